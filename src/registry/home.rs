//! What registries with keys have in common: one handle's settings, over a store that all of them share.

use std::{fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::time;

use super::{
    Codec, Naming,
    feed::Hub,
    session::check_role,
    store::{OnlyIf, Scope, Store, Write, Written},
};
use crate::{
    Backoff,
    discover::{Discovery, Settings},
    error::{Error, Kind},
};

/// How often an id is tried for before so much competition is an error.
const TRIES: u32 = 200;

/// One handle on a registry.
#[derive(Clone)]
pub(crate) struct Home {
    hub: Arc<Hub>,
    pub(super) codec: Arc<dyn Codec>,
    pub(super) root: Arc<str>,
    pub(super) ttl: Duration,
}

/// The schedule of discovery: 100 ms × 2, at most 1 s, ± 20 %.
pub(super) fn backoff() -> Backoff {
    // A registry that cannot be reached hears nothing of these, and one that is back is to be known
    // exactly within two seconds.
    let (initial, max) = (Duration::from_millis(100), Duration::from_secs(1));
    // These are within the bounds; the default is for whoever changes them wrongly.
    Backoff::new(initial, 2.0, max, 0.2).unwrap_or_default()
}

// === impl Home ===

impl Home {
    pub(super) fn new(
        store: Arc<dyn Store>,
        backoff: Backoff,
        root: impl Into<Arc<str>>,
        ttl: Duration,
    ) -> Self {
        Self {
            hub: Hub::new(store, backoff),
            codec: Arc::new(Naming),
            root: root.into(),
            ttl,
        }
    }

    /// Watches of its own from here on, shared with its clones.
    pub(super) fn watch_through(&mut self, store: Arc<dyn Store>, backoff: Backoff) {
        self.hub = Hub::new(store, backoff);
    }

    pub(super) fn hub(&self) -> &Arc<Hub> {
        &self.hub
    }

    pub(super) fn store(&self) -> &Arc<dyn Store> {
        self.hub.store()
    }

    pub(super) fn discover(&self, role: &str) -> Result<Discovery, Error> {
        check_role(role)?;
        let prefix = Bytes::from(self.codec.prefix(&self.root, role));
        Ok(Discovery::reading(Settings {
            news: self.hub.subscribe(Scope::Prefix(prefix)),
            codec: self.codec.clone(),
            root: self.root.clone(),
            role: role.into(),
        }))
    }

    /// Takes the number that stands under the counter's key, and leaves the next one there.
    pub(super) async fn allocate_id(&self) -> Result<u64, Error> {
        let key = Bytes::from(self.codec.counter(&self.root));
        for _ in 0..TRIES {
            let write = |value: u64, only_if| Write {
                key: key.clone(),
                value: Some(value.to_string().into()),
                lease: 0,
                only_if,
            };
            let Some(there) = self.store().get(&key).await? else {
                self.store().write(write(1, OnlyIf::Absent)).await?;
                continue;
            };
            let text = String::from_utf8_lossy(&there.value);
            let next = text
                .parse()
                .ok()
                .and_then(|id: u64| Some((id, id.checked_add(1)?)));
            let Some((id, next)) = next else {
                let key = String::from_utf8_lossy(&key);
                let why = format!("{key} is {text:?}, which is not a number below 2^64 - 1");
                return Err(Error::invalid("id counter", why));
            };
            let unchanged = OnlyIf::Unchanged(there.modified);
            if let Written::Done(_) = self.store().write(write(next, unchanged)).await? {
                return Ok(id);
            }
            // Somebody else has it. Whoever has lost comes again a little apart from the others.
            time::sleep(Duration::from_micros(fastrand::u64(0..10_000))).await;
        }
        let why = format!("its id counter was changed by others {TRIES} times in a row");
        Err(Error::new(Kind::RegistryRefused).with_reason(why))
    }
}

impl fmt::Debug for Home {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Home")
            .field("hub", &self.hub)
            .field("codec", &self.codec)
            .field("root", &self.root)
            .field("ttl", &self.ttl)
            .finish()
    }
}
