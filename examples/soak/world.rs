//! Servers, clients, and what is true of them.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering::SeqCst},
    time::{Duration, Instant},
};

use futures_util::StreamExt as _;
use switchboard::{
    Channel, ConnectionManager, Error, EtcdRegistry, Kind, Registration, Session,
    manager::{Connectivity, Discovery, Status},
    registry::{RegistrationEvent, RegistrationEvents},
};
use tokio::{task::JoinHandle, time};

use crate::{
    load,
    reader::{self, View},
    support::{etcd::Cluster, server::EchoServer},
};

pub(crate) const SERVERS: [&str; 4] = ["a", "b", "c", "d"];
const CLIENTS: usize = 3;
const TTL: Duration = Duration::from_secs(5);

/// How long what was done to a server may be seen in calls that it had.
const AFTERMATH: Duration = Duration::from_secs(10);

/// What must not be, and how often it was.
pub(crate) type Wrong = BTreeMap<String, u64>;

pub(crate) struct World {
    endpoints: Vec<String>,
    servers: BTreeMap<&'static str, Server>,
    clients: Vec<ConnectionManager>,
    /// What readers of the clients' watches were told.
    views: Vec<View>,
    truth: Arc<Mutex<Truth>>,
}

/// One server, with connections to etcd of its own.
struct Server {
    server: EchoServer,
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
    /// How often etcd deleted the session of a server that was well.
    deleted: u64,
    wrong: Wrong,
}

// === impl World ===

impl World {
    pub(crate) async fn start() -> (Self, Cluster) {
        let etcds = Cluster::start().await;
        let mut world = Self {
            endpoints: etcds.endpoints(),
            servers: BTreeMap::new(),
            clients: Vec::new(),
            views: Vec::new(),
            truth: Arc::default(),
        };
        for id in SERVERS {
            world.start_server(id, None).await;
        }
        for _ in 0..CLIENTS {
            let manager = ConnectionManager::builder(world.registry().await).build();
            for pause in [Duration::ZERO, Duration::from_millis(500)] {
                let view = reader::read(&manager, pause, world.truth());
                world.views.push(view);
            }
            world.clients.push(manager);
        }
        assert!(world.until_well().await.is_some(), "it was never well");
        (world, etcds)
    }

    async fn registry(&self) -> EtcdRegistry {
        let registry = EtcdRegistry::connect(&self.endpoints, "soak").await;
        let registry = registry.and_then(|registry| registry.with_ttl(TTL));
        registry.expect("its settings are good")
    }

    pub(crate) fn channels(&self) -> Vec<Channel> {
        self.clients.iter().map(|m| m.channel("echo")).collect()
    }

    pub(crate) fn truth(&self) -> Arc<Mutex<Truth>> {
        self.truth.clone()
    }

    /// Starts a server, at the address where it was or at another, and returns when it is registered.
    pub(crate) async fn start_server(&mut self, id: &'static str, same: Option<&str>) {
        let server = match same {
            Some(address) => EchoServer::start_at(id, address.parse().expect("an address")),
            None => EchoServer::start(id),
        };
        let session = Session::new("echo", server.address()).with_id(id);
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
        let mut truth = lock(&self.truth);
        truth.well.insert(id, server.address());
        truth.is_disturbed(id);
        drop(truth);
        let registration = Some(registration);
        self.servers.insert(
            id,
            Server {
                server,
                registration,
            },
        );
    }

    /// As SIGKILL does: its sockets are closed, its session stays. Returns where it was.
    pub(crate) async fn kill_server(&mut self, id: &'static str) -> Option<String> {
        self.is_not_well(id);
        let mut server = self.servers.remove(id)?;
        if let Some(registration) = server.registration.take() {
            registration.abandon();
        }
        server.server.killed().await;
        Some(server.server.address())
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
            let _ = registration.deregister().await;
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
    /// too long.
    pub(crate) async fn until_well(&self) -> Option<Duration> {
        let began = Instant::now();
        let truth = lock(&self.truth).well.clone();
        while began.elapsed() < Duration::from_secs(60) {
            if self
                .clients
                .iter()
                .all(|manager| is_exact(&manager.status(), &truth))
                && self.views.iter().all(|view| reader::is_exact(view, &truth))
                && self.all_answer().await
            {
                return Some(began.elapsed());
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
                if load::call(&channel.to(*id), 0, None).await.is_err() {
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
        !self.well.contains_key(id) || at.is_some_and(|at| at.elapsed() < AFTERMATH)
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
            truth.deleted += 1;
        }
    }
}

pub(crate) fn lock(truth: &Mutex<Truth>) -> MutexGuard<'_, Truth> {
    truth.lock().unwrap_or_else(PoisonError::into_inner)
}

fn is_exact(status: &Status, truth: &BTreeMap<&'static str, String>) -> bool {
    let Some(role) = status.roles.first() else {
        return false;
    };
    let is_true = |e: &switchboard::manager::EndpointStatus| {
        e.state == Connectivity::Ready
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
