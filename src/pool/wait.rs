//! The slow path of a call: waiting for an endpoint that is ready, and failing when that is no use.
//!
//! Order matters: register interest in the next snapshot, look at this one, and only then sleep. So nothing
//! that happens between the look and the sleep is missed.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{sync::futures::OwnedNotified, task::coop, time::Instant};
use tower_service::Service;

use super::{
    Avoid,
    interest::Held,
    limits::{Full, Places},
    protocol::{Call, InstanceId, Protocol},
    service::{Inner, Shared},
    snapshot::{Phase, Resolution, Snapshot},
};
use crate::{
    endpoint::{limiter::Place, ready::Ready},
    error::{BoxError, Error, Kind},
    waiters::timed::Pause,
};

/// How many endpoints that are not ready for a call it waits for at a time.
const CANDIDATES: usize = 4;

/// How many others it looks at when those are busy: not at all of a large pool, for each of many calls that wait.
const OTHERS: usize = 16;

/// How long a call waits for those, until it looks whether another is free: this long first, then longer and longer.
const SOON: Duration = Duration::from_millis(20);
const LATE: Duration = Duration::from_secs(1);

/// A request is told of a wait that was longer.
const TOLD: Duration = Duration::from_millis(1);

/// A call that was not picked for, or not taken, at once.
pub(super) struct Slow<S, Req> {
    inner: Arc<Inner<S>>,
    pinned: Option<InstanceId>,
    patient: bool,
    avoid: Option<Avoid>,
    // Until an endpoint has it.
    request: Option<Req>,
    candidates: Vec<Candidate<S>>,
    changed: Pin<Box<OwnedNotified>>,
    time_up: Pause,
    /// When it looks for others than its candidates, if there are any, and how long after that again.
    look: Option<Pause>,
    pause: Duration,
    began: Instant,
    /// Among those that may wait, once it has to.
    place: Option<Place>,
    /// A pool that somebody waits for is not idle.
    _held: Held,
}

/// What a call says of whom it waits for.
pub(super) struct Waiting {
    pub(super) pinned: Option<InstanceId>,
    pub(super) patient: Option<bool>,
    pub(super) avoid: Option<Avoid>,
}

/// An endpoint whose service was not ready at the last look.
struct Candidate<S> {
    service: S,
    ready: Arc<Ready<S>>,
}

/// Why there was no pick.
enum Unpicked {
    /// Something may change: sleep until it does.
    Wait,
    Fail(Error),
}

// === impl Slow ===

impl<S, Req> Slow<S, Req> {
    pub(super) fn new(inner: &Arc<Inner<S>>, waiting: Waiting, request: Req) -> Self {
        let config = &inner.shared.config;
        Self {
            inner: inner.clone(),
            pinned: waiting.pinned,
            patient: waiting.patient.unwrap_or(config.wait_for_ready),
            avoid: waiting.avoid,
            request: Some(request),
            candidates: Vec::new(),
            changed: inner.shared.next_change(),
            time_up: inner.driver.sleep(config.max_wait),
            look: None,
            pause: SOON,
            place: None,
            began: Instant::now(),
            _held: inner.shared.interest.hold(),
        }
    }

    /// An error from outside, such as a deadline, with what was waited for.
    #[cfg(feature = "manager")]
    pub(super) fn explain(&self, error: Error) -> Error {
        error
            .with_role(&self.inner.shared.role)
            .with_sent(crate::Sent::Unsent)
            .with_source(self.waited())
    }

    /// The error of a call that has waited for as long as it may.
    fn waited(&self) -> Error {
        let shared = &self.inner.shared;
        match self.candidates.first() {
            Some(candidate) => Error::new(Kind::Busy)
                .with_reason("it has no room for another call")
                .with_peer(&Arc::new(candidate.ready.load.of().clone())),
            None => shared.waited(&shared.snapshot.load(), self.pinned.as_ref()),
        }
    }
}

impl<S, Req> Slow<S, Req>
where
    S: Service<Req> + Clone,
    S::Error: Into<BoxError>,
{
    /// An endpoint has the call, or there is none and waiting is over.
    pub(super) fn poll_call<P>(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(S::Future, Call), Error>>
    where
        P: Protocol<Req, S::Response>,
    {
        loop {
            // Looking => (called | waiting | failed)
            let is_first_look = self.candidates.is_empty();
            if is_first_look {
                let snapshot = self.inner.shared.snapshot.load();
                let found: Vec<_> = match &self.avoid {
                    Some(avoid) if self.pinned.is_none() => avoid.candidates(&snapshot, CANDIDATES),
                    _ => {
                        let found = snapshot.candidates(self.pinned.as_ref(), CANDIDATES);
                        found.collect()
                    }
                };
                self.candidates
                    .extend(found.into_iter().map(Candidate::new));
                if self.candidates.is_empty() {
                    let shared = &self.inner.shared;
                    match shared.unpicked(&snapshot, self.pinned.as_ref(), self.patient) {
                        Unpicked::Fail(error) => {
                            ready!(in_turn(cx));
                            return Poll::Ready(Err(error));
                        }
                        Unpicked::Wait => {}
                    }
                }
            }
            let (found, mut n) = (self.candidates.len(), 0);
            let mut full = None;
            while let Some(candidate) = self.candidates.get_mut(n) {
                match candidate.service.poll_ready(cx) {
                    Poll::Ready(Ok(())) => {
                        let limits = &self.inner.shared.limits;
                        let places = match limits.admit(&candidate.ready, std::iter::empty) {
                            Ok((_, places)) => places,
                            Err(is_full) => {
                                full = Some((is_full, self.candidates.remove(n).ready));
                                continue;
                            }
                        };
                        let candidate = self.candidates.swap_remove(n);
                        return Poll::Ready(self.hand_over::<P>(candidate, places));
                    }
                    Poll::Ready(Err(_)) => {
                        candidate.ready.mark_down("it takes no new calls");
                        self.candidates.swap_remove(n);
                    }
                    Poll::Pending => n += 1,
                }
            }
            if let Some((is_full, whose)) = &full {
                // One that was not among the few may have room.
                match self.elsewhere(cx, Some(*is_full)) {
                    Ok(Some((candidate, places))) => {
                        return Poll::Ready(self.hand_over::<P>(candidate, places));
                    }
                    Err(is_full) if is_full == Full::Role || self.candidates.is_empty() => {
                        ready!(in_turn(cx));
                        let shared = &self.inner.shared;
                        let pinned = self.pinned.as_ref().map(|_| whose.load.of());
                        let error = shared.limits.refuse(is_full, &shared.role, pinned);
                        return Poll::Ready(Err(error));
                    }
                    // Those that are left are waited for. Nobody tells when one that was full has room again.
                    Ok(None) | Err(_) => self.look_later(),
                }
            }
            // The few are busy: one that is not among them may be free.
            if full.is_none() && is_first_look && !self.candidates.is_empty() {
                match self.elsewhere(cx, None) {
                    Ok(Some((candidate, places))) => {
                        return Poll::Ready(self.hand_over::<P>(candidate, places));
                    }
                    // These have no waker of this call.
                    Ok(None) => self.look_later(),
                    // Nor have these, which are full.
                    Err(_) if self.has_others() => self.look_later(),
                    Err(_) => {}
                }
            }
            if found > 0 && self.candidates.is_empty() {
                // They went down, and are passed by at the next look.
                continue;
            }
            if self.place.is_none() {
                let shared = &self.inner.shared;
                self.place = shared.limits.wait();
                if self.place.is_none() {
                    ready!(in_turn(cx));
                    return Poll::Ready(Err(shared.limits.refuse_to_wait(&shared.role)));
                }
            }
            // Waiting => (looking | failed). For the candidates, which have the waker, for the next
            // snapshot, or for the end of patience.
            if self.time_up.poll(cx).is_ready() {
                return Poll::Ready(Err(self.waited()));
            }
            let is_time = match &mut self.look {
                Some(look) => look.poll(cx).is_ready(),
                None => false,
            };
            match is_time {
                true => self.pause = LATE.min(2 * self.pause),
                false => {
                    ready!(self.changed.as_mut().poll(cx));
                    self.changed = self.inner.shared.next_change();
                }
            }
            self.look = None;
            self.candidates.clear();
        }
    }

    /// Another that has room, where those that were looked at are full or busy. It is here, or among the candidates if none is
    /// ready yet.
    fn elsewhere(
        &mut self,
        cx: &mut Context<'_>,
        full: Option<Full>,
    ) -> Result<Option<(Candidate<S>, Places)>, Full> {
        if full == Some(Full::Role) {
            return Err(Full::Role);
        }
        let shared = &self.inner.shared;
        let snapshot = shared.snapshot.load();
        let waited_for = |ready: &Arc<Ready<S>>| {
            let mut waited_for = self.candidates.iter();
            waited_for.any(|candidate| Arc::ptr_eq(&candidate.ready, ready))
        };
        let others = snapshot.others(self.pinned.as_ref(), self.avoid.as_ref());
        let mut busy = None;
        // Whoever is busy is waited for rather than tried where the call has just failed.
        let avoid = self.avoid.as_ref().filter(|_| full.is_none());
        let failed = |ready: &Arc<Ready<S>>| avoid.is_some_and(|avoid| avoid.is_last(ready));
        // A limit is none if it is not looked for everywhere.
        let most = if full.is_some() { usize::MAX } else { OTHERS };
        let others = others.filter(|other| !waited_for(other) && !failed(other));
        for other in others.take(most) {
            let places = match shared.limits.admit(other, std::iter::empty) {
                Ok((_, places)) => places,
                Err(Full::Role) => return Err(Full::Role),
                Err(Full::Peer) => continue,
            };
            let mut candidate = Candidate::new(other);
            match candidate.service.poll_ready(cx) {
                Poll::Ready(Ok(())) => return Ok(Some((candidate, places))),
                Poll::Ready(Err(_)) => other.mark_down("it takes no new calls"),
                Poll::Pending => {
                    busy.get_or_insert(candidate);
                }
            }
        }
        let busy = busy.ok_or(Full::Peer)?;
        self.candidates.push(busy);
        Ok(None)
    }

    /// It looks after a while whether one that it does not wait for has room.
    fn look_later(&mut self) {
        if self.look.is_none() {
            // Not all at once, who began to wait at once.
            let pause = self.pause.mul_f64(0.75 + 0.5 * fastrand::f64());
            self.look = Some(self.inner.driver.sleep(pause));
        }
    }

    /// Whether there are more that it may go to than it waits for.
    fn has_others(&self) -> bool {
        let ready = self.inner.shared.snapshot.load().ready.len();
        self.pinned.is_none() && ready > self.candidates.len()
    }

    /// An endpoint has the call.
    fn hand_over<P>(
        &mut self,
        candidate: Candidate<S>,
        places: Places,
    ) -> Result<(S::Future, Call), Error>
    where
        P: Protocol<Req, S::Response>,
    {
        let Candidate { mut service, ready } = candidate;
        let mut request = self.request.take().ok_or_else(polled_again)?;
        let waited = self.began.elapsed();
        if waited >= TOLD {
            let role = &self.inner.shared.role;
            P::waited(&mut request, waited).map_err(|error| error.with_role(role))?;
        }
        let call = Call {
            guard: ready.acquire(),
            _places: places,
        };
        if let Some(avoid) = &self.avoid {
            avoid.add(call.peer());
        }
        Ok((service.call(request), call))
    }
}

// === impl Candidate ===

impl<S: Clone> Candidate<S> {
    fn new(ready: &Arc<Ready<S>>) -> Self {
        Self {
            service: ready.service.clone(),
            ready: ready.clone(),
        }
    }
}

/// Lets others go first, once the caller's task has failed often enough without a pause. Whoever calls again at once
/// when a call has failed at once would otherwise never give its thread back, and what it waits for never come: the pool's
/// own driver may be what has no thread.
pub(crate) fn in_turn(cx: &mut Context<'_>) -> Poll<()> {
    ready!(coop::poll_proceed(cx)).made_progress();
    Poll::Ready(())
}

/// The error of a future that is polled after it was ready.
pub(super) fn polled_again() -> Error {
    Error::new(Kind::Internal).with_reason("polled after it was ready")
}

// === impl Shared ===

impl<S> Shared<S> {
    /// Registers interest in the next snapshot: from here on none is missed, even before the first poll.
    pub(crate) fn next_change(&self) -> Pin<Box<OwnedNotified>> {
        let mut changed = Box::pin(self.changed.clone().notified_owned());
        changed.as_mut().enable();
        changed
    }

    /// Returns when the pool has stopped.
    #[cfg(feature = "manager")]
    pub(crate) async fn stopped(self: Arc<Self>) {
        loop {
            // Interest first: nothing that happens after the look is missed.
            let changed = self.next_change();
            if matches!(self.snapshot.load().resolution, Resolution::Stopped(_)) {
                return;
            }
            changed.await;
        }
    }

    /// Why no endpoint could be picked from this snapshot, and whether it is worth waiting.
    fn unpicked(
        &self,
        snapshot: &Snapshot<S>,
        pinned: Option<&InstanceId>,
        patient: bool,
    ) -> Unpicked {
        let error = match &snapshot.resolution {
            Resolution::Stopped(why) => {
                let error = Error::new(Kind::Stopped).with_role(&self.role);
                return Unpicked::Fail(match why {
                    Some(why) => error.with_reason(*why),
                    None => error,
                });
            }
            Resolution::Pending => return Unpicked::Wait,
            Resolution::Failed(why) => {
                Error::new(Kind::RegistryUnreachable).with_shared_source(why.clone())
            }
            // As if each were connected for the first time.
            Resolution::Known { .. } if snapshot.asleep && snapshot.could_be_picked(pinned) => {
                self.interest.want();
                return Unpicked::Wait;
            }
            Resolution::Known { .. } => match pinned {
                Some(instance) => match snapshot.all.get(&instance.0) {
                    None => Error::new(Kind::UnknownPeer)
                        .with_reason(format!("instance {instance} is not registered")),
                    // It went down a moment ago, and its endpoint is about to say what comes next.
                    Some(entry) if entry.state.phase == Phase::Ready => return Unpicked::Wait,
                    Some(entry) if entry.state.phase == Phase::Connecting => return Unpicked::Wait,
                    Some(entry) => entry.unready(),
                },
                None if snapshot.all.len() == 0 => Error::new(Kind::NoSession),
                None if snapshot.ready.len() > 0 || snapshot.connecting > 0 => {
                    return Unpicked::Wait;
                }
                None => {
                    Error::new(Kind::NotConnected).unready(snapshot.all.len(), snapshot.troubles())
                }
            },
        };
        match patient {
            true => Unpicked::Wait,
            false => Unpicked::Fail(error.with_role(&self.role)),
        }
    }

    /// The error of a call that has waited for as long as it may.
    fn waited(&self, snapshot: &Snapshot<S>, pinned: Option<&InstanceId>) -> Error {
        let waited = format!("no endpoint was ready within {:?}", self.config.max_wait);
        match self.unpicked(snapshot, pinned, false) {
            Unpicked::Fail(error) => error,
            Unpicked::Wait if matches!(snapshot.resolution, Resolution::Pending) => {
                Error::new(Kind::RegistryUnreachable).with_reason(waited)
            }
            Unpicked::Wait if snapshot.all.len() > 0 => {
                match pinned.and_then(|instance| snapshot.all.get(instance.id())) {
                    Some(entry) => return entry.unready(),
                    None => Error::new(Kind::NotConnected)
                        .unready(snapshot.all.len(), snapshot.troubles()),
                }
            }
            Unpicked::Wait => Error::new(Kind::NotConnected).with_reason(waited),
        }
        .with_role(&self.role)
    }
}
