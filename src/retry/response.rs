//! The body of the response that counts.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use http_body::{Frame, SizeHint};
use pin_project_lite::pin_project;
use tonic::Code;

use super::{Codes, decide::code_of, target::Counted};

pin_project! {
    /// A response body whose end counts for the throttle of its service, if there is one.
    #[derive(Debug)]
    pub struct Body<B> {
        #[pin]
        inner: B,
        counting: Option<Counting>,
    }
}

/// How the end of a call is counted.
#[derive(Debug)]
pub(super) struct Counting {
    target: Arc<Counted>,
    codes: Codes,
}

// === impl Counting ===

impl Counting {
    pub(super) const fn new(target: Arc<Counted>, codes: Codes) -> Self {
        Self { target, codes }
    }

    pub(super) fn count(self, code: Code) {
        if code == Code::Ok {
            self.target.0.succeeded();
        } else if self.codes.contains(code)
            && let Some(throttle) = self.target.0.throttle()
        {
            throttle.failed();
        }
    }
}

// === impl Body ===

impl<B> Body<B> {
    pub(super) const fn new(inner: B, counting: Option<Counting>) -> Self {
        Self { inner, counting }
    }

    /// The body inside.
    pub const fn get_ref(&self) -> &B {
        &self.inner
    }

    /// The body inside; its end is not counted.
    pub fn into_inner(self) -> B {
        self.inner
    }
}

impl<B: Default> Default for Body<B> {
    /// A body that counts for nothing.
    fn default() -> Self {
        Self {
            inner: B::default(),
            counting: None,
        }
    }
}

impl<B: http_body::Body> http_body::Body for Body<B> {
    type Data = B::Data;
    type Error = B::Error;

    #[inline]
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let this = self.project();
        if this.counting.is_none() {
            return this.inner.poll_frame(cx);
        }
        let frame = ready!(this.inner.poll_frame(cx));
        {
            let code = match &frame {
                Some(Ok(frame)) => frame
                    .trailers_ref()
                    .map(|status| code_of(status).unwrap_or(Code::Unknown)),
                Some(Err(_)) => Some(Code::Unavailable),
                None => Some(Code::Unknown),
            };
            if let Some(code) = code
                && let Some(counting) = this.counting.take()
            {
                counting.count(code);
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
