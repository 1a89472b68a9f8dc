//! The pool as callers see it: a `Clone` service that picks in `call`.
//!
//! The fast path is one snapshot load, one pick, one guard, one clone of the endpoint's service, and
//! its call: no lock, no allocation, no wait. Everything else is the slow path, in the response future.

use std::{
    fmt,
    future::Future,
    marker::PhantomData,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

#[cfg(feature = "manager")]
use std::sync::Weak;

use arc_swap::ArcSwap;
use pin_project_lite::pin_project;
use tokio::sync::Notify;
use tower_service::Service;

use super::{
    PoolConfig, Setup,
    interest::Interest,
    limits::{Limits, Places},
    protocol::{Call, Http, InstanceId, Protocol},
    snapshot::Snapshot,
    wait::{Slow, Waiting, in_turn, polled_again},
};
use crate::error::{BoxError, Error};
#[cfg(feature = "manager")]
use crate::waiters::{Timers, timed::Pause};

/// The balanced set of a role's endpoints, as a tower service.
///
/// `poll_ready` is always ready and `call` picks, so a clone needs no readiness of its own and no
/// `Buffer` is needed to share a pool: clone it, an `Arc` clone, wherever a call is made.
///
/// A call that finds no ready endpoint waits while the role is not resolved yet, while an endpoint is
/// making its first attempt, or if it asked to ([`WaitForReady`](super::WaitForReady)), but no longer than
/// [`PoolConfig::max_wait`]; otherwise it fails at once.
///
/// # Errors
///
/// [`Error`], of kind [`NoSession`](crate::Kind::NoSession), [`UnknownPeer`](crate::Kind::UnknownPeer),
/// [`NotConnected`](crate::Kind::NotConnected), [`Busy`](crate::Kind::Busy), [`Limit`](crate::Kind::Limit),
/// [`RegistryUnreachable`](crate::Kind::RegistryUnreachable) or [`Stopped`](crate::Kind::Stopped) when the call went nowhere,
/// all *unsent*; otherwise what the endpoint's service returned, with the peer's name.
///
/// # Cancellation
///
/// Dropping the response future, or the response body, ends the call and gives its load back. Dropping
/// the last clone of the pool ends its tasks, and its connections as their last call ends.
pub struct Pool<S, P = Http> {
    inner: Arc<Inner<S>>,
    pinned: Option<InstanceId>,
    protocol: PhantomData<fn() -> P>,
}

/// A pool, if it is still there.
#[cfg(feature = "manager")]
pub(crate) struct WeakPool<S, P = Http> {
    inner: Weak<Inner<S>>,
    protocol: PhantomData<fn() -> P>,
}

/// What all clones of a pool share. Dropping it ends the driver.
pub(super) struct Inner<S> {
    pub(super) shared: Arc<Shared<S>>,
    pub(super) driver: super::Handle,
    /// What times and cancels its calls.
    #[cfg(feature = "manager")]
    pub(super) timers: Arc<Timers>,
}

/// Where the driver's route and the calls' route meet.
pub(crate) struct Shared<S> {
    pub(crate) role: Arc<str>,
    pub(crate) config: PoolConfig,
    pub(crate) snapshot: ArcSwap<Snapshot<S>>,
    /// Woken, all of it, after each new snapshot.
    pub(crate) changed: Arc<Notify>,
    pub(crate) interest: Interest,
    /// Whether it ends because nobody holds it any more.
    pub(crate) let_go: AtomicBool,
    pub(super) limits: Limits,
    #[cfg(feature = "manager")]
    pub(crate) target: Arc<crate::retry::Target>,
}

pin_project! {
    /// The response of a [`Pool`].
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<S, Req, P = Http>
    where
        S: Service<Req>,
    {
        #[pin]
        state: State<S, Req, S::Future>,
        protocol: PhantomData<fn() -> P>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<S, Req, F> {
        // The endpoint has the call.
        Calling {
            #[pin]
            response: F,
            call: Option<Call>,
        },
        // Boxed, for the fast path would carry it as dead weight.
        Slow {
            slow: Box<Slow<S, Req>>,
        },
        // It asks for what cannot be, or is over a limit.
        Refused {
            error: Option<Error>,
        },
    }
}

// === impl Pool ===

impl<S, P> Pool<S, P> {
    pub(super) fn from_inner(inner: Inner<S>) -> Self {
        Self {
            inner: Arc::new(inner),
            pinned: None,
            protocol: PhantomData,
        }
    }

    /// This pool with all calls pinned to one instance: they go there or fail.
    ///
    /// A request whose own [`InstanceId`] extension names another fails with [`Kind::Invalid`](crate::Kind::Invalid).
    #[must_use]
    pub fn to(&self, instance: impl Into<InstanceId>) -> Self {
        Self {
            inner: self.inner.clone(),
            pinned: Some(instance.into()),
            protocol: PhantomData,
        }
    }

    /// The role whose endpoints these are.
    pub fn role(&self) -> &str {
        &self.inner.shared.role
    }

    /// Ends it: calls in flight end as `CANCELLED` where their connections can be closed, later calls
    /// fail with [`Kind::Stopped`](crate::Kind::Stopped), all tasks end. Returns when they have, or after two seconds.
    ///
    /// Cancel safe: the stop goes on without its waiter. Stopping twice is stopping once.
    pub async fn stop(&self) {
        self.stop_gracefully(Duration::ZERO).await;
    }

    /// The same, giving calls in flight this long to finish, one day at most; calls that wait, and later ones, fail at once.
    ///
    /// Cancel safe. Of several stops the one that ends first counts.
    pub async fn stop_gracefully(&self, grace: Duration) {
        self.inner.driver.end(grace, None);
        self.inner.driver.ended(grace).await;
    }

    /// Orders its end without waiting for it; `why` is what later calls hear.
    #[cfg(feature = "manager")]
    pub(crate) fn end(&self, grace: Duration, why: Option<&'static str>) {
        self.inner.driver.end(grace, why);
    }

    #[cfg(feature = "manager")]
    pub(crate) fn timers(&self) -> &Timers {
        &self.inner.timers
    }

    #[cfg(feature = "manager")]
    pub(crate) const fn is_pinned(&self) -> bool {
        self.pinned.is_some()
    }

    /// A sleep for a call.
    #[cfg(feature = "manager")]
    pub(crate) fn sleep(&self, duration: Duration) -> Pause {
        self.inner.driver.sleep(duration)
    }

    #[cfg(feature = "manager")]
    pub(crate) fn shared(&self) -> &Arc<Shared<S>> {
        &self.inner.shared
    }

    /// A handle that does not keep it alive.
    #[cfg(feature = "manager")]
    pub(crate) fn downgrade(&self) -> WeakPool<S, P> {
        WeakPool {
            inner: Arc::downgrade(&self.inner),
            protocol: PhantomData,
        }
    }

    /// Whether it can still serve: neither was it stopped, nor has its runtime ended.
    #[cfg(any(feature = "manager", feature = "etcd"))]
    pub(crate) fn is_running(&self) -> bool {
        self.inner.driver.is_running()
    }

    pub(crate) fn role_arc(&self) -> Arc<str> {
        self.inner.shared.role.clone()
    }

    pub(super) fn shared_limits(&self) -> &Limits {
        &self.inner.shared.limits
    }

    pub(crate) fn snapshot(&self) -> Arc<Snapshot<S>> {
        self.inner.shared.snapshot.load_full()
    }
}

impl<S, P, Req> Service<Req> for Pool<S, P>
where
    S: Service<Req> + Clone,
    S::Error: Into<BoxError>,
    P: Protocol<Req, S::Response>,
{
    type Response = P::Response;
    type Error = Error;
    type Future = ResponseFuture<S, Req, P>;

    #[inline]
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    #[inline]
    fn call(&mut self, request: Req) -> Self::Future {
        self.start(request, None)
    }
}

impl<S, P> Pool<S, P> {
    /// A call, with what its method is configured to do where the request does not say.
    #[inline]
    pub(crate) fn start<Req>(
        &self,
        request: Req,
        wait_for_ready: Option<bool>,
    ) -> ResponseFuture<S, Req, P>
    where
        S: Service<Req> + Clone,
        S::Error: Into<BoxError>,
        P: Protocol<Req, S::Response>,
    {
        let options = P::options(&request);
        let instance = options.instance.or(self.pinned.as_ref());
        if let (Some(asked), Some(pinned)) = (options.instance, &self.pinned)
            && asked != pinned
        {
            let why = format!("it asks for {asked}, through a pool that is pinned to {pinned}");
            return ResponseFuture::new(State::Refused {
                error: Some(Error::invalid("request", why).with_role(&self.inner.shared.role)),
            });
        }
        let snapshot = self.inner.shared.snapshot.load();
        let picked = match options.avoid {
            Some(avoid) if instance.is_none() => avoid.pick(&snapshot),
            _ => snapshot.pick(instance),
        };
        let limits = &self.inner.shared.limits;
        let (picked, places) = match picked {
            Some(ready) if limits.are_set => {
                let others = || snapshot.others(instance, options.avoid);
                match limits.admit(ready, others) {
                    Ok((ready, places)) => (Some(ready), places),
                    Err(full) => {
                        let pinned = instance.map(|_| ready.load.of());
                        let error = limits.refuse(full, &self.inner.shared.role, pinned);
                        return ResponseFuture::new(State::Refused { error: Some(error) });
                    }
                }
            }
            picked => (picked, Places::default()),
        };
        if let Some(ready) = picked {
            let mut service = ready.service.clone();
            // Most services are ready at once; one that is not is polled again with a real waker.
            match service.poll_ready(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(Ok(())) => {
                    let call = Call {
                        guard: ready.acquire(),
                        _places: places,
                    };
                    if let Some(avoid) = options.avoid {
                        avoid.add(call.peer());
                    }
                    return ResponseFuture::new(State::Calling {
                        response: service.call(request),
                        call: Some(call),
                    });
                }
                Poll::Ready(Err(_)) => ready.mark_down("it takes no new calls"),
                Poll::Pending => {}
            }
        }
        drop(snapshot);
        let waiting = Waiting {
            pinned: instance.cloned(),
            patient: options.wait_for_ready.or(wait_for_ready),
            avoid: options.avoid.cloned(),
        };
        let slow = Box::new(Slow::new(&self.inner, waiting, request));
        ResponseFuture::new(State::Slow { slow })
    }
}

impl<S, P> Clone for Pool<S, P> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            pinned: self.pinned.clone(),
            protocol: PhantomData,
        }
    }
}

impl<S, P> fmt::Debug for Pool<S, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("role", &self.inner.shared.role)
            .field("pinned", &self.pinned)
            .field("snapshot", &self.inner.shared.snapshot.load())
            .finish()
    }
}

// === impl WeakPool ===

#[cfg(feature = "manager")]
impl<S, P> WeakPool<S, P> {
    pub(crate) fn upgrade(&self) -> Option<Pool<S, P>> {
        Some(Pool {
            inner: self.inner.upgrade()?,
            pinned: None,
            protocol: PhantomData,
        })
    }
}

// === impl Inner ===

impl<S> Drop for Inner<S> {
    fn drop(&mut self) {
        // For those who only watch. Before the driver's handle, which is dropped next, and whose abort synchronizes.
        self.shared.let_go.store(true, Ordering::Relaxed);
    }
}

// === impl Shared ===

impl<S> Shared<S> {
    pub(super) fn new(role: Arc<str>, config: PoolConfig, setup: &Setup) -> Self {
        #[cfg(not(feature = "manager"))]
        let _ = setup;
        Self {
            limits: Limits::new(&config),
            role,
            config,
            snapshot: ArcSwap::from_pointee(Snapshot::empty()),
            changed: Arc::new(Notify::new()),
            let_go: AtomicBool::new(false),
            interest: Interest::new(),
            #[cfg(feature = "manager")]
            target: setup.target.clone(),
        }
    }
}

// === impl ResponseFuture ===

impl<S: Service<Req>, Req, P> ResponseFuture<S, Req, P> {
    fn new(state: State<S, Req, S::Future>) -> Self {
        Self {
            state,
            protocol: PhantomData,
        }
    }

    /// An error from outside, such as a deadline, with what is known here of where the call is.
    #[cfg(feature = "manager")]
    pub(crate) fn explain(&self, error: Error) -> Error {
        match &self.state {
            State::Calling {
                call: Some(call), ..
            } => error.with_peer(&Arc::new(call.peer().clone())),
            State::Calling { call: None, .. } | State::Refused { .. } => error,
            State::Slow { slow } => slow.explain(error),
        }
    }
}

impl<S, Req, P> Future for ResponseFuture<S, Req, P>
where
    S: Service<Req> + Clone,
    S::Error: Into<BoxError>,
    P: Protocol<Req, S::Response>,
{
    type Output = Result<P::Response, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            match this.state.as_mut().project() {
                StateProj::Calling { response, call } => {
                    if call.is_none() {
                        return Poll::Ready(Err(polled_again()));
                    }
                    let result = ready!(response.poll(cx));
                    let Some(call) = call.take() else {
                        return Poll::Ready(Err(polled_again()));
                    };
                    return Poll::Ready(match result {
                        Ok(response) => Ok(P::track(response, call)),
                        Err(error) => {
                            let error = Error::from_service(error.into());
                            Err(match error.peer() {
                                Some(_) => error,
                                None => error.with_peer(&Arc::new(call.peer().clone())),
                            })
                        }
                    });
                }
                StateProj::Refused { error } => {
                    ready!(in_turn(cx));
                    return Poll::Ready(Err(error.take().unwrap_or_else(polled_again)));
                }
                // Slow => (Calling | failed)
                StateProj::Slow { slow } => {
                    let (response, call) = ready!(slow.poll_call::<P>(cx))?;
                    this.state.set(State::Calling {
                        response,
                        call: Some(call),
                    });
                }
            }
        }
    }
}

impl<S: Service<Req>, Req, P> fmt::Debug for ResponseFuture<S, Req, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &self.state {
            State::Calling { call, .. } => format!("calling {call:?}"),
            State::Slow { .. } => "waiting".to_owned(),
            State::Refused { error } => format!("refused {error:?}"),
        };
        f.debug_tuple("ResponseFuture").field(&state).finish()
    }
}
