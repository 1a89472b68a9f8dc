use std::{
    sync::{Arc, atomic::AtomicBool},
    task::Wake,
};

use loom::thread;

use super::*;
use crate::sync::in_every_order;

/// Whether it was woken. Std's: it is read when all is done.
#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl Woken {
    fn is(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

fn shared(shards: usize) -> Arc<Table> {
    Arc::new(Table::with_shards(shards))
}

/// What a sweeper does: returns when it looks next, if nobody tells it to look sooner.
fn sweep(table: &Table, now: u64) -> u64 {
    table.begin_sweep();
    let sweep = |shard| {
        let (_wakers, earliest) = table.sweep(shard, now, false);
        earliest
    };
    let next = (0..table.shards()).map(sweep).min().unwrap();
    table.end_sweep(next);
    next
}

#[test]
fn a_slot_that_is_armed_during_a_sweep_is_seen_by_it_or_its_sweeper_is_told() {
    for shard in [0, 1] {
        in_every_order(move || {
            // Given a slot whose time is between two sweeps: what the first says is past in the second
            let table = shared(2);
            table.arm_in(0, Waker::noop().clone(), 15, 0);
            let sweeper = table.clone();
            let sweeper = thread::spawn(move || {
                sweep(&sweeper, 10);
                sweep(&sweeper, 15)
            });
            let (_, told) = table.arm_in(shard, Waker::noop().clone(), 20, 0);
            let next = sweeper.join().unwrap();
            assert!(told || next <= 20, "it would look at {next}");
        });
    }
}

#[test]
fn of_two_that_are_armed_during_a_sweep_the_earlier_is_not_hidden_by_the_later() {
    for shards in [[0, 0], [0, 1]] {
        in_every_order(move || {
            let table = shared(2);
            let arm = |shard, at| {
                let table = table.clone();
                move || table.arm_in(shard, Waker::noop().clone(), at, 0).1
            };
            let later = thread::spawn(arm(shards[0], 30));
            let earlier = thread::spawn(arm(shards[1], 20));
            let next = sweep(&table, 10);
            let (later, earlier) = (later.join().unwrap(), earlier.join().unwrap());
            assert!(earlier || next <= 20, "it would look at {next}");
            assert!(later || earlier || next <= 30, "it would look at {next}");
        });
    }
}

#[test]
fn a_slot_whose_time_is_up_as_it_is_armed_is_woken_or_its_sweeper_is_told() {
    in_every_order(|| {
        let table = shared(1);
        let sweeper = table.clone();
        let sweeper = thread::spawn(move || sweep(&sweeper, 20));
        let woken = Arc::<Woken>::default();
        let (_, told) = table.arm_in(0, woken.clone().into(), 20, 0);
        let next = sweeper.join().unwrap();
        let woken = woken.is();
        assert!(woken || told || next <= 20, "it would look at {next}");
    });
}

#[test]
fn a_slot_that_moves_to_another_task_as_it_is_woken_tells_that_task() {
    for timed in [false, true] {
        in_every_order(move || {
            let table = shared(1);
            let (key, _) = table.arm_in(0, Arc::<Woken>::default().into(), 20, 1);
            let waking = table.clone();
            let waking = thread::spawn(move || match timed {
                true => drop(waking.sweep(0, 20, false)),
                false => waking.wake(Some(1)),
            });
            let woken = Arc::<Woken>::default();
            let look = table.look(key, &Context::from_waker(&woken.clone().into()));
            waking.join().unwrap();
            let told = match timed {
                true => look == Look::Expired,
                false => look == Look::Woken,
            };
            assert_ne!(told, woken.is(), "{look:?}");
            assert_eq!(told, look != Look::Moved, "{look:?}");
        });
    }
}

#[test]
fn a_slot_is_nobody_elses_once_it_is_disarmed() {
    in_every_order(|| {
        // Given a slot, and one of another tag that is armed in its place
        let table = shared(1);
        let (key, _) = table.arm_in(0, Waker::noop().clone(), NEVER, 1);
        let waking = table.clone();
        let waking = thread::spawn(move || waking.wake(Some(1)));
        table.disarm(key);
        let woken = Arc::<Woken>::default();
        table.arm_in(0, woken.clone().into(), NEVER, 2);
        waking.join().unwrap();
        assert!(!woken.is());
        assert_eq!(table.armed(), 1);
    });
}
