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
    interest::Held,
    service::Shared,
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
            // It was idle before there was a watch.
            _ if snapshot.asleep => self.shared.interest.want(),
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

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use futures_util::{FutureExt as _, future::poll_fn};

    use super::*;
    use crate::{
        endpoint::Target,
        error::Peer,
        pool::{
            PoolConfig, Setup,
            snapshot::{Phase, State},
        },
    };

    #[derive(Debug)]
    struct Named(Arc<Peer>);

    impl Target for Named {
        fn peer(&self) -> &Arc<Peer> {
            &self.0
        }
    }

    fn entry(id: u32, generation: u64, phase: Phase) -> Arc<Entry<()>> {
        let peer = Peer::new("echo", id.to_string(), "h:1").with_generation(generation);
        Arc::new(Entry {
            number: 0,
            target: Arc::new(Named(Arc::new(peer))),
            state: State::new(phase),
            ready: None,
            stands_in: None,
        })
    }

    /// What a reader has been told is there.
    #[derive(Default)]
    struct Reader {
        there: BTreeMap<String, (u64, Connectivity)>,
        told: usize,
    }

    impl Reader {
        /// Reads on until there is nothing more to be told for now.
        fn catch_up(&mut self, changes: &mut Changes<()>) {
            while let Some(Some(change)) = poll_fn(|cx| changes.poll_change(cx)).now_or_never() {
                self.told += 1;
                let of = |s: &EndpointStatus| (s.peer.id.to_string(), (s.peer.generation, s.state));
                match change {
                    Change::Added(now) => {
                        let (id, what) = of(&now);
                        assert_eq!(self.there.insert(id, what), None, "it was there already");
                    }
                    Change::Changed { before, now } => {
                        let (id, what) = of(&now);
                        let old = self.there.insert(id, what);
                        assert_eq!(old, Some((what.0, before)), "it was another");
                    }
                    Change::Removed(before) => {
                        let (id, what) = of(&before);
                        assert_eq!(self.there.remove(&id), Some(what), "it was not there");
                    }
                    Change::Synced => {}
                    Change::Ended(_) => self.there.clear(),
                }
            }
        }
    }

    #[test]
    fn readers_of_any_pace_end_with_what_is_there_and_each_word_follows_from_the_last() {
        let seed = fastrand::u64(..);
        let mut random = fastrand::Rng::with_seed(seed);
        println!("seed {seed}");
        let shared = Arc::new(Shared::new(
            "echo".into(),
            PoolConfig::default(),
            &Setup::of_nobody(),
        ));
        let mut next = Snapshot::empty();
        next.resolution = Resolution::Known { stale: None };
        let mut model = BTreeMap::new();
        // One that reads each snapshot, one in ten, one in a thousand.
        let mut readers =
            [1, 10, 1000].map(|pace| (pace, Changes::new(shared.clone()), Reader::default()));
        let phases = [Phase::Connecting, Phase::Retrying, Phase::Offline];
        for step in 1..=20_000 {
            // Grows to about 900, so that the map's buckets double, and is emptied now and then.
            let id = random.u32(0..1000);
            let name = id.to_string();
            match random.u32(0..1000) {
                0 => {
                    next = Snapshot::empty();
                    next.resolution = Resolution::Known { stale: None };
                    model.clear();
                }
                1..=100 => {
                    next.all.remove(&name);
                    model.remove(&name);
                }
                _ => {
                    // Another generation at times, else the same in whatever state.
                    let old = model.get(&name).map_or(1, |(generation, _)| *generation);
                    let generation = old + u64::from(random.u32(0..5) == 0);
                    let new = entry(id, generation, phases[random.usize(..3)]);
                    model.insert(name, (generation, Connectivity::of(&new)));
                    next.all.insert(&new.target.peer().id.clone(), new);
                }
            }
            shared.snapshot.store(Arc::new(next.clone()));
            shared.changed.notify_waiters();
            for (pace, changes, reader) in &mut readers {
                if step % *pace == 0 {
                    reader.catch_up(changes);
                    assert!(
                        reader.there == model,
                        "seed {seed}, step {step}: a reader of pace {pace} is wrong"
                    );
                }
            }
        }
        // The slower one was told less.
        assert!(readers[0].2.told > readers[1].2.told && readers[1].2.told > readers[2].2.told);
    }

    #[tokio::test]
    async fn a_reader_that_sleeps_is_woken_by_the_next_snapshot_and_ends_with_the_pool() {
        let shared: Arc<Shared<()>> = Arc::new(Shared::new(
            "echo".into(),
            PoolConfig::default(),
            &Setup::of_nobody(),
        ));
        let mut changes = Changes::new(shared.clone());
        let reading = tokio::spawn(async move {
            let mut seen = Vec::new();
            while let Some(change) = poll_fn(|cx| changes.poll_change(cx)).await {
                seen.push(change);
            }
            seen
        });
        let mut next = Snapshot::empty();
        let new = entry(7, 1, Phase::Connecting);
        for step in 0..2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
            match step {
                0 => next.all.insert(&"7".into(), new.clone()),
                _ => next.resolution = Resolution::Stopped(Some("enough")),
            }
            shared.snapshot.store(Arc::new(next.clone()));
            shared.changed.notify_waiters();
        }
        let seen = reading.await.unwrap();
        let [Change::Added(_), Change::Removed(_), Change::Ended(why)] = &seen[..] else {
            panic!("{seen:?}");
        };
        assert_eq!(why.to_string(), "stopped, role echo: enough");
    }
}
