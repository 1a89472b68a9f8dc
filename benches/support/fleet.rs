//! A pool whose endpoints come and go as a bench tells them to.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use futures_util::FutureExt as _;
use switchboard::{
    Pool,
    discover::{Change, Update},
    endpoint::{Peer, Provided, UseProvided},
    pool::{Plain, PoolConfig},
};
use tokio::{sync::mpsc, task::yield_now};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tower::Service as _;

use super::{measure::quantile, pools::Inner};

type Updates = mpsc::UnboundedSender<Update<usize, Arc<Provided<Inner>>>>;

/// A pool of this many endpoints, fed by a channel.
pub(crate) struct Fleet {
    pool: Pool<Inner, Plain>,
    updates: Updates,
}

/// Picks on a thread of their own, until dropped.
pub(crate) struct Picking {
    over: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<Vec<u32>>>,
}

impl Fleet {
    /// All of them connected. It wants a single-threaded runtime, where the driver runs when its bench
    /// yields.
    pub(crate) async fn new(endpoints: usize) -> Self {
        let (updates, stream) = mpsc::unbounded_channel();
        let stream = UnboundedReceiverStream::new(stream);
        let pool = Pool::new("fleet", PoolConfig::default(), stream, UseProvided);
        let fleet = Self {
            pool: pool.expect("it is made in a runtime"),
            updates,
        };
        for id in 0..endpoints {
            fleet.send(Change::Insert(id, given(id)));
        }
        fleet.updates.send(Update::Synced).expect("the driver runs");
        for id in 0..endpoints {
            let mut pinned = fleet.pool.to(id);
            pinned.call(0).await.expect("it connects");
        }
        fleet
    }

    /// Takes an endpoint away, and tells how long it took until no call could go there.
    pub(crate) async fn remove(&self, id: usize) -> Duration {
        let mut pinned = self.pool.to(id);
        let began = Instant::now();
        self.send(Change::Remove(id));
        loop {
            yield_now().await;
            if pinned.call(0).await.is_err() {
                return began.elapsed();
            }
        }
    }

    /// Brings one, and tells how long it took until a call went there: two snapshots, one of which says
    /// that it is connecting, and its task.
    pub(crate) async fn insert(&self, id: usize) -> Duration {
        let mut pinned = self.pool.to(id);
        let given = given(id);
        let began = Instant::now();
        self.send(Change::Insert(id, given));
        loop {
            yield_now().await;
            if pinned.call(0).await.is_ok() {
                return began.elapsed();
            }
        }
    }

    /// Picks from now on.
    pub(crate) fn picking(&self) -> Picking {
        let over = Arc::new(AtomicBool::new(false));
        let (mut pool, stop) = (self.pool.clone(), over.clone());
        let thread = thread::spawn(move || {
            let mut times = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let began = Instant::now();
                let called = pool.call(0).now_or_never();
                let took = began.elapsed();
                assert!(matches!(called, Some(Ok(0))), "{called:?}");
                times.push(u32::try_from(took.as_nanos()).unwrap_or(u32::MAX));
            }
            times
        });
        Picking {
            over,
            thread: Some(thread),
        }
    }

    fn send(&self, change: Change<usize, Arc<Provided<Inner>>>) {
        let change = Update::Change(change);
        self.updates.send(change).expect("the driver runs");
    }
}

fn given(id: usize) -> Arc<Provided<Inner>> {
    Arc::new(Provided::new(Peer::new("fleet", id.to_string(), ""), Inner))
}

impl Picking {
    /// The 99th percentile of a pick with its call, two readings of the clock included.
    pub(crate) fn p99(mut self) -> Duration {
        quantile(&mut self.stop(), 990)
    }

    fn stop(&mut self) -> Vec<u32> {
        self.over.store(true, Ordering::Relaxed);
        let thread = self.thread.take().map(thread::JoinHandle::join);
        thread.and_then(Result::ok).unwrap_or_default()
    }
}

impl Drop for Picking {
    fn drop(&mut self) {
        self.stop();
    }
}
