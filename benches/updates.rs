//! One change of the set: from discovery's word to the snapshot that calls pick from, while picks go on.

mod support;

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use support::{fleet::Fleet, measure::Threads};
use tokio::time::sleep;

const ENDPOINTS: [usize; 3] = [10, 1_000, 10_000];

fn changes(c: &mut Criterion) {
    let mut group = c.benchmark_group("one change");
    group
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2));
    for endpoints in ENDPOINTS {
        let runtime = Threads::One.runtime();
        let fleet = runtime.block_on(Fleet::new(endpoints));
        let _picking = fleet.picking();
        // Of each pair of changes one is timed.
        let pairs = |count: u64, timed: fn(Duration, Duration) -> Duration| {
            runtime.block_on(async {
                let mut total = Duration::ZERO;
                for i in 0..count {
                    let id = usize::try_from(i).unwrap_or_default() % endpoints;
                    let removed = fleet.remove(id).await;
                    total += timed(removed, fleet.insert(id).await);
                }
                total
            })
        };
        group.bench_function(BenchmarkId::new("an instance goes", endpoints), |b| {
            b.iter_custom(|count| pairs(count, |removed, _| removed));
        });
        group.bench_function(BenchmarkId::new("an instance comes", endpoints), |b| {
            b.iter_custom(|count| pairs(count, |_, inserted| inserted));
        });
    }
    group.finish();
}

/// A quantile, so printed beside criterion's means.
fn picks(_: &mut Criterion) {
    for endpoints in ENDPOINTS {
        let runtime = Threads::One.runtime();
        runtime.block_on(async {
            let fleet = Fleet::new(endpoints).await;
            let still = fleet.picking();
            sleep(Duration::from_secs(1)).await;
            let still = still.p99();
            let changing = fleet.picking();
            for i in 0..500 {
                fleet.remove(i % endpoints).await;
                fleet.insert(i % endpoints).await;
                sleep(Duration::from_millis(1)).await;
            }
            let changing = changing.p99();
            println!("picks' p99 at {endpoints} endpoints: {still:?} still, {changing:?} with 1,000 changes a second");
        });
    }
}

criterion_group!(benches, changes, picks);
criterion_main!(benches);
