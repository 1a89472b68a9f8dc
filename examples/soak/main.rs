//! Calls under load while etcd and servers are killed, paused, restarted, compacted and emptied: what fails, and how
//! long it takes until all is well again.
//!
//!     ./tests/run                      # gets an etcd, once
//!     SWITCHBOARD_ETCD=path/of/etcd cargo run --release --example soak -- --minutes 10
//!
//! Three etcds, four servers, three clients, all on this machine and started by this program. Exits with 1 if
//! anything happened that must not: a wrong view, a server that was well and was taken for gone, a call that failed
//! and could have gone elsewhere. A call that was sent to a server that was then killed may have been executed: it
//! fails, and says so.

mod chaos;
mod load;
mod reader;
mod world;

// The tests' own etcds and servers; they use more of it.
#[path = "../../tests/support/mod.rs"]
#[allow(clippy::expect_used, clippy::unwrap_used)]
mod support;

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use self::{chaos::Chaos, load::Load, world::World};

const HELP: &str = "\
usage: soak [--minutes N] [--seed N]

Runs calls and chaos for so many minutes (default 1), in an order that the seed decides (default: a random one,
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
    println!("three etcds, four servers, three clients; {length:?} of it; seed {seed}\n");
    let began = Instant::now();
    let (mut world, mut etcds) = World::start().await;
    let load = Load::start(&world);
    let watching = world.watch();
    let mut chaos = Chaos::new(seed);
    while began.elapsed() < length {
        let (what, took) = chaos.once(&mut world, &mut etcds).await;
        let (calls, failed) = load.so_far();
        println!(
            "{:>7.1} s  {what:<62} {:>9}  {calls:>9} calls, {failed} failed",
            began.elapsed().as_secs_f64(),
            match took {
                Some(took) => format!("{took:.1?}"),
                None => "NOT WELL".to_owned(),
            },
        );
    }
    let tally = load.stop().await;
    watching.abort();

    println!("\ncalls");
    tally.print();
    println!("\nuntil all is well again: every view exact and fresh, every server answers");
    chaos.print();
    let deleted = world.deleted();
    println!(
        "\netcd deleted the sessions of servers that were well {deleted} times: when it lost its data, and when a"
    );
    println!(
        "leader woke that had been paused, as etcds do before etcd-io/etcd#16822. Each registered again by itself."
    );
    let wrong = world.wrong();
    println!("\nwhat must not be");
    for (what, times) in wrong.iter().chain(&tally.wrong) {
        println!("  {times:>6} x  {what}");
    }
    let well = wrong.is_empty() && tally.wrong.is_empty() && chaos.all_well();
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
        length: Duration::from_secs(60),
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
