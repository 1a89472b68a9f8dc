//! TCP: all the addresses of a name, one soon after the other.

use std::{
    collections::VecDeque,
    fmt::Write as _,
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    net::{TcpSocket, TcpStream},
    time,
};

use crate::{
    endpoint::step,
    error::{Error, Kind},
};

/// How long one address may be alone in being tried; gRFC A61 and RFC 8305 say 250 ms.
const STAGGER: Duration = Duration::from_millis(250);

/// How TCP connections are made. `TCP_NODELAY` is always set: calls are small, and each waits for its answer.
#[derive(Clone, Debug, Default)]
pub(in crate::transport) struct Tcp {
    pub(in crate::transport) keepalive: Option<Duration>,
    pub(in crate::transport) user_timeout: Option<Duration>,
    pub(in crate::transport) local: Option<IpAddr>,
}

// === impl Tcp ===

impl Tcp {
    /// Connects to the first of these that answers: each is tried once the one before it has failed, or has had
    /// its time.
    pub(super) async fn connect_to_any(
        &self,
        mut addresses: Vec<SocketAddr>,
    ) -> Result<TcpStream, Error> {
        let lost = |why: String| Err(Error::new(Kind::ConnectionLost).with_reason(why));
        if addresses.is_empty() {
            return lost("the name has no address".to_owned());
        }
        if let Some(local) = self.local {
            addresses.retain(|address| address.is_ipv4() == local.is_ipv4());
            if addresses.is_empty() {
                return lost(format!(
                    "no address of the peer can be reached from {local}: none is of its family"
                ));
            }
        }
        step::next(match &addresses[..] {
            [only] => format!("connecting to {only}"),
            several => format!("connecting to any of its {} addresses", several.len()),
        });
        let mut left = in_turn(addresses);
        let mut under_way = FuturesUnordered::new();
        let mut failed: Vec<(SocketAddr, io::Error)> = Vec::new();
        loop {
            if let Some(next) = left.pop_front() {
                under_way.push(async move { (next, self.connect_to(next).await) });
            }
            let result = tokio::select! {
                result = under_way.next() => result,
                () = time::sleep(STAGGER), if !left.is_empty() => continue,
            };
            match result {
                Some((_, Ok(stream))) => return Ok(stream),
                Some((address, Err(error))) => failed.push((address, error)),
                None => return Err(all_failed(&failed)),
            }
        }
    }

    async fn connect_to(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        }?;
        // What fails here would read as if the peer had done it.
        let said = |what: &str, result: io::Result<()>| {
            result.map_err(|error| io::Error::other(format!("{what}: {}", words(&error))))
        };
        if let Some(after) = self.keepalive {
            let keepalive = TcpKeepalive::new().with_time(after);
            let set = SockRef::from(&socket).set_tcp_keepalive(&keepalive);
            said("TCP keepalive was not set", set)?;
        }
        #[cfg(any(target_os = "linux", target_os = "android"))]
        if let Some(timeout) = self.user_timeout {
            let set = SockRef::from(&socket).set_tcp_user_timeout(Some(timeout));
            said("TCP_USER_TIMEOUT was not set", set)?;
        }
        if let Some(local) = self.local {
            let what = format!("not bound to the local address {local}");
            said(&what, socket.bind(SocketAddr::new(local, 0)))?;
        }
        let stream = socket.connect(address).await?;
        said("TCP_NODELAY was not set", stream.set_nodelay(true))?;
        Ok(stream)
    }
}

/// The families in turn, beginning with that of the first: a whole family may be unreachable.
fn in_turn(addresses: Vec<SocketAddr>) -> VecDeque<SocketAddr> {
    let first_is_v6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (mut one, mut other): (VecDeque<_>, VecDeque<_>) = addresses
        .into_iter()
        .partition(|address| address.is_ipv6() == first_is_v6);
    let mut mixed = VecDeque::with_capacity(one.len() + other.len());
    while !one.is_empty() || !other.is_empty() {
        mixed.extend(one.pop_front());
        mixed.extend(other.pop_front());
    }
    mixed
}

fn all_failed(failed: &[(SocketAddr, io::Error)]) -> Error {
    let mut text = String::new();
    match failed {
        [(_, only)] => text = words(only),
        several => {
            let _ = write!(text, "all {} addresses failed", several.len());
            for (i, (address, error)) in several.iter().enumerate() {
                let sign = if i == 0 { ": " } else { ", " };
                let _ = write!(text, "{sign}{address} {}", words(error));
            }
        }
    }
    Error::new(Kind::ConnectionLost).with_reason(text)
}

/// The kind reads "connection refused" where the error itself adds the number of the system call's.
pub(super) fn words(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::Other => error.to_string(),
        kind => kind.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Dialer, *};

    #[test]
    fn families_take_turns() {
        let parse = |s: &str| s.parse().unwrap();
        let mixed = in_turn(vec![
            parse("[::1]:1"),
            parse("[::1]:2"),
            parse("[::1]:3"),
            parse("127.0.0.1:1"),
        ]);
        let expected: Vec<SocketAddr> = ["[::1]:1", "127.0.0.1:1", "[::1]:2", "[::1]:3"]
            .map(parse)
            .to_vec();
        assert!(mixed.into_iter().eq(expected));
    }

    #[tokio::test]
    async fn a_refused_port_and_an_unknown_name_read_as_what_they_are() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let dialer = Dialer::default();
        let dial = async |address: &str| {
            let destination = dialer.destination(address).unwrap();
            dialer.dial(&destination).await.unwrap_err()
        };
        let error = dial(&address.to_string()).await;
        assert_eq!(error.reason().as_deref(), Some("connection refused"));
        let error = dial("no.such.name.invalid:1").await;
        assert!(error.to_string().contains("not resolved"), "{error}");
    }

    #[tokio::test]
    async fn an_address_that_refuses_costs_no_time_and_one_that_is_silent_its_head_start() {
        let live = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let live = live.local_addr().unwrap();
        let refusing = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let refuses = refusing.local_addr().unwrap();
        drop(refusing);
        let began = time::Instant::now();
        let stream = Tcp::default()
            .connect_to_any(vec![refuses, refuses, live])
            .await
            .unwrap();
        assert_eq!(stream.peer_addr().unwrap(), live);
        assert!(stream.nodelay().unwrap());
        assert!(began.elapsed() < STAGGER, "{:?}", began.elapsed());

        // Its accept queue is full: it answers not even SYN.
        let socket = || {
            let (domain, kind) = (socket2::Domain::IPV4, socket2::Type::STREAM);
            socket2::Socket::new(domain, kind, None).unwrap()
        };
        let listener = socket();
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        listener.bind(&any.into()).unwrap();
        listener.listen(0).unwrap();
        let silent = listener.local_addr().unwrap().as_socket().unwrap();
        let _queue: Vec<_> = (0..4)
            .map(|_| {
                let socket = socket();
                socket.set_nonblocking(true).unwrap();
                let _ = socket.connect(&silent.into());
                socket
            })
            .collect();
        let began = time::Instant::now();
        let stream = Tcp::default()
            .connect_to_any(vec![silent, live])
            .await
            .unwrap();
        assert_eq!(stream.peer_addr().unwrap(), live);
        let took = began.elapsed();
        assert!(took >= STAGGER && took < 4 * STAGGER, "{took:?}");
    }

    #[tokio::test]
    async fn when_all_fail_each_is_named() {
        let closed = || {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            listener.local_addr().unwrap()
        };
        let (one, two) = (closed(), closed());
        let error = Tcp::default()
            .connect_to_any(vec![one, two])
            .await
            .unwrap_err();
        let expected =
            format!("all 2 addresses failed: {one} connection refused, {two} connection refused");
        assert_eq!(error.reason(), Some(expected));
        let error = Tcp::default().connect_to_any(Vec::new()).await.unwrap_err();
        assert!(error.to_string().contains("no address"), "{error}");
    }
}
