//! Cancelled calls, reset no faster than the peer takes calls in.
//!
//! A server counts calls that are reset before it has taken them in, for that is what an attack looks like
//! (CVE-2023-44487), and closes the connection under all others when there are too many: 20 in h2, which is
//! tonic's. A hundred calls that time out together, at a server that is busy, are such a burst. So of calls
//! that are cancelled in quick succession, with no answer, 16 are reset at once; the others keep their
//! streams until the peer has answered a ping, which it reads after them. Then 64 go, and four times as many
//! after each further answer.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use super::{core::Slot, pump::Pump};

/// How many resets may be on their way to streams of which the peer has shown nothing yet.
const UNCONFIRMED: usize = 16;

/// How many times more may be after each answer of a peer that is keeping up.
const GROWTH: usize = 4;

/// A peer that has had this long since the last reset has taken in what came before.
const LONG_AGO: Duration = Duration::from_secs(1);

/// The cancelled calls of one connection.
pub(super) struct Resets {
    inner: Mutex<Inner>,
    wanted: Notify,
}

#[derive(Default)]
struct Inner {
    waiting: VecDeque<Cancelled>,
    unconfirmed: usize,
    /// How many go at the next answer.
    batch: usize,
    last: Option<Instant>,
    /// The connection has ended, and its streams with it.
    closed: bool,
}

/// A call that nobody waits for; dropping it resets its stream.
pub(super) struct Cancelled {
    // First, so that the stream is let go of before its slot is given to another.
    pub(super) _response: h2::client::ResponseFuture,
    pub(super) pump: Option<Pump>,
    pub(super) _slot: Slot,
}

impl Cancelled {
    /// Lets go of the caller's request, and keeps the stream.
    fn held(mut self) -> Self {
        if let Some(pump) = &mut self.pump {
            pump.hold();
        }
        self
    }
}

impl Resets {
    pub(super) fn new() -> Self {
        Self {
            inner: Mutex::default(),
            wanted: Notify::new(),
        }
    }

    /// Resets a call's stream, now or soon.
    pub(super) fn cancel(&self, call: Cancelled) {
        {
            let mut inner = self.lock();
            if inner.last.is_some_and(|last| last.elapsed() >= LONG_AGO) {
                inner.unconfirmed = 0;
            }
            let now = inner.closed || inner.unconfirmed < UNCONFIRMED;
            if !now || !inner.waiting.is_empty() {
                inner.waiting.push_back(call.held());
                drop(inner);
                self.wanted.notify_one();
                return;
            }
            inner.unconfirmed += 1;
            inner.last = Some(Instant::now());
        }
        // Outside the lock: it goes into h2's.
        drop(call);
    }

    /// Waits until there are calls that cannot be reset before the peer has shown that it reads.
    pub(super) async fn wanted(&self) {
        while self.lock().waiting.is_empty() {
            self.wanted.notified().await;
        }
    }

    /// The peer has read what was sent before: the next ones may go.
    pub(super) fn confirmed(&self) {
        let next: Vec<_> = {
            let mut inner = self.lock();
            let batch = inner.batch.max(UNCONFIRMED * GROWTH);
            let next = inner.waiting.len().min(batch);
            inner.unconfirmed = next;
            inner.batch = match inner.waiting.len() > next {
                true => batch.saturating_mul(GROWTH),
                false => 0,
            };
            inner.last = Some(Instant::now());
            inner.waiting.drain(..next).collect()
        };
        drop(next);
    }

    /// There is no connection any more; nothing is held back.
    pub(super) fn close(&self) {
        let waiting = {
            let mut inner = self.lock();
            inner.closed = true;
            std::mem::take(&mut inner.waiting)
        };
        drop(waiting);
    }

    /// For a push or a pop; only cancelled calls and the connection's own task come here.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Resets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = self.lock();
        f.debug_struct("Resets")
            .field("waiting", &inner.waiting.len())
            .field("unconfirmed", &inner.unconfirmed)
            .finish_non_exhaustive()
    }
}
