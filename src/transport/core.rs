//! What a connection's handles, calls and tasks share: who has a stream, when the peer was last heard, why it
//! ended.

use std::{
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{task::AbortHandle, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    common::{Common, Why},
    frames::GoAway,
    resets::Resets,
    slots::Slots,
    window::Window,
};
use crate::{
    error::{Error, Kind, Sent},
    sync::Padded,
};

/// More calls on one connection than this, and another one may be worth its while; see [`super::several`].
pub(super) const CROWD: usize = 32;

/// No limit: what a peer says has 32 bits.
const NONE: u64 = u64::MAX;

/// What a connection's handles, calls and tasks share.
pub(super) struct Core {
    pub(super) common: Arc<Common>,
    /// How often its peer is pinged at least, if at all.
    pub(super) keepalive_interval: Option<Duration>,
    // The limit is beside the count: whoever reads it has just read or written that.
    slots: Padded<Slots>,
    resets: Resets,
    /// The limit of streams that h2 has yet to heed.
    limit: AtomicU64,
    flush_owed: AtomicBool,
    /// Whether keepalive has ever pinged.
    kept_alive: AtomicBool,
    /// Of its streams, where that follows the path.
    window: Option<Window>,
    /// When something was last read, in nanoseconds after `born`.
    last_read: AtomicU64,
    born: Instant,
    /// Why it takes no new calls, though it may have some; set once and before `leaves`.
    why_leaving: OnceLock<String>,
    leaves: CancellationToken,
    /// Why it was closed, written once and before it is.
    closed: OnceLock<Why>,
    /// Its task has ended, and the socket is closed.
    ended: CancellationToken,
    task: OnceLock<AbortHandle>,
}

/// A stream that a call has taken; dropping it gives it back.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) core: Arc<Core>,
}

/// Records the end of a connection's task, however it comes.
pub(super) struct Ending(Arc<Core>);

// === impl Core ===

impl Core {
    /// Of a connection that is being made.
    pub(super) fn new(common: Arc<Common>, keepalive_interval: Option<Duration>) -> Self {
        let keepalive_interval =
            keepalive_interval.map(|most| common.polite.interval(&common.to.address, most));
        Self {
            common,
            keepalive_interval,
            slots: Padded(Slots::new()),
            resets: Resets::new(),
            limit: AtomicU64::new(NONE),
            flush_owed: AtomicBool::new(false),
            kept_alive: AtomicBool::new(false),
            window: None,
            last_read: AtomicU64::new(0),
            born: Instant::now(),
            why_leaving: OnceLock::new(),
            leaves: CancellationToken::new(),
            closed: OnceLock::new(),
            ended: CancellationToken::new(),
            task: OnceLock::new(),
        }
    }

    /// The same with windows of its streams that follow the path, up to this.
    pub(super) fn with_adaptive_windows(mut self, most: u32) -> Self {
        self.window = Some(Window::new(most));
        self
    }

    /// The task whose end is the connection's.
    pub(super) fn runs_in(&self, task: AbortHandle) {
        let _ = self.task.set(task);
    }

    /// Takes a stream. It may be one too many when several do at once: h2 then queues it.
    #[inline]
    pub(super) fn take_slot(self: &Arc<Self>) -> Slot {
        if self.slots.take() > CROWD {
            self.common.crowded();
        }
        Slot { core: self.clone() }
    }

    /// Takes a stream if there is one to be had.
    #[inline]
    pub(super) fn try_take_slot(self: &Arc<Self>) -> Option<Slot> {
        if self.slots.try_take()? > CROWD {
            self.common.crowded();
        }
        Some(Slot { core: self.clone() })
    }

    pub(super) fn streams(&self) -> usize {
        self.slots.taken()
    }

    /// How many streams the peer allows, as far as is known.
    pub(super) fn most_streams(&self) -> usize {
        self.slots.most()
    }

    pub(super) fn has_slot(&self) -> bool {
        self.slots.has_room()
    }

    /// The peer allows so many streams.
    pub(super) fn note_limit(&self, read: impl Fn() -> usize) {
        if self.slots.note(read) {
            self.common.slot_free.notify_waiters();
        }
    }

    /// It takes no new calls from now on; those in flight go on.
    pub(super) fn leave(&self, why: impl FnOnce() -> String) {
        if self.why_leaving.get().is_none() && self.why_leaving.set(why()).is_ok() {
            self.leaves.cancel();
            self.common.left(self);
        }
    }

    /// The peer has said that it takes no new calls. h2 is about to refuse them.
    pub(super) fn sent_away(&self, said: &GoAway) {
        // What it minds may have been pings for the sake of cancelled calls.
        let kept_alive = self.kept_alive.load(Ordering::Relaxed);
        if let (true, Some(used)) = (kept_alive && said.minds_pings(), self.keepalive_interval) {
            self.common.polite.minds(&self.common.to.address, used);
        }
        self.leave(|| said.to_string());
    }

    /// Why it takes no new calls, if it does not.
    pub(super) fn why_leaving(&self) -> Option<Why> {
        let leaving = || Some((Kind::ConnectionLost, Some(self.why_leaving.get()?.clone())));
        self.closed.get().cloned().or_else(leaving)
    }

    pub(super) fn is_leaving(&self) -> bool {
        self.why_leaving.get().is_some() || self.closed.get().is_some()
    }

    /// Until it takes no new calls.
    #[cfg(feature = "health")]
    pub(super) async fn leaves(&self) {
        tokio::select! {
            () = self.leaves.cancelled() => {}
            () = self.ended.cancelled() => {}
        }
    }

    /// The peer has said how many streams it allows. h2 heeds it once it could write that it has read it, which is not
    /// before the peer takes what was written earlier.
    pub(super) fn told_limit(&self, streams: u32) {
        self.limit.store(streams.into(), Ordering::Relaxed);
    }

    /// Whether there is such a word that h2 has not heeded yet. All of this is of the connection's task.
    pub(super) fn awaits_limit(&self) -> bool {
        self.limit.load(Ordering::Relaxed) != NONE
    }

    /// h2 goes by this limit.
    pub(super) fn heeds_limit(&self, streams: usize) {
        if self.limit.load(Ordering::Relaxed) == streams as u64 {
            self.limit.store(NONE, Ordering::Relaxed);
        }
    }

    /// Whether something is gathered that is written with the next flush.
    pub(super) fn owes_a_flush(&self, owes: bool) {
        if self.flush_owed.load(Ordering::Relaxed) != owes {
            self.flush_owed.store(owes, Ordering::Relaxed);
        }
    }

    /// Whether h2 has left it at that. This too is of the connection's task.
    pub(super) fn take_owed_flush(&self) -> bool {
        self.flush_owed.load(Ordering::Relaxed) && self.flush_owed.swap(false, Ordering::Relaxed)
    }

    /// Its peer is pinged for its own sake.
    pub(super) fn keeps_alive(&self) {
        self.kept_alive.store(true, Ordering::Relaxed);
    }

    /// The window of its streams, where that follows the path.
    pub(super) fn window(&self) -> Option<&Window> {
        self.window.as_ref()
    }

    /// So much was just read.
    pub(super) fn read(&self, bytes: usize) {
        if let Some(window) = &self.window {
            window.read(bytes);
        }
        // A clock read is 24 ns beside a system call of microseconds. 2^64 ns are 584 years.
        let age = self.born.elapsed().as_nanos() as u64;
        self.last_read.store(age, Ordering::Relaxed);
    }

    /// Whether the peer has ever said anything.
    pub(super) fn heard(&self) -> bool {
        self.last_read.load(Ordering::Relaxed) > 0
    }

    pub(super) fn last_read(&self) -> Instant {
        self.born + Duration::from_nanos(self.last_read.load(Ordering::Relaxed))
    }

    pub(super) fn resets(&self) -> &Resets {
        &self.resets
    }

    pub(super) fn ended(&self) -> &CancellationToken {
        &self.ended
    }

    /// The error of a call on it, once it is closed.
    pub(super) fn error(&self) -> Option<Error> {
        self.closed.get().map(|(kind, reason)| {
            let error = Error::new(*kind).with_sent(Sent::Sent);
            match reason {
                Some(reason) => error.with_reason(reason.clone()),
                None => error,
            }
        })
    }

    /// The error of a new call, once it takes none.
    pub(super) fn over(&self) -> Option<Error> {
        if !self.is_leaving() {
            return None;
        }
        let leaving = || Error::new(Kind::ConnectionLost);
        self.error().or_else(|| {
            Some(match self.why_leaving.get() {
                Some(why) => leaving().with_reason(why.clone()),
                None => leaving(),
            })
        })
    }

    /// What an error of h2 means for the call that got it.
    ///
    /// A stream's own error is a *remote GOAWAY* only if its id is above the peer's last: h2 hands it to
    /// no other. Everything that says less than "not processed" counts as sent.
    pub(super) fn classify(&self, error: h2::Error) -> Error {
        if error.is_remote() && error.is_go_away() {
            return Error::new(Kind::Refused)
                .with_sent(Sent::Unprocessed)
                .with_reason("the peer is closing the connection")
                .with_source(error);
        }
        if error.is_remote() && error.is_reset() {
            return match error.reason() {
                Some(h2::Reason::REFUSED_STREAM) => Error::new(Kind::Refused)
                    .with_sent(Sent::Unprocessed)
                    .with_source(error),
                _ => Error::new(Kind::Reset)
                    .with_sent(Sent::Sent)
                    .with_source(error),
            };
        }
        if let Some(error) = self.error() {
            return error;
        }
        if error.is_reset() {
            return out_of_order(error);
        }
        Error::new(Kind::ConnectionLost)
            .with_sent(Sent::Sent)
            .with_source(error)
    }

    /// The same once the peer has begun to answer: whatever it says now, it has processed the call.
    pub(super) fn classify_late(&self, error: h2::Error) -> Error {
        if error.is_reset() && error.is_remote() {
            return Error::new(Kind::Reset)
                .with_sent(Sent::Sent)
                .with_source(error);
        }
        if let Some(error) = self.error() {
            return error;
        }
        if error.is_reset() {
            return out_of_order(error);
        }
        Error::new(Kind::ConnectionLost)
            .with_sent(Sent::Sent)
            .with_source(error)
    }

    pub(super) fn close_because(&self, kind: Kind, reason: Option<String>) {
        // Whoever is first says why; h2 drops the streams when the task is gone.
        let _ = self.closed.set((kind, reason));
        if let Some(task) = self.task.get() {
            task.abort();
        }
    }
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Core")
            .field("authority", &self.common.to.authority)
            .field("streams", &self.streams())
            .field("closed", &self.closed)
            .finish_non_exhaustive()
    }
}

/// What the peer sent on this stream alone breaks HTTP/2, which h2 has reset for it; the connection goes on.
fn out_of_order(error: h2::Error) -> Error {
    Error::new(Kind::Internal)
        .with_sent(Sent::Sent)
        .with_reason("the answer breaks HTTP/2")
        .with_source(error)
}

// === impl Slot ===

impl Drop for Slot {
    fn drop(&mut self) {
        if self.core.slots.give_back() {
            self.core.common.slot_free.notify_one();
        }
    }
}

// === impl Ending ===

impl Ending {
    pub(super) fn of(core: Arc<Core>) -> Self {
        Self(core)
    }

    pub(super) fn because(&self, result: Result<(), h2::Error>) {
        let why = match result {
            Ok(()) => "closed by the peer".to_owned(),
            Err(error) => error.to_string(),
        };
        let _ = self.0.closed.set((Kind::ConnectionLost, Some(why)));
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        let _ = self.0.closed.set((Kind::ConnectionLost, None));
        self.0.ended.cancel();
        // These hold the core, which holds them.
        self.0.resets.close();
        // After it says that it has ended: whoever lets it in looks. Whoever waits for a stream of it is told.
        self.0.common.remove(&self.0);
    }
}

/// Aborts a task unless disarmed.
pub(super) struct AbortOnDrop(Option<AbortHandle>);

impl AbortOnDrop {
    pub(super) fn new(task: AbortHandle) -> Self {
        Self(Some(task))
    }

    pub(super) fn abort(&self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }

    pub(super) fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.abort();
    }
}

impl fmt::Debug for AbortOnDrop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AbortOnDrop")
            .field(&self.0.is_some())
            .finish()
    }
}
