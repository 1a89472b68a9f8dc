//! A user's server, as the one who runs it sees it.

use std::{
    future::{Future, poll_fn},
    panic::AssertUnwindSafe,
    pin::Pin,
    task::{Context, Poll},
};

use futures_util::{FutureExt as _, future::CatchUnwind};
use tokio::pin;

use super::hook::{failed, words};
use crate::error::{BoxError, Error, Peer};

/// A server's future, which goes on while something else is waited for, and is dropped at its end.
pub(super) struct Server<'a, F> {
    future: Option<Pin<Box<CatchUnwind<AssertUnwindSafe<F>>>>>,
    of: &'a Peer,
    has_ended: bool,
    failure: Option<Error>,
}

// === impl Server ===

impl<'a, F, E> Server<'a, F>
where
    F: Future<Output = Result<(), E>>,
    E: Into<BoxError>,
{
    pub(super) fn new(of: &'a Peer, server: F) -> Self {
        Self {
            future: Some(Box::pin(AssertUnwindSafe(server).catch_unwind())),
            of,
            has_ended: false,
            failure: None,
        }
    }

    /// None that is known.
    pub(super) fn none(of: &'a Peer) -> Self {
        Self {
            future: None,
            of,
            has_ended: false,
            failure: None,
        }
    }

    /// Drops it, wherever it is.
    pub(super) fn cut(&mut self) {
        self.future = None;
    }

    /// What it failed with, if it did.
    pub(super) fn failure(self) -> Result<(), Error> {
        self.failure.map_or(Ok(()), Err)
    }

    /// Whether it has, by itself.
    pub(super) fn has_ended(&self) -> bool {
        self.has_ended
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(future) = &mut self.future else {
            return Poll::Ready(());
        };
        let Poll::Ready(result) = future.as_mut().poll(cx) else {
            return Poll::Pending;
        };
        self.future = None;
        self.has_ended = true;
        self.failure = match result {
            Ok(Ok(())) => None,
            Ok(Err(error)) => {
                Some(failed(self.of, "its server failed".to_owned()).with_source(error))
            }
            Err(panic) => {
                let why = format!("its server panicked: {}", words(&*panic));
                Some(failed(self.of, why))
            }
        };
        Poll::Ready(())
    }

    /// Until it has ended.
    pub(super) async fn ended(&mut self) {
        poll_fn(|cx| self.poll(cx)).await;
    }

    /// What comes of this, or `None` if the server ends before it.
    pub(super) async fn or<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            () = self.ended() => None,
            done = work => Some(done),
        }
    }

    /// What comes of this, whether the server ends before it or not.
    pub(super) async fn beside<T>(&mut self, work: impl Future<Output = T>) -> T {
        pin!(work);
        match self.or(&mut work).await {
            Some(done) => done,
            None => work.await,
        }
    }
}
