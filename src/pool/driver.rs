//! The writing half of a pool: one task that takes in what discovery and the endpoints say, and stores
//! one snapshot for all that came in together.

use std::{
    collections::HashMap,
    hash::Hash,
    panic::{self, AssertUnwindSafe},
    pin::pin,
    sync::Arc,
    thread,
    time::{Instant, SystemTime},
};

use futures_core::Stream;
use futures_util::{FutureExt as _, StreamExt as _};
use tokio::{
    sync::{Notify, mpsc, watch},
    task::JoinSet,
    time,
};

use super::{
    service::Shared,
    snapshot::{Entry, Phase, Resolution, Snapshot, Stale, State},
};
use crate::{
    discover::{Change, Update},
    endpoint::{
        Connect, Target,
        ready::Ready,
        task::{Command, Endpoint, Event},
    },
    error::{BoxError, Kind, SharedError},
};

/// How much is taken in before a snapshot is stored, so that a flood delays what came before it by
/// milliseconds at most.
const BATCH: usize = 1024;

pub(super) struct Driver<K, T, C: Connect<T>> {
    shared: Arc<Shared<C::Service>>,
    connect: Arc<C>,
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
}

/// An endpoint as its driver knows it.
struct Known<T, S> {
    target: Arc<T>,
    state: State,
    ready: Option<Arc<Ready<S>>>,
    /// Where it stands in `next.ready`, if it takes anybody's calls.
    index: Option<usize>,
    /// Whether it is among those that calls wait for.
    awaited: bool,
    /// None while it is barred.
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
    pub(super) fn new(shared: Arc<Shared<C::Service>>, connect: C) -> Self {
        let (events_tx, events) = mpsc::unbounded_channel();
        Self {
            shared,
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
        }
    }

    /// Runs until `stop` says so, or until it is dropped with all it spawned.
    pub(super) async fn run(
        mut self,
        updates: impl Stream<Item = Update<K, Arc<T>>>,
        mut stop: watch::Receiver<bool>,
    ) {
        // A user's stream that panics ends, as far as this task is concerned; what it said stays true.
        let mut updates = pin!(updates);
        let mut over = false;
        loop {
            // Whichever has something; then all that is there besides, up to a bound for each, and one
            // snapshot.
            tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => break,
                Some((key, event)) = self.events.recv() => self.on_event(key, event),
                update = AssertUnwindSafe(updates.next()).catch_unwind(), if !over => {
                    over = !self.on_update(update);
                }
                Some(_) = self.tasks.join_next() => {}
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
                && !over
                && let Some(update) = AssertUnwindSafe(updates.next())
                    .catch_unwind()
                    .now_or_never()
            {
                over = !self.on_update(update);
                changes -= 1;
            }
            self.publish();
            if events == 0 || changes == 0 {
                tokio::task::yield_now().await;
            }
        }
        self.stop().await;
    }

    async fn stop(mut self) {
        self.stopped = true;
        self.close(&Command::Close(Kind::Stopped, None));
        let ended = async { while self.tasks.join_next().await.is_some() {} };
        // Dropping the set aborts what is left.
        let _ = time::timeout(time::Duration::from_secs(2), ended).await;
    }

    /// False when there is nothing more to come.
    fn on_update(&mut self, update: thread::Result<Option<Update<K, Arc<T>>>>) -> bool {
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
            Ok(Some(Update::Synced)) => {
                self.next.resolution = Resolution::Known { stale: None };
                self.dirty = true;
            }
            Ok(Some(Update::Stale(why))) => self.stale(why),
            // The end: what is known is all there will be.
            Ok(None) => {
                if matches!(self.next.resolution, Resolution::Pending) {
                    self.next.resolution = Resolution::Known { stale: None };
                    self.dirty = true;
                }
                return false;
            }
            Err(_panic) => {
                tracing::error!(role = %self.shared.role, "the discovery stream panicked; the last known set is kept");
                self.stale(Arc::from(BoxError::from("the discovery stream panicked")));
                return false;
            }
        }
        true
    }

    fn stale(&mut self, why: SharedError) {
        // Once, and not at each further attempt.
        if !matches!(
            self.next.resolution,
            Resolution::Failed(_) | Resolution::Known { stale: Some(_) }
        ) {
            tracing::warn!(role = %self.shared.role, error = %why, "discovery failed; the last known set is kept");
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
            return self.add(key, target);
        };
        let Some(known) = self.endpoints.get_mut(&number) else {
            return;
        };
        // The same generation: its connection stays, what is said of it changes.
        let moved = known.target.peer().address != target.peer().address;
        if moved && known.task.is_some() {
            // The same session elsewhere: it takes new calls there, and finishes the old ones here.
            self.leave(number, &Command::Drain);
            return self.add(key, target);
        }
        known.target = target.clone();
        match (target.barred(), &known.task) {
            (Some(why), Some(_)) => {
                known.end(Command::Close(why.kind(), why.reason()));
                known.task = None;
                known.state = State::new(Phase::Barred);
                if let Some(ready) = known.ready.take() {
                    ready.mark_down(why.to_string());
                }
            }
            // Under a new number: what its old task still has to say is not taken for the new one's.
            (None, None) => {
                self.endpoints.remove(&number);
                return self.add(key, target);
            }
            (None, Some(task)) => task.nudge.notify_one(),
            (Some(_), None) => {}
        }
        self.show(number);
    }

    fn add(&mut self, key: K, target: Arc<T>) {
        self.last_key += 1;
        let number = self.last_key;
        self.by_key.insert(key, number);
        let (task, phase) = match target.barred() {
            None => (Some(self.spawn(number, &target)), Phase::Connecting),
            Some(_) => (None, Phase::Barred),
        };
        let known = Known {
            target,
            state: State::new(phase),
            ready: None,
            index: None,
            awaited: false,
            task,
        };
        *self.ids.entry(known.target.peer().id.clone()).or_default() += 1;
        self.endpoints.insert(number, known);
        self.show(number);
    }

    fn remove(&mut self, key: &K) {
        let Some(number) = self.by_key.remove(key) else {
            return;
        };
        let stopping = self
            .endpoints
            .get(&number)
            .is_some_and(|known| known.target.stopping());
        self.leave(
            number,
            &match stopping {
                true => Command::Drain,
                false => Command::Close(Kind::SessionDeleted, None),
            },
        );
    }

    /// Takes an endpoint out of everything, and has its task end as told.
    fn leave(&mut self, number: u64, how: &Command) {
        let Some(mut known) = self.endpoints.remove(&number) else {
            return;
        };
        known.end(how.clone());
        if let Command::Drain = how {
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
        let peer = known.target.peer();
        let now = SystemTime::now();
        match event {
            Event::Connecting { first } => {
                let phase = if first {
                    Phase::Connecting
                } else {
                    Phase::Retrying
                };
                if known.state.phase != phase {
                    known.state.phase = phase;
                    known.state.since = now;
                }
            }
            Event::Connected(ready) => {
                tracing::info!(%peer, "connected");
                known.ready = Some(ready);
                known.state = State::new(Phase::Ready);
            }
            Event::Lost { why } => {
                tracing::warn!(%peer, error = %why, "connection lost");
                known.ready = None;
                known.state.phase = Phase::Retrying;
                known.state.since = now;
                known.state.last_error = Some((Instant::now(), why));
            }
            Event::Failed {
                why,
                attempts,
                offline,
            } => {
                let phase = if offline {
                    Phase::Offline
                } else {
                    Phase::Retrying
                };
                if known.state.phase != phase {
                    tracing::warn!(%peer, error = %why, attempts, offline, "cannot connect");
                    known.state.phase = phase;
                    known.state.since = now;
                }
                known.state.attempts = attempts;
                known.state.last_error = Some((Instant::now(), why));
            }
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
            Some(ready) if !known.target.stopping() => match known.index {
                Some(index) => self.next.ready.replace(index, ready.clone()),
                None => known.index = Some(self.next.ready.push(ready.clone())),
            },
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

    fn publish(&mut self) {
        if std::mem::take(&mut self.dirty) {
            self.shared.snapshot.store(Arc::new(self.next.clone()));
            self.shared.changed.notify_waiters();
        }
    }
}

impl<K, T, C: Connect<T>> Driver<K, T, C> {
    /// Ends every endpoint, and leaves a snapshot that says so and holds no service.
    fn close(&mut self, how: &Command) {
        for known in self.endpoints.values() {
            if let Some(ready) = &known.ready {
                ready.mark_down("stopped");
            }
            known.end(how.clone());
        }
        for task in self.draining.drain(..) {
            task.commands.send_replace(how.clone());
        }
        self.endpoints.clear();
        self.next = Snapshot::empty();
        self.next.resolution = match self.stopped {
            true => Resolution::Stopped(None),
            false => Resolution::Stopped(Some("the runtime that it lived on has ended")),
        };
        self.shared.snapshot.store(Arc::new(self.next.clone()));
        self.shared.changed.notify_waiters();
    }
}

impl<K, T, C: Connect<T>> Drop for Driver<K, T, C> {
    /// However the driver ends, nobody is left waiting for it. Calls in flight whose callers hold nothing
    /// of the pool any more are left to finish.
    fn drop(&mut self) {
        self.close(&Command::Drain);
    }
}

impl<T, S> Known<T, S> {
    fn end(&self, command: Command) {
        if let Some(task) = &self.task {
            task.commands.send_replace(command);
        }
    }
}
