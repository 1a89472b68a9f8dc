//! The requests that we make of etcd, each with its bound. All of them may be made twice.

use std::{
    fmt,
    future::{Future, ready},
    time::Duration,
};

use futures_util::stream;
use tokio::{
    sync::{Mutex, mpsc},
    time::{self, Instant},
};
use tonic::{Code, Request, Response, Status, Streaming, metadata::MetadataValue};

use super::{
    failure::Failure,
    members::{Member, Members},
    past::Past,
    pb::{
        self, auth_client::AuthClient, kv_client::KvClient, lease_client::LeaseClient,
        watch_client::WatchClient, watch_request::RequestUnion,
    },
};
use crate::{Pool, transport::Connections};

/// How long a request may take unless it is said otherwise.
pub(super) const TIMEOUT: Duration = Duration::from_secs(5);

/// How old a token has to be before a refusal may be for its age.
const NEW_TOKEN: Duration = Duration::from_secs(10);

/// An etcd cluster, and who we are there.
#[derive(Debug)]
pub(super) struct Client {
    members: Members,
    user: Option<User>,
    pub(super) past: Past,
}

/// A user of etcd's own authentication.
pub(super) struct User {
    name: String,
    password: String,
    /// None until it was asked for. Held while it is: many requests fail together, and one asks.
    token: Mutex<Option<(Token, Instant)>>,
}

/// What a request is sent with; empty where etcd does not ask who we are.
type Token = Option<MetadataValue<tonic::metadata::Ascii>>;

/// A watch as etcd has it, and the member that it is on.
pub(super) struct Watched {
    pub(super) messages: Streaming<pb::WatchResponse>,
    requests: mpsc::Sender<pb::WatchRequest>,
    member: Member,
}

// === impl Client ===

impl Client {
    pub(super) fn new(members: Members, user: Option<User>) -> Self {
        Self {
            members,
            user,
            past: Past::default(),
        }
    }

    pub(super) async fn range(
        &self,
        what: &'static str,
        request: pb::RangeRequest,
        timeout: Duration,
    ) -> Result<pb::RangeResponse, Failure> {
        let list = |pool, request| async move {
            // A page of huge values has to be read to be skipped.
            let mut kv = KvClient::new(pool).max_decoding_message_size(usize::MAX);
            kv.range(request).await
        };
        self.ask(what, timeout, request, list).await
    }

    pub(super) async fn txn(
        &self,
        request: pb::TxnRequest,
        timeout: Duration,
    ) -> Result<pb::TxnResponse, Failure> {
        let write = |pool, request| async move { KvClient::new(pool).txn(request).await };
        self.ask("write a record", timeout, request, write).await
    }

    /// Grants a lease; that there is one of this id is no failure.
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
        let grant =
            |pool, request| async move { LeaseClient::new(pool).lease_grant(request).await };
        match self.ask("grant a lease", timeout, request, grant).await {
            // From an earlier request of ours, for ids are random: it has been running since.
            Err(failure) if failure.code() == Code::FailedPrecondition => {
                match self.keep_alive(id, timeout).await? {
                    true => Ok(()),
                    false => Err(failure),
                }
            }
            Err(failure) => Err(failure),
            Ok(granted) => match granted.error.as_str() {
                "" => Ok(()),
                why => Err(Failure::new("grant a lease", Status::unknown(why))),
            },
        }
    }

    /// Ends a lease and what is under it; that it is gone already is no failure.
    pub(super) async fn revoke(&self, id: i64, timeout: Duration) -> Result<(), Failure> {
        let request = pb::LeaseRevokeRequest { id };
        let revoke =
            |pool, request| async move { LeaseClient::new(pool).lease_revoke(request).await };
        match self.ask("revoke a lease", timeout, request, revoke).await {
            Err(failure) if failure.code() == Code::NotFound => Ok(()),
            result => result.map(drop),
        }
    }

    /// Prolongs a lease by its TTL; false if it is gone.
    ///
    /// A stream for each beat costs little, and each goes to a member that is well: there is no stream to
    /// mend when one is not.
    pub(super) async fn keep_alive(&self, id: i64, timeout: Duration) -> Result<bool, Failure> {
        let request = pb::LeaseKeepAliveRequest { id };
        let beat = |pool, request: Request<pb::LeaseKeepAliveRequest>| async move {
            let request = with_leader(request.map(|beat| stream::once(ready(beat))));
            let mut answers = LeaseClient::new(pool)
                .lease_keep_alive(request)
                .await?
                .into_inner();
            let answer = answers.message().await?;
            answer
                .map(Response::new)
                .ok_or_else(|| Status::unavailable("the stream ended"))
        };
        let answer = self
            .ask("keep a lease alive", timeout, request, beat)
            .await?;
        Ok(answer.ttl > 0)
    }

    /// A watch, as etcd has it: its first message says that it is created.
    pub(super) async fn watch(
        &self,
        request: pb::WatchCreateRequest,
        timeout: Duration,
    ) -> Result<Watched, Failure> {
        let request = pb::WatchRequest {
            request_union: Some(RequestUnion::CreateRequest(request)),
        };
        // The stream of requests stays open, for its end is the watch's, and takes questions later on.
        let watch = |pool, request: Request<pb::WatchRequest>| async move {
            let (requests, more) = mpsc::channel(1);
            let request = request.map(|first| {
                let more = stream::unfold(more, async |mut more| Some((more.recv().await?, more)));
                stream::StreamExt::chain(stream::once(ready(first)), more)
            });
            let mut watches = WatchClient::new(pool).max_decoding_message_size(usize::MAX);
            let watching = watches.watch(with_leader(request)).await?;
            Ok(watching.map(|messages| (messages, requests)))
        };
        let asked = self.ask_member("watch", timeout, request, watch).await;
        let ((messages, requests), member) = asked?;
        Ok(Watched {
            messages,
            requests,
            member,
        })
    }

    /// This watch's member has gone silent.
    pub(super) fn suspect(&self, watched: &Watched) {
        self.members.suspect(&watched.member);
    }

    /// A watch was refused for this reason. etcd 3.4 knows no other word than "permission denied" for a token that
    /// it has forgotten, so that is replaced, unless it is new: then it is the user that may not watch.
    pub(super) async fn is_refused(&self, reason: &str) {
        if let Some(user) = &self.user
            && (reason.contains("permission denied") || reason.contains("auth"))
        {
            let mut token = user.token.lock().await;
            let is_old = |(_, since): &(Token, Instant)| since.elapsed() > NEW_TOKEN;
            token.take_if(|token| is_old(token));
        }
    }

    async fn ask<M, T, F>(
        &self,
        what: &'static str,
        timeout: Duration,
        message: M,
        call: impl Fn(Pool<Connections>, Request<M>) -> F,
    ) -> Result<T, Failure>
    where
        M: Clone,
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let asked = self.ask_member(what, timeout, message, call).await;
        asked.map(|(answer, _)| answer)
    }

    /// The answer, and who gave it. A token that etcd does not know is replaced, once; that is within the time, too,
    /// as is the wait for whoever else asks for one.
    async fn ask_member<M, T, F>(
        &self,
        what: &'static str,
        timeout: Duration,
        message: M,
        call: impl Fn(Pool<Connections>, Request<M>) -> F,
    ) -> Result<(T, Member), Failure>
    where
        M: Clone,
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let deadline = Instant::now() + timeout;
        let left = || deadline.saturating_duration_since(Instant::now());
        let mut again = self.user.is_some();
        loop {
            let token = time::timeout_at(deadline, self.token(left())).await;
            let token = token.unwrap_or_else(|_| {
                let why = format!("no token within {timeout:?}");
                Err(Failure::new(what, Status::deadline_exceeded(why)))
            })?;
            let asked = self.members.ask(what, left(), |pool| {
                let mut request = Request::new(message.clone());
                if let Some(token) = &token {
                    request.metadata_mut().insert("token", token.clone());
                }
                call(pool, request)
            });
            match asked.await {
                Err(failure) if again && failure.wants_token() => {
                    again = false;
                    self.replace_token(&token).await;
                }
                asked => return asked,
            }
        }
    }

    /// The token to send, asked for if there is none.
    async fn token(&self, timeout: Duration) -> Result<Token, Failure> {
        let Some(user) = &self.user else {
            return Ok(None);
        };
        let mut token = user.token.lock().await;
        if let Some((token, _)) = &*token {
            return Ok(token.clone());
        }
        let request = pb::AuthenticateRequest {
            name: user.name.clone(),
            password: user.password.clone(),
        };
        let what = "authenticate";
        let prove = |pool| {
            let request = request.clone();
            async move { AuthClient::new(pool).authenticate(request).await }
        };
        let new = match self.members.ask(what, timeout, prove).await {
            Ok((answer, _)) => {
                let mut value = MetadataValue::try_from(answer.token)
                    .map_err(|_| Failure::new(what, Status::internal("its token is no text")))?;
                value.set_sensitive(true);
                Some(value)
            }
            // Authentication is not turned on: then nobody is asked who he is.
            Err(failure) if failure.code() == Code::FailedPrecondition => None,
            Err(failure) => return Err(failure),
        };
        *token = Some((new.clone(), Instant::now()));
        Ok(new)
    }

    /// Forgets a token that was refused, unless somebody has replaced it already.
    async fn replace_token(&self, refused: &Token) {
        if let Some(user) = &self.user {
            let mut token = user.token.lock().await;
            token.take_if(|(token, _)| token == refused);
        }
    }
}

// === impl User ===

impl User {
    pub(super) fn new(name: String, password: String) -> Self {
        Self {
            name,
            password,
            token: Mutex::new(None),
        }
    }
}

impl fmt::Debug for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("User").field(&self.name).finish()
    }
}

// === impl Watched ===

impl Watched {
    /// Asks how far it has come; the answer is a sign of life.
    pub(super) fn ask_for_progress(&self) {
        let request = RequestUnion::ProgressRequest(pb::WatchProgressRequest {});
        // A question that waits to be sent is enough.
        let _ = self.requests.try_send(pb::WatchRequest {
            request_union: Some(request),
        });
    }
}

/// A member that has lost its cluster ends the stream instead of going quiet.
fn with_leader<T>(mut request: Request<T>) -> Request<T> {
    let metadata = request.metadata_mut();
    metadata.insert("hasleader", MetadataValue::from_static("true"));
    request
}
