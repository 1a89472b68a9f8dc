//! The components of a process, as its manager knows them, and what they need of it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::watch;

use super::ConnectionManager;
use crate::{
    component::{ComponentStatus, Core},
    error::{Error, Kind},
    events::Bus,
    registry::{Register, Session},
};

/// The components that live. It holds them weakly: they hold the manager.
#[derive(Debug, Default)]
pub(crate) struct Components {
    list: Mutex<Vec<Weak<Core>>>,
    /// Counts what may change somebody's health.
    changes: watch::Sender<u64>,
}

// === impl Components ===

impl Components {
    pub(crate) fn add(&self, core: &Arc<Core>) {
        self.lock().push(Arc::downgrade(core));
    }

    /// Others that are gone go with it.
    pub(crate) fn remove(&self, core: &Arc<Core>) {
        let this = Arc::downgrade(core);
        let stays = |other: &Weak<Core>| other.strong_count() > 0 && !other.ptr_eq(&this);
        self.lock().retain(stays);
        self.changed();
    }

    pub(crate) fn forget_those_gone(&self) {
        self.lock().retain(|other| other.strong_count() > 0);
        self.changed();
    }

    /// In the order in which they were made.
    pub(crate) fn all(&self) -> Vec<Arc<Core>> {
        self.lock().iter().filter_map(Weak::upgrade).collect()
    }

    pub(crate) fn status(&self) -> Vec<ComponentStatus> {
        self.all().iter().map(|core| core.status()).collect()
    }

    pub(crate) fn changed(&self) {
        self.changes.send_modify(|n| *n = n.wrapping_add(1));
    }

    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Weak<Core>>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl ConnectionManager ===

impl ConnectionManager {
    pub(crate) fn components(&self) -> &Arc<Components> {
        &self.inner.components
    }

    /// What a component needs of it until its end, which may come later than the manager's.
    pub(crate) fn bus(&self) -> Result<Bus, Error> {
        let roles = self.inner.lock();
        match &roles.open {
            Some(open) => Ok(open.bus.clone()),
            None => Err(Error::new(Kind::Stopped)),
        }
    }

    /// A registration in the manager's own registry.
    pub(crate) fn register(&self, session: Session) -> Result<Register, Error> {
        // The registry may be a user's own: not under the lock.
        let open = self.inner.lock().open.clone();
        match open {
            Some(open) => open.registry.register_session(session),
            None => Err(Error::new(Kind::Stopped).with_role(session.role_arc())),
        }
    }

    /// How many of a role are ready; none of one that was never asked for.
    pub(crate) fn count_ready(&self, role: &str) -> usize {
        let known = &self.inner.lock().known;
        let pool = known.get(role).map(|role| role.pool.clone());
        pool.map_or(0, |pool| pool.snapshot().ready.len())
    }
}
