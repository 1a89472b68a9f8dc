//! All connections of a process, in one place.

mod channel;

use std::{
    collections::{BTreeMap, btree_map},
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use futures_util::future::join_all;

pub use self::channel::{Channel, ResponseBody, ResponseFuture};
pub use crate::pool::status::{Connectivity, Discovery, EndpointStatus};
use crate::{
    error::{Error, Kind},
    events::{Bus, Events},
    pool::{Pool, PoolConfig, status},
    registry::{Registry, session::check_role},
    transport::{Connection, Connector},
};

/// Manages all connections of a process: a balanced pool for each role, found through one registry.
///
/// Cheap to clone; all clones are one manager. Nothing has to be up when it is built, and nothing waits:
/// a role is watched and connected in the background from the first time it is asked for, and what goes
/// away and comes back is picked up without anybody's doing.
///
/// ```no_run
/// use switchboard::{ConnectionManager, registry::EtcdRegistry};
/// # mod pb { pub struct EchoClient; impl EchoClient { pub fn new(_: switchboard::Channel) {} } }
/// # use pb::EchoClient;
///
/// # async fn run() -> Result<(), switchboard::Error> {
/// let registry = EtcdRegistry::connect(["http://127.0.0.1:2379"], "demo").await?;
/// let manager = ConnectionManager::builder(registry).build();
///
/// let channel = manager.channel("echo");         // returns at once
/// let echo = EchoClient::new(channel.clone());   // a tonic generated client, unchanged
/// let one = EchoClient::new(channel.to(7));      // pinned to one instance
/// println!("{}", manager.status());
/// manager.stop().await;                          // ends calls, tasks and sockets
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct ConnectionManager {
    inner: Arc<Inner>,
}

/// Configures a [`ConnectionManager`]; see [`ConnectionManager::builder`].
#[derive(Clone, Debug)]
pub struct Builder {
    registry: Arc<dyn Registry>,
    pools: PoolConfig,
    connector: Connector,
}

/// A picture of all that a manager manages, in the order of the roles' names.
///
/// Its `Display` is a table for a terminal.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Status {
    /// A pool's status for each role that was asked for.
    pub roles: Vec<status::Status>,
    /// Whether the manager was stopped.
    pub stopped: bool,
}

struct Inner {
    config: PoolConfig,
    connector: Connector,
    bus: Bus,
    roles: Mutex<Roles>,
}

struct Roles {
    pools: BTreeMap<String, Pool<Connection>>,
    /// None once it was stopped.
    registry: Option<Arc<dyn Registry>>,
}

// === impl ConnectionManager ===

impl ConnectionManager {
    /// A manager over this registry, to be configured.
    pub fn builder(registry: impl Registry) -> Builder {
        Builder {
            registry: Arc::new(registry),
            pools: PoolConfig::default(),
            connector: Connector::new(),
        }
    }

    /// The channel to a role. Returns at once; a role asked for twice is one pool.
    ///
    /// A role that cannot be, a stopped manager and a missing tokio runtime make a channel whose every
    /// call fails and says so; [`ConnectionManager::try_channel`] says it at once.
    pub fn channel(&self, role: &str) -> Channel {
        match self.try_channel(role) {
            Ok(channel) => channel,
            Err(error) => Channel::broken(role, &error),
        }
    }

    /// As [`ConnectionManager::channel`], refusing what cannot work.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] for a role that is not 1 to 128 of `A-Z a-z 0-9 . _ -`, or outside a tokio
    /// runtime; [`Kind::Stopped`] after [`ConnectionManager::stop`].
    pub fn try_channel(&self, role: &str) -> Result<Channel, Error> {
        check_role(role)?;
        // The registry may be a user's own, and ask this manager: not under the lock.
        let registry = {
            let roles = self.inner.lock();
            match (&roles.registry, roles.pools.get(role)) {
                (None, _) => return Err(Error::new(Kind::Stopped).with_role(&role.into())),
                (_, Some(pool)) if pool.is_running() => return Ok(Channel::new(pool.clone())),
                (Some(registry), _) => registry.clone(),
            }
        };
        let updates = registry.discover(role)?.updates();
        let connector = self.inner.connector.clone();
        let new = Pool::new(role, self.inner.config, updates, connector)?;
        let mut roles = self.inner.lock();
        if roles.registry.is_none() {
            return Err(Error::new(Kind::Stopped).with_role(&role.into()));
        }
        // Somebody else may have been faster; a pool whose runtime has ended is replaced.
        let pool = match roles.pools.entry(role.to_owned()) {
            btree_map::Entry::Occupied(known) if known.get().is_running() => known.into_mut(),
            btree_map::Entry::Occupied(mut ended) => {
                ended.insert(new);
                ended.into_mut()
            }
            btree_map::Entry::Vacant(vacant) => vacant.insert(new),
        };
        Ok(Channel::new(pool.clone()))
    }

    /// Watches and connects a role in the background from here on, whether anybody calls it or not. Returns at once,
    /// and needs nothing to be up.
    ///
    /// # Errors
    ///
    /// As [`ConnectionManager::try_channel`].
    pub fn depends_on(&self, role: &str) -> Result<(), Error> {
        self.try_channel(role).map(drop)
    }

    /// Waits until `n` instances of a role are ready.
    ///
    /// # Errors
    ///
    /// As [`ConnectionManager::try_channel`]; when they are not ready within this time, an error that says what is
    /// missing.
    pub async fn ready(
        &self,
        role: &str,
        n: usize,
        within: std::time::Duration,
    ) -> Result<(), Error> {
        let channel = self.try_channel(role)?;
        let ready = async {
            loop {
                let status = self.status();
                let of_role = status.roles.iter().find(|r| &*r.role == role);
                let ready = of_role.map_or(0, |r| {
                    r.endpoints
                        .iter()
                        .filter(|e| e.state == Connectivity::Ready)
                        .count()
                });
                if ready >= n {
                    return;
                }
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        };
        drop(channel);
        tokio::time::timeout(within, ready)
            .await
            .map_err(|_| Error::new(Kind::NotConnected).with_role(&role.into()))
    }

    /// What happens to this manager's connections, from here on; see [`Events`].
    pub fn events(&self) -> Events {
        self.inner.bus.events()
    }

    /// What it is doing at this moment.
    pub fn status(&self) -> Status {
        let (pools, stopped) = {
            let roles = self.inner.lock();
            let pools: Vec<_> = roles.pools.values().cloned().collect();
            (pools, roles.registry.is_none())
        };
        Status {
            roles: pools.iter().map(Pool::status).collect(),
            stopped,
        }
    }

    /// Ends everything: calls in flight end as `CANCELLED`, later ones fail with [`Kind::Stopped`], tasks
    /// end and sockets are closed. Returns when they are, after two seconds at most. It lets go of the
    /// registry too, whose own connections end with its last handle.
    ///
    /// # Cancel safety
    ///
    /// Once polled the stop goes on without its waiter. Stopping twice is stopping once.
    pub async fn stop(&self) {
        let pools: Vec<_> = {
            let mut roles = self.inner.lock();
            // With it goes what it keeps open, unless somebody else holds it too.
            roles.registry = None;
            roles.pools.values().cloned().collect()
        };
        join_all(pools.iter().map(Pool::stop)).await;
    }
}

impl fmt::Debug for ConnectionManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let roles = self.inner.lock();
        f.debug_struct("ConnectionManager")
            .field("registry", &roles.registry)
            .field("roles", &roles.pools.keys())
            .finish_non_exhaustive()
    }
}

// === impl Inner ===

impl Inner {
    /// Held for a look-up, never across an await, and never on a call's path.
    fn lock(&self) -> std::sync::MutexGuard<'_, Roles> {
        // A panic under it would have to come from the registry; the map is whole all the same.
        self.roles.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Builder ===

impl Builder {
    /// How pools dial and wait: attempts, backoff, probes, and
    /// [`max_wait`](PoolConfig::max_wait), the bound on how long a call waits. See [`PoolConfig`].
    #[must_use]
    pub fn pools(mut self, config: PoolConfig) -> Self {
        self.pools = config;
        self
    }

    /// How connections are made and kept alive: TLS, keepalive, windows, user agent. See [`Connector`].
    #[must_use]
    pub fn connector(mut self, connector: Connector) -> Self {
        self.connector = connector;
        self
    }

    /// The manager. No I/O, and nothing has to be up.
    #[must_use]
    pub fn build(self) -> ConnectionManager {
        ConnectionManager {
            inner: Arc::new(Inner {
                config: self.pools,
                connector: self.connector,
                bus: Bus::new(),
                roles: Mutex::new(Roles {
                    pools: BTreeMap::new(),
                    registry: Some(self.registry),
                }),
            }),
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.stopped {
            f.write_str("stopped\n")?;
        }
        if self.roles.is_empty() && !self.stopped {
            f.write_str("no role was asked for yet\n")?;
        }
        for role in &self.roles {
            role.fmt(f)?;
        }
        Ok(())
    }
}
