//! The ways to make a unary call that the benches compare.

use std::{
    fmt,
    future::Future,
    net::SocketAddr,
    pin::Pin,
    sync::OnceLock,
    time::{Duration, Instant},
};

use bytes::Bytes;
use switchboard::{ConnectionManager, Session, registry::Fixed, transport::Connector};
use tokio::{runtime::Runtime, task::JoinSet, time};
use tonic::{
    Request,
    client::GrpcService,
    codegen::{Body, StdError},
    transport::{Channel, Endpoint},
};

use super::{
    echo::{EchoRequest, echo_client::EchoClient},
    measure::{Slice, processor_time, quantile},
    paced::{self, Ended},
    raw::RawH2,
};

/// Makes one unary call, and reads its answer to the end.
pub(crate) trait Caller: Clone + Send + Sync + 'static {
    fn call(&mut self) -> impl Future<Output = ()> + Send;

    /// The same with a deadline, and whether it was answered.
    fn try_call(&mut self, within: Duration) -> impl Future<Output = bool> + Send {
        async move { time::timeout(within, self.call()).await.is_ok() }
    }
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
    /// The same with windows of so many KiB for a stream, and four times that for a connection.
    ManagedWith(u32),
    /// A bare `tonic::transport::Channel`, to one server.
    Channel,
    /// `tonic::transport::Channel::balance_list`.
    Balance,
    /// `h2`, with what gRPC needs written by hand.
    RawH2,
}

/// What a call carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Load {
    /// One message there and back, of so many bytes.
    Unary(usize),
    /// So many messages of so many bytes, as an answer.
    Download(u32, u32),
    /// The same, as a request.
    Upload(u32, usize),
}

/// A client with what its calls carry.
#[derive(Clone)]
struct Loaded<T> {
    client: EchoClient<T>,
    load: Load,
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
    /// For calls that carry more than a few bytes; managed or tonic's own channel.
    pub(crate) async fn connect_for(self, load: Load, addresses: &[SocketAddr]) -> Candidate {
        let candidate = match (self, addresses) {
            (Self::Channel, [only]) => {
                let endpoint =
                    Endpoint::from_shared(format!("http://{only}")).expect("a valid URI");
                let channel = endpoint.connect().await.expect("the server listens");
                let client = EchoClient::new(channel);
                Candidate(Box::new(Loaded { client, load }))
            }
            _ => {
                let connector = match self {
                    Self::ManagedOver(most) => Connector::new().max_connections(most),
                    Self::ManagedWith(kib) => Connector::new().windows(kib << 10, kib << 12),
                    _ => Ok(Connector::new()),
                };
                let channel = managed(addresses, connector.expect("in bounds"));
                let client = EchoClient::new(channel);
                Candidate(Box::new(Loaded { client, load }))
            }
        };
        candidate.calls(4, 16).await;
        candidate
    }

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
            (Self::ManagedWith(_), _) => panic!("windows are for calls that carry much"),
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
            Self::ManagedWith(kib) => return write!(f, "managed, windows of {kib} KiB"),
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

    async fn try_call(&mut self, within: Duration) -> bool {
        let mut request = Request::new(message());
        request.set_timeout(within);
        // Who keeps no deadline fails as well, but later.
        let answer = time::timeout(5 * within, self.unary(request)).await;
        matches!(answer, Ok(Ok(_)))
    }
}

impl Load {
    /// How many bytes that is, both ways together.
    pub(crate) fn bytes(self) -> usize {
        match self {
            Self::Unary(size) => 2 * size,
            Self::Download(count, size) => count as usize * size as usize,
            Self::Upload(count, size) => count as usize * size,
        }
    }
}

impl<T> Caller for Loaded<T>
where
    T: GrpcService<tonic::body::Body> + Clone + Send + Sync + 'static,
    T::Future: Send,
    T::Error: Into<StdError>,
    T::ResponseBody: Body<Data = Bytes> + Send + 'static,
    <T::ResponseBody as Body>::Error: Into<StdError> + Send,
{
    async fn call(&mut self) {
        match self.load {
            Load::Unary(size) => {
                let payload = payload(size);
                let request = EchoRequest {
                    payload,
                    ..EchoRequest::default()
                };
                self.client.unary(request).await.expect("it is answered");
            }
            Load::Download(count, size) => {
                let request = EchoRequest {
                    count,
                    size,
                    ..EchoRequest::default()
                };
                let answer = self.client.download(request).await;
                let mut answers = answer.expect("it is answered").into_inner();
                let mut messages = 0;
                while answers.message().await.expect("it goes on").is_some() {
                    messages += 1;
                }
                assert_eq!(messages, count);
            }
            Load::Upload(count, size) => {
                let request = EchoRequest {
                    payload: payload(size),
                    ..EchoRequest::default()
                };
                let requests = (0..count).map(move |_| request.clone());
                let answer = self.client.upload(tokio_stream::iter(requests)).await;
                let answer = answer.expect("it is answered").into_inner();
                assert_eq!(answer.messages, count);
            }
        }
    }
}

/// Shared: to make it is not what is measured.
fn payload(size: usize) -> Bytes {
    static ONES: OnceLock<Bytes> = OnceLock::new();
    let ones = ONES.get_or_init(|| vec![1; 4 << 20].into());
    ones.slice(..size)
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

    /// Makes a call at each of these moments after `began`, however many are in flight, from this thread, which is none of
    /// the runtime's; each has to be answered `within` that time.
    pub(crate) fn paced(
        &self,
        runtime: &Runtime,
        began: Instant,
        moments: &[Duration],
        within: Duration,
    ) -> Vec<Ended> {
        self.0.paced(runtime, began, moments, within)
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

    fn paced(
        &self,
        runtime: &Runtime,
        began: Instant,
        moments: &[Duration],
        within: Duration,
    ) -> Vec<Ended>;
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

    fn paced(
        &self,
        runtime: &Runtime,
        began: Instant,
        moments: &[Duration],
        within: Duration,
    ) -> Vec<Ended> {
        paced::run(self, runtime, began, moments, within)
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
