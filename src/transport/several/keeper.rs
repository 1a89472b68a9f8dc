//! The task beside the connections to one peer: opens another, puts a new one in the place of an old one, closes one
//! that is not needed.
//!
//! It keeps none of them open: when the last handle is dropped, or no connection takes calls any more, it ends. What is
//! over is not begun anew here: whoever made the first one does so, with the backoff that it has.

use std::{
    future::Future,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::{Arc, Weak},
    time::Duration,
};

use futures_util::FutureExt as _;
use tokio::time::{self, Instant};

use super::{
    Member, Set,
    size::{Need, Seen, Sizing},
};
use crate::{
    Backoff,
    endpoint::{step, turn::in_turn},
    error::{BoxError, Error, Kind},
    transport::{Connection, Connector, common::Common, core::Core},
};

/// How long one attempt may take: as long as gRPC's.
const ATTEMPT: Duration = Duration::from_secs(20);

/// Over how long it is spread that connections are replaced because of other certificates: a thousand handshakes are a
/// second of processor time on each side.
const RENEWAL: Duration = Duration::from_secs(5);

/// How long nothing is heard of crowds after one that was none.
const CALM: Duration = Duration::from_millis(5);

struct Keeper {
    set: Weak<Set>,
    common: Arc<Common>,
    connector: Connector,
    sizing: Sizing,
    /// To have one more, and to put one in the place of another: neither waits for the other.
    growth: Attempts,
    renewal: Attempts,
    /// At the last look there was room again where a call had found none.
    was_full: bool,
    /// Of the connector's TLS configurations the last one known of, and when connections of earlier ones are replaced.
    tls: u64,
    tls_due: Option<Instant>,
}

/// Attempts for one purpose, one at a time.
#[derive(Default)]
struct Attempts {
    dial: Option<Dial>,
    /// How many failed in a row, and until when there is no new one.
    failures: u32,
    pause: Option<Instant>,
}

/// An attempt that is under way.
struct Dial {
    /// In whose place.
    replaces: Option<Arc<Core>>,
    tls: u64,
    attempt: Pin<Box<dyn Future<Output = Result<Connection, Error>> + Send>>,
}

/// To be spawned where the connections run.
pub(super) fn run(
    set: &Arc<Set>,
    connector: Connector,
) -> impl Future<Output = ()> + Send + 'static {
    Keeper {
        set: Arc::downgrade(set),
        common: set.common.clone(),
        sizing: Sizing::new(connector.size),
        growth: Attempts::default(),
        renewal: Attempts::default(),
        was_full: false,
        // Another may be in force since the first connection was begun.
        tls: set.open.load().iter().map(|m| m.tls).min().unwrap_or(0),
        tls_due: None,
        connector,
    }
    .run()
}

// === impl Keeper ===

impl Keeper {
    async fn run(mut self) {
        let mut crowd = false;
        loop {
            let next = {
                let Some(set) = self.set.upgrade() else {
                    return;
                };
                let over = self.common.is_sealed() || self.common.identity.is_denied();
                // Also then: what is not let go of here stays open until the last handle is dropped.
                set.prune();
                if over {
                    // Whoever waits for a stream hears of it.
                    self.common.slot_free.notify_waiters();
                    return;
                }
                self.decide(&set, std::mem::take(&mut crowd))
            };
            let heard = self.common.hears_of_crowds();
            let look_again = async {
                match next {
                    Some(next) => time::sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                dialled = self.growth.dialled() => self.dialled(dialled),
                dialled = self.renewal.dialled() => self.dialled(dialled),
                () = self.common.news() => crowd = heard && !self.common.hears_of_crowds(),
                () = look_again => {}
                _denied = self.common.identity.denied() => {}
                () = self.connector.tls_changed(self.tls) => self.tls_changed(),
            }
        }
    }

    /// Begins what is to be done, and returns when to look again.
    fn decide(&mut self, set: &Set, crowd: bool) -> Option<Instant> {
        let now = Instant::now();
        let open = set.open.load();
        // What is to take the place of one that has left by itself meanwhile is one more.
        let replaces = self.renewal.dial.as_ref();
        let replaces = replaces.and_then(|dial| dial.replaces.as_ref());
        let one_more = usize::from(replaces.is_some_and(|core| core.is_leaving()));
        let room = open.len() + one_more < self.connector.size.most;
        // Both are asked each time: what they say to be paused by has to be ahead.
        let (grows, renews) = (self.growth.may_begin(now), self.renewal.may_begin(now));
        let dials = !self.common.stays();
        if !dials {
            (self.growth.dial, self.renewal.dial) = (None, None);
        }
        let (grows, renews) = (grows && room && dials, renews && dials);
        // Where none can be had, it is not asked: who finds that so would wake this task each time.
        let told = grows && self.common.take_full();
        let full = told || std::mem::take(&mut self.was_full) || self.common.is_full();
        let has_room = open.iter().any(|m| m.connection.core.has_slot());
        let most_streams = |member: &Member| member.connection.core.most_streams();
        let seen = Seen {
            connections: open.len(),
            streams: open.iter().map(|m| m.connection.streams()).sum(),
            streams_each: open.iter().map(most_streams).min().unwrap_or(0),
            // Those who found it so sleep; if there is room by now, it is theirs. Where a peer allows none at all, it would
            // allow none on another.
            full: full && !has_room && open.iter().any(|m| most_streams(m) > 0),
        };
        if open.iter().all(|member| member.tls >= self.tls) {
            self.tls_due = None;
        }
        let outdated = |member: &Member| self.tls_due.filter(|_| member.tls < self.tls);
        let due = open
            .iter()
            .filter_map(|m| Some((earlier(m.due, outdated(m))?, &m.connection.core)))
            .min_by_key(|(due, _)| *due);
        let mut next = due.map(|(due, _)| due).filter(|due| *due > now);
        if told && has_room {
            // There may be more who sleep than there is room for, and they have said so.
            self.was_full = true;
            next = earlier(next, Some(now + CALM));
        }
        match self.sizing.look(seen, crowd && grows, now) {
            Need::More if grows => self.growth.begin(None, &self.connector, &self.common),
            // It stays full, and is looked at again when there may be another.
            Need::More => {}
            Need::Fewer => {
                let mut usable = open.iter().filter(|m| !m.connection.core.is_leaving());
                let (Some(one), Some(other)) = (usable.next(), usable.next()) else {
                    // Others are leaving by themselves.
                    return Some(now + CALM);
                };
                let least = [one, other].into_iter().chain(usable);
                if let Some(least) = least.min_by_key(|m| m.connection.streams()) {
                    let core = least.connection.core.clone();
                    drop(open);
                    // What was to take its place would be one too many again.
                    let renewed = self.renewal.dial.as_ref();
                    let renewed = renewed.and_then(|dial| dial.replaces.as_ref());
                    if renewed.is_some_and(|renewed| Arc::ptr_eq(renewed, &core)) {
                        self.renewal.dial = None;
                    }
                    set.replace(&core, None);
                    core.leave(|| "fewer connections would do".to_owned());
                    // Look again, at what is there now.
                    return Some(now);
                }
            }
            Need::Same(look) => next = earlier(next, look),
        }
        if grows && self.growth.dial.is_none() && self.sizing.minds_crowds(seen.connections) {
            match crowd {
                // What was none is not told again at once: each call might.
                true => next = earlier(next, Some(now + CALM)),
                false => self.common.hear_of_crowds(),
            }
        }
        if let Some((due, core)) = due
            && due <= now
            && renews
        {
            let core = Some(core.clone());
            self.renewal.begin(core, &self.connector, &self.common);
        }
        // What was put off is looked at when its time has come.
        earlier(next, earlier(self.growth.pause, self.renewal.pause))
    }

    /// Connections of earlier configurations are replaced within [`RENEWAL`]. What failed with the earlier one says nothing
    /// of this.
    fn tls_changed(&mut self) {
        self.tls = self.connector.tls_number();
        let at = Instant::now() + RENEWAL.mul_f64(fastrand::f64());
        self.tls_due = Some(self.tls_due.map_or(at, |before| before.min(at)));
        self.growth.forget();
        self.renewal.forget();
    }

    fn dialled(&mut self, (dial, result): (Dial, Result<Connection, Error>)) {
        let Some(set) = self.set.upgrade() else {
            return;
        };
        let address = &self.common.to.address;
        let (attempts, replaces) = match &dial.replaces {
            Some(_) => (&mut self.renewal, true),
            None => (&mut self.growth, false),
        };
        match result {
            Ok(connection) => {
                attempts.forget();
                tracing::debug!(%address, replaces, "another connection is open");
                let new = Member::new(connection, &self.connector, dial.tls);
                match dial.replaces {
                    Some(old) => {
                        set.replace(&old, Some(new));
                        old.leave(|| "another has taken its place".to_owned());
                    }
                    None => set.add(new),
                }
                // Who waits for a stream finds some.
                self.common.slot_free.notify_waiters();
            }
            Err(why) => {
                tracing::debug!(%address, replaces, error = %why, "another connection could not be opened");
                attempts.failed();
                if !replaces {
                    // Those who wait for one still do, and do not say so twice.
                    self.common.stays_full();
                }
            }
        }
    }
}

// === impl Attempts ===

impl Attempts {
    /// Whether there is none, and none has failed just now.
    fn may_begin(&mut self, now: Instant) -> bool {
        self.pause = self.pause.filter(|pause| *pause > now);
        self.dial.is_none() && self.pause.is_none()
    }

    fn begin(&mut self, replaces: Option<Arc<Core>>, connector: &Connector, common: &Arc<Common>) {
        let (connector, common) = (connector.clone(), common.clone());
        let tls = connector.tls_number();
        let attempt = async move {
            let turn = connector.turn();
            // Resolvers and dialers of one's own may panic. It has its time from when it has its turn.
            let open = AssertUnwindSafe(connector.open(&common)).catch_unwind();
            match in_turn(turn, async { step::within(ATTEMPT, open).await }).await {
                Ok(Ok(result)) => result,
                Ok(Err(_panic)) => Err(failed("the connector panicked")),
                Err(too_late) => Err(failed(too_late)),
            }
        };
        self.dial = Some(Dial {
            replaces,
            tls,
            attempt: Box::pin(attempt),
        });
    }

    /// The one that is under way, when it has ended; never if there is none. Cancel safe.
    async fn dialled(&mut self) -> (Dial, Result<Connection, Error>) {
        let Some(dial) = &mut self.dial else {
            return std::future::pending().await;
        };
        let result = (&mut dial.attempt).await;
        match self.dial.take() {
            Some(dial) => (dial, result),
            None => std::future::pending().await,
        }
    }

    fn failed(&mut self) {
        self.pause = Some(Instant::now() + Backoff::default().delay(self.failures));
        self.failures = self.failures.saturating_add(1);
    }

    fn forget(&mut self) {
        self.failures = 0;
        self.pause = None;
    }
}

// === impl Set ===

impl Set {
    /// Lets go of those that take no new calls: each closes as its last call ends.
    fn prune(&self) {
        let open = self.open.load();
        let stays = |member: &&Member| !member.connection.core.is_leaving();
        if open.iter().all(|member| stays(&member)) {
            return;
        }
        let stay = open.iter().filter(stays).cloned().collect();
        self.open.store(Arc::new(stay));
    }

    fn add(&self, new: Member) {
        let mut members = Vec::clone(&self.open.load());
        members.push(new);
        self.open.store(Arc::new(members));
    }

    /// Takes this one out, and puts another in its place.
    fn replace(&self, old: &Arc<Core>, new: Option<Member>) {
        let open = self.open.load();
        let others = open
            .iter()
            .filter(|member| !Arc::ptr_eq(&member.connection.core, old));
        let members = others.cloned().chain(new).collect();
        self.open.store(Arc::new(members));
    }
}

fn earlier(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}

fn failed(why: impl Into<BoxError>) -> Error {
    Error::new(Kind::ConnectionLost).with_source(why)
}

#[cfg(test)]
mod tests {
    use arc_swap::ArcSwap;
    use http::HeaderMap;

    use super::*;

    /// The keeper of connections of which there are none, so that nothing but its attempts gives it something to do.
    fn keeper() -> (Keeper, Arc<Set>) {
        let connector = Connector::new();
        let to = connector.dialer.destination("127.0.0.1:1").unwrap();
        let common = Arc::new(Common::new(to, HeaderMap::new(), &connector));
        let set = Arc::new(Set {
            open: ArcSwap::default(),
            common: common.clone(),
        });
        let keeper = Keeper {
            set: Arc::downgrade(&set),
            common,
            sizing: Sizing::new(connector.size),
            growth: Attempts::default(),
            renewal: Attempts::default(),
            was_full: false,
            tls: 0,
            tls_due: None,
            connector,
        };
        (keeper, set)
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_after_a_failure_is_waited_for_once() {
        for which in [0, 1] {
            let (mut keeper, set) = keeper();
            // Given an attempt that failed
            let attempts = match which {
                0 => &mut keeper.growth,
                _ => &mut keeper.renewal,
            };
            attempts.failed();
            let over = attempts.pause.expect("it pauses");
            // Then it looks again when its pause is over
            assert_eq!(keeper.decide(&set, false), Some(over));
            // And when it is, for whatever reason it looks, it is not over again: that would be now, each time.
            time::sleep_until(over).await;
            for _ in 0..3 {
                let next = keeper.decide(&set, false);
                assert!(next.is_none_or(|next| next > Instant::now()), "{next:?}");
            }
        }
    }
}
