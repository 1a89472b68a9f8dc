//! Who uses a pool, as far as its calls in flight do not tell: what idleness hangs on.

use std::sync::Arc;

use futures_util::FutureExt as _;
use tokio::sync::Notify;

/// Who has an interest in a pool, beside the calls that are in flight: while there is anybody it is not idle.
#[derive(Debug)]
pub(crate) struct Interest {
    /// Keeps a permit: whoever is interested in a pool that is about to be idle is not missed.
    wanted: Notify,
    held: Arc<()>,
}

/// An interest, until it is dropped.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    _held: Arc<()>,
}

// === impl Interest ===

impl Interest {
    pub(super) fn new() -> Self {
        Self {
            wanted: Notify::new(),
            held: Arc::default(),
        }
    }

    /// From here on the pool does not become idle; if it is, [`Interest::want`] wakes it.
    pub(crate) fn hold(&self) -> Held {
        Held {
            _held: self.held.clone(),
        }
    }

    /// Wakes the pool if it is idle, or about to be.
    pub(crate) fn want(&self) {
        self.wanted.notify_one();
    }

    /// Until somebody wants it. A `want` from before counts as well, unless it was [forgotten](Interest::forget).
    pub(super) async fn wanted(&self) {
        self.wanted.notified().await;
    }

    /// Forgets who wanted it, and tells whether anybody holds it. In this order: whoever holds it first and wants it
    /// then is either seen here, or its wanting is kept.
    pub(super) fn forget(&self) -> bool {
        let _ = self.wanted.notified().now_or_never();
        Arc::strong_count(&self.held) > 1
    }
}
