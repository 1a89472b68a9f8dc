//! etcd as discovery and registrations know it.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::stream;
use tokio::time::{self, Instant};

use super::{
    client::{Client, Watched},
    failure::Failure,
    past::Known,
    pb::{
        self,
        compare::{CompareResult, CompareTarget, TargetUnion},
        request_op, response_op,
    },
};
use crate::{
    endpoint::BoxFuture,
    error::{BoxError, Error},
    registry::store::{
        Broken, Event, Listing, OnlyIf, Record, Scope, Store, Watch, Write, Written,
    },
};

/// Records on the first page of a list. The next ones have as many as would have come to a MiB, for a page
/// is read whole: a thousand values of a MiB each would be a GiB.
const FIRST_PAGE: i64 = 128;
const PAGE_BYTES: usize = 1 << 20;
pub(crate) const LARGEST_PAGE: i64 = 10_000;

/// How long a watch may be silent before it is asked how far it is, and how long the answer may take. etcd's own
/// word, by itself, comes every ten minutes.
const SILENCE: Duration = Duration::from_secs(3);
const ANSWER: Duration = Duration::from_secs(2);

/// How far a member may be behind the list when a watch begins on it, and how often it is asked meanwhile. A follower
/// is a moment behind whoever answered the list, always.
const BEHIND: Duration = Duration::from_millis(500);
const PROGRESS: Duration = Duration::from_millis(20);

#[derive(Debug)]
pub(super) struct EtcdStore {
    pub(super) client: Arc<Client>,
    pub(super) timeout: Duration,
}

/// A watch that goes on.
struct Watching {
    client: Arc<Client>,
    watched: Watched,
    /// The revision that etcd was at.
    before: u64,
    past: Known,
}

// === impl EtcdStore ===

impl EtcdStore {
    async fn list_all(&self, scope: &Scope) -> Result<Listing, Failure> {
        let range_end = end_of(scope);
        let before = self.client.past.before();
        let mut listing = Listing::default();
        let mut key = scope.start().clone();
        let (mut revision, mut limit) = (0, FIRST_PAGE);
        loop {
            let request = pb::RangeRequest {
                key,
                range_end: range_end.clone(),
                limit,
                revision,
            };
            let page = self.client.range("list", request, self.timeout).await?;
            // The first page's revision is that of the whole list; later pages are read at it. If it is
            // compacted meanwhile, that is an error, and the list is made anew.
            if revision == 0 {
                let header = page.header.unwrap_or_default();
                revision = header.revision;
                listing.revision = positive(revision);
                // One that lost its data is another, whatever it is called.
                let losses = self.client.past.listed(before, listing.revision);
                listing.cluster = header.cluster_id.wrapping_add(losses);
            }
            let last = page.kvs.last().map(|kv| kv.key.clone());
            limit = next_limit(&page.kvs);
            listing.records.extend(page.kvs.iter().map(record));
            match last {
                Some(last) if page.more => key = [&*last, &[0]].concat().into(),
                _ => return Ok(listing),
            }
        }
    }

    async fn watch_from(&self, scope: &Scope, from: u64) -> Result<Watch, Broken> {
        // One revision too early, and what it has is left out. An etcd of before August 2024 that compacts at a
        // deletion forgets it, and tells a watch from just that revision everything but the deletion (etcd #18089);
        // from the one before it, the watch is refused as compacted.
        let early = from.saturating_sub(1).max(1);
        let request = pb::WatchCreateRequest {
            key: scope.start().clone(),
            range_end: end_of(scope),
            start_revision: i64::try_from(early).unwrap_or(i64::MAX),
            progress_notify: true,
        };
        let lost = |failure: Failure| Broken::Lost(failure.into());
        let past = self.client.past.before();
        let mut watching = Watching {
            past,
            watched: self
                .client
                .watch(request, self.timeout)
                .await
                .map_err(lost)?,
            client: self.client.clone(),
            before: from.saturating_sub(1),
        };
        let first = time::timeout(self.timeout, watching.first()).await;
        let Ok(first) = first else {
            self.client.suspect(&watching.watched);
            let why = format!("etcd did not create it within {:?}", self.timeout);
            return Err(Broken::Lost(why.into()));
        };
        // It says that the watch is created. If it said more, that would count.
        let first = first?;
        let first = stream::iter((!first.is_empty()).then_some(Ok(first)));
        let rest = stream::unfold(Some(watching), async |watching| {
            let mut watching = watching?;
            loop {
                match watching.next().await {
                    // A sign of life.
                    Ok(events) if events.is_empty() => {}
                    Ok(events) => return Some((Ok(events), Some(watching))),
                    Err(why) => return Some((Err(why), None)),
                }
            }
        });
        Ok(Box::pin(stream::StreamExt::chain(first, rest)))
    }

    async fn write_if(&self, write: Write) -> Result<Written, Failure> {
        let Write {
            key,
            value,
            lease,
            only_if,
        } = write;
        let signed = |revision| i64::try_from(revision).unwrap_or(i64::MAX);
        let (target, union) = match only_if {
            OnlyIf::Absent => (CompareTarget::Version, TargetUnion::Version(0)),
            OnlyIf::Created(at) => (
                CompareTarget::Create,
                TargetUnion::CreateRevision(signed(at)),
            ),
            OnlyIf::Unchanged(at) => (CompareTarget::Mod, TargetUnion::ModRevision(signed(at))),
        };
        let op = |request| pb::RequestOp {
            request: Some(request),
        };
        let write = match value {
            Some(value) => request_op::Request::RequestPut(pb::PutRequest {
                key: key.clone(),
                value,
                lease,
            }),
            None => request_op::Request::RequestDeleteRange(pb::DeleteRangeRequest {
                key: key.clone(),
                range_end: Bytes::new(),
            }),
        };
        let read = request_op::Request::RequestRange(pb::RangeRequest {
            key: key.clone(),
            ..Default::default()
        });
        let request = pb::TxnRequest {
            compare: vec![pb::Compare {
                result: CompareResult::Equal.into(),
                target: target.into(),
                key,
                target_union: Some(union),
            }],
            success: vec![op(write)],
            failure: vec![op(read)],
        };
        let before = self.client.past.before();
        let answer = self.client.txn(request, self.timeout).await?;
        let revision = answer.header.map_or(0, |header| positive(header.revision));
        self.client.past.reached(before, revision);
        if answer.succeeded {
            return Ok(Written::Done(revision));
        }
        let there = answer.responses.iter().find_map(|op| match &op.response {
            Some(response_op::Response::ResponseRange(range)) => range.kvs.first(),
            _ => None,
        });
        Ok(Written::Refused(there.map(record)))
    }
}

impl Store for EtcdStore {
    fn list<'a>(&'a self, scope: &'a Scope) -> BoxFuture<'a, Result<Listing, BoxError>> {
        Box::pin(async move { Ok(self.list_all(scope).await?) })
    }

    fn watch(self: Arc<Self>, scope: &Scope, from: u64) -> BoxFuture<'_, Result<Watch, Broken>> {
        let scope = scope.clone();
        Box::pin(async move { self.watch_from(&scope, from).await })
    }

    fn get<'a>(&'a self, key: &'a Bytes) -> BoxFuture<'a, Result<Option<Record>, Error>> {
        Box::pin(async move {
            let request = pb::RangeRequest {
                key: key.clone(),
                ..Default::default()
            };
            let answer = self
                .client
                .range("read a record", request, self.timeout)
                .await?;
            Ok(answer.kvs.first().map(record))
        })
    }

    fn grant(&self, lease: i64, ttl: Duration) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move { Ok(self.client.grant(lease, ttl, self.timeout).await?) })
    }

    fn keep_alive(&self, lease: i64, within: Duration) -> BoxFuture<'_, Result<bool, Error>> {
        let timeout = self.timeout.min(within);
        Box::pin(async move { Ok(self.client.keep_alive(lease, timeout).await?) })
    }

    fn revoke(&self, lease: i64) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move { Ok(self.client.revoke(lease, self.timeout).await?) })
    }

    fn write(&self, write: Write) -> BoxFuture<'_, Result<Written, Error>> {
        Box::pin(async move { Ok(self.write_if(write).await?) })
    }
}

// === impl Watching ===

impl Watching {
    /// The first message's events, once its member is as far as the list was.
    async fn first(&mut self) -> Result<Vec<Event>, Broken> {
        let (mut events, mut revision) = self.message().await?;
        let late = Instant::now() + BEHIND;
        while revision < self.before {
            time::sleep(PROGRESS).await;
            self.watched.ask_for_progress();
            (events, revision) = match time::timeout_at(late, self.message()).await {
                Ok(told) => told?,
                Err(_) => return Err(self.is_behind(revision)),
            };
        }
        Ok(events)
    }

    /// The next message's events; a watch that is silent for long is asked whether it lives.
    async fn next(&mut self) -> Result<Vec<Event>, Broken> {
        let told = match time::timeout(SILENCE, self.message()).await {
            Ok(told) => Ok(told),
            Err(_) => {
                self.watched.ask_for_progress();
                time::timeout(ANSWER, self.message()).await
            }
        };
        match told {
            Ok(told) => match told? {
                (_, revision) if revision < self.before => Err(self.is_behind(revision)),
                (events, _) => Ok(events),
            },
            Err(_) => {
                self.client.suspect(&self.watched);
                let why = format!("etcd has said nothing for {:?}", SILENCE + ANSWER);
                Err(Broken::Lost(why.into()))
            }
        }
    }

    /// etcd takes a watch of the future, and says nothing until that has come: for ever, if it was emptied since the
    /// list. A member that lags behind for long is not the one to watch, either.
    fn is_behind(&self, revision: u64) -> Broken {
        self.client.suspect(&self.watched);
        let why = format!(
            "etcd is at revision {revision}, before {}, which it had been at",
            self.before
        );
        Broken::Lost(why.into())
    }

    /// What the list had already, a watch tells once more.
    fn is_asked(&self, event: &pb::Event) -> bool {
        let at = |kv: &pb::KeyValue| positive(kv.mod_revision);
        event.kv.as_ref().is_some_and(|kv| at(kv) > self.before)
    }

    /// The next message's events, and the revision that its member is at; a compaction comes as an ordinary message,
    /// as does a cancellation. Cancel safe.
    async fn message(&mut self) -> Result<(Vec<Event>, u64), Broken> {
        let message = match self.watched.messages.message().await {
            Ok(Some(message)) => message,
            Ok(None) => return Err(Broken::Lost("etcd ended it".into())),
            Err(status) => {
                let failure = Failure::new("go on with it", status);
                return Err(Broken::Lost(failure.into()));
            }
        };
        if message.compact_revision > 0 {
            let at = positive(message.compact_revision);
            return Err(Broken::Compacted { at });
        }
        if message.canceled {
            self.client.is_refused(&message.cancel_reason).await;
            let why = format!("etcd canceled it: {}", message.cancel_reason);
            return Err(Broken::Lost(why.into()));
        }
        let revision = message.header.map_or(0, |header| positive(header.revision));
        self.client.past.reached(self.past, revision);
        let events = message.events.into_iter();
        let events = events.filter(|event| self.is_asked(event));
        Ok((events.filter_map(event).collect(), revision))
    }
}

/// How many records of this kind come to a page.
pub(crate) fn next_limit(kvs: &[pb::KeyValue]) -> i64 {
    let bytes: usize = kvs.iter().map(|kv| kv.key.len() + kv.value.len()).sum();
    let each = (bytes / kvs.len().max(1)).max(1);
    i64::try_from(PAGE_BYTES / each).map_or(1, |limit| limit.clamp(1, LARGEST_PAGE))
}

pub(crate) fn event(event: pb::Event) -> Option<Event> {
    let deleted = event.r#type() == pb::event::EventType::Delete;
    let kv = event.kv?;
    Some(match deleted {
        true => Event::Delete(Bytes::copy_from_slice(&kv.key)),
        false => Event::Put(record(&kv)),
    })
}

fn record(kv: &pb::KeyValue) -> Record {
    Record::new(
        &kv.key,
        &kv.value,
        positive(kv.create_revision),
        positive(kv.mod_revision),
        kv.lease,
    )
}

/// etcd's revisions are signed and never negative.
fn positive(revision: i64) -> u64 {
    u64::try_from(revision).unwrap_or(0)
}

/// The end of a range: nothing for a key alone, else the first key after all that begin with the prefix.
pub(crate) fn end_of(scope: &Scope) -> Bytes {
    let Scope::Prefix(prefix) = scope else {
        return Bytes::new();
    };
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
        let end_of = |prefix: &'static [u8]| end_of(&Scope::Prefix(Bytes::from_static(prefix)));
        assert_eq!(&*end_of(b"demo/echo/"), b"demo/echo0");
        assert_eq!(&*end_of(b"a\xff\xff"), b"b");
        assert_eq!(&*end_of(b"\xff"), b"\0");
    }

    #[test]
    fn pages_have_about_a_mebibyte() {
        let page = |n: usize, bytes: usize| {
            let kv = pb::KeyValue {
                value: vec![0; bytes].into(),
                ..Default::default()
            };
            next_limit(&vec![kv; n])
        };
        assert_eq!(page(128, 256), 4096);
        assert_eq!(page(128, 1), LARGEST_PAGE);
        assert_eq!(page(1, 3 << 20), 1);
        assert_eq!(page(0, 0), LARGEST_PAGE);
    }
}
