//! The ways to make a unary call that the benches compare.

use std::{
    fmt,
    future::Future,
    net::SocketAddr,
    pin::Pin,
    time::{Duration, Instant},
};

use bytes::Bytes;
use switchboard::{ConnectionManager, Session, registry::Fixed, transport::Connector};
use tokio::task::JoinSet;
use tonic::{
    client::GrpcService,
    codegen::{Body, StdError},
    transport::{Channel, Endpoint},
};

use super::{
    echo::{EchoRequest, echo_client::EchoClient},
    measure::{Slice, processor_time, quantile},
    raw::RawH2,
};

/// Makes one unary call, and reads its answer to the end.
pub(crate) trait Caller: Clone + Send + Sync + 'static {
    fn call(&mut self) -> impl Future<Output = ()> + Send;
}

/// A candidate: any [`Caller`], connected.
pub(crate) struct Candidate(Box<dyn Drive>);

/// Which candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    /// This crate's `Channel`, all of it.
    Managed,
    /// The same with so many connections to a peer at most.
    ManagedOver(usize),
    /// A bare `tonic::transport::Channel`, to one server.
    Channel,
    /// `tonic::transport::Channel::balance_list`.
    Balance,
    /// `h2`, with what gRPC needs written by hand.
    RawH2,
}

/// What all calls send.
pub(crate) fn message() -> EchoRequest {
    EchoRequest {
        payload: Bytes::from_static(b"sixteen bytes..."),
        ..EchoRequest::default()
    }
}

// === impl Kind ===

impl Kind {
    pub(crate) async fn connect(self, addresses: &[SocketAddr]) -> Candidate {
        let endpoint = |address: &SocketAddr| {
            Endpoint::from_shared(format!("http://{address}")).expect("a valid URI")
        };
        let candidate = match (self, addresses) {
            (Self::Managed, _) => {
                let channel = managed(addresses, Connector::new());
                Candidate(Box::new(EchoClient::new(channel)))
            }
            (Self::ManagedOver(most), _) => {
                let connector = Connector::new().max_connections(most).expect("in bounds");
                let channel = managed(addresses, connector);
                Candidate(Box::new(EchoClient::new(channel)))
            }
            (Self::Channel, [only]) => {
                let channel = endpoint(only).connect().await.expect("the server listens");
                Candidate(Box::new(EchoClient::new(channel)))
            }
            (Self::Channel, _) => panic!("a bare channel has one server"),
            (Self::Balance, _) => {
                let channel = Channel::balance_list(addresses.iter().map(endpoint));
                Candidate(Box::new(EchoClient::new(channel)))
            }
            (Self::RawH2, _) => Candidate(Box::new(RawH2::connect(addresses).await)),
        };
        // All their connections are made, and whatever grows has grown.
        candidate.calls(64, 2_000).await;
        candidate
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Managed => "managed",
            Self::ManagedOver(1) => "managed, 1 connection",
            Self::ManagedOver(most) => return write!(f, "managed, {most} connections"),
            Self::Channel => "tonic Channel",
            Self::Balance => "tonic balance_list",
            Self::RawH2 => "raw h2",
        })
    }
}

/// The whole managed stack over these servers.
fn managed(addresses: &[SocketAddr], connector: Connector) -> switchboard::Channel {
    let session = |address: &SocketAddr| Session::new("echo", address.to_string());
    let servers = Fixed::new(addresses.iter().map(session)).expect("valid sessions");
    let manager = ConnectionManager::builder(servers).connector(connector);
    manager.build().channel("echo")
}

// === impl Caller ===

impl<T> Caller for EchoClient<T>
where
    T: GrpcService<tonic::body::Body> + Clone + Send + Sync + 'static,
    T::Future: Send,
    T::Error: Into<StdError>,
    T::ResponseBody: Body<Data = Bytes> + Send + 'static,
    <T::ResponseBody as Body>::Error: Into<StdError> + Send,
{
    async fn call(&mut self) {
        self.unary(message()).await.expect("the call is answered");
    }
}

// === impl Candidate ===

impl Candidate {
    /// Calls for `length`, `in_flight` at a time, each from a task of its own.
    pub(crate) async fn slice(&self, in_flight: usize, length: Duration) -> Slice {
        let (began, cpu_before) = (Instant::now(), processor_time());
        let mut latencies = self.0.run(in_flight, Bound::Time(began + length)).await;
        let (wall, cpu) = (began.elapsed(), processor_time() - cpu_before);
        let calls = u32::try_from(latencies.len()).unwrap_or(u32::MAX).max(1);
        Slice {
            cpu: cpu / calls,
            p50: quantile(&mut latencies, 500),
            calls_per_second: f64::from(calls) / wall.as_secs_f64(),
        }
    }

    /// Makes this many calls, `in_flight` at a time; a few more if it does not divide.
    pub(crate) async fn calls(&self, in_flight: usize, calls: usize) {
        let each = calls.div_ceil(in_flight);
        self.0.run(in_flight, Bound::Calls(each)).await;
    }
}

/// When a task has called enough.
#[derive(Clone, Copy)]
enum Bound {
    Time(Instant),
    Calls(usize),
}

/// [`Caller`] without its type: one virtual call for thousands of calls.
trait Drive {
    /// Yields how long each call took, in nanoseconds.
    fn run(&self, in_flight: usize, bound: Bound) -> Pin<Box<dyn Future<Output = Vec<u32>> + '_>>;
}

impl<C: Caller> Drive for C {
    fn run(&self, in_flight: usize, bound: Bound) -> Pin<Box<dyn Future<Output = Vec<u32>> + '_>> {
        Box::pin(async move {
            let mut tasks = JoinSet::new();
            for _ in 0..in_flight {
                tasks.spawn(call_until(self.clone(), bound));
            }
            tasks.join_all().await.concat()
        })
    }
}

async fn call_until<C: Caller>(mut caller: C, bound: Bound) -> Vec<u32> {
    let mut latencies = Vec::with_capacity(1024);
    let mut began = Instant::now();
    loop {
        caller.call().await;
        let now = Instant::now();
        latencies.push(u32::try_from((now - began).as_nanos()).unwrap_or(u32::MAX));
        began = now;
        match bound {
            Bound::Time(end) if now < end => {}
            Bound::Calls(calls) if latencies.len() < calls => {}
            _ => return latencies,
        }
    }
}
