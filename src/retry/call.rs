//! One call, from its first attempt to the head of the response that counts.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{Request, Response};
use pin_project_lite::pin_project;
use tower_service::Service;

use super::{
    Body,
    again::{Attempted, Attempts, Call, polled_again},
    body::Source,
    decide::{Failure, Nature, Verdict},
    hedge::Hedge,
    kept::Kept,
    layer::{Shared, Spare},
    target::Again,
};
use crate::{
    CancelToken,
    cancel::cancelled_error,
    config::Repeat,
    error::{BoxError, Error, Kind, Sent},
    pool::in_turn,
    waiters::{Waiter, timed::Pause},
};

pin_project! {
    /// The response of a [`Retry`](super::Retry).
    ///
    /// Dropping it cancels the attempt that is under way, and there will be no other.
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<S, O = tonic::body::Body>
    where
        S: Service<Request<O>>,
    {
        #[pin]
        calls: Calls<Shared<S>, S, O>,
    }
}

pin_project! {
    /// A call's attempts.
    pub(crate) struct Calls<W, S, O>
    where
        S: Service<Request<O>>,
    {
        #[pin]
        state: State<W, S, O, S::Future>,
        // None when it is over, or hedged.
        call: Option<Call<W>>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<W, S, O, F>
    where
        S: Service<Request<O>>,
    {
        Attempt {
            #[pin]
            future: F,
        },
        Pausing {
            sleep: Pause,
            cancel: Option<Waiter<CancelToken>>,
        },
        // For the service that the next attempt goes to.
        Readying {
            service: S,
            cancel: Option<Waiter<CancelToken>>,
        },
        Hedging {
            hedge: Box<Hedge<W, S, O>>,
        },
        Failed {
            error: Option<Error>,
        },
    }
}

// === impl ResponseFuture ===

impl<S: Service<Request<O>>, O> ResponseFuture<S, O> {
    pub(super) const fn new(calls: Calls<Shared<S>, S, O>) -> Self {
        Self { calls }
    }
}

impl<S, O, R> Future for ResponseFuture<S, O>
where
    S: Service<Request<O>, Response = Response<R>> + Clone,
    S::Error: Into<BoxError>,
    O: From<Body>,
{
    type Output = Attempts<R>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.project().calls.poll(cx)
    }
}

impl<S: Service<Request<O>>, O> fmt::Debug for ResponseFuture<S, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ResponseFuture").field(&self.calls).finish()
    }
}

// === impl Calls ===

impl<W, S: Service<Request<O>>, O> Calls<W, S, O> {
    pub(crate) const fn failed(error: Error) -> Self {
        Self {
            state: State::Failed { error: Some(error) },
            call: None,
        }
    }

    /// Adds what is known here to an error from outside, such as a deadline.
    #[cfg(feature = "manager")]
    pub(crate) fn explain(
        &self,
        error: Error,
        attempt: impl FnOnce(&S::Future, Error) -> Error,
    ) -> Error {
        match (&self.state, &self.call) {
            (State::Attempt { future }, Some(call)) => {
                attempt(future, error).with_sent_at_least(call.sent)
            }
            // There is no attempt under way: it has got as far as those before.
            (State::Pausing { .. } | State::Readying { .. }, Some(call)) => error
                .with_sent(call.sent)
                .with_reason("between two attempts"),
            _ => error,
        }
    }
}

impl<W, S, O, R> Calls<W, S, O>
where
    W: Spare<S>,
    S: Service<Request<O>, Response = Response<R>> + Clone,
    S::Error: Into<BoxError>,
    O: From<Body>,
{
    /// A call whose time is up `at` this time, which its header says too, and whose method is configured to be made again
    /// like this; `first` makes the first attempt.
    #[inline]
    pub(crate) fn start<B>(
        owner: &Arc<W>,
        request: Request<B>,
        at: u64,
        repeat: Repeat,
        first: impl FnOnce(Request<O>) -> S::Future,
    ) -> Self
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let (mut head, body) = request.into_parts();
        let body = tonic::body::Body::new(body);
        let (body, source) = match Source::of(body, owner.buffer()) {
            Ok(looked) => looked,
            Err(error) => return Self::failed(error),
        };
        let mut call = Call::new(Kept::of(&head, source, at), owner);
        let hedging = call.decide(repeat);
        call.mark(&mut head.extensions);
        if hedging.is_some() {
            // The pool writes into it whom each attempt goes to, and passes them by.
            head.extensions.insert(call.avoid_list().clone());
        }
        // On the service that is ready; it may be the only one that can be.
        let future = first(Request::from_parts(head, O::from(body)));
        match hedging {
            None => Self {
                state: State::Attempt { future },
                call: Some(call),
            },
            Some(policy) => Self {
                state: State::Hedging {
                    hedge: Box::new(Hedge::new(policy, call, future)),
                },
                call: None,
            },
        }
    }
}

impl<W, S, O, R> Future for Calls<W, S, O>
where
    W: Spare<S>,
    S: Service<Request<O>, Response = Response<R>> + Clone,
    S::Error: Into<BoxError>,
    O: From<Body>,
{
    type Output = Attempts<R>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            match this.state.as_mut().project() {
                // Attempt => (done | Readying | Pausing)
                StateProj::Attempt { future } => {
                    let Some(call) = this.call.as_mut() else {
                        return Poll::Ready(Err(polled_again()));
                    };
                    let result = ready!(future.poll(cx));
                    let attempted = match result {
                        Ok(response) => match Failure::of_response(&response) {
                            None => {
                                let response = call.commit(response, Call::codes);
                                *this.call = None;
                                return Poll::Ready(Ok(response));
                            }
                            Some(failure) => Attempted::answered(response, failure),
                        },
                        Err(error) => Attempted::failed(error, call),
                    };
                    let pause = match call.after(&attempted) {
                        Verdict::Final => None,
                        Verdict::AtOnce => Some((Again::Unprocessed, None)),
                        // Where there is nothing to pause by, that was all.
                        Verdict::Soon(delay) => {
                            let sleep = call.owner.sleep(delay).ok();
                            sleep.map(|sleep| (Again::Unprocessed, Some(sleep)))
                        }
                        Verdict::After(delay) => {
                            let sleep = call.owner.sleep(delay).ok();
                            sleep.map(|sleep| (Again::ByPolicy, Some(sleep)))
                        }
                    };
                    let Some((again, pause)) = pause else {
                        let result = call.result(attempted);
                        *this.call = None;
                        return Poll::Ready(result);
                    };
                    call.owner.target().count(again);
                    call.before = match attempted.failure.nature {
                        Nature::Lost | Nature::Refused => attempted.result.err(),
                        _ => None,
                    };
                    // All that the attempt has had is given back before the next one waits.
                    this.state.set(match pause {
                        Some(sleep) => State::Pausing {
                            sleep,
                            cancel: call.cancel(),
                        },
                        None => State::Readying {
                            service: call.owner.spare(),
                            cancel: call.cancel(),
                        },
                    });
                }
                // Pausing => (Readying | done)
                StateProj::Pausing { sleep, cancel } => {
                    let is_over = sleep.poll(cx).is_ready();
                    let is_cancelled = poll_cancel(cancel, cx).is_ready();
                    let Some(call) = this.call.as_ref() else {
                        return Poll::Ready(Err(polled_again()));
                    };
                    if is_cancelled {
                        let error = cancelled_error().with_sent(call.sent);
                        *this.call = None;
                        return Poll::Ready(Err(error));
                    }
                    if !is_over {
                        return Poll::Pending;
                    }
                    let service = call.owner.spare();
                    let cancel = cancel.take();
                    this.state.set(State::Readying { service, cancel });
                }
                // Readying => (Attempt | done)
                StateProj::Readying { service, cancel } => {
                    ready!(in_turn(cx));
                    let ready = match service.poll_ready(cx) {
                        Poll::Ready(ready) => ready.map_err(|e| Error::from_ready(e.into())),
                        Poll::Pending => {
                            ready!(poll_cancel(cancel, cx));
                            Err(cancelled_error().with_sent(Sent::Unsent))
                        }
                    };
                    let Some(call) = this.call.as_mut() else {
                        return Poll::Ready(Err(polled_again()));
                    };
                    let request = match ready {
                        Ok(()) => call.again(),
                        Err(error) if error.kind() == Kind::Cancelled => Err(error),
                        // Nobody can take it: why it was to be made again says more.
                        Err(error) => Err(call.before.take().unwrap_or(error)),
                    };
                    match request {
                        Ok(request) => {
                            let future = service.call(request.map(O::from));
                            this.state.set(State::Attempt { future });
                        }
                        Err(error) => {
                            let error = error.with_sent_at_least(call.sent);
                            *this.call = None;
                            return Poll::Ready(Err(error));
                        }
                    }
                }
                StateProj::Hedging { hedge } => return hedge.poll(cx),
                StateProj::Failed { error } => {
                    ready!(in_turn(cx));
                    return Poll::Ready(Err(error.take().unwrap_or_else(polled_again)));
                }
            }
        }
    }
}

/// Ready when the call's own token is cancelled.
pub(super) fn poll_cancel(
    cancel: &mut Option<Waiter<CancelToken>>,
    cx: &mut Context<'_>,
) -> Poll<()> {
    match cancel {
        Some(token) => token.poll(cx).map(drop),
        None => Poll::Pending,
    }
}

impl<W, S: Service<Request<O>>, O> fmt::Debug for Calls<W, S, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &self.state {
            State::Attempt { .. } => "an attempt is under way",
            State::Pausing { .. } => "pausing",
            State::Readying { .. } => "waiting for the service",
            State::Hedging { .. } => "hedging",
            State::Failed { .. } => "failed",
        };
        f.debug_struct("Calls")
            .field("state", &state)
            .field("made", &self.call.as_ref().map(|call| call.progress.made))
            .finish()
    }
}
