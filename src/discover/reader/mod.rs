//! From what a registry says under a prefix to what is known of a role.

mod bad;

use std::{
    collections::{HashSet, VecDeque},
    fmt,
    sync::Arc,
};

use self::bad::Bad;
pub use self::bad::Skipped;
use super::{
    Update,
    member::{Key, Member},
    reconcile::{Found, Known, Step},
};
use crate::registry::{
    BadRecord,
    codec::{self, Codec},
    feed::{News, Subscription},
    store::{Event, Record},
};

/// What a reader needs to know.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) news: Subscription,
    pub(crate) codec: Arc<dyn Codec>,
    pub(crate) root: Arc<str>,
    pub(crate) role: Arc<str>,
}

/// Reads one role's records out of a feed, and says what comes of each word of it.
pub(super) struct Reader {
    settings: Settings,
    known: Known,
    bad: Bad,
    queue: VecDeque<Update<Key, Arc<Member>>>,
}

// === impl Reader ===

impl Reader {
    pub(super) fn new(settings: Settings, skipped: Skipped) -> Self {
        Self {
            settings,
            known: Known::default(),
            bad: Bad::new(skipped),
            queue: VecDeque::new(),
        }
    }

    /// The next thing to say. Never ends. Cancel safe.
    pub(super) async fn next(&mut self) -> Update<Key, Arc<Member>> {
        loop {
            if let Some(update) = self.queue.pop_front() {
                return update;
            }
            match &*self.settings.news.next().await {
                News::Listed(records) => self.replace(records),
                News::Happened(events) => self.apply(events),
                News::Fresh => self.queue.push_back(Update::Synced),
                News::Failed(why) => self.queue.push_back(Update::Stale(why.clone())),
            }
        }
    }

    fn replace(&mut self, records: &[Record]) {
        let keys = records.iter().map(|r| String::from_utf8_lossy(&r.key));
        let listed: HashSet<_> = keys.collect();
        self.bad.keep(|key| listed.contains(key));
        let found = records
            .iter()
            .filter_map(|record| self.read(record).ok())
            .collect();
        let changes = self.known.replace(found);
        self.queue.extend(changes.into_iter().map(Update::Change));
        self.queue.push_back(Update::Synced);
    }

    fn apply(&mut self, events: &[Event]) {
        let mut steps = Vec::with_capacity(events.len());
        for event in events {
            match event {
                Event::Put(record) => match self.read(record) {
                    Ok(found) => steps.push(Step::Put(found)),
                    // Whoever lists now does not see it, so neither does who has seen what was there.
                    Err(Some(key)) => steps.push(Step::Gone(key)),
                    Err(None) => {}
                },
                Event::Delete(key) => {
                    if let Ok(key) = std::str::from_utf8(key) {
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
            // The store did not keep it.
            Ok(_) if record.size > BadRecord::LONGEST => {
                Err(BadRecord::TooLarge { bytes: record.size })
            }
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

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
