//! How many calls are answered in a second, by how many are in flight.

use std::time::Duration;

use crate::{
    Plan,
    draw::{Axis, HALVES, Line, Panel, Point, Sheet},
    machine,
    support::{
        callers::{Candidate, Kind},
        measure::{Threads, share},
        servers::Servers,
    },
};

const IN_FLIGHT: [usize; 5] = [1, 4, 16, 64, 256];
const ROUNDS: usize = 21;
const SLICE: Duration = Duration::from_millis(100);

/// How long callers are as many before it counts: connections are opened by what is seen.
const SETTLE: Duration = Duration::from_millis(300);

/// Who is called, how many servers there are, and whose line that is.
pub(crate) const CANDIDATES: [(Kind, usize, Line); 4] = [
    (Kind::Managed, 1, Line::Ours),
    (Kind::Channel, 1, Line::Theirs),
    (Kind::Managed, 4, Line::Ours),
    (Kind::Balance, 4, Line::Theirs),
];

pub(crate) fn run(plan: &Plan) {
    let rounds = plan.rounds(ROUNDS);
    println!(
        "#\n# throughput: thousand calls answered a second; median, 10th and 90th percentile of {rounds} slices of {SLICE:?}"
    );
    let servers = Servers::start(4);
    let runtime = Threads::Two.runtime();
    // For each candidate, a point for each number of calls in flight.
    let mut lines: [Vec<Point>; 4] = Default::default();
    for (x, in_flight) in (0_u32..).zip(IN_FLIGHT) {
        let connected = CANDIDATES.map(|(kind, count, _)| -> Candidate {
            let candidate = runtime.block_on(kind.connect(servers.addresses(count)));
            runtime.block_on(candidate.slice(in_flight, SETTLE));
            candidate
        });
        let mut seen: [Vec<f64>; 4] = Default::default();
        for round in 0..rounds {
            for turn in 0..CANDIDATES.len() {
                let which = (round + turn) % CANDIDATES.len();
                let slice = runtime.block_on(connected[which].slice(in_flight, SLICE));
                seen[which].push(slice.calls_per_second / 1e3);
            }
        }
        for (which, (kind, count, _)) in CANDIDATES.iter().enumerate() {
            let point = Point::of(f64::from(x), &mut seen[which]);
            println!(
                "{in_flight:>4} in flight, {count} server(s), {:<19} {:>6.1}  ({:.1} to {:.1})",
                kind.to_string(),
                point.y,
                point.spread.0,
                point.spread.1
            );
            lines[which].push(point);
        }
    }
    draw(plan, rounds, &lines);
}

fn draw(plan: &Plan, rounds: usize, lines: &[Vec<Point>; 4]) {
    let height = 476;
    let path = plan.folder.join("throughput.svg");
    let sheet = Sheet::new(
        &path,
        height,
        "Calls per second, by how many are in flight at a time",
        &["Each caller makes its next call when it has the answer to the last. Higher is better."],
    );
    let highest = lines.iter().flatten().map(|point| point.spread.1);
    let highest = highest.fold(0.0, f64::max);
    let step = [5_u32, 10, 20, 50]
        .into_iter()
        .find(|step| highest / f64::from(*step) < 7.0);
    let step = step.unwrap_or(100);
    let steps = (0..).take_while(|n| f64::from(n * step) < highest + f64::from(step));
    let ticks: Vec<_> = steps
        .map(|n| (f64::from(n * step), (n * step).to_string()))
        .collect();
    let up = Axis {
        range: 0.0..ticks.last().map_or(1.0, |tick| tick.0),
        ticks,
        title: "thousand calls per second".into(),
    };
    let across = Axis {
        range: -0.3..4.3,
        ticks: (0_u32..)
            .zip(IN_FLIGHT)
            .map(|(x, n)| (f64::from(x), n.to_string()))
            .collect(),
        title: "calls in flight".into(),
    };
    for (half, pair) in pairs(&sheet, 92).into_iter().zip(lines.chunks(2)) {
        let mut panel = sheet.panel(half, 166..374, &across, &up, &[]);
        panel.lines(&[(Line::Ours, &pair[0]), (Line::Theirs, &pair[1])]);
        values(&panel, pair, false, |value| format!("{value:.0}"));
    }
    sheet.caption(height - 14, &[
        &machine(),
        &format!("Client: two workers. Servers: one thread. Lines: median of {rounds} slices of 0.1 s, taken in turns; bands: 10th to 90th percentile."),
    ]);
    sheet.write();
}

/// The headings and legends of two panels beside each other, one server and four; where they are.
pub(crate) fn pairs(sheet: &Sheet<'_>, y: i32) -> [std::ops::Range<i32>; 2] {
    for (half, heading, other) in [
        (&HALVES[0], "One server", "tonic Channel"),
        (&HALVES[1], "Four servers", "tonic balance_list"),
    ] {
        let left = half.start - 38;
        sheet.heading((left, y), heading);
        sheet.legend(
            (left, y + 24),
            &[(Line::Ours, "switchboard"), (Line::Theirs, other)],
            true,
        );
    }
    HALVES
}

/// The values of two lines, above the higher and below the lower one.
pub(crate) fn values(
    panel: &Panel<'_>,
    pair: &[Vec<Point>],
    rising: bool,
    words: impl Fn(f64) -> String,
) {
    let [ours, theirs] = pair else {
        return;
    };
    for (our, their) in ours.iter().zip(theirs) {
        let above = our.y >= their.y;
        panel.name(Line::Ours, (our.x, our.y), &words(our.y), above, rising);
        panel.name(
            Line::Theirs,
            (their.x, their.y),
            &words(their.y),
            !above,
            rising,
        );
    }
}

// === impl Point ===

impl Point {
    /// The median of these readings, and how far all but the outermost tenths spread.
    pub(crate) fn of(x: f64, readings: &mut [f64]) -> Self {
        Self {
            x,
            y: share(readings, 0.5),
            spread: (share(readings, 0.1), share(readings, 0.9)),
        }
    }
}
