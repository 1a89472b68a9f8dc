//! How a session stands in a registry: its key and its value.

mod milvus;
mod naming;

use std::{
    borrow::Cow,
    fmt,
    panic::{self, AssertUnwindSafe},
    sync::Arc,
};

use bytes::Bytes;
use http::HeaderMap;
use serde::Deserialize;

pub use self::{milvus::Milvus, naming::Naming};
use super::Session;
use crate::error::Error;

/// How sessions are written to a registry's keys and values, and read from them.
///
/// [`Naming`] is the default, [`Milvus`] reads and writes that system's sessions. Bring your own to read the
/// records of another system that exists: give it to a registry's `with_codec`.
pub trait Codec: fmt::Debug + Send + Sync + 'static {
    /// The prefix of all keys of this role; nothing else should have it.
    fn prefix(&self, root: &str, role: &str) -> String;

    /// The key of this session, which begins with the prefix of its role. All
    /// [exclusive](Session::with_exclusive) sessions of a role have the same.
    fn key(&self, root: &str, session: &Session) -> String;

    /// The key of the counter that ids are allocated from. Where a role's prefix covers it, [`Codec::decode`]
    /// says that it is no session. Default `<root>/id`.
    fn counter(&self, root: &str) -> String {
        match root {
            "" => "id".to_owned(),
            root => format!("{root}/id"),
        }
    }

    /// The value of this session. `lease` is the registry's id of the lease that it will be under, for
    /// formats that repeat it in the value.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid) if the format cannot hold it.
    fn encode(&self, session: &Session, lease: i64) -> Result<Vec<u8>, Error>;

    /// The session of one record whose key begins with the prefix of this role; `None` for a record that
    /// may well stand there and is no session of this role, such as that of a role whose name begins the same.
    /// What it returns is validated once more by whoever asked.
    ///
    /// # Errors
    ///
    /// [`BadRecord`]: it will be skipped, counted, and named in a warning. A panic is taken for
    /// [`BadRecord::Panicked`].
    fn decode(
        &self,
        root: &str,
        role: &str,
        key: &str,
        value: &[u8],
    ) -> Result<Option<Session>, BadRecord>;

    /// The metadata that every call to this session carries, so that a server can tell calls that are meant for
    /// another instance. Default: none, which costs a call nothing.
    ///
    /// Names of gRPC and HTTP/2 themselves, such as `te` or `grpc-timeout`, are not for it. It goes by a session's
    /// role and id, which do not change: a connection keeps what it was made with.
    fn call_metadata(&self, session: &Session) -> HeaderMap {
        let _ = session;
        HeaderMap::new()
    }
}

/// Why a record under a role's prefix is no session. It costs only itself.
#[derive(Debug)]
#[non_exhaustive]
pub enum BadRecord {
    /// The key is not one of the format's.
    Key(Cow<'static, str>),
    /// The value is empty.
    Empty,
    /// The value is longer than [`BadRecord::LONGEST`].
    TooLarge {
        /// How long, in bytes.
        bytes: usize,
    },
    /// The value cannot be read.
    Unparsable(Cow<'static, str>),
    /// The value says that the session is deleted (`Op` 1).
    Deleted,
    /// The value names no address.
    NoAddress,
    /// What it says cannot work: see [`Session::validate`].
    Invalid(Error),
    /// The codec panicked over it, with this message if it is known.
    Panicked(Cow<'static, str>),
}
// === impl BadRecord ===

impl BadRecord {
    /// The longest value that is read: 1 MiB. A session has a few hundred bytes.
    pub const LONGEST: usize = 1 << 20;
}

impl fmt::Display for BadRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key(why) => write!(f, "not one of our keys: {why}"),
            Self::Empty => f.write_str("the value is empty"),
            Self::TooLarge { bytes } => {
                write!(
                    f,
                    "the value has {bytes} bytes, {} are allowed",
                    Self::LONGEST
                )
            }
            Self::Unparsable(why) => write!(f, "the value cannot be read: {why}"),
            Self::Deleted => f.write_str("the value says that it is deleted (Op 1)"),
            Self::NoAddress => f.write_str("the value has no address"),
            Self::Invalid(error) => error.fmt(f),
            Self::Panicked(message) if message.is_empty() => {
                f.write_str("the codec panicked over it")
            }
            Self::Panicked(message) => write!(f, "the codec panicked over it: {message}"),
        }
    }
}

impl std::error::Error for BadRecord {}

/// Encodes with a codec that may be anybody's: its panic is an error. So is what nobody would read: it would stand
/// there unseen, and its keeper, who cannot read it either, would write it anew without end.
pub(crate) fn encode(codec: &dyn Codec, session: &Session, lease: i64) -> Result<Bytes, Error> {
    match panic::catch_unwind(AssertUnwindSafe(|| codec.encode(session, lease))) {
        Ok(Ok(encoded)) if encoded.len() > BadRecord::LONGEST => {
            let bytes = encoded.len();
            Err(Error::invalid("session", BadRecord::TooLarge { bytes }))
        }
        Ok(encoded) => encoded.map(Bytes::from),
        Err(_) => Err(Error::invalid("session", "the codec panicked over it")),
    }
}

/// Decodes with a codec that may be anybody's: its panic costs the record and no more.
pub(crate) fn decode(
    codec: &dyn Codec,
    root: &str,
    role: &str,
    key: &str,
    value: &[u8],
) -> Result<Option<Session>, BadRecord> {
    caught(|| codec.decode(root, role, key, value))
}

/// The metadata of calls to a session that was decoded, if there is any, from a codec that may be anybody's too.
pub(crate) fn call_metadata(
    codec: &dyn Codec,
    session: &Session,
) -> Result<Option<Arc<HeaderMap>>, BadRecord> {
    let metadata = caught(|| Ok(codec.call_metadata(session)))?;
    // An empty map has a hundred bytes, and sessions may be ten thousand.
    Ok((!metadata.is_empty()).then(|| Arc::new(metadata)))
}

fn caught<T>(ask: impl FnOnce() -> Result<T, BadRecord>) -> Result<T, BadRecord> {
    panic::catch_unwind(AssertUnwindSafe(ask)).unwrap_or_else(|payload| {
        let message = match payload.downcast::<String>() {
            Ok(message) => Cow::Owned(*message),
            Err(payload) => Cow::Borrowed(payload.downcast_ref::<&str>().copied().unwrap_or("")),
        };
        Err(BadRecord::Panicked(message))
    })
}

/// What a key says beyond the prefix that it was found by.
fn rest<'a>(prefix: &str, key: &'a str) -> Result<&'a str, BadRecord> {
    key.strip_prefix(prefix)
        .ok_or_else(|| BadRecord::Key(format!("it does not begin with {prefix}").into()))
}

/// The JSON object that a value is.
fn object<'a, T: Deserialize<'a>>(value: &'a [u8]) -> Result<T, BadRecord> {
    if value.is_empty() {
        return Err(BadRecord::Empty);
    }
    if value.len() > BadRecord::LONGEST {
        return Err(BadRecord::TooLarge { bytes: value.len() });
    }
    // serde would take an array for the fields in their order.
    if value.trim_ascii_start().first() != Some(&b'{') {
        return Err(BadRecord::Unparsable("it is not a JSON object".into()));
    }
    serde_json::from_slice(value).map_err(|e| BadRecord::Unparsable(e.to_string().into()))
}

#[cfg(test)]
mod properties;

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Panicky;

    impl Codec for Panicky {
        fn prefix(&self, _: &str, role: &str) -> String {
            role.to_owned()
        }

        fn key(&self, _: &str, session: &Session) -> String {
            session.role().to_owned()
        }

        fn encode(&self, _: &Session, _: i64) -> Result<Vec<u8>, Error> {
            Ok(Vec::new())
        }

        fn decode(
            &self,
            _: &str,
            _: &str,
            _: &str,
            _: &[u8],
        ) -> Result<Option<Session>, BadRecord> {
            Ok(None)
        }

        fn call_metadata(&self, _: &Session) -> HeaderMap {
            panic!("a bug over metadata")
        }
    }

    #[test]
    fn a_codec_that_panics_over_metadata_costs_the_record() {
        let bad = call_metadata(&Panicky, &Session::new("echo", "h:1")).unwrap_err();
        let says = "the codec panicked over it: a bug over metadata";
        assert_eq!(bad.to_string(), says);
    }

    #[test]
    fn no_metadata_takes_no_room() {
        let session = Session::new("echo", "h:1").with_id(7);
        let of = |codec: &dyn Codec| call_metadata(codec, &session).unwrap();
        assert!(of(&Naming).is_none());
        assert!(of(&Milvus::new()).is_some());
    }
}
