//! HTTP proxies: a tunnel by CONNECT.

use std::{env, fmt, io, net::IpAddr};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::{BufMut as _, BytesMut};
use http::HeaderValue;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{Dialer, Stream};
use crate::{
    address::HostPort,
    endpoint::step,
    error::{Error, Kind},
};

/// How much a proxy may say before its answer is at an end.
const HEAD_MOST: usize = 8 << 10;

/// An HTTP proxy, which is asked for a tunnel to each peer: `CONNECT`, as of
/// [RFC 9110, 9.3.6](https://www.rfc-editor.org/rfc/rfc9110#section-9.3.6).
///
/// It gets the peer's name as it is written: the proxy resolves it. What TLS there is is with the peer; between here and
/// the proxy there is none of its own. Its answer is part of the attempt and of its time, and may be 8 KiB long.
///
/// ```
/// use switchboard::transport::{Connector, Proxy};
///
/// let proxy = Proxy::http("http://user:secret@proxy.internal:3128")?.except("10.0.0.0/8, .svc");
/// let connector = Connector::new().proxy(proxy);
/// # Ok::<(), switchboard::Error>(())
/// ```
#[derive(Clone)]
pub struct Proxy {
    /// `host:port`, and valid.
    pub(crate) address: String,
    pub(crate) authorization: Option<HeaderValue>,
    except: Vec<Except>,
}

/// Who is reached without it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Except {
    who: Who,
    port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Who {
    All,
    /// This name, and all below it; in lower case.
    Names(String),
    /// All whose first bits are those of this address; names are not looked up for it.
    Net(IpAddr, u32),
}

// === impl Proxy ===

impl Proxy {
    /// The proxy at `http://host:port`, with basic authorization if it is `http://user:password@host:port`. The port is
    /// 80 unless it is said, and `http://` may be left out. In the user's name and the password, `%40` stands for `@`, and
    /// so on.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] if it is something else: proxies that are spoken to in TLS, and SOCKS, are not to be had. What it
    /// says does not show the password.
    pub fn http(uri: &str) -> Result<Self, Error> {
        // What has other characters is a password's part, and not to be shown.
        let is_scheme = |text: &str| {
            let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.');
            text.bytes().all(allowed)
        };
        let split = uri.split_once("://");
        let rest = match split.filter(|(scheme, _)| is_scheme(scheme)) {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => rest,
            Some((scheme, _)) => {
                let why = format!(
                    "{scheme:?} is not a scheme of proxies that can be used; write http://host:port"
                );
                return Err(Error::invalid("proxy", why));
            }
            None => uri,
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (user, address) = match rest.rsplit_once('@') {
            Some((user, address)) => (Some(user), address),
            None => (None, rest),
        };
        let has_port = match address.rsplit_once(']') {
            Some((_, after)) => after.contains(':'),
            None => address.contains(':'),
        };
        let address = match has_port {
            true => address.to_owned(),
            false => format!("{address}:80"),
        };
        HostPort::parse(&address)
            .map_err(|error| Error::invalid("proxy", error.reason().unwrap_or_default()))?;
        let authorization = user.map(basic).transpose()?;
        Ok(Self {
            address,
            authorization,
            except: Vec::new(),
        })
    }

    /// The proxy that the environment names, or `None` if it names none: the first that is set and not empty of
    /// `grpc_proxy`, `https_proxy` and `http_proxy`, each in lower case and then in upper case, whether or not TLS is
    /// spoken. So gRPC's other clients do. Where `REQUEST_METHOD` is set, as for CGI programs, `HTTP_PROXY` is
    /// not read: it is a request's header there.
    ///
    /// Whom it is not for, as [`Proxy::except`], is in the first that is set of `no_grpc_proxy` and `no_proxy`, likewise.
    /// This machine is proxied like any other, unless it stands there.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`], naming the variable, as [`Proxy::http`].
    pub fn from_env() -> Result<Option<Self>, Error> {
        Self::from_vars(|name| env::var(name).ok())
    }

    pub(crate) fn from_vars(var: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, Error> {
        let first = |names: &[&'static str]| {
            let each = names
                .iter()
                .flat_map(|name| [(*name).to_owned(), name.to_uppercase()]);
            each.filter(|name| name != "HTTP_PROXY" || var("REQUEST_METHOD").is_none())
                .find_map(|name| {
                    let value = var(&name)?.trim().to_owned();
                    (!value.is_empty()).then_some((name, value))
                })
        };
        let Some((name, uri)) = first(&["grpc_proxy", "https_proxy", "http_proxy"]) else {
            return Ok(None);
        };
        let proxy = Self::http(&uri).map_err(|error| {
            let why = error.reason().unwrap_or_default();
            Error::new(Kind::Invalid).with_reason(format!("{name}: {why}"))
        })?;
        Ok(Some(match first(&["no_grpc_proxy", "no_proxy"]) {
            Some((_, list)) => proxy.except(&list),
            None => proxy,
        }))
    }

    /// Reaches those in this list without it; a list adds to what is there. It is separated by commas. `*` is all; a
    /// name is itself and all names below it, with or without `*.` or a dot before it; `10.0.0.5` is this address and
    /// `10.0.0.0/8` all that begin like it, where an address and no name is dialled. `:port` after a name or an address
    /// makes it that port's alone. What is none of these is passed over, as other programs may read it.
    #[must_use]
    pub fn except(mut self, list: &str) -> Self {
        self.except
            .extend(list.split(',').filter_map(Except::parse));
        self
    }

    /// Whether this peer is reached through it.
    pub(crate) fn is_for(&self, target: &HostPort<'_>) -> bool {
        !self.except.iter().any(|except| except.is(target))
    }

    /// A tunnel to this peer.
    ///
    /// Dropping the future closes it.
    pub(super) async fn connect(&self, target: HostPort<'_>, by: &Dialer) -> Result<Stream, Error> {
        let proxy = HostPort::parse(&self.address)?;
        let mut io = by.dial_tcp(proxy).await.map_err(|error| {
            // Its cause stays with it.
            let why = error.reason().unwrap_or_default();
            error.with_reason(format!("the proxy at {proxy} was not reached: {why}"))
        })?;
        let lost = |error: io::Error| {
            Error::new(Kind::ConnectionLost)
                .with_reason(format!(
                    "the proxy at {proxy} was lost when it was asked to CONNECT to {target}"
                ))
                .with_source(error)
        };
        let refused = |why: &str| {
            Error::new(Kind::ConnectionLost).with_reason(format!("the proxy at {proxy} {why}"))
        };
        step::next(format!(
            "waiting for the proxy at {proxy} to CONNECT to {target}"
        ));
        io.write_all(&self.request(&target)).await.map_err(lost)?;
        let mut said = BytesMut::with_capacity(1024);
        loop {
            match Said::read(&said) {
                Said::Refused(line) => {
                    return Err(refused(&format!("refused CONNECT to {target}: {line}")));
                }
                Said::Nonsense => {
                    return Err(refused(&format!(
                        "did not answer in HTTP/1 when it was asked to CONNECT to {target}"
                    )));
                }
                Said::Open(head) => {
                    // What comes after it is the peer's.
                    let ahead = said.split_off(head).freeze();
                    return Ok(Stream::after(ahead, io));
                }
                Said::Wait(head) => drop(said.split_to(head)),
                Said::Part if said.len() >= HEAD_MOST => {
                    return Err(refused(&format!(
                        "answered with more than {HEAD_MOST} bytes when it was asked to CONNECT to {target}"
                    )));
                }
                Said::Part => {
                    let room = HEAD_MOST - said.len();
                    let read = io.read_buf(&mut (&mut said).limit(room)).await;
                    if read.map_err(lost)? == 0 {
                        return Err(refused(&format!(
                            "closed the connection when it was asked to CONNECT to {target}"
                        )));
                    }
                }
            }
        }
    }

    fn request(&self, target: &HostPort<'_>) -> Vec<u8> {
        let mut request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n").into_bytes();
        if let Some(authorization) = &self.authorization {
            request.extend_from_slice(b"Proxy-Authorization: ");
            request.extend_from_slice(authorization.as_bytes());
            request.extend_from_slice(b"\r\n");
        }
        request.extend_from_slice(b"\r\n");
        request
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy")
            .field("address", &self.address)
            .field("authorization", &self.authorization.is_some())
            .field("except", &self.except)
            .finish()
    }
}

/// What a proxy has said so far.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Said {
    Part,
    /// It is through, and its answer so long.
    Open(usize),
    /// It will answer yet; what it has said is so long.
    Wait(usize),
    /// With its status.
    Refused(String),
    Nonsense,
}

// === impl Said ===

impl Said {
    pub(crate) fn read(bytes: &[u8]) -> Self {
        const VERSION: &[u8] = b"HTTP/1.";
        let n = bytes.len().min(VERSION.len());
        if bytes[..n] != VERSION[..n] {
            return Self::Nonsense;
        }
        let mut lines = bytes.split_inclusive(|&b| b == b'\n');
        let Some(first) = lines.next().filter(|line| line.ends_with(b"\n")) else {
            return Self::Part;
        };
        // HTTP/1.1 200 Connection established
        let line = first.trim_ascii_end();
        let status = line.get(VERSION.len() + 1..).unwrap_or_default();
        let code = match status.strip_prefix(b" ") {
            Some([a, b, c, rest @ ..])
                if [a, b, c].iter().all(|digit| digit.is_ascii_digit())
                    && (rest.is_empty() || rest[0] == b' ') =>
            {
                (*a, status)
            }
            _ => return Self::Nonsense,
        };
        let waits = match code {
            (b'1', _) => true,
            (b'2', _) => false,
            // The rest of it says nothing that would help.
            (_, status) => return Self::Refused(readable(status)),
        };
        let mut length = first.len();
        for line in lines {
            length += line.len();
            if matches!(line, b"\r\n" | b"\n") {
                return match waits {
                    true => Self::Wait(length),
                    false => Self::Open(length),
                };
            }
        }
        Self::Part
    }
}

/// What a proxy says, for an error: one short line.
fn readable(status: &[u8]) -> String {
    let text = String::from_utf8_lossy(status);
    let shown = text.trim().chars().filter(|c| !c.is_control());
    shown.take(80).collect()
}

// === impl Except ===

impl Except {
    fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let of = |who, port| Some(Self { who, port });
        if text == "*" {
            return of(Who::All, None);
        }
        if let Some((net, bits)) = text.split_once('/') {
            let net: IpAddr = net.parse().ok()?;
            let bits = bits.parse().ok().filter(|bits| *bits <= width(net))?;
            return of(Who::Net(net, bits), None);
        }
        let bare = |text: &str| {
            let inner = text.strip_prefix('[').and_then(|t| t.strip_suffix(']'));
            inner.unwrap_or(text).parse::<IpAddr>().ok()
        };
        if let Some(ip) = bare(text) {
            return of(Who::Net(ip, width(ip)), None);
        }
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) => (host, Some(port.parse().ok()?)),
            None => (text, None),
        };
        if let Some(ip) = bare(host) {
            return of(Who::Net(ip, width(ip)), port);
        }
        let name = host.strip_prefix('*').unwrap_or(host);
        let name = name.trim_matches('.').to_ascii_lowercase();
        match name.is_empty() {
            true => None,
            false => of(Who::Names(name), port),
        }
    }

    fn is(&self, target: &HostPort<'_>) -> bool {
        if self.port.is_some_and(|port| port != target.port) {
            return false;
        }
        match &self.who {
            Who::All => true,
            Who::Names(name) => {
                let host = target.host.trim_end_matches('.').to_ascii_lowercase();
                let below = host.strip_suffix(name.as_str());
                below.is_some_and(|below| below.is_empty() || below.ends_with('.'))
            }
            Who::Net(net, bits) => target
                .literal()
                .is_some_and(|address| begins_like(address.ip(), *net, *bits)),
        }
    }
}

fn width(ip: IpAddr) -> u32 {
    match ip {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

fn begins_like(ip: IpAddr, net: IpAddr, bits: u32) -> bool {
    let differ = match (ip.to_canonical(), net.to_canonical()) {
        (IpAddr::V4(ip), IpAddr::V4(net)) => u128::from(ip.to_bits() ^ net.to_bits()) << 96,
        (IpAddr::V6(ip), IpAddr::V6(net)) => ip.to_bits() ^ net.to_bits(),
        _ => return false,
    };
    differ.leading_zeros() >= bits
}

/// The `Proxy-Authorization` of `user:password`, as it stands in a URI.
fn basic(user: &str) -> Result<HeaderValue, Error> {
    let invalid = |why| Error::invalid("proxy", format!("the user's name or password {why}"));
    let mut plain = Vec::with_capacity(user.len() + 1);
    let mut bytes = user.bytes();
    while let Some(byte) = bytes.next() {
        plain.push(match byte {
            b'%' => {
                let digit = |byte: Option<u8>| char::from(byte.unwrap_or_default()).to_digit(16);
                match (digit(bytes.next()), digit(bytes.next())) {
                    (Some(high), Some(low)) => (high * 16 + low) as u8,
                    _ => return Err(invalid("has a % without two hexadecimal digits after it")),
                }
            }
            byte => byte,
        });
    }
    if plain.iter().any(u8::is_ascii_control) {
        return Err(invalid("has control characters"));
    }
    if !user.contains(':') {
        plain.push(b':');
    }
    let mut value = HeaderValue::try_from(format!("Basic {}", STANDARD.encode(&plain)))
        .map_err(|_| invalid("cannot stand in a header"))?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn a_proxy_is_what_its_uri_says() {
        for (uri, address, authorization) in [
            ("http://proxy:3128", "proxy:3128", None),
            ("HTTP://proxy/", "proxy:80", None),
            ("proxy:3128", "proxy:3128", None),
            ("http://[::1]", "[::1]:80", None),
            ("http://[::1]:3128", "[::1]:3128", None),
            // "Aladdin:open sesame" is RFC 7617's own.
            (
                "http://Aladdin:open%20sesame@p:1",
                "p:1",
                Some("Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="),
            ),
            ("http://a@b:%40@p:1", "p:1", Some("Basic YUBiOkA=")),
            ("http://a@p:1", "p:1", Some("Basic YTo=")),
        ] {
            let proxy = Proxy::http(uri).expect(uri);
            assert_eq!(proxy.address, address);
            let found = proxy.authorization.as_ref().map(|v| v.to_str().expect(uri));
            assert_eq!(found, authorization, "{uri}");
            assert!(!format!("{proxy:?}").contains("sesame"));
        }
        for (uri, says) in [
            ("https://proxy:3128", "http://host:port"),
            ("socks5://secret:secret@proxy", "http://host:port"),
            ("http://", "host:port"),
            ("http://a:secret@proxy:x", "a port of 1 to 65535"),
            ("http://a:secret%4@proxy", "two hexadecimal digits"),
            ("http://a:secret%0a@proxy", "control characters"),
            ("http://proxy:3128/path", "a port of 1 to 65535"),
            ("a:secret://@proxy:x", "a port of 1 to 65535"),
        ] {
            let error = Proxy::http(uri).expect_err(uri);
            assert_eq!(error.kind(), Kind::Invalid);
            assert!(error.to_string().contains(says), "{error}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }

    #[test]
    fn the_environment_is_read_in_grpcs_order() {
        let of = |vars: &[(&str, &str)]| {
            let vars: HashMap<_, _> = vars.iter().copied().collect();
            Proxy::from_vars(|name| vars.get(name).map(|&value| value.to_owned()))
        };
        let address = |vars: &[(&str, &str)]| {
            let proxy = of(vars).expect("it is one");
            proxy.map(|proxy| proxy.address)
        };
        assert_eq!(address(&[]), None);
        assert_eq!(address(&[("no_proxy", "*"), ("https_proxy", " ")]), None);
        let mut vars = Vec::new();
        for name in [
            "HTTP_PROXY",
            "http_proxy",
            "HTTPS_PROXY",
            "https_proxy",
            "GRPC_PROXY",
            "grpc_proxy",
        ] {
            vars.push((name, name));
            assert_eq!(address(&vars), Some(format!("{name}:80")));
        }
        assert_eq!(
            address(&[("HTTP_PROXY", "p"), ("REQUEST_METHOD", "GET")]),
            None
        );
        let error = of(&[("HTTPS_PROXY", "ftp://x")])
            .expect_err("it is none")
            .to_string();
        assert!(error.contains("HTTPS_PROXY: proxy: \"ftp\""), "{error}");

        let proxy = of(&[
            ("http_proxy", "p"),
            ("NO_PROXY", "a"),
            ("no_grpc_proxy", "b, c"),
        ]);
        let proxy = proxy.expect("it is one").expect("it is there");
        let is_for = |address| proxy.is_for(&HostPort::parse(address).expect(address));
        assert!(is_for("a:1") && !is_for("b:1") && !is_for("c:1"));
    }

    #[test]
    fn who_is_excepted_is_reached_straight() {
        for (list, straight, proxied) in [
            ("", &[][..], &["a:1", "10.0.0.1:1"][..]),
            ("*", &["a:1", "10.0.0.1:1", "[::1]:1"], &[]),
            (
                "example.com",
                &["example.com:1", "A.Example.COM.:1"],
                &["badexample.com:1", "com:1"],
            ),
            (
                " , .example.com",
                &["a.example.com:1", "example.com:1"],
                &["example.org:1"],
            ),
            ("*.svc", &["a.b.svc:1"], &["svc.a:1"]),
            ("a:80", &["a:80", "b.a:80"], &["a:81"]),
            ("10.0.0.5", &["10.0.0.5:1"], &["10.0.0.51:1", "name:1"]),
            (
                "10.1.0.0/15",
                &["10.0.0.5:1", "10.1.255.255:1"],
                &["10.2.0.0:1", "[::1]:1"],
            ),
            ("0.0.0.0/0", &["10.2.0.0:1"], &["[2001:db8::1]:1"]),
            (
                "2001:db8::/32,[::1]:80",
                &["[2001:db8::7]:1", "[::1]:80"],
                &["[::1]:81", "[2001:db9::]:1"],
            ),
            ("10.0.0.0/33,/,:,x:y,[,.", &[], &["10.0.0.1:1", "x:1"]),
        ] {
            let proxy = Proxy::http("p").expect("it is one").except(list);
            let is_for = |address: &&str| proxy.is_for(&HostPort::parse(address).expect(address));
            let wrong: Vec<_> = straight.iter().filter(|a| is_for(a)).collect();
            assert!(wrong.is_empty(), "{list}: {wrong:?} is proxied");
            let wrong: Vec<_> = proxied.iter().filter(|a| !is_for(a)).collect();
            assert!(wrong.is_empty(), "{list}: {wrong:?} is not proxied");
        }
    }

    #[test]
    fn an_answer_is_read_to_its_end_and_no_further() {
        let open = b"HTTP/1.1 200 OK\r\nVia: x\r\n\r\n".len();
        let refused = |text: &str| Said::Refused(text.to_owned());
        for (said, expected) in [
            ("", Said::Part),
            ("HTT", Said::Part),
            ("HTTP/1.1 200 OK", Said::Part),
            ("HTTP/1.1 200 OK\r\n", Said::Part),
            ("HTTP/1.1 200 OK\r\nVia: x\r\n\r", Said::Part),
            ("HTTP/1.1 200 OK\r\nVia: x\r\n\r\n", Said::Open(open)),
            (
                "HTTP/1.1 200 OK\r\nVia: x\r\n\r\nPRI\r\n\r\n",
                Said::Open(open),
            ),
            ("HTTP/1.0 204\n\nx", Said::Open(14)),
            ("HTTP/1.1 100 Wait\r\n\r\nHTTP/1.1 2", Said::Wait(21)),
            (
                "HTTP/1.1 407 Proxy Authentication Required\r\nX",
                refused("407 Proxy Authentication Required"),
            ),
            ("HTTP/1.1 502\r\n", refused("502")),
            ("HTTP/1.1 200OK\r\n", Said::Nonsense),
            ("HTTP/1.1\r\n", Said::Nonsense),
            ("HTTP/1.1 20\r\n", Said::Nonsense),
            ("HTTP/2 200 OK", Said::Nonsense),
            ("\0\0\0\x04\0\0", Said::Nonsense),
        ] {
            assert_eq!(Said::read(said.as_bytes()), expected, "{said:?}");
        }
        let long = format!("HTTP/1.1 503 {}\u{7}\r\n", "x".repeat(200));
        assert_eq!(
            Said::read(long.as_bytes()),
            refused(&format!("503 {}", "x".repeat(76)))
        );
    }
}
