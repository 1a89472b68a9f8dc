//! What asks a component to stop, and what tells its server to.

use std::{
    convert::Infallible,
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::core::Core;
use crate::error::Error;

/// Ready when the component's server is to take no new calls; [`Component::stopping`](super::Component::stopping) makes
/// it, for `serve_with_incoming_shutdown` and its like.
///
/// A clone waits for the same. It is ready, too, when the component is dropped.
#[must_use = "futures do nothing unless polled"]
pub struct Stopping {
    draining: CancellationToken,
    wait: Pin<Box<WaitForCancellationFutureOwned>>,
}

/// The signals by which a process is told to stop: SIGTERM and SIGINT; Ctrl-C where there are none.
pub(super) struct Signals {
    #[cfg(unix)]
    terminate: tokio::signal::unix::Signal,
    #[cfg(unix)]
    interrupt: tokio::signal::unix::Signal,
}

// === impl Stopping ===

impl Stopping {
    pub(super) fn new(draining: CancellationToken) -> Self {
        Self {
            wait: Box::pin(draining.clone().cancelled_owned()),
            draining,
        }
    }
}

impl Clone for Stopping {
    fn clone(&self) -> Self {
        Self::new(self.draining.clone())
    }
}

impl Future for Stopping {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.wait.as_mut().poll(cx)
    }
}

impl fmt::Debug for Stopping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stopping")
            .field("now", &self.draining.is_cancelled())
            .finish_non_exhaustive()
    }
}

// === impl Signals ===

impl Signals {
    /// From here on they no longer end the process by themselves, and never will again: tokio has no way back.
    #[cfg(unix)]
    pub(super) fn listen() -> Result<Self, Error> {
        use tokio::signal::unix::{SignalKind, signal};

        let listen = |kind| {
            signal(kind).map_err(|error| {
                let why = "they cannot be listened for in this runtime; give it enable_all, or the component signals(false)";
                Error::invalid("signals", why).with_source(error)
            })
        };
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }

    #[cfg(not(unix))]
    pub(super) fn listen() -> Result<Self, Error> {
        Ok(Self {})
    }

    #[cfg(unix)]
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            Some(()) = self.terminate.recv() => "SIGTERM",
            Some(()) = self.interrupt.recv() => "SIGINT",
            else => std::future::pending().await,
        }
    }

    #[cfg(not(unix))]
    async fn next(&mut self) -> &'static str {
        match tokio::signal::ctrl_c().await {
            Ok(()) => "Ctrl-C",
            Err(_) => std::future::pending().await,
        }
    }

    /// Makes each of them a request.
    pub(super) async fn request(mut self, core: &Core) -> Infallible {
        loop {
            let signal = self.next().await;
            let (role, id) = (&*core.peer.role, &*core.peer.id);
            tracing::info!(role, id, signal, "asked to stop");
            core.request();
        }
    }
}

// === impl Core ===

impl Core {
    pub(super) fn request(&self) {
        self.requests.send_modify(|n| *n = n.saturating_add(1));
    }

    /// The first one, unless there was one.
    pub(super) fn request_once(&self) {
        self.requests.send_if_modified(|n| {
            let is_first = *n == 0;
            *n = (*n).max(1);
            is_first
        });
    }
}
