//! A live table of a manager's connections, over etcd.
//!
//!     cargo run --example top -- --endpoints http://127.0.0.1:2379 --prefix demo rootcoord querycoord querynode
//!
//! It watches these roles as any client would, connects to all their instances, and shows what becomes of them: a line
//! for each, and the last events below. `q` ends it. With `--once` it prints one table when all is known, or after two
//! seconds, and ends.

mod screen;

use std::{
    collections::VecDeque,
    io::IsTerminal as _,
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use futures_util::StreamExt as _;
use ratatui::crossterm::event::{self, Event as Input, KeyCode, KeyEventKind, KeyModifiers};
use switchboard::{
    ConnectionManager, EtcdRegistry, events::Event, manager::Discovery, registry::Milvus,
};

use self::screen::Screen;

const USAGE: &str =
    "usage: top [--endpoints URL[,URL...]] [--prefix PREFIX] [--milvus] [--once] ROLE...

  --endpoints  members of etcd           (default http://127.0.0.1:2379)
  --prefix     where sessions are kept   (default demo)
  --milvus     sessions are Milvus's, not grpc-go's
  --once       print one table, and end
  ROLE         the kinds of server to watch, such as querynode";

/// How often the screen is drawn anew.
const EVERY: Duration = Duration::from_millis(250);

/// How many events are kept to be shown.
const EVENTS: usize = 200;

struct Options {
    endpoints: Vec<String>,
    prefix: String,
    milvus: bool,
    once: bool,
    roles: Vec<String>,
}

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("{error:#}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> anyhow::Result<()> {
    // The manager works in the background; the terminal has this thread.
    let runtime = tokio::runtime::Runtime::new()?;
    let manager = runtime.block_on(options.manager())?;
    let mut events = manager.events();
    let seen = Arc::new(Mutex::new(VecDeque::new()));
    let keep = seen.clone();
    runtime.spawn(async move {
        while let Some(event) = events.next().await {
            let mut seen = keep.lock().unwrap_or_else(PoisonError::into_inner);
            seen.truncate(EVENTS - 1);
            seen.push_front(event);
        }
    });
    for role in &options.roles {
        let _entered = runtime.enter();
        manager.depends_on(role)?;
    }
    let result = if options.once {
        runtime.block_on(once(&manager))
    } else if std::io::stdout().is_terminal() {
        let title = format!("{} at {}", options.prefix, options.endpoints.join(", "));
        ratatui::run(|terminal| watch(terminal, &manager, &seen, &title))
    } else {
        Err(anyhow::anyhow!(
            "this is no terminal; --once prints one table"
        ))
    };
    runtime.block_on(manager.stop());
    result
}

async fn once(manager: &ConnectionManager) -> anyhow::Result<()> {
    let known = async {
        loop {
            let status = manager.status();
            let all = status.roles.iter().all(|role| {
                let connecting = |e: &switchboard::manager::EndpointStatus| {
                    e.state == switchboard::manager::Connectivity::Connecting
                };
                !matches!(role.discovery, Discovery::Pending)
                    && !role.endpoints.iter().any(connecting)
            });
            if all {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(2), known).await;
    print!("{}", manager.status());
    Ok(())
}

fn watch(
    terminal: &mut ratatui::DefaultTerminal,
    manager: &ConnectionManager,
    seen: &Mutex<VecDeque<Event>>,
    title: &str,
) -> anyhow::Result<()> {
    let mut screen = Screen::new(title);
    loop {
        let events: Vec<_> = {
            let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.iter().cloned().collect()
        };
        let status = manager.status();
        terminal.draw(|frame| screen.draw(frame, &status, &events))?;
        if !event::poll(EVERY)? {
            continue;
        }
        let Input::Key(key) = event::read()? else {
            continue;
        };
        if key.kind == KeyEventKind::Release {
            continue;
        }
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Ok(()),
            KeyCode::Down | KeyCode::Char('j') => screen.scroll(1),
            KeyCode::Up | KeyCode::Char('k') => screen.scroll(-1),
            KeyCode::PageDown => screen.scroll(20),
            KeyCode::PageUp => screen.scroll(-20),
            _ => {}
        }
    }
}

// === impl Options ===

impl Options {
    /// `None` if it was asked how to use it.
    fn parse(mut args: impl Iterator<Item = String>) -> anyhow::Result<Option<Self>> {
        let mut options = Self {
            endpoints: vec!["http://127.0.0.1:2379".to_owned()],
            prefix: "demo".to_owned(),
            milvus: false,
            once: false,
            roles: Vec::new(),
        };
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
            match arg.as_str() {
                "--endpoints" => {
                    options.endpoints = value()?.split(',').map(str::to_owned).collect();
                }
                "--prefix" => options.prefix = value()?,
                "--milvus" => options.milvus = true,
                "--once" => options.once = true,
                "--help" | "-h" => return Ok(None),
                other if other.starts_with('-') => anyhow::bail!("{other} is not known"),
                role => options.roles.push(role.to_owned()),
            }
        }
        anyhow::ensure!(!options.roles.is_empty(), "no role was given");
        Ok(Some(options))
    }

    async fn manager(&self) -> anyhow::Result<ConnectionManager> {
        let registry = EtcdRegistry::connect(&self.endpoints, &self.prefix).await?;
        Ok(match self.milvus {
            false => ConnectionManager::builder(registry).build(),
            true => ConnectionManager::builder(registry.with_codec(Milvus::new())).build(),
        })
    }
}
