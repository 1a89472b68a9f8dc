//! The task that keeps one session in a registry.
//!
//! It owns the registration's state: nobody else writes the key. What the feed of that key says is a hint; what
//! is there is asked for before anything is made of it, for a feed may tell of what this task has mended since.

mod heart;

use std::{
    sync::{Arc, Weak},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use futures_util::future;
use tokio::{
    runtime,
    sync::{mpsc, oneshot},
    time::{self, Instant},
};

use self::heart::{Beat, Heart};
use super::{
    Session, codec,
    feed::{News, Subscription},
    home::Home,
    registration::{Board, Holder, RegistrationEvent, RegistrationState, Release},
    store::{Event, OnlyIf, Record, Scope, Write, Written},
};
use crate::{
    Backoff,
    error::{BoxError, Error, Kind, SharedError},
};

/// How long whoever waits for a key trusts its feed before it looks for itself.
const LOOK: Duration = Duration::from_secs(1);

/// How long the loser of a record lets others have their turn.
const YIELD: Duration = Duration::from_millis(400);

/// How often a claim is begun anew at once when others write in between.
const ROUNDS: u32 = 8;

/// How many leases that may be alive are remembered, to be revoked.
const LEASES: usize = 16;

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

#[derive(Clone, Copy)]
struct Lease {
    id: i64,
    /// When it was last known to be alive, at the latest.
    confirmed: Option<Instant>,
}

/// The record, as it was last written.
#[derive(Clone)]
struct Held {
    lease: i64,
    generation: u64,
    modified: u64,
    value: Bytes,
}

enum Claimed {
    Held(Held),
    By(Holder),
    /// By another with our role, id and address, who came later.
    BySuccessor(Holder),
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

    /// Ends only when the first claim is refused.
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
                    if outcome.is_open() {
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

    // --- claiming

    /// Writes the record if the key is free, or ours to take.
    async fn claim(&mut self) -> Result<Claimed, Error> {
        for _ in 0..ROUNDS {
            if let Some(there) = self.home.store().get(&self.key).await? {
                match self.judge(&there) {
                    Whose::Ours => return Ok(Claimed::Held(Held::of(there))),
                    Whose::Past => {
                        // If it has changed meanwhile, that is seen in the next round.
                        let unchanged = OnlyIf::Unchanged(there.modified);
                        self.write(None, 0, unchanged).await?;
                        continue;
                    }
                    Whose::Successors(holder) => return Ok(Claimed::BySuccessor(holder)),
                    Whose::Others(holder) => return Ok(Claimed::By(holder)),
                }
            }
            let lease = self.lease().await?;
            let value = codec::encode(&*self.home.codec, &self.session, lease)?;
            let written = self.write(Some(value.clone()), lease, OnlyIf::Absent);
            match written.await {
                Ok(Written::Done(generation)) => {
                    return Ok(Claimed::Held(Held {
                        lease,
                        generation,
                        modified: generation,
                        value,
                    }));
                }
                // It came between.
                Ok(Written::Refused(_)) => {}
                Err(error) => {
                    // An answer is what says that it is alive; a refusal may say that it is gone.
                    self.live = self.live.map(|lease| Lease {
                        confirmed: None,
                        ..lease
                    });
                    return Err(error);
                }
            }
        }
        let why = format!("its key was written by others {ROUNDS} times in a row");
        Err(Error::new(Kind::Service).with_reason(why))
    }

    fn judge(&self, there: &Record) -> Whose {
        if there.lease != 0 {
            // An answer was lost: it was written all the same, if in words of before. The former is mended by
            // whoever sees it; the latter by writing it anew, as another generation.
            if self.live.is_some_and(|live| live.id == there.lease) && self.says_what_we_say(there)
            {
                return Whose::Ours;
            }
            let live = self.live.iter().map(|live| live.id);
            if live
                .chain(self.doubtful.iter().copied())
                .any(|id| id == there.lease)
            {
                return Whose::Past;
            }
        }
        let holder = Holder::of(&self.home, self.session.role(), there);
        let same = holder.session().is_some_and(|other| {
            other.id() == self.session.id() && other.address() == self.session.address()
        });
        // Whoever holds it through this very registry means to.
        let held = self.home.hub().holding().get(&there.lease).cloned();
        if !same || held.is_some_and(|handle| handle.strong_count() > 0) {
            return Whose::Others(holder);
        }
        // Only whoever has just come can be a successor. One that was there before has been succeeded itself.
        match self.newcomer {
            true => Whose::Past,
            false => Whose::Successors(holder),
        }
    }

    fn says_what_we_say(&self, there: &Record) -> bool {
        codec::encode(&*self.home.codec, &self.session, there.lease)
            .is_ok_and(|value| *value == *there.value)
    }

    /// A lease that is alive.
    async fn lease(&mut self) -> Result<i64, Error> {
        // One that was confirmed a moment ago can be counted on.
        let recent = self.home.ttl / 3;
        let lease = match self.live {
            Some(Lease {
                id,
                confirmed: Some(at),
            }) if at.elapsed() < recent => return Ok(id),
            // It may be there or not: by its own id it can be asked for again.
            Some(
                lease @ Lease {
                    confirmed: None, ..
                },
            ) => lease,
            Some(Lease { id, .. }) => {
                if self.home.store().keep_alive(id, recent).await? {
                    self.confirm(id);
                    return Ok(id);
                }
                self.forget_lease();
                self.new_lease()
            }
            None => self.new_lease(),
        };
        self.home.store().grant(lease.id, self.home.ttl).await?;
        self.confirm(lease.id);
        Ok(lease.id)
    }

    /// By our own choice, so that it can be revoked even when the answer is lost.
    fn new_lease(&mut self) -> Lease {
        let id = fastrand::i64(1..i64::MAX);
        let lease = Lease {
            id,
            confirmed: None,
        };
        self.live = Some(lease);
        lease
    }

    fn confirm(&mut self, id: i64) {
        self.live = Some(Lease {
            id,
            confirmed: Some(Instant::now()),
        });
    }

    /// It is gone, or nobody keeps it alive.
    fn forget_lease(&mut self) {
        if let Some(lease) = self.live.take() {
            self.home.hub().holding().remove(&lease.id);
            self.doubtful.push(lease.id);
            if self.doubtful.len() > LEASES {
                // Whose TTL was over long ago.
                self.doubtful.remove(0);
            }
        }
    }

    // --- holding

    /// Keeps it there, and returns how it was lost.
    async fn hold(&mut self, mut held: Held) -> SharedError {
        enum Next {
            Write(Update),
            Beat(Beat),
            Look,
        }
        // In a task of its own: whatever is written and looked at meanwhile, and however long that takes.
        let confirmed = self.live.and_then(|live| live.confirmed);
        let heart = Heart::start(&self.home, held.lease, confirmed);
        let mut beats = heart.beats.clone();
        let mut state = Beat::Alive;
        // Something was said of it that could not be looked at yet.
        let mut doubt = false;
        loop {
            let next = {
                let Self {
                    own, updates, key, ..
                } = self;
                tokio::select! {
                    biased;
                    Ok(()) = beats.changed() => Next::Beat(beats.borrow_and_update().clone()),
                    Some(update) = updates.recv() => Next::Write(update),
                    news = own.next() => match held.is_contradicted(&news, key) {
                        true => Next::Look,
                        false => continue,
                    },
                }
            };
            match next {
                Next::Beat(beat) => {
                    let before = std::mem::replace(&mut state, beat.clone());
                    match beat {
                        Beat::Alive => {
                            self.confirm(held.lease);
                            self.revoke_doubtful().await;
                            let back = !matches!(before, Beat::Alive);
                            if (back || doubt)
                                && let Some(lost) = self.look_or(&mut held, &mut doubt).await
                            {
                                return lost;
                            }
                            match before {
                                Beat::Failing(_) => self.is_reached(&held),
                                Beat::Overdue(_) => self.is_restored(&held),
                                Beat::Alive | Beat::Gone => {}
                            }
                        }
                        Beat::Failing(why) => self.is_not_confirmed(&held, why),
                        Beat::Overdue(why) => self.is_overdue(why),
                        Beat::Gone => {
                            self.forget_lease();
                            return shared("its lease ran out");
                        }
                    }
                }
                Next::Write(update) => {
                    if let Some(lost) = self.rewrite(&mut held, update).await {
                        return lost;
                    }
                }
                Next::Look => {
                    if let Some(lost) = self.look_or(&mut held, &mut doubt).await {
                        return lost;
                    }
                }
            }
        }
    }

    /// Writes what an update says over what is there; how it was lost, if it was.
    async fn rewrite(&mut self, held: &mut Held, update: Update) -> Option<SharedError> {
        let Update { session, reply } = update;
        let result = match codec::encode(&*self.home.codec, &session, held.lease) {
            Ok(value) => self.put_right(held, value).await,
            Err(error) => Err(error),
        };
        match result {
            Ok(None) => {
                self.session = session;
                let _ = reply.send(Ok(()));
                None
            }
            Ok(Some(lost)) => {
                self.remember(Update { session, reply });
                Some(lost)
            }
            Err(error) => {
                let _ = reply.send(Err(error));
                None
            }
        }
    }

    /// Looks at it, and notes whether that could not be done.
    async fn look_or(&mut self, held: &mut Held, doubt: &mut bool) -> Option<SharedError> {
        match self.look(held).await {
            Ok(lost) => {
                *doubt = false;
                lost
            }
            Err(_) => {
                *doubt = true;
                None
            }
        }
    }

    /// Whether the record is there as it was written, which it is made to be; how it was lost, if it was.
    async fn look(&mut self, held: &mut Held) -> Result<Option<SharedError>, Error> {
        let there = self.home.store().get(&self.key).await?;
        let Some(there) = there.filter(|there| there.created == held.generation) else {
            return Ok(Some(shared("its record was deleted")));
        };
        held.modified = there.modified;
        if there.lease == held.lease && there.value == held.value {
            return Ok(None);
        }
        // Without our lease it would outlive us; and what it says is ours to say.
        let (role, id) = (self.session.role(), self.session.id());
        tracing::warn!(
            role,
            id,
            "somebody wrote over the session's record, which is written again"
        );
        self.put_right(held, held.value.clone()).await
    }

    /// Writes this over our record as it is now; how it was lost, if it was.
    ///
    /// On the condition that it is unchanged, and not only that it is ours: a write whose answer was lost may be
    /// done late, by a member that was asleep, and is not to undo what was written since.
    async fn put_right(&self, held: &mut Held, value: Bytes) -> Result<Option<SharedError>, Error> {
        for _ in 0..ROUNDS {
            let unchanged = OnlyIf::Unchanged(held.modified);
            match self
                .write(Some(value.clone()), held.lease, unchanged)
                .await?
            {
                Written::Done(modified) => {
                    (held.modified, held.value) = (modified, value);
                    return Ok(None);
                }
                Written::Refused(Some(there)) if there.created == held.generation => {
                    held.modified = there.modified;
                    // An answer was lost.
                    if there.lease == held.lease && there.value == value {
                        held.value = value;
                        return Ok(None);
                    }
                }
                Written::Refused(_) => return Ok(Some(shared("its record was deleted"))),
            }
        }
        let why = format!("its record was written over by others {ROUNDS} times in a row");
        Err(Error::new(Kind::Service).with_reason(why))
    }

    // --- waiting

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
        let result = codec::encode(&*self.home.codec, &session, 1).map(drop);
        if result.is_ok() {
            self.session = session;
        }
        let _ = reply.send(result);
    }

    // --- letting go

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

    // --- telling

    fn held_by(&self, holder: &Holder) -> Error {
        let key = String::from_utf8_lossy(&self.key);
        Error::new(Kind::AlreadyRegistered)
            .with_role(self.session.role_arc())
            .with_reason(format!("key {key} is held by {holder}"))
    }

    fn is_held(&mut self, held: &Held) {
        let generation = held.generation;
        self.generation = Some(generation);
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

    fn is_held_by(&mut self, holder: &Holder) {
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

    fn is_succeeded_by(&self, holder: &Holder) {
        let (role, id) = (self.session.role(), self.session.id());
        tracing::warn!(role, id, by = %holder, "the same instance has registered anew; this registration ends");
        let state = RegistrationState::Taken { by: holder.clone() };
        self.board
            .tell(state, RegistrationEvent::Taken { by: holder.clone() });
    }

    /// Held => Lost => Claiming: soon, and later if it was there for less than a TTL several times.
    async fn is_lost(&mut self, why: SharedError, since: Instant) {
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

    fn is_not_confirmed(&self, held: &Held, why: SharedError) {
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
    fn is_overdue(&self, why: SharedError) {
        let (role, id) = (self.session.role(), self.session.id());
        tracing::warn!(role, id, error = %why, "the session's lease was not confirmed for its whole TTL");
        let state = RegistrationState::Lost { why: why.clone() };
        self.board.tell(state, RegistrationEvent::Lost { why });
    }

    /// It was not over after all.
    fn is_restored(&self, held: &Held) {
        let generation = held.generation;
        let (role, id) = (self.session.role(), self.session.id());
        tracing::info!(role, id, generation, "the session is still there");
        self.board.tell(
            RegistrationState::Registered { generation },
            RegistrationEvent::Restored { generation },
        );
    }

    fn is_reached(&self, held: &Held) {
        let generation = held.generation;
        let (role, id) = (self.session.role(), self.session.id());
        tracing::info!(role, id, "the session's lease is kept alive again");
        self.board.tell(
            RegistrationState::Registered { generation },
            RegistrationEvent::Reachable,
        );
    }

    /// A claim failed that nobody waits for; told where nothing else was.
    fn is_not_reached(&self, why: Error) {
        let (role, id) = (self.session.role(), self.session.id());
        if self.board.is_not_reached(Arc::new(why)) {
            tracing::warn!(role, id, "the session could not be registered yet");
        }
    }
}

/// Whose a record is.
enum Whose {
    /// Ours, and as we would have it.
    Ours,
    /// Ours of before, or of whom we succeed: in the way.
    Past,
    /// Another's, who is what we are, and came later.
    Successors(Holder),
    Others(Holder),
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.forget_lease();
    }
}

// === impl Held ===

impl Held {
    fn of(there: Record) -> Self {
        Self {
            lease: there.lease,
            generation: there.created,
            modified: there.modified,
            value: there.value,
        }
    }

    /// Whether this says that the record is not there as it was written.
    fn is_contradicted(&self, news: &News, key: &Bytes) -> bool {
        let is_other = |record: &Record| {
            record.created != self.generation
                || record.lease != self.lease
                || record.value != self.value
        };
        match news {
            News::Listed(records) => match records.iter().find(|record| record.key == *key) {
                Some(record) => is_other(record),
                None => true,
            },
            News::Happened(events) => events.iter().any(|event| match event {
                Event::Put(record) => record.key == *key && is_other(record),
                Event::Delete(gone) => gone == key,
            }),
            News::Failed(_) | News::Fresh => false,
        }
    }
}

// === impl Outcome ===

impl Outcome {
    /// Somebody waits, and nothing is registered yet.
    fn is_open(&self) -> bool {
        self.tell.is_some()
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
