//! Calls in flight, counted by the very reference count that keeps the callee's name alive.

use std::{
    fmt,
    sync::{Arc, Weak},
};

use crate::sync::Padded;

/// What calls are counted against.
///
/// A call needs its peer's name for as long as it runs (to put it in an error) and has to be counted
/// for as long as it runs (to balance). An `Arc`'s own count does both with one atomic add and one
/// subtract, where a counter beside an `Arc` takes two of each, 14 ns apiece. The price: nothing else
/// may ever clone that `Arc`, which is why it is private to this file and `Load` is not `Clone`. Padded, for
/// its neighbours on the heap are other endpoints' counts, which other threads write.
pub(crate) struct Load<T>(Arc<Padded<T>>);

/// The calls that were counted against a [`Load`], once that is gone; it is none itself.
pub(crate) struct Watched<T>(Weak<Padded<T>>);

/// One call in flight: dropping it gives the load back.
pub(crate) struct Guard<T>(Arc<Padded<T>>);

impl<T> Load<T> {
    pub(crate) fn new(of: T) -> Self {
        Self(Arc::new(Padded(of)))
    }

    /// Counts a call in, until the guard is dropped.
    pub(crate) fn acquire(&self) -> Guard<T> {
        Guard(self.0.clone())
    }

    /// How many calls are in flight.
    ///
    /// Relaxed, as `Arc::strong_count` is: a pick that is off by a call that ends at this moment is as
    /// good a pick, and nothing else hangs on it.
    pub(crate) fn current(&self) -> usize {
        Arc::strong_count(&self.0) - 1
    }

    /// The calls in flight, to be looked at when the load itself is gone.
    pub(crate) fn watch(&self) -> Watched<T> {
        Watched(Arc::downgrade(&self.0))
    }

    pub(crate) fn of(&self) -> &T {
        &self.0.0
    }
}

impl<T> Watched<T> {
    /// How many of the calls are still in flight.
    pub(crate) fn current(&self) -> usize {
        self.0.strong_count()
    }
}

impl<T> Guard<T> {
    pub(crate) fn of(&self) -> &T {
        &self.0.0
    }
}

impl<T: fmt::Debug> fmt::Debug for Load<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Load")
            .field("of", self.of())
            .field("current", &self.current())
            .finish()
    }
}

impl<T: fmt::Debug> fmt::Debug for Guard<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Guard").field(self.of()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_load_is_the_number_of_guards() {
        let load = Load::new("peer");
        assert_eq!(load.current(), 0);
        let one = load.acquire();
        let two = load.acquire();
        assert_eq!((load.current(), *two.of()), (2, "peer"));
        drop(one);
        assert_eq!(load.current(), 1);
        drop(two);
        assert_eq!(load.current(), 0);
    }
}
