//! Certificates that are renewed while connections are in use: by their files, or by the program.

mod support;

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use support::{
    certificates::{Ca, Issued},
    eventually,
    server::{
        Seen, echo,
        pb::{EchoRequest, echo_client::EchoClient},
    },
    sockets_to,
};
use switchboard::{
    ConnectionManager, Kind, Session,
    registry::Fixed,
    transport::{Connector, TlsConfig, TlsReloader},
};
use tokio::{net::TcpListener, sync::mpsc, task::JoinSet, time};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{RootCertStore, ServerConfig, crypto::ring, server::WebPkiClientVerifier},
};
use tokio_stream::wrappers::ReceiverStream;

/// A tonic server that asks for a certificate, and remembers each that it was shown.
struct Asking {
    address: SocketAddr,
    shown: Arc<Mutex<Vec<CertificateDer<'static>>>>,
    _tasks: JoinSet<()>,
}

impl Asking {
    async fn start(ca: &Ca) -> Self {
        let issued = ca.issue(&["127.0.0.1"]);
        let provider = Arc::new(ring::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(der(&ca.pem())).unwrap();
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build();
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(verifier.unwrap())
            .with_single_cert(
                vec![der(&issued.certificate)],
                PrivateKeyDer::from_pem_slice(issued.key.as_bytes()).unwrap(),
            )
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        // Each connection shows what it has; none resumes what another has shown.
        config.send_tls13_tickets = 0;
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shown = Arc::new(Mutex::new(Vec::new()));
        let (connected, connections) = mpsc::channel(1);
        let mut tasks = JoinSet::new();
        let remembered = shown.clone();
        tasks.spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let Ok(stream) = acceptor.accept(socket).await else {
                    continue;
                };
                let certificates = stream.get_ref().1.peer_certificates().unwrap();
                let first = certificates[0].clone().into_owned();
                remembered.lock().unwrap().push(first);
                let _ = connected.send(Ok::<_, std::io::Error>(stream)).await;
            }
        });
        tasks.spawn(async move {
            let service = echo("a", &Arc::<Seen>::default());
            let server = tonic::transport::Server::builder().add_service(service);
            let incoming = ReceiverStream::new(connections);
            server.serve_with_incoming(incoming).await.unwrap();
        });
        Self {
            address,
            shown,
            _tasks: tasks,
        }
    }

    fn was_shown(&self, issued: &Issued) -> bool {
        let shown = self.shown.lock().unwrap();
        shown.contains(&der(&issued.certificate))
    }

    fn connections(&self) -> usize {
        self.shown.lock().unwrap().len()
    }

    fn manager(&self, connector: Connector) -> ConnectionManager {
        let session = Session::new("echo", self.address.to_string());
        ConnectionManager::builder(Fixed::new([session]).unwrap())
            .connector(connector.max_connections(1).unwrap())
            .build()
    }
}

fn der(pem: &str) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()
}

/// A folder that is removed when this is dropped.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        let name = format!("switchboard-renewal-{}", fastrand::u64(..));
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// A folder in it with these certificates.
    fn write(&self, name: &str, ca: &Ca, issued: &Issued) -> PathBuf {
        let folder = self.0.join(name);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("ca.crt"), ca.pem()).unwrap();
        fs::write(folder.join("tls.crt"), &issued.certificate).unwrap();
        fs::write(folder.join("tls.key"), &issued.key).unwrap();
        folder
    }

    /// Puts a folder in place as Kubernetes does: by a link that is replaced in one step.
    fn link(&self, to: &Path) -> PathBuf {
        let (new, link) = (self.0.join("..data_tmp"), self.0.join("..data"));
        symlink(to, &new).unwrap();
        fs::rename(&new, &link).unwrap();
        link
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn from_files(folder: &Path) -> TlsConfig {
    TlsConfig::new()
        .ca_file(folder.join("ca.crt"))
        .unwrap()
        .identity_files(folder.join("tls.crt"), folder.join("tls.key"))
        .unwrap()
        .reload_every(Duration::from_millis(20))
        .unwrap()
}

/// Calls in a loop; whether one has failed.
fn calls(manager: &ConnectionManager) -> (JoinSet<()>, Arc<AtomicBool>) {
    let failed = Arc::new(AtomicBool::new(false));
    let (mut client, fails) = (EchoClient::new(manager.channel("echo")), failed.clone());
    let mut calls = JoinSet::new();
    calls.spawn(async move {
        loop {
            if let Err(status) = client.unary(EchoRequest::default()).await {
                println!("{status:?}");
                fails.store(true, SeqCst);
            }
        }
    });
    (calls, failed)
}

#[tokio::test]
async fn certificates_that_are_renewed_in_their_files_replace_connections_and_no_call_fails() {
    // Given a connection with certificates from a folder that is linked to
    let ca = Ca::new("ca");
    let server = Asking::start(&ca).await;
    let [old, new] = [ca.issue(&["old"]), ca.issue(&["new"])];
    let folder = Folder::new();
    let link = folder.link(&folder.write("one", &ca, &old));
    let manager = server.manager(Connector::new().tls(from_files(&link)).unwrap());
    let (_calls, failed) = calls(&manager);
    eventually("it is connected", || server.was_shown(&old)).await;
    // When the link leads to another folder
    folder.link(&folder.write("two", &ca, &new));
    // Then there is another connection, with what is there, and soon no other
    eventually("the new one is shown", || server.was_shown(&new)).await;
    eventually("the old connection is gone", || {
        sockets_to(server.address.port()) == 1
    })
    .await;
    assert_eq!(server.connections(), 2);
    assert!(!failed.load(SeqCst));
}

#[tokio::test]
async fn what_cannot_be_used_leaves_what_was_there_until_it_can() {
    let ca = Ca::new("ca");
    let server = Asking::start(&ca).await;
    let [old, new] = [ca.issue(&["old"]), ca.issue(&["new"])];
    let folder = Folder::new();
    let files = folder.write("one", &ca, &old);
    let connector = Connector::new().tls(from_files(&files)).unwrap();
    let connect = async || connector.connect_to(&server.address.to_string()).await;
    let _first = connect().await.unwrap();
    // Given a new certificate, whose key is not there yet; then one of which half is written; then none
    let half = &new.certificate[..new.certificate.len() / 2];
    for broken in [Some(&*new.certificate), Some(half), None] {
        match broken {
            Some(certificate) => fs::write(files.join("tls.crt"), certificate).unwrap(),
            None => fs::remove_file(files.join("tls.crt")).unwrap(),
        }
        time::sleep(Duration::from_millis(50)).await;
        // When another connection is made, then with what was there before
        let before = server.connections();
        connect().await.unwrap();
        assert_eq!(server.connections(), before + 1);
        assert!(!server.was_shown(&new));
    }
    // When both are there, then with those
    fs::write(files.join("tls.crt"), &new.certificate).unwrap();
    fs::write(files.join("tls.key"), &new.key).unwrap();
    time::sleep(Duration::from_millis(50)).await;
    connect().await.unwrap();
    assert!(server.was_shown(&new));
}

#[tokio::test]
async fn files_that_are_read_once_are_not_looked_at_again() {
    let ca = Ca::new("ca");
    let server = Asking::start(&ca).await;
    let [old, new] = [ca.issue(&["old"]), ca.issue(&["new"])];
    let folder = Folder::new();
    let files = folder.write("one", &ca, &old);
    let config = TlsConfig::new().ca_file(files.join("ca.crt")).unwrap();
    let config = config.identity_files(files.join("tls.crt"), files.join("tls.key"));
    let connector = Connector::new().tls(config.unwrap()).unwrap();
    folder.write("one", &ca, &new);
    let address = server.address.to_string();
    connector.connect_to(&address).await.unwrap();
    assert!(server.was_shown(&old) && !server.was_shown(&new));
}

#[tokio::test]
async fn a_program_replaces_certificates_and_connections_follow() {
    // Given a connection with certificates of the program's own
    let ca = Ca::new("ca");
    let server = Asking::start(&ca).await;
    let [old, new] = [ca.issue(&["old"]), ca.issue(&["new"])];
    let config = |issued: &Issued| {
        let config = TlsConfig::new().ca_pem(ca.pem().as_bytes()).unwrap();
        let identity = (issued.certificate.as_bytes(), issued.key.as_bytes());
        config.identity_pem(identity.0, identity.1).unwrap()
    };
    let tls = TlsReloader::new(config(&old)).unwrap();
    let manager = server.manager(Connector::new().tls_from(&tls));
    let (_calls, failed) = calls(&manager);
    eventually("it is connected", || server.was_shown(&old)).await;
    // When it brings what cannot be used, then nothing changes
    let error = tls.replace(TlsConfig::new()).unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid);
    assert!(error.to_string().contains("nobody is trusted"), "{error}");
    // When it brings others, then they are used
    tls.replace(config(&new)).unwrap();
    eventually("the new one is shown", || server.was_shown(&new)).await;
    eventually("the old connection is gone", || {
        sockets_to(server.address.port()) == 1
    })
    .await;
    assert_eq!(server.connections(), 2);
    assert!(!failed.load(SeqCst));
}

#[test]
fn how_often_files_are_looked_at_is_bounded() {
    for interval in [
        Duration::ZERO,
        Duration::from_millis(9),
        Duration::from_secs(86_401),
    ] {
        let error = TlsConfig::new().reload_every(interval).unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid);
        assert!(error.to_string().contains("reload interval"), "{error}");
    }
}
