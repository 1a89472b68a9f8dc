//! How evenly calls spread over endpoints: as two random choices promise, and better than one.
//!
//! With two choices the share s(i) of servers that have at least i calls follows, for many servers, a system of equations
//! (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", IEEE Transactions on Parallel and Distributed Systems
//! 12(10), 2001): a call makes a server's load i where both choices had at least i - 1, and not both i, so
//! `ds(i)/dt = λ (s(i-1)² - s(i)²) - what is done`. Where servers take one call after the other and are all alike, that settles at
//! `s(i) = λ^(2^i - 1)`, against `λ^i` with one choice: the fullest of n has ln ln n / ln 2 + O(1) calls, against
//! ln n / ln (1/λ). Where calls stay, it has ln ln n / ln 2 + O(1) over the average (Berenbrink, Czumaj, Steger and Vöcking,
//! "Balanced Allocations: The Heavily Loaded Case", SIAM Journal on Computing 35(6), 2006).
//!
//! The equations, solved here by small steps, give the bound of each test: a load that is expected of a thousandth of a server.
//! The same calls, each pinned to a server that chance picks, break it in the same run.

use std::{sync::Arc, time::Duration};

use fastrand::Rng;
use switchboard::pool::PoolConfig;
use tokio::{time, time::Instant};
use tower::Service as _;

use crate::world::{Ask, CLIENTS, Client, ENDPOINTS, Session, TICK, seeded};

/// So many servers less than one are as good as none.
const NONE: f64 = 0.001;
/// How far the shares of 10,000 servers may be from those of very many: their standard deviation is half a hundredth at most for
/// servers that know nothing of each other, and somewhat more for these, who share in what happens to come.
const OFF: f64 = 0.03;
/// No load goes that high.
const LEVELS: usize = 64;

/// What two choices promise: a state of many servers, of several speeds, in the mean.
struct Promise {
    /// Speeds, and for each the share of its servers that have at least i calls.
    kinds: Vec<(f64, Vec<f64>)>,
    /// How many calls have come to servers that had at least i, for each server.
    came: Vec<f64>,
}

// === impl Promise ===

impl Promise {
    /// As many servers of each speed, and none has a call.
    fn new(speeds: &[f64]) -> Self {
        let mut empty = vec![0.0; LEVELS + 2];
        empty[0] = 1.0;
        Self {
            kinds: speeds.iter().map(|s| (*s, empty.clone())).collect(),
            came: vec![0.0; LEVELS + 2],
        }
    }

    /// So much later, with `rate` calls for each server in a second.
    fn after(mut self, seconds: f64, rate: f64) -> Self {
        const STEPS: usize = 500;
        let step = 1.0 / STEPS as f64;
        for _ in 0..(seconds * STEPS as f64) as usize {
            let share = self.shares();
            for (i, share) in share.iter().enumerate() {
                self.came[i] += step * rate * share * share;
            }
            for (speed, of) in &mut self.kinds {
                let was = of.clone();
                for i in 1..=LEVELS {
                    let comes = rate * (share[i - 1] + share[i]) * (was[i - 1] - was[i]);
                    let done = *speed * (was[i] - was[i + 1]);
                    of[i] += step * (comes - done);
                }
            }
        }
        self
    }

    /// The share of all servers that have at least i calls.
    fn shares(&self) -> Vec<f64> {
        let kinds = self.kinds.len() as f64;
        let share = |i| self.kinds.iter().map(|(_, of)| of[i]).sum::<f64>() / kinds;
        (0..LEVELS + 2).map(share).collect()
    }

    /// The most that a server has now, of so many.
    fn most_now(&self, servers: usize) -> usize {
        let share = self.shares();
        let beyond = (0..).find(|i| share[*i] * (servers as f64) < NONE);
        beyond.unwrap() - 1
    }

    /// The most that a server ever had, of so many.
    fn most_ever(&self, servers: usize) -> usize {
        (0..)
            .find(|i| self.came[*i] * (servers as f64) < NONE)
            .unwrap()
    }
}

/// `ln ln n / ln 2 + O(1)`, which is what the promise has to be in the theory's words; its constant is 2 here.
fn over_mean(n: usize) -> f64 {
    (n as f64).ln().ln() / 2_f64.ln() + 2.0
}

/// A client that is connected to servers of these speeds, as many of each.
async fn scene(speeds: &[f64]) -> (Vec<Arc<Session>>, Client) {
    let speed = |id| speeds[id % speeds.len()];
    let servers = (0..ENDPOINTS).map(|id| Session::new(id, TICK, speed(id)));
    let servers: Vec<_> = servers.collect();
    let client = Client::of(PoolConfig::default(), &servers);
    time::sleep(Duration::from_secs(10)).await;
    assert_eq!(client.ready(), ENDPOINTS);
    (servers, client)
}

/// Whom a call goes to.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Choice {
    /// Whom the pool picks.
    Pool,
    /// Whom chance picks.
    Random,
}

/// A call by a client that knows so many servers, from the `first` on.
fn call(
    client: &Client,
    (first, known): (usize, usize),
    choice: Choice,
    ask: Ask,
    random: &mut Rng,
) -> impl Future<Output = Result<(), switchboard::Error>> + Send + use<> {
    match choice {
        Choice::Pool => client.pool.clone().call(ask),
        Choice::Random => {
            let id = (first + random.usize(..known)) % ENDPOINTS;
            client.pool.to(id).call(ask)
        }
    }
}

/// With alike servers it is known how it settles.
#[test]
fn what_two_choices_promise_settles_as_the_theory_says() {
    let settled = Promise::new(&[1.0]).after(200.0, 0.9).shares();
    for i in 1..=8 {
        let theory = 0.9_f64.powi(2_i32.pow(i) - 1);
        let share = settled[i as usize];
        assert!((share - theory).abs() < 0.001, "{i}: {share} for {theory}");
    }
}

fn fullest(servers: &[Arc<Session>]) -> usize {
    let loads = servers.iter().map(|server| server.0.in_flight());
    loads.max().unwrap()
}

#[tokio::test(start_paused = true)]
async fn calls_that_stay_are_at_no_endpoint_more_than_two_choices_promise() {
    let mut random = seeded("calls that stay");
    let (servers, client) = scene(&[1.0]).await;
    for mean in [1, 10] {
        // Given what is promised.
        let promise = Promise::new(&[0.0]).after(mean as f64, 1.0);
        let promised = promise.most_now(ENDPOINTS);
        assert!((promised - mean) as f64 <= over_mean(ENDPOINTS));

        // When calls come and stay.
        let [two, one] = [Choice::Pool, Choice::Random].map(|choice| {
            let held: Vec<_> = (0..mean * ENDPOINTS)
                .map(|_| call(&client, (0, ENDPOINTS), choice, Ask::Stay, &mut random))
                .collect();
            let most = fullest(&servers);
            drop(held);
            most
        });

        // Then that is kept, and not by chance.
        println!("  {mean} on average: {two} at the fullest, of {promised}; a random choice {one}");
        assert!(two <= promised, "{two} is over {promised}");
        assert!(one > promised, "{one} is no more than {promised}");
    }
}

/// Calls come at random, `rate` for each server in a second, of one second's work on average, for so many seconds. The shares
/// of servers that have at least i calls in the end, and the most that one ever had.
async fn traffic(
    (servers, client): &(Vec<Arc<Session>>, Client),
    choice: Choice,
    (rate, seconds): (f64, f64),
    random: &mut Rng,
) -> (Vec<f64>, usize) {
    let mut exponential = |mean: f64| Duration::from_secs_f64(-mean * (1.0 - random.f64()).ln());
    let gap = 1.0 / (rate * servers.len() as f64);
    let began = Instant::now();
    let end = began + Duration::from_secs_f64(seconds);
    let mut choices = Rng::with_seed(exponential(1.0).as_nanos() as u64);
    for server in servers {
        server.0.take_most();
    }
    let mut next = began + exponential(gap);
    while next < end {
        time::sleep_until(next).await;
        let work = Ask::Work(exponential(1.0));
        tokio::spawn(call(client, (0, servers.len()), choice, work, &mut choices));
        next += exponential(gap);
    }
    time::sleep_until(end).await;
    let loads: Vec<_> = servers.iter().map(|server| server.0.in_flight()).collect();
    let most = servers.iter().map(|server| server.0.take_most()).max();
    let share = |i| loads.iter().filter(|load| **load >= i).count() as f64 / loads.len() as f64;
    // Whoever comes next finds nobody there.
    time::sleep(Duration::from_secs(1000)).await;
    assert_eq!(fullest(servers), 0);
    ((0..LEVELS).map(share).collect(), most.unwrap())
}

async fn spread(speeds: &[f64], rate: f64, seconds: f64) {
    let mut random = seeded("traffic");
    let scene = scene(speeds).await;
    let promise = Promise::new(speeds).after(seconds, rate);
    let promised = promise.most_ever(ENDPOINTS);
    let (two, most) = traffic(&scene, Choice::Pool, (rate, seconds), &mut random).await;
    let (one, most_of_one) = traffic(&scene, Choice::Random, (rate, seconds), &mut random).await;
    let mean = |shares: &[f64]| shares[1..].iter().sum::<f64>();
    println!(
        "  {:.2} calls at each: {most} at the fullest, of {promised}; a random choice: {:.2}, and {most_of_one}",
        mean(&two),
        mean(&one)
    );
    println!("  with i calls or more:  two choices, promised, a random choice");
    for (i, expected) in promise
        .shares()
        .into_iter()
        .enumerate()
        .take(promised + 2)
        .skip(1)
    {
        println!("  {i:2}:  {:.4}, {expected:.4}, {:.4}", two[i], one[i]);
        assert!(
            (two[i] - expected).abs() <= OFF,
            "{i}: {} for {expected}",
            two[i]
        );
    }
    assert!(promised as f64 - mean(&two) <= over_mean(ENDPOINTS));
    assert!(most <= promised, "{most} is over {promised}");
    assert!(
        most_of_one > promised,
        "{most_of_one} is no more than {promised}"
    );
}

#[tokio::test(start_paused = true)]
async fn endpoints_of_one_speed_have_as_many_calls_as_two_choices_promise() {
    spread(&[1.0], 0.9, 10.0).await;
}

/// Half of them are three times as fast as the others. With a random choice the slow ones get more than they can do, and what
/// waits there grows; with two they get what the fast ones leave.
#[tokio::test(start_paused = true)]
async fn endpoints_of_two_speeds_have_as_many_calls_as_two_choices_promise() {
    spread(&[0.5, 1.5], 0.8, 10.0).await;
}

/// No client knows of another's calls, so what is promised is promised of its own. A server that five know has at most what
/// the five have there at most: their sum.
#[tokio::test(start_paused = true)]
async fn calls_of_all_clients_are_at_no_endpoint_more_than_each_is_promised() {
    const KNOWN: usize = 50;
    const MEAN: usize = 10;
    let mut random = seeded("all clients");
    // Given clients each of which knows 50, and servers each of which five know.
    let servers = (0..ENDPOINTS).map(|id| Session::new(id, TICK, 1.0));
    let servers: Vec<_> = servers.collect();
    let firsts = (0..CLIENTS).map(|n| n * ENDPOINTS / CLIENTS);
    let clients = firsts.map(|first| {
        let known = servers.iter().cycle().skip(first).take(KNOWN).cloned();
        (
            first,
            Client::of(PoolConfig::default(), &known.collect::<Vec<_>>()),
        )
    });
    let clients: Vec<_> = clients.collect();
    time::sleep(Duration::from_secs(10)).await;
    let known_by = CLIENTS * KNOWN / ENDPOINTS;
    let promise = Promise::new(&[0.0]).after(MEAN as f64, 1.0);
    let promised = promise.most_now(CLIENTS * KNOWN);
    assert!((promised - MEAN) as f64 <= over_mean(CLIENTS * KNOWN));

    // When each has ten calls, on average, at each that it knows.
    let [two, one] = [Choice::Pool, Choice::Random].map(|choice| {
        let mut held = Vec::new();
        let mut at_one = 0;
        for (first, client) in &clients {
            let known = (*first, KNOWN);
            let calls =
                (0..MEAN * KNOWN).map(|_| call(client, known, choice, Ask::Stay, &mut random));
            held.extend(calls);
            let loads = client.pool.status().endpoints;
            at_one = at_one.max(loads.iter().map(|e| e.in_flight).max().unwrap());
        }
        (at_one, fullest(&servers))
    });

    // Then each keeps what is promised, and so do all together.
    println!(
        "  of one client: {} at the fullest, of {promised}; of all: {}, of {}; a random choice: {} and {}",
        two.0,
        two.1,
        known_by * promised,
        one.0,
        one.1
    );
    assert!(two.0 <= promised && two.1 <= known_by * promised, "{two:?}");
    assert!(one.0 > promised && one.1 > known_by * promised, "{one:?}");
}
