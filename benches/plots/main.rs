//! `cargo bench --bench plots [-- --quick] [throughput | latency | recovery]`: what this crate and tonic's
//! channels do under the same calls, measured, printed, and drawn into `docs/plots/`, in under four minutes.
//! A quick one draws elsewhere: its figures are too few to keep.
//!
//! Candidates take turns, round by round, so that what else the machine does falls on all of them.

// A bench has nobody to hand an error to.
#![allow(clippy::expect_used)]

#[path = "../support/mod.rs"]
mod support;

mod draw;
mod latency;
mod recovery;
mod throughput;

use std::{fs, path::PathBuf, time::Instant};

use support::{measure, servers};

/// How much is measured, and where it is drawn.
struct Plan {
    quick: bool,
    folder: PathBuf,
}

fn main() {
    servers::run_if_asked();
    let plan = Plan::new(std::env::args().any(|arg| arg == "--quick"));
    fs::create_dir_all(&plan.folder).expect("a folder for the plots");
    let began = Instant::now();
    println!("# {}", measure::machine());
    // cargo adds `--bench`; anything else is a plot's name.
    let args = std::env::args().skip(1);
    let filters: Vec<_> = args.filter(|arg| !arg.starts_with('-')).collect();
    for (name, run) in [
        ("throughput", throughput::run as fn(&Plan)),
        ("latency", latency::run),
        ("recovery", recovery::run),
    ] {
        if filters.is_empty() || filters.iter().any(|filter| filter == name) {
            run(&plan);
        }
    }
    println!("# drawn into {}", plan.folder.display());
    println!("# {:.0} s", began.elapsed().as_secs_f64());
}

// === impl Plan ===

impl Plan {
    fn new(quick: bool) -> Self {
        let folder = match quick {
            true => concat!(env!("CARGO_TARGET_TMPDIR"), "/plots"),
            false => concat!(env!("CARGO_MANIFEST_DIR"), "/docs/plots"),
        };
        Self {
            quick,
            folder: folder.into(),
        }
    }

    /// How often the candidates take turns.
    const fn rounds(&self, full: usize) -> usize {
        match self.quick {
            true => full.div_ceil(5),
            false => full,
        }
    }
}

/// What every plot says of where it was measured.
fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!(
        "One {cores}-core machine, client and servers together, over loopback; unary calls of 16 bytes there and back."
    )
}

fn thousands(n: u32) -> String {
    match n {
        ..1_000 => n.to_string(),
        _ => format!("{},{:03}", n / 1_000, n % 1_000),
    }
}
