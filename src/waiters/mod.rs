//! One slot for each pending call, by which it is woken when its time is up or when it is cancelled.
//!
//! A call that is ready at once never comes here. One that is pending arms a slot, which is a lock that nobody else
//! wants and a place in a slab: no allocation, and nothing that other threads write. One [sweeper](sweeper) for all slots of a table wakes those whose time is up. A wake is a hint: a call
//! looks for itself whether it is cancelled, and what the clock says.

mod clock;
pub(crate) mod guard;
mod sweeper;
mod table;
pub(crate) mod timed;

use std::{
    fmt,
    task::{Context, Poll},
};

use crate::error::Error;

use self::table::{Key, Look};
pub(crate) use self::{
    clock::{after, now},
    sweeper::Timers,
    table::{NEVER, Table},
};

/// Where a call's slot is, and who may end the call.
pub(crate) trait Holder {
    /// None as long as nobody could wake anybody.
    fn table(&self) -> Option<&Table>;

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

    /// Whether that runs where this is asked.
    fn is_here(&self) -> Result<bool, Error> {
        Ok(true)
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
    /// It is not over, and has moved to another task.
    Moved,
}

/// One call's slot, armed while it is pending. Dropping it disarms it.
pub(crate) struct Waiter<H: Holder> {
    holder: H,
    at: u64,
    key: Option<Key>,
}

// === impl Waiter ===

impl<H: Holder> Waiter<H> {
    /// For a call whose time is up `at` this time, or [`NEVER`].
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

    /// To be asked whenever the call itself is pending: whether it is over. Has this task woken when it is.
    #[inline]
    pub(crate) fn poll(&mut self, cx: &Context<'_>) -> Poll<Over> {
        if self.holder.is_cancelled() {
            return Poll::Ready(Over::Cancelled);
        }
        // Armed => (armed | woken)
        let Some(table) = self.holder.table() else {
            return Poll::Ready(Over::Untimed);
        };
        if let Some(key) = self.key {
            match table.look(key, cx) {
                Look::Waits => return Poll::Pending,
                Look::Moved if !self.is_timed() => return Poll::Pending,
                // Whoever keeps its time may be another there.
                Look::Moved => return Poll::Ready(Over::Moved),
                Look::Expired => {
                    self.key = None;
                    return Poll::Ready(Over::Expired);
                }
                Look::Woken => self.key = None,
            }
            if let Some(over) = self.over() {
                return Poll::Ready(over);
            }
        }
        // Interest first, then another look.
        let (key, sooner) = table.arm(cx.waker().clone(), self.at, self.holder.tag());
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

    /// Somebody else keeps its time.
    fn untime(&mut self) {
        self.disarm();
        self.at = NEVER;
    }

    fn over(&self) -> Option<Over> {
        if self.holder.is_cancelled() {
            return Some(Over::Cancelled);
        }
        let timers = self.holder.timers().filter(|_| self.is_timed())?;
        timers.is_dead().then_some(Over::Untimed)
    }

    /// The call is not pending for now.
    #[inline]
    pub(crate) fn disarm(&mut self) {
        if let Some(key) = self.key.take()
            && let Some(table) = self.holder.table()
        {
            table.disarm(key);
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

#[cfg(all(test, switchboard_loom))]
mod loom_tests;

#[cfg(test)]
mod tests;
