//! Gates: whether calls go through, decided by somebody who knows better than the calls.
//!
//! A gate is a switch between those who call a service and one who knows how it is: a health check, a
//! session in a registry, an operator. While it is *open*, calls pass and pay a few nanoseconds for it. While it is
//! *shut*, they fail in nanoseconds with the reason that it was given, instead of waiting for a server that is
//! known to be gone. While it is *half open*, one call at a time, the probe, is let through to find out:
//!
//! ```text
//!  Open ─── shut(why) ──▶ Shut ─── half_open() ──▶ HalfOpen
//!   ▲                     │  ▲                        │
//!   ├────── open() ───────┘  └── Bad, or shut(why) ───┤
//!   └────────────── Good, or open() ──────────────────┘   Unknown: the next call is a probe
//! ```
//!
//! [`GateLayer`] puts a [`Gate`] before any tower service; the gate itself is a handle to keep, to clone, and to
//! flip from anywhere, at once:
//!
//! ```
//! use switchboard::{Error, Gate, GateLayer, Kind, gate::GateState};
//! use tower::{Service as _, ServiceBuilder, ServiceExt as _, service_fn};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Error> {
//! let gate = Gate::new();
//! let mut service = ServiceBuilder::new()
//!     .layer(GateLayer::new(gate.clone()))
//!     .service(service_fn(|name: &str| {
//!         let greeting = format!("hello {name}");
//!         async { Ok::<_, Error>(greeting) }
//!     }));
//! assert_eq!(service.ready().await?.call("Ann").await?, "hello Ann");
//!
//! gate.shut("maintenance");
//! let error = service.ready().await?.call("Ann").await.unwrap_err();
//! assert_eq!(error.kind(), Kind::Shut);
//! assert_eq!(error.to_string(), "gate shut: maintenance");
//!
//! gate.half_open(); // the next call is the probe, and goes well: the gate opens
//! assert_eq!(service.ready().await?.call("Bob").await?, "hello Bob");
//! assert_eq!(gate.state(), GateState::Open);
//! # Ok(())
//! # }
//! ```
//!
//! # What it is not
//!
//! No circuit breaker: it counts no failures and has no clock. Calls through an open gate are not judged, whatever
//! becomes of them; only a probe is, when its response, without the response's body, is there. Who shuts it, and
//! when to half open it, is for others to say. Nor does it touch calls that are under way: they go on when it shuts.

mod classify;
mod core;
mod layer;

use std::{borrow::Cow, fmt, sync::Arc, time::SystemTime};

pub(crate) use self::core::Core;
pub use self::{
    classify::{Classify, GrpcStatus, OkIsGood, Verdict},
    layer::{GateLayer, Gated, ResponseFuture},
};
use self::{core::Inside, layer::Slot};
use crate::{
    error::{Error, Kind},
    sync::Padded,
};

/// A switch that lets calls through or not; all clones are the same one.
///
/// See the [module](self) for what it is for. Its methods never wait, and may be called from anywhere, in a runtime
/// or not. What they do holds for every call that is made after they have returned.
#[derive(Clone)]
pub struct Gate {
    // Padded: clones are counted next to it, and that would slow down those who only look.
    core: Arc<Padded<Core>>,
}

/// What a [`Gate`] does with calls.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GateState {
    /// It lets them through.
    Open,
    /// It lets one through, the probe, and fails all others until that has its verdict.
    HalfOpen {
        /// Since when.
        since: SystemTime,
        /// Why it was shut before.
        reason: Cow<'static, str>,
    },
    /// It fails them.
    Shut {
        /// Since when; a probe that fails shuts it anew.
        since: SystemTime,
        /// Why, and what the last probe failed with, if there was one.
        reason: Cow<'static, str>,
    },
}

/// What becomes of a [`Gate`], told to one who reacts to it. From [`Gate::watch`].
#[derive(Clone, Debug)]
pub struct Watch {
    gate: Gate,
    seen: u64,
}

// === impl Gate ===

impl Gate {
    /// An open gate.
    pub fn new() -> Self {
        Self {
            core: Arc::new(Padded(Core::new())),
        }
    }

    /// Lets calls through. `false` if it did already.
    pub fn open(&self) -> bool {
        self.core.open()
    }

    /// Fails calls from now on, with this reason: a few words without a full stop. Calls under way go on; a
    /// probe among them decides nothing any more.
    ///
    /// `false` if it was shut already: then the first reason stays.
    pub fn shut(&self, reason: impl Into<Cow<'static, str>>) -> bool {
        self.core.shut(reason)
    }

    /// Lets one call through as a probe, whose verdict opens it or shuts it again. A probe that never ends holds its
    /// place until it is dropped: shut the gate to give the next one a chance.
    ///
    /// `false`, and nothing changes, unless it was shut: an open gate needs no probe.
    pub fn half_open(&self) -> bool {
        self.core.half_open()
    }

    /// Whether it lets every call through: one relaxed atomic load.
    pub fn is_open(&self) -> bool {
        self.core.is_open()
    }

    /// What it does with calls at this moment, since when, and why.
    pub fn state(&self) -> GateState {
        self.core.look(Inside::state)
    }

    /// Watches it, from its state at this moment on.
    ///
    /// ```
    /// # use switchboard::{Gate, gate::GateState};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() {
    /// let gate = Gate::new();
    /// let mut watch = gate.watch();
    /// gate.shut("maintenance");
    /// // It was flipped before anybody waited: that is not missed.
    /// assert!(matches!(watch.changed().await, GateState::Shut { .. }));
    /// # }
    /// ```
    pub fn watch(&self) -> Watch {
        Watch {
            gate: self.clone(),
            seen: self.core.look(|inside| inside.epoch),
        }
    }

    /// The error of a call that it did not let through.
    fn refusal(&self) -> Error {
        let error = Error::new(Kind::Shut);
        match self.core.reason() {
            none if none.is_empty() => error,
            reason => error.with_reason(reason),
        }
    }

    fn take_slot(&self) -> Option<Slot> {
        let epoch = self.core.take_slot()?;
        Some(Slot::new(self.clone(), epoch))
    }
}

impl Default for Gate {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Gate").field(&self.core.0).finish()
    }
}

// === impl GateState ===

impl fmt::Display for GateState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, reason) = match self {
            Self::Open => ("open", ""),
            Self::HalfOpen { reason, .. } => ("half open", &**reason),
            Self::Shut { reason, .. } => ("shut", &**reason),
        };
        f.write_str(name)?;
        match reason {
            "" => Ok(()),
            _ => write!(f, ": {reason}"),
        }
    }
}

// === impl Watch ===

impl Watch {
    /// The gate's state, once it has been flipped since this was made, or last told.
    ///
    /// Of several flips in between only the last is told, so it may be the state that was told before. A probe that
    /// begins, or ends without a verdict, is no flip. Cancel safe: what was not told is told the next time.
    /// Never returns while nobody flips it.
    pub async fn changed(&mut self) -> GateState {
        let seen = self.seen;
        let found = self.gate.core.until(|inside| {
            let flipped = inside.epoch != seen;
            flipped.then(|| (inside.epoch, inside.state()))
        });
        let (epoch, state) = found.await;
        self.seen = epoch;
        state
    }
}

#[cfg(all(test, switchboard_loom))]
mod loom_tests;

#[cfg(test)]
mod tests;
