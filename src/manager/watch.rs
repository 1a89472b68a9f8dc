//! A role's instances, as they come, change and go.

use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use futures_core::Stream;

use super::{Channel, Instance};
use crate::{
    error::{Brief, Error, Kind},
    pool::{
        Pool, WeakPool,
        changes::{Change, Changes},
        status::{Connectivity, EndpointStatus},
    },
    transport::Connections,
};

/// The instances of a role: first those that are there, then every change; see
/// [`ConnectionManager::watch`](super::ConnectionManager::watch).
///
/// A reader goes at its own pace and holds up nobody. What came and went between two looks it is not told; what is there
/// in the end it is always told. An instance of the same id in another generation is another: the old one is removed
/// first.
///
/// It keeps neither the manager nor the role's connections alive, and may be dropped, or drop the manager, at any
/// moment. It ends after [`InstanceChange::Ended`].
#[must_use = "streams do nothing unless polled"]
pub struct Watch {
    role: Arc<str>,
    source: Source,
}

enum Source {
    Pool {
        pool: WeakPool<Connections>,
        changes: Box<Changes<Connections>>,
        /// Of a change that is told in two.
        /// Its status, and no instance, whose channel would keep the pool alive.
        next: Option<Box<EndpointStatus>>,
    },
    /// It could not be watched, and why.
    Failed(Option<Arc<Error>>),
}

/// One change among the instances of a role.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum InstanceChange {
    /// It is registered. Its state is told with it, and again, as one of the next three, if it is not just connecting.
    Added(Instance),
    /// It is connected and takes calls.
    Ready(Instance),
    /// It cannot be called: its connection was lost, or could not be made; [`Instance::state`] says which, and
    /// [`Instance::why`] why. Told again when it goes from being tried to being offline.
    Unready(Instance),
    /// It says that it is stopping: only pinned calls go there.
    Stopping(Instance),
    /// It says something else than before: its metadata, or its address.
    Updated(Instance),
    /// It is not registered any more. This is how it was last told.
    Removed(Instance),
    /// All that were there when the watch began have been told: the registry has answered. Told once.
    Synced,
    /// There will be no more, and why: [`Kind::Stopped`] if the manager was stopped, or dropped, or the role released;
    /// [`Kind::Invalid`] if this cannot be a role.
    Ended(Arc<Error>),
}

// === impl Watch ===

impl Watch {
    pub(super) fn new(pool: Result<Pool<Connections>, Error>, role: &str) -> Self {
        let source = match pool {
            Ok(pool) => Source::Pool {
                changes: Box::new(Changes::new(pool.shared().clone())),
                pool: pool.downgrade(),
                next: None,
            },
            Err(error) => Source::Failed(Some(Arc::new(error))),
        };
        Self {
            role: role.into(),
            source,
        }
    }

    /// The role.
    pub fn role(&self) -> &str {
        &self.role
    }
}

impl Stream for Watch {
    type Item = InstanceChange;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        let (pool, changes, next) = match &mut this.source {
            Source::Pool {
                pool,
                changes,
                next,
            } => (pool, changes, next),
            Source::Failed(error) => return Poll::Ready(error.take().map(InstanceChange::Ended)),
        };
        let channel = || match pool.upgrade() {
            Some(pool) => Channel::new(pool),
            None => Channel::broken(&this.role, &Error::new(Kind::Stopped)),
        };
        loop {
            if let Some(now) = next.take()
                && let Some(instance) = Instance::new(*now, &channel())
            {
                return Poll::Ready(Some(in_state(instance)));
            }
            let Some(change) = ready!(changes.poll_change(cx)) else {
                return Poll::Ready(None);
            };
            let told = match change {
                Change::Added(now) => {
                    if now.state != Connectivity::Connecting {
                        *next = Some(Box::new(now.clone()));
                    }
                    Instance::new(now, &channel()).map(InstanceChange::Added)
                }
                Change::Changed { before, now } => {
                    let same = before == now.state;
                    let instance = Instance::new(now, &channel());
                    instance.map(match same {
                        true => InstanceChange::Updated,
                        false => in_state,
                    })
                }
                Change::Removed(before) => {
                    Instance::new(before, &channel()).map(InstanceChange::Removed)
                }
                Change::Synced => Some(InstanceChange::Synced),
                Change::Ended(why) => Some(InstanceChange::Ended(why)),
            };
            if told.is_some() {
                return Poll::Ready(told);
            }
        }
    }
}

/// What its state is told as.
fn in_state(instance: Instance) -> InstanceChange {
    match instance.state() {
        Connectivity::Ready => InstanceChange::Ready(instance),
        Connectivity::Stopping => InstanceChange::Stopping(instance),
        _ => InstanceChange::Unready(instance),
    }
}

// === impl InstanceChange ===

impl InstanceChange {
    /// The instance that it is about, if it is about one.
    pub fn instance(&self) -> Option<&Instance> {
        match self {
            Self::Added(instance)
            | Self::Ready(instance)
            | Self::Unready(instance)
            | Self::Stopping(instance)
            | Self::Updated(instance)
            | Self::Removed(instance) => Some(instance),
            Self::Synced | Self::Ended(_) => None,
        }
    }
}

impl fmt::Display for InstanceChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(instance) = self.instance() {
            write!(f, "{}: ", instance.peer())?;
        }
        match self {
            Self::Added(_) => f.write_str("added"),
            Self::Ready(_) => f.write_str("ready"),
            Self::Unready(instance) => match instance.why() {
                Some(why) => write!(f, "{}: {}", instance.state(), Brief(&**why)),
                None => write!(f, "{}", instance.state()),
            },
            Self::Stopping(_) => f.write_str("stopping"),
            Self::Updated(_) => f.write_str("updated"),
            Self::Removed(_) => f.write_str("removed"),
            Self::Synced => f.write_str("synced"),
            Self::Ended(why) => write!(f, "ended: {why}"),
        }
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch")
            .field("role", &self.role)
            .finish_non_exhaustive()
    }
}
