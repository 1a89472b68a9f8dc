//! List, watch, and list again: how a feed keeps up with a registry that comes and goes.

use std::{
    collections::HashSet,
    sync::{Arc, Weak},
    time::Duration,
};

use futures_util::StreamExt as _;
use tokio::time::{self, Instant};

use super::{Ends, Feed};
use crate::{
    Backoff,
    error::{BoxError, SharedError},
    registry::store::{Broken, Event, Listing, Record, Scope, Store, Watch},
};

/// How long an answer that makes everybody gone is doubted before it is asked for again.
const SECOND_LOOK: Duration = Duration::from_millis(500);

/// How long those are kept whom a registry has forgotten that was rebuilt or restored: they are alive, and hear of
/// it in the same moment, and are about to register again.
const GRACE: Duration = Duration::from_secs(3);

/// Over how many first delays the lists are spread that follow broken watches: one etcd that loses its leader
/// breaks the watches of all its clients.
const SPREAD: f64 = 5.0;

/// One feed's state machine.
///
/// Nothing is patched. Whatever happens to a watch, what is known is kept, and what comes next is a list, the
/// difference, and a watch from the list's revision + 1.
pub(super) struct Engine {
    feed: Weak<Feed>,
    store: Arc<dyn Store>,
    scope: Scope,
    backoff: Backoff,
    state: State,
    /// In a row, without a watch that was of use in between.
    failures: u32,
    /// Those whom the registry has forgotten, and until when they are kept.
    forgotten: Option<Forgotten>,
    _ends: Ends,
}

struct Forgotten {
    until: Instant,
    records: Vec<Record>,
}

enum State {
    Listing {
        /// An empty answer was doubted.
        again: bool,
    },
    /// The list is told; its revision is this.
    Listed(u64),
    Watching {
        watch: Watch,
        since: Instant,
    },
    Waiting {
        delay: Duration,
        again: bool,
    },
}

/// The feed has no readers any more.
struct Unread;

// === impl Engine ===

impl Engine {
    pub(super) fn new(feed: &Arc<Feed>, ends: Ends) -> Self {
        Self {
            feed: Arc::downgrade(feed),
            store: feed.hub.store.clone(),
            scope: feed.scope.clone(),
            backoff: feed.hub.backoff,
            state: State::Listing { again: false },
            failures: 0,
            forgotten: None,
            _ends: ends,
        }
    }

    /// Until nobody reads.
    pub(super) async fn run(mut self) {
        while self.step().await.is_ok() {}
    }

    async fn step(&mut self) -> Result<(), Unread> {
        match &mut self.state {
            // Waiting => Listing
            State::Waiting { delay, again } => {
                let again = *again;
                time::sleep(*delay).await;
                self.state = State::Listing { again };
            }
            // Listing => (Listed | Waiting)
            State::Listing { again } => {
                let again = *again;
                match self.store.list(&self.scope).await {
                    Ok(listing) => self.listed(listing, again)?,
                    Err(why) => self.failed(why, None)?,
                }
            }
            // Listed => (Watching | Waiting)
            State::Listed(revision) => {
                let from = revision.saturating_add(1);
                match self.store.clone().watch(&self.scope, from).await {
                    Ok(watch) => {
                        self.state = State::Watching {
                            watch,
                            since: Instant::now(),
                        }
                    }
                    Err(why) => self.failed(why.into(), None)?,
                }
            }
            // Watching => (Watching | Waiting)
            State::Watching { watch, since } => {
                let since = *since;
                let grace = async {
                    match &self.forgotten {
                        Some(forgotten) => time::sleep_until(forgotten.until).await,
                        None => std::future::pending().await,
                    }
                };
                let told = tokio::select! {
                    told = watch.next() => told,
                    () = grace => {
                        self.forget()?;
                        return Ok(());
                    }
                };
                match told {
                    Some(Ok(events)) => {
                        self.remember(&events);
                        self.feed()?.happened(events);
                    }
                    Some(Err(why)) => self.failed(why.into(), Some(since))?,
                    None => {
                        let why = Broken::Lost("it ended".into());
                        self.failed(why.into(), Some(since))?;
                    }
                }
            }
        }
        Ok(())
    }

    fn listed(&mut self, listing: Listing, again: bool) -> Result<(), Unread> {
        let feed = self.feed()?;
        let (there, revision, cluster) = {
            let state = feed.state();
            (state.records.len(), state.revision, state.cluster)
        };
        let rebuilt = listing.revision < revision || (cluster != 0 && listing.cluster != cluster);
        if rebuilt {
            tracing::warn!(
                scope = %self.scope,
                revision = listing.revision,
                before = revision,
                "the registry was rebuilt or restored; what it says now is taken for true"
            );
            let records = feed.state().records.values().cloned().collect();
            self.forgotten = self.keeps().then(|| Forgotten {
                until: Instant::now() + GRACE,
                records,
            });
        } else if listing.records.is_empty() && there > 0 && !again && self.keeps() {
            // A watch tells of each that goes, and is believed. A list that has nobody left may come from a
            // store that was emptied under those who live.
            let why = format!(
                "the registry answered with nothing under {}, where there were {there}; it is asked again",
                self.scope
            );
            feed.failed(SharedError::from(BoxError::from(why)));
            self.state = State::Waiting {
                delay: SECOND_LOOK,
                again: true,
            };
            return Ok(());
        }
        self.state = State::Listed(listing.revision);
        self.told(&feed, listing);
        Ok(())
    }

    /// Tells the list, with those who are kept although it does not have them.
    fn told(&mut self, feed: &Feed, mut listing: Listing) {
        let Some(Forgotten { until, records }) = &mut self.forgotten else {
            return feed.listed(listing);
        };
        if Instant::now() >= *until {
            self.forgotten = None;
            return feed.listed(listing);
        }
        let listed: HashSet<_> = listing.records.iter().map(|r| r.key.clone()).collect();
        records.retain(|record| !listed.contains(&record.key));
        listing.records.extend(records.iter().cloned());
        let kept = records.len();
        feed.listed(listing);
        if kept > 0 {
            let why = format!(
                "the registry was rebuilt or restored, and does not know {kept} of those that it had; they have {GRACE:?} to return"
            );
            feed.failed(SharedError::from(BoxError::from(why)));
        }
    }

    /// The time is over of those who have not registered again.
    fn forget(&mut self) -> Result<(), Unread> {
        let Some(Forgotten { records, .. }) = self.forgotten.take() else {
            return Ok(());
        };
        let gone = records.into_iter();
        let gone = gone.map(|record| Event::Delete(record.key));
        self.feed()?.is_fresh(gone.collect());
        Ok(())
    }

    /// These are spoken of again. That is how they are told: what has registered again may say the same under the
    /// same revisions, which have begun anew.
    fn remember(&mut self, events: &[Event]) {
        if let Some(Forgotten { records, .. }) = &mut self.forgotten {
            let told: HashSet<_> = events.iter().map(Event::key).collect();
            records.retain(|record| !told.contains(&record.key));
        }
    }

    /// Whether who has gone from a list may be kept. Whoever looks at a key alone is its owner, or wants to be, and
    /// is to know at once.
    fn keeps(&self) -> bool {
        matches!(self.scope, Scope::Prefix(_))
    }

    fn failed(&mut self, why: BoxError, watching_since: Option<Instant>) -> Result<(), Unread> {
        let initial = self.backoff.initial();
        // A watch that breaks as soon as it is made is one more failure, or it would be a busy loop.
        let was_of_use = watching_since.is_some_and(|since| since.elapsed() >= initial);
        let delay = if was_of_use {
            self.failures = 0;
            // Soon, but not all clients of a registry in the same moment.
            initial.mul_f64(SPREAD * fastrand::f64())
        } else {
            let delay = self.backoff.delay(self.failures);
            self.failures = self.failures.saturating_add(1);
            delay
        };
        self.state = State::Waiting {
            delay,
            again: false,
        };
        self.feed()?.failed(SharedError::from(why));
        Ok(())
    }

    fn feed(&self) -> Result<Arc<Feed>, Unread> {
        self.feed.upgrade().ok_or(Unread)
    }
}
