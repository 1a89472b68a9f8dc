//! The immutable set of endpoints that calls are picked from, and what is known of each.

use std::{fmt, sync::Arc, time::SystemTime};

use tokio::time::Instant;

use super::{
    avoid::Avoid,
    chunked::{ChunkedVec, IdMap},
    pick,
    protocol::InstanceId,
};
use crate::{
    endpoint::{Target, ready::Ready},
    error::{Error, Kind, NOT_SERVING, Peer, STOPPING, SharedError, Trouble},
};

/// One role's endpoints at one moment.
pub(crate) struct Snapshot<S> {
    /// Those that take calls of anybody.
    pub(crate) ready: ChunkedVec<Arc<Ready<S>>>,
    /// All, by id: those too that are connecting, offline or stopping.
    pub(crate) all: IdMap<Arc<Entry<S>>>,
    /// How many of `all` have a first attempt under way, for which calls wait.
    pub(crate) connecting: usize,
    /// Nobody uses it, so nobody is connected.
    pub(crate) asleep: bool,
    pub(crate) resolution: Resolution,
}

/// What discovery has said so far.
#[derive(Clone, Debug)]
pub(crate) enum Resolution {
    /// Nothing yet: calls wait.
    Pending,
    /// It failed before it ever answered: calls fail, saying so.
    Failed(SharedError),
    /// It has answered. `stale` since then and because of that, if it is failing now.
    Known { stale: Option<Stale> },
    /// The pool was stopped, or came to an end by itself, and why.
    Stopped(Option<&'static str>),
}

/// Since when, and why, the last known set is all there is.
#[derive(Clone, Debug)]
pub(crate) struct Stale {
    pub(crate) since: SystemTime,
    pub(crate) why: SharedError,
}

/// What is known of one endpoint; replaced at each change of its state.
pub(crate) struct Entry<S> {
    /// The endpoint's, by which its driver tells it from another of the same name.
    pub(crate) number: u64,
    pub(crate) target: Arc<dyn Target>,
    pub(crate) state: State,
    /// Its own, or that of who stands in for it.
    pub(crate) ready: Option<Arc<Ready<S>>>,
    /// Who takes its calls where it was registered before, and since when.
    pub(crate) stands_in: Option<(Arc<Peer>, SystemTime)>,
}

/// An endpoint's connectivity.
#[derive(Clone, Debug)]
pub(crate) struct State {
    pub(crate) phase: Phase,
    pub(crate) since: SystemTime,
    pub(crate) attempts: u32,
    /// When the next attempt begins, if the registry says nothing before; none is under way then.
    pub(crate) next: Option<SystemTime>,
    /// The last failure, kept until the endpoint has been connected for a while.
    pub(crate) last_error: Option<(Instant, SharedError)>,
}

/// The phases of [`State`]; gRPC's connectivity states, with the two kinds of failure told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The first attempt since it was registered, or since its connection was lost: calls wait for it.
    Connecting,
    /// Connected.
    Ready,
    /// Connected, and says that it is not to be called.
    NotServing,
    /// A later attempt, or between attempts.
    Retrying,
    /// Given up but for the slow probe and the registry's next word.
    Offline,
    /// Not to be called, see [`Target::barred`].
    Barred,
    /// Nobody uses the pool: whoever wants to call it wakes the pool, and waits.
    Idle,
}

// === impl Snapshot ===

impl<S> Snapshot<S> {
    pub(crate) fn empty() -> Self {
        Self {
            ready: ChunkedVec::new(),
            all: IdMap::new(),
            connecting: 0,
            asleep: false,
            resolution: Resolution::Pending,
        }
    }

    /// The endpoint for a call: the pinned one or none, else the less loaded of two.
    #[inline]
    pub(crate) fn pick(&self, pinned: Option<&InstanceId>) -> Option<&Arc<Ready<S>>> {
        match pinned {
            None => pick::least_loaded_of_two(self),
            Some(instance) => pick::pinned(self, instance.id()),
        }
    }

    /// Endpoints that a call may go to, the pick first, where the pick may have no room.
    pub(crate) fn candidates(
        &self,
        pinned: Option<&InstanceId>,
        most: usize,
    ) -> impl Iterator<Item = &Arc<Ready<S>>> {
        let first = self.pick(pinned);
        let others = match (pinned, first) {
            (None, Some(_)) => self.ready.len(),
            _ => 0,
        };
        let start = fastrand::usize(..others.max(1));
        // Bounded: among thousands that are down it is enough to have looked at some.
        let others = (0..others.min(4 * most))
            .filter_map(move |step| self.ready.get((start + step) % self.ready.len()))
            .filter(move |other| !other.is_down() && first.is_none_or(|f| !Arc::ptr_eq(f, other)));
        first.into_iter().chain(others).take(most)
    }

    /// All that are up, from anywhere on.
    pub(super) fn all_up(&self) -> impl Iterator<Item = &Arc<Ready<S>>> {
        let len = self.ready.len();
        let start = fastrand::usize(..len.max(1));
        let all = (0..len).filter_map(move |step| self.ready.get((start + step) % len));
        all.filter(|ready| !ready.is_down())
    }

    /// All that a call may go to where its pick is full: those first that no attempt has gone to.
    pub(super) fn others<'a>(
        &'a self,
        pinned: Option<&InstanceId>,
        avoid: Option<&Avoid>,
    ) -> impl Iterator<Item = &'a Arc<Ready<S>>> {
        let (ranked, anybody) = match (pinned, avoid) {
            (Some(_), _) => (None, None),
            (None, Some(avoid)) => (Some(avoid.ranked(self, usize::MAX)), None),
            (None, None) => (None, Some(self.all_up())),
        };
        let ranked = ranked.into_iter().flatten().map(|(_, ready)| ready);
        ranked.chain(anybody.into_iter().flatten())
    }

    /// Whether there is anybody to be picked, connected or not.
    pub(crate) fn could_be_picked(&self, pinned: Option<&InstanceId>) -> bool {
        match pinned {
            Some(instance) => self.all.get(instance.id()).is_some(),
            None => self.all.len() > 0,
        }
    }

    /// A few endpoints that could not be called, to be named in an error.
    pub(crate) fn troubles(&self) -> Vec<Trouble> {
        self.all.values().take(3).map(|e| e.trouble()).collect()
    }
}

impl<S> Clone for Snapshot<S> {
    fn clone(&self) -> Self {
        Self {
            ready: self.ready.clone(),
            all: self.all.clone(),
            connecting: self.connecting,
            asleep: self.asleep,
            resolution: self.resolution.clone(),
        }
    }
}

// === impl Entry ===

impl<S> Entry<S> {
    /// The error of a call pinned to it while it is not connected.
    pub(crate) fn unready(&self) -> Error {
        match self.target.barred() {
            Some(why) => why,
            None => Error::new(Kind::NotConnected).trouble(self.trouble()),
        }
        .with_peer(self.target.peer())
    }

    pub(crate) fn trouble(&self) -> Trouble {
        let state = match self.state.phase {
            _ if self.target.stopping() => STOPPING,
            Phase::Connecting => "connecting",
            Phase::Ready => "just lost",
            Phase::NotServing => NOT_SERVING,
            Phase::Retrying => "reconnecting",
            Phase::Offline => "offline",
            Phase::Barred => "not to be called",
            Phase::Idle => "idle",
        };
        let last = match self.target.barred() {
            Some(why) => Some((Instant::now(), Arc::new(why) as SharedError)),
            None => self.state.last_error.clone(),
        };
        Trouble {
            peer: self.target.peer().clone(),
            state,
            attempts: self.state.attempts,
            last,
        }
    }
}

impl<S> Clone for Entry<S> {
    fn clone(&self) -> Self {
        Self {
            number: self.number,
            target: self.target.clone(),
            state: self.state.clone(),
            ready: self.ready.clone(),
            stands_in: self.stands_in.clone(),
        }
    }
}

// === impl State ===

impl State {
    /// In this phase from now on, if it is not already.
    pub(crate) fn enter(&mut self, phase: Phase) {
        if self.phase != phase {
            self.phase = phase;
            self.since = SystemTime::now();
        }
    }

    pub(crate) fn new(phase: Phase) -> Self {
        Self {
            phase,
            since: SystemTime::now(),
            attempts: 0,
            next: None,
            last_error: None,
        }
    }
}

impl<S> fmt::Debug for Snapshot<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot")
            .field("ready", &self.ready.len())
            .field("all", &self.all.len())
            .field("connecting", &self.connecting)
            .field("resolution", &self.resolution)
            .finish()
    }
}
