//! Looking into header maps.

#[cfg(feature = "transport")]
use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use http::{HeaderMap, HeaderName, HeaderValue};

/// How a call has ended, in trailers.
pub(crate) const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// What else it has to say of that, in base64.
#[cfg(feature = "transport")]
const DETAILS: HeaderName = HeaderName::from_static("grpc-status-details-bin");

/// As tonic reads it: with padding or without.
#[cfg(feature = "transport")]
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

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

/// Takes out a status's details that are none: tonic panics over them
/// ([grpc-rust#2618](https://github.com/grpc/grpc-rust/pull/2618)). The code and the message stay, as with grpc-go.
#[cfg(feature = "transport")]
#[inline]
pub(crate) fn without_wrong_details(headers: &mut HeaderMap) {
    let details = find(headers, &DETAILS);
    if details.is_some_and(|details| BASE64.decode(details).is_err()) {
        headers.remove(DETAILS);
    }
}
