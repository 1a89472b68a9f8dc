//! For those who come from `tonic::transport`: where each of its options is here, or why there is none, and how to get from
//! `Channel::balance_channel` to a [`Channel`](crate::Channel) step by step.
//!
//! This page has no code. It goes by tonic 0.14. A generated client stays as it is: it takes a [`Channel`](crate::Channel)
//! where it took tonic's, with its own options, `accept_compressed`, `max_decoding_message_size` and interceptors among
//! them.
//!
//! | tonic | is here |
//! | --- | --- |
//! | `Endpoint`, for one address | [`Connector`], for all of them: an address is the peer's, and comes from a [`Session`] |
//! | `Channel`, of one connection | [`Channel`](crate::Channel), of a role and all its instances; [`Channel::to`](crate::Channel::to) for one |
//!
//! ```
//! use std::time::Duration;
//! use switchboard::{
//!     ConnectionManager, Session, config::{MethodConfig, MethodName, ServiceConfig},
//!     pool::PoolConfig, registry::Fixed, transport::Connector,
//! };
//!
//! # fn tonic() -> Result<(), Box<dyn std::error::Error>> {
//! // With tonic:
//! use tonic::transport::Endpoint;
//! let _lazy = Endpoint::from_static("http://10.0.0.5:21123")
//!     .connect_timeout(Duration::from_secs(5))
//!     .timeout(Duration::from_secs(2))
//!     .http2_keep_alive_interval(Duration::from_secs(10))
//!     .user_agent("querycoord/2.6")?
//!     .connect_lazy();
//! # Ok(())
//! # }
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), switchboard::Error> {
//!
//! // With this crate:
//! let connector = Connector::new()
//!     .keepalive(Some(Duration::from_secs(10)), Duration::from_secs(20))?
//!     .user_agent("querycoord/2.6")?;
//! let timeout = MethodConfig::new().timeout(Duration::from_secs(2))?;
//! let manager = ConnectionManager::builder(Fixed::new([Session::new("echo", "10.0.0.5:21123")])?)
//!     .connector(connector)
//!     .pools(PoolConfig::default().attempt_timeout(Duration::from_secs(5))?)
//!     .service_configs(ServiceConfig::new().method(MethodName::all(), timeout)?)
//!     .build();
//! let _channel = manager.channel("echo");
//! # Ok(())
//! # }
//! ```
//!
//! # Making a channel
//!
//! | tonic | is here |
//! | --- | --- |
//! | `Endpoint::from_static`, `from_shared`, `From<Uri>`, `TryFrom`, `FromStr`; `Channel::builder`, `from_static`, `from_shared` | a [`Session`] with the address: `host:port` without a scheme, which is the connector's; `unix:path` is the same |
//! | `Endpoint::connect_lazy` | [`ConnectionManager::channel`](crate::ConnectionManager::channel); it begins to connect at once |
//! | `Endpoint::connect`, which fails if the server is not there | the same, and [`ConnectionManager::ready`](crate::ConnectionManager::ready), which waits; for one connection without a manager [`Connector::connect_to`] |
//! | `Endpoint::connect_with_connector`, `connect_with_connector_lazy`; `Channel::new`, `Channel::connect` | [`Connector::dial_with`], with a function that returns a stream of tokio's; TLS goes on over it, as in tonic |
//! | `Channel::balance_list` | [`Fixed`](crate::registry::Fixed), a registry that never changes |
//! | `Channel::balance_channel` | [`MemoryRegistry`](crate::MemoryRegistry), or a [`Discovery`](crate::discover::Discovery) of a stream of one's own: see below |
//! | `Channel::balance_channel_with_executor` | the same; none for the executor, see below |
//! | `Endpoint::uri`, `get_tcp_nodelay`, `get_connect_timeout`, `get_tcp_keepalive`, `get_tcp_keepalive_interval`, `get_tcp_keepalive_retries` | none: `Debug` of a connector shows what was set, and [`status`](crate::ConnectionManager::status) whom it goes to |
//!
//! # From `balance_channel`, step by step
//!
//! 1. **Who feeds the sender.** What sent `Change::Insert` and `Change::Remove` becomes a registration, in a registry of this
//!    process; in one that all can see, [`EtcdRegistry`](crate::EtcdRegistry), servers register themselves and there is
//!    nobody left to feed it:
//!
//!    ```
//!    use std::collections::HashMap;
//!    use switchboard::{ConnectionManager, MemoryRegistry, Session};
//!
//!    # #[tokio::main(flavor = "current_thread")]
//!    # async fn main() -> Result<(), switchboard::Error> {
//!    // let (channel, sender) = tonic::transport::Channel::balance_channel(64);
//!    let registry = MemoryRegistry::new();
//!    let manager = ConnectionManager::builder(registry.clone()).build();
//!    let _channel = manager.channel("echo");
//!    let mut held = HashMap::new();
//!
//!    // sender.send(Change::Insert(7, Endpoint::from_static("http://10.0.0.5:21123"))).await
//!    let session = Session::new("echo", "10.0.0.5:21123").with_id(7);
//!    held.insert(7, registry.register(session).await?);
//!
//!    // sender.send(Change::Remove(7)).await
//!    held.remove(&7);
//!    # Ok(())
//!    # }
//!    ```
//!
//!    A stream of changes that is there already becomes a [`Discovery`](crate::discover::Discovery) for a [`Pool`](crate::Pool),
//!    or goes to one as it is: a pool takes any tower `Discover`. [`Update::Synced`](crate::discover::Update::Synced) is what
//!    tower's changes cannot say: by it a call to a role that has nobody fails at once, where it would have waited.
//! 2. **The client.** `EchoClient::new(channel)` stays as it is; cloning a [`Channel`](crate::Channel) is as cheap.
//! 3. **Options of each `Endpoint`** become those of one [`Connector`], and of one
//!    [`PoolConfig`](crate::pool::PoolConfig): see the tables below. Keepalive is on without being asked for.
//! 4. **What was built around it.** Loops that make a call again, watch whether a server is there, or wait until one is, may
//!    go: see the table that follows.
//!
//! | with `balance_channel` | here |
//! | --- | --- |
//! | An endpoint that could not be connected counts as ready, and takes its share of calls, each of which fails | It takes none: calls go to those that are connected. Where none is, they wait for a first attempt, and fail at once after that |
//! | All endpoints count as equally loaded: one that hangs gets its share of calls | The less loaded of two is picked: one that hangs has the most calls in flight, and hardly gets more, until keepalive finds it out |
//! | `Change::Remove` leaves calls in flight there until they end by themselves, if ever | They fail within milliseconds ([`Kind::SessionDeleted`](crate::Kind::SessionDeleted)); one that says that it stops finishes them |
//! | The same key again dials anew | Where the address is the same, the connection stays |
//! | An empty list: calls wait without a bound | They fail at once if it is known to be empty, and wait for [`PoolConfig::max_wait`](crate::pool::PoolConfig::max_wait) at most while that is not known |
//! | A failure is `UNAVAILABLE`, with the words of the connection | The same code; the message and [`Error::of`](crate::Error::of) say who it was, why, and whether the call may have been executed |
//! | Each call crosses a queue to one task that balances | It is picked for in its own task, from a snapshot |
//! | Nobody sees what it does | [`status`](crate::ConnectionManager::status), [`events`](mod@crate::events) |
//!
//! # Of calls
//!
//! | tonic | is here |
//! | --- | --- |
//! | `Endpoint::user_agent`, which puts tonic's own behind it | [`Connector::user_agent`], for calls that bring none, and nothing behind it |
//! | `Endpoint::origin` | [`Connector::authority`]; the scheme is that of the connection |
//! | `Endpoint::timeout`, until the head of the response | [`MethodConfig::timeout`](crate::config::MethodConfig::timeout) for each method or all, or [`DeadlineLayer`](crate::DeadlineLayer): until the end of the response, and told to the server as `grpc-timeout` |
//! | `Endpoint::concurrency_limit`, for each connection; calls over it wait | [`PoolConfig::max_in_flight`](crate::pool::PoolConfig::max_in_flight) and [`max_in_flight_per_peer`](crate::pool::PoolConfig::max_in_flight_per_peer); calls over it go to another peer, or fail at once. Who wants them to wait puts tower's `ConcurrencyLimitLayer` around the channel |
//! | `Endpoint::rate_limit` | none: a rate of calls says nothing of the load they make. tower's `RateLimitLayer` goes around the channel; it is not `Clone`, and so needs a `Buffer` around it |
//! | `Endpoint::buffer_size` | none: calls cross no queue. How many may wait for a peer is [`PoolConfig::max_waiting`](crate::pool::PoolConfig::max_waiting) |
//! | `Endpoint::executor`, `Channel::balance_channel_with_executor` | none: tasks run on the tokio runtime in which a role is first asked for, whatever runtime calls come from |
//!
//! # Of connections
//!
//! | tonic | is here |
//! | --- | --- |
//! | `Endpoint::connect_timeout`, of TCP, or of the connector | [`PoolConfig::attempt_timeout`](crate::pool::PoolConfig::attempt_timeout): the name, the connection, the proxy, TLS and the first answer together |
//! | `Endpoint::tcp_nodelay` | none: it is always set |
//! | `Endpoint::tcp_keepalive` | [`Connector::tcp_keepalive`] |
//! | `Endpoint::tcp_keepalive_interval`, `tcp_keepalive_retries` | none: as the system is set. What finds out that a peer is gone, within a bound, is [`Connector::keepalive`]; [`Connector::tcp_user_timeout`] where that is off |
//! | `Endpoint::local_address` | [`Connector::local_address`] |
//! | `Endpoint::http2_keep_alive_interval`, off by default, and `keep_alive_timeout` | [`Connector::keepalive`], on by default |
//! | `Endpoint::keep_alive_while_idle`, no by default | [`Connector::keepalive_while_idle`], yes by default |
//! | `Endpoint::initial_stream_window_size`, `initial_connection_window_size` | [`Connector::windows`] |
//! | `Endpoint::http2_adaptive_window` | [`Connector::adaptive_windows`], up to the bounds of [`Connector::windows`] |
//! | `Endpoint::max_frame_size` | [`Connector::max_frame_size`] |
//! | `Endpoint::http2_header_table_size` | [`Connector::header_table_size`] |
//! | `Endpoint::http2_max_header_list_size`, of responses, 16 KiB by default | none: 16 MiB, which is what `h2` has. [`Connector::max_header_list_size`] is another thing: that of requests |
//! | `Endpoint::http2_max_concurrent_reset_streams` | none: 4,096, so that answers to calls that were cancelled are known for what they are |
//! | `Endpoint::http2_reset_stream_duration` | none: what `h2` has |
//! | `Endpoint::http2_max_local_error_reset_streams` | none: without a bound, for what is counted are errors of ours, and at the bound the connection would close under all calls |
//!
//! # TLS
//!
//! | tonic | is here |
//! | --- | --- |
//! | `Endpoint::tls_config`, and the scheme `https` | `Connector::tls` (feature `tls`), for all peers. Unix domain sockets may have it too |
//! | `Endpoint::tls_config_with_verifier` | none so far: a server is believed by its roots and its name alone. Who has to look at more of a certificate, such as a SPIFFE id, brings a stream with TLS of their own by [`Connector::dial_with`]; calls over it have the scheme `http` |
//! | `ClientTlsConfig::domain_name` | `TlsConfig::server_name`, or [`Connector::authority`] for it and the calls' `:authority` |
//! | `ClientTlsConfig::ca_certificate`, `ca_certificates` | `TlsConfig::ca_pem`, `ca_file`; several add up |
//! | `ClientTlsConfig::trust_anchor`, `trust_anchors` | none: certificates only, in PEM |
//! | `ClientTlsConfig::identity` | `TlsConfig::identity_pem`, `identity_files` |
//! | `ClientTlsConfig::with_native_roots` | `TlsConfig::native_roots` |
//! | `ClientTlsConfig::with_webpki_roots` | `TlsConfig::webpki_roots` |
//! | `ClientTlsConfig::with_enabled_roots` | none: both of these, by name. Nobody is trusted who was not named |
//! | `ClientTlsConfig::assume_http2` | none: a server has to say that it speaks HTTP/2, as RFC 9113 demands |
//! | `ClientTlsConfig::use_key_log` | none: keys of sessions are not written down |
//! | `ClientTlsConfig::timeout` | [`PoolConfig::attempt_timeout`](crate::pool::PoolConfig::attempt_timeout), of which the handshake is part |
//! | none | `TlsConfig::reload_every`, `TlsReloader`: certificates that change |
//!
#![cfg_attr(feature = "tls", doc = "```")]
#![cfg_attr(not(feature = "tls"), doc = "```ignore")]
//! use switchboard::transport::{Connector, TlsConfig};
//!
//! # fn tonic(ca: &str, certificate: &str, key: &str) -> Result<(), Box<dyn std::error::Error>> {
//! // With tonic:
//! use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};
//! let tls = ClientTlsConfig::new()
//!     .ca_certificate(Certificate::from_pem(ca))
//!     .identity(Identity::from_pem(certificate, key))
//!     .domain_name("etcd.internal");
//! let _endpoint = Endpoint::from_static("https://10.0.0.5:2379").tls_config(tls)?;
//! # Ok(())
//! # }
//! # fn ours(ca: &str, certificate: &str, key: &str) -> Result<(), switchboard::Error> {
//!
//! // With this crate:
//! let tls = TlsConfig::new()
//!     .ca_pem(ca.as_bytes())?
//!     .identity_pem(certificate.as_bytes(), key.as_bytes())?
//!     .server_name("etcd.internal")?;
//! let _connector = Connector::new().tls(tls)?;
//! # Ok(())
//! # }
//! ```
//!
//! [`Connector`]: super::Connector
//! [`Connector::authority`]: super::Connector::authority
//! [`Connector::connect_to`]: super::Connector::connect_to
//! [`Connector::dial_with`]: super::Connector::dial_with
//! [`Connector::header_table_size`]: super::Connector::header_table_size
//! [`Connector::keepalive`]: super::Connector::keepalive
//! [`Connector::keepalive_while_idle`]: super::Connector::keepalive_while_idle
//! [`Connector::local_address`]: super::Connector::local_address
//! [`Connector::max_frame_size`]: super::Connector::max_frame_size
//! [`Connector::max_header_list_size`]: super::Connector::max_header_list_size
//! [`Connector::tcp_keepalive`]: super::Connector::tcp_keepalive
//! [`Connector::tcp_user_timeout`]: super::Connector::tcp_user_timeout
//! [`Connector::user_agent`]: super::Connector::user_agent
//! [`Connector::windows`]: super::Connector::windows
//! [`Connector::adaptive_windows`]: super::Connector::adaptive_windows
//! [`Session`]: crate::Session
