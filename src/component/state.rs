//! What a component says of itself, and how that follows from what is known.

use std::{fmt, sync::Arc};

use crate::{
    error::{Error, Kind},
    registry::{Holder, RegistrationState},
};

/// Where a component stands. Its `Display` is the [code](ComponentState::code), and why.
///
/// ```text
///  Initializing ──▶ Healthy ◀──▶ Abnormal
///       │              ▲            ▲           from anywhere: ──▶ Stopping ──▶ Stopped
///       └──────▶ StandBy ◀──────────┘
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ComponentState {
    /// It starts: something that comes before is not done yet.
    Initializing {
        /// What it waits for, if that is known.
        why: Option<Arc<str>>,
    },
    /// It serves: it is registered, or has nothing to register. A registry that does not answer changes nothing of that,
    /// however long; only one that is exclusive is `Abnormal` once its TTL is over, for another may be active.
    Healthy,
    /// It is exclusive, and another is active; it takes over when that is gone.
    StandBy {
        /// Who is active.
        active: Holder,
    },
    /// It does not serve as it should: its registration is lost or taken, a hook failed, or the program itself
    /// [says so](super::Component::abnormal).
    Abnormal {
        /// Why.
        why: Arc<str>,
    },
    /// It is being stopped. It comes back from here no more.
    Stopping,
    /// It has stopped: nothing of it is registered, and nothing runs.
    Stopped,
}

/// All that a component's state follows from.
#[derive(Debug)]
pub(super) struct Standing {
    /// By its start and its registration.
    base: ComponentState,
    /// Why the program itself says that it is abnormal.
    abnormal: Option<Arc<str>>,
    /// `Stopping` or `Stopped`.
    end: Option<ComponentState>,
}

// === impl ComponentState ===

impl ComponentState {
    /// The state in one word: `Initializing`, `Healthy`, `StandBy`, `Abnormal`, `Stopping` or `Stopped`.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Initializing { .. } => "Initializing",
            Self::Healthy => "Healthy",
            Self::StandBy { .. } => "StandBy",
            Self::Abnormal { .. } => "Abnormal",
            Self::Stopping => "Stopping",
            Self::Stopped => "Stopped",
        }
    }

    /// Whether it serves: only `Healthy` does.
    pub fn is_serving(&self) -> bool {
        matches!(self, Self::Healthy)
    }

    /// Whether it is on its way out: `Stopping` or `Stopped`.
    pub fn is_ending(&self) -> bool {
        matches!(self, Self::Stopping | Self::Stopped)
    }

    /// Why it is `Initializing` or `Abnormal`, if that is known.
    pub fn why(&self) -> Option<&str> {
        match self {
            Self::Initializing { why } => why.as_deref(),
            Self::Abnormal { why } => Some(why),
            _ => None,
        }
    }

    pub(super) fn initializing(why: impl Into<Arc<str>>) -> Self {
        Self::Initializing {
            why: Some(why.into()),
        }
    }

    pub(super) fn abnormal(why: impl Into<Arc<str>>) -> Self {
        Self::Abnormal { why: why.into() }
    }

    /// What follows from where the registration stands. `taken_by` is who was last said to have its key.
    pub(super) fn of(registration: &RegistrationState, taken_by: Option<&Holder>) -> Self {
        match registration {
            RegistrationState::Registering { why: None } => Self::initializing("registering"),
            RegistrationState::Registering { why: Some(why) } => {
                Self::initializing(format!("not registered yet, and tried again: {why}"))
            }
            // A server lives whether the registry answers or not, and so does its record, for now.
            RegistrationState::Registered { .. } | RegistrationState::Unreachable { .. } => {
                Self::Healthy
            }
            RegistrationState::StandBy { active } => Self::StandBy {
                active: active.clone(),
            },
            RegistrationState::Lost { why } => Self::abnormal(format!(
                "its registration was lost, and is being made again: {why}"
            )),
            RegistrationState::Taken { by } => Self::abnormal(format!(
                "its key is taken by {by}; it is registered again when that is gone"
            )),
            RegistrationState::Ended => Self::abnormal(match taken_by {
                Some(by) => format!(
                    "its successor, {by}, has registered: new calls go there, and this one is not registered again; stop it"
                ),
                None => "its registration has ended, and is not made again; restart it".to_owned(),
            }),
        }
    }
}

/// Whether that it is lost is only what its holder must think, because the registry does not answer. Others think
/// nothing of the kind: they keep whom they know for as long as that lasts.
pub(super) fn is_unanswered(registration: &RegistrationState) -> bool {
    let RegistrationState::Lost { why } = registration else {
        return false;
    };
    let why = why.downcast_ref::<Error>();
    why.is_some_and(|error| error.kind() == Kind::RegistryUnreachable)
}

impl fmt::Display for ComponentState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())?;
        match self {
            Self::StandBy { active } => write!(f, ": active is {active}"),
            _ => match self.why() {
                Some(why) => write!(f, ": {why}"),
                None => Ok(()),
            },
        }
    }
}

// === impl Standing ===

impl Standing {
    pub(super) fn new() -> Self {
        Self {
            base: ComponentState::Initializing { why: None },
            abnormal: None,
            end: None,
        }
    }

    pub(super) fn base(&mut self, state: ComponentState) {
        self.base = state;
    }

    pub(super) fn abnormal(&mut self, why: Option<Arc<str>>) {
        self.abnormal = why;
    }

    /// (anything) => Stopping => Stopped
    pub(super) fn end(&mut self, state: ComponentState) {
        if self.end != Some(ComponentState::Stopped) {
            self.end = Some(state);
        }
    }

    /// An end is an end. What the program says counts for more than that it is registered, and for less than that
    /// it is not.
    pub(super) fn current(&self) -> ComponentState {
        match (&self.end, &self.base, &self.abnormal) {
            (Some(end), _, _) => end.clone(),
            (None, ComponentState::Healthy | ComponentState::StandBy { .. }, Some(why)) => {
                ComponentState::Abnormal { why: why.clone() }
            }
            (None, base, _) => base.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{BoxError, SharedError};

    fn why(text: &str) -> SharedError {
        Arc::from(BoxError::from(text))
    }

    #[test]
    fn what_the_program_says_counts_for_more_than_healthy_and_for_less_than_the_registry() {
        let mut standing = Standing::new();
        let code = |standing: &Standing| standing.current().code();
        assert_eq!(code(&standing), "Initializing");

        standing.abnormal(Some("the disk is full".into()));
        assert_eq!(code(&standing), "Initializing");
        standing.base(ComponentState::Healthy);
        assert_eq!(standing.current().to_string(), "Abnormal: the disk is full");
        standing.base(ComponentState::abnormal("lost"));
        assert_eq!(standing.current().why(), Some("lost"));
        standing.base(ComponentState::Healthy);
        standing.abnormal(None);
        assert_eq!(standing.current(), ComponentState::Healthy);
    }

    #[test]
    fn an_end_is_final() {
        let mut standing = Standing::new();
        standing.end(ComponentState::Stopping);
        standing.base(ComponentState::Healthy);
        assert_eq!(standing.current(), ComponentState::Stopping);
        standing.end(ComponentState::Stopped);
        standing.end(ComponentState::Stopping);
        assert_eq!(standing.current(), ComponentState::Stopped);
        assert!(standing.current().is_ending());
    }

    #[test]
    fn an_outage_of_the_registry_changes_nothing_for_who_is_registered() {
        let unreachable = RegistrationState::Unreachable {
            generation: 7,
            since: std::time::SystemTime::now(),
            why: why("down"),
        };
        let healthy = ComponentState::of(&unreachable, None);
        assert!(healthy.is_serving());

        let registering = RegistrationState::Registering {
            why: Some(why("down")),
        };
        let starting = ComponentState::of(&registering, None);
        assert_eq!(
            starting.to_string(),
            "Initializing: not registered yet, and tried again: down"
        );
        let lost = ComponentState::of(
            &RegistrationState::Lost {
                why: why("expired"),
            },
            None,
        );
        assert_eq!(lost.code(), "Abnormal");
        assert!(lost.to_string().contains("expired"), "{lost}");
        let ended = ComponentState::of(&RegistrationState::Ended, None);
        assert!(ended.to_string().contains("restart it"), "{ended}");
    }
}
