//! A gRPC connection manager: it finds the instances of a service, keeps connections to them, spreads
//! calls over them, fails fast when one is gone, and picks up by itself what comes back.
//!
//! A tonic generated client takes a [`Channel`] where it would have taken `tonic::transport::Channel`:
//!
//! ```
//! use switchboard::{ConnectionManager, MemoryRegistry, Session};
//! # mod pb { #[derive(Clone)] pub struct EchoClient(switchboard::Channel); impl EchoClient { pub fn new(c: switchboard::Channel) -> Self { Self(c) } } }
//! # use pb::EchoClient;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), switchboard::Error> {
//! // In process here; `EtcdRegistry::connect([..], "prefix").await?` for etcd.
//! let registry = MemoryRegistry::new();
//! let session = Session::new("echo", "127.0.0.1:21123").with_id(7);
//! let registration = registry.register(session).await?;
//!
//! let manager = ConnectionManager::builder(registry).build();
//! let channel = manager.channel("echo");            // returns at once; nothing has to be up
//! let any = EchoClient::new(channel.clone());       // the less loaded of two random instances
//! let seven = EchoClient::new(channel.to(7));       // this instance or none
//!
//! println!("{}", manager.status());
//! manager.stop().await;                             // ends calls, tasks and sockets
//! # drop(registration);
//! # Ok(())
//! # }
//! ```
//!
//! # The two routes
//!
//! ```text
//!  a call                                      a change
//!
//!  generated client                            etcd, memory, a list, any tower Discover
//!    ▼                                           ▼  list, watch, reconcile      (discover)
//!  Channel      deadline, retries              Update
//!    ▼                                           ▼
//!  Pool         load, pick, guard  ◀─ Snapshot ◀─ driver: one writer            (pool)
//!    ▼                                           ▼
//!  Connection   h2, in the caller's task         endpoint tasks: dial, redial   (endpoint)
//!    ▼                                           │
//!  socket  ◀──────────────── makes ──────────────┘                             (transport)
//! ```
//!
//! They meet at the snapshot, which sits in an `ArcSwap`: a call loads it, picks the less loaded of two
//! random ready endpoints and goes straight to HTTP/2 in its own task. It takes no lock of this crate,
//! allocates nothing to pick, and waits for nobody, unless nobody is ready.
//!
//! # When things go wrong
//!
//! Every call ends: with the peer's own status, or with an [`Error`] that names the role, the instance and
//! the reason, as a `tonic::Status` with the right code. A call fails fast if nobody is registered, if
//! nobody is connected and a first attempt has failed, or if the registry has never answered. It waits,
//! within its deadline and [`PoolConfig::max_wait`](pool::PoolConfig::max_wait), while it cannot be known yet.
//! [`Error::sent`] says whether the peer may have executed it. Where records are [`Milvus`](registry::Milvus)'s, calls
//! also carry whom they are for, and a server that is another instance by now refuses them:
//! [`Kind::OtherInstance`].
//!
//! # Its connections
//!
//! A [`Connector`](transport::Connector) says how peers are reached: over TCP or Unix domain sockets, through a proxy or a dialer of one's
//! own, in plaintext or over TLS and mutual TLS, with certificates that are reloaded while it runs. A peer has one connection, and more
//! where it allows no more streams or where several threads make many calls. One that is too old, has other certificates or
//! leads to where its peer no longer is takes calls until another can. The page [`transport::from_tonic`] maps the options
//! of tonic's `Endpoint`.
//!
//! # What it tells
//!
//! [`watch`](ConnectionManager::watch) is a stream of a role's instances, [`channels`](ConnectionManager::channels)
//! lists them, [`ready`](ConnectionManager::ready) waits for enough of them or says what is missing,
//! [`events`](mod@events) are one stream for the process, in `tracing` too, and [`status`](ConnectionManager::status) is
//! a table or JSON. Whoever reads slowly holds up nobody.
//!
//! # How calls end
//!
//! A call that was certainly not processed is made again by itself, on another instance or connection; any other by a
//! [`RetryPolicy`] or [`HedgingPolicy`] only, which a role's [`ServiceConfig`] has for each method: gRPC's own JSON, replaced
//! while calls are made ([`ConnectionManager::configure`]). A deadline covers all attempts and the response's body. A
//! [`CancelToken`] ends one call or many, [`Channel::stop`] those of a channel. See [`retry`].
//!
//! # A whole server
//!
//! [`Component`] is the one way in which every server starts, says how it is, and stops: dependencies declared, its
//! session registered once it listens, its state watched and served as `grpc.health.v1`, calls in flight finished at
//! SIGTERM. See [`component`](mod@component).
//!
//! # Parts to take alone
//!
//! [`RetryLayer`], [`DeadlineLayer`] and [`CancelLayer`] wrap any service that speaks gRPC; [`Pool`] balances any tower `Service + Clone` from any tower `Discover`; [`GateLayer`] wraps any service at all, and its [`Gate`] is flipped from
//! outside, to fail calls at once while it is shut; a [`Connect`](endpoint::Connect) of one's own takes the place
//! of the [`transport`]. Without default features there is no HTTP/2 and no registry in the build.
//!
//! # What it is not
//!
//! Not a server framework, a mesh or a proxy: it lives in the client, and beside a server to register it. It does
//! not balance by weight. It needs tokio.

#![cfg_attr(
    not(test),
    warn(clippy::unwrap_used, clippy::expect_used, clippy::panic)
)]

#[cfg(any(feature = "registry", feature = "transport"))]
mod address;
pub mod backoff;
pub mod cancel;
#[cfg(feature = "component")]
pub mod component;
pub mod config;
pub mod deadline;
pub mod discover;
pub mod endpoint;
pub mod error;
pub mod events;
#[cfg(any(fuzzing, test))]
#[doc(hidden)]
pub mod fuzzing;
pub mod gate;
mod headers;
#[cfg(feature = "manager")]
pub mod manager;
pub mod pool;
#[cfg(feature = "registry")]
pub mod registry;
pub mod retry;
mod sync;
#[cfg(feature = "transport")]
pub mod transport;
mod waiters;

pub use backoff::Backoff;
pub use cancel::{CancelLayer, CancelToken};
#[cfg(feature = "component")]
pub use component::Component;
pub use config::ServiceConfig;
pub use deadline::DeadlineLayer;
pub use error::{Error, Kind, Sent};
pub use gate::{Gate, GateLayer};
#[cfg(feature = "manager")]
pub use manager::{Channel, ConnectionManager};
pub use pool::{Avoid, InstanceId, Pool, WaitForReady};
#[cfg(feature = "etcd")]
pub use registry::EtcdRegistry;
#[cfg(feature = "registry")]
pub use registry::{MemoryRegistry, Registration, Registry, Session};
pub use retry::{HedgingPolicy, RetryLayer, RetryPolicy};
