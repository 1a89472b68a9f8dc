//! How an endpoint comes by the service that takes its calls, and how it learns that it is gone.

use std::{
    any::Any, borrow::Cow, fmt, future::Future, future::Ready, pin::Pin, sync::Arc, time::Duration,
};

use futures_core::Stream;
use http::HeaderMap;

use crate::error::{BoxError, Error, Peer};

/// A boxed future; off the call path, where an allocation is not worth a type parameter.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What discovery yields and an endpoint is made from: at least, something with a name.
pub trait Target: Any + fmt::Debug + Send + Sync {
    /// Who it is. Its id is what calls are pinned by.
    fn peer(&self) -> &Arc<Peer>;

    /// Whether it has said that it is stopping: no new calls but pinned ones, those in flight finish.
    fn stopping(&self) -> bool {
        false
    }

    /// Metadata that each call to it carries, so that whoever answers at its address can tell calls that are
    /// meant for another. Default: none.
    ///
    /// A [`Connect`] asks when it makes a connection; our own transport adds it to all calls of that connection.
    fn call_metadata(&self) -> HeaderMap {
        HeaderMap::new()
    }

    /// Why no call may go there although it is registered; its connections are closed.
    fn barred(&self) -> Option<Error> {
        None
    }
}

/// Makes the service that takes an endpoint's calls.
///
/// One `connect` is one attempt. The endpoint bounds its time (see
/// [`PoolConfig::attempt_timeout`](crate::pool::PoolConfig::attempt_timeout)) by dropping the future, repeats it with
/// backoff, and catches its panics; all endpoints connect side by side, each in a task of its own.
///
/// Any `Fn(&T) -> Future` is a `Connect`. So a [`tonic::transport::Endpoint`] can serve instead of our
/// own transport:
///
/// ```
/// use switchboard::{Session, discover::Member, endpoint::{BoxError, Connected}};
/// # use tonic::transport::{Channel, Endpoint};
///
/// let connect = |member: &Member| {
///     let uri = format!("http://{}", member.session().address());
///     async move {
///         let channel = Endpoint::from_shared(uri)?.connect().await?;
///         Ok::<_, BoxError>(Connected::new(channel))
///     }
/// };
/// # fn is<T, C: switchboard::endpoint::Connect<T>>(_: &C) {}
/// # is::<Member, _>(&connect);
/// ```
///
/// [`tonic::transport::Endpoint`]: https://docs.rs/tonic/latest/tonic/transport/struct.Endpoint.html
pub trait Connect<T>: Send + Sync + 'static {
    /// The service: cloned for each call, so cloning should be cheap. An error from its `poll_ready`
    /// means that it is done for, and the endpoint connects anew.
    type Service: Clone + Send + Sync + 'static;
    /// The attempt.
    type Future: Future<Output = Result<Connected<Self::Service>, BoxError>> + Send;

    /// Begins one attempt.
    fn connect(&self, target: &T) -> Self::Future;
}

/// A service to call, and, if it has them, the lifeline of what it calls through, and what its peer says of its health.
pub struct Connected<S> {
    pub(crate) service: S,
    pub(crate) lifeline: Option<Arc<dyn Lifeline>>,
    pub(crate) health: Option<HealthStream>,
}

/// What a peer says of its health, word by word; the last one holds.
pub(crate) type HealthStream = Pin<Box<dyn Stream<Item = Health> + Send>>;

/// One word of a peer on whether it is to be called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// It is.
    Serving,
    /// It is not, and why: calls go elsewhere, or fail with this. Those in flight go on.
    NotServing(Cow<'static, str>),
}

/// The life of a connection, apart from its calls.
///
/// Without one a pool still works: it learns of a loss from the service's `poll_ready`, and cannot end
/// the calls in flight to a peer that was deleted.
pub trait Lifeline: fmt::Debug + Send + Sync {
    /// Ends when the connection, or the last of several, is gone, with the reason. Several may wait.
    ///
    /// Cancel safe: dropping the future loses nothing.
    fn closed(&self) -> BoxFuture<'_, Error>;

    /// Ends when it takes no new calls, with the reason; those in flight go on, and [`Lifeline::closed`] ends with them.
    /// The endpoint connects anew then. Default: never.
    ///
    /// Cancel safe, as [`Lifeline::closed`].
    fn leaving(&self) -> BoxFuture<'_, Error> {
        Box::pin(std::future::pending())
    }

    /// Ends when whoever answers has said that it is not the instance that was to be called, with an error of
    /// [`Kind::OtherInstance`](crate::Kind::OtherInstance). The connection takes no new calls from then on, and those
    /// in flight are left to end by themselves. Default: never.
    ///
    /// Cancel safe, as [`Lifeline::closed`].
    fn disowned(&self) -> BoxFuture<'_, Error> {
        Box::pin(std::future::pending())
    }

    /// Closes it now: calls in flight on it end with this error. A second call changes nothing.
    fn close(&self, why: Error);

    /// Nobody is to be dialled any more where it leads: the peer is elsewhere now, and who comes next may be another. What is
    /// connected stays so. Default: nothing.
    fn stop_dialling(&self) {}

    /// Whether it has ever carried a call to its answer. If so its loss is repaired at once, however
    /// short its life; a peer that only accepts and hangs up is dialled with backoff.
    fn has_served(&self) -> bool {
        false
    }

    /// How many connections take calls, of those that it is the life of. Default 1.
    fn connections(&self) -> usize {
        1
    }
}

/// A [`Target`] that brings its service with it, for discovery that yields services and not addresses,
/// such as tower's own [`ServiceList`](https://docs.rs/tower/latest/tower/discover/struct.ServiceList.html).
#[derive(Clone)]
pub struct Provided<S> {
    peer: Arc<Peer>,
    service: S,
}

/// The [`Connect`] of [`Provided`]: hands over the service that the target brought.
#[derive(Clone, Copy, Debug, Default)]
pub struct UseProvided;

// === impl Connect ===

impl<T, S, F, R> Connect<T> for F
where
    F: Fn(&T) -> R + Send + Sync + 'static,
    R: Future<Output = Result<Connected<S>, BoxError>> + Send,
    S: Clone + Send + Sync + 'static,
{
    type Service = S;
    type Future = R;

    fn connect(&self, target: &T) -> R {
        self(target)
    }
}

// === impl Connected ===

impl<S> Connected<S> {
    /// A service with no lifeline.
    pub fn new(service: S) -> Self {
        Self {
            service,
            lifeline: None,
            health: None,
        }
    }

    /// The same with the lifeline of its connection.
    #[must_use]
    pub fn with_lifeline(mut self, lifeline: Arc<dyn Lifeline>) -> Self {
        self.lifeline = Some(lifeline);
        self
    }

    /// The same with what its peer says of its health.
    ///
    /// Calls wait for the first word, for 5 s at most, as they do for a connection; when there is none by then, the peer
    /// is taken not to serve until it says so. Where the stream ends, the last word holds. Default: a peer that is
    /// connected serves.
    #[must_use]
    pub fn with_health(mut self, health: impl Stream<Item = Health> + Send + 'static) -> Self {
        self.health = Some(Box::pin(health));
        self
    }

    /// Wraps the service, say in layers of one's own; the lifeline stays.
    pub fn map<R>(self, wrap: impl FnOnce(S) -> R) -> Connected<R> {
        Connected {
            service: wrap(self.service),
            lifeline: self.lifeline,
            health: self.health,
        }
    }
}

impl<S> fmt::Debug for Connected<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connected")
            .field("lifeline", &self.lifeline)
            .finish_non_exhaustive()
    }
}

// === impl Provided ===

impl<S> Provided<S> {
    /// A service under this name.
    pub fn new(peer: Peer, service: S) -> Self {
        Self {
            peer: Arc::new(peer),
            service,
        }
    }
}

impl<S: Send + Sync + 'static> Target for Provided<S> {
    fn peer(&self) -> &Arc<Peer> {
        &self.peer
    }
}

impl<S> fmt::Debug for Provided<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Provided")
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}

impl<S: Clone + Send + Sync + 'static> Connect<Provided<S>> for UseProvided {
    type Service = S;
    type Future = Ready<Result<Connected<S>, BoxError>>;

    fn connect(&self, target: &Provided<S>) -> Self::Future {
        std::future::ready(Ok(Connected::new(target.service.clone())))
    }
}

/// How an endpoint dials, waits and gives up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dialing {
    pub(crate) attempt_timeout: Duration,
    pub(crate) attempts: u32,
    pub(crate) backoff: crate::Backoff,
    pub(crate) probe: Option<crate::Backoff>,
    pub(crate) drain: Duration,
    pub(crate) max_in_flight: Option<usize>,
}
