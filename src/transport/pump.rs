//! The task that sends a streaming request, as fast as the peer's windows allow.
//!
//! Only requests that were not complete at the first look have one. It has to be a task: a caller that
//! feeds its request and does not read the response would otherwise stop the request.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use h2::{Reason, SendStream};
use http_body::Frame;
use tokio::runtime;

use super::core::AbortOnDrop;
use crate::error::{BoxError, Error, Kind, Sent, SharedError};

/// The running pump of one call; dropping it ends the request where it is.
#[derive(Debug)]
pub(super) struct Pump {
    shared: Arc<Shared>,
    /// None where all of the request is h2's already.
    task: Option<AbortOnDrop>,
}

/// As much as h2 takes at once: no window is larger.
const MOST: usize = (1 << 31) - 1;

/// A message of this size or more may wait in h2 for its window, and is taken back from there if the response ends first. The
/// least frame size that HTTP/2 allows a peer to ask for; what is smaller is not worth it.
const MAY_WAIT: usize = 16 << 10;

/// What a pump and its task share.
#[derive(Debug, Default)]
struct Shared {
    /// The request body's own error.
    failure: OnceLock<SharedError>,
    /// The stream is not to be reset yet: the task leaves it here when it ends.
    hold: AtomicBool,
    left: Mutex<Left>,
}

/// What is left of a request once its task has ended.
#[derive(Debug, Default)]
enum Left {
    /// The task is there, or nothing is left.
    #[default]
    Nothing,
    /// It is held, or h2 may still have some of it: until the response ends, which the rest is of no use after.
    Stream(SendStream<Bytes>),
    /// The response has ended.
    Ended,
}

/// The task's half: the caller's body, and where it goes. Dropped unfinished (the body failed or panicked, or
/// the call was dropped), it resets the stream, so that neither side waits for the rest.
struct Sender<B> {
    body: B,
    // None only while it is dropped.
    stream: Option<SendStream<Bytes>>,
    finished: bool,
    /// The last that was handed over was more than there was room for.
    exceeds: bool,
    shared: Arc<Shared>,
}

/// The stream is over, whatever there was still to send.
struct Over;

impl Pump {
    /// Sends what was already polled, then the rest.
    pub(super) fn start<B>(
        runtime: &runtime::Handle,
        stream: SendStream<Bytes>,
        queued: [Option<Frame<Bytes>>; 2],
        body: B,
    ) -> Self
    where
        B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<BoxError>,
    {
        let shared = Arc::new(Shared::default());
        let mut sender = Sender {
            body,
            stream: Some(stream),
            finished: false,
            exceeds: false,
            shared: shared.clone(),
        };
        let task = runtime.spawn(async move {
            for frame in queued.into_iter().flatten() {
                if sender.send(frame).await.is_err() {
                    return;
                }
            }
            sender.rest().await;
        });
        Self {
            shared,
            task: Some(AbortOnDrop::new(task.abort_handle())),
        }
    }

    /// Sends a message that is all of the request. Returns what has to be kept until the response ends, if anything does; none
    /// if h2 does not take so much at once, and the message.
    pub(super) fn send_all(
        mut stream: SendStream<Bytes>,
        message: Bytes,
    ) -> Result<Option<Self>, (SendStream<Bytes>, Bytes)> {
        let length = message.len();
        if length > MOST {
            return Err((stream, message));
        }
        // That the stream is over already the response says.
        let _ = stream.send_data(message, true);
        Ok((length >= MAY_WAIT).then(|| Self {
            shared: Arc::new(Shared {
                left: Mutex::new(Left::Stream(stream)),
                ..Shared::default()
            }),
            task: None,
        }))
    }

    /// The request body's own error, if that is what ended the call.
    pub(super) fn failure(&self) -> Option<Error> {
        self.shared.failure.get().map(|error| {
            Error::new(Kind::RequestBody)
                .with_sent(Sent::Sent)
                .with_shared_source(error.clone())
        })
    }

    /// Ends the request where it is and lets go of the body, but keeps the stream until this is dropped.
    pub(super) fn hold(&mut self) {
        self.shared.hold.store(true, Ordering::Release);
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        // A stream that a server has answered in full without a word of the rest counts for as long as h2 has some of that: as
        // one of those that the peer allows, and in memory. Where all was sent this does nothing.
        let left = std::mem::replace(&mut *self.shared.left(), Left::Ended);
        if let Left::Stream(mut stream) = left {
            stream.send_reset(Reason::CANCEL);
        }
    }
}

// === impl Shared ===

impl Shared {
    fn left(&self) -> MutexGuard<'_, Left> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Sender ===

impl<B> Sender<B>
where
    B: http_body::Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    async fn rest(&mut self) {
        while !self.finished {
            let next = poll_fn(|cx| match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Ready(frame) => Poll::Ready(Ok(frame.map(|frame| frame.map_err(Into::into)))),
                // Only who waits has to look: sending tells as well.
                Poll::Pending => self.poll_reset(cx).map(|()| Err(Over)),
            });
            match next.await {
                Err(Over) => self.finished = true,
                Ok(Some(Ok(frame))) => {
                    if self.send(frame).await.is_err() {
                        return;
                    }
                }
                Ok(Some(Err(error))) => {
                    let error: BoxError = error;
                    let _ = self.shared.failure.set(Arc::from(error));
                    return;
                }
                Ok(None) => {
                    self.finished = true;
                    if let Some(stream) = &mut self.stream {
                        let _ = stream.send_data(Bytes::new(), true);
                    }
                }
            }
        }
    }

    async fn send(&mut self, frame: Frame<Bytes>) -> Result<(), Over> {
        let sent = match frame.into_data() {
            Ok(data) => self.send_data(data).await,
            Err(frame) => {
                if let (Ok(trailers), Some(stream)) = (frame.into_trailers(), &mut self.stream) {
                    if let Err(error) = stream.send_trailers(trailers) {
                        // Of HTTP/1 as a connection's own, say: the request has no end then, and is reset.
                        let _ = self.shared.failure.set(Arc::from(BoxError::from(error)));
                        return Err(Over);
                    }
                    self.finished = true;
                }
                return Ok(());
            }
        };
        self.finished |= sent.is_err();
        sent
    }

    /// Hands it to h2 as a whole once there is room for some of it: it is in memory anyway, and h2 cuts it to what the windows
    /// allow without waking this task for each part. So h2 has what is in the window, and one frame of the body.
    async fn send_data(&mut self, mut data: Bytes) -> Result<(), Over> {
        while !data.is_empty() {
            self.stream()?.reserve_capacity(1);
            poll_fn(|cx| self.poll_room(cx)).await?;
            let part = data.split_to(data.len().min(MOST));
            let stream = self.stream()?;
            let exceeds = part.len() > stream.capacity();
            stream.send_data(part, false).map_err(|_| Over)?;
            self.exceeds = exceeds;
        }
        Ok(())
    }

    /// Until h2 may send more of this stream than it has.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Over>> {
        loop {
            let stream = self.stream()?;
            // What is left of an earlier grant is not announced again.
            if stream.capacity() > 0 {
                return Poll::Ready(Ok(()));
            }
            match stream.poll_capacity(cx) {
                Poll::Ready(Some(Ok(0))) => {}
                Poll::Ready(Some(Ok(_))) => return Poll::Ready(Ok(())),
                Poll::Ready(Some(Err(_)) | None) => return Poll::Ready(Err(Over)),
                Poll::Pending => return self.poll_reset(cx).map(|()| Err(Over)),
            }
        }
    }

    /// Ready when there is nothing more to send to.
    fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.stream {
            Some(stream) => stream.poll_reset(cx).map(drop),
            None => Poll::Ready(()),
        }
    }

    fn stream(&mut self) -> Result<&mut SendStream<Bytes>, Over> {
        self.stream.as_mut().ok_or(Over)
    }
}

impl<B> Drop for Sender<B> {
    fn drop(&mut self) {
        let Some(mut stream) = self.stream.take() else {
            return;
        };
        let holds = self.shared.hold.load(Ordering::Acquire);
        if holds || (self.finished && self.exceeds) {
            match &mut *self.shared.left() {
                Left::Ended => {}
                left => {
                    *left = Left::Stream(stream);
                    return;
                }
            }
        }
        if !self.finished || self.exceeds {
            if std::thread::panicking() {
                let why = BoxError::from("the request body panicked");
                let _ = self.shared.failure.set(Arc::from(why));
            }
            stream.send_reset(Reason::CANCEL);
        }
    }
}
