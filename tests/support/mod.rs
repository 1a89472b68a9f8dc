//! What the integration tests share: servers, proxies, etcds, and waiting for what is to happen.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test file uses its part of it"
)]
pub mod afar;
pub mod certificates;
pub mod etcd;
pub mod fake;
pub mod interop;
pub mod load;
pub mod proxy;
pub mod server;
pub mod subscriber;
pub mod view;

use std::{
    collections::HashSet,
    fs,
    future::Future,
    time::{Duration, Instant},
};

/// How long anything may take before a test gives up on it.
const PATIENCE: Duration = Duration::from_secs(20);

/// How many tasks this runtime has at this moment.
pub fn tasks() -> usize {
    tokio::runtime::Handle::current()
        .metrics()
        .num_alive_tasks()
}

/// How many sockets of this process are connected to this port on 127.0.0.1.
pub fn sockets_to(port: u16) -> usize {
    let mine: HashSet<_> = fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .filter_map(|link| Some(link.to_str()?.strip_prefix("socket:[")?.to_owned()))
        .collect();
    let to = format!("0100007F:{port:04X}");
    let table = fs::read_to_string("/proc/net/tcp").unwrap();
    let connected = table.lines().filter(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        // The remote address, the state (01 is ESTABLISHED) and the inode.
        fields[2] == to && fields[3] == "01" && mine.contains(&format!("{}]", fields[9]))
    });
    connected.count()
}

/// Waits until it is so.
pub async fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    eventually_async(what, || std::future::ready(so())).await;
}

/// Waits until it is so.
pub async fn eventually_async<F: Future<Output = bool>>(what: &str, mut so: impl FnMut() -> F) {
    let began = Instant::now();
    while !so().await {
        assert!(began.elapsed() < PATIENCE, "it never came to this: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
