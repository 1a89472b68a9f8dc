//! What all connections to one peer have in common, and their life as one.

use std::{
    fmt,
    sync::{
        Arc, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use http::{HeaderMap, HeaderValue, uri::Scheme};
use tokio::{runtime, sync::Notify};
use tokio_util::sync::CancellationToken;

use super::{Connector, core::Core, dial::Destination, identity::Identity, polite::Polite};
use crate::{
    endpoint::{BoxFuture, Lifeline},
    error::{Error, Kind},
    sync::{Mutex, MutexGuard},
};

/// What all connections to one peer have in common: what their calls look like, who is woken when a stream is free,
/// and which of them are alive.
///
/// A connection that is alive is known here, and knows this: the circle is broken when its task ends, which it does with
/// its runtime at the latest.
pub(super) struct Common {
    pub(super) scheme: Scheme,
    pub(super) to: Destination,
    pub(super) user_agent: HeaderValue,
    pub(super) max_header_list_size: usize,
    pub(super) identity: Identity,
    /// Where pumps of streaming requests run: a call may be made outside of any runtime.
    pub(super) runtime: runtime::Handle,
    /// One for all connections: whoever waits for a stream takes that of any.
    pub(super) slot_free: Arc<Notify>,
    pub(super) polite: Polite,
    served: AtomicBool,
    /// Whether somebody acts on a crowd, and wants to hear of one.
    hears_of_crowds: AtomicBool,
    /// A call has found all streams of all connections in use.
    full: AtomicBool,
    news: Notify,
    life: Mutex<Life>,
    /// Why no connection takes calls any more; set once and before `over`.
    why_over: OnceLock<Why>,
    over: CancellationToken,
    ended: CancellationToken,
}

/// Which connections there are.
#[derive(Default)]
struct Life {
    alive: Vec<Arc<Core>>,
    /// No other is let in.
    sealed: bool,
    /// Nor is one dialled, though others may be needed yet.
    stays: bool,
    /// Why the last one ended.
    last: Option<Why>,
}

/// The kind and the reason of an error.
pub(super) type Why = (Kind, Option<String>);

/// What has become so, to be told once the lock is released: whoever is woken may run at once.
#[must_use]
#[derive(Clone, Copy)]
struct Told {
    over: bool,
    ended: bool,
}

// === impl Common ===

impl Common {
    /// To be called in the runtime that its connections will run in.
    pub(super) fn new(to: Destination, identity: HeaderMap, config: &Connector) -> Self {
        Self {
            scheme: config.scheme(),
            polite: config.polite.clone(),
            to,
            user_agent: config.user_agent.clone(),
            max_header_list_size: config.max_header_list_size,
            identity: Identity::new(identity),
            runtime: runtime::Handle::current(),
            slot_free: Arc::new(Notify::new()),
            served: AtomicBool::new(false),
            hears_of_crowds: AtomicBool::new(false),
            full: AtomicBool::new(false),
            news: Notify::new(),
            life: Mutex::new(Life::default()),
            why_over: OnceLock::new(),
            over: CancellationToken::new(),
            ended: CancellationToken::new(),
        }
    }

    /// Lets a connection in, or returns why it is not: it has ended or is leaving already, or all have.
    pub(super) fn admit(&self, core: &Arc<Core>) -> Result<(), Error> {
        let mut life = self.lock();
        // Whoever leaves or ends says so before it asks for the lock: it is seen here, or finds itself in the list.
        if let Some(why) = core.why_leaving() {
            return Err(error_of(&why));
        }
        if life.sealed || life.stays {
            return Err(Error::new(Kind::ConnectionLost).with_reason("no longer wanted"));
        }
        life.alive.push(core.clone());
        Ok(())
    }

    /// A connection takes no new calls any more. When it was the last one that did, that is over, for its reason.
    pub(super) fn left(&self, core: &Core) {
        let told = {
            let mut life = self.lock();
            if !life.alive.iter().any(|other| std::ptr::eq(&**other, core)) {
                // It has not been let in, and will not be.
                return;
            }
            self.settle(&mut life, core.why_leaving())
        };
        self.tell(told);
        self.slot_free.notify_waiters();
    }

    /// A connection's task has ended.
    pub(super) fn remove(&self, core: &Arc<Core>) {
        let told = {
            let mut life = self.lock();
            let before = life.alive.len();
            life.alive.retain(|other| !Arc::ptr_eq(other, core));
            if life.alive.len() == before {
                // It was never let in.
                return;
            }
            life.last = core.why_leaving();
            let why = life.last.clone();
            self.settle(&mut life, why)
        };
        self.tell(told);
        self.slot_free.notify_waiters();
    }

    /// No other connection is let in: nobody is left to use one.
    pub(super) fn seal(&self) {
        let told = {
            let mut life = self.lock();
            life.sealed = true;
            self.settle(&mut life, None)
        };
        self.tell(told);
    }

    pub(super) fn is_sealed(&self) -> bool {
        self.lock().sealed
    }

    /// Whether nobody is to be dialled any more, whatever else may be done.
    pub(super) fn stays(&self) -> bool {
        self.lock().stays
    }

    /// What follows from which connections there are. `why` is what has just happened to one of them: of all that take no new
    /// calls, it is the one whose reason says why the peer has none left.
    fn settle(&self, life: &mut Life, why: Option<Why>) -> Told {
        let usable = life.alive.iter().any(|core| !core.is_leaving());
        let mut over = false;
        if !usable {
            let leaving = || life.alive.iter().find_map(|core| core.why_leaving());
            // None of these: the first is still to come.
            if let Some(why) = why.or_else(leaving).or_else(|| life.last.clone()) {
                life.sealed = true;
                let _ = self.why_over.set(why);
                over = true;
            }
        }
        Told {
            over,
            ended: life.sealed && life.alive.is_empty(),
        }
    }

    fn tell(&self, told: Told) {
        if told.over {
            self.over.cancel();
        }
        if told.ended {
            self.ended.cancel();
        }
        self.news.notify_one();
    }

    /// Why no connection takes calls, once that is so.
    pub(super) fn why_over(&self) -> Option<Error> {
        self.why_over.get().map(error_of)
    }

    /// Until something has changed that may call for another connection, or for one less.
    pub(super) async fn news(&self) {
        self.news.notified().await;
    }

    /// A call has found all streams in use.
    pub(super) fn all_full(&self) {
        if !self.full.swap(true, Ordering::Relaxed) {
            self.news.notify_one();
        }
    }

    /// Whether that has happened since this was last asked. Until then it is told once.
    pub(super) fn take_full(&self) -> bool {
        self.full.swap(false, Ordering::Relaxed)
    }

    /// Whether it has, and the next call that finds it so need not say so.
    pub(super) fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }

    /// Whoever found all streams in use has got none since.
    pub(super) fn stays_full(&self) {
        self.full.store(true, Ordering::Relaxed);
    }

    /// A connection has many calls; beside its count, which has just been written, this is one relaxed load.
    #[inline]
    pub(super) fn crowded(&self) {
        if self.hears_of_crowds.load(Ordering::Relaxed) {
            self.hears_of_crowds.store(false, Ordering::Relaxed);
            self.news.notify_one();
        }
    }

    /// The next crowd is to be told.
    pub(super) fn hear_of_crowds(&self) {
        self.hears_of_crowds.store(true, Ordering::Relaxed);
    }

    /// Whether the next crowd would be told.
    pub(super) fn hears_of_crowds(&self) -> bool {
        self.hears_of_crowds.load(Ordering::Relaxed)
    }

    /// The first answer shows that the peer is of use.
    pub(super) fn served(&self) {
        // A load is cheap on a line that all threads share; a store each time would not be.
        if !self.served.load(Ordering::Relaxed) {
            self.served.store(true, Ordering::Relaxed);
        }
    }

    /// For a look or a change; only connections that come and go get here.
    fn lock(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lifeline for Common {
    fn closed(&self) -> BoxFuture<'_, Error> {
        Box::pin(async {
            self.ended.cancelled().await;
            let last = || self.lock().last.as_ref().map(error_of);
            // Who it was not tells more than how it ended.
            let why = self.identity.error().or_else(last);
            why.unwrap_or_else(|| Error::new(Kind::ConnectionLost))
        })
    }

    fn leaving(&self) -> BoxFuture<'_, Error> {
        Box::pin(async {
            self.over.cancelled().await;
            let why = self.identity.error().or_else(|| self.why_over());
            why.unwrap_or_else(|| Error::new(Kind::ConnectionLost))
        })
    }

    fn disowned(&self) -> BoxFuture<'_, Error> {
        Box::pin(self.identity.denied())
    }

    fn close(&self, why: Error) {
        let (alive, told) = {
            let mut life = self.lock();
            life.sealed = true;
            let told = self.settle(&mut life, None);
            (life.alive.clone(), told)
        };
        self.tell(told);
        for core in &alive {
            core.close_because(why.kind(), why.reason());
        }
        // So that calls hear why before the connections' tasks have ended.
        let told = self.settle(&mut self.lock(), Some((why.kind(), why.reason())));
        self.tell(told);
        self.slot_free.notify_waiters();
    }

    fn stop_dialling(&self) {
        self.lock().stays = true;
        self.news.notify_one();
    }

    fn has_served(&self) -> bool {
        self.served.load(Ordering::Relaxed)
    }

    fn connections(&self) -> usize {
        let life = self.lock();
        let taking = life
            .alive
            .iter()
            .filter(|core| core.why_leaving().is_none());
        taking.count()
    }
}

impl fmt::Debug for Common {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let life = self.lock();
        f.debug_struct("Common")
            .field("authority", &self.to.authority)
            .field("alive", &life.alive.len())
            .field("sealed", &life.sealed)
            .finish_non_exhaustive()
    }
}

fn error_of((kind, reason): &Why) -> Error {
    let error = Error::new(*kind);
    match reason {
        Some(reason) => error.with_reason(reason.clone()),
        None => error,
    }
}

#[cfg(all(test, switchboard_loom))]
mod loom_tests;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::core::Ending;

    /// What so many connections to one peer have in common, none of which has a socket.
    fn connections<const N: usize>() -> (Arc<Common>, [Arc<Core>; N]) {
        let connector = Connector::new();
        let to = connector.dialer.destination("127.0.0.1:1").unwrap();
        let common = Arc::new(Common::new(to, HeaderMap::new(), &connector));
        let cores = std::array::from_fn(|_| {
            let core = Arc::new(Core::new(common.clone(), None));
            common.admit(&core).unwrap();
            core
        });
        (common, cores)
    }

    fn ends(core: &Arc<Core>) {
        Ending::of(core.clone()).because(Ok(()));
    }

    #[tokio::test]
    async fn the_reason_is_that_of_the_last_one_that_took_calls() {
        // Given one that finishes its calls, and another in its place
        let (common, [old, new]) = connections();
        old.leave(|| "another has taken its place".to_owned());
        assert!(common.why_over().is_none());
        // When that one ends
        ends(&new);
        // Then this is why there is none any more, and not that the other had been replaced.
        let why = common.why_over().and_then(|why| why.reason());
        assert_eq!(why.as_deref(), Some("closed by the peer"));
        assert_eq!(common.leaving().await.reason(), why);
        assert!(!common.ended.is_cancelled());
        ends(&old);
        assert!(common.ended.is_cancelled());
    }

    #[tokio::test]
    async fn who_it_was_not_tells_more_than_how_it_ended() {
        let (common, [one]) = connections();
        common.identity.deny("node not match");
        ends(&one);
        for why in [common.leaving().await, common.closed().await] {
            assert_eq!(why.kind(), Kind::OtherInstance);
        }
    }

    #[tokio::test]
    async fn closed_by_ourselves_all_say_so() {
        let (common, [old, new]) = connections();
        old.leave(|| "another has taken its place".to_owned());
        common.close(Error::new(Kind::SessionDeleted));
        assert_eq!(common.leaving().await.kind(), Kind::SessionDeleted);
        for core in [old, new] {
            assert_eq!(core.why_leaving().unwrap().0, Kind::SessionDeleted);
            ends(&core);
        }
        assert_eq!(common.closed().await.kind(), Kind::SessionDeleted);
        // Nor is another let in.
        let late = Arc::new(Core::new(common.clone(), None));
        assert!(common.admit(&late).is_err());
    }
}
