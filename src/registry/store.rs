//! What all registries with keys and revisions have in common: a list, and a watch from a revision.
//!
//! Discovery's engine knows registries by this alone, so it is one engine for all of them, and its tests
//! can break each step of it.

use std::{fmt, pin::Pin, sync::Arc};

use bytes::Bytes;
use futures_core::Stream;

use crate::{endpoint::BoxFuture, error::BoxError};

/// A place with keys, values and revisions, as etcd has it.
///
/// Revisions are positive; 0 is "before everything". Every future ends by itself, within a bound of the
/// store's; the streams do not.
pub(crate) trait Store: fmt::Debug + Send + Sync + 'static {
    /// All records under the prefix, as of one revision.
    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Listing, BoxError>>;

    /// All that happens under the prefix from this revision on. It is established when the future is
    /// ready; what it yields together is applied together.
    fn watch(self: Arc<Self>, prefix: &str, from: u64) -> BoxFuture<'_, Result<Watch, Broken>>;
}

/// Ends with its first error; its plain end is the same as [`Broken::Lost`].
pub(crate) type Watch = Pin<Box<dyn Stream<Item = Result<Vec<Event>, Broken>> + Send>>;

/// All records under a prefix at a revision.
#[derive(Clone, Debug, Default)]
pub(crate) struct Listing {
    pub(crate) records: Vec<Record>,
    pub(crate) revision: u64,
}

/// One key and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) key: Bytes,
    pub(crate) value: Bytes,
    /// When the key came into being: the generation of what it stands for.
    pub(crate) created: u64,
    /// When the value was last written.
    pub(crate) modified: u64,
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Put(Record),
    Delete(Bytes),
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
