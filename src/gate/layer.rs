//! A gate before a tower service.

use std::{
    fmt,
    future::Future,
    mem,
    pin::Pin,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use super::{Classify, Gate, OkIsGood, Verdict};
use crate::error::{BoxError, Error, Kind};

/// Puts a [`Gate`] before a service.
///
/// `C` says what the outcome of a probe means: [`OkIsGood`], or what [`GateLayer::classify`] was given.
///
/// All services that one layer makes, and all their clones, are behind the one gate.
#[derive(Clone, Debug)]
pub struct GateLayer<C = OkIsGood> {
    gate: Gate,
    classify: C,
}

/// The service of [`GateLayer`].
///
/// While the gate lets calls through, it is ready when the service inside is. While it does not, it is ready at once,
/// so that nobody waits for a service that is known to be down, and `call` fails with [`Kind::Shut`], *unsent*, which
/// is `UNAVAILABLE`. A wait for the service inside ends when the gate shuts.
///
/// `call` decides by what the gate is then. If it was shut in `poll_ready` and has opened since, the call fails
/// all the same: the service inside was not asked whether it is ready. The next one gets through.
///
/// A failing `poll_ready` inside is told to its caller, and changes nothing: only calls are probes.
///
/// If the gate shuts between `poll_ready` and `call`, what the service inside has set aside for the call, such as
/// a permit of tower's `ConcurrencyLimit`, stays with this clone until its next call, or its end.
pub struct Gated<S, C = OkIsGood> {
    inner: S,
    gate: Gate,
    classify: C,
    polled: Polled,
    // Until the gate shuts, while the service inside is awaited. Boxed when there is a wait.
    shuts: Option<Pin<Box<dyn Future<Output = ()> + Send + Sync>>>,
}

/// What `poll_ready` has found, until the next `call`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Polled {
    /// Nothing yet.
    Not,
    /// The gate let nobody through.
    Shut,
    /// The service inside is ready.
    Ready,
}

pin_project! {
    /// The response of a [`Gated`].
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<F, C = OkIsGood> {
        #[pin]
        state: State<F, C>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F, C> {
        // Dropped in this order: the slot is free when the probe is gone.
        Calling {
            #[pin]
            inner: F,
            probe: Option<Probe<C>>,
        },
        Failed {
            error: Option<Error>,
        },
    }
}

/// What a probe holds: the slot, and how to judge it.
struct Probe<C> {
    slot: Slot,
    classify: C,
}

/// The slot of a half open gate. Dropping it gives it back, also in a panic.
pub(super) struct Slot {
    gate: Gate,
    epoch: u64,
}

// === impl GateLayer ===

impl GateLayer {
    /// A layer for this gate; keep a clone of it, to flip it.
    pub const fn new(gate: Gate) -> Self {
        Self {
            gate,
            classify: OkIsGood,
        }
    }
}

impl<C> GateLayer<C> {
    /// Judges probes by this.
    pub fn classify<D>(self, classify: D) -> GateLayer<D> {
        GateLayer {
            gate: self.gate,
            classify,
        }
    }
}

impl<S, C: Clone> Layer<S> for GateLayer<C> {
    type Service = Gated<S, C>;

    fn layer(&self, inner: S) -> Gated<S, C> {
        Gated {
            inner,
            gate: self.gate.clone(),
            classify: self.classify.clone(),
            polled: Polled::Not,
            shuts: None,
        }
    }
}

// === impl Gated ===

impl<S, C> Gated<S, C> {
    /// The gate before it.
    pub const fn gate(&self) -> &Gate {
        &self.gate
    }

    /// The service inside.
    pub const fn get_ref(&self) -> &S {
        &self.inner
    }

    /// The service inside, to be changed. It has to be polled ready again then.
    pub fn get_mut(&mut self) -> &mut S {
        self.polled = Polled::Not;
        &mut self.inner
    }

    /// The service inside, without its gate.
    pub fn into_inner(self) -> S {
        self.inner
    }

    /// Whether the gate has shut while the service inside is awaited. Has this task woken when it does.
    fn poll_shuts(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let gate = &self.gate;
        let shuts = self.shuts.get_or_insert_with(|| {
            let gate = gate.clone();
            Box::pin(async move { gate.core.went_past().await })
        });
        ready!(shuts.as_mut().poll(cx));
        self.shuts = None;
        Poll::Ready(())
    }
}

impl<S, C, Req> Service<Req> for Gated<S, C>
where
    S: Service<Req>,
    S::Error: Into<BoxError>,
    C: Classify<S::Response> + Clone,
{
    type Response = S::Response;
    type Error = Error;
    type Future = ResponseFuture<S::Future, C>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.polled = Polled::Not;
        // Waiting => (Waiting | ready inside | shut)
        while self.gate.core.lets_through() {
            if let Poll::Ready(result) = self.inner.poll_ready(cx) {
                self.shuts = None;
                return Poll::Ready(match result {
                    Ok(()) => {
                        self.polled = Polled::Ready;
                        Ok(())
                    }
                    Err(error) => Err(Error::from_ready(error.into())),
                });
            }
            ready!(self.poll_shuts(cx));
        }
        self.shuts = None;
        self.polled = Polled::Shut;
        Poll::Ready(Ok(()))
    }

    #[inline]
    fn call(&mut self, request: Req) -> Self::Future {
        let polled = mem::replace(&mut self.polled, Polled::Not);
        let open = self.gate.is_open();
        let probe = match polled {
            Polled::Ready if open => None,
            // Taken before the call, so that it is given back if the service panics in it.
            Polled::Ready => match self.gate.take_slot() {
                Some(slot) => Some(Probe {
                    slot,
                    classify: self.classify.clone(),
                }),
                None => return ResponseFuture::failed(self.gate.refusal()),
            },
            Polled::Not if open => {
                let error = Error::new(Kind::Internal);
                return ResponseFuture::failed(error.with_reason("called before it was ready"));
            }
            Polled::Shut | Polled::Not => return ResponseFuture::failed(self.gate.refusal()),
        };
        ResponseFuture {
            state: State::Calling {
                inner: self.inner.call(request),
                probe,
            },
        }
    }
}

impl<S: Clone, C: Clone> Clone for Gated<S, C> {
    /// The clone is to be polled ready itself.
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            gate: self.gate.clone(),
            classify: self.classify.clone(),
            polled: Polled::Not,
            shuts: None,
        }
    }
}

impl<S: fmt::Debug, C> fmt::Debug for Gated<S, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gated")
            .field("inner", &self.inner)
            .field("gate", &self.gate)
            .field("polled", &self.polled)
            .finish_non_exhaustive()
    }
}

// === impl ResponseFuture ===

impl<F, C> ResponseFuture<F, C> {
    fn failed(error: Error) -> Self {
        Self {
            state: State::Failed { error: Some(error) },
        }
    }
}

impl<F, C, R, E> Future for ResponseFuture<F, C>
where
    F: Future<Output = Result<R, E>>,
    E: Into<BoxError>,
    C: Classify<R>,
{
    type Output = Result<R, Error>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            StateProj::Calling { inner, probe } => {
                let result = match ready!(inner.poll(cx)) {
                    // One look at each answer: to hand it on costs a copy each time.
                    Ok(response) if probe.is_none() => return Poll::Ready(Ok(response)),
                    Ok(response) => Ok(response),
                    Err(error) => Err(Error::from_service(error.into())),
                };
                if let Some(probe) = probe.take() {
                    probe.judge(&result);
                }
                Poll::Ready(result)
            }
            StateProj::Failed { error } => Poll::Ready(Err(error.take().unwrap_or_else(|| {
                Error::new(Kind::Internal).with_reason("polled after it was ready")
            }))),
        }
    }
}

impl<F: fmt::Debug, C> fmt::Debug for ResponseFuture<F, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.state {
            State::Calling { inner, probe } => f
                .debug_struct("ResponseFuture")
                .field("inner", inner)
                .field("probe", &probe.is_some())
                .finish(),
            State::Failed { error } => f.debug_tuple("ResponseFuture").field(error).finish(),
        }
    }
}

// === impl Probe ===

impl<C> Probe<C> {
    fn judge<R>(self, outcome: &Result<R, Error>)
    where
        C: Classify<R>,
    {
        let Slot { gate, epoch } = &self.slot;
        match self.classify.classify(outcome) {
            // A verdict is a flip: the slot that is dropped then is of an epoch that is over.
            Verdict::Good => gate.core.probed_good(*epoch),
            Verdict::Bad => gate.core.probed_bad(
                *epoch,
                match outcome {
                    Ok(_) => "its response is a bad one".to_owned(),
                    Err(error) => error.to_string(),
                },
            ),
            Verdict::Unknown => {}
        }
    }
}

// === impl Slot ===

impl Slot {
    pub(super) const fn new(gate: Gate, epoch: u64) -> Self {
        Self { gate, epoch }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.gate.core.return_slot(self.epoch);
    }
}
