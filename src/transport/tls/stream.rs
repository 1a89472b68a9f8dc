//! A TLS connection that says why it ended, in words; also when that comes after the handshake.
//!
//! In TLS 1.3 the client's half of the handshake is done before the server has seen its certificate. A server
//! that refuses it does so while we already speak HTTP/2.

use std::{
    fmt, io,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::{
    client,
    rustls::{self, AlertDescription, CertificateError, InvalidMessage},
};

use crate::{
    error::{Error, Kind},
    transport::dial::Stream,
};

/// A TLS connection that says why it ended.
pub(in crate::transport) struct TlsStream {
    io: client::TlsStream<Stream>,
    refusal: Refusal,
}

/// Whether we brought a certificate: what a server that does not like it says means another thing.
#[derive(Clone, Copy, Debug)]
pub(super) enum Client {
    Anonymous,
    Certified,
}

/// What TLS, and not the network or HTTP/2, ended a connection with.
#[derive(Clone)]
pub(in crate::transport) struct Refusal {
    client: Client,
    why: Arc<OnceLock<rustls::Error>>,
}

// === impl TlsStream ===

impl TlsStream {
    pub(super) fn new(io: client::TlsStream<Stream>, client: Client) -> Self {
        let why = Arc::new(OnceLock::new());
        Self {
            io,
            refusal: Refusal { client, why },
        }
    }

    pub(in crate::transport) fn refusal(&self) -> Refusal {
        self.refusal.clone()
    }
}

impl AsyncRead for TlsStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Poll::Ready(match ready!(Pin::new(&mut self.io).poll_read(cx, buf)) {
            // The end without TLS's own goodbye, as of a process that was killed. HTTP/2 says itself where
            // a message ends, so a cut one is not taken for whole.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
            Err(error) => match reason(&error) {
                Some(why) => {
                    let text = in_words(why, self.refusal.client);
                    let _ = self.refusal.why.set(why.clone());
                    Err(io::Error::new(error.kind(), text))
                }
                None => Err(error),
            },
            Ok(()) => Ok(()),
        })
    }
}

impl AsyncWrite for TlsStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

impl fmt::Debug for TlsStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsStream").finish_non_exhaustive()
    }
}

// === impl Refusal ===

impl Refusal {
    /// The error of a connection that was not made: this, if it was TLS that ended it.
    pub(in crate::transport) fn or(&self, error: Error) -> Error {
        match self.why.get() {
            Some(why) => failed(why.clone(), self.client),
            None => error,
        }
    }
}

/// The error of a TLS handshake.
pub(super) fn handshake_failed(error: io::Error, client: Client) -> Error {
    match error.downcast::<rustls::Error>() {
        Ok(why) => failed(why, client),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Error::new(Kind::ConnectionLost)
                .with_reason("TLS handshake failed: closed by the peer before it was done")
        }
        Err(error) => Error::new(Kind::ConnectionLost)
            .with_reason("TLS handshake failed")
            .with_source(error),
    }
}

fn failed(why: rustls::Error, client: Client) -> Error {
    let reason = match hint(&why, client) {
        Some(hint) => format!("TLS handshake failed: {hint}"),
        None => "TLS handshake failed".to_owned(),
    };
    Error::new(Kind::ConnectionLost)
        .with_reason(reason)
        .with_source(why)
}

fn in_words(why: &rustls::Error, client: Client) -> String {
    match hint(why, client) {
        Some(hint) => format!("TLS: {hint}: {why}"),
        None => format!("TLS: {why}"),
    }
}

/// What to look at, where rustls's words leave that open.
fn hint(why: &rustls::Error, client: Client) -> Option<&'static str> {
    use AlertDescription as Alert;
    Some(match why {
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "the server's certificate leads to none of the trusted roots"
        }
        rustls::Error::AlertReceived(alert) => match alert {
            Alert::CertificateRequired => "the server asks for a client certificate",
            Alert::NoApplicationProtocol => "the server does not speak HTTP/2 (ALPN h2)",
            Alert::UnrecognisedName => "the server does not go by this name",
            Alert::BadCertificate
            | Alert::UnsupportedCertificate
            | Alert::CertificateRevoked
            | Alert::CertificateExpired
            | Alert::CertificateUnknown
            | Alert::UnknownCA
            | Alert::AccessDenied => match client {
                Client::Certified => "the server refuses the client certificate",
                // Servers in Go say so, etcd among them, where others say what they miss.
                Client::Anonymous => "the server refuses a client without a certificate",
            },
            _ => "the server refuses",
        },
        // The first bytes are not those of a TLS record.
        rustls::Error::InvalidMessage(
            InvalidMessage::InvalidContentType | InvalidMessage::UnknownProtocolVersion,
        ) => "the server does not seem to speak TLS",
        _ => return None,
    })
}

fn reason(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use rcgen::{CertificateParams, CertifiedIssuer, KeyPair};
    use rustls_pki_types::{PrivateKeyDer, ServerName};
    use tokio::{
        io::AsyncWriteExt as _,
        net::{TcpListener, TcpStream},
        time,
    };
    use tokio_rustls::{
        TlsAcceptor,
        rustls::{
            RootCertStore, ServerConfig, crypto::ring, server::WebPkiClientVerifier, version::TLS13,
        },
    };

    use super::*;
    use crate::transport::{Connector, TlsConfig, common::Common, core::Core, socket::Socket};

    #[tokio::test]
    async fn a_refusal_is_told_by_the_write_that_it_makes_fail() {
        // Given a server that wants a certificate, and a client whose handshake is done without one.
        let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(issuer.der().clone()).unwrap();
        let provider = Arc::new(ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier.build().unwrap())
            .with_single_cert(
                vec![issuer.der().clone()],
                PrivateKeyDer::try_from(issuer.key().serialize_der()).unwrap(),
            )
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            let (socket, _) = listener.accept().await.unwrap();
            let refused = TlsAcceptor::from(Arc::new(config)).accept(socket).await;
            refused.unwrap_err();
        });
        let tls = TlsConfig::new().ca_pem(issuer.pem().as_bytes());
        let tls = tls.unwrap().build().unwrap();
        let socket = TcpStream::connect(address).await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let stream = tls.handshake(Stream::Tcp(socket), name).await.unwrap();
        let refusal = stream.refusal();
        let connector = Connector::new();
        let to = connector.dialer.destination("localhost:1").unwrap();
        let common = Common::new(to, http::HeaderMap::new(), &connector);
        let core = Core::new(Arc::new(common), None);
        let mut stream = Socket::new(stream, Arc::new(core));

        // When the server has refused it and closed, and the client only writes,
        server.await.unwrap();
        let written = async {
            loop {
                if let Err(error) = stream.write_all(b"PRI * HTTP/2.0").await {
                    return error;
                }
                // One write is needed for the system to see that nobody is there, and some time.
                time::sleep(Duration::from_millis(1)).await;
            }
        };
        let error = time::timeout(Duration::from_secs(10), written).await;

        // Then it is told why.
        let error = error.expect("the write does not fail").to_string();
        let expected = "TLS: the server asks for a client certificate: received fatal alert: \
                        CertificateRequired";
        assert_eq!(error, expected);
        let lost = Error::new(Kind::ConnectionLost);
        let error = refusal.or(lost).to_string();
        assert!(
            error.contains("TLS handshake failed: the server asks"),
            "{error}"
        );
    }
}
