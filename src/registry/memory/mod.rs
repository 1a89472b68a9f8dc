//! A registry in this process.

mod history;
mod lease;
mod listing;

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use tokio::{sync::watch, time::Instant};

use self::{history::History, lease::Held};
use super::{
    Codec, Naming, Registration, Registry, Session, registration::held_by, session::check_role,
};
use crate::{
    Backoff,
    backoff::check_duration,
    discover::{Discovery, Settings, default_backoff},
    error::{Error, Kind},
};

/// A registry in this process, with the semantics of etcd: revisions, leases that expire, watches from a
/// revision, compaction.
///
/// For programs of one process and for tests: what a program does with etcd it does with this, and an outage
/// ([`MemoryRegistry::set_available`]), a compaction ([`MemoryRegistry::compact`]) and the death of a process
/// ([`Registration::abandon`]) can be had at will. Keys are `<role>/<id>`. It keeps the last 10,000 events for
/// watches; one that lags behind that lists anew, as after a compaction.
///
/// A clone is another handle on the same registry. Making one needs no runtime; time is tokio's, so that
/// expiry works in tests with paused time. There is no task: leases expire as somebody looks.
///
/// ```
/// use switchboard::{MemoryRegistry, Session};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), switchboard::Error> {
/// let registry = MemoryRegistry::new();
/// let echo = registry.register(Session::new("echo", "10.0.0.5:21123")).await?;
/// let again = registry.register(Session::new("echo", "10.0.0.5:21123")).await;
/// assert!(again.is_err_and(|e| e.kind() == switchboard::Kind::AlreadyRegistered));
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct MemoryRegistry {
    shared: Arc<Shared>,
    codec: Arc<dyn Codec>,
    ttl: Duration,
    backoff: Backoff,
}

const UNAVAILABLE: &str = "the in-process registry is set unavailable";

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
        Self {
            shared: Arc::new(Shared {
                state: Mutex::new(state),
                changed: watch::Sender::new(0),
            }),
            codec: Arc::new(Naming),
            ttl: Self::TTL,
            backoff: default_backoff(),
        }
    }

    /// How long a session that is registered through this handle outlives its process. Default 10 s; 1 ms to
    /// 1 day.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] outside these bounds.
    pub fn with_ttl(mut self, ttl: Duration) -> Result<Self, Error> {
        self.ttl = check_duration("TTL", ttl, Duration::from_millis(1), Backoff::LONGEST)?;
        Ok(self)
    }

    /// How sessions are written and read through this handle. Default [`Naming`].
    #[must_use]
    pub fn with_codec(mut self, codec: impl Codec) -> Self {
        self.codec = Arc::new(codec);
        self
    }

    /// How discovery through this handle tries again while the registry is unavailable. Default 100 ms × 2,
    /// ± 20 %, at most 1 s.
    #[must_use]
    pub fn with_backoff(mut self, backoff: Backoff) -> Self {
        self.backoff = backoff;
        self
    }

    /// Registers a session, and keeps it until the handle is dropped.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] if the session cannot work; [`Kind::AlreadyRegistered`], naming the holder, if its key is
    /// held; [`Kind::RegistryUnreachable`] during an outage.
    ///
    /// # Cancel safety
    ///
    /// It is done at its first poll, or not at all.
    pub async fn register(&self, session: Session) -> Result<Registration, Error> {
        session.validate()?;
        let key = Bytes::from(self.codec.key("", &session));
        let value = Bytes::from(self.codec.encode(&session, 0)?);
        let session = Arc::new(session);
        self.shared.write(|history| {
            if let Some(record) = history.get(&key) {
                return Err(held_by(&*self.codec, "", &session, &record.value));
            }
            let lease = history.grant(self.ttl);
            history.put(key.clone(), value, Some(lease));
            let hold = Held {
                shared: self.shared.clone(),
                codec: self.codec.clone(),
                key,
                lease,
            };
            Ok(Registration::new(session.clone(), Box::new(hold)))
        })?
    }

    /// Writes a record as it is, under no lease; for tests and tools. It works during an outage, as if
    /// another client could still reach the registry.
    pub fn put(&self, key: impl Into<String>, value: impl Into<Vec<u8>>) {
        let (key, value) = (Bytes::from(key.into()), Bytes::from(value.into()));
        self.shared
            .change(|state| state.history.put(key, value, None));
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
        check_role(role)?;
        Ok(Discovery::of_store(Settings {
            store: self.shared.clone(),
            codec: self.codec.clone(),
            root: "".into(),
            role: role.into(),
            backoff: self.backoff,
        }))
    }
}

impl fmt::Debug for MemoryRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryRegistry")
            .field("codec", &self.codec)
            .field("ttl", &self.ttl)
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
    fn write<R>(&self, write: impl FnOnce(&mut History) -> R) -> Result<R, Error> {
        self.change(|state| match state.available {
            true => Ok(write(&mut state.history)),
            false => Err(Error::new(Kind::RegistryUnreachable).with_reason(UNAVAILABLE)),
        })
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
