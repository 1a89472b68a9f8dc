//! Loom's, and how its tests are run.

pub(crate) use loom::sync::{Mutex, MutexGuard, RwLock};

pub(crate) mod atomic {
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};

    pub(crate) use super::AtomicUsize;
}

use std::sync::atomic::Ordering;

use loom::{model::Builder, sync::atomic::fence};

/// Loom takes `SeqCst` for `AcqRel`, but knows fences: with one on either side there is the one order of all that
/// `SeqCst` is for. With any other ordering it is loom's own. One that is weakened between others that are not is still
/// fenced by those: what is found is that none of them orders.
#[derive(Debug)]
pub(crate) struct AtomicUsize(loom::sync::atomic::AtomicUsize);

/// Runs a test in every order that there is.
pub(crate) fn in_every_order(test: impl Fn() + Send + Sync + 'static) {
    Builder::new().check(test);
}

/// The same, of the orders in which a thread loses its turn, without having to wait, so many times at most: where all of
/// them would take minutes.
pub(crate) fn within(preemptions: usize, test: impl Fn() + Send + Sync + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(test);
}

// === impl AtomicUsize ===

impl AtomicUsize {
    pub(crate) fn new(value: usize) -> Self {
        Self(loom::sync::atomic::AtomicUsize::new(value))
    }

    pub(crate) fn load(&self, order: Ordering) -> usize {
        fenced(order, || self.0.load(order))
    }

    pub(crate) fn swap(&self, value: usize, order: Ordering) -> usize {
        fenced(order, || self.0.swap(value, order))
    }

    pub(crate) fn fetch_add(&self, value: usize, order: Ordering) -> usize {
        fenced(order, || self.0.fetch_add(value, order))
    }

    pub(crate) fn fetch_sub(&self, value: usize, order: Ordering) -> usize {
        fenced(order, || self.0.fetch_sub(value, order))
    }

    pub(crate) fn fetch_update(
        &self,
        set: Ordering,
        fetch: Ordering,
        update: impl FnMut(usize) -> Option<usize>,
    ) -> Result<usize, usize> {
        fenced(set, || self.0.fetch_update(set, fetch, update))
    }
}

fn fenced<T>(order: Ordering, act: impl FnOnce() -> T) -> T {
    let fences = order == Ordering::SeqCst;
    if fences {
        fence(order);
    }
    let done = act();
    if fences {
        fence(order);
    }
    done
}
