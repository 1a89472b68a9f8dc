//! When nobody has used a pool for long: it lets go of its connections, and of the registry, until somebody does.

use std::{future::pending, time::Duration};

use tokio::time::{Interval, MissedTickBehavior, interval_at};

use super::Driver;
use crate::{
    endpoint::{Connect, task::Command},
    events::EventKind,
    pool::snapshot::{Resolution, Snapshot},
};

/// Into how many looks the time is divided: so idleness is noticed at most a quarter late, and no call reads a
/// clock for it.
const LOOKS: u32 = 4;

/// When to look whether anybody uses the pool.
pub(super) struct Sweeps {
    /// None if it is never idle.
    interval: Option<Interval>,
    quiet: u32,
}

// === impl Sweeps ===

impl Sweeps {
    pub(super) fn new(idle_after: Option<Duration>) -> Self {
        let interval = idle_after.map(|after| {
            let every = after / LOOKS;
            let mut interval = interval_at(tokio::time::Instant::now() + every, every);
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
            interval
        });
        Self { interval, quiet: 0 }
    }

    /// Until the next look. Cancel safe.
    pub(super) async fn due(&mut self) {
        match &mut self.interval {
            Some(interval) => drop(interval.tick().await),
            None => pending().await,
        }
    }

    /// Takes down what a look has seen; true if it has been quiet for long enough.
    pub(super) fn quiet(&mut self, used: bool) -> bool {
        self.quiet = if used { 0 } else { self.quiet + 1 };
        self.quiet >= LOOKS
    }

    pub(super) fn reset(&mut self) {
        self.quiet = 0;
        if let Some(interval) = &mut self.interval {
            interval.reset();
        }
    }
}

// === impl Driver ===

impl<K, T, C: Connect<T>> Driver<K, T, C> {
    pub(super) fn is_idle(&self) -> bool {
        matches!(self.next.resolution, Resolution::Idle)
    }

    /// Whether anybody has used it since the last look, or is about to.
    pub(super) fn was_used(&self) -> bool {
        let held = self.shared.interest.forget();
        // All of them, so that each says so only once.
        let used = self.endpoints.values().filter_map(|e| e.ready.as_ref());
        held | used.fold(false, |any, ready| any | ready.take_used())
    }

    /// Calls that were picked for an instant ago still find their connections, and finish on them.
    pub(super) fn become_idle(&mut self) {
        self.let_go_of_all(&Command::Drain(self.shared.config.drain));
        self.next = Snapshot::empty();
        self.next.resolution = Resolution::Idle;
        self.failing_since = None;
        self.dirty = true;
        self.setup.bus.tell(&self.shared.role, EventKind::Idle);
    }
}
