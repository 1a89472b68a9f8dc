//! The channel that a generated client takes.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::{Frame, SizeHint};
use pin_project_lite::pin_project;
use tokio::runtime;
use tower_service::Service;

use crate::{
    CancelToken, InstanceId, RetryLayer, WaitForReady,
    cancel::cancelled_error,
    config::Repeat,
    deadline::{GRPC_TIMEOUT, exceeded, header_of, is_reset_so, says_so, timeout_of},
    error::{Error, Kind, Sent},
    pool::{self, Pool, in_turn},
    retry::{self, Calls, OwnTarget, Owner, Spare, Target, is_bare},
    transport::{self, Connections},
    waiters::{
        Holder, NEVER, Over, Table, Timers, Waiter, after,
        guard::{Head, Rest, Watch},
        timed::{Pause, Timed},
    },
};

/// A channel to all instances of a role, or to one of them; what a generated client takes where it would
/// have taken a `tonic::transport::Channel`.
///
/// Cheap to clone, `Send` and `Sync`. It keeps to each call's `grpc-timeout` (`Request::set_timeout`):
/// waiting, all attempts and the response body together end as `DEADLINE_EXCEEDED`. Options of one call travel
/// as request extensions: [`WaitForReady`](crate::WaitForReady), [`InstanceId`], [`CancelToken`],
/// [`RetryPolicy`](crate::RetryPolicy), [`HedgingPolicy`](crate::HedgingPolicy). What its role's
/// [`ServiceConfig`](crate::ServiceConfig) says holds for calls that do not say otherwise.
///
/// Calls go to the less loaded of two random ready instances. They wait while the role is being
/// resolved or connected for the first time, and fail fast afterwards; see [`Pool`].
///
/// A call that was certainly not processed is made again by itself, on another instance or connection; any other only by
/// a policy. See [`RetryLayer`], which is built in.
///
/// # Errors
///
/// Every failed call is a status whose message names the role, the instance and the reason, and from
/// which [`Error::of`] gets back the [`Error`].
///
/// # Cancellation
///
/// Dropping a call's future or its response stream resets the HTTP/2 stream: the server is told.
/// [`stop`](Channel::stop) ends all calls through a channel and its clones.
#[derive(Debug)]
pub struct Channel {
    route: Route,
}

#[derive(Debug)]
enum Route {
    // A handle for each clone, so that its count, which every call writes, is not one that all threads do.
    Pool(Arc<Handle>),
    /// Made with a role that cannot be, or after the manager was stopped.
    Broken(Arc<Broken>),
}

#[derive(Debug)]
struct Broken {
    kind: Kind,
    role: Arc<str>,
    reason: Option<String>,
}

/// What the calls through one channel reach for.
#[derive(Debug)]
struct Handle(Arc<Shared>, OwnTarget);

/// What a channel and its clones share.
#[derive(Debug)]
struct Shared {
    pool: Pool<Connections>,
    // Relaxed: a call arms its slot, under a lock, and then reads this; `stop` writes this and then takes the same locks.
    stopped: AtomicBool,
}

type Inner = pool::ResponseFuture<Connections, Request<retry::Body>>;

pin_project! {
    /// The response of a [`Channel`].
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture {
        #[pin]
        head: Head<Calls<Handle, Pool<Connections>, retry::Body>, Ends>,
    }
}

pin_project! {
    /// The body of a response through a [`Channel`].
    #[derive(Debug, Default)]
    pub struct ResponseBody {
        #[pin]
        rest: Rest<retry::ResponseBody<pool::Body<transport::Body>>, Ends>,
    }
}

/// What may end a call.
#[derive(Debug)]
struct Ends {
    timed: Timed<Arc<Handle>>,
    timeout: Duration,
    // Boxed, for few have one.
    token: Option<Box<Waiter<CancelToken>>>,
}

// === impl Channel ===

impl Channel {
    pub(super) fn new(pool: Pool<Connections>) -> Self {
        Self {
            route: Route::Pool(Handle::new(Arc::new(Shared {
                pool,
                stopped: AtomicBool::new(false),
            }))),
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
    /// fails with [`Kind::Invalid`]. It is a channel of its own, which [`stop`](Channel::stop) of this one does not end.
    #[must_use]
    pub fn to(&self, instance: impl Into<InstanceId>) -> Self {
        match &self.route {
            Route::Pool(handle) => Self::new(handle.0.pool.to(instance)),
            Route::Broken(broken) => Self {
                route: Route::Broken(broken.clone()),
            },
        }
    }

    /// Ends all calls through this channel and its clones, whether they wait, are in flight or read their response: as
    /// `CANCELLED`, with [`Kind::Stopped`]. Later ones fail at once. Other channels of the role go on, and so do its
    /// connections.
    ///
    /// It returns when all have been woken, one after the other.
    pub fn stop(&self) {
        if let Route::Pool(handle) = &self.route {
            handle.0.stopped.store(true, Ordering::Relaxed);
            handle.0.pool.timers().table().wake(Some(handle.tag()));
        }
    }

    /// The role that it calls.
    pub fn role(&self) -> &str {
        match &self.route {
            Route::Pool(handle) => handle.0.pool.role(),
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
    fn call(&mut self, mut request: Request<tonic::body::Body>) -> ResponseFuture {
        let handle = match &self.route {
            Route::Pool(handle) => handle,
            Route::Broken(broken) => return ResponseFuture::failed(broken.error()),
        };
        let Shared { pool, stopped } = &*handle.0;
        if stopped.load(Ordering::Relaxed) {
            return ResponseFuture::failed(stopped_error(pool).with_sent(Sent::Unsent));
        }
        let asked = match timeout_of(request.headers()) {
            Ok(asked) => asked,
            Err(error) => return ResponseFuture::failed(error.with_role(&pool.role_arc())),
        };
        let config = handle.target().config();
        let (configured, wait_for_ready, repeat) = match config.is_plain() {
            true => (None, None, Repeat::Transparent),
            false => {
                let config = config.load();
                let method = config.for_path(request.uri().path());
                (method.timeout, method.wait_for_ready, *method.repeat())
            }
        };
        let timeout = match (asked, configured) {
            (Some(asked), Some(configured)) => Some(asked.min(configured)),
            (asked, configured) => asked.or(configured),
        };
        let at = match timeout {
            None => NEVER,
            Some(Duration::ZERO) => {
                let error = exceeded(Duration::ZERO).with_sent(Sent::Unsent);
                return ResponseFuture::failed(error.with_role(&pool.role_arc()));
            }
            Some(timeout) => {
                if asked != Some(timeout) {
                    request
                        .headers_mut()
                        .insert(GRPC_TIMEOUT, header_of(timeout));
                }
                after(timeout)
            }
        };
        if let Some(wait) = wait_for_ready
            && request.extensions().get::<WaitForReady>().is_none()
        {
            request.extensions_mut().insert(WaitForReady(wait));
        }
        let token = match is_bare(request.extensions()) {
            true => None,
            false => request.extensions_mut().remove::<CancelToken>(),
        };
        if token.as_ref().is_some_and(CancelToken::is_cancelled) {
            let error = cancelled_error().with_sent(Sent::Unsent);
            return ResponseFuture::failed(error.with_role(&pool.role_arc()));
        }
        let ends = Ends {
            timed: Timed::new(handle.clone(), at),
            timeout: timeout.unwrap_or_default(),
            token: token.map(|token| Box::new(Waiter::new(token, NEVER))),
        };
        let calls = Calls::start(handle, request, at, repeat, |request| {
            pool.start(request, None)
        });
        ResponseFuture {
            head: Head::new(calls, ends),
        }
    }
}

impl Clone for Channel {
    fn clone(&self) -> Self {
        Self {
            route: match &self.route {
                Route::Pool(handle) => Route::Pool(Handle::new(handle.0.clone())),
                Route::Broken(broken) => Route::Broken(broken.clone()),
            },
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

// === impl Handle ===

impl Handle {
    fn new(shared: Arc<Shared>) -> Arc<Self> {
        Arc::new(Self(shared, OwnTarget::default()))
    }
}

impl Holder for Arc<Handle> {
    fn table(&self) -> Option<&Table> {
        Some(self.0.pool.timers().table())
    }

    #[inline]
    fn is_cancelled(&self) -> bool {
        self.0.stopped.load(Ordering::Relaxed)
    }

    /// All calls of a pool are in one table.
    fn tag(&self) -> usize {
        Arc::as_ptr(&self.0).addr()
    }

    fn timers(&self) -> Option<&Timers> {
        Some(self.0.pool.timers())
    }

    /// Outside of any runtime the pool's is all there is.
    fn is_here(&self) -> Result<bool, Error> {
        let timers = self.0.pool.timers();
        Ok(match runtime::Handle::try_current() {
            Ok(here) => here.id() == timers.runtime().id() && !timers.is_dead(),
            Err(_) => true,
        })
    }
}

impl Owner for Handle {
    fn target(&self) -> &Arc<Target> {
        &self.0.pool.shared().target
    }

    fn own_target(&self) -> &OwnTarget {
        &self.1
    }

    fn buffer(&self) -> usize {
        RetryLayer::BUFFER
    }

    /// Below it is its own pool.
    fn is_outer(&self) -> bool {
        false
    }

    fn is_pinned(&self) -> bool {
        self.0.pool.is_pinned()
    }

    fn sleep(&self, duration: Duration) -> Result<Pause, Error> {
        let pool = &self.0.pool;
        // The next attempt finds out why.
        Ok(pool.sleep(duration).unless(pool.shared().clone().stopped()))
    }
}

impl Spare<Pool<Connections>> for Handle {
    fn spare(&self) -> Pool<Connections> {
        self.0.pool.clone()
    }
}

// === impl Ends ===

impl Ends {
    fn named(&self, error: Error) -> Error {
        error.with_role(&self.timed.holder().0.pool.role_arc())
    }

    fn over(&self, over: Over) -> Error {
        match over {
            Over::Expired => self.named(exceeded(self.timeout)),
            Over::Cancelled => stopped_error(&self.timed.holder().0.pool),
            Over::Untimed | Over::Moved => Error::new(Kind::Internal).with_sent(Sent::Sent),
        }
    }
}

impl Watch for Ends {
    #[inline]
    fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        if let Some(token) = &mut self.token
            && token.poll(cx).is_ready()
        {
            return Poll::Ready(self.named(cancelled_error()));
        }
        match ready!(self.timed.poll(cx)) {
            Ok(over) => Poll::Ready(self.over(over)),
            Err(error) => Poll::Ready(error.with_sent(Sent::Sent)),
        }
    }

    #[inline]
    fn is_over(&mut self) -> Option<Error> {
        if self
            .token
            .as_ref()
            .is_some_and(|token| token.is_cancelled())
        {
            return Some(self.named(cancelled_error()));
        }
        if self.timed.is_cancelled() {
            return Some(self.over(Over::Cancelled));
        }
        self.timed.is_late().then(|| self.over(Over::Expired))
    }

    fn knows_better(&mut self, status: &HeaderMap) -> Option<Error> {
        (self.timed.is_timed() && says_so(status) && self.timed.is_expired())
            .then(|| self.over(Over::Expired))
    }

    fn or_better(&mut self, failure: Error) -> Error {
        if self.timed.is_timed() && is_reset_so(&failure) && self.timed.is_expired() {
            return self.over(Over::Expired).with_names_of(&failure);
        }
        match failure.role() {
            Some(_) => failure,
            None => self.named(failure),
        }
    }
}

fn stopped_error(pool: &Pool<Connections>) -> Error {
    Error::new(Kind::Stopped)
        .with_sent(Sent::Sent)
        .with_role(&pool.role_arc())
        .with_reason("the channel was stopped")
}

// === impl ResponseFuture ===

impl ResponseFuture {
    fn failed(error: Error) -> Self {
        Self {
            head: Head::failed(error),
        }
    }
}

impl Future for ResponseFuture {
    type Output = Result<Response<ResponseBody>, Error>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let head = self.project().head;
        if head.inner().is_none() {
            ready!(in_turn(cx));
        }
        let explain = |calls: &Calls<_, _, _>, error| {
            calls.explain(error, |inner: &Inner, error| inner.explain(error))
        };
        head.poll_with(cx, explain, |rest| ResponseBody { rest })
    }
}

impl fmt::Debug for ResponseFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ResponseFuture").field(&self.head).finish()
    }
}

// === impl ResponseBody ===

impl http_body::Body for ResponseBody {
    type Data = Bytes;
    type Error = Error;

    #[inline]
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let explain =
            |body: &retry::ResponseBody<pool::Body<_>>, error| body.get_ref().explain(error);
        self.project().rest.poll_with(cx, explain)
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.rest.size_hint()
    }
}
