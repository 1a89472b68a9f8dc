//! Events as one line each.

use std::{fmt, time::Duration};

use super::{Event, EventKind};
use crate::error::Brief;

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use EventKind as Kind;
        match (self.kind.peer(), &*self.role) {
            (Some(peer), _) => write!(f, "{peer}: ")?,
            (None, "") => {}
            (None, role) => write!(f, "{role}: ")?,
        }
        match &self.kind {
            Kind::Watching => f.write_str("watching"),
            #[cfg(feature = "manager")]
            Kind::Released => f.write_str("released"),
            Kind::Idle => f.write_str("idle, connections closed"),
            Kind::Woken => f.write_str("in use again"),
            Kind::Added { peer } => write!(f, "added, generation {}", peer.generation),
            Kind::Connecting { .. } => f.write_str("connecting"),
            Kind::Connected { .. } => f.write_str("connected"),
            Kind::Restored { after, .. } => write!(f, "restored after {}", Brisk(*after)),
            Kind::NotServing { why, .. } => write!(f, "not serving: {}", Brief(&**why)),
            Kind::Lost { why, .. } => write!(f, "lost: {}", Brief(&**why)),
            Kind::AttemptFailed {
                attempts,
                next,
                why,
                ..
            } => {
                let why = Brief(&**why);
                write!(f, "attempt {attempts} failed: {why}{}", Next(*next))
            }
            Kind::Offline {
                attempts,
                next,
                why,
                ..
            } => {
                let s = if *attempts == 1 { "" } else { "s" };
                let why = Brief(&**why);
                write!(
                    f,
                    "offline after {attempts} attempt{s}: {why}{}",
                    Next(*next)
                )
            }
            Kind::Updated { .. } => f.write_str("updated"),
            Kind::Stopping { .. } => f.write_str("stopping"),
            Kind::Barred { why, .. } => write!(f, "not to be called: {}", Brief(&**why)),
            Kind::Removed { .. } => f.write_str("removed"),
            Kind::RegistryStale { why } => write!(f, "registry stale: {}", Brief(&**why)),
            Kind::RegistryFresh { after: None } => f.write_str("registry fresh"),
            Kind::RegistryFresh { after: Some(after) } => {
                write!(f, "registry fresh after {}", Brisk(*after))
            }
            #[cfg(feature = "component")]
            Kind::Component { state, .. } => state.fmt(f),
            #[cfg(feature = "component")]
            Kind::Registration { event, .. } => write!(f, "registration {event}"),
            Kind::Missed { events } => write!(f, "{events} events were missed"),
            Kind::Stopped => f.write_str("stopped"),
        }
    }
}

/// When it is tried again.
struct Next(Option<Duration>);

impl fmt::Display for Next {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(next) => write!(f, "; next in {}", Brisk(next)),
            None => f.write_str("; until the registry speaks of it"),
        }
    }
}

/// A duration in the one unit that matters.
pub(crate) struct Brisk(pub(crate) Duration);

impl fmt::Display for Brisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_secs() {
            0 => write!(f, "{}ms", self.0.as_millis()),
            1..=9 => write!(f, "{:.1}s", self.0.as_secs_f64()),
            s @ 10..=119 => write!(f, "{s}s"),
            s @ 120..=7199 => write!(f, "{}m", s / 60),
            s => write!(f, "{}h", s / 3600),
        }
    }
}
