//! Time as a number of nanoseconds.

use std::{sync::OnceLock, time::Duration};

use tokio::time::Instant;

use super::NEVER;

/// The time, by tokio's clock, which tests can pause.
#[inline]
pub(crate) fn now() -> u64 {
    let age = Instant::now().saturating_duration_since(base());
    // 2^64 ns are 584 years.
    age.as_nanos() as u64
}

/// When a time is up that begins now.
#[inline]
pub(crate) fn after(timeout: Duration) -> u64 {
    let timeout = u64::try_from(timeout.as_nanos()).unwrap_or(NEVER);
    now().saturating_add(timeout).min(NEVER - 1)
}

pub(super) fn instant(at: u64) -> Instant {
    let base = base();
    // Further off than the clock goes is as good as a century.
    base.checked_add(Duration::from_nanos(at))
        .unwrap_or(base + Duration::from_secs(100 * 365 * 24 * 60 * 60))
}

/// Real time, and well before now: a runtime whose clock is paused may have begun earlier than this process first asked.
fn base() -> Instant {
    static BASE: OnceLock<Instant> = OnceLock::new();
    *BASE.get_or_init(|| {
        let now = std::time::Instant::now();
        let hours = [24, 1].map(|hours| Duration::from_secs(hours * 3600));
        let before = hours.iter().find_map(|before| now.checked_sub(*before));
        Instant::from_std(before.unwrap_or(now))
    })
}
