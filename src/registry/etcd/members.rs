//! The members of an etcd cluster: which of them is asked, and what happens when it does not answer.

use std::{
    collections::HashMap,
    fmt,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::{self, Instant};
use tonic::{Code, Response, Status};

use super::failure::Failure;
use crate::{
    Backoff, Pool,
    error::{Error, Kind},
    pool::PoolConfig,
    registry::{Fixed, Registry as _, keeper::current_runtime},
    transport::{Connections, Connector},
};

/// How long a member that did not answer is passed by while there are others.
const SUSPECT: Duration = Duration::from_secs(10);

/// A cluster, as a pool of its members.
pub(super) struct Members {
    members: Fixed,
    connector: Connector,
    // Made at first use: that needs a runtime, and making a registry does not. Made anew when its runtime
    // has ended.
    pool: Mutex<Option<Pool<Connections>>>,
    /// Who did not answer, and until when it is passed by.
    suspects: Mutex<HashMap<Arc<str>, Instant>>,
}

/// The member that one attempt goes to.
#[derive(Clone, Debug)]
pub(super) struct Member {
    /// Pinned to it, or to none if none is connected: then whoever is first takes the call.
    pub(super) pool: Pool<Connections>,
    address: Option<Arc<str>>,
    /// How many others could be asked.
    others: usize,
}

// === impl Members ===

impl Members {
    pub(super) fn new(members: Fixed, connector: Connector) -> Self {
        Self {
            members,
            connector,
            pool: Mutex::new(None),
            suspects: Mutex::default(),
        }
    }

    /// Asks one member, and another if it does not answer; all of it in this time. So what is asked must bear
    /// being done twice.
    ///
    /// An attempt has a third of the time while there is another member to turn to, else all that is left. Where
    /// there is none, a connection that broke under the request is no answer yet: it is dialled again at once.
    pub(super) async fn ask<T, F>(
        &self,
        what: &'static str,
        timeout: Duration,
        mut call: impl FnMut(Pool<Connections>) -> F,
    ) -> Result<(T, Member), Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let deadline = Instant::now() + timeout;
        let mut redialled = false;
        loop {
            let member = self
                .choose()
                .map_err(|error| Failure::new(what, error.into()))?;
            let until = match member.others {
                0 => deadline,
                _ => deadline.min(Instant::now() + timeout / 3),
            };
            let status = match time::timeout_at(until, call(member.pool.clone())).await {
                Ok(Ok(response)) => {
                    self.trust(&member);
                    return Ok((response.into_inner(), member));
                }
                Ok(Err(status)) if status.code() == Code::Unavailable => status,
                Ok(Err(status)) => return Err(Failure::new(what, status)),
                Err(_) => Status::deadline_exceeded(format!("no answer within {timeout:?}")),
            };
            self.suspect(&member);
            let broke = Error::of(&status).is_some_and(|e| e.kind() == Kind::ConnectionLost);
            let again = member.others > 0 || (broke && !std::mem::replace(&mut redialled, true));
            if !again || Instant::now() >= deadline {
                return Err(Failure::new(what, status));
            }
        }
    }

    /// Passes this member by, for a while, if there are others.
    pub(super) fn suspect(&self, member: &Member) {
        if let Some(address) = &member.address {
            let until = Instant::now() + SUSPECT;
            self.suspects().insert(address.clone(), until);
        }
    }

    fn trust(&self, member: &Member) {
        if let Some(address) = &member.address {
            self.suspects().remove(address);
        }
    }

    /// A random one of those that are connected and answer; if none does, the one that has been suspect for the
    /// longest.
    fn choose(&self) -> Result<Member, Error> {
        let pool = self.pool()?;
        let snapshot = pool.snapshot();
        let now = Instant::now();
        let mut suspects = self.suspects();
        suspects.retain(|_, until| *until > now);
        let connected = snapshot.ready.iter().filter(|ready| !ready.is_down());
        let connected = connected.map(|ready| &ready.load.of().id);
        let (suspect, well): (Vec<_>, Vec<_>) =
            connected.partition(|id| suspects.contains_key(*id));
        let chosen = match well.len() {
            0 => suspect.into_iter().min_by_key(|id| suspects.get(*id)),
            n => well.get(fastrand::usize(..n)).copied(),
        };
        Ok(Member {
            address: chosen.cloned(),
            others: well.len().saturating_sub(1),
            pool: match chosen {
                Some(id) => pool.to(id),
                None => pool,
            },
        })
    }

    fn pool(&self) -> Result<Pool<Connections>, Error> {
        // A request has a timer, so it needs a runtime even where the pool is made.
        current_runtime()?;
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
        let updates = self.members.discover("etcd")?.updates();
        let new: Pool<Connections> = Pool::new("etcd", config, updates, self.connector.clone())?;
        *pool = Some(new.clone());
        Ok(new)
    }

    fn suspects(&self) -> MutexGuard<'_, HashMap<Arc<str>, Instant>> {
        self.suspects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Members {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Members")
            .field("members", &self.members)
            .finish_non_exhaustive()
    }
}
