//! What the environment and files say.

use base64::{Engine as _, engine::general_purpose::STANDARD};

use super::{Input, is_readable};
use crate::{address::HostPort, transport::Proxy};

/// In the place of a password, to see that no error shows it.
const SECRET: &str = "SECRET";

/// The first variable that is set counts, nobody's password is shown, and who is excepted is reached straight.
///
/// An address, and lines of `NAME=value`.
pub fn proxy_settings(data: &[u8]) {
    let mut input = Input(data);
    let to = input.line();
    let mut vars = Vec::new();
    while !input.0.is_empty() {
        let line = input.line();
        if let Some((name, value)) = line.split_once('=') {
            vars.push((name.to_owned(), value.to_owned()));
        }
    }
    let var = |asked: &str| {
        let found = vars.iter().find(|(name, _)| name == asked);
        found.map(|(_, value)| value.clone())
    };
    let first = |names: &[&'static str]| {
        let is_cgi = var("REQUEST_METHOD").is_some();
        let read = names
            .iter()
            .filter(|name| !is_cgi || **name != "HTTP_PROXY");
        let mut set = read.filter_map(|name| Some((*name, var(name)?.trim().to_owned())));
        set.find(|(_, value)| !value.is_empty())
    };
    let uri = first(&[
        "grpc_proxy",
        "GRPC_PROXY",
        "https_proxy",
        "HTTPS_PROXY",
        "http_proxy",
        "HTTP_PROXY",
    ]);
    let list = first(&["no_grpc_proxy", "NO_GRPC_PROXY", "no_proxy", "NO_PROXY"]);
    let proxy = match (Proxy::from_vars(var), uri) {
        (Ok(None), None) => return,
        (Ok(Some(proxy)), Some((_, uri))) => {
            is_what_it_says(&proxy, &uri);
            proxy
        }
        (Err(error), Some((name, uri))) => {
            is_readable(&error);
            let reason = error.reason().expect("it has one");
            assert!(reason.starts_with(&format!("{name}: ")), "{reason}");
            let rest = after_scheme(&uri);
            let user = rest.rsplit_once('@').map_or("", |(user, _)| user);
            let outside = uri.replacen(user, "", 1).contains(SECRET);
            assert!(
                !user.contains(SECRET) || outside || !reason.contains(SECRET),
                "{reason}"
            );
            return;
        }
        (read, uri) => panic!("{uri:?} is read as {read:?}"),
    };
    if let Ok(to) = HostPort::parse(&to) {
        let list = list.map_or(String::new(), |(_, list)| list);
        excepts(&proxy, &list, to);
    }
}

fn after_scheme(uri: &str) -> &str {
    let is_scheme = |c: char| c.is_ascii_alphanumeric() || "+-.".contains(c);
    match uri.split_once("://") {
        Some((scheme, rest)) if scheme.chars().all(is_scheme) => rest,
        _ => uri,
    }
}

fn is_what_it_says(proxy: &Proxy, uri: &str) {
    HostPort::parse(&proxy.address).expect("it can be dialled");
    assert!(
        !format!("{proxy:?}").contains("SECRET")
            || proxy.address.contains("SECRET")
            || uri.matches("SECRET").count() > 1
    );
    let user = after_scheme(uri).rsplit_once('@').map(|(user, _)| user);
    assert_eq!(proxy.authorization.is_some(), user.is_some());
    let (Some(user), Some(value)) = (user, &proxy.authorization) else {
        return;
    };
    assert!(value.is_sensitive());
    let text = value.to_str().expect("it is ASCII");
    let plain = STANDARD.decode(text.strip_prefix("Basic ").expect("it is basic"));
    let mut plain = &*plain.expect("it is base64");
    // Each byte as it is, or by its two digits.
    let mut said = user.as_bytes();
    while let [byte, rest @ ..] = said {
        let (meant, rest) = match (byte, rest) {
            (b'%', [a, b, rest @ ..]) => {
                let digits = format!("{}{}", char::from(*a), char::from(*b));
                (u8::from_str_radix(&digits, 16).expect("two digits"), rest)
            }
            (byte, rest) => (*byte, rest),
        };
        assert_eq!(plain.first(), Some(&meant));
        (plain, said) = (&plain[1..], rest);
    }
    let rest: &[u8] = if user.contains(':') { b"" } else { b":" };
    assert_eq!(plain, rest);
}

fn excepts(proxy: &Proxy, list: &str, to: HostPort<'_>) {
    let bare = Proxy::http("p").expect("it is one");
    let is_for = |list: &str| bare.clone().except(list).is_for(&to);
    assert!(bare.is_for(&to));
    // A list is its items, in whatever order.
    let each = list.split(',').all(is_for);
    assert_eq!(proxy.is_for(&to), each);
    let backwards: Vec<_> = list.rsplit(',').collect();
    assert_eq!(is_for(&backwards.join(" , ")), each);
    assert!(!proxy.clone().except("*").is_for(&to));
    let HostPort { host, port } = to;
    let dotted = format!("{}.", host.trim_end_matches('.'));
    let upper = host.to_ascii_uppercase();
    for host in [&*upper, &dotted]
        .into_iter()
        .filter(|_| to.literal().is_none())
    {
        assert_eq!(proxy.is_for(&HostPort { host, port }), each);
    }
    // Scopes are this machine's, and no list's.
    if host.contains('%') {
        return;
    }
    assert!(!is_for(host));
    assert!(!is_for(&to.to_string()));
    let other = HostPort {
        host,
        port: port.wrapping_add(1).max(1),
    };
    assert!(is_for(&other.to_string()));
    match to.literal().map(|address| address.ip()) {
        Some(ip) => {
            let most = if ip.is_ipv4() { 32 } else { 128 };
            let mut is_in = true;
            for bits in 0..=most {
                let straight = !is_for(&format!("{ip}/{bits}"));
                assert!(straight && is_in);
                is_in = straight;
            }
            assert!(is_for(&format!("{ip}/{}", most + 1)));
        }
        None => {
            let name = host.trim_end_matches('.');
            assert!(!is_for(&format!("x,*.{name}")) && !is_for(&format!(".{name}")));
            assert!(is_for(&format!("x{name}")) && is_for(&format!("x.{name}")));
            let below = format!("x.{name}");
            let below = HostPort { host: &below, port };
            assert!(!bare.clone().except(name).is_for(&below));
            let longer = format!("x{name}");
            let longer = HostPort {
                host: &longer,
                port,
            };
            assert!(bare.clone().except(name).is_for(&longer));
        }
    }
}

/// Certificates are those that are there, also when they are written anew, and no error shows what is in a key.
///
/// A certificate, a line of `====`, and a key.
#[cfg(feature = "tls")]
pub fn pem(data: &[u8]) {
    use crate::transport::{
        TlsConfig,
        inside::{certificates, roots},
    };

    const BETWEEN: &[u8] = b"\n====\n";
    let cut = data.windows(BETWEEN.len()).position(|part| part == BETWEEN);
    let (certificate, key) = match cut {
        Some(cut) => (&data[..cut], &data[cut + BETWEEN.len()..]),
        None => (data, data),
    };
    let found = certificates("it", certificate);
    match &found {
        Ok(found) => {
            let text = String::from_utf8_lossy(certificate);
            assert!((1..=text.matches("-----BEGIN CERTIFICATE").count()).contains(&found.len()));
            let printed: String = found
                .iter()
                .map(|der| {
                    let body = STANDARD.encode(der);
                    format!(
                        "# one\n-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n"
                    )
                })
                .collect();
            let again = certificates("it", printed.as_bytes());
            assert_eq!(again.expect("it can be read"), *found);
        }
        Err(error) => is_readable(error),
    }
    let trusted = roots("it", certificate);
    let config = TlsConfig::new().ca_pem(certificate);
    assert_eq!(config.is_ok(), trusted.is_ok());
    match trusted {
        Ok(trusted) => assert_eq!(Some(&trusted), found.as_ref().ok()),
        Err(error) => is_readable(&error),
    }
    if let Err(error) = TlsConfig::new().identity_pem(certificate, key) {
        is_readable(&error);
        let text = error.to_string();
        let mut lines = String::from_utf8_lossy(key).into_owned();
        lines.retain(|c| c != '\r');
        let shown = lines
            .lines()
            .find(|line| line.len() >= 16 && !line.starts_with("-----") && text.contains(*line));
        assert_eq!(shown, None, "{text}");
        // Nor as the numbers of its bytes.
        assert!(!text.contains(", 45, 45"), "{text}");
    }
}
