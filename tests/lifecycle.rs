//! How roles and managers come to an end: released, idle, stopped at once or gracefully; and that nothing is left.

mod support;

use std::{
    sync::atomic::Ordering::SeqCst,
    time::{Duration, Instant},
};

use futures_util::{FutureExt as _, StreamExt as _};
use support::{
    eventually,
    server::{
        EchoServer,
        pb::{EchoRequest, echo_client::EchoClient},
    },
    sockets_to, tasks,
};
use switchboard::{
    Channel, ConnectionManager, Error, Kind, MemoryRegistry, Registration, Session, WaitForReady,
    events::EventKind,
    manager::{Connectivity, InstanceChange},
};
use tokio::time::{sleep, timeout};
use tonic::{Code, Request, Status};

async fn call(channel: &Channel, delay_ms: u32) -> Result<String, Status> {
    let request = EchoRequest {
        delay_ms,
        ..EchoRequest::default()
    };
    let answer = EchoClient::new(channel.clone()).unary(request).await?;
    Ok(answer.into_inner().server)
}

async fn served(registry: &MemoryRegistry, id: &str) -> (EchoServer, Registration) {
    let server = EchoServer::start(id);
    let session = Session::new("echo", server.address()).with_id(id);
    let registration = registry.register(session).await.unwrap();
    (server, registration)
}

/// Calls in flight that take this long.
async fn in_flight(
    channel: &Channel,
    server: &EchoServer,
    n: usize,
    delay_ms: u32,
) -> Vec<tokio::task::JoinHandle<Result<String, Status>>> {
    let before = server.seen.started.load(SeqCst);
    let calls = (0..n).map(|_| {
        let channel = channel.clone();
        tokio::spawn(async move { call(&channel, delay_ms).await })
    });
    let calls = calls.collect();
    eventually("all are in flight", || {
        server.seen.started.load(SeqCst) == before + n
    })
    .await;
    calls
}

fn kind_of(status: &Status) -> Option<Kind> {
    Error::of(status).map(Error::kind)
}

#[tokio::test]
async fn a_role_that_is_released_finishes_its_calls_and_begins_anew_when_asked_for() {
    let registry = MemoryRegistry::new();
    let (server, _held) = served(&registry, "a").await;
    let before = tasks();
    let manager = ConnectionManager::builder(registry).build();
    assert!(!manager.release("echo").unwrap(), "nobody asked for it yet");
    let channel = manager.channel("echo");
    call(&channel, 0).await.unwrap();
    let mut watch = manager.watch("echo");
    let calls = in_flight(&channel, &server, 20, 300).await;

    assert!(manager.release("echo").unwrap());
    assert!(!manager.release("echo").unwrap(), "it is gone already");
    assert!(manager.status().roles.is_empty());
    let mut end = None;
    while let Some(change) = watch.next().await {
        if let InstanceChange::Ended(why) = change {
            end = Some(why.to_string());
        }
    }
    let released = "stopped, role echo: the role was released";
    assert_eq!(end.as_deref(), Some(released));
    let status = call(&channel, 0).await.unwrap_err();
    assert_eq!(kind_of(&status), Some(Kind::Stopped));
    assert_eq!(status.message(), released);

    // A new pool beside the old one, which is still at work.
    let anew = manager.channel("echo");
    assert_eq!(call(&anew, 0).await.unwrap(), "a");
    assert_eq!(sockets_to(server.address.port()), 2);
    for call in calls {
        assert_eq!(call.await.unwrap().unwrap(), "a");
    }
    eventually("the old connection is closed", || {
        sockets_to(server.address.port()) == 1
    })
    .await;
    // One that is being released ends with the manager.
    let calls = in_flight(&anew, &server, 20, 60_000).await;
    manager.release("echo").unwrap();
    manager.stop().await;
    for call in calls {
        assert_eq!(call.await.unwrap().unwrap_err().code(), Code::Cancelled);
    }
    drop((manager, channel, anew, watch));
    eventually("no task is left", || tasks() == before).await;
    assert_eq!(sockets_to(server.address.port()), 0);
}

#[tokio::test]
async fn a_role_that_nobody_uses_lets_go_of_its_connections_until_somebody_does() {
    let registry = MemoryRegistry::new();
    let (server, _held) = served(&registry, "a").await;
    let quiet = Duration::from_secs(1);
    let builder = ConnectionManager::builder(registry.clone());
    let manager = builder.idle_after(Some(quiet)).unwrap().build();
    let mut events = manager.events();
    let channel = manager.channel("echo");
    let is_idle = || manager.status().roles[0].idle;
    let sockets = || sockets_to(server.address.port());

    // In use, if only by a call now and then, it stays, and so it does while a call is in flight.
    let began = Instant::now();
    while began.elapsed() < quiet * 2 {
        call(&channel, 0).await.unwrap();
        sleep(Duration::from_millis(100)).await;
        assert!(!is_idle());
    }
    call(&channel, 1_800).await.unwrap();
    assert!(!is_idle(), "it had a call in flight");

    // To hold a channel is not to use it.
    let last = Instant::now();
    eventually("it is idle", is_idle).await;
    let took = last.elapsed();
    assert!(took > quiet * 3 / 4 && took < quiet * 2, "after {took:?}");
    eventually("its connection is closed", || sockets() == 0).await;
    let known = manager.status().roles[0].endpoints[0].state;
    assert_eq!(known, Connectivity::Idle);

    // A call that does not wait for anything else waits for this.
    for _ in 0..3 {
        assert_eq!(call(&channel, 0).await.unwrap(), "a");
    }
    assert_eq!(sockets(), 1);
    eventually("it is idle again", is_idle).await;
    // Many at once wake it once, and each is answered.
    let calls = (0..100).map(|_| call(&channel, 0));
    for answer in futures_util::future::join_all(calls).await {
        assert_eq!(answer.unwrap(), "a");
    }
    assert_eq!(sockets(), 1);

    // Whoever watches it, waits for it or depends on it uses it.
    let watch = manager.watch("echo");
    sleep(quiet * 2).await;
    assert!(!is_idle(), "it is watched");
    drop(watch);
    eventually("it is idle once more", is_idle).await;
    let mut request = Request::new(EchoRequest::default());
    request.extensions_mut().insert(WaitForReady(true));
    call(&channel, 0).await.unwrap();
    let nobody = channel.to("nobody");
    let waiting = tokio::spawn(async move { EchoClient::new(nobody).unary(request).await });
    sleep(quiet * 2).await;
    assert!(!is_idle(), "a call waits");
    waiting.abort();
    eventually("it is idle for the last time", is_idle).await;
    manager.depends_on("echo").unwrap();
    eventually("it is connected", || sockets() == 1).await;
    sleep(quiet * 2).await;
    assert!(!is_idle(), "it is depended on");

    let mut names = Vec::new();
    while let Some(Some(event)) = events.next().now_or_never() {
        if matches!(event.kind, EventKind::Idle | EventKind::Woken) {
            names.push(event.kind.name());
        }
    }
    assert_eq!(names, ["idle", "woken"].repeat(4));
}

#[tokio::test]
async fn a_graceful_stop_refuses_at_once_and_lets_calls_in_flight_finish() {
    let registry = MemoryRegistry::new();
    let (server, _held) = served(&registry, "a").await;
    let before = tasks();
    let manager = ConnectionManager::builder(registry).build();
    let channel = manager.channel("echo");
    call(&channel, 0).await.unwrap();
    let calls = in_flight(&channel, &server, 100, 400).await;
    let mut patient = Request::new(EchoRequest::default());
    patient.extensions_mut().insert(WaitForReady(true));
    let nobody = channel.to("nobody");
    let waiting = tokio::spawn(async move { EchoClient::new(nobody).unary(patient).await });
    sleep(Duration::from_millis(20)).await;

    let began = Instant::now();
    let grace = Duration::from_secs(10);
    let stopping = tokio::spawn({
        let manager = manager.clone();
        async move { manager.stop_gracefully(grace).await }
    });
    eventually("it is stopping", || manager.is_stopped()).await;
    let waited = waiting.await.unwrap().unwrap_err();
    assert_eq!(kind_of(&waited), Some(Kind::Stopped), "{waited}");
    let status = timeout(Duration::from_millis(200), call(&channel, 0)).await;
    assert_eq!(kind_of(&status.unwrap().unwrap_err()), Some(Kind::Stopped));
    for call in calls {
        assert_eq!(call.await.unwrap().unwrap(), "a");
    }
    stopping.await.unwrap();
    let took = began.elapsed();
    assert!(took < Duration::from_secs(2), "it took {took:?}");
    drop((manager, channel));
    eventually("no task is left", || tasks() == before).await;
    assert_eq!(sockets_to(server.address.port()), 0);
}

#[tokio::test]
async fn what_is_not_done_within_the_grace_is_cancelled_and_a_stop_shortens_it() {
    let registry = MemoryRegistry::new();
    let (server, _held) = served(&registry, "a").await;
    for (grace, stop_after) in [
        (Duration::from_millis(200), None),
        (Duration::from_secs(60), Some(Duration::from_millis(200))),
    ] {
        let manager = ConnectionManager::builder(registry.clone()).build();
        let channel = manager.channel("echo");
        call(&channel, 0).await.unwrap();
        let calls = in_flight(&channel, &server, 20, 60_000).await;
        let began = Instant::now();
        let graceful = manager.stop_gracefully(grace);
        let at_once = async {
            if let Some(after) = stop_after {
                sleep(after).await;
                manager.stop().await;
            }
        };
        tokio::join!(graceful, at_once);
        let took = began.elapsed();
        let bounds = Duration::from_millis(200)..Duration::from_millis(1_000);
        assert!(bounds.contains(&took), "it took {took:?}");
        for call in calls {
            let status = call.await.unwrap().unwrap_err();
            assert_eq!(status.code(), Code::Cancelled, "{status}");
            assert_eq!(kind_of(&status), Some(Kind::Stopped));
        }
    }
}

#[tokio::test]
async fn after_the_stop_every_method_says_so() {
    let registry = MemoryRegistry::new();
    let (_server, _held) = served(&registry, "a").await;
    let manager = ConnectionManager::builder(registry).build();
    let held = manager.channel("echo");
    call(&held, 0).await.unwrap();
    let mut events = manager.events();
    let mut watch = manager.watch("echo");
    manager.stop().await;

    let stopped = |error: Error| {
        assert_eq!(error.kind(), Kind::Stopped, "{error}");
        assert_eq!(error.code(), Code::Cancelled);
    };
    for role in ["echo", "another"] {
        stopped(manager.try_channel(role).unwrap_err());
        stopped(manager.depends_on(role).unwrap_err());
        stopped(manager.release(role).unwrap_err());
        stopped(manager.channels(role).unwrap_err());
        let long = Duration::from_secs(60);
        let ready = timeout(Duration::from_secs(1), manager.ready(role, 1, long)).await;
        stopped(ready.expect("at once").unwrap_err());
        let status = call(&manager.channel(role), 0).await.unwrap_err();
        assert_eq!(kind_of(&status), Some(Kind::Stopped), "{status}");
        let mut watch = manager.watch(role);
        let InstanceChange::Ended(why) = watch.next().await.unwrap() else {
            panic!("it begins with something else");
        };
        assert_eq!(why.kind(), Kind::Stopped);
        assert!(watch.next().await.is_none());
    }
    for channel in [held.clone(), held.to("a")] {
        let status = call(&channel, 0).await.unwrap_err();
        assert_eq!(kind_of(&status), Some(Kind::Stopped), "{status}");
    }
    // Those that were there end with the word.
    let mut last = None;
    while let Some(change) = watch.next().await {
        last = Some(change);
    }
    assert!(matches!(last, Some(InstanceChange::Ended(_))), "{last:?}");
    let mut last = None;
    while let Some(event) = events.next().await {
        last = Some(event.kind);
    }
    assert!(matches!(last, Some(EventKind::Stopped)), "{last:?}");
    let mut late = manager.events();
    assert!(matches!(
        late.next().await.map(|event| event.kind),
        Some(EventKind::Stopped)
    ));
    assert!(late.next().await.is_none());

    assert!(manager.is_stopped() && manager.clone().is_stopped());
    let status = manager.status();
    assert!(status.stopped);
    assert!(status.to_string().starts_with("stopped\n"), "{status}");
    let again = async {
        manager.stop().await;
        manager.stop_gracefully(Duration::from_secs(60)).await;
    };
    timeout(Duration::from_secs(1), again)
        .await
        .expect("at once");
}

#[tokio::test]
async fn while_a_role_drains_a_session_that_is_deleted_still_ends_its_calls() {
    for released in [false, true] {
        let registry = MemoryRegistry::new();
        let (a, of_a) = served(&registry, "a").await;
        let (b, _of_b) = served(&registry, "b").await;
        let manager = ConnectionManager::builder(registry).build();
        let channel = manager.channel("echo");
        manager
            .ready("echo", 2, Duration::from_secs(5))
            .await
            .unwrap();
        let to_a = in_flight(&channel.to("a"), &a, 5, 60_000).await;
        let to_b = in_flight(&channel.to("b"), &b, 5, 700).await;
        let began = Instant::now();
        let ending = tokio::spawn({
            let manager = manager.clone();
            async move {
                match released {
                    true => drop(manager.release("echo").unwrap()),
                    false => manager.stop_gracefully(Duration::from_secs(60)).await,
                }
            }
        });
        sleep(Duration::from_millis(50)).await;
        of_a.deregister().await.unwrap();
        for call in to_a {
            let status = call.await.unwrap().unwrap_err();
            assert_eq!(kind_of(&status), Some(Kind::SessionDeleted), "{status}");
        }
        assert!(began.elapsed() < Duration::from_millis(600));
        for call in to_b {
            assert_eq!(call.await.unwrap().unwrap(), "b");
        }
        ending.await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(3));
    }
}

/// On one thread, which the caller would not give back: and the session could not be seen.
#[tokio::test]
async fn whoever_calls_again_as_soon_as_it_fails_does_not_keep_itself_from_being_answered() {
    let registry = MemoryRegistry::new();
    let manager = ConnectionManager::builder(registry.clone()).build();
    let channel = manager.channel("echo");
    call(&channel, 0).await.unwrap_err();
    let calling = tokio::spawn(async move {
        loop {
            if let Ok(server) = call(&channel, 0).await {
                return server;
            }
        }
    });
    let (_server, _held) = served(&registry, "a").await;
    let answer = timeout(Duration::from_secs(10), calling).await;
    assert_eq!(answer.expect("in time").unwrap(), "a");
    manager.stop().await;
    // The same of a channel that can never work.
    let broken = manager.channel("echo");
    let calling = tokio::spawn(async move {
        loop {
            let _ = call(&broken, 0).await;
        }
    });
    sleep(Duration::from_millis(50)).await;
    calling.abort();
}

#[tokio::test]
async fn a_grace_without_end_is_one_and_lets_calls_finish() {
    let registry = MemoryRegistry::new();
    let (server, _held) = served(&registry, "a").await;
    let manager = ConnectionManager::builder(registry).build();
    let channel = manager.channel("echo");
    call(&channel, 0).await.unwrap();
    let calls = in_flight(&channel, &server, 10, 200).await;
    let stop = manager.stop_gracefully(Duration::MAX);
    timeout(Duration::from_secs(5), stop).await.unwrap();
    for call in calls {
        assert_eq!(call.await.unwrap().unwrap(), "a");
    }
}

#[tokio::test]
async fn whoever_says_that_it_is_stopping_while_its_role_is_idle_is_told_so() {
    let registry = MemoryRegistry::new();
    let (_server, mut held) = served(&registry, "a").await;
    let builder = ConnectionManager::builder(registry.clone());
    let quiet = Some(Duration::from_secs(1));
    let manager = builder.idle_after(quiet).unwrap().build();
    let mut events = manager.events();
    let _channel = manager.channel("echo");
    eventually("it is idle", || manager.status().roles[0].idle).await;
    held.stopping().await.unwrap();
    let told = async {
        let mut told = Vec::new();
        while !told.contains(&"stopping") {
            told.push(events.next().await.expect("no end").kind.name());
        }
        told
    };
    let told = timeout(Duration::from_secs(5), told)
        .await
        .expect("it is told");
    assert!(!told.contains(&"updated"), "{told:?}");
}

#[tokio::test]
async fn what_a_session_left_behind_where_it_was_ends_with_it() {
    let registry = MemoryRegistry::new();
    let (old, mut of_it) = served(&registry, "a").await;
    let new = EchoServer::start("a");
    let manager = ConnectionManager::builder(registry).build();
    let channel = manager.channel("echo");
    call(&channel, 0).await.unwrap();
    let calls = in_flight(&channel, &old, 5, 60_000).await;
    let to = new.address();
    let moved = of_it.update(|session| session.with_address(to));
    moved.await.unwrap();
    eventually("it is connected where it is now", || {
        sockets_to(new.address.port()) == 1
    })
    .await;
    assert_eq!(sockets_to(old.address.port()), 1, "its calls go on");
    of_it.deregister().await.unwrap();
    for call in calls {
        let status = timeout(Duration::from_secs(1), call).await;
        let status = status.expect("at once").unwrap().unwrap_err();
        assert_eq!(kind_of(&status), Some(Kind::SessionDeleted), "{status}");
    }
}

#[test]
fn a_stop_is_bounded_also_where_nobody_drives_the_managers_runtime() {
    let build = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    };
    let (its, other) = (build(), build());
    let manager = ConnectionManager::builder(MemoryRegistry::new()).build();
    its.block_on(async { manager.depends_on("echo").unwrap() });
    let began = Instant::now();
    other.block_on(manager.stop());
    let took = began.elapsed();
    assert!(took < Duration::from_secs(4), "{took:?}");
    assert!(manager.is_stopped());
}
