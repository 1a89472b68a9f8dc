//! Calls without end, and what became of them: half of them may be repeated by a policy, half may not; some are for one
//! server alone.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use fastrand::Rng;
use switchboard::{Channel, Error, Kind, RetryPolicy, Sent};
use tokio::{task::JoinSet, time};
use tonic::{Request, Status};

use crate::{
    ledger::{Call, Ledger},
    support::server::pb::{EchoRequest, echo_client::EchoClient},
    world::{HINDSIGHT, SERVERS, Truth, World, Wrong, lock, says_whom},
};

/// Callers of each client.
const CALLERS: usize = 8;

/// How long most calls may take.
const DEADLINE: Duration = Duration::from_secs(5);

/// How much longer than it may take a call may be under way, beside what this process itself is late.
const BOUND: Duration = Duration::from_millis(150);

/// How often a call is made that may be repeated.
const ATTEMPTS: u32 = 5;

/// The longest pause before another attempt: by the policy's default backoff of 100 ms, doubled and spread by 0.2, the one
/// before the last. A call that has not the time for its pause fails at once, with what was the last attempt's end.
const LONGEST_PAUSE: Duration = Duration::from_millis(960);

/// How often each caller prints what must not be at once; all of it is counted.
const TOLD: u64 = 3;

pub(crate) struct Load {
    shared: Arc<Shared>,
    callers: JoinSet<()>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    calls: AtomicU64,
    failed: AtomicU64,
    /// How late timers of this process were lately, at most, in microseconds.
    late: AtomicU64,
    tally: Mutex<Tally>,
}

/// What became of the calls.
#[derive(Clone, Default)]
pub(crate) struct Tally {
    calls: u64,
    repeatable: u64,
    pinned: u64,
    given_up: u64,
    slowest: Duration,
    /// By how much a call was under way longer than it may take, less what this process was late.
    over: Duration,
    failures: BTreeMap<String, u64>,
    pub(crate) wrong: Wrong,
}

/// One call that failed.
struct Failure {
    number: u64,
    /// Whom alone it was for, if anybody.
    pinned: Option<&'static str>,
    began: Instant,
    at: Instant,
    status: Status,
    took: Duration,
    deadline: Duration,
}

// === impl Load ===

impl Load {
    /// What is called, and whom, the seed decides; not in which order all of that comes.
    pub(crate) fn start(world: &World, seed: u64) -> Self {
        let shared = Arc::new(Shared::default());
        let mut callers = JoinSet::new();
        callers.spawn(watch_the_clock(shared.clone()));
        let mut random = Rng::with_seed(seed);
        for (client, channel) in world.channels().into_iter().enumerate() {
            for n in 0..CALLERS {
                let policy = (n % 2 == 0).then(|| {
                    let policy = RetryPolicy::new(ATTEMPTS).expect("so many may be made");
                    policy.idempotent()
                });
                let caller = Caller {
                    random: random.fork(),
                    says_whom: says_whom(client),
                    channel: channel.clone(),
                    policy,
                    ledger: world.ledger(),
                    truth: world.truth(),
                    shared: shared.clone(),
                    tally: Tally::default(),
                };
                callers.spawn(caller.run());
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
        let ended = async { while self.callers.join_next().await.is_some() {} };
        let ended = time::timeout(HINDSIGHT + 2 * DEADLINE, ended).await;
        let tally = self.shared.tally.lock();
        let mut tally = tally.unwrap_or_else(PoisonError::into_inner).clone();
        if ended.is_err() {
            let hang = self.callers.len();
            tally.is_wrong(format!("{hang} callers hang in calls that do not end"));
        }
        tally
    }
}

/// How late a timer is, on a machine that has more to do than it can.
async fn watch_the_clock(shared: Arc<Shared>) {
    const TICK: Duration = Duration::from_millis(5);
    let mut lately = VecDeque::new();
    while !shared.stop.load(Relaxed) {
        let began = Instant::now();
        time::sleep(TICK).await;
        let late = began.elapsed().saturating_sub(TICK).as_micros();
        lately.push_back((began, u64::try_from(late).unwrap_or(u64::MAX)));
        while lately
            .front()
            .is_some_and(|(at, _)| at.elapsed() > 2 * DEADLINE)
        {
            lately.pop_front();
        }
        let worst = lately.iter().map(|(_, late)| *late).max();
        shared.late.store(worst.unwrap_or_default(), Relaxed);
    }
}

struct Caller {
    random: Rng,
    says_whom: bool,
    channel: Channel,
    policy: Option<RetryPolicy>,
    ledger: Arc<Ledger>,
    truth: Arc<Mutex<Truth>>,
    shared: Arc<Shared>,
    tally: Tally,
}

// === impl Caller ===

impl Caller {
    async fn run(mut self) {
        // Judged a little later: what was done to the server may not be known at once.
        let mut failures: VecDeque<Failure> = VecDeque::new();
        while !self.shared.stop.load(Relaxed) {
            failures.extend(self.call().await);
            while failures
                .front()
                .is_some_and(|f| f.at.elapsed() >= HINDSIGHT)
                && let Some(failure) = failures.pop_front()
            {
                self.failed(&failure);
            }
        }
        time::sleep(HINDSIGHT).await;
        for failure in failures {
            self.failed(&failure);
        }
        let all = self.shared.tally.lock();
        all.unwrap_or_else(PoisonError::into_inner).add(self.tally);
    }

    async fn call(&mut self) -> Option<Failure> {
        let random = &mut self.random;
        let delay = match random.u8(..) {
            // Now and then a long one, to be in flight when things happen.
            0 => random.u32(100..2000),
            _ => random.u32(0..10),
        };
        let deadline = match random.u8(..) {
            0..10 => Duration::from_millis(random.u64(20..200)),
            _ => DEADLINE,
        };
        // Some are given up by whoever made them.
        let patience = match random.u8(..) {
            0..5 => Duration::from_millis(random.u64(0..20)),
            _ => Duration::MAX,
        };
        let pinned = match random.u8(..) {
            0..32 => Some(SERVERS[random.usize(..SERVERS.len())]),
            _ => None,
        };
        let channel = match pinned {
            Some(id) => &self.channel.to(id),
            None => &self.channel,
        };
        let number = self.ledger.number();
        let began = Instant::now();
        let call = call(channel, number.to_string(), delay, deadline, self.policy);
        let result = time::timeout(patience, call).await;
        let took = began.elapsed();
        self.tally.calls += 1;
        self.tally.repeatable += u64::from(self.policy.is_some());
        self.tally.pinned += u64::from(pinned.is_some());
        self.tally.slowest = self.tally.slowest.max(took);
        self.shared.calls.fetch_add(1, Relaxed);
        let late = Duration::from_micros(self.shared.late.load(Relaxed));
        let over = took.saturating_sub(deadline + late);
        self.tally.over = self.tally.over.max(over);
        if over > BOUND {
            self.tally.is_wrong("a call did not end in time".to_owned());
        }
        let mut record = Call {
            began,
            only: pinned.filter(|_| self.says_whom),
            repeatable: self.policy.is_some(),
            failed: None,
        };
        let failure = match result {
            Err(_given_up) => {
                self.tally.given_up += 1;
                None
            }
            Ok(Ok(())) => None,
            Ok(Err(status)) => {
                record.failed = Error::of(&status).map(Error::sent);
                self.shared.failed.fetch_add(1, Relaxed);
                let at = Instant::now();
                Some(Failure {
                    number,
                    pinned,
                    began,
                    at,
                    status,
                    took,
                    deadline,
                })
            }
        };
        self.ledger.ended(number, record);
        failure
    }

    fn failed(&mut self, failure: &Failure) {
        let truth = lock(&self.truth);
        let by = self.ledger.executed_by(failure.number);
        // Whoever had it first may have had most of its time.
        let mut had_it = by.iter().copied().chain(failure.pinned);
        let excused = had_it.any(|id| truth.was_disturbed(id));
        let may_be_repeated = self.policy.is_some();
        let is_new = self.tally.failed(failure, may_be_repeated, excused, &truth);
        if is_new {
            let executed = self.ledger.executed(failure.number, failure.began);
            println!(
                "           its deadline was {:?}, it took {:.1?}, began {:.1?} ago and was {executed}",
                failure.deadline,
                failure.took,
                failure.began.elapsed()
            );
        }
    }
}

pub(crate) async fn call(
    channel: &Channel,
    message: String,
    delay_ms: u32,
    deadline: Duration,
    policy: Option<RetryPolicy>,
) -> Result<(), Status> {
    let mut request = Request::new(EchoRequest {
        message,
        delay_ms,
        ..EchoRequest::default()
    });
    request.set_timeout(deadline);
    if let Some(policy) = policy {
        request.extensions_mut().insert(policy);
    }
    let mut client = EchoClient::new(channel.clone());
    client.unary(request).await.map(drop)
}

// === impl Tally ===

impl Tally {
    /// Whether it must not be, and nothing like it had been before.
    fn failed(
        &mut self,
        failure: &Failure,
        may_be_repeated: bool,
        excused: bool,
        truth: &Truth,
    ) -> bool {
        let status = &failure.status;
        let Some(error) = Error::of(status) else {
            let before = self.wrong.len();
            self.is_wrong(format!(
                "a failure of the server itself: {}",
                status.message()
            ));
            return self.wrong.len() > before;
        };
        let what = format!("{:?}, {:?}", error.kind(), error.sent());
        let what = match may_be_repeated {
            true => format!("{what}, of those that may be repeated"),
            false => what,
        };
        *self.failures.entry(what).or_default() += 1;
        let in_time = error.kind() != Kind::DeadlineExceeded;
        let peer = error.peer().map(|peer| peer.id.to_string());
        let excused = excused || peer.as_ref().is_some_and(|id| truth.was_disturbed(id));
        let before = self.wrong.len();
        match (error.sent(), peer) {
            // Nobody else would do.
            _ if failure.pinned.is_some() && excused => {}
            // So little time may not be enough.
            _ if !in_time && failure.deadline < DEADLINE => {}
            // Nor for the pause before another attempt.
            _ if may_be_repeated && failure.deadline < DEADLINE => {}
            // Its time may be up where several servers in a row stop answering, or too short for another pause.
            _ if may_be_repeated && failure.took + LONGEST_PAUSE >= DEADLINE && excused => {}
            _ if may_be_repeated && in_time => {
                self.is_wrong(format!(
                    "a call that may be repeated failed: {:?}: {error}",
                    error.kind()
                ));
            }
            // Nobody is registered: etcd can have deleted the sessions of all who were well at once, see the end.
            _ if error.kind() == Kind::NoSession && truth.were_all_gone() => {}
            // There are always others, and they are well.
            (Sent::Unsent | Sent::Unprocessed, _) => {
                self.is_wrong(format!(
                    "a call that could have gone elsewhere failed: {:?}: {error}",
                    error.kind()
                ));
            }
            (_, Some(_)) if excused => {}
            (_, peer) => self.is_wrong(format!(
                "a call failed {:.1?} ago though nothing was done to its server {}: {:?}: {error}",
                failure.at.elapsed(),
                peer.as_deref().unwrap_or("(unknown)"),
                error.kind(),
            )),
        }
        self.wrong.len() > before
    }

    fn is_wrong(&mut self, what: String) {
        let times = self.wrong.entry(what.clone()).or_default();
        *times += 1;
        if *times <= TOLD {
            println!("           !!! {what}");
        }
    }

    fn add(&mut self, other: Self) {
        self.calls += other.calls;
        self.repeatable += other.repeatable;
        self.pinned += other.pinned;
        self.given_up += other.given_up;
        self.slowest = self.slowest.max(other.slowest);
        self.over = self.over.max(other.over);
        for (what, times) in other.failures {
            *self.failures.entry(what).or_default() += times;
        }
        for (what, times) in other.wrong {
            *self.wrong.entry(what).or_default() += times;
        }
    }

    pub(crate) fn print(&self, length: Duration) {
        println!(
            "  {:>9}  made, {:.0} a second; the slowest took {:.1?}, and none was under way for more than {:.0?} over its time",
            self.calls,
            self.calls as f64 / length.as_secs_f64(),
            self.slowest,
            self.over,
        );
        println!("  {:>9}  of them might be repeated", self.repeatable);
        println!("  {:>9}  were for one server alone", self.pinned);
        println!("  {:>9}  were given up by their callers", self.given_up);
        for (what, times) in &self.failures {
            println!("  {times:>9}  failed: {what}");
        }
    }
}
