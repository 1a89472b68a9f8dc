//! What an address says, parsed once: a port of a host, or a Unix domain socket. Pure; nothing is looked up here.
//!
//! Apart from the transport, which dials them, because a session is checked where there is no transport.

use std::{
    fmt,
    net::{Ipv4Addr, SocketAddr, SocketAddrV6},
};

use crate::error::{Error, Kind, shown};

/// What an address says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Address<'a> {
    /// `host:port`.
    HostPort(HostPort<'a>),
    /// The path of a Unix domain socket: of `unix:path` and `unix:///absolute/path`.
    Unix(&'a str),
    /// The name of a Unix domain socket that is in no file system: of `unix-abstract:name`.
    Abstract(&'a str),
}

/// The two parts of `host:port`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HostPort<'a> {
    /// A name or an IP address; that of IPv6 without its brackets.
    pub(crate) host: &'a str,
    pub(crate) port: u16,
}

/// How long a path or an abstract name may be, in bytes: what the kernel has is 108, with the zero byte after the one
/// and before the other. Some systems have less, and say so when it is dialled.
const LONGEST_PATH: usize = 107;

const ALLOWED_HOST: &str =
    "write a DNS name, an IPv4 address or an [IPv6] address, and a port of 1 to 65535";

const ALLOWED_UNIX: &str = "write unix:path, unix:///absolute/path or, on Linux, unix-abstract:name, of 1 to 107 bytes without control characters";

// === impl Address ===

impl<'a> Address<'a> {
    /// Of `host:port`, `unix:path`, `unix:///absolute/path` or `unix-abstract:name`, as gRPC writes them.
    ///
    /// A host of the name `unix` is none here: what begins with `unix:` is a path.
    pub(crate) fn parse(text: &'a str) -> Result<Self, Error> {
        if let Some(name) = text.strip_prefix("unix-abstract:") {
            check_path(text, name)?;
            return Ok(Self::Abstract(name));
        }
        let Some(path) = text.strip_prefix("unix:") else {
            return HostPort::parse(text).map(Self::HostPort);
        };
        let path = match path.strip_prefix("//") {
            Some(absolute) if absolute.starts_with('/') => absolute,
            Some(_) => {
                return Err(invalid_unix(
                    text,
                    "after unix:// there is no absolute path",
                ));
            }
            None => path,
        };
        check_path(text, path)?;
        Ok(Self::Unix(path))
    }

    /// Refuses what this platform has not, by what it says of itself.
    #[cfg_attr(not(feature = "transport"), allow(dead_code, reason = "who dials"))]
    pub(crate) fn check_platform(&self, text: &str, unix: bool, linux: bool) -> Result<(), Error> {
        let why = match self {
            Self::Unix(_) | Self::Abstract(_) if !unix => {
                "this platform has no Unix domain sockets; only host:port is allowed"
            }
            Self::Abstract(_) if !linux => {
                "abstract sockets are Linux's; host:port, unix:path and unix:///absolute/path are allowed"
            }
            _ => return Ok(()),
        };
        Err(invalid(text, "to be dialled here", why))
    }
}

// === impl HostPort ===

impl fmt::Display for HostPort<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (host, port) = (self.host, self.port);
        match host.contains(':') {
            true => write!(f, "[{host}]:{port}"),
            false => write!(f, "{host}:{port}"),
        }
    }
}

impl<'a> HostPort<'a> {
    pub(crate) fn parse(text: &'a str) -> Result<Self, Error> {
        let invalid = |why: &str| {
            let why = format!("{why}; {ALLOWED_HOST}");
            Err(invalid(text, "host:port", &why))
        };
        let Some((host, port)) = text.rsplit_once(':') else {
            return invalid("there is no port");
        };
        // `u16::from_str` would take "+80".
        let port = match port.parse::<u16>() {
            Ok(number @ 1..) if port.bytes().all(|b| b.is_ascii_digit()) => number,
            _ => return invalid("the port is not a number of 1 to 65535"),
        };
        if let Some(inner) = host.strip_prefix('[') {
            // With its scope, if it has one.
            return match (inner.strip_suffix(']'), text.parse::<SocketAddrV6>()) {
                (Some(host), Ok(_)) => Ok(Self { host, port }),
                _ => invalid("what is in brackets is not an IPv6 address"),
            };
        }
        if host.contains(':') {
            return invalid("an IPv6 address needs brackets");
        }
        // Underscores are no part of host names, but container platforms make such.
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        let name = host.strip_suffix('.').unwrap_or(host);
        if name.len() > 253 || !name.split('.').all(label) {
            return invalid("the host is not a name or an address");
        }
        // What looks like an IPv4 address has to be one: 10.0.0.256 resolves nowhere.
        let numeric = name
            .split('.')
            .all(|l| l.bytes().all(|b| b.is_ascii_digit()));
        if numeric && name.parse::<Ipv4Addr>().is_err() {
            return invalid("the host is not an IPv4 address");
        }
        Ok(Self { host, port })
    }

    /// The one address that it is, unless it is a name.
    #[cfg_attr(not(feature = "transport"), allow(dead_code, reason = "who dials"))]
    pub(crate) fn literal(&self) -> Option<SocketAddr> {
        let Self { host, port } = *self;
        if host.contains(':') {
            return format!("[{host}]:{port}").parse().ok();
        }
        let ip: Ipv4Addr = host.strip_suffix('.').unwrap_or(host).parse().ok()?;
        Some((ip, port).into())
    }
}

fn check_path(text: &str, path: &str) -> Result<(), Error> {
    match path.len() {
        0 => return Err(invalid_unix(text, "there is nothing after the colon")),
        1..=LONGEST_PATH => {}
        bytes => return Err(invalid_unix(text, &format!("it has {bytes} bytes"))),
    }
    match path.contains(char::is_control) {
        true => Err(invalid_unix(text, "it has control characters")),
        false => Ok(()),
    }
}

fn invalid_unix(text: &str, why: &str) -> Error {
    let why = format!("{why}; {ALLOWED_UNIX}");
    invalid(text, "a Unix domain socket", &why)
}

fn invalid(text: &str, what: &str, why: &str) -> Error {
    let why = format!("address: {} is not {what}: {why}", shown(text));
    Error::new(Kind::Invalid).with_reason(why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_can_be_dialled_are_taken_apart() {
        for (text, host, port) in [
            ("10.0.0.5:21123", "10.0.0.5", 21123),
            ("localhost:1", "localhost", 1),
            ("a-b.example.com:65535", "a-b.example.com", 65535),
            ("my_service.ns.svc:80", "my_service.ns.svc", 80),
            ("example.com.:80", "example.com.", 80),
            ("[::1]:80", "::1", 80),
            ("[2001:db8::7]:443", "2001:db8::7", 443),
            ("[fe80::1%3]:80", "fe80::1%3", 80),
            ("1a:80", "1a", 80),
            ("unix-abstract.example:80", "unix-abstract.example", 80),
        ] {
            let expected = Address::HostPort(HostPort { host, port });
            assert_eq!(Address::parse(text).expect(text), expected);
        }
        let longest = format!("unix:{}", "x".repeat(107));
        for (text, expected) in [
            ("unix:a.sock", Address::Unix("a.sock")),
            ("unix:/run/a.sock", Address::Unix("/run/a.sock")),
            ("unix:///run/a b.sock", Address::Unix("/run/a b.sock")),
            (&longest, Address::Unix(&longest[5..])),
            ("unix-abstract:a/b:1", Address::Abstract("a/b:1")),
        ] {
            assert_eq!(Address::parse(text).expect(text), expected);
        }
    }

    #[test]
    fn addresses_that_cannot_are_refused_with_what_is_allowed() {
        for text in [
            "",
            ":80",
            "host",
            "host:",
            "host:0",
            "host:65536",
            "host:+80",
            "host:http",
            "::1:80",
            "[::1]",
            "[nope]:80",
            "[::1:80",
            "10.0.0.256:80",
            "10.0.0:80",
            "a b:80",
            "http://host:80",
            "user@host:80",
            "-a:80",
            "a..b:80",
            "host:80/path",
        ] {
            let error = Address::parse(text).expect_err(text);
            assert_eq!(error.kind(), Kind::Invalid, "{text}");
            let error = error.to_string();
            assert!(error.contains("is not host:port"), "{error}");
            assert!(error.ends_with("a port of 1 to 65535"), "{error}");
        }
        let long = format!("unix-abstract:{}", "x".repeat(108));
        for (text, says) in [
            ("unix:", "nothing after the colon"),
            ("unix://", "no absolute path"),
            ("unix://host/run/a.sock", "no absolute path"),
            ("unix:a\0b", "control characters"),
            ("unix-abstract:", "nothing after the colon"),
            (&long, "108 bytes"),
        ] {
            let error = Address::parse(text).expect_err(text);
            assert_eq!(error.kind(), Kind::Invalid, "{text}");
            let error = error.to_string();
            assert!(error.contains(says), "{error}");
            assert!(error.contains("unix:///absolute/path"), "{error}");
            assert!(error.len() < 400, "{error}");
        }
    }

    #[test]
    fn a_platform_refuses_what_it_has_not_and_says_what_it_has() {
        let check = |text, unix, linux| {
            let address = Address::parse(text).expect(text);
            let error = address.check_platform(text, unix, linux).err();
            error.map(|error| {
                assert_eq!(error.kind(), Kind::Invalid);
                error.to_string()
            })
        };
        for text in ["h:1", "unix:a", "unix-abstract:a"] {
            assert_eq!(check(text, true, true), None);
        }
        assert_eq!(check("unix:a", true, false), None);
        assert_eq!(check("h:1", false, false), None);
        let error = check("unix-abstract:a", true, false).expect("it is not Linux");
        assert!(error.contains("unix:path and unix:///absolute/path are allowed"));
        for text in ["unix:a", "unix-abstract:a"] {
            let error = check(text, false, false).expect("it has no such sockets");
            assert!(error.ends_with("only host:port is allowed"), "{error}");
        }
    }

    #[test]
    fn an_ip_address_is_itself_and_a_name_is_to_be_resolved() {
        for (text, expected) in [
            ("10.0.0.5:1", Some("10.0.0.5:1")),
            ("10.0.0.5.:1", Some("10.0.0.5:1")),
            ("[::1]:1", Some("[::1]:1")),
            ("[fe80::1%3]:1", Some("[fe80::1%3]:1")),
            ("localhost:1", None),
            ("1a:1", None),
        ] {
            let literal = HostPort::parse(text).expect(text).literal();
            assert_eq!(literal, expected.map(|e| e.parse().expect(e)), "{text}");
        }
    }
}
