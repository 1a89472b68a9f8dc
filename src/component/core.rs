//! What all parts of a component share.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, atomic::AtomicBool, atomic::Ordering},
    time::{Duration, SystemTime},
};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    hook::{Hooks, Step},
    state::{ComponentState, Standing},
};
use crate::{
    error::{Error, Peer},
    events::{Bus, EventKind},
    manager::{Components, ConnectionManager},
    registry::{Register, Registration, RegistrationState},
};

/// How long a hook may take while the component stops.
const HOOK: Duration = Duration::from_secs(30);

pub(crate) struct Core {
    /// Who it is; the address is empty if it advertises none.
    pub(super) peer: Arc<Peer>,
    pub(super) manager: ConnectionManager,
    bus: Bus,
    /// The manager's list, that this one is in.
    pub(super) components: Arc<Components>,
    pub(super) dependencies: Vec<Dependency>,
    pub(super) hooks: Hooks,
    pub(super) settings: Settings,
    /// What the health service of this process knows and no other does: by it the server that listens is told from
    /// another at the same address.
    pub(super) token: String,
    standing: Mutex<Standing>,
    /// What is to be told of it.
    untold: Mutex<Untold>,
    states: watch::Sender<ComponentState>,
    since: Mutex<SystemTime>,
    /// Whether all that it needs to serve was ready when that was last looked at. All who ask for its health see this,
    /// and are told when it changes.
    has_needs: AtomicBool,
    /// Its registration before it is begun.
    pub(super) register: Mutex<Option<Register>>,
    pub(super) registration: tokio::sync::Mutex<Option<Registration>>,
    pub(super) registered: OnceLock<watch::Receiver<RegistrationState>>,
    /// How often it was asked to stop.
    pub(super) requests: watch::Sender<u32>,
    /// Who stops it.
    pub(super) stopper: watch::Sender<Stopper>,
    /// Its stop has begun: what its registration says is nobody's business any more.
    pub(super) ending: CancellationToken,
    /// Its session is being removed: whoever changes it lets go of it.
    pub(super) leaving: CancellationToken,
    /// Its server is to take no new calls.
    pub(super) draining: CancellationToken,
    /// It needs the manager no more.
    pub(super) done: AtomicBool,
}

/// States that events have not been told of. One at a time tells them, in their order and under no lock: who is told,
/// such as a subscriber of `tracing`, may change the state again.
#[derive(Debug, Default)]
struct Untold {
    states: VecDeque<ComponentState>,
    is_being_told: bool,
}

/// A role that a component depends on or watches.
#[derive(Clone, Debug)]
pub(super) struct Dependency {
    pub(super) role: Arc<str>,
    /// So many have to be ready before it is registered, within this time.
    pub(super) require: Option<(usize, Duration)>,
    /// So many have to be ready for it to be `SERVING`.
    pub(super) serving: Option<usize>,
}

#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) exclusive: bool,
    pub(super) drain: Duration,
    pub(super) settle: Duration,
    pub(super) signals: bool,
    pub(super) keep_manager: bool,
    pub(super) listens_at: Option<Arc<str>>,
}

/// Who does the stop: one at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stopper {
    Nobody,
    /// `run`, from its beginning.
    Run,
    /// `stop`.
    Stop,
}

// === impl Core ===

impl Core {
    pub(super) fn new(
        peer: Arc<Peer>,
        manager: ConnectionManager,
        bus: Bus,
        dependencies: Vec<Dependency>,
        hooks: Hooks,
        settings: Settings,
        register: Option<Register>,
    ) -> Arc<Self> {
        let components = manager.components().clone();
        let has_needs = AtomicBool::new(dependencies.iter().all(|d| d.serving.is_none()));
        let core = Arc::new(Self {
            peer,
            manager,
            bus,
            components,
            dependencies,
            hooks,
            settings,
            token: format!("component-{:032x}", fastrand::u128(..)),
            states: watch::Sender::new(Standing::new().current()),
            standing: Mutex::new(Standing::new()),
            untold: Mutex::default(),
            since: Mutex::new(SystemTime::now()),
            has_needs,
            register: Mutex::new(register),
            registration: tokio::sync::Mutex::default(),
            registered: OnceLock::new(),
            requests: watch::Sender::new(0),
            stopper: watch::Sender::new(Stopper::Nobody),
            ending: CancellationToken::new(),
            leaving: CancellationToken::new(),
            draining: CancellationToken::new(),
            done: AtomicBool::new(false),
        });
        core.components.add(&core);
        lock(&core.untold).states.push_back(core.state());
        core.components.changed();
        core.tell_states();
        core
    }

    pub(super) fn state(&self) -> ComponentState {
        self.states.borrow().clone()
    }

    pub(super) fn states(&self) -> watch::Receiver<ComponentState> {
        self.states.subscribe()
    }

    pub(super) fn since(&self) -> SystemTime {
        *lock(&self.since)
    }

    /// What follows from its start and its registration.
    pub(super) fn say(&self, state: ComponentState) {
        self.change(|standing| standing.base(state));
    }

    /// What the program says.
    pub(super) fn say_abnormal(&self, why: Option<Arc<str>>) {
        self.change(|standing| standing.abnormal(why));
    }

    /// `Stopping` or `Stopped`.
    pub(super) fn say_end(&self, state: ComponentState) {
        self.change(|standing| standing.end(state));
    }

    fn change(&self, change: impl FnOnce(&mut Standing)) {
        let mut standing = lock(&self.standing);
        change(&mut standing);
        let state = standing.current();
        if *self.states.borrow() == state {
            return;
        }
        *lock(&self.since) = SystemTime::now();
        self.states.send_replace(state.clone());
        // Under the lock: in the order in which it was so.
        lock(&self.untold).states.push_back(state);
        drop(standing);
        self.components.changed();
        self.tell_states();
    }

    fn tell_states(&self) {
        loop {
            let state = {
                let mut untold = lock(&self.untold);
                // Who is at it, further down or elsewhere, tells this one too.
                if untold.is_being_told {
                    return;
                }
                let Some(state) = untold.states.pop_front() else {
                    return;
                };
                untold.is_being_told = true;
                state
            };
            let peer = self.peer.clone();
            // It does not panic.
            self.tell(EventKind::Component { peer, state });
            lock(&self.untold).is_being_told = false;
        }
    }

    pub(super) fn tell(&self, kind: EventKind) {
        self.bus.tell(&self.peer.role, kind);
    }

    /// Tells the hooks a step of the start.
    pub(super) async fn hook(&self, step: Step) -> Result<(), Error> {
        self.hooks.tell(&self.peer, step).await
    }

    /// Tells the hooks a step of the stop, which goes on whatever they do.
    pub(super) async fn hook_at_end(&self, step: Step) {
        let told = tokio::time::timeout(HOOK, self.hook(step.clone())).await;
        let (role, id) = (&*self.peer.role, &*self.peer.id);
        match told {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(role, id, %step, %error, "a hook failed; the stop goes on");
            }
            Err(_) => {
                tracing::warn!(role, id, %step, "a hook took over {HOOK:?}; the stop goes on without it");
            }
        }
    }

    /// How many of a role are ready at this moment.
    pub(super) fn ready(&self, role: &str) -> usize {
        self.manager.count_ready(role)
    }

    /// Looks whether all that it needs to serve is ready, and tells if that has changed.
    pub(super) fn look_at_needs(&self) {
        let mut all = self.dependencies.iter();
        let has = all.all(|d| d.serving.is_none_or(|n| self.ready(&d.role) >= n));
        if has != self.has_needs.swap(has, Ordering::SeqCst) {
            self.components.changed();
        }
    }

    fn has_needs(&self) -> bool {
        self.has_needs.load(Ordering::SeqCst)
    }

    pub(crate) fn role(&self) -> &str {
        &self.peer.role
    }

    pub(crate) fn has_stopped(&self) -> bool {
        *self.states.borrow() == ComponentState::Stopped
    }

    /// Whether calls may come.
    pub(crate) fn is_serving(&self) -> bool {
        self.states.borrow().is_serving() && self.has_needs()
    }

    /// Whether it is as it should be: one that stands by is, too.
    pub(crate) fn is_well(&self) -> bool {
        let well = matches!(
            &*self.states.borrow(),
            ComponentState::Healthy | ComponentState::StandBy { .. }
        );
        well && self.has_needs()
    }

    /// Whether this is asked by the component itself, of the server that it runs.
    pub(crate) fn is_asked_by_itself(&self, service: &str) -> bool {
        self.token == service
    }

    pub(super) fn is_exclusive(&self) -> bool {
        self.settings.exclusive
    }

    pub(super) fn registration_state(&self) -> Option<RegistrationState> {
        let states = self.registered.get()?;
        Some(states.borrow().clone())
    }
}

impl Drop for Core {
    /// Where a stop went on without its component, this is when it leaves the list.
    fn drop(&mut self) {
        self.components.forget_those_gone();
    }
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Component")
            .field("peer", &self.peer)
            .field("state", &*self.states.borrow())
            .field("dependencies", &self.dependencies)
            .finish_non_exhaustive()
    }
}

/// What is under these locks is whole whatever panicked.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
