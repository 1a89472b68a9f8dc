//! 1,000 changes a second, each from its PUT until the new instance has answered a call.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use switchboard::{Channel, ConnectionManager, EtcdRegistry, WaitForReady};
use tokio::{runtime::Runtime, sync::mpsc, time};
use tonic::Request;

use super::{
    address, by_hand,
    etcd::Etcd,
    line, pb, put,
    support::{
        echo::{EchoRequest, echo_client::EchoClient},
        measure::quantile,
        servers::Servers,
    },
};

const A_SECOND: u64 = 1_000;
const SLICE: usize = 2_000;
const ROUNDS: usize = 3;
/// How many instances there are at a time: the oldest goes as one comes.
const AT_A_TIME: usize = 200;

pub(crate) fn run(runtime: &Runtime, etcd: &Etcd, servers: &Servers) {
    let port = servers.addresses(1)[0].port();
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        theirs.extend(runtime.block_on(slice_by_hand(etcd, port, 2 * round)));
        ours.extend(runtime.block_on(slice(etcd, port, 2 * round + 1)));
    }
    println!(
        "\n{:<34} {:>13} {:>13} {:>6}",
        "1,000 changes a second", "ours", "by hand", "ratio"
    );
    for (name, per_mille) in [
        ("PUT to answered call, p50", 500),
        ("PUT to answered call, p99", 990),
    ] {
        let ours = quantile(&mut ours, per_mille).as_secs_f64() * 1e3;
        let theirs = quantile(&mut theirs, per_mille).as_secs_f64() * 1e3;
        line(
            name,
            ours,
            theirs,
            "ms",
            "by hand: a watch, and a connect for each event",
        );
    }
}

/// Waiting calls for instances that are about to come.
async fn slice(etcd: &Etcd, port: u16, number: usize) -> Vec<u32> {
    let registry = EtcdRegistry::connect([etcd.endpoint()], "bench").await;
    let manager = ConnectionManager::builder(registry.expect("a good endpoint")).build();
    let role = format!("changing-{number}");
    let channel = manager.channel(&role);
    // It is watched when this is answered.
    let _ = EchoClient::new(channel.clone())
        .unary(EchoRequest::default())
        .await;
    let (done, mut took) = mpsc::unbounded_channel();
    let changes = changes(etcd, &role, port, number, |n, began| {
        let (channel, done) = (channel.clone(), done.clone());
        tokio::spawn(async move {
            answered(channel, n).await;
            let _ = done.send(nanos(began));
        });
    });
    changes.await;
    drop(done);
    let mut all = Vec::with_capacity(SLICE);
    while let Some(nanos) = took.recv().await {
        all.push(nanos);
    }
    manager.stop().await;
    assert_eq!(all.len(), SLICE);
    all
}

async fn answered(channel: Channel, n: usize) {
    let mut request = Request::new(EchoRequest::default());
    request.extensions_mut().insert(WaitForReady(true));
    let answer = EchoClient::new(channel.to(n)).unary(request).await;
    answer.expect("it comes, and answers");
}

async fn slice_by_hand(etcd: &Etcd, port: u16, number: usize) -> Vec<u32> {
    let role = format!("changing-{number}");
    let mut watch = by_hand::watch(etcd, &format!("bench/{role}/")).await;
    let began: Arc<Mutex<HashMap<String, Instant>>> = Arc::default();
    let (done, mut took) = mpsc::unbounded_channel();
    let waiting = began.clone();
    let watching = tokio::spawn(async move {
        while let Ok(Some(message)) = watch.message().await {
            for event in message.events {
                let Some(kv) = event.kv.filter(|kv| !kv.value.is_empty()) else {
                    continue;
                };
                let record: by_hand::Record = serde_json::from_slice(&kv.value).expect("JSON");
                let key = String::from_utf8_lossy(&kv.key).into_owned();
                let (done, waiting) = (done.clone(), waiting.clone());
                tokio::spawn(async move {
                    let channel = by_hand::connect(&record.address).await;
                    let answer = EchoClient::new(channel).unary(EchoRequest::default()).await;
                    answer.expect("it answers");
                    let began = waiting.lock().expect("whole").remove(&key);
                    let _ = done.send(nanos(began.expect("it was put")));
                });
            }
        }
    });
    let changes = changes(etcd, &role, port, number, |n, at| {
        let key = format!("bench/{role}/{n}");
        began.lock().expect("whole").insert(key, at);
    });
    changes.await;
    let mut all = Vec::with_capacity(SLICE);
    while all.len() < SLICE {
        all.push(took.recv().await.expect("it goes on"));
    }
    watching.abort();
    all
}

/// Puts one a millisecond, and deletes the oldest; tells of each as it is put.
async fn changes(
    etcd: &Etcd,
    role: &str,
    port: u16,
    number: usize,
    mut put_now: impl FnMut(usize, Instant),
) {
    let kv = etcd.kv().await;
    let mut every = time::interval(Duration::from_secs(1) / A_SECOND as u32);
    every.set_missed_tick_behavior(time::MissedTickBehavior::Burst);
    let mut writes = tokio::task::JoinSet::new();
    for n in 0..SLICE {
        every.tick().await;
        let key = |n: usize| format!("bench/{role}/{n}");
        let request = put(key(n), &address(number * SLICE + n, port));
        put_now(n, Instant::now());
        let (mut putting, mut deleting) = (kv.clone(), kv.clone());
        writes.spawn(async move { putting.put(request).await.map(drop) });
        if let Some(oldest) = n.checked_sub(AT_A_TIME) {
            let request = pb::DeleteRangeRequest {
                key: key(oldest).into_bytes().into(),
                range_end: Default::default(),
            };
            writes.spawn(async move { deleting.delete_range(request).await.map(drop) });
        }
    }
    while let Some(written) = writes.join_next().await {
        written.expect("no panic").expect("etcd writes");
    }
}

fn nanos(began: Instant) -> u32 {
    u32::try_from(began.elapsed().as_nanos()).unwrap_or(u32::MAX)
}
