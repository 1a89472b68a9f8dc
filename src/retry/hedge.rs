//! A call that is made several times at once: the first answer counts
//! ([A6](https://github.com/grpc/proposal/blob/master/A6-client-retries.md#hedging-policy)).

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use http::{Request, Response};
use tower_service::Service;

use super::{
    Body, HedgingPolicy,
    again::{Attempted, Attempts, Call, finally, polled_again},
    call::poll_cancel,
    decide::{Failure, Nature, Pushback, Verdict},
    layer::{Owner, Spare},
    target::Again,
};
use crate::{
    CancelToken,
    cancel::cancelled_error,
    error::{BoxError, Error, Kind, Sent},
    pool::in_turn,
    waiters::{Waiter, timed::Pause},
};

/// The attempts of one call.
pub(super) struct Hedge<W, S, O>
where
    S: Service<Request<O>>,
{
    policy: HedgingPolicy,
    // None when it is over.
    call: Option<Call<W>>,
    under_way: Vec<Pin<Box<S::Future>>>,
    next: Next<S>,
    /// What may cancel it while no attempt is under way.
    cancel: Option<Waiter<CancelToken>>,
    /// Attempts that count.
    made: u32,
    /// The next one is made in the place of one that was not processed.
    remaking: bool,
    /// There will be no more but in the place of one that did not count.
    enough: bool,
    /// The last failure, as long as others may do better.
    last: Option<Result<S::Response, Error>>,
}

/// The next attempt.
enum Next<S> {
    Now,
    /// The service that it goes to is awaited.
    Readying(S),
    After(Pause),
    /// There is none.
    No,
}

/// What a failed attempt comes to.
enum Outcome<T> {
    /// It is the call's failure.
    Fatal(Result<T, Error>),
    Another,
}

// === impl Hedge ===

impl<W, S, O> Hedge<W, S, O>
where
    W: Owner,
    S: Service<Request<O>>,
{
    /// The first attempt is under way.
    pub(super) fn new(policy: HedgingPolicy, call: Call<W>, first: S::Future) -> Self {
        Self {
            next: match policy.delay().is_zero() {
                true => Next::Now,
                false => next_after(&call, policy.delay()),
            },
            policy,
            cancel: call.cancel(),
            call: Some(call),
            under_way: vec![Box::pin(first)],
            made: 1,
            remaking: false,
            enough: false,
            last: None,
        }
    }
}

impl<W, S, O, R> Hedge<W, S, O>
where
    W: Spare<S>,
    S: Service<Request<O>, Response = Response<R>> + Clone,
    S::Error: Into<BoxError>,
    O: From<Body>,
{
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Attempts<R>> {
        let Some(mut call) = self.call.take() else {
            return Poll::Ready(Err(polled_again()));
        };
        let result = match self.poll_call(&mut call, cx) {
            // Those that are under way know for themselves.
            Poll::Pending if self.under_way.is_empty() => {
                let cancelled = poll_cancel(&mut self.cancel, cx);
                cancelled.map(|()| Err(Err(cancelled_error().with_sent(Sent::Unsent))))
            }
            result => result,
        };
        let Poll::Ready(result) = result else {
            self.call = Some(call);
            return Poll::Pending;
        };
        // The others are cancelled, and nobody will know how far they got.
        if !self.under_way.is_empty() {
            call.sent(Sent::Sent);
        }
        self.under_way.clear();
        self.next = Next::No;
        self.last = None;
        Poll::Ready(match result {
            Ok(response) => {
                let codes = self.policy.codes();
                Ok(call.commit(response, |_| codes))
            }
            Err(failed) => finally(failed, call.sent(Sent::Unsent)),
        })
    }

    /// The response that counts, or the failure that does.
    #[expect(
        clippy::type_complexity,
        reason = "it is taken apart by its one caller"
    )]
    fn poll_call(
        &mut self,
        call: &mut Call<W>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Response<R>, Result<Response<R>, Error>>> {
        loop {
            let next = self.poll_next(call, cx);
            if let Poll::Ready(Err(error)) = next {
                return Poll::Ready(Err(Err(error)));
            }
            // Those that were made first are asked first.
            let mut n = 0;
            let mut again = next.is_ready();
            while let Some(attempt) = self.under_way.get_mut(n) {
                let Poll::Ready(result) = attempt.as_mut().poll(cx) else {
                    n += 1;
                    continue;
                };
                drop(self.under_way.remove(n));
                let attempted = match result {
                    Ok(response) => match Failure::of_response(&response) {
                        None => return Poll::Ready(Ok(response)),
                        Some(failure) => Attempted::answered(response, failure),
                    },
                    Err(error) => Attempted::failed(error, call),
                };
                match self.failed(call, attempted) {
                    Outcome::Fatal(failed) => return Poll::Ready(Err(failed)),
                    Outcome::Another => again = true,
                }
            }
            if self.under_way.is_empty() && matches!(self.next, Next::No) {
                let last = self.last.take();
                return Poll::Ready(Err(last.unwrap_or_else(|| Err(polled_again()))));
            }
            if !again {
                return Poll::Pending;
            }
        }
    }

    /// Makes the next attempt when it is time for it.
    fn poll_next(&mut self, call: &mut Call<W>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        loop {
            match &mut self.next {
                Next::No => return Poll::Pending,
                // After => Now
                Next::After(sleep) => {
                    ready!(sleep.poll(cx));
                    self.next = Next::Now;
                }
                // Now => (Readying | No)
                Next::Now => {
                    let is_allowed = call.throttle().is_none_or(|t| t.allows());
                    if self.made > 0 && (self.made >= self.policy.attempts() || !is_allowed) {
                        self.next = Next::No;
                        return Poll::Pending;
                    }
                    ready!(in_turn(cx));
                    self.next = Next::Readying(call.owner.spare());
                }
                // Readying => (Now | After | No)
                Next::Readying(service) => {
                    if let Err(error) = ready!(service.poll_ready(cx)) {
                        self.next = Next::No;
                        self.not_made(Err(Error::from_ready(error.into())));
                        return Poll::Pending;
                    }
                    self.made += 1;
                    if !std::mem::replace(&mut self.remaking, false) {
                        call.owner.target().count(Again::Hedged);
                    }
                    call.progress.made = self.made;
                    let request = call.again()?;
                    let attempt = Box::pin(service.call(request.map(O::from)));
                    self.under_way.push(attempt);
                    self.next = match self.made < self.policy.attempts() && !self.enough {
                        true if self.policy.delay().is_zero() => Next::Now,
                        true => next_after(call, self.policy.delay()),
                        false => Next::No,
                    };
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }

    /// Takes in a failure.
    fn failed(&mut self, call: &mut Call<W>, attempted: Attempted<R>) -> Outcome<Response<R>> {
        // As if it had not been made, if that may be.
        let again = match call.after_uncounted(&attempted) {
            Verdict::AtOnce => Some(Next::Now),
            Verdict::Soon(pause) => Some(next_after(call, pause)),
            Verdict::After(_) | Verdict::Final => None,
        };
        let Attempted {
            failure,
            peer,
            result,
            ..
        } = attempted;
        if let Some(peer) = &peer {
            call.avoid(peer);
        }
        if let Some(again) = again {
            call.owner.target().count(Again::Unprocessed);
            self.remaking = true;
            self.made = self.made.saturating_sub(1);
            self.next = again;
            self.last = Some(result);
            return Outcome::Another;
        }
        let is_alone = self.under_way.is_empty();
        match failure.nature {
            // One that nobody could take says nothing against those that somebody has.
            Nature::Unsent if !is_alone => {
                self.not_made(result);
                return Outcome::Another;
            }
            Nature::Final if !is_alone && is_not_let_in(&result) => {
                self.next = Next::No;
                self.enough = true;
                self.not_made(result);
                return Outcome::Another;
            }
            Nature::Final => return Outcome::Fatal(result),
            _ => {}
        }
        let is_fatal = !self.policy.codes().contains(failure.code);
        if !is_fatal || failure.pushback == Pushback::Stop {
            call.throttle().inspect(|throttle| {
                throttle.failed();
            });
        }
        if is_fatal {
            return Outcome::Fatal(result);
        }
        self.last = Some(result);
        self.enough |= failure.pushback == Pushback::Stop;
        if !matches!(self.next, Next::No) {
            self.next = match failure.pushback {
                Pushback::None => Next::Now,
                Pushback::Stop => Next::No,
                Pushback::After(delay) => next_after(call, delay),
            };
        }
        Outcome::Another
    }

    /// An attempt has failed here. What one that got out has failed with says more.
    fn not_made(&mut self, result: Result<Response<R>, Error>) {
        self.last.get_or_insert(result);
    }
}

/// Whether this process has refused it: by a limit, or because it stops, where those under way may still have some time.
fn is_not_let_in<T>(result: &Result<T, Error>) -> bool {
    matches!(result, Err(error) if error.sent() == Sent::Unsent && matches!(error.kind(), Kind::Limit | Kind::Stopped))
}

/// After this delay, if there is the time for it, and something to wait by.
fn next_after<W: Owner, S>(call: &Call<W>, delay: Duration) -> Next<S> {
    match call.owner.sleep(delay) {
        Ok(sleep) if call.has(delay) => Next::After(sleep),
        _ => Next::No,
    }
}
