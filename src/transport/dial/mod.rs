//! From an address to a byte stream: over TCP, straight or through a proxy, over a Unix domain socket, or by a program's
//! own means.

mod proxy;
mod stream;
mod tcp;
mod unix;

use std::{any::Any, fmt, future::Future, io, net::SocketAddr, panic::AssertUnwindSafe, sync::Arc};

use futures_util::FutureExt as _;
use http::uri::Authority;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};

pub use self::proxy::Proxy;
#[cfg(any(fuzzing, test))]
pub(crate) use self::proxy::Said;
pub(super) use self::stream::Stream;
use self::tcp::Tcp;
use crate::{
    address::{Address, HostPort},
    endpoint::{BoxFuture, step},
    error::{BoxError, Error, Kind},
};

/// The `:authority` where the address names no host, as in gRPC's other clients.
const LOCALHOST: &str = "localhost";

/// How a connector comes from an address to a stream, and what it calls the peer.
#[derive(Clone, Default)]
pub(crate) struct Dialer {
    authority: Option<Authority>,
    resolver: Option<Arc<Resolver>>,
    own: Option<Arc<Own>>,
    proxy: Option<Arc<Proxy>>,
    pub(super) tcp: Tcp,
}

type Resolver =
    dyn Fn(String, u16) -> BoxFuture<'static, io::Result<Vec<SocketAddr>>> + Send + Sync;

type Own = dyn Fn(String) -> BoxFuture<'static, Result<Stream, BoxError>> + Send + Sync;

/// Where a peer is, and what it is called: an address, taken apart once for all attempts.
#[derive(Clone, Debug)]
pub(crate) struct Destination {
    pub(super) address: Arc<str>,
    /// That of all calls and, unless another was given, the name to prove.
    pub(crate) authority: Authority,
    to: To,
}

#[derive(Clone, Debug)]
enum To {
    Literal(SocketAddr),
    /// Resolved anew by each attempt.
    Name(Box<str>, u16),
    /// Through the proxy, which resolves it.
    Proxied(Box<str>),
    /// The path of a Unix domain socket; a zero byte and its name if it is abstract.
    Local(Box<str>),
    /// Whatever the program's own dialer makes of the address.
    Own,
}

// === impl Dialer ===

impl Dialer {
    /// Calls all peers this: a name with or without a port.
    pub(crate) fn set_authority(&mut self, name: &str) -> Result<(), Error> {
        let is_host = |text: &str| HostPort::parse(text).is_ok();
        let authority = match is_host(name) || is_host(&format!("{name}:1")) {
            true => name.parse().ok(),
            false => None,
        };
        self.authority = Some(authority.ok_or_else(|| {
            let why = format!(
                "{name:?} is not name or name:port; write a DNS name, an IPv4 address or an [IPv6] address, and a port of 1 to 65535 or none"
            );
            Error::invalid("authority", why)
        })?);
        Ok(())
    }

    pub(super) fn set_resolver<R, F>(&mut self, resolver: R)
    where
        R: Fn(String, u16) -> F + Send + Sync + 'static,
        F: Future<Output = io::Result<Vec<SocketAddr>>> + Send + 'static,
    {
        self.resolver = Some(Arc::new(move |host, port| Box::pin(resolver(host, port))));
    }

    pub(super) fn set_own<D, F, I>(&mut self, dial: D)
    where
        D: Fn(String) -> F + Send + Sync + 'static,
        F: Future<Output = Result<I, BoxError>> + Send + 'static,
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        self.own = Some(Arc::new(move |address| {
            let dialling = dial(address);
            Box::pin(async move { Ok(Stream::Other(Box::new(dialling.await?))) })
        }));
    }

    pub(super) fn set_proxy(&mut self, proxy: Option<Proxy>) {
        self.proxy = proxy.map(Arc::new);
    }

    /// Takes an address apart. A program's own dialer may know others than we do.
    pub(crate) fn destination(&self, address: &str) -> Result<Destination, Error> {
        let (to, known_as) = match (Address::parse(address), &self.own) {
            (Ok(Address::HostPort(at)), Some(_)) => (To::Own, authority_of(address, at)?),
            (_, Some(_)) => (To::Own, Authority::from_static(LOCALHOST)),
            (Err(error), None) => return Err(error),
            (Ok(parsed), None) => {
                parsed.check_platform(address, cfg!(unix), unix::HAS_ABSTRACT)?;
                match parsed {
                    Address::HostPort(at) => {
                        let proxied = self.proxy.as_ref().is_some_and(|proxy| proxy.is_for(&at));
                        let to = match proxied {
                            true => To::Proxied(address.into()),
                            false => To::host(at),
                        };
                        (to, authority_of(address, at)?)
                    }
                    Address::Unix(path) => {
                        (To::Local(path.into()), Authority::from_static(LOCALHOST))
                    }
                    Address::Abstract(name) => (
                        To::Local(format!("\0{name}").into()),
                        Authority::from_static(LOCALHOST),
                    ),
                }
            }
        };
        Ok(Destination {
            address: address.into(),
            authority: self.authority.clone().unwrap_or(known_as),
            to,
        })
    }

    /// One attempt. Dropping the future closes what was opened.
    pub(super) async fn dial(&self, destination: &Destination) -> Result<Stream, Error> {
        match (&destination.to, &self.own) {
            (To::Literal(address), _) => self
                .tcp
                .connect_to_any(vec![*address])
                .await
                .map(Stream::Tcp),
            (To::Name(host, port), _) => self.dial_name(host, *port).await.map(Stream::Tcp),
            (To::Proxied(address), _) => match &self.proxy {
                Some(proxy) => proxy.connect(HostPort::parse(address)?, self).await,
                None => Err(Error::new(Kind::Internal).with_reason("the proxy is another's")),
            },
            (To::Local(path), _) => unix::connect(path).await,
            (To::Own, Some(own)) => {
                step::next("waiting for the dialer");
                match guarded(|| own(destination.address.to_string())).await {
                    Ok(Ok(stream)) => Ok(stream),
                    Ok(Err(error)) => Err(lost("the dialer failed", error)),
                    Err(panic) => Err(lost("the dialer panicked", panic)),
                }
            }
            (To::Own, None) => {
                Err(Error::new(Kind::Internal).with_reason("the dialer is another's"))
            }
        }
    }

    async fn dial_tcp(&self, at: HostPort<'_>) -> Result<TcpStream, Error> {
        match at.literal() {
            Some(address) => self.tcp.connect_to_any(vec![address]).await,
            None => self.dial_name(at.host, at.port).await,
        }
    }

    async fn dial_name(&self, host: &str, port: u16) -> Result<TcpStream, Error> {
        let found = self.resolve(host, port).await?;
        self.tcp.connect_to_any(found).await
    }

    async fn resolve(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, Error> {
        step::next(format!("resolving the name {host}"));
        let found = match &self.resolver {
            None => tokio::net::lookup_host((host, port))
                .await
                .map(Iterator::collect),
            Some(resolver) => match guarded(|| resolver(host.to_owned(), port)).await {
                Ok(found) => found,
                Err(panic) => return Err(lost("the resolver panicked", panic)),
            },
        };
        found.map_err(|error| lost("the name was not resolved", error))
    }
}

impl fmt::Debug for Dialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dialer")
            .field("authority", &self.authority)
            .field("resolver", &self.resolver.is_some())
            .field("own", &self.own.is_some())
            .field("proxy", &self.proxy)
            .field("tcp", &self.tcp)
            .finish()
    }
}

// === impl To ===

impl To {
    fn host(at: HostPort<'_>) -> Self {
        match at.literal() {
            Some(address) => Self::Literal(address),
            None => Self::Name(at.host.into(), at.port),
        }
    }
}

/// The address itself; without the scope of an IPv6 address, which means something on this machine alone (RFC 6874, 4).
fn authority_of(address: &str, at: HostPort<'_>) -> Result<Authority, Error> {
    let authority = match at.host.split_once('%') {
        Some((ip, _scope)) => format!("[{ip}]:{}", at.port).parse(),
        None => address.parse(),
    };
    authority.map_err(|_| Error::invalid("address", format!("{address:?} is not host:port")))
}

/// What a program's own closure comes to, or the words of its panic.
async fn guarded<T>(call: impl FnOnce() -> BoxFuture<'static, T>) -> Result<T, BoxError> {
    // Inside the future, so that one that panics before its first await is caught too.
    let call = AssertUnwindSafe(async { call().await }).catch_unwind();
    call.await.map_err(|panic| words(&*panic).into())
}

fn words(panic: &(dyn Any + Send)) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(words), _) => words,
        (_, Some(words)) => words,
        _ => "it said nothing that is text",
    }
}

fn lost(step: &'static str, why: impl Into<BoxError>) -> Error {
    Error::new(Kind::ConnectionLost)
        .with_reason(step)
        .with_source(why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_called_by_its_address_or_localhost_or_what_is_asked_for() {
        let mut dialer = Dialer::default();
        let authority = |dialer: &Dialer, address: &str| {
            let found = dialer.destination(address);
            found.map(|found| found.authority.to_string())
        };
        let unix: &[_] = match cfg!(target_os = "linux") {
            true => &[("unix:a", "localhost"), ("unix-abstract:a", "localhost")],
            false => &[],
        };
        let tcp = [
            ("h:1", "h:1"),
            ("[::1]:1", "[::1]:1"),
            ("[fe80::1%3]:1", "[fe80::1]:1"),
        ];
        for (address, expected) in tcp.iter().chain(unix) {
            assert_eq!(authority(&dialer, address).unwrap(), *expected);
        }
        assert_eq!(
            authority(&dialer, "vsock").unwrap_err().kind(),
            Kind::Invalid
        );

        dialer.set_own(|_| async { Ok(tokio::io::empty()) });
        for (address, expected) in [("h:1", "h:1"), ("unix:a", LOCALHOST), ("vsock", LOCALHOST)] {
            assert_eq!(authority(&dialer, address).unwrap(), expected);
        }

        for name in ["etcd.internal", "etcd.internal:2379", "10.0.0.5", "[::1]:1"] {
            dialer.set_authority(name).unwrap();
            for address in ["h:1", "vsock"] {
                assert_eq!(authority(&dialer, address).unwrap(), name);
            }
        }
        for name in [
            "", "a b", "a:", "a:0", "u@a", "http://a", "::1", "a/b", ":1",
        ] {
            let error = dialer.set_authority(name).unwrap_err();
            assert_eq!(error.kind(), Kind::Invalid);
            assert!(error.to_string().contains("name:port"), "{error}");
        }
    }
}
