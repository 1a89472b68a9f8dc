//! A call's time, whoever keeps it.

use std::{
    fmt,
    future::Future,
    panic::{self, AssertUnwindSafe},
    pin::Pin,
    task::{Context, Poll, ready},
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
    alone: Option<Pause>,
    /// It is known who keeps the time.
    asked: bool,
    /// There was something of the response's body already.
    begun: bool,
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
            begun: false,
        }
    }

    #[cfg(feature = "manager")]
    pub(crate) const fn holder(&self) -> &H {
        self.waiter.holder()
    }

    #[cfg(feature = "manager")]
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

    /// To be asked whenever there is something of the response's body: whether its time is up.
    ///
    /// Not for the first of it, which is all that there is of most calls: that came with the head, which was in time. So a call
    /// of one message does not look at the clock again, and one whose messages never let it wait does, from the second on.
    #[inline]
    pub(crate) fn is_late(&mut self) -> bool {
        std::mem::replace(&mut self.begun, true) && self.is_expired()
    }

    /// To be asked whenever the call itself is pending: whether it is over, for which the task is woken. It fails
    /// where there is nobody that could keep the time.
    #[inline]
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Over, Error>> {
        if !self.asked && self.waiter.is_timed() {
            self.asked = true;
            self.ask()?;
        }
        match self.waiter.poll(cx) {
            Poll::Pending => {}
            // Shared => (shared | alone). Moved, it has been seen to that this task is woken. Whether another one polls is a guess,
            // which may be wrong each time.
            Poll::Ready(over @ (Over::Moved | Over::Untimed)) => {
                match over {
                    Over::Moved => self.ask()?,
                    _ => self.keep_alone()?,
                }
                // Alone, it is to be woken all the same when it is cancelled.
                if self.alone.is_some()
                    && let Poll::Ready(Over::Cancelled) = self.waiter.poll(cx)
                {
                    return Poll::Ready(Ok(Over::Cancelled));
                }
            }
            Poll::Ready(over) => return Poll::Ready(Ok(over)),
        }
        let Some(pause) = &mut self.alone else {
            return Poll::Pending;
        };
        ready!(pause.poll(cx));
        if !self.is_expired() {
            // The runtime that it was on has ended, and the call has moved on.
            self.keep_alone()?;
            if let Some(pause) = &mut self.alone {
                ready!(pause.poll(cx));
            }
        }
        Poll::Ready(Ok(Over::Expired))
    }

    /// Whether the time is kept where the call is.
    fn ask(&mut self) -> Result<(), Error> {
        match self.waiter.holder().is_here()? {
            true => Ok(()),
            false => self.keep_alone(),
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

/// A sleep, which also ends with the runtime that it is on: whoever it was for looks at the clock, or at what else has ended.
///
/// It goes along with a call that is polled on another runtime: nobody may be driving the one before.
pub(crate) struct Pause {
    sleep: Pin<Box<Sleep>>,
    /// Where it was polled last, or made.
    on: Option<runtime::Id>,
    unless: Option<Pin<Box<dyn Future<Output = ()> + Send + Sync>>>,
}

impl Pause {
    /// On the runtime that the call is on, or on this one if it is on none, or on one without a timer: nobody else has to
    /// be driven for it.
    pub(crate) fn with(runtime: &runtime::Handle, duration: Duration) -> Self {
        sleep(duration).unwrap_or_else(|_| {
            let _entered = runtime.enter();
            Self::new(duration)
        })
    }

    /// On this runtime.
    fn new(duration: Duration) -> Self {
        Self {
            sleep: Box::pin(time::sleep(duration)),
            on: runtime::Handle::try_current().ok().map(|here| here.id()),
            unless: None,
        }
    }

    /// It is over when this is, too.
    #[cfg(feature = "manager")]
    pub(crate) fn unless(mut self, over: impl Future<Output = ()> + Send + Sync + 'static) -> Self {
        self.unless = Some(Box::pin(over));
        self
    }

    #[cfg(feature = "manager")]
    pub(crate) fn is_over(&self) -> bool {
        self.sleep.deadline() <= time::Instant::now()
    }

    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(over) = &mut self.unless
            && over.as_mut().poll(cx).is_ready()
        {
            self.unless = None;
            return Poll::Ready(());
        }
        if let Ok(here) = runtime::Handle::try_current()
            && self.on.replace(here.id()) != Some(here.id())
            && crate::pool::has_timer()
        {
            self.sleep = Box::pin(time::sleep_until(self.sleep.deadline()));
        }
        // Tokio panics where the runtime has ended, and has no way to ask.
        let sleep = AssertUnwindSafe(|| self.sleep.as_mut().poll(cx));
        panic::catch_unwind(sleep).unwrap_or(Poll::Ready(()))
    }
}

impl Future for Pause {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.get_mut().poll(cx)
    }
}

impl fmt::Debug for Pause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let deadline = self.sleep.deadline();
        f.debug_tuple("Pause").field(&deadline).finish()
    }
}

/// A sleep here, where there is a runtime that keeps time.
pub(crate) fn sleep(duration: Duration) -> Result<Pause, Error> {
    runtime::Handle::try_current().map_err(|error| {
        Error::invalid("call", "it has to wait, outside a tokio runtime").with_source(error)
    })?;
    if !crate::pool::has_timer() {
        let why = "it has to wait, in a tokio runtime without enable_time";
        return Err(Error::invalid("call", why));
    }
    Ok(Pause::new(duration))
}
