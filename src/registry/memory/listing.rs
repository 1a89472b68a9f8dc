//! The in-process registry as discovery knows it: a list, and a watch from a revision.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream;
use tokio::{
    sync::watch,
    time::{self, Instant},
};

use super::{Shared, UNAVAILABLE, history::Compacted};
use crate::{
    endpoint::BoxFuture,
    error::BoxError,
    registry::store::{Broken, Event, Listing, Store, Watch},
};

/// How far one watch has come.
struct Cursor {
    shared: Arc<Shared>,
    changed: watch::Receiver<u64>,
    prefix: Bytes,
    next: u64,
    outages: u64,
    over: bool,
}

// === impl Shared ===

impl Store for Shared {
    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Listing, BoxError>> {
        Box::pin(async move {
            let state = self.lock();
            match state.available {
                true => Ok(state.history.list(prefix.as_bytes())),
                false => Err(UNAVAILABLE.into()),
            }
        })
    }

    fn watch(self: Arc<Self>, prefix: &str, from: u64) -> BoxFuture<'_, Result<Watch, Broken>> {
        let prefix = Bytes::copy_from_slice(prefix.as_bytes());
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
                prefix,
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
        let events = state.history.since(&self.prefix, self.next);
        let events = events.map_err(|Compacted(at)| Broken::Compacted { at })?;
        self.next = self.next.max(state.history.revision() + 1);
        Ok((events, state.history.next_expiry()))
    }
}
