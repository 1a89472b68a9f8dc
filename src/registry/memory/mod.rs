//! A registry in this process.

mod history;
mod store;

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use tokio::{sync::watch, time::Instant};

use self::history::History;
use super::{
    Codec, Register, Registry, Session,
    home::{self, Home},
};
use crate::{
    Backoff,
    backoff::check_duration,
    discover::Discovery,
    error::{Error, Kind},
};

/// A registry in this process, with the semantics of etcd: revisions, leases that expire, watches from a
/// revision, compaction.
///
/// For programs of one process and for tests: what a program does with etcd it does with this, and an outage
/// ([`MemoryRegistry::set_available`]), a compaction ([`MemoryRegistry::compact`]) and the death of a process
/// ([`Registration::abandon`](super::Registration::abandon)) can be had at will. Keys are `<role>/<id>`. It keeps the last 10,000 events for
/// watches; one that lags behind that lists anew, as after a compaction.
///
/// A clone is another handle on the same registry. Making one needs no runtime; time is tokio's, so that
/// expiry works in tests with paused time. Leases expire as somebody looks.
///
/// ```
/// use switchboard::{MemoryRegistry, Session};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), switchboard::Error> {
/// let registry = MemoryRegistry::new();
/// let seven = registry.register(Session::new("echo", "10.0.0.5:21123").with_id(7)).await?;
/// let other = registry.register(Session::new("echo", "10.0.0.6:21123").with_id(7)).await;
/// assert!(other.is_err_and(|e| e.kind() == switchboard::Kind::AlreadyRegistered));
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct MemoryRegistry {
    shared: Arc<Shared>,
    home: Home,
}

const UNAVAILABLE: &str = "the in-process registry is set unavailable";

fn unavailable() -> Error {
    Error::new(Kind::RegistryUnreachable).with_reason(UNAVAILABLE)
}

struct Shared {
    state: Mutex<State>,
    /// Counts changes of the state; what watches wait for.
    changed: watch::Sender<u64>,
}

struct State {
    history: History,
    available: bool,
    /// How often it has been unavailable: a watch ends with the outage that it slept through, too.
    outages: u64,
}

// === impl MemoryRegistry ===

impl MemoryRegistry {
    /// The default time to live of a session whose process is gone.
    pub const TTL: Duration = Duration::from_secs(10);

    /// An empty registry.
    pub fn new() -> Self {
        let state = State {
            history: History::new(),
            available: true,
            outages: 0,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            changed: watch::Sender::new(0),
        });
        Self {
            home: Home::new(shared.clone(), home::backoff(), "", Self::TTL),
            shared,
        }
    }

    /// How long a session that is registered through this handle outlives its process. Default 10 s; 10 ms to
    /// 1 day.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] outside these bounds.
    pub fn with_ttl(mut self, ttl: Duration) -> Result<Self, Error> {
        self.home.ttl = check_duration("TTL", ttl, Duration::from_millis(10), Backoff::LONGEST)?;
        Ok(self)
    }

    /// How sessions are written and read through this handle. Default [`Naming`](super::Naming).
    #[must_use]
    pub fn with_codec(mut self, codec: impl Codec) -> Self {
        self.home.codec = Arc::new(codec);
        self
    }

    /// How discovery through this handle tries again while the registry is unavailable. Default 100 ms × 2,
    /// ± 20 %, at most 1 s. Handles that are cloned from it share its watches, and no others do.
    #[must_use]
    pub fn with_backoff(mut self, backoff: Backoff) -> Self {
        self.home.watch_through(self.shared.clone(), backoff);
        self
    }

    /// Registers a session under a lease, and keeps it alive in the background until the handle is dropped.
    /// What is lost is registered again. See [`Register`] for what can be chosen, and for its errors.
    pub fn register(&self, session: Session) -> Register {
        Register::new(self.home.clone(), session)
    }

    /// An id that no other session of this registry was given: the value of a counter in the registry, from
    /// 1, under [`Codec::counter`].
    ///
    /// # Errors
    ///
    /// [`Kind::RegistryUnreachable`] during an outage; [`Kind::Invalid`] if what stands under the counter's key
    /// is no number.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, an id may be skipped.
    pub async fn allocate_id(&self) -> Result<u64, Error> {
        self.home.allocate_id().await
    }

    /// Writes a record as it is, under no lease; for tests and tools. It works during an outage, as if
    /// another client could still reach the registry.
    pub fn put(&self, key: impl Into<String>, value: impl Into<Vec<u8>>) {
        let (key, value) = (Bytes::from(key.into()), value.into());
        self.shared
            .change(|state| state.history.put(&key, &value, 0));
    }

    /// Deletes a record; false if there is none. For tests and tools; it works during an outage.
    pub fn delete(&self, key: &str) -> bool {
        self.shared
            .change(|state| state.history.delete(key.as_bytes()))
    }

    /// Forgets what has happened up to now, but not what is there. A watch that has not heard of all of it
    /// breaks, and lists anew.
    pub fn compact(&self) {
        self.shared
            .change(|state| state.history.compact(state.history.revision()));
    }

    /// Begins (`false`) or ends (`true`) an outage. While it lasts nothing can be listed, watched or
    /// registered, and no lease expires; when it ends every lease has its whole TTL once more, as in etcd.
    pub fn set_available(&self, available: bool) {
        self.shared.change(|state| {
            if state.available && !available {
                state.outages += 1;
            }
            if !state.available && available {
                state.history.extend(Instant::now());
            }
            state.available = available;
        });
    }

    #[cfg(test)]
    pub(crate) fn store(&self) -> Arc<dyn super::store::Store> {
        self.shared.clone()
    }

    #[cfg(test)]
    pub(crate) fn record(&self, key: &str) -> Option<super::store::Record> {
        self.shared.lock().history.get(key.as_bytes()).cloned()
    }

    #[cfg(test)]
    pub(crate) fn end_lease_of(&self, key: &str) {
        if let Some(record) = self.record(key) {
            self.shared
                .change(|state| state.history.revoke(record.lease));
        }
    }

    /// The revision of the last change.
    pub fn revision(&self) -> u64 {
        self.shared.lock().history.revision()
    }
}

impl Default for MemoryRegistry {
    fn default() -> Self {
        Self::new()
    }
}

impl Registry for MemoryRegistry {
    fn discover(&self, role: &str) -> Result<Discovery, Error> {
        self.home.discover(role)
    }

    fn register_session(&self, session: Session) -> Result<Register, Error> {
        Ok(self.register(session))
    }
}

impl fmt::Debug for MemoryRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryRegistry")
            .field("home", &self.home)
            .field("state", &self.shared)
            .finish_non_exhaustive()
    }
}

// === impl Shared ===

impl Shared {
    /// The state as of now, without what has expired.
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while it was held is impossible or a bug of ours; what is in it is whole either way.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.available && state.history.expire(Instant::now()) {
            self.wake();
        }
        state
    }

    fn change<R>(&self, change: impl FnOnce(&mut State) -> R) -> R {
        let result = change(&mut self.lock());
        self.wake();
        result
    }

    /// What a client does, which an outage prevents.
    fn client<R>(&self, request: impl FnOnce(&mut History) -> R) -> Result<R, Error> {
        let mut state = self.lock();
        if !state.available {
            return Err(unavailable());
        }
        let before = state.history.revision();
        let result = request(&mut state.history);
        // A beat, say, is nobody's news: a thousand watches need not look.
        if state.history.revision() != before {
            self.wake();
        }
        Ok(result)
    }

    fn wake(&self) {
        self.changed.send_modify(|n| *n = n.wrapping_add(1));
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        f.debug_struct("Shared")
            .field("revision", &state.history.revision())
            .field("available", &state.available)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
