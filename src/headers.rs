//! Looking into header maps.

use http::{HeaderMap, HeaderName, HeaderValue};

/// How a call has ended, in trailers.
pub(crate) const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// So many names are looked through faster than one is hashed.
const FEW: usize = 8;

/// The first value of this name. Calls have few headers, and mostly not this one: comparing a name with theirs takes half
/// the instructions that hashing it does.
#[inline]
pub(crate) fn find<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a HeaderValue> {
    if headers.len() > FEW {
        return headers.get(name);
    }
    let found = headers.iter().find(|(other, _)| *other == name);
    found.map(|(_, value)| value)
}
