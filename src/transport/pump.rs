//! The task that sends a streaming request, as fast as the peer's windows allow.
//!
//! Only requests that were not complete at the first look have one. It has to be a task: a caller that
//! feeds its request and does not read the response would otherwise stop the request.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
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
    task: AbortOnDrop,
}

/// What a pump and its task share.
#[derive(Debug, Default)]
struct Shared {
    /// The request body's own error.
    failure: OnceLock<SharedError>,
    /// The stream is not to be reset yet: the task leaves it here when it ends.
    hold: AtomicBool,
    held: Mutex<Option<SendStream<Bytes>>>,
}

/// The task's half: the caller's body, and where it goes. Dropped unfinished (the body failed or panicked, or
/// the call was dropped), it resets the stream, so that neither side waits for the rest.
struct Sender<B> {
    body: B,
    // None only while it is dropped.
    stream: Option<SendStream<Bytes>>,
    finished: bool,
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
            task: AbortOnDrop::new(task.abort_handle()),
        }
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
        self.task.abort();
    }
}

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
                    self.finished = true;
                    let _ = stream.send_trailers(trailers);
                }
                Ok(())
            }
        };
        self.finished |= sent.is_err();
        sent
    }

    /// Hands it to h2 as a whole once there is room for some of it: it is in memory anyway, and h2 cuts it to what the windows
    /// allow without waking this task for each part. So h2 has what is in the window, and one frame of the body.
    async fn send_data(&mut self, data: Bytes) -> Result<(), Over> {
        if data.is_empty() {
            return Ok(());
        }
        self.stream()?.reserve_capacity(1);
        poll_fn(|cx| self.poll_room(cx)).await?;
        self.stream()?.send_data(data, false).map_err(|_| Over)
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
        if self.shared.hold.load(Ordering::Acquire) {
            let held = &self.shared.held;
            *held.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream);
            return;
        }
        if !self.finished {
            if std::thread::panicking() {
                let why = BoxError::from("the request body panicked");
                let _ = self.shared.failure.set(Arc::from(why));
            }
            stream.send_reset(Reason::CANCEL);
        }
    }
}
