//! What a component is doing, to be looked at.

use std::{fmt, sync::Arc, time::SystemTime};

use serde::{Serialize, Serializer, ser::SerializeStruct as _};

use super::{core::Core, state::ComponentState};
use crate::{events::Brisk, pool::status::millis, registry::RegistrationState};

/// A picture of one component of a process, as [`Status`](crate::manager::Status) shows it. Its `Display` is one line;
/// `serde` writes the state's [code](ComponentState::code) and why, the registration in words, and times in
/// milliseconds since the Unix epoch.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ComponentStatus {
    /// Its role.
    pub role: Arc<str>,
    /// Its id.
    pub id: Arc<str>,
    /// The address that it advertises, if it does.
    pub address: Option<Arc<str>>,
    /// Where it stands.
    pub state: ComponentState,
    /// Since when.
    pub since: SystemTime,
    /// Whether its health is `SERVING`.
    pub serving: bool,
    /// Where its registration stands; `None` before it is begun.
    pub registration: Option<RegistrationState>,
    /// The roles that it depends on and watches, in the order in which they were named.
    pub dependencies: Vec<DependencyStatus>,
}

/// How a role is doing that a component depends on or watches. Its `Display` is a few words.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DependencyStatus {
    /// The role.
    pub role: Arc<str>,
    /// How many of it are ready.
    pub ready: usize,
    /// How many have to be: to start, or to be `SERVING`, whichever is more. 0 if the component goes without.
    pub needed: usize,
}

// === impl Core ===

impl Core {
    pub(crate) fn status(&self) -> ComponentStatus {
        let of = |d: &super::core::Dependency| DependencyStatus {
            role: d.role.clone(),
            ready: self.ready(&d.role),
            needed: d.require.map_or(0, |(n, _)| n).max(d.serving.unwrap_or(0)),
        };
        let peer = &self.peer;
        ComponentStatus {
            role: peer.role.clone(),
            id: peer.id.clone(),
            address: (!peer.address.is_empty()).then(|| peer.address.clone()),
            state: self.state(),
            since: self.since(),
            serving: self.is_serving(),
            registration: self.registration_state(),
            dependencies: self.dependencies.iter().map(of).collect(),
        }
    }
}

// === impl Serialize ===

impl Serialize for ComponentStatus {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut to = to.serialize_struct("ComponentStatus", 9)?;
        to.serialize_field("role", &*self.role)?;
        to.serialize_field("id", &*self.id)?;
        to.serialize_field("address", &self.address.as_deref())?;
        to.serialize_field("state", self.state.code())?;
        to.serialize_field("why", &self.state.why())?;
        to.serialize_field("since_ms", &millis(self.since))?;
        to.serialize_field("serving", &self.serving)?;
        let registration = self.registration.as_ref().map(ToString::to_string);
        to.serialize_field("registration", &registration)?;
        to.serialize_field("dependencies", &self.dependencies)?;
        to.end()
    }
}

impl Serialize for DependencyStatus {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut to = to.serialize_struct("DependencyStatus", 3)?;
        to.serialize_field("role", &*self.role)?;
        to.serialize_field("ready", &self.ready)?;
        to.serialize_field("needed", &self.needed)?;
        to.end()
    }
}

// === impl Display ===

impl fmt::Display for ComponentStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "component {} {}", self.role, self.id)?;
        if let Some(address) = &self.address
            && *address != self.id
        {
            write!(f, " at {address}")?;
        }
        // A clock that was set back makes it zero.
        let age = Brisk(self.since.elapsed().unwrap_or_default());
        write!(f, ": {} for {age}", self.state.code())?;
        if let Some(why) = self.state.why() {
            write!(f, " ({why})")?;
        }
        if self.state.is_serving() && !self.serving {
            f.write_str(", not serving")?;
        }
        if let Some(registration) = &self.registration {
            write!(f, "; {registration}")?;
        }
        for (i, dependency) in self.dependencies.iter().enumerate() {
            f.write_str(if i == 0 { "; " } else { ", " })?;
            dependency.fmt(f)?;
        }
        Ok(())
    }
}

impl fmt::Display for DependencyStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} ready", self.role, self.ready)?;
        match self.needed {
            0 => Ok(()),
            needed => write!(f, " of {needed} needed"),
        }
    }
}
