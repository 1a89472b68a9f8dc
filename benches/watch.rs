//! What it costs to follow the instances of a role: a watch, beside what one would do without it, which is to look at
//! the status again and again and compare.
//!
//! 10,000 sessions, of which one changes at a time. Nobody listens where they say, so that no connection is in the way.

use std::{
    collections::HashMap,
    hint::black_box,
    time::{Duration, Instant},
};

use futures_util::StreamExt as _;
use switchboard::{
    ConnectionManager, MemoryRegistry,
    manager::{Connectivity, InstanceChange, Watch},
    pool::PoolConfig,
};

const SESSIONS: usize = 10_000;
const ROUNDS: usize = 200;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), switchboard::Error> {
    let registry = MemoryRegistry::new();
    for id in 0..SESSIONS {
        put(&registry, id, 0);
    }
    let config = PoolConfig::default().attempts(1)?.probe(None);
    let manager = ConnectionManager::builder(registry.clone())
        .pools(config.max_dials(1_000)?)
        .build();
    let mut watch = manager.watch("node");
    let began = Instant::now();
    let mut offline = 0;
    while offline < SESSIONS {
        if let Some(InstanceChange::Unready(instance)) = watch.next().await {
            offline += usize::from(instance.state() == Connectivity::Offline);
        }
    }
    println!(
        "{SESSIONS} sessions, all of them refusing, are told to be offline within {:.0?}",
        began.elapsed()
    );

    let (mut by_watch, mut by_status) = (Vec::new(), Vec::new());
    let mut known = versions(&manager);
    for round in 1..=ROUNDS {
        let id = round * 37 % SESSIONS;
        let began = Instant::now();
        put(&registry, id, 2 * round);
        until_told(&mut watch, id).await;
        by_watch.push(began.elapsed());

        known.insert(id.to_string(), (2 * round).to_string());
        let began = Instant::now();
        put(&registry, id, 2 * round + 1);
        loop {
            tokio::task::yield_now().await;
            let now = versions(&manager);
            let changed = now
                .iter()
                .find(|(id, version)| known.get(*id) != Some(version));
            if black_box(changed).is_some() {
                known = now;
                break;
            }
        }
        by_status.push(began.elapsed());
        until_told(&mut watch, id).await;
    }
    let (by_watch, by_status) = (median(by_watch), median(by_status));
    println!(
        "one of {SESSIONS} changes, median of {ROUNDS}: told by a watch after {by_watch:.1?}, found in the status after {by_status:.1?}, ratio {:.3}",
        by_watch.as_secs_f64() / by_status.as_secs_f64()
    );
    manager.stop().await;
    Ok(())
}

fn put(registry: &MemoryRegistry, id: usize, version: usize) {
    let address = format!("127.0.0.{}:{}", 1 + id / 60, 1 + id % 60);
    let value =
        format!(r#"{{"Addr":"{address}","Metadata":{{"id":"{id}","version":"{version}"}}}}"#);
    registry.put(format!("node/{id}"), value);
}

async fn until_told(watch: &mut Watch, id: usize) {
    while let Some(change) = watch.next().await {
        // What it was told of a dial that its word has brought about.
        if let InstanceChange::Updated(instance) = change
            && instance.id() == id.to_string()
        {
            return;
        }
    }
}

fn versions(manager: &ConnectionManager) -> HashMap<String, String> {
    let known = manager.channels("node").unwrap_or_default();
    let version = |i: &switchboard::manager::Instance| i.session().version().to_owned();
    known
        .iter()
        .map(|i| (i.id().to_owned(), version(i)))
        .collect()
}

fn median(mut of: Vec<Duration>) -> Duration {
    of.sort_unstable();
    of[of.len() / 2]
}
