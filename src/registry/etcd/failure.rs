//! A request to etcd that came to nothing.

use std::fmt;

use tonic::{Code, Status};

use crate::error::{Error, Kind};

/// A request that came to nothing.
#[derive(Debug)]
pub(super) struct Failure {
    what: &'static str,
    status: Status,
}

// === impl Failure ===

impl Failure {
    pub(super) fn new(what: &'static str, status: Status) -> Self {
        Self { what, status }
    }

    pub(super) fn code(&self) -> Code {
        self.status.code()
    }

    /// Whether another token may mend it. etcd says so in three ways: the token is unknown (it is forgotten
    /// after some minutes, or with the member that made it), none was sent (authentication was turned on), or
    /// users and roles have changed since.
    pub(super) fn wants_token(&self) -> bool {
        let says = |words| self.status.message().contains(words);
        // Which code the latter two come with depends on the version.
        self.status.code() == Code::Unauthenticated
            || says("user name is empty")
            || says("revision of auth store is old")
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "etcd did not {}: ", self.what)?;
        match self.status.message() {
            "" => self.status.code().fmt(f),
            message => f.write_str(message),
        }
    }
}

impl std::error::Error for Failure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.status)
    }
}

impl From<Failure> for Error {
    fn from(Failure { what, status }: Failure) -> Self {
        let kind = match status.code() {
            // etcd is away, or has no leader, or is too slow.
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => {
                Kind::RegistryUnreachable
            }
            // Ours, and not etcd's: there is no runtime.
            Code::InvalidArgument if Self::of(&status).is_some() => Kind::Invalid,
            _ => Kind::RegistryRefused,
        };
        let error = Self::new(kind).with_reason(format!("etcd did not {what}"));
        error.with_source(status)
    }
}
