//! A session that has moved: the same one, at another address.
//!
//! Make before break: its calls go on where it was until it is reached where it is now, as an endpoint that stands in for
//! the new one. `tower::balance` replaces a service of the same key in the same way. Nobody is dialled there any more, who
//! might be another: once its connections are lost, only the new address counts.

use std::{
    hash::Hash,
    panic::{self, AssertUnwindSafe},
    sync::Arc,
};

use tokio::time::Instant;

use super::Driver;
use crate::{
    endpoint::{Connect, Target, task::Command},
    error::SharedError,
    events::EventKind,
    pool::snapshot::Phase,
};

impl<K, T, C> Driver<K, T, C>
where
    K: Hash + Eq + Send + 'static,
    T: Target,
    C: Connect<T>,
{
    /// Has a new endpoint in the place of this one, which is elsewhere now.
    pub(super) fn follow(&mut self, key: K, number: u64, target: Arc<T>) {
        let Some(known) = self.endpoints.get_mut(&number) else {
            return;
        };
        let wanted = !target.stopping() && !known.target.stopping();
        let (stands_in, former) = match known.state.phase {
            Phase::Ready if wanted => (Some(number), Vec::new()),
            // Who stood in for this one does so for the next: it has moved again before it was reached.
            _ if wanted => {
                let stands_in = known.stands_in.take();
                (stands_in, self.leave(number, &self.drain()))
            }
            _ => {
                self.relieve(number, &self.drain());
                (None, self.leave(number, &self.drain()))
            }
        };
        let new = self.add(key, target);
        if let Some(known) = self.endpoints.get_mut(&new) {
            known.former = former;
            known.stands_in = stands_in;
        }
        if let Some(stands_in) = stands_in
            && let Some(known) = self.endpoints.get_mut(&stands_in)
        {
            known.stands_in_for = Some(new);
            // It is another's address from now on, as far as anybody knows.
            if let Some(task) = &known.task {
                task.commands.send_replace(Command::Stay);
            }
            if let Some(ready) = known.ready.clone() {
                // A bug in one lifeline is not the others' end.
                let stop = AssertUnwindSafe(|| ready.stop_dialling());
                if panic::catch_unwind(stop).is_err() {
                    self.complain("a lifeline panicked when told to stop dialling");
                }
            }
        }
        self.show(new);
    }

    /// Whoever stands in for this one takes no more calls, and ends as told.
    pub(super) fn relieve(&mut self, number: u64, how: &Command) {
        let known = self.endpoints.get_mut(&number);
        let Some(stands_in) = known.and_then(|known| known.stands_in.take()) else {
            return;
        };
        let mut calls = Vec::new();
        if let Some(before) = self.endpoints.get_mut(&stands_in) {
            calls = std::mem::take(&mut before.retired);
            calls.extend(before.ready.as_ref().map(|ready| ready.load.watch()));
        }
        let draining = self.leave(stands_in, how);
        if let Some(known) = self.endpoints.get_mut(&number) {
            known.former.retain(|task| !task.commands.is_closed());
            known.former.extend(draining);
            known.retired.retain(|calls| calls.current() > 0);
            known.retired.extend(calls);
        }
    }

    /// One that stands in for this `number` has lost its connection. Where it was is not where it would be found again.
    pub(super) fn stand_in_lost(&mut self, stands_in: u64, number: u64, why: SharedError) {
        if let Some(known) = self.endpoints.get(&stands_in) {
            let peer = known.target.peer().clone();
            self.tell(EventKind::Lost { peer, why });
        }
        self.relieve(number, &self.drain());
        if let Some(known) = self.endpoints.get_mut(&number) {
            known.lost.get_or_insert_with(Instant::now);
            if let Some(task) = &known.task {
                task.nudge.notify_one();
            }
        }
        self.show(number);
    }

    pub(super) fn drain(&self) -> Command {
        Command::Drain(self.shared.config.drain)
    }
}
