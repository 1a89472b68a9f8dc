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
    error::{Error, Kind},
};

/// The places that one call has.
#[derive(Debug, Default)]
pub(crate) struct Places {
    role: Option<Place>,
    peer: Option<Place>,
}

/// A pool's limits.
#[derive(Debug)]
pub(crate) struct Limits {
    role: Option<Arc<Limiter>>,
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

/// Why a call was not let in.
pub(super) enum Full {
    Role(Error),
    /// Another peer may have room.
    Peer(Error),
}

// === impl Limits ===

impl Limits {
    pub(super) fn new(config: &PoolConfig) -> Self {
        Self {
            role: config.max_in_flight.map(Limiter::new),
            waiting: Limiter::new(config.max_waiting),
            are_set: config.max_in_flight.is_some() || config.max_in_flight_per_peer.is_some(),
            refused: Default::default(),
        }
    }

    /// Places for a call to this peer.
    pub(super) fn admit<S>(&self, role: &Arc<str>, to: &Ready<S>) -> Result<Places, Full> {
        let mut places = Places::default();
        if let Some(limiter) = &self.role {
            places.role = limiter.take();
            if places.role.is_none() {
                let why = format!("{} calls are in flight, as many as may be", limiter.limit());
                let error = Error::new(Kind::Limit).with_role(role).with_reason(why);
                return Err(Full::Role(error));
            }
        }
        if let Some(limiter) = &to.limiter {
            places.peer = limiter.take();
            if places.peer.is_none() {
                let why = format!(
                    "{} calls are in flight there, as many as may be",
                    limiter.limit()
                );
                let peer = Arc::new(to.load.of().clone());
                let error = Error::new(Kind::Limit).with_peer(&peer).with_reason(why);
                return Err(Full::Peer(error));
            }
        }
        Ok(places)
    }

    /// A place for a call that has to wait.
    pub(super) fn wait(&self, role: &Arc<str>) -> Result<Place, Error> {
        self.waiting.take().ok_or_else(|| {
            self.count(Which::Waiting);
            let why = match self.waiting.limit() {
                0 => "it would have to wait, and none may".to_owned(),
                n => format!("it would have to wait, and {n} calls do, as many as may"),
            };
            Error::new(Kind::Limit).with_role(role).with_reason(why)
        })
    }

    /// The error of a call that is not let in.
    pub(super) fn refuse(&self, full: Full) -> Error {
        match full {
            Full::Role(error) => {
                self.count(Which::Role);
                error
            }
            Full::Peer(error) => {
                self.count(Which::Peer);
                error
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
