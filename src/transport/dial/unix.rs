//! Unix domain sockets, where there are some.

#[cfg(unix)]
use std::io;

use super::Stream;
#[cfg(unix)]
use super::tcp::words;
use crate::error::{Error, Kind};

/// Whether a socket may have a name that is in no file system.
pub(super) const HAS_ABSTRACT: bool = cfg!(any(target_os = "linux", target_os = "android"));

/// Connects to the socket at this path; if that begins with a zero byte, to the abstract one of this name.
#[cfg(unix)]
pub(super) async fn connect(path: &str) -> Result<Stream, Error> {
    let connected = tokio::net::UnixStream::connect(path).await;
    connected.map(Stream::Unix).map_err(|error| {
        let why = match error.kind() {
            io::ErrorKind::NotFound => "there is no such socket".to_owned(),
            // TCP would wait; here the kernel leaves that to who dials, and so it is another attempt's.
            io::ErrorKind::WouldBlock => "its queue of connections is full".to_owned(),
            _ => words(&error),
        };
        Error::new(Kind::ConnectionLost).with_reason(why)
    })
}

/// An address says so already, and is refused.
#[cfg(not(unix))]
pub(super) async fn connect(_path: &str) -> Result<Stream, Error> {
    Err(Error::new(Kind::Invalid).with_reason("this platform has no Unix domain sockets"))
}
