//! A registry in etcd.
//!
//! It speaks with etcd through this crate's own pool and transport: each etcd member is an endpoint, calls
//! are spread over those that are connected, and a member that is gone or silent is found out by
//! keepalive.

mod client;
mod failure;
mod members;
mod past;
pub(super) mod store;

use std::{collections::BTreeSet, fmt, sync::Arc, time::Duration};

use self::{
    client::{Client, User},
    members::Members,
    store::EtcdStore,
};
use super::{
    Codec, Fixed, Register, Registry, Session,
    home::{self, Home},
    session::check_prefix,
};
#[cfg(feature = "tls")]
use crate::transport::TlsConfig;
use crate::{
    Backoff,
    address::HostPort,
    backoff::check_duration,
    discover::Discovery,
    error::{Error, shown},
    transport::Connector,
};

/// Generated from `proto/etcd.proto`; `tests/generated.rs` checks that it is current.
// None of it is ours to mend.
#[allow(
    clippy::all,
    dead_code,
    missing_debug_implementations,
    missing_docs,
    rust_2018_idioms,
    unreachable_pub
)]
pub(crate) mod pb {
    include!(concat!(env!("CARGO_MANIFEST_DIR"), "/proto/gen/etcd.rs"));
}

/// A registry in etcd (3.4 and later), under one prefix.
///
/// Making one does no I/O, so it works with etcd away; discovery begins when etcd can be reached, and a
/// registration fails until then, or waits for it in the [background](Register::background). A clone is another handle on the same connections, which are made at first
/// use, on the runtime of that use, and closed with the last handle. When that runtime has ended, the next use
/// makes others on its own.
///
/// Endpoints are the members of one cluster; each request goes to one that is connected and answers, and to another
/// when it does not. [`EtcdRegistry::builder`] is for an etcd that wants TLS, or a user and a password.
///
/// All that goes through the clones of one handle shares its connections, and all who look for a role share one
/// watch. A registration watches its own key alone: it is to know at once when that is gone, and needs not know
/// thousands of others. etcd's `grpc-proxy` does not answer whether a watch lives, so through it watches
/// are made anew every few seconds.
///
/// ```no_run
/// use switchboard::{EtcdRegistry, Session};
///
/// # async fn run() -> Result<(), switchboard::Error> {
/// let registry = EtcdRegistry::connect(["http://127.0.0.1:2379"], "demo").await?;
/// let registration = registry.register(Session::new("echo", "10.0.0.5:21123")).await?;
/// registration.deregister().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct EtcdRegistry {
    client: Arc<Client>,
    home: Home,
    timeout: Duration,
    backoff: Backoff,
}

/// Configures an [`EtcdRegistry`] whose etcd wants TLS, or asks who one is; see [`EtcdRegistry::builder`].
///
/// ```
/// use switchboard::EtcdRegistry;
///
/// # async fn run() -> Result<(), switchboard::Error> {
/// let registry = EtcdRegistry::builder(["http://10.0.0.1:2379", "http://10.0.0.2:2379"], "demo")
///     .user("querynode", "secret")
///     .connect()
///     .await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "a builder does nothing until it connects"]
pub struct EtcdBuilder {
    endpoints: Vec<String>,
    prefix: String,
    user: Option<(String, String)>,
    #[cfg(feature = "tls")]
    tls: Option<TlsConfig>,
}

// === impl EtcdRegistry ===

impl EtcdRegistry {
    /// The default time to live of a session whose process is gone.
    pub const TTL: Duration = Duration::from_secs(10);

    /// A registry at these endpoints, each `http://host:port`, with its keys under this prefix: a namespace of its
    /// own. Others have [`EtcdRegistry::builder`].
    ///
    /// It does no I/O and is ready at once; that it is async leaves room for what may need some. Cancel safe.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid) without an endpoint; for an endpoint that is not
    /// `http://host:port`; and for a prefix that is not 1 to 256 bytes without spaces, control characters, a slash
    /// at its end or two in a row.
    pub async fn connect<E: AsRef<str>>(
        endpoints: impl IntoIterator<Item = E>,
        prefix: impl AsRef<str>,
    ) -> Result<Self, Error> {
        Self::builder(endpoints, prefix).connect().await
    }

    /// A registry as by [`EtcdRegistry::connect`], of an etcd that wants TLS or asks who one is.
    pub fn builder<E: AsRef<str>>(
        endpoints: impl IntoIterator<Item = E>,
        prefix: impl AsRef<str>,
    ) -> EtcdBuilder {
        EtcdBuilder {
            endpoints: endpoints
                .into_iter()
                .map(|endpoint| endpoint.as_ref().to_owned())
                .collect(),
            prefix: prefix.as_ref().to_owned(),
            user: None,
            #[cfg(feature = "tls")]
            tls: None,
        }
    }

    /// How long a session that is registered through this handle outlives its process. Default 10 s; 1 s to
    /// 1 day, in whole seconds, rounded up. etcd itself raises it to a few of its election timeouts.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid) outside these bounds.
    pub fn with_ttl(mut self, ttl: Duration) -> Result<Self, Error> {
        self.home.ttl = check_duration("TTL", ttl, Duration::from_secs(1), Backoff::LONGEST)?;
        Ok(self)
    }

    /// How long one request to etcd through this handle may take, all attempts at several members together.
    /// Default 5 s; 10 ms to 10 min. Handles that are cloned from it share its watches, and no others do.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid) outside these bounds.
    pub fn with_timeout(mut self, timeout: Duration) -> Result<Self, Error> {
        let (least, most) = (Duration::from_millis(10), Duration::from_secs(600));
        self.timeout = check_duration("timeout", timeout, least, most)?;
        self.watch_anew();
        Ok(self)
    }

    /// How discovery through this handle tries again while etcd cannot be reached. Default 100 ms × 2,
    /// ± 20 %, at most 1 s. Handles that are cloned from it share its watches, and no others do.
    #[must_use]
    pub fn with_backoff(mut self, backoff: Backoff) -> Self {
        self.backoff = backoff;
        self.watch_anew();
        self
    }

    /// How sessions are written and read through this handle. Default [`Naming`](super::Naming).
    #[must_use]
    pub fn with_codec(mut self, codec: impl Codec) -> Self {
        self.home.codec = Arc::new(codec);
        self
    }

    /// Registers a session under a lease, and keeps it alive in the background until the handle is dropped.
    /// What is lost is registered again. See [`Register`] for what can be chosen, and for its errors.
    pub fn register(&self, session: Session) -> Register {
        Register::new(self.home.clone(), session)
    }

    /// An id that no other session under this prefix was given: the value of a counter in etcd, from 1, under
    /// [`Codec::counter`].
    ///
    /// # Errors
    ///
    /// [`Kind::RegistryUnreachable`](crate::Kind::RegistryUnreachable) if etcd does not answer;
    /// [`Kind::Invalid`](crate::Kind::Invalid) if what stands under the counter's key is no number, or outside a
    /// tokio runtime; [`Kind::RegistryRefused`](crate::Kind::RegistryRefused) if too many others ask at the same time, 200 tries
    /// in a row, or if etcd refuses.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, or an answer is lost, an id may be skipped.
    pub async fn allocate_id(&self) -> Result<u64, Error> {
        self.home.allocate_id().await
    }

    fn watch_anew(&mut self) {
        let store = EtcdStore {
            client: self.client.clone(),
            timeout: self.timeout,
        };
        self.home.watch_through(Arc::new(store), self.backoff);
    }
}

impl Registry for EtcdRegistry {
    fn discover(&self, role: &str) -> Result<Discovery, Error> {
        self.home.discover(role)
    }

    fn register_session(&self, session: Session) -> Result<Register, Error> {
        Ok(self.register(session))
    }
}

// === impl EtcdBuilder ===

impl EtcdBuilder {
    /// Proves to be this user of etcd's own authentication. The token that etcd gives for it is asked for anew
    /// whenever etcd no longer knows it. Without TLS name and password can be read by whoever sees the traffic.
    pub fn user(mut self, name: impl Into<String>, password: impl Into<String>) -> Self {
        self.user = Some((name.into(), password.into()));
        self
    }

    /// Speaks TLS, trusting whom this says, and proving to be whom it says if it has an identity. All endpoints
    /// are `https://host:port` then.
    #[cfg(feature = "tls")]
    pub fn tls(mut self, config: TlsConfig) -> Self {
        self.tls = Some(config);
        self
    }

    /// The registry. It does no I/O. Cancel safe.
    ///
    /// # Errors
    ///
    /// As [`EtcdRegistry::connect`]; with TLS, for an endpoint that is not `https://host:port`, and if nobody is
    /// trusted.
    pub async fn connect(self) -> Result<EtcdRegistry, Error> {
        check_prefix(&self.prefix)?;
        let scheme = self.scheme();
        let mut addresses = BTreeSet::new();
        for endpoint in &self.endpoints {
            addresses.insert(address_of(endpoint, scheme)?.to_owned());
        }
        if addresses.is_empty() {
            let why = format!("none is given; at least one {scheme}host:port is needed");
            return Err(Error::invalid("endpoints", why));
        }
        let members = addresses
            .into_iter()
            .map(|address| Session::new("etcd", address));
        // A watch is a call, so a connection that is in use is never idle. etcd takes more than one ping in
        // 5 s for an attack.
        let connector = Connector::new()
            .keepalive(Some(Duration::from_secs(5)), Duration::from_secs(3))?
            .keepalive_while_idle(false);
        #[cfg(feature = "tls")]
        let connector = match self.tls {
            Some(tls) => connector.tls(tls)?,
            None => connector,
        };
        let Self { prefix, user, .. } = self;
        let members = Members::new(Fixed::new(members)?, connector);
        let user = user.map(|(name, password)| User::new(name, password));
        let client = Arc::new(Client::new(members, user));
        let (timeout, backoff) = (client::TIMEOUT, home::backoff());
        let store = EtcdStore {
            client: client.clone(),
            timeout,
        };
        Ok(EtcdRegistry {
            client,
            home: Home::new(Arc::new(store), backoff, prefix, EtcdRegistry::TTL),
            timeout,
            backoff,
        })
    }

    /// How its endpoints begin.
    fn scheme(&self) -> &'static str {
        #[cfg(feature = "tls")]
        if self.tls.is_some() {
            return "https://";
        }
        "http://"
    }
}

impl fmt::Debug for EtcdRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdRegistry")
            .field("client", &self.client)
            .field("codec", &self.home.codec)
            .field("prefix", &self.home.root)
            .field("ttl", &self.home.ttl)
            .finish_non_exhaustive()
    }
}

/// The `host:port` of an endpoint.
pub(crate) fn address_of<'a>(endpoint: &'a str, scheme: &str) -> Result<&'a str, Error> {
    let invalid = |why: String| Err(Error::invalid("endpoint", why));
    // A password may stand there.
    if let Some((_, host)) = endpoint.rsplit_once('@') {
        return invalid(format!(
            "what ends with {} names a user, whom EtcdRegistry::builder(..).user(..) is told; only {scheme}host:port is allowed",
            shown(host)
        ));
    }
    let quoted = shown(endpoint);
    let Some(address) = endpoint.strip_prefix(scheme) else {
        return match scheme {
            "http://" if endpoint.starts_with("https://") => invalid(format!(
                "{quoted} wants TLS, which EtcdRegistry::builder(..).tls(..) is told whom to trust for; without it only http://host:port is allowed"
            )),
            "https://" if endpoint.starts_with("http://") => invalid(format!(
                "{quoted} is not to be spoken with in plaintext; with TLS only https://host:port is allowed"
            )),
            _ => invalid(format!("{quoted} is not {scheme}host:port")),
        };
    };
    let address = address.strip_suffix('/').unwrap_or(address);
    match HostPort::parse(address) {
        Ok(_) => Ok(address),
        Err(error) => {
            let why = error.reason().unwrap_or_default();
            invalid(format!("{quoted} is not {scheme}host:port: {why}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::IntoFuture as _;

    use futures_util::{FutureExt as _, StreamExt as _};
    use tokio::time::{Instant, timeout};

    use super::*;
    use crate::{Kind, discover::Update};

    fn connect(endpoints: &[&str], prefix: &str) -> Result<EtcdRegistry, Error> {
        let connecting = EtcdRegistry::connect(endpoints, prefix);
        connecting.now_or_never().expect("it does no I/O")
    }

    #[test]
    fn it_is_made_without_a_runtime_and_without_etcd() {
        connect(
            &[
                "http://127.0.0.1:1",
                "http://[::1]:2/",
                "http://127.0.0.1:1",
            ],
            "demo",
        )
        .expect("good");
    }

    #[test]
    fn what_cannot_work_is_refused_with_what_is_allowed() {
        for (endpoints, prefix, says) in [
            (&[][..], "demo", "http://host:port"),
            (
                &["https://h:1"][..],
                "demo",
                "EtcdRegistry::builder(..).tls(..)",
            ),
            (&["h:1"][..], "demo", "http://host:port"),
            (&["http://h"][..], "demo", "http://host:port"),
            (&["http://h:1/path"][..], "demo", "http://host:port"),
            (&["http://root:secret@h:1"][..], "demo", ".user(..)"),
            (&["http://h:1"][..], "demo/", "1 to 256 bytes"),
            (&["http://h:1"][..], "", "1 to 256 bytes"),
        ] {
            let error = connect(endpoints, prefix).expect_err(says);
            assert_eq!(error.kind(), Kind::Invalid);
            assert!(error.to_string().contains(says), "{error}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
        let registry = connect(&["http://h:1"], "demo").expect("good");
        assert!(
            registry
                .clone()
                .with_ttl(Duration::from_millis(999))
                .is_err()
        );
        assert!(registry.clone().with_timeout(Duration::ZERO).is_err());
        assert!(registry.discover("a/b").is_err());
    }

    #[test]
    fn a_registration_outside_a_runtime_is_refused() {
        // Given a registry that was made without a runtime
        let registry = connect(&["http://127.0.0.1:1"], "demo").expect("good");

        // When a session is registered outside of any
        let registering = registry.register(Session::new("echo", "h:1"));
        let registered = registering.into_future().now_or_never();
        let registered = registered.expect("it is refused at once");

        // Then that is an error that says so
        let error = registered.expect_err("there is no runtime");
        assert_eq!(error.kind(), Kind::Invalid);
        assert!(
            error.to_string().contains("outside a tokio runtime"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn with_etcd_away_all_fails_in_time_and_says_so() {
        // Nobody listens on port 1.
        let registry = connect(&["http://127.0.0.1:1"], "demo").expect("good");
        let before = Instant::now();
        let error = registry
            .register(Session::new("echo", "h:1"))
            .await
            .expect_err("etcd is away");
        assert!(
            before.elapsed() < Duration::from_secs(4),
            "{:?}",
            before.elapsed()
        );
        assert_eq!(error.kind(), Kind::RegistryUnreachable);
        assert!(error.to_string().contains("127.0.0.1:1"), "{error}");

        let mut updates = registry.discover("echo").expect("a good role").updates();
        let update = timeout(Duration::from_secs(4), updates.next())
            .await
            .expect("in time");
        assert!(matches!(update, Some(Update::Stale(_))), "{update:?}");
    }

    #[tokio::test]
    async fn who_needs_a_token_waits_no_longer_for_it_than_for_the_answer() {
        // Given an etcd that takes connections and says nothing, and a user
        let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let endpoint = format!("http://{}", silent.local_addr().expect("bound"));
        let registry = EtcdRegistry::builder([endpoint], "demo").user("root", "secret");
        let registry = registry.connect().await.expect("it does no I/O");
        let bound = Duration::from_millis(300);
        let registry = registry.with_timeout(bound).expect("good");

        // When many ask together
        let before = Instant::now();
        let asked = (0..10).map(|_| registry.allocate_id());
        let asked = futures_util::future::join_all(asked).await;

        // Then all hear in time that it does not answer
        assert!(before.elapsed() < 2 * bound, "{:?}", before.elapsed());
        for answer in asked {
            let error = answer.expect_err("nobody answers");
            assert_eq!(error.kind(), Kind::RegistryUnreachable, "{error}");
        }
    }
}
