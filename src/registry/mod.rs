//! What is registered: sessions, the records that hold them, and the places that hold the records.
//!
//! [`MemoryRegistry`] is in this process, for tests and for programs of one process; `EtcdRegistry` (feature
//! `etcd`) is etcd; [`Fixed`] is a list that never changes. All three are a [`Registry`]: something that tells
//! what sessions a role has.
//!
//! The first two also take sessions: `register` makes a [`Registration`], which keeps a session there, under a
//! lease, for as long as its handle lives. Both have one engine, so what is tested in memory holds in etcd:
//!
//! ```
//! use futures_util::StreamExt as _;
//! use switchboard::{MemoryRegistry, Session, registry::RegistrationEvent};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), switchboard::Error> {
//! let registry = MemoryRegistry::new();
//! let registration = registry.register(Session::new("echo", "10.0.0.5:21123").with_id(7)).await?;
//! let mut events = registration.events();
//!
//! // Somebody deletes its key: it is registered again by itself.
//! registry.delete("echo/7");
//! let mut seen = Vec::new();
//! while !matches!(seen.last(), Some(RegistrationEvent::Restored { .. })) {
//!     seen.extend(events.next().await);
//! }
//! assert!(matches!(seen[0], RegistrationEvent::Registered { .. }));
//! assert!(matches!(seen[1], RegistrationEvent::Lost { .. }));
//! # Ok(())
//! # }
//! ```
//!
//! How a session stands in keys and values is a [`Codec`]'s: [`Naming`], as grpc-go has it, or [`Milvus`].

pub(crate) mod codec;
#[cfg(feature = "etcd")]
mod etcd;
pub(crate) mod feed;
mod fixed;
mod home;
mod keeper;
mod memory;
mod registration;
pub(crate) mod session;
pub(crate) mod store;

use std::{fmt, sync::Arc};

#[cfg(feature = "etcd")]
pub use self::etcd::{EtcdBuilder, EtcdRegistry};
pub use self::{
    codec::{BadRecord, Codec, Milvus, Naming},
    fixed::Fixed,
    memory::MemoryRegistry,
    registration::{
        Holder, Register, Registration, RegistrationEvent, RegistrationEvents, RegistrationState,
    },
    session::Session,
};
use crate::{discover::Discovery, error::Error};

/// What `crate::fuzzing` looks at.
#[cfg(all(feature = "etcd", any(fuzzing, test)))]
pub(crate) mod inside {
    pub(crate) use super::etcd::{
        address_of, pb,
        store::{LARGEST_PAGE, end_of, event, next_limit},
    };
}

/// Where sessions are kept, as those who look for them see it.
///
/// ```
/// use std::sync::Arc;
/// use switchboard::{MemoryRegistry, Registry};
///
/// let registry: Arc<dyn Registry> = Arc::new(MemoryRegistry::new());
/// let discovery = registry.discover("echo")?;
/// assert!(registry.discover("no spaces").is_err());
/// # Ok::<(), switchboard::Error>(())
/// ```
pub trait Registry: fmt::Debug + Send + Sync + 'static {
    /// The sessions of this role, now and from now on. Returns at once, whether the registry can be
    /// reached or not: the stream says so, and goes on when it can.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid) if this cannot be a role: see [`Session::validate`].
    fn discover(&self, role: &str) -> Result<Discovery, Error>;

    /// Registers a session, where this is a registry that takes any; what `register` is for those whose type is
    /// known. Default: it takes none.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid) if it takes none.
    fn register_session(&self, session: Session) -> Result<Register, Error> {
        let role = session.role_arc();
        let why = "it only tells what is there, and takes no sessions";
        Err(Error::invalid("registry", why).with_role(role))
    }
}

impl<R: Registry + ?Sized> Registry for Arc<R> {
    fn discover(&self, role: &str) -> Result<Discovery, Error> {
        (**self).discover(role)
    }

    fn register_session(&self, session: Session) -> Result<Register, Error> {
        (**self).register_session(session)
    }
}
