//! A set of gRPC's codes.

use std::fmt;

use tonic::Code;

use crate::error::Error;

/// A set of gRPC status codes.
///
/// ```
/// use switchboard::retry::Codes;
/// use tonic::Code;
///
/// let codes: Codes = [Code::Unavailable, Code::Aborted].into_iter().collect();
/// assert!(codes.contains(Code::Aborted));
/// assert_eq!(format!("{codes:?}"), "{Aborted, Unavailable}");
/// ```
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Codes(u32);

// === impl Codes ===

impl Codes {
    /// Whether this code is in it.
    pub const fn contains(self, code: Code) -> bool {
        self.0 & Self::bit(code) != 0
    }

    /// Whether there is none in it.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The codes in it, by number.
    pub fn iter(self) -> impl Iterator<Item = Code> {
        (0..=16)
            .map(Code::from)
            .filter(move |code| self.contains(*code))
    }

    pub(crate) const fn one(code: Code) -> Self {
        Self(Self::bit(code))
    }

    /// Failures only.
    pub(crate) fn of_failures(
        what: &'static str,
        codes: impl IntoIterator<Item = Code>,
    ) -> Result<Self, Error> {
        let codes: Self = codes.into_iter().collect();
        match codes.contains(Code::Ok) {
            true => Err(Error::invalid(what, "OK is no failure")),
            false => Ok(codes),
        }
    }

    const fn bit(code: Code) -> u32 {
        1 << code as u32
    }
}

impl FromIterator<Code> for Codes {
    fn from_iter<I: IntoIterator<Item = Code>>(codes: I) -> Self {
        Self(
            codes
                .into_iter()
                .fold(0, |bits, code| bits | Self::bit(code)),
        )
    }
}

impl fmt::Debug for Codes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}
