//! How many streams a connection has, how many its peer allows, and who has to be woken when that changes.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Streams in use, and how many the peer allows.
///
/// It counts and wakes nobody: what changes the count in a waiter's favour returns whether anybody has to be woken, and
/// the caller does it, by whatever means it has.
///
/// A waiter (1) notes the limit, [`allow`](Slots::allow), (2) registers where it will be woken, and (3) looks whether there is
/// room, [`has_room`](Slots::has_room), before it sleeps. Whoever gives a stream back counts and then reads the limit.
/// All of this is `SeqCst`: in one total order one of the two sees the other. So a waiter that saw a full house is woken by
/// the stream that ends it. With anything less each could read what was there before the other wrote.
///
/// Only the stream that ends a full house wakes, and it wakes one. If two end before that one has looked, there is room for
/// another who sleeps: so a waiter that was woken and finds room hands the wake on. Tokio's `Notified` does when it is dropped
/// before it is polled again.
#[derive(Debug)]
pub(super) struct Slots {
    /// Calls that have a stream.
    taken: AtomicUsize,
    /// How many the peer allows; a new reading replaces it when it is reached.
    most: AtomicUsize,
}

// === impl Slots ===

impl Slots {
    /// None in use, and any number allowed.
    pub(super) const fn new() -> Self {
        Self {
            taken: AtomicUsize::new(0),
            most: AtomicUsize::new(usize::MAX),
        }
    }

    /// Counts a stream in. It may be one too many when several do at once: h2 then queues it.
    ///
    /// Relaxed: it takes room, and so has nobody to wake.
    pub(super) fn take(&self) {
        self.taken.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a stream out: whether one waiter has to be woken.
    #[must_use = "one who waits would sleep on"]
    pub(super) fn give_back(&self) -> bool {
        let before = self.taken.fetch_sub(1, Ordering::SeqCst);
        // Only a full house can have anybody waiting.
        before >= self.most.load(Ordering::SeqCst)
    }

    /// The peer allows so many, as of now: whether all who wait have to be woken, because there is room that nobody has
    /// given back.
    #[must_use = "those who wait would sleep on"]
    pub(super) fn allow(&self, most: usize) -> bool {
        most > self.most.swap(most, Ordering::SeqCst)
    }

    /// Whether there is room for one more.
    pub(super) fn has_room(&self) -> bool {
        self.taken.load(Ordering::SeqCst) < self.most.load(Ordering::SeqCst)
    }

    /// How many are in use. Relaxed: nothing is read on the strength of it.
    pub(super) fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Arc, mpsc},
        thread,
        time::Duration,
    };

    use tokio::{runtime, sync::Notify};

    use super::*;

    #[test]
    fn only_a_stream_that_ends_a_full_house_wakes_somebody() {
        let slots = Slots::new();
        slots.take();
        assert!(slots.has_room() && !slots.give_back());
        // Given room for two
        assert!(!slots.allow(2));
        slots.take();
        assert!(slots.has_room());
        slots.take();
        assert!(!slots.has_room());
        // When there is one too many, the first that ends makes no room, but may be who a waiter saw
        slots.take();
        assert_eq!(slots.taken(), 3);
        assert!(slots.give_back() && !slots.has_room());
        assert!(slots.give_back() && slots.has_room());
        assert!(!slots.give_back());
    }

    #[test]
    fn a_peer_that_allows_more_wakes_all_and_one_that_allows_less_nobody() {
        let slots = Slots::new();
        assert!(!slots.allow(1));
        slots.take();
        assert!(!slots.has_room());
        assert!(slots.allow(2) && slots.has_room());
        assert!(!slots.allow(2));
        assert!(!slots.allow(0) && !slots.has_room());
    }

    /// By the waiter's protocol: were a wake lost, they would not all end.
    #[test]
    fn whoever_waits_for_a_stream_is_woken_by_one_that_ends() {
        let (slots, freed) = (Arc::new(Slots::new()), Arc::new(Notify::new()));
        let (ended, ends) = mpsc::channel();
        for _ in 0..6 {
            let (slots, freed, ended) = (slots.clone(), freed.clone(), ended.clone());
            thread::spawn(move || {
                let runtime = runtime::Builder::new_current_thread().build().unwrap();
                for _ in 0..1_000 {
                    loop {
                        if slots.allow(2) {
                            freed.notify_waiters();
                        }
                        let mut waiting = Box::pin(freed.notified());
                        waiting.as_mut().enable();
                        // Dropping one that was woken wakes the next.
                        if slots.has_room() {
                            break;
                        }
                        runtime.block_on(waiting);
                    }
                    slots.take();
                    thread::yield_now();
                    if slots.give_back() {
                        freed.notify_one();
                    }
                }
                ended.send(()).unwrap();
            });
        }
        for n in 0..6 {
            let end = ends.recv_timeout(Duration::from_secs(60));
            assert!(end.is_ok(), "{n} have ended, the others sleep: {slots:?}");
        }
        assert_eq!(slots.taken(), 0);
    }
}
