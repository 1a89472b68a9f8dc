//! The pool alone: what it adds to the service inside, against `Buffer` over `Balance`.

use crate::{
    report::{info, ratio},
    support::{
        measure::{Threads, median},
        pools::{self, Through},
    },
};

const ROUNDS: usize = 15;
const SLICES: usize = 12;
const ENDPOINTS: usize = 10;

pub(crate) fn run() {
    for (threads, callers, suffix) in [(Threads::One, 1, "1t"), (Threads::Two, 2, "2t")] {
        let runtime = threads.runtime();
        let time = |through: Through, endpoints| {
            let time = through.time(&runtime, endpoints, callers, through.slice());
            time.as_secs_f64() * 1e9 / through.slice() as f64
        };
        let candidates = [
            (Through::Inner, ENDPOINTS),
            (Through::BufferBalance, ENDPOINTS),
            (Through::Pool, 2),
            (Through::Pool, ENDPOINTS),
            (Through::Pool, 1000),
        ];
        let [mut buffer, mut pool_2, mut pool, mut pool_1000, mut ratios] =
            [(); 5].map(|()| Vec::new());
        for _ in 0..ROUNDS {
            let best = best_in_turns(&candidates, time);
            let over_inner = |i: usize| best[i] - best[0];
            buffer.push(over_inner(1));
            pool_2.push(over_inner(2));
            pool.push(over_inner(3));
            pool_1000.push(over_inner(4));
            ratios.push(over_inner(3) / over_inner(1));
        }
        let (ours, theirs) = (median(&mut pool), median(&mut buffer));
        ratio(
            &format!("pool_overhead_vs_buffer_balance_{suffix}"),
            median(&mut ratios),
            &format!(
                "pool's {ours:.0} ns over the inner service against Buffer(Balance)'s {theirs:.0}, {ENDPOINTS} endpoints, {callers} caller(s)"
            ),
        );
        info(
            &format!("pool_ns_over_inner_{suffix}"),
            ours,
            "ns a call over the bare inner service, 10 endpoints",
        );
        info(
            &format!("pool_ns_over_inner_2_endpoints_{suffix}"),
            median(&mut pool_2),
            "ns, 2 endpoints",
        );
        info(
            &format!("pool_ns_over_inner_1000_endpoints_{suffix}"),
            median(&mut pool_1000),
            "ns, 1,000 endpoints",
        );
        info(
            &format!("buffer_balance_ns_over_inner_{suffix}"),
            theirs,
            "ns, 10 endpoints",
        );
    }

    let runtime = Threads::One.runtime();
    let ours = Through::Pool.allocations(&runtime, ENDPOINTS);
    let theirs = Through::BufferBalance.allocations(&runtime, ENDPOINTS);
    ratio(
        "pool_allocs",
        ours,
        &format!("the pool's allocations a call, absolute; Buffer(Balance) makes {theirs:.1}"),
    );

    const CALLS: u64 = 10_000;
    let nowhere = (0..ROUNDS * SLICES).map(|_| pools::time_nowhere(&runtime, CALLS));
    let nowhere = nowhere.min().unwrap_or_default().as_secs_f64() * 1e9 / CALLS as f64;
    info(
        "pool_ns_no_endpoint",
        nowhere,
        "ns until a call with no endpoint has failed",
    );
}

/// The least time of each, all of them in turn for several slices.
fn best_in_turns<C: Copy, const N: usize>(
    candidates: &[(C, usize); N],
    time: impl Fn(C, usize) -> f64,
) -> [f64; N] {
    let mut best = [f64::INFINITY; N];
    for _ in 0..SLICES {
        for (best, (candidate, endpoints)) in best.iter_mut().zip(candidates) {
            *best = best.min(time(*candidate, *endpoints));
        }
    }
    best
}
