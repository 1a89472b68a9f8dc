//! Calls, in every order with what ends them: what a token and a sweeper do, with the code that does it.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Wake, Waker},
    time::Duration,
};

use loom::thread;
use tokio::runtime::{self, Runtime};

use super::*;
use crate::{
    CancelToken,
    sync::{in_every_order, within},
};

/// Whether it was woken. Std's: it is read when all is done.
#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// A task that has a waiter.
struct Task<H: Holder> {
    waiter: Waiter<H>,
    woken: Arc<Woken>,
    last: Poll<Over>,
}

impl<H: Holder> Task<H> {
    fn new(holder: H, at: u64) -> Self {
        Self {
            waiter: Waiter::new(holder, at),
            woken: Arc::default(),
            last: Poll::Pending,
        }
    }

    fn poll(&mut self) {
        let waker = Waker::from(self.woken.clone());
        self.last = self.waiter.poll(&Context::from_waker(&waker));
    }

    /// Whether it knows, or will know when it is polled for having been woken, that it is over.
    fn knows(&self) -> bool {
        self.last.is_ready() || self.woken.0.load(Ordering::SeqCst)
    }
}

#[test]
fn no_call_misses_that_it_is_cancelled() {
    in_every_order(|| {
        let token = CancelToken::for_call();
        let polled = |token: CancelToken| {
            move || {
                let mut task = Task::new(token, NEVER);
                task.poll();
                task
            }
        };
        let other = thread::spawn(polled(token.clone()));
        let cancel = token.clone();
        let cancel = thread::spawn(move || cancel.cancel());
        let mine = polled(token)();
        let other = other.join().unwrap();
        cancel.join().unwrap();
        assert!(mine.knows(), "{:?}", mine.last);
        assert!(other.knows(), "{:?}", other.last);
    });
}

#[test]
fn a_call_that_moves_to_another_task_does_not_miss_that_it_is_cancelled() {
    in_every_order(|| {
        let token = CancelToken::for_call();
        let mut task = Task::new(token.clone(), NEVER);
        task.poll();
        let cancel = thread::spawn(move || token.cancel());
        // Polled once more where it was, and then elsewhere
        task.poll();
        if task.last.is_pending() {
            task.woken = Arc::default();
            task.poll();
        }
        cancel.join().unwrap();
        assert!(task.knows(), "{:?}", task.last);
    });
}

struct Owner(Timers);

impl Owner {
    fn on(runtime: &Runtime) -> Arc<Self> {
        Arc::new(Self(Timers::new(runtime.handle().clone())))
    }
}

impl Holder for Arc<Owner> {
    fn table(&self) -> Option<&Table> {
        Some(self.0.table())
    }

    fn is_cancelled(&self) -> bool {
        false
    }

    fn timers(&self) -> Option<&Timers> {
        Some(&self.0)
    }
}

/// One that nobody drives: loom runs all threads on one.
fn runtime() -> Runtime {
    runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap()
}

/// A sweeper, run by hand.
struct Sweeper {
    task: Pin<Box<dyn Future<Output = ()>>>,
    woken: Arc<Woken>,
    ended: bool,
}

impl Sweeper {
    /// Until it sleeps or has ended.
    fn run(&mut self) {
        let waker = Waker::from(self.woken.clone());
        loop {
            self.woken.0.store(false, Ordering::SeqCst);
            self.ended = self
                .task
                .as_mut()
                .poll(&mut Context::from_waker(&waker))
                .is_ready();
            if self.ended || !self.woken.0.load(Ordering::SeqCst) {
                return;
            }
        }
    }
}

#[test]
fn no_call_that_has_a_time_is_missed_by_a_sweeper_that_ends_or_sleeps() {
    for closed in [true, false] {
        within(3, move || {
            let runtime = runtime();
            let _here = runtime.enter();
            let owner = Owner::on(&runtime);
            // Given a sweeper that runs, and ends where there is nothing to do, or stays for a while
            let mut sweeper = Sweeper {
                task: Box::pin(owner.0.running(closed)),
                woken: Arc::default(),
                ended: false,
            };
            let sweeping = thread::spawn(move || {
                sweeper.run();
                sweeper
            });
            // When a call comes that has a time
            let at = after(Duration::from_secs(3600));
            let mut call = Task::new(owner.clone(), at);
            call.poll();
            assert!(call.last.is_pending(), "{:?}", call.last);
            let mut sweeper = sweeping.join().unwrap();
            if !sweeper.ended && sweeper.woken.0.load(Ordering::SeqCst) {
                sweeper.run();
            }
            // Then it looks in time, or has ended and another was begun
            match sweeper.ended {
                true => assert_eq!(runtime.metrics().num_alive_tasks(), 1),
                false => assert!(owner.0.table().next_sweep() <= at),
            }
        });
    }
}

#[test]
fn no_call_misses_that_nobody_keeps_its_time_any_more() {
    within(3, || {
        let runtime = runtime();
        let owner = Owner::on(&runtime);
        let at = |hours: u64| after(Duration::from_secs(hours * 3600));
        // Given a call whose sweeper runs
        let mut first = Task::new(owner.clone(), at(2));
        first.poll();
        assert!(first.last.is_pending(), "{:?}", first.last);
        // When its runtime ends as another call comes
        let ending = thread::spawn(move || drop(runtime));
        let mut second = Task::new(owner.clone(), at(1));
        second.poll();
        ending.join().unwrap();
        assert!(first.knows() && second.knows(), "{:?}", second.last);
    });
}
