//! One instance of a role, as a manager knows it.

use std::{any::Any, fmt, time::SystemTime};

use super::Channel;
use crate::{
    discover::Member,
    error::{Peer, SharedError},
    pool::status::{Connectivity, EndpointStatus},
    registry::Session,
};

/// One instance of a role: what it says of itself, how its connection was when this was made, and a channel to it.
///
/// It is a picture and does not change. Its channel is pinned by the instance's id: when the instance is gone its calls
/// fail, whoever has the address now; when it comes back under its id they reach it again.
#[derive(Clone)]
pub struct Instance {
    member: Member,
    state: Connectivity,
    since: SystemTime,
    in_flight: usize,
    connections: usize,
    why: Option<SharedError>,
    channel: Channel,
}

// === impl Instance ===

impl Instance {
    /// None for what is not from a registry; a manager has no such endpoints.
    pub(super) fn new(status: EndpointStatus, channel: &Channel) -> Option<Self> {
        let target: &dyn Any = &*status.target;
        let member = target.downcast_ref::<Member>()?.clone();
        Some(Self {
            channel: channel.to(&status.peer.id),
            member,
            state: status.state,
            since: status.since,
            in_flight: status.in_flight,
            connections: status.connections,
            why: status.last_error,
        })
    }

    /// Its id, unique in its role.
    pub fn id(&self) -> &str {
        self.session().id()
    }

    /// Where it listens, `host:port` or a Unix domain socket.
    pub fn address(&self) -> &str {
        self.session().address()
    }

    /// Who it is: role, id, address, generation.
    pub fn peer(&self) -> &Peer {
        crate::endpoint::Target::peer(&self.member)
    }

    /// What it says of itself.
    pub fn session(&self) -> &Session {
        self.member.session()
    }

    /// Which generation of its session it is: the registry's `create_revision`.
    pub fn generation(&self) -> u64 {
        self.member.generation()
    }

    /// Its connectivity.
    pub fn state(&self) -> Connectivity {
        self.state
    }

    /// Whether it is connected and takes anybody's calls.
    pub fn is_ready(&self) -> bool {
        self.state == Connectivity::Ready
    }

    /// Since when it is in this state.
    pub fn since(&self) -> SystemTime {
        self.since
    }

    /// Calls in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// How many connections take its calls.
    pub fn connections(&self) -> usize {
        self.connections
    }

    /// Why it is not ready, if that is known.
    pub fn why(&self) -> Option<&SharedError> {
        self.why.as_ref()
    }

    /// A channel pinned to it.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// The same, taken out.
    pub fn into_channel(self) -> Channel {
        self.channel
    }
}

impl fmt::Debug for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Instance")
            .field("peer", self.peer())
            .field("state", &self.state)
            .field("why", &self.why)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.peer(), self.state)
    }
}
