//! What a pool has to know of requests and responses: the options of a call, and when a call is over.

use std::{fmt, sync::Arc, time::Duration};

use super::{Avoid, body::Body, limits::Places};
use crate::{
    deadline::{GRPC_TIMEOUT, exceeded, header_of, timeout_of},
    endpoint::load::Guard,
    error::{Error, Peer, Sent},
    headers::{GRPC_STATUS, find},
    retry::is_bare,
};

/// How a pool reads its options from a request, and when a response is over.
///
/// [`Http`], the default, is for gRPC and everything else over `http` types; [`Plain`] is for any
/// request and response at all.
pub trait Protocol<Req, Res> {
    /// What the pool answers: the response, with the call's guard where it belongs.
    type Response;

    /// The options that travel with a request.
    fn options(request: &Req) -> Options<'_>;

    /// Told before a request is handed over that has waited, for a millisecond or more: what it says of its time may not be
    /// true any more.
    ///
    /// # Errors
    ///
    /// Why it is not to be made any more.
    fn waited(request: &mut Req, waited: Duration) -> Result<(), Error> {
        let _ = (request, waited);
        Ok(())
    }

    /// Ties the end of the call to the end of its response.
    fn track(response: Res, call: Call) -> Self::Response;
}

/// Calls over `http` types: options are request extensions ([`WaitForReady`], [`InstanceId`], [`Avoid`]), and a call is
/// over when its response body is at its end, has failed or is dropped.
///
/// A response that says in its head that the call has failed (`grpc-status` other than 0) has the [`Peer`] that it came from
/// as an extension, so that layers above know whom to avoid. A request that has waited has what remains of its time in
/// `grpc-timeout`; if nothing does, it is not sent and fails with
/// [`Kind::DeadlineExceeded`](crate::Kind::DeadlineExceeded).
#[derive(Clone, Copy, Debug, Default)]
pub struct Http;

/// Any request and response: no options per call, and a call is over when its response is there.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plain;

/// What a request asks of the pool; the pool's own configuration where it says nothing.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct Options<'a> {
    /// The one instance to go to.
    pub instance: Option<&'a InstanceId>,
    /// Whether to wait for a ready endpoint instead of failing fast.
    pub wait_for_ready: Option<bool>,
    /// Whom earlier attempts went to.
    pub avoid: Option<&'a Avoid>,
}

/// Request extension: whether this call waits for a ready endpoint, up to
/// [`PoolConfig::max_wait`](super::PoolConfig::max_wait), where it would otherwise fail at once.
///
/// ```
/// # use switchboard::WaitForReady;
/// let mut request = tonic::Request::new(());
/// request.extensions_mut().insert(WaitForReady(true));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitForReady(pub bool);

/// Request extension: the id of the one instance that this call may go to.
///
/// It goes there or fails; it is never executed by another, whoever has the address now.
///
/// ```
/// # use switchboard::InstanceId;
/// let mut request = tonic::Request::new(());
/// request.extensions_mut().insert(InstanceId::from(7));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct InstanceId(pub(crate) Arc<str>);

/// A call in flight: counted at its peer until dropped.
#[derive(Debug)]
pub struct Call {
    pub(crate) guard: Guard<Peer>,
    pub(crate) _places: Places,
}

// === impl Http ===

impl<B, R> Protocol<http::Request<B>, http::Response<R>> for Http {
    type Response = http::Response<Body<R>>;

    #[inline]
    fn options(request: &http::Request<B>) -> Options<'_> {
        let extensions = request.extensions();
        // Most calls have tonic's word for their method there, and nothing else.
        if is_bare(extensions) {
            return Options::default();
        }
        Options {
            instance: extensions.get(),
            wait_for_ready: extensions.get().map(|WaitForReady(wait)| *wait),
            avoid: extensions.get(),
        }
    }

    /// A server is told what remains of the time.
    fn waited(request: &mut http::Request<B>, waited: Duration) -> Result<(), Error> {
        // What cannot be read is the server's to refuse, as for a call that did not wait.
        let Ok(Some(timeout)) = timeout_of(request.headers()) else {
            return Ok(());
        };
        let left = timeout.saturating_sub(waited);
        if left.is_zero() {
            return Err(exceeded(timeout).with_sent(Sent::Unsent));
        }
        request.headers_mut().insert(GRPC_TIMEOUT, header_of(left));
        Ok(())
    }

    #[inline]
    fn track(response: http::Response<R>, call: Call) -> Self::Response {
        let mut response = response;
        // That is how a call fails before its first message.
        let failed = find(response.headers(), &GRPC_STATUS);
        if failed.is_some_and(|code| code != "0") {
            response.extensions_mut().insert(call.peer().clone());
        }
        response.map(|body| Body::new(body, call))
    }
}

// === impl Plain ===

impl<Req, Res> Protocol<Req, Res> for Plain {
    type Response = Res;

    #[inline]
    fn options(_: &Req) -> Options<'_> {
        Options::default()
    }

    #[inline]
    fn track(response: Res, _: Call) -> Res {
        response
    }
}

// === impl InstanceId ===

impl InstanceId {
    /// The id.
    pub fn id(&self) -> &str {
        &self.0
    }
}

impl From<&str> for InstanceId {
    fn from(id: &str) -> Self {
        Self(id.into())
    }
}

impl From<String> for InstanceId {
    fn from(id: String) -> Self {
        Self(id.into())
    }
}

impl From<Arc<str>> for InstanceId {
    fn from(id: Arc<str>) -> Self {
        Self(id)
    }
}

impl From<&Arc<str>> for InstanceId {
    fn from(id: &Arc<str>) -> Self {
        Self(id.clone())
    }
}

macro_rules! from_integers {
    ($($integer:ty),*) => {$(
        impl From<$integer> for InstanceId {
            /// The decimal form, as it stands in the registry.
            fn from(id: $integer) -> Self {
                Self(id.to_string().into())
            }
        }
    )*};
}

from_integers!(u32, u64, usize, i32, i64);

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

// === impl Call ===

impl Call {
    /// The peer that it went to.
    pub fn peer(&self) -> &Peer {
        self.guard.of()
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderValue, Request, Response};

    use super::*;
    use crate::{endpoint::load::Load, error::Kind};

    fn tracked(status: Option<&'static str>) -> Response<Body<()>> {
        let load = Load::new(Peer::new("echo", "7", "h:1"));
        let mut response = Response::new(());
        if let Some(status) = status {
            let headers = response.headers_mut();
            headers.insert(GRPC_STATUS, HeaderValue::from_static(status));
        }
        let call = Call {
            guard: load.acquire(),
            _places: Places::default(),
        };
        <Http as Protocol<Request<()>, _>>::track(response, call)
    }

    #[test]
    fn a_failure_in_a_responses_head_says_whose_it_is_and_success_says_nothing() {
        for (status, says) in [(None, None), (Some("0"), None), (Some("14"), Some("7"))] {
            let response = tracked(status);
            let peer = response.extensions().get::<Peer>();
            assert_eq!(peer.map(|peer| &*peer.id), says, "{status:?}");
        }
    }

    fn waited(timeout: Option<&'static str>, ms: u64) -> Result<Option<HeaderValue>, Error> {
        let mut request = Request::new(());
        if let Some(timeout) = timeout {
            let headers = request.headers_mut();
            headers.insert(GRPC_TIMEOUT, HeaderValue::from_static(timeout));
        }
        let waited = Duration::from_millis(ms);
        <Http as Protocol<_, Response<()>>>::waited(&mut request, waited)?;
        Ok(request.headers_mut().remove(GRPC_TIMEOUT))
    }

    #[test]
    fn a_request_that_has_waited_says_what_remains() {
        assert_eq!(waited(None, 5).unwrap(), None);
        assert_eq!(waited(Some("1S"), 250).unwrap().unwrap(), "750000u");
        // What cannot be read is left to the server.
        assert_eq!(waited(Some("soon"), 5).unwrap().unwrap(), "soon");
        for gone in [1000, 2000] {
            let error = waited(Some("1S"), gone).unwrap_err();
            assert_eq!(error.kind(), Kind::DeadlineExceeded);
            assert_eq!(error.sent(), Sent::Unsent);
        }
    }
}
