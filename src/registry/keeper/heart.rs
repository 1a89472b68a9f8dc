//! The task that keeps one lease alive, whatever its keeper is doing.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    task::AbortHandle,
    time::{self, Instant},
};

use super::{backoff, spread};
use crate::{
    error::{Error, SharedError},
    registry::home::Home,
};

/// How long a lease that is said to be gone is doubted: a member of etcd that has just come to lead may not know yet
/// of the latest.
const DOUBT: Duration = Duration::from_millis(100);

/// How the last beat went.
#[derive(Clone, Debug)]
pub(super) enum Beat {
    Alive,
    /// The registry does not answer; told once.
    Failing(SharedError),
    /// Nor has it for as long as the lease lasts. It may be alive all the same, for a registry that was away gives
    /// its leases more time.
    Overdue(SharedError),
    /// The last word.
    Gone,
}

/// Keeps a lease alive until it is dropped.
pub(super) struct Heart {
    pub(super) beats: watch::Receiver<Beat>,
    task: AbortHandle,
}

struct Task {
    home: Home,
    lease: i64,
    /// When the lease is over if nothing more is heard of it, judged from when the last beat was sent.
    until: Instant,
    tell: watch::Sender<Beat>,
}

// === impl Heart ===

impl Heart {
    /// Of a lease that was granted or kept alive at this time, or now.
    pub(super) fn start(home: &Home, lease: i64, confirmed: Option<Instant>) -> Self {
        let (tell, beats) = watch::channel(Beat::Alive);
        let task = Task {
            home: home.clone(),
            lease,
            until: confirmed.unwrap_or_else(Instant::now) + home.ttl,
            tell,
        };
        Self {
            beats,
            task: tokio::spawn(task.run()).abort_handle(),
        }
    }
}

impl Drop for Heart {
    fn drop(&mut self) {
        self.task.abort();
    }
}

// === impl Task ===

impl Task {
    async fn run(mut self) {
        let period = self.home.ttl / 3;
        let (mut failures, mut doubted) = (0, false);
        let mut delay = spread(period);
        loop {
            time::sleep(delay).await;
            let sent = Instant::now();
            match self.beat(period).await {
                Ok(true) => {
                    self.until = sent + self.home.ttl;
                    (failures, doubted) = (0, false);
                    self.tell.send_replace(Beat::Alive);
                    delay = spread(period);
                }
                Ok(false) if doubted => {
                    self.tell.send_replace(Beat::Gone);
                    return;
                }
                Ok(false) => {
                    doubted = true;
                    delay = DOUBT;
                }
                Err(why) => {
                    if failures == 0 && !self.is_overdue() {
                        self.tell.send_replace(Beat::Failing(Arc::new(why)));
                    }
                    delay = backoff().delay(failures).min(period);
                    failures = failures.saturating_add(1);
                }
            }
        }
    }

    /// One beat, with its own deadline; meanwhile the end of the lease is not missed.
    async fn beat(&self, period: Duration) -> Result<bool, Error> {
        let beat = self.home.store().keep_alive(self.lease, period);
        tokio::pin!(beat);
        if !self.is_overdue() {
            tokio::select! {
                // A process that was stopped for long comes to this first.
                biased;
                () = time::sleep_until(self.until) => {}
                beaten = &mut beat => return beaten,
            }
            let why = format!(
                "the registry has not confirmed its lease for {:?}",
                self.home.ttl
            );
            let why = Error::new(crate::Kind::RegistryUnreachable).with_reason(why);
            self.tell.send_replace(Beat::Overdue(Arc::new(why)));
        }
        beat.await
    }

    fn is_overdue(&self) -> bool {
        matches!(*self.tell.borrow(), Beat::Overdue(_))
    }
}
