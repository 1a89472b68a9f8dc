//! Paper hardware: servers that can be dialled and called, and clients with a real pool each.

use std::{
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll},
    time::Duration,
};

use fastrand::Rng;
use switchboard::{
    Error, Kind, Pool,
    discover::{Change, Update},
    endpoint::{BoxError, BoxFuture, Connected, Lifeline, Peer, Target},
    pool::{Plain, PoolConfig, status::Connectivity},
};
use tokio::{sync::mpsc, time, time::Instant};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tower::Service;

/// How many endpoints there are.
pub(crate) const ENDPOINTS: usize = 10_000;
/// How many clients there are.
pub(crate) const CLIENTS: usize = 1_000;
/// How long it takes to be refused.
pub(crate) const REFUSAL: Duration = Duration::from_millis(1);
/// Timers go by whole milliseconds.
pub(crate) const TICK: Duration = Duration::from_millis(1);

/// Seeds the crate's chance, and returns that of the paper.
pub(crate) fn seeded(test: &str) -> Rng {
    let seed = std::env::var("SWITCHBOARD_SEED");
    let seed = seed.map_or(20_261, |seed| seed.parse().expect("a seed is a number"));
    println!("{test}: seed {seed}");
    fastrand::seed(seed);
    Rng::with_seed(seed)
}

// === servers ===

/// What a server does with those that dial it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Manner {
    /// Answers when the dial's time is over.
    Answers,
    Refuses,
    Silent,
}

/// A server on paper, which is also what discovery says of it.
#[derive(Debug)]
pub(crate) struct Server {
    peer: Arc<Peer>,
    /// How long a dial takes that is answered.
    pub(crate) dial: Duration,
    /// How much work it does in a second.
    pub(crate) speed: f64,
    in_flight: AtomicUsize,
    most: AtomicUsize,
    desk: Mutex<Desk>,
}

#[derive(Debug)]
struct Desk {
    manner: Manner,
    /// Until it dies.
    life: CancellationToken,
    /// When it will have done all that it was asked for.
    free: Instant,
    dialled: Vec<Instant>,
}

/// What discovery hands to a pool.
#[derive(Clone, Debug)]
pub(crate) struct Session(pub Arc<Server>);

/// A call at its server.
struct Visit(Arc<Server>);

// === impl Server ===

impl Server {
    /// All connections to it are gone, and it does this with those that dial.
    pub(crate) fn dies(&self, manner: Manner) {
        let mut desk = self.desk();
        desk.manner = manner;
        std::mem::take(&mut desk.life).cancel();
    }

    pub(crate) fn is_back(&self) {
        self.desk().manner = Manner::Answers;
    }

    /// When it was dialled, since `from`.
    pub(crate) fn dialled(&self, from: Instant) -> Vec<Duration> {
        let desk = self.desk();
        let since = desk.dialled.iter().filter(|at| **at >= from);
        since.map(|at| *at - from).collect()
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.load(SeqCst)
    }

    /// How many calls were in flight there at most, since this was last asked.
    pub(crate) fn take_most(&self) -> usize {
        self.most.swap(0, SeqCst)
    }

    async fn dial(self: Arc<Self>, dials: Arc<Dials>) -> Result<Connected<Conn>, BoxError> {
        let mut dial = Dial::begin(dials);
        let manner = {
            let mut desk = self.desk();
            desk.dialled.push(Instant::now());
            desk.manner
        };
        match manner {
            Manner::Answers => time::sleep(self.dial).await,
            Manner::Refuses => {
                time::sleep(REFUSAL).await;
                return Err("connection refused".into());
            }
            Manner::Silent => std::future::pending().await,
        }
        // It may have died meanwhile.
        let line = {
            let desk = self.desk();
            if desk.manner != Manner::Answers {
                return Err("connection refused".into());
            }
            Arc::new(Line {
                cut: desk.life.child_token(),
                served: AtomicBool::new(false),
            })
        };
        dial.connected = true;
        let conn = Conn {
            server: self,
            line: line.clone(),
        };
        Ok(Connected::new(conn).with_lifeline(line))
    }

    /// When a call will be answered that comes now.
    fn answers_at(&self, work: Duration) -> Instant {
        let mut desk = self.desk();
        desk.free = desk.free.max(Instant::now()) + work.div_f64(self.speed);
        desk.free
    }

    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap()
    }
}

// === impl Session ===

impl Session {
    /// A server that answers, and nobody knows yet.
    pub(crate) fn new(id: usize, dial: Duration, speed: f64) -> Arc<Self> {
        Arc::new(Self(Arc::new(Server {
            peer: Arc::new(Peer::new("node", id.to_string(), format!("10.0.0.0:{id}"))),
            dial,
            speed,
            in_flight: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
            desk: Mutex::new(Desk {
                manner: Manner::Answers,
                life: CancellationToken::new(),
                free: Instant::now(),
                dialled: Vec::new(),
            }),
        })))
    }
}

impl Target for Session {
    fn peer(&self) -> &Arc<Peer> {
        &self.0.peer
    }
}

// === impl Visit ===

impl Visit {
    fn new(server: &Arc<Server>) -> Self {
        let now = server.in_flight.fetch_add(1, SeqCst) + 1;
        server.most.fetch_max(now, SeqCst);
        Self(server.clone())
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, SeqCst);
    }
}

// === connections ===

/// What a call asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ask {
    /// To stay, until it is dropped.
    Stay,
    /// So much work: a server of speed 1 takes this long for it, once it has done what it was asked for before.
    Work(Duration),
}

/// A connection.
#[derive(Clone, Debug)]
pub(crate) struct Conn {
    server: Arc<Server>,
    line: Arc<Line>,
}

#[derive(Debug)]
struct Line {
    cut: CancellationToken,
    served: AtomicBool,
}

// === impl Conn ===

impl Service<Ask> for Conn {
    type Response = ();
    type Error = Error;
    type Future = BoxFuture<'static, Result<(), Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(match self.line.cut.is_cancelled() {
            true => Err(Error::new(Kind::ConnectionLost)),
            false => Ok(()),
        })
    }

    fn call(&mut self, ask: Ask) -> Self::Future {
        let visit = Visit::new(&self.server);
        match ask {
            Ask::Stay => Box::pin(async move {
                let _visit = visit;
                std::future::pending().await
            }),
            Ask::Work(work) => {
                let (answer, line) = (self.server.answers_at(work), self.line.clone());
                Box::pin(async move {
                    let _visit = visit;
                    time::sleep_until(answer).await;
                    line.served.store(true, SeqCst);
                    Ok(())
                })
            }
        }
    }
}

// === impl Line ===

impl Lifeline for Line {
    fn closed(&self) -> BoxFuture<'_, Error> {
        Box::pin(async {
            self.cut.cancelled().await;
            Error::new(Kind::ConnectionLost)
        })
    }

    fn close(&self, _: Error) {
        self.cut.cancel();
    }

    fn has_served(&self) -> bool {
        self.served.load(SeqCst)
    }
}

// === clients ===

/// A client: a real pool, and what is known of its dials.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) pool: Pool<Conn, Plain>,
    pub(crate) dials: Arc<Dials>,
    updates: mpsc::UnboundedSender<Update<u64, Arc<Session>>>,
}

/// The dials of one client.
#[derive(Debug, Default)]
pub(crate) struct Dials(Mutex<Vec<Past>>, AtomicUsize, AtomicUsize);

/// A dial that is over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Past {
    pub(crate) began: Instant,
    pub(crate) ended: Instant,
    pub(crate) connected: bool,
}

/// A dial that goes on.
struct Dial {
    dials: Arc<Dials>,
    began: Instant,
    connected: bool,
}

// === impl Client ===

impl Client {
    pub(crate) fn new(config: PoolConfig) -> Self {
        let dials = Arc::<Dials>::default();
        let connector = {
            let dials = dials.clone();
            move |session: &Session| session.0.clone().dial(dials.clone())
        };
        let (updates, stream) = mpsc::unbounded_channel();
        let stream = UnboundedReceiverStream::new(stream);
        Self {
            pool: Pool::new("node", config, stream, connector).unwrap(),
            dials,
            updates,
        }
    }

    /// A client that knows these, by their places in the list.
    pub(crate) fn of(config: PoolConfig, servers: &[Arc<Session>]) -> Self {
        let client = Self::new(config);
        for (key, server) in servers.iter().enumerate() {
            client.insert(key as u64, server);
        }
        client.updates.send(Update::Synced).unwrap();
        client
    }

    /// The registry speaks of a session: a new one, or one that is known.
    pub(crate) fn insert(&self, key: u64, server: &Arc<Session>) {
        let change = Change::Insert(key, server.clone());
        self.updates.send(Update::Change(change)).unwrap();
    }

    pub(crate) fn remove(&self, key: u64) {
        let change = Change::Remove(key);
        self.updates.send(Update::Change(change)).unwrap();
    }

    /// How many endpoints its pool says are connected.
    pub(crate) fn ready(&self) -> usize {
        let endpoints = self.pool.status().endpoints;
        let ready = endpoints.iter().filter(|e| e.state == Connectivity::Ready);
        ready.count()
    }
}

// === impl Dials ===

impl Dials {
    /// How many went on at once, at most, since this was last asked.
    pub(crate) fn take_most(&self) -> usize {
        self.2.swap(self.1.load(SeqCst), SeqCst)
    }

    /// Those that began since then and are over.
    pub(crate) fn since(&self, from: Instant) -> Vec<Past> {
        let past = self.0.lock().unwrap();
        let since = past.iter().filter(|dial| dial.began >= from);
        since.copied().collect()
    }
}

// === impl Dial ===

impl Dial {
    fn begin(dials: Arc<Dials>) -> Self {
        let now = dials.1.fetch_add(1, SeqCst) + 1;
        dials.2.fetch_max(now, SeqCst);
        Self {
            dials,
            began: Instant::now(),
            connected: false,
        }
    }
}

impl Drop for Dial {
    fn drop(&mut self) {
        self.dials.1.fetch_sub(1, SeqCst);
        self.dials.0.lock().unwrap().push(Past {
            began: self.began,
            ended: Instant::now(),
            connected: self.connected,
        });
    }
}
