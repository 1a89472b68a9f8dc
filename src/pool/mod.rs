//! The balanced set of a role's endpoints.
//!
//! Two routes meet here and nowhere else. A call loads one snapshot, out of an `ArcSwap`, and picks; it takes no
//! lock, allocates nothing and waits for nobody. A change goes through the one driver task, which stores
//! the next snapshot. The service half never imports the driver half.
//!
//! Options of one call are request extensions, where requests are `http` ones ([`Http`]): [`WaitForReady`], [`InstanceId`],
//! and [`Avoid`], which attempts of one call share. Those of a pool are in [`PoolConfig`]: how it dials, how long its calls
//! wait and how many may ([`max_waiting`](PoolConfig::max_waiting)), and how many are in flight at most, in all
//! ([`max_in_flight`](PoolConfig::max_in_flight)) and at each peer
//! ([`max_in_flight_per_peer`](PoolConfig::max_in_flight_per_peer)); both are off by default. A call over a limit fails at
//! once with [`Kind::Limit`], and [`Status::refused`](status::Status::refused) counts it.
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

mod avoid;
mod body;
#[cfg(feature = "manager")]
pub(crate) mod changes;
mod chunked;
mod config;
mod driver;
#[cfg(feature = "manager")]
mod enough;
mod interest;
mod limits;
mod pick;
mod protocol;
mod service;
pub(crate) mod snapshot;
pub mod status;
mod wait;

use std::{fmt, hash::Hash, panic, sync::Arc, time::Duration};

use futures_core::Stream;
use tokio::{runtime, sync::watch, time};
use tower::discover::Discover;

pub(crate) use self::wait::in_turn;
pub use self::{
    avoid::Avoid,
    body::Body,
    config::PoolConfig,
    limits::Refused,
    protocol::{Call, Http, InstanceId, Options, Plain, Protocol, WaitForReady},
    service::{Pool, ResponseFuture},
};
use self::{
    driver::Driver,
    service::{Inner, Shared},
};
#[cfg(feature = "manager")]
pub(crate) use self::{interest::Held, service::WeakPool};
#[cfg(feature = "manager")]
use crate::waiters::Timers;
use crate::{
    Backoff,
    discover::{FromTower, Update},
    endpoint::{BoxError, Connect, Provided, Target, UseProvided},
    error::{Error, Kind},
    events::Bus,
    waiters::timed::Pause,
};

/// What a pool of a manager has that others do without.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    /// Where its events are told.
    pub(crate) bus: Bus,
    /// How long nobody uses it until it closes its connections.
    pub(crate) idle_after: Option<Duration>,
    /// What is configured for its calls.
    #[cfg(feature = "manager")]
    pub(crate) target: Arc<crate::retry::Target>,
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

// === impl Setup ===

impl Setup {
    /// A pool on its own.
    pub(crate) fn of_nobody() -> Self {
        Self {
            bus: Bus::of_nobody(),
            idle_after: None,
            #[cfg(feature = "manager")]
            target: Arc::default(),
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
        Self::with(role, config, Setup::of_nobody(), updates, connect)
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
        let shared = Arc::new(Shared::new(role.into(), config, &setup));
        let driver = Driver::new(shared.clone(), setup, connect);
        let (end, ends) = watch::channel(None);
        let (ending, ended) = watch::channel(());
        #[cfg(feature = "manager")]
        let timers = Arc::new(Timers::new(runtime.clone()));
        #[cfg(feature = "manager")]
        let closing = timers.clone();
        let task = runtime.spawn(async move {
            let _ending = ending;
            driver.run(updates, ends).await;
            #[cfg(feature = "manager")]
            closing.close();
        });
        Ok(Self::from_inner(Inner {
            shared,
            driver: Handle {
                runtime,
                end,
                ended,
                task: task.abort_handle(),
            },
            #[cfg(feature = "manager")]
            timers,
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
    /// A sleep for a call, which may be polled outside of any runtime: on the pool's own then.
    pub(crate) fn sleep(&self, duration: Duration) -> Pause {
        Pause::with(&self.runtime, duration)
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
pub(crate) fn has_timer() -> bool {
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
