//! All connections of a process, in one place: made, watched, told of, and ended.
//!
//! | to | is |
//! | --- | --- |
//! | call a role | [`channel`](ConnectionManager::channel), [`try_channel`](ConnectionManager::try_channel) |
//! | have it connected, whether it is called or not | [`depends_on`](ConnectionManager::depends_on) |
//! | wait until enough are there | [`ready`](ConnectionManager::ready) |
//! | call each instance | [`channels`](ConnectionManager::channels), [`Channel::to`] |
//! | follow the instances of a role | [`watch`](ConnectionManager::watch) |
//! | follow all that happens | [`events`](ConnectionManager::events) |
//! | look | [`status`](ConnectionManager::status) |
//! | let go | [`release`](ConnectionManager::release), [`Builder::idle_after`], [`stop`](ConnectionManager::stop), [`stop_gracefully`](ConnectionManager::stop_gracefully) |
//!
//! None of these waits for the network but those that are `async`, and those are bounded.

mod builder;
mod channel;
#[cfg(feature = "component")]
mod components;
mod instance;
mod status;
mod watch;

use std::{
    collections::{BTreeMap, btree_map},
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::future::join_all;

#[cfg(feature = "component")]
pub(crate) use self::components::Components;
pub use self::{
    builder::Builder,
    channel::{Channel, ResponseBody, ResponseFuture},
    instance::Instance,
    status::Status,
    watch::{InstanceChange, Watch},
};
pub use crate::pool::status::{Connectivity, Discovery, EndpointStatus, Status as RoleStatus};
#[cfg(feature = "health")]
use crate::transport::HealthCheck;
use crate::{
    config::{ServiceConfig, SharedConfig},
    error::{Error, Kind},
    events::{Bus, EventKind, Events},
    pool::{Held, Pool, PoolConfig, Setup},
    registry::{Registry, session::check_role},
    retry::Target,
    transport::{Connections, Connector},
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

struct Inner {
    config: PoolConfig,
    connector: Connector,
    idle_after: Option<Duration>,
    /// Of roles that have none of their own.
    service_config: ServiceConfig,
    #[cfg(feature = "component")]
    components: Arc<Components>,
    roles: Mutex<Roles>,
}

struct Roles {
    /// What is configured for their calls, whether they were asked for or not.
    targets: BTreeMap<String, Arc<Target>>,
    known: BTreeMap<String, Role>,
    /// Their pools are finishing the calls in flight.
    released: Vec<Pool<Connections>>,
    /// None once it was stopped.
    open: Option<Open>,
}

/// What a manager has until it is stopped.
#[derive(Clone)]
struct Open {
    registry: Arc<dyn Registry>,
    bus: Bus,
}

struct Role {
    pool: Pool<Connections>,
    /// It is depended on, and so never idle.
    depended_on: Option<Held>,
}

// === impl ConnectionManager ===

impl ConnectionManager {
    /// A manager over this registry, to be configured.
    pub fn builder(registry: impl Registry) -> Builder {
        Builder::new(Arc::new(registry))
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
        self.pool(role).map(Channel::new)
    }

    /// Looks for a role and connects it in the background from here on, whether anybody calls it or not. Returns at
    /// once, and needs nothing to be up. Such a role is never [idle](Builder::idle_after).
    ///
    /// # Errors
    ///
    /// As [`ConnectionManager::try_channel`].
    pub fn depends_on(&self, role: &str) -> Result<(), Error> {
        self.pool(role)?;
        // Released meanwhile, it is not depended on: one of the two came first.
        if let Some(role) = self.inner.lock().known.get_mut(role) {
            let interest = &role.pool.shared().interest;
            role.depended_on = Some(interest.hold());
            interest.want();
        }
        Ok(())
    }

    /// Configures the calls of a role, in place of what was configured before: [`Builder::service_config`] for a role, and later
    /// than that. Calls that begin from here on are made by it, through channels that are held already too.
    ///
    /// # Errors
    ///
    /// As [`ConnectionManager::try_channel`].
    pub fn configure(&self, role: &str, config: impl Into<ServiceConfig>) -> Result<(), Error> {
        check_role(role)?;
        let config = config.into();
        let target = {
            let mut roles = self.inner.lock();
            if roles.open.is_none() {
                return Err(Error::new(Kind::Stopped).with_role(&role.into()));
            }
            self.inner.target(&mut roles, role)
        };
        target.config().replace(config);
        Ok(())
    }

    /// Lets go of a role: it is not looked for nor [depended on](ConnectionManager::depends_on) any more, calls in flight
    /// finish within [`PoolConfig::drain`], 30 s by default, and later ones through channels that are still held fail with [`Kind::Stopped`], as its
    /// watches end. Asked for again, it begins anew. Returns at once, a moment before the pool's driver has heard of it;
    /// `false` if the role was not asked for. To have the calls end sooner, stop the manager.
    ///
    /// # Errors
    ///
    /// [`Kind::Stopped`] after [`ConnectionManager::stop`].
    pub fn release(&self, role: &str) -> Result<bool, Error> {
        let mut roles = self.inner.lock();
        let bus = match &roles.open {
            Some(open) => open.bus.clone(),
            None => return Err(Error::new(Kind::Stopped).with_role(&role.into())),
        };
        let Some(known) = roles.known.remove(role) else {
            return Ok(false);
        };
        known
            .pool
            .end(self.inner.config.drain, Some("the role was released"));
        roles.released.retain(Pool::is_running);
        roles.released.push(known.pool);
        // Whoever listens may ask this manager, and does not find the lock taken.
        drop(roles);
        bus.tell(&role.into(), EventKind::Released);
        Ok(true)
    }

    /// The instances of a role that are known now, ready or not, in the order of their ids. The role is looked for
    /// from here on, as by [`ConnectionManager::channel`]: of one that was not asked for before nothing is known yet.
    ///
    /// # Errors
    ///
    /// As [`ConnectionManager::try_channel`].
    pub fn channels(&self, role: &str) -> Result<Vec<Instance>, Error> {
        let pool = self.pool(role)?;
        let status = pool.status();
        if status.idle {
            pool.shared().interest.want();
        }
        let channel = Channel::new(pool);
        let instance = |endpoint| Instance::new(endpoint, &channel);
        Ok(status.endpoints.into_iter().filter_map(instance).collect())
    }

    /// The instances of a role as they come, change and go, beginning with those that are there; see [`Watch`]. The
    /// role is looked for from here on, and not idle while it is watched.
    ///
    /// ```
    /// use futures_util::StreamExt as _;
    /// use switchboard::{ConnectionManager, MemoryRegistry, Session, manager::InstanceChange};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), switchboard::Error> {
    /// let registry = MemoryRegistry::new();
    /// let _held = registry.register(Session::new("echo", "127.0.0.1:1").with_id(7)).await?;
    /// let manager = ConnectionManager::builder(registry).build();
    ///
    /// let mut seen = manager.watch("echo");
    /// while let Some(change) = seen.next().await {
    ///     println!("{change}");               // echo 7 at 127.0.0.1:1: added
    ///     if let InstanceChange::Synced = change {
    ///         manager.stop().await;
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn watch(&self, role: &str) -> Watch {
        Watch::new(self.pool(role), role)
    }

    /// Waits until `n` instances of a role are ready, and returns them, or more if more are, in the order of their ids.
    /// Zero are there at once. The role is looked for from here on, and not idle while this waits.
    ///
    /// # Errors
    ///
    /// When `within` has passed, what is missing: [`Kind::RegistryUnreachable`] if nothing could be known,
    /// [`Kind::NoSession`] if none is registered, [`Kind::NotConnected`] with how many are ready and what ails the
    /// others; [`Kind::Stopped`] if the manager is stopped or the role released; else as
    /// [`ConnectionManager::try_channel`].
    ///
    /// # Cancel safety
    ///
    /// Dropping the future changes nothing.
    pub async fn ready(
        &self,
        role: &str,
        n: usize,
        within: Duration,
    ) -> Result<Vec<Instance>, Error> {
        let pool = self.pool(role)?;
        let ready = pool.enough(n, within).await?;
        let channel = Channel::new(pool);
        let instance = |endpoint| Instance::new(endpoint, &channel);
        Ok(ready.into_iter().filter_map(instance).collect())
    }

    /// What happens to this manager's connections, from here on; see [`Events`].
    pub fn events(&self) -> Events {
        match &self.inner.lock().open {
            Some(open) => open.bus.events(),
            None => Bus::of_nobody().events(),
        }
    }

    /// What it is doing at this moment. Costs a walk over all instances, and holds up nobody.
    pub fn status(&self) -> Status {
        let (pools, stopped) = {
            let roles = self.inner.lock();
            let pools: Vec<_> = roles.known.values().map(|role| role.pool.clone()).collect();
            (pools, roles.open.is_none())
        };
        Status {
            #[cfg(feature = "component")]
            components: self.inner.components.status(),
            roles: pools.iter().map(Pool::status).collect(),
            stopped,
        }
    }

    /// Whether it was stopped.
    pub fn is_stopped(&self) -> bool {
        self.inner.lock().open.is_none()
    }

    /// Ends everything: calls in flight end as `CANCELLED`, later ones fail with [`Kind::Stopped`], tasks
    /// end and sockets are closed. Returns when they are, after two seconds at most; half a second later where nobody
    /// drives the runtime that a role lives on. It lets go of the registry too, whose own connections end with its last
    /// handle.
    ///
    /// From here on every method says that it is stopped: those that can fail by [`Kind::Stopped`], streams by their
    /// last item, and [`ConnectionManager::status`] by [`Status::stopped`].
    ///
    /// # Cancel safety
    ///
    /// Once polled the stop goes on without its waiter. Stopping twice is stopping once.
    pub async fn stop(&self) {
        self.stop_gracefully(Duration::ZERO).await;
    }

    /// The same, but calls in flight have this long to finish, one day at most; those that are not sent yet, and later
    /// ones, fail at once. Returns when all have, after this and two seconds at most. Of several stops the one that
    /// ends first counts.
    ///
    /// # Cancel safety
    ///
    /// As [`ConnectionManager::stop`].
    pub async fn stop_gracefully(&self, grace: Duration) {
        let (open, pools): (_, Vec<_>) = {
            let mut roles = self.inner.lock();
            roles.released.retain(Pool::is_running);
            let known = roles.known.values().map(|role| &role.pool);
            let pools = known.chain(&roles.released).cloned().collect();
            (roles.open.take(), pools)
        };
        // With it goes what the registry keeps open, unless somebody else holds it too; and neither that nor whoever
        // listens finds the lock taken.
        if let Some(Open { bus, registry }) = open {
            bus.tell(&"".into(), EventKind::Stopped);
            drop(registry);
        }
        join_all(pools.iter().map(|pool| pool.stop_gracefully(grace))).await;
    }

    fn pool(&self, role: &str) -> Result<Pool<Connections>, Error> {
        check_role(role)?;
        // The registry may be a user's own, and ask this manager: not under the lock.
        let Open { registry, bus } = {
            let roles = self.inner.lock();
            match (&roles.open, roles.known.get(role)) {
                (None, _) => return Err(Error::new(Kind::Stopped).with_role(&role.into())),
                (_, Some(known)) if known.pool.is_running() => return Ok(known.pool.clone()),
                (Some(open), _) => open.clone(),
            }
        };
        let updates = registry.discover(role)?.updates();
        let target = self.inner.target(&mut self.inner.lock(), role);
        let connector = self.inner.connector(&target)?;
        let setup = Setup {
            bus,
            idle_after: self.inner.idle_after,
            target,
        };
        // Begun under the lock, or somebody else's would dial and tell events beside it.
        let begin = || Pool::with(role, self.inner.config, setup, updates, connector);
        let mut roles = self.inner.lock();
        if roles.open.is_none() {
            return Err(Error::new(Kind::Stopped).with_role(&role.into()));
        }
        // Somebody else may have been faster; a pool whose runtime has ended is replaced.
        let known = match roles.known.entry(role.to_owned()) {
            btree_map::Entry::Occupied(known) if known.get().pool.is_running() => known.into_mut(),
            btree_map::Entry::Occupied(mut ended) => {
                let new = begin()?;
                let depended_on = ended.get().depended_on.is_some();
                let depended_on = depended_on.then(|| new.shared().interest.hold());
                ended.insert(Role {
                    pool: new,
                    depended_on,
                });
                ended.into_mut()
            }
            btree_map::Entry::Vacant(vacant) => vacant.insert(Role {
                pool: begin()?,
                depended_on: None,
            }),
        };
        Ok(known.pool.clone())
    }
}

impl fmt::Debug for ConnectionManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let roles = self.inner.lock();
        f.debug_struct("ConnectionManager")
            .field("registry", &roles.open.as_ref().map(|open| &open.registry))
            .field("roles", &roles.known.keys())
            .finish_non_exhaustive()
    }
}

// === impl Inner ===

impl Inner {
    /// What is configured for a role's calls.
    fn target(&self, roles: &mut Roles, role: &str) -> Arc<Target> {
        match roles.targets.get(role) {
            Some(target) => target.clone(),
            None => {
                let config = SharedConfig::new(self.service_config.clone());
                let target = Arc::new(Target::new(config));
                roles.targets.insert(role.to_owned(), target.clone());
                target
            }
        }
    }

    /// How a role is connected: as all are, but for the health that its configuration has watched.
    fn connector(&self, target: &Target) -> Result<Connector, Error> {
        let connector = self.connector.clone();
        match target.config().load().health_service() {
            None => Ok(connector),
            #[cfg(feature = "health")]
            Some(service) => Ok(connector.health_check(HealthCheck::Service(service.into()))),
            #[cfg(not(feature = "health"))]
            Some(_) => {
                let why = "healthCheckConfig takes the feature health";
                Err(Error::invalid("service config", why))
            }
        }
    }

    /// Held for a look-up, never across an await, and never on a call's path.
    fn lock(&self) -> std::sync::MutexGuard<'_, Roles> {
        // A panic under it would have to come from the registry; the map is whole all the same.
        self.roles.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
