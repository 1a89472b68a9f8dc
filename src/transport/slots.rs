//! How many streams a connection has, how many its peer allows, and who has to be woken when that changes.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use tokio::sync::{Notify, futures::OwnedNotified};

use crate::sync::{
    atomic::{AtomicUsize, Ordering},
    const_fn,
};

/// Streams in use, and how many the peer allows.
///
/// It counts and wakes nobody itself: what changes the count in a waiter's favour returns whether anybody has to be woken, and
/// the caller does it, by whatever means it has.
///
/// A waiter (1) notes the limit, [`note`](Slots::note), (2) registers where it will be woken, and (3) looks whether there is
/// room, [`has_room`](Slots::has_room), before it sleeps. Whoever gives a stream back counts and then reads the limit.
/// All of this is `SeqCst`: in one total order one of the two sees the other. So a waiter that saw a full house is woken by
/// the stream that ends it. With anything less each could read what was there before the other wrote.
///
/// Only the stream that ends a full house wakes, and it wakes one. If two end before that one has looked, there is room for
/// another who sleeps: so a waiter that was woken and finds room hands the wake on, see [`Waiting`].
#[derive(Debug)]
pub(super) struct Slots {
    /// Calls that have a stream.
    taken: AtomicUsize,
    /// How many the peer allows; a new reading replaces it when it is reached.
    most: AtomicUsize,
}

/// Where one waits that has found no room.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    /// Tokio's hands the wake on when it is dropped after it was woken, and before it was polled again.
    freed: Option<Pin<Box<OwnedNotified>>>,
    /// Once it has been polled and was woken, it is for us to hand that on; to whom.
    woken: Option<Arc<Notify>>,
}

// === impl Slots ===

impl Slots {
    const_fn! {
        /// None in use, and any number allowed.
        pub(super) fn new() -> Self {
            Self {
                taken: AtomicUsize::new(0),
                most: AtomicUsize::new(usize::MAX),
            }
        }
    }

    /// Counts a stream in, and returns how many were in use before. It may be one too many when several do at once: h2
    /// then queues it.
    ///
    /// Relaxed: it takes room, and so has nobody to wake.
    pub(super) fn take(&self) -> usize {
        self.taken.fetch_add(1, Ordering::Relaxed)
    }

    /// Counts a stream in if there is room for it, and returns how many were in use before.
    ///
    /// `SeqCst`, as a waiter's look is: one that finds no room has to be seen by the stream that makes some.
    pub(super) fn try_take(&self) -> Option<usize> {
        let one_more = |taken: usize| (taken < self.most.load(Ordering::SeqCst)).then(|| taken + 1);
        let taken = &self.taken;
        taken
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more)
            .ok()
    }

    /// Counts a stream out: whether one waiter has to be woken.
    #[must_use = "one who waits would sleep on"]
    pub(super) fn give_back(&self) -> bool {
        let before = self.taken.fetch_sub(1, Ordering::SeqCst);
        // Only a full house can have anybody waiting.
        before >= self.most.load(Ordering::SeqCst)
    }

    /// Notes how many the peer allows: whether all who wait have to be woken, because there is room that nobody has given
    /// back.
    ///
    /// Read again until it is what was noted. Whoever reads, is overtaken by one that reads and notes more, and notes what it
    /// read then, would else have taken that back, and would sleep beside room.
    #[must_use = "those who wait would sleep on"]
    pub(super) fn note(&self, read: impl Fn() -> usize) -> bool {
        let mut most = read();
        let mut more = self.allow(most);
        loop {
            let now = read();
            if now == most {
                return more;
            }
            most = now;
            more |= self.allow(most);
        }
    }

    /// The peer allows so many: whether that is more than before.
    fn allow(&self, most: usize) -> bool {
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

    /// How many the peer allows, as last noted. Relaxed, as above.
    pub(super) fn most(&self) -> usize {
        self.most.load(Ordering::Relaxed)
    }
}

// === impl Waiting ===

impl Waiting {
    /// There was no room: ready if one has to look again. Else it has this task woken.
    ///
    /// `freed` may be that of several connections, none of which had room: `note` notes the limits of all, and the other look
    /// is at all.
    pub(super) fn poll(
        &mut self,
        freed: &Arc<Notify>,
        note: impl FnOnce(),
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        match &mut self.freed {
            // Looking => registered: interest first, then another look.
            None => {
                // What it was woken for, it has not found.
                self.woken = None;
                note();
                let mut waits = Box::pin(freed.clone().notified_owned());
                waits.as_mut().enable();
                self.freed = Some(waits);
            }
            // Registered => (registered | looking)
            Some(waits) => {
                ready!(waits.as_mut().poll(cx));
                self.freed = None;
                self.woken = Some(freed.clone());
            }
        }
        Poll::Ready(())
    }

    /// There is room. If it was woken, this wakes the next: there may be room for more than one.
    pub(super) fn end(&mut self) {
        self.freed = None;
        if let Some(freed) = self.woken.take() {
            freed.notify_one();
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(all(test, switchboard_loom))]
mod loom_tests;

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, sync::mpsc, thread, time::Duration};

    use tokio::runtime;

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
                    let mut waiting = Waiting::default();
                    let note = || assert!(!slots.note(|| 2));
                    runtime.block_on(poll_fn(|cx| {
                        while !slots.has_room() {
                            ready!(waiting.poll(&freed, note, cx));
                        }
                        waiting.end();
                        Poll::Ready(())
                    }));
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
