//! Calls that end when somebody says so.

use std::{
    fmt,
    future::{Future, poll_fn},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use http::{Request, Response};
use http_body::{Frame, SizeHint};
use pin_project_lite::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use crate::{
    error::{BoxError, Error, Kind, Sent},
    sync::atomic::{AtomicBool, Ordering},
    waiters::{
        Holder, NEVER, Table, Waiter,
        guard::{Head, Rest, Watch},
    },
};

/// Ends calls: all that are under it, whether they wait, are in flight or read their response's body.
///
/// As a layer's ([`CancelLayer`]) it ends all calls through that; as a request's extension it ends that one call, through a
/// [`CancelLayer`] or a [`Channel`](crate::Channel). They end with [`Kind::Cancelled`], which is `CANCELLED`, and are
/// dropped, which resets their streams: servers are told. Later calls fail at once, *unsent*.
///
/// Clones are the same token. Once cancelled it stays so.
///
/// ```
/// use switchboard::CancelToken;
///
/// let token = CancelToken::for_call();
/// let mut request = tonic::Request::new(());
/// request.extensions_mut().insert(token.clone());
/// // The call is made, and somewhere else:
/// token.cancel();
/// ```
///
/// # Cost
///
/// A call pays one relaxed load, and a slot in the token's table while it is pending: no task, no allocation. Cancelling
/// wakes the calls one after the other.
#[derive(Clone)]
pub struct CancelToken(Arc<Inner>);

struct Inner {
    // Relaxed: a call arms its slot, under a lock, and then reads this; `cancel` writes this and then takes the same locks.
    // Of the two, whoever has the lock second sees what the first did.
    cancelled: AtomicBool,
    table: Table,
}

/// Puts calls under a [`CancelToken`].
///
/// ```
/// use switchboard::{CancelLayer, CancelToken};
/// use tower::ServiceBuilder;
///
/// # fn wrap<S>(inner: S) {
/// let token = CancelToken::new();
/// let service = ServiceBuilder::new()
///     .layer(CancelLayer::new(token.clone()))
///     .service(inner);
/// # }
/// ```
///
/// A call that carries a [`CancelToken`] of its own as a request extension is under both.
#[derive(Clone, Debug)]
pub struct CancelLayer {
    token: CancelToken,
}

/// The service of [`CancelLayer`].
///
/// It is ready when the service inside is; once its token is cancelled, at once: the call then fails.
#[derive(Debug)]
pub struct Cancel<S> {
    inner: S,
    // A handle on the token for each clone, so that its count is not one that all threads write.
    token: Arc<CancelToken>,
    // While the service inside is awaited.
    waiting: Option<Waiter<Arc<CancelToken>>>,
}

pin_project! {
    /// The response of a [`Cancel`].
    #[derive(Debug)]
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<F> {
        #[pin]
        head: Head<F, Tokens>,
    }
}

pin_project! {
    /// A response body that ends when its call is cancelled.
    #[derive(Debug)]
    pub struct Body<B> {
        #[pin]
        rest: Rest<B, Tokens>,
    }
}

/// The tokens that one call is under.
#[derive(Debug)]
struct Tokens {
    layer: Waiter<Arc<CancelToken>>,
    // Boxed, for few have one.
    call: Option<Box<Waiter<CancelToken>>>,
}

// === impl CancelToken ===

impl CancelToken {
    /// For many calls, from many threads: it has a shard of slots, two cache lines, for each of twice as many threads as there are
    /// cores, and at most 64.
    pub fn new() -> Self {
        Self::with(Table::new())
    }

    /// The same with one shard, for one call or a few. It works for any number; their threads then wait for each other.
    pub fn for_call() -> Self {
        Self::with(Table::small())
    }

    fn with(table: Table) -> Self {
        Self(Arc::new(Inner {
            cancelled: AtomicBool::new(false),
            table,
        }))
    }

    /// Ends all calls under it, and all that come later.
    pub fn cancel(&self) {
        if !self.0.cancelled.swap(true, Ordering::Relaxed) {
            self.0.table.wake(None);
        }
    }

    /// Whether it was cancelled.
    #[inline]
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Relaxed)
    }

    /// Returns when it is cancelled. Cancel safe.
    pub async fn cancelled(&self) {
        let mut waiter = Waiter::new(self.clone(), NEVER);
        poll_fn(|cx| waiter.poll(cx)).await;
    }
}

impl Default for CancelToken {
    fn default() -> Self {
        Self::new()
    }
}

impl Holder for CancelToken {
    fn table(&self) -> Option<&Table> {
        Some(&self.0.table)
    }

    #[inline]
    fn is_cancelled(&self) -> bool {
        Self::is_cancelled(self)
    }
}

impl Holder for Arc<CancelToken> {
    fn table(&self) -> Option<&Table> {
        Some(&self.0.table)
    }

    #[inline]
    fn is_cancelled(&self) -> bool {
        CancelToken::is_cancelled(self)
    }
}

impl fmt::Debug for CancelToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CancelToken")
            .field("cancelled", &self.is_cancelled())
            .finish_non_exhaustive()
    }
}

// === impl CancelLayer ===

impl CancelLayer {
    /// Puts the calls of all services that it makes under this token.
    pub const fn new(token: CancelToken) -> Self {
        Self { token }
    }
}

impl<S> Layer<S> for CancelLayer {
    type Service = Cancel<S>;

    fn layer(&self, inner: S) -> Cancel<S> {
        Cancel {
            inner,
            token: Arc::new(self.token.clone()),
            waiting: None,
        }
    }
}

// === impl Cancel ===

impl<S> Cancel<S> {
    /// The token that its calls are under.
    pub fn token(&self) -> &CancelToken {
        &self.token
    }

    /// The service inside.
    pub const fn get_ref(&self) -> &S {
        &self.inner
    }

    /// The service inside, to be changed.
    pub const fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// The service inside, whose calls are under no token.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S: Clone> Clone for Cancel<S> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            token: Arc::new(CancelToken::clone(&self.token)),
            waiting: None,
        }
    }
}

impl<S, B, R> Service<Request<B>> for Cancel<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Error: Into<BoxError>,
{
    type Response = Response<Body<R>>;
    type Error = Error;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        if !self.token.is_cancelled()
            && let Poll::Ready(result) = self.inner.poll_ready(cx)
        {
            self.waiting = None;
            return Poll::Ready(result.map_err(|error| Error::from_ready(error.into())));
        }
        // Waiting => (waiting | cancelled)
        let waiting = self
            .waiting
            .get_or_insert_with(|| Waiter::new(self.token.clone(), NEVER));
        ready!(waiting.poll(cx));
        self.waiting = None;
        Poll::Ready(Ok(()))
    }

    #[inline]
    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        // Taken out: it is heeded here.
        let call = match request.extensions().is_empty() {
            true => None,
            false => request.extensions_mut().remove::<CancelToken>(),
        };
        let cancelled = call.as_ref().is_some_and(CancelToken::is_cancelled);
        let head = match cancelled || self.token.is_cancelled() {
            true => Head::failed(cancelled_error().with_sent(Sent::Unsent)),
            false => Head::new(
                self.inner.call(request),
                Tokens {
                    layer: Waiter::new(self.token.clone(), NEVER),
                    call: call.map(|token| Box::new(Waiter::new(token, NEVER))),
                },
            ),
        };
        ResponseFuture { head }
    }
}

// === impl Tokens ===

impl Watch for Tokens {
    #[inline]
    fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        let mut over = self.layer.poll(cx).is_ready();
        if let Some(call) = &mut self.call {
            over |= call.poll(cx).is_ready();
        }
        match over {
            true => Poll::Ready(cancelled_error()),
            false => Poll::Pending,
        }
    }

    #[inline]
    fn is_over(&mut self) -> Option<Error> {
        let call = self.call.as_ref().is_some_and(|call| call.is_cancelled());
        (call || self.layer.is_cancelled()).then(cancelled_error)
    }
}

/// The error of a call that is cancelled while it is under way.
pub(crate) fn cancelled_error() -> Error {
    Error::new(Kind::Cancelled).with_sent(Sent::Sent)
}

// === impl ResponseFuture ===

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
