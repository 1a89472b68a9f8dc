//! The task that keeps one session in a registry.
//!
//! It owns the registration's state: nobody else writes the key. What the feed of that key says is a hint; what
//! is there is asked for before anything is made of it, for a feed may tell of what this task has mended since.

mod claim;
mod heart;
mod hold;
mod tell;

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future;
use tokio::{
    runtime,
    sync::{mpsc, oneshot},
    time::{self, Instant},
};

use self::claim::{Claimed, Lease};
use super::{
    Session, codec,
    feed::{News, Subscription},
    home::Home,
    registration::{Board, RegistrationEvent, RegistrationState, Release},
    store::{Event, OnlyIf, Scope, Write, Written},
};
use crate::{
    Backoff,
    error::{BoxError, Error, Kind, SharedError},
};

/// How long whoever waits for a key trusts its feed before it looks for itself.
const LOOK: Duration = Duration::from_secs(1);

/// How long the loser of a record lets others have their turn.
const YIELD: Duration = Duration::from_millis(400);

pub(super) struct Keeper {
    home: Home,
    board: Board,
    key: Bytes,
    session: Arc<Session>,
    updates: mpsc::Receiver<Update>,
    /// Whether somebody has the registration, which says so at once when it is let go of.
    handle: Weak<()>,
    own: Subscription,
    /// The lease that the record is under, or is to be.
    live: Option<Lease>,
    /// The generation that it has, while it is held. No longer: in a registry that lost its data another's may have
    /// come into being at the very revision that ours did, and is not ours to delete.
    generation: Option<u64>,
    /// The generation that it had last; 0 while it never had one.
    last: u64,
    /// Others that were asked for and may be alive. A request whose answer was lost may still do its work.
    doubtful: Vec<i64>,
    /// Whether it has yet to see who has its key: until then it may be the successor of who has.
    newcomer: bool,
    /// Whether the registry has ever had it.
    registered: bool,
    /// How often in a row it was lost soon after it was there.
    losses: u32,
}

/// What the first claim does when it cannot have the key.
#[derive(Clone, Copy, Debug)]
pub(super) enum First {
    Refuse,
    Wait(Duration),
    Background,
}

/// What the session is to say from now on.
pub(super) struct Update {
    pub(super) session: Arc<Session>,
    pub(super) reply: oneshot::Sender<Result<(), Error>>,
}

/// The first outcome, which somebody waits for.
struct Outcome {
    tell: Option<oneshot::Sender<Result<(), Error>>>,
    how: First,
    until: Option<Instant>,
}

/// The runtime that this is polled on; [`Kind::Invalid`] if there is none.
pub(super) fn current_runtime() -> Result<runtime::Handle, Error> {
    runtime::Handle::try_current().map_err(|error| {
        Error::invalid("registry", "used outside a tokio runtime").with_source(error)
    })
}

// === impl Keeper ===

impl Keeper {
    pub(super) fn new(
        home: Home,
        session: Arc<Session>,
        board: Board,
        updates: mpsc::Receiver<Update>,
        handle: Weak<()>,
    ) -> Self {
        let key = Bytes::from(home.codec.key(&home.root, &session));
        Self {
            own: home.hub().subscribe(Scope::Key(key.clone())),
            home,
            board,
            key,
            session,
            updates,
            handle,
            live: None,
            generation: None,
            last: 0,
            doubtful: Vec::new(),
            newcomer: true,
            registered: false,
            losses: 0,
        }
    }

    /// Until it is released: told so, or let go of. Whatever it was doing is dropped then, wherever it was.
    pub(super) async fn run(
        mut self,
        first: First,
        outcome: oneshot::Sender<Result<(), Error>>,
        released: oneshot::Receiver<Release>,
    ) {
        // However this ends: with its runtime, too.
        let _ended = Ended(self.board.clone());
        let until = match first {
            First::Wait(within) => Some(Instant::now() + within),
            First::Refuse | First::Background => None,
        };
        let outcome = Outcome {
            tell: Some(outcome),
            how: first,
            until,
        };
        let reply = tokio::select! {
            biased;
            reply = released => reply.ok(),
            () = self.keep(outcome) => None,
        };
        let released = self.release().await;
        match (reply, released) {
            (Some(reply), released) => drop(reply.send(released)),
            (None, Err(error)) => {
                let (role, id) = (self.session.role(), self.session.id());
                tracing::warn!(role, id, %error, "the session could not be removed, and ends with its TTL");
            }
            (None, Ok(())) => {}
        }
    }

    /// Ends only when the first claim is refused, or a successor has the key.
    async fn keep(&mut self, mut outcome: Outcome) {
        if let First::Background = outcome.how {
            outcome.tell(Ok(()));
        }
        let mut failures = 0;
        loop {
            let claimed = self.claim().await;
            self.newcomer &= claimed.is_err();
            match claimed {
                // Claiming => Held => Lost
                Ok(Claimed::Held(held)) => {
                    failures = 0;
                    self.is_held(&held);
                    outcome.tell(Ok(()));
                    let since = Instant::now();
                    let why = self.hold(held).await;
                    self.generation = None;
                    self.is_lost(why, since).await;
                }
                // Claiming => ended
                Ok(Claimed::BySuccessor(holder)) => {
                    outcome.tell(Err(self.held_by(&holder)));
                    return self.is_succeeded_by(&holder);
                }
                // Claiming => (StandBy | Taken | refused)
                Ok(Claimed::By(holder)) => {
                    failures = 0;
                    let exclusive = self.session.is_exclusive();
                    if outcome.is_open() && !exclusive && outcome.until.is_none() {
                        return outcome.tell(Err(self.held_by(&holder)));
                    }
                    self.is_held_by(&holder);
                    // After that: whoever waited for it looks at where it stands.
                    if exclusive {
                        outcome.tell(Ok(()));
                    }
                    self.let_go_of_leases().await;
                    if !self.until_free(outcome.until()).await {
                        return outcome.tell(Err(self.held_by(&holder)));
                    }
                }
                // Claiming => (Waiting => Claiming | refused)
                Err(error) => {
                    if outcome.is_open() && !outcome.waits_out(&error) {
                        return outcome.tell(Err(error));
                    }
                    let delay = backoff().delay(failures);
                    failures = failures.saturating_add(1);
                    self.is_not_reached(error);
                    self.pause(delay).await;
                }
            }
        }
    }

    /// Until the key may be free; false when it is so late.
    async fn until_free(&mut self, late: Option<Instant>) -> bool {
        let look = Instant::now() + spread(LOOK.min(self.home.ttl / 3));
        loop {
            let Self {
                own, updates, key, ..
            } = self;
            let is_late = async {
                match late {
                    Some(late) => time::sleep_until(late).await,
                    None => future::pending().await,
                }
            };
            let update = tokio::select! {
                biased;
                () = is_late => return false,
                () = time::sleep_until(look) => return true,
                Some(update) = updates.recv() => update,
                news = own.next() => match frees(&news, key) {
                    true => return true,
                    false => continue,
                },
            };
            self.remember(update);
        }
    }

    async fn pause(&mut self, delay: Duration) {
        let until = Instant::now() + delay;
        loop {
            let update = tokio::select! {
                biased;
                () = time::sleep_until(until) => return,
                Some(update) = self.updates.recv() => update,
            };
            self.remember(update);
        }
    }

    /// To be written with the next claim.
    fn remember(&mut self, update: Update) {
        let Update { session, reply } = update;
        let result = codec::encode(&*self.home.codec, &session, i64::MAX).map(drop);
        if result.is_ok() {
            self.session = session;
        }
        let _ = reply.send(result);
    }

    /// Revokes all leases that it has or may have, whatever becomes of each; the first error, if any.
    async fn release(&mut self) -> Result<(), Error> {
        self.forget_lease();
        // By its key as well, in case that somebody has just taken the lease from it.
        let deleted = async {
            if let Some(generation) = self.generation {
                self.write(None, 0, OnlyIf::Created(generation)).await?;
            }
            Ok(())
        };
        // The live one is the last of them, and its error the one to tell. Together: however many they are, they
        // take no longer than one.
        let ids = self.doubtful.iter().rev();
        let revoked = ids.map(|id| self.home.store().revoke(*id));
        let (revoked, deleted) = future::join(future::join_all(revoked), deleted).await;
        revoked.into_iter().chain([deleted]).collect()
    }

    /// Nothing is to be under a lease of ours while another has the key.
    async fn let_go_of_leases(&mut self) {
        self.forget_lease();
        self.revoke_doubtful().await;
    }

    async fn revoke_doubtful(&mut self) {
        while let Some(id) = self.doubtful.last().copied() {
            if self.home.store().revoke(id).await.is_err() {
                return;
            }
            self.doubtful.pop();
        }
    }

    async fn write(
        &self,
        value: Option<Bytes>,
        lease: i64,
        only_if: OnlyIf,
    ) -> Result<Written, Error> {
        let write = Write {
            key: self.key.clone(),
            value,
            lease,
            only_if,
        };
        self.home.store().write(write).await
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.forget_lease();
    }
}

// === impl Outcome ===

impl Outcome {
    /// Somebody waits, and nothing is registered yet.
    fn is_open(&self) -> bool {
        self.tell.is_some()
    }

    /// Whether this error is one that may pass in the time that it waits.
    fn waits_out(&self, error: &Error) -> bool {
        let passes = error.kind() == Kind::RegistryUnreachable;
        passes && self.until().is_some_and(|until| Instant::now() < until)
    }

    fn until(&self) -> Option<Instant> {
        self.until.filter(|_| self.is_open())
    }

    fn tell(&mut self, outcome: Result<(), Error>) {
        if let Some(tell) = self.tell.take() {
            let _ = tell.send(outcome);
        }
    }
}

struct Ended(Board);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0
            .tell(RegistrationState::Ended, RegistrationEvent::Ended);
    }
}

/// Whether this says that nobody has the key.
fn frees(news: &News, key: &Bytes) -> bool {
    match news {
        News::Listed(records) => !records.iter().any(|record| record.key == *key),
        News::Happened(events) => {
            let last = events.iter().rfind(|event| event.key() == key);
            matches!(last, Some(Event::Delete(_)))
        }
        News::Failed(_) | News::Fresh => false,
    }
}

/// 100 ms × 1.5, at most 500 ms, ± 20 %: a registry that is back is to have it again within two seconds.
fn backoff() -> Backoff {
    let (initial, max) = (Duration::from_millis(100), Duration::from_millis(500));
    // These are within the bounds; the default is for whoever changes them wrongly.
    Backoff::new(initial, 1.5, max, 0.2).unwrap_or_default()
}

/// A little earlier, so that many who began together do not go on together.
fn spread(delay: Duration) -> Duration {
    delay.mul_f64(0.7 + 0.3 * fastrand::f64())
}

fn shared(why: &'static str) -> SharedError {
    Arc::from(BoxError::from(why))
}

#[cfg(test)]
mod tests;
