//! What a connection's handles, calls and tasks share: who has a stream, when the peer was last heard, why it
//! ended.

use std::{
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use http::{
    HeaderMap, HeaderValue,
    uri::{Authority, Scheme},
};
use tokio::{runtime, sync::Notify, task::AbortHandle};
use tokio_util::sync::CancellationToken;

use super::{
    Connector,
    identity::Identity,
    resets::Resets,
    slots::{Slots, Waiting},
};
use crate::{
    endpoint::{BoxFuture, Lifeline},
    error::{Error, Kind, Sent},
    sync::Padded,
};

/// What a connection's handles, calls and tasks share.
pub(super) struct Core {
    pub(super) scheme: Scheme,
    pub(super) authority: Authority,
    pub(super) user_agent: HeaderValue,
    pub(super) max_header_list_size: usize,
    pub(super) identity: Identity,
    /// Where pumps of streaming requests run: a call may be made outside of any runtime.
    pub(super) runtime: runtime::Handle,
    // The limit is beside the count: whoever reads it has just read or written that.
    slots: Padded<Slots>,
    slot_free: Arc<Notify>,
    resets: Resets,
    /// When something was last read, in nanoseconds after `born`.
    last_read: AtomicU64,
    born: Instant,
    served: AtomicBool,
    /// Why it was closed, written once and before it is.
    closed: OnceLock<(Kind, Option<String>)>,
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
    /// Of a connection that is being made; to be called in the runtime that it will run in.
    pub(super) fn new(authority: Authority, identity: HeaderMap, config: &Connector) -> Self {
        Self {
            scheme: config.scheme(),
            authority,
            user_agent: config.user_agent.clone(),
            max_header_list_size: config.max_header_list_size,
            identity: Identity::new(identity),
            runtime: runtime::Handle::current(),
            slots: Padded(Slots::new()),
            slot_free: Arc::new(Notify::new()),
            resets: Resets::new(),
            last_read: AtomicU64::new(0),
            born: Instant::now(),
            served: AtomicBool::new(false),
            closed: OnceLock::new(),
            ended: CancellationToken::new(),
            task: OnceLock::new(),
        }
    }

    /// The task whose end is the connection's.
    pub(super) fn runs_in(&self, task: AbortHandle) {
        let _ = self.task.set(task);
    }

    /// Takes a stream. It may be one too many when several do at once: h2 then queues it.
    pub(super) fn take_slot(self: &Arc<Self>) -> Slot {
        self.slots.take();
        Slot { core: self.clone() }
    }

    pub(super) fn streams(&self) -> usize {
        self.slots.taken()
    }

    pub(super) fn has_slot(&self) -> bool {
        self.slots.has_room()
    }

    /// There was no slot: ready if one has to look again. Else it has this task woken.
    pub(super) fn poll_slot(
        &self,
        waiting: &mut Waiting,
        limit: impl Fn() -> usize,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        waiting.poll(&self.slots, &self.slot_free, limit, cx)
    }

    /// The peer allows so many streams.
    pub(super) fn note_limit(&self, read: impl Fn() -> usize) {
        if self.slots.note(read) {
            self.slot_free.notify_waiters();
        }
    }

    /// Something was just read.
    pub(super) fn read(&self) {
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

    /// The first answer shows that the peer is of use.
    pub(super) fn served(&self) {
        // A load is cheap on a line that all threads share; a store each time would not be.
        if !self.served.load(Ordering::Relaxed) {
            self.served.store(true, Ordering::Relaxed);
        }
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
        Error::new(Kind::ConnectionLost)
            .with_sent(Sent::Sent)
            .with_source(error)
    }

    /// The same once the peer has begun to answer: whatever it says now, it has processed the call.
    pub(super) fn classify_late(&self, error: h2::Error) -> Error {
        let kind = match error.is_reset() && error.is_remote() {
            true => Kind::Reset,
            false => Kind::ConnectionLost,
        };
        if kind == Kind::ConnectionLost
            && let Some(error) = self.error()
        {
            return error;
        }
        Error::new(kind).with_sent(Sent::Sent).with_source(error)
    }

    pub(super) fn close_because(&self, kind: Kind, reason: Option<String>) {
        // Whoever is first says why; h2 drops the streams when the task is gone.
        let _ = self.closed.set((kind, reason));
        if let Some(task) = self.task.get() {
            task.abort();
        }
    }
}

impl Lifeline for Core {
    fn closed(&self) -> BoxFuture<'_, Error> {
        Box::pin(async {
            self.ended.cancelled().await;
            self.error()
                .unwrap_or_else(|| Error::new(Kind::ConnectionLost))
        })
    }

    fn disowned(&self) -> BoxFuture<'_, Error> {
        Box::pin(self.identity.denied())
    }

    fn close(&self, why: Error) {
        self.close_because(why.kind(), why.reason());
    }

    fn has_served(&self) -> bool {
        self.served.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Core")
            .field("authority", &self.authority)
            .field("streams", &self.streams())
            .field("closed", &self.closed)
            .finish_non_exhaustive()
    }
}

// === impl Slot ===

impl Drop for Slot {
    fn drop(&mut self) {
        if self.core.slots.give_back() {
            self.core.slot_free.notify_one();
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
        // Whoever waits for a stream learns that there will be none.
        self.0.slot_free.notify_waiters();
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
