//! switchboard

pub mod backoff;
pub mod deadline;
pub mod discover;
pub mod endpoint;
pub mod error;
#[cfg(feature = "manager")]
pub mod manager;
pub mod pool;
#[cfg(feature = "transport")]
pub mod transport;

pub use backoff::Backoff;
pub use deadline::DeadlineLayer;
pub use error::{Error, Kind, Sent};
#[cfg(feature = "manager")]
pub use manager::{Channel, ConnectionManager};
pub use pool::{Instance, Pool, WaitForReady};
