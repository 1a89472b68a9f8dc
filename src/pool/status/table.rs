//! A pool's status as a table that a person can read in a terminal.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use super::{Connectivity, Discovery, EndpointStatus, Status};
use crate::{error::Brief, events::Brisk};

/// The columns before the last, which is as long as it likes.
const COLUMNS: [&str; 8] = [
    "id",
    "address",
    "generation",
    "state",
    "since",
    "in flight",
    "attempts",
    "next",
];

impl fmt::Display for Status {
    /// A table, a line for each endpoint.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ready, all) = (self.ready(), self.endpoints.len());
        let (role, discovery) = (&self.role, &self.discovery);
        let idle = if self.idle { ", idle" } else { "" };
        write!(
            f,
            "{role}: {ready} of {all} ready{idle}, registry {discovery}"
        )?;
        match self.refused.total() {
            0 => {}
            1 => write!(f, ", 1 call over a limit")?,
            n => write!(f, ", {n} calls over a limit")?,
        }
        #[cfg(feature = "manager")]
        match self.repeated.total() {
            0 => {}
            1 => write!(f, ", 1 call made again")?,
            n => write!(f, ", {n} calls made again")?,
        }
        writeln!(f)?;
        let lines: Vec<_> = self.endpoints.iter().map(cells).collect();
        if lines.is_empty() {
            return Ok(());
        }
        let mut widths = COLUMNS.map(str::len);
        for line in &lines {
            for (width, cell) in widths.iter_mut().zip(line) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let titles = COLUMNS.map(str::to_owned);
        row(f, &titles, &widths, "last error")?;
        for (line, endpoint) in lines.iter().zip(&self.endpoints) {
            match &endpoint.last_error {
                None => row(f, line, &widths, "-")?,
                Some(why) => row(f, line, &widths, &Brief(&**why).to_string())?,
            }
        }
        Ok(())
    }
}

fn cells(of: &EndpointStatus) -> [String; 8] {
    let attempts = match of.attempts {
        0 => "-".to_owned(),
        n => n.to_string(),
    };
    let now = SystemTime::now();
    let next = match of.next_attempt {
        None => "-".to_owned(),
        Some(at) => Brisk(whole(at.duration_since(now).unwrap_or_default())).to_string(),
    };
    [
        of.peer.id.to_string(),
        match &of.former {
            None => of.peer.address.to_string(),
            Some(former) => format!("{}, still {}", of.peer.address, former.address),
        },
        of.peer.generation.to_string(),
        of.state.to_string(),
        Age(of.since).to_string(),
        match of.connections {
            0 | 1 => of.in_flight.to_string(),
            more => format!("{} over {more}", of.in_flight),
        },
        attempts,
        next,
    ]
}

/// Names to the left, figures to the right.
fn row(
    f: &mut fmt::Formatter<'_>,
    cells: &[String; 8],
    widths: &[usize; 8],
    last: &str,
) -> fmt::Result {
    for (column, (cell, width)) in cells.iter().zip(widths).enumerate() {
        match column {
            0 | 1 | 3 => write!(f, "  {cell:width$}")?,
            _ => write!(f, "  {cell:>width$}")?,
        }
    }
    writeln!(f, "  {last}")
}

fn whole(of: Duration) -> Duration {
    match of.as_secs() {
        0 => of,
        s => Duration::from_secs(s),
    }
}

impl fmt::Display for Discovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pending => f.write_str("pending"),
            Self::Failed(why) => write!(f, "failed: {}", Brief(&**why)),
            Self::Fresh => f.write_str("fresh"),
            Self::Stale { since, why } => {
                write!(f, "stale for {}: {}", Age(*since), Brief(&**why))
            }
            Self::Stopped => f.write_str("stopped"),
        }
    }
}

impl fmt::Display for Connectivity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// How long ago, in whole units.
pub(crate) struct Age(pub(crate) SystemTime);

impl fmt::Display for Age {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A clock that was set back makes it zero.
        let age = self.0.elapsed().unwrap_or_default();
        match age.as_secs() {
            0 => write!(f, "{}ms", age.as_millis()),
            1..=119 => write!(f, "{}s", age.as_secs()),
            _ => Brisk(age).fmt(f),
        }
    }
}
