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
    endpoint::Given,
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
        queue: VecDeque<Update<(D::Key, u64), Arc<Given<D::Service>>>>,
        synced: bool,
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
            synced: false,
        }
    }
}

impl<D> Stream for FromTower<D>
where
    D: Discover,
    D::Key: Clone + Hash + fmt::Display,
    D::Error: Into<BoxError>,
{
    type Item = Update<(D::Key, u64), Arc<Given<D::Service>>>;

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
                *this.synced = false;
                let peer = Peer::new(this.role.clone(), key.to_string(), "");
                let given = Given::new(peer.with_generation(generation), service);
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
                *this.synced = false;
                match this.generations.remove(&key) {
                    Some(generation) => {
                        Poll::Ready(Some(Update::Change(Change::Remove((key, generation)))))
                    }
                    // Nothing went; say instead that all is said, which is always true between changes.
                    None => Poll::Ready(Some(Update::Synced)),
                }
            }
            Poll::Ready(Some(Err(error))) => {
                *this.synced = false;
                Poll::Ready(Some(Update::Stale(Arc::from(error.into()))))
            }
            Poll::Ready(None) => Poll::Ready(None),
            // All it had to say for now: there is no other sign of a complete set in tower's stream.
            Poll::Pending if !*this.synced => {
                *this.synced = true;
                Poll::Ready(Some(Update::Synced))
            }
            Poll::Pending => Poll::Pending,
        }
    }
}
