//! What the integration tests share: servers, proxies, etcds, and waiting for what is to happen.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test file uses its part of it"
)]
pub mod etcd;
pub mod proxy;
pub mod server;

use std::{
    future::Future,
    time::{Duration, Instant},
};

/// How long anything may take before a test gives up on it.
const PATIENCE: Duration = Duration::from_secs(20);

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
