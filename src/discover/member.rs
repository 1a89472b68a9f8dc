//! One session generation, as a pool's target.

use std::{fmt, sync::Arc};

use http::HeaderMap;

use crate::{
    endpoint::Target,
    error::{Error, Kind, Peer},
    registry::Session,
};

/// What makes a session itself and not its successor: the registry's key, and the generation of what
/// stands under it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub struct Key {
    /// The registry's key, such as `demo/echo/7`.
    pub key: Arc<str>,
    /// The revision at which the registry came to have that key.
    pub generation: u64,
}

/// One generation of a session, as discovery hands it to a pool.
///
/// Immutable: when the session's value changes there is a new member under the same [`Key`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    session: Arc<Session>,
    peer: Arc<Peer>,
    /// None if it is empty.
    call_metadata: Option<Arc<HeaderMap>>,
    barred: Option<Bar>,
}

/// Why a member is not to be called: a younger one has what it says is its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Bar {
    Address { owner: Arc<str> },
    Id { owner: Arc<str> },
}

// === impl Key ===

impl Key {
    /// The key of this generation.
    pub fn new(key: impl Into<Arc<str>>, generation: u64) -> Self {
        Self {
            key: key.into(),
            generation,
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.key, self.generation)
    }
}

// === impl Member ===

impl Member {
    /// A member for this session; for registries of one's own.
    pub fn new(session: impl Into<Arc<Session>>, generation: u64) -> Self {
        let session = session.into();
        let peer = Peer {
            role: session.role_arc().clone(),
            id: session.id_arc().clone(),
            address: session.address_arc().clone(),
            generation,
        };
        Self {
            session,
            peer: Arc::new(peer),
            call_metadata: None,
            barred: None,
        }
    }

    /// The same with metadata that each call to it carries; see [`Target::call_metadata`]. Default: none.
    #[must_use]
    pub fn with_call_metadata(self, metadata: HeaderMap) -> Self {
        let metadata = (!metadata.is_empty()).then(|| Arc::new(metadata));
        self.with_shared_call_metadata(metadata)
    }

    pub(crate) fn with_shared_call_metadata(mut self, metadata: Option<Arc<HeaderMap>>) -> Self {
        self.call_metadata = metadata;
        self
    }

    /// What the instance says of itself.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Which generation of the session it is: the registry's `create_revision`.
    pub fn generation(&self) -> u64 {
        self.peer.generation
    }

    pub(crate) fn with_bar(&self, barred: Option<Bar>) -> Self {
        Self {
            barred,
            ..self.clone()
        }
    }

    /// The same, saying that it is stopping: when it is removed then, its calls in flight finish.
    pub(crate) fn leaving(&self) -> Self {
        let session = Session::clone(&self.session).with_stopping(true);
        Self {
            session: Arc::new(session),
            ..self.clone()
        }
    }

    pub(crate) fn bar(&self) -> Option<&Bar> {
        self.barred.as_ref()
    }
}

impl Target for Member {
    fn peer(&self) -> &Arc<Peer> {
        &self.peer
    }

    fn stopping(&self) -> bool {
        self.session.is_stopping()
    }

    fn call_metadata(&self) -> HeaderMap {
        match &self.call_metadata {
            Some(metadata) => HeaderMap::clone(metadata),
            None => HeaderMap::new(),
        }
    }

    fn barred(&self) -> Option<Error> {
        let reason = match self.barred.as_ref()? {
            Bar::Address { owner } => {
                format!(
                    "its address {} now belongs to instance {owner}",
                    self.peer.address
                )
            }
            Bar::Id { owner } => format!("its id {} now belongs to {owner}", self.peer.id),
        };
        let error = Error::new(Kind::SessionDeleted).with_reason(reason);
        Some(error.with_peer(&self.peer))
    }
}
