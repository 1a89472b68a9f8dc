//! The slots of pending calls, sharded by thread.

use std::{
    cell::Cell,
    num::NonZeroU32,
    panic::{self, AssertUnwindSafe},
    sync::{OnceLock, PoisonError, atomic::AtomicUsize},
    task::{Context, Waker},
    thread,
};

use slab::Slab;

use crate::sync::{
    Mutex, MutexGuard, Padded,
    atomic::{AtomicU64, Ordering},
};

/// A time that never comes.
pub(crate) const NEVER: u64 = u64::MAX;

/// A shard that is empty may keep so many places.
const SPACIOUS: usize = 1024;

/// Pending calls: how to wake each, and when its time is up.
///
/// A slot costs an uncontended lock to arm and one to disarm, and no allocation once its shard has grown. A thread has
/// a shard of its own as long as there are no more threads than shards.
///
/// No foreign code runs under a lock: wakers are cloned before, and woken and dropped after it.
pub(crate) struct Table {
    shards: Box<[Padded<Mutex<Shard>>]>,
    // When the sweeper looks next, as far as it knows. Relaxed: whoever arms a slot reads it after it has let go of the
    // shard's lock. If the sweeper has had that lock before, what it stored before that is seen here, or something
    // later: so an earlier time is never taken for one that the sweeper knows. If it has not, it will see the slot.
    next: Padded<AtomicU64>,
}

struct Shard {
    slots: Slab<Slot>,
    /// No slot's time is up before this. A slot that is disarmed leaves it as it is.
    earliest: u64,
}

struct Slot {
    /// Taken when it was woken, for whatever reason.
    waker: Option<Waker>,
    at: u64,
    /// The sweeper has found its time to be up.
    expired: bool,
    /// Whose it is, for those who wake some of a table only.
    tag: usize,
}

/// Calls that are to be woken: those too that are left when this is dropped.
pub(super) struct Wakers(Vec<Waker>);

/// A slot of a table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Key {
    /// From 1 up, so that the lack of a key takes no place.
    shard: NonZeroU32,
    slot: u32,
}

/// What a look at an armed slot found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// It waits, with this waker.
    Waits,
    /// It was woken since, and is disarmed.
    Woken,
    /// The same, because its time was up.
    Expired,
    /// It waits, and another task polls it than before.
    Moved,
}

// === impl Table ===

impl Table {
    /// For calls from all threads.
    pub(crate) fn new() -> Self {
        static SHARDS: OnceLock<usize> = OnceLock::new();
        let shards = SHARDS.get_or_init(|| {
            let threads = thread::available_parallelism().map_or(1, usize::from);
            (2 * threads).next_power_of_two().min(64)
        });
        Self::with_shards(*shards)
    }

    /// For one call, or a few.
    pub(crate) fn small() -> Self {
        Self::with_shards(1)
    }

    fn with_shards(shards: usize) -> Self {
        let shard = || {
            Padded(Mutex::new(Shard {
                slots: Slab::new(),
                earliest: NEVER,
            }))
        };
        Self {
            shards: (0..shards).map(|_| shard()).collect(),
            next: Padded(AtomicU64::new(NEVER)),
        }
    }

    /// Arms a slot. The second is true if the sweeper has to be told: this is earlier than it would look.
    pub(super) fn arm(&self, waker: Waker, at: u64, tag: usize) -> (Key, bool) {
        self.arm_in(this_thread() % self.shards.len(), waker, at, tag)
    }

    fn arm_in(&self, shard: usize, waker: Waker, at: u64, tag: usize) -> (Key, bool) {
        let slot = Slot {
            waker: Some(waker),
            at,
            expired: false,
            tag,
        };
        let (slot, earlier) = match self.lock(shard) {
            Some(mut shard) => {
                let earlier = at < shard.earliest;
                if earlier {
                    shard.earliest = at;
                }
                (shard.slots.insert(slot), earlier)
            }
            // There is at least one shard.
            None => (usize::MAX, false),
        };
        let sooner = earlier && at < self.next.load(Ordering::Relaxed);
        (Key::new(shard, slot), sooner)
    }

    /// Sees to it that an armed slot wakes this task.
    pub(super) fn look(&self, key: Key, cx: &Context<'_>) -> Look {
        let Some(mut shard) = self.lock(key.shard()) else {
            return Look::Woken;
        };
        match shard.slots.get(key.slot()) {
            Some(Slot {
                waker: Some(waker), ..
            }) if waker.will_wake(cx.waker()) => return Look::Waits,
            Some(Slot { waker: Some(_), .. }) => {}
            Some(_) | None => return shard.woken(key.slot()),
        }
        // Another task has it now.
        drop(shard);
        let mut waker = Some(cx.waker().clone());
        let look = match self.lock(key.shard()) {
            Some(mut shard) => match shard.slots.get_mut(key.slot()) {
                Some(slot) if slot.waker.is_some() => {
                    std::mem::swap(&mut slot.waker, &mut waker);
                    Look::Moved
                }
                Some(_) | None => shard.woken(key.slot()),
            },
            None => Look::Woken,
        };
        drop(waker);
        look
    }

    pub(super) fn disarm(&self, key: Key) {
        let slot = self
            .lock(key.shard())
            .and_then(|mut shard| shard.slots.try_remove(key.slot()));
        drop(slot);
    }

    /// Wakes all calls, or all of this tag.
    pub(crate) fn wake(&self, tag: Option<usize>) {
        for shard in 0..self.shards.len() {
            let mut wakers = Vec::new();
            if let Some(mut shard) = self.lock(shard) {
                let slots = shard.slots.iter_mut().map(|(_, slot)| slot);
                let slots = slots.filter(|slot| tag.is_none_or(|tag| tag == slot.tag));
                wakers.extend(slots.filter_map(|slot| slot.waker.take()));
            }
            drop(Wakers(wakers));
        }
    }

    /// From here on, whoever arms a slot has the sweeper told, until it says when it will look again.
    pub(super) fn begin_sweep(&self) {
        self.next.store(NEVER, Ordering::Relaxed);
    }

    /// The wakers of a shard's slots whose time is up, and when the next one's is; unless it is `thorough`, that may be
    /// the time of a slot that is disarmed.
    pub(super) fn sweep(&self, shard: usize, now: u64, thorough: bool) -> (Wakers, u64) {
        let mut wakers = Vec::new();
        let Some(mut shard) = self.lock(shard) else {
            return (Wakers(wakers), NEVER);
        };
        if thorough || shard.earliest <= now {
            let mut earliest = NEVER;
            for (_, slot) in &mut shard.slots {
                if slot.at <= now {
                    slot.at = NEVER;
                    slot.expired = true;
                    wakers.extend(slot.waker.take());
                }
                earliest = earliest.min(slot.at);
            }
            shard.earliest = earliest;
            // What a burst has left would be walked over each time.
            if shard.slots.is_empty() && shard.slots.capacity() > SPACIOUS {
                shard.slots = Slab::new();
            }
        }
        (Wakers(wakers), shard.earliest)
    }

    pub(super) fn end_sweep(&self, next: u64) {
        self.next.store(next, Ordering::Relaxed);
    }

    pub(super) fn shards(&self) -> usize {
        self.shards.len()
    }

    /// When the sweeper looks next.
    #[cfg(all(test, switchboard_loom))]
    pub(super) fn next_sweep(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    /// How many slots are armed.
    #[cfg(test)]
    pub(crate) fn armed(&self) -> usize {
        let shards = (0..self.shards.len()).filter_map(|shard| self.lock(shard));
        shards.map(|shard| shard.slots.len()).sum()
    }

    fn lock(&self, shard: usize) -> Option<MutexGuard<'_, Shard>> {
        let shard = self.shards.get(shard)?;
        Some(shard.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

// === impl Key ===

impl Key {
    /// A table has at most 64 shards, and fewer than 2^32 pending calls: each has a waker, an allocation of its own.
    fn new(shard: usize, slot: usize) -> Self {
        let shard = u32::try_from(shard).unwrap_or(u32::MAX);
        Self {
            shard: NonZeroU32::MIN.saturating_add(shard),
            slot: u32::try_from(slot).unwrap_or(u32::MAX),
        }
    }

    const fn shard(self) -> usize {
        self.shard.get() as usize - 1
    }

    const fn slot(self) -> usize {
        self.slot as usize
    }
}

// === impl Shard ===

impl Shard {
    /// Disarms a slot that was woken, and tells why.
    fn woken(&mut self, slot: usize) -> Look {
        match self.slots.try_remove(slot) {
            Some(slot) if slot.expired => Look::Expired,
            _ => Look::Woken,
        }
    }
}

// === impl Wakers ===

impl Wakers {
    /// Wakes some; false if there are no more.
    pub(super) fn wake(&mut self, most: usize) -> bool {
        let some = self.0.len().saturating_sub(most)..;
        self.0.drain(some).for_each(wake);
        !self.0.is_empty()
    }
}

impl Drop for Wakers {
    fn drop(&mut self) {
        self.wake(usize::MAX);
    }
}

/// A waker that panics is its task's affair, and not that of those who come after it.
fn wake(waker: Waker) {
    let _panic = panic::catch_unwind(AssertUnwindSafe(|| waker.wake()));
}

/// A number for this thread, so that threads are spread evenly.
fn this_thread() -> usize {
    static THREADS: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static THREAD: Cell<usize> = Cell::new(THREADS.fetch_add(1, Ordering::Relaxed));
    }
    // A thread that is ending has none any more.
    THREAD.try_with(Cell::get).unwrap_or(0)
}

#[cfg(all(test, switchboard_loom))]
mod loom_tests;
