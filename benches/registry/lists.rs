//! 10,000 sessions, from nothing to known.

use std::{
    convert::Infallible,
    future::Ready,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures_util::StreamExt as _;
use switchboard::{
    Backoff, EtcdRegistry, Pool, Registry as _,
    discover::{Member, Update, Updates},
    endpoint::{BoxError, Connected},
    pool::{Plain, PoolConfig},
};
use tokio::{runtime::Runtime, time::sleep};
use tower_service::Service;

use super::{
    address, by_hand,
    etcd::Etcd,
    line, put,
    support::measure::{Threads, median},
};

const SESSIONS: usize = 10_000;
const ROUNDS: usize = 7;
const PREFIX: &str = "bench/listed/";

pub(crate) fn run(runtime: &Runtime, etcd: &Etcd) {
    runtime.block_on(fill(etcd));
    let [mut ours, mut theirs, mut ready] = [(); 3].map(|()| Vec::new());
    for _ in 0..ROUNDS {
        let began = Instant::now();
        let listed = runtime.block_on(by_hand::list(etcd, PREFIX));
        theirs.push(millis(began.elapsed()));
        assert_eq!(listed.len(), SESSIONS);

        let began = Instant::now();
        let (_updates, seen) = runtime.block_on(synced(etcd));
        ours.push(millis(began.elapsed()));
        assert_eq!(seen, SESSIONS);

        ready.push(millis(runtime.block_on(until_ready(etcd))));
    }
    println!(
        "\n{:<34} {:>13} {:>13} {:>6}",
        "10,000 sessions", "ours", "by hand", "ratio"
    );
    let (ours, theirs) = (median(&mut ours), median(&mut theirs));
    line(
        "listed, decoded, reconciled",
        ours,
        theirs,
        "ms",
        "by hand: one range, serde_json, a map",
    );
    let ready = median(&mut ready);
    line(
        "the same, and ready in a pool",
        ready,
        theirs,
        "ms",
        "with a task for each instance",
    );

    // On one thread, whose allocations can be counted.
    let single = Threads::One.runtime();
    let kept =
        |info: allocation_counter::AllocationInfo| info.bytes_current as f64 / SESSIONS as f64;
    let mut listed = None;
    let theirs = kept(allocation_counter::measure(|| {
        listed = Some(single.block_on(by_hand::list(etcd, PREFIX)));
    }));
    drop(listed);
    let mut known = None;
    let ours = kept(allocation_counter::measure(|| {
        known = Some(single.block_on(synced(etcd)));
    }));
    line(
        "bytes kept for each",
        ours,
        theirs,
        "B",
        "key, record, session, and who owns its address",
    );
    drop(known);
}

async fn fill(etcd: &Etcd) {
    let kv = etcd.kv().await;
    let puts = (0..SESSIONS).map(|n| {
        let mut kv = kv.clone();
        async move {
            kv.put(put(format!("{PREFIX}{n}"), &address(n, 1)))
                .await
                .map(drop)
        }
    });
    let mut puts = futures_util::stream::iter(puts).buffer_unordered(64);
    while let Some(done) = puts.next().await {
        done.expect("etcd takes a record");
    }
}

/// Connections and a watch of its own, each time.
async fn registry(etcd: &Etcd) -> EtcdRegistry {
    let registry = EtcdRegistry::connect([etcd.endpoint()], "bench").await;
    registry.expect("a good endpoint")
}

/// How many sessions there are, and what is to be kept for them to be known.
async fn synced(etcd: &Etcd) -> (Updates, usize) {
    let mut updates = registry(etcd)
        .await
        .discover("listed")
        .expect("a role")
        .updates();
    let mut seen = 0;
    loop {
        match updates.next().await {
            Some(Update::Change(_)) => seen += 1,
            Some(Update::Synced) => return (updates, seen),
            other => panic!("{other:?}"),
        }
    }
}

/// A service that answers at once; to connect to it takes no time.
#[derive(Clone)]
struct Instant0;

impl Service<()> for Instant0 {
    type Response = ();
    type Error = Infallible;
    type Future = Ready<Result<(), Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, (): ()) -> Self::Future {
        std::future::ready(Ok(()))
    }
}

async fn until_ready(etcd: &Etcd) -> Duration {
    let began = Instant::now();
    let connected = Arc::new(AtomicUsize::new(0));
    let counted = connected.clone();
    let connect = move |_: &Member| {
        counted.fetch_add(1, Ordering::Relaxed);
        std::future::ready(Ok::<_, BoxError>(Connected::new(Instant0)))
    };
    let updates = registry(etcd)
        .await
        .discover("listed")
        .expect("a role")
        .updates();
    // Nothing is ever tried again here.
    let config = PoolConfig::default().backoff(Backoff::default());
    let pool = Pool::<Instant0, Plain>::new("listed", config, updates, connect).expect("a runtime");
    while connected.load(Ordering::Relaxed) < SESSIONS {
        sleep(Duration::from_micros(500)).await;
    }
    // The last of them may be on their way into the snapshot.
    let ready = || {
        let status = pool.status();
        let ready = status
            .endpoints
            .iter()
            .filter(|e| e.state == switchboard::pool::status::Connectivity::Ready);
        ready.count()
    };
    while ready() < SESSIONS {
        sleep(Duration::from_micros(500)).await;
    }
    began.elapsed()
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
