//! Three etcds that are one, of which some are killed, paused or cut off: scenario 17.
//!
//! Whatever happens to a member, nobody who is alive is said to be gone, and what changes is seen again soon.

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, future, stream};

use support::{
    etcd::Cluster,
    eventually, eventually_async,
    load::Load,
    proxy::{Mode, Proxy},
    server::EchoServer,
    view::{self, View, value},
};
use switchboard::{
    ConnectionManager, Kind, Registration, Session,
    registry::{RegistrationEvent, RegistrationState},
};
use tokio::time::sleep;

const SECOND: Duration = Duration::from_secs(1);

/// Within this time changes are seen again, wherever the trouble is.
const SEEN_AGAIN: Duration = Duration::from_secs(10);

/// A cluster, each member behind a proxy, with sessions and whoever looks at them.
struct Scene {
    cluster: Cluster,
    /// The member that the view is watched through.
    watched: usize,
    proxies: Vec<Proxy>,
    view: View,
    /// Of the servers, and of the active one of an exclusive role.
    registrations: Vec<Registration>,
    standby: Registration,
    losses: Arc<Mutex<Vec<String>>>,
    ids: Vec<String>,
    manager: ConnectionManager,
    load: Load,
    _servers: Vec<EchoServer>,
}

impl Scene {
    /// Six servers, each with a client of its own and a lease of five seconds; and a caller, who is watching through
    /// the member that leads, or through one that does not.
    async fn new(leader: bool) -> Self {
        let cluster = Cluster::start().await;
        let watched = match leader {
            true => cluster.leader().await,
            false => cluster.follower().await,
        };
        let mut proxies = Vec::new();
        for member in &cluster.members {
            let address = member.address().parse().expect("host:port");
            proxies.push(Proxy::start(address).await);
        }
        let endpoints: Vec<_> = proxies
            .iter()
            .map(|proxy| format!("http://{}", proxy.address()))
            .collect();
        let registry = async || {
            let registry = view::registry(&endpoints).await;
            registry.with_ttl(5 * SECOND).expect("a good TTL")
        };
        let ids: Vec<_> = (0..6).map(|n| n.to_string()).collect();
        let servers: Vec<_> = ids.iter().map(|id| EchoServer::start(id)).collect();
        let mut registrations = Vec::new();
        for server in &servers {
            let session = Session::new("echo", server.address()).with_id(server.id.as_str());
            let registered = registry().await.register(session).await;
            registrations.push(registered.expect("it is free"));
        }
        let coord = |address| Session::new("coord", address).with_exclusive(true);
        let active = registry().await.register(coord("a:1")).await;
        registrations.push(active.expect("it is free"));
        let standby = registry().await.register(coord("b:1")).await;
        let standby = standby.expect("it stands by");
        let each_has_one = async || watches(&cluster).await.iter().sum::<u64>() == 8;
        eventually_async("each watches its own key", each_has_one).await;
        // Whom a client talks to is left to chance. So until it comes out.
        let (caller, view) = loop {
            let before = watches(&cluster).await;
            let caller = registry().await;
            let view = View::listed(&caller, "echo").await;
            let mut after = before.clone();
            while after == before {
                after = watches(&cluster).await;
            }
            if after[watched] > before[watched] {
                break (caller, view);
            }
            // Or its end would be taken for another's beginning.
            drop((caller, view));
            eventually_async("its watch ends", async || watches(&cluster).await == before).await;
        };
        let manager = ConnectionManager::builder(caller).build();
        let load = Load::start(&manager.channel("echo"), 0);
        let mut scene = Self {
            cluster,
            watched,
            proxies,
            view,
            losses: losses(&registrations),
            registrations,
            standby,
            ids,
            manager,
            load,
            _servers: servers,
        };
        scene.is_exact("at first", 5 * SECOND).await;
        eventually_async("calls are answered", async || scene.load.answered() > 100).await;
        scene
    }

    async fn is_exact(&mut self, when: &str, bound: Duration) -> Duration {
        let ids = self.ids.clone();
        let is = |v: &View| v.ids() == ids && !v.is_stale;
        self.view.until(bound, when, is).await
    }

    /// How long it takes from now until a change is seen that is made from now on.
    async fn until_a_change_is_seen(&mut self, what: &str, through: usize) -> Duration {
        let began = Instant::now();
        let key = format!("demo/echo/new-{what}");
        let put = self.cluster.members[through].put(&key, value("new:1"));
        self.view.during(put).await;
        let id = format!("new-{what}");
        let is = |v: &View| v.member(&id).is_some();
        self.view.until(SEEN_AGAIN, what, is).await;
        let took = began.elapsed();
        let deleted = self.cluster.members[through].delete(&key);
        assert!(self.view.during(deleted).await);
        let is = |v: &View| v.member(&id).is_none();
        self.view.until(SECOND, "the change is undone", is).await;
        self.view.removed.retain(|gone| *gone != id);
        took
    }

    /// For longer than a TTL, and the most that an election adds: a lease that is not kept alive would be over.
    async fn time_passes(&mut self) {
        self.view.during(sleep(6 * SECOND)).await;
    }

    /// Up to now nobody was gone, no lease was lost, and no call has failed.
    async fn was_never_wrong(&mut self, what: &str) {
        self.is_exact(what, SEEN_AGAIN).await;
        for registration in &self.registrations {
            let is_registered =
                || matches!(registration.state(), RegistrationState::Registered { .. });
            eventually("each is registered", is_registered).await;
        }
        let state = self.standby.state();
        assert!(
            matches!(state, RegistrationState::StandBy { .. }),
            "{state}"
        );
        let again = Load::start(&self.manager.channel("echo"), 0);
        let answered = std::mem::replace(&mut self.load, again)
            .all_answered()
            .await;
        let stale = std::mem::take(&mut self.view.stale);
        eprintln!("{what}: {answered} calls were answered; it was stale because of {stale:?}");
        assert!(self.view.removed.is_empty(), "{:?}", self.view.removed);
        let losses = self.losses.lock().expect("no panic");
        assert!(losses.is_empty(), "{losses:?}");
    }
}

/// What the registrations tell of losses.
fn losses(registrations: &[Registration]) -> Arc<Mutex<Vec<String>>> {
    let losses = Arc::new(Mutex::new(Vec::new()));
    let mut events = stream::select_all(registrations.iter().map(Registration::events));
    let told = losses.clone();
    tokio::spawn(async move {
        while let Some(event) = events.next().await {
            if let RegistrationEvent::Lost { .. } | RegistrationEvent::Taken { .. } = event {
                told.lock().expect("no panic").push(event.to_string());
            }
        }
    });
    losses
}

/// How many watches each member has.
async fn watches(cluster: &Cluster) -> Vec<u64> {
    let watches = cluster
        .members
        .iter()
        .map(|member| member.metric("etcd_debugging_mvcc_watcher_total"));
    future::join_all(watches).await
}

/// What befalls a member.
#[derive(Clone, Copy, Debug)]
enum Trouble {
    Killed,
    Paused,
    Partitioned,
}

async fn befalls(trouble: Trouble, leader: bool) {
    // Given a cluster, and sessions in it
    let mut scene = Scene::new(leader).await;
    let n = scene.watched;
    let what = format!("{trouble:?}-{}", if leader { "leader" } else { "follower" });

    // When something befalls the member that a caller talks to
    match trouble {
        Trouble::Killed => scene.cluster.members[n].kill(),
        Trouble::Paused => scene.cluster.members[n].pause(),
        Trouble::Partitioned => scene.proxies[n].set(Mode::Swallow),
    }
    let began = Instant::now();
    if leader {
        // Writes wait for another to lead.
        eventually_async("another leads", async || {
            let others = scene.cluster.members.iter().enumerate();
            let leads = others
                .filter(|(other, _)| *other != n || matches!(trouble, Trouble::Partitioned))
                .map(|(_, member)| member.leads());
            future::join_all(leads).await.contains(&true)
        })
        .await;
    }

    // Then changes are seen again within a bound
    scene.until_a_change_is_seen(&what, (n + 1) % 3).await;
    let seen = began.elapsed();
    eprintln!("{what}: a change was seen {seen:?} after");
    let bound = match trouble {
        Trouble::Killed => SEEN_AGAIN,
        // By its silence, and not only when the keepalive of its connection finds nobody.
        Trouble::Paused | Trouble::Partitioned => 7 * SECOND,
    };
    assert!(seen < bound, "{seen:?}");

    // And for as long as it lasts nobody is said to be gone, no lease is lost, and no call fails
    scene.time_passes().await;
    scene.was_never_wrong(&what).await;

    // And when it is over
    match trouble {
        Trouble::Killed => scene.cluster.members[n].restart().await,
        Trouble::Paused => scene.cluster.members[n].resume(),
        Trouble::Partitioned => {
            scene.proxies[n].set(Mode::Pass);
            scene.proxies[n].reset();
        }
    }
    let over = format!("{what}, over");
    if let (Trouble::Paused, true) = (trouble, leader) {
        // Who led when it fell asleep may revoke leases before it finds out that it no longer does, in these
        // versions of etcd (etcd-io/etcd#15247). What etcd says is gone is gone; it is soon there again.
        scene.view.during(sleep(SECOND / 2)).await;
        scene.is_exact(&over, 2 * SECOND).await;
        eprintln!(
            "{over}: etcd revoked the leases of {:?}",
            scene.view.removed
        );
    } else {
        scene.until_a_change_is_seen("again", n).await;
        scene.was_never_wrong(&over).await;
    }
}

// Each with a member and with the leader, at the same time: they wait more than they work.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_killed_costs_nobody_his_session() {
    future::join(
        befalls(Trouble::Killed, false),
        befalls(Trouble::Killed, true),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_paused_is_left_within_seconds() {
    future::join(
        befalls(Trouble::Paused, false),
        befalls(Trouble::Paused, true),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_cannot_be_reached_is_left_within_seconds() {
    future::join(
        befalls(Trouble::Partitioned, false),
        befalls(Trouble::Partitioned, true),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_costs_nobody_his_session() {
    // Given a cluster, and sessions in it
    let mut scene = Scene::new(true).await;

    // When each member is restarted, the leader first
    for n in 0..3 {
        let n = (scene.watched + n) % 3;
        scene.cluster.members[n].kill();
        scene.view.during(sleep(SECOND)).await;
        let view = &mut scene.view;
        view.during(scene.cluster.members[n].restart()).await;

        // Then a change is seen soon
        let what = format!("member-{n}");
        let took = scene.until_a_change_is_seen(&what, n).await;
        eprintln!("restarted {what}: a change was seen after {took:?}");
    }

    // And nobody was said to be gone
    scene.time_passes().await;
    scene.was_never_wrong("restarted one by one").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quorum_that_is_lost_and_regained_costs_nobody_his_session() {
    // Given a cluster, and sessions in it
    let mut scene = Scene::new(false).await;

    // When two of three are gone, for longer than a TTL, and the one that is left is who a caller talks to
    let left = scene.watched;
    for n in [1, 2] {
        scene.cluster.members[(left + n) % 3].kill();
    }
    let began = Instant::now();
    scene
        .view
        .until(SEEN_AGAIN, "that is seen", |v| v.is_stale)
        .await;
    eprintln!(
        "quorum lost: seen {:?} after; {:?}",
        began.elapsed(),
        scene.view.stale
    );
    scene.time_passes().await;
    assert!(scene.view.is_stale, "nothing can be known");

    // Then what is asked for meanwhile ends in time, and says why it came to nothing
    let began = Instant::now();
    let change = |session: Session| session.with_version("2");
    let updated = scene.view.during(scene.registrations[0].update(change));
    let error = updated.await.expect_err("nothing can be written");
    assert_eq!(error.kind(), Kind::RegistryUnreachable, "{error}");
    eprintln!(
        "quorum lost: an update failed after {:?}: {error}",
        began.elapsed()
    );
    assert!(began.elapsed() < 6 * SECOND, "{:?}", began.elapsed());

    // When they are back, then the view is exact soon
    let view = &mut scene.view;
    view.during(scene.cluster.restart()).await;
    let back = Instant::now();
    scene.is_exact("they are back", SEEN_AGAIN).await;
    scene.until_a_change_is_seen("quorum", left).await;
    eprintln!(
        "quorum regained: a change was seen {:?} after",
        back.elapsed()
    );

    // And every lease lives, for another TTL. That it may be over was said, for nobody could know.
    let said = std::mem::take(&mut *scene.losses.lock().expect("no panic"));
    eprintln!(
        "quorum lost: {} of 7 said that they may be lost",
        said.len()
    );
    scene.time_passes().await;
    scene.was_never_wrong("quorum").await;
}

/// A follower is a moment behind the leader, always. That is no reason to say that nothing can be known.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_a_moment_behind_is_watched_through_all_the_same() {
    // Given a cluster that is written to all the time
    let cluster = Cluster::start().await;
    let endpoints: Vec<_> = cluster.members.iter().map(|m| m.endpoint()).collect();
    let writer = view::registry(&endpoints).await;
    let writes = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let writers: Vec<_> = (0..8)
        .map(|n| {
            let (writer, writes) = (writer.clone(), writes.clone());
            tokio::spawn(async move {
                let key = format!("role-{n}");
                let session = Session::new(key, "h:1");
                let mut held = writer.register(session).await.expect("it is free");
                for version in 0.. {
                    let version = format!("{version}");
                    let updated = held.update(|s| s.with_version(version)).await;
                    updated.expect("etcd answers");
                    writes.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                }
            })
        })
        .collect();

    // When many begin to watch, through whichever member
    let began = Instant::now();
    let mut stale = Vec::new();
    for n in 0..150 {
        let registry = view::registry(&endpoints).await;
        let mut view = View::listed(&registry, &format!("watched-{n}")).await;
        view.during(sleep(Duration::from_millis(20))).await;
        let behind = |why: &String| why.contains("which it had been at");
        stale.extend(view.stale.into_iter().filter(behind));
    }
    for writer in writers {
        writer.abort();
    }
    let rate =
        writes.load(std::sync::atomic::Ordering::Relaxed) as f64 / began.elapsed().as_secs_f64();

    // Then nobody is told that what it knows is old
    eprintln!(
        "150 watches at {rate:.0} writes a second: stale {} times",
        stale.len()
    );
    assert!(stale.is_empty(), "{stale:?}");
}
