//! How a keeper keeps what it holds.

use bytes::Bytes;

use super::{
    Keeper, Update,
    heart::{Beat, Heart},
    shared,
};
use crate::{
    error::{Error, Kind, SharedError},
    registry::{
        codec,
        feed::News,
        store::{Event, OnlyIf, Record, Written},
    },
};

/// How often a record is written anew at once when others write in between.
const ROUNDS: u32 = 8;

/// The record, as it was last written.
#[derive(Clone)]
pub(super) struct Held {
    pub(super) lease: i64,
    pub(super) generation: u64,
    pub(super) modified: u64,
    pub(super) value: Bytes,
}

// === impl Keeper ===

impl Keeper {
    /// Keeps it there, and returns how it was lost.
    pub(super) async fn hold(&mut self, mut held: Held) -> SharedError {
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
        Err(Error::new(Kind::RegistryRefused).with_reason(why))
    }
}

// === impl Held ===

impl Held {
    pub(super) fn of(there: Record) -> Self {
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
