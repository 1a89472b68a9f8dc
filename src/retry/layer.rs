//! The layer, and the service that it makes.

use std::{
    fmt,
    marker::PhantomData,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use tower_layer::Layer;
use tower_service::Service;

use super::{
    Body, ResponseFuture,
    call::Calls,
    response,
    target::{OwnTarget, Repeated, Target},
};
#[cfg(doc)]
use super::{HedgingPolicy, RetryPolicy};
use crate::{
    config::{ServiceConfig, SharedConfig},
    deadline::timeout_of,
    error::{BoxError, Error},
    waiters::{
        NEVER, after,
        timed::{self, Pause},
    },
};

/// Makes failed calls again where that is safe: over any tower service that speaks gRPC over HTTP/2.
///
/// What was certainly not processed is repeated whatever the method: at once, on another peer or connection, and
/// uncounted. A call that never left this process is repeated as often as it takes, within its deadline or 30 s; one that
/// a peer refused (`REFUSED_STREAM`, a GOAWAY below it), once. For more there has to be a policy: a [`RetryPolicy`],
/// a [`HedgingPolicy`], or a [`ServiceConfig`] with one for each method. Failures that say that nobody is there to take
/// the call are not repeated without one: whoever said so has waited as long as it would.
///
/// All of it is as gRPC's retry design has it ([A6](https://github.com/grpc/proposal/blob/master/A6-client-retries.md)). A
/// call is committed, and not made again, once its response has begun, or when its request is larger than
/// [`buffer`](RetryLayer::buffer). A response that has nothing but trailers has not begun: that is how a server says that a
/// call failed before its first message. Each attempt tells the server how many there were before
/// (`grpc-previous-rpc-attempts`) and how much time is left (`grpc-timeout`). A server's `grpc-retry-pushback-ms` is obeyed,
/// but for one that outlasts the call's deadline, or two minutes where it has none: that ends the call.
/// A deadline inside ([`DeadlineLayer`](crate::DeadlineLayer)) is one of each attempt; a policy on `DEADLINE_EXCEEDED` repeats those.
/// A [`Pool`](crate::Pool) below does not give an attempt to a peer that failed the call before, as long as there is another.
///
/// ```
/// use switchboard::{RetryLayer, RetryPolicy};
/// use tower::ServiceBuilder;
///
/// # fn wrap<S: Clone>(inner: S) -> Result<(), switchboard::Error> {
/// let policy = RetryPolicy::new(3)?.on([tonic::Code::Unavailable])?.idempotent();
/// let service = ServiceBuilder::new()
///     .layer(RetryLayer::new(policy))
///     .service(inner);
/// # Ok(())
/// # }
/// ```
///
/// # One owner
///
/// Of retry layers that are nested, [`Channel`](crate::Channel) being one, the outermost that has a policy for a call repeats
/// by it; those inside do no more than repeat what was not processed. So attempts are never multiplied.
///
/// # Services that make calls of their own
///
/// What an [`Error`] says of how far a call got is believed. So a service inside that makes several calls of its own, and fails
/// with one of theirs, would be repeated as a whole for a call that was never sent: it has to make such an error its own.
///
/// # The request's body
///
/// A unary call's message is shared between attempts and not copied. A stream is read once; its beginning is kept for the
/// next attempt. The service inside gets a [`tonic::body::Body`], or whatever `O` is made of a [`retry::Body`](Body).
pub struct RetryLayer<O = tonic::body::Body> {
    config: SharedConfig,
    buffer: usize,
    body: PhantomData<fn() -> O>,
}

/// The service of [`RetryLayer`].
///
/// It is ready when the service inside is. Attempts after the first are made on clones of that.
pub struct Retry<S, O = tonic::body::Body> {
    inner: S,
    // Made for each clone, so that its count, which every call writes, is not one that all threads do.
    shared: Arc<Shared<S>>,
    body: PhantomData<fn() -> O>,
}

/// What the calls through one [`Retry`] reach for when they fail.
pub(super) struct Shared<S> {
    /// To be cloned for another attempt.
    spare: Mutex<S>,
    target: Arc<Target>,
    own: OwnTarget,
    buffer: usize,
}

/// Where another attempt goes.
pub(crate) trait Spare<S>: Owner {
    /// A service that has to be polled ready.
    fn spare(&self) -> S;
}

/// Whose calls are made again, and what that takes.
pub(crate) trait Owner {
    fn target(&self) -> &Arc<Target>;

    fn own_target(&self) -> &OwnTarget;

    /// How many bytes of a request are kept.
    fn buffer(&self) -> usize;

    /// Whether there may be others inside that make calls again.
    fn is_outer(&self) -> bool;

    /// Whether all calls go to the same instance, or nowhere.
    fn is_pinned(&self) -> bool;

    fn sleep(&self, duration: Duration) -> Result<Pause, Error>;
}

// === impl RetryLayer ===

impl RetryLayer {
    /// Repeats what was not processed, and otherwise by this policy: a [`RetryPolicy`] or [`HedgingPolicy`] for all
    /// methods, a [`ServiceConfig`] with one for each, or a [`SharedConfig`] that can be replaced while calls are made.
    /// Of a configuration it heeds policies and throttling only.
    pub fn new(policy: impl Into<SharedConfig>) -> Self {
        Self {
            config: policy.into(),
            buffer: Self::BUFFER,
            body: PhantomData,
        }
    }

    /// Repeats what was not processed, and nothing else.
    pub fn transparent() -> Self {
        Self::new(ServiceConfig::default())
    }

    /// How much of a request is kept: 256 KiB, as gRPC does.
    pub const BUFFER: usize = 256 * 1024;
}

impl<O> RetryLayer<O> {
    /// How many bytes of a request are kept for another attempt, [`RetryLayer::BUFFER`] unless it is said otherwise. A
    /// request that is larger is not repeated. Of a stream each piece counts for some hundred bytes more, which is what keeping
    /// it takes.
    #[must_use]
    pub const fn buffer(mut self, bytes: usize) -> Self {
        self.buffer = bytes;
        self
    }

    /// For a service inside that takes other request bodies than tonic's: `P` is made of a [`retry::Body`](Body).
    pub fn with_body<P>(self) -> RetryLayer<P> {
        RetryLayer {
            config: self.config,
            buffer: self.buffer,
            body: PhantomData,
        }
    }
}

impl<S: Clone, O> Layer<S> for RetryLayer<O> {
    type Service = Retry<S, O>;

    fn layer(&self, inner: S) -> Retry<S, O> {
        Retry::with(
            inner,
            Arc::new(Target::new(self.config.clone())),
            self.buffer,
        )
    }
}

impl<O> Clone for RetryLayer<O> {
    fn clone(&self) -> Self {
        Self {
            config: self.config.clone(),
            buffer: self.buffer,
            body: PhantomData,
        }
    }
}

impl<O> fmt::Debug for RetryLayer<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RetryLayer")
            .field("config", &self.config)
            .field("buffer", &self.buffer)
            .finish()
    }
}

// === impl Retry ===

impl<S: Clone, O> Retry<S, O> {
    fn with(inner: S, target: Arc<Target>, buffer: usize) -> Self {
        Self {
            shared: Arc::new(Shared {
                spare: Mutex::new(inner.clone()),
                target,
                own: OwnTarget::default(),
                buffer,
            }),
            inner,
            body: PhantomData,
        }
    }
}

impl<S, O> Retry<S, O> {
    /// The service inside.
    pub const fn get_ref(&self) -> &S {
        &self.inner
    }

    /// The service inside, without what repeats its calls.
    pub fn into_inner(self) -> S {
        self.inner
    }

    /// The configuration that it heeds.
    pub fn config(&self) -> &SharedConfig {
        self.shared.target.config()
    }

    /// How many calls it and its clones have made again.
    pub fn repeated(&self) -> Repeated {
        self.shared.target.repeated()
    }
}

impl<S, O, B, R> Service<Request<B>> for Retry<S, O>
where
    S: Service<Request<O>, Response = Response<R>> + Clone,
    S::Error: Into<BoxError>,
    O: From<Body>,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<response::Body<R>>;
    type Error = Error;
    type Future = ResponseFuture<S, O>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner
            .poll_ready(cx)
            .map_err(|error| Error::from_ready(error.into()))
    }

    #[inline]
    fn call(&mut self, request: Request<B>) -> Self::Future {
        let at = match timeout_of(request.headers()) {
            Ok(None) => NEVER,
            Ok(Some(timeout)) => after(timeout),
            Err(error) => return ResponseFuture::new(Calls::failed(error)),
        };
        let inner = &mut self.inner;
        let first = |request| inner.call(request);
        let repeat = self.shared.target.repeat(request.uri().path());
        ResponseFuture::new(Calls::start(&self.shared, request, at, repeat, first))
    }
}

impl<S: Clone, O> Clone for Retry<S, O> {
    fn clone(&self) -> Self {
        let Shared { target, buffer, .. } = &*self.shared;
        Self::with(self.inner.clone(), target.clone(), *buffer)
    }
}

impl<S: fmt::Debug, O> fmt::Debug for Retry<S, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Retry")
            .field("inner", &self.inner)
            .field("config", self.shared.target.config())
            .finish_non_exhaustive()
    }
}

// === impl Shared ===

impl<S: Clone> Spare<S> for Shared<S> {
    fn spare(&self) -> S {
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        spare.clone()
    }
}

impl<S> Owner for Shared<S> {
    fn target(&self) -> &Arc<Target> {
        &self.target
    }

    fn own_target(&self) -> &OwnTarget {
        &self.own
    }

    fn buffer(&self) -> usize {
        self.buffer
    }

    fn is_outer(&self) -> bool {
        true
    }

    fn is_pinned(&self) -> bool {
        false
    }

    fn sleep(&self, duration: Duration) -> Result<Pause, Error> {
        timed::sleep(duration)
    }
}

impl<S> fmt::Debug for Shared<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("target", &self.target)
            .finish_non_exhaustive()
    }
}
