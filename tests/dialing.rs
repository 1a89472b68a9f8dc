//! From an address to a connection: over which kind of socket, by which name, by whose resolver and dialer, and which
//! step an error names.

mod support;

use std::{
    collections::HashSet,
    future::Future,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use support::{
    certificates::Ca,
    proxy::Blackhole,
    server::{
        EchoServer, Seen,
        pb::{EchoRequest, echo_client::EchoClient},
    },
};
use switchboard::{
    Channel, ConnectionManager, Kind, MemoryRegistry, Session,
    endpoint::BoxError,
    pool::PoolConfig,
    registry::Registration,
    transport::{Connector, TlsConfig},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream},
    net::{TcpListener, UnixListener},
    runtime::Runtime,
    sync::mpsc,
    task::JoinSet,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{ServerConfig, crypto::ring},
};
use tokio_stream::{
    Stream, StreamExt as _,
    wrappers::{TcpListenerStream, UnboundedReceiverStream, UnixListenerStream},
};
use tonic::{
    Code,
    transport::{Certificate, Identity, Server, ServerTlsConfig, server::Connected},
};
use tower::util::MapRequestLayer;

/// A failure is an answer: it takes no timeout to see it.
const PATIENCE: Duration = Duration::from_secs(10);

/// A tonic server over any streams, on a runtime of its own; dropping it kills it, with its connections.
struct Echo {
    /// The `:authority` of each call.
    authorities: Arc<Mutex<Vec<String>>>,
    runtime: Option<Runtime>,
}

impl Echo {
    fn over<I>(
        incoming: impl Stream<Item = std::io::Result<I>> + Send + 'static,
        tls: Option<ServerTlsConfig>,
    ) -> Self
    where
        I: AsyncRead + AsyncWrite + Connected + Send + Unpin + 'static,
    {
        let authorities = Arc::new(Mutex::new(Vec::new()));
        let seen = authorities.clone();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        runtime.spawn(async move {
            let note = move |request: http::Request<tonic::body::Body>| {
                let authority = request.uri().authority().unwrap().to_string();
                seen.lock().unwrap().push(authority);
                request
            };
            let mut server = Server::builder();
            if let Some(tls) = tls {
                server = server.tls_config(tls).unwrap();
            }
            server
                .layer(MapRequestLayer::new(note))
                .add_service(support::server::echo("a", &Arc::new(Seen::default())))
                .serve_with_incoming(incoming)
                .await
                .unwrap();
        });
        Self {
            authorities,
            runtime: Some(runtime),
        }
    }

    fn authorities(&self) -> Vec<String> {
        self.authorities.lock().unwrap().clone()
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

struct Client {
    channel: Channel,
    manager: ConnectionManager,
    _registration: Registration,
}

impl Client {
    async fn of(address: &str, connector: Connector) -> Self {
        let registry = MemoryRegistry::new();
        let session = Session::new("echo", address);
        let registration = registry.register(session).await.unwrap();
        let manager = ConnectionManager::builder(registry)
            .connector(connector)
            .build();
        Self {
            channel: manager.channel("echo"),
            manager,
            _registration: registration,
        }
    }

    async fn call(&self) -> Result<String, tonic::Status> {
        let request = EchoRequest {
            message: "hello".to_owned(),
            ..EchoRequest::default()
        };
        let answer = EchoClient::new(self.channel.clone()).unary(request).await?;
        assert_eq!(answer.get_ref().message, "hello");
        Ok(answer.into_inner().server)
    }
}

/// A path for a socket, which is free; what is there is removed when it is dropped.
struct SocketPath(PathBuf);

impl SocketPath {
    fn new() -> Self {
        let name = format!("switchboard-{}.sock", unique());
        Self(std::env::temp_dir().join(name))
    }

    fn address(&self) -> String {
        format!("unix://{}", self.0.display())
    }
}

impl Drop for SocketPath {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Unlike any other of this machine.
fn unique() -> String {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let n = NEXT.fetch_add(1, SeqCst);
    format!("{}-{n}", std::process::id())
}

fn listening(path: impl AsRef<std::path::Path>) -> UnixListenerStream {
    UnixListenerStream::new(UnixListener::bind(path).unwrap())
}

async fn listening_at_a_port() -> (TcpListenerStream, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (TcpListenerStream::new(listener), address)
}

fn trusting(ca: &Ca) -> TlsConfig {
    TlsConfig::new().ca_pem(ca.pem().as_bytes()).unwrap()
}

fn presenting(ca: &Ca, name: &str) -> ServerTlsConfig {
    let issued = ca.issue(&[name]);
    ServerTlsConfig::new().identity(Identity::from_pem(&issued.certificate, &issued.key))
}

#[tokio::test]
async fn a_session_at_a_unix_domain_socket_is_called_over_it() {
    // Given a server at a path, whose session says so,
    let path = SocketPath::new();
    let server = Echo::over(listening(&path.0), None);
    let client = Client::of(&path.address(), Connector::new()).await;

    // When it is called, then it answers, to calls that are for no host in particular.
    assert_eq!(client.call().await.unwrap(), "a");
    assert_eq!(server.authorities(), ["localhost"]);

    // And it is called what it was registered as.
    let peer = client.manager.status().roles[0].endpoints[0].peer.clone();
    assert_eq!(*peer.address, path.address());
}

#[tokio::test]
async fn a_unix_domain_socket_may_carry_tls() {
    let ca = Ca::new("ca");
    let path = SocketPath::new();
    let tls = presenting(&ca, "etcd.internal");
    let server = Echo::over(listening(&path.0), Some(tls));
    let config = trusting(&ca).server_name("etcd.internal").unwrap();
    let connector = Connector::new().tls(config).unwrap();
    let client = Client::of(&path.address(), connector).await;
    client.call().await.unwrap();
    assert_eq!(server.authorities(), ["localhost"]);

    // Without a name to prove it is to be who the authority says.
    let connector = Connector::new().tls(trusting(&ca)).unwrap();
    let error = connector.connect_to(&path.address()).await.unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("not valid for name \"localhost\""),
        "{error}"
    );
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_unix_domain_socket_may_be_in_no_file_system() {
    let name = format!("switchboard-{}", unique());
    let server = Echo::over(listening(format!("\0{name}")), None);
    let client = Client::of(&format!("unix-abstract:{name}"), Connector::new()).await;
    client.call().await.unwrap();
    assert_eq!(server.authorities(), ["localhost"]);
}

#[tokio::test]
async fn a_server_that_listens_again_at_its_path_is_called_again() {
    // Given a server that was called, and is gone with its socket,
    let path = SocketPath::new();
    let first = Echo::over(listening(&path.0), None);
    let client = Client::of(&path.address(), Connector::new()).await;
    client.call().await.unwrap();
    drop(first);
    std::fs::remove_file(&path.0).unwrap();

    // When another listens there, then calls go to it, without a word of the registry.
    let second = Echo::over(listening(&path.0), None);
    support::eventually_async("it is called", || async { client.call().await.is_ok() }).await;
    assert!(!second.authorities().is_empty());
}

#[tokio::test]
async fn the_authority_that_is_asked_for_is_that_of_all_calls_and_the_name_to_prove() {
    // Given servers that are for a name, one at a port and one at a path, neither of which says so,
    let ca = Ca::new("ca");
    let path = SocketPath::new();
    let (listener, tcp) = listening_at_a_port().await;
    for (address, server) in [
        (
            tcp,
            Echo::over(listener, Some(presenting(&ca, "etcd.internal"))),
        ),
        (
            path.address(),
            Echo::over(listening(&path.0), Some(presenting(&ca, "etcd.internal"))),
        ),
    ] {
        // When they are called by that name, with and without a port,
        for name in ["etcd.internal:2379", "etcd.internal"] {
            let connector = Connector::new().tls(trusting(&ca)).unwrap();
            let connector = connector.authority(name).unwrap();
            let client = Client::of(&address, connector).await;
            client.call().await.unwrap();
        }

        // Then they have proved it, and see it.
        assert_eq!(
            server.authorities(),
            ["etcd.internal:2379", "etcd.internal"]
        );

        // And the name to prove may be yet another than the authority.
        let connector = |server_name: &str, authority: &str| {
            let config = trusting(&ca).server_name(server_name).unwrap();
            let connector = Connector::new().authority(authority).unwrap();
            connector.tls(config).unwrap()
        };
        let client = Client::of(&address, connector("etcd.internal", "front")).await;
        client.call().await.unwrap();
        assert_eq!(server.authorities().last().unwrap(), "front");
        let connector = connector("front", "etcd.internal");
        let error = connector.connect_to(&address).await.unwrap_err();
        assert!(
            error.to_string().contains("not valid for name \"front\""),
            "{error}"
        );
    }
}

#[tokio::test]
async fn the_authority_is_seen_in_plaintext_too() {
    let (listener, address) = listening_at_a_port().await;
    let server = Echo::over(listener, None);
    for (connector, expected) in [
        (Connector::new(), &*address),
        (Connector::new().authority("[::1]:7").unwrap(), "[::1]:7"),
    ] {
        let client = Client::of(&address, connector).await;
        client.call().await.unwrap();
        assert_eq!(server.authorities().last().unwrap(), expected);
    }
    let error = Connector::new().authority("http://h").unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid);
}

#[tokio::test]
async fn of_a_names_addresses_one_that_refuses_is_passed_by() {
    // Given a name of two addresses, of which one refuses, at other ports than that of the name,
    let live = EchoServer::start("live");
    let refuses = SocketAddr::from(([127, 0, 0, 1], support::etcd::free_port()));
    let asked = Arc::new(Mutex::new(Vec::new()));
    let (seen, found) = (asked.clone(), vec![refuses, live.address]);
    let connector = Connector::new().resolver(move |host, port| {
        seen.lock().unwrap().push((host, port));
        let found = found.clone();
        async move { Ok(found) }
    });

    // When it is called, then the other answers, and the question was the name and its port.
    let client = Client::of("rootcoord.internal:53100", connector.clone()).await;
    assert_eq!(client.call().await.unwrap(), "live");
    let expected = ("rootcoord.internal".to_owned(), 53100);
    assert_eq!(*asked.lock().unwrap(), [expected]);

    // And an address that is no name is not asked about.
    let client = Client::of(&live.address(), connector).await;
    client.call().await.unwrap();
    assert_eq!(asked.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_name_that_moves_is_found_again_without_a_word_of_the_registry() {
    // Given a name that leads to one server, and is called,
    let mut first = EchoServer::start("first");
    let second = EchoServer::start("second");
    let leads_to = Arc::new(Mutex::new(first.address));
    let now = leads_to.clone();
    let connector = Connector::new().resolver(move |_host, _port| {
        let address = *now.lock().unwrap();
        async move { Ok(vec![address]) }
    });
    let client = Client::of("rootcoord:53100", connector).await;
    assert_eq!(client.call().await.unwrap(), "first");

    // When it leads to another, then it goes on as it is,
    *leads_to.lock().unwrap() = second.address;
    assert_eq!(client.call().await.unwrap(), "first");

    // And when the first is killed, calls find the other.
    first.killed().await;
    support::eventually_async("the other is called", || async {
        client.call().await.is_ok_and(|server| server == "second")
    })
    .await;
}

#[tokio::test]
async fn a_stream_of_ones_own_carries_http2_and_tls() {
    let ca = Ca::new("ca");
    for tls in [false, true] {
        // Given a server over streams in memory, and a dialer that makes them,
        let (streams, incoming) = mpsc::unbounded_channel();
        let incoming = UnboundedReceiverStream::new(incoming).map(Ok);
        let server = Echo::over(incoming, tls.then(|| presenting(&ca, "querynode")));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let seen = asked.clone();
        let connector = Connector::new().dial_with(move |address| {
            seen.lock().unwrap().push(address);
            let streams = streams.clone();
            async move {
                let (ours, theirs) = tokio::io::duplex(64 << 10);
                streams.send(theirs)?;
                Ok(ours)
            }
        });
        let connector = match tls {
            true => connector.tls(trusting(&ca)).unwrap(),
            false => connector,
        };

        // When a session's address is nowhere that could be dialled, then it is called all the same.
        let client = Client::of("querynode:7", connector.clone()).await;
        client.call().await.unwrap();
        assert_eq!(*asked.lock().unwrap(), ["querynode:7"]);
        assert_eq!(server.authorities(), ["querynode:7"]);

        // And an address that none of us knows is the dialer's affair.
        let connector = connector.authority("querynode").unwrap();
        let connection = connector.connect_to("vsock://3/7").await.unwrap();
        let request = EchoRequest::default();
        EchoClient::new(connection).unary(request).await.unwrap();
        assert_eq!(asked.lock().unwrap()[1], "vsock://3/7");
        assert_eq!(server.authorities()[1], "querynode");
    }
}

#[tokio::test]
async fn a_dialer_that_fails_or_panics_costs_the_attempt_and_says_why() {
    type Dialling = Pin<Box<dyn Future<Output = Result<DuplexStream, BoxError>> + Send>>;
    type Case = (fn() -> Dialling, &'static str);
    let cases: [Case; 3] = [
        (
            || Box::pin(async { Err(io::Error::other("the tunnel is down").into()) }),
            "the dialer failed: the tunnel is down",
        ),
        (
            || panic!("before it began"),
            "the dialer panicked: before it began",
        ),
        (
            || Box::pin(async { panic!("half way, at {}", 7) }),
            "the dialer panicked: half way, at 7",
        ),
    ];
    for (dial, expected) in cases {
        let connector = Connector::new().dial_with(move |_| dial());
        let error = connector.connect_to("h:1").await.unwrap_err();
        assert_eq!(error.kind(), Kind::ConnectionLost);
        assert_eq!(error.to_string(), format!("connection lost: {expected}"));

        // Calls through a pool end with it, and the pool lives.
        let client = Client::of("h:1", connector).await;
        for _ in 0..2 {
            let status = client.call().await.unwrap_err();
            assert_eq!(status.code(), Code::Unavailable);
            assert!(status.message().contains(expected), "{status:?}");
        }
    }

    // The program's own error can be had from ours.
    let connector = Connector::new().dial_with(|_| async {
        let error = io::Error::new(io::ErrorKind::NetworkDown, "the tunnel is down");
        Err::<DuplexStream, BoxError>(error.into())
    });
    let error = connector.connect_to("h:1").await.unwrap_err();
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    let found = loop {
        match source.and_then(|source| source.downcast_ref::<io::Error>()) {
            Some(found) => break found,
            None => source = source.expect("it is a source").source(),
        }
    };
    assert_eq!(found.kind(), io::ErrorKind::NetworkDown);
}

/// What an attempt goes through, and the words by which an error says that it was this.
const STEPS: [(&str, &[&str]); 6] = [
    ("address", &["address: "]),
    ("name", &["the name ", "the resolver "]),
    (
        "dial",
        &["connection refused", "no such socket", "addresses failed"],
    ),
    ("dialer", &["the dialer "]),
    ("tls", &["TLS handshake failed"]),
    ("http2", &["HTTP/2 handshake failed"]),
];

#[tokio::test]
async fn an_error_says_at_which_step_the_attempt_failed() {
    let (ca, clients) = (Ca::new("ca"), Ca::new("clients"));
    let plain = Connector::new;
    let trusting_them = |ca: &Ca| Connector::new().tls(trusting(ca)).unwrap();
    let resolving = |found: fn() -> io::Result<Vec<SocketAddr>>| {
        Connector::new().resolver(move |_, _| async move { found() })
    };
    let refuses = SocketAddr::from(([127, 0, 0, 1], support::etcd::free_port()));
    let nowhere = SocketPath::new().address();
    let (listener, wants_certificates) = listening_at_a_port().await;
    let tls = presenting(&ca, "127.0.0.1").client_ca_root(Certificate::from_pem(clients.pem()));
    let _wants_certificates = Echo::over(listener, Some(tls));
    let (mute, _mute) = without_alpn(&ca).await;
    let stranger = Ca::new("stranger").issue(&["querycoord"]);
    let (certificate, key) = (stranger.certificate.as_bytes(), stranger.key.as_bytes());
    let stranger = trusting(&ca).identity_pem(certificate, key).unwrap();

    let cases: Vec<(&str, Connector, &str, &str)> = vec![
        ("address", plain(), "nowhere", "there is no port"),
        ("address", plain(), "unix:", "unix:path"),
        (
            "name",
            plain(),
            "no.such.name.invalid:1",
            "the name was not resolved: ",
        ),
        (
            "name",
            resolving(|| Ok(Vec::new())),
            "h:1",
            "the name has no address",
        ),
        (
            "name",
            resolving(|| Err(io::Error::other("the zone is gone"))),
            "h:1",
            "the name was not resolved: the zone is gone",
        ),
        (
            "name",
            resolving(|| panic!("a bug")),
            "h:1",
            "the resolver panicked: a bug",
        ),
        ("dial", plain(), "127.0.0.1:REFUSES", "connection refused"),
        ("dial", plain(), &nowhere, "there is no such socket"),
        (
            "dial",
            Connector::new().resolver(move |_, _| async move { Ok(vec![refuses, refuses]) }),
            "h:1",
            "all 2 addresses failed: ",
        ),
        (
            "dialer",
            Connector::new().dial_with(|_| async {
                Err::<DuplexStream, BoxError>("the tunnel is down".into())
            }),
            "h:1",
            "the dialer failed: the tunnel is down",
        ),
        (
            "tls",
            trusting_them(&Ca::new("ours")),
            &wants_certificates,
            "the server's certificate leads to none of the trusted roots",
        ),
        (
            "tls",
            trusting_them(&ca).authority("etcd.internal").unwrap(),
            &wants_certificates,
            "not valid for name \"etcd.internal\"",
        ),
        (
            "tls",
            trusting_them(&ca),
            &wants_certificates,
            "the server asks for a client certificate",
        ),
        (
            "tls",
            Connector::new().tls(stranger).unwrap(),
            &wants_certificates,
            "the server refuses the client certificate",
        ),
        ("tls", trusting_them(&ca), &mute, "(ALPN h2)"),
        (
            "tls",
            meeting(hangs_up).tls(trusting(&ca)).unwrap(),
            "h:1",
            "closed by the peer before it was done",
        ),
        (
            "http2",
            meeting(hangs_up),
            "h:1",
            "the peer had said nothing",
        ),
        (
            "http2",
            meeting(|mut theirs| {
                tokio::spawn(async move {
                    let _ = theirs.write_all(b"220 mail.example ESMTP\r\n").await;
                    let _ = theirs.read(&mut [0; 1024]).await;
                });
            }),
            "h:1",
            "",
        ),
        ("http2", plain(), &wants_certificates, "the peer speaks TLS"),
    ];
    let mut provoked = HashSet::new();
    for (step, connector, address, says) in cases {
        let address = address.replace("REFUSES", &refuses.port().to_string());
        let attempt = tokio::time::timeout(PATIENCE, connector.connect_to(&address));
        let error = attempt.await.expect("it hangs").unwrap_err();
        let kind = match step {
            "address" => Kind::Invalid,
            _ => Kind::ConnectionLost,
        };
        let text = error.to_string();
        assert_eq!(error.kind(), kind, "{step} {address}: {text}");
        assert!(text.contains(says), "{step} {address}: {text}");
        // Which step it was, and that it was no other.
        for (other, words) in STEPS {
            let said = words.iter().any(|words| text.contains(words));
            assert_eq!(said, other == step, "{step} {address}, {other}: {text}");
        }
        provoked.insert(step);
    }
    assert_eq!(provoked.len(), STEPS.len(), "{provoked:?}");
}

/// One whose streams lead to this.
fn meeting(peer: fn(DuplexStream)) -> Connector {
    Connector::new().dial_with(move |_| async move {
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        peer(theirs);
        Ok(ours)
    })
}

/// Hears us out, and says nothing.
fn hangs_up(mut peer: DuplexStream) {
    tokio::spawn(async move {
        let _ = peer.read(&mut [0; 1024]).await;
    });
}

#[tokio::test]
async fn an_attempt_that_runs_out_of_time_says_in_which_step_it_was() {
    let within = Duration::from_millis(200);
    let silent = Blackhole::new();
    let connects = format!("connecting to {}", silent.address());
    let two = silent.address;
    for (address, connector, step) in [
        (silent.address(), Connector::new(), connects.as_str()),
        (
            "echo:1".to_owned(),
            Connector::new().resolver(move |_, _| std::future::pending()),
            "resolving the name echo",
        ),
        (
            "echo:1".to_owned(),
            Connector::new().resolver(move |_, _| async move { Ok(vec![two, two]) }),
            "connecting to any of its 2 addresses",
        ),
        (
            "echo:1".to_owned(),
            Connector::new()
                .dial_with(move |_| std::future::pending::<Result<DuplexStream, BoxError>>()),
            "waiting for the dialer",
        ),
    ] {
        let registry = MemoryRegistry::new();
        let session = Session::new("echo", address);
        let _registration = registry.register(session).await.unwrap();
        let manager = ConnectionManager::builder(registry)
            .connector(connector)
            .pools(PoolConfig::default().attempt_timeout(within).unwrap())
            .build();
        let mut client = EchoClient::new(manager.channel("echo"));
        let status = client.unary(EchoRequest::default()).await.unwrap_err();
        let expected = format!("not connected within 200ms, {step} (1 attempt");
        assert!(status.message().contains(&expected), "{status}");
    }
}

/// A TLS server for 127.0.0.1 that does not say which protocol it speaks.
async fn without_alpn(ca: &Ca) -> (String, JoinSet<()>) {
    let issued = ca.issue(&["127.0.0.1"]);
    let chain = vec![CertificateDer::from_pem_slice(issued.certificate.as_bytes()).unwrap()];
    let key = PrivateKeyDer::from_pem_slice(issued.key.as_bytes()).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut task = JoinSet::new();
    task.spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            if let Ok(mut stream) = acceptor.accept(socket).await {
                let _ = stream.read(&mut [0; 1024]).await;
            }
        }
    });
    (address, task)
}

#[tokio::test]
async fn options_of_tcp_are_those_of_the_socket() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let from = Ipv4Addr::new(127, 0, 0, 2);
    let connector = Connector::new()
        .tcp_keepalive(Some(Duration::from_secs(61)))
        .and_then(|connector| connector.tcp_user_timeout(Some(Duration::from_secs(7))))
        .unwrap()
        .local_address(IpAddr::from(from));
    let address_text = address.to_string();
    let connecting = connector.connect_to(&address_text);
    tokio::pin!(connecting);
    let (_accepted, peer) = tokio::select! {
        accepted = listener.accept() => accepted.unwrap(),
        result = &mut connecting => panic!("{result:?}"),
    };
    assert_eq!(peer.ip(), from);
    #[cfg(target_os = "linux")]
    {
        let timers = std::fs::read_to_string("/proc/net/tcp").unwrap();
        let local = format!("0200007F:{:04X}", peer.port());
        let line = timers
            .lines()
            .find(|line| line.split_whitespace().nth(1) == Some(&local));
        // Timer 2 is that of TCP's keepalive; without it there would be none on a socket that is still.
        assert!(line.is_some(), "{timers}");
    }

    // Out of bounds, or where there is none of its family, it is refused.
    let short = Some(Duration::from_millis(9));
    assert!(Connector::new().tcp_keepalive(short).is_err());
    assert!(Connector::new().tcp_user_timeout(short).is_err());
    let v6 = Connector::new().local_address(IpAddr::from(std::net::Ipv6Addr::LOCALHOST));
    let error = v6.connect_to(&address_text).await.unwrap_err().to_string();
    assert!(error.contains("from ::1: none is of its family"), "{error}");
    let elsewhere = Connector::new().local_address(IpAddr::from([192, 0, 2, 1]));
    let error = elsewhere
        .connect_to(&address_text)
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("not bound to the local address 192.0.2.1"),
        "{error}"
    );
}
