//! The records that are skipped: counted, and each named in one warning.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::registry::BadRecord;

/// How many records are skipped now, and how many ever were, because they are no sessions.
///
/// A clone is another handle on the same numbers.
#[derive(Clone, Debug, Default)]
pub struct Skipped(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    now: AtomicU64,
    total: AtomicU64,
}

/// The records that are skipped, by key, with the revision that the warning was about.
pub(super) struct Bad {
    skipped: Skipped,
    warned: HashMap<Arc<str>, u64>,
}

// === impl Skipped ===

impl Skipped {
    /// How many records there are now that are skipped.
    pub fn now(&self) -> u64 {
        self.0.now.load(Ordering::Relaxed)
    }

    /// How many were ever skipped; a record that is listed again unchanged counts once.
    pub fn total(&self) -> u64 {
        self.0.total.load(Ordering::Relaxed)
    }
}

// === impl Bad ===

impl Bad {
    pub(super) fn new(skipped: Skipped) -> Self {
        Self {
            skipped,
            warned: HashMap::new(),
        }
    }

    pub(super) fn note(&mut self, key: &Arc<str>, modified: u64, why: &BadRecord, role: &str) {
        if self.warned.insert(key.clone(), modified) == Some(modified) {
            return;
        }
        self.skipped.0.total.fetch_add(1, Ordering::Relaxed);
        self.publish();
        // Quoted: the key may be anybody's, with line breaks and all.
        tracing::warn!(role, key = ?key, %why, "skipped a record that is no session");
    }

    pub(super) fn forget(&mut self, key: &str) {
        if self.warned.remove(key).is_some() {
            self.publish();
        }
    }

    pub(super) fn keep(&mut self, keep: impl Fn(&str) -> bool) {
        self.warned.retain(|key, _| keep(key));
        self.publish();
    }

    fn publish(&self) {
        // Relaxed: a number for people to read, which orders nothing.
        let now = self.warned.len() as u64;
        self.skipped.0.now.store(now, Ordering::Relaxed);
    }
}
