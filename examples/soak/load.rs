//! Calls without end, and what became of them.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use switchboard::{Channel, Error, Sent};
use tokio::task::JoinSet;
use tonic::{Request, Status};

use crate::{
    support::server::pb::{EchoRequest, echo_client::EchoClient},
    world::{HINDSIGHT, Truth, World, Wrong, lock},
};

/// Callers of each client.
const CALLERS: usize = 8;
const DEADLINE: Duration = Duration::from_secs(5);
/// How often a call is repeated that was not processed.
const REPEATS: u32 = 3;

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
    repeated: u64,
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
            for _ in 0..CALLERS {
                callers.spawn(keep_calling(channel.clone(), world.truth(), shared.clone()));
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

async fn keep_calling(channel: Channel, truth: Arc<Mutex<Truth>>, shared: Arc<Shared>) {
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
        let mut repeats = 0;
        let result = loop {
            match call(&channel, delay).await {
                // The server said that it did not do it: then it is safe to do it elsewhere.
                Err(status) if repeats < REPEATS && is_unprocessed(&status) => repeats += 1,
                result => break result,
            }
        };
        tally.calls += 1;
        tally.repeated += u64::from(repeats);
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
            tally.failed(&status, &lock(&truth));
        }
    }
    tokio::time::sleep(HINDSIGHT).await;
    for (_, status) in failures {
        tally.failed(&status, &lock(&truth));
    }
    let mut all = shared.tally.lock().unwrap_or_else(PoisonError::into_inner);
    all.add(tally);
}

pub(crate) async fn call(channel: &Channel, delay_ms: u32) -> Result<(), Status> {
    let mut request = Request::new(EchoRequest {
        delay_ms,
        ..EchoRequest::default()
    });
    request.set_timeout(DEADLINE);
    EchoClient::new(channel.clone())
        .unary(request)
        .await
        .map(drop)
}

fn is_unprocessed(status: &Status) -> bool {
    Error::of(status).is_some_and(|error| error.sent() == Sent::Unprocessed)
}

// === impl Tally ===

impl Tally {
    fn failed(&mut self, status: &Status, truth: &Truth) {
        let Some(error) = Error::of(status) else {
            return self.is_wrong(format!(
                "a failure of the server itself: {}",
                status.message()
            ));
        };
        let what = format!("{:?}, {:?}", error.kind(), error.sent());
        *self.failures.entry(what).or_default() += 1;
        let peer = error.peer().map(|peer| peer.id.to_string());
        match (error.sent(), peer) {
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
        self.repeated += other.repeated;
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
        println!(
            "  {:>9}  repeated, as the server had not processed them",
            self.repeated
        );
        for (what, times) in &self.failures {
            println!("  {times:>9}  failed: {what}");
        }
    }
}
