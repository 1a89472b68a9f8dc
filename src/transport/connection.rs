//! One HTTP/2 connection: the handle that calls go through, and the task that moves its frames.

use std::{
    fmt,
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use bytes::Bytes;
use h2::{Ping, client::SendRequest};
use http::{
    HeaderValue,
    uri::{Authority, Scheme},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    runtime,
    sync::{Notify, futures::OwnedNotified},
    task::AbortHandle,
};
use tokio_util::sync::CancellationToken;

use super::{
    Connector,
    paced::Paced,
    pings::{self, Keepalive},
    resets::Resets,
};
use crate::{
    endpoint::{BoxFuture, Lifeline},
    error::{Error, Kind, Sent},
};

/// A connection to one peer, as a tower service; a clone is another handle on the same connection.
///
/// `poll_ready` is pending while all the streams that the peer allows are in use, and fails once the
/// connection takes no more calls. When the last handle is dropped, the connection closes as its last
/// call ends.
pub struct Connection {
    pub(super) send: SendRequest<Bytes>,
    pub(super) core: Arc<Core>,
    /// Waiting for a stream to become free.
    slot: Option<Pin<Box<OwnedNotified>>>,
}

/// What a connection's handles, calls and tasks share.
pub(super) struct Core {
    pub(super) scheme: Scheme,
    pub(super) authority: Authority,
    pub(super) user_agent: HeaderValue,
    pub(super) max_header_list_size: usize,
    /// Where pumps of streaming requests run: a call may be made outside of any runtime.
    pub(super) runtime: runtime::Handle,
    /// Calls that have a stream, and how many the peer allows; a new reading replaces the latter when it
    /// is reached.
    streams: AtomicUsize,
    max_streams: AtomicUsize,
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
struct Ending(Arc<Core>);

/// The socket, noting when something was read.
struct Watched<I> {
    io: I,
    core: Arc<Core>,
}

// === impl Connection ===

impl Connection {
    /// Speaks HTTP/2 over `io`, and returns when the peer has answered a ping.
    pub(super) async fn handshake<I>(
        io: I,
        authority: Authority,
        config: &Connector,
    ) -> Result<Self, Error>
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let core = Arc::new(Core {
            scheme: Scheme::HTTP,
            authority,
            user_agent: config.user_agent.clone(),
            max_header_list_size: config.max_header_list_size,
            runtime: runtime::Handle::current(),
            streams: AtomicUsize::new(0),
            max_streams: AtomicUsize::new(usize::MAX),
            slot_free: Arc::new(Notify::new()),
            resets: Resets::new(),
            last_read: AtomicU64::new(0),
            born: Instant::now(),
            served: AtomicBool::new(false),
            closed: OnceLock::new(),
            ended: CancellationToken::new(),
            task: OnceLock::new(),
        });
        let io = Watched {
            io,
            core: core.clone(),
        };
        let failed = |error: h2::Error| {
            Error::new(Kind::ConnectionLost)
                .with_reason("HTTP/2 handshake failed")
                .with_source(error)
        };
        let (send, mut connection) = h2::client::Builder::new()
            .enable_push(false)
            .initial_window_size(config.stream_window)
            .initial_connection_window_size(config.connection_window)
            // h2's guards against hostile peers count what honest ones do too, over a connection's whole
            // life: small messages that arrive together, and frames for calls that were cancelled. One
            // caller's cancellations would close the connection under all others.
            .data_frame_budget(usize::MAX)
            .max_local_error_reset_streams(None)
            .max_concurrent_reset_streams(4096)
            .handshake::<_, Bytes>(io)
            .await
            .map_err(failed)?;
        let Some(mut pings) = connection.ping_pong() else {
            return Err(Error::new(Kind::Internal).with_reason("h2 gave no ping handle"));
        };
        let ending = Ending(core.clone());
        let connection = Paced::new(connection, core.clone());
        let task = tokio::spawn(async move {
            let ending = ending;
            // Moved into the await: its drop is what fails the streams after a write error.
            let result = connection.await;
            ending.because(result);
        });
        let _ = core.task.set(task.abort_handle());
        // Until the handle is out, dropping this future has to close the connection.
        let undo = AbortOnDrop(Some(task.abort_handle()));
        if let Err(error) = pings.ping(Ping::opaque()).await {
            return Err(core.error().unwrap_or_else(|| failed(error)));
        }
        // The answer to a ping comes after the peer's settings.
        let max = send.current_max_send_streams();
        core.max_streams.store(max, Ordering::Relaxed);
        let keepalive = Keepalive {
            interval: config.keepalive_interval,
            timeout: config.keepalive_timeout,
            while_idle: config.keepalive_while_idle,
        };
        tokio::spawn(pings::run(core.clone(), pings, keepalive));
        undo.disarm();
        Ok(Self {
            send,
            core,
            slot: None,
        })
    }

    /// Its lifeline, to be told of its end and to close it.
    pub fn lifeline(&self) -> Arc<dyn Lifeline> {
        self.core.clone()
    }

    /// How many calls are using it.
    pub fn streams(&self) -> usize {
        self.core.streams()
    }

    pub(super) fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        loop {
            if let Some(error) = self.core.error() {
                return Poll::Ready(Err(error.with_sent(Sent::Unsent)));
            }
            if let Err(error) = ready!(self.send.poll_ready(cx)) {
                return Poll::Ready(Err(self.core.classify(error).with_sent(Sent::Unsent)));
            }
            if self.core.has_slot() {
                self.slot = None;
                return Poll::Ready(Ok(()));
            }
            match &mut self.slot {
                // Interest first, then another look.
                None => {
                    let max = self.send.current_max_send_streams();
                    if max > self.core.max_streams.swap(max, Ordering::SeqCst) {
                        // There is room that no slot was given back for.
                        self.core.slot_free.notify_waiters();
                    }
                    let mut slot = Box::pin(self.core.slot_free.clone().notified_owned());
                    slot.as_mut().enable();
                    self.slot = Some(slot);
                }
                Some(slot) => {
                    ready!(slot.as_mut().poll(cx));
                    self.slot = None;
                }
            }
        }
    }
}

impl Clone for Connection {
    fn clone(&self) -> Self {
        Self {
            send: self.send.clone(),
            core: self.core.clone(),
            slot: None,
        }
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Connection").field(&self.core).finish()
    }
}

// === impl Core ===

impl Core {
    /// Takes a stream. It may be one too many when several do at once: h2 then queues it.
    pub(super) fn take_slot(self: &Arc<Self>) -> Slot {
        self.streams.fetch_add(1, Ordering::Relaxed);
        Slot { core: self.clone() }
    }

    pub(super) fn streams(&self) -> usize {
        self.streams.load(Ordering::Relaxed)
    }

    // All SeqCst, as in `Slot::drop`: a waiter notes the limit, registers and then counts; a slot that is
    // given back counts and then reads the limit. In one total order one of the two sees the other, so a
    // waiter that saw a full house is woken by the slot that ends it.
    fn has_slot(&self) -> bool {
        self.streams.load(Ordering::SeqCst) < self.max_streams.load(Ordering::SeqCst)
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
        let before = self.core.streams.fetch_sub(1, Ordering::SeqCst);
        // Only a full house can have anybody waiting.
        if before >= self.core.max_streams.load(Ordering::SeqCst) {
            self.core.slot_free.notify_one();
        }
    }
}

// === impl Ending ===

impl Ending {
    fn because(&self, result: Result<(), h2::Error>) {
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
pub(super) struct AbortOnDrop(pub(super) Option<AbortHandle>);

impl AbortOnDrop {
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

// === impl Watched ===

impl<I: AsyncRead + Unpin> AsyncRead for Watched<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.io).poll_read(cx, buf);
        if buf.filled().len() > before {
            // A clock read is 24 ns beside a system call of microseconds. 2^64 ns are 584 years.
            let age = self.core.born.elapsed().as_nanos() as u64;
            self.core.last_read.store(age, Ordering::Relaxed);
        }
        result
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Watched<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
