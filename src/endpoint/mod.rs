//! One peer: how it is connected, how loaded it is, and the guard that a response body holds.
//!
//! An endpoint stands for one *generation* of one session. It dials in a task of its own, and lives
//! until its session is gone; a session that comes back is another endpoint, even at the same address.

mod connect;
pub(crate) mod limiter;
pub(crate) mod load;
pub(crate) mod ready;
pub(crate) mod step;
pub(crate) mod task;
pub(crate) mod turn;

pub use connect::{BoxFuture, Connect, Connected, Health, Lifeline, Provided, Target, UseProvided};
pub(crate) use connect::{Dialing, HealthStream};

pub use crate::error::{BoxError, Peer, SharedError};
