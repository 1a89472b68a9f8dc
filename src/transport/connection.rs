//! One HTTP/2 connection: the handle that calls go through, and the task that moves its frames.

use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::{Ping, client::SendRequest};
use http::uri::Scheme;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    Connector,
    common::Common,
    core::{AbortOnDrop, Core, Ending, Slot},
    paced::Paced,
    pings::{self, Keepalive},
    slots::Waiting,
    socket::Socket,
    window,
};
use crate::{
    endpoint::{Lifeline, step},
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
    waiting: Waiting,
    /// The stream of the call that follows, if it has been taken already.
    pub(super) slot: Option<Slot>,
    /// Whether an answer shows that the peer is of use to somebody.
    pub(super) serves: bool,
}

/// How much h2 may keep for the sake of small messages that nobody has read, in bytes by its own account of 256 for each
/// at most: a quarter of a million of them.
const UNREAD_FRAMES: usize = 64 << 20;

// === impl Connection ===

impl Connection {
    /// Speaks HTTP/2 over `io`, and returns when the peer has answered a ping.
    pub(super) async fn handshake<I>(
        io: I,
        common: &Arc<Common>,
        config: &Connector,
    ) -> Result<Self, Error>
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let core = Core::new(common.clone(), config.keepalive_interval);
        let (core, stream_window) = match config.adaptive_windows {
            true => {
                let most = config.stream_window;
                (core.with_adaptive_windows(most), window::LEAST)
            }
            false => (core, config.stream_window),
        };
        let core = Arc::new(core);
        let io = Socket::new(io, core.clone());
        let failed = |error: h2::Error| {
            Error::new(Kind::ConnectionLost)
                .with_reason("HTTP/2 handshake failed")
                .with_source(error)
        };
        let (send, mut connection) = h2::client::Builder::new()
            .enable_push(false)
            // HTTP/2's own 16 KiB are many reads and many heads: answers of 1 MiB take two thirds of the processor time
            // with 64 KiB, and hardly less with 1 MiB. While one comes, other calls' answers wait.
            .max_frame_size(config.max_frame_size)
            .header_table_size(config.header_table_size)
            .initial_window_size(stream_window)
            .initial_connection_window_size(config.connection_window)
            // h2's guards against hostile peers count what honest ones do too: small messages that nobody has read
            // yet and, over a connection's whole life, frames for calls that were cancelled. One caller's would
            // close the connection under all others. The first is bounded where memory would be in danger.
            .data_frame_budget(UNREAD_FRAMES)
            .max_local_error_reset_streams(None)
            .max_concurrent_reset_streams(4096)
            .handshake::<_, Bytes>(io)
            .await
            .map_err(failed)?;
        let Some(mut pings) = connection.ping_pong() else {
            return Err(Error::new(Kind::Internal).with_reason("h2 gave no ping handle"));
        };
        let ending = Ending::of(core.clone());
        let connection = Paced::new(connection, core.clone());
        let task = tokio::spawn(async move {
            let ending = ending;
            // Moved into the await: its drop is what fails the streams after a write error.
            let result = connection.await;
            ending.because(result);
        });
        core.runs_in(task.abort_handle());
        // Until the handle is out, dropping this future has to close the connection.
        let undo = AbortOnDrop::new(task.abort_handle());
        step::next("waiting for its HTTP/2 settings");
        if let Err(error) = pings.ping(Ping::opaque()).await {
            // The ping fails as the connection is dropped, an instant before its task says why.
            core.ended().cancelled().await;
            return Err(match core.error().and_then(|error| error.reason()) {
                Some(why) => failed_because(&core, &why),
                None => failed(error),
            });
        }
        // The answer to a ping comes after the peer's settings.
        core.note_limit(|| send.current_max_send_streams());
        let keepalive = Keepalive {
            interval: core.keepalive_interval,
            timeout: config.keepalive_timeout,
            while_idle: config.keepalive_while_idle,
        };
        common.admit(&core).map_err(|why| match why.reason() {
            Some(why) => failed_because(&core, &why),
            None => why,
        })?;
        tokio::spawn(pings::run(core.clone(), pings, keepalive));
        undo.disarm();
        Ok(Self {
            send,
            core,
            waiting: Waiting::default(),
            slot: None,
            serves: true,
        })
    }

    /// The same handle, for questions of our own: that they are answered is no use to anybody.
    #[cfg(feature = "health")]
    pub(super) fn for_ourselves(mut self) -> Self {
        self.serves = false;
        self
    }

    /// Its lifeline, to be told of its end and to close it.
    pub fn lifeline(&self) -> Arc<dyn Lifeline> {
        self.core.common.clone()
    }

    /// How many calls are using it.
    pub fn streams(&self) -> usize {
        self.core.streams()
    }

    pub(super) fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        loop {
            ready!(self.poll_usable(cx))?;
            // For what is shared by several connections only those wait that take a stream of any: one that waits for this
            // one would keep a wake that is meant for the others. h2 has our own questions wait by itself.
            if !self.serves || self.core.has_slot() {
                self.waiting.end();
                return Poll::Ready(Ok(()));
            }
            let limit = || self.send.current_max_send_streams();
            let note = || self.core.note_limit(limit);
            ready!(self.waiting.poll(&self.core.common.slot_free, note, cx));
        }
    }

    /// Whether it takes calls, if there is a stream for them.
    pub(super) fn poll_usable(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let over = self
            .core
            .over()
            .or_else(|| self.core.common.identity.error());
        if let Some(error) = over {
            return Poll::Ready(Err(error.with_sent(Sent::Unsent)));
        }
        Poll::Ready(match ready!(self.send.poll_ready(cx)) {
            Ok(()) => Ok(()),
            Err(error) => Err(self.core.classify(error).with_sent(Sent::Unsent)),
        })
    }
}

fn failed_because(core: &Core, why: &str) -> Error {
    let mut reason = format!("HTTP/2 handshake failed: {why}");
    if !core.heard() {
        reason.push_str(", and the peer had said nothing");
        // Servers in Go hang up on plaintext without a word.
        if core.common.scheme == Scheme::HTTP {
            reason.push_str("; it may want TLS");
        }
    }
    Error::new(Kind::ConnectionLost).with_reason(reason)
}

impl Clone for Connection {
    fn clone(&self) -> Self {
        Self {
            send: self.send.clone(),
            core: self.core.clone(),
            waiting: Waiting::default(),
            slot: None,
            serves: self.serves,
        }
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Connection").field(&self.core).finish()
    }
}
