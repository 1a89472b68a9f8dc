//! What is fuzzed: for each parser of what comes from outside, a function that gives it these bytes and checks what holds
//! whatever they are. It panics if something does not.
//!
//! `fuzz/` runs them guided by coverage, the unit tests here over `fuzz/seeds` and mutations of these. It is no part of
//! the crate as others build it.

#[cfg(feature = "service-config")]
mod config;
mod names;
#[cfg(feature = "registry")]
mod records;
#[cfg(feature = "transport")]
mod settings;
mod wire;

#[cfg(test)]
mod tests;

use std::borrow::Cow;

use http::{HeaderMap, HeaderName, HeaderValue};

#[cfg(feature = "service-config")]
pub use self::config::config;
#[cfg(any(feature = "registry", feature = "transport"))]
pub use self::names::address;
pub use self::names::method;
#[cfg(feature = "etcd")]
pub use self::records::etcd;
#[cfg(feature = "registry")]
pub use self::records::{milvus, naming, session};
#[cfg(feature = "tls")]
pub use self::settings::pem;
#[cfg(feature = "transport")]
pub use self::settings::proxy_settings;
pub use self::wire::{failure, status, timeout};
#[cfg(feature = "transport")]
pub use self::wire::{frames, proxy_answer, refusal};
use crate::error::{Error, Kind};

/// Panics if something that has to hold does not.
pub type Check = fn(&[u8]);

/// All of them, under the names of their seeds.
pub const TARGETS: &[(&str, Check)] = &[
    #[cfg(any(feature = "registry", feature = "transport"))]
    ("address", address),
    #[cfg(feature = "service-config")]
    ("config", config),
    #[cfg(feature = "etcd")]
    ("etcd", etcd),
    ("failure", failure),
    #[cfg(feature = "transport")]
    ("frames", frames),
    ("method", method),
    #[cfg(feature = "registry")]
    ("milvus", milvus),
    #[cfg(feature = "registry")]
    ("naming", naming),
    #[cfg(feature = "tls")]
    ("pem", pem),
    #[cfg(feature = "transport")]
    ("proxy_answer", proxy_answer),
    #[cfg(feature = "transport")]
    ("proxy_settings", proxy_settings),
    #[cfg(feature = "transport")]
    ("refusal", refusal),
    #[cfg(feature = "registry")]
    ("session", session),
    ("status", status),
    ("timeout", timeout),
];

/// Bytes that are taken apart: by lines where they are text, so that seeds can be read and written.
struct Input<'a>(&'a [u8]);

// === impl Input ===

impl<'a> Input<'a> {
    /// Up to the next line break, which is left out.
    fn bytes(&mut self) -> &'a [u8] {
        let end = self.0.iter().position(|&byte| byte == b'\n');
        let (line, rest) = match end {
            Some(end) => (&self.0[..end], &self.0[end + 1..]),
            None => (self.0, &[][..]),
        };
        self.0 = rest;
        line
    }

    fn line(&mut self) -> Cow<'a, str> {
        String::from_utf8_lossy(self.bytes())
    }

    /// So many bytes as the first one says, or as there are.
    #[cfg(feature = "transport")]
    fn counted(&mut self) -> &'a [u8] {
        let Some((&count, rest)) = self.0.split_first() else {
            return &[];
        };
        let (counted, rest) = rest.split_at(rest.len().min(count.into()));
        self.0 = rest;
        counted
    }

    /// Lines of `name: value`, as long as they are such.
    fn headers(&mut self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        while !self.0.is_empty() {
            let line = self.bytes();
            let colon = line.iter().position(|&byte| byte == b':');
            let Some((name, value)) = colon.map(|at| (&line[..at], &line[at + 1..])) else {
                continue;
            };
            let value = value.strip_prefix(b" ").unwrap_or(value);
            if let (Ok(name), Ok(value)) =
                (HeaderName::from_bytes(name), HeaderValue::from_bytes(value))
            {
                // There may be 32,768.
                let _ = headers.try_append(name, value);
            }
        }
        headers
    }
}

/// What is refused is the caller's, and said in one line that can be read.
fn is_readable(error: &Error) {
    assert_eq!(error.kind(), Kind::Invalid);
    is_short_line(&error.to_string());
}

/// Whatever somebody sent, a line in a log has an end, and breaks no terminal.
fn is_short_line(text: &str) {
    assert!(!text.contains(char::is_control), "{text:?}");
    assert!(text.len() <= 2000, "{} bytes: {text:.200}", text.len());
}
