//! All 10,000 endpoints of one client are lost at once: how many it dials at once, and how long that takes.
//!
//! At most 64 dials go on at once ([`PoolConfig::max_dials`]), each for as long as it takes, or for 500 ms of it: whoever has
//! not answered by then gives up its place. Places are given in the order in which they were asked for, and none is free while
//! somebody waits. So whoever waits, waits for no more than all places' time that was asked for before, divided by 64 (Graham,
//! "Bounds on Multiprocessing Timing Anomalies", 1969).

use std::{sync::Arc, time::Duration};

use switchboard::pool::PoolConfig;
use tokio::{time, time::Instant};

use crate::world::{Client, ENDPOINTS, Manner, Past, REFUSAL, Server, Session, TICK, seeded};

/// How many dials may go on at once: the default.
const PLACES: usize = 64;
/// How long one keeps its place.
const BRISK: Duration = Duration::from_millis(500);

/// A client that is connected to all there are.
async fn scene(test: &str) -> (Vec<Arc<Session>>, Client) {
    let mut random = seeded(test);
    let mut dial = || Duration::from_millis(random.u64(1..=20));
    let servers = (0..ENDPOINTS).map(|id| Session::new(id, dial(), 1.0));
    let servers: Vec<_> = servers.collect();
    let began = Instant::now();
    let client = Client::of(PoolConfig::default(), &servers);
    let bound = in_turn(&servers, |server| server.dial);
    time::sleep(bound).await;
    println!(
        "  at the start: {PLACES} places, {} taken",
        client.dials.take_most()
    );
    report(&client.dials.since(began), began, bound);
    assert_eq!(client.ready(), ENDPOINTS);
    (servers, client)
}

/// How long it takes until all have had their turn, if each has a place for so long.
fn in_turn(servers: &[Arc<Session>], takes: impl Fn(&Server) -> Duration) -> Duration {
    let takes = servers.iter().map(|server| takes(&server.0) + TICK);
    let longest = takes.clone().max().unwrap();
    takes.sum::<Duration>() / PLACES as u32 + longest
}

/// When the last one was connected; no later than the bound.
fn report(dials: &[Past], from: Instant, bound: Duration) {
    let connected = dials.iter().filter(|dial| dial.connected);
    let last = connected
        .clone()
        .map(|dial| dial.ended - from)
        .max()
        .unwrap();
    let count = connected.count();
    println!("  {count} connected after {last:?}, of {bound:?}");
    assert!(last <= bound, "{last:?} is over {bound:?}");
}

#[tokio::test(start_paused = true)]
async fn when_all_restart_at_once_no_more_are_dialled_at_once_than_may_and_all_are_back_in_turn() {
    // Given a client that is connected to all.
    let (servers, client) = scene("restart").await;

    // When all die, refuse for two seconds, and are back.
    let died = Instant::now();
    for server in &servers {
        server.0.dies(Manner::Refuses);
    }
    time::sleep(Duration::from_secs(2)).await;
    for server in &servers {
        server.0.is_back();
    }
    // The last dial is asked for after the delays of two failures, 1 s and 1.6 s and a fifth of it, and after the turns of
    // two that were refused; what waits by then is one dial of each at most.
    let refusals = in_turn(&servers, |_| REFUSAL) * 2;
    let delays = Duration::from_millis(1200 + 1920) + 2 * TICK;
    let bound = delays + refusals + in_turn(&servers, |server| server.dial);
    time::sleep(bound).await;

    // Then they are connected in time, three dials each at most.
    let dials = client.dials.since(died);
    let most = client.dials.take_most();
    println!(
        "  {} dials, {most} at once at most, of {PLACES}",
        dials.len()
    );
    report(&dials, died, bound);
    assert_eq!(most, PLACES);
    assert_eq!(client.ready(), ENDPOINTS);
    assert!(dials.len() <= 3 * ENDPOINTS, "{}", dials.len());
}

#[tokio::test(start_paused = true)]
async fn when_half_of_them_fall_silent_the_others_are_back_in_turn() {
    // Given a client that is connected to all.
    let (servers, client) = scene("silence").await;

    // When all are lost, and every other one never answers again.
    let died = Instant::now();
    for (n, server) in servers.iter().enumerate() {
        server.0.dies(match n % 2 {
            0 => Manner::Answers,
            _ => Manner::Silent,
        });
    }
    let silent = servers.iter().skip(1).step_by(2).cloned();
    let bound =
        in_turn(&silent.collect::<Vec<_>>(), |_| BRISK) + in_turn(&servers, |server| server.dial);
    time::sleep(Duration::from_secs(100)).await;

    // Then those that answer are connected in time: the silent ones keep their places for half a second each.
    let dials = client.dials.since(died);
    report(&dials, died, bound);
    assert_eq!(client.ready(), ENDPOINTS / 2);

    // And never were there more that were as young as to have a place.
    let mut edges: Vec<_> = dials
        .iter()
        .flat_map(|dial| [(dial.began, 1), (dial.ended.min(dial.began + BRISK), -1)])
        .collect();
    // Ends first.
    edges.sort_unstable();
    let young = edges.iter().scan(0, |now, (_, change)| {
        *now += change;
        Some(*now)
    });
    let (young, all) = (young.max().unwrap(), client.dials.take_most());
    println!(
        "  {young} young ones at once at most, of {PLACES}; {all} dials at once with those that went unanswered"
    );
    assert!(young <= PLACES as i32, "{young}");
    // Each is given up after 30 s, and 64 may begin in each half of one.
    assert!(all <= 2 * PLACES * 30 + PLACES, "{all}");
}
