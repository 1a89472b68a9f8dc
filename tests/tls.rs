//! TLS and mutual TLS against real servers over real sockets: who is believed, who is refused, and what the
//! error says.

mod support;

use std::{
    future::Future,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use support::{
    certificates::{Ca, Issued},
    eventually,
    fake::Fake,
    server::{
        EchoServer, Options,
        pb::{EchoRequest, echo_client::EchoClient},
    },
    sockets_to,
};
use switchboard::{
    Backoff, Channel, ConnectionManager, Error, Kind, MemoryRegistry, Session, WaitForReady,
    pool::PoolConfig,
    registry::Registration,
    transport::{Connector, TlsConfig},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self, RootCertStore, ServerConfig, SupportedProtocolVersion, crypto::ring,
        server::WebPkiClientVerifier,
    },
};
use tonic::{
    Code,
    transport::{Certificate, Identity, ServerTlsConfig},
};

/// A refusal is an answer: it takes no timeout to see it.
const AT_ONCE: Duration = Duration::from_secs(5);

fn trusting(ca: &Ca) -> TlsConfig {
    TlsConfig::new().ca_pem(ca.pem().as_bytes()).unwrap()
}

fn showing(config: TlsConfig, identity: &Issued) -> TlsConfig {
    let (certificate, key) = (identity.certificate.as_bytes(), identity.key.as_bytes());
    config.identity_pem(certificate, key).unwrap()
}

fn presenting(issued: &Issued) -> ServerTlsConfig {
    ServerTlsConfig::new().identity(Identity::from_pem(&issued.certificate, &issued.key))
}

fn server(tls: ServerTlsConfig) -> EchoServer {
    EchoServer::start_with(
        "a",
        Options {
            tls: Some(tls),
            ..Options::default()
        },
    )
}

async fn channel_to(address: &str, connector: Connector) -> Client {
    let registry = MemoryRegistry::new();
    let session = Session::new("echo", address).with_id("a");
    let registration = registry.register(session).await.unwrap();
    let manager = ConnectionManager::builder(registry)
        .connector(connector)
        .build();
    Client {
        channel: manager.channel("echo"),
        _manager: manager,
        _registration: registration,
    }
}

struct Client {
    channel: Channel,
    _manager: ConnectionManager,
    _registration: Registration,
}

impl Client {
    fn echo(&self) -> EchoClient<Channel> {
        EchoClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }
}

fn message(text: &str) -> EchoRequest {
    EchoRequest {
        message: text.to_owned(),
        ..EchoRequest::default()
    }
}

/// A connection that is not made, with why; it must not take long to know.
async fn refused(address: &str, connector: &Connector) -> String {
    let connecting = tokio::time::timeout(AT_ONCE, connector.connect_to(address));
    let error = connecting.await.expect("it hangs").unwrap_err();
    assert_eq!(error.kind(), Kind::ConnectionLost, "{error}");
    error.to_string()
}

/// A TLS server of which each part can be chosen; it takes each connection's handshake to its end, and then
/// hands it to this.
async fn tls_server<F: Future<Output = ()> + Send + 'static>(
    issued: &Issued,
    clients: Option<&Ca>,
    versions: &[&'static SupportedProtocolVersion],
    alpn: &[&[u8]],
    then: fn(tokio_rustls::server::TlsStream<TcpStream>) -> F,
) -> (SocketAddr, JoinSet<()>) {
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(versions)
        .unwrap();
    let builder = match clients {
        Some(ca) => {
            let mut roots = RootCertStore::empty();
            roots
                .add(CertificateDer::from_pem_slice(ca.pem().as_bytes()).unwrap())
                .unwrap();
            let verifier =
                WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            builder.with_client_cert_verifier(verifier.unwrap())
        }
        None => builder.with_no_client_auth(),
    };
    let chain = vec![CertificateDer::from_pem_slice(issued.certificate.as_bytes()).unwrap()];
    let key = PrivateKeyDer::from_pem_slice(issued.key.as_bytes()).unwrap();
    let mut config = builder.with_single_cert(chain, key).unwrap();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut task = JoinSet::new();
    task.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((socket, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            connections.spawn(async move {
                if let Ok(stream) = acceptor.accept(socket).await {
                    then(stream).await;
                }
            });
        }
    });
    (address, task)
}

#[tokio::test]
async fn calls_and_streams_go_over_tls() {
    // Given a server whose certificate is for the address that it is registered with.
    let ca = Ca::new("ca");
    let server = server(presenting(&ca.issue(&["127.0.0.1"])));
    let connector = Connector::new().tls(trusting(&ca)).unwrap();
    let client = channel_to(&server.address(), connector).await;

    // When it is called, then it answers.
    let answer = client.echo().unary(message("hello")).await.unwrap();
    assert_eq!(answer.get_ref().message, "hello");

    // And messages larger than any window or record come back whole.
    let payload: Bytes = (0..10_000_000u32)
        .map(|n| n as u8)
        .collect::<Vec<_>>()
        .into();
    let request = EchoRequest {
        payload: payload.clone(),
        ..message("large")
    };
    let answer = client.echo().unary(request).await.unwrap().into_inner();
    let bytes = answer.payload.len();
    assert!(answer.payload == payload, "{bytes} bytes came back");
}

#[tokio::test]
async fn a_name_in_the_address_is_the_one_that_is_verified() {
    let ca = Ca::new("ca");
    let server = server(presenting(&ca.issue(&["localhost"])));
    let connector = Connector::new().tls(trusting(&ca)).unwrap();
    let address = format!("localhost:{}", server.address.port());
    let client = channel_to(&address, connector).await;
    client.echo().unary(message("hello")).await.unwrap();
}

#[tokio::test]
async fn calls_over_tls_have_the_scheme_https_and_the_authority_that_was_dialled() {
    let ca = Ca::new("ca");
    let issued = ca.issue(&["etcd.internal"]);
    let all = rustls::ALL_VERSIONS;
    let (address, _server) = tls_server(&issued, None, all, &[b"h2"], |io| async move {
        let mut connection = h2::server::handshake(io).await.unwrap();
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            let answer = http::Response::builder()
                .header("content-type", "application/grpc")
                .header("grpc-status", "9")
                .header("grpc-message", request.uri().to_string())
                .body(())
                .unwrap();
            respond.send_response(answer, true).unwrap();
        }
    })
    .await;
    let config = trusting(&ca).server_name("etcd.internal").unwrap();
    let connector = Connector::new().tls(config).unwrap();
    let client = channel_to(&address.to_string(), connector).await;
    let status = client.echo().unary(message("hello")).await.unwrap_err();
    let uri = format!("https://{address}/switchboard.demo.v1.Echo/Unary");
    assert!(status.message().starts_with(&uri), "{status:?}");
}

#[tokio::test]
async fn a_server_may_be_verified_by_another_name_than_its_address() {
    let ca = Ca::new("ca");
    let server = server(presenting(&ca.issue(&["etcd.internal"])));
    let config = trusting(&ca).server_name("etcd.internal").unwrap();
    let connector = Connector::new().tls(config).unwrap();
    let client = channel_to(&server.address(), connector).await;
    client.echo().unary(message("hello")).await.unwrap();
}

#[tokio::test]
async fn a_server_that_asks_for_a_client_certificate_gets_it() {
    let (ca, clients) = (Ca::new("ca"), Ca::new("clients"));
    let tls =
        presenting(&ca.issue(&["127.0.0.1"])).client_ca_root(Certificate::from_pem(clients.pem()));
    let server = server(tls);
    let config = showing(trusting(&ca), &clients.issue(&["querycoord"]));
    let connector = Connector::new().tls(config).unwrap();
    let client = channel_to(&server.address(), connector).await;
    client.echo().unary(message("hello")).await.unwrap();
}

// The store is the environment's, which a process may not change while its threads run: so this test is also the program that it
// starts, each time with another store.
#[tokio::test]
async fn the_platforms_roots_are_believed_and_no_others() {
    const SERVER: &str = "SWITCHBOARD_TEST_SERVER";
    if let Ok(address) = std::env::var(SERVER) {
        // In the program: what came of it goes out.
        let connected = match TlsConfig::new().native_roots() {
            Ok(config) => {
                let connector = Connector::new().tls(config).unwrap();
                let connecting = connector.connect_to(&address).await;
                connecting.map(drop).map_err(|error| error.to_string())
            }
            Err(error) => Err(error.to_string()),
        };
        println!("came of it: {connected:?}");
        return;
    }
    let (ca, other) = (Ca::new("ca"), Ca::new("other"));
    let server = server(presenting(&ca.issue(&["127.0.0.1"])));
    let folder = std::env::temp_dir().join(format!("switchboard-roots-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let with_store = async |pem: &str| {
        let store = folder.join("store.pem");
        std::fs::write(&store, pem).unwrap();
        let program = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_platforms_roots_are_believed_and_no_others"])
            .arg("--nocapture")
            .env(SERVER, server.address())
            .env("SSL_CERT_FILE", &store)
            .env_remove("SSL_CERT_DIR")
            .output()
            .unwrap();
        String::from_utf8(program.stdout).unwrap()
    };
    let both = with_store(&format!("{}{}", other.pem(), ca.pem())).await;
    assert!(both.contains("came of it: Ok(())"), "{both}");
    let others = with_store(&other.pem()).await;
    assert!(
        others.contains("UnknownIssuer") || others.contains("unknown issuer"),
        "{others}"
    );
    let none = with_store("").await;
    assert!(
        none.contains("the platform's CA certificates: none was found"),
        "{none}"
    );
    std::fs::remove_dir_all(&folder).unwrap();
}

#[tokio::test]
async fn roots_and_identity_may_come_from_files_and_roots_add_up() {
    let (ca, other, clients) = (Ca::new("ca"), Ca::new("other"), Ca::new("clients"));
    let folder = std::env::temp_dir().join(format!("switchboard-tls-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let identity = clients.issue(&["querycoord"]);
    let write = |name: &str, text: &str| {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let bundle = format!("# Ours\n{}\n# Theirs\n{}", other.pem(), ca.pem());
    let config = TlsConfig::new()
        .webpki_roots()
        .ca_file(write("ca.crt", &bundle))
        .unwrap()
        .identity_files(
            write("client.crt", &identity.certificate),
            write("client.key", &identity.key),
        )
        .unwrap();
    std::fs::remove_dir_all(&folder).unwrap();

    let tls =
        presenting(&ca.issue(&["127.0.0.1"])).client_ca_root(Certificate::from_pem(clients.pem()));
    let server = server(tls);
    let connector = Connector::new().tls(config).unwrap();
    let client = channel_to(&server.address(), connector).await;
    client.echo().unary(message("hello")).await.unwrap();
}

#[tokio::test]
async fn a_server_whose_issuer_is_unknown_is_refused() {
    let server = server(presenting(&Ca::new("theirs").issue(&["127.0.0.1"])));
    let connector = Connector::new().tls(trusting(&Ca::new("ours"))).unwrap();
    let error = refused(&server.address(), &connector).await;
    let expected = "connection lost: TLS handshake failed: the server's certificate leads to none of the \
                    trusted roots: invalid peer certificate: UnknownIssuer";
    assert_eq!(error, expected);

    // And so does a call say.
    let began = Instant::now();
    let client = channel_to(&server.address(), connector).await;
    let status = client.echo().unary(message("hello")).await.unwrap_err();
    assert!(began.elapsed() < AT_ONCE, "{:?}", began.elapsed());
    assert_eq!(status.code(), Code::Unavailable);
    let message = status.message();
    assert!(
        message.contains("TLS handshake failed: the server's certificate"),
        "{message}"
    );
    assert_eq!(server.seen.started.load(SeqCst), 0);
}

#[tokio::test]
async fn a_server_with_a_certificate_for_another_name_is_refused() {
    let ca = Ca::new("ca");
    let server = server(presenting(&ca.issue(&["querynode.internal"])));
    let connector = Connector::new().tls(trusting(&ca)).unwrap();
    let error = refused(&server.address(), &connector).await;
    assert!(error.contains("TLS handshake failed: "), "{error}");
    assert!(
        error.contains("not valid for name \"127.0.0.1\""),
        "{error}"
    );
    assert!(error.contains("querynode.internal"), "{error}");
}

#[tokio::test]
async fn a_server_whose_certificate_has_expired_is_refused() {
    let ca = Ca::new("ca");
    let server = server(presenting(&ca.issue_expired(&["127.0.0.1"])));
    let connector = Connector::new().tls(trusting(&ca)).unwrap();
    let error = refused(&server.address(), &connector).await;
    assert!(error.contains("TLS handshake failed: "), "{error}");
    assert!(error.contains("certificate expired"), "{error}");
}

// More than once, as what is read first, the alert or that the socket is closed, is a race.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_misses_a_client_certificate_says_so_whatever_is_written_meanwhile() {
    let (ca, clients) = (Ca::new("ca"), Ca::new("clients"));
    let issued = ca.issue(&["127.0.0.1"]);
    let tonic = server(presenting(&issued).client_ca_root(Certificate::from_pem(clients.pem())));
    let tls13: &[_] = &[&rustls::version::TLS13];
    let tls12: &[_] = &[&rustls::version::TLS12];
    let (new, _new) = tls_server(&issued, Some(&clients), tls13, &[b"h2"], silent).await;
    let (old, _old) = tls_server(&issued, Some(&clients), tls12, &[b"h2"], silent).await;
    let connector = Connector::new().tls(trusting(&ca)).unwrap();
    for address in [tonic.address, new, old] {
        for n in 0..50 {
            let error = refused(&address.to_string(), &connector).await;
            let expected = "connection lost: TLS handshake failed: the server asks for a client \
                            certificate: received fatal alert: CertificateRequired";
            assert_eq!(error, expected, "at attempt {n}");
        }
    }
}

#[tokio::test]
async fn a_client_certificate_that_the_server_does_not_trust_is_what_the_error_names() {
    let (ca, clients) = (Ca::new("ca"), Ca::new("clients"));
    let tls =
        presenting(&ca.issue(&["127.0.0.1"])).client_ca_root(Certificate::from_pem(clients.pem()));
    let server = server(tls);
    let config = showing(trusting(&ca), &Ca::new("stranger").issue(&["querycoord"]));
    let connector = Connector::new().tls(config).unwrap();
    let error = refused(&server.address(), &connector).await;
    let expected =
        "TLS handshake failed: the server refuses the client certificate: received fatal alert";
    assert!(error.contains(expected), "{error}");
}

#[tokio::test]
async fn a_plaintext_server_that_is_spoken_to_in_tls_is_recognized() {
    let server = EchoServer::start("a");
    let connector = Connector::new().tls(trusting(&Ca::new("ca"))).unwrap();
    let error = refused(&server.address(), &connector).await;
    let expected = "TLS handshake failed: the server does not seem to speak TLS";
    assert!(error.contains(expected), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tls_server_that_is_spoken_to_in_plaintext_is_recognized() {
    let server = server(presenting(&Ca::new("ca").issue(&["127.0.0.1"])));
    for n in 0..20 {
        let error = refused(&server.address(), &Connector::new()).await;
        let expected = "connection lost: HTTP/2 handshake failed: the peer speaks TLS, and was spoken to in \
                        plaintext";
        assert_eq!(error, expected, "at attempt {n}");
    }
}

#[tokio::test]
async fn a_peer_that_hangs_up_on_plaintext_without_a_word_may_want_tls() {
    // As servers in Go do, etcd among them.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let _ = socket.read(&mut [0; 1024]).await;
        }
    });
    let error = refused(&address.to_string(), &Connector::new()).await;
    assert!(error.contains("HTTP/2 handshake failed: "), "{error}");
    assert!(
        error.ends_with("the peer had said nothing; it may want TLS"),
        "{error}"
    );
}

#[tokio::test]
async fn a_server_that_does_not_agree_on_http2_is_refused() {
    let ca = Ca::new("ca");
    let issued = ca.issue(&["127.0.0.1"]);
    let all = rustls::ALL_VERSIONS;
    let (mute, _mute) = tls_server(&issued, None, all, &[], silent).await;
    let (other, _other) = tls_server(&issued, None, all, &[b"http/1.1"], silent).await;
    let connector = Connector::new().tls(trusting(&ca)).unwrap();
    let error = refused(&mute.to_string(), &connector).await;
    let expected = "connection lost: TLS handshake failed: the server did not say that it speaks HTTP/2 (ALPN h2)";
    assert_eq!(error, expected);
    let error = refused(&other.to_string(), &connector).await;
    let expected =
        "TLS handshake failed: the server does not speak HTTP/2 (ALPN h2): received fatal alert";
    assert!(error.contains(expected), "{error}");
}

#[tokio::test]
async fn a_server_that_is_silent_in_the_handshake_costs_one_attempt_and_is_let_go() {
    // Given a server that accepts and says nothing.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let registry = MemoryRegistry::new();
    let session = Session::new("echo", address.to_string());
    let _registration = registry.register(session).await.unwrap();
    let attempt = Duration::from_millis(200);
    let manager = ConnectionManager::builder(registry)
        .connector(Connector::new().tls(trusting(&Ca::new("ca"))).unwrap())
        .pools(PoolConfig::default().attempt_timeout(attempt).unwrap())
        .build();

    // When it is called, then the call ends with the attempt.
    let began = Instant::now();
    let mut client = EchoClient::new(manager.channel("echo"));
    let status = client.unary(message("hello")).await.unwrap_err();
    let took = began.elapsed();
    assert!(took >= attempt && took < AT_ONCE, "{took:?}");
    assert_eq!(
        Error::of(&status).map(Error::kind),
        Some(Kind::NotConnected)
    );
    assert!(
        status
            .message()
            .contains("not connected within 200ms, in the TLS handshake"),
        "{status:?}"
    );

    // And an attempt that nobody waits for closes its socket.
    manager.stop().await;
    let port = address.port();
    eventually("nothing is left", || sockets_to(port) == 0).await;
    let connector = Connector::new().tls(trusting(&Ca::new("ca"))).unwrap();
    let address = address.to_string();
    {
        let connecting = connector.connect_to(&address);
        tokio::pin!(connecting);
        let half = async {
            tokio::select! {
                result = &mut connecting => panic!("{result:?}"),
                () = eventually("it is in the handshake", || sockets_to(port) == 1) => {}
            }
        };
        half.await;
    }
    eventually("nothing is left", || sockets_to(port) == 0).await;
}

/// What a server does in the handshake instead of taking part in it.
#[derive(Clone, Copy, Debug)]
enum Instead {
    HangUp,
    HangUpAfterTheHello,
    Say(&'static [u8]),
    SayAndHangUp(&'static [u8]),
}

// A record of TLS begins with its type (22 is a handshake, 21 an alert), its version, and its length.
#[tokio::test]
async fn a_server_that_does_not_take_part_in_the_handshake_costs_one_attempt_and_is_let_go() {
    use Instead::{HangUp, HangUpAfterTheHello, Say, SayAndHangUp};
    let ca = Ca::new("ca");
    let real = server(presenting(&ca.issue(&["127.0.0.1"])));
    let behind = real.address;
    for (instead, why) in [
        (HangUp, "TLS handshake failed"),
        (HangUpAfterTheHello, "TLS handshake failed"),
        (SayAndHangUp(&[22, 3, 3]), "TLS handshake failed"),
        (
            SayAndHangUp(&[22, 3, 3, 0, 100, 2, 0, 0, 96]),
            "TLS handshake failed",
        ),
        (Say(&[22, 3, 3, 0, 4, 2, 0, 0, 0]), "TLS handshake failed"),
        (Say(&[22, 3, 3, 0, 4, 0, 0, 0, 0]), "TLS handshake failed"),
        (Say(&[22, 3, 3, 0xff, 0xff, 2]), "TLS handshake failed"),
        (
            Say(&[21, 3, 3, 0, 2, 2, 40]),
            "TLS handshake failed: the server refuses: received fatal alert",
        ),
        (
            Say(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
            "does not seem to speak TLS",
        ),
        // As much as was announced never comes.
        (
            Say(&[22, 3, 3, 0, 100, 2, 0, 0, 96]),
            "not connected within 300ms, in the TLS handshake",
        ),
    ] {
        // Given a server that is not one at first
        let recovered = Arc::new(AtomicBool::new(false));
        let has = recovered.clone();
        let fake = Fake::sockets(move |_, mut socket| {
            let recovered = has.load(SeqCst);
            async move {
                if recovered {
                    let mut real = TcpStream::connect(behind).await?;
                    tokio::io::copy_bidirectional(&mut socket, &mut real).await?;
                    return Ok(());
                }
                let mut hello = [0; 1024];
                match instead {
                    HangUp => return Ok(()),
                    HangUpAfterTheHello => _ = socket.read(&mut hello).await?,
                    Say(what) => {
                        socket.write_all(what).await?;
                        while socket.read(&mut hello).await? > 0 {}
                    }
                    SayAndHangUp(what) => {
                        _ = socket.read(&mut hello).await?;
                        socket.write_all(what).await?;
                    }
                }
                Ok(())
            }
        });
        let registry = MemoryRegistry::new();
        let session = Session::new("echo", fake.address()).with_id("a");
        let _registration = registry.register(session).await.unwrap();
        let backoff = Backoff::constant(Duration::from_millis(50), 0.0).unwrap();
        let attempt = match why.starts_with("not connected") {
            true => Duration::from_millis(300),
            false => AT_ONCE,
        };
        let pools = PoolConfig::default().attempt_timeout(attempt).unwrap();
        let manager = ConnectionManager::builder(registry)
            .connector(Connector::new().tls(trusting(&ca)).unwrap())
            .pools(pools.backoff(backoff).probe(Some(backoff)))
            .build();
        // When it is called, then that ends, with who and why
        let began = Instant::now();
        let mut client = EchoClient::new(manager.channel("echo"));
        let status = client.unary(message("hello")).await.unwrap_err();
        assert!(began.elapsed() < AT_ONCE, "{:?}", began.elapsed());
        let kind = Error::of(&status).map(Error::kind);
        assert_eq!(kind, Some(Kind::NotConnected), "{instead:?}: {status}");
        for part in [why, &format!("{} (id a)", fake.address)] {
            assert!(
                status.message().contains(part),
                "{instead:?}: not {part}: {status}"
            );
        }
        // When it is one, then it is called
        recovered.store(true, SeqCst);
        let mut request = tonic::Request::new(message("hello"));
        request.extensions_mut().insert(WaitForReady(true));
        let called = tokio::time::timeout(AT_ONCE, client.unary(request)).await;
        called.expect("it hangs").unwrap();
        manager.stop().await;
        eventually("nothing is left", || sockets_to(fake.address.port()) == 0).await;
    }
}

#[tokio::test]
async fn a_killed_server_ends_its_calls_and_is_connected_anew_when_it_is_back() {
    let ca = Ca::new("ca");
    let tls = presenting(&ca.issue(&["127.0.0.1"]));
    let mut first = server(tls.clone());
    let connector = Connector::new().tls(trusting(&ca)).unwrap();
    let client = channel_to(&first.address(), connector).await;
    let mut echo = client.echo();
    let slow = EchoRequest {
        delay_ms: 60_000,
        ..message("slow")
    };
    let call = tokio::spawn(async move { echo.unary(slow).await });
    eventually("the call is there", || first.seen.started.load(SeqCst) == 1).await;

    first.killed().await;
    let status = tokio::time::timeout(AT_ONCE, call).await.expect("it hangs");
    let status = status.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");

    let options = Options {
        address: Some(first.address),
        tls: Some(tls),
        ..Options::default()
    };
    let _second = EchoServer::start_with("a", options);
    support::eventually_async("it is connected anew", || async {
        client.echo().unary(message("again")).await.is_ok()
    })
    .await;
}

#[test]
fn what_cannot_work_is_said_when_it_is_configured() {
    let (ca, clients) = (Ca::new("ca"), Ca::new("clients"));
    let (one, other) = (clients.issue(&["one"]), clients.issue(&["other"]));
    let (certificate, key) = (one.certificate.as_bytes(), one.key.as_bytes());
    let config = || trusting(&ca);
    let cases = [
        (
            Connector::new().tls(TlsConfig::new()).err(),
            "TLS: nobody is trusted; it needs at least one of ca_pem, ca_file, webpki_roots and native_roots",
        ),
        (
            config().ca_pem(b"nothing").err(),
            "CA certificates: there is no certificate in PEM",
        ),
        (
            config().ca_pem(key).err(),
            "CA certificates: there is no certificate in PEM",
        ),
        (
            config()
                .ca_pem(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
                .err(),
            "CA certificates: certificate 1: invalid peer certificate: BadEncoding",
        ),
        (
            config().ca_file("/no/such/file").err(),
            "CA file /no/such/file: No such file or directory",
        ),
        (
            config().identity_pem(key, key).err(),
            "client certificate: there is no certificate in PEM",
        ),
        (
            config().identity_pem(certificate, certificate).err(),
            "client key: there is no private key in PEM (PKCS#8, PKCS#1 or SEC1, not encrypted)",
        ),
        (
            config()
                .identity_pem(certificate, other.key.as_bytes())
                .err(),
            "client key: it is not the key of the first certificate",
        ),
        (
            config().identity_files("/no/such/file", "/none").err(),
            "client certificate /no/such/file: No such file or directory",
        ),
        (
            config().server_name("not a name").err(),
            "TLS server name: \"not a name\" is neither a DNS name nor an IP address",
        ),
    ];
    for (error, expected) in cases {
        let error = error.expect(expected);
        assert_eq!(error.kind(), Kind::Invalid, "{error}");
        let text = error.to_string();
        assert!(text.contains(expected), "{text}, not {expected}");
    }
}

#[test]
fn secrets_are_not_shown() {
    let ca = Ca::new("ca");
    let config = showing(trusting(&ca), &ca.issue(&["querycoord"]));
    let shown = format!(
        "{config:?} {:?}",
        Connector::new().tls(config.clone()).unwrap()
    );
    assert!(shown.contains("identity: true"), "{shown}");
    assert!(shown.len() < 1000, "{shown}");
}

/// Says nothing, until the client has had enough.
async fn silent(mut stream: tokio_rustls::server::TlsStream<TcpStream>) {
    let mut buffer = [0; 1024];
    while stream.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
}
