//! What a pool is doing, to be looked at.

use std::{fmt, sync::Arc, time::SystemTime};

use super::{
    Pool,
    snapshot::{Entry, Phase, Resolution},
};
use crate::{
    endpoint::Target,
    error::{Brief, Peer, SharedError},
};

/// A picture of one pool.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Status {
    /// The role.
    pub role: Arc<str>,
    /// How discovery is doing.
    pub discovery: Discovery,
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
    /// Who it is.
    pub peer: Arc<Peer>,
    /// What discovery said of it; a [`Member`](crate::discover::Member) where there is a registry.
    pub target: Arc<dyn Target>,
    /// Its connectivity.
    pub state: Connectivity,
    /// Since when.
    pub since: SystemTime,
    /// Calls in flight.
    pub in_flight: usize,
    /// Failed attempts in a row.
    pub attempts: u32,
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
    /// Connected, but its session says that it is stopping: only pinned calls go there.
    Stopping,
    /// It could not be reached, and will be tried again soon: calls fail fast.
    Retrying,
    /// It could not be reached several times; the slow probe, or the registry's next word, tries again.
    Offline,
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
            endpoints,
        }
    }
}

// === impl EndpointStatus ===

impl EndpointStatus {
    fn of<S>(entry: &Entry<S>) -> Self {
        Self {
            peer: entry.target.peer().clone(),
            target: entry.target.clone(),
            state: match entry.state.phase {
                Phase::Connecting => Connectivity::Connecting,
                Phase::Ready if entry.target.stopping() => Connectivity::Stopping,
                Phase::Ready => Connectivity::Ready,
                Phase::Retrying => Connectivity::Retrying,
                Phase::Offline => Connectivity::Offline,
                Phase::Barred => Connectivity::Barred,
            },
            since: entry.state.since,
            in_flight: entry.ready.as_ref().map_or(0, |ready| ready.load.current()),
            attempts: entry.state.attempts,
            last_error: match entry.target.barred() {
                Some(why) => Some(Arc::new(why)),
                None => entry.state.last_error.as_ref().map(|(_, why)| why.clone()),
            },
        }
    }
}

// === impl Display ===

impl fmt::Display for Status {
    /// A table, a line for each endpoint.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ready = self
            .endpoints
            .iter()
            .filter(|e| e.state == Connectivity::Ready);
        let (ready, all) = (ready.count(), self.endpoints.len());
        writeln!(
            f,
            "{}: {ready} of {all} ready, discovery {}",
            self.role, self.discovery
        )?;
        let width = |of: fn(&EndpointStatus) -> usize, least: usize| {
            self.endpoints.iter().map(of).max().unwrap_or(0).max(least)
        };
        let id = width(|e| e.peer.id.len(), "id".len());
        let address = width(|e| e.peer.address.len(), "address".len());
        if all > 0 {
            writeln!(
                f,
                "  {:id$}  {:address$}  {:10}  {:>6}  {:>9}  last error",
                "id", "address", "state", "since", "in flight"
            )?;
        }
        for endpoint in &self.endpoints {
            write!(
                f,
                "  {:id$}  {:address$}  {:10}  {:>6}  {:>9}  ",
                endpoint.peer.id,
                endpoint.peer.address,
                endpoint.state.to_string(),
                Age(endpoint.since).to_string(),
                endpoint.in_flight,
            )?;
            match (&endpoint.last_error, endpoint.attempts) {
                (None, _) => writeln!(f, "-")?,
                (Some(why), 0) => writeln!(f, "{}", Brief(&**why))?,
                (Some(why), 1) => writeln!(f, "{} (1 attempt)", Brief(&**why))?,
                (Some(why), n) => writeln!(f, "{} ({n} attempts)", Brief(&**why))?,
            }
        }
        Ok(())
    }
}

impl fmt::Display for Discovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pending => f.write_str("pending"),
            Self::Failed(why) => write!(f, "failed: {why}"),
            Self::Fresh => f.write_str("fresh"),
            Self::Stale { since, why } => write!(f, "stale for {}: {why}", Age(*since)),
            Self::Stopped => f.write_str("stopped"),
        }
    }
}

impl fmt::Display for Connectivity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connecting => "connecting",
            Self::Ready => "ready",
            Self::Stopping => "stopping",
            Self::Retrying => "retrying",
            Self::Offline => "offline",
            Self::Barred => "barred",
        })
    }
}

/// How long ago, in the one unit that matters.
struct Age(SystemTime);

impl fmt::Display for Age {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A clock that was set back makes it zero.
        let age = self.0.elapsed().unwrap_or_default();
        match age.as_secs() {
            0 => write!(f, "{}ms", age.as_millis()),
            s @ 1..=119 => write!(f, "{s}s"),
            s @ 120..=7199 => write!(f, "{}m", s / 60),
            s => write!(f, "{}h", s / 3600),
        }
    }
}
