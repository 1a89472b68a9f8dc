//! What a probe's outcome says of the service.

use http::{Response, StatusCode};
use tonic::Code;
use tower::{load_shed::error::Overloaded, timeout::error::Elapsed};

use crate::{
    error::{Error, Kind},
    headers::{GRPC_STATUS, find},
};

/// What the outcome of a probe says of the service behind a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// It works: the gate opens.
    Good,
    /// It does not: the gate shuts again.
    Bad,
    /// Neither: the gate stays half open, and the next call is a probe.
    Unknown,
}

/// Judges a probe by its outcome. Any `Fn(&Result<Res, Error>) -> Verdict` does.
///
/// The error is the service's own if that is an [`Error`], else one of kind [`Kind::Service`] with the service's
/// own among its [sources](std::error::Error::source): tower's services box their errors, and no box can be looked
/// into before it is ours.
///
/// A classifier that panics does so in the probe's own task; its slot is given back.
///
/// ```
/// use switchboard::{Error, Gate, GateLayer, gate::Verdict};
///
/// // A server that is starting answers, but is not to be called yet.
/// let layer = GateLayer::new(Gate::new()).classify(|outcome: &Result<String, Error>| match outcome {
///     Ok(answer) if answer == "starting" => Verdict::Unknown,
///     Ok(_) => Verdict::Good,
///     Err(_) => Verdict::Bad,
/// });
/// # let _ = layer;
/// ```
pub trait Classify<Res> {
    /// What this outcome says.
    fn classify(&self, outcome: &Result<Res, Error>) -> Verdict;
}

/// A response is good, an error is bad, unless it says nothing of the service. What [`GateLayer`](super::GateLayer)
/// uses if not told otherwise.
///
/// Cancellation, a deadline, overload and a wrong request say nothing: an [`Error`] of kind [`Kind::Stopped`], [`Kind::Cancelled`],
/// [`Kind::DeadlineExceeded`], [`Kind::Busy`], [`Kind::Limit`], [`Kind::RequestBody`] or [`Kind::Invalid`], wherever it is among
/// the sources; a `tonic::Status` of code `CANCELLED`, `DEADLINE_EXCEEDED` or `RESOURCE_EXHAUSTED`; and the
/// errors of tower's `Timeout` and `LoadShed`.
#[derive(Clone, Copy, Debug, Default)]
pub struct OkIsGood;

/// For gRPC over `http` types: an answer of `UNAVAILABLE` is bad, any other is good. Errors as by [`OkIsGood`].
///
/// It reads the header `grpc-status`, which is there when the response has nothing but trailers, as all have that
/// fail before their first message; where there is none, HTTP's 502, 503 and 504 are bad, which gRPC takes for
/// `UNAVAILABLE`
/// ([http-grpc-status-mapping.md](https://github.com/grpc/grpc/blob/master/doc/http-grpc-status-mapping.md)).
/// A status after a body comes too late to be judged.
#[derive(Clone, Copy, Debug, Default)]
pub struct GrpcStatus;

// === impl Classify ===

impl<Res, F> Classify<Res> for F
where
    F: Fn(&Result<Res, Error>) -> Verdict,
{
    fn classify(&self, outcome: &Result<Res, Error>) -> Verdict {
        self(outcome)
    }
}

impl<Res> Classify<Res> for OkIsGood {
    fn classify(&self, outcome: &Result<Res, Error>) -> Verdict {
        match outcome {
            Ok(_) => Verdict::Good,
            Err(error) if says_nothing(error) => Verdict::Unknown,
            Err(_) => Verdict::Bad,
        }
    }
}

impl<B> Classify<Response<B>> for GrpcStatus {
    fn classify(&self, outcome: &Result<Response<B>, Error>) -> Verdict {
        let Ok(response) = outcome else {
            return OkIsGood.classify(outcome);
        };
        let unavailable = match find(response.headers(), &GRPC_STATUS) {
            Some(code) => Code::from_bytes(code.as_bytes()) == Code::Unavailable,
            None => matches!(
                response.status(),
                StatusCode::BAD_GATEWAY
                    | StatusCode::SERVICE_UNAVAILABLE
                    | StatusCode::GATEWAY_TIMEOUT
            ),
        };
        match unavailable {
            true => Verdict::Bad,
            false => Verdict::Good,
        }
    }
}

/// Overload, cancellation, deadlines and wrong requests are not the connection's failures.
fn says_nothing(error: &Error) -> bool {
    match error.kind() {
        Kind::Stopped
        | Kind::Cancelled
        | Kind::DeadlineExceeded
        | Kind::Busy
        | Kind::Limit
        | Kind::RequestBody
        | Kind::Invalid => {
            return true;
        }
        Kind::Service => {}
        _ => return false,
    }
    // The service's own error, or whatever that wraps.
    let mut next = std::error::Error::source(error);
    if let Some(ours) = next.and_then(Error::of) {
        return says_nothing(ours);
    }
    while let Some(cause) = next {
        if cause.is::<Elapsed>() || cause.is::<Overloaded>() {
            return true;
        }
        next = cause.source();
    }
    matches!(
        error.code(),
        Code::Cancelled | Code::DeadlineExceeded | Code::ResourceExhausted
    )
}
