//! From an address to a connection: over which kind of socket, by which name, by whose resolver and dialer, and which
//! step an error names.

mod support;

use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use support::{
    certificates::Ca,
    server::{
        Seen,
        pb::{EchoRequest, echo_client::EchoClient},
    },
};
use switchboard::{
    Channel, ConnectionManager, MemoryRegistry, Session,
    registry::Registration,
    transport::{Connector, TlsConfig},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixListener,
    runtime::Runtime,
};
use tokio_stream::{Stream, wrappers::UnixListenerStream};
use tonic::transport::{Identity, Server, ServerTlsConfig, server::Connected};
use tower::util::MapRequestLayer;

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
