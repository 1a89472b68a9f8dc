//! The writing half of a pool: one task that takes in what discovery and the endpoints say, and stores
//! one snapshot for all that came in together.

mod end;
mod idle;
mod moved;
mod set;

use std::{
    collections::HashMap,
    hash::Hash,
    panic::{self, AssertUnwindSafe},
    pin::Pin,
    sync::Arc,
    thread,
    time::SystemTime,
};

use futures_core::Stream;
use futures_util::{FutureExt as _, StreamExt as _};
use tokio::{
    sync::{Notify, Semaphore, mpsc, watch},
    task::JoinSet,
    time::Instant,
};

pub(super) use self::end::CLOSING;
use self::idle::Sweeps;
use super::{
    End, Setup,
    service::Shared,
    snapshot::{Phase, Resolution, Snapshot, Stale, State},
};
use crate::{
    discover::{Change, Update},
    endpoint::{
        Connect, Target, load,
        ready::Ready,
        task::{Command, Event},
    },
    error::{BoxError, Peer, SharedError},
    events::EventKind,
};

/// How much is taken in before a snapshot is stored, so that a flood delays what came before it by
/// milliseconds at most.
const BATCH: usize = 1024;

pub(super) struct Driver<K, T, C: Connect<T>> {
    shared: Arc<Shared<C::Service>>,
    setup: Setup,
    connect: Arc<C>,
    dials: Arc<Semaphore>,
    /// Half of them: as many may be probing whoever is offline.
    probes: Arc<Semaphore>,
    /// The next snapshot, in the making.
    next: Snapshot<C::Service>,
    dirty: bool,
    /// By its users, and not by the end of its runtime.
    stopped: bool,
    by_key: HashMap<K, u64>,
    endpoints: HashMap<u64, Known<T, C::Service>>,
    /// How many endpoints have an id. A registry's have one each; of others, one stands in for another.
    ids: HashMap<Arc<str>, usize>,
    last_key: u64,
    events: mpsc::UnboundedReceiver<(u64, Event<C::Service>)>,
    events_tx: mpsc::UnboundedSender<(u64, Event<C::Service>)>,
    tasks: JoinSet<()>,
    /// Those whose sessions are gone and that are finishing their calls; `stop` ends them too.
    draining: Vec<Task>,
    /// Since when discovery fails.
    failing_since: Option<Instant>,
    /// Nobody uses it, so nobody is connected.
    asleep: bool,
    /// What is told once the snapshot is there that it is true of.
    told: Vec<EventKind>,
}

/// What discovery says, while it says something.
type Updates<K, T> = Option<Pin<Box<dyn Stream<Item = Update<K, Arc<T>>> + Send>>>;

/// An endpoint as its driver knows it.
struct Known<T, S> {
    target: Arc<T>,
    state: State,
    ready: Option<Arc<Ready<S>>>,
    /// Where it stands in `next.ready`, if it takes anybody's calls.
    index: Option<usize>,
    /// Whether it is among those that calls wait for.
    awaited: bool,
    /// Since when it has not been connected, if it ever was.
    lost: Option<Instant>,
    /// Calls on connections that it had before.
    retired: Vec<load::Watched<Peer>>,
    /// None while it is barred, or all are asleep.
    task: Option<Task>,
    /// Those that are finishing the calls that it had elsewhere, or before all slept: they end with its session.
    former: Vec<Task>,
    /// Who takes its calls, where it was registered before, until it is connected or not to be called.
    stands_in: Option<u64>,
    /// Whom it does that for; it has no key then.
    stands_in_for: Option<u64>,
}

struct Task {
    commands: watch::Sender<Command>,
    nudge: Arc<Notify>,
}

impl<K, T, C> Driver<K, T, C>
where
    K: Hash + Eq + Send + 'static,
    T: Target,
    C: Connect<T>,
{
    pub(super) fn new(shared: Arc<Shared<C::Service>>, setup: Setup, connect: C) -> Self {
        let (events_tx, events) = mpsc::unbounded_channel();
        Self {
            dials: Arc::new(Semaphore::new(shared.config.max_dials)),
            probes: Arc::new(Semaphore::new(shared.config.max_dials.div_ceil(2))),
            shared,
            setup,
            connect: Arc::new(connect),
            next: Snapshot::empty(),
            dirty: false,
            stopped: false,
            by_key: HashMap::new(),
            endpoints: HashMap::new(),
            ids: HashMap::new(),
            last_key: 0,
            events,
            events_tx,
            tasks: JoinSet::new(),
            draining: Vec::new(),
            failing_since: None,
            asleep: false,
            told: Vec::new(),
        }
    }

    /// Runs until `ends` says so, or until it is dropped with all it spawned.
    pub(super) async fn run(
        mut self,
        updates: impl Stream<Item = Update<K, Arc<T>>> + Send + 'static,
        mut ends: watch::Receiver<Option<End>>,
    ) {
        let mut updates: Updates<K, T> = Some(Box::pin(updates));
        let mut sweeps = Sweeps::new(self.setup.idle_after);
        self.tell(EventKind::Watching);
        self.publish();
        loop {
            // Whichever has something; then all that is there besides, up to a bound for each, and one
            // snapshot.
            tokio::select! {
                biased;
                _ = ends.wait_for(Option::is_some) => break,
                Some((key, event)) = self.events.recv() => self.on_event(key, event),
                update = next(&mut updates) => self.on_update(&mut updates, update),
                Some(_) = self.tasks.join_next() => {}
                () = self.shared.interest.wanted(), if self.asleep => {
                    self.wake();
                    sweeps.reset();
                }
                () = sweeps.due(), if !self.asleep => {
                    let used = self.was_used();
                    if sweeps.quiet(used) {
                        self.sleep();
                    }
                }
            }
            while self.tasks.try_join_next().is_some() {}
            let (mut events, mut changes) = (BATCH, BATCH);
            while events > 0
                && let Ok((key, event)) = self.events.try_recv()
            {
                self.on_event(key, event);
                events -= 1;
            }
            while changes > 0
                && let Some(update) = next(&mut updates).now_or_never()
            {
                self.on_update(&mut updates, update);
                changes -= 1;
            }
            self.publish();
            if events == 0 || changes == 0 {
                tokio::task::yield_now().await;
            }
        }
        self.end(updates, ends).await;
    }

    /// Takes in what discovery said; `updates` becomes none when there is nothing more to come.
    fn on_update(
        &mut self,
        updates: &mut Updates<K, T>,
        update: thread::Result<Option<Update<K, Arc<T>>>>,
    ) {
        match update {
            Ok(Some(Update::Change(Change::Insert(key, target)))) => {
                // Asked once here, where it may panic: a bug in one target is not the others' end.
                let asked =
                    AssertUnwindSafe(|| (target.peer(), target.stopping(), target.barred()));
                match panic::catch_unwind(|| drop(asked())) {
                    Ok(()) => self.insert(key, target),
                    Err(_panic) => {
                        self.complain("a target panicked when asked who it is; it is skipped")
                    }
                }
            }
            Ok(Some(Update::Change(Change::Remove(key)))) => self.remove(&key),
            Ok(Some(Update::Synced)) => self.synced(),
            Ok(Some(Update::Stale(why))) => self.stale(why),
            // The end: what is known is all there will be.
            Ok(None) => {
                self.over();
                *updates = None;
            }
            // A user's stream that panics has ended, as far as this task is concerned; what it said stays true.
            Err(_panic) => {
                self.complain("the discovery stream panicked; the last known set is kept");
                let why = BoxError::from("the discovery stream panicked");
                self.stale(Arc::from(why));
                *updates = None;
            }
        }
    }

    fn synced(&mut self) {
        if let Resolution::Known { stale: None } = self.next.resolution {
            return;
        }
        self.next.resolution = Resolution::Known { stale: None };
        self.dirty = true;
        let after = self.failing_since.take().map(|since| since.elapsed());
        self.tell(EventKind::RegistryFresh { after });
    }

    fn over(&mut self) {
        if matches!(self.next.resolution, Resolution::Pending) {
            self.next.resolution = Resolution::Known { stale: None };
            self.dirty = true;
        }
    }

    fn stale(&mut self, why: SharedError) {
        // Told once, and not at each further attempt.
        if self.failing_since.is_none() {
            self.failing_since = Some(Instant::now());
            self.tell(EventKind::RegistryStale { why: why.clone() });
        }
        self.next.resolution = match &self.next.resolution {
            Resolution::Pending | Resolution::Failed(_) => Resolution::Failed(why),
            Resolution::Known { stale } => Resolution::Known {
                stale: Some(Stale {
                    since: stale.as_ref().map_or_else(SystemTime::now, |s| s.since),
                    why,
                }),
            },
            Resolution::Stopped(why) => Resolution::Stopped(*why),
        };
        self.dirty = true;
    }

    fn on_event(&mut self, key: u64, event: Event<C::Service>) {
        let Some(known) = self.endpoints.get_mut(&key) else {
            return;
        };
        if known.task.is_none() {
            return;
        }
        if let Some(number) = known.stands_in_for
            && let Event::Lost { why } = event
        {
            self.stand_in_lost(key, number, why);
            return;
        }
        let peer = known.target.peer().clone();
        let state = &mut known.state;
        let told = match event {
            Event::Connecting { first } => {
                state.next = None;
                // A probe of one that is offline says nothing yet.
                if first || state.phase != Phase::Offline {
                    state.enter(match first {
                        true => Phase::Connecting,
                        false => Phase::Retrying,
                    });
                }
                first.then_some(EventKind::Connecting { peer })
            }
            Event::Connected(ready) => {
                known.ready = Some(ready);
                *state = State::new(Phase::Ready);
                Some(match known.lost.take() {
                    None => EventKind::Connected { peer },
                    Some(lost) => EventKind::Restored {
                        peer,
                        after: lost.elapsed(),
                    },
                })
            }
            Event::NotServing { why } => {
                // One that has never served has lost nothing: `Connected` is told when it does.
                if known.ready.is_some() {
                    known.lost.get_or_insert_with(Instant::now);
                }
                // Its reason may change; it is told once.
                let news = state.phase != Phase::NotServing;
                state.enter(Phase::NotServing);
                state.last_error = Some((Instant::now(), why.clone()));
                news.then_some(EventKind::NotServing { peer, why })
            }
            Event::Lost { why } => {
                known.retired.retain(|calls| calls.current() > 0);
                if let Some(ready) = known.ready.take() {
                    known.retired.push(ready.load.watch());
                }
                known.lost.get_or_insert_with(Instant::now);
                state.enter(Phase::Retrying);
                state.last_error = Some((Instant::now(), why.clone()));
                Some(EventKind::Lost { peer, why })
            }
            Event::Failed {
                why,
                attempts,
                offline,
                next,
            } => {
                let news = state.phase != Phase::Offline;
                state.enter(match offline {
                    true => Phase::Offline,
                    false => Phase::Retrying,
                });
                state.attempts = attempts;
                state.next = next.and_then(|next| SystemTime::now().checked_add(next));
                state.last_error = Some((Instant::now(), why.clone()));
                Some(match offline && news {
                    true => EventKind::Offline {
                        peer,
                        attempts,
                        next,
                        why,
                    },
                    false => EventKind::AttemptFailed {
                        peer,
                        attempts,
                        next,
                        why,
                    },
                })
            }
        };
        if let Phase::Ready | Phase::NotServing = state.phase {
            self.relieve(key, &self.drain());
        }
        if let Some(told) = told {
            self.tell(told);
        }
        self.show(key);
    }
}

impl<K, T, C: Connect<T>> Driver<K, T, C> {
    /// Tells it with the next snapshot: whoever hears of a connection can call it.
    fn tell(&mut self, event: EventKind) {
        self.told.push(event);
    }

    /// Of somebody's code that panicked. A subscriber may do so as well.
    fn complain(&self, what: &str) {
        let role = &*self.shared.role;
        let complained = || tracing::error!(role, "{what}");
        let _ = panic::catch_unwind(AssertUnwindSafe(complained));
    }

    /// Stores the snapshot, wakes whoever waits for it, and tells what has happened, in this order.
    fn publish(&mut self) {
        if std::mem::take(&mut self.dirty) {
            self.shared.snapshot.store(Arc::new(self.next.clone()));
            self.shared.changed.notify_waiters();
        }
        for event in self.told.drain(..) {
            self.setup.bus.tell(&self.shared.role, event);
        }
    }
}

/// The next word of discovery; never, when there is nothing more to come.
async fn next<K, T>(updates: &mut Updates<K, T>) -> thread::Result<Option<Update<K, Arc<T>>>> {
    match updates {
        Some(updates) => AssertUnwindSafe(updates.next()).catch_unwind().await,
        None => std::future::pending().await,
    }
}
