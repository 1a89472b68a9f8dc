//! How many calls may be under way, and how many may wait.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use super::config::PoolConfig;
use crate::{
    endpoint::{
        limiter::{Limiter, Place},
        ready::Ready,
    },
    error::{Error, Kind, Peer},
};

/// The places that one call has.
#[derive(Debug, Default)]
pub(crate) struct Places {
    _role: Option<Place>,
    _peer: Option<Place>,
}

/// A pool's limits.
#[derive(Debug)]
pub(crate) struct Limits {
    role: Option<Arc<Limiter>>,
    /// What each endpoint's own limiter has; for words.
    per_peer: Option<usize>,
    waiting: Arc<Limiter>,
    /// Whether calls have to look at all.
    pub(super) are_set: bool,
    refused: [AtomicU64; 3],
}

/// How many calls a pool's limits have refused since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Refused {
    /// By [`PoolConfig::max_in_flight`].
    pub role: u64,
    /// By [`PoolConfig::max_in_flight_per_peer`]: all peers were full, or the one that it was pinned to.
    pub peer: u64,
    /// By [`PoolConfig::max_waiting`].
    pub waiting: u64,
}

/// Which limit it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    Role,
    Peer,
    Waiting,
}

/// Why a call was not let in. No error yet: another peer may have room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Full {
    Role,
    Peer,
}

// === impl Limits ===

impl Limits {
    pub(super) fn new(config: &PoolConfig) -> Self {
        Self {
            role: config.max_in_flight.map(Limiter::new),
            per_peer: config.max_in_flight_per_peer,
            waiting: Limiter::new(config.max_waiting),
            are_set: config.max_in_flight.is_some() || config.max_in_flight_per_peer.is_some(),
            refused: Default::default(),
        }
    }

    /// Places for a call to this endpoint, or to the first of the others that has room.
    ///
    /// The role's place is held while a peer's is looked for, and given back with it: what is taken is never more than may be.
    pub(super) fn admit<'a, S, I>(
        &self,
        first: &'a Arc<Ready<S>>,
        others: impl FnOnce() -> I,
    ) -> Result<(&'a Arc<Ready<S>>, Places), Full>
    where
        I: Iterator<Item = &'a Arc<Ready<S>>>,
    {
        let role = match &self.role {
            None => None,
            Some(limiter) => Some(limiter.take().ok_or(Full::Role)?),
        };
        let place = |ready: &Ready<S>| match &ready.limiter {
            None => Some(None),
            Some(limiter) => limiter.take().map(Some),
        };
        let with = |peer| Places {
            _role: role,
            _peer: peer,
        };
        if let Some(peer) = place(first) {
            return Ok((first, with(peer)));
        }
        for other in others() {
            if let Some(peer) = place(other) {
                return Ok((other, with(peer)));
            }
        }
        Err(Full::Peer)
    }

    /// A place for a call that has to wait. None if all are taken, and no error yet: whoever has to let others go first asks
    /// again, and is counted when it is told.
    pub(super) fn wait(&self) -> Option<Place> {
        self.waiting.take()
    }

    /// The error of a call that may not wait.
    pub(super) fn refuse_to_wait(&self, role: &Arc<str>) -> Error {
        self.count(Which::Waiting);
        let why = match self.waiting.limit() {
            0 => "it would have to wait, and none may".to_owned(),
            1 => "it would have to wait, and 1 call does, as many as may".to_owned(),
            n => format!("it would have to wait, and {n} calls do, as many as may"),
        };
        Error::new(Kind::Limit).with_role(role).with_reason(why)
    }

    /// The error of a call that is not let in; `pinned` is the only peer that it may go to.
    pub(super) fn refuse(&self, full: Full, role: &Arc<str>, pinned: Option<&Peer>) -> Error {
        let in_flight = |limit: Option<usize>| match limit.unwrap_or_default() {
            1 => "1 call is in flight".to_owned(),
            n => format!("{n} calls are in flight"),
        };
        let error = Error::new(Kind::Limit).with_role(role);
        match full {
            Full::Role => {
                self.count(Which::Role);
                let all = in_flight(self.role.as_ref().map(|limiter| limiter.limit()));
                error.with_reason(format!("{all}, as many as may be in all"))
            }
            Full::Peer => {
                self.count(Which::Peer);
                let all = in_flight(self.per_peer);
                match pinned {
                    Some(peer) => error
                        .with_peer(&Arc::new(peer.clone()))
                        .with_reason(format!("{all} there, as many as may be at a peer")),
                    None => error.with_reason(format!(
                        "{all} at each that is ready, as many as may be at a peer"
                    )),
                }
            }
        }
    }

    pub(super) fn refused(&self) -> Refused {
        let [role, peer, waiting] = &self.refused;
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Refused {
            role: read(role),
            peer: read(peer),
            waiting: read(waiting),
        }
    }

    fn count(&self, which: Which) {
        let [role, peer, waiting] = &self.refused;
        let count = match which {
            Which::Role => role,
            Which::Peer => peer,
            Which::Waiting => waiting,
        };
        count.fetch_add(1, Ordering::Relaxed);
    }
}

// === impl Refused ===

impl Refused {
    /// All together.
    pub const fn total(&self) -> u64 {
        self.role + self.peer + self.waiting
    }
}

#[cfg(test)]
mod tests {
    use std::iter;

    use super::*;
    use crate::error::Sent;

    fn limits(role: Option<usize>, per_peer: Option<usize>) -> Limits {
        let config = PoolConfig::default().max_in_flight(role).unwrap();
        Limits::new(&config.max_in_flight_per_peer(per_peer).unwrap())
    }

    fn peer(id: &str, limit: usize) -> Arc<Ready<()>> {
        let peer = Peer::new("echo", id, "h:1");
        Arc::new(Ready::new((), &peer, 0, Some(Limiter::new(limit))))
    }

    #[test]
    fn a_role_gets_its_place_back_from_a_call_for_which_no_peer_has_room() {
        // Given room for two in all, and for one at either of two peers
        let limits = limits(Some(2), Some(1));
        let (a, b) = (peer("a", 1), peer("b", 1));
        let admit = || limits.admit(&a, || iter::once(&b));
        let (first, places) = admit().unwrap();
        assert!(Arc::ptr_eq(first, &a));
        // When calls that may go nowhere else are refused for the peer
        for _ in 0..5 {
            assert_eq!(limits.admit(&a, iter::empty).unwrap_err(), Full::Peer);
        }
        // Then the role has room all the same, and the other peer
        let (second, _others) = admit().unwrap();
        assert!(Arc::ptr_eq(second, &b));
        assert_eq!(admit().unwrap_err(), Full::Role);
        // And a call that ends makes room for one at its peer
        drop(places);
        let (third, _places) = admit().unwrap();
        assert!(Arc::ptr_eq(third, &a));
        // To find no room is no refusal yet
        assert_eq!(limits.refused().total(), 0);
    }

    #[test]
    fn others_are_looked_for_only_if_the_pick_is_full() {
        let limits = limits(None, Some(1));
        let a = peer("a", 1);
        let nobody = || -> iter::Empty<_> { panic!("there was room") };
        let (_, _places) = limits.admit(&a, nobody).unwrap();
        // Of two that are full and one that is not, it is the one
        let (b, c) = (peer("b", 1), peer("c", 1));
        let (_, _full) = limits.admit(&b, iter::empty).unwrap();
        let (last, _places) = limits.admit(&a, || [&a, &b, &c].into_iter()).unwrap();
        assert!(Arc::ptr_eq(last, &c));
    }

    #[test]
    fn without_limits_a_call_has_no_places() {
        let limits = limits(None, None);
        assert!(!limits.are_set);
        let free = Arc::new(Ready::new((), &Peer::new("echo", "a", ""), 0, None));
        let (_, places) = limits.admit(&free, iter::empty).unwrap();
        assert!(places._role.is_none() && places._peer.is_none());
    }

    #[test]
    fn a_refusal_says_which_limit_and_whose_and_is_counted_under_it() {
        let limits = limits(Some(1), Some(2));
        let role: Arc<str> = "echo".into();
        let seven = Peer::new("echo", "7", "h:1");
        let errors = [
            limits.refuse(Full::Role, &role, None),
            limits.refuse(Full::Peer, &role, None),
            limits.refuse(Full::Peer, &role, Some(&seven)),
            limits.refuse_to_wait(&role),
        ];
        let words = [
            "limit reached, role echo: 1 call is in flight, as many as may be in all",
            "limit reached, role echo: 2 calls are in flight at each that is ready, as many as may be at a peer",
            "limit reached, echo 7 at h:1: 2 calls are in flight there, as many as may be at a peer",
            "limit reached, role echo: it would have to wait, and 65536 calls do, as many as may",
        ];
        for (error, words) in errors.iter().zip(words) {
            assert_eq!(error.to_string(), words);
            assert_eq!((error.kind(), error.sent()), (Kind::Limit, Sent::Unsent));
        }
        let refused = limits.refused();
        assert_eq!((refused.role, refused.peer, refused.waiting), (1, 2, 1));
        assert_eq!(refused.total(), 4);
    }
}
