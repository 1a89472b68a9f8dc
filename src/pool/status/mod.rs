//! What a pool is doing, to be looked at.

#[cfg(feature = "registry")]
mod json;
mod table;

use std::{sync::Arc, time::SystemTime};

#[cfg(feature = "component")]
pub(crate) use self::json::millis;
use super::{
    Pool, Refused,
    snapshot::{Entry, Phase, Resolution},
};
use crate::{
    endpoint::Target,
    error::{Peer, SharedError},
};

/// A picture of one pool. Its `Display` is a table for a terminal, its `Serialize` (feature `registry`) for programs.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Status {
    /// The role.
    pub role: Arc<str>,
    /// How discovery is doing.
    pub discovery: Discovery,
    /// Whether nobody has used it for so long that nobody is connected.
    pub idle: bool,
    /// How many calls its limits have refused since it began.
    pub refused: Refused,
    /// How many calls its channels have made again.
    #[cfg(feature = "manager")]
    pub repeated: crate::retry::Repeated,
    /// All its endpoints, by id.
    pub endpoints: Vec<EndpointStatus>,
}

/// How a pool's discovery is doing.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Discovery {
    /// It has not answered yet.
    Pending,
    /// It has never answered, because of this.
    Failed(SharedError),
    /// It is up to date.
    Fresh,
    /// It fails for now; the set is the last known.
    Stale {
        /// Since when.
        since: SystemTime,
        /// Why, the last time it was tried.
        why: SharedError,
    },
    /// The pool was stopped.
    Stopped,
}

/// A picture of one endpoint.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct EndpointStatus {
    /// Who it is, and where discovery says that it is.
    pub peer: Arc<Peer>,
    /// The same at another address, where its calls still go: its session has moved, and is not reached yet where it is
    /// now. Its attempts and their error are those of the new address.
    pub former: Option<Arc<Peer>>,
    /// What discovery said of it; a [`Member`](crate::discover::Member) where there is a registry.
    pub target: Arc<dyn Target>,
    /// Its connectivity.
    pub state: Connectivity,
    /// Since when.
    pub since: SystemTime,
    /// Calls in flight.
    pub in_flight: usize,
    /// How many connections take its calls: more than one where that pays, see
    /// [`Connections`](crate::transport::Connections).
    pub connections: usize,
    /// Failed attempts in a row to connect it.
    pub attempts: u32,
    /// When it is tried next, if the registry says nothing before; `None` while it is tried, or is connected, or
    /// only the registry's next word counts.
    pub next_attempt: Option<SystemTime>,
    /// Why the last one failed, or why its connection was lost; kept until it is connected again.
    pub last_error: Option<SharedError>,
}

/// Whether an endpoint can be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Connectivity {
    /// Its first attempt is under way, or the first since its connection was lost: calls wait for it.
    Connecting,
    /// Connected, and picked.
    Ready,
    /// Connected, but it says that it does not serve (`Connector::health_check`): calls go elsewhere.
    NotServing,
    /// Connected, but its session says that it is stopping: only pinned calls go there.
    Stopping,
    /// It could not be reached, and will be tried again soon: calls fail fast.
    Retrying,
    /// It could not be reached several times; the slow probe, or the registry's next word, tries again.
    Offline,
    /// Nobody uses the role, so it is not connected; the next call to the role connects it, and waits for that.
    Idle,
    /// It must not be called, whatever is registered: its address belongs to another now.
    Barred,
}

// === impl Pool ===

impl<S, P> Pool<S, P> {
    /// What it is doing at this moment. Costs a walk over all endpoints, and holds up nobody.
    pub fn status(&self) -> Status {
        let snapshot = self.snapshot();
        let mut endpoints: Vec<_> = snapshot
            .all
            .values()
            .map(|e| EndpointStatus::of(e))
            .collect();
        endpoints.sort_by(|a, b| a.peer.id.cmp(&b.peer.id));
        Status {
            role: self.role_arc(),
            discovery: match &snapshot.resolution {
                Resolution::Pending => Discovery::Pending,
                Resolution::Failed(why) => Discovery::Failed(why.clone()),
                Resolution::Known { stale: None } => Discovery::Fresh,
                Resolution::Known { stale: Some(stale) } => Discovery::Stale {
                    since: stale.since,
                    why: stale.why.clone(),
                },
                Resolution::Stopped(_) => Discovery::Stopped,
            },
            idle: snapshot.asleep,
            refused: self.shared_limits().refused(),
            #[cfg(feature = "manager")]
            repeated: self.shared().target.repeated(),
            endpoints,
        }
    }
}

// === impl EndpointStatus ===

impl EndpointStatus {
    pub(crate) fn of<S>(entry: &Entry<S>) -> Self {
        Self {
            peer: entry.target.peer().clone(),
            target: entry.target.clone(),
            state: Connectivity::of(entry),
            since: match &entry.stands_in {
                Some((_, since)) => *since,
                None => entry.state.since,
            },
            former: entry.stands_in.as_ref().map(|(peer, _)| peer.clone()),
            in_flight: entry.ready.as_ref().map_or(0, |ready| ready.load.current()),
            connections: entry.ready.as_ref().map_or(0, |ready| ready.connections()),
            attempts: entry.state.attempts,
            next_attempt: entry.state.next,
            last_error: match entry.target.barred() {
                Some(why) => Some(Arc::new(why)),
                None => entry.state.last_error.as_ref().map(|(_, why)| why.clone()),
            },
        }
    }
}

// === impl Status ===

impl Status {
    /// How many endpoints are ready.
    pub fn ready(&self) -> usize {
        let ready = |e: &&EndpointStatus| e.state == Connectivity::Ready;
        self.endpoints.iter().filter(ready).count()
    }
}

// === impl Connectivity ===

impl Connectivity {
    fn word(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Ready => "ready",
            Self::NotServing => "not serving",
            Self::Stopping => "stopping",
            Self::Retrying => "retrying",
            Self::Offline => "offline",
            Self::Barred => "barred",
            Self::Idle => "idle",
        }
    }

    pub(crate) fn of<S>(entry: &Entry<S>) -> Self {
        match entry.state.phase {
            _ if entry.stands_in.is_some() => Self::Ready,
            Phase::Connecting => Self::Connecting,
            Phase::Ready if entry.target.stopping() => Self::Stopping,
            Phase::Ready => Self::Ready,
            Phase::NotServing => Self::NotServing,
            Phase::Retrying => Self::Retrying,
            Phase::Offline => Self::Offline,
            Phase::Barred => Self::Barred,
            Phase::Idle => Self::Idle,
        }
    }
}
