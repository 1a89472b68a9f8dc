//! What went wrong in real systems, over a real etcd, real servers and real sockets.
//!
//! The bounds are those that a user may count on, for a slow machine; they are not what is measured.

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use support::{
    etcd::Etcd,
    eventually, eventually_async,
    load::Load,
    proxy::{Blackhole, Mode, Proxy},
    server::{
        EchoServer,
        pb::{EchoRequest, echo_client::EchoClient},
    },
    sockets_to, tasks,
};
use switchboard::{
    Backoff, Channel, ConnectionManager, Error, EtcdRegistry, Kind, RetryPolicy, Session,
    WaitForReady, manager::Connectivity, pool::PoolConfig, transport::Connector,
};
use tokio::time;
use tonic::{Code, Request, Status};

async fn registry(etcd: &Etcd) -> EtcdRegistry {
    EtcdRegistry::connect([etcd.endpoint()], "test")
        .await
        .unwrap()
}

fn session(id: &str, address: &str) -> Session {
    Session::new("echo", address).with_id(id)
}

fn request(delay_ms: u32) -> EchoRequest {
    EchoRequest {
        message: "hello".to_owned(),
        delay_ms,
        ..EchoRequest::default()
    }
}

async fn call(channel: &Channel, delay_ms: u32) -> Result<String, Status> {
    let answer = EchoClient::new(channel.clone())
        .unary(request(delay_ms))
        .await?;
    Ok(answer.into_inner().server)
}

/// Milliseconds from `since` until a call succeeds; a failing call is made again.
async fn until_answered(channel: &Channel, by: &str, since: Instant) -> Duration {
    eventually_async(&format!("{by} answers"), || async {
        call(channel, 0).await.is_ok_and(|server| server == by)
    })
    .await;
    since.elapsed()
}

fn state_of(manager: &ConnectionManager, id: &str) -> Option<Connectivity> {
    let status = manager.status();
    let endpoints = &status.roles.first()?.endpoints;
    endpoints
        .iter()
        .find(|e| &*e.peer.id == id)
        .map(|e| e.state)
}

// Scenario 1.
#[tokio::test]
async fn a_session_that_moves_ten_times_is_followed_and_its_old_addresses_are_left_alone() {
    let etcd = Etcd::start().await;
    let registry = registry(&etcd).await;
    let manager = ConnectionManager::builder(registry.clone()).build();
    let channel = manager.channel("echo");
    let mut servers = Vec::new();
    let mut removed = Vec::new();
    for n in 0..10 {
        let server = EchoServer::start(&format!("at port {n}"));
        // The old servers stay up: whoever dialled them would be answered, and seen.
        let proxy = Proxy::start(server.address).await;
        let put = Instant::now();
        let registration = registry
            .register(session("q", &proxy.address()))
            .await
            .unwrap();
        servers.push(server);
        if n == 9 {
            let took = until_answered(&channel, "at port 9", put).await;
            assert!(took < Duration::from_secs(1), "found after {took:?}");
            drop(proxy);
            registration.deregister().await.unwrap();
            break;
        }
        time::sleep(Duration::from_millis(300)).await;
        registration.deregister().await.unwrap();
        removed.push((proxy, Instant::now()));
        time::sleep(Duration::from_millis(100)).await;
    }
    time::sleep(Duration::from_secs(2)).await;
    for (n, (proxy, at)) in removed.iter().enumerate() {
        let last = proxy
            .last_accepted()
            .expect("it was used while it was there");
        let late = last.saturating_duration_since(*at);
        assert!(
            late < Duration::from_millis(500),
            "address {n} was dialled {late:?} after its DELETE"
        );
    }
}

// Scenario 2.
#[tokio::test]
async fn a_deleted_session_ends_its_calls_and_is_found_again_elsewhere() {
    let etcd = Etcd::start().await;
    let registry = registry(&etcd).await;
    let manager = ConnectionManager::builder(registry.clone()).build();
    let channel = manager.channel("echo");
    let old = EchoServer::start("old");
    let registration = registry
        .register(session("q", &old.address()))
        .await
        .unwrap();
    until_answered(&channel, "old", Instant::now()).await;

    let stop = Arc::new(AtomicBool::new(false));
    let in_a_loop = tokio::spawn({
        let (channel, stop) = (channel.clone(), stop.clone());
        async move {
            let mut slowest = Duration::ZERO;
            while !stop.load(SeqCst) {
                let began = Instant::now();
                let _ = call(&channel, 0).await;
                slowest = slowest.max(began.elapsed());
                time::sleep(Duration::from_millis(1)).await;
            }
            slowest
        }
    });
    let long: Vec<_> = (0..20)
        .map(|_| {
            let channel = channel.clone();
            tokio::spawn(async move { call(&channel, 60_000).await })
        })
        .collect();
    eventually("all are there", || {
        manager.status().roles[0].endpoints[0].in_flight >= 20
    })
    .await;

    registration.deregister().await.unwrap();
    let deleted = Instant::now();
    for call in long {
        let status = call.await.unwrap().unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        let message = status.message();
        assert!(message.contains("session deleted"), "{message}");
        assert!(
            message.contains(&format!("echo q at {}", old.address())),
            "{message}"
        );
    }
    let took = deleted.elapsed();
    assert!(took < Duration::from_secs(1), "they ended after {took:?}");

    let new = EchoServer::start("new");
    let put = Instant::now();
    let _registration = registry
        .register(session("q", &new.address()))
        .await
        .unwrap();
    let took = until_answered(&channel, "new", put).await;
    assert!(took < Duration::from_secs(1), "found after {took:?}");
    stop.store(true, SeqCst);
    let slowest = in_a_loop.await.unwrap();
    assert!(slowest < Duration::from_secs(1), "a call took {slowest:?}");
}

// Scenario 3.
#[tokio::test]
async fn a_role_whose_only_session_flaps_troubles_no_other_role() {
    let etcd = Etcd::start().await;
    let registry = registry(&etcd).await;
    let manager = ConnectionManager::builder(registry.clone()).build();
    let (well, flaps) = (EchoServer::start("well"), EchoServer::start("flaps"));
    let a = Session::new("a", well.address()).with_id("well");
    let _a = registry.register(a).await.unwrap();
    let (of_a, of_b) = (manager.channel("a"), manager.channel("b"));
    until_answered(&of_a, "well", Instant::now()).await;

    // B's callers go on for the whole of it.
    let over = Arc::new(AtomicBool::new(false));
    let callers: Vec<_> = (0..4)
        .map(|_| {
            let (channel, over) = (of_b.clone(), over.clone());
            tokio::spawn(async move {
                let (mut slowest, mut failed, mut answered) = (Duration::ZERO, 0, 0);
                while !over.load(SeqCst) {
                    let began = Instant::now();
                    match call(&channel, 0).await {
                        Ok(_) => answered += 1,
                        Err(_) => {
                            failed += 1;
                            slowest = slowest.max(began.elapsed());
                        }
                    }
                    time::sleep(Duration::from_millis(1)).await;
                }
                (slowest, failed, answered)
            })
        })
        .collect();
    // By turns with and without, for the machine is not the same from one second to the next.
    let (mut alone, mut meanwhile) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        calls_take(&of_a, &mut alone, Duration::from_secs(1)).await;
        let flapping = tokio::spawn({
            let (registry, address) = (registry.clone(), flaps.address());
            async move {
                for _ in 0..5 {
                    let b = Session::new("b", &*address).with_id("flaps");
                    let registration = registry.register(b).await.unwrap();
                    time::sleep(Duration::from_millis(200)).await;
                    registration.deregister().await.unwrap();
                    time::sleep(Duration::from_millis(200)).await;
                }
            }
        });
        calls_take(&of_a, &mut meanwhile, Duration::from_secs(2)).await;
        flapping.await.unwrap();
    }
    over.store(true, SeqCst);
    let (mut failed, mut answered) = (0, 0);
    for caller in callers {
        let (slowest, f, a) = caller.await.unwrap();
        assert!(
            slowest < Duration::from_millis(100),
            "failed after {slowest:?}"
        );
        failed += f;
        answered += a;
    }
    assert!(
        failed > 100 && answered > 100,
        "{failed} failed, {answered} did not"
    );
    let p99 = |took: &mut Vec<Duration>| {
        took.sort_unstable();
        took[took.len() * 99 / 100]
    };
    let (alone, meanwhile) = (p99(&mut alone), p99(&mut meanwhile));
    println!("A's p99: {alone:?} alone, {meanwhile:?} beside B; of B's calls {failed} failed");
    // The scenario's factor, and the time slice of a machine with other tests on it.
    assert!(
        meanwhile < 2 * alone + Duration::from_millis(4),
        "{alone:?} alone, {meanwhile:?} beside B"
    );
}

// Scenario 4.
#[tokio::test]
async fn with_no_session_calls_fail_at_once_or_wait_as_they_asked_to() {
    let etcd = Etcd::start().await;
    let registry = registry(&etcd).await;
    let manager = ConnectionManager::builder(registry.clone()).build();
    let channel = manager.channel("echo");
    // The role is resolved: to nobody.
    let status = call(&channel, 0).await.unwrap_err();
    assert_eq!(status.message(), "no session of role echo is registered");

    let began = Instant::now();
    let hasty: Vec<_> = (0..100)
        .map(|_| {
            let channel = channel.clone();
            tokio::spawn(async move { call(&channel, 0).await })
        })
        .collect();
    for call in hasty {
        let status = call.await.unwrap().unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        assert_eq!(Error::of(&status).map(Error::kind), Some(Kind::NoSession));
    }
    assert!(
        began.elapsed() < Duration::from_millis(200),
        "{:?}",
        began.elapsed()
    );

    let patient = |deadline: Duration| {
        let mut request = Request::new(request(0));
        request.extensions_mut().insert(WaitForReady(true));
        request.set_timeout(deadline);
        let mut client = EchoClient::new(channel.clone());
        tokio::spawn(async move { client.unary(request).await })
    };
    let began = Instant::now();
    let status = patient(Duration::from_millis(300))
        .await
        .unwrap()
        .unwrap_err();
    let took = began.elapsed();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(
        status.message().contains("no session of role echo"),
        "{status}"
    );
    assert!((300..500).contains(&took.as_millis()), "{took:?}");

    let waiting: Vec<_> = (0..100).map(|_| patient(Duration::from_secs(20))).collect();
    time::sleep(Duration::from_millis(300)).await;
    let server = EchoServer::start("at last");
    let _registration = registry
        .register(session("q", &server.address()))
        .await
        .unwrap();
    for call in waiting {
        assert_eq!(call.await.unwrap().unwrap().get_ref().server, "at last");
    }
}

// Scenario 5.
#[tokio::test]
async fn a_call_for_one_instance_is_never_executed_by_who_took_its_address() {
    let etcd = Etcd::start().await;
    let registry = registry(&etcd).await;
    let manager = ConnectionManager::builder(registry.clone()).build();
    let channel = manager.channel("echo");
    let mut seven = EchoServer::start("7");
    let address = seven.address;
    let first = registry
        .register(session("7", &seven.address()))
        .await
        .unwrap();
    until_answered(&channel.to(7), "7", Instant::now()).await;

    // 7 dies; its session stays, its lease being alive.
    seven.kill();
    eventually("its loss is seen", || {
        state_of(&manager, "7") != Some(Connectivity::Ready)
    })
    .await;
    let eight = EchoServer::start_at("8", address);
    let put = Instant::now();
    let _second = registry
        .register(session("8", &eight.address()))
        .await
        .unwrap();
    let took = until_answered(&channel.to(8), "8", put).await;
    assert!(took < Duration::from_secs(1), "found after {took:?}");

    let executed = eight.seen.started.load(SeqCst);
    let began = Instant::now();
    let status = call(&channel.to(7), 0).await.unwrap_err();
    assert!(
        began.elapsed() < Duration::from_millis(100),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(status.code(), Code::Unavailable);
    assert!(
        status.message().contains("now belongs to instance 8"),
        "{status}"
    );
    assert_eq!(
        eight.seen.started.load(SeqCst),
        executed,
        "8 executed a call for 7"
    );
    assert_eq!(state_of(&manager, "7"), Some(Connectivity::Barred));

    // Nor when the session of 7 has gone at last, and for no longer than 7 is away.
    first.deregister().await.unwrap();
    eventually("7 is gone", || state_of(&manager, "7").is_none()).await;
    let status = call(&channel.to(7), 0).await.unwrap_err();
    assert!(
        status.message().contains("instance 7 is not registered"),
        "{status}"
    );
    assert_eq!(eight.seen.started.load(SeqCst), executed);
    assert_eq!(call(&channel, 0).await.unwrap(), "8");
}

// Scenario 6. Calls that were sent may have been executed: whether to repeat them is not a connection's to say.
#[tokio::test]
async fn of_a_killed_replica_no_call_fails_that_is_safe_to_repeat_and_none_goes_there_later() {
    let etcd = Etcd::start().await;
    let registry = registry(&etcd).await;
    let manager = ConnectionManager::builder(registry.clone()).build();
    let channel = manager.channel("echo");
    let (mut a, b) = (EchoServer::start("a"), EchoServer::start("b"));
    let _a = registry.register(session("a", &a.address())).await.unwrap();
    let _b = registry.register(session("b", &b.address())).await.unwrap();
    for id in ["a", "b"] {
        eventually(id, || state_of(&manager, id) == Some(Connectivity::Ready)).await;
    }
    let over = Arc::new(AtomicBool::new(false));
    let callers: Vec<_> = (0..8)
        .map(|n| {
            let (channel, over) = (channel.clone(), over.clone());
            // Half of them may be repeated, also when they may have been executed.
            let policy = (n >= 4).then(|| RetryPolicy::new(3).unwrap().idempotent());
            tokio::spawn(async move {
                let (mut failures, mut by_b) = (Vec::new(), 0);
                while !over.load(SeqCst) {
                    let mut request = Request::new(request(n % 4));
                    if let Some(policy) = policy {
                        request.extensions_mut().insert(policy);
                    }
                    match EchoClient::new(channel.clone()).unary(request).await {
                        Ok(answer) => by_b += usize::from(answer.into_inner().server == "b"),
                        Err(status) => failures.push((Instant::now(), status)),
                    }
                }
                (policy.is_some(), failures, by_b)
            })
        })
        .collect();
    time::sleep(Duration::from_millis(300)).await;
    a.kill();
    let killed = Instant::now();
    time::sleep(Duration::from_secs(2)).await;
    assert!(
        state_of(&manager, "a").is_some(),
        "its lease is still alive"
    );
    over.store(true, SeqCst);
    let (mut failed, mut latest) = (0, Duration::ZERO);
    for caller in callers {
        let (may_be_repeated, failures, by_b) = caller.await.unwrap();
        assert!(by_b > 50, "{by_b}");
        assert!(!may_be_repeated || failures.is_empty(), "{failures:?}");
        for (at, status) in failures {
            let error = Error::of(&status).expect("ours");
            assert_eq!(error.sent(), switchboard::Sent::Sent, "{status}");
            assert_eq!(error.peer().map(|peer| &*peer.id), Some("a"), "{status}");
            latest = latest.max(at.saturating_duration_since(killed));
            failed += 1;
        }
    }
    println!("{failed} calls were in flight and failed, the last {latest:?} after the death");
    assert!(failed <= 4, "{failed} calls failed of 4 at a time");
    assert!(latest < Duration::from_millis(300), "{latest:?}");
}

// Scenario 7.
#[tokio::test]
async fn a_peer_that_stops_answering_is_left_within_its_keepalive() {
    let etcd = Etcd::start().await;
    let registry = registry(&etcd).await;
    let keepalive = Connector::new()
        .keepalive(Some(Duration::from_secs(1)), Duration::from_secs(1))
        .unwrap();
    let manager = ConnectionManager::builder(registry.clone())
        .connector(keepalive)
        .build();
    let channel = manager.channel("echo");
    let (mute, well) = (EchoServer::start("mute"), EchoServer::start("well"));
    let proxy = Proxy::start(mute.address).await;
    let _one = registry
        .register(session("mute", &proxy.address()))
        .await
        .unwrap();
    let _two = registry
        .register(session("well", &well.address()))
        .await
        .unwrap();
    for id in ["mute", "well"] {
        eventually(id, || state_of(&manager, id) == Some(Connectivity::Ready)).await;
    }
    let long: Vec<_> = (0..10)
        .map(|_| {
            let channel = channel.to("mute");
            tokio::spawn(async move { call(&channel, 60_000).await })
        })
        .collect();
    eventually("all are there", || mute.seen.started.load(SeqCst) == 10).await;
    proxy.set(Mode::Swallow);
    let silent = Instant::now();
    for call in long {
        let status = call.await.unwrap().unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        assert!(status.message().contains("keepalive"), "{status}");
    }
    let took = silent.elapsed();
    assert!(took < Duration::from_secs(3), "they ended after {took:?}");
    for _ in 0..100 {
        assert_eq!(call(&channel, 0).await.unwrap(), "well");
    }
    // And it is taken back when it answers again.
    proxy.set(Mode::Pass);
    proxy.reset();
    eventually("it is back", || {
        state_of(&manager, "mute") == Some(Connectivity::Ready)
    })
    .await;
}

// Scenario 9.
#[tokio::test]
async fn a_dial_into_the_void_holds_up_neither_its_callers_nor_others() {
    let etcd = Etcd::start().await;
    let registry = registry(&etcd).await;
    let manager = ConnectionManager::builder(registry.clone()).build();
    let channel = manager.channel("echo");
    let server = EchoServer::start("well");
    let blackhole = Blackhole::new();
    let _well = registry
        .register(session("well", &server.address()))
        .await
        .unwrap();
    eventually("the other", || {
        state_of(&manager, "well") == Some(Connectivity::Ready)
    })
    .await;
    let alone = percentile_99(&channel).await;
    let _void = registry
        .register(session("void", &blackhole.address()))
        .await
        .unwrap();
    eventually("it is being dialled", || {
        state_of(&manager, "void") == Some(Connectivity::Connecting)
    })
    .await;

    let mut request = Request::new(request(0));
    request.set_timeout(Duration::from_millis(100));
    let began = Instant::now();
    let status = EchoClient::new(channel.to("void"))
        .unary(request)
        .await
        .unwrap_err();
    let took = began.elapsed();
    assert!(took < Duration::from_millis(150), "{took:?}");
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(status.message().contains(&blackhole.address()), "{status}");

    let meanwhile = percentile_99(&channel).await;
    assert_eq!(state_of(&manager, "void"), Some(Connectivity::Connecting));
    println!("99 of 100 calls take at most {alone:?}, during the dial {meanwhile:?}");
    assert!(
        meanwhile < 3 * alone + Duration::from_millis(20),
        "{alone:?} alone, {meanwhile:?} during the dial"
    );
}

/// How long calls take, but for the slowest of a hundred.
async fn percentile_99(channel: &Channel) -> Duration {
    let mut took = Vec::new();
    for _ in 0..300 {
        let began = Instant::now();
        assert_eq!(call(channel, 0).await.unwrap(), "well");
        took.push(began.elapsed());
    }
    took.sort_unstable();
    took[took.len() * 99 / 100]
}

/// How long calls take, one after the other, for so long.
async fn calls_take(channel: &Channel, took: &mut Vec<Duration>, within: Duration) {
    let until = Instant::now() + within;
    while Instant::now() < until {
        let began = Instant::now();
        assert_eq!(call(channel, 0).await.unwrap(), "well");
        took.push(began.elapsed());
    }
}

// Scenario 10, the first half; the registration's own part of it comes with the registrations.
#[tokio::test]
async fn a_session_that_is_stopping_is_drained() {
    let etcd = Etcd::start().await;
    let registry = registry(&etcd).await;
    let manager = ConnectionManager::builder(registry.clone()).build();
    let channel = manager.channel("echo");
    let (a, b) = (EchoServer::start("a"), EchoServer::start("b"));
    let mut going = registry.register(session("a", &a.address())).await.unwrap();
    let _stays = registry.register(session("b", &b.address())).await.unwrap();
    for id in ["a", "b"] {
        eventually(id, || state_of(&manager, id) == Some(Connectivity::Ready)).await;
    }
    let last = tokio::spawn({
        let channel = channel.to("a");
        async move { call(&channel, 1500).await }
    });
    eventually("it is there", || a.seen.started.load(SeqCst) > 0).await;
    going.stopping().await.unwrap();
    let said = Instant::now();
    eventually("it is seen", || {
        state_of(&manager, "a") == Some(Connectivity::Stopping)
    })
    .await;
    assert!(
        said.elapsed() < Duration::from_millis(500),
        "{:?}",
        said.elapsed()
    );
    for _ in 0..100 {
        assert_eq!(call(&channel, 0).await.unwrap(), "b");
    }
    // Another manager, which was not there when it was said, knows it from its first list.
    let late = ConnectionManager::builder(registry.clone()).build();
    for _ in 0..20 {
        assert_eq!(call(&late.channel("echo"), 0).await.unwrap(), "b");
    }
    going.deregister().await.unwrap();
    assert_eq!(
        last.await.unwrap().unwrap(),
        "a",
        "a call in flight was not let finish"
    );
}

// Scenario 26.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_under_load_fails_no_call() {
    const IDS: [&str; 4] = ["a", "b", "c", "d"];
    let etcd = Etcd::start().await;
    let registry = registry(&etcd).await;
    let mut servers = Vec::new();
    for id in IDS {
        let server = EchoServer::start(id);
        let held = registry.register(session(id, &server.address())).await;
        servers.push((server, Some(held.unwrap())));
    }
    let manager = ConnectionManager::builder(registry.clone()).build();
    let ready = manager.ready("echo", IDS.len(), Duration::from_secs(5));
    drop(ready.await.unwrap());
    // Given short calls and such as are in flight when it happens
    let channel = manager.channel("echo");
    let loads = [0, 0, 20, 150].map(|delay_ms| Load::start(&channel, delay_ms));
    // When each is restarted where it was: one that says so in the registry first, and one that only says goodbye
    // (GOAWAY), and takes its session back when it is done.
    for tells in [true, false] {
        for (id, (server, held)) in IDS.iter().zip(&mut servers) {
            if tells {
                held.as_mut().unwrap().stopping().await.unwrap();
                eventually("it is seen", || {
                    state_of(&manager, id) == Some(Connectivity::Stopping)
                })
                .await;
            }
            server.stop_gracefully();
            let seen = server.seen.clone();
            eventually("it has finished its calls", || {
                seen.started.load(SeqCst) == seen.finished.load(SeqCst)
                    && sockets_to(server.address.port()) == 0
            })
            .await;
            assert_eq!(seen.cancelled.load(SeqCst), 0);
            server.killed().await;
            let at = server.address;
            *server = EchoServer::start_at(id, at);
            held.take().unwrap().deregister().await.unwrap();
            let again = session(id, &server.address());
            *held = Some(registry.register(again).await.unwrap());
            let seen = server.seen.clone();
            eventually("it is called again", || seen.finished.load(SeqCst) > 20).await;
        }
    }
    // Then no call has failed.
    for load in loads {
        load.all_answered().await;
    }
}

// Scenario 11, scaled down: the port opens after two seconds, the probe comes every half.
#[tokio::test]
async fn a_server_that_opens_its_port_late_is_found_without_the_registrys_help() {
    let etcd = Etcd::start().await;
    let registry = registry(&etcd).await;
    let ms = Duration::from_millis;
    let config = PoolConfig::default()
        .backoff(Backoff::new(ms(50), 1.6, ms(200), 0.2).unwrap())
        .probe(Some(Backoff::constant(ms(500), 0.2).unwrap()));
    let manager = ConnectionManager::builder(registry.clone())
        .pools(config)
        .build();
    let channel = manager.channel("echo");
    let mut closed = EchoServer::start("early");
    let address = closed.address;
    closed.killed().await;
    let _registration = registry
        .register(session("q", &address.to_string()))
        .await
        .unwrap();
    eventually("it is given up", || {
        state_of(&manager, "q") == Some(Connectivity::Offline)
    })
    .await;
    let status = call(&channel, 0).await.unwrap_err();
    assert!(status.message().contains("connection refused"), "{status}");
    time::sleep(Duration::from_secs(2)).await;
    let _server = EchoServer::start_at("late", address);
    let opened = Instant::now();
    let took = until_answered(&channel, "late", opened).await;
    assert!(took < Duration::from_secs(1), "found after {took:?}");
}

// Scenario 12.
#[tokio::test]
async fn a_peer_that_says_it_is_exhausted_keeps_its_place_and_its_call() {
    let etcd = Etcd::start().await;
    let registry = registry(&etcd).await;
    let manager = ConnectionManager::builder(registry.clone()).build();
    let channel = manager.channel("echo");
    let (a, b) = (EchoServer::start("a"), EchoServer::start("b"));
    let _a = registry.register(session("a", &a.address())).await.unwrap();
    let _b = registry.register(session("b", &b.address())).await.unwrap();
    for id in ["a", "b"] {
        eventually(id, || state_of(&manager, id) == Some(Connectivity::Ready)).await;
    }
    let seen = || (a.seen.started.load(SeqCst), b.seen.started.load(SeqCst));
    for n in 1..=100 {
        let exhausted = EchoRequest {
            message: "full".to_owned(),
            fail_with: Code::ResourceExhausted as u32,
            ..EchoRequest::default()
        };
        let mut client = EchoClient::new(channel.to("a"));
        let status = client.unary(exhausted.clone()).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(status.message(), "as asked: full");
        assert_eq!(seen(), (n, 0), "it went elsewhere too");
    }
    // Unpinned, each goes to one peer, and to both alike.
    for n in 1..=100 {
        let exhausted = EchoRequest {
            fail_with: Code::ResourceExhausted as u32,
            ..EchoRequest::default()
        };
        let mut client = EchoClient::new(channel.clone());
        client.unary(exhausted).await.unwrap_err();
        let (of_a, of_b) = seen();
        assert_eq!(of_a + of_b, 100 + n);
    }
    let (of_a, of_b) = seen();
    assert!(of_a > 120 && of_b > 20, "{of_a} {of_b}");
    assert_eq!(state_of(&manager, "a"), Some(Connectivity::Ready));
}

// "Registry unreachable at start."
#[tokio::test]
async fn an_etcd_that_comes_last_is_waited_for_by_nobody_and_found_by_all() {
    let mut etcd = Etcd::stopped();
    let registry = registry(&etcd).await;
    let manager = ConnectionManager::builder(registry.clone()).build();
    let channel = manager.channel("echo");
    let status = call(&channel, 0).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(
        status.message().contains("registry unreachable"),
        "{status}"
    );
    let began = Instant::now();
    for _ in 0..100 {
        call(&channel, 0).await.unwrap_err();
    }
    assert!(
        began.elapsed() < Duration::from_millis(200),
        "{:?}",
        began.elapsed()
    );

    etcd.restart().await;
    let server = EchoServer::start("well");
    eventually_async("a registration is taken", || async {
        match registry.register(session("q", &server.address())).await {
            // Kept by nobody: it lives for its lease, which is longer than this test.
            Ok(registration) => {
                registration.abandon();
                true
            }
            Err(_) => false,
        }
    })
    .await;
    until_answered(&channel, "well", Instant::now()).await;

    // And what is known stays usable when it goes again.
    etcd.kill();
    time::sleep(Duration::from_millis(500)).await;
    for _ in 0..100 {
        assert_eq!(call(&channel, 0).await.unwrap(), "well");
    }
}

#[tokio::test]
async fn a_managers_stop_lets_go_of_its_registry() {
    let etcd = Etcd::start().await;
    let server = EchoServer::start("a");
    let port = etcd.address().rsplit(':').next().unwrap().parse().unwrap();
    let record = format!(
        r#"{{"Op":0,"Addr":"{}","Metadata":null}}"#,
        server.address()
    );
    etcd.put("test/echo/7", record).await;
    let all = || (tasks(), sockets_to(port));
    eventually("only we are left", || all() == (0, 0)).await;

    let manager = ConnectionManager::builder(registry(&etcd).await).build();
    let channel = manager.channel("echo");
    until_answered(&channel, "a", Instant::now()).await;
    let during = all();
    assert!(during.0 > 0 && during.1 > 0, "{during:?}");
    manager.stop().await;
    let stopped = Instant::now();
    // The manager and its channel are held on to; what they held is not.
    eventually("nothing is left", || all() == (0, 0)).await;
    let took = stopped.elapsed();
    println!("{during:?} tasks and sockets; gone {took:?} after the stop");
    assert!(took < Duration::from_secs(1), "{took:?}");
    let status = call(&channel, 0).await.unwrap_err();
    assert_eq!(status.code(), Code::Cancelled, "{status}");
}

#[tokio::test]
async fn what_cannot_work_is_refused_where_it_is_given() {
    let etcd = Etcd::stopped();
    let registry = registry(&etcd).await;
    let manager = ConnectionManager::builder(registry.clone()).build();
    for role in ["", "a/b", "a b", &"x".repeat(200)] {
        let error = manager.try_channel(role).unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid, "{role:?}");
        // The channel that returns at once says so at each call.
        let status = call(&manager.channel(role), 0).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{role:?}: {status}");
    }
    for address in [
        "",
        "nowhere",
        "host:0",
        "host:99999",
        "http://host:1",
        "ho st:1",
    ] {
        let error = registry.register(session("q", address)).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid, "{address:?}");
        assert!(
            error.to_string().contains("host:port"),
            "{address:?}: {error}"
        );
    }
    manager.stop().await;
    let error = manager.try_channel("echo").unwrap_err();
    assert_eq!(error.kind(), Kind::Stopped);
    let status = call(&manager.channel("echo"), 0).await.unwrap_err();
    assert_eq!(status.code(), Code::Cancelled);
}
