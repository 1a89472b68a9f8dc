//! Time, processor time and allocations, and what to make of many readings of them.

use std::{env, process::Command, time::Duration};

use nix::sys::{
    resource::{UsageWho, getrusage},
    time::TimeValLike as _,
};
use tokio::runtime::{self, Runtime};

/// How the client's process runs its calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Threads {
    /// Tokio's `current_thread` runtime.
    One,
    /// Tokio's multi-threaded runtime with two workers.
    Two,
}

impl Threads {
    pub(crate) fn runtime(self) -> Runtime {
        let mut builder = match self {
            Self::One => runtime::Builder::new_current_thread(),
            Self::Two => {
                let mut builder = runtime::Builder::new_multi_thread();
                builder.worker_threads(2);
                builder
            }
        };
        builder.enable_all().build().expect("a runtime")
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::One => "1 thread",
            Self::Two => "2 workers",
        }
    }
}

/// What this process has used of the processors so far, user's and system's time together.
pub(crate) fn processor_time() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).expect("a process may ask for its own usage");
    let micros = (usage.user_time() + usage.system_time()).num_microseconds();
    Duration::from_micros(u64::try_from(micros).unwrap_or_default())
}

/// How many allocations, reallocations among them, `run` makes on this thread.
///
/// The counter is always there, and costs some 20 instructions an allocation without any atomic: as all
/// candidates pay it in proportion, it changes no ratio by as much as 0.1 %.
pub(crate) fn allocations(run: impl FnOnce()) -> u64 {
    allocation_counter::measure(run).count_total
}

/// How many bytes are kept, on this thread, of what `make` makes; and that.
pub(crate) fn kept<T>(make: impl FnOnce() -> T) -> (i64, T) {
    let mut made = None;
    let info = allocation_counter::measure(|| made = Some(make()));
    (info.bytes_current, made.expect("it was made"))
}

/// Allocations a call, of a number of calls that `run` makes on this thread.
pub(crate) fn allocations_a_call(run: impl Fn(u64)) -> f64 {
    const CALLS: u64 = 10_000;
    // What is allocated before and after the calls goes out with the first of these.
    let [few, many] = [1, 1 + CALLS].map(|count| allocations(|| run(count)));
    many.saturating_sub(few) as f64 / CALLS as f64
}

/// The user-space instructions of this program, started anew with this variable in its environment, by valgrind: no noise
/// touches them. None where there is no valgrind.
pub(crate) fn instructions(variable: &str, value: String) -> Option<u64> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(env::current_exe().ok()?)
        .env(variable, value)
        .output()
        .ok()?;
    let said = String::from_utf8_lossy(&output.stderr);
    let collected = said.lines().find_map(|line| line.split_once("Collected :"));
    collected?.1.trim().parse().ok()
}

/// One reading of many calls.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slice {
    /// Processor time a call.
    pub(crate) cpu: Duration,
    /// The median time from a call to its answer.
    pub(crate) p50: Duration,
    pub(crate) calls_per_second: f64,
}

/// The least disturbed reading of several, each figure for itself.
pub(crate) fn best(slices: impl IntoIterator<Item = Slice>) -> Option<Slice> {
    slices.into_iter().reduce(|a, b| Slice {
        cpu: a.cpu.min(b.cpu),
        p50: a.p50.min(b.p50),
        calls_per_second: a.calls_per_second.max(b.calls_per_second),
    })
}

/// The median, in place.
pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The value that this share of them stay under, in place.
pub(crate) fn share(values: &mut [f64], of_all: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1);
    let rank = (last as f64 * of_all).round() as usize;
    values.get(rank).copied().unwrap_or(f64::NAN)
}

/// The value that `per_mille` of 1,000 stay under.
pub(crate) fn quantile(values: &mut [u32], per_mille: usize) -> Duration {
    if values.is_empty() {
        return Duration::ZERO;
    }
    let rank = (values.len() * per_mille / 1000).min(values.len() - 1);
    let (_, value, _) = values.select_nth_unstable(rank);
    Duration::from_nanos(u64::from(*value))
}

/// What a figure depends on and a reader should know.
pub(crate) fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown processor", |(_, model)| model);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or("unknown");
    format!("{cores} cores, {model}, load {load}")
}
