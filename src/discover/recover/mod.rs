//! List, watch, and list again: how discovery keeps up with a registry that comes and goes.

mod bad;

use std::{
    collections::{HashSet, VecDeque},
    fmt,
    sync::Arc,
    time::Duration,
};

use futures_util::StreamExt as _;
use tokio::time::{self, Instant};

use self::bad::Bad;
pub use self::bad::Skipped;
use super::{
    Update,
    member::{Key, Member},
    reconcile::{Found, Known, Step},
};
use crate::{
    Backoff,
    error::{BoxError, SharedError},
    registry::{
        BadRecord,
        codec::{self, Codec},
        store::{Broken, Event, Listing, Record, Store, Watch},
    },
};

/// What an engine needs to know.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) codec: Arc<dyn Codec>,
    pub(crate) root: Arc<str>,
    pub(crate) role: Arc<str>,
    pub(crate) backoff: Backoff,
}

/// One role's discovery: the state machine.
///
/// Nothing is patched. Whatever happens to a watch, the set is kept, and what comes next is a list, the
/// difference, and a watch from the list's revision + 1.
pub(super) struct Engine {
    settings: Settings,
    prefix: String,
    known: Known,
    state: State,
    /// In a row, without a watch that was of use in between.
    failures: u32,
    /// The last thing said when it became stale, so as not to repeat it every second.
    stale: Option<String>,
    bad: Bad,
    queue: VecDeque<Update<Key, Arc<Member>>>,
}

enum State {
    Listing,
    /// The list is applied; its revision is this.
    Listed(u64),
    Watching {
        watch: Watch,
        since: Instant,
    },
    Waiting(Duration),
}

/// Discovery's own schedule: 100 ms × 2, at most 1 s, ± 20 %.
pub(crate) fn default_backoff() -> Backoff {
    // A registry that cannot be reached hears nothing of these, and one that is back is to be known
    // exactly within two seconds.
    let (initial, max) = (Duration::from_millis(100), Duration::from_secs(1));
    // These are within the bounds; the default is for whoever changes them wrongly.
    Backoff::new(initial, 2.0, max, 0.2).unwrap_or_default()
}

// === impl Engine ===

impl Engine {
    pub(super) fn new(settings: Settings, skipped: Skipped) -> Self {
        Self {
            prefix: settings.codec.prefix(&settings.root, &settings.role),
            settings,
            known: Known::default(),
            state: State::Listing,
            failures: 0,
            stale: None,
            bad: Bad::new(skipped),
            queue: VecDeque::new(),
        }
    }

    /// The next thing to say. Never ends. To be awaited to its end: what it was doing is lost otherwise.
    pub(super) async fn next(&mut self) -> Update<Key, Arc<Member>> {
        loop {
            if let Some(update) = self.queue.pop_front() {
                return update;
            }
            self.step().await;
        }
    }

    async fn step(&mut self) {
        match &mut self.state {
            // Waiting => Listing
            State::Waiting(delay) => {
                time::sleep(*delay).await;
                self.state = State::Listing;
            }
            // Listing => (Listed | Waiting)
            State::Listing => match self.settings.store.list(&self.prefix).await {
                Ok(listing) => {
                    let revision = listing.revision;
                    self.replace(listing);
                    self.state = State::Listed(revision);
                }
                Err(why) => self.failed(why, None),
            },
            // Listed => (Watching | Waiting)
            State::Listed(revision) => {
                let from = revision.saturating_add(1);
                match self.settings.store.clone().watch(&self.prefix, from).await {
                    Ok(watch) => {
                        self.state = State::Watching {
                            watch,
                            since: Instant::now(),
                        }
                    }
                    Err(why) => self.failed(why.into(), None),
                }
            }
            // Watching => (Watching | Waiting)
            State::Watching { watch, since } => {
                let since = *since;
                match watch.next().await {
                    Some(Ok(events)) => self.apply(events),
                    Some(Err(why)) => self.failed(why.into(), Some(since)),
                    None => {
                        let why = Broken::Lost("it ended".into());
                        self.failed(why.into(), Some(since));
                    }
                }
            }
        }
    }

    fn failed(&mut self, why: BoxError, watching_since: Option<Instant>) {
        let initial = self.settings.backoff.initial();
        // A watch that breaks as soon as it is made is one more failure, or it would be a busy loop.
        let was_of_use = watching_since.is_some_and(|since| since.elapsed() >= initial);
        let delay = if was_of_use {
            self.failures = 0;
            // At once, but not all clients of a registry in the same moment.
            initial.mul_f64(fastrand::f64())
        } else {
            let delay = self.settings.backoff.delay(self.failures);
            self.failures = self.failures.saturating_add(1);
            delay
        };
        self.state = State::Waiting(delay);
        let text = why.to_string();
        if self.stale.as_ref() != Some(&text) {
            self.stale = Some(text);
            self.queue.push_back(Update::Stale(SharedError::from(why)));
        }
    }

    fn replace(&mut self, listing: Listing) {
        let keys = listing
            .records
            .iter()
            .map(|r| String::from_utf8_lossy(&r.key));
        let listed: HashSet<_> = keys.collect();
        self.bad.keep(|key| listed.contains(key));
        let found = listing
            .records
            .iter()
            .filter_map(|record| self.read(record).ok())
            .collect();
        let changes = self.known.replace(found);
        self.queue.extend(changes.into_iter().map(Update::Change));
        self.queue.push_back(Update::Synced);
        self.stale = None;
    }

    fn apply(&mut self, events: Vec<Event>) {
        let mut steps = Vec::with_capacity(events.len());
        for event in events {
            match event {
                Event::Put(record) => match self.read(&record) {
                    Ok(found) => steps.push(Step::Put(found)),
                    // Whoever lists now does not see it, so neither does who has seen what was there.
                    Err(Some(key)) => steps.push(Step::Gone(key)),
                    Err(None) => {}
                },
                Event::Delete(key) => {
                    if let Ok(key) = std::str::from_utf8(&key) {
                        self.bad.forget(key);
                        steps.push(Step::Gone(key.into()));
                    }
                }
            }
        }
        let changes = self.known.apply(steps);
        self.queue.extend(changes.into_iter().map(Update::Change));
    }

    /// The session of a record; the key of one that is none of this role's, if it is text.
    fn read(&mut self, record: &Record) -> Result<Found, Option<Arc<str>>> {
        let Settings {
            codec, root, role, ..
        } = &self.settings;
        let lossy = String::from_utf8_lossy(&record.key);
        let read = match std::str::from_utf8(&record.key) {
            Err(_) => Err(BadRecord::Key("it is not UTF-8".into())),
            Ok(key) => codec::decode(&**codec, root, role, key, &record.value),
        };
        let read = read.and_then(|session| {
            let Some(session) = session else {
                return Ok(None);
            };
            session.validate().map_err(BadRecord::Invalid)?;
            if session.role() != &**role {
                return Err(BadRecord::Key(
                    format!("it is of role {}", session.role()).into(),
                ));
            }
            let call_metadata = codec::call_metadata(&**codec, &session)?;
            Ok(Some((session, call_metadata)))
        });
        let key: Arc<str> = lossy.as_ref().into();
        match read {
            Ok(None) => {
                self.bad.forget(&key);
                Err(Some(key))
            }
            Ok(Some((session, call_metadata))) => {
                self.bad.forget(&key);
                Ok(Found {
                    key,
                    session,
                    call_metadata,
                    created: record.created,
                    modified: record.modified,
                })
            }
            Err(why) => {
                self.bad.note(&key, record.modified, &why, role);
                Err(matches!(lossy, std::borrow::Cow::Borrowed(_)).then_some(key))
            }
        }
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &self.state {
            State::Listing => "listing",
            State::Listed(_) => "listed",
            State::Watching { .. } => "watching",
            State::Waiting(_) => "waiting",
        };
        f.debug_struct("Engine")
            .field("role", &self.settings.role)
            .field("state", &state)
            .field("failures", &self.failures)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
