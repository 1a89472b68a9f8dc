//! A whole server process: one same way in which every one of them starts, says how it is, and stops.
//!
//! ```text
//!  state         hooks hear      when
//!
//!  Initializing                  first of all: it can be seen from here on
//!    │           Declared        dependencies and watched roles are being connected
//!    │           Required        what is required is ready; the server listens (run)
//!    │                           its own registration begins, in the background
//!    │           Registered,     the registry has it
//!    │           or Activated    and it is the active one
//!  Healthy                       or StandBy while another is active, or Abnormal
//!    │                           a signal, shutdown(), stop(), the server's end
//!  Stopping      Stopping        health says NOT_SERVING
//!    │                           the session says so; callers move on (settle)
//!    │           Drained         the server has finished its calls (drain)
//!    │           Deregistered    the session is removed
//!    │           Stopped         the manager has stopped
//!  Stopped
//! ```
//!
//! A server that is tied to one:
//!
//! ```
//! use std::time::Duration;
//! use switchboard::{Component, ConnectionManager, MemoryRegistry, component::Step};
//! # use tokio_stream::wrappers::TcpListenerStream;
//! use tonic::transport::Server;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let registry = MemoryRegistry::new();
//! # let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
//! # let address = listener.local_addr()?.to_string();
//! # let incoming = TcpListenerStream::new(listener);
//! let manager = ConnectionManager::builder(registry).build();
//! let component = Component::builder("querycoord", manager.clone())
//!     .depends_on("rootcoord") // called; may be down, and come later
//!     .watches("querynode") // managed
//!     .advertise(address) // registered once the server listens there
//!     .drain(Duration::from_secs(10))
//!     .hook(|step| async move { println!("{step}") })
//!     .build()?;
//! let server = Server::builder()
//!     .add_service(component.health())
//!     // .add_service(..) the program's own
//!     .serve_with_incoming_shutdown(incoming, component.stopping());
//! # let component = std::sync::Arc::new(component);
//! # let same = component.clone();
//! # tokio::spawn(async move {
//! #     same.healthy().await.expect("it comes to this");
//! #     println!("{}", same.manager().status());
//! #     same.shutdown();
//! # });
//! component.run(server).await?; // until SIGTERM, or Ctrl-C
//! # Ok(())
//! # }
//! ```
//!
//! What a server must do at one of the steps it does in a [hook](Builder::hook). Its [state](ComponentState) is a
//! [`watch`](Component::states), stands in the manager's [`Status`](crate::manager::Status), is told as an
//! [event](crate::events::EventKind::Component), and is [served](HealthService) as `grpc.health.v1`.
//!
//! Nothing here waits for the registry or for another server, unless it is [required](Builder::require), and then for a time.

mod begin;
mod builder;
mod core;
mod follow;
mod health;
mod hook;
mod own;
mod plan;
mod run;
mod server;
mod shutdown;
mod state;
mod status;
mod stop;

use std::{
    fmt,
    future::Future,
    sync::{Arc, Mutex, atomic::AtomicBool, atomic::Ordering},
};

use tokio::{runtime, sync::watch, task::JoinSet};

pub(crate) use self::core::Core;
pub use self::{
    builder::Builder,
    health::{HealthService, HealthWatch},
    hook::{Outcome, Step},
    shutdown::Stopping,
    state::ComponentState,
    status::{ComponentStatus, DependencyStatus},
};
use crate::{
    error::{Error, Kind},
    manager::ConnectionManager,
};
#[doc(no_inline)]
pub use tonic_health::pb::health_server::HealthServer;

/// A server process: its start-up order, its state, its own registration.
///
/// It is had by [`start`](Builder::start), or by [`build`](Builder::build) for [`run`](Component::run). What happens to it
/// happens in tasks of its own; nothing of it needs to be polled. Put it into an `Arc` to share it. A process may have several
/// over one manager.
///
/// Dropping it removes its session in the background, as well as that can be done, and ends its tasks; its manager goes
/// on. [`stop`](Component::stop) waits, and takes the steps in order; one that has begun goes on when it is dropped.
///
/// ```
/// use switchboard::{Component, ConnectionManager, MemoryRegistry, component::ComponentState};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), switchboard::Error> {
/// let manager = ConnectionManager::builder(MemoryRegistry::new()).build();
/// let component = Component::builder("querycoord", manager.clone())
///     .depends_on("rootcoord").watches("querynode").advertise("10.0.0.4:19531")
///     .start().await?;
///
/// component.healthy().await?;
/// assert_eq!(component.state(), ComponentState::Healthy);
/// component.abnormal("the disk is full");
/// assert_eq!(component.state().to_string(), "Abnormal: the disk is full");
/// component.stop().await;
/// # Ok(())
/// # }
/// ```
#[must_use = "dropping it removes its session"]
pub struct Component {
    core: Arc<Core>,
    tasks: Tasks,
    begun: AtomicBool,
    ran: AtomicBool,
}

/// What runs for a component, and ends with it.
struct Tasks {
    runtime: runtime::Handle,
    all: Mutex<JoinSet<()>>,
}

// === impl Component ===

impl Component {
    /// A component of this role over this manager, to be configured. A role is 1 to 128 characters of
    /// `A-Z a-z 0-9 . _ -`.
    pub fn builder(role: impl Into<Arc<str>>, manager: ConnectionManager) -> Builder {
        Builder::new(role.into(), manager)
    }

    fn new(core: Arc<Core>, runtime: runtime::Handle) -> Self {
        Self {
            core,
            tasks: Tasks {
                runtime,
                all: Mutex::default(),
            },
            begun: AtomicBool::new(false),
            ran: AtomicBool::new(false),
        }
    }

    /// Names to the manager all that it depends on: each is watched and connected from here on.
    fn declare(&self) -> Result<(), Error> {
        let core = &self.core;
        for dependency in &core.dependencies {
            core.manager.depends_on(&dependency.role)?;
        }
        if core.dependencies.iter().any(|d| d.serving.is_some()) {
            self.tasks.spawn(core.clone().watch_needs());
        }
        Ok(())
    }

    async fn begin(&self) -> Result<(), Error> {
        self.begun.store(true, Ordering::Relaxed);
        self.core.begin(&self.tasks, false).await
    }

    /// Its role.
    pub fn role(&self) -> &str {
        self.core.role()
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.core.peer.id
    }

    /// The manager that it is over.
    pub fn manager(&self) -> &ConnectionManager {
        &self.core.manager
    }

    /// Where it stands at this moment.
    pub fn state(&self) -> ComponentState {
        self.core.state()
    }

    /// Where it stands, to be watched: the newest is always there, and whoever reads slowly misses those in between.
    /// It is closed after `Stopped`, when the component is dropped.
    ///
    /// What `borrow` and `wait_for` give is a lock on the state: let go of it before anything else is done with the
    /// component.
    pub fn states(&self) -> watch::Receiver<ComponentState> {
        self.core.states()
    }

    /// Waits until it is `Healthy`; one that stands by is not.
    ///
    /// # Errors
    ///
    /// [`Kind::Stopped`] if it is stopped instead. It has no time limit of its own.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future changes nothing.
    pub async fn healthy(&self) -> Result<(), Error> {
        let mut states = self.states();
        let settled = states.wait_for(|state| state.is_serving() || state.is_ending());
        match settled.await.as_deref() {
            Ok(ComponentState::Healthy) => Ok(()),
            _ => Err(Error::new(Kind::Stopped).with_role(&self.core.peer.role)),
        }
    }

    /// Says that it is abnormal, and why, by the program's own checks, until [`recovered`](Component::recovered). It
    /// shows in place of `Healthy` and `StandBy`; a start that is not done, and trouble with the registration, show all
    /// the same.
    ///
    /// It stays registered, and is called: only its state and its health tell.
    pub fn abnormal(&self, reason: impl Into<Arc<str>>) {
        self.core.say_abnormal(Some(reason.into()));
    }

    /// Takes back what [`abnormal`](Component::abnormal) said.
    pub fn recovered(&self) {
        self.core.say_abnormal(None);
    }

    /// The service `grpc.health.v1.Health`, to be added to its server, once: it answers for all components over the same
    /// manager. Where several share a server, take that of the one that runs it: who watches is let go of when that one
    /// drains. See [`HealthService`].
    pub fn health(&self) -> HealthServer<HealthService> {
        let core = &self.core;
        let health = HealthService::new(core.components.clone(), core.draining.clone());
        HealthServer::new(health)
    }

    /// What its server waits for before it drains: ready once it is being stopped, and callers have moved on.
    pub fn stopping(&self) -> Stopping {
        Stopping::new(self.core.draining.clone())
    }
}

impl Drop for Component {
    fn drop(&mut self) {
        let core = &self.core;
        // A stop under way goes on: all that is left is its own to end.
        if *core.stopper.borrow() == core::Stopper::Stop {
            return;
        }
        core.ending.cancel();
        // Nobody has it now: whoever else takes it borrows the component.
        if let Ok(mut registration) = core.registration.try_lock() {
            drop(registration.take());
        }
        core.draining.cancel();
        core.say_end(ComponentState::Stopped);
        core.components.remove(core);
    }
}

impl fmt::Debug for Component {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.core.fmt(f)
    }
}

// === impl Tasks ===

impl Tasks {
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut all = core::lock(&self.all);
        // What has ended is let go of here: there are few, and nobody waits for them.
        while all.try_join_next().is_some() {}
        all.spawn_on(task, &self.runtime);
    }
}

#[cfg(test)]
mod tests;
