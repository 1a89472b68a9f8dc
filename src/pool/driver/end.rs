//! The end of a pool: as it was ordered, or as its driver is dropped.

use std::{sync::atomic::Ordering, time::Duration};

use tokio::{sync::watch, time};

use super::{Driver, Known};
use crate::{
    endpoint::{Connect, task::Command},
    error::Kind,
    pool::{
        End,
        snapshot::{Resolution, Snapshot},
    },
};

/// How long closing may take once it was ordered.
const CLOSING: Duration = Duration::from_secs(2);

impl<K, T, C: Connect<T>> Driver<K, T, C> {
    /// Lets the calls in flight go on until the time that was ordered, which a later order may bring forward; then
    /// closes.
    pub(super) async fn end(mut self, mut ends: watch::Receiver<Option<End>>) {
        let Some(End { mut by, why }) = *ends.borrow_and_update() else {
            return;
        };
        self.stopped = true;
        // Draining => Closing
        let left = by.saturating_duration_since(time::Instant::now());
        if !left.is_zero() {
            self.close(&Command::Drain(left), why);
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
                }
            }
        }
        // Closing => ended
        self.close(&Command::Close(Kind::Stopped, None), why);
        let ended = async { while self.tasks.join_next().await.is_some() {} };
        // Dropping the set aborts what is left.
        let _ = time::timeout(CLOSING, ended).await;
    }

    /// Has every endpoint end like this, and leaves a snapshot that says so and holds no service.
    fn close(&mut self, how: &Command, why: Option<&'static str>) {
        self.let_go_of_all(how);
        self.next = Snapshot::empty();
        self.next.resolution = Resolution::Stopped(match self.stopped {
            true => why,
            false if self.shared.let_go.load(Ordering::Relaxed) => Some("nobody holds it any more"),
            false => Some("the runtime that it lived on has ended"),
        });
        self.dirty = true;
        self.publish();
    }

    /// Has every endpoint end like this, and forgets it. They still count among those that are draining.
    pub(super) fn let_go_of_all(&mut self, how: &Command) {
        self.draining.retain(|task| !task.commands.is_closed());
        for task in &self.draining {
            if let Command::Close(..) = how {
                task.commands.send_replace(how.clone());
            }
        }
        for (_, mut known) in self.endpoints.drain() {
            if let Some(ready) = &known.ready {
                ready.mark_down();
            }
            known.end(how.clone());
            self.draining.extend(known.task.take());
        }
        self.by_key.clear();
        self.ids.clear();
    }

    pub(super) fn publish(&mut self) {
        if std::mem::take(&mut self.dirty) {
            self.shared
                .snapshot
                .store(std::sync::Arc::new(self.next.clone()));
            self.shared.changed.notify_waiters();
        }
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
    pub(super) fn end(&self, command: Command) {
        if let Some(task) = &self.task {
            task.commands.send_replace(command);
        }
    }
}
