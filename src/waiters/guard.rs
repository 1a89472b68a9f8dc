//! A call that may be over before it is done, from its head to the end of its body.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use http::{HeaderMap, Response};
use http_body::{Frame, SizeHint};
use pin_project_lite::pin_project;

use crate::error::{BoxError, Error, Kind, Peer, Sent};

/// What may end a call.
pub(crate) trait Watch {
    /// Asked whenever the call is pending. Has its task woken when it is over.
    fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<Error>;

    /// Asked whenever there is something of the response: a stream that always has something would never be pending.
    fn is_over(&mut self) -> Option<Error>;

    /// Whether this status of the peer only says what is known here better.
    fn knows_better(&mut self, status: &HeaderMap) -> Option<Error> {
        let _ = status;
        None
    }

    /// The same of a failure inside; or the failure itself, with what it does not say.
    fn or_better(&mut self, failure: Error) -> Error {
        failure
    }
}

pin_project! {
    /// The response's head.
    #[derive(Debug)]
    pub(crate) struct Head<F, W> {
        #[pin]
        inner: Option<F>,
        // None when the call has come to its body.
        watch: Option<W>,
        error: Option<Error>,
    }
}

pin_project! {
    /// The response's body.
    #[derive(Debug)]
    pub(crate) struct Rest<B, W> {
        // Dropped as soon as it is over: this resets the stream.
        #[pin]
        inner: Option<B>,
        watch: Option<W>,
    }
}

// === impl Head ===

impl<F, W> Head<F, W> {
    #[inline]
    pub(crate) const fn new(inner: F, watch: W) -> Self {
        Self {
            inner: Some(inner),
            watch: Some(watch),
            error: None,
        }
    }

    pub(crate) const fn failed(error: Error) -> Self {
        Self {
            inner: None,
            watch: None,
            error: Some(error),
        }
    }

    /// The call, until it is over.
    #[cfg(feature = "manager")]
    pub(crate) const fn inner(&self) -> Option<&F> {
        self.inner.as_ref()
    }
}

impl<F, W, R, E> Head<F, W>
where
    F: Future<Output = Result<Response<R>, E>>,
    E: Into<BoxError>,
    W: Watch,
{
    /// As a future's; `explain` adds to an error what the call inside knows of where it is, and `body` makes the response's of
    /// what there is here. At once: each time that a response is handed on costs a copy of it.
    #[inline]
    pub(crate) fn poll_with<B>(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        explain: impl FnOnce(&F, Error) -> Error,
        body: impl FnOnce(Rest<R, W>) -> B,
    ) -> Poll<Result<Response<B>, Error>> {
        let mut this = self.project();
        let Some(inner) = this.inner.as_mut().as_pin_mut() else {
            return Poll::Ready(Err(this.error.take().unwrap_or_else(|| {
                Error::new(Kind::Internal).with_reason("polled after it was ready")
            })));
        };
        match inner.poll(cx) {
            // Calling => done
            Poll::Ready(result) => {
                this.inner.set(None);
                let mut watch = this.watch.take();
                let response = match result {
                    Ok(response) => response,
                    Err(error) => {
                        let error = Error::from_service(error.into());
                        return Poll::Ready(Err(match &mut watch {
                            Some(watch) => watch.or_better(error),
                            None => error,
                        }));
                    }
                };
                if let Some(watch) = &mut watch
                    && let Some(error) = watch.knows_better(response.headers())
                {
                    return Poll::Ready(Err(match response.extensions().get::<Peer>() {
                        Some(peer) => error.with_peer(&Arc::new(peer.clone())),
                        None => error,
                    }));
                }
                Poll::Ready(Ok(response.map(|inner| body(Rest::new(inner, watch)))))
            }
            // Calling => (Calling | over)
            Poll::Pending => {
                let over = match this.watch {
                    Some(watch) => watch.poll_over(cx),
                    None => Poll::Pending,
                };
                let Poll::Ready(error) = over else {
                    return Poll::Pending;
                };
                let error = match this.inner.as_ref().as_pin_ref() {
                    Some(inner) => explain(inner.get_ref(), error),
                    None => error,
                };
                // Here and now, and not when the caller gets round to dropping this: it resets the stream.
                this.inner.set(None);
                *this.watch = None;
                Poll::Ready(Err(error))
            }
        }
    }
}

// === impl Rest ===

impl<B, W> Rest<B, W> {
    pub(crate) const fn new(inner: B, watch: Option<W>) -> Self {
        Self {
            inner: Some(inner),
            watch,
        }
    }
}

impl<B, W> Default for Rest<B, W> {
    /// A body at its end.
    fn default() -> Self {
        Self {
            inner: None,
            watch: None,
        }
    }
}

impl<B, W> http_body::Body for Rest<B, W>
where
    B: http_body::Body,
    B::Error: Into<BoxError>,
    W: Watch,
{
    type Data = B::Data;
    type Error = Error;

    #[inline]
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, Error>>> {
        self.poll_with(cx, |_, error| error)
    }

    fn is_end_stream(&self) -> bool {
        self.inner
            .as_ref()
            .is_none_or(http_body::Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.inner
            .as_ref()
            .map_or_else(|| SizeHint::with_exact(0), http_body::Body::size_hint)
    }
}

impl<B, W> Rest<B, W>
where
    B: http_body::Body,
    B::Error: Into<BoxError>,
    W: Watch,
{
    /// As a body's `poll_frame`; `explain` adds to the error of what ends the call what the body inside knows of it.
    #[inline]
    pub(crate) fn poll_with(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        explain: impl FnOnce(&B, Error) -> Error,
    ) -> Poll<Option<Result<Frame<B::Data>, Error>>> {
        let mut this = self.project();
        let Some(inner) = this.inner.as_mut().as_pin_mut() else {
            return Poll::Ready(None);
        };
        let over = match inner.poll_frame(cx) {
            // Each frame is handed on as it came: to take it apart costs a copy.
            Poll::Ready(Some(Ok(frame))) => {
                let over = match (this.watch.as_mut(), frame.trailers_ref()) {
                    (None, _) => None,
                    (Some(watch), Some(trailers)) => watch.knows_better(trailers),
                    (Some(watch), None) => watch.is_over(),
                };
                if over.is_none() {
                    // It is at its end: nobody has to be woken for it.
                    if !frame.is_data() {
                        *this.watch = None;
                    }
                    return Poll::Ready(Some(Ok(frame)));
                }
                over
            }
            Poll::Ready(Some(Err(error))) => {
                // There was a response.
                let failure = Error::from_service(error.into()).with_sent(Sent::Sent);
                let failure = match this.watch.take() {
                    Some(mut watch) => watch.or_better(failure),
                    None => failure,
                };
                return Poll::Ready(Some(Err(failure)));
            }
            Poll::Ready(None) => {
                *this.watch = None;
                return Poll::Ready(None);
            }
            Poll::Pending => match this.watch.as_mut().map(|watch| watch.poll_over(cx)) {
                Some(Poll::Ready(error)) => Some(error),
                Some(Poll::Pending) | None => None,
            },
        };
        let Some(error) = over else {
            return Poll::Pending;
        };
        let error = match this.inner.as_ref().as_pin_ref() {
            Some(inner) => explain(inner.get_ref(), error),
            None => error,
        };
        this.inner.set(None);
        *this.watch = None;
        Poll::Ready(Some(Err(error)))
    }
}
