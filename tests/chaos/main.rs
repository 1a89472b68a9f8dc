//! Calls under load while etcd, servers and networks fail: what fails of the calls, what is executed, and how long it takes
//! until all is well again.
//!
//!     ./tests/run                      # gets an etcd, once
//!     SWITCHBOARD_ETCD=path/of/etcd cargo test --all-features --test chaos -- --minutes 10
//!
//! Three etcds, six servers, four clients, all on this machine and started by this program; the servers are reached
//! through proxies, which can lose, hold, delay and reset what goes through: to a client, a server that stands still or is
//! killed looks so. Half of the servers take one call on a connection, so that there are several; of half of the clients
//! none gets older than 2 s; those of another half say whom they are for, as Milvus's do. Each call is written down on both sides.
//! Exits with 1 if anything happened that must not:
//!
//! - a call did not end in its time;
//! - one that was reported unsent was executed, or one that may not be repeated was executed twice;
//! - one went to a server whose session had been gone for more than 500 ms, or, though it said whom it was for, to another;
//! - one failed that could have gone elsewhere, or failed though nothing was done to its server;
//! - a server that was well was taken for gone, a watch told what was not so, a view was wrong for too long.
//!
//! A call that was sent to a server that was then killed may have been executed: it fails, and says so.

mod chaos;
mod ledger;
mod load;
mod reader;
mod world;

#[path = "../support/mod.rs"]
#[allow(clippy::expect_used, clippy::unwrap_used)]
mod support;

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use self::{chaos::Chaos, load::Load, world::World};

const HELP: &str = "\
usage: chaos [--minutes N] [--seed N]

Runs calls and chaos for so many minutes (default 3), in an order that the seed decides (default: a random one,
which is printed). Needs an etcd, 3.4 or later: its path in SWITCHBOARD_ETCD, or etcd on PATH.";

struct Arguments {
    length: Duration,
    seed: u64,
}

#[tokio::main]
async fn main() -> ExitCode {
    let Some(Arguments { length, seed }) = arguments() else {
        eprintln!("{HELP}");
        return ExitCode::from(2);
    };
    if let Err(why) = support::etcd::is_here() {
        eprintln!("{why}\n\n{HELP}");
        return ExitCode::from(2);
    }
    ledger::try_out();
    println!("three etcds, six servers, four clients; {length:?} of it; seed {seed}\n");
    let (mut world, mut etcds) = World::start(seed).await;
    let load = Load::start(&world, seed);
    let watching = world.watch();
    let mut chaos = Chaos::new(seed);
    let began = Instant::now();
    while began.elapsed() < length {
        let done = chaos.once(&mut world, &mut etcds).await;
        if done.too_long {
            let what = format!("it was too long until all was well, after: {}", done.what);
            world::lock(&world.truth()).is_wrong(&what);
        }
        let (calls, failed) = load.so_far();
        println!(
            "{:>7.1} s  {:<92} {:>9}  {calls:>8} calls, {failed} failed",
            began.elapsed().as_secs_f64(),
            done.what,
            match done.took {
                Some(took) => format!("{took:.1?}"),
                None => "NOT WELL".to_owned(),
            },
        );
    }
    let ran = began.elapsed();
    let tally = load.stop().await;
    watching.abort();

    println!("\ncalls");
    tally.print(ran);
    println!("\nuntil all is well again: every view exact and fresh, every server answers");
    chaos.print();
    let deleted = world.deleted();
    println!(
        "\netcd deleted the sessions of servers that were well {deleted} times: when it lost its data, and when a"
    );
    println!(
        "leader woke that had been paused, as etcds do before etcd-io/etcd#16822. Each registered again by itself."
    );
    let (counts, unlawful) = world.ledger().judge();
    println!(
        "\nof {} calls on record, {} executions; {} calls executed more than once, {} reported unsent",
        counts.calls, counts.executions, counts.again, counts.unsent
    );
    let wrong = world.wrong();
    println!("\nwhat must not be (seed {seed})");
    let all = wrong.iter().chain(&tally.wrong).chain(&unlawful);
    let mut well = true;
    for (what, times) in all {
        well = false;
        println!("  {times:>6} x  {what}");
    }
    world.stop().await;
    match well {
        true => {
            println!("  nothing of it happened.");
            ExitCode::SUCCESS
        }
        false => ExitCode::FAILURE,
    }
}

fn arguments() -> Option<Arguments> {
    let mut parsed = Arguments {
        length: Duration::from_secs(180),
        seed: fastrand::u64(..1_000_000),
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next()?;
        match name.as_str() {
            "--minutes" => {
                let minutes: f64 = value.parse().ok()?;
                let within = (0.1..=24.0 * 60.0).contains(&minutes);
                parsed.length = within.then(|| Duration::from_secs_f64(60.0 * minutes))?;
            }
            "--seed" => parsed.seed = value.parse().ok()?,
            _ => return None,
        }
    }
    Some(parsed)
}
