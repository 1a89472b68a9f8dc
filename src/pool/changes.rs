//! What a pool's endpoints are and become, for one reader.
//!
//! A reader compares the snapshots that calls are picked from, at its own pace: what comes and goes between two looks
//! it never hears of, what is there at the end it always does, and it holds up nobody. It keeps what it has told and
//! not the snapshot, which would keep connections open.

use std::{
    collections::{HashMap, VecDeque},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use tokio::sync::futures::OwnedNotified;

use super::{
    chunked::{Bucket, WeakBucket},
    service::{Held, Shared},
    snapshot::{Entry, Resolution, Snapshot},
    status::{Connectivity, EndpointStatus},
};
use crate::error::{Error, Kind};

/// One reader of a pool's changes. It does not keep the pool alive.
pub(crate) struct Changes<S> {
    shared: Arc<Shared<S>>,
    changed: Pin<Box<OwnedNotified>>,
    /// What was told of each id, in the map's own buckets.
    told: Vec<Seen<S>>,
    queue: VecDeque<Change>,
    synced: bool,
    ended: bool,
    /// A pool that is watched is not idle.
    _held: Held,
}

/// A bucket of the map as it was at the last look.
struct Seen<S> {
    /// Its allocation, which is not used for another bucket while this points there. A bucket that changed is another
    /// allocation, also where nobody else held the old one: `Arc::make_mut` moves what has `Weak`s.
    bucket: WeakBucket<Arc<Entry<S>>>,
    told: Vec<EndpointStatus>,
}

/// One change of one endpoint, or of all.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    Added(EndpointStatus),
    /// Its state is another, or what discovery says of it.
    Changed {
        before: Connectivity,
        now: EndpointStatus,
    },
    Removed(EndpointStatus),
    /// What is there has been told, for the first time.
    Synced,
    /// There will be no more.
    Ended(Arc<Error>),
}

// === impl Changes ===

impl<S> Changes<S> {
    pub(crate) fn new(shared: Arc<Shared<S>>) -> Self {
        Self {
            _held: shared.interest.hold(),
            changed: shared.next_change(),
            shared,
            told: Vec::new(),
            queue: VecDeque::new(),
            synced: false,
            ended: false,
        }
    }

    /// The next change; `None` after the end.
    pub(crate) fn poll_change(&mut self, cx: &mut Context<'_>) -> Poll<Option<Change>> {
        loop {
            // Telling => (telling | looking)
            if let Some(change) = self.queue.pop_front() {
                return Poll::Ready(Some(change));
            }
            if self.ended {
                return Poll::Ready(None);
            }
            // Looking => (telling | waiting). Interest in the next snapshot was registered before this look.
            self.look();
            if self.queue.is_empty() {
                // Waiting => looking
                ready!(self.changed.as_mut().poll(cx));
            }
            self.changed = self.shared.next_change();
        }
    }

    fn look(&mut self) {
        let snapshot = self.shared.snapshot.load_full();
        match &snapshot.resolution {
            Resolution::Stopped(why) => {
                let error = Error::new(Kind::Stopped).with_role(&self.shared.role);
                let error = match why {
                    Some(why) => error.with_reason(*why),
                    None => error,
                };
                let gone = self.told.drain(..).flat_map(|seen| seen.told);
                self.queue.extend(gone.map(Change::Removed));
                self.queue.push_back(Change::Ended(Arc::new(error)));
                self.ended = true;
                return;
            }
            // It became idle before there was a watch.
            Resolution::Idle => self.shared.interest.want(),
            Resolution::Pending | Resolution::Failed(_) | Resolution::Known { .. } => {}
        }
        self.compare(&snapshot);
        if !self.synced && matches!(snapshot.resolution, Resolution::Known { .. }) {
            self.synced = true;
            self.queue.push_back(Change::Synced);
        }
    }

    fn compare(&mut self, snapshot: &Snapshot<S>) {
        let buckets = snapshot.all.buckets();
        if self.told.len() != buckets.len() {
            self.lay_out(snapshot);
        }
        let differs =
            |seen: &Seen<S>, bucket| !std::ptr::eq(seen.bucket.as_ptr(), Arc::as_ptr(bucket));
        // Whoever is gone first: if it is another map altogether, an id may be in another bucket.
        for (seen, bucket) in self.told.iter_mut().zip(buckets) {
            if differs(seen, bucket) {
                seen.keep(bucket, &mut self.queue);
            }
        }
        for (seen, bucket) in self.told.iter_mut().zip(buckets) {
            if differs(seen, bucket) {
                seen.add(bucket, &mut self.queue);
                seen.bucket = Arc::downgrade(bucket);
            }
        }
    }

    /// The map has grown: what was told is put where it is now.
    fn lay_out(&mut self, snapshot: &Snapshot<S>) {
        let buckets = snapshot.all.buckets();
        let mut told: HashMap<Arc<str>, EndpointStatus> = HashMap::new();
        for of_old in std::mem::take(&mut self.told) {
            told.extend(of_old.told.into_iter().map(|t| (t.peer.id.clone(), t)));
        }
        self.told = buckets
            .iter()
            .map(|bucket| Seen {
                bucket: WeakBucket::new(),
                told: bucket
                    .iter()
                    .filter_map(|(id, _)| told.remove(id))
                    .collect(),
            })
            .collect();
        self.queue.extend(told.into_values().map(Change::Removed));
    }
}

// === impl Seen ===

impl<S> Seen<S> {
    /// Whoever was told, and is still there or not.
    fn keep(&mut self, bucket: &Bucket<Arc<Entry<S>>>, queue: &mut VecDeque<Change>) {
        let now = |told: &EndpointStatus| {
            let mut all = bucket.iter().map(|(_, entry)| entry);
            all.find(|entry| *entry.target.peer().id == *told.peer.id)
        };
        self.told.retain_mut(|told| {
            match now(told).map(|entry| EndpointStatus::of(entry)) {
                // The same generation: the same endpoint, though it may have moved.
                Some(now) if now.peer.generation == told.peer.generation => {
                    let before = told.state;
                    if before != now.state || !Arc::ptr_eq(&told.target, &now.target) {
                        *told = now.clone();
                        queue.push_back(Change::Changed { before, now });
                    }
                    true
                }
                // Its successor is told as one that is new.
                _ => {
                    queue.push_back(Change::Removed(told.clone()));
                    false
                }
            }
        });
    }

    /// Whoever was not told.
    fn add(&mut self, bucket: &Bucket<Arc<Entry<S>>>, queue: &mut VecDeque<Change>) {
        for (id, entry) in bucket.iter() {
            if !self.told.iter().any(|told| *told.peer.id == **id) {
                let new = EndpointStatus::of(entry);
                self.told.push(new.clone());
                queue.push_back(Change::Added(new));
            }
        }
    }
}
