//! A session's hold on the in-process registry.

use std::{fmt, future::ready, sync::Arc};

use bytes::Bytes;
use tokio::time::Instant;

use super::Shared;
use crate::{
    endpoint::BoxFuture,
    error::{Error, Kind},
    registry::{Codec, Session, registration::Hold},
};

/// There is nobody to keep the lease alive for: a process that is dead does not hold this either.
pub(super) struct Held {
    pub(super) shared: Arc<Shared>,
    pub(super) codec: Arc<dyn Codec>,
    pub(super) key: Bytes,
    pub(super) lease: u64,
}

impl Held {
    fn write_now(&self, session: &Session) -> Result<(), Error> {
        let value = Bytes::from(self.codec.encode(session, 0)?);
        self.shared.write(|history| {
            if history.lease_of(&self.key) != Some(self.lease) {
                return Err(Error::new(Kind::SessionDeleted)
                    .with_reason("its record is no longer in the registry"));
            }
            history.put(self.key.clone(), value, Some(self.lease));
            Ok(())
        })?
    }

    fn release_now(&self) -> Result<(), Error> {
        let released = self.shared.write(|history| history.revoke(self.lease));
        if released.is_err() {
            self.abandon_now();
        }
        released
    }

    fn abandon_now(&self) {
        let abandon = |state: &mut super::State| state.history.abandon(self.lease, Instant::now());
        self.shared.change(abandon);
    }
}

impl Hold for Held {
    fn write<'a>(&'a self, session: &'a Arc<Session>) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(ready(self.write_now(session)))
    }

    fn release(self: Box<Self>) -> BoxFuture<'static, Result<(), Error>> {
        Box::pin(ready(self.release_now()))
    }

    fn release_in_background(self: Box<Self>) {
        // During an outage it ends with its TTL, as the docs say.
        let _ = self.release_now();
    }

    fn abandon(self: Box<Self>) {
        self.abandon_now();
    }
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Held")
            .field("key", &self.key)
            .field("lease", &self.lease)
            .finish_non_exhaustive()
    }
}
