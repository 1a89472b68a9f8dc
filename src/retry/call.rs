//! One call, from its first attempt to the head of the response that counts.

use std::{
    fmt,
    future::Future,
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use pin_project_lite::pin_project;
use tokio::time::Sleep;
use tower_service::Service;

use super::{
    Body, Codes, HedgingPolicy, RetryPolicy, Throttle,
    body::Source,
    decide::{Failure, Nature, Progress, Verdict, code_of},
    hedge::Hedge,
    kept::{Kept, is_bare},
    layer::{Owner, Shared, Spare},
    response,
};
use crate::{
    CancelToken, InstanceId,
    cancel::cancelled_error,
    config::Repeat,
    error::{BoxError, Error, Kind, Peer, Sent},
    pool::{Avoid, in_turn},
    waiters::{NEVER, Waiter, now},
};

/// How long a call that has no deadline is repeated because it never got out.
const LOST: Duration = Duration::from_secs(30);

/// The longest pause that a server may ask for where there is no deadline.
const LONGEST_PAUSE: Duration = Duration::from_secs(120);

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
            sleep: Pin<Box<Sleep>>,
            cancel: Option<Waiter<CancelToken>>,
        },
        // For the service that the next attempt goes to.
        Readying {
            service: S,
        },
        Hedging {
            hedge: Box<Hedge<W, S, O>>,
        },
        Failed {
            error: Option<Error>,
        },
    }
}

/// What another attempt needs.
pub(super) struct Call<W> {
    pub(super) kept: Kept,
    pub(super) progress: Progress,
    avoid: Option<Avoid>,
    /// Since when it does not get out.
    lost: Option<u64>,
    /// How far any attempt got: what the call's error says.
    sent: Sent,
    /// Why it was made again, uncounted. If nobody can take it then, that is what the caller is told.
    before: Option<Error>,
    pub(super) owner: Arc<W>,
}

/// Request extension: somebody outside makes this call again by a policy.
#[derive(Clone, Copy, Debug)]
struct Owned;

/// A failed attempt, as its service told it.
pub(super) struct Attempted<T> {
    pub(super) failure: Failure,
    pub(super) sent: Sent,
    pub(super) peer: Option<Peer>,
    pub(super) result: Result<Response<T>, Error>,
}

/// What the attempts of a call come to.
pub(super) type Attempts<R> = Result<Response<response::Body<R>>, Error>;

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

    #[cfg(feature = "manager")]
    /// Adds what is known here to an error from outside, such as a deadline.
    pub(crate) fn explain(
        &self,
        error: Error,
        attempt: impl FnOnce(&S::Future, Error) -> Error,
    ) -> Error {
        let error = match &self.state {
            State::Attempt { future } => attempt(future, error),
            State::Pausing { .. } => error.with_reason("between two attempts"),
            _ => error,
        };
        match &self.call {
            Some(call) => error.with_sent_at_least(call.sent),
            None => error,
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
        let repeat = repeat_of(&head.extensions, || repeat);
        let is_whole = matches!(source, Source::Whole(_));
        let kept = Kept::of(&head, source, at);
        let mut call = Call {
            kept,
            progress: Progress::new(),
            avoid: None,
            lost: None,
            sent: Sent::Unsent,
            before: None,
            owner: owner.clone(),
        };
        match repeat {
            Repeat::Transparent => {}
            Repeat::Retry(_) => {
                call.kept.owned = true;
                if owner.is_outer() {
                    head.extensions.insert(Owned);
                }
            }
            Repeat::Hedge(policy) if is_whole => {
                call.kept.owned = true;
                // The pool writes into it whom each attempt goes to, and passes them by.
                head.extensions.insert(call.avoid_list().clone());
                if owner.is_outer() {
                    head.extensions.insert(Owned);
                }
                // On the service that is ready; it may be the only one that can be.
                let attempt = first(Request::from_parts(head, O::from(body)));
                let hedge = Box::new(Hedge::new(policy, call, attempt));
                return Self {
                    state: State::Hedging { hedge },
                    call: None,
                };
            }
            // A stream cannot be in two places.
            Repeat::Hedge(_) => {}
        }
        let future = first(Request::from_parts(head, O::from(body)));
        Self {
            state: State::Attempt { future },
            call: Some(call),
        }
    }
}

/// How a call is made again: as it says itself, or as its method is configured; not by a policy if somebody outside does that.
#[inline]
fn repeat_of(extensions: &http::Extensions, configured: impl FnOnce() -> Repeat) -> Repeat {
    if is_bare(extensions) {
        return configured();
    }
    if extensions.get::<Owned>().is_some() {
        return Repeat::Transparent;
    }
    if let Some(policy) = extensions.get::<RetryPolicy>() {
        return Repeat::Retry(*policy);
    }
    if let Some(policy) = extensions.get::<HedgingPolicy>() {
        return Repeat::Hedge(*policy);
    }
    configured()
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
                    let result = ready!(future.poll(cx));
                    let Some(call) = this.call.as_mut() else {
                        return Poll::Ready(Err(polled_again()));
                    };
                    let attempted = match result {
                        Ok(response) => match Failure::of_response(&response) {
                            None => {
                                let response = call.commit(response, Call::codes);
                                *this.call = None;
                                return Poll::Ready(Ok(response));
                            }
                            Some(failure) => Attempted::answered(response, failure),
                        },
                        Err(error) => Attempted::failed(error, call.is_pinned()),
                    };
                    let pause = match call.after(&attempted) {
                        Verdict::Final => None,
                        Verdict::AtOnce => Some(None),
                        // Where there is nothing to pause by, that was all.
                        Verdict::Soon(delay) | Verdict::After(delay) => {
                            call.owner.sleep(delay).ok().map(Some)
                        }
                    };
                    let Some(pause) = pause else {
                        let result = call.result(attempted);
                        *this.call = None;
                        return Poll::Ready(result);
                    };
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
                        },
                    });
                }
                // Pausing => (Readying | done)
                StateProj::Pausing { sleep, cancel } => {
                    let is_over = sleep.as_mut().poll(cx).is_ready();
                    let is_cancelled = cancel.as_mut().is_some_and(|c| c.poll(cx).is_ready());
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
                    this.state.set(State::Readying { service });
                }
                // Readying => (Attempt | done)
                StateProj::Readying { service } => {
                    ready!(in_turn(cx));
                    let ready = ready!(service.poll_ready(cx));
                    let Some(call) = this.call.as_mut() else {
                        return Poll::Ready(Err(polled_again()));
                    };
                    let request = match ready {
                        Ok(()) => call.again(),
                        Err(error) => Err(Error::from_service(error.into())),
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

// === impl Call ===

impl<W: Owner> Call<W> {
    /// Whether only one instance may have it.
    pub(super) fn is_pinned(&self) -> bool {
        self.owner.is_pinned() || self.kept.extension::<InstanceId>().is_some()
    }

    /// What follows on a failed attempt.
    fn after<T>(&mut self, attempted: &Attempted<T>) -> Verdict {
        self.sent = self.sent.max(attempted.sent);
        let policy = self.policy();
        let throttle = self.throttle();
        let again = self.kept.source.is_there();
        let verdict = self.progress.after(
            attempted.failure,
            again,
            policy.as_ref(),
            throttle.as_deref(),
        );
        let verdict = match verdict {
            Verdict::Final => return Verdict::Final,
            // The failure says more than that the time was up in a pause.
            Verdict::Soon(delay) | Verdict::After(delay) if !self.has(delay) => {
                return Verdict::Final;
            }
            Verdict::Soon(_) if self.kept.at == NEVER => {
                let since = *self.lost.get_or_insert_with(now);
                if now().saturating_sub(since) > LOST.as_nanos() as u64 {
                    return Verdict::Final;
                }
                verdict
            }
            Verdict::Soon(_) => verdict,
            Verdict::AtOnce | Verdict::After(_) => {
                self.lost = None;
                verdict
            }
        };
        if let Some(peer) = &attempted.peer {
            self.avoid(peer);
        }
        verdict
    }

    /// Whether it has the time for a pause.
    pub(super) fn has(&self, pause: Duration) -> bool {
        match self.kept.at {
            NEVER => pause <= LONGEST_PAUSE,
            at => pause < Duration::from_nanos(at.saturating_sub(now())),
        }
    }

    /// The policy that it is made again by. Asked for when it has failed, so that a call that goes well keeps none.
    fn policy(&self) -> Option<RetryPolicy> {
        if !self.kept.owned {
            return None;
        }
        if let Some(policy) = self.kept.extension::<RetryPolicy>() {
            return Some(*policy);
        }
        match self.owner.target().repeat(self.kept.path()) {
            Repeat::Retry(policy) => Some(policy),
            _ => None,
        }
    }

    pub(super) fn throttle(&self) -> Option<Arc<Throttle>> {
        match self.kept.owned {
            true => self.owner.target().throttle(),
            false => None,
        }
    }

    /// The attempts to come go to another peer, if there is one.
    pub(super) fn avoid(&mut self, peer: &Peer) {
        self.avoid_list().add(peer);
    }

    pub(super) fn avoid_list(&mut self) -> &Avoid {
        let kept = &mut self.kept;
        self.avoid.get_or_insert_with(|| {
            // One that is there already is of somebody outside, who wants to know as well.
            let avoid = kept.extension::<Avoid>().cloned().unwrap_or_default();
            kept.add(avoid.clone());
            avoid
        })
    }

    /// What may cancel it while no attempt is under way.
    fn cancel(&self) -> Option<Waiter<CancelToken>> {
        let token = self.kept.extension::<CancelToken>()?;
        Some(Waiter::new(token.clone(), NEVER))
    }

    /// The request of the next attempt.
    pub(super) fn again(&mut self) -> Result<Request<Body>, Error> {
        if self.kept.is_expired() {
            return Err(Error::new(Kind::DeadlineExceeded)
                .with_reason("its time was up before the next attempt"));
        }
        let mut request = self
            .kept
            .again(self.progress.made - 1)
            .ok_or_else(|| Error::new(Kind::Internal).with_reason("the request is gone"))?;
        if self.kept.owned && self.owner.is_outer() {
            request.extensions_mut().insert(Owned);
        }
        Ok(request)
    }

    /// What the last attempt's failure makes the call's.
    fn result<R>(&mut self, attempted: Attempted<R>) -> Attempts<R> {
        match self.before.take() {
            Some(before) if attempted.failure.nature == Nature::Unsent => {
                Err(before.with_sent_at_least(self.sent))
            }
            _ => finally(attempted.result, self.sent),
        }
    }

    pub(super) fn sent(&mut self, attempt: Sent) -> Sent {
        self.sent = self.sent.max(attempt);
        self.sent
    }

    /// The failures that its policy knows.
    fn codes(&self) -> Codes {
        self.policy().map_or_else(Codes::default, |p| p.codes())
    }

    /// The response that counts: there will be no other attempt.
    pub(super) fn commit<R>(
        &mut self,
        response: Response<R>,
        codes: impl FnOnce(&Self) -> Codes,
    ) -> Response<response::Body<R>> {
        let throttle = self.throttle();
        let mut counting = throttle.map(|throttle| response::Counting::new(throttle, codes(self)));
        // One that has nothing but trailers.
        if let Some(code) = counting.as_ref().and_then(|_| code_of(response.headers()))
            && let Some(counting) = counting.take()
        {
            counting.count(code);
        }
        mem::replace(&mut self.kept.source, Source::Spent).commit();
        response.map(|body| response::Body::new(body, counting))
    }
}

// === impl Attempted ===

impl<T> Attempted<T> {
    /// By an answer that says so.
    pub(super) fn answered(response: Response<T>, failure: Failure) -> Self {
        Self {
            failure,
            sent: Sent::Sent,
            peer: response.extensions().get::<Peer>().cloned(),
            result: Ok(response),
        }
    }

    pub(super) fn failed(error: impl Into<BoxError>, pinned: bool) -> Self {
        let error = Error::from_service(error.into());
        Self {
            failure: Failure::of_error(&error, pinned),
            sent: error.sent(),
            peer: error.peer().cloned(),
            result: Err(error),
        }
    }
}

/// The failure that is the call's.
pub(super) fn finally<R>(result: Result<Response<R>, Error>, sent: Sent) -> Attempts<R> {
    match result {
        Ok(response) => Ok(response.map(|body| response::Body::new(body, None))),
        Err(error) => Err(error.with_sent_at_least(sent)),
    }
}

pub(super) fn polled_again() -> Error {
    Error::new(Kind::Internal)
        .with_sent(Sent::Sent)
        .with_reason("polled after it was ready")
}
