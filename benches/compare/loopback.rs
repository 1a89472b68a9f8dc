//! Unary calls over loopback: processor time, latency, throughput and allocations of the client.

use std::{collections::HashMap, time::Duration};

use crate::{
    report::{info, micros, ratio},
    support::{
        callers::{Candidate, Kind},
        cores::Cores,
        measure::{Slice, Threads, allocations, best, median},
        servers::Servers,
    },
};

const ROUNDS: usize = 11;
const SLICES: usize = 5;
const SLICE: Duration = Duration::from_millis(50);

/// Candidates that take turns under the same conditions.
struct Scene {
    threads: Threads,
    cores: Cores,
    in_flight: usize,
    servers: usize,
    against: &'static [Against],
}

/// The figures of managed over those of one other.
struct Against(Kind, &'static [Figure]);

#[derive(Clone, Copy)]
enum Figure {
    Cpu,
    P50,
    Throughput,
}

use Figure::{Cpu, P50, Throughput};

const SCENES: &[Scene] = &[
    Scene {
        threads: Threads::One,
        cores: Cores::Shared,
        in_flight: 1,
        servers: 1,
        against: &[Against(Kind::Channel, &[Cpu, P50])],
    },
    Scene {
        threads: Threads::One,
        cores: Cores::Apart,
        in_flight: 64,
        servers: 1,
        against: &[
            Against(Kind::Channel, &[Cpu, P50, Throughput]),
            Against(Kind::RawH2, &[Cpu]),
        ],
    },
    Scene {
        threads: Threads::One,
        cores: Cores::Apart,
        in_flight: 64,
        servers: 4,
        against: &[Against(Kind::Balance, &[Cpu])],
    },
    Scene {
        threads: Threads::Two,
        cores: Cores::Any,
        in_flight: 1,
        servers: 1,
        against: &[Against(Kind::Channel, &[Cpu, P50])],
    },
    Scene {
        threads: Threads::Two,
        cores: Cores::Any,
        in_flight: 64,
        servers: 1,
        against: &[
            Against(Kind::Channel, &[Cpu, P50, Throughput]),
            Against(Kind::RawH2, &[Cpu]),
        ],
    },
    Scene {
        threads: Threads::Two,
        cores: Cores::Any,
        in_flight: 256,
        servers: 1,
        against: &[Against(Kind::Channel, &[Throughput])],
    },
    Scene {
        threads: Threads::Two,
        cores: Cores::Any,
        in_flight: 64,
        servers: 4,
        against: &[Against(Kind::Balance, &[Cpu])],
    },
    Scene {
        threads: Threads::Two,
        cores: Cores::Any,
        in_flight: 256,
        servers: 4,
        against: &[Against(Kind::Balance, &[Throughput])],
    },
];

pub(crate) fn run() {
    let servers = Servers::start(4);
    for scene in SCENES {
        scene.run(&servers);
    }
    count_allocations(&servers);
}

// === impl Scene ===

impl Scene {
    fn run(&self, servers: &Servers) {
        let _placed = self.cores.place(servers);
        let runtime = self.threads.runtime();
        let addresses = servers.addresses(self.servers);
        let mut candidates: HashMap<Kind, Candidate> = HashMap::new();
        let kinds = self.against.iter().map(|against| against.0);
        for kind in kinds.chain([Kind::Managed]) {
            candidates.insert(kind, runtime.block_on(kind.connect(addresses)));
        }
        let mut rounds: Vec<HashMap<Kind, Slice>> = Vec::new();
        for _ in 0..ROUNDS {
            let mut slices: HashMap<Kind, Vec<Slice>> = HashMap::new();
            for _ in 0..SLICES {
                for (kind, candidate) in &candidates {
                    let slice = runtime.block_on(candidate.slice(self.in_flight, SLICE));
                    slices.entry(*kind).or_default().push(slice);
                }
            }
            let best = slices
                .into_iter()
                .filter_map(|(kind, all)| Some((kind, best(all)?)));
            rounds.push(best.collect());
        }
        for Against(other, figures) in self.against {
            for figure in *figures {
                self.report(*other, *figure, &rounds);
            }
        }
    }

    fn report(&self, other: Kind, figure: Figure, rounds: &[HashMap<Kind, Slice>]) {
        let of = |kind: Kind| rounds.iter().map(move |round| figure.of(&round[&kind]));
        let mut ratios: Vec<f64> = of(Kind::Managed)
            .zip(of(other))
            .map(|(a, b)| a / b)
            .collect();
        let [ours, theirs] =
            [Kind::Managed, other].map(|kind| median(&mut of(kind).collect::<Vec<_>>()));
        let against = match other {
            Kind::RawH2 => "raw_h2",
            Kind::Balance => "balance_channel",
            _ => "channel",
        };
        let suffix = match self.threads {
            Threads::One => "",
            Threads::Two => "_mt",
        };
        let name = format!(
            "managed_{}_vs_{against}_{}{suffix}",
            figure.name(),
            self.in_flight
        );
        let what = format!(
            "{} {ours:.1} against {other}'s {theirs:.1}, {} in flight, {}{}, {}",
            figure.words(),
            self.in_flight,
            self.threads.name(),
            self.cores.name(),
            match self.servers {
                1 => "1 server".to_owned(),
                many => format!("{many} servers"),
            }
        );
        ratio(&name, median(&mut ratios), &what);
    }
}

// === impl Figure ===

impl Figure {
    fn of(self, slice: &Slice) -> f64 {
        match self {
            Cpu => micros(slice.cpu),
            P50 => micros(slice.p50),
            Throughput => slice.calls_per_second / 1e3,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Cpu => "cpu",
            P50 => "p50",
            Throughput => "throughput",
        }
    }

    const fn words(self) -> &'static str {
        match self {
            Cpu => "processor µs a call",
            P50 => "median µs to the answer",
            Throughput => "thousand calls a second",
        }
    }
}

fn count_allocations(servers: &Servers) {
    const CALLS: usize = 5_000;
    let runtime = Threads::One.runtime();
    let count = |kind: Kind| {
        let candidate = runtime.block_on(kind.connect(servers.addresses(1)));
        let made = allocations(|| runtime.block_on(candidate.calls(1, CALLS)));
        made as f64 / CALLS as f64
    };
    let [ours, theirs, raw] = [Kind::Managed, Kind::Channel, Kind::RawH2].map(count);
    ratio(
        "managed_allocs_vs_channel",
        ours / theirs,
        &format!("allocations a call {ours:.1} against tonic Channel's {theirs:.1}"),
    );
    info("allocs_managed", ours, "allocations a call");
    info("allocs_channel", theirs, "allocations a call");
    info("allocs_raw_h2", raw, "allocations a call");
}
