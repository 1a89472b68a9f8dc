//! Calls that end when their time is up.

mod header;

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::Duration,
};

use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::{Frame, SizeHint};
use pin_project_lite::pin_project;
use tokio::runtime;
use tonic::Code;
use tower_layer::Layer;
use tower_service::Service;

pub(crate) use self::header::{GRPC_TIMEOUT, header_of, timeout_of};
use crate::{
    error::{BoxError, Error, Kind, Sent},
    headers::{GRPC_STATUS, find},
    waiters::{
        Holder, Table, Timers, after,
        guard::{Head, Rest, Watch},
        timed::Timed,
    },
};

/// Bounds the time of each call through a service: of the wait for its response and of the reading of its
/// response body, both together, from `call` on.
///
/// The bound is the smaller of the layer's and the request's own `grpc-timeout` header
/// (tonic's `Request::set_timeout`), and is what the server is told. Over it, the call ends with
/// [`Kind::DeadlineExceeded`], which is `DEADLINE_EXCEEDED`, and is dropped, which resets its stream. It is never ended
/// before its time, and at most about 5 ms after it.
///
/// Above a [`RetryLayer`](crate::RetryLayer) it covers all attempts and the pauses between them, and each attempt tells
/// its server what remains.
///
/// [`Channel`](crate::Channel) already keeps to the header and to its configuration; this layer is for other services,
/// and for a bound on every call.
///
/// ```
/// use std::time::Duration;
/// use switchboard::DeadlineLayer;
/// use tower::ServiceBuilder;
///
/// # fn wrap<S>(inner: S) {
/// let service = ServiceBuilder::new()
///     .layer(DeadlineLayer::new(Duration::from_secs(2)))
///     .service(inner);
/// # }
/// ```
///
/// # Cost
///
/// There is no timer for each call: one that is pending has a place in a table, and one task of the layer wakes those whose
/// time is up. That task runs on the runtime of the first call that had to wait; calls on other runtimes have timers
/// of their own, so that no runtime depends on another's being driven.
#[derive(Clone, Debug)]
pub struct DeadlineLayer {
    timeout: Duration,
    clock: Arc<Clock>,
}

/// The service of [`DeadlineLayer`].
#[derive(Debug)]
pub struct Deadline<S> {
    inner: S,
    timeout: Duration,
    mine: Arc<Mine>,
}

pin_project! {
    /// The response of a [`Deadline`].
    #[derive(Debug)]
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<F> {
        #[pin]
        head: Head<F, Time>,
    }
}

pin_project! {
    /// A response body under a deadline.
    #[derive(Debug)]
    pub struct Body<B> {
        #[pin]
        rest: Rest<B, Time>,
    }
}

/// What keeps the time of all calls through one layer.
#[derive(Debug, Default)]
struct Clock {
    /// Since the first call had to wait.
    timers: OnceLock<Timers>,
}

/// What one clone has for itself, so that no count in it is one that all threads write: a handle on the clock, and what
/// its calls tell their servers.
#[derive(Debug)]
struct Mine {
    clock: Arc<Clock>,
    header: HeaderValue,
}

/// The time that one call has.
#[derive(Debug)]
struct Time {
    timeout: Duration,
    timed: Timed<Arc<Mine>>,
}

// === impl DeadlineLayer ===

impl DeadlineLayer {
    /// A bound on every call; from zero, where every call fails, up. A time that is as good as
    /// endless may be cut short to some centuries.
    pub fn new(timeout: Duration) -> Self {
        Self {
            timeout,
            clock: Arc::default(),
        }
    }
}

impl<S> Layer<S> for DeadlineLayer {
    type Service = Deadline<S>;

    fn layer(&self, inner: S) -> Deadline<S> {
        Deadline {
            inner,
            timeout: self.timeout,
            mine: Mine::new(&self.clock, self.timeout),
        }
    }
}

// === impl Deadline ===

impl<S> Deadline<S> {
    /// The service inside.
    pub const fn get_ref(&self) -> &S {
        &self.inner
    }

    /// The service inside, to be changed.
    pub const fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// The service inside, without its deadline.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S: Clone> Clone for Deadline<S> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            timeout: self.timeout,
            mine: Mine::new(&self.mine.clock, self.timeout),
        }
    }
}

impl<S, B, R> Service<Request<B>> for Deadline<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Error: Into<BoxError>,
{
    type Response = Response<Body<R>>;
    type Error = Error;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner
            .poll_ready(cx)
            .map_err(|error| Error::from_ready(error.into()))
    }

    #[inline]
    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let asked = match timeout_of(request.headers()) {
            Ok(asked) => asked,
            Err(error) => return ResponseFuture::failed(error),
        };
        let timeout = asked.map_or(self.timeout, |asked| asked.min(self.timeout));
        if timeout.is_zero() {
            return ResponseFuture::failed(exceeded(timeout).with_sent(Sent::Unsent));
        }
        if asked != Some(timeout) {
            // It is the layer's.
            let header = self.mine.header.clone();
            request.headers_mut().insert(GRPC_TIMEOUT, header);
        }
        let time = Time {
            timeout,
            timed: Timed::new(self.mine.clone(), after(timeout)),
        };
        ResponseFuture {
            head: Head::new(self.inner.call(request), time),
        }
    }
}

// === impl Mine ===

impl Mine {
    fn new(clock: &Arc<Clock>, timeout: Duration) -> Arc<Self> {
        Arc::new(Self {
            clock: clock.clone(),
            header: header_of(timeout),
        })
    }
}

impl Holder for Arc<Mine> {
    fn table(&self) -> Option<&Table> {
        self.clock.timers.get().map(Timers::table)
    }

    fn is_cancelled(&self) -> bool {
        false
    }

    fn timers(&self) -> Option<&Timers> {
        self.clock.timers.get()
    }

    /// The first runtime where this is asked is the one.
    fn is_here(&self) -> Result<bool, Error> {
        let here = runtime::Handle::try_current().map_err(|error| {
            Error::invalid("deadline", "waited for outside a tokio runtime").with_source(error)
        })?;
        let timers = self.clock.timers.get_or_init(|| Timers::new(here.clone()));
        Ok(timers.runtime().id() == here.id() && !timers.is_dead())
    }
}

// === impl Time ===

impl Watch for Time {
    #[inline]
    fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        self.timed.poll(cx).map(|over| match over {
            Ok(_) => exceeded(self.timeout),
            Err(error) => error.with_sent(Sent::Sent),
        })
    }

    #[inline]
    fn is_over(&mut self) -> Option<Error> {
        self.timed.is_late().then(|| exceeded(self.timeout))
    }

    #[inline]
    fn knows_better(&mut self, status: &HeaderMap) -> Option<Error> {
        (says_so(status) && self.timed.is_expired()).then(|| exceeded(self.timeout))
    }

    fn or_better(&mut self, failure: Error) -> Error {
        match is_reset_so(&failure) && self.timed.is_expired() {
            true => exceeded(self.timeout).with_names_of(&failure),
            false => failure,
        }
    }
}

/// Whether this may be a server's word that the call's time is up, which can come an instant before it is found out
/// here: tonic's says CANCELLED then.
#[inline]
pub(crate) fn says_so(status: &HeaderMap) -> bool {
    let code = find(status, &GRPC_STATUS).map(HeaderValue::as_bytes);
    matches!(code, Some(b"1" | b"4"))
}

/// The same of a server that resets the stream then: grpc-go's does, with CANCEL.
pub(crate) fn is_reset_so(failure: &Error) -> bool {
    matches!(failure.kind(), Kind::Reset | Kind::Service)
        && matches!(failure.code(), Code::Cancelled | Code::DeadlineExceeded)
}

/// The error of a call whose time is up while it is under way.
pub(crate) fn exceeded(timeout: Duration) -> Error {
    Error::new(Kind::DeadlineExceeded)
        .with_sent(Sent::Sent)
        .with_reason(format!("not done within {timeout:?}"))
}

// === impl ResponseFuture ===

impl<F> ResponseFuture<F> {
    const fn failed(error: Error) -> Self {
        Self {
            head: Head::failed(error),
        }
    }
}

impl<F, R, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<R>, E>>,
    E: Into<BoxError>,
{
    type Output = Result<Response<Body<R>>, Error>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let head = self.project().head;
        head.poll_with(cx, |_, error| error, |rest| Body { rest })
    }
}

// === impl Body ===

impl<B> Default for Body<B> {
    /// A body at its end.
    fn default() -> Self {
        Self {
            rest: Rest::default(),
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

    #[inline]
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, Error>>> {
        self.project().rest.poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.rest.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_bound_covers_response_and_body_together() {
        use http_body_util::BodyExt as _;
        use tower::{Service as _, ServiceBuilder, service_fn};

        // Answers after 60 ms, with a body that never ends.
        let slow = service_fn(|_: Request<()>| async {
            tokio::time::sleep(Duration::from_millis(60)).await;
            let never = futures_util::stream::pending::<Result<Frame<bytes::Bytes>, BoxError>>();
            Ok::<_, BoxError>(Response::new(http_body_util::StreamBody::new(never)))
        });
        let mut service = ServiceBuilder::new()
            .layer(DeadlineLayer::new(Duration::from_millis(100)))
            .service(slow);
        let began = tokio::time::Instant::now();
        let response = service.call(Request::new(())).await.unwrap();
        let error = response.into_body().collect().await.unwrap_err();
        assert_eq!(error.kind(), Kind::DeadlineExceeded);
        let took = began.elapsed().as_millis();
        assert!((100..=102).contains(&took), "{took} ms");

        // The request asks for less: that is what it gets.
        let mut request = Request::new(());
        request
            .headers_mut()
            .insert(GRPC_TIMEOUT, HeaderValue::from_static("10m"));
        let began = tokio::time::Instant::now();
        let error = service.call(request).await.unwrap_err();
        assert_eq!(error.code(), tonic::Code::DeadlineExceeded);
        assert!(began.elapsed().as_millis() <= 12);
    }
}
