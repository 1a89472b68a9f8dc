//! The body of a response, with flow control: what is read is what the peer may send anew.

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::RecvStream;
use http_body::{Frame, SizeHint};

use super::{core::Slot, pump::Pump};
use crate::{error::Error, headers::without_wrong_details};

/// The response body of a call through a [`Connection`](super::Connection).
///
/// Dropping it before its end resets the stream, which cancels the call at the server.
#[derive(Default)]
pub struct Body {
    /// None at the end. Before `slot`, so that the stream is let go of before its slot is.
    open: Option<Open>,
}

struct Open {
    stream: RecvStream,
    data_done: bool,
    /// Ends with the response: a server that has answered does not want the rest.
    pump: Option<Pump>,
    slot: Slot,
}

impl Body {
    pub(super) fn new(stream: RecvStream, pump: Option<Pump>, slot: Slot) -> Self {
        Self {
            open: Some(Open {
                stream,
                data_done: false,
                pump,
                slot,
            }),
        }
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let Some(open) = &mut self.open else {
            return Poll::Ready(None);
        };
        let result = ready!(open.poll(cx));
        if !matches!(&result, Some(Ok(frame)) if frame.is_data()) {
            self.open = None;
        }
        Poll::Ready(result)
    }

    fn is_end_stream(&self) -> bool {
        match &self.open {
            None => true,
            Some(open) => open.stream.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

impl Open {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        if !self.data_done {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(data)) => {
                    // Handed over is consumed: a reader that is slow does not poll. An error here is
                    // that the stream has ended, which the next poll says better.
                    let _ = self.stream.flow_control().release_capacity(data.len());
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(self.failed(error)))),
                None => self.data_done = true,
            }
        }
        match ready!(self.stream.poll_trailers(cx)) {
            Ok(trailers) => Poll::Ready(trailers.map(|mut trailers| {
                without_wrong_details(&mut trailers);
                Ok(Frame::trailers(trailers))
            })),
            Err(error) => Poll::Ready(Some(Err(self.failed(error)))),
        }
    }

    fn failed(&mut self, error: h2::Error) -> Error {
        // A reset after the end, by a server that does not want the rest of the request, comes from h2 as that end. So
        // this one cuts the response short, also if it is for no error.
        let failure = self.pump.take().and_then(|pump| pump.failure());
        failure.unwrap_or_else(|| self.slot.core.classify_late(error))
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Body")
            .field("open", &self.open.is_some())
            .finish_non_exhaustive()
    }
}
