//! What the calls to one target have in common: how they are configured, when they are left alone, and how many were made again.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicU64, Ordering},
};

use arc_swap::ArcSwapOption;

use super::throttle::Throttle;
#[cfg(doc)]
use super::{HedgingPolicy, RetryPolicy};
use crate::config::{Repeat, SharedConfig};

/// What calls to one target have in common: their configuration, and the bucket of its throttle.
#[derive(Debug, Default)]
pub(crate) struct Target {
    config: SharedConfig,
    throttle: ArcSwapOption<Throttle>,
    // Written when a call is made again, which is seldom.
    unprocessed: AtomicU64,
    by_policy: AtomicU64,
    hedged: AtomicU64,
}

/// How many attempts were made after the first ones of their calls, since the service or the role began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Repeated {
    /// Because the one before was certainly not processed.
    pub unprocessed: u64,
    /// By a [`RetryPolicy`].
    pub by_policy: u64,
    /// By a [`HedgingPolicy`], beside others of the same call.
    pub hedged: u64,
}

/// Why there is another attempt.
#[derive(Clone, Copy, Debug)]
pub(super) enum Again {
    Unprocessed,
    ByPolicy,
    Hedged,
}

/// One clone's handle on its target, for those of its calls that are counted: so their counting is no count that all
/// threads write. Made when it is first asked for, as most have no throttle.
#[derive(Debug, Default)]
pub(crate) struct OwnTarget(OnceLock<Arc<Counted>>);

/// A target, held once for all calls of a clone that are counted.
#[derive(Debug)]
pub(super) struct Counted(pub(super) Arc<Target>);

// === impl Repeated ===

impl Repeated {
    /// All together.
    pub const fn total(&self) -> u64 {
        self.unprocessed + self.by_policy + self.hedged
    }
}

// === impl OwnTarget ===

impl OwnTarget {
    pub(super) fn of(&self, target: &Arc<Target>) -> Arc<Counted> {
        let counted = self.0.get_or_init(|| Arc::new(Counted(target.clone())));
        counted.clone()
    }
}

// === impl Target ===

impl Target {
    pub(crate) fn new(config: SharedConfig) -> Self {
        Self {
            config,
            ..Self::default()
        }
    }

    pub(super) fn count(&self, again: Again) {
        let count = match again {
            Again::Unprocessed => &self.unprocessed,
            Again::ByPolicy => &self.by_policy,
            Again::Hedged => &self.hedged,
        };
        count.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn repeated(&self) -> Repeated {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Repeated {
            unprocessed: read(&self.unprocessed),
            by_policy: read(&self.by_policy),
            hedged: read(&self.hedged),
        }
    }

    pub(crate) const fn config(&self) -> &SharedConfig {
        &self.config
    }

    /// How the calls of a method are made again.
    pub(super) fn repeat(&self, path: &str) -> Repeat {
        match self.config.is_plain() {
            true => Repeat::Transparent,
            false => *self.config.load().for_path(path).repeat(),
        }
    }

    /// Whether how calls end is counted.
    #[inline]
    pub(super) fn is_throttled(&self) -> bool {
        self.config.is_throttled()
    }

    /// A call has gone well. The bucket is full if there is none yet; one of a configuration that was replaced is there until the
    /// first failure.
    pub(super) fn succeeded(&self) {
        if let Some(throttle) = &*self.throttle.load() {
            throttle.succeeded();
        }
    }

    /// Its throttle, if one is configured now.
    pub(super) fn throttle(&self) -> Option<Arc<Throttle>> {
        if !self.is_throttled() {
            return None;
        }
        let wanted = self.config.load().throttled()?;
        let is_wanted = |throttle: &&Arc<Throttle>| throttle.throttling() == wanted;
        if let Some(throttle) = self.throttle.load().as_ref().filter(is_wanted) {
            return Some(throttle.clone());
        }
        // The first, or one in the place of another.
        self.throttle.rcu(|before| match before {
            Some(there) if is_wanted(&there) => Some(there.clone()),
            Some(other) => Some(Arc::new(Throttle::like(other, wanted))),
            None => Some(Arc::new(Throttle::new(wanted))),
        });
        self.throttle.load_full()
    }
}
