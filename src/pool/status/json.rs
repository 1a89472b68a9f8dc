//! A pool's status for programs: JSON, or whatever else `serde` writes.
//!
//! Times are whole milliseconds since the Unix epoch, errors are their words, and what does not apply is null.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Serialize, Serializer, ser::SerializeStruct as _};

use super::{Connectivity, Discovery, EndpointStatus, Status};
use crate::discover::Member;
use crate::pool::Refused;

impl Serialize for Status {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let fields = if cfg!(feature = "manager") { 7 } else { 6 };
        let mut to = to.serialize_struct("Status", fields)?;
        to.serialize_field("role", &*self.role)?;
        to.serialize_field("registry", &self.discovery)?;
        to.serialize_field("ready", &self.ready())?;
        to.serialize_field("idle", &self.idle)?;
        to.serialize_field("refused", &self.refused)?;
        #[cfg(feature = "manager")]
        to.serialize_field("repeated", &self.repeated)?;
        to.serialize_field("instances", &self.endpoints)?;
        to.end()
    }
}

impl Serialize for Refused {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut to = to.serialize_struct("Refused", 3)?;
        to.serialize_field("role", &self.role)?;
        to.serialize_field("peer", &self.peer)?;
        to.serialize_field("waiting", &self.waiting)?;
        to.end()
    }
}

#[cfg(feature = "manager")]
impl Serialize for crate::retry::Repeated {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut to = to.serialize_struct("Repeated", 3)?;
        to.serialize_field("unprocessed", &self.unprocessed)?;
        to.serialize_field("by_policy", &self.by_policy)?;
        to.serialize_field("hedged", &self.hedged)?;
        to.end()
    }
}

impl Serialize for EndpointStatus {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let target: &dyn std::any::Any = &*self.target;
        let session = target.downcast_ref::<Member>().map(Member::session);
        let mut to = to.serialize_struct("EndpointStatus", 14)?;
        to.serialize_field("id", &*self.peer.id)?;
        to.serialize_field("address", &*self.peer.address)?;
        let former = self.former.as_ref().map(|peer| &*peer.address);
        to.serialize_field("former_address", &former)?;
        to.serialize_field("generation", &self.peer.generation)?;
        to.serialize_field("version", &session.map(|s| s.version()))?;
        to.serialize_field("metadata", &session.map(|s| s.metadata()))?;
        to.serialize_field("stopping", &self.target.stopping())?;
        to.serialize_field("state", &self.state)?;
        to.serialize_field("since_ms", &millis(self.since))?;
        to.serialize_field("in_flight", &self.in_flight)?;
        to.serialize_field("connections", &self.connections)?;
        to.serialize_field("attempts", &self.attempts)?;
        to.serialize_field("next_attempt_ms", &self.next_attempt.map(millis))?;
        let why = self.last_error.as_ref().map(ToString::to_string);
        to.serialize_field("last_error", &why)?;
        to.end()
    }
}

impl Serialize for Discovery {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let (state, since, why) = match self {
            Self::Pending => ("pending", None, None),
            Self::Failed(why) => ("failed", None, Some(why)),
            Self::Fresh => ("fresh", None, None),
            Self::Stale { since, why } => ("stale", Some(*since), Some(why)),
            Self::Stopped => ("stopped", None, None),
        };
        let mut to = to.serialize_struct("Discovery", 3)?;
        to.serialize_field("state", state)?;
        to.serialize_field("since_ms", &since.map(millis))?;
        to.serialize_field("why", &why.map(ToString::to_string))?;
        to.end()
    }
}

impl Serialize for Connectivity {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.word())
    }
}

/// Milliseconds since the Unix epoch; zero before it.
pub(crate) fn millis(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
