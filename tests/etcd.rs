//! The etcd registry against a real etcd.

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    collections::{HashMap, HashSet},
    future::IntoFuture as _,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::StreamExt as _;
use support::{
    etcd::Etcd,
    eventually, eventually_async,
    proxy::{Mode, Proxy},
    server::pb::{EchoRequest, echo_client::EchoClient},
    view::{self, View, value},
};
use switchboard::{
    ConnectionManager, Error, EtcdRegistry, Kind, Session,
    discover::{Change, Update},
    endpoint::Target as _,
    registry::{RegistrationEvent, RegistrationState},
};
use tokio::{
    runtime::{self, Runtime},
    time::{sleep, timeout},
};

const SECOND: Duration = Duration::from_secs(1);

async fn registry(etcd: &Etcd) -> EtcdRegistry {
    view::registry(&[etcd.endpoint()]).await
}

/// A runtime of one's own, to end when the test says so.
fn runtime() -> Runtime {
    let mut builder = runtime::Builder::new_multi_thread();
    let built = builder.worker_threads(1).enable_all().build();
    built.expect("a runtime")
}

/// How many sockets of this process are connected to this port. etcd itself has one to its own.
#[cfg(target_os = "linux")]
fn connections_to(address: &str) -> usize {
    let (_, port) = address.rsplit_once(':').expect("host:port");
    let port: u16 = port.parse().expect("a port");
    let fds = std::fs::read_dir("/proc/self/fd").expect("our files");
    let ours: HashSet<_> = fds
        .filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok())
        .map(|link| link.to_string_lossy().into_owned())
        .collect();
    let table = std::fs::read_to_string("/proc/self/net/tcp").expect("a table of sockets");
    let is_one = |line: &&str| {
        let columns: Vec<_> = line.split_whitespace().collect();
        columns[2].ends_with(&format!(":{port:04X}"))
            && ours.contains(&format!("socket:[{}]", columns[9]))
    };
    table.lines().skip(1).filter(is_one).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_is_seen_changed_and_deleted() {
    let etcd = Etcd::start().await;
    let registry = registry(&etcd).await;
    let mut view = View::of(&registry, "echo");
    view.until(5 * SECOND, "an empty role", |v| v.synced == 1)
        .await;
    assert!(view.has(&[]));

    let session = Session::new("echo", "10.0.0.5:1")
        .with_id(7)
        .with_version("2.6");
    let mut registration = registry
        .register(session.clone())
        .await
        .expect("it is free");
    view.until(SECOND, "7 comes", |v| v.has(&["7"])).await;
    let (key, member) = view.members.first_key_value().expect("it is there");
    assert_eq!(&*key.key, "demo/echo/7");
    assert_eq!(member.session(), &session);
    let generation = key.generation;
    assert!(generation > 1 && member.generation() == generation);

    let change = registration.update(|s| s.with_metadata("zone", "b"));
    change.await.expect("it is ours");
    let zone = |v: &View| {
        v.members
            .values()
            .any(|m| m.session().metadata().contains_key("zone"))
    };
    view.until(SECOND, "7 changes", zone).await;
    registration.stopping().await.expect("it is ours");
    view.until(SECOND, "7 stops", |v| {
        v.members.values().any(|m| m.stopping())
    })
    .await;
    let key = view.members.keys().next().expect("it is there");
    assert_eq!(
        key.generation, generation,
        "a change makes no other generation"
    );

    registration.deregister().await.expect("etcd answers");
    view.until(SECOND, "7 goes", |v| v.has(&[])).await;

    // As grpc-go writes it; and a role whose name begins the same is another.
    etcd.put("demo/echo_other/a", value("10.0.0.9:1")).await;
    etcd.put("demo/echo/10.0.0.6:1", value("10.0.0.6:1")).await;
    view.until(SECOND, "grpc-go's comes", |v| v.has(&["10.0.0.6:1"]))
        .await;
    assert!(view.stale.is_empty(), "{:?}", view.stale);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_may_be_started_late() {
    let mut etcd = Etcd::stopped();
    let registry = registry(&etcd).await;
    let mut view = View::of(&registry, "echo");
    view.until(5 * SECOND, "it says so", |v| !v.stale.is_empty())
        .await;
    assert!(view.stale[0].contains(&etcd.address()), "{:?}", view.stale);
    let error = registry
        .register(Session::new("echo", "h:1"))
        .await
        .expect_err("etcd is away");
    assert_eq!(error.kind(), Kind::RegistryUnreachable, "{error}");

    let restarted = tokio::spawn(async move {
        etcd.restart().await;
        etcd
    });
    view.until(30 * SECOND, "the first list", |v| v.synced == 1)
        .await;
    let etcd = restarted.await.expect("it starts");
    let _held = registry
        .register(Session::new("echo", "h:1"))
        .await
        .expect("etcd is there");
    view.until(SECOND, "the session comes", |v| v.has(&["h:1"]))
        .await;
    drop(etcd);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_with_changes_and_a_compaction_heals_exactly() {
    let mut etcd = Etcd::start().await;
    let registry = registry(&etcd).await;
    for id in ["stays", "changes", "goes", "returns"] {
        etcd.put(&format!("demo/echo/{id}"), value(&format!("{id}:1")))
            .await;
    }
    let mut view = View::of(&registry, "echo");
    view.until(5 * SECOND, "the first list", |v| v.synced == 1)
        .await;
    let before: HashMap<_, _> = view
        .members
        .iter()
        .map(|(k, m)| (m.session().id().to_owned(), (k.generation, m.clone())))
        .collect();

    etcd.kill();
    view.until(5 * SECOND, "the break", |v| !v.stale.is_empty())
        .await;
    assert_eq!(view.members.len(), 4, "what is known is kept");

    // Long enough for the longest delay. Then nobody reads on while all this happens: the watch cannot
    // have come back in between.
    let _ = timeout(3 * SECOND, async {
        loop {
            view.step().await;
        }
    })
    .await;
    etcd.restart().await;
    etcd.put("demo/echo/changes", value("changed:1")).await;
    etcd.delete("demo/echo/goes").await;
    etcd.delete("demo/echo/returns").await;
    etcd.put("demo/echo/returns", value("returns:1")).await;
    etcd.put("demo/echo/comes", value("comes:1")).await;
    etcd.compact().await;
    let took = view
        .until(5 * SECOND, "the view is exact", |v| {
            v.synced == 2 && v.has(&["changes", "comes", "returns", "stays"])
        })
        .await;
    assert!(took < 2 * SECOND, "it took {took:?}");
    let after: HashMap<_, _> = view
        .members
        .iter()
        .map(|(k, m)| (m.session().id(), (k.generation, m.clone())))
        .collect();
    assert!(
        Arc::ptr_eq(&after["stays"].1, &before["stays"].1),
        "it was not touched"
    );
    assert_eq!(after["changes"].0, before["changes"].0);
    assert_eq!(after["changes"].1.session().address(), "changed:1");
    assert!(
        after["returns"].0 > before["returns"].0,
        "another generation"
    );

    etcd.put("demo/echo/last", value("last:1")).await;
    view.until(SECOND, "the watch is back", |v| v.ids().contains(&"last"))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_goes_silent_is_found_out_and_its_return_heals() {
    let etcd = Etcd::start().await;
    let registry = registry(&etcd).await;
    etcd.put("demo/echo/a", value("a:1")).await;
    let mut view = View::of(&registry, "echo");
    view.until(5 * SECOND, "the first list", |v| v.synced == 1)
        .await;
    etcd.pause();
    view.until(12 * SECOND, "keepalive finds it out", |v| {
        !v.stale.is_empty()
    })
    .await;
    assert!(view.has(&["a"]));
    etcd.resume();
    view.until(10 * SECOND, "it heals", |v| v.synced == 2).await;
    etcd.put("demo/echo/b", value("b:1")).await;
    view.until(SECOND, "the watch is back", |v| v.has(&["a", "b"]))
        .await;
}

/// Scenario 18.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_records_cost_only_themselves() {
    let etcd = Etcd::start().await;
    let registry = registry(&etcd).await;
    let huge = |n: usize| {
        format!(
            r#"{{"Addr":"h:{n}","Metadata":"{}"}}"#,
            "x".repeat(1_200_000)
        )
    };
    let unknown = r#"{"Addr":"known:1","Surprise":{"a":[1]}}"#;
    etcd.put("demo/echo/unparsable", "{").await;
    etcd.put("demo/echo/empty", "").await;
    // Together more than a gRPC message may have by default.
    for n in 1..=4 {
        etcd.put(&format!("demo/echo/huge-{n}"), huge(n)).await;
    }
    etcd.put("demo/echo/nested/key", value("h:9")).await;
    etcd.put("demo/echo/unknown-field", unknown).await;
    for n in 0..20 {
        etcd.put(
            &format!("demo/echo/good-{n:02}"),
            value(&format!("good:{}", n + 1)),
        )
        .await;
    }
    let mut view = View::of(&registry, "echo");
    view.until(10 * SECOND, "the first list", |v| v.synced == 1)
        .await;
    assert_eq!(view.members.len(), 21, "{:?}", view.ids());
    assert_eq!((view.skipped.now(), view.skipped.total()), (7, 7));

    // The same through the watch.
    etcd.put("demo/echo/late-unparsable", "\u{0}").await;
    etcd.put("demo/echo/late-empty", "").await;
    etcd.put("demo/echo/late-huge", huge(5)).await;
    etcd.put("demo/echo/late-nested/key", value("h:10")).await;
    etcd.put("demo/echo/last", value("last:1")).await;
    view.until(5 * SECOND, "the last", |v| v.ids().contains(&"last"))
        .await;
    assert_eq!(view.members.len(), 22, "{:?}", view.ids());
    assert_eq!((view.skipped.now(), view.skipped.total()), (11, 11));
    etcd.put("demo/echo/unparsable", value("mended:1")).await;
    view.until(SECOND, "it is mended", |v| v.ids().contains(&"unparsable"))
        .await;
    assert_eq!(view.skipped.now(), 10);
    assert!(view.stale.is_empty(), "{:?}", view.stale);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registration_outlives_its_ttl_and_an_abandoned_one_does_not() {
    let etcd = Etcd::start().await;
    let registry = registry(&etcd).await.with_ttl(SECOND).expect("a good TTL");
    let mut view = View::of(&registry, "echo");
    let kept = registry
        .register(Session::new("echo", "kept:1"))
        .await
        .expect("it is free");
    let left = registry
        .register(Session::new("echo", "left:1"))
        .await
        .expect("it is free");
    view.until(5 * SECOND, "both", |v| v.has(&["kept:1", "left:1"]))
        .await;

    let taken = registry
        .register(Session::new("echo", "other:1").with_id("kept:1"))
        .await;
    let error = taken.expect_err("it is held");
    assert_eq!(error.kind(), Kind::AlreadyRegistered);
    let text = error.to_string();
    assert!(
        text.contains("demo/echo/kept:1 is held by instance kept:1 at kept:1"),
        "{text}"
    );

    sleep(4 * SECOND).await;
    left.abandon();
    view.until(5 * SECOND, "the abandoned one goes", |v| v.has(&["kept:1"]))
        .await;
    drop(kept);
    view.until(SECOND, "the dropped one goes", |v| v.has(&[]))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registration_whose_lease_ran_out_comes_back() {
    let etcd = Etcd::start().await;
    let registry = registry(&etcd).await.with_ttl(SECOND).expect("a good TTL");
    let mut view = View::of(&registry, "echo");
    let session = Session::new("echo", "h:1");
    let mut held = registry.register(session).await.expect("it is free");
    view.until(5 * SECOND, "it comes", |v| v.has(&["h:1"]))
        .await;
    let first = view.members.keys().next().expect("it is there").generation;
    // etcd's own way to end a lease early.
    held.update(|s| s.with_version("2"))
        .await
        .expect("it is ours");
    etcd.expire("demo/echo/h:1").await;
    view.until(SECOND, "it goes", |v| v.has(&[])).await;
    view.until(2 * SECOND, "it comes back", |v| v.has(&["h:1"]))
        .await;
    let (key, member) = view.members.first_key_value().expect("it is there");
    assert!(key.generation > first);
    assert_eq!(member.session().version(), "2", "as it was last written");
    held.deregister().await.expect("etcd answers");
    view.until(SECOND, "it goes", |v| v.has(&[])).await;
    sleep(SECOND).await;
    assert_eq!(
        etcd.get("demo/echo/h:1").await,
        None,
        "nobody writes it again"
    );
}

#[test]
fn a_registry_goes_on_when_the_runtime_of_its_first_use_has_ended() {
    // Given a registry that was first used on one runtime, and a discovery on another
    let (first, second) = (runtime(), runtime());
    let (etcd, registry) = second.block_on(async {
        let etcd = Etcd::start().await;
        let registry = registry(&etcd).await;
        (etcd, registry)
    });
    first.block_on(async {
        let registered = registry.register(Session::new("echo", "h:1")).await;
        let registration = registered.expect("it is free");
        registration.deregister().await.expect("etcd answers");
    });
    let mut view = View::of(&registry, "echo");
    second.block_on(view.until(5 * SECOND, "the first list", |v| v.synced == 1));

    // When the first runtime ends
    drop(first);

    // Then the registry takes another session, and the discovery hears of it
    second.block_on(async {
        let registered = registry.register(Session::new("echo", "h:2")).await;
        let registration = registered.expect("the registry goes on");
        view.until(10 * SECOND, "the session comes", |v| v.has(&["h:2"]))
            .await;
        registration.deregister().await.expect("etcd answers");
        view.until(SECOND, "it goes", |v| v.has(&[])).await;
    });
    drop(etcd);
}

#[test]
fn a_registration_can_be_used_outside_its_runtime_and_ends_with_it() {
    // Given a registration that was made on a runtime
    let (own, other) = (runtime(), runtime());
    let (etcd, registry, mut registration) = own.block_on(async {
        let etcd = Etcd::start().await;
        let registry = registry(&etcd).await;
        let registered = registry.register(Session::new("echo", "h:1")).await;
        (etcd, registry, registered.expect("it is free"))
    });

    // When it is updated on another, then that is done
    let updated = other.block_on(registration.update(|s| s.with_version("2")));
    updated.expect("its own runtime runs");
    assert_eq!(registration.session().version(), "2");

    // When it is dropped outside of any, then its record goes
    drop(registration);
    own.block_on(eventually_async("the record goes", async || {
        etcd.get("demo/echo/h:1").await.is_none()
    }));

    // When its runtime ends, then it says so
    let registered = own.block_on(registry.register(Session::new("echo", "h:2")).into_future());
    let mut registration = registered.expect("it is free");
    drop(own);
    let updated = other.block_on(registration.update(|s| s.with_version("2")));
    let error = updated.expect_err("nobody is left to do it");
    assert_eq!(error.kind(), Kind::SessionDeleted, "{error}");
    assert!(error.to_string().contains("runtime"), "{error}");
    assert!(matches!(registration.state(), RegistrationState::Ended));
    drop(etcd);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_tasks_and_sockets_are_gone_with_the_last_handle() {
    let alive = || runtime::Handle::current().metrics().num_alive_tasks();
    let etcd = Etcd::start().await;
    eventually("the test's own clients are gone", || alive() == 0).await;

    // Given a registry that is used in every way
    let registry = registry(&etcd).await;
    let mut view = View::of(&registry, "echo");
    let register = |address| registry.register(Session::new("echo", address));
    let ended = register("ended:1").await.expect("it is free");
    let dropped = register("dropped:1").await.expect("it is free");
    view.until(5 * SECOND, "both", |v| v.has(&["dropped:1", "ended:1"]))
        .await;
    let manager = ConnectionManager::builder(registry.clone()).build();
    let channel = manager.channel("nobody");
    let mut client = EchoClient::new(channel.clone());
    let called = client.unary(EchoRequest::default()).await;
    let status = called.expect_err("there is nobody");
    let kind = Error::of(&status).map(Error::kind);
    assert_eq!(kind, Some(Kind::NoSession), "{status}");
    assert!(alive() > 0);
    #[cfg(target_os = "linux")]
    assert!(connections_to(&etcd.address()) > 0);

    // When all handles are given up
    ended.deregister().await.expect("etcd answers");
    drop((client, channel, manager));
    drop(view);
    drop(registry);
    drop(dropped);

    // Then nothing of it is left
    eventually("no task is left", || alive() == 0).await;
    #[cfg(target_os = "linux")]
    eventually("no socket is left", || connections_to(&etcd.address()) == 0).await;
}

/// Scenario 19.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_sessions_and_a_hundred_changes_a_second() {
    let etcd = Etcd::start().await;
    let registry = registry(&etcd).await;
    let kv = etcd.kv().await;
    let put = |n: usize, address: String| {
        let mut kv = kv.clone();
        let request = support::etcd::pb::PutRequest {
            key: format!("demo/echo/{n}").into_bytes().into(),
            value: value(&address).into_bytes().into(),
            lease: 0,
        };
        async move { kv.put(request).await.map(drop) }
    };
    let puts = (0..1000).map(|n| put(n, format!("first-{n}:1")));
    let done = futures_util::stream::iter(puts)
        .buffer_unordered(50)
        .collect::<Vec<_>>()
        .await;
    assert!(done.iter().all(Result::is_ok), "{done:?}");

    let mut view = View::of(&registry, "echo");
    let took = view
        .until(10 * SECOND, "the first list", |v| v.synced == 1)
        .await;
    assert_eq!(view.members.len(), 1000);
    eprintln!("1,000 sessions were listed in {took:?}");

    // A watch of the test's own says when the event is there: what is timed is what we add to it.
    let mut events = etcd.watch("demo/echo/").await;
    let arrived = tokio::spawn(async move {
        let mut arrived = HashMap::new();
        while arrived.len() < 300 {
            for key in events.next().await {
                let n = key.rsplit('/').next().expect("a key has parts");
                let n: usize = n.parse().expect("a number");
                arrived.insert(n, Instant::now());
            }
        }
        arrived
    });
    let changes: Vec<_> = (0..300).map(|n| put(n, format!("second-{n}:1"))).collect();
    let writer = tokio::spawn(async move {
        let mut every = tokio::time::interval(Duration::from_millis(10));
        for change in changes {
            every.tick().await;
            tokio::spawn(change);
        }
    });
    let mut applied: HashMap<usize, Instant> = HashMap::new();
    while applied.len() < 300 {
        let update = timeout(10 * SECOND, view.updates.next())
            .await
            .expect("a change in time");
        let Some(Update::Change(Change::Insert(_, member))) = update else {
            panic!("{update:?}");
        };
        let id: usize = member.session().id().parse().expect("a number");
        applied.insert(id, Instant::now());
    }
    writer.await.expect("it writes");
    let arrived = timeout(10 * SECOND, arrived)
        .await
        .expect("the test's watch sees them too")
        .expect("it does not panic");
    let mut took: Vec<_> = applied
        .iter()
        .map(|(n, at)| at.saturating_duration_since(arrived[n]))
        .collect();
    took.sort_unstable();
    let p99 = took[took.len() * 99 / 100];
    eprintln!(
        "a change from its event to the stream: p50 {:?}, p99 {p99:?}",
        took[took.len() / 2]
    );
    assert!(p99 < SECOND / 10, "p99 {p99:?}");
    assert_eq!(view.synced, 1);
}

/// How the connection is lost.
#[derive(Clone, Copy, Debug)]
enum Break {
    Reset,
    Silence,
}

/// Scenario 13.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_that_broke_is_exact_again_although_its_history_is_gone() {
    for how in [Break::Reset, Break::Silence] {
        // Given a view through a proxy
        let etcd = Etcd::start().await;
        let proxy = Proxy::start(etcd.address().parse().expect("host:port")).await;
        for id in ["changes", "goes", "returns", "stays"] {
            etcd.put(&format!("demo/echo/{id}"), value(&format!("{id}:1")))
                .await;
        }
        let registry = view::registry(&[format!("http://{}", proxy.address())]).await;
        let mut view = View::listed(&registry, "echo").await;
        let before = view.member("returns").expect("it is there").generation();

        // When its connection is lost, and all kinds of things happen and are forgotten before it heals
        proxy.set(Mode::Swallow);
        if let Break::Reset = how {
            proxy.reset();
            view.until(5 * SECOND, "the break", |v| v.is_stale).await;
        }
        etcd.put("demo/echo/changes", value("changed:1")).await;
        etcd.delete("demo/echo/goes").await;
        etcd.delete("demo/echo/returns").await;
        etcd.put("demo/echo/returns", value("returns:1")).await;
        etcd.put("demo/echo/comes", value("comes:1")).await;
        etcd.compact().await;
        if let Break::Silence = how {
            // It is found out by itself, and not by a connection that ends.
            let took = view.until(8 * SECOND, "the break", |v| v.is_stale).await;
            eprintln!("{how:?}: found out after {took:?}");
        }
        assert!(view.has(&["changes", "goes", "returns", "stays"]));

        // Then the view is exact within two seconds of that
        proxy.set(Mode::Pass);
        proxy.reset();
        let healed = |v: &View| !v.is_stale && v.has(&["changes", "comes", "returns", "stays"]);
        let took = view.until(2 * SECOND, "it is exact", healed).await;
        eprintln!("{how:?}: exact {took:?} after it healed");
        let changed = view.member("changes").expect("it is there");
        assert_eq!(changed.session().address(), "changed:1");
        let returned = view.member("returns").expect("it is there");
        assert!(returned.generation() > before, "it is another generation");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deletion_at_which_etcd_compacts_before_the_watch_is_there_is_seen() {
    // Given a list that is told, and a watch that takes its time to get to etcd
    let etcd = Etcd::start().await;
    for id in ["goes", "stays"] {
        etcd.put(&format!("demo/echo/{id}"), value(&format!("{id}:1")))
            .await;
    }
    let proxy = Proxy::start(etcd.address().parse().expect("host:port")).await;
    proxy.delay(Duration::from_millis(200));
    let registry = view::registry(&[format!("http://{}", proxy.address())]).await;
    let mut view = View::listed(&registry, "echo").await;

    // When a session is deleted meanwhile, and the history is compacted at just that
    etcd.delete("demo/echo/goes").await;
    etcd.compact().await;

    // Then it is seen
    view.until(3 * SECOND, "it goes", |v| !v.is_stale && v.has(&["stays"]))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_was_rebuilt_at_a_lower_revision_is_believed_and_its_lost_are_given_time() {
    // Given a view of an etcd at a high revision
    let mut etcd = Etcd::start().await;
    for n in 0..50 {
        etcd.put("demo/echo/a", value(&format!("a:{}", n + 1)))
            .await;
    }
    etcd.put("demo/echo/b", value("b:1")).await;
    let mut view = View::listed(&registry(&etcd).await, "echo").await;
    let before = etcd.revision().await;

    // When it is rebuilt, with one of the two and one more
    etcd.lose_data();
    etcd.restart().await;
    etcd.put("demo/echo/a", value("a:50")).await;
    etcd.put("demo/echo/c", value("c:1")).await;
    let rebuilt = Instant::now();
    assert!(etcd.revision().await < before);

    // Then what it has is seen within two seconds, and what it has not is kept for some more
    view.until(2 * SECOND, "what it has", |v| v.has(&["a", "b", "c"]))
        .await;
    let says = |v: &View| v.stale.iter().any(|why| why.contains("does not know 1"));
    view.until(SECOND, "it says that it is in doubt", says)
        .await;
    assert!(view.is_stale);
    let exact = |v: &View| v.has(&["a", "c"]) && !v.is_stale;
    view.until(5 * SECOND, "it is exact", exact).await;
    eprintln!("rebuilt; exact {:?} after", rebuilt.elapsed());
    assert!(rebuilt.elapsed() > 2 * SECOND, "{:?}", rebuilt.elapsed());

    // And what happens there is seen, although the old etcd had been at that revision before
    etcd.put("demo/echo/d", value("d:1")).await;
    view.until(SECOND, "a change", |v| v.has(&["a", "c", "d"]))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_answer_right_after_one_that_was_not_is_looked_at_twice() {
    // Given a view that is cut off, while all go and two return
    let etcd = Etcd::start().await;
    let proxy = Proxy::start(etcd.address().parse().expect("host:port")).await;
    etcd.put("demo/echo/a", value("a:1")).await;
    etcd.put("demo/echo/b", value("b:1")).await;
    let registry = view::registry(&[format!("http://{}", proxy.address())]).await;
    let mut view = View::listed(&registry, "echo").await;
    let cut = async |view: &mut View| {
        proxy.set(Mode::Swallow);
        proxy.reset();
        view.until(5 * SECOND, "the break", |v| v.is_stale).await;
        view.stale.clear();
    };
    cut(&mut view).await;
    etcd.delete("demo/echo/a").await;
    etcd.delete("demo/echo/b").await;

    // When it is back, and all is empty, then that is doubted, and who has returned meanwhile was never gone
    proxy.set(Mode::Pass);
    proxy.reset();
    let doubts = |v: &View| v.stale.iter().any(|why| why.contains("it is asked again"));
    view.until(3 * SECOND, "it doubts", doubts).await;
    assert!(view.has(&["a", "b"]) && view.removed.is_empty());
    etcd.put("demo/echo/a", value("a:1")).await;
    view.until(2 * SECOND, "it is exact", |v| v.has(&["a"]) && !v.is_stale)
        .await;

    // When it is empty once more, then that is believed at the second look
    cut(&mut view).await;
    etcd.delete("demo/echo/a").await;
    proxy.set(Mode::Pass);
    proxy.reset();
    let exact = |v: &View| v.has(&[]) && !v.is_stale;
    let took = view.until(3 * SECOND, "it is exact", exact).await;
    assert!(doubts(&view), "{:?}", view.stale);
    eprintln!("emptied; believed {took:?} after it was back");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_who_look_through_one_registry_share_a_watch_and_a_connection() {
    // Given one registry with managers, views and registrations, of its clones too
    let etcd = Etcd::start().await;
    let watches = async || etcd.metric("etcd_debugging_mvcc_watcher_total").await;
    let registry = registry(&etcd).await;
    let mut views = Vec::new();
    for _ in 0..3 {
        views.push(View::listed(&registry.clone(), "echo").await);
    }
    let managers: Vec<_> = (0..3)
        .map(|_| ConnectionManager::builder(registry.clone()).build())
        .collect();
    for manager in &managers {
        let mut client = EchoClient::new(manager.channel("echo"));
        let called = client.unary(EchoRequest::default()).await;
        called.expect_err("nobody is there");
    }

    // When all of them look at one role, then that is one watch
    eventually_async("one watch", async || watches().await == 1).await;

    // When three sessions are registered, then each has that of its own key besides
    let mut held = Vec::new();
    for n in 0..3 {
        let session = Session::new("echo", format!("h:{}", n + 1));
        held.push(registry.register(session).await.expect("it is free"));
    }
    for view in &mut views {
        view.until(SECOND, "all", |v| v.has(&["h:1", "h:2", "h:3"]))
            .await;
    }
    eventually_async("and one for each key", async || watches().await == 4).await;
    #[cfg(target_os = "linux")]
    assert_eq!(connections_to(&etcd.address()), 1);

    // When they go, then their watches do
    drop((managers, held));
    eventually_async("the views' is left", async || watches().await == 1).await;
    drop(views);
    eventually_async("none is left", async || watches().await == 0).await;
}

/// Users root and app, of which the latter may use what is under demo/.
async fn with_users(etcd: &Etcd) {
    for args in [
        &["user", "add", "root:secret"][..],
        &["role", "add", "root"],
        &["user", "grant-role", "root", "root"],
        &["role", "add", "app"],
        &[
            "role",
            "grant-permission",
            "app",
            "--prefix=true",
            "readwrite",
            "demo/",
        ],
        &["user", "add", "app:pw-4711"],
        &["user", "grant-role", "app", "app"],
        &["user", "add", "nobody:pw-4711"],
    ] {
        etcd.etcdctl(args).await;
    }
}

async fn as_user(endpoint: String, name: &str, password: &str) -> EtcdRegistry {
    let builder = EtcdRegistry::builder([endpoint], "demo").user(name, password);
    let registry = builder.connect().await.expect("a good endpoint");
    registry.with_ttl(2 * SECOND).expect("a good TTL")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_asks_who_one_is_is_told_and_says_readably_what_it_does_not_like() {
    // Given an etcd with users
    let etcd = Etcd::start().await;
    with_users(&etcd).await;
    etcd.etcdctl(&["auth", "enable"]).await;

    // When one proves to be a user, then all goes well
    let app = as_user(etcd.endpoint(), "app", "pw-4711").await;
    let mut view = View::listed(&app, "echo").await;
    let mut held = app
        .register(Session::new("echo", "h:1"))
        .await
        .expect("it may");
    view.until(SECOND, "it is seen", |v| v.has(&["h:1"])).await;
    let change = |s: Session| s.with_version("2");
    held.update(change).await.expect("it may");
    assert_eq!(app.allocate_id().await.expect("it may"), 1);
    held.deregister().await.expect("it may");
    view.until(SECOND, "it goes", |v| v.has(&[])).await;

    // When one does not, or is another, then the error says what is wrong
    let anonymous = registry(&etcd).await;
    let wrong = as_user(etcd.endpoint(), "app", "wrong").await;
    let nobody = as_user(etcd.endpoint(), "nobody", "pw-4711").await;
    for (registry, says) in [
        (&anonymous, "user name is empty"),
        (&wrong, "invalid user ID or password"),
        (&nobody, "permission denied"),
    ] {
        let registered = registry.register(Session::new("echo", "h:2")).await;
        let error = registered.expect_err("it may not");
        eprintln!("{error}");
        assert!(error.to_string().contains(says), "{error}");
        assert_eq!(error.kind(), Kind::RegistryRefused, "{error}");
        assert!(!format!("{registry:?} {error:?}").contains("pw-4711"));
        let mut view = View::of(registry, "echo");
        view.until(5 * SECOND, "it says so", |v| !v.stale.is_empty())
            .await;
        assert!(view.stale[0].contains(says), "{:?}", view.stale);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_that_etcd_forgets_are_replaced_and_nobody_notices() {
    // Given an etcd with users, that forgets tokens after a second, if it can be told to
    let mut etcd = Etcd::stopped();
    let forgets = etcd.knows_option("--auth-token-ttl").await;
    if forgets {
        etcd = etcd.with_options(&["--auth-token-ttl", "1"]);
    }
    etcd.restart().await;
    with_users(&etcd).await;
    etcd.etcdctl(&["auth", "enable"]).await;
    let proxy = Proxy::start(etcd.address().parse().expect("host:port")).await;
    let app = as_user(format!("http://{}", proxy.address()), "app", "pw-4711").await;
    let mut view = View::listed(&app, "echo").await;
    let registered = app.register(Session::new("echo", "h:1")).await;
    let mut held = registered.expect("it may");
    view.until(SECOND, "it is seen", |v| v.has(&["h:1"])).await;
    let mut events = held.events();

    for (n, what) in ["age", "restart", "users change"].iter().enumerate() {
        // When the token is forgotten: by its age, with the member that made it, or since users have changed
        match *what {
            "age" => {}
            "restart" => {
                etcd.kill();
                view.during(etcd.restart()).await;
            }
            _ => {
                let root = ["--user", "root:secret", "user", "add", "more:pw-4711"];
                etcd.etcdctl(&root).await;
            }
        }
        // For longer than the TTL, and the token's.
        view.during(sleep(3 * SECOND)).await;

        // Then updates, watches and beats go on
        let version = n.to_string();
        let change = |s: Session| s.with_version(version.as_str());
        held.update(change).await.expect(what);
        let seen = |v: &View| {
            v.member("h:1")
                .is_some_and(|m| m.session().version() == version && !v.is_stale)
        };
        view.until(3 * SECOND, what, seen).await;
        // With a watch that is made anew.
        let lists = view.synced;
        proxy.reset();
        view.until(5 * SECOND, "the next list", |v| v.synced > lists)
            .await;
    }
    assert!(view.removed.is_empty(), "{:?}", view.removed);
    while let Ok(Some(event)) = timeout(SECOND / 10, events.next()).await {
        let lost = matches!(event, RegistrationEvent::Lost { .. });
        assert!(!lost, "{event}");
    }
    eprintln!("tokens age: {forgets}; {:?}", view.stale);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn authentication_that_is_turned_on_later_is_met_by_who_has_a_user() {
    // Given an etcd that does not ask, and two registrations, one with a user
    let etcd = Etcd::start().await;
    let proxy = Proxy::start(etcd.address().parse().expect("host:port")).await;
    let endpoint = format!("http://{}", proxy.address());
    let app = as_user(endpoint.clone(), "app", "pw-4711").await;
    let anonymous = view::registry(&[endpoint]).await;
    let mut held = app.register(Session::new("echo", "h:1")).await.expect("ok");
    let mut seen = View::listed(&app, "echo").await;
    let mut unseen = View::listed(&anonymous, "echo").await;

    // When authentication is turned on, and the connections are made anew
    with_users(&etcd).await;
    etcd.etcdctl(&["auth", "enable"]).await;
    proxy.reset();

    // Then who has a user goes on
    held.update(|s| s.with_version("2")).await.expect("it may");
    let is_new = |v: &View| {
        let member = v.member("h:1");
        member.is_some_and(|m| m.session().version() == "2") && !v.is_stale
    };
    seen.until(3 * SECOND, "it is seen", is_new).await;
    seen.during(sleep(3 * SECOND)).await;
    assert!(seen.removed.is_empty(), "{:?}", seen.removed);

    // And who has none keeps what it knows, and says why it knows no more
    let says = |v: &View| v.stale.iter().any(|why| why.contains("user name is empty"));
    unseen.until(5 * SECOND, "it says so", says).await;
    assert!(unseen.has(&["h:1"]) && unseen.is_stale);
    let registered = anonymous.register(Session::new("echo", "h:2")).await;
    let error = registered.expect_err("it may not");
    assert!(error.to_string().contains("user name is empty"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_sessions_are_listed_in_pages_among_huge_values() {
    // Given 3,000 sessions, and some values that are too long to be read
    let etcd = Etcd::start().await;
    let kv = etcd.kv().await;
    let puts = (0..3000).map(|n| {
        let mut kv = kv.clone();
        let value = match n % 500 {
            0 => format!(r#"{{"Addr":"h:1","Metadata":"{}"}}"#, "x".repeat(1_200_000)),
            _ => value(&format!("h-{n}:1")),
        };
        let request = support::etcd::pb::PutRequest {
            key: format!("demo/echo/{n:04}").into_bytes().into(),
            value: value.into_bytes().into(),
            lease: 0,
        };
        async move { kv.put(request).await.expect("etcd takes a record") }
    });
    let puts = futures_util::stream::iter(puts).buffer_unordered(50);
    puts.for_each(|_| std::future::ready(())).await;

    // When they are listed, then all that can be read are there, and each of the others was skipped
    let began = Instant::now();
    let mut view = View::listed(&registry(&etcd).await, "echo").await;
    eprintln!("3,000 sessions listed in {:?}", began.elapsed());
    assert_eq!((view.members.len(), view.skipped.now()), (2994, 6));

    // And a change of the first and of the last is seen
    for id in ["0001", "2999"] {
        etcd.put(&format!("demo/echo/{id}"), value("new:1")).await;
        let is_new = |v: &View| {
            let member = v.member(id);
            member.is_some_and(|m| m.session().address() == "new:1")
        };
        view.until(SECOND, id, is_new).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_broke_costs_no_request() {
    // Given a registration through a proxy, to an etcd that has no other member
    let etcd = Etcd::start().await;
    let proxy = Proxy::start(etcd.address().parse().expect("host:port")).await;
    let registry = view::registry(&[format!("http://{}", proxy.address())]).await;
    let registered = registry.register(Session::new("echo", "h:1")).await;
    let mut held = registered.expect("it is free");

    for n in 0..20 {
        // When the connection is reset, then what is asked for at that moment is done all the same
        proxy.reset();
        let change = |session: Session| session.with_version(n.to_string());
        held.update(change).await.expect("etcd is there");
        assert_eq!(registry.allocate_id().await.expect("it is there"), n + 1);
    }
}

#[cfg(feature = "tls")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_wants_tls_and_a_certificate_is_spoken_with_and_others_hear_why_not() {
    use support::certificates::Ca;
    use switchboard::transport::TlsConfig;

    // Given an etcd that speaks TLS, with those alone who have a certificate of its authority
    let (authority, stranger) = (Ca::new("authority"), Ca::new("stranger"));
    let (server, client) = (authority.issue(&["127.0.0.1"]), authority.issue(&["app"]));
    let mut etcd = Etcd::stopped();
    let endpoint = etcd.start_with_tls(&authority.pem(), &server.certificate, &server.key);
    let trusting = |ca: &Ca| {
        TlsConfig::new()
            .ca_pem(ca.pem().as_bytes())
            .expect("a root")
    };
    let connect = async |tls| {
        let builder = EtcdRegistry::builder([&endpoint], "demo").tls(tls);
        builder.connect().await.expect("good settings")
    };
    let known = trusting(&authority)
        .identity_pem(client.certificate.as_bytes(), client.key.as_bytes())
        .expect("a certificate and its key");

    // When one has it, then sessions are registered and seen
    let registry = connect(known).await;
    let session = Session::new("echo", "h:1").with_id(7);
    let registration = registry
        .register(session)
        .background()
        .await
        .expect("it is good");
    let mut view = View::of(&registry, "echo");
    view.until(20 * SECOND, "etcd starts, and has the session", |v| {
        v.has(&["7"])
    })
    .await;

    // When one has none, or trusts another authority, or speaks plaintext, then the error says so
    let plain = EtcdRegistry::connect([endpoint.replace("https://", "http://")], "demo").await;
    for (registry, says) in [
        (
            connect(trusting(&authority)).await,
            "refuses a client without a certificate",
        ),
        (
            connect(trusting(&stranger)).await,
            "leads to none of the trusted roots",
        ),
        (plain.expect("good settings"), "TLS"),
    ] {
        let registered = registry.register(Session::new("echo", "h:2")).await;
        let error = registered.expect_err("it is not let in");
        eprintln!("{error}");
        assert_eq!(error.kind(), Kind::RegistryUnreachable, "{error}");
        assert!(error.to_string().contains(says), "{error}");
    }
    registration.deregister().await.expect("it answers");
}
