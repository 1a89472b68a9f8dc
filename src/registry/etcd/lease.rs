//! A session's hold on etcd: its lease, and the task that keeps it alive.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future;
use tokio::{runtime, task::AbortHandle, time};

use super::{EtcdRegistry, client::Written};
use crate::{
    Backoff,
    endpoint::BoxFuture,
    error::{Error, Kind},
    registry::{Session, registration::Hold},
};

/// A session and the lease that its record is under.
pub(super) struct Lease {
    registry: EtcdRegistry,
    key: Bytes,
    state: Mutex<State>,
    /// Held over each write, so that an update and a renewal do not cross.
    writing: tokio::sync::Mutex<()>,
}

struct State {
    session: Arc<Session>,
    id: i64,
    /// Leases that were asked for and came to nothing, as far as is known; revoked in the end.
    doubtful: Vec<i64>,
}

/// A [`Lease`] that is kept alive until this is dropped or let go.
pub(super) struct Kept {
    lease: Arc<Lease>,
    task: AbortHandle,
    runtime: runtime::Handle,
}

// === impl Lease ===

impl Lease {
    pub(super) fn new(registry: EtcdRegistry, key: Bytes, session: Arc<Session>) -> Arc<Self> {
        Arc::new(Self {
            registry,
            key,
            state: Mutex::new(State {
                session,
                id: 0,
                doubtful: Vec::new(),
            }),
            writing: tokio::sync::Mutex::new(()),
        })
    }

    /// Grants a lease and writes the record under it; or returns what stands under the key already.
    pub(super) async fn establish(self: &Arc<Self>, value: Bytes) -> Result<Option<Bytes>, Error> {
        // By our own choice, so that it can be revoked even when the answer is lost.
        let id = fastrand::i64(1..i64::MAX);
        self.state().doubtful.push(id);
        let timeout = self.registry.timeout;
        let client = &self.registry.client;
        let result = async {
            client.grant(id, self.registry.ttl, timeout).await?;
            let written = client.create(self.key.clone(), value, id, timeout);
            Ok::<_, Error>(written.await?)
        };
        match result.await {
            Ok(Written::Done) => {
                let mut state = self.state();
                state.doubtful.retain(|doubtful| *doubtful != id);
                state.id = id;
                Ok(None)
            }
            Ok(Written::Refused(there)) => {
                self.clone().discard(id);
                // Empty if it went between; whoever tries again will get it.
                Ok(Some(there.map(|kv| kv.value).unwrap_or_default()))
            }
            Err(error) => {
                self.clone().discard(id);
                Err(error)
            }
        }
    }

    /// Keeps it alive in a task.
    pub(super) fn keep(self: Arc<Self>) -> Kept {
        let task = tokio::spawn(self.clone().run());
        Kept {
            lease: self,
            task: task.abort_handle(),
            runtime: runtime::Handle::current(),
        }
    }

    async fn run(self: Arc<Self>) {
        let period = self.registry.ttl / 3;
        let (initial, max) = (Duration::from_millis(100), Duration::from_millis(500));
        let backoff = Backoff::new(initial, 1.5, max, 0.2).unwrap_or_default();
        let mut failures = 0;
        loop {
            let delay = match failures {
                0 => period,
                n => backoff.delay(n - 1).min(period),
            };
            time::sleep(delay).await;
            match self.beat(period).await {
                Ok(()) => failures = 0,
                Err(error) => {
                    if failures == 0 {
                        let session = self.state().session.clone();
                        let (role, id) = (session.role(), session.id());
                        tracing::warn!(role, id, %error, "the session's lease could not be kept alive");
                    }
                    // Whoever has the key now is not asked again in a hurry.
                    failures = match error.kind() {
                        Kind::AlreadyRegistered => 0,
                        _ => failures + 1,
                    };
                }
            }
        }
    }

    /// Prolongs the lease; if it is gone, grants another and writes the record anew.
    async fn beat(self: &Arc<Self>, period: Duration) -> Result<(), Error> {
        let id = self.state().id;
        let timeout = self.registry.timeout.min(period);
        if self.registry.client.keep_alive(id, timeout).await? {
            return Ok(());
        }
        let _writing = self.writing.lock().await;
        let session = self.state().session.clone();
        let value = Bytes::from(self.registry.codec.encode(&session, 0)?);
        tracing::warn!(
            role = session.role(),
            id = session.id(),
            "the session's lease ran out; registering again"
        );
        match self.establish(value).await? {
            None => Ok(()),
            Some(holder) => {
                let EtcdRegistry { codec, root, .. } = &self.registry;
                Err(super::held_by(&**codec, root, &session, &holder))
            }
        }
    }

    async fn write(&self, session: &Arc<Session>) -> Result<(), Error> {
        let value = Bytes::from(self.registry.codec.encode(session, 0)?);
        let _writing = self.writing.lock().await;
        let id = self.state().id;
        let EtcdRegistry {
            client, timeout, ..
        } = &self.registry;
        match client
            .replace(self.key.clone(), value, id, *timeout)
            .await?
        {
            Written::Done => {
                self.state().session = session.clone();
                Ok(())
            }
            Written::Refused(_) => Err(Error::new(Kind::SessionDeleted)
                .with_reason("its record is no longer in the registry")),
        }
    }

    /// Revokes all leases that it has or may have, whatever becomes of each; the first error, if any.
    async fn revoke(&self) -> Result<(), Error> {
        let EtcdRegistry {
            client, timeout, ..
        } = &self.registry;
        // A renewal that was aborted is over when it has let go of this: it adds no lease after we looked.
        // Its runtime may be asleep, and then we do not wait for ever.
        let _writing = time::timeout(*timeout, self.writing.lock()).await;
        let (live, doubtful) = {
            let state = self.state();
            (state.id, state.doubtful.clone())
        };
        let live = client.revoke(live, *timeout).await;
        // Together: however many they are, they take no longer than one.
        let doubtful = doubtful.into_iter().map(|id| client.revoke(id, *timeout));
        let doubtful = future::join_all(doubtful).await;
        Ok(doubtful.into_iter().fold(live, Result::and)?)
    }

    /// Revokes, in the background, a lease that came to nothing.
    fn discard(self: Arc<Self>, id: i64) {
        tokio::spawn(async move {
            let revoked = self.registry.client.revoke(id, self.registry.timeout).await;
            if revoked.is_ok() {
                self.state().doubtful.retain(|doubtful| *doubtful != id);
            }
        });
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("key", &self.key)
            .field("id", &self.state().id)
            .finish_non_exhaustive()
    }
}

// === impl Kept ===

impl Hold for Kept {
    fn write<'a>(&'a self, session: &'a Arc<Session>) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(self.lease.write(session))
    }

    fn release(self: Box<Self>) -> BoxFuture<'static, Result<(), Error>> {
        let lease = self.lease.clone();
        self.task.abort();
        Box::pin(async move { lease.revoke().await })
    }

    fn release_in_background(self: Box<Self>) {
        let lease = self.lease.clone();
        self.task.abort();
        self.runtime.spawn(async move {
            // If etcd does not answer, the session ends with its TTL.
            let _ = lease.revoke().await;
        });
    }

    fn abandon(self: Box<Self>) {
        // Dropping it ends the task.
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.lease.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use tokio::{net::TcpListener, sync::mpsc};

    use super::{super::pb, *};

    /// The address of an etcd that revokes leases, but not these, and says which it is asked to.
    async fn etcd_that_keeps(kept: &'static [i64]) -> (String, mpsc::UnboundedReceiver<i64>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("it has one").to_string();
        let (asked, told) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let (socket, _) = listener.accept().await.expect("it is dialled");
            let mut connection = h2::server::handshake(socket).await.expect("HTTP/2");
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                let asked = asked.clone();
                tokio::spawn(async move {
                    let mut body = request.into_body();
                    let mut message = Vec::new();
                    while let Some(Ok(data)) = body.data().await {
                        message.extend_from_slice(&data);
                    }
                    let revoke = pb::LeaseRevokeRequest::decode(&message[5..]).expect("a revoke");
                    let _ = asked.send(revoke.id);
                    let kept = kept.contains(&revoke.id);
                    let mut trailers = http::HeaderMap::new();
                    let status = if kept { "14" } else { "0" };
                    trailers.insert("grpc-status", status.parse().expect("a value"));
                    let why = format!("lease {} stays", revoke.id);
                    trailers.insert("grpc-message", why.parse().expect("a value"));
                    let head = http::Response::builder().header("content-type", "application/grpc");
                    let head = head.body(()).expect("a head");
                    let mut answer = respond.send_response(head, false).expect("it listens");
                    if !kept {
                        let empty = Bytes::from_static(&[0; 5]);
                        answer.send_data(empty, false).expect("it listens");
                    }
                    answer.send_trailers(trailers).expect("it listens");
                });
            }
        });
        (address, told)
    }

    #[tokio::test]
    async fn all_leases_are_revoked_whichever_of_them_fail_and_the_first_error_is_told() {
        for (kept, told) in [
            (&[][..], None),
            (&[2][..], Some("lease 2 stays")),
            (&[3][..], Some("lease 3 stays")),
            (&[1, 2, 3][..], Some("lease 1 stays")),
        ] {
            // Given a live lease, 1, two that are doubtful, and an etcd that fails to revoke some
            let (address, mut asked) = etcd_that_keeps(kept).await;
            let connecting = EtcdRegistry::connect([format!("http://{address}")], "demo");
            let registry = connecting.await.expect("a good endpoint");
            let session = Arc::new(Session::new("echo", "h:1"));
            let lease = Lease::new(registry, Bytes::from_static(b"demo/echo/h:1"), session);
            lease.state().id = 1;
            lease.state().doubtful = vec![2, 3];

            // When they are revoked
            let revoked = lease.revoke().await;

            // Then each was asked for, the live one first, and the first error is reported
            let mut ids = [(); 3].map(|()| asked.try_recv().expect("three were asked for"));
            assert_eq!(ids[0], 1, "{ids:?}");
            ids.sort_unstable();
            assert_eq!(ids, [1, 2, 3]);
            assert!(asked.try_recv().is_err(), "each is asked for once");
            match (revoked, told) {
                (Ok(()), None) => {}
                (Err(error), Some(told)) => {
                    assert_eq!(error.kind(), Kind::RegistryUnreachable);
                    assert!(error.to_string().contains(told), "{error}");
                }
                (revoked, told) => panic!("{revoked:?} instead of {told:?}"),
            }
        }
    }
}
