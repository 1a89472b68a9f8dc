//! HTTP/2 connections, spoken with `h2` directly from the caller's task.
//!
//! A call through tonic's channel crosses a queue to a worker task, boxes its future and its body, and
//! crosses hyper's dispatch queue. Here it is three steps in the caller's own task: take a stream of the
//! connection, hand its headers and its one message to `h2`, await the response. One task per connection
//! moves frames to and from the socket, and a second watches that the peer still answers.
//!
//! A peer has one connection at first, and more where that pays: [`Connections`] is the service over all of them.
//! [`Connector`] makes both; a [`Pool`](crate::Pool) does so by itself. Where each option of tonic's `Endpoint` is, says
//! [`from_tonic`].

mod body;
mod common;
mod connection;
mod connector;
mod core;
mod dial;
mod frames;
pub mod from_tonic;
mod gather;
#[cfg(feature = "health")]
mod health;
mod identity;
mod paced;
mod pings;
mod polite;
mod pump;
mod request;
mod resets;
mod several;
mod slots;
mod socket;
#[cfg(feature = "tls")]
mod tls;
mod window;

#[cfg(feature = "health")]
pub use self::health::HealthCheck;
#[cfg(feature = "tls")]
pub use self::tls::{TlsConfig, TlsReloader};
pub use self::{
    body::Body, connection::Connection, connector::Connector, dial::Proxy, request::ResponseFuture,
    several::Connections,
};

/// What `crate::fuzzing` looks at.
#[cfg(any(fuzzing, test))]
pub(crate) mod inside {
    #[cfg(feature = "tls")]
    pub(crate) use super::tls::{certificates, parse_name, roots};
    pub(crate) use super::{
        dial::{Dialer, Said},
        frames::{Frames, GoAway},
        identity::Identity,
    };
}
