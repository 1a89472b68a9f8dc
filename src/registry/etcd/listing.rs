//! etcd as discovery knows it: a list, and a watch from a revision.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::stream;
use tonic::Streaming;

use super::{
    client::{Client, Failure},
    pb,
};
use crate::{
    endpoint::BoxFuture,
    error::BoxError,
    registry::store::{Broken, Event, Listing, Record, Store, Watch},
};

/// Records on one page of a list: with usual sessions, some 300 KiB.
const PAGE: i64 = 1000;

#[derive(Debug)]
pub(super) struct EtcdStore {
    pub(super) client: Arc<Client>,
    pub(super) timeout: Duration,
}

// === impl EtcdStore ===

impl EtcdStore {
    async fn list_all(&self, prefix: &str) -> Result<Listing, Failure> {
        let range_end = end_of(prefix.as_bytes());
        let mut listing = Listing::default();
        let mut key = Bytes::copy_from_slice(prefix.as_bytes());
        let mut revision = 0;
        loop {
            let request = pb::RangeRequest {
                key,
                range_end: range_end.clone(),
                limit: PAGE,
                revision,
            };
            let page = self.client.range(request, self.timeout).await?;
            // The first page's revision is that of the whole list; later pages are read at it. If it is
            // compacted meanwhile, that is an error, and the list is made anew.
            if revision == 0 {
                revision = page.header.map_or(0, |header| header.revision);
                listing.revision = positive(revision);
            }
            let last = page.kvs.last().map(|kv| kv.key.clone());
            listing.records.extend(page.kvs.into_iter().map(record));
            match last {
                Some(last) if page.more => key = [&*last, &[0]].concat().into(),
                _ => return Ok(listing),
            }
        }
    }

    async fn watch_from(&self, prefix: &str, from: u64) -> Result<Watch, Broken> {
        let request = pb::WatchCreateRequest {
            key: Bytes::copy_from_slice(prefix.as_bytes()),
            range_end: end_of(prefix.as_bytes()),
            start_revision: i64::try_from(from).unwrap_or(i64::MAX),
            progress_notify: true,
        };
        let lost = |failure: Failure| Broken::Lost(failure.into());
        let mut messages = self
            .client
            .watch(request, self.timeout)
            .await
            .map_err(lost)?;
        let first = tokio::time::timeout(self.timeout, message(&mut messages)).await;
        let first =
            first.map_err(|_| Broken::Lost("etcd did not create the watch in time".into()))?;
        // It says that the watch is created. If it said more, that would count.
        let first = first?;
        let first = stream::iter((!first.is_empty()).then_some(Ok(first)));
        let rest = stream::unfold(Some(messages), async |messages| {
            let mut messages = messages?;
            loop {
                match message(&mut messages).await {
                    // A sign of life.
                    Ok(events) if events.is_empty() => {}
                    Ok(events) => return Some((Ok(events), Some(messages))),
                    Err(why) => return Some((Err(why), None)),
                }
            }
        });
        Ok(Box::pin(stream::StreamExt::chain(first, rest)))
    }
}

impl Store for EtcdStore {
    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Listing, BoxError>> {
        Box::pin(async move { Ok(self.list_all(prefix).await?) })
    }

    fn watch(self: Arc<Self>, prefix: &str, from: u64) -> BoxFuture<'_, Result<Watch, Broken>> {
        Box::pin(async move { self.watch_from(prefix, from).await })
    }
}

/// The next message's events; a compaction comes as an ordinary message, as does a cancellation.
async fn message(messages: &mut Streaming<pb::WatchResponse>) -> Result<Vec<Event>, Broken> {
    let message = match messages.message().await {
        Ok(Some(message)) => message,
        Ok(None) => return Err(Broken::Lost("etcd ended it".into())),
        Err(status) => return Err(Broken::Lost(status.into())),
    };
    if message.compact_revision > 0 {
        let at = positive(message.compact_revision);
        return Err(Broken::Compacted { at });
    }
    if message.canceled {
        let why = format!("etcd canceled it: {}", message.cancel_reason);
        return Err(Broken::Lost(why.into()));
    }
    Ok(message.events.into_iter().filter_map(event).collect())
}

fn event(event: pb::Event) -> Option<Event> {
    let deleted = event.r#type() == pb::event::EventType::Delete;
    let kv = event.kv?;
    Some(match deleted {
        true => Event::Delete(kv.key),
        false => Event::Put(record(kv)),
    })
}

fn record(kv: pb::KeyValue) -> Record {
    Record {
        key: kv.key,
        value: kv.value,
        created: positive(kv.create_revision),
        modified: positive(kv.mod_revision),
    }
}

/// etcd's revisions are signed and never negative.
fn positive(revision: i64) -> u64 {
    u64::try_from(revision).unwrap_or(0)
}

/// The first key after all that begin with this prefix.
fn end_of(prefix: &[u8]) -> Bytes {
    let mut end = prefix.to_vec();
    while let Some(last) = end.last_mut() {
        if *last < 0xff {
            *last += 1;
            return end.into();
        }
        end.pop();
    }
    // etcd's word for "no end".
    Bytes::from_static(&[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_prefix_is_after_all_its_keys() {
        assert_eq!(&*end_of(b"demo/echo/"), b"demo/echo0");
        assert_eq!(&*end_of(b"a\xff\xff"), b"b");
        assert_eq!(&*end_of(b"\xff"), b"\0");
    }
}
