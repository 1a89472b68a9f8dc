//! The handle on one's own session.

use std::{fmt, sync::Arc};

use super::{
    Session,
    codec::{self, Codec},
};
use crate::{
    endpoint::BoxFuture,
    error::{Error, Kind},
};

/// One's own session in a registry, kept alive until this is dropped.
///
/// Dropping it removes the session in the background, as well as that can be done;
/// [`Registration::deregister`] waits and says whether it could.
///
/// ```
/// use switchboard::{MemoryRegistry, Session};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), switchboard::Error> {
/// let registry = MemoryRegistry::new();
/// let mut registration = registry.register(Session::new("echo", "10.0.0.5:21123")).await?;
/// registration.update(|session| session.with_metadata("zone", "b")).await?;
/// registration.stopping().await?; // no new calls from here on
/// registration.deregister().await?;
/// # Ok(())
/// # }
/// ```
#[must_use = "dropping it removes the session"]
pub struct Registration {
    session: Arc<Session>,
    // None once it is given up.
    hold: Option<Box<dyn Hold>>,
}

/// What keeps a session in a registry.
pub(crate) trait Hold: fmt::Debug + Send + Sync {
    /// Writes the session anew, under the same key and lease.
    fn write<'a>(&'a self, session: &'a Arc<Session>) -> BoxFuture<'a, Result<(), Error>>;

    /// Removes the record and lets go of the lease.
    fn release(self: Box<Self>) -> BoxFuture<'static, Result<(), Error>>;

    /// The same in the background, with nobody to hear of it.
    fn release_in_background(self: Box<Self>);

    /// Keeps the lease alive no longer.
    fn abandon(self: Box<Self>);
}

// === impl Registration ===

impl Registration {
    pub(crate) fn new(session: Arc<Session>, hold: Box<dyn Hold>) -> Self {
        Self {
            session,
            hold: Some(hold),
        }
    }

    /// The session as it was last written.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Changes what the session says; its role and its id stay. Those who know it hear of it, and their
    /// connections stay, unless it is the address that changes.
    ///
    /// With another address it is the same instance, of the same generation, that has moved. Those who are
    /// connected to the old address give it no new calls, let the calls in flight there finish within their
    /// drain bound, and dial the new one. So listen at the new address first, and at the old for as long as its
    /// calls take. The id stays what it was, even where it was the old address by default:
    ///
    /// ```
    /// # use switchboard::{MemoryRegistry, Session};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), switchboard::Error> {
    /// # let registry = MemoryRegistry::new();
    /// let mut registration = registry.register(Session::new("echo", "10.0.0.5:21123")).await?;
    /// let moved = |session: Session| Session::new(session.role(), "10.0.0.6:21123").with_id(session.id());
    /// registration.update(moved).await?;
    /// assert_eq!(registration.session().id(), "10.0.0.5:21123");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] if the changed session cannot work, or has another role or id, or, with a registry that
    /// does I/O, outside a tokio runtime;
    /// [`Kind::RegistryUnreachable`] if the registry does not answer; [`Kind::SessionDeleted`] if the record is no
    /// longer there, or no longer this session's.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, or the registry does not answer, the change may have been made or not;
    /// [`Registration::session`] tells the old. To make it again does no harm.
    pub async fn update(&mut self, change: impl FnOnce(Session) -> Session) -> Result<(), Error> {
        let session = Arc::new(change(Session::clone(&self.session)));
        session.validate()?;
        if session.role() != self.session.role() || session.id() != self.session.id() {
            let why = "its role and its id make it itself and cannot change; register another";
            return Err(Error::invalid("session", why));
        }
        let Some(hold) = &self.hold else {
            return Err(Error::new(Kind::SessionDeleted));
        };
        hold.write(&session).await?;
        self.session = session;
        Ok(())
    }

    /// Says that the instance is stopping: it gets no new calls, and those in flight finish. An
    /// [`update`](Registration::update).
    ///
    /// # Errors
    ///
    /// As [`Registration::update`].
    pub async fn stopping(&mut self) -> Result<(), Error> {
        self.update(|session| session.with_stopping(true)).await
    }

    /// Removes the session, and returns when it is gone.
    ///
    /// # Errors
    ///
    /// [`Kind::RegistryUnreachable`] if the registry does not answer: then the session ends with its TTL.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, the session may live on until its TTL is over.
    pub async fn deregister(mut self) -> Result<(), Error> {
        match self.hold.take() {
            Some(hold) => hold.release().await,
            None => Ok(()),
        }
    }

    /// Leaves the session to its TTL, as a process does that is killed; for tests.
    pub fn abandon(mut self) {
        if let Some(hold) = self.hold.take() {
            hold.abandon();
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Some(hold) = self.hold.take() {
            hold.release_in_background();
        }
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration")
            .field("session", &self.session)
            .field("hold", &self.hold)
            .finish()
    }
}

/// The error of a session whose key is held by the record with this value.
pub(crate) fn held_by(codec: &dyn Codec, root: &str, session: &Session, value: &[u8]) -> Error {
    let key = codec.key(root, session);
    let holder = match codec::decode(codec, root, session.role(), &key, value) {
        Ok(Some(holder)) => {
            let version = match holder.version() {
                "" => String::new(),
                version => format!(", version {version}"),
            };
            format!("instance {} at {}{version}", holder.id(), holder.address())
        }
        Ok(None) => "a record that is no session of this role".to_owned(),
        Err(bad) => format!("a record that is no session ({bad})"),
    };
    Error::new(Kind::AlreadyRegistered)
        .with_role(session.role_arc())
        .with_reason(format!("key {key} is held by {holder}"))
}
