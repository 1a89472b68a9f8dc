//! The pool as callers see it: a `Clone` service that picks in `call`.
//!
//! The fast path is one snapshot load, one pick, one guard, one clone of the endpoint's service, and
//! its call: no lock, no allocation, no wait. Everything else is the slow path, in the response future.

use std::{
    fmt,
    future::Future,
    marker::PhantomData,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
};

use arc_swap::ArcSwap;
use pin_project_lite::pin_project;
use tokio::{
    sync::{Notify, futures::OwnedNotified},
    time::Sleep,
};
use tower_service::Service;

use super::{
    PoolConfig,
    protocol::{Call, Http, Instance, Protocol},
    snapshot::{Phase, Ready, Resolution, Snapshot},
};
use crate::error::{BoxError, Error, Kind};

/// The balanced set of a role's endpoints, as a tower service.
///
/// `poll_ready` is always ready and `call` picks, so a clone needs no readiness of its own and no
/// `Buffer` is needed to share a pool: clone it, an `Arc` clone, wherever a call is made.
///
/// A call that finds no ready endpoint waits while the role is not resolved yet, while an endpoint is
/// making its first attempt, or if it asked to ([`WaitForReady`](super::WaitForReady)), but no longer than
/// [`PoolConfig::max_wait`]; otherwise it fails at once.
///
/// # Errors
///
/// [`Error`], of kind [`Kind::NoSession`], [`Kind::UnknownPeer`], [`Kind::NotConnected`],
/// [`Kind::RegistryUnreachable`] or [`Kind::Stopped`] when the call went nowhere, all *unsent*; otherwise what
/// the endpoint's service returned, with the peer's name.
///
/// # Cancellation
///
/// Dropping the response future, or the response body, ends the call and gives its load back. Dropping
/// the last clone of the pool ends its tasks, and its connections as their last call ends.
pub struct Pool<S, P = Http> {
    inner: Arc<Inner<S>>,
    pinned: Option<Instance>,
    protocol: PhantomData<fn() -> P>,
}

/// What all clones of a pool share. Dropping it ends the driver.
pub(super) struct Inner<S> {
    pub(super) shared: Arc<Shared<S>>,
    pub(super) driver: super::Handle,
}

/// Where the driver's route and the calls' route meet.
pub(crate) struct Shared<S> {
    pub(crate) role: Arc<str>,
    pub(crate) config: PoolConfig,
    pub(crate) snapshot: ArcSwap<Snapshot<S>>,
    /// Woken, all of it, after each new snapshot.
    pub(crate) changed: Arc<Notify>,
}

pin_project! {
    /// The response of a [`Pool`].
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<S, Req, P = Http>
    where
        S: Service<Req>,
    {
        #[pin]
        state: State<S, Req, S::Future>,
        protocol: PhantomData<fn() -> P>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<S, Req, F> {
        // The endpoint has the call.
        Calling {
            #[pin]
            response: F,
            call: Option<Call>,
        },
        // Boxed, for the fast path would carry it as dead weight.
        Slow {
            slow: Box<Slow<S, Req>>,
        },
    }
}

/// A call that was not picked for, or not taken, at once.
struct Slow<S, Req> {
    inner: Arc<Inner<S>>,
    pinned: Option<Instance>,
    wait_for_ready: bool,
    // Until an endpoint has it.
    request: Option<Req>,
    picked: Option<Picked<S>>,
    changed: Pin<Box<OwnedNotified>>,
    time_up: Pin<Box<Sleep>>,
}

/// An endpoint's service which is not ready yet.
struct Picked<S> {
    service: S,
    call: Call,
    ready: Arc<Ready<S>>,
}

/// Why there was no pick.
enum Unpicked {
    /// Something may change: sleep until it does.
    Wait,
    Fail(Error),
}

// === impl Pool ===

impl<S, P> Pool<S, P> {
    pub(super) fn from_inner(inner: Inner<S>) -> Self {
        Self {
            inner: Arc::new(inner),
            pinned: None,
            protocol: PhantomData,
        }
    }

    /// This pool with all calls pinned to one instance: they go there or fail.
    ///
    /// A request's own [`Instance`] extension goes before it.
    #[must_use]
    pub fn to(&self, instance: impl Into<Instance>) -> Self {
        Self {
            inner: self.inner.clone(),
            pinned: Some(instance.into()),
            protocol: PhantomData,
        }
    }

    /// The role whose endpoints these are.
    pub fn role(&self) -> &str {
        &self.inner.shared.role
    }

    /// Ends it: calls in flight end as `CANCELLED` where their connections can be closed, later calls
    /// fail with [`Kind::Stopped`], all tasks end. Returns when they have, or after two seconds.
    ///
    /// Cancel safe: the stop goes on without its waiter. Stopping twice is stopping once.
    pub async fn stop(&self) {
        self.inner.driver.stop().await;
    }

    /// Whether its driver is there still: it ends when it is stopped, and with its runtime.
    #[cfg(feature = "etcd")]
    pub(crate) fn is_running(&self) -> bool {
        self.inner.driver.is_running()
    }

    pub(crate) fn role_arc(&self) -> Arc<str> {
        self.inner.shared.role.clone()
    }

    #[cfg(feature = "manager")]
    pub(crate) fn runtime(&self) -> &tokio::runtime::Handle {
        self.inner.driver.runtime()
    }

    pub(crate) fn snapshot(&self) -> Arc<Snapshot<S>> {
        self.inner.shared.snapshot.load_full()
    }
}

impl<S, P, Req> Service<Req> for Pool<S, P>
where
    S: Service<Req> + Clone,
    S::Error: Into<BoxError>,
    P: Protocol<Req, S::Response>,
{
    type Response = P::Response;
    type Error = Error;
    type Future = ResponseFuture<S, Req, P>;

    #[inline]
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    #[inline]
    fn call(&mut self, request: Req) -> Self::Future {
        let options = P::options(&request);
        let instance = options.instance.or(self.pinned.as_ref());
        let snapshot = self.inner.shared.snapshot.load();
        if let Some(ready) = snapshot.pick(instance) {
            let mut service = ready.service.clone();
            // Most services are ready at once; one that is not is polled again with a real waker.
            match service.poll_ready(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(Ok(())) => {
                    let call = Call {
                        guard: ready.load.acquire(),
                    };
                    return ResponseFuture::new(State::Calling {
                        response: service.call(request),
                        call: Some(call),
                    });
                }
                Poll::Ready(Err(_)) => ready.mark_down(),
                Poll::Pending => {}
            }
        }
        drop(snapshot);
        let config = &self.inner.shared.config;
        let slow = Box::new(Slow {
            inner: self.inner.clone(),
            pinned: instance.cloned(),
            wait_for_ready: options.wait_for_ready.unwrap_or(config.wait_for_ready),
            request: Some(request),
            picked: None,
            changed: self.inner.shared.interest(),
            time_up: self.inner.driver.sleep(config.max_wait),
        });
        ResponseFuture::new(State::Slow { slow })
    }
}

impl<S, P> Clone for Pool<S, P> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            pinned: self.pinned.clone(),
            protocol: PhantomData,
        }
    }
}

impl<S, P> fmt::Debug for Pool<S, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("role", &self.inner.shared.role)
            .field("pinned", &self.pinned)
            .field("snapshot", &self.inner.shared.snapshot.load())
            .finish()
    }
}

// === impl Shared ===

impl<S> Shared<S> {
    pub(super) fn new(role: Arc<str>, config: PoolConfig) -> Self {
        Self {
            role,
            config,
            snapshot: ArcSwap::from_pointee(Snapshot::empty()),
            changed: Arc::new(Notify::new()),
        }
    }

    /// Registers interest in the next snapshot: from here on none is missed, even before the first poll.
    fn interest(&self) -> Pin<Box<OwnedNotified>> {
        let mut changed = Box::pin(self.changed.clone().notified_owned());
        changed.as_mut().enable();
        changed
    }

    /// Why no endpoint could be picked from this snapshot, and whether it is worth waiting.
    fn unpicked(
        &self,
        snapshot: &Snapshot<S>,
        pinned: Option<&Instance>,
        patient: bool,
    ) -> Unpicked {
        let error = match &snapshot.resolution {
            Resolution::Stopped => {
                return Unpicked::Fail(Error::new(Kind::Stopped).with_role(&self.role));
            }
            Resolution::Pending => return Unpicked::Wait,
            Resolution::Failed(why) => {
                Error::new(Kind::RegistryUnreachable).with_shared_source(why.clone())
            }
            Resolution::Known { .. } => match pinned {
                Some(instance) => match snapshot.all.get(&instance.0) {
                    None => Error::new(Kind::UnknownPeer)
                        .with_reason(format!("instance {instance} is not registered")),
                    // It went down a moment ago, and its endpoint is about to say what comes next.
                    Some(entry) if entry.ready.is_some() => return Unpicked::Wait,
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
    fn waited(&self, snapshot: &Snapshot<S>, pinned: Option<&Instance>) -> Error {
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

// === impl ResponseFuture ===

impl<S: Service<Req>, Req, P> ResponseFuture<S, Req, P> {
    fn new(state: State<S, Req, S::Future>) -> Self {
        Self {
            state,
            protocol: PhantomData,
        }
    }

    /// An error from outside, such as a deadline, with what is known here of where the call is.
    #[cfg(feature = "manager")]
    pub(crate) fn explain(&self, error: Error) -> Error {
        match &self.state {
            State::Calling {
                call: Some(call), ..
            } => error.with_peer(&Arc::new(call.peer().clone())),
            State::Calling { call: None, .. } => error,
            State::Slow { slow } => {
                let shared = &slow.inner.shared;
                let waiting = shared.waited(&shared.snapshot.load(), slow.pinned.as_ref());
                error
                    .with_role(&shared.role)
                    .with_sent(crate::Sent::Unsent)
                    .with_source(waiting)
            }
        }
    }
}

impl<S, Req, P> Future for ResponseFuture<S, Req, P>
where
    S: Service<Req> + Clone,
    S::Error: Into<BoxError>,
    P: Protocol<Req, S::Response>,
{
    type Output = Result<P::Response, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            match this.state.as_mut().project() {
                StateProj::Calling { response, call } => {
                    let result = ready!(response.poll(cx));
                    let Some(call) = call.take() else {
                        return Poll::Ready(Err(
                            Error::new(Kind::Internal).with_reason("polled after it was ready")
                        ));
                    };
                    return Poll::Ready(match result {
                        Ok(response) => Ok(P::track(response, call)),
                        Err(error) => {
                            let error = Error::from_service(error.into());
                            Err(match error.peer() {
                                Some(_) => error,
                                None => error.with_peer(&Arc::new(call.peer().clone())),
                            })
                        }
                    });
                }
                // Slow => (Calling | failed)
                StateProj::Slow { slow } => {
                    let (response, call) = ready!(slow.poll_call(cx))?;
                    this.state.set(State::Calling {
                        response,
                        call: Some(call),
                    });
                }
            }
        }
    }
}

impl<S: Service<Req>, Req, P> fmt::Debug for ResponseFuture<S, Req, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &self.state {
            State::Calling { call, .. } => format!("calling {call:?}"),
            State::Slow { slow } => match &slow.picked {
                Some(picked) => format!("waiting until {:?} is ready", picked.call),
                None => "waiting for an endpoint".to_owned(),
            },
        };
        f.debug_tuple("ResponseFuture").field(&state).finish()
    }
}

// === impl Slow ===

impl<S, Req> Slow<S, Req>
where
    S: Service<Req> + Clone,
    S::Error: Into<BoxError>,
{
    /// An endpoint has the call, or there is none and waiting is over.
    fn poll_call(&mut self, cx: &mut Context<'_>) -> Poll<Result<(S::Future, Call), Error>> {
        loop {
            // Picked => (called | looking | failed)
            if let Some(picked) = &mut self.picked {
                match picked.service.poll_ready(cx) {
                    Poll::Ready(Ok(())) => {
                        let (Some(mut picked), Some(request)) =
                            (self.picked.take(), self.request.take())
                        else {
                            return Poll::Ready(Err(
                                Error::new(Kind::Internal).with_reason("polled after it was ready")
                            ));
                        };
                        return Poll::Ready(Ok((picked.service.call(request), picked.call)));
                    }
                    Poll::Ready(Err(_)) => picked.ready.mark_down(),
                    Poll::Pending => {
                        if self.time_up.as_mut().poll(cx).is_ready() {
                            let bound = self.inner.shared.config.max_wait;
                            return Poll::Ready(Err(Error::new(Kind::NotConnected)
                                .with_reason(format!("the endpoint was busy for {bound:?}"))
                                .with_peer(&Arc::new(picked.call.peer().clone()))));
                        }
                        // The set changed: this endpoint may be gone, or another free.
                        ready!(self.changed.as_mut().poll(cx));
                        self.changed = self.inner.shared.interest();
                    }
                }
                self.picked = None;
            }

            // Looking => (Picked | waiting | failed). Interest is registered before the look.
            let snapshot = self.inner.shared.snapshot.load();
            if let Some(ready) = snapshot.pick(self.pinned.as_ref()) {
                self.picked = Some(Picked {
                    service: ready.service.clone(),
                    call: Call {
                        guard: ready.load.acquire(),
                    },
                    ready: ready.clone(),
                });
                continue;
            }
            let shared = &self.inner.shared;
            match shared.unpicked(&snapshot, self.pinned.as_ref(), self.wait_for_ready) {
                Unpicked::Fail(error) => return Poll::Ready(Err(error)),
                Unpicked::Wait => {}
            }
            // Waiting => (looking | failed)
            if self.time_up.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err(shared.waited(&snapshot, self.pinned.as_ref())));
            }
            drop(snapshot);
            ready!(self.changed.as_mut().poll(cx));
            self.changed = self.inner.shared.interest();
        }
    }
}
