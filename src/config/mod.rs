//! What is configured for a service's calls: gRPC's service config.
//!
//! A [`ServiceConfig`] says for each method how long its calls may take, whether they wait for a ready instance, and
//! how they are made again when they fail; and for all together when a service that fails is left alone. A
//! [`Channel`](crate::Channel) keeps to the one of its role, a [`RetryLayer`](crate::RetryLayer) to its policies.

#[cfg(feature = "service-config")]
mod json;

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arc_swap::{ArcSwap, Guard};

#[cfg(doc)]
use crate::error::Kind;
use crate::{
    Backoff, HedgingPolicy, RetryPolicy,
    backoff::check_duration,
    error::{Error, shown},
    retry::Throttling,
};

/// What is configured for a service's calls, method by method. The default configures nothing.
///
/// ```
/// use std::time::Duration;
/// use switchboard::{RetryPolicy, ServiceConfig, config::{MethodConfig, MethodName}};
///
/// let config = ServiceConfig::new()
///     .method(MethodName::all(), MethodConfig::new().timeout(Duration::from_secs(5))?)?
///     .method(
///         MethodName::method("echo.Echo", "Say")?,
///         MethodConfig::new().retry(RetryPolicy::new(3)?.idempotent())?,
///     )?;
/// # Ok::<(), switchboard::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ServiceConfig {
    methods: HashMap<Box<str>, MethodConfig>,
    /// For those that are not named.
    others: MethodConfig,
    has_others: bool,
    throttling: Option<Throttling>,
    health_service: Option<Arc<str>>,
}

/// Which methods a [`MethodConfig`] is for. Of several that fit a method, the most particular is its own, alone: they are not
/// put together.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MethodName(Option<Box<str>>);

/// What is configured for the calls of a method. The default configures nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MethodConfig {
    pub(crate) timeout: Option<Duration>,
    pub(crate) wait_for_ready: Option<bool>,
    repeat: Repeat,
}

/// How calls are made again.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum Repeat {
    /// Only what was certainly not processed.
    #[default]
    Transparent,
    /// And what the policy says, one attempt after the other.
    Retry(RetryPolicy),
    /// Several attempts at once.
    Hedge(HedgingPolicy),
}

/// A [`ServiceConfig`] that can be replaced while calls are made. Clones are the same one.
#[derive(Clone)]
pub struct SharedConfig(Arc<Shared>);

struct Shared {
    // Both relaxed: a call that misses that it was replaced an instant ago is as one that was made before.
    plain: AtomicBool,
    throttled: AtomicBool,
    config: ArcSwap<ServiceConfig>,
}

// === impl ServiceConfig ===

impl ServiceConfig {
    /// Nothing is configured.
    pub fn new() -> Self {
        Self::default()
    }

    /// Configures these methods.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] if they are configured already.
    pub fn method(mut self, name: MethodName, config: MethodConfig) -> Result<Self, Error> {
        let taken = match name.0 {
            Some(name) if self.methods.contains_key(&name) => Some(name),
            Some(name) => {
                self.methods.insert(name, config);
                None
            }
            None if self.has_others => Some("all methods".into()),
            None => {
                self.others = config;
                self.has_others = true;
                None
            }
        };
        match taken {
            Some(name) => {
                let why = format!("{} is configured twice", shown(&name));
                Err(Error::invalid("service config", why))
            }
            None => Ok(self),
        }
    }

    /// When a service that fails is left alone. Default: never.
    #[must_use]
    pub const fn throttling(mut self, throttling: Throttling) -> Self {
        self.throttling = Some(throttling);
        self
    }

    /// The service whose health each peer is asked for, over `grpc.health.v1`: those that do not serve get no calls. A manager
    /// heeds it when it first asks for the role (feature `health`); without it, it does as its
    /// [`Connector`](crate::transport::Connector) says. Default: none.
    #[must_use]
    pub fn health_check(mut self, service: impl Into<Arc<str>>) -> Self {
        self.health_service = Some(service.into());
        self
    }

    /// What is configured for a method: `/package.Service/Method`.
    #[inline]
    pub fn for_path(&self, path: &str) -> &MethodConfig {
        match self.methods.is_empty() {
            true => &self.others,
            false => self.look_up(path),
        }
    }

    fn look_up(&self, path: &str) -> &MethodConfig {
        if let Some(own) = self.methods.get(path) {
            return own;
        }
        let service = path.rfind('/').and_then(|end| path.get(..=end));
        let service = service.and_then(|service| self.methods.get(service));
        service.unwrap_or(&self.others)
    }

    /// The service whose health peers are asked for, if one is.
    #[cfg(feature = "manager")]
    pub(crate) fn health_service(&self) -> Option<&str> {
        self.health_service.as_deref()
    }

    fn is_plain(&self) -> bool {
        self.methods.is_empty() && self.others == MethodConfig::default()
    }

    pub(crate) const fn throttled(&self) -> Option<Throttling> {
        self.throttling
    }
}

impl From<MethodConfig> for ServiceConfig {
    /// For all methods.
    fn from(others: MethodConfig) -> Self {
        Self {
            others,
            has_others: true,
            ..Self::default()
        }
    }
}

impl From<RetryPolicy> for ServiceConfig {
    /// For all methods.
    fn from(policy: RetryPolicy) -> Self {
        Self::from(MethodConfig {
            repeat: Repeat::Retry(policy),
            ..MethodConfig::default()
        })
    }
}

impl From<HedgingPolicy> for ServiceConfig {
    /// For all methods.
    fn from(policy: HedgingPolicy) -> Self {
        Self::from(MethodConfig {
            repeat: Repeat::Hedge(policy),
            ..MethodConfig::default()
        })
    }
}

// === impl MethodName ===

impl MethodName {
    /// One method of a service: `echo.Echo` and `Say`.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] if one of them is empty or has a slash.
    pub fn method(service: &str, method: &str) -> Result<Self, Error> {
        check_name("service", service)?;
        check_name("method", method)?;
        Ok(Self(Some(format!("/{service}/{method}").into())))
    }

    /// All methods of a service that are not named themselves.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] if it is empty or has a slash.
    pub fn service(service: &str) -> Result<Self, Error> {
        check_name("service", service)?;
        Ok(Self(Some(format!("/{service}/").into())))
    }

    /// All methods that are not named, and whose service is not either.
    pub const fn all() -> Self {
        Self(None)
    }
}

fn check_name(what: &'static str, name: &str) -> Result<(), Error> {
    match name.is_empty() || name.contains('/') {
        true => {
            let why = format!("{} is no name: it is empty, or has a slash", shown(name));
            Err(Error::invalid(what, why))
        }
        false => Ok(()),
    }
}

// === impl MethodConfig ===

impl MethodConfig {
    /// Nothing is configured.
    pub fn new() -> Self {
        Self::default()
    }

    /// How long a call may take, all attempts together; a call that asks for less gets that. From zero, where every call fails,
    /// to ten years.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] over ten years.
    pub fn timeout(mut self, timeout: Duration) -> Result<Self, Error> {
        let most = 3650 * Backoff::LONGEST;
        self.timeout = Some(check_duration("timeout", timeout, Duration::ZERO, most)?);
        Ok(self)
    }

    /// Whether calls that do not say ([`WaitForReady`](crate::WaitForReady)) wait for a ready instance.
    #[must_use]
    pub const fn wait_for_ready(mut self, wait: bool) -> Self {
        self.wait_for_ready = Some(wait);
        self
    }

    /// Calls that fail are made again.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] if they are hedged.
    pub fn retry(self, policy: RetryPolicy) -> Result<Self, Error> {
        match self.repeat {
            Repeat::Hedge(_) => Err(both()),
            _ => Ok(Self {
                repeat: Repeat::Retry(policy),
                ..self
            }),
        }
    }

    /// Calls are made several times at once.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] if they are retried.
    pub fn hedge(self, policy: HedgingPolicy) -> Result<Self, Error> {
        match self.repeat {
            Repeat::Retry(_) => Err(both()),
            _ => Ok(Self {
                repeat: Repeat::Hedge(policy),
                ..self
            }),
        }
    }

    /// How calls are made again.
    pub const fn repeat(&self) -> &Repeat {
        &self.repeat
    }
}

fn both() -> Error {
    Error::invalid("method config", "a method is retried or hedged, not both")
}

// === impl SharedConfig ===

impl SharedConfig {
    /// This one, until it is replaced.
    pub fn new(config: impl Into<ServiceConfig>) -> Self {
        let config = config.into();
        Self(Arc::new(Shared {
            plain: AtomicBool::new(config.is_plain()),
            throttled: AtomicBool::new(config.throttled().is_some()),
            config: ArcSwap::from_pointee(config),
        }))
    }

    /// Replaces it. Calls that begin later are made by the new one, and so are repeats of those under way that
    /// began with a policy. A throttle is as full as before.
    pub fn replace(&self, config: impl Into<ServiceConfig>) {
        let config = config.into();
        let plain = config.is_plain();
        // Of two that replace it at once, the flag may be the other's: it may only err on the safe side.
        self.0.plain.fetch_and(plain, Ordering::Relaxed);
        let throttled = config.throttled().is_some();
        self.0.throttled.fetch_or(throttled, Ordering::Relaxed);
        self.0.config.store(Arc::new(config));
    }

    /// What is configured now.
    pub fn current(&self) -> Arc<ServiceConfig> {
        self.0.config.load_full()
    }

    /// Whether nothing is configured for any method: a look that costs less than one at the configuration.
    #[inline]
    pub(crate) fn is_plain(&self) -> bool {
        self.0.plain.load(Ordering::Relaxed)
    }

    /// Whether it ever said when a service is left alone.
    #[inline]
    pub(crate) fn is_throttled(&self) -> bool {
        self.0.throttled.load(Ordering::Relaxed)
    }

    /// What is configured now, for a moment: not to be held across an await.
    #[inline]
    pub(crate) fn load(&self) -> Guard<Arc<ServiceConfig>> {
        self.0.config.load()
    }
}

impl Default for SharedConfig {
    fn default() -> Self {
        Self::new(ServiceConfig::default())
    }
}

impl<C: Into<ServiceConfig>> From<C> for SharedConfig {
    fn from(config: C) -> Self {
        Self::new(config)
    }
}

impl fmt::Debug for SharedConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SharedConfig").field(&self.load()).finish()
    }
}
