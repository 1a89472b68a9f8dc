//! Keys, values, revisions and leases, as etcd has them: pure, with the clock as an argument.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::Bound,
    time::Duration,
};

use bytes::Bytes;
use tokio::time::Instant;

use crate::registry::store::{Event, Listing, Record};

/// How many events are kept for watches before the oldest are compacted away.
const HISTORY: usize = 10_000;

#[derive(Debug)]
pub(super) struct History {
    /// Of the last change; 1 with none, as in etcd.
    revision: u64,
    /// What happened up to here is gone.
    compacted: u64,
    records: BTreeMap<Bytes, Stored>,
    events: VecDeque<(u64, Event)>,
    leases: BTreeMap<u64, Lease>,
    /// The leases that nobody keeps alive, by when they are over.
    ending: BTreeSet<(Instant, u64)>,
    last_lease: u64,
}

#[derive(Debug)]
struct Stored {
    record: Record,
    lease: Option<u64>,
}

#[derive(Debug)]
struct Lease {
    ttl: Duration,
    keys: BTreeSet<Bytes>,
}

/// History up to this revision is gone.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Compacted(pub(super) u64);

// === impl History ===

impl History {
    pub(super) fn new() -> Self {
        Self {
            revision: 1,
            compacted: 0,
            records: BTreeMap::new(),
            events: VecDeque::new(),
            leases: BTreeMap::new(),
            ending: BTreeSet::new(),
            last_lease: 0,
        }
    }

    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    pub(super) fn get(&self, key: &[u8]) -> Option<&Record> {
        self.records.get(key).map(|stored| &stored.record)
    }

    pub(super) fn lease_of(&self, key: &[u8]) -> Option<u64> {
        self.records.get(key)?.lease
    }

    pub(super) fn list(&self, prefix: &[u8]) -> Listing {
        let from = (Bound::Included(prefix), Bound::Unbounded);
        let records = self.records.range::<[u8], _>(from);
        let records = records.take_while(|(key, _)| key.starts_with(prefix));
        Listing {
            records: records.map(|(_, stored)| stored.record.clone()).collect(),
            revision: self.revision,
        }
    }

    /// What happened under the prefix from this revision on.
    pub(super) fn since(&self, prefix: &[u8], from: u64) -> Result<Vec<Event>, Compacted> {
        if from <= self.compacted {
            return Err(Compacted(self.compacted));
        }
        let start = self
            .events
            .partition_point(|(revision, _)| *revision < from);
        let events = self.events.range(start..).map(|(_, event)| event);
        let ours = events.filter(|event| {
            let (Event::Put(Record { key, .. }) | Event::Delete(key)) = event;
            key.starts_with(prefix)
        });
        Ok(ours.cloned().collect())
    }

    /// Writes the key, under this lease or none. False if the lease is gone.
    pub(super) fn put(&mut self, key: Bytes, value: Bytes, lease: Option<u64>) -> bool {
        if lease.is_some_and(|lease| !self.leases.contains_key(&lease)) {
            return false;
        }
        self.revision += 1;
        let old = self.records.remove(&key);
        if let Some(lease) = old
            .as_ref()
            .and_then(|old| self.leases.get_mut(&old.lease?))
        {
            lease.keys.remove(&key);
        }
        if let Some(lease) = lease.and_then(|lease| self.leases.get_mut(&lease)) {
            lease.keys.insert(key.clone());
        }
        let record = Record {
            key: key.clone(),
            value,
            created: old.map_or(self.revision, |old| old.record.created),
            modified: self.revision,
        };
        self.happened(Event::Put(record.clone()));
        self.records.insert(key, Stored { record, lease });
        true
    }

    /// False if there was nothing.
    pub(super) fn delete(&mut self, key: &[u8]) -> bool {
        if !self.records.contains_key(key) {
            return false;
        }
        self.revision += 1;
        self.delete_at_this_revision(key);
        true
    }

    /// A lease that somebody keeps alive.
    pub(super) fn grant(&mut self, ttl: Duration) -> u64 {
        self.last_lease += 1;
        let lease = Lease {
            ttl,
            keys: BTreeSet::new(),
        };
        self.leases.insert(self.last_lease, lease);
        self.last_lease
    }

    /// Nobody keeps it alive from now on.
    pub(super) fn abandon(&mut self, id: u64, now: Instant) {
        if let Some(lease) = self.leases.get(&id) {
            self.ending.insert((now + lease.ttl, id));
        }
    }

    /// Ends a lease, and all records under it at one revision.
    pub(super) fn revoke(&mut self, id: u64) {
        let Some(lease) = self.leases.remove(&id) else {
            return;
        };
        if !lease.keys.is_empty() {
            self.revision += 1;
        }
        for key in &lease.keys {
            self.delete_at_this_revision(key);
        }
    }

    /// Ends the leases that are over. True if there were any.
    pub(super) fn expire(&mut self, now: Instant) -> bool {
        let mut any = false;
        while let Some((until, id)) = self.ending.first().copied()
            && until <= now
        {
            self.ending.pop_first();
            self.revoke(id);
            any = true;
        }
        any
    }

    /// When the next lease is over.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.ending.first().map(|(until, _)| *until)
    }

    /// Gives each lease its whole TTL once more: what a new leader of etcd does, which cannot know who
    /// would have been heard of meanwhile.
    pub(super) fn extend(&mut self, now: Instant) {
        for (_, id) in std::mem::take(&mut self.ending) {
            self.abandon(id, now);
        }
    }

    /// Forgets all that happened up to this revision; what is there stays.
    pub(super) fn compact(&mut self, revision: u64) {
        self.compacted = self.compacted.max(revision.min(self.revision));
        while self
            .events
            .front()
            .is_some_and(|(at, _)| *at <= self.compacted)
        {
            self.events.pop_front();
        }
    }

    fn delete_at_this_revision(&mut self, key: &[u8]) {
        if let Some(stored) = self.records.remove(key) {
            if let Some(lease) = stored.lease.and_then(|lease| self.leases.get_mut(&lease)) {
                lease.keys.remove(key);
            }
            self.happened(Event::Delete(stored.record.key));
        }
    }

    fn happened(&mut self, event: Event) {
        self.events.push_back((self.revision, event));
        if self.events.len() > HISTORY
            && let Some((oldest, _)) = self.events.front()
        {
            self.compact(*oldest);
        }
    }
}
