//! A call's time, whoever keeps it.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    runtime,
    time::{self, Sleep},
};

use super::{Holder, NEVER, Over, Waiter, now};
use crate::error::Error;

/// One call's slot and its time. Where the holder's sweeper runs on another runtime than the call, the call has a timer of its
/// own: nobody may be driving the other.
#[derive(Debug)]
pub(crate) struct Timed<H: Holder> {
    waiter: Waiter<H>,
    at: u64,
    alone: Option<Pin<Box<Sleep>>>,
    /// It is known who keeps the time.
    asked: bool,
}

// === impl Timed ===

impl<H: Holder> Timed<H> {
    /// For a call whose time is up `at` this time of the [clock](super::clock), or [`NEVER`].
    #[inline]
    pub(crate) const fn new(holder: H, at: u64) -> Self {
        Self {
            waiter: Waiter::new(holder, at),
            at,
            alone: None,
            asked: false,
        }
    }

    pub(crate) const fn holder(&self) -> &H {
        self.waiter.holder()
    }

    #[inline]
    pub(crate) fn is_cancelled(&self) -> bool {
        self.waiter.is_cancelled()
    }

    pub(crate) const fn is_timed(&self) -> bool {
        self.at != NEVER
    }

    /// Whether its time is up, by the clock.
    #[inline]
    pub(crate) fn is_expired(&self) -> bool {
        self.is_timed() && now() >= self.at
    }

    /// To be asked whenever the call itself is pending: whether it is over, for which the task is woken. It fails
    /// where there is nobody that could keep the time.
    #[inline]
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Over, Error>> {
        loop {
            if !self.asked && self.waiter.is_timed() {
                self.asked = true;
                if !self.waiter.holder().is_here()? {
                    self.keep_alone()?;
                }
            }
            match self.waiter.poll(cx) {
                Poll::Pending => break,
                // Shared => alone
                Poll::Ready(Over::Untimed) => self.keep_alone()?,
                Poll::Ready(Over::Moved) => self.asked = false,
                Poll::Ready(over) => return Poll::Ready(Ok(over)),
            }
        }
        match &mut self.alone {
            Some(sleep) => sleep.as_mut().poll(cx).map(|()| Ok(Over::Expired)),
            None => Poll::Pending,
        }
    }

    #[cold]
    fn keep_alone(&mut self) -> Result<(), Error> {
        self.waiter.untime();
        let left = self.at.saturating_sub(now());
        self.alone = Some(sleep(Duration::from_nanos(left))?);
        Ok(())
    }
}

/// A sleep here, where there is a runtime that keeps time.
pub(crate) fn sleep(duration: Duration) -> Result<Pin<Box<Sleep>>, Error> {
    runtime::Handle::try_current().map_err(|error| {
        Error::invalid("call", "it has to wait, outside a tokio runtime").with_source(error)
    })?;
    if !crate::pool::has_timer() {
        let why = "it has to wait, in a tokio runtime without enable_time";
        return Err(Error::invalid("call", why));
    }
    Ok(Box::pin(time::sleep(duration)))
}
