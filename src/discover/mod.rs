//! What a role's sessions are, as a stream of changes.
//!
//! A registry lists at a revision and watches from the next one; discovery reads its records and reconciles
//! them by key and generation. A broken watch is never patched: the last known set is kept, marked stale, and
//! on return there is a new list, a diff, and a watch from the list's revision + 1.

#[cfg(feature = "registry")]
mod discovery;
#[cfg(feature = "registry")]
mod member;
#[cfg(feature = "registry")]
mod reader;
#[cfg(feature = "registry")]
mod reconcile;
mod tower_adapter;

#[cfg(feature = "registry")]
pub(crate) use self::reader::Settings;
#[cfg(feature = "registry")]
pub use self::{
    discovery::{Discovery, Updates},
    member::{Key, Member},
    reader::Skipped,
};
use crate::error::SharedError;
pub use tower::discover::Change;
pub use tower_adapter::FromTower;

/// One word of discovery to a pool.
///
/// [`Change`] is tower's own; the other two say what it cannot: that the set is complete, or that it is
/// only the last known.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Update<K, V> {
    /// An instance came or changed, or went. Inserting a key that is there changes what is said of that
    /// instance; its connection stays, and if it is at another address now it takes calls until it is reached there. An
    /// instance that is another has another key.
    Change(Change<K, V>),
    /// What has been said up to here is all there is now.
    Synced,
    /// Discovery fails for now; what was said before is kept.
    Stale(SharedError),
}
