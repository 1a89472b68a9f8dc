//! One watch for each prefix, whoever looks at it: managers, registrations, and handles of one registry.
//!
//! A feed has one task, which lists and watches and after any trouble does so again. It keeps what is there,
//! for those who come late and those who fall behind: they get the whole once more, so that a slow reader
//! holds up nobody and misses no final state. The task lives on the runtime of whoever read first; when that ends
//! it is begun anew on another reader's. A runtime that nobody drives, and nobody ends, holds up its readers.

mod engine;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use bytes::Bytes;
use tokio::{runtime, sync::broadcast, task::AbortHandle};

use self::engine::Engine;
use super::store::{Event, Listing, Record, Scope, Store};
use crate::{
    Backoff,
    error::{BoxError, Error, SharedError},
};

/// How much news a reader may be behind before it gets the whole instead.
const NEWS: usize = 1024;

/// A store with its feeds: what all handles of a registry share.
pub(crate) struct Hub {
    store: Arc<dyn Store>,
    backoff: Backoff,
    feeds: Mutex<HashMap<Scope, Weak<Feed>>>,
    /// The leases of those who hold a record through this, each while its handle lives.
    holding: Mutex<HashMap<i64, Weak<()>>>,
}

/// What is there in one scope, and the task that keeps it so.
pub(crate) struct Feed {
    hub: Arc<Hub>,
    scope: Scope,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    records: BTreeMap<Bytes, Record>,
    /// The highest that is known.
    revision: u64,
    cluster: u64,
    listed: bool,
    stale: Option<SharedError>,
    /// None while no task runs.
    running: Option<Running>,
    /// How many tasks there were.
    tasks: u64,
}

struct Running {
    tell: broadcast::Sender<Arc<News>>,
    /// None while it is being spawned.
    task: Option<AbortHandle>,
}

/// One word of a feed.
#[derive(Debug)]
pub(crate) enum News {
    /// All that is there now.
    Listed(Vec<Record>),
    /// What happened since, together.
    Happened(Vec<Event>),
    /// What was said is all there is, after it could not be known.
    Fresh,
    /// It cannot be kept up to date for now; what was said before is kept.
    Failed(SharedError),
}

/// One reader of a feed.
pub(crate) struct Subscription {
    feed: Arc<Feed>,
    reading: Reading,
}

enum Reading {
    /// It has not begun, or has to begin anew.
    NotYet,
    /// First what was there when it came, then what comes.
    From(VecDeque<Arc<News>>, broadcast::Receiver<Arc<News>>),
    /// Outside a runtime.
    Never,
}

// === impl Hub ===

impl Hub {
    /// Failed lists and watches are repeated after the delays of this backoff.
    pub(crate) fn new(store: Arc<dyn Store>, backoff: Backoff) -> Arc<Self> {
        Arc::new(Self {
            store,
            backoff,
            feeds: Mutex::default(),
            holding: Mutex::default(),
        })
    }

    pub(crate) fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// A reader of the feed of this scope. Nothing is asked of the store before it is first read.
    pub(crate) fn subscribe(self: &Arc<Self>, scope: Scope) -> Subscription {
        let mut feeds = self.feeds();
        let known = feeds.get(&scope).and_then(Weak::upgrade);
        let feed = known.unwrap_or_else(|| {
            let feed = Arc::new(Feed {
                hub: self.clone(),
                scope: scope.clone(),
                state: Mutex::default(),
            });
            feeds.insert(scope, Arc::downgrade(&feed));
            feed
        });
        Subscription {
            feed,
            reading: Reading::NotYet,
        }
    }

    /// The leases under which somebody in this process holds a record, and means to.
    pub(crate) fn holding(&self) -> MutexGuard<'_, HashMap<i64, Weak<()>>> {
        self.holding.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn feeds(&self) -> MutexGuard<'_, HashMap<Scope, Weak<Feed>>> {
        self.feeds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub")
            .field("store", &self.store)
            .finish_non_exhaustive()
    }
}

// === impl Feed ===

impl Feed {
    /// What is there now, and all that comes; begins to look if nobody has.
    fn read(self: &Arc<Self>) -> Result<Reading, Error> {
        let runtime = runtime::Handle::try_current().map_err(|error| {
            Error::invalid("registry", "used outside a tokio runtime").with_source(error)
        })?;
        let mut state = self.state();
        let (news, begun) = match &state.running {
            Some(running) => (running.tell.subscribe(), None),
            None => {
                let (tell, news) = broadcast::channel(NEWS);
                state.tasks += 1;
                state.running = Some(Running { tell, task: None });
                (news, Some(state.tasks))
            }
        };
        let mut first = VecDeque::new();
        if state.listed {
            let records = state.records.values().cloned().collect();
            first.push_back(Arc::new(News::Listed(records)));
        }
        if let Some(why) = &state.stale {
            first.push_back(Arc::new(News::Failed(why.clone())));
        }
        drop(state);
        if let Some(number) = begun {
            // Not under the lock: a runtime that is shutting down drops the task at once, and that takes it.
            let engine = Engine::new(self, Ends(Arc::downgrade(self), number));
            let task = runtime.spawn(engine.run()).abort_handle();
            let mut state = self.state();
            let is_latest = state.tasks == number;
            match &mut state.running {
                Some(running) if is_latest => running.task = Some(task),
                _ => {
                    let why = "used in a tokio runtime that is shutting down";
                    return Err(Error::invalid("registry", why));
                }
            }
        }
        Ok(Reading::From(first, news))
    }

    /// All that is there now is this.
    fn listed(&self, listing: Listing) {
        let mut state = self.state();
        state.revision = listing.revision;
        state.cluster = listing.cluster;
        state.listed = true;
        state.stale = None;
        let records = listing.records.iter().cloned();
        state.records = records.map(|record| (record.key.clone(), record)).collect();
        state.tell(News::Listed(listing.records));
    }

    fn happened(&self, events: Vec<Event>) {
        let mut state = self.state();
        for event in &events {
            match event {
                Event::Put(record) => {
                    state.revision = state.revision.max(record.modified);
                    state.records.insert(record.key.clone(), record.clone());
                }
                Event::Delete(key) => {
                    state.records.remove(key);
                }
            }
        }
        state.tell(News::Happened(events));
    }

    /// What is there is known again, and these are gone.
    fn is_fresh(&self, gone: Vec<Event>) {
        for event in &gone {
            self.state().records.remove(event.key());
        }
        let mut state = self.state();
        state.stale = None;
        state.tell(News::Happened(gone));
        state.tell(News::Fresh);
    }

    /// Told once for each thing that it can be.
    fn failed(&self, why: SharedError) {
        let mut state = self.state();
        let text = why.to_string();
        if state
            .stale
            .as_ref()
            .is_some_and(|known| known.to_string() == text)
        {
            return;
        }
        state.stale = Some(why.clone());
        state.tell(News::Failed(why));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(Running {
            task: Some(task), ..
        }) = &state.running
        {
            task.abort();
        }
        let mut feeds = self.hub.feeds();
        // Another may stand there by now.
        if feeds
            .get(&self.scope)
            .is_some_and(|feed| feed.strong_count() == 0)
        {
            feeds.remove(&self.scope);
        }
    }
}

impl State {
    fn tell(&self, news: News) {
        if let Some(running) = &self.running {
            // A failed send means that nobody reads at this moment: whoever comes gets the whole.
            let _ = running.tell.send(Arc::new(news));
        }
    }
}

/// Records the end of a feed's n-th task, however it comes: with its runtime, mostly. Its readers then begin
/// anew, on their own.
struct Ends(Weak<Feed>, u64);

impl Drop for Ends {
    fn drop(&mut self) {
        if let Some(feed) = self.0.upgrade() {
            let ended = {
                let mut state = feed.state();
                match state.tasks == self.1 {
                    true => {
                        // Whoever comes gets what was known, and is told that it may be old.
                        let why = "the runtime on which it was watched has ended";
                        state.stale = Some(Arc::from(BoxError::from(why)));
                        state.running.take()
                    }
                    false => None,
                }
            };
            drop(ended);
        }
    }
}

// === impl Subscription ===

impl Subscription {
    /// The next word; the first is what is there, once it is known. It has no end. Cancel safe.
    ///
    /// Outside a tokio runtime it says so, once, and nothing after that.
    pub(crate) async fn next(&mut self) -> Arc<News> {
        loop {
            match &mut self.reading {
                Reading::NotYet => match self.feed.read() {
                    Ok(reading) => self.reading = reading,
                    Err(error) => {
                        self.reading = Reading::Never;
                        return Arc::new(News::Failed(Arc::new(error)));
                    }
                },
                Reading::From(first, news) => {
                    if let Some(first) = first.pop_front() {
                        return first;
                    }
                    match news.recv().await {
                        Ok(news) => return news,
                        // Too slow, or the task is gone: the whole, once more.
                        Err(_) => self.reading = Reading::NotYet,
                    }
                }
                Reading::Never => std::future::pending().await,
            }
        }
    }
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription")
            .field("scope", &self.feed.scope)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
