//! The in-process registry as discovery and registrations know it.

use std::{future::ready, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::stream;
use tokio::{
    sync::watch,
    time::{self, Instant},
};

use super::{
    Shared, UNAVAILABLE,
    history::{Compacted, History},
    unavailable,
};
use crate::{
    endpoint::BoxFuture,
    error::{BoxError, Error, Kind},
    registry::store::{
        Broken, Event, Listing, OnlyIf, Record, Scope, Store, Watch, Write, Written,
    },
};

/// How far one watch has come.
struct Cursor {
    shared: Arc<Shared>,
    changed: watch::Receiver<u64>,
    scope: Scope,
    next: u64,
    outages: u64,
    over: bool,
}

// === impl Shared ===

impl Store for Shared {
    fn list<'a>(&'a self, scope: &'a Scope) -> BoxFuture<'a, Result<Listing, BoxError>> {
        Box::pin(async move {
            let state = self.lock();
            match state.available {
                true => Ok(state.history.list(scope)),
                false => Err(UNAVAILABLE.into()),
            }
        })
    }

    fn get<'a>(&'a self, key: &'a Bytes) -> BoxFuture<'a, Result<Option<Record>, Error>> {
        let state = self.lock();
        Box::pin(ready(match state.available {
            true => Ok(state.history.get(key).cloned()),
            false => Err(unavailable()),
        }))
    }

    fn grant(&self, lease: i64, ttl: Duration) -> BoxFuture<'_, Result<(), Error>> {
        let grant = |history: &mut History| history.grant(lease, ttl, Instant::now());
        Box::pin(ready(self.client(grant)))
    }

    fn keep_alive(&self, lease: i64, _: Duration) -> BoxFuture<'_, Result<bool, Error>> {
        let keep = |history: &mut History| history.keep_alive(lease, Instant::now());
        Box::pin(ready(self.client(keep)))
    }

    fn revoke(&self, lease: i64) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(ready(self.client(|history| history.revoke(lease))))
    }

    fn write(&self, write: Write) -> BoxFuture<'_, Result<Written, Error>> {
        let Write {
            key,
            value,
            lease,
            only_if,
        } = write;
        let written = self.client(|history| {
            let there = history.get(&key);
            let holds = match (only_if, there) {
                (OnlyIf::Absent, there) => there.is_none(),
                (OnlyIf::Created(at), Some(there)) => there.created == at,
                (OnlyIf::Unchanged(at), Some(there)) => there.modified == at,
                (OnlyIf::Created(_) | OnlyIf::Unchanged(_), None) => false,
            };
            if !holds {
                return Ok(Written::Refused(there.cloned()));
            }
            let done = match &value {
                Some(value) => history.put(&key, value, lease),
                None => history.delete(&key),
            };
            match done {
                true => Ok(Written::Done(history.revision())),
                false => Err(Error::new(Kind::RegistryRefused).with_reason("the lease is gone")),
            }
        });
        Box::pin(ready(written.and_then(|written| written)))
    }

    fn watch(self: Arc<Self>, scope: &Scope, from: u64) -> BoxFuture<'_, Result<Watch, Broken>> {
        let scope = scope.clone();
        Box::pin(async move {
            let outages = {
                let state = self.lock();
                if !state.available {
                    return Err(Broken::Lost(UNAVAILABLE.into()));
                }
                state.outages
            };
            let cursor = Cursor {
                changed: self.changed.subscribe(),
                shared: self,
                scope,
                next: from,
                outages,
                over: false,
            };
            let watch: Watch = Box::pin(stream::unfold(cursor, async |mut cursor| {
                Some((cursor.next().await?, cursor))
            }));
            Ok(watch)
        })
    }
}

// === impl Cursor ===

impl Cursor {
    async fn next(&mut self) -> Option<Result<Vec<Event>, Broken>> {
        if self.over {
            return None;
        }
        loop {
            self.changed.mark_unchanged();
            match self.look() {
                Ok((events, _)) if !events.is_empty() => return Some(Ok(events)),
                Ok((_, expiry)) => {
                    let expired = async {
                        match expiry {
                            Some(at) => time::sleep_until(at).await,
                            None => std::future::pending().await,
                        }
                    };
                    tokio::select! {
                        // The sender is ours too: it cannot be gone.
                        _ = self.changed.changed() => {}
                        () = expired => {}
                    }
                }
                Err(why) => {
                    self.over = true;
                    return Some(Err(why));
                }
            }
        }
    }

    /// What has happened since the last look, and when the next lease is over.
    fn look(&mut self) -> Result<(Vec<Event>, Option<Instant>), Broken> {
        let state = self.shared.lock();
        if !state.available || state.outages != self.outages {
            return Err(Broken::Lost(UNAVAILABLE.into()));
        }
        let events = state.history.since(&self.scope, self.next);
        let events = events.map_err(|Compacted(at)| Broken::Compacted { at })?;
        self.next = self.next.max(state.history.revision() + 1);
        Ok((events, state.history.next_expiry()))
    }
}
