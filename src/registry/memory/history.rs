//! Keys, values, revisions and leases, as etcd has them: pure, with the clock as an argument.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::Bound,
    time::Duration,
};

use bytes::Bytes;
use tokio::time::Instant;

use crate::registry::store::{Event, Listing, Record, Scope};

/// How many events are kept for watches before the oldest are compacted away.
const HISTORY: usize = 10_000;

#[derive(Debug)]
pub(super) struct History {
    /// Of the last change; 1 with none, as in etcd.
    revision: u64,
    /// What happened up to here is gone.
    compacted: u64,
    records: BTreeMap<Bytes, Record>,
    events: VecDeque<(u64, Event)>,
    leases: BTreeMap<i64, Lease>,
    /// All leases, by when they are over.
    ending: BTreeSet<(Instant, i64)>,
}

#[derive(Debug)]
struct Lease {
    ttl: Duration,
    until: Instant,
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
        }
    }

    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    pub(super) fn get(&self, key: &[u8]) -> Option<&Record> {
        self.records.get(key)
    }

    pub(super) fn list(&self, scope: &Scope) -> Listing {
        let from = (Bound::Included(&**scope.start()), Bound::Unbounded);
        let records = self.records.range::<[u8], _>(from);
        let records = records.take_while(|(key, _)| scope.covers(key));
        Listing {
            records: records.map(|(_, record)| record.clone()).collect(),
            revision: self.revision,
            cluster: 0,
        }
    }

    /// What happened in the scope from this revision on.
    pub(super) fn since(&self, scope: &Scope, from: u64) -> Result<Vec<Event>, Compacted> {
        if from <= self.compacted {
            return Err(Compacted(self.compacted));
        }
        let start = self
            .events
            .partition_point(|(revision, _)| *revision < from);
        let events = self.events.range(start..).map(|(_, event)| event);
        let ours = events.filter(|event| scope.covers(event.key()));
        Ok(ours.cloned().collect())
    }

    /// Writes the key, under this lease or none (0). False if the lease is gone.
    pub(super) fn put(&mut self, key: &Bytes, value: &[u8], lease: i64) -> bool {
        if lease != 0 && !self.leases.contains_key(&lease) {
            return false;
        }
        self.revision += 1;
        let created = match self.take(key) {
            Some(old) => old.created,
            None => self.revision,
        };
        if let Some(lease) = self.leases.get_mut(&lease) {
            lease.keys.insert(key.clone());
        }
        let record = Record::new(key, value, created, self.revision, lease);
        self.happened(Event::Put(record.clone()));
        self.records.insert(key.clone(), record);
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

    /// A lease that is over after its TTL. One that is there already has the whole of its own once more.
    pub(super) fn grant(&mut self, id: i64, ttl: Duration, now: Instant) {
        if self.keep_alive(id, now) {
            return;
        }
        let until = now + ttl;
        let lease = Lease {
            ttl,
            until,
            keys: BTreeSet::new(),
        };
        self.leases.insert(id, lease);
        self.ending.insert((until, id));
    }

    /// Gives a lease its whole TTL once more. False if it is gone.
    pub(super) fn keep_alive(&mut self, id: i64, now: Instant) -> bool {
        let Some(lease) = self.leases.get_mut(&id) else {
            return false;
        };
        self.ending.remove(&(lease.until, id));
        lease.until = now + lease.ttl;
        self.ending.insert((lease.until, id));
        true
    }

    /// Ends a lease, and all records under it at one revision.
    pub(super) fn revoke(&mut self, id: i64) {
        let Some(lease) = self.leases.remove(&id) else {
            return;
        };
        self.ending.remove(&(lease.until, id));
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
        let all: Vec<_> = self.leases.keys().copied().collect();
        for id in all {
            self.keep_alive(id, now);
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
        if let Some(record) = self.take(key) {
            self.happened(Event::Delete(record.key));
        }
    }

    /// Takes a record out, and out of its lease.
    fn take(&mut self, key: &[u8]) -> Option<Record> {
        let record = self.records.remove(key)?;
        if let Some(lease) = self.leases.get_mut(&record.lease) {
            lease.keys.remove(key);
        }
        Some(record)
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
