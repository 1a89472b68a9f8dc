//! The set of endpoints: who comes, changes and goes.

use std::{hash::Hash, sync::Arc};

use tokio::sync::{Notify, watch};

use super::{Driver, Known, Task};
use crate::{
    endpoint::{
        Connect, Target,
        limiter::Limiter,
        task::{Command, Endpoint},
    },
    error::{Error, Kind},
    events::EventKind,
    pool::snapshot::{Entry, Phase, State},
};

impl<K, T, C> Driver<K, T, C>
where
    K: Hash + Eq + Send + 'static,
    T: Target,
    C: Connect<T>,
{
    pub(super) fn insert(&mut self, key: K, target: Arc<T>) {
        let Some(&number) = self.by_key.get(&key) else {
            self.tell(EventKind::Added {
                peer: target.peer().clone(),
            });
            self.add(key, target);
            return;
        };
        let Some(known) = self.endpoints.get_mut(&number) else {
            return;
        };
        // The same generation: its connection stays, what is said of it changes.
        let peer = target.peer().clone();
        let moved = known.target.peer().address != peer.address && target.barred().is_none();
        let news = match (known.target.stopping(), target.stopping()) {
            (false, true) => EventKind::Stopping { peer: peer.clone() },
            _ => EventKind::Updated { peer: peer.clone() },
        };
        if moved && known.task.is_some() {
            self.tell(news);
            self.follow(key, number, target);
            return;
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
                let how = Command::Close(why.kind(), why.reason());
                self.relieve(number, &how);
                self.tell(EventKind::Barred { peer, why });
            }
            // It was barred, or all are asleep.
            (None, None) => {
                self.tell(news);
                let number = self.start(number);
                self.by_key.insert(key, number);
                return;
            }
            (None, Some(task)) => {
                task.nudge.notify_one();
                if target.stopping() {
                    self.relieve(number, &self.drain());
                }
                self.tell(news);
            }
        }
        self.show(number);
    }

    /// A new endpoint, and its number.
    pub(super) fn add(&mut self, key: K, target: Arc<T>) -> u64 {
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
            former: Vec::new(),
            stands_in: None,
            stands_in_for: None,
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
        number
    }

    /// Has an endpoint that has no task connect, unless all are asleep. It gets a new number, which is returned: what
    /// a task that it had before still has to say is not taken for this one's.
    pub(super) fn start(&mut self, number: u64) -> u64 {
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

    pub(super) fn remove(&mut self, key: &K) {
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
        self.relieve(number, &how);
        let draining = self.leave(number, &how);
        self.draining.retain(|task| !task.commands.is_closed());
        self.draining.extend(draining);
    }

    /// Takes an endpoint out of everything, and has its tasks end as told; returns those that are not done at once.
    pub(super) fn leave(&mut self, number: u64, how: &Command) -> Vec<Task> {
        let Some(mut known) = self.endpoints.remove(&number) else {
            return Vec::new();
        };
        known.end(how.clone());
        let mut draining = Vec::new();
        if let Command::Drain(_) = how {
            draining = std::mem::take(&mut known.former);
            draining.retain(|task| !task.commands.is_closed());
            draining.extend(known.task.take());
        } else if let (Command::Close(kind, _), Some(ready)) = (how, &known.ready) {
            ready.mark_down(Error::new(*kind).to_string());
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
        draining
    }

    fn spawn(&mut self, key: u64, target: &Arc<T>) -> Task {
        let (commands_tx, commands) = watch::channel(Command::Run);
        let nudge = Arc::new(Notify::new());
        let dialing = self.shared.config.dialing();
        let endpoint = Endpoint {
            key,
            target: target.clone(),
            connect: self.connect.clone(),
            limiter: dialing.max_in_flight.map(Limiter::new),
            dialing,
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
    pub(super) fn show(&mut self, number: u64) {
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
        if let Some(who) = known.stands_in_for {
            // Of the two, that is who is meant by their id.
            self.endpoints.insert(number, known);
            self.dirty = true;
            return self.show(who);
        }
        let stands_in = known.stands_in.and_then(|n| self.endpoints.get(&n));
        let stands_in = stands_in.filter(|other| other.state.phase == Phase::Ready);
        let entry = Arc::new(Entry {
            number,
            target: known.target.clone(),
            state: known.state.clone(),
            ready: match stands_in {
                Some(other) => other.ready.clone(),
                None => known.ready.clone(),
            },
            stands_in: stands_in.map(|other| (other.target.peer().clone(), other.state.since)),
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
