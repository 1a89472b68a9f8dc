//! Five servers that depend on each other, started in the worst order, killed and restarted one after the other.
//!
//!     cargo run --example component
//!
//! Three nodes, which depend on a coordinator that is not there yet; that coordinator, which depends on another that is
//! not there yet; and the other one last. A client calls the first coordinator, which calls the other and a node: it is
//! answered only if all three of them are well. Every one of the five is killed then, with no word to anybody, and
//! started again; one is stopped gracefully, under load. The program prints what the client's manager sees, and exits
//! with 1 if anything did not recover by itself.
//!
//! All run in this process, each on threads of its own, over the embedded registry. `server.rs` is what a server's
//! own program would be.

mod server;

use std::{
    future::Future,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use futures_util::StreamExt as _;
use switchboard::{ConnectionManager, MemoryRegistry, component::ComponentState};
use tokio::time;
use tonic::Status;

use self::{
    pb::{EchoRequest, echo_client::EchoClient},
    server::{Process, Program},
};

#[allow(
    clippy::all,
    unreachable_pub,
    missing_docs,
    dead_code,
    reason = "generated"
)]
pub mod pb {
    include!(concat!(env!("CARGO_MANIFEST_DIR"), "/proto/gen/echo.rs"));
}

/// How long anything may take to be well again.
const BOUND: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    match story().await {
        Ok(()) => {
            println!("\nall of it recovered by itself.");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("\nthis should not have happened: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn story() -> anyhow::Result<()> {
    // A server that died is forgotten after three seconds; the default is ten.
    let registry = MemoryRegistry::new().with_ttl(Duration::from_secs(3))?;
    let began = Instant::now();
    let client = Client::new(&registry, began)?;

    tell(
        began,
        "the nodes are started; nobody whom they depend on is there",
    );
    let node = |id| Program {
        role: "node",
        id,
        depends_on: &["querycoord"],
        watches: &[],
    };
    let mut all = Vec::new();
    for id in ["1", "2", "3"] {
        all.push(Process::start(&registry, node(id)).await?);
    }
    for process in &all {
        process.is(ComponentState::Healthy).await?;
    }
    tell(
        began,
        "querycoord is started; rootcoord, whom it calls, is not there",
    );
    let query = Program {
        role: "querycoord",
        id: "1",
        depends_on: &["rootcoord"],
        watches: &["node"],
    };
    all.push(Process::start(&registry, query).await?);
    all[3].is(ComponentState::Healthy).await?;
    client.has(&[("node", 3), ("querycoord", 1)]).await?;
    match client.call().await {
        Ok(answer) => anyhow::bail!("{answer} answered without rootcoord"),
        Err(status) => tell(began, &format!("a call fails: {}", status.message())),
    }
    tell(began, "rootcoord is started, the last of all");
    let root = Program {
        role: "rootcoord",
        id: "1",
        depends_on: &[],
        watches: &[],
    };
    let started = Instant::now();
    all.push(Process::start(&registry, root).await?);
    let answer = client.answered().await?;
    tell(
        began,
        &format!("{} later a call is answered by {answer}", short(started)),
    );
    client.is_whole().await?;
    println!("\nthe client sees:\n\n{}", client.manager.status());
    println!("querycoord sees:\n\n{}", all[3].status());

    for process in &mut all {
        let name = process.name();
        tell(began, &format!("{name} is killed"));
        process.kill();
        // Its lease is alive; its connections are not.
        client.is_not_whole().await?;
        let started = Instant::now();
        process.restart().await?;
        client.answered().await?;
        client.is_whole().await?;
        tell(
            began,
            &format!(
                "{name} was started again, and {} later all is well",
                short(started)
            ),
        );
    }

    tell(began, "node 2 is restarted gracefully, under load");
    let load = client.load();
    time::sleep(Duration::from_millis(300)).await;
    all[1].stop().await?;
    all[1].restart().await?;
    client.is_whole().await?;
    time::sleep(Duration::from_millis(300)).await;
    let (answered, failed) = load.end().await?;
    tell(
        began,
        &format!("of {} calls meanwhile {failed} failed", answered + failed),
    );
    anyhow::ensure!(answered > 100, "only {answered} calls were answered");
    anyhow::ensure!(failed == 0, "a graceful restart failed {failed} calls");

    println!("\nquerycoord sees:\n\n{}", all[3].status());
    for process in all.iter_mut().rev() {
        process.stop().await?;
        process.is(ComponentState::Stopped).await?;
    }
    client.manager.stop().await;
    Ok(())
}

/// Somebody who uses the system.
struct Client {
    manager: ConnectionManager,
}

impl Client {
    /// Prints the events that it sees.
    fn new(registry: &MemoryRegistry, began: Instant) -> anyhow::Result<Self> {
        let manager = ConnectionManager::builder(registry.clone()).build();
        let mut events = manager.events();
        tokio::spawn(async move {
            while let Some(event) = events.next().await {
                println!("{}      {event}", at(began));
            }
        });
        for role in ["rootcoord", "querycoord", "node"] {
            manager.depends_on(role)?;
        }
        Ok(Self { manager })
    }

    async fn call(&self) -> Result<String, Status> {
        call(&self.manager).await
    }

    async fn answered(&self) -> anyhow::Result<String> {
        until("a call is answered", || async { self.call().await.ok() }).await
    }

    async fn has(&self, ready: &[(&str, usize)]) -> anyhow::Result<()> {
        for (role, n) in ready {
            self.manager.ready(role, *n, BOUND).await?;
        }
        Ok(())
    }

    /// All five are connected, and nobody else is known.
    async fn is_whole(&self) -> anyhow::Result<()> {
        until("all five are connected", || async {
            self.whole().then_some(())
        })
        .await
    }

    async fn is_not_whole(&self) -> anyhow::Result<()> {
        until("one is missed", || async { (!self.whole()).then_some(()) }).await
    }

    fn whole(&self) -> bool {
        let status = self.manager.status();
        let ready: usize = status.roles.iter().map(|role| role.ready()).sum();
        let known: usize = status.roles.iter().map(|role| role.endpoints.len()).sum();
        ready == 5 && known == 5
    }

    /// Calls, one after the other, until it is told to end.
    fn load(&self) -> Load {
        let over = Arc::new(AtomicBool::new(false));
        let (manager, end) = (self.manager.clone(), over.clone());
        let task = tokio::spawn(async move {
            let (mut answered, mut failed) = (0, 0);
            while !end.load(SeqCst) {
                match call(&manager).await {
                    Ok(_) => answered += 1,
                    Err(status) => {
                        println!("             a call failed: {}", status.message());
                        failed += 1;
                    }
                }
                time::sleep(Duration::from_millis(1)).await;
            }
            (answered, failed)
        });
        Load { over, task }
    }
}

async fn call(manager: &ConnectionManager) -> Result<String, Status> {
    let mut query = EchoClient::new(manager.channel("querycoord"));
    let answer = query.unary(EchoRequest::default()).await?;
    Ok(answer.into_inner().server)
}

struct Load {
    over: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<(usize, usize)>,
}

impl Load {
    async fn end(self) -> anyhow::Result<(usize, usize)> {
        self.over.store(true, SeqCst);
        Ok(self.task.await?)
    }
}

/// Waits until there is something, or says what there was not.
async fn until<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut look: impl FnMut() -> F,
) -> anyhow::Result<T> {
    let wait = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            time::sleep(Duration::from_millis(2)).await;
        }
    };
    let waited = time::timeout(BOUND, wait).await;
    waited.map_err(|_| anyhow::anyhow!("not within {BOUND:?}: {what}"))
}

/// A step of the story; the events that it brings are printed below it.
fn tell(began: Instant, what: &str) {
    println!("{}  {what}", at(began));
}

fn at(began: Instant) -> String {
    format!("{:7.3} s", began.elapsed().as_secs_f64())
}

fn short(since: Instant) -> String {
    format!("{:.0} ms", since.elapsed().as_secs_f64() * 1e3)
}
