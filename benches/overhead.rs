//! What the pool and the gate add to a service that does nothing, beside tower's `Balance` and `Buffer` over `Balance`; and what
//! each layer adds to one that answers whole gRPC requests, beside tower's and tower-resilience's.

mod support;

use std::{hint::black_box, time::Duration};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use support::{
    layers::{Answers, Stack},
    measure::Threads,
    pools::{self, Through},
};

const ENDPOINTS: [usize; 4] = [2, 10, 100, 1_000];

fn overhead(c: &mut Criterion) {
    for (threads, callers, name) in [
        (Threads::One, 1, "1 thread"),
        (Threads::Two, 2, "2 threads"),
    ] {
        let runtime = threads.runtime();
        let mut group = c.benchmark_group(format!("overhead, {name}"));
        group
            .sample_size(20)
            .warm_up_time(Duration::from_millis(200))
            .measurement_time(Duration::from_secs(1));
        for through in [Through::Inner, Through::Gate] {
            group.bench_function(through.name(), |b| {
                b.iter_custom(|calls| through.time(&runtime, 1, callers, calls));
            });
        }
        for through in [Through::Pool, Through::Balance, Through::BufferBalance] {
            if through == Through::Balance && callers > 1 {
                continue;
            }
            for endpoints in ENDPOINTS {
                group.bench_function(BenchmarkId::new(through.name(), endpoints), |b| {
                    b.iter_custom(|calls| through.time(&runtime, endpoints, callers, calls));
                });
            }
        }
        group.finish();
    }
}

fn layers(c: &mut Criterion) {
    for (threads, callers, name) in [
        (Threads::One, 1, "1 thread"),
        (Threads::Two, 2, "2 threads"),
    ] {
        let runtime = threads.runtime();
        for (answers, when) in [
            (Answers::AtOnce, "ready at once"),
            (Answers::Later, "pending once"),
        ] {
            let mut group = c.benchmark_group(format!("layers, {name}, {when}"));
            group
                .sample_size(20)
                .warm_up_time(Duration::from_millis(200))
                .measurement_time(Duration::from_secs(1));
            for stack in Stack::ALL {
                group.bench_function(stack.name(), |b| {
                    b.iter_custom(|calls| stack.time(&runtime, answers, callers, calls));
                });
            }
            group.finish();
        }
    }
}

fn nowhere(c: &mut Criterion) {
    let runtime = Threads::One.runtime();
    c.bench_function("a call with no endpoint", |b| {
        b.iter_custom(|calls| black_box(pools::time_nowhere(&runtime, calls)));
    });
}

fn shut(c: &mut Criterion) {
    let runtime = Threads::One.runtime();
    for (owned, name) in [(false, "a literal"), (true, "a String")] {
        c.bench_function(&format!("a call at a shut gate, for {name}"), |b| {
            b.iter_custom(|calls| black_box(pools::time_shut(&runtime, owned, calls)));
        });
    }
}

/// Not a time, so printed beside criterion's.
fn allocations(_: &mut Criterion) {
    let runtime = Threads::One.runtime();
    for through in [
        Through::Inner,
        Through::Gate,
        Through::Pool,
        Through::Balance,
        Through::BufferBalance,
    ] {
        let made = through.allocations(&runtime, 10);
        println!("allocations a call, {}: {made:.2}", through.name());
    }
    for stack in Stack::ALL {
        let made = stack.allocations(&runtime, Answers::Later);
        println!("allocations a call, {}: {made:.2}", stack.name());
    }
}

criterion_group!(benches, overhead, layers, nowhere, shut, allocations);
criterion_main!(benches);
