//! What an idle connection keeps, and how long it takes until the last call to a peer has failed that was killed, or whose
//! session was deleted.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use switchboard::{ConnectionManager, MemoryRegistry, Session, registry::Fixed};
use tokio::{task::JoinSet, time};
use tonic::{
    client::GrpcService,
    codegen::{Body, StdError},
    transport::{Channel, Endpoint, channel::Change},
};

use crate::{
    report::{info, ratio},
    support::{
        echo::{EchoRequest, echo_client::EchoClient},
        measure::{Threads, kept, median},
        servers::Servers,
    },
};

/// Peers with a connection each, to see what one keeps.
const IDLE: u8 = 200;

/// Callers, and rounds, of the killed peer.
const CALLERS: usize = 64;
const ROUNDS: usize = 5;

/// Calls in flight to the peer whose session is deleted.
const IN_FLIGHT: usize = 10_000;

pub(crate) fn run() {
    idle();
    killed();
    deleted();
}

fn idle() {
    let servers = Servers::start(1);
    let port = servers.addresses(1)[0].port();
    // All of them lead to the one server.
    let addresses: Vec<_> = (2..IDLE + 2)
        .map(|n| SocketAddr::from(([127, 0, 0, n], port)))
        .collect();
    let runtime = Threads::One.runtime();
    let (theirs, _channels) = kept(|| {
        runtime.block_on(async {
            let mut channels = Vec::new();
            for address in &addresses {
                channels.push(endpoint(*address).connect().await.expect("it listens"));
            }
            channels
        })
    });
    let (ours, _manager) = kept(|| {
        runtime.block_on(async {
            let manager = managed(&addresses);
            let ready = manager.ready("echo", usize::from(IDLE), Duration::from_secs(10));
            ready.await.expect("all are connected");
            manager
        })
    });
    let [ours, theirs] = [ours, theirs].map(|bytes| bytes as f64 / f64::from(IDLE) / 1e3);
    let what = format!(
        "kept for each of {IDLE} idle peers, {ours:.1} kB managed over tonic Channel's {theirs:.1}"
    );
    ratio("idle_connection_memory_vs_channel", ours / theirs, &what);
}

fn killed() {
    let runtime = Threads::Two.runtime();
    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    for _ in 0..ROUNDS {
        for (tonics, found) in [(false, &mut ours), (true, &mut theirs)] {
            let (doomed, other) = (Servers::start(1), Servers::start(1));
            let addresses = [doomed.addresses(1)[0], other.addresses(1)[0]];
            let last = runtime.block_on(async move {
                match tonics {
                    true => {
                        let list = addresses.into_iter().map(endpoint);
                        last_failure(Channel::balance_list(list), doomed).await
                    }
                    false => last_failure(managed(&addresses).channel("echo"), doomed).await,
                }
            });
            found.push(last.as_secs_f64() * 1e3);
        }
    }
    for (name, mut found, who) in [
        ("killed_last_failure_ms", ours, "managed"),
        (
            "killed_last_failure_ms_balance",
            theirs,
            "tonic balance_list",
        ),
    ] {
        let what = format!(
            "ms from SIGKILL of one of two servers to the last failed call, {CALLERS} callers, {who}"
        );
        info(name, median(&mut found), &what);
    }
}

/// From the death of a server to the end of the last call that failed, of callers that go on for a while.
async fn last_failure<S>(channel: S, doomed: Servers) -> Duration
where
    S: GrpcService<tonic::body::Body> + Clone + Send + Sync + 'static,
    S::Future: Send,
    S::Error: Into<StdError>,
    S::ResponseBody: Body<Data = Bytes> + Send + 'static,
    <S::ResponseBody as Body>::Error: Into<StdError> + Send,
{
    let (stop, last) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(None)));
    let mut callers = JoinSet::new();
    for _ in 0..CALLERS {
        let (mut client, stop, last) =
            (EchoClient::new(channel.clone()), stop.clone(), last.clone());
        callers.spawn(async move {
            while !stop.load(SeqCst) {
                if client.unary(EchoRequest::default()).await.is_err() {
                    *last.lock().expect("whole") = Some(Instant::now());
                }
            }
        });
    }
    time::sleep(Duration::from_millis(300)).await;
    let killed = Instant::now();
    drop(doomed);
    time::sleep(Duration::from_millis(1_500)).await;
    stop.store(true, SeqCst);
    while callers.join_next().await.is_some() {}
    let last = last.lock().expect("whole").unwrap_or(killed);
    last.saturating_duration_since(killed)
}

fn deleted() {
    let runtime = Threads::Two.runtime();
    let servers = Servers::start_roomy();
    let address = servers.addresses(1)[0];
    let mut each = Vec::new();
    for _ in 0..3 {
        let took = runtime.block_on(async {
            let registry = MemoryRegistry::new();
            let session = Session::new("echo", address.to_string());
            let registration = registry.register(session).await.expect("a valid session");
            let manager = ConnectionManager::builder(registry).build();
            let mut calls = held(manager.channel("echo")).await;
            let began = Instant::now();
            registration.deregister().await.expect("it is registered");
            while calls.join_next().await.is_some() {}
            began.elapsed()
        });
        each.push(took.as_secs_f64() * 1e3);
    }
    info(
        "deleted_last_failure_ms",
        median(&mut each),
        &format!(
            "ms from the end of a session to the last of {IN_FLIGHT} calls in flight that failed, managed"
        ),
    );
    let left = runtime.block_on(async {
        let (channel, changes) = Channel::balance_channel(8);
        let insert = Change::Insert(1, endpoint(address));
        changes.send(insert).await.expect("it is there");
        let mut calls = held(channel).await;
        changes.send(Change::Remove(1)).await.expect("it is there");
        time::sleep(Duration::from_secs(2)).await;
        while calls.try_join_next().is_some() {}
        calls.len()
    });
    info(
        "deleted_left_after_2s_balance",
        left as f64,
        &format!(
            "of {IN_FLIGHT} calls in flight still wait 2 s after their peer was removed, tonic balance_channel"
        ),
    );
}

/// Calls that do not end by themselves, and are all under way.
async fn held<S>(channel: S) -> JoinSet<()>
where
    S: GrpcService<tonic::body::Body> + Clone + Send + Sync + 'static,
    S::Future: Send,
    S::Error: Into<StdError>,
    S::ResponseBody: Body<Data = Bytes> + Send + 'static,
    <S::ResponseBody as Body>::Error: Into<StdError> + Send,
{
    let mut calls = JoinSet::new();
    for _ in 0..IN_FLIGHT {
        let mut client = EchoClient::new(channel.clone());
        calls.spawn(async move {
            let _ = client.upload(tokio_stream::pending::<EchoRequest>()).await;
        });
    }
    time::sleep(Duration::from_millis(1_000)).await;
    assert_eq!(calls.len(), IN_FLIGHT);
    calls
}

fn managed(addresses: &[SocketAddr]) -> ConnectionManager {
    let session = |address: &SocketAddr| Session::new("echo", address.to_string());
    let servers = Fixed::new(addresses.iter().map(session)).expect("valid sessions");
    ConnectionManager::builder(servers).build()
}

fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint::from_shared(format!("http://{address}")).expect("a valid URI")
}
