//! What becomes of a registration, as it is told.

use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::SystemTime,
};

use futures_core::Stream;
use futures_util::stream;
use tokio::sync::{broadcast, watch};

#[cfg(doc)]
use super::{Register, Registration};
use crate::{
    error::SharedError,
    registry::{Session, codec, home::Home, store::Record},
};

/// How much of what happened is kept for a reader of [`RegistrationEvents`].
const EVENTS: usize = 64;

/// Where a [`Registration`] stands. Its `Display` is a few words.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum RegistrationState {
    /// The registry has not had it yet, if it was made in the [background](Register::background).
    Registering {
        /// Why not, if that is known.
        why: Option<SharedError>,
    },
    /// The registry has it.
    Registered {
        /// The registry's revision at which its key came into being.
        generation: u64,
    },
    /// The registry has it, as far as is known, but does not answer.
    Unreachable {
        /// As it was last known.
        generation: u64,
        /// Since when.
        since: SystemTime,
        /// Why it does not answer.
        why: SharedError,
    },
    /// The registry has it no more; it is being registered again.
    Lost {
        /// How.
        why: SharedError,
    },
    /// Somebody else has its key; it is registered again when that is free, unless the other is its successor: the
    /// same role, id and address, and younger.
    Taken {
        /// Who.
        by: Holder,
    },
    /// It is exclusive, and another is active; it takes over when that is gone.
    StandBy {
        /// Who is active.
        active: Holder,
    },
    /// It was given up, its successor has its key, or its runtime has ended.
    Ended,
}

/// What happened to a [`Registration`]. Its `Display` is a few words.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum RegistrationEvent {
    /// The registry has it, for the first time; one that stood by is active from here on.
    Registered {
        /// The registry's revision at which its key came into being.
        generation: u64,
    },
    /// The registry does not answer. Its record outlives that by a TTL at least.
    Unreachable {
        /// Why it does not answer.
        why: SharedError,
    },
    /// The registry answers again, and has it as before.
    Reachable,
    /// The registry has it no more, or has not confirmed it for a whole TTL, so that others may think so; it
    /// is being registered again.
    Lost {
        /// How.
        why: SharedError,
    },
    /// The registry has it again: the same instance, mostly in another generation.
    Restored {
        /// The registry's revision at which its key came into being.
        generation: u64,
    },
    /// Somebody else has its key; it is registered again when that is free. If it was its successor, with the
    /// same role, id and address, it ends.
    Taken {
        /// Who.
        by: Holder,
    },
    /// It is exclusive, and this one is active; it takes over when that is gone.
    StandingBy {
        /// Who is active.
        active: Holder,
    },
    /// It was given up, its successor has its key, or its runtime has ended. The last event.
    Ended,
}

/// Who holds a key that somebody else wants. Its `Display` reads `instance 7 at 10.0.0.5:21123, version 2.6`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    session: Option<Arc<Session>>,
    generation: u64,
    words: Arc<str>,
}

/// The events of one [`Registration`]: first where it stands, then what happens.
///
/// The stream ends after [`RegistrationEvent::Ended`]. A reader that falls behind by more than 64 events
/// misses the oldest.
#[must_use = "streams do nothing unless polled"]
pub struct RegistrationEvents {
    inner: Pin<Box<dyn Stream<Item = RegistrationEvent> + Send + Sync>>,
}

/// Where a keeper tells what becomes of its registration.
#[derive(Clone, Debug)]
pub(in crate::registry) struct Board {
    state: watch::Sender<RegistrationState>,
    events: broadcast::Sender<RegistrationEvent>,
}

// === impl Board ===

impl Board {
    pub(in crate::registry) fn new() -> Self {
        Self {
            state: watch::Sender::new(RegistrationState::Registering { why: None }),
            events: broadcast::Sender::new(EVENTS),
        }
    }

    /// Both at once: a reader that comes now has the one or the other, and not both.
    pub(in crate::registry) fn tell(&self, state: RegistrationState, event: RegistrationEvent) {
        self.state.send_modify(|current| {
            if !matches!(current, RegistrationState::Ended) {
                *current = state;
                let _ = self.events.send(event);
            }
        });
    }

    /// Whether that is what was last told: that this one has its key.
    pub(in crate::registry) fn is_held_by(&self, holder: &Holder) -> bool {
        match &*self.state.borrow() {
            RegistrationState::Taken { by } => by == holder,
            RegistrationState::StandBy { active } => active == holder,
            _ => false,
        }
    }

    /// A claim failed. That is news while it was never registered, and the first time; true if it was told.
    pub(in crate::registry) fn is_not_reached(&self, why: SharedError) -> bool {
        let first = match &*self.state.borrow() {
            RegistrationState::Registering { why } => why.is_none(),
            _ => return false,
        };
        let state = RegistrationState::Registering {
            why: Some(why.clone()),
        };
        if first {
            self.tell(state, RegistrationEvent::Unreachable { why });
        } else {
            self.state.send_replace(state);
        }
        first
    }

    pub(super) fn state(&self) -> watch::Ref<'_, RegistrationState> {
        self.state.borrow()
    }

    pub(super) fn states(&self) -> watch::Receiver<RegistrationState> {
        self.state.subscribe()
    }

    pub(super) fn events(&self) -> RegistrationEvents {
        let state = self.state.borrow();
        let events = self.events.subscribe();
        let first = match &*state {
            RegistrationState::Registering { why } => {
                let why = why.clone();
                why.map(|why| RegistrationEvent::Unreachable { why })
            }
            RegistrationState::Registered { generation } => Some(RegistrationEvent::Registered {
                generation: *generation,
            }),
            RegistrationState::Unreachable { why, .. } => {
                Some(RegistrationEvent::Unreachable { why: why.clone() })
            }
            RegistrationState::Lost { why } => Some(RegistrationEvent::Lost { why: why.clone() }),
            RegistrationState::Taken { by } => Some(RegistrationEvent::Taken { by: by.clone() }),
            RegistrationState::StandBy { active } => Some(RegistrationEvent::StandingBy {
                active: active.clone(),
            }),
            RegistrationState::Ended => Some(RegistrationEvent::Ended),
        };
        drop(state);
        let all = stream::unfold(Some((first, events)), async |rest| {
            let (mut first, mut events) = rest?;
            let event = loop {
                if let Some(first) = first.take() {
                    break first;
                }
                match events.recv().await {
                    Ok(event) => break event,
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return None,
                }
            };
            let over = matches!(event, RegistrationEvent::Ended);
            Some((event, (!over).then_some((None, events))))
        });
        RegistrationEvents {
            inner: Box::pin(all),
        }
    }
}

// === impl RegistrationEvents ===

impl Stream for RegistrationEvents {
    type Item = RegistrationEvent;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.inner.as_mut().poll_next(cx)
    }
}

impl fmt::Debug for RegistrationEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegistrationEvents").finish_non_exhaustive()
    }
}

// === impl Holder ===

impl Holder {
    /// Who has the record.
    pub(in crate::registry) fn of(home: &Home, role: &str, record: &Record) -> Self {
        let key = String::from_utf8_lossy(&record.key);
        let decoded = codec::decode(&*home.codec, &home.root, role, &key, &record.value);
        let (session, words) = match decoded {
            Ok(Some(session)) => {
                let version = match session.version() {
                    "" => String::new(),
                    version => format!(", version {version}"),
                };
                let words = format!(
                    "instance {} at {}{version}",
                    session.id(),
                    session.address()
                );
                (Some(Arc::new(session)), words)
            }
            Ok(None) => (None, "a record that is no session of this role".to_owned()),
            Err(bad) => (None, format!("a record that is no session ({bad})")),
        };
        Self {
            session,
            generation: record.created,
            words: words.into(),
        }
    }

    /// Its session, if what stands there is one.
    pub fn session(&self) -> Option<&Session> {
        self.session.as_deref()
    }

    /// The registry's revision at which it came to hold the key.
    pub fn generation(&self) -> u64 {
        self.generation
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.words)
    }
}

// === impl Display ===

impl fmt::Display for RegistrationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registering { why: None } => f.write_str("registering"),
            Self::Registering { why: Some(why) } => write!(f, "not registered yet: {why}"),
            Self::Registered { generation } => write!(f, "registered, generation {generation}"),
            Self::Unreachable {
                generation, why, ..
            } => {
                write!(
                    f,
                    "registered, generation {generation}, but not confirmed: {why}"
                )
            }
            Self::Lost { why } => write!(f, "lost, being registered again: {why}"),
            Self::Taken { by } => write!(f, "its key is taken by {by}"),
            Self::StandBy { active } => write!(f, "standing by; active is {active}"),
            Self::Ended => f.write_str("ended"),
        }
    }
}

impl fmt::Display for RegistrationEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registered { generation } => write!(f, "registered, generation {generation}"),
            Self::Unreachable { why } => write!(f, "not confirmed: {why}"),
            Self::Reachable => f.write_str("confirmed again"),
            Self::Lost { why } => write!(f, "lost: {why}"),
            Self::Restored { generation } => write!(f, "restored, generation {generation}"),
            Self::Taken { by } => write!(f, "its key is taken by {by}"),
            Self::StandingBy { active } => write!(f, "standing by; active is {active}"),
            Self::Ended => f.write_str("ended"),
        }
    }
}
