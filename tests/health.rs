//! Peers that say how they are: calls heed it, and nothing else does.

mod support;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use futures_util::StreamExt as _;
use support::{
    eventually, eventually_async,
    fake::{ByHand, Fake},
    server::{
        EchoServer, Options,
        pb::{EchoRequest, echo_client::EchoClient},
    },
    sockets_to,
};
use switchboard::{
    Channel, ConnectionManager, Error, Kind, MemoryRegistry, Registration, Session,
    events::EventKind,
    manager::{Connectivity, InstanceChange},
    transport::{Connector, HealthCheck},
};
use tokio::sync::Notify;
use tonic::Status;
use tonic_health::ServingStatus::{self, NotServing, Serving};

async fn call(channel: &Channel, delay_ms: u32) -> Result<String, Status> {
    let request = EchoRequest {
        delay_ms,
        ..EchoRequest::default()
    };
    let answer = EchoClient::new(channel.clone()).unary(request).await?;
    Ok(answer.into_inner().server)
}

async fn served(registry: &MemoryRegistry, id: &str, health: bool) -> (EchoServer, Registration) {
    let options = Options {
        health,
        ..Options::default()
    };
    let server = EchoServer::start_with(id, options);
    let session = Session::new("echo", server.address()).with_id(id);
    let registration = registry.register(session).await.unwrap();
    (server, registration)
}

async fn says(server: &EchoServer, status: ServingStatus) {
    let reporter = server.health.as_ref().expect("it serves health");
    reporter.set_service_status("echo", status).await;
}

fn managed(registry: &MemoryRegistry, check: HealthCheck) -> ConnectionManager {
    ConnectionManager::builder(registry.clone())
        .connector(Connector::new().health_check(check))
        .build()
}

fn state(manager: &ConnectionManager, id: &str) -> Option<Connectivity> {
    let known = manager.channels("echo").unwrap();
    known.iter().find(|i| i.id() == id).map(|i| i.state())
}

#[tokio::test]
async fn who_says_that_it_does_not_serve_gets_no_calls_until_it_does() {
    let registry = MemoryRegistry::new();
    let (a, _of_a) = served(&registry, "a", true).await;
    let (_b, _of_b) = served(&registry, "b", false).await;
    says(&a, Serving).await;
    let manager = managed(&registry, HealthCheck::Role);
    let mut events = manager.events();
    let mut watch = manager.watch("echo");
    let channel = manager.channel("echo");
    // b knows nothing of health: it is taken to be well.
    let ready = manager.ready("echo", 2, Duration::from_secs(5)).await;
    ready.unwrap_or_else(|error| panic!("{error}"));

    // What is under way goes on.
    let pinned = channel.to("a");
    let before = a.seen.started.load(SeqCst);
    let under_way = tokio::spawn({
        let pinned = pinned.clone();
        async move { call(&pinned, 300).await }
    });
    eventually("it is under way", || a.seen.started.load(SeqCst) > before).await;
    says(&a, NotServing).await;
    eventually("it is heard of", || {
        state(&manager, "a") == Some(Connectivity::NotServing)
    })
    .await;
    for _ in 0..100 {
        assert_eq!(call(&channel, 0).await.unwrap(), "b");
    }
    let status = call(&pinned, 0).await.unwrap_err();
    assert!(status.message().contains("it says NOT_SERVING"), "{status}");
    assert_eq!(Error::of(&status).unwrap().kind(), Kind::NotConnected);
    assert_eq!(under_way.await.unwrap().unwrap(), "a");
    assert_eq!(sockets_to(a.address.port()), 1, "its connection stays");
    println!("{}", manager.status());

    says(&a, Serving).await;
    eventually_async("it is called again", || async {
        call(&pinned, 0).await.is_ok_and(|by| by == "a")
    })
    .await;
    assert_eq!(sockets_to(a.address.port()), 1);

    let mut told = Vec::new();
    while told.last() != Some(&"restored") {
        let event = events.next().await.unwrap();
        if event.peer().is_some_and(|peer| &*peer.id == "a") {
            if let EventKind::NotServing { why, .. } = &event.kind {
                assert_eq!(why.to_string(), "it says NOT_SERVING");
            }
            told.push(event.kind.name());
        }
    }
    let expected = [
        "added",
        "connecting",
        "connected",
        "not_serving",
        "restored",
    ];
    assert_eq!(told, expected);
    let mut last = None;
    while let Some(Some(change)) = futures_util::FutureExt::now_or_never(watch.next()) {
        if change.instance().is_some_and(|i| i.id() == "a") {
            last = Some(change);
        }
    }
    assert!(matches!(last, Some(InstanceChange::Ready(_))), "{last:?}");
}

#[tokio::test]
async fn one_that_does_not_serve_yet_is_not_called_before_it_does() {
    let registry = MemoryRegistry::new();
    let (a, _of_a) = served(&registry, "a", true).await;
    // Nothing is said under its role's name: the service is not known.
    let manager = managed(&registry, HealthCheck::Role);
    let mut events = manager.events();
    let channel = manager.channel("echo");
    let status = call(&channel, 0).await.unwrap_err();
    let expected = "1 session is known, it does not serve: ";
    assert!(status.message().contains(expected), "{status}");
    assert!(
        status.message().contains("service not registered"),
        "{status}"
    );
    assert_eq!(a.seen.started.load(SeqCst), 0);
    says(&a, Serving).await;
    eventually_async("it is called", || async { call(&channel, 0).await.is_ok() }).await;
    // It is for the first time that it serves.
    let mut told = Vec::new();
    while let Some(Some(event)) = futures_util::FutureExt::now_or_never(events.next()) {
        told.extend(event.peer().map(|_| event.kind.name()));
    }
    assert_eq!(told, ["added", "connecting", "not_serving", "connected"]);
    // Under the empty name tonic's server says that it serves; without a check nobody asks.
    for check in [HealthCheck::Overall, HealthCheck::Off] {
        says(&a, NotServing).await;
        let manager = managed(&registry, check);
        assert_eq!(call(&manager.channel("echo"), 0).await.unwrap(), "a");
    }
}

#[tokio::test]
async fn a_watch_of_health_does_not_keep_a_connection_that_is_to_go() {
    let registry = MemoryRegistry::new();
    let (a, mut of_a) = served(&registry, "a", true).await;
    says(&a, Serving).await;
    let manager = managed(&registry, HealthCheck::Role);
    let channel = manager.channel("echo");
    call(&channel, 0).await.unwrap();
    of_a.stopping().await.unwrap();
    of_a.deregister().await.unwrap();
    // Drained: nothing is in flight, so it is closed now and not after 30 s.
    eventually("it is closed", || sockets_to(a.address.port()) == 0).await;
    assert!(state(&manager, "a").is_none());

    let session = Session::new("echo", a.address()).with_id("a");
    let _of_a = registry.register(session).await.unwrap();
    eventually_async("it is called", || async { call(&channel, 0).await.is_ok() }).await;
    let began = std::time::Instant::now();
    manager.stop_gracefully(Duration::from_secs(60)).await;
    assert!(began.elapsed() < Duration::from_secs(1));
    assert_eq!(sockets_to(a.address.port()), 0);
}

/// A peer that knows no service, says so, and hangs up a moment later.
fn hangs_up_after_an_answer() -> Fake {
    Fake::sockets(|_, socket| async {
        let mut connection = h2::server::handshake(socket)
            .await
            .map_err(io::Error::other)?;
        if let Some(Ok((_request, mut respond))) = connection.accept().await {
            let response = http::Response::builder()
                .header("content-type", "application/grpc")
                .header("grpc-status", "12")
                .body(());
            let _ = respond.send_response(response.unwrap(), true);
            let moment = Duration::from_millis(10);
            let _ = tokio::time::timeout(moment, connection.accept()).await;
        }
        Ok(())
    })
}

#[tokio::test]
async fn who_answers_for_its_health_and_hangs_up_is_dialled_with_backoff() {
    let registry = MemoryRegistry::new();
    let fake = hangs_up_after_an_answer();
    let session = Session::new("echo", fake.address()).with_id("a");
    let _of_a = registry.register(session).await.unwrap();
    let manager = managed(&registry, HealthCheck::Role);
    manager.depends_on("echo").unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let dials = fake.connections();
    assert!((1..10).contains(&dials), "{dials} dials in 2 s");
}

/// A peer that takes each request, which it counts, and never answers it; it closes its connections when told to.
fn never_answers(close: Arc<Notify>, streams: Arc<AtomicUsize>) -> Fake {
    Fake::sockets(move |_, socket| {
        let (close, streams) = (close.clone(), streams.clone());
        async move {
            let mut connection = ByHand::accept(socket, &[]).await?;
            let serve = async {
                loop {
                    connection.called().await?;
                    streams.fetch_add(1, SeqCst);
                }
            };
            tokio::select! {
                ended = serve => ended,
                () = close.notified() => Ok(()),
            }
        }
    })
}

#[tokio::test]
async fn who_does_not_say_how_it_is_is_not_called() {
    let registry = MemoryRegistry::new();
    let (close, streams) = (Arc::new(Notify::new()), Arc::new(AtomicUsize::new(0)));
    let fake = never_answers(close.clone(), streams.clone());
    let session = Session::new("echo", fake.address()).with_id("a");
    let mut of_a = registry.register(session).await.unwrap();
    let manager = managed(&registry, HealthCheck::Role);
    let channel = manager.channel("echo");
    let began = std::time::Instant::now();
    let status = call(&channel, 0).await.unwrap_err();
    let took = began.elapsed();
    assert!(
        status.message().contains("did not say whether it serves"),
        "{status}"
    );
    assert_eq!(took.as_secs(), 5, "{took:?}");
    // Pinned too, at once; and who waits for one that is ready is told.
    let status = call(&channel.to("a"), 0).await.unwrap_err();
    assert!(status.message().contains("did not say"), "{status}");
    let bound = Duration::from_millis(100);
    let error = manager.ready("echo", 1, bound).await.map(drop).unwrap_err();
    assert!(error.to_string().contains("did not say"), "{error}");
    assert_eq!(streams.load(SeqCst), 1);
    assert_eq!(manager.status().roles[0].endpoints[0].in_flight, 0);

    // When its connection is lost, it is dialled again
    close.notify_waiters();
    eventually("it is asked again", || streams.load(SeqCst) == 2).await;
    // When it stops and is gone, it is let go of
    of_a.stopping().await.unwrap();
    of_a.deregister().await.unwrap();
    eventually("it is closed", || sockets_to(fake.address.port()) == 0).await;
}

#[tokio::test]
async fn who_changes_its_mind_fast_is_as_it_last_said() {
    let registry = MemoryRegistry::new();
    let (a, _of_a) = served(&registry, "a", true).await;
    let manager = managed(&registry, HealthCheck::Role);
    let channel = manager.channel("echo");
    for last in [Serving, NotServing, Serving] {
        for _ in 0..500 {
            says(&a, NotServing).await;
            let _ = call(&channel, 0).await;
            says(&a, Serving).await;
        }
        says(&a, last).await;
        let expected = match last {
            Serving => Connectivity::Ready,
            _ => Connectivity::NotServing,
        };
        eventually("it is so", || state(&manager, "a") == Some(expected)).await;
        assert_eq!(call(&channel, 0).await.is_ok(), last == Serving);
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(state(&manager, "a"), Some(expected));
        assert_eq!(sockets_to(a.address.port()), 1);
    }
}

#[tokio::test]
async fn a_peer_that_does_not_serve_and_dies_is_found_when_it_is_back() {
    let registry = MemoryRegistry::new();
    let (mut a, _of_a) = served(&registry, "a", true).await;
    says(&a, NotServing).await;
    let manager = managed(&registry, HealthCheck::Role);
    let channel = manager.channel("echo");
    assert!(call(&channel, 0).await.is_err());
    a.killed().await;
    eventually("it is heard of", || {
        state(&manager, "a") != Some(Connectivity::NotServing)
    })
    .await;
    let options = Options {
        address: Some(a.address),
        ..Options::default()
    };
    let _again = EchoServer::start_with("a", options);
    eventually_async("it is called", || async { call(&channel, 0).await.is_ok() }).await;
    let role = &manager.status().roles[0];
    assert_eq!(role.endpoints[0].in_flight, 0);
}
