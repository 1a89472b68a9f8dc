//! How connections are made: all that can be chosen, and the making of one.

use std::{
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use http::{HeaderMap, HeaderValue, uri::Scheme};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Semaphore,
};

#[cfg(feature = "health")]
use super::HealthCheck;
use super::{
    Connection, Connections, Proxy, common::Common, dial::Dialer, polite::Polite, several::Size,
};
#[cfg(feature = "tls")]
use super::{TlsConfig, TlsReloader};
use crate::{
    backoff::check_duration,
    endpoint::{BoxFuture, Connect, Connected, Target},
    error::{BoxError, Error},
};

/// Makes HTTP/2 connections, over TCP, a Unix domain socket or a stream of one's own: in plaintext, or by
/// `Connector::tls` (feature `tls`) over TLS.
///
/// A target's address is one of these, as gRPC writes them:
/// - `host:port`: each attempt resolves a name anew ([`Connector::resolver`]); if it has several addresses, all are tried,
///   250 ms apart, IPv6 and IPv4 in turn ([RFC 8305](https://www.rfc-editor.org/rfc/rfc8305)). `TCP_NODELAY` is always set.
/// - `unix:path` or `unix:///absolute/path`: a Unix domain socket, on platforms that have them. The path is 1 to 107
///   bytes, and relative to the directory that the process is in unless it begins with a slash.
/// - `unix-abstract:name`: one on Linux that is in no file system.
/// - With [`Connector::dial_with`], whatever that knows.
///
/// The `:authority` of calls is `host:port`, or `localhost` over a Unix domain socket, unless [`Connector::authority`] says
/// another. A connection counts as made when the peer has answered a first HTTP/2 ping: a port that accepts and says
/// nothing is not a server.
///
/// A connection to a [`Target`] adds that target's [`call_metadata`](Target::call_metadata) to each request. One that
/// brings other values under the same names is for somebody else: it fails with
/// [`Kind::Invalid`](crate::Kind::Invalid), unsent. When whoever answers says `node not match`, which is how a Milvus
/// server tells calls that are meant for another instance, the call fails with
/// [`Kind::OtherInstance`](crate::Kind::OtherInstance), and the connection takes no new ones. A connection that
/// adds nothing looks for nothing.
///
/// ```
/// use std::time::Duration;
/// use switchboard::transport::Connector;
///
/// let connector = Connector::new()
///     .keepalive(Some(Duration::from_secs(10)), Duration::from_secs(5))?
///     .user_agent("querycoord/2.6")?;
/// # Ok::<(), switchboard::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Connector {
    pub(super) keepalive_interval: Option<Duration>,
    pub(super) keepalive_timeout: Duration,
    pub(super) keepalive_while_idle: bool,
    pub(super) stream_window: u32,
    pub(super) adaptive_windows: bool,
    pub(super) connection_window: u32,
    pub(super) max_frame_size: u32,
    pub(super) header_table_size: u32,
    pub(super) user_agent: HeaderValue,
    pub(super) max_header_list_size: usize,
    pub(super) dialer: Dialer,
    pub(super) polite: Polite,
    pub(super) size: Size,
    /// Who may open another connection to a peer that has one, of all clones.
    turns: Arc<Semaphore>,
    #[cfg(feature = "health")]
    pub(super) health: HealthCheck,
    #[cfg(feature = "tls")]
    pub(super) tls: Option<TlsReloader>,
}

/// How many connections are opened at once beside those that their peers have, by all clones of a connector: as many as a
/// pool makes of first ones. One that takes longer than [`in_turn`](crate::endpoint::turn::in_turn) gives it counts no more.
const TURNS: usize = 64;

// === impl Connector ===

impl Connector {
    /// The defaults: plaintext, straight to the peer; keepalive every 10 s with a timeout of 20 s, idle or not; windows of 2 MiB
    /// for a stream and 8 MiB for a connection; frames of up to 64 KiB from the peer, headers of up to 64 KiB to it; up to 4
    /// connections to a peer, of any age, a spare one for 30 s.
    pub fn new() -> Self {
        Self {
            keepalive_interval: Some(Duration::from_secs(10)),
            keepalive_timeout: Duration::from_secs(20),
            keepalive_while_idle: true,
            stream_window: 2 << 20,
            adaptive_windows: false,
            connection_window: 8 << 20,
            max_frame_size: 64 << 10,
            header_table_size: 4096,
            user_agent: HeaderValue::from_static(concat!(
                "switchboard/",
                env!("CARGO_PKG_VERSION")
            )),
            max_header_list_size: 64 << 10,
            dialer: Dialer::default(),
            polite: Polite::default(),
            size: Size {
                most: 4,
                spare_for: Duration::from_secs(30),
                max_age: None,
            },
            turns: Arc::new(Semaphore::new(TURNS)),
            #[cfg(feature = "health")]
            health: HealthCheck::Off,
            #[cfg(feature = "tls")]
            tls: None,
        }
    }

    /// When nothing was read for `interval`, the peer is pinged; when then nothing is read for `timeout`,
    /// the connection is closed and its calls fail as `UNAVAILABLE`. So a peer that is silently gone is
    /// found out within the sum of both. `None` turns it off. Defaults 10 s and 20 s; 1 ms to 1 day.
    ///
    /// gRPC's own servers may mind being pinged more often than every 5 minutes (`too_many_pings`), and close the connection;
    /// the interval of later connections to that address is doubled then, each time, up to 10 minutes, and
    /// is as configured again a day after it last minded. tonic's servers do not mind. Calls on the connection that it closes fail:
    /// with the default, those to which such a server has said nothing for about 40 s, and twice as long each time after that.
    /// A program that has such calls and such servers, and cannot configure these (`GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS`
    /// in the C core, `keepalive.EnforcementPolicy` in Go), is better off with an interval of 5 minutes.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid) outside these bounds.
    pub fn keepalive(
        mut self,
        interval: Option<Duration>,
        timeout: Duration,
    ) -> Result<Self, Error> {
        let (least, most) = (Duration::from_millis(1), crate::Backoff::LONGEST);
        if let Some(interval) = interval {
            check_duration("keepalive interval", interval, least, most)?;
        }
        self.keepalive_interval = interval;
        self.keepalive_timeout = check_duration("keepalive timeout", timeout, least, most)?;
        Ok(self)
    }

    /// Whether a connection without calls is pinged too. Default yes: a peer that died while nobody
    /// called is found out before somebody does.
    #[must_use]
    pub fn keepalive_while_idle(mut self, while_idle: bool) -> Self {
        self.keepalive_while_idle = while_idle;
        self
    }

    /// How much may be in flight to us, in bytes, on one stream and on the whole connection, before it is
    /// read; of a stream at most, with [`Connector::adaptive_windows`]. Defaults 2 MiB and 8 MiB; each 65,535 to 2,147,483,647, the stream's at most the connection's.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid) outside these bounds.
    pub fn windows(mut self, stream: u32, connection: u32) -> Result<Self, Error> {
        let allowed = 65_535..=(1 << 31) - 1;
        if !allowed.contains(&stream) || !allowed.contains(&connection) || stream > connection {
            let why = format!(
                "stream {stream}, connection {connection}: each must be 65,535 to 2,147,483,647, the stream's at most the connection's"
            );
            return Err(Error::invalid("windows", why));
        }
        self.stream_window = stream;
        self.connection_window = connection;
        Ok(self)
    }

    /// Whether the window of a stream follows the path: it begins as HTTP/2's own 65,535 bytes and becomes twice what comes in
    /// a round trip, for as long as that is limited by the window, up to what [`Connector::windows`] allows. It is measured
    /// by pings while much comes, as by gRPC's other clients; small answers cause none. Default no.
    ///
    /// It pays where peers may be far: with a bound of 16 MiB one answer from 10 ms away came 3.6 times as fast as with the
    /// default's 2 MiB, and small calls beside large answers on a near connection took no longer (`cargo bench --bench compare --
    /// windows`); with a fixed 16 MiB they took four times as long. The price is that the first large answers of a connection come in
    /// more round trips. As much is needed as is under way: 100 MB a second from 100 ms away are 10 MB.
    ///
    /// ```
    /// use switchboard::transport::Connector;
    ///
    /// let afar = Connector::new().adaptive_windows(true).windows(16 << 20, 64 << 20)?;
    /// # Ok::<(), switchboard::Error>(())
    /// ```
    #[must_use]
    pub fn adaptive_windows(mut self, adaptive: bool) -> Self {
        self.adaptive_windows = adaptive;
        self
    }

    /// How large the frames of HTTP/2 may be that a peer sends, in bytes; it need not use it. Default 65,536; 16,384, the
    /// least that there is, to 16,777,215. What we send goes by what the peer allows.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid) outside these bounds.
    pub fn max_frame_size(mut self, bytes: u32) -> Result<Self, Error> {
        if !(16_384..=16_777_215).contains(&bytes) {
            let why = format!("{bytes} is not between 16,384 and 16,777,215 bytes");
            return Err(Error::invalid("largest frame", why));
        }
        self.max_frame_size = bytes;
        Ok(self)
    }

    /// How much of the headers that a peer sends it may have us keep, so that it need not send them again
    /// ([RFC 7541](https://www.rfc-editor.org/rfc/rfc7541)), in bytes and for each connection. Default 4,096, as HTTP/2 has
    /// it; 0, which turns that off, to 1 MiB.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid) outside these bounds.
    pub fn header_table_size(mut self, bytes: u32) -> Result<Self, Error> {
        if bytes > 1 << 20 {
            let why = format!("{bytes} is not between 0 and 1,048,576 bytes");
            return Err(Error::invalid("header table", why));
        }
        self.header_table_size = bytes;
        Ok(self)
    }

    /// How many connections a peer may have at most. Default 4; 1 to 64.
    ///
    /// There is one at first. Another is opened when the peer allows no more streams on those there are, and calls wait for
    /// it or for a stream, whichever comes first; or on a multi-threaded runtime, for as many threads as that has, when each
    /// connection has had more than 32 calls for 15 ms: threads that share one connection wait for its lock and its task.
    /// A peer that allows no streams at all is not asked on another. It is opened by a task beside the calls, one at a time,
    /// within 20 s, and with gRPC's connection backoff after a failure; of all peers of a connector and its clones, 64 are
    /// being opened at once, not counting those that have taken longer than 500 ms.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid) outside these bounds.
    pub fn max_connections(mut self, connections: usize) -> Result<Self, Error> {
        if !(1..=64).contains(&connections) {
            let why = format!("{connections} is not between 1 and 64");
            return Err(Error::invalid("connections per peer", why));
        }
        self.size.most = connections;
        Ok(self)
    }

    /// For how long fewer connections to a peer have to be enough until one takes no new calls; it closes when its own have
    /// ended. Enough means that the others would be half full: of the streams that the peer allows or, of those opened for
    /// threads, of 32 calls each. Default 30 s; 10 ms to 1 day.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid) outside these bounds.
    pub fn spare_for(mut self, spare: Duration) -> Result<Self, Error> {
        let (least, most) = (Duration::from_millis(10), crate::Backoff::LONGEST);
        self.size.spare_for = check_duration("time to spare a connection", spare, least, most)?;
        Ok(self)
    }

    /// How old a connection gets, ± 10 % by chance, until another takes its place: when that is there, new calls go to it,
    /// and the old one closes when its own have ended, however long they take. If it cannot be made, the old one stays, and another attempt
    /// follows with backoff. Default `None`, for ever; 100 ms to 1 year.
    ///
    /// It has calls find other machines behind an address that is a load balancer's or a name's, and certificates
    /// checked anew.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid) outside these bounds.
    pub fn max_age(mut self, age: Option<Duration>) -> Result<Self, Error> {
        if let Some(age) = age {
            let (least, most) = (Duration::from_millis(100), 365 * crate::Backoff::LONGEST);
            check_duration("age of a connection", age, least, most)?;
        }
        self.size.max_age = age;
        Ok(self)
    }

    /// Whose health each connection watches (`grpc.health.v1`): while the peer says that it does not serve, no call goes
    /// there, and those that are pinned to it fail with its words; calls in flight go on. A server without a health
    /// service is taken to be well. Default [`HealthCheck::Off`], as with gRPC's other clients.
    ///
    /// It costs one stream for each connection, and the time of one more answer until a new one is ready. What a
    /// `Component` (feature `component`) says of itself is under its role's name: [`HealthCheck::Role`].
    #[cfg(feature = "health")]
    #[must_use]
    pub fn health_check(mut self, of: HealthCheck) -> Self {
        self.health = of;
        self
    }

    /// How large a request's headers may be, in bytes as HTTP/2 counts them: names, values, and 32 for
    /// each. A call with more fails with [`Kind::Invalid`](crate::Kind::Invalid) and is not sent. Default
    /// 64 KiB; 1 KiB to 16 MiB.
    ///
    /// Servers answer too large headers with an error, and much too large ones by closing the connection
    /// under all other calls: a tonic server of 0.14 did the one at 60 kB and the other at 200 kB.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid) outside these bounds.
    pub fn max_header_list_size(mut self, bytes: usize) -> Result<Self, Error> {
        if !(1 << 10..=16 << 20).contains(&bytes) {
            let why = format!("{bytes} is not between 1,024 and 16,777,216 bytes");
            return Err(Error::invalid("largest header list", why));
        }
        self.max_header_list_size = bytes;
        Ok(self)
    }

    /// The `user-agent` of calls that bring none. Default `switchboard/<version>`.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid) if it cannot stand in a header.
    pub fn user_agent(mut self, agent: &str) -> Result<Self, Error> {
        self.user_agent = HeaderValue::from_str(agent)
            .map_err(|_| Error::invalid("user agent", format!("{agent:?} is not visible ASCII")))?;
        Ok(self)
    }

    /// The `:authority` of all calls, whatever the address: a DNS name, an IPv4 address or an IPv6 address in brackets, and
    /// a port of 1 to 65535 or none. With TLS its host is also the name that servers have to prove, and that they are
    /// asked for (SNI), unless `TlsConfig::server_name` says another. Default: the address; `localhost` over a Unix
    /// domain socket.
    ///
    /// It does not change where is dialled. It is for peers that are reached by addresses which are not their names: behind
    /// a proxy that looks at the authority, or with a certificate for the name of a service.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid) if it is none of these.
    pub fn authority(mut self, name: &str) -> Result<Self, Error> {
        self.dialer.set_authority(name)?;
        Ok(self)
    }

    /// How names become addresses: by this, which is given the host and the port of `host:port`, and tells where to dial,
    /// the port included. Default: the system's resolver.
    ///
    /// It is asked anew by each attempt, within the attempt's time, and all that it tells is tried as if the system had
    /// told it. An IP address is not asked about. If it fails, so does the attempt, with its error as the source; a panic
    /// is a failure too.
    ///
    /// ```
    /// use std::net::{Ipv4Addr, SocketAddr};
    /// use switchboard::transport::Connector;
    ///
    /// let connector = Connector::new().resolver(|host, port| async move {
    ///     match host.as_str() {
    ///         "rootcoord" => Ok(vec![SocketAddr::from((Ipv4Addr::LOCALHOST, port))]),
    ///         _ => Ok(tokio::net::lookup_host((host, port)).await?.collect()),
    ///     }
    /// });
    /// ```
    #[must_use]
    pub fn resolver<R, F>(mut self, resolver: R) -> Self
    where
        R: Fn(String, u16) -> F + Send + Sync + 'static,
        F: Future<Output = io::Result<Vec<SocketAddr>>> + Send + 'static,
    {
        self.dialer.set_resolver(resolver);
        self
    }

    /// TCP's own keepalive: when nothing came for so long, the system asks the peer; what follows is as the system is
    /// set. Default `None`, off: [`Connector::keepalive`] finds out sooner, and finds a hung process too. 1 s to 1 day.
    ///
    /// It keeps what stands between from forgetting a connection, where pings are not welcome.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid) outside these bounds.
    pub fn tcp_keepalive(mut self, after: Option<Duration>) -> Result<Self, Error> {
        if let Some(after) = after {
            let (least, most) = (Duration::from_secs(1), crate::Backoff::LONGEST);
            check_duration("TCP keepalive", after, least, most)?;
        }
        self.dialer.tcp.keepalive = after;
        Ok(self)
    }

    /// How long what was sent may go unacknowledged by the peer's system until a connection is lost (`TCP_USER_TIMEOUT`,
    /// [RFC 5482](https://www.rfc-editor.org/rfc/rfc5482)). Only Linux and Android have it; elsewhere it is without
    /// effect. Default `None`, as the system is set, which is often about 15 minutes. 10 ms to 1 day.
    ///
    /// [`Connector::keepalive`] bounds the same, and more, by its own time; this is for where that is off.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid) outside these bounds.
    pub fn tcp_user_timeout(mut self, timeout: Option<Duration>) -> Result<Self, Error> {
        if let Some(timeout) = timeout {
            let (least, most) = (Duration::from_millis(10), crate::Backoff::LONGEST);
            check_duration("TCP user timeout", timeout, least, most)?;
        }
        self.dialer.tcp.user_timeout = timeout;
        Ok(self)
    }

    /// The address of this machine that connections come from; of a peer's addresses those of the same family are
    /// tried. Default `None`: the system chooses.
    #[must_use]
    pub fn local_address(mut self, address: impl Into<Option<IpAddr>>) -> Self {
        self.dialer.tcp.local = address.into();
        self
    }

    /// Connects through a proxy, or straight again with `None`. Default: straight, whatever the environment says;
    /// [`Proxy::from_env`] asks it. Neither Unix domain sockets nor streams of [`Connector::dial_with`] are proxied.
    #[must_use]
    pub fn proxy(mut self, proxy: impl Into<Option<Proxy>>) -> Self {
        self.dialer.set_proxy(proxy.into());
        self
    }

    /// Dials by this instead: it is given the address as it stands, whatever its form, and yields the byte stream that
    /// TLS, if it is asked for, and HTTP/2 go over. For what we do not dial ourselves: vsock, SOCKS, pipes in memory, tests.
    /// Default: TCP, or a Unix domain socket.
    ///
    /// It is called by each attempt, within the attempt's time, which drops its future. The resolver is not asked. The
    /// `:authority` of calls, unless [`Connector::authority`] says another, is the address if that is `host:port`, and
    /// `localhost` otherwise. If it fails, so does the attempt, with its error as the source; a panic is a failure too.
    ///
    /// Sessions in a registry have to have an address that `Session::validate` allows.
    ///
    /// ```
    /// use switchboard::transport::Connector;
    /// use tokio::io::DuplexStream;
    ///
    /// /// Hands the one end to a server, and returns the other.
    /// async fn dial(address: String) -> std::io::Result<DuplexStream> {
    ///     # let server = |_: String, _: DuplexStream| {};
    ///     let (ours, theirs) = tokio::io::duplex(64 << 10);
    ///     server(address, theirs);
    ///     Ok(ours)
    /// }
    ///
    /// let connector = Connector::new().dial_with(|address| async { Ok(dial(address).await?) });
    /// ```
    #[must_use]
    pub fn dial_with<D, F, I>(mut self, dial: D) -> Self
    where
        D: Fn(String) -> F + Send + Sync + 'static,
        F: Future<Output = Result<I, BoxError>> + Send + 'static,
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        self.dialer.set_own(dial);
        self
    }

    /// Speaks TLS, and only TLS, and gives calls the scheme `https`. Default is plaintext.
    ///
    /// The handshake is part of the attempt and of its time. A server has to say that it speaks HTTP/2
    /// (ALPN `h2`). Connections to one name resume each other's sessions.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid) if nobody is trusted: no root was given.
    #[cfg(feature = "tls")]
    pub fn tls(mut self, config: TlsConfig) -> Result<Self, Error> {
        self.tls = Some(TlsReloader::new(config)?);
        Ok(self)
    }

    /// The same with what can be replaced while it runs.
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn tls_from(mut self, reloader: &TlsReloader) -> Self {
        self.tls = Some(reloader.clone());
        self
    }

    /// Connects to `host:port`, `unix:path`, `unix:///absolute/path` or `unix-abstract:name`, or to what
    /// [`Connector::dial_with`] knows.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid) if the address is none of these or not to be had on this platform, or
    /// with TLS its host cannot be a server's name; [`Kind::ConnectionLost`](crate::Kind::ConnectionLost) if nobody could
    /// be reached there, or whoever was does not speak HTTP/2, or one side did not believe the other. The message says
    /// which step failed: the name, the connection (in the words of the system, such as "connection refused"), the proxy,
    /// the program's own resolver or dialer, the TLS handshake, or the HTTP/2 handshake. It has no time limit of its own.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes what was opened.
    pub async fn connect_to(&self, address: &str) -> Result<Connection, Error> {
        let to = self.dialer.destination(address)?;
        let common = Common::new(to, HeaderMap::new(), self);
        let connection = self.open(&Arc::new(common)).await?;
        connection.core.common.seal();
        Ok(connection)
    }

    /// Until there is a turn to open another connection beside those there are.
    pub(super) fn turn(&self) -> impl Future<Output = impl Send> + Send + 'static {
        let turns = self.turns.clone();
        async move { turns.acquire_owned().await.ok() }
    }

    /// The same as one of several. Dropping the future closes what was opened.
    pub(super) async fn open(&self, common: &Arc<Common>) -> Result<Connection, Error> {
        #[cfg(feature = "tls")]
        if let Some(tls) = &self.tls {
            crate::endpoint::step::next("reading certificates");
            let tls = tls.current().await;
            let name = tls.name_of(&common.to.authority)?;
            let io = tls
                .handshake(self.dialer.dial(&common.to).await?, name)
                .await?;
            let refusal = io.refusal();
            let connected = Connection::handshake(io, common, self).await;
            return connected.map_err(|error| refusal.or(error));
        }
        let io = self.dialer.dial(&common.to).await?;
        Connection::handshake(io, common, self).await
    }

    /// Which of its TLS configurations is in force.
    pub(super) fn tls_number(&self) -> u64 {
        #[cfg(feature = "tls")]
        if let Some(tls) = &self.tls {
            return tls.number();
        }
        0
    }

    /// Until another one is.
    pub(super) async fn tls_changed(&self, since: u64) {
        #[cfg(feature = "tls")]
        if let Some(tls) = &self.tls {
            return tls.changed(since).await;
        }
        let _ = since;
        std::future::pending().await
    }

    pub(super) fn scheme(&self) -> Scheme {
        #[cfg(feature = "tls")]
        if self.tls.is_some() {
            return Scheme::HTTPS;
        }
        Scheme::HTTP
    }
}

impl Default for Connector {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Target> Connect<T> for Connector {
    type Service = Connections;
    type Future = BoxFuture<'static, Result<Connected<Connections>, BoxError>>;

    fn connect(&self, target: &T) -> Self::Future {
        let (this, peer) = (self.clone(), target.peer().clone());
        let identity = target.call_metadata();
        Box::pin(async move {
            #[cfg(feature = "health")]
            let health_of = this.health.service_of(&peer);
            let to = this.dialer.destination(&peer.address)?;
            let connections = Connections::open(this, to, identity).await?;
            let lifeline = connections.lifeline();
            #[cfg(feature = "health")]
            if let Some(service) = health_of {
                let health = super::health::watch(connections.clone(), service);
                let connected = Connected::new(connections).with_lifeline(lifeline);
                return Ok(connected.with_health(health));
            }
            Ok(Connected::new(connections).with_lifeline(lifeline))
        })
    }
}
