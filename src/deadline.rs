//! Calls that end when their time is up.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body::{Frame, SizeHint};
use pin_project_lite::pin_project;
use tokio::{
    runtime,
    time::{self, Sleep},
};
use tower_layer::Layer;
use tower_service::Service;

use crate::error::{BoxError, Error, Kind, Sent};

const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// Bounds the time of each call through a service: of the wait for its response and of the reading of its
/// response body, both together.
///
/// The bound is the smaller of the layer's and the request's own `grpc-timeout` header
/// (tonic's `Request::set_timeout`), and is what the server is told. Over it, the call ends with
/// [`Kind::DeadlineExceeded`], which is `DEADLINE_EXCEEDED`, and is dropped, which resets its stream.
///
/// [`Channel`](crate::Channel) already keeps to the header; this layer is for a bound on every call, and for
/// other services.
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
#[derive(Clone, Copy, Debug)]
pub struct DeadlineLayer {
    timeout: Duration,
}

/// The service of [`DeadlineLayer`].
#[derive(Clone, Copy, Debug)]
pub struct Deadline<S> {
    inner: S,
    timeout: Duration,
}

pin_project! {
    /// The response of a [`Deadline`].
    #[derive(Debug)]
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<F> {
        #[pin]
        inner: Option<F>,
        timer: Option<Timer>,
        error: Option<Error>,
    }
}

pin_project! {
    /// A response body under a deadline.
    #[derive(Debug)]
    pub struct Body<B> {
        #[pin]
        inner: Option<B>,
        timer: Option<Timer>,
    }
}

/// The time that one call has.
#[derive(Debug)]
pub(crate) struct Timer {
    timeout: Duration,
    sleep: Pin<Box<Sleep>>,
}

// === impl DeadlineLayer ===

impl DeadlineLayer {
    /// A bound on every call; from zero, where every call fails, up. More than 30 years is 30 years.
    pub const fn new(timeout: Duration) -> Self {
        Self { timeout }
    }
}

impl<S> Layer<S> for DeadlineLayer {
    type Service = Deadline<S>;

    fn layer(&self, inner: S) -> Deadline<S> {
        Deadline {
            inner,
            timeout: self.timeout,
        }
    }
}

// === impl Deadline ===

impl<S> Deadline<S> {
    /// The service inside.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// The service inside, to be changed.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// The service inside, without its deadline.
    pub fn into_inner(self) -> S {
        self.inner
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
            .map_err(|error| Error::from_service(error.into()))
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let timeout = match timeout_of(request.headers()) {
            Ok(asked) => asked.map_or(self.timeout, |asked| asked.min(self.timeout)),
            Err(error) => return ResponseFuture::failed(error),
        };
        let runtime = match runtime::Handle::try_current() {
            Ok(runtime) => runtime,
            Err(error) => {
                let outside = Error::invalid("deadline", "called outside a tokio runtime");
                return ResponseFuture::failed(outside.with_source(error));
            }
        };
        let timer = match Timer::start(timeout, &runtime) {
            Ok(timer) => timer,
            Err(error) => return ResponseFuture::failed(error),
        };
        request
            .headers_mut()
            .insert(GRPC_TIMEOUT, header_of(timeout));
        ResponseFuture {
            inner: Some(self.inner.call(request)),
            timer: Some(timer),
            error: None,
        }
    }
}

// === impl ResponseFuture ===

impl<F> ResponseFuture<F> {
    fn failed(error: Error) -> Self {
        Self {
            inner: None,
            timer: None,
            error: Some(error),
        }
    }
}

impl<F, R, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<R>, E>>,
    E: Into<BoxError>,
{
    type Output = Result<Response<Body<R>>, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        if let Some(inner) = this.inner.as_mut().as_pin_mut() {
            if let Poll::Ready(result) = inner.poll(cx) {
                this.inner.set(None);
                let timer = this.timer.take();
                let response = result.map_err(|error| Error::from_service(error.into()))?;
                return Poll::Ready(bounded(response, timer));
            }
            if let Some(timer) = this.timer
                && timer.poll_expired(cx).is_ready()
            {
                let error = timer.error();
                // Dropped here and not with this future, which its caller may keep.
                this.inner.set(None);
                return Poll::Ready(Err(error));
            }
            return Poll::Pending;
        }
        Poll::Ready(Err(this.error.take().unwrap_or_else(|| {
            Error::new(Kind::Internal).with_reason("polled after it was ready")
        })))
    }
}

// === impl Body ===

impl<B> Body<B> {
    pub(crate) fn new(inner: B, timer: Option<Timer>) -> Self {
        Self {
            inner: Some(inner),
            timer,
        }
    }
}

impl<B> Default for Body<B> {
    /// A body at its end.
    fn default() -> Self {
        Self {
            inner: None,
            timer: None,
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
        let mut this = self.project();
        let Some(inner) = this.inner.as_mut().as_pin_mut() else {
            return Poll::Ready(None);
        };
        let frame = inner.poll_frame(cx);
        let expired = match (&frame, this.timer.as_mut()) {
            (_, None) => false,
            (Poll::Pending, Some(timer)) => timer.poll_expired(cx).is_ready(),
            // A stream that always has something would never come to the timer.
            (Poll::Ready(Some(Ok(frame))), Some(timer)) => match frame.trailers_ref() {
                Some(trailers) => timer.is_meant_by(trailers),
                None => timer.is_over(),
            },
            (Poll::Ready(_), Some(_)) => false,
        };
        if expired && let Some(timer) = this.timer {
            let error = timer.error();
            this.inner.set(None);
            return Poll::Ready(Some(Err(error)));
        }
        frame.map_err(|error| Error::from_service(error.into()))
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

// === impl Timer ===

impl Timer {
    /// A call's time begins now. No time at all is over before anything is sent.
    pub(crate) fn start(timeout: Duration, runtime: &runtime::Handle) -> Result<Self, Error> {
        if timeout.is_zero() {
            return Err(exceeded(timeout).with_sent(Sent::Unsent));
        }
        let _entered = runtime.enter();
        Ok(Self {
            timeout,
            sleep: Box::pin(tokio::time::sleep(timeout)),
        })
    }

    pub(crate) fn poll_expired(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.sleep.as_mut().poll(cx)
    }

    /// By the clock alone: needs no runtime.
    fn is_over(&self) -> bool {
        time::Instant::now() >= self.sleep.deadline()
    }

    /// Whether this is a server's word that the call's time is up, which may come an instant before our own timer
    /// fires: tonic's says CANCELLED then.
    fn is_meant_by(&self, status: &HeaderMap) -> bool {
        let code = status.get("grpc-status").map(HeaderValue::as_bytes);
        matches!(code, Some(b"1" | b"4")) && self.is_over()
    }

    pub(crate) fn error(&self) -> Error {
        exceeded(self.timeout)
    }
}

/// A response that has come in time, its body under the same deadline.
pub(crate) fn bounded<B>(
    response: Response<B>,
    timer: Option<Timer>,
) -> Result<Response<Body<B>>, Error> {
    match timer {
        Some(timer) if timer.is_meant_by(response.headers()) => Err(timer.error()),
        timer => Ok(response.map(|body| Body::new(body, timer))),
    }
}

fn exceeded(timeout: Duration) -> Error {
    Error::new(Kind::DeadlineExceeded)
        .with_sent(Sent::Sent)
        .with_reason(format!("not done within {timeout:?}"))
}

/// The time that a request gives itself.
///
/// The header is at most eight digits and a unit
/// ([PROTOCOL-HTTP2.md](https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md)).
pub(crate) fn timeout_of(headers: &HeaderMap) -> Result<Option<Duration>, Error> {
    let Some(value) = headers.get(GRPC_TIMEOUT) else {
        return Ok(None);
    };
    let invalid = || {
        let why = format!("{value:?} is not one to eight digits and one of H, M, S, m, u, n");
        Error::invalid("grpc-timeout", why)
    };
    let (digits, unit) = value
        .to_str()
        .ok()
        .and_then(|text| text.split_at_checked(text.len().saturating_sub(1)))
        .ok_or_else(invalid)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(invalid());
    }
    let number: u64 = digits.parse().map_err(|_| invalid())?;
    Ok(Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return Err(invalid()),
    }))
}

/// The finest unit in which it fits into eight digits, rounded up, so that the server never gives up first.
fn header_of(timeout: Duration) -> HeaderValue {
    const MOST: u128 = 99_999_999;
    let nanos = timeout.as_nanos();
    let units = [
        (1, 'n'),
        (1_000, 'u'),
        (1_000_000, 'm'),
        (1_000_000_000, 'S'),
        (60_000_000_000, 'M'),
        (3_600_000_000_000, 'H'),
    ];
    let (number, unit) = units
        .iter()
        .map(|(size, unit)| (nanos.div_ceil(*size), unit))
        .find(|(number, _)| *number <= MOST)
        .unwrap_or((MOST, &'H'));
    HeaderValue::from_str(&format!("{number}{unit}"))
        .unwrap_or_else(|_| HeaderValue::from_static("99999999H"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_header_comes_back_as_it_was_or_a_little_longer() {
        for timeout in [
            Duration::from_nanos(1),
            Duration::from_millis(1),
            Duration::from_millis(1500),
            Duration::from_secs(86_400),
            Duration::from_secs(10_000_000_000),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(GRPC_TIMEOUT, header_of(timeout));
            let read = timeout_of(&headers).unwrap().unwrap();
            assert!(read >= timeout, "{timeout:?} was read as {read:?}");
            assert!(
                read.as_secs_f64() <= timeout.as_secs_f64() * 1.001,
                "{read:?}"
            );
        }
    }

    #[test]
    fn what_is_no_timeout_is_refused() {
        for bad in ["", "m", "5", "123456789m", "-1S", "1.5S", "5x", "5 S"] {
            let mut headers = HeaderMap::new();
            headers.insert(GRPC_TIMEOUT, HeaderValue::from_static(bad));
            let error = timeout_of(&headers).unwrap_err();
            assert_eq!(error.kind(), Kind::Invalid, "{bad}");
            assert!(error.to_string().contains("eight digits"), "{error}");
        }
    }

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
