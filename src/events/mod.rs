//! What happens to the connections of a process, told as it happens.
//!
//! Each event is told twice: to whoever reads `Events` of a `ConnectionManager`, typed, and to `tracing`, under the target
//! `switchboard::events`, with these fields and no others, where they apply:
//!
//! | field | is |
//! | --- | --- |
//! | `event` | what happened, one of [`EventKind::name`]'s words |
//! | `role`, `id`, `address`, `generation` | to whom |
//! | `attempts` | failed attempts in a row |
//! | `next_ms` | milliseconds until the next attempt |
//! | `after_ms` | milliseconds that the trouble lasted |
//! | `state` | where a component, or its registration, stands: one word |
//! | `error` | why |
//!
//! Trouble is told at level WARN, the further attempts of an endpoint that is known to be in trouble at DEBUG, and
//! all else at INFO. Names of fields and events change only with a major version.

mod words;

use std::{
    fmt,
    panic::{self, AssertUnwindSafe},
    sync::Arc,
    time::{Duration, SystemTime},
};
#[cfg(feature = "manager")]
use std::{
    pin::Pin,
    task::{Context, Poll},
};

#[cfg(feature = "manager")]
use futures_core::Stream;
#[cfg(feature = "manager")]
use futures_util::{StreamExt as _, stream};
use tokio::sync::broadcast;

pub(crate) use self::words::Brisk;
use crate::error::{Peer, SharedError};
#[cfg(feature = "component")]
use crate::{component::ComponentState, registry::RegistrationEvent};

/// How many events are kept for a reader that is behind.
#[cfg(feature = "manager")]
const KEPT: usize = 1024;

/// Something that happened to a connection, an instance, a role or the process. Its `Display` is one line without
/// the time.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Event {
    /// When.
    pub at: SystemTime,
    /// The role that it is about; empty for [`EventKind::Missed`] and [`EventKind::Stopped`].
    pub role: Arc<str>,
    /// What.
    pub kind: EventKind,
}

/// What an [`Event`] tells.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum EventKind {
    /// The role is looked for and connected from here on.
    Watching,
    /// The role was let go by [`release`](crate::manager::ConnectionManager::release).
    #[cfg(feature = "manager")]
    Released,
    /// Nobody has used the role for long enough: its connections are closed until somebody does.
    Idle,
    /// Somebody uses the role that was idle.
    Woken,
    /// A session was registered.
    Added {
        /// Whose.
        peer: Arc<Peer>,
    },
    /// The first attempt to connect begins, since it was registered or since its connection was lost.
    Connecting {
        /// To whom.
        peer: Arc<Peer>,
    },
    /// It is connected, for the first time since it was registered, or since its connection was closed on purpose:
    /// its role was [idle](Self::Idle), it was [barred](Self::Barred), or its address is another.
    Connected {
        /// To whom.
        peer: Arc<Peer>,
    },
    /// It is connected, or serves, again.
    Restored {
        /// To whom.
        peer: Arc<Peer>,
        /// How long it was not.
        after: Duration,
    },
    /// It is connected, and says that it does not serve.
    NotServing {
        /// Who.
        peer: Arc<Peer>,
        /// In its words.
        why: SharedError,
    },
    /// Its connection is gone.
    Lost {
        /// To whom.
        peer: Arc<Peer>,
        /// Why.
        why: SharedError,
    },
    /// An attempt to connect has failed.
    AttemptFailed {
        /// To whom.
        peer: Arc<Peer>,
        /// How many failed in a row, this one included.
        attempts: u32,
        /// How long until the next one; `None`: not before the registry speaks of it.
        next: Option<Duration>,
        /// Why.
        why: SharedError,
    },
    /// So many attempts have failed that calls to it fail at once, until a slow probe or one after the registry's next
    /// word succeeds.
    Offline {
        /// Who.
        peer: Arc<Peer>,
        /// How many failed in a row.
        attempts: u32,
        /// How long until it is probed; `None`: not before the registry speaks of it.
        next: Option<Duration>,
        /// Why the last one failed.
        why: SharedError,
    },
    /// Its session says something else than before, or the registry spoke of it once more.
    Updated {
        /// Whose.
        peer: Arc<Peer>,
    },
    /// Its session says that it is stopping: it gets no new calls but pinned ones.
    Stopping {
        /// Who.
        peer: Arc<Peer>,
    },
    /// It is registered, and must not be called.
    Barred {
        /// Who.
        peer: Arc<Peer>,
        /// Why.
        why: SharedError,
    },
    /// Its session is gone: its calls in flight end, or finish if it was stopping.
    Removed {
        /// Whose.
        peer: Arc<Peer>,
    },
    /// The registry does not answer; the last known set is kept.
    RegistryStale {
        /// Why.
        why: SharedError,
    },
    /// The set is up to date, for the first time or again.
    RegistryFresh {
        /// How long it was not, if it ever was before.
        after: Option<Duration>,
    },
    /// A component of this process stands here now.
    #[cfg(feature = "component")]
    Component {
        /// Who it is; its generation is 0.
        peer: Arc<Peer>,
        /// Where it stands.
        state: ComponentState,
    },
    /// This happened to the registration of a component of this process.
    #[cfg(feature = "component")]
    Registration {
        /// Who it is; its generation is 0.
        peer: Arc<Peer>,
        /// What happened.
        event: RegistrationEvent,
    },
    /// The reader was too slow: so many events before this one are lost to it.
    Missed {
        /// How many.
        events: u64,
    },
    /// The manager was stopped: this is the last event.
    Stopped,
}

/// The events of a process, from here on.
///
/// The last 1,024 are kept for a reader that is behind; a slower one is told how many it has
/// [missed](EventKind::Missed), and holds up nobody. Who needs to know exactly what is there uses a watch of the role.
/// It ends after [`EventKind::Stopped`], and stays ended. It keeps neither the manager nor a connection alive. Events of
/// one role come in order; between roles there is none.
#[cfg(feature = "manager")]
#[must_use = "streams do nothing unless polled"]
pub struct Events {
    inner: Pin<Box<dyn Stream<Item = Event> + Send + Sync>>,
}

/// Where events are told. A clone tells the same readers.
#[derive(Clone, Debug)]
pub(crate) struct Bus {
    readers: broadcast::Sender<Event>,
}

// === impl Event ===

impl Event {
    fn new(role: &Arc<str>, kind: EventKind) -> Self {
        Self {
            at: SystemTime::now(),
            role: role.clone(),
            kind,
        }
    }

    /// The instance that it is about, if it is about one.
    pub fn peer(&self) -> Option<&Arc<Peer>> {
        self.kind.peer()
    }
}

// === impl EventKind ===

impl EventKind {
    /// Its name in one or two words with an underscore, as it is in `tracing`'s field `event`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Watching => "watching",
            #[cfg(feature = "manager")]
            Self::Released => "released",
            Self::Idle => "idle",
            Self::Woken => "woken",
            Self::Added { .. } => "added",
            Self::Connecting { .. } => "connecting",
            Self::Connected { .. } => "connected",
            Self::Restored { .. } => "restored",
            Self::NotServing { .. } => "not_serving",
            Self::Lost { .. } => "lost",
            Self::AttemptFailed { .. } => "attempt_failed",
            Self::Offline { .. } => "offline",
            Self::Updated { .. } => "updated",
            Self::Stopping { .. } => "stopping",
            Self::Barred { .. } => "barred",
            Self::Removed { .. } => "removed",
            Self::RegistryStale { .. } => "registry_stale",
            Self::RegistryFresh { .. } => "registry_fresh",
            #[cfg(feature = "component")]
            Self::Component { .. } => "component",
            #[cfg(feature = "component")]
            Self::Registration { .. } => "registration",
            Self::Missed { .. } => "missed",
            Self::Stopped => "stopped",
        }
    }

    fn peer(&self) -> Option<&Arc<Peer>> {
        match self {
            Self::Added { peer }
            | Self::Connecting { peer }
            | Self::Connected { peer }
            | Self::Restored { peer, .. }
            | Self::NotServing { peer, .. }
            | Self::Lost { peer, .. }
            | Self::AttemptFailed { peer, .. }
            | Self::Offline { peer, .. }
            | Self::Updated { peer }
            | Self::Stopping { peer }
            | Self::Barred { peer, .. }
            | Self::Removed { peer } => Some(peer),
            #[cfg(feature = "component")]
            Self::Component { peer, .. } | Self::Registration { peer, .. } => Some(peer),
            _ => None,
        }
    }

    /// Where a component or its registration stands, in one word.
    fn state(&self) -> Option<&'static str> {
        match self {
            #[cfg(feature = "component")]
            Self::Component { state, .. } => Some(state.code()),
            #[cfg(feature = "component")]
            Self::Registration { event, .. } => Some(match event {
                RegistrationEvent::Registered { .. } => "registered",
                RegistrationEvent::Unreachable { .. } => "unreachable",
                RegistrationEvent::Reachable => "reachable",
                RegistrationEvent::Lost { .. } => "lost",
                RegistrationEvent::Restored { .. } => "restored",
                RegistrationEvent::Taken { .. } => "taken",
                RegistrationEvent::StandingBy { .. } => "standing_by",
                RegistrationEvent::Ended => "ended",
            }),
            _ => None,
        }
    }

    fn why(&self) -> Option<&dyn fmt::Display> {
        match self {
            #[cfg(feature = "component")]
            Self::Component {
                state:
                    ComponentState::Initializing { why: Some(why) } | ComponentState::Abnormal { why },
                ..
            } => Some(why),
            #[cfg(feature = "component")]
            Self::Registration {
                event: RegistrationEvent::Unreachable { why } | RegistrationEvent::Lost { why },
                ..
            } => Some(why),
            Self::NotServing { why, .. }
            | Self::Lost { why, .. }
            | Self::AttemptFailed { why, .. }
            | Self::Offline { why, .. }
            | Self::Barred { why, .. }
            | Self::RegistryStale { why } => Some(why),
            _ => None,
        }
    }
}

// === impl Events ===

#[cfg(feature = "manager")]
impl Stream for Events {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.inner.as_mut().poll_next(cx)
    }
}

#[cfg(feature = "manager")]
impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

// === impl Bus ===

impl Bus {
    #[cfg(feature = "manager")]
    pub(crate) fn new() -> Self {
        Self {
            readers: broadcast::Sender::new(KEPT),
        }
    }

    /// One that only `tracing` hears, so that it keeps nothing.
    pub(crate) fn of_nobody() -> Self {
        Self {
            readers: broadcast::Sender::new(1),
        }
    }

    /// Tells an event. Waits for nobody, and survives a subscriber or an error's words that panic.
    pub(crate) fn tell(&self, role: &Arc<str>, kind: EventKind) {
        let _ = panic::catch_unwind(AssertUnwindSafe(|| trace(role, &kind)));
        // Nobody reads: that is no error.
        let _ = self.readers.send(Event::new(role, kind));
    }

    #[cfg(feature = "manager")]
    pub(crate) fn events(&self) -> Events {
        let readers = Some(self.readers.subscribe());
        let events = stream::unfold(readers, async |readers| {
            let mut readers = readers?;
            let none = || Arc::from("");
            match readers.recv().await {
                Ok(event) => {
                    let over = matches!(event.kind, EventKind::Stopped);
                    Some((event, (!over).then_some(readers)))
                }
                Err(broadcast::error::RecvError::Lagged(events)) => {
                    let missed = EventKind::Missed { events };
                    Some((Event::new(&none(), missed), Some(readers)))
                }
                // Whoever told is gone, and so it was stopped.
                Err(broadcast::error::RecvError::Closed) => {
                    Some((Event::new(&none(), EventKind::Stopped), None))
                }
            }
        });
        Events {
            // Whoever selects over several streams asks again after the end.
            inner: Box::pin(events.fuse()),
        }
    }
}

/// The same for `tracing`.
fn trace(role: &Arc<str>, kind: &EventKind) {
    macro_rules! tell {
        ($level:ident) => {
            tracing::$level!(
                target: "switchboard::events",
                event = kind.name(),
                role = &**role,
                id = kind.peer().map(|peer| &*peer.id),
                address = kind.peer().map(|peer| &*peer.address),
                generation = kind.peer().map(|peer| peer.generation),
                attempts = match kind {
                    EventKind::AttemptFailed { attempts, .. } | EventKind::Offline { attempts, .. } => Some(*attempts),
                    _ => None,
                },
                next_ms = match kind {
                    EventKind::AttemptFailed { next, .. } | EventKind::Offline { next, .. } => next.map(millis),
                    _ => None,
                },
                after_ms = match kind {
                    EventKind::Restored { after, .. } => Some(millis(*after)),
                    EventKind::RegistryFresh { after } => after.map(millis),
                    _ => None,
                },
                state = kind.state(),
                error = kind.why().map(tracing::field::display),
            )
        };
    }
    match kind {
        // The first failure of a row is news; those that follow are what was to be expected.
        EventKind::AttemptFailed { attempts: 2.., .. } => tell!(debug),
        EventKind::AttemptFailed { .. }
        | EventKind::NotServing { .. }
        | EventKind::Lost { .. }
        | EventKind::Offline { .. }
        | EventKind::Barred { .. }
        | EventKind::RegistryStale { .. } => tell!(warn),
        #[cfg(feature = "component")]
        EventKind::Component {
            state: ComponentState::Abnormal { .. },
            ..
        }
        | EventKind::Registration {
            event:
                RegistrationEvent::Unreachable { .. }
                | RegistrationEvent::Lost { .. }
                | RegistrationEvent::Taken { .. },
            ..
        } => tell!(warn),
        _ => tell!(info),
    }
}

fn millis(of: Duration) -> u64 {
    u64::try_from(of.as_millis()).unwrap_or(u64::MAX)
}
