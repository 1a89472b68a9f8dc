//! The end of a pool: as it was ordered, or as its driver is dropped.

use std::{hash::Hash, sync::atomic::Ordering, time::Duration};

use tokio::{sync::watch, time};

use super::{Driver, Known, Updates, next};
use crate::{
    Backoff,
    discover::{Change, Update},
    endpoint::{Connect, Target, task::Command},
    error::Kind,
    pool::{
        End,
        snapshot::{Resolution, Snapshot},
    },
};

/// How long closing may take once it was ordered.
pub(in crate::pool) const CLOSING: Duration = Duration::from_secs(2);

impl<K, T, C> Driver<K, T, C>
where
    K: Hash + Eq + Send + 'static,
    T: Target,
    C: Connect<T>,
{
    /// Lets the calls in flight go on until the time that was ordered, which a later order may bring forward; then
    /// closes.
    pub(super) async fn end(
        mut self,
        mut updates: Updates<K, T>,
        mut ends: watch::Receiver<Option<End>>,
    ) {
        let Some(End { mut by, why }) = *ends.borrow_and_update() else {
            return;
        };
        self.stopped = true;
        // Draining => (closing | ended)
        if by > time::Instant::now() {
            // The bound is this loop's, whose word is also what the calls hear that it ends.
            self.close(&Command::Drain(Backoff::LONGEST), why);
            loop {
                tokio::select! {
                    biased;
                    next = self.tasks.join_next() => if next.is_none() { return },
                    () = time::sleep_until(by) => break,
                    Ok(()) = ends.changed() => {
                        if let Some(end) = &*ends.borrow_and_update() {
                            by = end.by;
                        }
                    }
                    update = next(&mut updates) => match update {
                        // Its calls in flight end, now as ever.
                        Ok(Some(Update::Change(Change::Remove(key)))) => self.is_gone(&key),
                        Ok(Some(_)) => {}
                        Ok(None) | Err(_) => updates = None,
                    }
                }
            }
        }
        // Closing => ended
        self.close(&Command::Close(Kind::Stopped, None), why);
        let ended = async { while self.tasks.join_next().await.is_some() {} };
        // Dropping the set aborts what is left.
        let _ = time::timeout(CLOSING, ended).await;
    }

    fn is_gone(&mut self, key: &K) {
        let known = self.by_key.get(key);
        let known = known.and_then(|number| self.endpoints.get(number));
        if let Some(known) = known.filter(|known| !known.target.stopping()) {
            let stands_in = known.stands_in.and_then(|n| self.endpoints.get(&n));
            for known in stands_in.into_iter().chain([known]) {
                known.end(Command::Close(Kind::SessionDeleted, None));
            }
        }
    }
}

impl<K, T, C: Connect<T>> Driver<K, T, C> {
    /// Has every endpoint end like this, and leaves a snapshot that says so and holds no service.
    fn close(&mut self, how: &Command, why: Option<&'static str>) {
        for known in self.endpoints.values_mut() {
            if let Some(ready) = known.ready.take() {
                ready.mark_down("stopped");
            }
            known.end(how.clone());
        }
        if let Command::Close(..) = how {
            for task in &self.draining {
                task.commands.send_replace(how.clone());
            }
        }
        self.next = Snapshot::empty();
        self.next.resolution = Resolution::Stopped(match self.stopped {
            true => why,
            false if self.shared.let_go.load(Ordering::Relaxed) => Some("nobody holds it any more"),
            false => Some("the runtime that it lived on has ended"),
        });
        self.dirty = true;
        self.publish();
    }
}

impl<K, T, C: Connect<T>> Drop for Driver<K, T, C> {
    /// However the driver ends, nobody is left waiting for it. Calls in flight whose callers hold nothing
    /// of the pool any more are left to finish.
    fn drop(&mut self) {
        let bound = self.shared.config.drain;
        let why = match self.next.resolution {
            Resolution::Stopped(why) => why,
            _ => None,
        };
        self.close(&Command::Drain(bound), why);
    }
}

impl<T, S> Known<T, S> {
    /// Has its task end like this, and, if that is at once, those too that are finishing what it had before.
    pub(super) fn end(&self, command: Command) {
        if let Command::Close(..) = &command {
            for task in &self.former {
                task.commands.send_replace(command.clone());
            }
        }
        if let Some(task) = &self.task {
            task.commands.send_replace(command);
        }
    }
}
