//! From what becomes of the registration to what the component says.

use std::{sync::Arc, time::Duration};

use futures_util::{FutureExt as _, StreamExt as _};
use tokio::{pin, sync::watch, time};

use super::{
    core::Core,
    hook::Step,
    state::{ComponentState, is_unanswered},
};
use crate::{
    Backoff,
    error::Error,
    events::EventKind,
    registry::{Holder, RegistrationEvent, RegistrationEvents, RegistrationState},
};

/// The one who makes a component's state of its registration's.
pub(super) struct Follower {
    core: Arc<Core>,
    states: watch::Receiver<RegistrationState>,
    events: RegistrationEvents,
    /// The generation that the program has been told of, by a hook that took it well.
    told: Option<u64>,
    /// Who was last said to have its key: if it ends, its successor.
    taken_by: Option<Holder>,
    failures: u32,
}

// === impl Follower ===

impl Follower {
    pub(super) fn new(
        core: Arc<Core>,
        states: watch::Receiver<RegistrationState>,
        events: RegistrationEvents,
    ) -> Self {
        Self {
            core,
            states,
            events,
            told: None,
            taken_by: None,
            failures: 0,
        }
    }

    /// Until the component stops: whatever hook runs then is dropped.
    pub(super) async fn run(mut self) {
        let ending = self.core.ending.clone();
        ending.run_until_cancelled(self.follow()).await;
    }

    async fn follow(&mut self) {
        loop {
            let now = self.look();
            let generation = generation_of(&now);
            match (self.told, generation) {
                // Active => (StandBy | Lost | Taken | Ended), or another's in between
                (Some(told), _) if self.core.is_exclusive() && generation != Some(told) => {
                    self.say(&now);
                    self.told = None;
                    if let Err(error) = self.hook(Step::Deactivated).await {
                        let (role, id) = (&*self.core.peer.role, &*self.core.peer.id);
                        tracing::warn!(role, id, %error, "a hook failed");
                    }
                }
                // (Registering | StandBy | Lost | Taken) => (Healthy | Abnormal, and told again)
                (told, Some(generation)) if told != Some(generation) => {
                    self.is_held(&now, generation).await;
                }
                _ => {
                    self.say(&now);
                    if self.states.changed().await.is_err() {
                        return;
                    }
                }
            }
        }
    }

    /// The registry has it: the program hears of it before it is healthy.
    async fn is_held(&mut self, now: &RegistrationState, generation: u64) {
        self.say(now);
        let step = match self.core.is_exclusive() {
            true => Step::Activated { generation },
            false => Step::Registered { generation },
        };
        match self.hook(step).await {
            Ok(()) => {
                self.told = Some(generation);
                self.failures = 0;
            }
            Err(error) => {
                let delay = backoff().delay(self.failures);
                self.failures = self.failures.saturating_add(1);
                let (role, id) = (&*self.core.peer.role, &*self.core.peer.id);
                tracing::warn!(role, id, %error, "a hook failed; it is told again in {delay:?}");
                self.core.say(ComponentState::abnormal(error.to_string()));
                let again = time::sleep(delay);
                pin!(again);
                loop {
                    tokio::select! {
                        biased;
                        () = &mut again => return,
                        Ok(()) = self.states.changed() => {}
                    }
                    // It does not answer, or answers again: that is not what is wrong.
                    let now = self.look();
                    if generation_of(&now) != Some(generation) {
                        return;
                    }
                }
            }
        }
    }

    /// Tells the hooks. Meanwhile what happens to the registration is said, but not that it is healthy.
    async fn hook(&mut self, step: Step) -> Result<(), Error> {
        let core = self.core.clone();
        let told = core.hook(step);
        pin!(told);
        loop {
            tokio::select! {
                biased;
                result = &mut told => return result,
                Ok(()) = self.states.changed() => {
                    let now = self.look();
                    self.say(&now);
                }
            }
        }
    }

    /// Where it stands, having told on the bus what happened up to then.
    fn look(&mut self) -> RegistrationState {
        let now = self.states.borrow_and_update().clone();
        // Each event was told together with a state. States may be passed over, events are not: so they say who the
        // successor is of one that has ended.
        while let Some(Some(event)) = self.events.next().now_or_never() {
            match &event {
                RegistrationEvent::Taken { by } => self.taken_by = Some(by.clone()),
                RegistrationEvent::Ended => {}
                _ => self.taken_by = None,
            }
            let peer = self.core.peer.clone();
            self.core.tell(EventKind::Registration { peer, event });
        }
        now
    }

    fn say(&self, now: &RegistrationState) {
        let state = match generation_of(now) {
            Some(generation) if self.told != Some(generation) => {
                // Without hooks there is nothing to wait for, and no moment in which it is said.
                if self.core.hooks.is_empty() {
                    return;
                }
                let step = match self.core.is_exclusive() {
                    true => "active",
                    false => "registered",
                };
                let why = format!("{step}, generation {generation}; its hook runs");
                ComponentState::initializing(why)
            }
            // The one active must not go on where another may be; anybody else lives, and is called.
            None if is_unanswered(now) && !self.core.is_exclusive() && self.told.is_some() => {
                ComponentState::Healthy
            }
            _ => ComponentState::of(now, self.taken_by.as_ref()),
        };
        self.core.say(state);
    }
}

/// The generation in which the registry has it.
fn generation_of(state: &RegistrationState) -> Option<u64> {
    match state {
        RegistrationState::Registered { generation }
        | RegistrationState::Unreachable { generation, .. } => Some(*generation),
        _ => None,
    }
}

/// When a hook that failed is told again: 1 s × 2, at most 30 s, ± 20 %.
fn backoff() -> Backoff {
    let (initial, max) = (Duration::from_secs(1), Duration::from_secs(30));
    // These are within the bounds; the default is for whoever changes them wrongly.
    Backoff::new(initial, 2.0, max, 0.2).unwrap_or_default()
}
