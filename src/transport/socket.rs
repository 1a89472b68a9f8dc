//! The socket under a connection, which notes when it was last read and whether the peer says goodbye, and finds out
//! why a peer hung up that had not begun to speak HTTP/2.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{core::Core, frames::Frames, gather::Gather};

/// How an alert of TLS begins: its content type, and the version's first byte. HTTP/2 begins with a frame of
/// at most 16 KiB; this would be one of more than 1 MiB.
const TLS_ALERT: [u8; 2] = [21, 3];

/// The socket, noting when something was read, and what a peer said that then hung up.
pub(super) struct Socket<I> {
    io: I,
    core: Arc<Core>,
    heard: bool,
    frames: Frames,
    gather: Gather,
    /// A write failed, and what the peer had said before that is being looked for.
    write_failed: Option<io::Error>,
}

// === impl Socket ===

impl<I> Socket<I> {
    pub(super) fn new(io: I, core: Arc<Core>) -> Self {
        Self {
            io,
            core,
            heard: false,
            frames: Frames::default(),
            gather: Gather::default(),
            write_failed: None,
        }
    }
}

impl<I: AsyncRead + Unpin> Socket<I> {
    /// The result of a write, or, if the peer had hung up before it spoke HTTP/2, what it said instead.
    ///
    /// A server that refuses us, a client certificate of TLS 1.3 or plaintext, sends an alert and closes.
    /// What we then write fails before anybody has read the alert, and "broken pipe" is not why.
    fn poll_written<T>(
        &mut self,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut I>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let failed = match self.write_failed.take() {
            Some(failed) => failed,
            None => match ready!(write(Pin::new(&mut self.io), cx)) {
                Err(error) if !self.heard && hung_up(&error) => error,
                result => return Poll::Ready(result),
            },
        };
        // Nothing more comes over such a socket: what was said is there to be read, and then its end.
        let mut scratch = [0; 64];
        let mut buf = ReadBuf::new(&mut scratch);
        Poll::Ready(Err(match Pin::new(&mut *self).poll_read(cx, &mut buf) {
            Poll::Pending => {
                self.write_failed = Some(failed);
                return Poll::Pending;
            }
            Poll::Ready(Err(said)) if said.kind() == io::ErrorKind::InvalidData => said,
            Poll::Ready(_) => failed,
        }))
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> Socket<I> {
    /// Writes what was gathered.
    fn poll_gathered(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.gather.rest().is_empty() {
            let gather = std::mem::take(&mut self.gather);
            let result = self.poll_written(cx, |io, cx| io.poll_write(cx, gather.rest()));
            self.gather = gather;
            match ready!(result)? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.gather.wrote(written),
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// The other side does not take what is written, and may have said why.
fn hung_up(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
    matches!(
        error.kind(),
        BrokenPipe | ConnectionReset | ConnectionAborted
    )
}

impl<I: AsyncRead + Unpin> AsyncRead for Socket<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.io).poll_read(cx, buf);
        let new = &buf.filled()[before..];
        if !new.is_empty() {
            self.core.read(new.len());
            if !self.heard && new.starts_with(&TLS_ALERT) {
                let why = "the peer speaks TLS, and was spoken to in plaintext";
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, why)));
            }
            self.heard = true;
            if let Some(said) = self.frames.read(new) {
                self.core.sent_away(&said);
            }
            if let Some(streams) = self.frames.take_streams() {
                self.core.told_limit(streams);
            }
        }
        result
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Socket<I> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(buf)])
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let puts_off = self.gather.puts_off();
        self.core.owes_a_flush(puts_off);
        if puts_off {
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_gathered(cx))?;
        self.poll_written(cx, |io, cx| io.poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_gathered(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            if let Some(taken) = self.gather.take(bufs) {
                return Poll::Ready(Ok(taken));
            }
            // Whichever write comes first writes what a flush was put off for, now or when the socket takes it.
            self.core.owes_a_flush(false);
            if self.gather.rest().is_empty() {
                return self.poll_written(cx, |io, cx| io.poll_write_vectored(cx, bufs));
            }
            ready!(self.poll_gathered(cx))?;
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
