//! A connected endpoint, as calls see it.

use std::{
    borrow::Cow,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{
    Lifeline,
    limiter::Limiter,
    load::{Guard, Load},
};
use crate::{error::Peer, gate::Core};

/// An endpoint that is connected: one for each connection that it has in its life.
pub(crate) struct Ready<S> {
    pub(crate) service: S,
    pub(crate) load: Load<Peer>,
    pub(crate) key: u64,
    /// How many calls it may have, over all its connections.
    pub(crate) limiter: Option<Arc<Limiter>>,
    lifeline: Option<Arc<dyn Lifeline>>,
    // Shut for good by the first call that finds the service done for. Later picks pass it by at once, without
    // waiting for the driver: a dead peer has no load, and would attract them all. Shut, until further notice, by a
    // peer that says that it does not serve.
    gate: Core,
    // Whether it had a call since that was last asked.
    used: AtomicBool,
}

// === impl Ready ===

impl<S> Ready<S> {
    pub(crate) fn new(service: S, peer: &Peer, key: u64, limiter: Option<Arc<Limiter>>) -> Self {
        Self {
            service,
            load: Load::new(peer.clone()),
            key,
            limiter,
            lifeline: None,
            gate: Core::new(),
            used: AtomicBool::new(false),
        }
    }

    /// The same, with the life of its connections.
    pub(crate) fn with_lifeline(mut self, lifeline: Option<&Arc<dyn Lifeline>>) -> Self {
        self.lifeline = lifeline.cloned();
        self
    }

    /// How many connections take its calls.
    pub(crate) fn connections(&self) -> usize {
        self.lifeline.as_ref().map_or(1, |life| life.connections())
    }

    /// Has it make no connection beside those that it has.
    pub(crate) fn stop_dialling(&self) {
        if let Some(life) = &self.lifeline {
            life.stop_dialling();
        }
    }

    /// Counts a call in.
    #[inline]
    pub(crate) fn acquire(&self) -> Guard<Peer> {
        // Looked at first: a line that all threads read is not written to for nothing. Relaxed: idleness is a matter
        // of minutes.
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
        self.load.acquire()
    }

    /// Whether it has had a call since this was last asked, or has one now.
    pub(crate) fn take_used(&self) -> bool {
        self.used.swap(false, Ordering::Relaxed) || self.load.current() > 0
    }

    /// Whether a call has found it done for. One relaxed load: a pick that just misses it finds out for itself.
    pub(crate) fn is_down(&self) -> bool {
        !self.gate.is_open()
    }

    /// Takes it out of the picks, and lets its endpoint know. The first reason stays.
    pub(crate) fn mark_down(&self, why: impl Into<Cow<'static, str>>) {
        self.gate.shut(why);
    }

    /// Puts it back into the picks.
    pub(crate) fn mark_up(&self) {
        self.gate.open();
    }

    /// Returns when it is down, at once if it is already: the endpoint cannot miss it.
    pub(crate) async fn went_down(&self) {
        self.gate.went_shut().await;
    }
}

impl<S> fmt::Debug for Ready<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ready")
            .field("load", &self.load)
            .field("gate", &self.gate)
            .finish_non_exhaustive()
    }
}
