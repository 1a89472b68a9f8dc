//! What becomes of calls while one of four servers stands still, and while another is dead.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    thread,
    time::{Duration, Instant},
};

use crate::{
    Plan,
    draw::{Axis, Line, Sheet, WHOLE},
    machine,
    support::{
        callers::Kind,
        measure::{Threads, share},
        paced::{Ended, evenly},
        servers::Servers,
    },
    thousands,
};

/// Calls a second: far below what any of them can do.
const RATE: u32 = 4_000;
const ROUNDS: usize = 5;
const LENGTH: Duration = Duration::from_millis(6_500);
/// Each call's deadline.
const WITHIN: Duration = Duration::from_secs(1);
const BUCKET: Duration = Duration::from_millis(50);

const STANDS_STILL: Duration = Duration::from_millis(1_500);
const GOES_ON: Duration = Duration::from_millis(3_500);
const KILLED: Duration = Duration::from_millis(4_500);
const STARTED: Duration = Duration::from_millis(5_500);

const CANDIDATES: [(Kind, Line); 2] = [(Kind::Managed, Line::Ours), (Kind::Balance, Line::Theirs)];

/// What a bucket's calls came to.
struct Bucket {
    /// The middle of it, in seconds.
    at: f64,
    answered: f64,
    failed: f64,
    /// Milliseconds that one in a hundred took longer than, to its end, good or bad.
    slow: f64,
}

pub(crate) fn run(plan: &Plan) {
    let rounds = plan.rounds(ROUNDS);
    println!(
        "#\n# recovery: {RATE} calls a second to 4 processes, each call within {WITHIN:?}; {rounds} rounds"
    );
    let mut all: [Vec<Vec<Ended>>; 2] = Default::default();
    let moments = evenly(RATE, LENGTH);
    for round in 0..rounds {
        for turn in 0..CANDIDATES.len() {
            let which = (round + turn) % CANDIDATES.len();
            all[which].push(watch(CANDIDATES[which].0, &moments));
        }
    }
    tell(&all);
    draw(plan, rounds, &all);
}

/// One candidate, over servers of its own.
fn watch(kind: Kind, moments: &[Duration]) -> Vec<Ended> {
    let mut servers: Vec<_> = (0..4).map(|_| Servers::start_at(free_port())).collect();
    let addresses: Vec<SocketAddr> = servers
        .iter()
        .map(|server| server.addresses(1)[0])
        .collect();
    let runtime = Threads::Two.runtime();
    let candidate = runtime.block_on(kind.connect(&addresses));
    let began = Instant::now();
    let until = |moment: Duration| {
        thread::sleep((began + moment).saturating_duration_since(Instant::now()));
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            until(STANDS_STILL);
            servers[1].stand_still();
            until(GOES_ON);
            servers[1].go_on();
            until(KILLED);
            drop(servers.remove(2));
            until(STARTED);
            servers.push(Servers::start_at(addresses[2].port()));
        });
        candidate.paced(&runtime, began, moments, WITHIN)
    })
}

/// Below those that the system gives to connections: one that is dialled from the port it is dialled to would have it itself.
fn free_port() -> u16 {
    let mut ports = std::iter::repeat_with(|| fastrand::u16(10_000..32_000));
    let free = ports.find(|port| TcpListener::bind((Ipv4Addr::UNSPECIFIED, *port)).is_ok());
    free.expect("there are many")
}

fn tell(all: &[Vec<Vec<Ended>>; 2]) {
    for (from, to, name) in [
        (Duration::ZERO, STANDS_STILL, "all are well"),
        (STANDS_STILL, GOES_ON, "one of four stands still"),
        (GOES_ON, KILLED, "it goes on"),
        (KILLED, STARTED, "another is dead"),
        (STARTED, LENGTH, "it is started again"),
    ] {
        for ((kind, _), rounds) in CANDIDATES.iter().zip(all) {
            let calls = || {
                rounds
                    .iter()
                    .flatten()
                    .filter(|call| (from..to).contains(&call.due))
            };
            let begun = calls().count();
            let failed = calls().filter(|call| !call.answered).count();
            let mut took: Vec<_> = calls().map(|call| call.took.as_secs_f64() * 1e3).collect();
            println!(
                "{:.1} to {:.1} s, {name:<25} {:<19} failed {failed:>5} of {begun} ({:>5.2} %), p50 {:>5.2} ms, p99 {:>7.2} ms, slowest {:>7.2} ms",
                from.as_secs_f64(),
                to.as_secs_f64(),
                kind.to_string(),
                failed as f64 / begun as f64 * 100.0,
                share(&mut took, 0.5),
                share(&mut took, 0.99),
                share(&mut took, 1.0),
            );
        }
    }
}

fn buckets(rounds: &[Vec<Ended>]) -> Vec<Bucket> {
    let a_second = 1.0 / BUCKET.as_secs_f64() / rounds.len() as f64;
    let count = u32::try_from(LENGTH.as_millis() / BUCKET.as_millis()).expect("a few");
    let all = (0..count).map(|n| {
        let due = n * BUCKET..(n + 1) * BUCKET;
        let calls = || {
            rounds
                .iter()
                .flatten()
                .filter(|call| due.contains(&call.due))
        };
        let failed = calls().filter(|call| !call.answered).count();
        let mut took: Vec<_> = calls().map(|call| call.took.as_secs_f64() * 1e3).collect();
        Bucket {
            at: (f64::from(n) + 0.5) * BUCKET.as_secs_f64(),
            answered: (took.len() - failed) as f64 * a_second,
            failed: failed as f64 * a_second,
            slow: share(&mut took, 0.99),
        }
    });
    all.collect()
}

fn draw(plan: &Plan, rounds: usize, all: &[Vec<Vec<Ended>>; 2]) {
    let height = 762;
    let path = plan.folder.join("recovery.svg");
    let sheet = Sheet::new(
        &path,
        height,
        "One of four servers stands still, then another is killed",
        &[
            &format!(
                "{} calls per second with a deadline of 1 s each. Nobody repeats a call, and no registry tells",
                thousands(RATE)
            ),
            "of what happens. A call counts for the moment at which it is made, however it ends later.",
        ],
    );
    sheet.legend(
        (24, 112),
        &[
            (Line::Ours, "switchboard"),
            (Line::Theirs, "tonic balance_list"),
        ],
        false,
    );
    let lines = all.each_ref().map(|rounds| buckets(rounds));
    let most_failed = lines.iter().flatten().map(|bucket| bucket.failed);
    let most_failed = most_failed.fold(1_000.0, f64::max);
    let steps = |most: f64, step: u32, title: &str| {
        let last = (most / f64::from(step)).ceil() * f64::from(step);
        let ticks = (0..)
            .map(|n| n * step)
            .take_while(|n| f64::from(*n) <= last);
        Axis {
            range: 0.0..last,
            ticks: ticks.map(|n| (f64::from(n), thousands(n))).collect(),
            title: title.into(),
        }
    };
    let decades = [
        (-1.0, "0.1"),
        (0.0, "1"),
        (1.0, "10"),
        (2.0, "100"),
        (3.0, "1,000"),
    ];
    let slow = Axis {
        range: -1.0..3.3,
        ticks: decades.map(|(at, words)| (at, words.into())).into(),
        title: "99th percentile of the time to a call's end, good or bad, ms (logarithmic scale)"
            .into(),
    };
    let across = |title: &str, labelled: bool| Axis {
        range: 0.0..LENGTH.as_secs_f64(),
        ticks: match labelled {
            true => (0..=6).map(|n| (f64::from(n), n.to_string())).collect(),
            false => Vec::new(),
        },
        title: title.into(),
    };
    type Value = fn(&Bucket) -> f64;
    let panels: [(_, _, _, Value); 3] = [
        (
            198..338,
            across("", false),
            steps(
                f64::from(RATE) + 1.0,
                1_000,
                "calls per second that are answered",
            ),
            |bucket| bucket.answered,
        ),
        (
            384..504,
            across("", false),
            steps(most_failed, 500, "calls per second that fail"),
            |bucket| bucket.failed,
        ),
        (550..660, across("seconds", true), slow, |bucket| {
            bucket.slow.log10()
        }),
    ];
    let shades = [(STANDS_STILL, GOES_ON), (KILLED, STARTED)]
        .map(|(from, to)| from.as_secs_f64()..to.as_secs_f64());
    let events = [
        (STANDS_STILL, "one stands still"),
        (GOES_ON, "it goes on"),
        (KILLED, "another is killed"),
        (STARTED, "it is back"),
    ];
    for (n, (y, across, up, value)) in panels.into_iter().enumerate() {
        let mut panel = sheet.panel(WHOLE, y, &across, &up, &shades);
        for (moment, words) in events {
            panel.event(moment.as_secs_f64(), (n == 0).then_some((46, words)));
        }
        for ((_, line), buckets) in CANDIDATES.iter().zip(&lines).rev() {
            let points = buckets.iter().map(|bucket| (bucket.at, value(bucket)));
            panel.curve(*line, points.collect());
        }
    }
    sheet.caption(height - 14, &[
        &machine(),
        &format!("Client: two workers. Servers: four processes of one thread each. Buckets of 50 ms, over {rounds} rounds taken in turns."),
    ]);
    sheet.write();
}
