//! The lines that are printed.

use std::time::Duration;

/// A figure of ours over the same figure of what a user would pick instead.
pub(crate) fn ratio(name: &str, value: f64, what: &str) {
    println!("ratio {name:<41} {value:>7.3}   {what}");
}

/// An absolute figure, to read a target from or to understand a ratio.
pub(crate) fn info(name: &str, value: f64, what: &str) {
    println!("info  {name:<41} {value:>7.1}   {what}");
}

pub(crate) fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}
