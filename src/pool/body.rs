//! The response body that holds its call's guard until the end of the stream.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use http_body::{Frame, SizeHint};
use pin_project_lite::pin_project;

use super::protocol::Call;
use crate::error::{BoxError, Error, Sent};

pin_project! {
    /// A response body that counts as load at its peer until it has ended, failed or been dropped, and
    /// whose errors name that peer.
    #[derive(Debug)]
    pub struct Body<B> {
        #[pin]
        inner: B,
        call: Option<Call>,
    }
}

impl<B> Body<B> {
    pub(crate) fn new(inner: B, call: Call) -> Self {
        Self {
            inner,
            call: Some(call),
        }
    }

    /// The body inside.
    pub fn get_ref(&self) -> &B {
        &self.inner
    }

    /// The body inside, to be changed.
    pub fn get_mut(&mut self) -> &mut B {
        &mut self.inner
    }

    /// An error from outside, such as a deadline, with the peer that the call is at.
    #[cfg(feature = "manager")]
    pub(crate) fn explain(&self, error: Error) -> Error {
        match &self.call {
            Some(call) if error.peer().is_none() => error.with_peer(&Arc::new(call.peer().clone())),
            _ => error,
        }
    }

    /// The body inside; the call is over as far as load goes.
    pub fn into_inner(self) -> B {
        self.inner
    }
}

impl<B: Default> Default for Body<B> {
    /// An empty body, of no call; what tonic's interceptors answer with when they refuse one.
    fn default() -> Self {
        Self {
            inner: B::default(),
            call: None,
        }
    }
}

impl<B> http_body::Body for Body<B>
where
    B: http_body::Body,
    B::Error: Into<BoxError>,
{
    type Data = B::Data;
    type Error = Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, Error>>> {
        let this = self.project();
        Poll::Ready(match ready!(this.inner.poll_frame(cx)) {
            Some(Ok(frame)) => {
                // Trailers are the last frame of any body.
                if frame.is_trailers() {
                    *this.call = None;
                }
                Some(Ok(frame))
            }
            Some(Err(error)) => {
                // There was a response.
                let error = Error::from_service(error.into()).with_sent(Sent::Sent);
                Some(Err(match this.call.take() {
                    Some(call) if error.peer().is_none() => {
                        error.with_peer(&Arc::new(call.peer().clone()))
                    }
                    _ => error,
                }))
            }
            None => {
                *this.call = None;
                None
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
