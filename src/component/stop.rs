//! The order in which a component stops.

use std::{
    future::Future,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::time::{sleep, timeout};

use super::{
    core::{Core, Stopper},
    hook::Step,
    server::Server,
    state::ComponentState,
};
use crate::{
    error::{BoxError, Error, Kind},
    registry::RegistrationState,
};

/// How long the registry may take to take a word at the end.
const WORD: Duration = Duration::from_secs(2);

/// The same, when it is to end at once: a round trip here spares others a TTL.
const AT_ONCE: Duration = Duration::from_millis(250);

/// The right to stop a component, given back when it is dropped.
pub(super) struct Turn(Arc<Core>);

// === impl Core ===

impl Core {
    /// Nobody => (Run | Stop) => Nobody
    pub(super) fn turn(self: &Arc<Self>, who: Stopper) -> Option<Turn> {
        let taken = self.stopper.send_if_modified(|stopper| {
            let free = *stopper == Stopper::Nobody;
            if free {
                *stopper = who;
            }
            free
        });
        // Not made where it was not taken: it gives back what it stands for.
        taken.then(|| Turn(self.clone()))
    }

    /// The stop, which another request cuts short.
    pub(super) async fn end<F, E>(&self, server: &mut Server<'_, F>) -> Result<(), Error>
    where
        F: Future<Output = Result<(), E>>,
        E: Into<BoxError>,
    {
        if self.state() == ComponentState::Stopped {
            return Ok(());
        }
        let mut requests = self.requests.subscribe();
        let first = *requests.borrow_and_update();
        tokio::select! {
            biased;
            () = self.end_in_order(server) => return Ok(()),
            _ = requests.wait_for(|n| *n > first) => {}
        }
        let (role, id) = (&*self.peer.role, &*self.peer.id);
        tracing::warn!(role, id, "asked again to stop: it ends at once");
        server.cut();
        self.draining.cancel();
        self.deregister(AT_ONCE).await;
        let _ = timeout(AT_ONCE, self.stop_manager()).await;
        self.say_end(ComponentState::Stopped);
        let why = "it was asked again to stop before the stop was done, and ended at once";
        Err(Error::new(Kind::Stopped)
            .with_role(&self.peer.role)
            .with_reason(why))
    }

    async fn end_in_order<F, E>(&self, server: &mut Server<'_, F>)
    where
        F: Future<Output = Result<(), E>>,
        E: Into<BoxError>,
    {
        let (role, id) = (&*self.peer.role, &*self.peer.id);
        self.say_end(ComponentState::Stopping);
        self.ending.cancel();
        server.beside(self.hook_at_end(Step::Stopping)).await;
        let is_known = server.beside(self.say_stopping()).await;
        if is_known && !server.has_ended() {
            server.beside(sleep(self.settings.settle)).await;
        }
        self.draining.cancel();
        let drain = self.settings.drain;
        if timeout(drain, server.ended()).await.is_err() {
            tracing::warn!(
                role,
                id,
                "its server has not ended within {drain:?}, and is dropped"
            );
            server.cut();
        }
        self.hook_at_end(Step::Drained).await;
        self.deregister(WORD).await;
        self.hook_at_end(Step::Deregistered).await;
        self.stop_manager().await;
        self.hook_at_end(Step::Stopped).await;
        self.say_end(ComponentState::Stopped);
    }

    /// Says in the registry that it is stopping; whether there is anybody who may call it.
    async fn say_stopping(&self) -> bool {
        let said = timeout(WORD, async {
            let mut registration = self.registration.lock().await;
            let Some(registration) = registration.as_mut() else {
                return Ok(());
            };
            match registration.state() {
                RegistrationState::Ended => Ok(()),
                _ => registration.stopping().await,
            }
        });
        let error = match said.await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some(format!("no answer within {WORD:?}")),
        };
        if let Some(error) = error {
            let (role, id) = (&*self.peer.role, &*self.peer.id);
            tracing::warn!(
                role,
                id,
                error,
                "the registry could not be told that it is stopping"
            );
        }
        matches!(
            self.registration_state(),
            Some(RegistrationState::Registered { .. } | RegistrationState::Unreachable { .. })
        )
    }

    async fn deregister(&self, within: Duration) {
        self.leaving.cancel();
        let removed = timeout(within, async {
            match self.registration.lock().await.take() {
                None => Ok(()),
                Some(own) if matches!(own.state(), RegistrationState::Ended) => Ok(()),
                Some(own) => own.deregister().await,
            }
        });
        let error = match removed.await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {within:?}"),
        };
        let (role, id) = (&*self.peer.role, &*self.peer.id);
        tracing::warn!(
            role,
            id,
            error,
            "its session could not be removed, and ends with its TTL"
        );
    }

    async fn stop_manager(&self) {
        // First said, then looked: of two that end together at least one sees that it is the last.
        self.done.store(true, Ordering::SeqCst);
        let all = self.components.all();
        let is_last = all.iter().all(|other| other.done.load(Ordering::SeqCst));
        if is_last && !self.settings.keep_manager {
            self.manager.stop().await;
        }
    }
}

// === impl Turn ===

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.stopper.send_replace(Stopper::Nobody);
    }
}
