//! Calls that come when they come, whether those before them have ended or not.

use std::{
    thread,
    time::{Duration, Instant},
};

use nix::sys::prctl;
use tokio::runtime::Runtime;

use super::callers::Caller;

/// A call that has ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ended {
    /// When it was due, after the beginning.
    pub(crate) due: Duration,
    /// From then until it ended, however late it was made.
    pub(crate) took: Duration,
    pub(crate) answered: bool,
}

/// Moments at random, so many a second on average; the same ones for the same seed.
pub(crate) fn moments(a_second: f64, length: Duration, seed: u64) -> Vec<Duration> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut at = 0.0;
    let next = || {
        at -= (1.0 - random.f64()).ln() / a_second;
        Some(Duration::from_secs_f64(at))
    };
    let moments = std::iter::from_fn(next);
    moments.take_while(|at| *at < length).collect()
}

/// So many a second, one as far from the other as the next.
pub(crate) fn evenly(a_second: u32, length: Duration) -> Vec<Duration> {
    let pause = Duration::from_secs(1) / a_second;
    let moments = (0..).map(|n| n * pause);
    moments.take_while(|at| *at < length).collect()
}

/// See `Candidate::paced`.
pub(super) fn run<C: Caller>(
    caller: &C,
    runtime: &Runtime,
    began: Instant,
    moments: &[Duration],
    within: Duration,
) -> Vec<Ended> {
    // The kernel wakes a sleeper up to 50 µs late, unless asked not to. Where it refuses, all candidates are late.
    let _ = prctl::set_timerslack(1);
    let mut calls = Vec::with_capacity(moments.len());
    for due in moments {
        let (mut caller, due, at) = (caller.clone(), *due, began + *due);
        thread::sleep(at.saturating_duration_since(Instant::now()));
        calls.push(runtime.spawn(async move {
            let answered = caller.try_call(within).await;
            Ended {
                due,
                took: at.elapsed(),
                answered,
            }
        }));
    }
    runtime.block_on(async {
        let mut ended = Vec::with_capacity(calls.len());
        for call in calls {
            ended.push(call.await.expect("a call does not panic"));
        }
        ended
    })
}
