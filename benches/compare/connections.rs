//! One, two and four connections to a peer at most, beside the one of tonic's channels: what many callers gain.

use std::{collections::HashMap, time::Duration};

use crate::{
    report::ratio,
    support::{
        callers::{Candidate, Kind},
        cores::Cores,
        measure::{Slice, Threads, best, median},
        servers::Servers,
    },
};

const ROUNDS: usize = 7;
const SLICES: usize = 4;
const SLICE: Duration = Duration::from_millis(50);

/// How long callers are many before it counts: connections are opened by what is seen.
const SETTLE: Duration = Duration::from_millis(300);

const MOST: [usize; 3] = [1, 2, 4];

pub(crate) fn run() {
    let servers = Servers::start(4);
    for (threads, count, in_flight) in [
        (Threads::One, 1, 256),
        (Threads::Two, 1, 64),
        (Threads::Two, 1, 256),
        (Threads::Two, 4, 256),
    ] {
        compare(&servers, threads, count, in_flight);
    }
}

fn compare(servers: &Servers, threads: Threads, count: usize, in_flight: usize) {
    let (other, against) = match count {
        1 => (Kind::Channel, "channel"),
        _ => (Kind::Balance, "balance_channel"),
    };
    let cores = match threads {
        Threads::One => Cores::Apart,
        Threads::Two => Cores::Any,
    };
    let _placed = cores.place(servers);
    let runtime = threads.runtime();
    let kinds = MOST.map(Kind::ManagedOver).into_iter().chain([other]);
    let connected = kinds.map(|kind| {
        let candidate = runtime.block_on(kind.connect(servers.addresses(count)));
        runtime.block_on(candidate.slice(in_flight, SETTLE));
        (kind, candidate)
    });
    let candidates: Vec<(Kind, Candidate)> = connected.collect();
    let mut rounds: Vec<HashMap<Kind, Slice>> = Vec::new();
    for _ in 0..ROUNDS {
        let mut slices: HashMap<Kind, Vec<Slice>> = HashMap::new();
        for _ in 0..SLICES {
            for (kind, candidate) in &candidates {
                let slice = runtime.block_on(candidate.slice(in_flight, SLICE));
                slices.entry(*kind).or_default().push(slice);
            }
        }
        let all = slices.into_iter();
        rounds.push(
            all.filter_map(|(kind, all)| Some((kind, best(all)?)))
                .collect(),
        );
    }
    let suffix = match threads {
        Threads::One => "",
        Threads::Two => "_mt",
    };
    for most in MOST {
        let ours = Kind::ManagedOver(most);
        let figures = [
            (
                "cpu",
                "processor time a call",
                (|slice: &Slice| slice.cpu.as_secs_f64()) as fn(&Slice) -> f64,
            ),
            ("throughput", "calls a second", |slice| {
                slice.calls_per_second
            }),
        ];
        for (figure, words, of) in figures {
            let ratios = rounds
                .iter()
                .map(|round| of(&round[&ours]) / of(&round[&other]));
            let name = format!(
                "connections_{most}_{figure}_vs_{against}_{in_flight}_servers_{count}{suffix}"
            );
            let what = format!(
                "{words}, {ours} at most, over {other}'s; {in_flight} in flight, {}, {count} server(s)",
                threads.name()
            );
            ratio(&name, median(&mut ratios.collect::<Vec<_>>()), &what);
        }
    }
}
