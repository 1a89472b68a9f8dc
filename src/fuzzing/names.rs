//! Names and addresses, of whoever writes them.

use super::{Input, is_readable};
#[cfg(any(feature = "registry", feature = "transport"))]
use crate::address::{Address, HostPort};
use crate::config::{MethodConfig, MethodName, ServiceConfig};

/// An address that is taken is what it reads as, to std as well, and can be dialled; a session can be there, and nowhere
/// else.
#[cfg(any(feature = "registry", feature = "transport"))]
pub fn address(data: &[u8]) {
    let text = &*String::from_utf8_lossy(data);
    let parsed = Address::parse(text);
    match &parsed {
        Ok(Address::HostPort(at)) => host_port(text, *at),
        Ok(Address::Unix(path)) => {
            assert!((1..=107).contains(&path.len()) && !path.contains(char::is_control));
            let again = match path.starts_with('/') {
                true => format!("unix://{path}"),
                false => format!("unix:{path}"),
            };
            assert_eq!(Address::parse(&again).ok(), Some(Address::Unix(path)));
            assert!(text.starts_with("unix:") && text.ends_with(path));
        }
        Ok(Address::Abstract(name)) => {
            assert!((1..=107).contains(&name.len()) && !name.contains(char::is_control));
            assert_eq!(*text, format!("unix-abstract:{name}"));
        }
        Err(error) => is_readable(error),
    }
    if let Ok(socket) = text.parse::<std::net::SocketAddr>()
        && socket.port() != 0
    {
        let Ok(Address::HostPort(at)) = &parsed else {
            panic!("std reads {text:?} as {socket}");
        };
        assert_eq!(at.literal(), Some(socket));
    }
    assert!(crate::error::shown(text).len() <= 80 * 10 + 40);
    #[cfg(feature = "transport")]
    dialled(text, parsed.as_ref().ok());
    #[cfg(feature = "registry")]
    registered(text, parsed.is_ok());
    #[cfg(feature = "etcd")]
    for (endpoint, scheme) in [
        (text, "http://"),
        (&format!("http://{text}"), "http://"),
        (&format!("https://{text}/"), "https://"),
    ] {
        match crate::registry::inside::address_of(endpoint, scheme) {
            Ok(address) => {
                HostPort::parse(address).expect("it is valid");
                let rest = endpoint.strip_prefix(scheme).expect("it begins so");
                assert_eq!(rest.strip_suffix('/').unwrap_or(rest), address);
            }
            Err(error) => {
                is_readable(&error);
                let user = endpoint
                    .rsplit_once('@')
                    .filter(|(_, host)| !host.contains("SECRET"));
                assert!(
                    user.is_none() || !error.to_string().contains("SECRET"),
                    "{error}"
                );
                let rest = endpoint.strip_prefix(scheme);
                let rest = rest.map(|rest| rest.strip_suffix('/').unwrap_or(rest));
                assert!(rest.is_none_or(|rest| HostPort::parse(rest).is_err()));
            }
        }
    }
    #[cfg(feature = "tls")]
    if let Ok(name) = crate::transport::inside::parse_name(text) {
        let again = crate::transport::inside::parse_name(&name.to_str());
        assert_eq!(again.ok(), Some(name));
    }
}

#[cfg(any(feature = "registry", feature = "transport"))]
fn host_port(text: &str, at: HostPort<'_>) {
    let shown = at.to_string();
    assert_eq!(HostPort::parse(&shown).ok(), Some(at));
    assert!(at.port != 0 && !at.host.is_empty());
    assert!(text.contains(at.host) && !text.contains(char::is_whitespace));
    let bare = at.host.strip_suffix('.').unwrap_or(at.host);
    match at.literal() {
        Some(address) => assert_eq!(address.port(), at.port),
        None => {
            assert!(bare.parse::<std::net::IpAddr>().is_err() && bare.len() <= 253);
            assert!(bare.split('.').all(|label| (1..=63).contains(&label.len())));
        }
    }
}

/// What can be dialled has a name for HTTP/2, which is its host and port; so has what was given as one.
#[cfg(feature = "transport")]
fn dialled(text: &str, parsed: Option<&Address<'_>>) {
    let mut dialer = crate::transport::inside::Dialer::default();
    match (dialer.destination(text), parsed) {
        (Ok(to), Some(Address::HostPort(at))) => {
            let host = at.host.split_once('%').map_or(at.host, |(ip, _)| ip);
            let bare = to.authority.host().trim_matches(['[', ']']);
            assert_eq!(bare, host);
            assert_eq!(to.authority.port_u16(), Some(at.port));
        }
        (Ok(to), Some(_)) => assert_eq!(to.authority, "localhost"),
        // Other platforms have none of these.
        (Err(_), Some(Address::Unix(_) | Address::Abstract(_))) if !cfg!(target_os = "linux") => {}
        (Err(_), None) => {}
        (to, parsed) => panic!("{text:?} is {parsed:?}, and dialled at {to:?}"),
    }
    match dialer.set_authority(text) {
        Ok(()) => {
            let known_as = dialer.destination("h:1").expect("it is valid").authority;
            assert_eq!(known_as, text);
            assert!(!known_as.host().is_empty() && !text.contains(['@', '/']));
        }
        Err(error) => assert_eq!(error.kind(), crate::Kind::Invalid),
    }
}

#[cfg(feature = "registry")]
fn registered(text: &str, is_address: bool) {
    use crate::{Session, registry::session::check_role};

    let session = Session::new("echo", text);
    match session.validate() {
        Ok(()) => assert!(is_address),
        Err(error) => {
            is_readable(&error);
            // A name of the longest with its port is too long for an id.
            assert!(!is_address || text.len() > 256, "{error}");
        }
    }
    assert!(!session.id().contains('/'));
    let of_role = Session::new(text, "h:1").validate();
    assert_eq!(of_role.is_ok(), check_role(text).is_ok());
    if of_role.is_ok() {
        assert!(!text.is_empty() && text.len() <= 128 && text.is_ascii());
        assert!(!text.contains(|c: char| c == '/' || c.is_whitespace() || c.is_control()));
    }
}

/// A method finds what is configured for it, else for its service, else for all.
///
/// A service, a method, and the path of a call.
pub fn method(data: &[u8]) {
    let mut input = Input(data);
    let (service, method, path) = (input.line(), input.line(), input.line());
    let is_name = |name: &str| !name.is_empty() && !name.contains('/');
    let one = MethodName::method(&service, &method);
    let all = MethodName::service(&service);
    assert_eq!(one.is_ok(), is_name(&service) && is_name(&method));
    assert_eq!(all.is_ok(), is_name(&service));
    for error in [one.as_ref().err(), all.as_ref().err()]
        .into_iter()
        .flatten()
    {
        is_readable(error);
    }
    let after = |ms| MethodConfig::new().timeout(std::time::Duration::from_millis(ms));
    let mut config = ServiceConfig::new();
    for (name, ms) in [(Some(MethodName::all()), 1), (all.ok(), 2), (one.ok(), 3)] {
        if let Some(name) = name {
            let once = config.method(name.clone(), after(ms).expect("it is short"));
            config = once.expect("it is the first");
            let twice = config.clone().method(name, MethodConfig::new());
            assert!(twice.is_err());
        }
    }
    let found = |path: &str| {
        config
            .for_path(path)
            .timeout
            .map(|timeout| timeout.as_millis())
    };
    let own = format!("/{service}/{method}");
    for path in [
        &*path,
        &own,
        &format!("/{service}/"),
        &format!("/{service}/other"),
        "",
    ] {
        let of_service = path
            .strip_prefix('/')
            .and_then(|path| path.strip_prefix(&*service));
        let rest = of_service.and_then(|rest| rest.strip_prefix('/'));
        let expected = match rest {
            Some(rest) if is_name(&service) && is_name(&method) && rest == method => 3,
            Some(rest) if is_name(&service) && !rest.contains('/') => 2,
            _ => 1,
        };
        assert_eq!(found(path), Some(expected), "{path:?}");
    }
}
