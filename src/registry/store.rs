//! What all registries with keys, revisions and leases have in common.
//!
//! Discovery and registrations know registries by this alone, so there is one engine for all of them, and
//! tests can break each step of it.

use std::{fmt, pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_core::Stream;

use super::BadRecord;
use crate::{
    endpoint::BoxFuture,
    error::{BoxError, Error},
};

/// A place with keys, values, revisions and leases, as etcd has it.
///
/// Revisions are positive; 0 is "before everything". Lease ids are positive, chosen by whoever asks for one,
/// and 0 is "no lease". Every future ends by itself, within a bound of the store's, and dropping it leaves its
/// effect in doubt; the streams have no end. All of it may be asked for again when an answer was lost.
pub(crate) trait Store: fmt::Debug + Send + Sync + 'static {
    /// All records in the scope, as of one revision.
    fn list<'a>(&'a self, scope: &'a Scope) -> BoxFuture<'a, Result<Listing, BoxError>>;

    /// All that happens in the scope from this revision on. It is established when the future is
    /// ready; what it yields together is applied together.
    fn watch(self: Arc<Self>, scope: &Scope, from: u64) -> BoxFuture<'_, Result<Watch, Broken>>;

    /// The record under a key. Never older than what was there when it was asked for.
    fn get<'a>(&'a self, key: &'a Bytes) -> BoxFuture<'a, Result<Option<Record>, Error>>;

    /// Grants a lease under this id. That there is one already, of an earlier request, is no failure.
    fn grant(&self, lease: i64, ttl: Duration) -> BoxFuture<'_, Result<(), Error>>;

    /// Prolongs a lease by its whole TTL, within this time; false if it is gone.
    fn keep_alive(&self, lease: i64, within: Duration) -> BoxFuture<'_, Result<bool, Error>>;

    /// Ends a lease, and all records under it. That it is gone already is no failure.
    fn revoke(&self, lease: i64) -> BoxFuture<'_, Result<(), Error>>;

    /// Writes or deletes a record on a condition.
    fn write(&self, write: Write) -> BoxFuture<'_, Result<Written, Error>>;
}

/// What to list or watch.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Scope {
    /// All keys that begin like this.
    Prefix(Bytes),
    /// This key.
    Key(Bytes),
}

/// Ends with its first error; its plain end is the same as [`Broken::Lost`].
pub(crate) type Watch = Pin<Box<dyn Stream<Item = Result<Vec<Event>, Broken>> + Send>>;

/// All records in a scope at a revision.
#[derive(Clone, Debug, Default)]
pub(crate) struct Listing {
    pub(crate) records: Vec<Record>,
    pub(crate) revision: u64,
    /// Which cluster it is; 0 if the store has no such thing.
    pub(crate) cluster: u64,
}

/// One key and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) key: Bytes,
    /// Empty if it is longer than is read; `size` says how long it is.
    pub(crate) value: Bytes,
    pub(crate) size: usize,
    /// When the key came into being: the generation of what it stands for.
    pub(crate) created: u64,
    /// When the value was last written.
    pub(crate) modified: u64,
    pub(crate) lease: i64,
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Put(Record),
    Delete(Bytes),
}

/// A conditional write.
#[derive(Clone, Debug)]
pub(crate) struct Write {
    pub(crate) key: Bytes,
    /// None deletes.
    pub(crate) value: Option<Bytes>,
    pub(crate) lease: i64,
    pub(crate) only_if: OnlyIf,
}

/// The condition of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnlyIf {
    /// There is nothing under the key.
    Absent,
    /// What is there came into being at this revision.
    Created(u64),
    /// What is there was last written at this revision.
    Unchanged(u64),
}

/// What a conditional write comes to.
#[derive(Debug)]
pub(crate) enum Written {
    /// Done, at this revision.
    Done(u64),
    /// The condition did not hold; this stands under the key, if anything.
    Refused(Option<Record>),
}

/// Why a watch goes on no more.
#[derive(Debug)]
pub(crate) enum Broken {
    Lost(BoxError),
    /// History up to this revision is gone, and with it what the watch would have told.
    Compacted {
        at: u64,
    },
}

// === impl Scope ===

impl Scope {
    /// The first key that it may cover.
    pub(crate) fn start(&self) -> &Bytes {
        let (Self::Prefix(start) | Self::Key(start)) = self;
        start
    }

    pub(crate) fn covers(&self, key: &[u8]) -> bool {
        match self {
            Self::Prefix(prefix) => key.starts_with(prefix),
            Self::Key(only) => key == only,
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        String::from_utf8_lossy(self.start()).fmt(f)?;
        match self {
            Self::Prefix(_) => f.write_str("*"),
            Self::Key(_) => Ok(()),
        }
    }
}

// === impl Record ===

impl Record {
    /// A record with a copy of these, in one allocation of just their size: what a store hands over is
    /// often a slice of a whole answer, which one record that is kept would keep.
    pub(crate) fn new(key: &[u8], value: &[u8], created: u64, modified: u64, lease: i64) -> Self {
        let size = value.len();
        // It will be skipped, and its length is all that will be said of it.
        let value = if size > BadRecord::LONGEST {
            &[]
        } else {
            value
        };
        let both = Bytes::from([key, value].concat());
        Self {
            key: both.slice(..key.len()),
            value: both.slice(key.len()..),
            size,
            created,
            modified,
            lease,
        }
    }
}

// === impl Event ===

impl Event {
    pub(crate) fn key(&self) -> &Bytes {
        let (Self::Put(Record { key, .. }) | Self::Delete(key)) = self;
        key
    }
}

// === impl Broken ===

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost(why) => write!(f, "the watch broke: {why}"),
            Self::Compacted { at } => {
                write!(f, "the watch's history was compacted at revision {at}")
            }
        }
    }
}

impl std::error::Error for Broken {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Lost(why) => why.source(),
            Self::Compacted { .. } => None,
        }
    }
}
