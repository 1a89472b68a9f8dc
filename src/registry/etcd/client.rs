//! The requests that we make of etcd, each with its bound.

use std::{
    fmt,
    future::{Future, ready},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use futures_util::stream;
use tokio::runtime;
use tonic::{Code, Request, Response, Status, Streaming, metadata::MetadataValue};

use super::pb::{
    self,
    compare::{CompareResult, CompareTarget, TargetUnion},
    kv_client::KvClient,
    lease_client::LeaseClient,
    request_op, response_op,
    watch_client::WatchClient,
    watch_request::RequestUnion,
};
use crate::{
    Backoff, Pool,
    error::{Error, Kind},
    pool::PoolConfig,
    registry::{Fixed, Registry as _},
    transport::{Connection, Connector},
};

/// How long a request may take unless it is said otherwise.
pub(super) const TIMEOUT: Duration = Duration::from_secs(5);

/// The members of an etcd cluster, as a pool.
pub(super) struct Client {
    members: Fixed,
    // Made at first use: that needs a runtime, and making a registry does not. Made anew when its runtime
    // has ended.
    pool: Mutex<Option<Pool<Connection>>>,
}

/// What a conditional write comes to.
pub(super) enum Written {
    Done,
    /// The condition did not hold; what stands under the key, if anything.
    Refused(Option<pb::KeyValue>),
}

/// A request that came to nothing.
#[derive(Debug)]
pub(super) struct Failure {
    what: &'static str,
    status: Status,
}

// === impl Client ===

impl Client {
    pub(super) fn new(members: Fixed) -> Self {
        Self {
            members,
            pool: Mutex::new(None),
        }
    }

    pub(super) async fn range(
        &self,
        request: pb::RangeRequest,
        timeout: Duration,
    ) -> Result<pb::RangeResponse, Failure> {
        // A page of huge values has to be read to be skipped.
        let mut kv = KvClient::new(self.pool()?).max_decoding_message_size(usize::MAX);
        bounded("list", timeout, kv.range(request)).await
    }

    /// Writes a key under a lease if it does not exist.
    pub(super) async fn create(
        &self,
        key: Bytes,
        value: Bytes,
        lease: i64,
        timeout: Duration,
    ) -> Result<Written, Failure> {
        let free = (CompareTarget::Version, TargetUnion::Version(0));
        self.put_if(free, key, value, lease, timeout).await
    }

    /// Writes a key under its lease if it is still under that.
    pub(super) async fn replace(
        &self,
        key: Bytes,
        value: Bytes,
        lease: i64,
        timeout: Duration,
    ) -> Result<Written, Failure> {
        let ours = (CompareTarget::Lease, TargetUnion::Lease(lease));
        self.put_if(ours, key, value, lease, timeout).await
    }

    pub(super) async fn grant(
        &self,
        id: i64,
        ttl: Duration,
        timeout: Duration,
    ) -> Result<(), Failure> {
        let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
        let request = pb::LeaseGrantRequest {
            ttl: i64::try_from(seconds).unwrap_or(i64::MAX),
            id,
        };
        let mut leases = LeaseClient::new(self.pool()?);
        let granted = bounded("grant a lease", timeout, leases.lease_grant(request)).await?;
        match granted.error.as_str() {
            "" => Ok(()),
            why => Err(Failure::new("grant a lease", Status::unknown(why))),
        }
    }

    /// Ends a lease and what is under it; that it is gone already is no failure.
    pub(super) async fn revoke(&self, id: i64, timeout: Duration) -> Result<(), Failure> {
        let mut leases = LeaseClient::new(self.pool()?);
        let request = pb::LeaseRevokeRequest { id };
        match bounded("revoke a lease", timeout, leases.lease_revoke(request)).await {
            Err(failure) if failure.status.code() == Code::NotFound => Ok(()),
            result => result.map(drop),
        }
    }

    /// Prolongs a lease by its TTL; false if it is gone.
    ///
    /// A stream for each beat costs little, and each goes to a member that is well: there is no stream to
    /// mend when one is not.
    pub(super) async fn keep_alive(&self, id: i64, timeout: Duration) -> Result<bool, Failure> {
        let mut leases = LeaseClient::new(self.pool()?);
        let request = stream::once(ready(pb::LeaseKeepAliveRequest { id }));
        let answer = async {
            let mut answers = leases
                .lease_keep_alive(with_leader(request))
                .await?
                .into_inner();
            let answer = answers.message().await?;
            answer
                .map(Response::new)
                .ok_or_else(|| Status::unavailable("the stream ended"))
        };
        Ok(bounded("keep a lease alive", timeout, answer).await?.ttl > 0)
    }

    /// A watch, as etcd has it: its first message says that it is created.
    pub(super) async fn watch(
        &self,
        request: pb::WatchCreateRequest,
        timeout: Duration,
    ) -> Result<Streaming<pb::WatchResponse>, Failure> {
        let request = pb::WatchRequest {
            request_union: Some(RequestUnion::CreateRequest(request)),
        };
        // The stream of requests has to stay open: its end is the watch's.
        let requests = stream::StreamExt::chain(stream::once(ready(request)), stream::pending());
        let mut watches = WatchClient::new(self.pool()?).max_decoding_message_size(usize::MAX);
        bounded("watch", timeout, watches.watch(with_leader(requests))).await
    }

    async fn put_if(
        &self,
        (target, value_is): (CompareTarget, TargetUnion),
        key: Bytes,
        value: Bytes,
        lease: i64,
        timeout: Duration,
    ) -> Result<Written, Failure> {
        let op = |request| pb::RequestOp {
            request: Some(request),
        };
        let request = pb::TxnRequest {
            compare: vec![pb::Compare {
                result: CompareResult::Equal.into(),
                target: target.into(),
                key: key.clone(),
                target_union: Some(value_is),
            }],
            failure: vec![op(request_op::Request::RequestRange(pb::RangeRequest {
                key: key.clone(),
                ..Default::default()
            }))],
            success: vec![op(request_op::Request::RequestPut(pb::PutRequest {
                key,
                value,
                lease,
            }))],
        };
        let mut kv = KvClient::new(self.pool()?);
        let answer = bounded("write a session", timeout, kv.txn(request)).await?;
        if answer.succeeded {
            return Ok(Written::Done);
        }
        let there = answer
            .responses
            .into_iter()
            .find_map(|op| match op.response {
                Some(response_op::Response::ResponseRange(range)) => range.kvs.into_iter().next(),
                _ => None,
            });
        Ok(Written::Refused(there))
    }

    fn pool(&self) -> Result<Pool<Connection>, Failure> {
        self.made()
            .map_err(|error| Failure::new("get a call", error))
    }

    fn made(&self) -> Result<Pool<Connection>, Error> {
        // A request has a timer, so it needs a runtime even where the pool is made.
        current_runtime("registry")?;
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pool) = pool.as_ref().filter(|pool| pool.is_running()) {
            return Ok(pool.clone());
        }
        let ms = Duration::from_millis;
        // An etcd that is away is dialled for as long as anybody wants it, twice a second.
        let config = PoolConfig::default()
            .attempts(1000)?
            .backoff(Backoff::new(ms(100), 1.5, ms(500), 0.2)?)
            .probe(Some(Backoff::constant(ms(500), 0.2)?))
            .attempt_timeout(ms(2000))?
            .max_wait(ms(2000))?;
        // A watch is a call, so a connection that is in use is never idle.
        let connector = Connector::new()
            .keepalive(Some(Duration::from_secs(5)), Duration::from_secs(3))?
            .keepalive_while_idle(false);
        let updates = self.members.discover("etcd")?.updates();
        let new: Pool<Connection> = Pool::new("etcd", config, updates, connector)?;
        *pool = Some(new.clone());
        Ok(new)
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("members", &self.members)
            .finish_non_exhaustive()
    }
}

// === impl Failure ===

impl Failure {
    fn new(what: &'static str, why: impl Into<Status>) -> Self {
        let status = why.into();
        Self { what, status }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "etcd did not {}: ", self.what)?;
        match self.status.message() {
            "" => self.status.code().fmt(f),
            message => f.write_str(message),
        }
    }
}

impl std::error::Error for Failure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.status)
    }
}

impl From<Failure> for Error {
    fn from(Failure { what, status }: Failure) -> Self {
        let kind = match status.code() {
            // etcd is away, or has no leader, or is too slow.
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => {
                Kind::RegistryUnreachable
            }
            // Ours, and not etcd's: there is no runtime.
            Code::InvalidArgument if Self::of(&status).is_some() => Kind::Invalid,
            _ => Kind::Service,
        };
        let error = Self::new(kind).with_reason(format!("etcd did not {what}"));
        error.with_source(status)
    }
}

/// The runtime that this is polled on; [`Kind::Invalid`] if there is none.
pub(super) fn current_runtime(what: &'static str) -> Result<runtime::Handle, Error> {
    runtime::Handle::try_current()
        .map_err(|error| Error::invalid(what, "used outside a tokio runtime").with_source(error))
}

/// A member that has lost its cluster ends the stream instead of going quiet.
fn with_leader<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    let metadata = request.metadata_mut();
    metadata.insert("hasleader", MetadataValue::from_static("true"));
    request
}

async fn bounded<T>(
    what: &'static str,
    timeout: Duration,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Failure> {
    let status = match tokio::time::timeout(timeout, call).await {
        Ok(Ok(response)) => return Ok(response.into_inner()),
        Ok(Err(status)) => status,
        Err(_) => Status::deadline_exceeded(format!("no answer within {timeout:?}")),
    };
    Err(Failure { what, status })
}
