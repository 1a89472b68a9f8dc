//! A registry in etcd.
//!
//! It speaks with etcd through this crate's own pool and transport: each etcd member is an endpoint, calls
//! are spread over those that are connected, and a member that is gone or silent is found out by
//! keepalive.

mod client;
mod lease;
mod listing;

use std::{collections::BTreeSet, fmt, sync::Arc, time::Duration};

use bytes::Bytes;

use self::{client::Client, lease::Lease};
use super::{
    Codec, Fixed, Naming, Registration, Registry, Session,
    registration::held_by,
    session::{check_address, check_prefix, check_role},
};
use crate::{
    Backoff,
    backoff::check_duration,
    discover::{Discovery, Settings, default_backoff},
    error::Error,
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
mod pb {
    include!(concat!(env!("CARGO_MANIFEST_DIR"), "/proto/gen/etcd.rs"));
}

/// A registry in etcd (3.4 and later), under one prefix.
///
/// Making one does no I/O, so it works with etcd away; discovery begins when etcd can be reached, and a
/// registration fails until then. A clone is another handle on the same connections, which are made at first
/// use, on the runtime of that use, and closed with the last handle. When that runtime has ended, the next use
/// makes others on its own.
///
/// Endpoints are the members of one cluster. TLS and authentication are not supported yet.
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
    codec: Arc<dyn Codec>,
    root: Arc<str>,
    ttl: Duration,
    timeout: Duration,
    backoff: Backoff,
}

// === impl EtcdRegistry ===

impl EtcdRegistry {
    /// The default time to live of a session whose process is gone.
    pub const TTL: Duration = Duration::from_secs(10);

    /// A registry at these endpoints, each `http://host:port`, with its keys under this prefix.
    ///
    /// It does no I/O and is ready at once; that it is async leaves room for what may need some.
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
        let prefix = prefix.as_ref();
        check_prefix(prefix)?;
        let mut addresses = BTreeSet::new();
        for endpoint in endpoints {
            addresses.insert(address_of(endpoint.as_ref())?.to_owned());
        }
        if addresses.is_empty() {
            let why = "none is given; at least one http://host:port is needed";
            return Err(Error::invalid("endpoints", why));
        }
        let members = addresses
            .into_iter()
            .map(|address| Session::new("etcd", address));
        Ok(Self {
            client: Arc::new(Client::new(Fixed::new(members)?)),
            codec: Arc::new(Naming),
            root: prefix.into(),
            ttl: Self::TTL,
            timeout: client::TIMEOUT,
            backoff: default_backoff(),
        })
    }

    /// How long a session that is registered through this handle outlives its process. Default 10 s; 1 s to
    /// 1 day, in whole seconds, rounded up. etcd itself raises it to a few of its election timeouts.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid) outside these bounds.
    pub fn with_ttl(mut self, ttl: Duration) -> Result<Self, Error> {
        self.ttl = check_duration("TTL", ttl, Duration::from_secs(1), Backoff::LONGEST)?;
        Ok(self)
    }

    /// How long one request to etcd through this handle may take. Default 5 s; 10 ms to 10 min.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid) outside these bounds.
    pub fn with_timeout(mut self, timeout: Duration) -> Result<Self, Error> {
        let (least, most) = (Duration::from_millis(10), Duration::from_secs(600));
        self.timeout = check_duration("timeout", timeout, least, most)?;
        Ok(self)
    }

    /// How discovery through this handle tries again while etcd cannot be reached. Default 100 ms × 2,
    /// ± 20 %, at most 1 s.
    #[must_use]
    pub fn with_backoff(mut self, backoff: Backoff) -> Self {
        self.backoff = backoff;
        self
    }

    /// How sessions are written and read through this handle. Default [`Naming`].
    #[must_use]
    pub fn with_codec(mut self, codec: impl Codec) -> Self {
        self.codec = Arc::new(codec);
        self
    }

    /// Registers a session under a lease, and keeps the lease alive in the background until the handle is
    /// dropped.
    ///
    /// A lease that ran out all the same, because etcd was away for longer than the TTL, is granted anew
    /// and the session written again, unless somebody else has its key by then.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid) if the session cannot work, or outside a tokio runtime;
    /// [`Kind::AlreadyRegistered`](crate::Kind::AlreadyRegistered), naming the holder, if its key is held, if only
    /// by a process that is gone and whose TTL is not over;
    /// [`Kind::RegistryUnreachable`](crate::Kind::RegistryUnreachable) if etcd does not answer.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped the session may be there nevertheless, until its TTL is over.
    pub async fn register(&self, session: Session) -> Result<Registration, Error> {
        client::current_runtime("registry")?;
        session.validate()?;
        let key = Bytes::from(self.codec.key(&self.root, &session));
        let value = Bytes::from(self.codec.encode(&session, 0)?);
        let session = Arc::new(session);
        let lease = Lease::new(self.clone(), key, session.clone());
        match lease.establish(value).await? {
            None => Ok(Registration::new(session, Box::new(lease.keep()))),
            Some(holder) => Err(held_by(&*self.codec, &self.root, &session, &holder)),
        }
    }
}

impl Registry for EtcdRegistry {
    fn discover(&self, role: &str) -> Result<Discovery, Error> {
        check_role(role)?;
        let store = listing::EtcdStore {
            client: self.client.clone(),
            timeout: self.timeout,
        };
        Ok(Discovery::of_store(Settings {
            store: Arc::new(store),
            codec: self.codec.clone(),
            root: self.root.clone(),
            role: role.into(),
            backoff: self.backoff,
        }))
    }
}

impl fmt::Debug for EtcdRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdRegistry")
            .field("client", &self.client)
            .field("codec", &self.codec)
            .field("prefix", &self.root)
            .field("ttl", &self.ttl)
            .finish_non_exhaustive()
    }
}

/// The `host:port` of an endpoint.
fn address_of(endpoint: &str) -> Result<&str, Error> {
    let invalid = |why: String| Err(Error::invalid("endpoint", why));
    if endpoint.starts_with("https://") {
        return invalid(format!(
            "{endpoint:?}: TLS is not supported yet; only http://host:port is allowed"
        ));
    }
    let Some(address) = endpoint.strip_prefix("http://") else {
        return invalid(format!("{endpoint:?} is not http://host:port"));
    };
    let address = address.strip_suffix('/').unwrap_or(address);
    match check_address(address) {
        Ok(()) => Ok(address),
        Err(error) => {
            let why = error.reason().unwrap_or_default();
            invalid(format!("{endpoint:?} is not http://host:port: {why}"))
        }
    }
}

#[cfg(test)]
mod tests {
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
            (&["https://h:1"][..], "demo", "TLS is not supported yet"),
            (&["h:1"][..], "demo", "http://host:port"),
            (&["http://h"][..], "demo", "http://host:port"),
            (&["http://h:1/path"][..], "demo", "http://host:port"),
            (&["http://h:1"][..], "demo/", "1 to 256 bytes"),
            (&["http://h:1"][..], "", "1 to 256 bytes"),
        ] {
            let error = connect(endpoints, prefix).expect_err(says);
            assert_eq!(error.kind(), Kind::Invalid);
            assert!(error.to_string().contains(says), "{error}");
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
        let registered = registering.now_or_never().expect("it is refused at once");

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
}
