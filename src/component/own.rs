//! A component's own registration.

use super::Component;
use crate::{
    error::Error,
    registry::{RegistrationState, Session},
};

impl Component {
    /// Where its registration stands; `None` before it is begun, and for one that only is a client.
    pub fn registration(&self) -> Option<RegistrationState> {
        self.core.registration_state()
    }

    /// Changes what its session says, as [`Registration::update`](crate::Registration::update) does: version, metadata,
    /// weight, and the address, for one that moves.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid) before its registration is begun, once a stop removes it, and for one that
    /// only is a client; else those of [`Registration::update`](crate::Registration::update).
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, the change may have been made or not. To make it again does no harm.
    pub async fn update(&self, change: impl FnOnce(Session) -> Session) -> Result<(), Error> {
        let core = &self.core;
        let updated = core.leaving.run_until_cancelled(async {
            match core.registration.lock().await.as_mut() {
                Some(registration) => Some(registration.update(change).await),
                None => None,
            }
        });
        updated.await.flatten().unwrap_or_else(|| {
            let why = "its registration is not begun yet, or over, or there is none";
            Err(Error::invalid("update", why).with_role(&core.peer.role))
        })
    }
}
