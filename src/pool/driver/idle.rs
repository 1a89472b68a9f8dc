//! When nobody has used a pool for long: it lets go of its connections until somebody does. It goes on listening to
//! discovery, so that whoever comes finds the endpoints known, whether the registry answers by then or not.

use std::{future::pending, time::Duration};

use tokio::time::{Interval, MissedTickBehavior, interval_at};

use super::Driver;
use crate::{
    Backoff,
    endpoint::{Connect, Target, task::Command},
    events::EventKind,
    pool::snapshot::{Phase, State},
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

impl<K, T, C> Driver<K, T, C>
where
    K: std::hash::Hash + Eq + Send + 'static,
    T: Target,
    C: Connect<T>,
{
    /// Whether anybody has used it since the last look, or is about to.
    pub(super) fn was_used(&self) -> bool {
        let mut used = self.shared.interest.forget();
        // All of them, so that each says so only once.
        for known in self.endpoints.values() {
            used |= known.ready.as_ref().is_some_and(|ready| ready.take_used());
            used |= known.retired.iter().any(|calls| calls.current() > 0);
        }
        used
    }

    /// Lets go of all connections. A call that was picked for an instant ago still has its own, and finishes on it.
    pub(super) fn sleep(&mut self) {
        self.asleep = true;
        self.next.asleep = true;
        let numbers: Vec<_> = self.endpoints.keys().copied().collect();
        for number in numbers {
            self.relieve(number, &Command::Drain(Backoff::LONGEST));
            let Some(known) = self.endpoints.get_mut(&number) else {
                continue;
            };
            if known.stands_in_for.is_some() {
                // It goes with whom it stands in for.
                continue;
            }
            known.end(Command::Drain(Backoff::LONGEST));
            let Some(task) = known.task.take() else {
                continue;
            };
            if let Some(ready) = known.ready.take() {
                ready.mark_down("nobody uses it");
            }
            known.state = State::new(Phase::Idle);
            known.former.retain(|task| !task.commands.is_closed());
            known.former.push(task);
            self.show(number);
        }
        self.dirty = true;
        self.tell(EventKind::Idle);
    }

    /// Connects all that are known.
    pub(super) fn wake(&mut self) {
        self.asleep = false;
        self.next.asleep = false;
        let mut by_key = std::mem::take(&mut self.by_key);
        for number in by_key.values_mut() {
            let known = self.endpoints.get(number);
            if known.is_some_and(|known| known.state.phase == Phase::Idle) {
                *number = self.start(*number);
            }
        }
        self.by_key = by_key;
        self.dirty = true;
        self.tell(EventKind::Woken);
    }
}
