//! Calls that are made again, where that is safe.
//!
//! [`RetryLayer`] over any service that speaks gRPC repeats what was certainly not processed, and more by a
//! [`RetryPolicy`] or a [`HedgingPolicy`]. A [`Channel`](crate::Channel) has it built in, and takes its policies from a
//! [`ServiceConfig`](crate::ServiceConfig).
//!
//! The rules are gRPC's ([A6](https://github.com/grpc/proposal/blob/master/A6-client-retries.md)).

mod again;
mod body;
mod call;
mod codes;
mod decide;
mod hedge;
mod kept;
mod layer;
mod policy;
mod response;
mod target;
mod throttle;

#[cfg(any(fuzzing, test))]
pub(crate) use self::decide::{Failure, LONGEST_PUSHBACK, Nature, Progress, Pushback, Verdict};
pub use self::{
    body::Body,
    call::ResponseFuture,
    codes::Codes,
    layer::{Retry, RetryLayer},
    policy::{HedgingPolicy, RetryPolicy, Throttling},
    response::Body as ResponseBody,
    target::Repeated,
};
#[cfg(feature = "manager")]
pub(crate) use self::{
    call::Calls,
    layer::{Owner, Spare},
    target::{OwnTarget, Target},
};
pub(crate) use self::{kept::is_bare, throttle::Throttle};
