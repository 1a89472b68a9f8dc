//! TLS under a connection: whom to trust, who we are, and the name that a server has to prove.

mod reload;
mod stream;

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use http::uri::Authority;
use rustls_pki_types::{
    CertificateDer, PrivateKeyDer, ServerName,
    pem::{self, PemObject as _},
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        self, ClientConfig, RootCertStore,
        crypto::{CryptoProvider, ring},
        sign::{CertifiedKey, SingleCertAndKey},
    },
};

pub use self::reload::TlsReloader;
pub(super) use self::stream::TlsStream;
use self::{reload::Kept, stream::Client};
use super::dial::Stream;
use crate::{
    Backoff,
    backoff::check_duration,
    endpoint::step,
    error::{Error, Kind},
};

/// HTTP/2, as ALPN names it.
const H2: &[u8] = b"h2";

/// How a [`Connector`](super::Connector) speaks TLS: whom it trusts, who it is itself, and by which name it
/// knows the server.
///
/// TLS 1.3 and 1.2, by `rustls` on `ring`. A server is believed when its certificate is in date, leads to one
/// of the roots, and is for the name: that of [`TlsConfig::server_name`], otherwise the host of the `:authority`, which is the address unless another was
/// given.
/// Nothing turns that off. At least one root is needed; those of several calls add up.
///
/// Certificates and keys are read when the method is called, and kept: a file that changes later is read again only if
/// [`TlsConfig::reload_every`] asks for it.
///
/// ```
/// use switchboard::transport::{Connector, TlsConfig};
///
/// # fn run() -> Result<(), switchboard::Error> {
/// let tls = TlsConfig::new()
///     .ca_file("/etc/etcd/ca.crt")?
///     .identity_files("/etc/etcd/client.crt", "/etc/etcd/client.key")?;
/// let connector = Connector::new().tls(tls)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
#[must_use]
pub struct TlsConfig {
    provider: Arc<CryptoProvider>,
    /// Those that are not from files.
    roots: RootCertStore,
    ca_files: Vec<(Kept, Vec<CertificateDer<'static>>)>,
    identity: Option<Arc<CertifiedKey>>,
    /// Where that is from, if it is from files: the certificate and the key.
    identity_files: Option<[Kept; 2]>,
    reload: Option<Duration>,
    server_name: Option<ServerName<'static>>,
}

/// What a connector needs of it, made once: all connections share it, and with it the sessions that they
/// resume.
#[derive(Clone)]
pub(super) struct Tls {
    config: Arc<ClientConfig>,
    client: Client,
    server_name: Option<ServerName<'static>>,
}

// === impl TlsConfig ===

impl TlsConfig {
    /// Trusts nobody yet, and brings no certificate of its own.
    pub fn new() -> Self {
        Self {
            provider: Arc::new(ring::default_provider()),
            roots: RootCertStore::empty(),
            ca_files: Vec::new(),
            identity: None,
            identity_files: None,
            reload: None,
            server_name: None,
        }
    }

    /// Trusts the certificates in this PEM text, one or more. What else is in it is passed over.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] if there is none, or one that cannot be a root.
    pub fn ca_pem(mut self, pem: &[u8]) -> Result<Self, Error> {
        for root in roots("CA certificates", pem)? {
            self.roots
                .add(root)
                .map_err(|error| invalid("CA certificates", error))?;
        }
        Ok(self)
    }

    /// Trusts the certificates in this PEM file, as [`TlsConfig::ca_pem`] does. It is read here and now,
    /// on the caller's thread.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] if it cannot be read, has no certificate, or one that cannot be a root.
    pub fn ca_file(mut self, path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let file = read("CA file", path)?;
        let roots = roots(&format!("CA file {}", path.display()), &file.contents)?;
        self.ca_files.push((file, roots));
        Ok(self)
    }

    /// Trusts the authorities that browsers do: Mozilla's list as of the `webpki-roots` crate in this build.
    pub fn webpki_roots(mut self) -> Self {
        self.roots
            .extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
        self
    }

    /// Trusts the authorities that this machine does: the platform's store or, where they are set, the files
    /// that `SSL_CERT_FILE` and `SSL_CERT_DIR` name. It is read here and now, on the caller's thread.
    ///
    /// Certificates in it that are of no use are passed over; such stores have some.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] if there is not one that is of use.
    pub fn native_roots(mut self) -> Result<Self, Error> {
        let found = rustls_native_certs::load_native_certs();
        let (added, _ignored) = self.roots.add_parsable_certificates(found.certs);
        if added == 0 {
            let why = match found.errors.first() {
                Some(error) => format!("none was found: {error}"),
                None => "none was found".to_owned(),
            };
            return Err(Error::invalid("the platform's CA certificates", why));
        }
        Ok(self)
    }

    /// Proves to servers who we are (mutual TLS): the certificate, followed by those that lead to its
    /// root if there are any, and its private key, both in PEM. A later identity replaces an earlier one.
    ///
    /// The key may be PKCS#8, PKCS#1 or SEC1; RSA, ECDSA on P-256 or P-384, or Ed25519; not encrypted. The
    /// first one in the text counts.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] if either is not there or not readable, or if the key is not the certificate's.
    pub fn identity_pem(mut self, certificate: &[u8], key: &[u8]) -> Result<Self, Error> {
        self.identity_files = None;
        self.identify(("client certificate", certificate), ("client key", key))
    }

    /// The same from two PEM files, or one given twice. They are read here and now, on the caller's thread.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] if a file cannot be read, and as [`TlsConfig::identity_pem`].
    pub fn identity_files(
        self,
        certificate: impl AsRef<Path>,
        key: impl AsRef<Path>,
    ) -> Result<Self, Error> {
        let (certificate, key) = (certificate.as_ref(), key.as_ref());
        let certificate_file = read("client certificate", certificate)?;
        let key_file = read("client key", key)?;
        let mut this = self.identify(
            (
                &format!("client certificate {}", certificate.display()),
                &certificate_file.contents,
            ),
            (&format!("client key {}", key.display()), &key_file.contents),
        )?;
        this.identity_files = Some([certificate_file, key_file]);
        Ok(this)
    }

    /// Looks at the files again this often, those of [`TlsConfig::ca_file`] and [`TlsConfig::identity_files`]. Default: never.
    /// 10 ms to 1 day; grpc-go's certificate providers do so each hour.
    ///
    /// When their contents have changed, and can be used as a whole, handshakes are made with them from then on, and
    /// connections that were made before are replaced, as [`TlsReloader`] describes. When they cannot be used, such as while
    /// a certificate has been replaced and its key has not yet, those before stay, a warning is logged, and the files are
    /// looked at again. They are followed by name: a link to another folder, as Kubernetes puts its secrets in place, is
    /// a change as well.
    ///
    /// They are read on tokio's threads for blocking work, when a connection is dialled or there is one, and not otherwise.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] outside these bounds.
    pub fn reload_every(mut self, interval: Duration) -> Result<Self, Error> {
        let least = Duration::from_millis(10);
        let interval = check_duration("reload interval", interval, least, Backoff::LONGEST)?;
        self.reload = Some(interval);
        Ok(self)
    }

    /// The name that servers have to prove, and that they are asked for (SNI), whatever their address: a DNS
    /// name or an IP address, without a port. Default is the host of [`Connector::authority`](super::Connector::authority) or,
    /// without one, of each address; `localhost` where that has none, as of Unix domain sockets.
    ///
    /// It changes neither where is dialled nor the `:authority` of calls.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] if it is neither.
    pub fn server_name(mut self, name: &str) -> Result<Self, Error> {
        self.server_name = Some(parse_name(name)?);
        Ok(self)
    }

    /// The same with what its files hold now, and that itself. Reads them on this thread.
    fn read_again(&self) -> Result<(Self, Vec<Vec<u8>>), Error> {
        let mut new = self.clone();
        new.ca_files.clear();
        for (file, _) in &self.ca_files {
            new = new.ca_file(&file.path)?;
        }
        if let Some([certificate, key]) = &self.identity_files {
            new = new.identity_files(&certificate.path, &key.path)?;
        }
        let contents = new.contents();
        Ok((new, contents))
    }

    fn kept(&self) -> impl Iterator<Item = &Kept> {
        let identity = self.identity_files.iter().flatten();
        self.ca_files.iter().map(|(file, _)| file).chain(identity)
    }

    fn contents(&self) -> Vec<Vec<u8>> {
        self.kept().map(|file| file.contents.clone()).collect()
    }

    fn files(&self) -> Vec<PathBuf> {
        self.kept().map(|file| file.path.clone()).collect()
    }

    pub(super) fn build(self) -> Result<Tls, Error> {
        let mut roots = self.roots;
        for (file, of_file) in self.ca_files {
            let what = format!("CA file {}", file.path.display());
            for root in of_file {
                roots.add(root).map_err(|error| invalid(&what, error))?;
            }
        }
        if roots.is_empty() {
            let why = "nobody is trusted; it needs at least one of ca_pem, ca_file, webpki_roots and native_roots";
            return Err(Error::invalid("TLS", why));
        }
        let builder = ClientConfig::builder_with_provider(self.provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| Error::invalid("TLS", error))?
            .with_root_certificates(roots);
        let (client, mut config) = match self.identity {
            Some(identity) => {
                let identity = Arc::new(SingleCertAndKey::from(identity));
                (
                    Client::Certified,
                    builder.with_client_cert_resolver(identity),
                )
            }
            None => (Client::Anonymous, builder.with_no_client_auth()),
        };
        config.alpn_protocols = vec![H2.to_vec()];
        Ok(Tls {
            config: Arc::new(config),
            client,
            server_name: self.server_name,
        })
    }

    fn identify(
        mut self,
        (what, certificate): (&str, &[u8]),
        (what_key, key): (&str, &[u8]),
    ) -> Result<Self, Error> {
        let chain = certificates(what, certificate)?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| match error {
            pem::Error::NoItemsFound => invalid(
                what_key,
                "there is no private key in PEM (PKCS#8, PKCS#1 or SEC1, not encrypted)",
            ),
            error => invalid(what_key, in_words(&error)),
        })?;
        let identity = CertifiedKey::from_der(chain, key, &self.provider);
        self.identity = Some(Arc::new(identity.map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => {
                invalid(what_key, "it is not the key of the first certificate")
            }
            rustls::Error::InvalidCertificate(_) => invalid(what, error),
            error => invalid(what_key, error),
        })?));
        Ok(self)
    }
}

impl Default for TlsConfig {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for TlsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsConfig")
            .field("roots", &self.roots.len())
            .field("files", &self.files())
            .field("reload", &self.reload)
            .field("identity", &self.identity.is_some())
            .field("server_name", &self.server_name)
            .finish_non_exhaustive()
    }
}

// === impl Tls ===

impl Tls {
    /// The name that the server at this address has to prove.
    pub(super) fn name_of(&self, authority: &Authority) -> Result<ServerName<'static>, Error> {
        match &self.server_name {
            Some(name) => Ok(name.clone()),
            None => parse_name(authority.host()),
        }
    }

    /// From a byte stream to one that has proved its name and speaks HTTP/2.
    ///
    /// Dropping the future closes it.
    pub(super) async fn handshake(
        &self,
        io: Stream,
        name: ServerName<'static>,
    ) -> Result<TlsStream, Error> {
        step::next("in the TLS handshake");
        let connector = TlsConnector::from(self.config.clone());
        let io = connector
            .connect(name, io)
            .await
            .map_err(|error| stream::handshake_failed(error, self.client))?;
        // A protocol that was not offered is refused by rustls, a server that offers others refuses us. One
        // that ignores ALPN may speak anything; RFC 9113, 3.2 demands it, as gRPC in Go has since 1.67.
        if io.get_ref().1.alpn_protocol() != Some(H2) {
            return Err(Error::new(Kind::ConnectionLost).with_reason(
                "TLS handshake failed: the server did not say that it speaks HTTP/2 (ALPN h2)",
            ));
        }
        Ok(TlsStream::new(io, self.client))
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls")
            .field("client", &self.client)
            .field("server_name", &self.server_name)
            .finish_non_exhaustive()
    }
}

pub(crate) fn parse_name(name: &str) -> Result<ServerName<'static>, Error> {
    let bare = name.strip_prefix('[').and_then(|n| n.strip_suffix(']'));
    ServerName::try_from(bare.unwrap_or(name).to_owned()).map_err(|_| {
        let why = format!("{name:?} is neither a DNS name nor an IP address");
        Error::invalid("TLS server name", why)
    })
}

/// Certificates that can be roots.
pub(crate) fn roots(what: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    let found = certificates(what, pem)?;
    let mut store = RootCertStore::empty();
    for (n, certificate) in found.iter().enumerate() {
        store
            .add(certificate.clone())
            .map_err(|error| invalid(what, format!("certificate {}: {error}", n + 1)))?;
    }
    Ok(found)
}

pub(crate) fn certificates(what: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    let found: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|error| invalid(what, in_words(&error)))?;
    match found.is_empty() {
        true => Err(invalid(what, "there is no certificate in PEM")),
        false => Ok(found),
    }
}

/// Why a text is no PEM, without its lines: where line breaks were lost, one has the whole key.
fn in_words(error: &pem::Error) -> String {
    match error {
        pem::Error::IllegalSectionStart { .. } => {
            "a line begins with -----BEGIN and is not -----BEGIN ...----- alone".to_owned()
        }
        pem::Error::MissingSectionEnd { .. } => {
            "a section has no line -----END ...----- of its own".to_owned()
        }
        error => error.to_string(),
    }
}

fn read(what: &str, path: &Path) -> Result<Kept, Error> {
    let contents = fs::read(path).map_err(|error| {
        Error::new(Kind::Invalid)
            .with_reason(format!("{what} {}", path.display()))
            .with_source(error)
    })?;
    Ok(Kept {
        path: path.to_owned(),
        contents,
    })
}

fn invalid(what: &str, why: impl fmt::Display) -> Error {
    Error::new(Kind::Invalid).with_reason(format!("{what}: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_whose_line_breaks_are_lost_is_not_shown() {
        for between in ["", " ", "\\n"] {
            let key = [
                "-----BEGIN PRIVATE KEY-----",
                "MIGH",
                "-----END PRIVATE KEY-----",
            ];
            let key = key.join(between);
            let issuer = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
            let certificate = issuer.cert.pem();
            let config = TlsConfig::new().identity_pem(certificate.as_bytes(), key.as_bytes());
            let error = config.unwrap_err().to_string();
            assert!(error.contains("line"), "{error}");
            // Neither as text nor as the numbers of its bytes.
            assert!(
                !error.contains("MIGH") && !error.contains("77, 73"),
                "{error}"
            );
        }
    }

    #[test]
    fn the_name_to_prove_is_the_host_of_the_address_unless_another_was_given() {
        let by_address = TlsConfig::new().webpki_roots().build().unwrap();
        let name = |tls: &Tls, address: &str| {
            let name = tls.name_of(&address.parse().unwrap());
            name.map(|name| name.to_str().into_owned())
                .map_err(|error| error.to_string())
        };
        for (address, expected) in [
            ("etcd-0.internal:2379", "etcd-0.internal"),
            ("query_node:1", "query_node"),
            ("10.0.0.5:2379", "10.0.0.5"),
            ("[::1]:2379", "::1"),
            ("[2001:db8::5]:2379", "2001:db8::5"),
        ] {
            assert_eq!(name(&by_address, address).as_deref(), Ok(expected));
        }
        let error = name(&by_address, "-:1").unwrap_err();
        let expected =
            "invalid argument: TLS server name: \"-\" is neither a DNS name nor an IP address";
        assert_eq!(error, expected);

        let config = TlsConfig::new().webpki_roots();
        let named = config.server_name("[::1]").unwrap().build().unwrap();
        assert_eq!(name(&named, "etcd:1").as_deref(), Ok("::1"));
    }
}
