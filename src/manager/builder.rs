//! How a manager is made.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use super::{ConnectionManager, Inner, Open, Roles};
#[cfg(doc)]
use crate::error::Kind;
use crate::{
    backoff::{Backoff, check_duration},
    config::{ServiceConfig, SharedConfig},
    error::Error,
    events::Bus,
    pool::PoolConfig,
    registry::{Registry, session::check_role},
    retry::Target,
    transport::Connector,
};

/// Configures a [`ConnectionManager`]; see [`ConnectionManager::builder`].
#[derive(Clone, Debug)]
pub struct Builder {
    registry: Arc<dyn Registry>,
    pools: PoolConfig,
    connector: Connector,
    idle_after: Option<Duration>,
    service_config: ServiceConfig,
    service_configs: BTreeMap<String, ServiceConfig>,
}

// === impl Builder ===

impl Builder {
    pub(super) fn new(registry: Arc<dyn Registry>) -> Self {
        Self {
            registry,
            pools: PoolConfig::default(),
            connector: Connector::new(),
            idle_after: None,
            service_config: ServiceConfig::default(),
            service_configs: BTreeMap::new(),
        }
    }

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

    /// Lets go of the connections of a role that nobody has used for this long. Its instances stay known, so that the
    /// next call, or whoever else asks for it, connects them at once, and waits for that as for a first connection.
    /// Default `None`: never. 1 s to 1 day.
    ///
    /// A role is in use while a call is in flight or waits, while somebody [watches](ConnectionManager::watch) it, and
    /// if it is [depended on](ConnectionManager::depends_on); to hold a channel is not to use it. That nobody does is
    /// found out a quarter of this time late at most.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] outside these bounds.
    pub fn idle_after(mut self, quiet: Option<Duration>) -> Result<Self, Error> {
        if let Some(quiet) = quiet {
            check_duration("idle time", quiet, Duration::from_secs(1), Backoff::LONGEST)?;
        }
        self.idle_after = quiet;
        Ok(self)
    }

    /// What is configured for the calls of each role: timeouts, whether they wait, how they are made again. Default: nothing.
    /// See [`ServiceConfig`].
    #[must_use]
    pub fn service_configs(mut self, config: impl Into<ServiceConfig>) -> Self {
        self.service_config = config.into();
        self
    }

    /// The same for one role, in the place of that. [`ConnectionManager::configure`] replaces it later.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] if this cannot be a role.
    pub fn service_config(
        mut self,
        role: &str,
        config: impl Into<ServiceConfig>,
    ) -> Result<Self, Error> {
        check_role(role)?;
        self.service_configs.insert(role.to_owned(), config.into());
        Ok(self)
    }

    /// The manager. No I/O, and nothing has to be up.
    #[must_use]
    pub fn build(self) -> ConnectionManager {
        let targets = self.service_configs.into_iter();
        let targets = targets.map(|(role, config)| {
            let target = Target::new(SharedConfig::new(config));
            (role, Arc::new(target))
        });
        ConnectionManager {
            inner: Arc::new(Inner {
                config: self.pools,
                connector: self.connector,
                idle_after: self.idle_after,
                service_config: self.service_config,
                #[cfg(feature = "component")]
                components: Arc::default(),
                roles: Mutex::new(Roles {
                    targets: targets.collect(),
                    known: BTreeMap::new(),
                    released: Vec::new(),
                    open: Some(Open {
                        registry: self.registry,
                        bus: Bus::new(),
                    }),
                }),
            }),
        }
    }
}
