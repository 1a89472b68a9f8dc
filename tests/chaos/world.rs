//! Servers, clients, and what is true of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering::SeqCst},
    time::{Duration, Instant},
};

use fastrand::Rng;
use futures_util::StreamExt as _;
use http::{HeaderMap, HeaderName};
use switchboard::{
    Backoff, Channel, ConnectionManager, Error, EtcdRegistry, Kind, Registration, Session,
    manager::{Connectivity, Discovery, Status},
    pool::PoolConfig,
    registry::{BadRecord, Codec, Naming, RegistrationEvent, RegistrationEvents},
    transport::Connector,
};
use tokio::{task::JoinHandle, time};

use crate::{
    ledger::Ledger,
    load,
    reader::{self, View},
    support::{
        etcd::{Cluster, free_port},
        proxy::{Mode, Proxy},
        server::{EchoServer, Node, Options},
    },
};

pub(crate) const SERVERS: [&str; 6] = ["a", "b", "c", "d", "e", "f"];
const CLIENTS: usize = 4;
const TTL: Duration = Duration::from_secs(5);
const SECOND: Duration = Duration::from_secs(1);

/// How long after a server was told that its session was lost that may be seen in calls: it is judged a second later, and
/// another session takes its time while etcd finds a leader.
const GONE: Duration = Duration::from_secs(5);

/// How long what was done to a server may be seen in calls that it had.
const AFTERMATH: Duration = Duration::from_secs(10);

/// What must not be, and how often it was.
pub(crate) type Wrong = BTreeMap<String, u64>;

/// Whether each call of this client says whom it is for, which servers heed. Without that, one for a server whose address another
/// has just taken is executed by that.
pub(crate) fn says_whom(client: usize) -> bool {
    client < CLIENTS / 2
}

/// The naming format, and who each call is for.
#[derive(Debug)]
struct Addressed;

impl Codec for Addressed {
    fn prefix(&self, root: &str, role: &str) -> String {
        Naming.prefix(root, role)
    }

    fn key(&self, root: &str, session: &Session) -> String {
        Naming.key(root, session)
    }

    fn encode(&self, session: &Session, lease: i64) -> Result<Vec<u8>, Error> {
        Naming.encode(session, lease)
    }

    fn decode(
        &self,
        root: &str,
        role: &str,
        key: &str,
        value: &[u8],
    ) -> Result<Option<Session>, BadRecord> {
        Naming.decode(root, role, key, value)
    }

    fn call_metadata(&self, session: &Session) -> HeaderMap {
        HeaderMap::from_iter([(
            HeaderName::from_static("serverid"),
            number(session.id()).into(),
        )])
    }
}

/// The number by which calls name a server.
fn number(id: &str) -> i64 {
    let place = SERVERS.iter().position(|known| *known == id);
    place.map_or(-1, |place| place as i64)
}

pub(crate) struct World {
    endpoints: Vec<String>,
    servers: BTreeMap<&'static str, Server>,
    clients: Vec<ConnectionManager>,
    /// What readers of the clients' watches were told.
    views: Vec<View>,
    truth: Arc<Mutex<Truth>>,
    ledger: Arc<Ledger>,
}

/// One server behind a network that can fail, with connections to etcd of its own.
struct Server {
    server: EchoServer,
    proxy: Arc<Proxy>,
    /// Where it listened before, and still does for whoever is connected there.
    former: Vec<Arc<Proxy>>,
    registration: Option<Registration>,
}

/// How long it may take until it is known what was done to a server that is missed, or whose call failed.
pub(crate) const HINDSIGHT: Duration = Duration::from_secs(1);

/// What is true of the servers.
#[derive(Default)]
pub(crate) struct Truth {
    /// Where each listens, while it is registered and well.
    well: BTreeMap<&'static str, String>,
    /// When something was last done to it.
    disturbed: BTreeMap<&'static str, Instant>,
    /// Whose network fails.
    afflicted: BTreeSet<&'static str>,
    /// How often etcd deleted the session of a server that was well, and when it did so last.
    deleted: u64,
    lost: BTreeMap<&'static str, Instant>,
    wrong: Wrong,
}

/// How a network fails.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Affliction {
    Reset,
    Slow,
    /// It loses everything.
    Silent,
    /// It, or the server, stands still and goes on.
    Paused,
}

// === impl World ===

impl World {
    pub(crate) async fn start(seed: u64) -> (Self, Cluster) {
        let mut random = Rng::with_seed(seed);
        let etcds = Cluster::start().await;
        let mut world = Self {
            endpoints: etcds.endpoints(),
            servers: BTreeMap::new(),
            clients: Vec::new(),
            views: Vec::new(),
            truth: Arc::default(),
            ledger: Arc::default(),
        };
        for id in SERVERS {
            world.start_server(id, None).await;
        }
        for n in 0..CLIENTS {
            // Peers that are silent are found out within 3 s, those that are offline tried again within a second.
            let connector = Connector::new().keepalive(Some(SECOND), 2 * SECOND);
            // And connections come and go all the while, for each second client.
            let age = (n % 2 == 0).then_some(2 * SECOND);
            let connector = connector.and_then(|c| c.max_age(age)?.spare_for(SECOND));
            let probe = Backoff::constant(SECOND, 0.2).expect("it is in bounds");
            let mut registry = world.registry().await;
            if says_whom(n) {
                registry = registry.with_codec(Addressed);
            }
            let manager = ConnectionManager::builder(registry)
                .connector(connector.expect("it is in bounds"))
                .pools(PoolConfig::default().probe(Some(probe)))
                .build();
            for pause in [Duration::ZERO, Duration::from_millis(500)] {
                let view = reader::read(&manager, pause, random.fork(), world.truth());
                world.views.push(view);
            }
            world.clients.push(manager);
        }
        assert!(world.until_well().await.is_some(), "it was never well");
        (world, etcds)
    }

    async fn registry(&self) -> EtcdRegistry {
        let registry = EtcdRegistry::connect(&self.endpoints, "chaos").await;
        let registry = registry.and_then(|registry| registry.with_ttl(TTL));
        registry.expect("its settings are good")
    }

    pub(crate) fn channels(&self) -> Vec<Channel> {
        self.clients.iter().map(|m| m.channel("echo")).collect()
    }

    pub(crate) fn ledger(&self) -> Arc<Ledger> {
        self.ledger.clone()
    }

    pub(crate) fn truth(&self) -> Arc<Mutex<Truth>> {
        self.truth.clone()
    }

    /// Starts a server, at the address where it was or at another, and returns when it is registered.
    pub(crate) async fn start_server(&mut self, id: &'static str, at: Option<SocketAddr>) {
        let witness = Some(self.ledger.witness(id));
        let server = EchoServer::start_with(
            id,
            Options {
                witness,
                node: Some(Node::new(number(id))),
                // Half of them get another connection for each other call at once.
                max_streams: ["a", "b", "c"].contains(&id).then_some(1),
                ..Options::default()
            },
        );
        let proxy = match at {
            Some(address) => Proxy::start_at(address, server.address).await,
            None => Proxy::start(server.address).await,
        };
        let proxy = Arc::new(proxy);
        let registration = self.register(id, &proxy).await;
        self.servers.insert(
            id,
            Server {
                server,
                proxy,
                former: Vec::new(),
                registration: Some(registration),
            },
        );
    }

    /// Registers a server, and returns when it is.
    async fn register(&mut self, id: &'static str, at: &Proxy) -> Registration {
        let session = Session::new("echo", at.address()).with_id(id);
        // An older session of this id may live until its lease runs out, and etcd may be away.
        let registering = self.registry().await.register(session).background();
        let registration = registering.await.expect("it is a good session");
        let registered = time::timeout(Duration::from_secs(60), registration.registered());
        if !matches!(registered.await, Ok(Ok(_))) {
            self.truth()
                .lock()
                .expect("whole")
                .is_wrong("a server that could not register within a minute");
        }
        tokio::spawn(listen(id, registration.events(), self.truth.clone()));
        self.ledger.registered(id);
        let mut truth = lock(&self.truth);
        truth.well.insert(id, at.address());
        truth.is_disturbed(id);
        registration
    }

    /// As SIGKILL does: its sockets are closed, its session stays. Returns where it was.
    pub(crate) async fn kill_server(&mut self, id: &'static str) -> Option<SocketAddr> {
        self.is_not_well(id);
        let mut server = self.servers.remove(id)?;
        if let Some(registration) = server.registration.take() {
            registration.abandon();
        }
        let address = server.proxy.address;
        // Whoever has connected to it is reset.
        drop((server.proxy, server.former));
        server.server.killed().await;
        refuses(address).await;
        Some(address)
    }

    /// Removes its session; the server itself goes on. Whether that could be done.
    pub(crate) async fn unregister(&mut self, id: &'static str) -> bool {
        self.is_not_well(id);
        let registration = self.servers.get_mut(id).and_then(|s| s.registration.take());
        let Some(registration) = registration else {
            return false;
        };
        let gone = registration.deregister().await.is_ok();
        if gone {
            self.ledger.unregistered(id);
        }
        gone
    }

    /// Registers a server that has lost its session.
    pub(crate) async fn register_again(&mut self, id: &'static str) {
        let Some(proxy) = self.servers.get(id).map(|server| server.proxy.clone()) else {
            return;
        };
        let registration = self.register(id, &proxy).await;
        if let Some(server) = self.servers.get_mut(id) {
            server.registration = Some(registration);
        }
    }

    /// What its network does for a while; to go on beside what is done to others.
    pub(crate) fn afflict(
        &self,
        id: &'static str,
        how: Affliction,
        a_while: Duration,
    ) -> impl Future<Output = ()> + use<> {
        let proxy = self.servers.get(id).map(|server| server.proxy.clone());
        let truth = self.truth.clone();
        async move {
            let Some(proxy) = proxy else {
                return;
            };
            lock(&truth).afflicted.insert(id);
            match how {
                Affliction::Reset => proxy.reset(),
                Affliction::Slow => proxy.delay(Duration::from_millis(50)),
                Affliction::Silent => proxy.set(Mode::Swallow),
                Affliction::Paused => proxy.set(Mode::Hold),
            }
            time::sleep(a_while).await;
            proxy.set(Mode::Pass);
            proxy.delay(Duration::ZERO);
            if let Affliction::Silent = how {
                // What was swallowed is missing in the middle of what follows.
                proxy.reset();
            }
            let mut truth = lock(&truth);
            truth.afflicted.remove(id);
            truth.is_disturbed(id);
        }
    }

    /// Says that it is stopping, lets its calls finish, and goes.
    pub(crate) async fn stop_server(&mut self, id: &'static str) {
        self.is_not_well(id);
        let Some(mut server) = self.servers.remove(id) else {
            return;
        };
        if let Some(mut registration) = server.registration.take() {
            // Either may fail while etcd is away, and then it ends with its TTL.
            let _ = registration.stopping().await;
            time::sleep(Duration::from_millis(500)).await;
            if registration.deregister().await.is_ok() {
                self.ledger.unregistered(id);
            }
        }
        server.server.stop_gracefully();
        let seen = &server.server.seen;
        let over = || seen.finished.load(SeqCst) + seen.cancelled.load(SeqCst);
        while over() < seen.started.load(SeqCst) {
            time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Says something else of itself.
    pub(crate) async fn update_server(&mut self, id: &'static str, version: u32) {
        if let Some(server) = self.servers.get_mut(id)
            && let Some(registration) = &mut server.registration
        {
            let update = registration.update(|session| session.with_version(version.to_string()));
            let _ = update.await;
        }
    }

    /// Says that it is elsewhere, and is so a while later. No call is to feel it.
    pub(crate) async fn move_server(&mut self, id: &'static str) {
        let to = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let Some(server) = self.servers.get_mut(id) else {
            return;
        };
        let Some(registration) = &mut server.registration else {
            return;
        };
        // In vain while etcd is away.
        for _ in 0..600 {
            let there = |session: Session| session.with_address(to.to_string());
            if registration.update(there).await.is_ok() {
                break;
            }
            time::sleep(Duration::from_millis(100)).await;
        }
        time::sleep(Duration::from_millis(300)).await;
        let proxy = Proxy::start_at(to, server.server.address).await;
        let before = std::mem::replace(&mut server.proxy, Arc::new(proxy));
        server.former.push(before);
        lock(&self.truth).well.insert(id, to.to_string());
    }

    /// Something is about to be done to all of them at once.
    pub(crate) fn disturb_all(&self) {
        let mut truth = lock(&self.truth);
        SERVERS.iter().for_each(|id| truth.is_disturbed(id));
    }

    fn is_not_well(&self, id: &'static str) {
        let mut truth = lock(&self.truth);
        truth.well.remove(id);
        truth.is_disturbed(id);
    }

    /// Until every client's view is exact and fresh and every server answers each; how long that took, unless it is
    /// too long. What readers of watches were told is exact then as well, once those that are slow have read it.
    pub(crate) async fn until_well(&self) -> Option<Duration> {
        let began = Instant::now();
        let truth = lock(&self.truth).well.clone();
        let mut took = None;
        while began.elapsed() < Duration::from_secs(60) {
            let mut clients = self.clients.iter();
            if took.is_none()
                && clients.all(|manager| is_exact(&manager.status(), &truth))
                && self.all_answer().await
            {
                took = Some(began.elapsed());
            }
            let mut views = self.views.iter();
            if took.is_some() && views.all(|view| reader::is_exact(view, &truth)) {
                return took;
            }
            time::sleep(Duration::from_millis(10)).await;
        }
        for manager in &self.clients {
            println!("{}", manager.status());
        }
        println!("watches told: {:#?}\ntrue is: {truth:#?}", self.views);
        for (id, server) in &self.servers {
            let state = server.registration.as_ref().map(Registration::state);
            println!(
                "{id}: {}",
                state.map_or("none".to_owned(), |s| s.to_string())
            );
        }
        let what = "a view that was not exact within a minute".to_owned();
        *lock(&self.truth).wrong.entry(what).or_default() += 1;
        None
    }

    async fn all_answer(&self) -> bool {
        for channel in self.channels() {
            for id in self.servers.keys() {
                // One that hangs is as bad as one that fails.
                let pinned = channel.to(*id);
                let call = load::call(&pinned, String::new(), 0, SECOND, None);
                if call.await.is_err() {
                    return false;
                }
            }
        }
        true
    }

    /// Looks, all the while, whether anybody who is well is taken for gone.
    pub(crate) fn watch(&self) -> JoinHandle<()> {
        let (clients, truth) = (self.clients.clone(), self.truth.clone());
        tokio::spawn(async move {
            let mut missed: BTreeMap<(usize, &str), Instant> = BTreeMap::new();
            loop {
                time::sleep(Duration::from_millis(20)).await;
                for (n, manager) in clients.iter().enumerate() {
                    let status = manager.status();
                    let mut truth = lock(&truth);
                    for id in SERVERS {
                        if truth.was_disturbed(id) || knows(&status, id) {
                            continue;
                        }
                        missed.entry((n, id)).or_insert_with(Instant::now);
                    }
                    missed.retain(|(_, id), since| {
                        let told = truth.was_disturbed(id);
                        let over = since.elapsed() >= HINDSIGHT;
                        if over && !told {
                            truth.is_wrong(&format!("{id} was well, and taken for gone"));
                        }
                        !told && !over
                    });
                }
            }
        })
    }

    /// How often etcd deleted the session of a server that was well.
    pub(crate) fn deleted(&self) -> u64 {
        lock(&self.truth).deleted
    }

    pub(crate) fn wrong(&self) -> Wrong {
        lock(&self.truth).wrong.clone()
    }

    pub(crate) async fn stop(self) {
        for manager in &self.clients {
            manager.stop().await;
        }
    }
}

// === impl Truth ===

impl Truth {
    fn is_disturbed(&mut self, id: &'static str) {
        self.disturbed.insert(id, Instant::now());
    }

    /// Whether something was done to it that its calls may have felt.
    pub(crate) fn was_disturbed(&self, id: &str) -> bool {
        let at = self.disturbed.get(id);
        !self.well.contains_key(id)
            || self.afflicted.contains(id)
            || at.is_some_and(|at| at.elapsed() < AFTERMATH)
    }

    /// Whether nobody may have been registered just now.
    pub(crate) fn were_all_gone(&self) -> bool {
        SERVERS.iter().all(|id| {
            let lost = self.lost.get(id);
            !self.well.contains_key(id) || lost.is_some_and(|at| at.elapsed() < GONE)
        })
    }

    /// This is what must not be.
    pub(crate) fn is_wrong(&mut self, what: &str) {
        *self.wrong.entry(what.to_owned()).or_default() += 1;
    }
}

/// What etcd itself does to a server that is well.
async fn listen(id: &'static str, mut events: RegistrationEvents, truth: Arc<Mutex<Truth>>) {
    while let Some(event) = events.next().await {
        // That it was not confirmed in time does not mean that it was not there.
        if let RegistrationEvent::Lost { why } = event
            && Error::of(&*why).map(Error::kind) != Some(Kind::RegistryUnreachable)
        {
            let mut truth = lock(&truth);
            truth.is_disturbed(id);
            truth.lost.insert(id, Instant::now());
            truth.deleted += 1;
        }
    }
}

pub(crate) fn lock(truth: &Mutex<Truth>) -> MutexGuard<'_, Truth> {
    truth.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Until nobody listens there.
async fn refuses(address: SocketAddr) {
    while tokio::net::TcpStream::connect(address).await.is_ok() {
        time::sleep(Duration::from_millis(1)).await;
    }
}

fn is_exact(status: &Status, truth: &BTreeMap<&'static str, String>) -> bool {
    let Some(role) = status.roles.first() else {
        return false;
    };
    let is_true = |e: &switchboard::manager::EndpointStatus| {
        e.state == Connectivity::Ready
            && e.former.is_none()
            && truth
                .get(&*e.peer.id)
                .is_some_and(|address| **address == *e.peer.address)
    };
    matches!(role.discovery, Discovery::Fresh)
        && role.endpoints.len() == truth.len()
        && role.endpoints.iter().all(is_true)
}

fn knows(status: &Status, id: &str) -> bool {
    let role = status.roles.first();
    role.is_some_and(|role| role.endpoints.iter().any(|e| &*e.peer.id == id))
}
