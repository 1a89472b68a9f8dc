//! Immutable sequences and maps in two levels, so that a change copies a small part.
//!
//! A snapshot is replaced whole at every change. Copying a flat vector of 10,000 `Arc`s takes 100 µs;
//! in two levels one change copies one chunk and the list of chunks, 2 µs, and a read is one step more.

use std::{
    hash::{BuildHasher, RandomState},
    sync::Arc,
};

const CHUNK: usize = 128;

/// A vector in chunks of 128, all full but the last, so that an index is two shifts away.
pub(crate) struct ChunkedVec<T> {
    chunks: Vec<Arc<Vec<T>>>,
    len: usize,
}

impl<T: Clone> ChunkedVec<T> {
    pub(crate) const fn new() -> Self {
        Self {
            chunks: Vec::new(),
            len: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn get(&self, index: usize) -> Option<&T> {
        self.chunks.get(index / CHUNK)?.get(index % CHUNK)
    }

    #[cfg(any(test, feature = "etcd"))]
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.chunks.iter().flat_map(|chunk| chunk.iter())
    }

    /// Appends, and tells the index.
    pub(crate) fn push(&mut self, value: T) -> usize {
        match self.chunks.last_mut() {
            Some(last) if last.len() < CHUNK => Arc::make_mut(last).push(value),
            _ => self.chunks.push(Arc::new(vec![value])),
        }
        self.len += 1;
        self.len - 1
    }

    pub(crate) fn replace(&mut self, index: usize, value: T) {
        if let Some(chunk) = self.chunks.get_mut(index / CHUNK)
            && let Some(slot) = Arc::make_mut(chunk).get_mut(index % CHUNK)
        {
            *slot = value;
        }
    }

    /// Removes by putting the last element in its place; tells which one moved there, if any did.
    pub(crate) fn swap_remove(&mut self, index: usize) -> Option<&T> {
        if index >= self.len {
            return None;
        }
        let last_chunk = self.chunks.last_mut()?;
        let last = Arc::make_mut(last_chunk).pop()?;
        if last_chunk.is_empty() {
            self.chunks.pop();
        }
        self.len -= 1;
        if index == self.len {
            return None;
        }
        self.replace(index, last);
        self.get(index)
    }
}

impl<T> Clone for ChunkedVec<T> {
    fn clone(&self) -> Self {
        Self {
            chunks: self.chunks.clone(),
            len: self.len,
        }
    }
}

pub(super) type Bucket<V> = Arc<Vec<(Arc<str>, V)>>;
#[cfg(feature = "manager")]
pub(super) type WeakBucket<V> = std::sync::Weak<Vec<(Arc<str>, V)>>;

/// A map from ids in hash buckets of about 64, doubled when they fill up.
pub(crate) struct IdMap<V> {
    buckets: Vec<Bucket<V>>,
    len: usize,
    hasher: RandomState,
}

impl<V: Clone> IdMap<V> {
    pub(crate) fn new() -> Self {
        Self {
            buckets: vec![Arc::default()],
            len: 0,
            hasher: RandomState::new(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn get(&self, id: &str) -> Option<&V> {
        let bucket = self.buckets.get(self.bucket_of(id))?;
        bucket
            .iter()
            .find(|(known, _)| &**known == id)
            .map(|(_, value)| value)
    }

    /// All buckets: one that is the same allocation as in an earlier map has the same in it.
    #[cfg(feature = "manager")]
    pub(super) fn buckets(&self) -> &[Bucket<V>] {
        &self.buckets
    }

    pub(crate) fn values(&self) -> impl Iterator<Item = &V> {
        self.buckets
            .iter()
            .flat_map(|bucket| bucket.iter().map(|(_, value)| value))
    }

    pub(crate) fn insert(&mut self, id: &Arc<str>, value: V) {
        if self.len >= self.buckets.len() * CHUNK / 2 {
            self.double();
        }
        let at = self.bucket_of(id);
        if let Some(bucket) = self.buckets.get_mut(at) {
            let bucket = Arc::make_mut(bucket);
            match bucket.iter_mut().find(|(known, _)| known == id) {
                Some((_, slot)) => *slot = value,
                None => {
                    bucket.push((id.clone(), value));
                    self.len += 1;
                }
            }
        }
    }

    pub(crate) fn remove(&mut self, id: &str) {
        let at = self.bucket_of(id);
        if let Some(bucket) = self.buckets.get_mut(at)
            && let Some(index) = bucket.iter().position(|(known, _)| &**known == id)
        {
            Arc::make_mut(bucket).swap_remove(index);
            self.len -= 1;
        }
    }

    fn bucket_of(&self, id: &str) -> usize {
        // The number of buckets is a power of two.
        self.hasher.hash_one(id) as usize & (self.buckets.len() - 1)
    }

    fn double(&mut self) {
        let old = std::mem::take(&mut self.buckets);
        let mut new = vec![Vec::new(); old.len() * 2];
        let mask = new.len() - 1;
        for (id, value) in old.iter().flat_map(|bucket| bucket.iter()) {
            let at = self.hasher.hash_one(&**id) as usize & mask;
            new[at].push((id.clone(), value.clone()));
        }
        self.buckets = new.into_iter().map(Arc::new).collect();
    }
}

impl<V> Clone for IdMap<V> {
    fn clone(&self) -> Self {
        Self {
            buckets: self.buckets.clone(),
            len: self.len,
            hasher: self.hasher.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vector_keeps_its_elements_through_pushes_and_swap_removes() {
        let mut ours = ChunkedVec::new();
        let mut model = Vec::new();
        let mut random = fastrand::Rng::with_seed(7);
        for step in 0..20_000 {
            // Grows to about 600, so that several chunks come and go.
            if model.is_empty() || random.usize(0..1200) > model.len() {
                assert_eq!(ours.push(step), model.len());
                model.push(step);
            } else {
                let index = random.usize(0..model.len());
                model.swap_remove(index);
                assert_eq!(ours.swap_remove(index), model.get(index));
            }
            assert_eq!(ours.len(), model.len());
        }
        assert!(ours.iter().eq(model.iter()));
        assert_eq!(ours.get(model.len()), None);
        assert_eq!(ours.swap_remove(model.len()), None);
    }

    #[test]
    fn a_clone_does_not_see_later_changes() {
        let mut ours = ChunkedVec::new();
        for i in 0..300 {
            ours.push(i);
        }
        let before = ours.clone();
        ours.swap_remove(0);
        ours.replace(5, -1);
        assert!(before.iter().copied().eq(0..300));
        assert_eq!((ours.get(0), ours.get(5)), (Some(&299), Some(&-1)));
    }

    #[test]
    fn a_map_finds_what_was_put_in_at_every_size() {
        let mut ours = IdMap::new();
        let ids: Vec<Arc<str>> = (0..10_000).map(|i| Arc::from(i.to_string())).collect();
        for (i, id) in ids.iter().enumerate() {
            ours.insert(id, i);
        }
        ours.insert(&ids[17], 1_000_017);
        for id in ids.iter().step_by(3) {
            ours.remove(id);
        }
        ours.remove("never there");
        for (i, id) in ids.iter().enumerate() {
            let expected = match i {
                _ if i % 3 == 0 => None,
                17 => Some(1_000_017),
                _ => Some(i),
            };
            assert_eq!(ours.get(id).copied(), expected, "{id}");
        }
        assert_eq!(ours.len(), ours.values().count());
        assert_eq!(ours.len(), 10_000 - 3334);
    }
}
