//! The story that the `quickstart` and `etcd` examples tell, over whichever registry.

mod server;

use std::{
    collections::BTreeMap,
    process::ExitCode,
    time::{Duration, Instant},
};

use switchboard::{
    Channel, ConnectionManager, Error,
    registry::{Registration, Registry, Session},
};
use tokio::{sync::mpsc, time};
use tonic::{Code, Status};

use self::{
    pb::{EchoRequest, echo_client::EchoClient},
    server::Node,
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

/// A registry that servers register in and clients read.
pub(crate) trait Home: Registry + Clone {
    async fn register(&self, session: Session) -> Result<Registration, Error>;
}

/// How one call went.
struct Outcome {
    result: Result<String, Status>,
    repeated: bool,
}

/// How the calls went that are taken together.
#[derive(Default)]
struct Tally {
    by_server: BTreeMap<String, u64>,
    repeated: u64,
    failed: u64,
    failures: Vec<String>,
}

/// Tells the story; the exit code says whether it went as it should.
pub(crate) async fn run(registry_name: &str, home: impl Home) -> ExitCode {
    println!("three servers a, b and c; four callers; {registry_name}\n");
    match story(home).await {
        Ok(()) => {
            println!("\nall of it happened as it should.");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("\nthis should not have happened: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn story(home: impl Home) -> anyhow::Result<()> {
    // The client comes first, and nothing is there yet: it is built all the same.
    let manager = ConnectionManager::builder(home.clone()).build();
    let channel = manager.channel("echo");
    let clock = Clock(Instant::now());

    let began = Instant::now();
    let Err(status) = call(&channel, "anybody?").await else {
        anyhow::bail!("somebody answered before anybody was there");
    };
    clock.tell(&format!(
        "a call before any server is there fails in {}:",
        short(began.elapsed())
    ));
    clock.quote(&status);
    anyhow::ensure!(status.code() == Code::Unavailable, "{status}");

    let mut nodes = BTreeMap::new();
    for id in ["a", "b", "c"] {
        nodes.insert(id, Node::start(&home, id).await?);
    }
    let (outcomes, mut seen) = mpsc::unbounded_channel();
    // Until the first server is seen there is nobody to call.
    until(Duration::from_secs(5), || async {
        call(&channel, "first").await.is_ok()
    })
    .await?;
    clock.tell("servers a, b and c have registered; the callers begin");
    let callers: Vec<_> = (0..4)
        .map(|_| tokio::spawn(keep_calling(channel.clone(), outcomes.clone())))
        .collect();

    clock.head();
    let mut total = clock.lines(3, &mut seen).await;
    for id in ["a", "b", "c"] {
        let share = total.share(id);
        anyhow::ensure!(
            (0.2..0.5).contains(&share),
            "{id} got {share:.2} of the calls"
        );
    }

    if let Some(node) = nodes.get_mut("b") {
        node.kill();
        clock.tell(
            "server b is killed. It said nothing: its session stays until its lease runs out",
        );
    }
    time::sleep(Duration::from_millis(50)).await;
    pinned_fails(&clock, &channel).await?;
    let gone = || manager.status().roles[0].endpoints.len() == 2;
    for _ in 0..12 {
        if !gone() {
            total.add(clock.lines(1, &mut seen).await);
        }
    }
    anyhow::ensure!(gone(), "b's session outlived its lease");
    clock.tell("b's lease has run out: its session is gone from the registry");
    pinned_fails(&clock, &channel).await?;

    nodes.insert("b", Node::start(&home, "b").await?);
    let back = Instant::now();
    clock.tell(&format!(
        "server b is started again, now at {}",
        nodes["b"].address
    ));
    let one = channel.to("b");
    until(Duration::from_secs(5), || async {
        call(&one, "are you back?").await.is_ok()
    })
    .await?;
    clock.tell(&format!(
        "b answers {} later; nobody did anything",
        short(back.elapsed())
    ));
    let after = clock.lines(3, &mut seen).await;
    let share = after.share("b");
    anyhow::ensure!(
        share > 0.2,
        "b got {share:.2} of the calls after its return"
    );
    total.add(after);

    for caller in callers {
        caller.abort();
    }
    total.add(Tally::of(&mut seen));
    println!("\n{}", manager.status());
    println!(
        "{} calls: {} failed, {} were repeated elsewhere",
        total.calls(),
        total.failed,
        total.repeated
    );
    manager.stop().await;
    anyhow::ensure!(
        total.failed == 0,
        "{} calls failed that could have gone elsewhere: {:?}",
        total.failed,
        total.failures
    );
    Ok(())
}

async fn call(channel: &Channel, message: &str) -> Result<String, Status> {
    let request = EchoRequest {
        message: message.to_owned(),
        ..EchoRequest::default()
    };
    let answer = EchoClient::new(channel.clone()).unary(request).await?;
    Ok(answer.into_inner().server)
}

/// Calls every 2 ms. A call that a lost connection ended is made again, once: an echo may be executed
/// twice, and that is the caller's to know.
async fn keep_calling(channel: Channel, outcomes: mpsc::UnboundedSender<Outcome>) {
    loop {
        let mut result = call(&channel, "hello").await;
        let lost = matches!(&result, Err(status) if status.code() == Code::Unavailable);
        if lost {
            result = call(&channel, "hello").await;
        }
        let outcome = Outcome {
            result,
            repeated: lost,
        };
        if outcomes.send(outcome).is_err() {
            return;
        }
        time::sleep(Duration::from_millis(2)).await;
    }
}

/// A call for b alone fails at once, and says what is the matter with b.
async fn pinned_fails(clock: &Clock, channel: &Channel) -> anyhow::Result<()> {
    let began = Instant::now();
    let result = call(&channel.to("b"), "are you there?").await;
    let took = began.elapsed();
    let status = match result {
        Ok(server) => anyhow::bail!("{server} answered a call for b"),
        Err(status) => status,
    };
    clock.tell(&format!("a call for b alone fails in {}:", short(took)));
    clock.quote(&status);
    anyhow::ensure!(took < Duration::from_millis(100), "it took {took:?}");
    let error = Error::of(&status);
    anyhow::ensure!(
        error.is_some(),
        "it carries no error of switchboard's: {status:?}"
    );
    Ok(())
}

async fn until<F: Future<Output = bool>>(
    bound: Duration,
    mut condition: impl FnMut() -> F,
) -> anyhow::Result<()> {
    let wait = async {
        while !condition().await {
            time::sleep(Duration::from_millis(5)).await;
        }
    };
    let waited = time::timeout(bound, wait).await;
    waited.map_err(|_| anyhow::anyhow!("waited in vain for {bound:?}"))
}

fn short(duration: Duration) -> String {
    match duration.as_secs() {
        0 if duration.as_millis() < 10 => format!("{:.1} ms", duration.as_secs_f64() * 1e3),
        0 => format!("{} ms", duration.as_millis()),
        _ => format!("{:.1} s", duration.as_secs_f64()),
    }
}

impl Tally {
    /// All that has come in.
    fn of(outcomes: &mut mpsc::UnboundedReceiver<Outcome>) -> Self {
        let mut tally = Self::default();
        while let Ok(outcome) = outcomes.try_recv() {
            tally.repeated += u64::from(outcome.repeated);
            match outcome.result {
                Ok(server) => *tally.by_server.entry(server).or_default() += 1,
                Err(status) => {
                    tally.failed += 1;
                    tally.failures.push(status.to_string());
                }
            }
        }
        tally
    }

    fn calls(&self) -> u64 {
        self.by_server.values().sum::<u64>() + self.failed
    }

    fn share(&self, id: &str) -> f64 {
        let of = self.by_server.get(id).copied().unwrap_or_default();
        of as f64 / self.calls().max(1) as f64
    }

    fn add(&mut self, other: Tally) {
        for (id, calls) in other.by_server {
            *self.by_server.entry(id).or_default() += calls;
        }
        self.repeated += other.repeated;
        self.failed += other.failed;
        self.failures.extend(other.failures);
    }
}

/// Prints the timeline.
struct Clock(Instant);

impl Clock {
    fn now(&self) -> String {
        format!("{:5.1} s", self.0.elapsed().as_secs_f64())
    }

    fn tell(&self, what: &str) {
        println!("{}  {what}", self.now());
    }

    fn quote(&self, status: &Status) {
        println!("         {:?}: {}", status.code(), status.message());
    }

    fn head(&self) {
        println!("\n   time    calls        a       b       c   repeated  failed");
    }

    /// A line every half second, with what came since the one before; all of it, added up.
    async fn lines(&self, count: usize, outcomes: &mut mpsc::UnboundedReceiver<Outcome>) -> Tally {
        let mut total = Tally::default();
        for _ in 0..count {
            time::sleep(Duration::from_millis(500)).await;
            let seen = Tally::of(outcomes);
            let of = |id| seen.by_server.get(id).copied().unwrap_or_default();
            println!(
                "{}  {:>7}  {:>7} {:>7} {:>7}   {:>8}  {:>6}",
                self.now(),
                seen.calls(),
                of("a"),
                of("b"),
                of("c"),
                seen.repeated,
                seen.failed
            );
            total.add(seen);
        }
        total
    }
}
