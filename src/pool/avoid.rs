//! Whom the attempts of a call pass by.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::snapshot::Snapshot;
use crate::{endpoint::ready::Ready, error::Peer};

/// Request extension: the peers that earlier attempts of a call went to. A pool gives the call to another, as long as there is
/// one that is ready, and writes down whom.
///
/// If there is none, the call goes to one that is not the last of them; and if there is none either, to that.
/// Calls pinned to an instance go there, whatever stands here. [`RetryLayer`](crate::RetryLayer) uses it; so can a retry of
/// one's own, by giving all attempts of a call clones of the same one.
#[derive(Clone, Default)]
pub struct Avoid(Arc<Mutex<Vec<Who>>>);

/// A server that registers again is another peer, whatever its id.
#[derive(PartialEq, Eq)]
struct Who {
    id: Arc<str>,
    generation: u64,
}

// === impl Avoid ===

impl Avoid {
    /// Nobody.
    pub fn new() -> Self {
        Self::default()
    }

    /// This peer too; as the last, if it was there already.
    pub fn add(&self, peer: &Peer) {
        let who = Who {
            id: peer.id.clone(),
            generation: peer.generation,
        };
        let mut list = self.lock();
        list.retain(|other| *other != who);
        list.push(who);
    }

    /// Up to so many of those that may have the call, the best first.
    pub(crate) fn others<S>(&self, snapshot: &Snapshot<S>, most: usize) -> Vec<Arc<Ready<S>>> {
        let list = self.lock();
        let rounds: [&[Who]; 3] = [&list, list.last().map_or(&[], std::slice::from_ref), &[]];
        let len = snapshot.ready.len();
        let start = fastrand::usize(..len.max(1));
        for avoided in rounds {
            let all = (0..len).filter_map(|step| snapshot.ready.get((start + step) % len));
            let others = all.filter(|ready| !ready.is_down());
            let others = others.filter(|ready| {
                let peer = ready.load.of();
                let is = |who: &Who| who.id == peer.id && who.generation == peer.generation;
                !avoided.iter().any(is)
            });
            let mut others: Vec<_> = others.take(most.max(2)).cloned().collect();
            if let [one, other, ..] = others.as_slice()
                && other.load.current() < one.load.current()
            {
                others.swap(0, 1);
            }
            others.truncate(most);
            if !others.is_empty() {
                return others;
            }
        }
        Vec::new()
    }

    /// No foreign code runs under it.
    fn lock(&self) -> MutexGuard<'_, Vec<Who>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Avoid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = self.lock();
        f.debug_list()
            .entries(list.iter().map(|who| &who.id))
            .finish()
    }
}
