//! Places for calls, of which there are so many and no more.

use std::{fmt, sync::Arc};

use crate::sync::{
    Padded,
    atomic::{AtomicUsize, Ordering},
};

/// A limit, and what is taken of it.
///
/// One number, which each change takes from what it was to what it is by a compare-and-swap: so the limit is never passed, and
/// nobody is refused for somebody who was.
///
/// Giving a place back is `Release`, and taking one `Acquire`, as in any semaphore: what a call did in its place has been done
/// for the one that has it next. Nothing in here is read on the strength of that, but a service that counts its calls would
/// else see one too many where the processor reorders. A call that is refused has seen nothing: relaxed.
pub(crate) struct Limiter {
    limit: usize,
    taken: Padded<AtomicUsize>,
}

/// A place under a limit. Dropping it gives it back, also in a panic.
pub(crate) struct Place(Arc<Limiter>);

// === impl Limiter ===

impl Limiter {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit,
            taken: Padded(AtomicUsize::new(0)),
        })
    }

    pub(crate) const fn limit(&self) -> usize {
        self.limit
    }

    /// None if all are taken.
    pub(crate) fn take(self: &Arc<Self>) -> Option<Place> {
        let one_more = |taken: usize| (taken < self.limit).then(|| taken + 1);
        let taken = self
            .taken
            .fetch_update(Ordering::Acquire, Ordering::Relaxed, one_more);
        taken.ok().map(|_| Place(self.clone()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::Release);
    }
}

impl fmt::Debug for Limiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let taken = self.taken.load(Ordering::Relaxed);
        write!(f, "{taken} of {}", self.limit)
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Place").field(&self.0).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::atomic::AtomicUsize, thread};

    use super::*;

    #[test]
    fn there_are_never_more_than_the_limit_and_all_come_back() {
        let limiter = Limiter::new(3);
        let most = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..20_000 {
                        let place = limiter.take();
                        let taken = limiter.taken.load(Ordering::Relaxed);
                        most.fetch_max(taken, Ordering::Relaxed);
                        drop(place);
                    }
                });
            }
        });
        assert!(most.load(Ordering::Relaxed) <= 3, "{most:?}");
        let all: Vec<_> = (0..3).map(|_| limiter.take()).collect();
        assert!(all.iter().all(Option::is_some), "{all:?}");
        assert!(limiter.take().is_none());
    }
}

#[cfg(all(test, switchboard_loom))]
mod loom_tests {
    use loom::{cell::UnsafeCell, thread};

    use super::*;
    use crate::sync::in_every_order;

    #[test]
    fn whoever_has_a_place_next_finds_done_what_was_done_in_it_before() {
        in_every_order(|| {
            let (limiter, done) = (Limiter::new(1), Arc::new(UnsafeCell::new(())));
            let call = {
                let (limiter, done) = (limiter.clone(), done.clone());
                move || {
                    if let Some(_place) = limiter.take() {
                        // Loom's cell is no lock: it panics if two are in it, or if one's coming was not ordered after the
                        // other's going.
                        done.with_mut(|_| ());
                    }
                }
            };
            let others = [thread::spawn(call.clone()), thread::spawn(call.clone())];
            call();
            others.into_iter().for_each(|other| other.join().unwrap());
            assert_eq!(format!("{limiter:?}"), "0 of 1");
        });
    }

    #[test]
    fn nobody_is_refused_for_somebody_who_was() {
        in_every_order(|| {
            let limiter = Limiter::new(1);
            let place = limiter.take();
            let other = limiter.clone();
            let other = thread::spawn(move || other.take());
            // One place is free from here on: one of the two has it.
            drop(place);
            let mine = limiter.take();
            let other = other.join().unwrap();
            assert!(mine.is_some() != other.is_some(), "{mine:?}, {other:?}");
        });
    }
}
