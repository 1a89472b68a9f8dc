//! switchboard

pub mod backoff;
pub mod discover;
pub mod endpoint;
pub mod error;
pub mod pool;
#[cfg(feature = "registry")]
pub mod registry;
#[cfg(feature = "transport")]
pub mod transport;

pub use backoff::Backoff;
pub use error::{Error, Kind, Sent};
pub use pool::{Instance, Pool, WaitForReady};
#[cfg(feature = "registry")]
pub use registry::{MemoryRegistry, Registration, Registry, Session};
#[cfg(feature = "etcd")]
pub use registry::EtcdRegistry;
