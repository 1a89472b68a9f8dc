//! Calls without end, and what became of them: half of them may be repeated by a policy, half may not.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use switchboard::{Channel, Error, Kind, RetryPolicy, Sent};
use tokio::task::JoinSet;
use tonic::{Request, Status};

use crate::{
    support::server::pb::{EchoRequest, echo_client::EchoClient},
    world::{HINDSIGHT, Truth, World, Wrong, lock},
};

/// Callers of each client.
const CALLERS: usize = 8;
const DEADLINE: Duration = Duration::from_secs(5);
/// How often a call is made that may be repeated.
const ATTEMPTS: u32 = 5;

pub(crate) struct Load {
    shared: Arc<Shared>,
    callers: JoinSet<()>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    calls: AtomicU64,
    failed: AtomicU64,
    tally: Mutex<Tally>,
}

/// What became of the calls.
#[derive(Clone, Default)]
pub(crate) struct Tally {
    calls: u64,
    repeatable: u64,
    slowest: Duration,
    failures: BTreeMap<String, u64>,
    pub(crate) wrong: Wrong,
}

// === impl Load ===

impl Load {
    pub(crate) fn start(world: &World) -> Self {
        let shared = Arc::new(Shared::default());
        let mut callers = JoinSet::new();
        for channel in world.channels() {
            for n in 0..CALLERS {
                let policy = (n % 2 == 0).then(|| {
                    let policy = RetryPolicy::new(ATTEMPTS).expect("so many may be made");
                    policy.idempotent()
                });
                let truth = world.truth();
                callers.spawn(keep_calling(channel.clone(), policy, truth, shared.clone()));
            }
        }
        Self { shared, callers }
    }

    pub(crate) fn so_far(&self) -> (u64, u64) {
        (
            self.shared.calls.load(Relaxed),
            self.shared.failed.load(Relaxed),
        )
    }

    pub(crate) async fn stop(mut self) -> Tally {
        self.shared.stop.store(true, Relaxed);
        while self.callers.join_next().await.is_some() {}
        let tally = self.shared.tally.lock();
        tally.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn keep_calling(
    channel: Channel,
    policy: Option<RetryPolicy>,
    truth: Arc<Mutex<Truth>>,
    shared: Arc<Shared>,
) {
    let mut tally = Tally::default();
    // Judged a little later: what was done to the server may not be known at once.
    let mut failures = VecDeque::new();
    while !shared.stop.load(Relaxed) {
        let began = Instant::now();
        let delay = match fastrand::u8(..) {
            // Now and then a long one, to be in flight when things happen.
            0 => fastrand::u32(100..2000),
            _ => fastrand::u32(0..10),
        };
        let result = call(&channel, delay, policy).await;
        tally.calls += 1;
        tally.repeatable += u64::from(policy.is_some());
        tally.slowest = tally.slowest.max(began.elapsed());
        shared.calls.fetch_add(1, Relaxed);
        if let Err(status) = result {
            shared.failed.fetch_add(1, Relaxed);
            failures.push_back((Instant::now(), status));
        }
        while let Some((at, _)) = failures.front()
            && at.elapsed() >= HINDSIGHT
            && let Some((_, status)) = failures.pop_front()
        {
            tally.failed(&status, policy.is_some(), &lock(&truth));
        }
    }
    tokio::time::sleep(HINDSIGHT).await;
    for (_, status) in failures {
        tally.failed(&status, policy.is_some(), &lock(&truth));
    }
    let mut all = shared.tally.lock().unwrap_or_else(PoisonError::into_inner);
    all.add(tally);
}

pub(crate) async fn call(
    channel: &Channel,
    delay_ms: u32,
    policy: Option<RetryPolicy>,
) -> Result<(), Status> {
    let mut request = Request::new(EchoRequest {
        delay_ms,
        ..EchoRequest::default()
    });
    request.set_timeout(DEADLINE);
    if let Some(policy) = policy {
        request.extensions_mut().insert(policy);
    }
    EchoClient::new(channel.clone())
        .unary(request)
        .await
        .map(drop)
}

// === impl Tally ===

impl Tally {
    fn failed(&mut self, status: &Status, may_be_repeated: bool, truth: &Truth) {
        let Some(error) = Error::of(status) else {
            return self.is_wrong(format!(
                "a failure of the server itself: {}",
                status.message()
            ));
        };
        let what = format!("{:?}, {:?}", error.kind(), error.sent());
        let what = match may_be_repeated {
            true => format!("{what}, of those that may be repeated"),
            false => what,
        };
        *self.failures.entry(what).or_default() += 1;
        let peer = error.peer().map(|peer| peer.id.to_string());
        match (error.sent(), peer) {
            // Its time may be up where several servers in a row stop answering.
            _ if may_be_repeated && error.kind() != Kind::DeadlineExceeded => {
                self.is_wrong(format!(
                    "a call that may be repeated failed: {:?}",
                    error.kind()
                ));
            }
            // There are always others, and they are well.
            (Sent::Unsent | Sent::Unprocessed, _) => {
                self.is_wrong(format!(
                    "a call that could have gone elsewhere failed: {:?}",
                    error.kind()
                ));
            }
            (_, Some(id)) if truth.was_disturbed(&id) => {}
            (_, peer) => self.is_wrong(format!(
                "a call failed though nothing was done to its server {}: {:?}",
                peer.as_deref().unwrap_or("(unknown)"),
                error.kind(),
            )),
        }
    }

    fn is_wrong(&mut self, what: String) {
        *self.wrong.entry(what).or_default() += 1;
    }

    fn add(&mut self, other: Self) {
        self.calls += other.calls;
        self.repeatable += other.repeatable;
        self.slowest = self.slowest.max(other.slowest);
        for (what, times) in other.failures {
            *self.failures.entry(what).or_default() += times;
        }
        for (what, times) in other.wrong {
            *self.wrong.entry(what).or_default() += times;
        }
    }

    pub(crate) fn print(&self) {
        println!(
            "  {:>9}  made; the slowest took {:.1?}",
            self.calls, self.slowest
        );
        println!("  {:>9}  of them might be repeated", self.repeatable);
        for (what, times) in &self.failures {
            println!("  {times:>9}  failed: {what}");
        }
    }
}
