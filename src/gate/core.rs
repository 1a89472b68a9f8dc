//! What a gate is, without its handle: it can be a field of whatever it guards.

use std::{borrow::Cow, fmt, sync::PoisonError, time::SystemTime};

use tokio::sync::Notify;

use super::GateState;
use crate::sync::{
    RwLock,
    atomic::{AtomicU8, Ordering},
    const_fn,
};

pub(super) type Reason = Cow<'static, str>;

/// A gate.
///
/// All that changes, changes under one lock, so that there is no protocol of atomics to prove: the one that
/// is here only mirrors the phase, for those who pass by. A call through an open gate reads it and nothing
/// else; the lock is for flips, probes, and calls that fail and want to say why. No foreign code runs under it.
pub(crate) struct Core {
    // Relaxed everywhere. Who passes by reads nothing else on the strength of it: a call that just misses a
    // flip is as good as one made an instant earlier. And who has read that it is not open, and goes on to
    // the lock to see why, sees what was written with that phase, or something later: it is stored under
    // the lock, and if the reader had the lock first, that store would come after the reader's load.
    phase: AtomicU8,
    inside: RwLock<Inside>,
    // Woken, all who wait, after every change.
    changed: Notify,
}

/// What stands behind the lock.
pub(super) struct Inside {
    pub(super) phase: Phase,
    /// Counts the flips. A probe remembers its own, and is void in any other.
    pub(super) epoch: u64,
    since: SystemTime,
    // Why it was shut, in the words of who shut it. Kept when it opens: a call that saw it shut may come for
    // its reason an instant later.
    reason: Reason,
    // What the last probe failed with. Apart, or the reason would grow with every probe.
    failed: Option<String>,
}

/// The states, ordered by what they let through: everything, one probe, nothing, nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(super) enum Phase {
    Open,
    /// Half open, its slot is free.
    Vacant,
    /// Half open, its probe is under way.
    Probing,
    Shut,
}

// === impl Core ===

impl Core {
    const_fn! {
        /// An open gate.
        pub(crate) fn new() -> Self {
            Self {
                phase: AtomicU8::new(Phase::Open as u8),
                inside: RwLock::new(Inside {
                    phase: Phase::Open,
                    epoch: 0,
                    since: SystemTime::UNIX_EPOCH,
                    reason: Cow::Borrowed(""),
                    failed: None,
                }),
                changed: Notify::const_new(),
            }
        }
    }

    /// One relaxed load.
    #[inline]
    pub(crate) fn is_open(&self) -> bool {
        self.phase.load(Ordering::Relaxed) == Phase::Open as u8
    }

    /// Whether a call has a chance: it is open, or half open with its slot free. One relaxed load.
    #[inline]
    pub(super) fn lets_through(&self) -> bool {
        self.phase.load(Ordering::Relaxed) <= Phase::Vacant as u8
    }

    /// Shuts it; `false` if it was shut already, and then the first reason stays: causes come before what
    /// follows from them.
    pub(crate) fn shut(&self, reason: impl Into<Reason>) -> bool {
        // Without the lock: many calls may find out at once.
        if self.phase.load(Ordering::Relaxed) == Phase::Shut as u8 {
            return false;
        }
        let reason = reason.into();
        let shut = self.change(|inside| {
            // (Open | Vacant | Probing) => Shut
            (inside.phase != Phase::Shut).then(|| {
                inside.flip(Phase::Shut);
                inside.reason = reason;
                inside.failed = None;
            })
        });
        shut.is_some()
    }

    pub(crate) fn open(&self) -> bool {
        let opened = self.change(|inside| {
            // (Vacant | Probing | Shut) => Open
            (inside.phase != Phase::Open).then(|| inside.flip(Phase::Open))
        });
        opened.is_some()
    }

    pub(super) fn half_open(&self) -> bool {
        let opened = self.change(|inside| {
            // Shut => Vacant
            (inside.phase == Phase::Shut).then(|| inside.flip(Phase::Vacant))
        });
        opened.is_some()
    }

    /// Takes the probe's slot, for one only; with the epoch in which the probe counts.
    pub(super) fn take_slot(&self) -> Option<u64> {
        if self.phase.load(Ordering::Relaxed) != Phase::Vacant as u8 {
            return None;
        }
        self.change(|inside| {
            // Vacant => Probing. No flip: to those outside it is half open, as before.
            (inside.phase == Phase::Vacant).then(|| {
                inside.phase = Phase::Probing;
                inside.epoch
            })
        })
    }

    /// The probe of this epoch says nothing: the next caller may try.
    pub(super) fn return_slot(&self, epoch: u64) {
        self.change(|inside| {
            // Probing => Vacant
            let mine = inside.is_probing_in(epoch);
            mine.then(|| inside.phase = Phase::Vacant)
        });
    }

    /// The probe of this epoch went well.
    pub(super) fn probed_good(&self, epoch: u64) {
        self.change(|inside| {
            // Probing => Open
            let mine = inside.is_probing_in(epoch);
            mine.then(|| inside.flip(Phase::Open))
        });
    }

    /// The probe of this epoch failed, with this.
    pub(super) fn probed_bad(&self, epoch: u64, with: String) {
        self.change(|inside| {
            // Probing => Shut, for the old reason
            inside.is_probing_in(epoch).then(|| {
                inside.flip(Phase::Shut);
                inside.failed = Some(with);
            })
        });
    }

    /// Why it is shut, or was the last time; empty if it never was.
    pub(crate) fn reason(&self) -> Reason {
        self.look(Inside::why)
    }

    /// Returns when it is not open: at once if it is not now.
    ///
    /// Cancel safe. A gate that shuts and opens again before this is polled goes unnoticed.
    pub(crate) async fn went_shut(&self) {
        self.until(|inside| (inside.phase != Phase::Open).then_some(()))
            .await;
    }

    /// Returns when it lets nobody through, not even a probe.
    pub(super) async fn went_past(&self) {
        self.until(|inside| (inside.phase > Phase::Vacant).then_some(()))
            .await;
    }

    /// Looks inside, now and after every change, until something is found.
    pub(super) async fn until<T>(&self, look: impl Fn(&Inside) -> Option<T>) -> T {
        loop {
            // From here on it is woken by every change, also before it is awaited. Then the look, under the lock that
            // a change is made under: one that the look missed comes after it, and is made known after this, too.
            let changed = self.changed.notified();
            let found = self.look(&look);
            if let Some(found) = found {
                return found;
            }
            changed.await;
        }
    }

    pub(super) fn look<T>(&self, look: impl FnOnce(&Inside) -> T) -> T {
        // Nothing that runs under the lock panics, and nothing is left half done if it did.
        look(&self.inside.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The one place where anything changes. `None` is no change.
    fn change<T>(&self, change: impl FnOnce(&mut Inside) -> Option<T>) -> Option<T> {
        let changed = {
            let mut inside = self.inside.write().unwrap_or_else(PoisonError::into_inner);
            let changed = change(&mut inside)?;
            self.phase.store(inside.phase as u8, Ordering::Relaxed);
            changed
        };
        self.changed.notify_waiters();
        Some(changed)
    }
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.look(Inside::state).fmt(f)
    }
}

// === impl Inside ===

impl Inside {
    fn flip(&mut self, phase: Phase) {
        self.phase = phase;
        self.epoch += 1;
        self.since = SystemTime::now();
    }

    fn is_probing_in(&self, epoch: u64) -> bool {
        self.phase == Phase::Probing && self.epoch == epoch
    }

    fn why(&self) -> Reason {
        match &self.failed {
            None => self.reason.clone(),
            Some(with) => format!("{} (last probe: {with})", self.reason).into(),
        }
    }

    pub(super) fn state(&self) -> GateState {
        let (since, reason) = (self.since, self.why());
        match self.phase {
            Phase::Open => GateState::Open,
            Phase::Vacant | Phase::Probing => GateState::HalfOpen { since, reason },
            Phase::Shut => GateState::Shut { since, reason },
        }
    }
}
