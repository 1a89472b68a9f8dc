//! What a component is to be.

use std::{fmt, future::Future, sync::Arc, time::Duration};

use tokio::runtime;

use super::{
    Component,
    core::{Core, Dependency, Settings},
    hook::{Change, Hooks, Outcome, Step},
    plan::{check, session},
};
use crate::{
    InstanceId,
    error::{Error, Peer},
    manager::ConnectionManager,
    registry::{Register, Session},
};

/// Configures a [`Component`]; [`Component::builder`] makes it. What cannot work is an error of
/// [`start`](Builder::start) and [`build`](Builder::build), not before.
#[must_use = "nothing is started until `start`, or `build` and `run`"]
pub struct Builder {
    role: Arc<str>,
    manager: ConnectionManager,
    id: Option<InstanceId>,
    address: Option<Arc<str>>,
    change: Option<Change>,
    dependencies: Vec<Dependency>,
    hooks: Hooks,
    settings: Settings,
}

// === impl Builder ===

impl Builder {
    pub(super) fn new(role: Arc<str>, manager: ConnectionManager) -> Self {
        Self {
            role,
            manager,
            id: None,
            address: None,
            change: None,
            dependencies: Vec::new(),
            hooks: Hooks::default(),
            settings: Settings {
                exclusive: false,
                drain: Duration::from_secs(30),
                settle: Duration::from_millis(200),
                signals: true,
                keep_manager: false,
                listens_at: None,
            },
        }
    }

    /// A role whose servers this one calls. From its start on it is watched and connected in the background;
    /// nothing waits for it, unless [required](Builder::require).
    pub fn depends_on(mut self, role: impl Into<Arc<str>>) -> Self {
        self.dependency(role.into());
        self
    }

    /// A role whose servers this one manages. Those that are in the registry already are taken up at the start, each
    /// in a task of its own, and so is each that comes. The same as [`depends_on`](Builder::depends_on), by the name that
    /// says what it is for.
    pub fn watches(mut self, role: impl Into<Arc<str>>) -> Self {
        self.dependency(role.into());
        self
    }

    /// The address that it is registered with, `host:port`: where others reach it. Default: none; it is then only a
    /// client, registers nothing, and is `Healthy` once what it requires is ready.
    pub fn advertise(mut self, address: impl Into<Arc<str>>) -> Self {
        self.address = Some(address.into());
        self
    }

    /// Its id, unique in its role. Default: the address that it advertises; `pid-` and the process's id without one.
    pub fn id(mut self, id: impl Into<InstanceId>) -> Self {
        self.id = Some(id.into());
        self
    }

    /// What else its session says: version, metadata, weight, and whether it is
    /// [exclusive](Session::with_exclusive). Role and address stay. It needs an [address](Builder::advertise).
    ///
    /// ```no_run
    /// # use switchboard::{Component, ConnectionManager, MemoryRegistry, Session};
    /// # let manager = ConnectionManager::builder(MemoryRegistry::new()).build();
    /// let builder = Component::builder("querycoord", manager)
    ///     .advertise("10.0.0.4:19531")
    ///     .session(|session| session.with_version("2.6.0").with_exclusive(true));
    /// ```
    pub fn session(mut self, change: impl FnOnce(Session) -> Session + Send + 'static) -> Self {
        self.change = Some(match self.change.take() {
            None => Box::new(change),
            Some(first) => Box::new(move |session| change(first(session))),
        });
        self
    }

    /// Registers nothing before so many of a role are ready, and fails if they are not within this time. At least 1;
    /// 1 ms to 1 day. All that is required is waited for side by side. The role need not be named
    /// as a dependency as well. Default: nothing is required.
    ///
    /// Two servers that require each other never start.
    pub fn require(mut self, role: impl Into<Arc<str>>, n: usize, within: Duration) -> Self {
        self.dependency(role.into()).require = Some((n, within));
        self
    }

    /// Its [health](Component::health) is `SERVING` only while so many of a role are ready. At least 1. It changes
    /// nothing of its state, nor whether it is called. Followed within 100 ms. Default: it is `SERVING` without any.
    pub fn serving_needs(mut self, role: impl Into<Arc<str>>, n: usize) -> Self {
        // None is what is meant by not asking, and refused when it is asked for.
        self.dependency(role.into()).serving = Some(n);
        self
    }

    /// What is to be done at each [`Step`]. The next one waits until it is done; an error, or a panic, is that of the
    /// step:
    ///
    /// - `Declared` and `Required`: the start fails with it.
    /// - `Registered` and `Activated`: the component is `Abnormal` because of it, and the hook is told again after 1 s,
    ///   then ever later, up to 30 s, until it does not fail. It should bear that. It goes on while the registration
    ///   changes, is then told anew, and is dropped when the component stops.
    /// - `Deactivated`, and all of the stop: it is logged. In the stop the hooks of a step have 30 s together, and are
    ///   then dropped.
    ///
    /// Several hooks are told one after the other, up to the first that fails: those after it do not hear of the step.
    /// Before `Registered` there is no time limit but the user's own.
    ///
    /// A hook may call the component, and may ask it to [`shutdown`](Component::shutdown). It should not wait for what
    /// waits for itself: [`healthy`](Component::healthy) in any hook of the start, [`stop`](Component::stop) in one of the
    /// stop. It should hold it weakly ([`std::sync::Weak`]): the component holds its hooks.
    ///
    /// ```no_run
    /// # use switchboard::{Component, ConnectionManager, MemoryRegistry, component::Step};
    /// # async fn load() -> Result<(), std::io::Error> { Ok(()) }
    /// # let manager = ConnectionManager::builder(MemoryRegistry::new()).build();
    /// let builder = Component::builder("querycoord", manager).hook(|step| async move {
    ///     match step {
    ///         Step::Activated { .. } => load().await,
    ///         _ => Ok(()),
    ///     }
    /// });
    /// ```
    pub fn hook<F, Fut>(mut self, hook: F) -> Self
    where
        F: Fn(Step) -> Fut + Send + Sync + 'static,
        Fut: Future<Output: Outcome> + Send + 'static,
    {
        self.hooks.add(hook);
        self
    }

    /// How long its server may take to finish the calls in flight. Default 30 s; up to 1 day.
    pub fn drain(mut self, bound: Duration) -> Self {
        self.settings.drain = bound;
        self
    }

    /// The time between the registry's being told that it is stopping and its server's being told so: those who call
    /// it hear of it, and move on, before it refuses them. Default 200 ms; up to 60 s.
    pub fn settle(mut self, time: Duration) -> Self {
        self.settings.settle = time;
        self
    }

    /// Whether [`run`](Component::run) ends at SIGTERM and SIGINT (Ctrl-C on other systems than Unix). Default yes.
    ///
    /// From then on these signals no longer end the process by themselves, not even after `run`.
    pub fn signals(mut self, listen: bool) -> Self {
        self.settings.signals = listen;
        self
    }

    /// Whether the manager still runs when the component has stopped. Default no.
    pub fn keep_manager(mut self, keep: bool) -> Self {
        self.settings.keep_manager = keep;
        self
    }

    /// Where [`run`](Component::run) looks whether its server listens, `host:port`. Default: the address that it
    /// advertises, which may not lead back to it from where it runs itself.
    pub fn listens_at(mut self, address: impl Into<Arc<str>>) -> Self {
        self.settings.listens_at = Some(address.into());
        self
    }

    /// Starts it: declares its dependencies, waits for what it requires, and registers in the background. For a server
    /// that is already listening, or is run by other means; else see [`build`](Builder::build).
    ///
    /// Nothing waits for the registry, nor for anybody who is not required: it may all be down. The
    /// [state](Component::state) tells how far it is.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid), saying what is allowed, for what cannot work, or outside a tokio runtime;
    /// [`Kind::NotConnected`](crate::Kind::NotConnected), naming all that is missing, if what it requires is not ready in
    /// time; [`Kind::Component`](crate::Kind::Component) if a hook fails; [`Kind::Stopped`](crate::Kind::Stopped) if the
    /// manager is.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped nothing is left of it, but that the manager still connects the roles.
    pub async fn start(self) -> Result<Component, Error> {
        let component = self.build()?;
        component.begin().await?;
        Ok(component)
    }

    /// The same up to and without what takes time: dependencies are declared, and [`run`](Component::run) does the
    /// rest, and registers as soon as the server listens.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid), saying what is allowed, for what cannot work, or outside a tokio runtime;
    /// [`Kind::Stopped`](crate::Kind::Stopped) if the manager is.
    pub fn build(self) -> Result<Component, Error> {
        let runtime = runtime::Handle::try_current().map_err(|error| {
            Error::invalid("component", "made outside a tokio runtime").with_source(error)
        })?;
        check(&self.role, &self.dependencies, &self.settings)?;
        if self.address.is_none() {
            self.check_client()?;
        }
        let Self {
            role,
            manager,
            id,
            address,
            change,
            dependencies,
            hooks,
            mut settings,
        } = self;
        let bus = manager.bus().map_err(|error| error.with_role(&role))?;
        let (peer, register) = match address {
            Some(address) => {
                let session = session(role, address, id, change)?;
                let register: Register = manager.register(session.clone())?;
                settings.exclusive = session.is_exclusive();
                let (role, id) = (session.role_arc(), session.id_arc());
                let peer = Peer::new(role.clone(), id.clone(), session.address_arc().clone());
                (peer, Some(register))
            }
            None => {
                let id = id.unwrap_or_else(|| format!("pid-{}", std::process::id()).into());
                (Peer::new(role, id.0, ""), None)
            }
        };
        // The state first: who looks sees that it starts.
        let peer = Arc::new(peer);
        let core = Core::new(peer, manager, bus, dependencies, hooks, settings, register);
        let component = Component::new(core, runtime);
        component.declare()?;
        Ok(component)
    }

    /// What only makes sense for one that registers.
    fn check_client(&self) -> Result<(), Error> {
        let what = match (&self.change, &self.settings.listens_at) {
            (None, None) => return Ok(()),
            (Some(_), _) => "session",
            (None, Some(_)) => "listens_at",
        };
        let why = "it advertises no address, and so registers nothing; name one with advertise";
        Err(Error::invalid(what, why))
    }

    #[cfg(test)]
    pub(super) fn manager(&self) -> &ConnectionManager {
        &self.manager
    }

    fn dependency(&mut self, role: Arc<str>) -> &mut Dependency {
        let at = self.dependencies.iter().position(|d| d.role == role);
        let at = at.unwrap_or_else(|| {
            self.dependencies.push(Dependency {
                role,
                require: None,
                serving: None,
            });
            self.dependencies.len() - 1
        });
        &mut self.dependencies[at]
    }
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder")
            .field("role", &self.role)
            .field("id", &self.id)
            .field("address", &self.address)
            .field("dependencies", &self.dependencies)
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}
