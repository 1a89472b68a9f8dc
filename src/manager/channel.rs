//! The channel that a generated client takes.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use http::{Request, Response};
use pin_project_lite::pin_project;
use tower_service::Service;

use crate::{
    InstanceId,
    deadline::{self, Timer, timeout_of},
    error::{Error, Kind},
    pool::{self, Pool, in_turn},
    transport::{self, Connection},
};

/// A channel to all instances of a role, or to one of them; what a generated client takes where it would
/// have taken a `tonic::transport::Channel`.
///
/// Cheap to clone, `Send` and `Sync`. It keeps to each call's `grpc-timeout` (`Request::set_timeout`):
/// waiting, the call and its response body together end as `DEADLINE_EXCEEDED`. Options of one call travel
/// as request extensions: [`WaitForReady`](crate::WaitForReady), [`InstanceId`].
///
/// Calls go to the less loaded of two random ready instances. They wait while the role is being
/// resolved or connected for the first time, and fail fast afterwards; see [`Pool`].
///
/// # Errors
///
/// Every failed call is a status whose message names the role, the instance and the reason, and from
/// which [`Error::of`] gets back the [`Error`].
///
/// # Cancellation
///
/// Dropping a call's future or its response stream resets the HTTP/2 stream: the server is told.
#[derive(Clone, Debug)]
pub struct Channel {
    route: Route,
}

#[derive(Clone, Debug)]
enum Route {
    Pool(Pool<Connection>),
    /// Made with a role that cannot be, or after the manager was stopped.
    Broken(Arc<Broken>),
}

#[derive(Debug)]
struct Broken {
    kind: Kind,
    role: Arc<str>,
    reason: Option<String>,
}

/// The body of a response through a [`Channel`].
pub type ResponseBody = deadline::Body<pool::Body<transport::Body>>;

type Inner = pool::ResponseFuture<Connection, Request<tonic::body::Body>>;

pin_project! {
    /// The response of a [`Channel`].
    #[derive(Debug)]
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture {
        #[pin]
        inner: Option<Inner>,
        timer: Option<Timer>,
        error: Option<Error>,
    }
}

// === impl Channel ===

impl Channel {
    pub(super) fn new(pool: Pool<Connection>) -> Self {
        Self {
            route: Route::Pool(pool),
        }
    }

    pub(super) fn broken(role: &str, error: &Error) -> Self {
        Self {
            route: Route::Broken(Arc::new(Broken {
                kind: error.kind(),
                role: role.into(),
                reason: error.reason(),
            })),
        }
    }

    /// This channel with all calls pinned to the instance of this id.
    ///
    /// Calls go there or fail; they are never executed by another instance, even if that has the address
    /// now. The id need not be registered yet. A request whose own [`InstanceId`] extension names another
    /// fails with [`Kind::Invalid`].
    #[must_use]
    pub fn to(&self, instance: impl Into<InstanceId>) -> Self {
        Self {
            route: match &self.route {
                Route::Pool(pool) => Route::Pool(pool.to(instance)),
                Route::Broken(broken) => Route::Broken(broken.clone()),
            },
        }
    }

    /// The role that it calls.
    pub fn role(&self) -> &str {
        match &self.route {
            Route::Pool(pool) => pool.role(),
            Route::Broken(broken) => &broken.role,
        }
    }
}

impl Service<Request<tonic::body::Body>> for Channel {
    type Response = Response<ResponseBody>;
    type Error = Error;
    type Future = ResponseFuture;

    #[inline]
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    #[inline]
    fn call(&mut self, request: Request<tonic::body::Body>) -> ResponseFuture {
        let pool = match &mut self.route {
            Route::Pool(pool) => pool,
            Route::Broken(broken) => return ResponseFuture::failed(broken.error()),
        };
        let timer = match timeout_of(request.headers()) {
            Ok(None) => None,
            Ok(Some(timeout)) => match Timer::start(timeout, pool.runtime()) {
                Ok(timer) => Some(timer),
                Err(error) => return ResponseFuture::failed(error.with_role(&pool.role_arc())),
            },
            Err(error) => return ResponseFuture::failed(error),
        };
        ResponseFuture {
            inner: Some(pool.call(request)),
            timer,
            error: None,
        }
    }
}

impl fmt::Display for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.role())
    }
}

// === impl Broken ===

impl Broken {
    fn error(&self) -> Error {
        let error = Error::new(self.kind).with_role(&self.role);
        match &self.reason {
            Some(reason) => error.with_reason(reason.clone()),
            None => error,
        }
    }
}

// === impl ResponseFuture ===

impl ResponseFuture {
    fn failed(error: Error) -> Self {
        Self {
            inner: None,
            timer: None,
            error: Some(error),
        }
    }
}

impl Future for ResponseFuture {
    type Output = Result<Response<ResponseBody>, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let Some(inner) = this.inner.as_mut().as_pin_mut() else {
            ready!(in_turn(cx));
            return Poll::Ready(Err(this.error.take().unwrap_or_else(|| {
                Error::new(Kind::Internal).with_reason("polled after it was ready")
            })));
        };
        if let Poll::Ready(result) = inner.poll(cx) {
            let timer = this.timer.take();
            return Poll::Ready(result.and_then(|response| deadline::bounded(response, timer)));
        }
        if let Some(timer) = this.timer
            && timer.poll_expired(cx).is_ready()
        {
            let error = timer.error();
            let error = match this.inner.as_ref().as_pin_ref() {
                Some(inner) => inner.get_ref().explain(error),
                None => error,
            };
            // Dropped here, and not when the caller gets round to it: this resets the stream.
            this.inner.set(None);
            return Poll::Ready(Err(error));
        }
        Poll::Pending
    }
}
