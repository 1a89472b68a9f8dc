//! What a registry costs: 10,000 sessions listed and applied, memory for each, and changes, from their PUT until
//! they can be called.
//!
//!     ./tests/run                      # gets an etcd, once
//!     SWITCHBOARD_ETCD=path/of/etcd cargo bench --bench registry
//!
//! Over a real etcd of its own, beside what one would write by hand: etcd's API through tonic, `serde_json`, and
//! a `tonic::transport::Channel` for each instance. The two take turns. It takes about a minute.

#[path = "../support/mod.rs"]
mod support;

#[path = "../../tests/support/etcd.rs"]
// It is the tests', and they use all of it.
#[allow(dead_code, unreachable_pub, clippy::expect_used)]
mod etcd;

mod by_hand;
mod changes;
mod lists;

use self::{
    etcd::{Etcd, pb},
    support::{
        measure::{Threads, machine},
        servers::{self, Servers},
    },
};

fn main() {
    servers::run_if_asked();
    if std::env::args().any(|argument| argument == "--test") {
        println!("registry: nothing to test; run it as a bench");
        return;
    }
    println!("registry: {}", machine());
    let servers = Servers::start(1);
    let runtime = Threads::Two.runtime();
    let etcd = runtime.block_on(Etcd::start());
    lists::run(&runtime, &etcd);
    changes::run(&runtime, &etcd, &servers);
    // It ends its process on a runtime's thread or without one.
    drop(etcd);
}

/// A record as grpc-go writes it.
fn put(key: String, address: &str) -> pb::PutRequest {
    let value = format!(
        r#"{{"Op":0,"Addr":"{address}","Metadata":{{"version":"2.6.0","metadata":{{"zone":"eu-1a"}}}}}}"#
    );
    pb::PutRequest {
        key: key.into_bytes().into(),
        value: value.into_bytes().into(),
        lease: 0,
    }
}

/// The n-th of many addresses that lead to this port.
fn address(n: usize, port: u16) -> String {
    format!(
        "127.{}.{}.{}:{port}",
        1 + n / 62_500,
        n / 250 % 250,
        1 + n % 250
    )
}

fn line(name: &str, ours: f64, theirs: f64, unit: &str, what: &str) {
    let ratio = ours / theirs;
    println!("{name:<34} {ours:>9.2} {unit:<3} {theirs:>9.2} {unit:<3} {ratio:>6.2}   {what}");
}
