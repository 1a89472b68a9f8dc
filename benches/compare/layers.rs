//! Each layer alone, and all of them over a pool: what they add to a whole gRPC request, beside tower's and
//! tower-resilience's.

use std::{env, process::exit};

use crate::{
    report::{info, ratio},
    support::{
        layers::{Answers, Stack},
        measure::{self, Threads, median},
    },
};

/// `<stack> <calls> <answers>`: what a process that is started with it calls, instead of the bench. A profiler's way in too.
const ROLE: &str = "SWITCHBOARD_BENCH_LAYER";
const ROUNDS: usize = 11;
const SLICES: usize = 10;
/// Less than so many ns is less than what the same calls differ by from one build to the next.
const NOISE: f64 = 20.0;

/// Ours, and what a user would pick instead.
const GROUPS: [(&str, Stack, &[Stack]); 5] = [
    (
        "gate",
        Stack::Gate,
        &[Stack::LoadShed, Stack::CircuitBreaker],
    ),
    ("cancel", Stack::Cancel, &[Stack::CancelByHand]),
    (
        "deadline",
        Stack::Deadline,
        &[Stack::Timeout, Stack::TimeLimiter],
    ),
    (
        "retry",
        Stack::Retry,
        &[Stack::TowerRetry, Stack::ResilienceRetry],
    ),
    (
        "all",
        Stack::Full,
        &[Stack::TowerFull, Stack::ResilienceFull],
    ),
];

pub(crate) fn run() {
    for (threads, callers, suffix) in [(Threads::One, 1, "1t"), (Threads::Two, 2, "2t")] {
        let runtime = threads.runtime();
        for (answers, when) in [(Answers::AtOnce, ""), (Answers::Later, "_pending")] {
            for (name, ours, theirs) in GROUPS {
                let mut candidates = vec![Stack::Nothing, Stack::NothingCloned, ours];
                candidates.extend(theirs);
                let mut over = vec![Vec::new(); candidates.len()];
                for _ in 0..ROUNDS {
                    let mut best = vec![f64::INFINITY; candidates.len()];
                    for _ in 0..SLICES {
                        for (best, stack) in best.iter_mut().zip(&candidates) {
                            let count = slice(*stack);
                            let time = stack.time(&runtime, answers, callers, count);
                            *best = best.min(time.as_secs_f64() * 1e9 / count as f64);
                        }
                    }
                    for (n, stack) in candidates.iter().enumerate() {
                        let base = match stack.base() {
                            Stack::Nothing => best[0],
                            _ => best[1],
                        };
                        over[n].push(best[n] - base);
                    }
                }
                let medians: Vec<_> = over.iter_mut().map(|times| median(times)).collect();
                info(
                    &format!("layer_{name}{when}_ns_{suffix}"),
                    medians[2],
                    &format!("ns, {} over nothing, {callers} caller(s)", ours.name()),
                );
                for (stack, theirs) in candidates.iter().zip(&medians).skip(3) {
                    if *theirs < NOISE {
                        println!("# {} adds {theirs:.0} ns: no ratio", stack.name());
                        continue;
                    }
                    ratio(
                        &format!("layer_{name}{when}_{suffix}"),
                        medians[2] / theirs,
                        &format!("against the {theirs:.0} ns of {}", stack.name()),
                    );
                }
            }
        }
    }

    let of_base = [Stack::Nothing, Stack::NothingCloned].map(instructions);
    let over_base = |stack: Stack| {
        let base = match stack.base() {
            Stack::Nothing => of_base[0],
            _ => of_base[1],
        };
        Some(instructions(stack)? - base?)
    };
    for (name, ours, theirs) in GROUPS {
        let theirs: Option<Vec<_>> = theirs
            .iter()
            .map(|stack| Some(format!("{} has {:.0}", stack.name(), over_base(*stack)?)))
            .collect();
        let (Some(ours), Some(theirs)) = (over_base(ours), theirs) else {
            println!("# no instructions: valgrind is missing, or does not run here");
            break;
        };
        info(
            &format!("layer_{name}_instructions"),
            ours,
            &format!("instructions a call over nothing; {}", theirs.join(", ")),
        );
    }

    let runtime = Threads::One.runtime();
    for (name, ours, theirs) in GROUPS {
        let allocations = |stack: Stack| {
            let base = stack.base().allocations(&runtime, Answers::Later);
            stack.allocations(&runtime, Answers::Later) - base
        };
        let theirs: Vec<_> = theirs
            .iter()
            .map(|stack| format!("{} makes {:.1}", stack.name(), allocations(*stack)))
            .collect();
        info(
            &format!("layer_{name}_allocations"),
            allocations(ours),
            &format!("allocations a call; {}", theirs.join(", ")),
        );
    }
}

/// How many calls take it some 5 ms.
const fn slice(stack: Stack) -> u64 {
    match stack {
        Stack::TowerFull | Stack::ResilienceFull => 2_500,
        _ => 20_000,
    }
}

/// The user-space instructions of a call.
fn instructions(stack: Stack) -> Option<f64> {
    const FEW: u64 = 1_000;
    const MANY: u64 = 11_000;
    let [few, many] =
        [FEW, MANY].map(|calls| measure::instructions(ROLE, format!("{stack:?} {calls} Later")));
    Some((many? - few?) as f64 / (MANY - FEW) as f64)
}

/// In a process that was started for it: makes the calls and does not return.
pub(crate) fn run_if_asked() {
    let Ok(role) = env::var(ROLE) else {
        return;
    };
    let words: Vec<_> = role.split(' ').collect();
    let [name, calls, answers] = words[..] else {
        panic!("{ROLE} wants three words");
    };
    let stack = Stack::ALL
        .into_iter()
        .find(|stack| format!("{stack:?}") == name)
        .expect("a known one");
    let answers = match answers {
        "AtOnce" => Answers::AtOnce,
        _ => Answers::Later,
    };
    let calls = calls.parse().expect("a number");
    stack.time(&Threads::One.runtime(), answers, 1, calls);
    exit(0);
}
