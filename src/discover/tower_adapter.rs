//! From any tower `Discover` to updates.

use std::{
    collections::HashMap,
    collections::VecDeque,
    fmt,
    hash::Hash,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures_core::Stream;
use pin_project_lite::pin_project;
use tower::discover::{Change, Discover};

use super::Update;
use crate::{
    endpoint::Provided,
    error::{BoxError, Peer},
};

pin_project! {
    /// The services of a tower `Discover`, as a stream of [`Update`]s.
    ///
    /// Tower's change knows no generations: inserting a key anew replaces the service under it. Here that
    /// is one instance going and another coming, so that nothing of the old one is taken for the new.
    #[derive(Debug)]
    pub struct FromTower<D>
    where
        D: Discover,
    {
        role: Arc<str>,
        #[pin]
        discover: D,
        generations: HashMap<D::Key, u64>,
        last_generation: u64,
        queue: VecDeque<Update<(D::Key, u64), Arc<Provided<D::Service>>>>,
        // What was said since the last time that all was said.
        unsynced: bool,
    }
}

impl<D: Discover> FromTower<D>
where
    D::Key: Hash,
{
    /// The services of `discover` under this role.
    pub fn new(role: impl Into<Arc<str>>, discover: D) -> Self {
        Self {
            role: role.into(),
            discover,
            generations: HashMap::new(),
            last_generation: 0,
            queue: VecDeque::new(),
            unsynced: false,
        }
    }
}

impl<D> Stream for FromTower<D>
where
    D: Discover,
    D::Key: Clone + Hash + fmt::Display,
    D::Error: Into<BoxError>,
{
    type Item = Update<(D::Key, u64), Arc<Provided<D::Service>>>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut this = self.project();
        if let Some(update) = this.queue.pop_front() {
            return Poll::Ready(Some(update));
        }
        match this.discover.as_mut().poll_discover(cx) {
            Poll::Ready(Some(Ok(Change::Insert(key, service)))) => {
                *this.last_generation += 1;
                let generation = *this.last_generation;
                let old = this.generations.insert(key.clone(), generation);
                *this.unsynced = true;
                let peer = Peer::new(this.role.clone(), key.to_string(), "");
                let given = Provided::new(peer.with_generation(generation), service);
                let insert =
                    Update::Change(Change::Insert((key.clone(), generation), Arc::new(given)));
                Poll::Ready(Some(match old {
                    None => insert,
                    Some(old) => {
                        this.queue.push_back(insert);
                        Update::Change(Change::Remove((key, old)))
                    }
                }))
            }
            Poll::Ready(Some(Ok(Change::Remove(key)))) => {
                *this.unsynced = true;
                match this.generations.remove(&key) {
                    Some(generation) => {
                        Poll::Ready(Some(Update::Change(Change::Remove((key, generation)))))
                    }
                    // Nothing went: the next poll says what there is to say.
                    None => {
                        cx.waker().wake_by_ref();
                        Poll::Pending
                    }
                }
            }
            Poll::Ready(Some(Err(error))) => {
                *this.unsynced = false;
                Poll::Ready(Some(Update::Stale(Arc::from(error.into()))))
            }
            Poll::Ready(None) => Poll::Ready(None),
            // All it had to say for now: there is no other sign of a complete set in tower's stream. One
            // that has said nothing yet, or nothing since its last error, does not know.
            Poll::Pending if *this.unsynced => {
                *this.unsynced = false;
                Poll::Ready(Some(Update::Synced))
            }
            Poll::Pending => Poll::Pending,
        }
    }
}
