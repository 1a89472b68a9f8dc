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
    server::pb::{EchoRequest, echo_client::EchoClient},
    view::{self, View, value},
};
use switchboard::{
    ConnectionManager, Error, EtcdRegistry, Kind, Session,
    discover::{Change, Update},
    endpoint::Target as _,
    registry::RegistrationState,
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
