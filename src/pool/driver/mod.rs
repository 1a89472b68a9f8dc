//! The writing half of a pool: one task that takes in what discovery and the endpoints say, and stores
//! one snapshot for all that came in together.

mod end;
mod idle;

use std::{
    collections::HashMap,
    hash::Hash,
    panic::{self, AssertUnwindSafe},
    pin::Pin,
    sync::Arc,
    thread,
    time::{Instant, SystemTime},
};

use futures_core::Stream;
use futures_util::{FutureExt as _, StreamExt as _};
use tokio::{
    sync::{Notify, Semaphore, mpsc, watch},
    task::JoinSet,
};

use self::idle::Sweeps;
use super::{
    End, Setup,
    service::Shared,
    snapshot::{Entry, Phase, Resolution, Snapshot, Stale, State},
};
use crate::{
    discover::{Change, Update},
    endpoint::{
        Connect, Target, load,
        ready::Ready,
        task::{Command, Endpoint, Event},
    },
    error::{BoxError, Kind, Peer, SharedError},
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
                        let role = &*self.shared.role;
                        tracing::error!(
                            role,
                            "a target panicked when asked who it is; it is skipped"
                        );
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
                self.stale(panicked("the discovery stream panicked"));
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

    fn insert(&mut self, key: K, target: Arc<T>) {
        let Some(&number) = self.by_key.get(&key) else {
            self.tell(EventKind::Added {
                peer: target.peer().clone(),
            });
            return self.add(key, target);
        };
        let Some(known) = self.endpoints.get_mut(&number) else {
            return;
        };
        // The same generation: its connection stays, what is said of it changes.
        let peer = target.peer().clone();
        let moved = known.target.peer().address != peer.address;
        let (was_stopping, stopping) = (known.target.stopping(), target.stopping());
        if moved && known.task.is_some() {
            // The same session elsewhere: it takes new calls there, and finishes the old ones here.
            self.leave(number, &Command::Drain(self.shared.config.drain));
            self.tell(EventKind::Updated { peer });
            return self.add(key, target);
        }
        known.target = target.clone();
        match (target.barred(), &known.task) {
            (Some(_), _) if known.state.phase == Phase::Barred => {}
            (Some(why), _) => {
                known.end(Command::Close(why.kind(), why.reason()));
                known.task = None;
                known.state = State::new(Phase::Barred);
                if let Some(ready) = known.ready.take() {
                    ready.mark_down(why.to_string());
                }
                let why = Arc::new(why);
                self.tell(EventKind::Barred { peer, why });
            }
            // It was barred, or all are asleep.
            (None, None) => {
                self.tell(EventKind::Updated { peer });
                let number = self.start(number);
                self.by_key.insert(key, number);
                return;
            }
            (None, Some(task)) => {
                task.nudge.notify_one();
                self.tell(match (was_stopping, stopping) {
                    (false, true) => EventKind::Stopping { peer },
                    _ => EventKind::Updated { peer },
                });
            }
        }
        self.show(number);
    }

    fn add(&mut self, key: K, target: Arc<T>) {
        self.last_key += 1;
        let number = self.last_key;
        *self.ids.entry(target.peer().id.clone()).or_default() += 1;
        let barred = target.barred();
        let known = Known {
            state: State::new(match barred {
                Some(_) => Phase::Barred,
                None => Phase::Idle,
            }),
            ready: None,
            index: None,
            awaited: false,
            lost: None,
            retired: Vec::new(),
            task: None,
            target,
        };
        let peer = known.target.peer().clone();
        self.endpoints.insert(number, known);
        let number = match barred {
            Some(why) => {
                let why = Arc::new(why);
                self.tell(EventKind::Barred { peer, why });
                self.show(number);
                number
            }
            None => self.start(number),
        };
        self.by_key.insert(key, number);
    }

    /// Has an endpoint that has no task connect, unless all are asleep. It gets a new number, which is returned: what
    /// a task that it had before still has to say is not taken for this one's.
    fn start(&mut self, number: u64) -> u64 {
        let Some(mut known) = self.endpoints.remove(&number) else {
            return number;
        };
        self.last_key += 1;
        let new = self.last_key;
        known.state = match self.asleep {
            true => State::new(Phase::Idle),
            false => {
                known.task = Some(self.spawn(new, &known.target));
                State::new(Phase::Connecting)
            }
        };
        self.endpoints.insert(new, known);
        self.show(new);
        new
    }

    fn remove(&mut self, key: &K) {
        let Some(number) = self.by_key.remove(key) else {
            return;
        };
        let Some(known) = self.endpoints.get(&number) else {
            return;
        };
        let how = match known.target.stopping() {
            true => Command::Drain(self.shared.config.drain),
            false => Command::Close(Kind::SessionDeleted, None),
        };
        let peer = known.target.peer().clone();
        self.tell(EventKind::Removed { peer });
        self.leave(number, &how);
    }

    /// Takes an endpoint out of everything, and has its task end as told.
    fn leave(&mut self, number: u64, how: &Command) {
        let Some(mut known) = self.endpoints.remove(&number) else {
            return;
        };
        known.end(how.clone());
        if let Command::Drain(_) = how {
            self.draining.retain(|task| !task.commands.is_closed());
            self.draining.extend(known.task.take());
        } else if let Some(ready) = &known.ready {
            ready.mark_down("session deleted");
        }
        self.unlist(&mut known);
        if known.awaited {
            self.next.connecting -= 1;
        }
        // Another with the same id may be shown by now.
        let id = &known.target.peer().id;
        if let Some(shown) = self.next.all.get(id)
            && shown.number == number
        {
            self.next.all.remove(id);
        }
        self.dirty = true;
        match self.ids.get_mut(id) {
            Some(others) if *others > 1 => {
                *others -= 1;
                let mut all = self.endpoints.iter();
                let other = all.find(|(_, other)| other.target.peer().id == *id);
                if let Some(other) = other.map(|(number, _)| *number) {
                    self.show(other);
                }
            }
            _ => {
                self.ids.remove(id);
            }
        }
    }

    fn on_event(&mut self, key: u64, event: Event<C::Service>) {
        let Some(known) = self.endpoints.get_mut(&key) else {
            return;
        };
        if known.task.is_none() {
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
        if let Some(told) = told {
            self.tell(told);
        }
        self.show(key);
    }

    fn spawn(&mut self, key: u64, target: &Arc<T>) -> Task {
        let (commands_tx, commands) = watch::channel(Command::Run);
        let nudge = Arc::new(Notify::new());
        let endpoint = Endpoint {
            key,
            target: target.clone(),
            connect: self.connect.clone(),
            dialing: self.shared.config.dialing(),
            events: self.events_tx.clone(),
            commands,
            nudge: nudge.clone(),
            dials: self.dials.clone(),
            probes: self.probes.clone(),
            retired: Vec::new(),
        };
        self.tasks.spawn(endpoint.supervise());
        Task {
            commands: commands_tx,
            nudge,
        }
    }

    /// Brings the next snapshot up to what is known of this endpoint.
    fn show(&mut self, number: u64) {
        let Some(mut known) = self.endpoints.remove(&number) else {
            return;
        };
        // Nobody waits for one that would not be picked.
        let awaited = known.state.phase == Phase::Connecting && !known.target.stopping();
        match (known.awaited, awaited) {
            (false, true) => self.next.connecting += 1,
            (true, false) => self.next.connecting -= 1,
            _ => {}
        }
        known.awaited = awaited;
        match &known.ready {
            Some(ready) if known.state.phase == Phase::Ready && !known.target.stopping() => {
                match known.index {
                    Some(index) => self.next.ready.replace(index, ready.clone()),
                    None => known.index = Some(self.next.ready.push(ready.clone())),
                }
            }
            _ => self.unlist(&mut known),
        }
        let entry = Arc::new(Entry {
            number,
            target: known.target.clone(),
            state: known.state.clone(),
            ready: known.ready.clone(),
        });
        // Of two with the same id, the one that is barred is not who is meant by it.
        let id = &known.target.peer().id;
        let shown = self.next.all.get(id);
        let owned = shown.is_some_and(|e| e.number != number && e.state.phase != Phase::Barred);
        if !owned || known.state.phase != Phase::Barred {
            self.next.all.insert(id, entry);
        }
        self.endpoints.insert(number, known);
        self.dirty = true;
    }

    /// Takes it out of the picks.
    fn unlist(&mut self, known: &mut Known<T, C::Service>) {
        if let Some(index) = known.index.take()
            && let Some(moved) = self.next.ready.swap_remove(index)
            && let Some(moved) = self.endpoints.get_mut(&moved.key)
        {
            moved.index = Some(index);
        }
    }
}

impl<K, T, C: Connect<T>> Driver<K, T, C> {
    /// Tells it with the next snapshot: whoever hears of a connection can call it.
    fn tell(&mut self, event: EventKind) {
        self.told.push(event);
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

fn panicked(what: &'static str) -> SharedError {
    tracing::error!("{what}; the last known set is kept");
    Arc::from(BoxError::from(what))
}
