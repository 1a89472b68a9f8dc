//! How long calls take that come at a fixed rate, whether those before them are answered or not.

use std::time::{Duration, Instant};

use crate::{
    Plan,
    draw::{Axis, Line, Point, Sheet},
    machine,
    support::{
        callers::Candidate,
        measure::{Threads, share},
        paced::moments,
        servers::Servers,
    },
    thousands,
    throughput::{CANDIDATES, pairs, values},
};

/// Calls a second: far below what any of them can do.
const RATE: u32 = 8_000;
const ROUNDS: usize = 11;
const LENGTH: Duration = Duration::from_secs(1);
const WITHIN: Duration = Duration::from_secs(1);

const PERCENTILES: [(f64, &str); 4] = [
    (0.5, "50th"),
    (0.9, "90th"),
    (0.99, "99th"),
    (0.999, "99.9th"),
];

pub(crate) fn run(plan: &Plan) {
    let rounds = plan.rounds(ROUNDS);
    println!(
        "#\n# latency: µs from when a call was due to its answer, {RATE} calls a second at random moments; median, 10th and 90th percentile of {rounds} rounds of {LENGTH:?}"
    );
    let servers = Servers::start(4);
    let runtime = Threads::Two.runtime();
    let connected = CANDIDATES.map(|(kind, count, _)| -> Candidate {
        runtime.block_on(kind.connect(servers.addresses(count)))
    });
    // For each candidate, for each percentile, a reading of each round.
    let mut seen: [[Vec<f64>; 4]; 4] = Default::default();
    for round in 0..rounds {
        // The same ones for all that take turns.
        let moments = moments(f64::from(RATE), LENGTH, round as u64);
        for turn in 0..CANDIDATES.len() {
            let which = (round + turn) % CANDIDATES.len();
            let ended = connected[which].paced(&runtime, Instant::now(), &moments, WITHIN);
            assert!(ended.iter().all(|call| call.answered), "a call failed");
            let micros = ended.iter().map(|call| call.took.as_secs_f64() * 1e6);
            let mut micros: Vec<_> = micros.collect();
            for ((of_all, _), readings) in PERCENTILES.iter().zip(&mut seen[which]) {
                readings.push(share(&mut micros, *of_all));
            }
        }
    }
    let lines = seen.map(|mut percentiles| -> Vec<Point> {
        let all = (0_u32..).zip(&mut percentiles);
        all.map(|(x, readings)| Point::of(f64::from(x), readings))
            .collect()
    });
    for ((_, name), x) in PERCENTILES.iter().zip(0..) {
        for ((kind, count, _), line) in CANDIDATES.iter().zip(&lines) {
            let point = &line[x];
            println!(
                "{name:>6} percentile, {count} server(s), {:<19} {:>6.0}  ({:.0} to {:.0})",
                kind.to_string(),
                point.y,
                point.spread.0,
                point.spread.1
            );
        }
    }
    draw(plan, rounds, lines);
}

fn draw(plan: &Plan, rounds: usize, mut lines: [Vec<Point>; 4]) {
    let height = 476;
    let path = plan.folder.join("latency.svg");
    let sheet = Sheet::new(
        &path,
        height,
        &format!(
            "Time to the answer, at {} calls per second",
            thousands(RATE)
        ),
        &[
            "Calls come at random moments, whether those before them are answered or not. Lower is better.",
        ],
    );
    let all = lines.iter().flatten();
    let (lowest, highest) = all.fold((f64::MAX, 0.0_f64), |(low, high), point| {
        (low.min(point.spread.0), high.max(point.spread.1))
    });
    for point in lines.iter_mut().flatten() {
        point.y = point.y.log10();
        point.spread = (point.spread.0.log10(), point.spread.1.log10());
    }
    let range = (lowest / 1.7).log10()..(highest * 1.3).log10();
    let ticks = [
        20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000,
    ];
    let ticks = ticks.map(|micros: u32| (f64::from(micros).log10(), words(f64::from(micros))));
    let up = Axis {
        ticks: ticks
            .into_iter()
            .filter(|tick| range.contains(&tick.0))
            .collect(),
        range,
        title: "time to the answer (logarithmic scale)".into(),
    };
    let across = Axis {
        range: -0.45..3.45,
        ticks: (0_u32..)
            .zip(PERCENTILES)
            .map(|(x, (_, name))| (f64::from(x), name.into()))
            .collect(),
        title: "percentile of calls".into(),
    };
    for (half, pair) in pairs(&sheet, 92).into_iter().zip(lines.chunks(2)) {
        let mut panel = sheet.panel(half, 166..374, &across, &up, &[]);
        panel.lines(&[(Line::Ours, &pair[0]), (Line::Theirs, &pair[1])]);
        values(&panel, pair, true, |log| words(10_f64.powf(log)));
    }
    sheet.caption(height - 14, &[
        &machine(),
        &format!("Client: two workers. Servers: one thread. Lines: median of {rounds} rounds of 1 s, taken in turns; bands: 10th to 90th percentile."),
    ]);
    sheet.write();
}

/// Microseconds with a unit.
fn words(micros: f64) -> String {
    match micros {
        ..1_000.0 => format!("{micros:.0} µs"),
        1_000.0..10_000.0 if micros % 1_000.0 != 0.0 => format!("{:.1} ms", micros / 1e3),
        _ => format!("{:.0} ms", micros / 1e3),
    }
}
