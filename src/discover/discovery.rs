//! The stream that discovery is, for tower and for our own pool.

use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use futures_core::Stream;
use futures_util::stream;
use tower::discover::Change;

use super::{
    Update,
    member::{Key, Member},
    reader::{Reader, Settings, Skipped},
};
use crate::error::{Error, Kind};

/// The sessions of one role, as they come, change and go: a
/// [`tower::discover::Discover`] without end.
///
/// It starts with what is there. Inserting a key that is there changes what is said of that instance. An
/// `Err` is not the end: the registry cannot be reached for now, and what was said before is kept until it can,
/// when the difference follows. [`Discovery::updates`] gives the same with the moments at which the set is
/// complete.
///
/// It is read inside a tokio runtime, and looks for nothing before it is. All who look for a role through the
/// handles of one registry share one watch, in a task of its own, which ends with the last of them. A reader that
/// is slow holds up nobody: when it falls behind by too much it gets the difference to what is there.
///
/// ```
/// use futures_util::StreamExt as _;
/// use switchboard::{MemoryRegistry, Registry as _, Session, discover::Change};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), switchboard::Error> {
/// let registry = MemoryRegistry::new();
/// let _held = registry.register(Session::new("echo", "10.0.0.5:21123").with_id(7)).await?;
///
/// let mut echo = registry.discover("echo")?;
/// match echo.next().await {
///     Some(Ok(Change::Insert(_, member))) => assert_eq!(member.session().id(), "7"),
///     other => panic!("{other:?}"),
/// }
/// # Ok(())
/// # }
/// ```
#[must_use = "streams do nothing unless polled"]
pub struct Discovery {
    role: Arc<str>,
    updates: Updates,
}

/// A [`Discovery`] with what tower's changes cannot say: [`Update::Synced`] and [`Update::Stale`]. What a
/// [`Pool`](crate::Pool) is made from.
#[must_use = "streams do nothing unless polled"]
pub struct Updates {
    inner: Pin<Box<dyn Stream<Item = Update<Key, Arc<Member>>> + Send>>,
    skipped: Skipped,
}

// === impl Discovery ===

impl Discovery {
    /// A discovery that says this; for registries of one's own.
    pub fn new(
        role: impl Into<Arc<str>>,
        updates: impl Stream<Item = Update<Key, Arc<Member>>> + Send + 'static,
    ) -> Self {
        Self {
            role: role.into(),
            updates: Updates {
                inner: Box::pin(updates),
                skipped: Skipped::default(),
            },
        }
    }

    pub(crate) fn reading(settings: Settings) -> Self {
        let role = settings.role.clone();
        let skipped = Skipped::default();
        let reader = Reader::new(settings, skipped.clone());
        let updates = stream::unfold(reader, |mut reader| async move {
            let update = reader.next().await;
            Some((update, reader))
        });
        let mut this = Self::new(role, updates);
        this.updates.skipped = skipped;
        this
    }

    /// The role.
    pub fn role(&self) -> &str {
        &self.role
    }

    /// How many records are skipped because they are no sessions.
    pub fn skipped(&self) -> Skipped {
        self.updates.skipped.clone()
    }

    /// The same as [`Update`]s, for a pool.
    pub fn updates(self) -> Updates {
        self.updates
    }
}

impl Stream for Discovery {
    type Item = Result<Change<Key, Arc<Member>>, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            return Poll::Ready(match ready!(self.updates.inner.as_mut().poll_next(cx)) {
                Some(Update::Change(change)) => Some(Ok(change)),
                Some(Update::Synced) => continue,
                Some(Update::Stale(why)) => {
                    // Not with the role as such, which would say that nothing is known of it.
                    let error = Error::new(Kind::RegistryUnreachable)
                        .with_reason(format!("sessions of role {} are the last known", self.role));
                    Some(Err(error.with_shared_source(why)))
                }
                None => None,
            });
        }
    }
}

impl fmt::Debug for Discovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Discovery")
            .field("role", &self.role)
            .finish_non_exhaustive()
    }
}

// === impl Updates ===

impl Updates {
    /// How many records are skipped because they are no sessions.
    pub fn skipped(&self) -> Skipped {
        self.skipped.clone()
    }
}

impl Stream for Updates {
    type Item = Update<Key, Arc<Member>>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.inner.as_mut().poll_next(cx)
    }
}

impl fmt::Debug for Updates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Updates")
            .field("skipped", &self.skipped)
            .finish_non_exhaustive()
    }
}
