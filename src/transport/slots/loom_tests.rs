//! Slots with tokio's `Notify`, as a connection has them. Loom does not see into that: to it each of its functions is
//! done at once and orders nothing, so what is shown here is shown without its help. A waiter that nobody wakes is a
//! deadlock, which loom reports.

use std::{future::poll_fn, task::Waker};

use super::*;
use crate::sync::{Mutex, in_every_order, within};
use loom::{future::block_on, thread};

/// What a connection has of it.
struct Connection {
    slots: Slots,
    freed: Arc<Notify>,
    /// What the peer's last settings say.
    settings: Mutex<usize>,
}

// === impl Connection ===

impl Connection {
    /// One with so many streams, where the peer allows so many; nobody has noted that yet.
    fn new(taken: usize, settings: usize) -> Arc<Self> {
        let slots = Slots::new();
        (0..taken).for_each(|_| _ = slots.take());
        Arc::new(Self {
            slots,
            freed: Arc::default(),
            settings: Mutex::new(settings),
        })
    }

    /// As `Core::note_limit`.
    fn note_limit(&self) {
        // Under a lock, as in h2.
        if self.slots.note(|| *self.settings.lock().unwrap()) {
            self.freed.notify_waiters();
        }
    }

    /// As `Connection::poll_ready`.
    fn poll_ready(&self, waiting: &mut Waiting, cx: &mut Context<'_>) -> Poll<()> {
        while !self.slots.has_room() {
            ready!(waiting.poll(&self.freed, || self.note_limit(), cx));
        }
        waiting.end();
        Poll::Ready(())
    }

    fn call(&self) {
        let mut waiting = Waiting::default();
        block_on(poll_fn(|cx| self.poll_ready(&mut waiting, cx)));
        self.slots.take();
    }

    /// As the drop of a `Slot`.
    fn end(&self) {
        if self.slots.give_back() {
            self.freed.notify_one();
        }
    }
}

fn apart(
    connection: &Arc<Connection>,
    act: impl FnOnce(&Connection) + 'static,
) -> thread::JoinHandle<()> {
    let connection = connection.clone();
    thread::spawn(move || act(&connection))
}

#[test]
fn a_waiter_that_notes_the_limit_is_woken_by_the_stream_that_ends_meanwhile() {
    in_every_order(|| {
        // Given one stream, and a limit of one that nobody has noted
        let connection = Connection::new(1, 1);
        let ending = apart(&connection, Connection::end);
        // When a waiter, which has seen that there is no room, notes it as the stream ends
        connection.note_limit();
        connection.call();
        ending.join().unwrap();
        assert_eq!(connection.slots.taken(), 1);
    });
}

#[test]
fn a_waiter_in_a_full_house_is_woken_by_the_stream_that_ends_it() {
    within(3, || {
        let connection = Connection::new(2, 1);
        connection.note_limit();
        let ending = apart(&connection, Connection::end);
        let other = apart(&connection, Connection::end);
        connection.call();
        ending.join().unwrap();
        other.join().unwrap();
        assert_eq!(connection.slots.taken(), 1);
    });
}

#[test]
fn of_two_that_wait_each_gets_one_of_two_streams_that_end() {
    within(3, || {
        let connection = Connection::new(2, 2);
        connection.note_limit();
        let waiters = [
            apart(&connection, Connection::call),
            apart(&connection, Connection::call),
        ];
        connection.end();
        connection.end();
        waiters
            .into_iter()
            .for_each(|waiter| waiter.join().unwrap());
        assert_eq!(connection.slots.taken(), 2);
    });
}

#[test]
fn a_stream_goes_from_hand_to_hand() {
    within(3, || {
        let connection = Connection::new(1, 1);
        connection.note_limit();
        let waiters = [0, 1].map(|_| {
            apart(&connection, |connection| {
                connection.call();
                connection.end();
            })
        });
        connection.end();
        waiters
            .into_iter()
            .for_each(|waiter| waiter.join().unwrap());
        assert_eq!(connection.slots.taken(), 0);
    });
}

#[test]
fn a_waiter_is_woken_when_another_notes_that_the_peer_allows_more() {
    within(3, || {
        let connection = Connection::new(1, 1);
        connection.note_limit();
        let waiter = apart(&connection, Connection::call);
        *connection.settings.lock().unwrap() = 2;
        // Whoever comes after them looks as well.
        connection.note_limit();
        waiter.join().unwrap();
        assert_eq!(connection.slots.taken(), 2);
        // One that comes when nobody else does notes it itself.
        *connection.settings.lock().unwrap() = 3;
        connection.call();
        assert_eq!(connection.slots.taken(), 3);
    });
}

#[test]
fn one_that_is_polled_as_it_is_woken_leaves_the_rest_of_the_room_to_the_next() {
    within(3, || {
        let connection = Connection::new(2, 2);
        connection.note_limit();
        let mut waiting = Waiting::default();
        let mut cx = Context::from_waker(Waker::noop());
        // Given one that waits, for something else as well, and one that waits behind it
        let room = connection.poll_ready(&mut waiting, &mut cx);
        assert!(room.is_pending());
        let other = apart(&connection, Connection::call);
        let ends = apart(&connection, |connection| {
            connection.end();
            connection.end();
        });
        // When it is polled for that, as two streams end
        let room = connection.poll_ready(&mut waiting, &mut cx);
        // Then it has room or is woken, and does not take the wake with it
        if room.is_pending() {
            drop(waiting);
        }
        other.join().unwrap();
        ends.join().unwrap();
        assert_eq!(connection.slots.taken(), 1);
    });
}

/// Two connections, whose streams whoever waits takes of either.
struct Two([Connection; 2]);

impl Two {
    /// Both full, with room for one.
    fn full() -> Arc<Self> {
        let freed: Arc<Notify> = Arc::default();
        let both = [0, 1].map(|_| {
            let slots = Slots::new();
            let _ = slots.take();
            Connection {
                slots,
                freed: freed.clone(),
                settings: Mutex::new(1),
            }
        });
        both.iter().for_each(Connection::note_limit);
        Arc::new(Self(both))
    }

    /// As `Connections::poll_ready` and the call that follows.
    fn call(&self) -> &Connection {
        let mut waiting = Waiting::default();
        let taken = block_on(poll_fn(|cx| {
            loop {
                if let Some(free) = self.0.iter().find(|one| one.slots.try_take().is_some()) {
                    waiting.end();
                    return Poll::Ready(free);
                }
                let note = || self.0.iter().for_each(Connection::note_limit);
                ready!(waiting.poll(&self.0[0].freed, note, cx));
            }
        }));
        taken
    }
}

#[test]
fn whoever_waits_beside_two_full_connections_is_woken_by_a_stream_of_either() {
    within(3, || {
        let two = Two::full();
        let waiter = {
            let two = two.clone();
            thread::spawn(move || {
                two.call();
            })
        };
        two.0[1].end();
        waiter.join().unwrap();
        assert_eq!(two.0[1].slots.taken(), 1);
    });
}

#[test]
fn two_that_wait_get_the_streams_of_two_that_end_on_different_connections() {
    within(2, || {
        let two = Two::full();
        let waiters = [0, 1].map(|_| {
            let two = two.clone();
            thread::spawn(move || {
                two.call();
            })
        });
        two.0.iter().for_each(Connection::end);
        waiters
            .into_iter()
            .for_each(|waiter| waiter.join().unwrap());
        let taken: usize = two.0.iter().map(|one| one.slots.taken()).sum();
        assert_eq!(taken, 2);
    });
}
