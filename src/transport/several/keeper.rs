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
    dial: Option<Dial>,
    /// Of the connector's TLS configurations the last one known of, and when connections of earlier ones are replaced.
    tls: u64,
    renewal: Option<Instant>,
    /// Attempts that failed in a row, and until when there is no new one.
    failures: u32,
    pause: Option<Instant>,
}

/// The one attempt that is under way.
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
        dial: None,
        // Another may be in force since the first connection was begun.
        tls: set.open.load().iter().map(|m| m.tls).min().unwrap_or(0),
        renewal: None,
        connector,
        failures: 0,
        pause: None,
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
                set.prune();
                if self.common.is_sealed() {
                    return;
                }
                self.decide(&set, std::mem::take(&mut crowd))
            };
            let heard = self.common.hears_of_crowds();
            let dialled = async {
                match &mut self.dial {
                    Some(dial) => (&mut dial.attempt).await,
                    None => std::future::pending().await,
                }
            };
            let look_again = async {
                match next {
                    Some(next) => time::sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                result = dialled => self.dialled(result),
                () = self.common.news() => crowd = heard && !self.common.hears_of_crowds(),
                () = look_again => {}
                () = self.connector.tls_changed(self.tls) => {
                    self.tls = self.connector.tls_number();
                    let at = Instant::now() + RENEWAL.mul_f64(fastrand::f64());
                    self.renewal = Some(self.renewal.map_or(at, |before| before.min(at)));
                }
            }
        }
    }

    /// Begins what is to be done, and returns when to look again.
    fn decide(&mut self, set: &Set, crowd: bool) -> Option<Instant> {
        let now = Instant::now();
        if self.pause.is_some_and(|pause| pause <= now) {
            self.pause = None;
            // Those who still wait look again, and say so.
            self.common.slot_free.notify_waiters();
        }
        let open = set.open.load();
        let seen = Seen {
            connections: open.len(),
            streams: open.iter().map(|m| m.connection.streams()).sum(),
            streams_each: open
                .iter()
                .map(|m| m.connection.core.most_streams())
                .min()
                .unwrap_or(0),
            // Those who found it so sleep; if there is room by now, it is theirs.
            full: self.common.take_full() && open.iter().all(|m| !m.connection.core.has_slot()),
        };
        if open.iter().all(|member| member.tls >= self.tls) {
            self.renewal = None;
        }
        let outdated = |member: &Member| self.renewal.filter(|_| member.tls < self.tls);
        let due = open
            .iter()
            .filter_map(|m| Some((earlier(m.due, outdated(m))?, &m.connection.core)))
            .min_by_key(|(due, _)| *due);
        let mut next = due.map(|(due, _)| due).filter(|due| *due > now);
        let free = self.dial.is_none() && self.pause.is_none();
        match self.sizing.look(seen, crowd && free, now) {
            Need::More => self.begin(None),
            Need::Fewer => {
                if let Some(least) = open.iter().min_by_key(|m| m.connection.streams()) {
                    let core = least.connection.core.clone();
                    drop(open);
                    set.replace(&core, None);
                    core.leave(|| "fewer connections would do".to_owned());
                    // Look again, at what is there now.
                    return Some(now);
                }
            }
            Need::Same(look) => next = earlier(next, look),
        }
        if free && self.sizing.minds_crowds(seen.connections) {
            match crowd {
                // What was none is not told again at once: each call might.
                true => next = earlier(next, Some(now + CALM)),
                false => self.common.hear_of_crowds(),
            }
        }
        if let Some((due, core)) = due
            && due <= now
        {
            self.begin(Some(core.clone()));
        }
        // What was put off is looked at when its time has come.
        earlier(next, self.pause)
    }

    fn begin(&mut self, replaces: Option<Arc<Core>>) {
        if self.dial.is_some() || self.pause.is_some() {
            return;
        }
        let (connector, common) = (self.connector.clone(), self.common.clone());
        let tls = connector.tls_number();
        let attempt = async move {
            let open = connector.open(&common);
            // Resolvers and dialers of one's own may panic.
            match time::timeout(ATTEMPT, AssertUnwindSafe(open).catch_unwind()).await {
                Ok(Ok(result)) => result,
                Ok(Err(_panic)) => Err(failed("the connector panicked")),
                Err(_elapsed) => Err(failed(format!("not connected within {ATTEMPT:?}"))),
            }
        };
        self.dial = Some(Dial {
            replaces,
            tls,
            attempt: Box::pin(attempt),
        });
    }

    fn dialled(&mut self, result: Result<Connection, Error>) {
        let Some(Dial { replaces, tls, .. }) = self.dial.take() else {
            return;
        };
        match (result, self.set.upgrade()) {
            (_, None) => {}
            (Ok(connection), Some(set)) => {
                self.failures = 0;
                self.pause = None;
                let new = Member::new(connection, &self.connector, tls);
                tracing::debug!(address = %self.common.to.address, replaces = replaces.is_some(), "another connection is open");
                match replaces {
                    Some(old) => {
                        set.replace(&old, Some(new));
                        old.leave(|| "another has taken its place".to_owned());
                    }
                    None => set.add(new),
                }
                // Who waits for a stream finds some.
                self.common.slot_free.notify_waiters();
            }
            (Err(why), Some(_)) => {
                tracing::debug!(address = %self.common.to.address, error = %why, "another connection could not be opened");
                self.pause = Some(Instant::now() + Backoff::default().delay(self.failures));
                self.failures = self.failures.saturating_add(1);
            }
        }
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
