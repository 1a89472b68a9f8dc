//! A server that all clients know dies and comes back: how often it is dialled.
//!
//! What is allowed follows from the backoff alone. Whoever loses a connection that was of use dials at once, and then, while that
//! fails, after delays d1, d2, ..., each spread evenly over ± j of itself. So for a client whose n-th delay begins anywhere, the
//! density of its (n+1)-th dial is nowhere over 1 / (2 j dn): what is added before can only flatten it. It lies between (1 - j) and
//! (1 + j) times the sum of the delays. Once all delays are the same d, a client's dials can overlap with its later ones; but a dial
//! at t follows one in a window before t that is 2 j d wide, and no two are within (1 - j) d of each other. With j at most a third
//! there is at most one in that window, so that the rate of all of them together stays at 1 / (2 j d).
//!
//! That makes a mean for each second. Clients are independent of each other, so the count is within five standard deviations of
//! it, which are no more than its root each.

use std::{sync::Arc, time::Duration};

use switchboard::pool::PoolConfig;
use tokio::{time, time::Instant};

use crate::world::{CLIENTS, Client, ENDPOINTS, Manner, REFUSAL, Session, TICK, seeded};

/// How many endpoints each client knows.
const KNOWN: usize = 50;

/// The delays that a configuration comes to, and their spread; said here once more, not asked of the crate.
struct Delays {
    /// Those that differ, in seconds.
    first: Vec<f64>,
    /// All later ones.
    then: f64,
    jitter: f64,
    /// How long after a dial it is known at the latest that it has failed.
    late: Duration,
}

// === impl Delays ===

impl Delays {
    /// gRPC's backoff, three attempts of it, and a probe every 30 s: the default.
    fn of_the_default() -> Self {
        Self {
            first: vec![1.0, 1.6],
            then: 30.0,
            jitter: 0.2,
            late: REFUSAL + TICK,
        }
    }

    /// gRPC's backoff up to its two minutes.
    fn of_grpc() -> Self {
        let delays = (0..).map(|n| 1.6_f64.powi(n));
        Self {
            first: delays.take_while(|delay| *delay < 120.0).collect(),
            then: 120.0,
            jitter: 0.2,
            late: REFUSAL + TICK,
        }
    }

    /// How many dials of how many clients there may be between `from` and `from + 1`, in seconds since the loss.
    fn most(&self, clients: usize, from: f64) -> f64 {
        let late = self.late.as_secs_f64();
        let (mut earliest, mut latest) = (0.0, late);
        // The dial that comes at once.
        let mut mean = if from <= latest { 1.0 } else { 0.0 };
        for delay in &self.first {
            earliest += delay * (1.0 - self.jitter);
            latest += delay * (1.0 + self.jitter) + late;
            let overlap = latest.min(from + 1.0) - earliest.max(from);
            let density = 1.0 / (2.0 * self.jitter * delay);
            mean += (overlap.max(0.0) * density).min(1.0);
        }
        earliest += self.then * (1.0 - self.jitter);
        let overlap = (from + 1.0 - earliest).clamp(0.0, 1.0);
        mean += overlap / (2.0 * self.jitter * self.then);
        let mean = mean * clients as f64;
        mean + 5.0 * mean.sqrt()
    }

    /// The longest that a client may be without a dial.
    fn longest(&self) -> Duration {
        Duration::from_secs_f64(self.then * (1.0 + self.jitter)) + self.late
    }

    /// That no second had more; prints the worst of some, from each of these on.
    fn check(&self, clients: usize, dials: &[Duration], phases: &[usize]) {
        let counts = by_second(dials);
        let most = |second: usize| self.most(clients, second as f64);
        for (second, count) in counts.iter().enumerate() {
            let most = most(second);
            assert!(
                *count as f64 <= most,
                "{count} dials in second {second}, {most:.0} at most"
            );
        }
        for phase in phases.windows(2) {
            let of_it = counts.iter().enumerate().take(phase[1]).skip(phase[0]);
            if let Some((second, count)) = of_it.max_by_key(|(_, count)| **count) {
                println!(
                    "  seconds {} to {}: {count} dials in one at most, of {:.0}",
                    phase[0],
                    phase[1],
                    most(second)
                );
            }
        }
    }
}

/// The server that all know, and clients that know it and some of the others: of 10,000 in all.
async fn scene(config: PoolConfig, known: usize) -> (Arc<Session>, Vec<Client>) {
    let mut random = seeded("storm");
    let mut dial = || Duration::from_millis(random.u64(1..=20));
    let others = (1..ENDPOINTS).map(|id| Session::new(id, dial(), 1.0));
    let others: Vec<_> = others.collect();
    let all_know = Session::new(0, Duration::from_millis(5), 1.0);
    let clients = (0..CLIENTS).map(|n| {
        let ring = others.iter().cycle().skip(n * others.len() / CLIENTS);
        let knows: Vec<_> = [&all_know]
            .into_iter()
            .chain(ring)
            .take(known)
            .cloned()
            .collect();
        Client::of(config, &knows)
    });
    let clients: Vec<_> = clients.collect();
    time::sleep(Duration::from_secs(60)).await;
    for client in &clients {
        assert_eq!(client.ready(), known);
    }
    (all_know, clients)
}

/// How many fall into each second.
fn by_second(dials: &[Duration]) -> Vec<usize> {
    let seconds = dials.iter().map(|at| at.as_secs() as usize);
    let mut counts = vec![0; seconds.clone().max().map_or(0, |last| last + 1)];
    seconds.for_each(|second| counts[second] += 1);
    counts
}

/// It dies, is down for so long, comes back, and says nothing to anybody of either.
async fn storm(config: PoolConfig, known: usize, delays: &Delays, down: u64) {
    // Given clients that are connected.
    let (server, clients) = scene(config, known).await;

    // When it dies, and is back much later.
    let died = Instant::now();
    server.0.dies(Manner::Refuses);
    time::sleep(Duration::from_secs(down)).await;
    let before = server.0.dialled(died).len();
    server.0.is_back();
    time::sleep(delays.longest() + server.0.dial + TICK).await;

    // Then no second had more dials than the backoff allows, down or back.
    let dials = server.0.dialled(died);
    let back = down as usize;
    delays.check(clients.len(), &dials, &[0, 1, 4, back, back + 1]);

    // And all are connected, within the longest delay, by one dial each.
    assert_eq!(dials.len() - before, clients.len());
    let last = *dials.last().unwrap() - Duration::from_secs(down);
    println!("  the last was dialled {last:?} after it was back");
    assert!(last <= delays.longest(), "{last:?}");
    for client in &clients {
        assert_eq!(client.ready(), known);
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_all_know_is_dialled_as_the_probes_allow_while_it_is_down_and_when_it_is_back()
 {
    storm(PoolConfig::default(), KNOWN, &Delays::of_the_default(), 300).await;
}

#[tokio::test(start_paused = true)]
async fn where_nobody_gives_up_it_is_dialled_as_the_backoff_allows_up_to_its_longest_delay() {
    let config = PoolConfig::default().attempts(1000).unwrap();
    storm(config, 2, &Delays::of_grpc(), 1500).await;
}

/// Not a second long does it live, which is no use to anybody. Its connections end together, every 100 ms.
#[tokio::test(start_paused = true)]
async fn a_server_that_accepts_and_hangs_up_is_dialled_no_faster_than_one_that_refuses() {
    let (server, clients) = scene(PoolConfig::default(), 2).await;
    let died = Instant::now();
    for _ in 0..1000 {
        server.0.dies(Manner::Answers);
        time::sleep(Duration::from_millis(100)).await;
    }
    let delays = Delays {
        late: Duration::from_millis(100) + server.0.dial + TICK,
        ..Delays::of_the_default()
    };
    delays.check(clients.len(), &server.0.dialled(died), &[0, 1, 4, 100]);
}

/// The registry is no place to spread them: whoever hears of a session dials it, and each hears of it at once.
#[tokio::test(start_paused = true)]
async fn a_server_that_registers_again_is_dialled_once_by_each_however_long_it_was_down() {
    // Given a server that is down, and whose session is gone, for so long that each client probes.
    let (server, clients) = scene(PoolConfig::default(), 2).await;
    server.0.dies(Manner::Refuses);
    time::sleep(Duration::from_secs(100)).await;
    for client in &clients {
        client.remove(0);
    }
    time::sleep(Duration::from_secs(1)).await;

    // When it is back, and registers.
    server.0.is_back();
    let back = Instant::now();
    for client in &clients {
        client.insert(CLIENTS as u64, &server);
    }
    time::sleep(Duration::from_secs(60)).await;

    // Then that is one dial each, and no more.
    let dials = server.0.dialled(back);
    println!(
        "  {} dials, the last after {:?}",
        dials.len(),
        dials[dials.len() - 1]
    );
    assert_eq!(dials.len(), clients.len());
    for client in &clients {
        assert_eq!(client.ready(), 2);
    }
}

/// Words are taken together that come within a second: at most one dial a second for them. Another may come by backoff, and is
/// at least 0.8 s after whatever was before it, so that there are at most two of those in a second.
#[tokio::test(start_paused = true)]
async fn a_registry_that_speaks_of_a_dead_server_all_the_time_has_it_dialled_thrice_a_second_at_most()
 {
    let (server, clients) = scene(PoolConfig::default(), 2).await;
    let died = Instant::now();
    server.0.dies(Manner::Refuses);
    for _ in 0..100 {
        for client in &clients {
            client.insert(0, &server);
        }
        time::sleep(Duration::from_millis(100)).await;
    }
    let counts = by_second(&server.0.dialled(died));
    let most = *counts.iter().max().unwrap();
    let mean = counts.iter().sum::<usize>() / counts.len();
    println!("  {most} dials in a second at most, {mean} on average");
    assert!(most <= 3 * clients.len(), "{counts:?}");
}

/// Seen from its client, a connection that lived for an hour was of use, whether it carried a call or not.
#[tokio::test(start_paused = true)]
async fn a_connection_that_lived_long_is_dialled_again_at_once_however_often_it_is_lost() {
    seeded("lived long");
    let server = Session::new(0, Duration::from_millis(5), 1.0);
    let client = Client::of(PoolConfig::default(), std::slice::from_ref(&server));
    for _ in 0..5 {
        time::sleep(Duration::from_secs(3600)).await;
        assert_eq!(client.ready(), 1);
        let lost = Instant::now();
        server.0.dies(Manner::Answers);
        time::sleep(Duration::from_secs(10)).await;
        assert_eq!(server.0.dialled(lost), [Duration::ZERO]);
    }
}
