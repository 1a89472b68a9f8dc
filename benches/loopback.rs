//! Unary calls over loopback: the managed channel beside a bare tonic `Channel`, `balance_list` and raw h2.

mod support;

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use support::{
    callers::Kind,
    cores::Cores,
    measure::Threads,
    servers::{self, Servers},
};

fn loopback(c: &mut Criterion, servers: &Servers) {
    for count in [1, 4] {
        for in_flight in [1, 64, 256] {
            let cores = match in_flight {
                1 => Cores::Shared,
                _ => Cores::Apart,
            };
            let _placed = cores.place(servers);
            let runtime = Threads::One.runtime();
            let mut group = c.benchmark_group(format!(
                "loopback, {count} server(s), {in_flight} in flight"
            ));
            group
                .throughput(Throughput::Elements(1))
                .sample_size(20)
                .warm_up_time(Duration::from_millis(300))
                .measurement_time(Duration::from_secs(2));
            for kind in [Kind::Managed, Kind::Channel, Kind::Balance, Kind::RawH2] {
                if kind == Kind::Channel && count > 1 {
                    continue;
                }
                let candidate = runtime.block_on(kind.connect(servers.addresses(count)));
                group.bench_function(BenchmarkId::from_parameter(kind), |b| {
                    b.iter_custom(|calls| {
                        // Whole rounds: a task too few at the end would be idle time.
                        let calls = usize::try_from(calls).unwrap_or(usize::MAX);
                        let made = calls.next_multiple_of(in_flight);
                        let began = Instant::now();
                        runtime.block_on(candidate.calls(in_flight, made));
                        began.elapsed().mul_f64(calls as f64 / made as f64)
                    });
                });
            }
            group.finish();
        }
    }
}

fn main() {
    servers::run_if_asked();
    let servers = Servers::start(4);
    let mut criterion = Criterion::default().configure_from_args();
    loopback(&mut criterion, &servers);
    criterion.final_summary();
}
