//! Whom the attempts of a call pass by.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::snapshot::Snapshot;
use crate::{endpoint::ready::Ready, error::Peer};

/// Request extension: the peers that earlier attempts of a call went to. A pool gives the call to another, as long as one is
/// connected, and writes down whom.
///
/// Of those others it is the less loaded of two. If there is none, the call goes to one that is not the last of the list; and
/// if there is none either, to that. However many are down or listed, whoever else is there is found: a look at all of them, at
/// worst. Others that are full ([`PoolConfig::max_in_flight_per_peer`](super::PoolConfig::max_in_flight_per_peer)) are as good
/// as not there. Calls pinned to an instance go there, whatever stands here, and are written down too.
///
/// [`RetryLayer`](crate::RetryLayer) uses it; so can a retry of one's own, by giving all attempts of a call clones of the same
/// one. Attempts that begin at the same moment on several threads may not see each other.
///
/// ```
/// # use switchboard::Avoid;
/// let avoid = Avoid::new();
/// for _attempt in 0..3 {
///     let mut request = tonic::Request::new(());
///     request.extensions_mut().insert(avoid.clone());
///     // Each goes elsewhere.
/// }
/// ```
#[derive(Clone, Default)]
pub struct Avoid(Arc<Mutex<Vec<Who>>>);

/// A server that registers again is another peer, whatever its id.
#[derive(PartialEq, Eq)]
struct Who {
    id: Arc<str>,
    generation: u64,
}

/// How much a peer is to be passed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rank {
    /// Not at all.
    New,
    /// An attempt has gone there.
    Earlier,
    /// The last one has.
    Last,
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

    /// The less loaded of two that chance picks among those that may have the call.
    ///
    /// Each from a start of its own: two neighbours would always share what they have.
    pub(super) fn pick<'a, S>(&self, snapshot: &'a Snapshot<S>) -> Option<&'a Arc<Ready<S>>> {
        let list = self.lock();
        [Rank::New, Rank::Earlier, Rank::Last]
            .into_iter()
            .find_map(|wanted| {
                let fits = |ready: &&Arc<Ready<S>>| Rank::of(ready, &list) == wanted;
                let one = snapshot.all_up().find(fits)?;
                let other = snapshot
                    .all_up()
                    .find(|other| !Arc::ptr_eq(one, other) && fits(other));
                Some(match other {
                    Some(other) if other.load.current() < one.load.current() => other,
                    _ => one,
                })
            })
    }

    /// All that are up, those that may have the call first; no more than `most` if so many of these are found.
    pub(super) fn ranked<'a, S>(
        &self,
        snapshot: &'a Snapshot<S>,
        most: usize,
    ) -> Vec<(Rank, &'a Arc<Ready<S>>)> {
        let list = self.lock();
        let (mut ranked, mut new) = (Vec::new(), 0);
        for ready in snapshot.all_up() {
            let rank = Rank::of(ready, &list);
            ranked.push((rank, ready));
            new += usize::from(rank == Rank::New);
            if new == most {
                break;
            }
        }
        drop(list);
        ranked.sort_by_key(|(rank, _)| *rank);
        ranked.truncate(most);
        if let [(rank, one), (of, other), ..] = ranked.as_mut_slice()
            && rank == of
            && other.load.current() < one.load.current()
        {
            std::mem::swap(one, other);
        }
        ranked
    }

    /// Up to so many that a call may wait for: not the last of the list, as long as there is another.
    pub(super) fn candidates<'a, S>(
        &self,
        snapshot: &'a Snapshot<S>,
        most: usize,
    ) -> Vec<&'a Arc<Ready<S>>> {
        let ranked = self.ranked(snapshot, most);
        let others = ranked.iter().filter(|(rank, _)| *rank != Rank::Last);
        match others.count() {
            0 => ranked.into_iter().map(|(_, last)| last).collect(),
            n => ranked.into_iter().map(|(_, other)| other).take(n).collect(),
        }
    }

    /// Whether the last attempt went there.
    pub(super) fn is_last<S>(&self, ready: &Ready<S>) -> bool {
        Rank::of(ready, &self.lock()) == Rank::Last
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

// === impl Rank ===

impl Rank {
    fn of<S>(ready: &Ready<S>, list: &[Who]) -> Self {
        let peer = ready.load.of();
        let is = |who: &Who| who.generation == peer.generation && who.id == peer.id;
        match list.split_last() {
            Some((last, _)) if is(last) => Self::Last,
            Some((_, earlier)) if earlier.iter().any(is) => Self::Earlier,
            _ => Self::New,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(id: usize) -> Peer {
        Peer::new("echo", id.to_string(), "")
    }

    fn snapshot(of: usize) -> Snapshot<()> {
        let mut snapshot = Snapshot::empty();
        for id in 0..of {
            let ready = Ready::new((), &peer(id), id as u64, None);
            snapshot.ready.push(Arc::new(ready));
        }
        snapshot
    }

    fn avoiding(ids: impl IntoIterator<Item = usize>) -> Avoid {
        let avoid = Avoid::new();
        for id in ids {
            avoid.add(&peer(id));
        }
        avoid
    }

    fn picked(avoid: &Avoid, snapshot: &Snapshot<()>) -> Option<u64> {
        avoid.pick(snapshot).map(|ready| ready.key)
    }

    #[test]
    fn the_only_one_that_is_neither_down_nor_listed_is_found_among_many() {
        let many = snapshot(300);
        for index in (0..300).filter(|index| index % 2 == 0 && *index != 212) {
            many.ready.get(index).unwrap().mark_down("gone");
        }
        let avoid = avoiding((0..300).filter(|index| index % 2 == 1));
        for _ in 0..200 {
            assert_eq!(picked(&avoid, &many), Some(212));
            let keys: Vec<_> = avoid.candidates(&many, 4).iter().map(|r| r.key).collect();
            assert_eq!(keys[0], 212, "{keys:?}");
            assert!(!keys.contains(&299), "the last: {keys:?}");
        }
    }

    #[test]
    fn where_all_are_listed_it_is_not_the_last_and_where_that_is_all_it_is() {
        let two = snapshot(2);
        assert_eq!(picked(&avoiding([0, 1]), &two), Some(0));
        assert_eq!(picked(&avoiding([0, 1, 0]), &two), Some(1), "listed anew");
        two.ready.get(0).unwrap().mark_down("gone");
        assert_eq!(picked(&avoiding([0, 1]), &two), Some(1));
        assert_eq!(avoiding([0, 1]).candidates(&two, 4).len(), 1);
        two.ready.get(1).unwrap().mark_down("gone");
        assert_eq!(picked(&avoiding([0, 1]), &two), None);
        assert_eq!(picked(&Avoid::new(), &snapshot(0)), None);
    }

    #[test]
    fn a_server_that_has_registered_again_is_another() {
        let one = snapshot(1);
        let avoid = avoiding([]);
        avoid.add(&peer(0).with_generation(7));
        let ready = one.ready.get(0).unwrap();
        assert_eq!(Rank::of(ready, &avoid.lock()), Rank::New);
        avoid.add(&peer(0));
        assert_eq!(Rank::of(ready, &avoid.lock()), Rank::Last);
    }

    #[test]
    fn of_the_others_it_is_the_less_loaded_of_two() {
        let three = snapshot(3);
        let _busy = three.ready.get(1).unwrap().load.acquire();
        let avoid = avoiding([0]);
        for _ in 0..100 {
            assert_eq!(picked(&avoid, &three), Some(2));
            assert_eq!(avoid.candidates(&three, 4)[0].key, 2);
        }
        // All of many alike get their share, also beside one that is listed.
        let many = snapshot(100);
        let mut held = Vec::new();
        for _ in 0..9_900 {
            held.push(avoid.pick(&many).unwrap().load.acquire());
        }
        let loads: Vec<_> = many.ready.iter().map(|r| r.load.current()).collect();
        assert_eq!(loads[0], 0);
        assert!(
            loads[1..].iter().all(|n| (90..=110).contains(n)),
            "{loads:?}"
        );
    }
}
