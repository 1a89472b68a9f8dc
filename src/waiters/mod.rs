//! One slot for each pending call, by which it is woken when its time is up or when it is cancelled.
//!
//! A call that is ready at once never comes here. One that is pending arms a slot, which is a lock that nobody else
//! wants and a place in a slab: less than a timer and a third of a watched `CancellationToken`, and the same on
//! many threads. One [sweeper](sweeper) for all slots of a table wakes those whose time is up. A wake is a hint: a call
//! looks for itself whether it is cancelled, and what the clock says.

mod sweeper;
mod table;

use std::{
    fmt,
    task::{Context, Poll},
};

use self::table::{Key, Look};
pub(crate) use self::{
    sweeper::Timers,
    table::{NEVER, Table},
};

/// Where a call's slot is, and who may end the call.
pub(crate) trait Holder {
    fn table(&self) -> &Table;

    /// Whether all calls of this holder are cancelled. What makes it so wakes the table afterwards.
    fn is_cancelled(&self) -> bool;

    /// What the holder's slots are marked with.
    fn tag(&self) -> usize {
        0
    }

    /// The sweeper of its table, if calls have times.
    fn timers(&self) -> Option<&Timers> {
        None
    }
}

/// Why a call is over before it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Over {
    Cancelled,
    /// Its time is up.
    Expired,
    /// Nobody keeps the time any more: the runtime has ended that did.
    Untimed,
}

/// One call's slot, armed while it is pending. Dropping it disarms it.
pub(crate) struct Waiter<H: Holder> {
    holder: H,
    at: u64,
    key: Option<Key>,
}

// === impl Waiter ===

impl<H: Holder> Waiter<H> {
    /// For a call whose time is up `at` this time of the holder's [`Timers`], or [`NEVER`].
    #[inline]
    pub(crate) const fn new(holder: H, at: u64) -> Self {
        Self {
            holder,
            at,
            key: None,
        }
    }

    pub(crate) const fn holder(&self) -> &H {
        &self.holder
    }

    pub(crate) const fn is_timed(&self) -> bool {
        self.at != NEVER
    }

    #[inline]
    pub(crate) fn is_cancelled(&self) -> bool {
        self.holder.is_cancelled()
    }

    /// Whether its time is up, by the clock.
    pub(crate) fn is_expired(&self) -> bool {
        self.is_timed() && (self.holder.timers()).is_some_and(|timers| timers.now() >= self.at)
    }

    /// To be asked whenever the call itself is pending: whether it is over. Has this task woken when it is.
    #[inline]
    pub(crate) fn poll(&mut self, cx: &Context<'_>) -> Poll<Over> {
        if self.holder.is_cancelled() {
            return Poll::Ready(Over::Cancelled);
        }
        // Armed => (armed | woken)
        if let Some(key) = self.key {
            if self.holder.table().look(key, cx) == Look::Waits {
                return Poll::Pending;
            }
            self.key = None;
            if let Some(over) = self.over() {
                return Poll::Ready(over);
            }
        }
        // Interest first, then another look.
        let (key, sooner) = self
            .holder
            .table()
            .arm(cx.waker().clone(), self.at, self.holder.tag());
        self.key = Some(key);
        if let Some(timers) = self.holder.timers()
            && self.is_timed()
        {
            if sooner {
                timers.sooner();
            }
            if timers.is_dead() {
                return Poll::Ready(Over::Untimed);
            }
        }
        match self.holder.is_cancelled() {
            true => Poll::Ready(Over::Cancelled),
            false => Poll::Pending,
        }
    }

    fn over(&self) -> Option<Over> {
        if self.holder.is_cancelled() {
            return Some(Over::Cancelled);
        }
        let timers = self.holder.timers().filter(|_| self.is_timed())?;
        if timers.now() >= self.at {
            return Some(Over::Expired);
        }
        timers.is_dead().then_some(Over::Untimed)
    }

    /// The call is not pending for now.
    #[inline]
    pub(crate) fn disarm(&mut self) {
        if let Some(key) = self.key.take() {
            self.holder.table().disarm(key);
        }
    }
}

impl<H: Holder> Drop for Waiter<H> {
    #[inline]
    fn drop(&mut self) {
        self.disarm();
    }
}

impl<H: Holder> fmt::Debug for Waiter<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waiter")
            .field("timed", &self.is_timed())
            .field("armed", &self.key.is_some())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table")
            .field("shards", &self.shards())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
