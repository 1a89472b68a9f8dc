//! Large messages and streams: processor time a byte and throughput, beside tonic's channel; and what the size of
//! flow-control windows does to them.

use std::{collections::HashMap, time::Duration};

use crate::{
    report::{info, ratio},
    support::{
        callers::{Candidate, Kind, Load},
        measure::{Slice, Threads, best, median},
        servers::Servers,
    },
};

const ROUNDS: usize = 7;
const SLICES: usize = 3;
const SLICE: Duration = Duration::from_millis(100);

const MIB: usize = 1 << 20;

/// A load, its name, and how many calls of it are in flight.
const LOADS: [(&str, Load, usize); 4] = [
    ("unary_1mib", Load::Unary(MIB), 1),
    ("unary_1mib", Load::Unary(MIB), 8),
    ("download_16kib", Load::Download(256, 16 << 10), 2),
    ("upload_16kib", Load::Upload(256, 16 << 10), 2),
];

const WINDOWS: [u32; 5] = [64, 256, 1024, 2048, 4096];

pub(crate) fn run() {
    let servers = Servers::start(1);
    for (name, load, in_flight) in LOADS {
        let rounds = compare(&servers, load, in_flight, &[Kind::Managed, Kind::Channel]);
        for (figure, of) in FIGURES {
            let ours = median_of(&rounds, Kind::Managed, Kind::Channel, of);
            let what =
                format!("{figure}, managed over tonic Channel's; {in_flight} in flight, 2 workers");
            let figure = figure.split(' ').next().unwrap_or_default();
            ratio(
                &format!("bytes_{name}_{figure}_vs_channel_{in_flight}"),
                ours,
                &what,
            );
        }
    }
    for (name, load, in_flight) in [LOADS[0], LOADS[2]] {
        let kinds = WINDOWS.map(Kind::ManagedWith);
        let rounds = compare(&servers, load, in_flight, &kinds);
        for kind in kinds {
            let Kind::ManagedWith(kib) = kind else {
                continue;
            };
            let mut each: Vec<f64> = rounds.iter().map(|r| r[&kind].calls_per_second).collect();
            let rate = median(&mut each) * load.bytes() as f64 / 1e6;
            info(
                &format!("bytes_{name}_window_{kib}kib"),
                rate,
                &format!("MB a second, {kind} for a stream, {in_flight} in flight, 2 workers"),
            );
        }
    }
}

type Figure = (&'static str, fn(&Slice) -> f64);

const FIGURES: [Figure; 2] = [
    ("cpu a byte", |slice| slice.cpu.as_secs_f64()),
    ("throughput", |slice| slice.calls_per_second),
];

fn compare(
    servers: &Servers,
    load: Load,
    in_flight: usize,
    kinds: &[Kind],
) -> Vec<HashMap<Kind, Slice>> {
    let runtime = Threads::Two.runtime();
    let connected = kinds.iter().map(|kind| {
        let candidate = runtime.block_on(kind.connect_for(load, servers.addresses(1)));
        (*kind, candidate)
    });
    let candidates: Vec<(Kind, Candidate)> = connected.collect();
    let rounds = (0..ROUNDS).map(|_| {
        let mut slices: HashMap<Kind, Vec<Slice>> = HashMap::new();
        for _ in 0..SLICES {
            for (kind, candidate) in &candidates {
                let slice = runtime.block_on(candidate.slice(in_flight, SLICE));
                slices.entry(*kind).or_default().push(slice);
            }
        }
        let all = slices.into_iter();
        all.filter_map(|(kind, all)| Some((kind, best(all)?)))
            .collect()
    });
    rounds.collect()
}

fn median_of(
    rounds: &[HashMap<Kind, Slice>],
    ours: Kind,
    theirs: Kind,
    of: fn(&Slice) -> f64,
) -> f64 {
    let ratios = rounds
        .iter()
        .map(|round| of(&round[&ours]) / of(&round[&theirs]));
    median(&mut ratios.collect::<Vec<_>>())
}
