//! `cargo bench --bench compare [-- pool | layers | updates | loopback | connections | bytes | windows | ends | instructions]`: every figure that the crate is judged
//! by, against what a user would pick instead, in one run of a few minutes.
//!
//! Shared machines stall often. So the candidates take turns, slice by slice; of several short slices in
//! a round the best counts, each figure for itself; and a ratio is the median over the rounds of the
//! ratios within them. `ratio` lines are `ratio <name> <value> <what against what>`, `info` lines
//! `info <name> <value> <of what>`; whatever else is printed begins with `#`.

// A bench has nobody to hand an error to.
#![allow(clippy::expect_used)]

#[path = "../support/mod.rs"]
mod support;

mod bytes;
mod connections;
mod ends;
mod instructions;
mod layers;
mod loopback;
mod pool;
mod report;
mod updates;
mod windows;

use std::time::Instant;

use support::{measure, servers};

fn main() {
    servers::run_if_asked();
    instructions::run_if_asked();
    layers::run_if_asked();

    // cargo adds `--bench`; anything else is the part of a group's name.
    let filters: Vec<_> = std::env::args()
        .skip(1)
        .filter(|arg| !arg.starts_with('-'))
        .collect();
    let wanted = |group: &str| filters.is_empty() || filters.iter().any(|f| group.contains(&**f));

    let began = Instant::now();
    println!("# {}", measure::machine());
    for (group, run) in [
        ("pool", pool::run as fn()),
        ("layers", layers::run),
        ("updates", updates::run),
        ("loopback", loopback::run),
        ("connections", connections::run),
        ("bytes", bytes::run),
        ("windows", windows::run),
        ("ends", ends::run),
        ("instructions", instructions::run),
    ] {
        if wanted(group) {
            println!("#\n# {group}");
            run();
        }
    }
    println!("#\n# {:.0} s", began.elapsed().as_secs_f64());
}
