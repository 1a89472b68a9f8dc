//! User-space instructions a call, the one figure that noise does not touch.
//!
//! This program is started anew under `valgrind --tool=callgrind`, as a client that makes a given number
//! of calls to servers outside of valgrind. Two such runs of different lengths, subtracted, leave the
//! calls alone.

use std::{env, net::SocketAddr, process::exit};

use crate::{
    report::{info, ratio},
    support::{
        callers::Kind,
        measure::{self, Threads},
        servers::Servers,
    },
};

/// `<candidate> <threads> <in flight> <calls> <address>`: what a process that is started with it does,
/// instead of the bench. A profiler's way in too.
const ROLE: &str = "SWITCHBOARD_BENCH_CLIENT";
const KINDS: [(&str, Kind); 3] = [
    ("managed", Kind::Managed),
    ("channel", Kind::Channel),
    ("raw_h2", Kind::RawH2),
];
const IN_FLIGHT: usize = 64;
const FEW: usize = 640;
const MANY: usize = FEW + 3_840;

pub(crate) fn run() {
    let servers = Servers::start(1);
    let address = servers.addresses(1)[0];
    let mut found = Vec::new();
    for (name, _) in KINDS {
        let [Some(few), Some(many)] = [FEW, MANY].map(|calls| count(name, calls, address)) else {
            println!("# skipped: valgrind is missing, or does not run here");
            return;
        };
        let each = many.saturating_sub(few) as f64 / (MANY - FEW) as f64;
        found.push(each);
        let what = format!("user-space instructions a call, {IN_FLIGHT} in flight, 1 thread");
        info(&format!("instructions_{name}"), each, &what);
    }
    if let [managed, channel, raw] = found[..] {
        ratio(
            "managed_instructions_vs_channel_64",
            managed / channel,
            "managed against tonic Channel, instructions as above",
        );
        info(
            "managed_instructions_over_raw_h2",
            managed - raw,
            "instructions a call more than raw h2",
        );
    }
}

/// The instructions of a whole process that makes so many calls.
fn count(kind: &str, calls: usize, address: SocketAddr) -> Option<u64> {
    let role = format!("{kind} 1 {IN_FLIGHT} {calls} {address}");
    measure::instructions(ROLE, role)
}

/// In a process that was started as a client: makes the calls and does not return.
pub(crate) fn run_if_asked() {
    let Ok(role) = env::var(ROLE) else {
        return;
    };
    let words: Vec<_> = role.split(' ').collect();
    let [kind, threads, in_flight, calls, address] = words[..] else {
        panic!("{ROLE} wants five words");
    };
    let kind = KINDS.iter().find(|(name, _)| *name == kind);
    let (_, kind) = kind.expect("a known candidate");
    let threads = match threads {
        "1" => Threads::One,
        _ => Threads::Two,
    };
    let number = |word: &str| word.parse().expect("a number");
    let address = address.parse().expect("an address");
    threads.runtime().block_on(async {
        let candidate = kind.connect(&[address]).await;
        candidate.calls(number(in_flight), number(calls)).await;
    });
    exit(0);
}
