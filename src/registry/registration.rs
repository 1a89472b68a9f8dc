//! The handle on one's own session.

mod told;

use std::{fmt, future::IntoFuture, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, oneshot},
    task::AbortHandle,
};

pub(super) use self::told::Board;
pub use self::told::{Holder, RegistrationEvent, RegistrationEvents, RegistrationState};
use super::{
    Session, codec,
    home::Home,
    keeper::{self, First, Keeper, Update},
};
use crate::{
    backoff::{Backoff, check_duration},
    endpoint::BoxFuture,
    error::{Error, Kind},
};

/// A registration in the making: await it.
///
/// It ends with the [`Registration`] once the registry has the session under a lease, which is kept alive in
/// the background, at a third of the TTL, until the handle is dropped. For an
/// [exclusive](Session::with_exclusive) session it ends also when another is active: this one then stands by.
///
/// The key of an earlier registration of the same role, id and address is taken over at once: that was this
/// very instance, before it was restarted, for two cannot listen at one address. If it lives all the same it ends.
/// A registration of this process, through a clone of the same registry, is not taken over while its handle lives.
///
/// ```
/// use std::time::Duration;
/// use switchboard::{MemoryRegistry, Session};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), switchboard::Error> {
/// # let registry = MemoryRegistry::new();
/// let session = Session::new("echo", "10.0.0.5:21123").with_id(7);
/// let registration = registry.register(session).wait(Duration::from_secs(15))?.await?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
///
/// [`Kind::Invalid`] if the session cannot work, or outside a tokio runtime;
/// [`Kind::AlreadyRegistered`], naming the holder, if somebody else has its key, if only a process that
/// is gone and whose TTL is not over; [`Kind::RegistryUnreachable`] if the registry does not answer;
/// [`Kind::RegistryRefused`] if it does not take the record, as where its user may not write.
///
/// # Cancel safety
///
/// When the future is dropped, what it may have written is removed in the background.
#[must_use = "nothing is registered until it is awaited"]
#[derive(Debug)]
pub struct Register {
    home: Home,
    session: Session,
    first: First,
}

/// One's own session in a registry, kept alive until this is dropped.
///
/// A task of its own keeps the lease alive and looks after the record. What is lost (the lease ran out, somebody
/// deleted the key, the registry was down for longer than the TTL or lost its data) is registered again by
/// itself, under the same id, as another generation; [`Registration::events`] tells of it. Nothing of that
/// needs the handle to be polled.
///
/// Dropping it removes the session in the background, as well as that can be done;
/// [`Registration::deregister`] waits and says whether it could. A process that dies leaves the session to its
/// TTL, and so does a runtime that ends.
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
    board: Board,
    updates: mpsc::Sender<Update>,
    /// Dropped to release it; sent through to hear of that.
    release: Option<oneshot::Sender<Release>>,
    /// While this lives, nobody in this process takes it over.
    _handle: Arc<()>,
    task: AbortHandle,
}

/// Where the result of a release goes.
pub(super) type Release = oneshot::Sender<Result<(), Error>>;

// === impl Register ===

impl Register {
    pub(super) fn new(home: Home, session: Session) -> Self {
        Self {
            home,
            session,
            first: First::Refuse,
        }
    }

    /// If somebody else has its key, or the registry does not answer, waits until that is over, for so long at most,
    /// and a request's time. Default: that is an error at once. 1 ms to 1 day. It makes no difference to an exclusive session, which stands by.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] outside these bounds.
    pub fn wait(mut self, within: Duration) -> Result<Self, Error> {
        let least = Duration::from_millis(1);
        check_duration("wait", within, least, Backoff::LONGEST)?;
        self.first = First::Wait(within);
        Ok(self)
    }

    /// Does not wait for the registry: awaiting it ends at once, and it is registered in the background as soon
    /// as the registry answers and its key is free. Only what can never work is an error.
    ///
    /// So a server can start while etcd is down. [`Registration::registered`] waits for it.
    pub fn background(mut self) -> Self {
        self.first = First::Background;
        self
    }
}

impl IntoFuture for Register {
    type Output = Result<Registration, Error>;
    type IntoFuture = BoxFuture<'static, Result<Registration, Error>>;

    fn into_future(self) -> Self::IntoFuture {
        let Self {
            home,
            session,
            first,
        } = self;
        Box::pin(async move {
            let runtime = keeper::current_runtime()?;
            session.validate()?;
            // What the format cannot hold is better said here than in a log.
            codec::encode(&*home.codec, &session, i64::MAX)?;
            let session = Arc::new(session);
            let board = Board::new();
            // One at a time: a handle has one owner.
            let (updates, updated) = mpsc::channel(1);
            let (release, released) = oneshot::channel();
            let (outcome, told) = oneshot::channel();
            let handle = Arc::new(());
            let weak = Arc::downgrade(&handle);
            let keeper = Keeper::new(home, session.clone(), board.clone(), updated, weak);
            let task = runtime.spawn(keeper.run(first, outcome, released));
            let registration = Registration {
                session,
                board,
                updates,
                release: Some(release),
                _handle: handle,
                task: task.abort_handle(),
            };
            match told.await {
                Ok(Ok(())) => Ok(registration),
                Ok(Err(error)) => Err(error),
                Err(_) => Err(registration.ended()),
            }
        })
    }
}

// === impl Registration ===

impl Registration {
    /// The session as it was last given to the registry.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Where it stands at this moment.
    pub fn state(&self) -> RegistrationState {
        self.board.state().clone()
    }

    /// Where it stands, from here on.
    #[cfg(feature = "component")]
    pub(crate) fn states(&self) -> tokio::sync::watch::Receiver<RegistrationState> {
        self.board.states()
    }

    /// What happens to it, beginning with where it stands.
    pub fn events(&self) -> RegistrationEvents {
        self.board.events()
    }

    /// Waits until the registry has it, and an exclusive one is active; returns its generation.
    ///
    /// # Errors
    ///
    /// [`Kind::SessionDeleted`] if it has ended. It has no time limit of its own.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future changes nothing.
    pub async fn registered(&self) -> Result<u64, Error> {
        let mut states = self.board.states();
        let settled = states.wait_for(|state| {
            matches!(
                state,
                RegistrationState::Registered { .. }
                    | RegistrationState::Unreachable { .. }
                    | RegistrationState::Ended
            )
        });
        match settled.await.as_deref() {
            Ok(
                RegistrationState::Registered { generation }
                | RegistrationState::Unreachable { generation, .. },
            ) => Ok(*generation),
            _ => Err(self.ended()),
        }
    }

    /// Changes what the session says; its role, its id and whether it is exclusive stay. Those who know it hear
    /// of it, and their connections stay, unless it is the address that changes.
    ///
    /// Only its own generation is written over. While the registry does not have it (it was lost, or taken, or
    /// stands by) the change is kept, and written when it is registered again.
    ///
    /// With another address it is the same instance, of the same generation, that has moved. Those who are
    /// connected to the old address dial the new one, and go on calling the old until they are connected there (or have lost
    /// it where it was); the calls in flight there finish within their drain bound. So listen at the old address until
    /// nobody is connected to it. The id stays what it was, even where it was the old address by default:
    ///
    /// ```
    /// # use switchboard::{MemoryRegistry, Session};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), switchboard::Error> {
    /// # let registry = MemoryRegistry::new();
    /// let mut registration = registry.register(Session::new("echo", "10.0.0.5:21123")).await?;
    /// registration.update(|session| session.with_address("10.0.0.6:21123")).await?;
    /// assert_eq!(registration.session().id(), "10.0.0.5:21123");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] if the changed session cannot work, or is another by role or id;
    /// [`Kind::RegistryUnreachable`] if the registry had it and does not answer; [`Kind::RegistryRefused`] if it does
    /// not take the change; [`Kind::SessionDeleted`] if it has
    /// [ended](RegistrationState::Ended).
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, or the registry does not answer, the change may have been made or not;
    /// [`Registration::session`] tells the old. To make it again does no harm.
    pub async fn update(&mut self, change: impl FnOnce(Session) -> Session) -> Result<(), Error> {
        let session = Arc::new(change(Session::clone(&self.session)));
        session.validate()?;
        if session.role() != self.session.role()
            || session.id() != self.session.id()
            || session.is_exclusive() != self.session.is_exclusive()
        {
            let why = "its role, its id and whether it is exclusive make it itself and cannot change; register another";
            return Err(Error::invalid("session", why));
        }
        let (reply, written) = oneshot::channel();
        let update = Update {
            session: session.clone(),
            reply,
        };
        self.updates.send(update).await.map_err(|_| self.ended())?;
        written.await.map_err(|_| self.ended())??;
        self.session = session;
        Ok(())
    }

    /// Says that the instance is stopping: it gets no new calls, and those in flight finish. An
    /// [`update`](Registration::update).
    ///
    /// # Errors
    ///
    /// As [`Registration::update`].
    ///
    /// # Cancel safety
    ///
    /// As [`Registration::update`].
    pub async fn stopping(&mut self) -> Result<(), Error> {
        self.update(|session| session.with_stopping(true)).await
    }

    /// Removes the session, and returns when it is gone.
    ///
    /// # Errors
    ///
    /// [`Kind::RegistryUnreachable`] if the registry does not answer; [`Kind::SessionDeleted`] if it has
    /// [ended](RegistrationState::Ended) before: then the key is its successor's, or the session ends with its TTL.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, it goes on in the background.
    pub async fn deregister(mut self) -> Result<(), Error> {
        let (reply, released) = oneshot::channel();
        if let Some(release) = self.release.take() {
            let _ = release.send(reply);
        }
        released.await.map_err(|_| self.ended())?
    }

    /// Leaves the session to its TTL, as a process does that is killed; for tests.
    pub fn abandon(self) {
        self.task.abort();
    }

    fn ended(&self) -> Error {
        Error::new(Kind::SessionDeleted)
            .with_role(self.session.role_arc())
            .with_reason(
                "its registration has ended: its successor registered, or its runtime is gone",
            )
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration")
            .field("session", &self.session)
            .field("state", &*self.board.state())
            .finish_non_exhaustive()
    }
}
