//! The task that wakes calls whose time is up.

use std::{
    fmt,
    sync::{Arc, PoisonError},
    time::Duration,
};

use tokio::{runtime, sync::Notify, task, time};

use super::{
    NEVER, Table,
    clock::{instant, now},
};
use crate::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, Ordering},
};

/// The least time between two sweeps that nobody asked for: calls whose times are close together are woken together,
/// and none is later than this.
const GRAIN: Duration = Duration::from_millis(5);

/// How long a sweeper stays when there is nothing to do.
const LINGER: Duration = Duration::from_secs(1);

/// How many calls are woken before others get their turn.
const BATCH: usize = 256;

/// A table of calls that have times, and its sweeper: one task, which runs while there is a pending call that has a
/// time, and a second longer.
///
/// It runs on one runtime, and calls are held up as long as nobody drives that: it is for those whose calls end with that
/// runtime anyway, and for those who look where they are.
pub(crate) struct Timers(Arc<Inner>);

struct Inner {
    table: Table,
    runtime: runtime::Handle,
    state: Mutex<State>,
    sooner: Notify,
    /// The runtime has ended. Stored before the table is woken: who arms a slot looks at it afterwards.
    dead: AtomicBool,
}

#[derive(Default)]
struct State {
    running: bool,
    /// The sweeper is to look again before it sleeps or ends.
    again: bool,
    /// Nobody makes calls any more; those under way go on.
    closed: bool,
}

/// Tells of the end of a sweeper that was not to end.
struct Ending {
    inner: Arc<Inner>,
    in_order: bool,
}

// === impl Timers ===

impl Timers {
    pub(crate) fn new(runtime: runtime::Handle) -> Self {
        Self(Arc::new(Inner {
            table: Table::new(),
            runtime,
            state: Mutex::default(),
            sooner: Notify::new(),
            dead: AtomicBool::new(false),
        }))
    }

    pub(crate) fn table(&self) -> &Table {
        &self.0.table
    }

    /// The runtime that it is on.
    pub(crate) fn runtime(&self) -> &runtime::Handle {
        &self.0.runtime
    }

    /// Whether the runtime has ended.
    pub(crate) fn is_dead(&self) -> bool {
        self.0.dead.load(Ordering::Acquire)
    }

    /// The sweeper is to look sooner than it would have.
    #[cold]
    pub(super) fn sooner(&self) {
        let mut state = self.0.lock();
        state.again = true;
        if std::mem::replace(&mut state.running, true) {
            drop(state);
            self.0.sooner.notify_one();
            return;
        }
        drop(state);
        // Not under the lock: where the runtime has ended, the task ends here and now, and says so.
        let ending = Ending {
            inner: self.0.clone(),
            in_order: false,
        };
        self.0.runtime.spawn(async move {
            ending.inner.run().await;
            ending.in_order();
        });
    }

    /// Its sweeper ends as soon as no pending call has a time any more.
    pub(crate) fn close(&self) {
        self.0.lock().closed = true;
        self.0.sooner.notify_one();
    }
}

#[cfg(all(test, switchboard_loom))]
impl Timers {
    /// Its sweeper, for whoever runs it by hand.
    pub(super) fn running(&self, closed: bool) -> impl Future<Output = ()> + use<> {
        let mut state = self.0.lock();
        (state.running, state.closed) = (true, closed);
        drop(state);
        let inner = self.0.clone();
        async move { inner.run().await }
    }
}

impl Drop for Timers {
    fn drop(&mut self) {
        // Whoever has armed a slot holds this, so there is none.
        self.close();
    }
}

impl fmt::Debug for Timers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timers")
            .field("table", &self.0.table)
            .finish_non_exhaustive()
    }
}

// === impl Inner ===

impl Inner {
    /// Until there is nothing to do.
    async fn run(&self) {
        loop {
            let closed = {
                let mut state = self.lock();
                state.again = false;
                state.closed
            };
            let now = now();
            let next = self.sweep(now, closed).await;
            let again = self.sooner.notified();
            if next == NEVER {
                // Watching => (sweeping | ended)
                if !closed {
                    let _ = time::timeout(LINGER, again).await;
                }
                if self.ends() {
                    return;
                }
            } else {
                // Sleeping => sweeping
                let soonest = now + GRAIN.as_nanos() as u64;
                tokio::select! {
                    () = time::sleep_until(instant(next.max(soonest))) => {}
                    () = again => {}
                }
            }
        }
    }

    /// Wakes those whose time is up; returns when the next one's is, or was to be.
    async fn sweep(&self, now: u64, thorough: bool) -> u64 {
        self.table.begin_sweep();
        let mut next = NEVER;
        for shard in 0..self.table.shards() {
            let (mut wakers, earliest) = self.table.sweep(shard, now, thorough);
            next = next.min(earliest);
            while wakers.wake(BATCH) {
                task::yield_now().await;
            }
        }
        self.table.end_sweep(next);
        next
    }

    /// Whether the sweeper ends now: nobody asked for it since its last look.
    fn ends(&self) -> bool {
        let mut state = self.lock();
        if state.again {
            return false;
        }
        state.running = false;
        true
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Ending ===

impl Ending {
    fn in_order(mut self) {
        self.in_order = true;
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        if self.in_order {
            return;
        }
        self.inner.dead.store(true, Ordering::Release);
        // All of them: whoever has no time is woken for nothing, once.
        self.inner.table.wake(None);
    }
}
