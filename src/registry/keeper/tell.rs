//! What a keeper tells of its registration: on its board, and in the log.

use std::{sync::Arc, time::SystemTime};

use tokio::time::Instant;

use super::{Keeper, YIELD, backoff, hold::Held, spread};
use crate::{
    error::{Error, Kind, SharedError},
    registry::registration::{Holder, RegistrationEvent, RegistrationState},
};

// === impl Keeper ===

impl Keeper {
    pub(super) fn held_by(&self, holder: &Holder) -> Error {
        let key = String::from_utf8_lossy(&self.key);
        Error::new(Kind::AlreadyRegistered)
            .with_role(self.session.role_arc())
            .with_reason(format!("key {key} is held by {holder}"))
    }

    pub(super) fn is_held(&mut self, held: &Held) {
        let generation = held.generation;
        self.generation = Some(generation);
        self.last = generation;
        let mut holding = self.home.hub().holding();
        holding.insert(held.lease, self.handle.clone());
        drop(holding);
        let (role, id) = (self.session.role(), self.session.id());
        let event = match std::mem::replace(&mut self.registered, true) {
            false => {
                tracing::info!(role, id, generation, "registered");
                RegistrationEvent::Registered { generation }
            }
            true => {
                tracing::info!(role, id, generation, "registered again");
                RegistrationEvent::Restored { generation }
            }
        };
        self.board
            .tell(RegistrationState::Registered { generation }, event);
    }

    pub(super) fn is_held_by(&mut self, holder: &Holder) {
        let (role, id) = (self.session.role(), self.session.id());
        let holder = holder.clone();
        // Each look finds the same.
        if self.board.is_held_by(&holder) {
            return;
        }
        match self.session.is_exclusive() {
            true => {
                tracing::info!(role, id, active = %holder, "standing by");
                let state = RegistrationState::StandBy {
                    active: holder.clone(),
                };
                self.board
                    .tell(state, RegistrationEvent::StandingBy { active: holder });
            }
            false => {
                tracing::warn!(role, id, by = %holder, "the session's key is taken");
                let state = RegistrationState::Taken { by: holder.clone() };
                self.board
                    .tell(state, RegistrationEvent::Taken { by: holder });
            }
        }
    }

    pub(super) fn is_succeeded_by(&self, holder: &Holder) {
        let (role, id) = (self.session.role(), self.session.id());
        tracing::warn!(role, id, by = %holder, "the same instance has registered anew; this registration ends");
        let state = RegistrationState::Taken { by: holder.clone() };
        self.board
            .tell(state, RegistrationEvent::Taken { by: holder.clone() });
    }

    /// Held => Lost => Claiming: soon, and later if it was there for less than a TTL several times.
    pub(super) async fn is_lost(&mut self, why: SharedError, since: Instant) {
        let (role, id) = (self.session.role(), self.session.id());
        tracing::warn!(role, id, %why, "the session was lost; registering again");
        let state = RegistrationState::Lost { why: why.clone() };
        self.board.tell(state, RegistrationEvent::Lost { why });
        if since.elapsed() >= self.home.ttl {
            self.losses = 0;
        }
        // Whoever succeeds us deletes first, and has its turn; and not all who are lost with their registry
        // return to it in the same moment.
        self.pause(spread(YIELD)).await;
        if self.losses > 0 {
            let delay = backoff().delay(self.losses - 1);
            self.pause(delay).await;
        }
        self.losses = self.losses.saturating_add(1);
    }

    pub(super) fn is_not_confirmed(&self, held: &Held, why: SharedError) {
        let (role, id) = (self.session.role(), self.session.id());
        tracing::warn!(role, id, error = %why, "the session's lease could not be kept alive");
        let state = RegistrationState::Unreachable {
            generation: held.generation,
            since: SystemTime::now(),
            why: why.clone(),
        };
        self.board
            .tell(state, RegistrationEvent::Unreachable { why });
    }

    /// Nothing was heard of the lease for as long as it lasts: as far as anybody here can know, it is over.
    pub(super) fn is_overdue(&self, why: SharedError) {
        let (role, id) = (self.session.role(), self.session.id());
        tracing::warn!(role, id, error = %why, "the session's lease was not confirmed for its whole TTL");
        let state = RegistrationState::Lost { why: why.clone() };
        self.board.tell(state, RegistrationEvent::Lost { why });
    }

    /// It was not over after all.
    pub(super) fn is_restored(&self, held: &Held) {
        let generation = held.generation;
        let (role, id) = (self.session.role(), self.session.id());
        tracing::info!(role, id, generation, "the session is still there");
        self.board.tell(
            RegistrationState::Registered { generation },
            RegistrationEvent::Restored { generation },
        );
    }

    pub(super) fn is_reached(&self, held: &Held) {
        let generation = held.generation;
        let (role, id) = (self.session.role(), self.session.id());
        tracing::info!(role, id, "the session's lease is kept alive again");
        self.board.tell(
            RegistrationState::Registered { generation },
            RegistrationEvent::Reachable,
        );
    }

    /// A claim failed that nobody waits for; told where nothing else was.
    pub(super) fn is_not_reached(&self, why: Error) {
        let (role, id) = (self.session.role(), self.session.id());
        if self.board.is_not_reached(Arc::new(why)) {
            tracing::warn!(role, id, "the session could not be registered yet");
        }
    }
}
