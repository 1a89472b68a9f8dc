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
    /// [`Kind::Invalid`](crate::Kind::Invalid) before its registration is begun, after it has stopped, and for one that
    /// only is a client; else those of [`Registration::update`](crate::Registration::update).
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, the change may have been made or not. To make it again does no harm.
    pub async fn update(&self, change: impl FnOnce(Session) -> Session) -> Result<(), Error> {
        match self.core.registration.lock().await.as_mut() {
            Some(registration) => registration.update(change).await,
            None => {
                let why = "its registration is not begun yet, or over, or there is none";
                Err(Error::invalid("update", why).with_role(&self.core.peer.role))
            }
        }
    }
}
