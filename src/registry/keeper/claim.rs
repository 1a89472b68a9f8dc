//! How a keeper comes to hold its key.

use tokio::time::Instant;

use super::{Keeper, hold::Held};
use crate::{
    error::{Error, Kind},
    registry::{
        codec,
        registration::Holder,
        store::{OnlyIf, Record, Written},
    },
};

/// How often a claim is begun anew at once when others write in between.
const ROUNDS: u32 = 8;

/// How many leases that may be alive are remembered, to be revoked.
const LEASES: usize = 16;

/// What a claim comes to.
pub(super) enum Claimed {
    Held(Held),
    By(Holder),
    /// By another with our role, id and address, who came later.
    BySuccessor(Holder),
}

#[derive(Clone, Copy)]
pub(super) struct Lease {
    pub(super) id: i64,
    /// When it was last known to be alive, at the latest.
    pub(super) confirmed: Option<Instant>,
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

// === impl Keeper ===

impl Keeper {
    /// Writes the record if the key is free, or ours to take.
    pub(super) async fn claim(&mut self) -> Result<Claimed, Error> {
        let mut refused = false;
        for _ in 0..ROUNDS {
            if let Some(there) = self.home.store().get(&self.key).await? {
                match self.judge(&there) {
                    Whose::Ours => return Ok(Claimed::Held(Held::of(there))),
                    Whose::Past => {
                        // First what is to take its place: where no lease can be had, nothing is taken away.
                        self.lease().await?;
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
                    // It may have run out since it was granted, as with an etcd that stood still: the next round looks, and
                    // has another if that is so. Refused again, it is for another reason.
                    if error.kind() == Kind::RegistryRefused
                        && !std::mem::replace(&mut refused, true)
                    {
                        continue;
                    }
                    return Err(error);
                }
            }
        }
        let why = format!("its key was written by others {ROUNDS} times in a row");
        Err(Error::new(Kind::RegistryRefused).with_reason(why))
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
        // Only whoever has just come can be a successor. One that had the key before has been succeeded itself, if
        // what is there is younger: else a backup has brought back what was there before this process, or it is the
        // one that was waited for and has died. That ends with its lease, and is no reason to end.
        match (self.newcomer, self.last) {
            (true, _) => Whose::Past,
            (false, 1..) if there.created > self.last => Whose::Successors(holder),
            (false, _) => Whose::Others(holder),
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

    pub(super) fn confirm(&mut self, id: i64) {
        self.live = Some(Lease {
            id,
            confirmed: Some(Instant::now()),
        });
    }

    /// It is gone, or nobody keeps it alive.
    pub(super) fn forget_lease(&mut self) {
        if let Some(lease) = self.live.take() {
            self.home.hub().holding().remove(&lease.id);
            self.doubtful.push(lease.id);
            if self.doubtful.len() > LEASES {
                // Whose TTL was over long ago.
                self.doubtful.remove(0);
            }
        }
    }
}
