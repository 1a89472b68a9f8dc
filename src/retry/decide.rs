//! Whether a failed attempt is followed by another, and when: gRPC's rules, without a clock and without a wire.

use std::time::Duration;

use http::{HeaderMap, HeaderName, Response, StatusCode};
use tonic::Code;

use super::{RetryPolicy, throttle::Throttle};
use crate::{
    error::{Error, Kind, Sent},
    headers::{GRPC_STATUS, find},
};

/// A server's word on when, or whether, to try again
/// ([A6](https://github.com/grpc/proposal/blob/master/A6-client-retries.md#pushback)).
const PUSHBACK: HeaderName = HeaderName::from_static("grpc-retry-pushback-ms");

/// The longest delay that a server may ask for. A longer one is not to be tried again.
pub(crate) const LONGEST_PUSHBACK: Duration = Duration::from_secs(24 * 60 * 60);

/// After so many repeats in a row of what was never sent, each is preceded by a pause.
const AT_ONCE: u32 = 3;
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// A failed attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) code: Code,
    pub(crate) nature: Nature,
    pub(crate) pushback: Pushback,
}

/// What a failure says of its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Nature {
    /// It is nobody's failure that another attempt could mend: the caller's own end of it, a wrong request, a limit.
    Final,
    /// It was never sent, by chance: what it was given to had just gone.
    Lost,
    /// The peer did not process it.
    Refused,
    /// It was never sent, because there is nobody that could take it. Whoever said so has waited as long as it would.
    Unsent,
    /// It may have been executed.
    Sent,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pushback {
    None,
    /// Exactly this delay.
    After(Duration),
    /// Not again.
    Stop,
}

/// How far a call's attempts have come.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Progress {
    /// Attempts that count.
    pub(crate) made: u32,
    /// Those since a server last said when to try again.
    since_pushback: u32,
    /// It was repeated once because a peer had not processed it.
    pub(crate) refused: bool,
    /// Repeats in a row of what was never sent.
    lost: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The failure is the call's.
    Final,
    /// Again, and this does not count.
    AtOnce,
    /// Again after a pause, and this does not count either.
    Soon(Duration),
    /// Again by the policy, after this delay.
    After(Duration),
}

// === impl Failure ===

impl Failure {
    pub(crate) fn of_error(error: &Error, pinned: bool) -> Self {
        let nature = match (error.kind(), error.sent()) {
            (
                Kind::Invalid
                | Kind::Stopped
                | Kind::Cancelled
                | Kind::DeadlineExceeded
                | Kind::RequestBody
                | Kind::Limit
                | Kind::Component,
                _,
            )
            // Polled again, and the like.
            | (Kind::Internal, Sent::Unsent) => Nature::Final,
            // Only another instance could take it, and none may.
            (Kind::OtherInstance | Kind::SessionDeleted, Sent::Unprocessed | Sent::Unsent) if pinned => {
                Nature::Final
            }
            (_, Sent::Unprocessed) => Nature::Refused,
            (Kind::Service, _) if is_refused(error) => Nature::Refused,
            (Kind::ConnectionLost | Kind::SessionDeleted | Kind::Refused, Sent::Unsent) => Nature::Lost,
            (_, Sent::Unsent) => Nature::Unsent,
            (_, _) => Nature::Sent,
        };
        Self {
            code: error.code(),
            nature,
            pushback: Pushback::None,
        }
    }

    /// Of a response that has nothing but trailers, as all have that fail before their first message.
    #[inline]
    pub(crate) fn of_response<B>(response: &Response<B>) -> Option<Self> {
        match find(response.headers(), &GRPC_STATUS) {
            None if response.status() == StatusCode::OK => None,
            Some(code) if code == "0" => None,
            code => Some(Self {
                code: match code {
                    Some(code) => Code::from_bytes(code.as_bytes()),
                    None => code_of_http(response.status()),
                },
                nature: Nature::Sent,
                pushback: Pushback::of(response.headers()),
            }),
        }
    }
}

/// Whether another transport's error is that the peer has refused the stream. What stands behind a status is not looked at: that
/// may be of another call, such as the one whose response is this one's request.
fn is_refused(error: &Error) -> bool {
    #[cfg(feature = "transport")]
    {
        let mut next = error.cause();
        while let Some(cause) = next.filter(|cause| !cause.is::<tonic::Status>()) {
            if let Some(error) = cause.downcast_ref::<h2::Error>() {
                let refused = error.reason() == Some(h2::Reason::REFUSED_STREAM);
                return refused && error.is_reset() && error.is_remote();
            }
            next = cause.source();
        }
    }
    let _ = error;
    false
}

/// gRPC's code for an answer that is not gRPC's, from a proxy or another server
/// ([http-grpc-status-mapping.md](https://github.com/grpc/grpc/blob/master/doc/http-grpc-status-mapping.md)).
fn code_of_http(status: StatusCode) -> Code {
    match status {
        StatusCode::BAD_REQUEST => Code::Internal,
        StatusCode::UNAUTHORIZED => Code::Unauthenticated,
        StatusCode::FORBIDDEN => Code::PermissionDenied,
        StatusCode::NOT_FOUND => Code::Unimplemented,
        StatusCode::TOO_MANY_REQUESTS
        | StatusCode::BAD_GATEWAY
        | StatusCode::SERVICE_UNAVAILABLE
        | StatusCode::GATEWAY_TIMEOUT => Code::Unavailable,
        _ => Code::Unknown,
    }
}

/// The code in a status, wherever it stands.
pub(super) fn code_of(status: &HeaderMap) -> Option<Code> {
    let code = find(status, &GRPC_STATUS)?;
    Some(Code::from_bytes(code.as_bytes()))
}

// === impl Pushback ===

impl Pushback {
    /// What is negative, no number, or said twice, is a no.
    fn of(headers: &HeaderMap) -> Self {
        let mut said = headers.get_all(PUSHBACK).iter();
        let (first, second) = (said.next(), said.next());
        let Some(value) = first else {
            return Self::None;
        };
        let digits = value.to_str().unwrap_or_default();
        let millis = match digits.bytes().all(|b| b.is_ascii_digit()) {
            true => digits.parse().ok(),
            false => None,
        };
        match millis.map(Duration::from_millis) {
            Some(delay) if second.is_none() && delay <= LONGEST_PUSHBACK => Self::After(delay),
            _ => Self::Stop,
        }
    }
}

// === impl Progress ===

impl Progress {
    /// The first attempt is under way.
    pub(crate) const fn new() -> Self {
        Self {
            made: 1,
            since_pushback: 0,
            refused: false,
            lost: 0,
        }
    }

    /// What follows on a failed attempt. `again` is whether the request can be sent once more at all; `policy` is none
    /// where nothing is repeated but what was certainly not processed.
    pub(crate) fn after(
        &mut self,
        failure: Failure,
        again: bool,
        policy: Option<&RetryPolicy>,
        throttle: Option<&Throttle>,
    ) -> Verdict {
        match failure.nature {
            Nature::Final => return Verdict::Final,
            Nature::Lost if again => {
                self.lost = self.lost.saturating_add(1);
                return match self.lost.checked_sub(AT_ONCE + 1) {
                    None => Verdict::AtOnce,
                    Some(more) => {
                        let pause = Duration::from_millis(1 << more.min(7));
                        Verdict::Soon(pause.min(LONGEST_PAUSE))
                    }
                };
            }
            Nature::Refused if again && !self.refused => {
                self.refused = true;
                return Verdict::AtOnce;
            }
            _ => self.lost = 0,
        }
        // In the order of gRPC's own: a failure counts against the throttle also where something else forbids another
        // attempt.
        let listed = policy.is_some_and(|policy| policy.codes().contains(failure.code));
        let allowed = match throttle {
            Some(throttle) if listed || failure.pushback == Pushback::Stop => throttle.failed(),
            _ => true,
        };
        let Some(policy) = policy.filter(|_| listed && allowed && again) else {
            return Verdict::Final;
        };
        let may_be_executed = failure.nature == Nature::Sent;
        if (may_be_executed && !policy.is_idempotent()) || self.made >= policy.attempts() {
            return Verdict::Final;
        }
        let delay = match failure.pushback {
            Pushback::Stop => return Verdict::Final,
            Pushback::After(delay) => {
                self.since_pushback = 0;
                delay
            }
            Pushback::None => {
                let delay = policy.delays().delay(self.since_pushback);
                self.since_pushback += 1;
                delay
            }
        };
        self.made += 1;
        Verdict::After(delay)
    }
}

#[cfg(test)]
mod tests;
