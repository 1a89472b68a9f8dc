//! The balanced set of a role's endpoints.
//!
//! Two routes meet here and nowhere else. A call loads one snapshot, out of an `ArcSwap`, and picks; it takes no
//! lock, allocates nothing and waits for nobody. A change goes through the one driver task, which stores
//! the next snapshot. The service half never imports the driver half.
//!
//! A pool balances anything that is a tower `Service + Clone`:
//!
//! ```
//! use std::convert::Infallible;
//! use switchboard::pool::{Plain, Pool};
//! use tower::{ServiceExt, discover::ServiceList, service_fn};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), switchboard::Error> {
//! let double = service_fn(|n: u32| async move { Ok::<_, Infallible>(2 * n) });
//! let list = ServiceList::new::<u32>(vec![double.clone(), double]);
//!
//! let pool = Pool::<_, Plain>::from_discover("double", list)?;
//! assert_eq!(pool.oneshot(21).await?, 42);
//! # Ok(())
//! # }
//! ```

mod body;
#[cfg(feature = "manager")]
pub(crate) mod changes;
mod chunked;
mod driver;
#[cfg(feature = "manager")]
mod enough;
mod pick;
mod protocol;
mod service;
pub(crate) mod snapshot;
pub mod status;
mod wait;

use std::{fmt, hash::Hash, panic, pin::Pin, sync::Arc, time::Duration};

use futures_core::Stream;
use tokio::{
    runtime,
    sync::watch,
    time::{self, Sleep},
};
use tower::discover::Discover;

pub use self::{
    body::Body,
    protocol::{Call, Http, InstanceId, Options, Plain, Protocol, WaitForReady},
    service::{Pool, ResponseFuture},
};
use self::{
    driver::Driver,
    service::{Inner, Shared},
};
#[cfg(feature = "manager")]
pub(crate) use self::{
    service::{Held, WeakPool},
    wait::in_turn,
};
use crate::{
    Backoff,
    backoff::check_duration,
    discover::{FromTower, Update},
    endpoint::{BoxError, Connect, Dialing, Provided, Target, UseProvided},
    error::{Error, Kind},
    events::Bus,
};

/// How a pool's endpoints dial, and how long its calls wait.
///
/// ```
/// use std::time::Duration;
/// use switchboard::{Backoff, pool::PoolConfig};
///
/// let config = PoolConfig::default()
///     .attempt_timeout(Duration::from_secs(5))?
///     .attempts(5)?
///     .probe(None);
/// # Ok::<(), switchboard::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct PoolConfig {
    attempt_timeout: Duration,
    attempts: u32,
    backoff: Backoff,
    probe: Option<Backoff>,
    pub(crate) drain: Duration,
    max_dials: usize,
    pub(crate) max_wait: Duration,
    pub(crate) wait_for_ready: bool,
}

/// What a pool of a manager has that others do without.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    /// Where its events are told.
    pub(crate) bus: Bus,
    /// How long nobody uses it until it closes its connections.
    pub(crate) idle_after: Option<Duration>,
}

/// The end of a pool, as ordered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct End {
    /// Until when calls in flight may go on.
    by: time::Instant,
    /// What calls hear that come later.
    why: Option<&'static str>,
}

/// The handle on a pool's driver: dropping it ends the driver and all that it spawned.
pub(crate) struct Handle {
    runtime: runtime::Handle,
    end: watch::Sender<Option<End>>,
    ended: watch::Receiver<()>,
    task: tokio::task::AbortHandle,
}

// === impl PoolConfig ===

impl PoolConfig {
    /// How long one attempt to connect may take, name resolution included. Default 30 s; 1 ms to 10 min.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] outside these bounds.
    pub fn attempt_timeout(mut self, timeout: Duration) -> Result<Self, Error> {
        let (least, most) = (Duration::from_millis(1), Duration::from_secs(600));
        self.attempt_timeout = check_duration("attempt timeout", timeout, least, most)?;
        Ok(self)
    }

    /// How many attempts in a row fail before an endpoint is offline. Default 3; 1 to 1,000.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] outside these bounds.
    pub fn attempts(mut self, attempts: u32) -> Result<Self, Error> {
        if !(1..=1000).contains(&attempts) {
            let why = format!("{attempts} is not between 1 and 1,000");
            return Err(Error::invalid("attempts", why));
        }
        self.attempts = attempts;
        Ok(self)
    }

    /// The delays between attempts. Default gRPC's: 1 s × 1.6, ± 20 %, at most 120 s.
    ///
    /// Its first delay is also how long a connection must have lived for its loss to be repaired at
    /// once every time; one that breaks sooner is dialled at once but one time, then with backoff.
    #[must_use]
    pub const fn backoff(mut self, backoff: Backoff) -> Self {
        self.backoff = backoff;
        self
    }

    /// How often an offline endpoint is tried again with no word from discovery, if at all. Default every
    /// 30 s ± 20 %: a server that merely opened its port late gets no new event.
    #[must_use]
    pub const fn probe(mut self, probe: Option<Backoff>) -> Self {
        self.probe = probe;
        self
    }

    /// How long calls in flight may take to finish once a session that was stopping is gone, before its
    /// connection is closed. Default 30 s; up to one day.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] outside these bounds.
    pub fn drain(mut self, bound: Duration) -> Result<Self, Error> {
        self.drain = check_duration("drain bound", bound, Duration::ZERO, Backoff::LONGEST)?;
        Ok(self)
    }

    /// How many endpoints of a pool may be dialling at once; the others wait for their turn, and their attempt's time
    /// begins with it. Default 64; 1 to 10,000.
    ///
    /// It keeps thousands of handshakes from going on at the same moment. A dial that has gone unanswered for
    /// 500 ms costs nothing but its socket and does not count any longer, so that peers that are silent do not hold
    /// up those that answer: however many they are, 128 a second have their turn.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] outside these bounds.
    pub fn max_dials(mut self, dials: usize) -> Result<Self, Error> {
        if !(1..=10_000).contains(&dials) {
            let why = format!("{dials} is not between 1 and 10,000");
            return Err(Error::invalid("dials at once", why));
        }
        self.max_dials = dials;
        Ok(self)
    }

    /// How long a call waits for a ready endpoint when its own deadline is later, or missing. Default
    /// 30 s; up to one day. Zero means that no call ever waits.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] outside these bounds.
    pub fn max_wait(mut self, bound: Duration) -> Result<Self, Error> {
        self.max_wait = check_duration("longest wait", bound, Duration::ZERO, Backoff::LONGEST)?;
        Ok(self)
    }

    /// Whether calls that do not say ([`WaitForReady`]) wait for a ready endpoint. Default no: they fail fast.
    #[must_use]
    pub const fn wait_for_ready(mut self, wait: bool) -> Self {
        self.wait_for_ready = wait;
        self
    }

    pub(crate) const fn dialing(&self) -> Dialing {
        Dialing {
            attempt_timeout: self.attempt_timeout,
            attempts: self.attempts,
            backoff: self.backoff,
            probe: self.probe,
            drain: self.drain,
        }
    }
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            attempt_timeout: Duration::from_secs(30),
            attempts: 3,
            backoff: Backoff::default(),
            probe: Backoff::constant(Duration::from_secs(30), 0.2).ok(),
            drain: Duration::from_secs(30),
            max_dials: 64,
            max_wait: Duration::from_secs(30),
            wait_for_ready: false,
        }
    }
}

// === impl Pool ===

impl<S, P> Pool<S, P>
where
    S: Clone + Send + Sync + 'static,
{
    /// A pool over what discovery says, connecting each target with `connect`.
    ///
    /// Returns at once: resolving and connecting go on in the background.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] outside a tokio runtime, or in one without a timer (`enable_time`).
    pub fn new<K, T, C>(
        role: impl Into<Arc<str>>,
        config: PoolConfig,
        updates: impl Stream<Item = Update<K, Arc<T>>> + Send + 'static,
        connect: C,
    ) -> Result<Self, Error>
    where
        K: Hash + Eq + Send + 'static,
        T: Target,
        C: Connect<T, Service = S>,
    {
        let setup = Setup {
            bus: Bus::of_nobody(),
            idle_after: None,
        };
        Self::with(role, config, setup, updates, connect)
    }

    /// The same with what a manager has to say.
    pub(crate) fn with<K, T, C>(
        role: impl Into<Arc<str>>,
        config: PoolConfig,
        setup: Setup,
        updates: impl Stream<Item = Update<K, Arc<T>>> + Send + 'static,
        connect: C,
    ) -> Result<Self, Error>
    where
        K: Hash + Eq + Send + 'static,
        T: Target,
        C: Connect<T, Service = S>,
    {
        let runtime = runtime::Handle::try_current().map_err(|error| {
            Error::invalid("pool", "made outside a tokio runtime").with_source(error)
        })?;
        // Better here than in somebody's call.
        if !has_timer() {
            return Err(Error::invalid(
                "pool",
                "made in a tokio runtime without enable_time",
            ));
        }
        let shared = Arc::new(Shared::new(role.into(), config));
        let driver = Driver::new(shared.clone(), setup, connect);
        let (end, ends) = watch::channel(None);
        let (ending, ended) = watch::channel(());
        let task = runtime.spawn(async move {
            let _ending = ending;
            driver.run(updates, ends).await;
        });
        Ok(Self::from_inner(Inner {
            shared,
            driver: Handle {
                runtime,
                end,
                ended,
                task: task.abort_handle(),
            },
        }))
    }

    /// A pool over the services of any [`tower::discover::Discover`], with the default configuration.
    ///
    /// Each key's `Display` is its instance's id. An error of the stream is not the end: the set is kept,
    /// as stale, until its next word.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] outside a tokio runtime.
    pub fn from_discover<D>(role: impl Into<Arc<str>>, discover: D) -> Result<Self, Error>
    where
        D: Discover<Service = S> + Send + 'static,
        D::Key: Clone + Hash + fmt::Display + Send + 'static,
        D::Error: Into<BoxError>,
    {
        let role: Arc<str> = role.into();
        let updates = FromTower::new(role.clone(), discover);
        Self::new::<_, Provided<S>, _>(role, PoolConfig::default(), updates, UseProvided)
    }
}

// === impl Handle ===

impl Handle {
    /// A sleep on the pool's own runtime: a call may be polled outside of any.
    pub(crate) fn sleep(&self, duration: Duration) -> Pin<Box<Sleep>> {
        let _entered = self.runtime.enter();
        Box::pin(time::sleep(duration))
    }

    #[cfg(feature = "manager")]
    pub(crate) fn runtime(&self) -> &runtime::Handle {
        &self.runtime
    }

    /// Whether the driver runs: neither was it stopped, nor has its runtime ended.
    #[cfg(any(feature = "manager", feature = "etcd"))]
    pub(crate) fn is_running(&self) -> bool {
        self.ended.has_changed().is_ok()
    }

    /// Orders the end, within a day at most; of several orders the earliest counts.
    pub(crate) fn end(&self, within: Duration, why: Option<&'static str>) {
        // On a clock that tests can pause.
        let _entered = self.runtime.enter();
        let by = time::Instant::now() + within.min(Backoff::LONGEST);
        self.end.send_modify(|end| {
            *end = Some(match *end {
                Some(first) => End {
                    by: by.min(first.by),
                    ..first
                },
                None => End { by, why },
            });
        });
    }

    /// Waits for the end that was ordered, as long as it may take.
    pub(crate) async fn ended(&self, within: Duration) {
        let mut ended = self.ended.clone();
        // Nothing is ever sent: an error is the driver's end.
        let ended = ended.changed();
        // The driver keeps the time itself, unless its runtime is one that nobody drives at the moment. Whoever waits
        // outside of any runtime has no other clock.
        if has_timer() {
            let _ = time::timeout(
                within.min(Backoff::LONGEST) + driver::CLOSING + SPARE,
                ended,
            )
            .await;
        } else {
            let _ = ended.await;
        }
    }
}

/// Whether this is within a runtime that keeps time. Tokio has no other way to ask.
fn has_timer() -> bool {
    runtime::Handle::try_current().is_ok()
        && panic::catch_unwind(|| drop(time::sleep(Duration::ZERO))).is_ok()
}

/// How much later than the driver its waiter gives up.
const SPARE: Duration = Duration::from_millis(500);

impl Drop for Handle {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl From<Kind> for Error {
    /// An error that says no more than its kind.
    fn from(kind: Kind) -> Self {
        Self::new(kind)
    }
}
