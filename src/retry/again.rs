//! What a call needs to be made again, and what its failed attempts make of it.

use std::{mem, sync::Arc, time::Duration};

use http::{Extensions, Request, Response};

use super::{
    Body, Codes, HedgingPolicy, RetryPolicy, Throttle,
    body::Source,
    decide::{Failure, Nature, Progress, Verdict, code_of},
    kept::Kept,
    layer::Owner,
    response,
};
use crate::{
    CancelToken, InstanceId,
    config::Repeat,
    error::{BoxError, Error, Kind, Peer, Sent},
    pool::Avoid,
    waiters::{NEVER, Waiter, now},
};

/// How long a call that has no deadline is repeated because it never got out.
const LOST: Duration = Duration::from_secs(30);

/// The longest pause that a server may ask for where there is no deadline.
const LONGEST_PAUSE: Duration = Duration::from_secs(120);

/// What another attempt needs.
pub(super) struct Call<W> {
    pub(super) kept: Kept,
    pub(super) progress: Progress,
    avoid: Option<Avoid>,
    /// Since when it does not get out.
    lost: Option<u64>,
    /// What is kept of its request was too little to make it again: somebody outside may have more.
    spent: bool,
    /// How far any attempt got: what the call's error says.
    pub(super) sent: Sent,
    /// Why it was made again, uncounted. If nobody can take it then, that is what the caller is told.
    pub(super) before: Option<Error>,
    pub(super) owner: Arc<W>,
}

/// Request extension: somebody outside makes this call again by a policy.
#[derive(Clone, Copy, Debug)]
pub(super) struct Owned;

/// A failed attempt, as its service told it.
pub(super) struct Attempted<T> {
    pub(super) failure: Failure,
    pub(super) sent: Sent,
    pub(super) peer: Option<Peer>,
    pub(super) result: Result<Response<T>, Error>,
}

/// What the attempts of a call come to.
pub(super) type Attempts<R> = Result<Response<response::Body<R>>, Error>;

// === impl Call ===

impl<W: Owner> Call<W> {
    /// Its first attempt is about to be made.
    #[inline]
    pub(super) fn new(kept: Kept, owner: &Arc<W>) -> Self {
        Self {
            kept,
            progress: Progress::new(),
            avoid: None,
            lost: None,
            spent: false,
            sent: Sent::Unsent,
            before: None,
            owner: owner.clone(),
        }
    }

    /// How it is made again: as it says itself, or as its method is configured; not by a policy if somebody outside does that. The
    /// policy, if it is to be hedged.
    #[inline]
    pub(super) fn decide(&mut self, configured: Repeat) -> Option<HedgingPolicy> {
        let kept = &mut self.kept;
        let mut repeat = configured;
        if kept.has_options() {
            if kept.extension::<Owned>().is_some() {
                return None;
            }
            if let Some(policy) = kept.extension::<RetryPolicy>() {
                repeat = Repeat::Retry(*policy);
            } else if let Some(policy) = kept.extension::<HedgingPolicy>() {
                repeat = Repeat::Hedge(*policy);
            }
        }
        kept.counted = true;
        match repeat {
            Repeat::Hedge(policy) if matches!(kept.source, Source::Whole(_)) => {
                kept.owned = true;
                Some(policy)
            }
            Repeat::Retry(_) => {
                kept.owned = true;
                None
            }
            // A stream cannot be in two places.
            Repeat::Hedge(_) | Repeat::Transparent => None,
        }
    }

    /// Whether only one instance may have it.
    pub(super) fn is_pinned(&self) -> bool {
        self.owner.is_pinned() || self.kept.extension::<InstanceId>().is_some()
    }

    /// What follows on a failed attempt.
    pub(super) fn after<T>(&mut self, attempted: &Attempted<T>) -> Verdict {
        let (policy, throttle) = (self.policy(), self.throttle());
        self.after_by(attempted, policy, throttle)
    }

    /// The same of what does not count: what was certainly not processed.
    pub(super) fn after_uncounted<T>(&mut self, attempted: &Attempted<T>) -> Verdict {
        self.after_by(attempted, None, None)
    }

    fn after_by<T>(
        &mut self,
        attempted: &Attempted<T>,
        policy: Option<RetryPolicy>,
        throttle: Option<Arc<Throttle>>,
    ) -> Verdict {
        self.sent = self.sent.max(attempted.sent);
        let again = self.kept.source.take_back();
        self.spent = !again;
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
        match self.kept.counted {
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
    pub(super) fn cancel(&self) -> Option<Waiter<CancelToken>> {
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
        self.mark(request.extensions_mut());
        Ok(request)
    }

    /// Tells those inside that make calls again that this one is repeated here.
    #[inline]
    pub(super) fn mark(&self, extensions: &mut Extensions) {
        if self.kept.owned && self.owner.is_outer() {
            extensions.insert(Owned);
        }
    }

    /// What the last attempt's failure makes the call's.
    pub(super) fn result<R>(&mut self, attempted: Attempted<R>) -> Attempts<R> {
        match self.before.take() {
            Some(before) if attempted.failure.nature == Nature::Unsent => {
                Err(before.with_sent_at_least(self.sent).given_up())
            }
            _ if self.spent => {
                let sent = self.sent;
                let failed = attempted.result.map_err(|e| e.with_sent_at_least(sent));
                failed.map(|response| response.map(|body| response::Body::new(body, None)))
            }
            _ => finally(attempted.result, self.sent),
        }
    }

    pub(super) fn sent(&mut self, attempt: Sent) -> Sent {
        self.sent = self.sent.max(attempt);
        self.sent
    }

    /// The failures that its policy knows.
    pub(super) fn codes(&self) -> Codes {
        self.policy().map_or_else(Codes::default, |p| p.codes())
    }

    /// The response that counts: there will be no other attempt.
    pub(super) fn commit<R>(
        &mut self,
        response: Response<R>,
        codes: impl FnOnce(&Self) -> Codes,
    ) -> Response<response::Body<R>> {
        let owner = &self.owner;
        let target = owner.target();
        let mut counting = (self.kept.counted && target.is_throttled())
            .then(|| response::Counting::new(owner.own_target().of(target), codes(self)));
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

    pub(super) fn failed<W: Owner>(error: impl Into<BoxError>, call: &mut Call<W>) -> Self {
        let error = Error::from_service(error.into());
        let mut failure = Failure::of_error(&error, call.is_pinned());
        // A deadline inside is the attempt's own: another attempt has time.
        if error.kind() == Kind::DeadlineExceeded && !call.kept.is_expired() {
            failure.nature = match error.sent() {
                Sent::Sent => Nature::Sent,
                _ => Nature::Unsent,
            };
        }
        // A layer inside has done this already.
        if error.is_given_up() {
            call.progress.refused = true;
            if failure.nature == Nature::Lost {
                failure.nature = Nature::Unsent;
            }
        }
        Self {
            failure,
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
        Err(error) => Err(error.with_sent_at_least(sent).given_up()),
    }
}

pub(super) fn polled_again() -> Error {
    Error::new(Kind::Internal)
        .with_sent(Sent::Sent)
        .with_reason("polled after it was ready")
}
