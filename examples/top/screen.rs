//! How it is drawn.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::{Color, Style, Stylize as _},
    text::{Line, Span},
    widgets::{Block, Borders, Cell, Paragraph, Row, Table},
};
use switchboard::{
    events::{Event, EventKind},
    manager::{Connectivity, Discovery, EndpointStatus, RoleStatus, Status},
};

pub(crate) struct Screen {
    title: String,
    /// How many lines of the table are above the screen.
    above: usize,
}

// === impl Screen ===

impl Screen {
    pub(crate) fn new(title: &str) -> Self {
        Self {
            title: title.to_owned(),
            above: 0,
        }
    }

    pub(crate) fn scroll(&mut self, by: isize) {
        self.above = self.above.saturating_add_signed(by);
    }

    pub(crate) fn draw(&mut self, frame: &mut Frame<'_>, status: &Status, events: &[Event]) {
        let below = (frame.area().height / 3).clamp(3, 12);
        let [top, middle, bottom] = Layout::vertical([
            Constraint::Length(1),
            Constraint::Min(3),
            Constraint::Length(below),
        ])
        .areas(frame.area());
        frame.render_widget(self.head(status), top);
        self.table(frame, middle, status);
        frame.render_widget(happened(events), bottom);
    }

    fn head(&self, status: &Status) -> Paragraph<'_> {
        let all: usize = status.roles.iter().map(|r| r.endpoints.len()).sum();
        let ready: usize = status.roles.iter().map(RoleStatus::ready).sum();
        let color = if ready == all {
            Color::Green
        } else {
            Color::Yellow
        };
        Paragraph::new(Line::from(vec![
            Span::from("switchboard  ").bold(),
            Span::from(format!("{ready} of {all} ready")).fg(color),
            Span::from(format!("  {}", self.title)).dark_gray(),
            Span::from("   q quits, arrows scroll").dark_gray(),
        ]))
    }

    fn table(&mut self, frame: &mut Frame<'_>, area: Rect, status: &Status) {
        let mut rows = Vec::new();
        for role in &status.roles {
            rows.push(title_of(role));
            rows.extend(role.endpoints.iter().map(line_of));
        }
        // The last line stays on the screen.
        self.above = self.above.min(rows.len().saturating_sub(1));
        let widths = [
            Constraint::Max(20),
            Constraint::Max(24),
            Constraint::Length(10),
            Constraint::Length(10),
            Constraint::Length(6),
            Constraint::Length(9),
            Constraint::Length(8),
            Constraint::Length(5),
            Constraint::Min(20),
        ];
        let titles = [
            "id",
            "address",
            "generation",
            "state",
            "since",
            "in flight",
            "attempts",
            "next",
            "last error",
        ];
        let table = Table::new(rows.into_iter().skip(self.above), widths)
            .header(Row::new(titles).dark_gray())
            .block(Block::new().borders(Borders::TOP).dark_gray());
        frame.render_widget(table, area);
    }
}

fn title_of(role: &RoleStatus) -> Row<'static> {
    let (ready, all) = (role.ready(), role.endpoints.len());
    let color = match role.discovery {
        Discovery::Fresh => Color::Green,
        Discovery::Pending => Color::Gray,
        _ => Color::Yellow,
    };
    Row::new(vec![
        Cell::from(Span::from(role.role.to_string()).bold().white()),
        Cell::from(format!("{ready} of {all} ready")).white(),
        Cell::from("registry").dark_gray(),
        Cell::from(Span::from(word_of(&role.discovery)).fg(color)),
        Cell::from(""),
        Cell::from(""),
        Cell::from(""),
        Cell::from(""),
        Cell::from(match &role.discovery {
            Discovery::Failed(why) | Discovery::Stale { why, .. } => why.to_string(),
            _ => String::new(),
        }),
    ])
}

fn word_of(discovery: &Discovery) -> &'static str {
    match discovery {
        Discovery::Pending => "pending",
        Discovery::Failed(_) => "failed",
        Discovery::Fresh => "fresh",
        Discovery::Stale { .. } => "stale",
        _ => "stopped",
    }
}

fn line_of(of: &EndpointStatus) -> Row<'static> {
    let color = match of.state {
        Connectivity::Ready => Color::Green,
        Connectivity::Connecting => Color::Cyan,
        Connectivity::Idle => Color::Gray,
        Connectivity::Stopping => Color::Blue,
        Connectivity::Retrying => Color::Yellow,
        _ => Color::Red,
    };
    let now = SystemTime::now();
    let next = of
        .next_attempt
        .map(|at| at.duration_since(now).unwrap_or_default());
    let attempts = match of.attempts {
        0 => "-".to_owned(),
        n => n.to_string(),
    };
    Row::new(vec![
        Cell::from(format!("  {}", of.peer.id)),
        Cell::from(of.peer.address.to_string()),
        Cell::from(of.peer.generation.to_string()),
        Cell::from(of.state.to_string()).fg(color),
        Cell::from(short(now.duration_since(of.since).unwrap_or_default())),
        Cell::from(of.in_flight.to_string()),
        Cell::from(attempts),
        Cell::from(next.map_or_else(|| "-".to_owned(), short)),
        Cell::from(match &of.last_error {
            Some(why) => why.to_string(),
            None => "-".to_owned(),
        }),
    ])
    .style(Style::new().gray())
}

fn happened(events: &[Event]) -> Table<'static> {
    let rows = events.iter().map(|event| {
        let color = match event.kind {
            EventKind::Connected { .. } | EventKind::Restored { .. } => Color::Green,
            EventKind::Lost { .. } | EventKind::Offline { .. } => Color::Red,
            EventKind::AttemptFailed { .. } | EventKind::RegistryStale { .. } => Color::Yellow,
            _ => Color::Gray,
        };
        Row::new(vec![
            Cell::from(time_of_day(event.at)).dark_gray(),
            Cell::from(event.to_string()).fg(color),
        ])
    });
    let block = Block::new()
        .borders(Borders::TOP)
        .title("what happened, UTC")
        .dark_gray();
    Table::new(rows, [Constraint::Length(12), Constraint::Min(20)]).block(block)
}

fn time_of_day(at: SystemTime) -> String {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (s, ms) = (since.as_secs() % 86_400, since.subsec_millis());
    format!("{:02}:{:02}:{:02}.{ms:03}", s / 3600, s / 60 % 60, s % 60)
}

fn short(of: Duration) -> String {
    match of.as_secs() {
        s @ 0..=119 => format!("{s}s"),
        s @ 120..=7199 => format!("{}m", s / 60),
        s => format!("{}h", s / 3600),
    }
}
