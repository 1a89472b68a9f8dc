//! The task that sends a streaming request, as fast as the peer's windows allow.
//!
//! Only requests that were not complete at the first look have one. It has to be a task: a caller that
//! feeds its request and does not read the response would otherwise stop the request.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::{Reason, SendStream};
use http_body::Frame;
use tokio::runtime;

use super::connection::AbortOnDrop;
use crate::error::{BoxError, Error, Kind, Sent, SharedError};

/// The running pump of one call; dropping it ends the request where it is.
#[derive(Debug)]
pub(super) struct Pump {
    failure: Arc<OnceLock<SharedError>>,
    _task: AbortOnDrop,
}

/// The sending half. Dropped unfinished (the body failed or panicked, or the call was dropped), it resets
/// the stream, so that neither side waits for the rest.
struct Sender {
    stream: SendStream<Bytes>,
    finished: bool,
    failure: Arc<OnceLock<SharedError>>,
}

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
        let failure = Arc::new(OnceLock::new());
        let mut sender = Sender {
            stream,
            finished: false,
            failure: failure.clone(),
        };
        let task = runtime.spawn(async move {
            for frame in queued.into_iter().flatten() {
                if sender.send(frame).await.is_err() {
                    return;
                }
            }
            sender.rest(body).await;
        });
        Self {
            failure,
            _task: AbortOnDrop(Some(task.abort_handle())),
        }
    }

    /// The request body's own error, if that is what ended the call.
    pub(super) fn failure(&self) -> Option<Error> {
        self.failure.get().map(|error| {
            Error::new(Kind::RequestBody)
                .with_sent(Sent::Sent)
                .with_shared_source(error.clone())
        })
    }
}

/// The stream is over, whatever there was still to send.
struct Over;

impl Sender {
    async fn rest<B>(&mut self, mut body: B)
    where
        B: http_body::Body<Data = Bytes> + Unpin,
        B::Error: Into<BoxError>,
    {
        while !self.finished {
            let next = poll_fn(|cx| {
                if let Poll::Ready(result) = self.stream.poll_reset(cx) {
                    let _ = result;
                    return Poll::Ready(Err(Over));
                }
                let frame = ready!(Pin::new(&mut body).poll_frame(cx));
                Poll::Ready(Ok(frame.map(|frame| frame.map_err(Into::into))))
            });
            match next.await {
                Err(Over) => {
                    self.finished = true;
                    return;
                }
                Ok(Some(Ok(frame))) => {
                    if self.send(frame).await.is_err() {
                        return;
                    }
                }
                Ok(Some(Err(error))) => {
                    let error: BoxError = error;
                    let _ = self.failure.set(Arc::from(error));
                    return;
                }
                Ok(None) => {
                    self.finished = true;
                    let _ = self.stream.send_data(Bytes::new(), true);
                }
            }
        }
    }

    async fn send(&mut self, frame: Frame<Bytes>) -> Result<(), Over> {
        match frame.into_data() {
            Ok(data) => self.send_data(data).await,
            Err(frame) => {
                if let Ok(trailers) = frame.into_trailers() {
                    self.finished = true;
                    let _ = self.stream.send_trailers(trailers);
                }
                Ok(())
            }
        }
    }

    async fn send_data(&mut self, mut data: Bytes) -> Result<(), Over> {
        while !data.is_empty() {
            self.stream.reserve_capacity(data.len());
            let room = poll_fn(|cx| self.poll_room(cx)).await;
            let Ok(room) = room else {
                self.finished = true;
                return Err(Over);
            };
            let part = data.split_to(room.min(data.len()));
            if self.stream.send_data(part, false).is_err() {
                self.finished = true;
                return Err(Over);
            }
        }
        // What is reserved and not used would be withheld from other streams.
        self.stream.reserve_capacity(0);
        Ok(())
    }

    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize, Over>> {
        loop {
            if self.stream.poll_reset(cx).is_ready() {
                return Poll::Ready(Err(Over));
            }
            // What is left of an earlier grant is not announced again.
            match self.stream.capacity() {
                0 => {}
                room => return Poll::Ready(Ok(room)),
            }
            match ready!(self.stream.poll_capacity(cx)) {
                Some(Ok(0)) => {}
                Some(Ok(room)) => return Poll::Ready(Ok(room)),
                Some(Err(_)) | None => return Poll::Ready(Err(Over)),
            }
        }
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        if !self.finished {
            if std::thread::panicking() {
                let why = BoxError::from("the request body panicked");
                let _ = self.failure.set(Arc::from(why));
            }
            self.stream.send_reset(Reason::CANCEL);
        }
    }
}
