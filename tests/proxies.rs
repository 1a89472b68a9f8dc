//! Connections through an HTTP proxy, against real servers over real sockets: what the proxy is asked, what of its answer is
//! whose, and which step an error names.

mod support;

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use http::header::PROXY_AUTHORIZATION;
use support::{
    certificates::Ca,
    proxy::Blackhole,
    server::{
        EchoServer, Options, Seen, echo,
        pb::{EchoRequest, echo_client::EchoClient},
    },
};
use switchboard::{
    Channel, ConnectionManager, Error, Kind, MemoryRegistry, Session,
    pool::PoolConfig,
    registry::Registration,
    transport::{Connector, Proxy, TlsConfig},
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream, UnixListener},
    task::JoinSet,
};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::{Identity, Server, ServerTlsConfig};

/// An answer comes at once, and takes no timeout.
const AT_ONCE: Duration = Duration::from_secs(5);

fn message(text: &str) -> EchoRequest {
    EchoRequest {
        message: text.to_owned(),
        ..EchoRequest::default()
    }
}

/// A managed channel to the one session, at this address.
struct Client {
    channel: Channel,
    _manager: ConnectionManager,
    _registration: Registration,
}

impl Client {
    async fn to(address: &str, connector: Connector) -> Self {
        Self::with(address, connector, PoolConfig::default()).await
    }

    async fn with(address: &str, connector: Connector, pools: PoolConfig) -> Self {
        let registry = MemoryRegistry::new();
        let session = Session::new("echo", address);
        let registration = registry.register(session).await.unwrap();
        let manager = ConnectionManager::builder(registry)
            .connector(connector)
            .pools(pools)
            .build();
        Self {
            channel: manager.channel("echo"),
            _manager: manager,
            _registration: registration,
        }
    }

    /// Who answers.
    async fn call(&self) -> Result<String, tonic::Status> {
        let mut client = EchoClient::new(self.channel.clone());
        let answer = tokio::time::timeout(AT_ONCE, client.unary(message("hello"))).await;
        Ok(answer.expect("it hangs")?.into_inner().server)
    }
}

async fn refused(address: &str, connector: &Connector) -> String {
    let connecting = tokio::time::timeout(AT_ONCE, connector.connect_to(address));
    connecting.await.expect("it hangs").unwrap_err().to_string()
}

fn trusting(ca: &Ca) -> TlsConfig {
    TlsConfig::new().ca_pem(ca.pem().as_bytes()).unwrap()
}

fn presenting(ca: &Ca, name: &str) -> ServerTlsConfig {
    let issued = ca.issue(&[name]);
    ServerTlsConfig::new().identity(Identity::from_pem(&issued.certificate, &issued.key))
}

fn over_tls(ca: &Ca, name: &str) -> EchoServer {
    let options = Options {
        tls: Some(presenting(ca, name)),
        ..Options::default()
    };
    EchoServer::start_with("a", options)
}

/// A port of this machine at which nobody listens.
fn refusing() -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

/// A name in the temporary folder that no other test has.
fn path(name: &str) -> String {
    let file = format!("switchboard-{}-{name}.sock", std::process::id());
    let path = std::env::temp_dir().join(file);
    let _ = std::fs::remove_file(&path);
    path.to_str().unwrap().to_owned()
}

/// Serves at a Unix domain socket until it is dropped.
fn serve_unix(listener: UnixListener, tls: Option<ServerTlsConfig>) -> JoinSet<()> {
    let mut task = JoinSet::new();
    task.spawn(async move {
        let mut server = Server::builder();
        if let Some(tls) = tls {
            server = server.tls_config(tls).unwrap();
        }
        let service = echo("unix", &Arc::new(Seen::default()));
        let incoming = UnixListenerStream::new(listener);
        let served = server.add_service(service).serve_with_incoming(incoming);
        served.await.unwrap();
    });
    task
}

/// What a proxy does with a CONNECT.
#[derive(Clone, Copy)]
enum Then {
    /// Goes to this address, whatever was asked for.
    Tunnel(SocketAddr),
    /// The same, with the answer and the peer's first bytes in one write.
    Glued(SocketAddr),
    Says(&'static [u8]),
    EndlessHeaders,
    Silence,
}

type Asked = Arc<Mutex<Vec<(String, Option<String>)>>>;

/// A small HTTP proxy; it notes what it is asked, the request line and the authorization.
struct Connects {
    address: SocketAddr,
    asked: Asked,
    accepted: Arc<AtomicUsize>,
    _task: JoinSet<()>,
}

impl Connects {
    async fn start(then: Then) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (asked, accepted) = (Arc::default(), Arc::new(AtomicUsize::new(0)));
        let (notes, count) = (Arc::clone(&asked), accepted.clone());
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut links = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                count.fetch_add(1, SeqCst);
                links.spawn(tunnel(client, then, Arc::clone(&notes)));
            }
        });
        Self {
            address,
            asked,
            accepted,
            _task: task,
        }
    }

    fn connector(&self) -> Connector {
        Connector::new().proxy(Proxy::http(&format!("http://{}", self.address)).unwrap())
    }

    fn asked(&self) -> Vec<(String, Option<String>)> {
        self.asked.lock().unwrap().clone()
    }
}

async fn tunnel(client: TcpStream, then: Then, asked: Asked) {
    let mut client = BufReader::new(client);
    let (mut first, mut authorization) = (String::new(), None);
    client.read_line(&mut first).await.unwrap();
    loop {
        let mut line = String::new();
        client.read_line(&mut line).await.unwrap();
        match line.trim_end().split_once(": ") {
            None => break,
            Some((name, value)) if name.eq_ignore_ascii_case(PROXY_AUTHORIZATION.as_str()) => {
                authorization = Some(value.to_owned());
            }
            Some(_) => {}
        }
    }
    asked
        .lock()
        .unwrap()
        .push((first.trim_end().to_owned(), authorization));
    let mut client = client.into_inner();
    let open = b"HTTP/1.1 200 Connection established\r\nVia: test\r\n\r\n";
    match then {
        Then::Tunnel(to) => {
            let mut server = TcpStream::connect(to).await.unwrap();
            client.write_all(open).await.unwrap();
            let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
        }
        Then::Glued(to) => {
            let mut server = TcpStream::connect(to).await.unwrap();
            let mut said = vec![0; 1024];
            let n = server.read(&mut said).await.unwrap();
            let all = [open, &said[..n]].concat();
            client.write_all(&all).await.unwrap();
            let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
        }
        Then::Says(what) => {
            client.write_all(what).await.unwrap();
            let _ = client.read(&mut [0; 1]).await;
        }
        Then::EndlessHeaders => {
            client.write_all(b"HTTP/1.1 200 OK\r\n").await.unwrap();
            while client
                .write_all(b"X-More: and more of it\r\n")
                .await
                .is_ok()
            {}
        }
        Then::Silence => {
            let _ = client.read(&mut [0; 1]).await;
        }
    }
}

#[tokio::test]
async fn calls_go_through_a_proxy_which_resolves_the_name() {
    let server = EchoServer::start("a");
    let proxy = Connects::start(Then::Tunnel(server.address)).await;
    let uri = format!("http://Aladdin:open%20sesame@{}", proxy.address);
    let connector = Connector::new().proxy(Proxy::http(&uri).unwrap());
    let client = Client::to("echo.nowhere.invalid:7", connector).await;
    assert_eq!(client.call().await.unwrap(), "a");
    let expected = (
        "CONNECT echo.nowhere.invalid:7 HTTP/1.1".to_owned(),
        Some("Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==".to_owned()),
    );
    assert_eq!(proxy.asked(), [expected]);
}

#[tokio::test]
async fn tls_through_a_proxy_is_with_the_server_behind_it() {
    let ca = Ca::new("ca");
    let server = over_tls(&ca, "echo.internal");
    let proxy = Connects::start(Then::Tunnel(server.address)).await;
    let connector = proxy.connector().tls(trusting(&ca)).unwrap();
    let client = Client::to("echo.internal:7", connector.clone()).await;
    assert_eq!(client.call().await.unwrap(), "a");
    assert_eq!(proxy.asked()[0].1, None);

    // And it is not believed under another name.
    let error = refused("other.internal:7", &connector).await;
    assert!(
        error.contains("not valid for name \"other.internal\""),
        "{error}"
    );
}

#[tokio::test]
async fn what_the_server_says_right_behind_the_proxys_answer_is_not_lost() {
    // Given a server that speaks first, as HTTP/2 allows, and a proxy that passes that on together with its answer.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
        socket.write_all(&settings).await.unwrap();
        let mut read = Vec::new();
        // A ping is answered; it is the client's last frame.
        while !read.windows(6).any(|frame| frame == [0, 0, 8, 6, 0, 0]) {
            assert!(socket.read_buf(&mut read).await.unwrap() > 0);
        }
        let at = read
            .windows(6)
            .position(|frame| frame == [0, 0, 8, 6, 0, 0])
            .unwrap();
        while read.len() < at + 17 {
            socket.read_buf(&mut read).await.unwrap();
        }
        let mut pong = read[at..at + 17].to_vec();
        pong[4] = 1;
        // And so are settings, but only if the client was told of them.
        let acknowledged = [0, 0, 0, 4, 1, 0, 0, 0, 0];
        socket.write_all(&acknowledged).await.unwrap();
        while !read.windows(9).any(|frame| frame == acknowledged) {
            assert!(socket.read_buf(&mut read).await.unwrap() > 0);
        }
        socket.write_all(&pong).await.unwrap();
        let _ = socket.read(&mut [0; 1]).await;
    });
    let proxy = Connects::start(Then::Glued(address)).await;
    let connector = proxy.connector();
    let connecting = connector.connect_to("echo:1");
    tokio::time::timeout(AT_ONCE, connecting)
        .await
        .expect("it hangs")
        .unwrap();
}

#[tokio::test]
async fn a_proxy_that_does_not_open_a_tunnel_is_named_with_what_it_said() {
    for (then, expected) in [
        (
            Then::Says(
                b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\n\r\n",
            ),
            "refused CONNECT to echo:1: 407 Proxy Authentication Required",
        ),
        (
            Then::Says(b"SSH-2.0-OpenSSH_9.2\r\n"),
            "did not answer in HTTP/1 when it was asked to CONNECT to echo:1",
        ),
        (
            Then::EndlessHeaders,
            "answered with more than 8192 bytes when it was asked to CONNECT to echo:1",
        ),
    ] {
        let proxy = Connects::start(then).await;
        let error = refused("echo:1", &proxy.connector()).await;
        let expected = format!("connection lost: the proxy at {} {expected}", proxy.address);
        assert_eq!(error, expected);
    }

    let nobody = refusing();
    let connector = Connector::new().proxy(Proxy::http(&nobody.to_string()).unwrap());
    let error = refused("echo:1", &connector).await;
    let expected = format!("the proxy at {nobody} was not reached: connection refused");
    assert!(error.ends_with(&expected), "{error}");
}

#[tokio::test]
async fn a_proxy_that_says_nothing_costs_one_attempt() {
    let proxy = Connects::start(Then::Silence).await;
    let attempt = Duration::from_millis(200);
    let pools = PoolConfig::default().attempt_timeout(attempt).unwrap();
    let client = Client::with("echo:1", proxy.connector(), pools).await;
    let began = Instant::now();
    let status = client.call().await.unwrap_err();
    assert!(began.elapsed() >= attempt, "{:?}", began.elapsed());
    assert_eq!(
        Error::of(&status).map(Error::kind),
        Some(Kind::NotConnected)
    );
    assert!(
        status
            .message()
            .contains("not connected within 200ms, waiting for the proxy at 127.0.0.1:"),
        "{status:?}"
    );
}

#[tokio::test]
async fn who_is_excepted_and_who_is_on_this_machine_goes_past_the_proxy() {
    let server = EchoServer::start("a");
    let blackhole = Blackhole::new();
    let proxy = Proxy::http(&blackhole.address())
        .unwrap()
        .except("127.0.0.0/8");
    let connector = Connector::new().proxy(proxy);
    let client = Client::to(&server.address(), connector.clone()).await;
    assert_eq!(client.call().await.unwrap(), "a");

    // And none stands before a Unix domain socket, or where it was taken back.
    let path = path("proxied");
    let _server = serve_unix(UnixListener::bind(&path).unwrap(), None);
    let client = Client::to(&format!("unix:{path}"), connector).await;
    assert_eq!(client.call().await.unwrap(), "unix");
    let proxy = Connects::start(Then::Silence).await;
    let connector = proxy.connector().proxy(None);
    let client = Client::to(&server.address(), connector).await;
    assert_eq!(client.call().await.unwrap(), "a");
    assert_eq!(proxy.accepted.load(SeqCst), 0);
}
