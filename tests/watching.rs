//! What a manager tells of its connections: watches, channels, events, status.

mod support;

use std::{collections::BTreeMap, time::Duration};

use futures_util::{FutureExt as _, StreamExt as _};
use support::{
    eventually, eventually_async,
    server::{
        EchoServer,
        pb::{EchoRequest, echo_client::EchoClient},
    },
    subscriber::OnEvent,
};
use switchboard::{
    Backoff, Channel, ConnectionManager, Error, Kind, MemoryRegistry, Registration, Session,
    events::{EventKind, Events},
    manager::{Connectivity, InstanceChange, Watch},
    pool::PoolConfig,
};
use tokio::time::timeout;
use tonic::Status;

async fn call(channel: &Channel) -> Result<String, Status> {
    let request = EchoRequest::default();
    let answer = EchoClient::new(channel.clone()).unary(request).await?;
    Ok(answer.into_inner().server)
}

fn session(server: &EchoServer) -> Session {
    Session::new("echo", server.address()).with_id(&*server.id)
}

async fn register(registry: &MemoryRegistry, server: &EchoServer) -> Registration {
    registry.register(session(server)).await.unwrap()
}

/// Fails twice within 30 ms, and is probed every 100 ms then.
fn quick() -> PoolConfig {
    let backoff = Backoff::constant(Duration::from_millis(10), 0.0).unwrap();
    let probe = Backoff::constant(Duration::from_millis(100), 0.0).unwrap();
    let config = PoolConfig::default().attempts(2).unwrap();
    config.backoff(backoff).probe(Some(probe))
}

fn managed(registry: &MemoryRegistry) -> ConnectionManager {
    let builder = ConnectionManager::builder(registry.clone());
    builder.pools(quick()).build()
}

/// The next change, as its words without what differs from run to run.
async fn next(watch: &mut Watch) -> String {
    let change = timeout(Duration::from_secs(10), watch.next()).await;
    let change = change.expect("a change in time").expect("no end");
    match change.instance() {
        Some(instance) => {
            let text = change.to_string();
            let name = format!("{}: ", instance.peer());
            let what = text.strip_prefix(&name).expect("a name, and what");
            format!("{} {what}", instance.id())
        }
        None => change.to_string(),
    }
}

/// The names of events up to this one.
async fn until(events: &mut Events, id: &str, name: &str) -> Vec<String> {
    let mut seen = Vec::new();
    loop {
        let event = timeout(Duration::from_secs(10), events.next()).await;
        let event = event
            .unwrap_or_else(|_| panic!("{name} of {id} never came after {seen:?}"))
            .expect("no end");
        let of = event.peer().map_or("-", |peer| &*peer.id).to_owned();
        seen.push(format!("{of} {}", event.kind.name()));
        if of == id && event.kind.name() == name {
            return seen;
        }
    }
}

#[tokio::test]
async fn a_watch_starts_with_what_is_there_and_tells_what_becomes_of_it() {
    let registry = MemoryRegistry::new();
    let mut a = EchoServer::start("a");
    let mut of_a = register(&registry, &a).await;
    let manager = managed(&registry);
    assert_eq!(call(&manager.channel("echo")).await.unwrap(), "a");

    // What is there is told at once, without waiting.
    let mut watch = manager.watch("echo");
    for expected in ["a added", "a ready", "synced"] {
        let change = next(&mut watch).now_or_never();
        assert_eq!(change.as_deref(), Some(expected));
    }
    assert!(watch.next().now_or_never().is_none(), "nothing happened");

    of_a.update(|session| session.with_metadata("zone", "b"))
        .await
        .unwrap();
    let updated = watch.next().await.unwrap();
    let InstanceChange::Updated(instance) = &updated else {
        panic!("{updated}");
    };
    assert_eq!(instance.session().metadata()["zone"], "b");
    assert_eq!(call(instance.channel()).await.unwrap(), "a");

    // Killed with its session alive.
    a.killed().await;
    // Lost and tried again are told too, unless they were over before anybody looked.
    let mut seen = vec![next(&mut watch).await];
    while seen.last().unwrap() != "a offline: connection refused" {
        seen.push(next(&mut watch).await);
    }
    assert!(seen.iter().all(|what| what.starts_with("a ")), "{seen:?}");

    // It listens again: found by the slow probe.
    let a = EchoServer::start_at("a", a.address);
    while next(&mut watch).await != "a ready" {}
    of_a.stopping().await.unwrap();
    assert_eq!(next(&mut watch).await, "a stopping");
    of_a.deregister().await.unwrap();
    assert_eq!(next(&mut watch).await, "a removed");

    // Another one, and the same id again, which is another generation.
    let _of_a = register(&registry, &a).await;
    assert_eq!(next(&mut watch).await, "a added");
    assert_eq!(next(&mut watch).await, "a ready");
    manager.stop().await;
    assert_eq!(next(&mut watch).await, "a removed");
    let end = watch.next().await.expect("its last word");
    let InstanceChange::Ended(why) = end else {
        panic!("{end}");
    };
    assert_eq!(why.kind(), Kind::Stopped);
    assert!(watch.next().await.is_none());
}

#[tokio::test]
async fn a_reader_that_does_not_read_holds_up_nobody_and_ends_with_what_is_there() {
    let registry = MemoryRegistry::new();
    let server = EchoServer::start("a");
    let _of_a = register(&registry, &server).await;
    let manager = managed(&registry);
    let mut slow = manager.watch("echo");
    let mut quick = manager.watch("echo");
    while next(&mut quick).await != "synced" {}

    // Nobody listens at these: they come, and most go.
    let mut left = Vec::new();
    for n in 0..200 {
        let dead = format!("127.0.0.1:{}", 1 + n);
        let session = Session::new("echo", dead).with_id(n);
        let registration = registry.register(session).await.unwrap();
        match n % 10 {
            0 => left.push((n.to_string(), registration)),
            _ => registration.deregister().await.unwrap(),
        }
    }
    assert_eq!(call(&manager.channel("echo").to("a")).await.unwrap(), "a");
    let known = || manager.channels("echo").unwrap();
    eventually("all are known", || known().len() == 21).await;
    eventually("all are offline", || {
        let offline = |i: &switchboard::manager::Instance| i.state() == Connectivity::Offline;
        known().iter().filter(|i| offline(i)).count() == 20
    })
    .await;

    let mut there = BTreeMap::new();
    let mut told = 0;
    while let Some(Some(change)) = slow.next().now_or_never() {
        told += 1;
        match change {
            InstanceChange::Removed(instance) => drop(there.remove(instance.id())),
            change => {
                if let Some(instance) = change.instance() {
                    there.insert(instance.id().to_owned(), instance.state());
                }
            }
        }
    }
    let known: BTreeMap<_, _> = known()
        .iter()
        .map(|i| (i.id().to_owned(), i.state()))
        .collect();
    assert_eq!(there, known);
    assert!(
        told < 100,
        "it was told of {told} changes, and not of all 380"
    );
}

#[tokio::test]
async fn every_instance_comes_with_a_channel_of_its_own() {
    let registry = MemoryRegistry::new();
    let servers = ["a", "b", "c"].map(EchoServer::start);
    let mut registrations = Vec::new();
    for server in &servers {
        registrations.push(register(&registry, server).await);
    }
    let manager = managed(&registry);
    // Of a role that nobody asked for nothing is known yet; it is looked for from here on.
    assert!(manager.channels("echo").unwrap().is_empty());
    let ready = manager.ready("echo", 3, Duration::from_secs(5)).await;
    let ids: Vec<_> = ready.unwrap().iter().map(|i| i.id().to_owned()).collect();
    assert_eq!(ids, ["a", "b", "c"]);
    for instance in manager.channels("echo").unwrap() {
        assert!(instance.is_ready(), "{instance}");
        assert_eq!(call(instance.channel()).await.unwrap(), instance.id());
        assert_eq!(instance.address(), instance.session().address());
        assert!(instance.generation() > 0);
    }
    let error = manager.channels("no spaces").unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid);
}

#[tokio::test]
async fn whoever_waits_for_enough_hears_what_is_missing() {
    let registry = MemoryRegistry::new();
    let manager = managed(&registry);
    let soon = Duration::from_millis(50);
    let error = manager.ready("echo", 2, soon).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NoSession);
    assert_eq!(
        error.to_string(),
        "no session of role echo is registered: 2 are wanted after 50ms"
    );

    let server = EchoServer::start("a");
    let _of_a = register(&registry, &server).await;
    let dead = Session::new("echo", "127.0.0.1:1").with_id("dead");
    let dead = registry.register(dead).await.unwrap();
    eventually("it is offline", || {
        let known = manager.channels("echo").unwrap();
        known.len() == 2 && known[1].state() == Connectivity::Offline
    })
    .await;
    let error = manager.ready("echo", 2, soon).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotConnected);
    let text = error.to_string();
    let expected = "role echo: 1 of 2 known are ready after 50ms, 2 are wanted: 127.0.0.1:1 (id dead) connection refused (";
    assert!(text.starts_with(expected), "{text}");

    // It waits for as long as it may, and not longer than it has to.
    let later = EchoServer::start("b");
    let (ready, registration) =
        tokio::join!(manager.ready("echo", 2, Duration::from_secs(10)), async {
            tokio::time::sleep(soon).await;
            register(&registry, &later).await
        });
    let ids: Vec<_> = ready.unwrap().iter().map(|i| i.id().to_owned()).collect();
    assert_eq!(ids, ["a", "b"]);
    drop((registration, dead));

    let away = MemoryRegistry::new();
    away.set_available(false);
    let elsewhere = managed(&away);
    let error = elsewhere.ready("echo", 1, soon).await.unwrap_err();
    assert_eq!(error.kind(), Kind::RegistryUnreachable, "{error}");
    assert_eq!(
        manager
            .ready("no spaces", 1, soon)
            .await
            .unwrap_err()
            .kind(),
        Kind::Invalid
    );
}

#[tokio::test]
async fn events_tell_the_life_of_a_connection_in_order() {
    let registry = MemoryRegistry::new();
    let mut a = EchoServer::start("a");
    let of_a = register(&registry, &a).await;
    let manager = managed(&registry);
    let mut events = manager.events();
    manager.depends_on("echo").unwrap();
    assert_eq!(
        until(&mut events, "a", "connected").await,
        [
            "- watching",
            "a added",
            "- registry_fresh",
            "a connecting",
            "a connected"
        ]
    );
    a.killed().await;
    let seen = until(&mut events, "a", "offline").await;
    assert_eq!(
        seen,
        ["a lost", "a connecting", "a attempt_failed", "a offline"]
    );
    let a = EchoServer::start_at("a", a.address);
    let seen = until(&mut events, "a", "restored").await;
    let (last, before) = seen.split_last().unwrap();
    assert_eq!(last, "a restored");
    assert!(before.iter().all(|e| e == "a attempt_failed"), "{seen:?}");

    registry.set_available(false);
    assert_eq!(until(&mut events, "-", "registry_stale").await.len(), 1);
    registry.set_available(true);
    assert_eq!(until(&mut events, "-", "registry_fresh").await.len(), 1);
    of_a.deregister().await.unwrap();
    assert_eq!(until(&mut events, "a", "removed").await, ["a removed"]);
    drop(a);

    assert!(manager.release("echo").unwrap());
    let seen = until(&mut events, "-", "released").await;
    assert_eq!(seen, ["- released"]);
    manager.stop().await;
    let last = events.next().await.expect("one more");
    assert!(matches!(last.kind, EventKind::Stopped), "{last}");
    assert!(events.next().await.is_none());
}

#[tokio::test]
async fn a_reader_of_events_that_is_too_slow_hears_how_many_it_has_missed() {
    let registry = MemoryRegistry::new();
    let manager = managed(&registry);
    let mut events = manager.events();
    manager.depends_on("echo").unwrap();
    for n in 0..600 {
        let session = Session::new("echo", "127.0.0.1:1").with_id(n);
        let registration = registry.register(session).await.unwrap();
        registration.deregister().await.unwrap();
    }
    eventually("all have come and gone", || {
        manager.channels("echo").unwrap().is_empty()
    })
    .await;
    let first = events.next().await.unwrap();
    let EventKind::Missed { events: missed } = first.kind else {
        panic!("{first}");
    };
    assert!(missed > 100, "{missed}");
    let mut left = 0;
    while timeout(Duration::from_millis(200), events.next())
        .await
        .is_ok()
    {
        left += 1;
    }
    assert_eq!(left, 1024);
}

#[tokio::test]
async fn a_status_is_written_for_programs_too() {
    let registry = MemoryRegistry::new();
    let a = EchoServer::start("a");
    let with = session(&a).with_version("2.6").with_metadata("zone", "b");
    let _of_a = registry.register(with).await.unwrap();
    let dead = Session::new("echo", "127.0.0.1:1").with_id("dead");
    let _dead = registry.register(dead).await.unwrap();
    let manager = managed(&registry);
    call(&manager.channel("echo").to("a")).await.unwrap();
    let status = || serde_json::to_value(manager.status()).unwrap();
    eventually("one is offline", || {
        status()["roles"][0]["instances"][1]["state"] == "offline"
    })
    .await;
    let status = status();
    println!("{status:#}");
    assert_eq!(status["stopped"], false);
    let role = &status["roles"][0];
    assert_eq!((&role["role"], &role["ready"]), (&"echo".into(), &1.into()));
    assert_eq!(role["registry"]["state"], "fresh");
    let a = &role["instances"][0];
    assert_eq!((&a["id"], &a["state"]), (&"a".into(), &"ready".into()));
    assert_eq!(
        (&a["version"], &a["metadata"]["zone"]),
        (&"2.6".into(), &"b".into())
    );
    assert!(a["since_ms"].as_u64().unwrap() > 1_700_000_000_000);
    assert!(a["generation"].as_u64().unwrap() > 0);
    assert!(a["last_error"].is_null());
    let dead = &role["instances"][1];
    assert!(dead["attempts"].as_u64().unwrap() >= 2);
    assert!(dead["last_error"].as_str().unwrap().contains("refused"));
}

#[tokio::test]
async fn a_manager_may_be_dropped_by_whoever_reads_its_own_watch() {
    let registry = MemoryRegistry::new();
    let server = EchoServer::start("a");
    let _of_a = register(&registry, &server).await;
    let before = support::tasks();
    let manager = managed(&registry);
    let mut watch = manager.watch("echo");
    let mut events = manager.events();
    let mut holder = Some(manager);
    let mut kept = None;
    let mut end = None;
    while let Some(change) = watch.next().await {
        match change {
            InstanceChange::Ready(instance) => {
                // All that there is of the manager goes here; what it gave lives on.
                drop(holder.take());
                kept = Some(instance);
                let kept = kept.as_ref().unwrap();
                assert_eq!(call(kept.channel()).await.unwrap(), "a");
            }
            InstanceChange::Synced if holder.is_none() => drop(kept.take()),
            InstanceChange::Ended(why) => end = Some(why),
            _ => {}
        }
        // The order of the two above is not fixed.
        if holder.is_none() {
            kept = None;
        }
    }
    let end: std::sync::Arc<Error> = end.expect("it says why it ended");
    assert_eq!(end.kind(), Kind::Stopped);
    assert!(end.to_string().contains("nobody holds it"), "{end}");
    eventually("all tasks are gone", || support::tasks() == before).await;
    eventually_async("its socket is gone", || async {
        support::sockets_to(server.address.port()) == 0
    })
    .await;
    while let Some(event) = events.next().await {
        if let EventKind::Stopped = event.kind {
            return;
        }
    }
    panic!("the events end without a last word");
}

#[tokio::test]
async fn events_that_have_ended_may_be_asked_again() {
    let manager = managed(&MemoryRegistry::new());
    let mut events = manager.events();
    manager.stop().await;
    let last = events.next().await.expect("a last word");
    assert!(matches!(last.kind, EventKind::Stopped));
    for _ in 0..3 {
        assert!(events.next().await.is_none());
    }
}

#[tokio::test]
async fn whoever_listens_may_ask_the_manager() {
    let manager = managed(&MemoryRegistry::new());
    // In a thread of its own, which may hang.
    let (done, wait) = tokio::sync::oneshot::channel();
    let runtime = tokio::runtime::Handle::current();
    std::thread::spawn(move || {
        let _entered = runtime.enter();
        let asked = manager.clone();
        let asking = OnEvent(move |_: &tracing::Event<'_>| drop(asked.status()));
        tracing::subscriber::with_default(asking, || {
            manager.depends_on("echo").unwrap();
            assert!(manager.release("echo").unwrap());
            let _ = manager.stop().now_or_never();
        });
        done.send(()).unwrap();
    });
    let done = timeout(Duration::from_secs(10), wait).await;
    done.expect("it does not hang").unwrap();
}

#[test]
fn whoever_waits_for_enough_need_not_be_in_a_runtime() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let manager = managed(&MemoryRegistry::new());
    runtime.block_on(async { manager.depends_on("echo").unwrap() });
    let ready = manager.ready("echo", 1, Duration::from_millis(50));
    let error = outside(ready).unwrap_err();
    assert_eq!(error.kind(), Kind::NoSession, "{error}");
}

/// Runs a future outside of any runtime.
fn outside<F: std::future::Future>(future: F) -> F::Output {
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = std::sync::Arc::new(Unpark(std::thread::current())).into();
    let mut cx = std::task::Context::from_waker(&waker);
    let mut future = std::pin::pin!(future);
    loop {
        if let std::task::Poll::Ready(output) = future.as_mut().poll(&mut cx) {
            return output;
        }
        std::thread::park();
    }
}

#[tokio::test]
async fn a_watch_that_is_not_read_on_keeps_nothing_alive() {
    let registry = MemoryRegistry::new();
    let server = EchoServer::start("a");
    let _of_a = register(&registry, &server).await;
    let manager = managed(&registry);
    let within = Duration::from_secs(5);
    drop(manager.ready("echo", 1, within).await.unwrap());
    // That it is ready is told next.
    let mut watch = manager.watch("echo");
    assert_eq!(next(&mut watch).await, "a added");
    drop(manager);
    eventually_async("its socket is gone", || async {
        support::sockets_to(server.address.port()) == 0
    })
    .await;
    assert_eq!(next(&mut watch).await, "a ready");
    assert_eq!(next(&mut watch).await, "synced");
    assert_eq!(next(&mut watch).await, "a removed");
}

#[test]
fn of_many_who_ask_for_a_role_at_once_one_begins_it() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let _entered = runtime.enter();
    for _ in 0..50 {
        let manager = managed(&MemoryRegistry::new());
        let mut events = manager.events();
        let start = std::sync::Barrier::new(8);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                let runtime = runtime.handle();
                scope.spawn(|| {
                    let _entered = runtime.enter();
                    start.wait();
                    manager.depends_on("echo").unwrap();
                });
            }
        });
        let watched = runtime.block_on(async {
            let within = Duration::from_millis(1);
            manager.ready("echo", 1, within).await.unwrap_err();
            manager.stop().await;
            let events: Vec<_> = events.by_ref().collect().await;
            let mut names = events.iter().map(|event| event.kind.name());
            names.by_ref().filter(|name| *name == "watching").count()
        });
        assert_eq!(watched, 1);
    }
}
