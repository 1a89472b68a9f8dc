//! Several connections to one peer: when another is opened, when one is closed, and that no call notices.

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::{FutureExt as _, StreamExt as _};
use support::{
    eventually,
    fake::{self, Fake},
    proxy::Proxy,
    server::{
        EchoServer, Options,
        pb::{EchoRequest, echo_client::EchoClient},
    },
    sockets_to, tasks,
};
use switchboard::{
    CancelToken, Channel, ConnectionManager, MemoryRegistry, Session,
    pool::status::Connectivity,
    registry::Fixed,
    transport::{Connector, HealthCheck},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    sync::{Notify, mpsc},
    task::JoinSet,
    time,
};
use tonic::{Code, Request};

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn quick() -> EchoRequest {
    EchoRequest::default()
}

fn slow(delay_ms: u32) -> EchoRequest {
    EchoRequest {
        delay_ms,
        ..EchoRequest::default()
    }
}

fn connector(most: usize) -> Connector {
    let connector = Connector::new().max_connections(most).unwrap();
    connector.keepalive(None, ms(1_000)).unwrap()
}

fn manager(address: String, connector: Connector) -> ConnectionManager {
    let session = Session::new("echo", address).with_id("one");
    ConnectionManager::builder(Fixed::new([session]).unwrap())
        .connector(connector)
        .build()
}

fn connections(manager: &ConnectionManager) -> usize {
    let status = manager.status();
    let endpoint = status.roles[0].endpoints.first();
    endpoint.map_or(0, |endpoint| endpoint.connections)
}

/// So many callers, each calling again and again, until dropped; what failed comes out.
fn callers(channel: &Channel, many: usize) -> (JoinSet<()>, mpsc::UnboundedReceiver<String>) {
    let (failed, failures) = mpsc::unbounded_channel();
    let mut calls = JoinSet::new();
    for _ in 0..many {
        let (mut client, failed) = (EchoClient::new(channel.clone()), failed.clone());
        calls.spawn(async move {
            loop {
                if let Err(status) = client.unary(quick()).await {
                    let _ = failed.send(format!("{status:?}"));
                }
            }
        });
    }
    (calls, failures)
}

/// Calls that go on for a minute, and have begun.
async fn held(
    channel: &Channel,
    server: &EchoServer,
    many: usize,
) -> JoinSet<Result<(), tonic::Status>> {
    let under_way = || {
        let seen = &server.seen;
        let ended = [&seen.finished, &seen.cancelled].map(|count| count.load(SeqCst));
        seen.started.load(SeqCst).saturating_sub(ended.iter().sum())
    };
    let before = under_way();
    let mut calls = JoinSet::new();
    for _ in 0..many {
        let mut client = EchoClient::new(channel.clone());
        calls.spawn(async move { client.unary(slow(60_000)).await.map(drop) });
    }
    eventually("they are under way", || under_way() >= before + many).await;
    calls
}

// === more ===

#[tokio::test]
async fn another_is_opened_when_the_peer_allows_no_more_streams_and_no_more_than_may_be() {
    // Given a peer that allows two calls on a connection, and three connections
    let max_streams = Some(2);
    let server = EchoServer::start_with(
        "one",
        Options {
            max_streams,
            ..Options::default()
        },
    );
    let manager = manager(server.address(), connector(3));
    let channel = manager.channel("echo");
    let port = server.address.port();
    EchoClient::new(channel.clone())
        .unary(quick())
        .await
        .unwrap();
    assert_eq!((sockets_to(port), connections(&manager)), (1, 1));
    // When there are six calls, then they go over three
    let mut calls = held(&channel, &server, 6).await;
    assert_eq!((sockets_to(port), connections(&manager)), (3, 3));
    let table = manager.status().to_string();
    assert!(table.contains("6 over 3"), "{table}");
    // And a seventh waits until there is a stream
    let mut client = EchoClient::new(channel.clone());
    let waits = tokio::spawn(async move { client.unary(quick()).await });
    time::sleep(ms(100)).await;
    assert_eq!((waits.is_finished(), sockets_to(port)), (false, 3));
    calls.abort_all();
    time::timeout(ms(2_000), waits)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_first_calls_dial_no_more_connections_than_may_be() {
    // Given a peer that allows 10 calls on a connection
    let max_streams = Some(10);
    let server = EchoServer::start_with(
        "one",
        Options {
            max_streams,
            ..Options::default()
        },
    );
    let proxy = Proxy::start(server.address).await;
    let manager = manager(proxy.address(), connector(4));
    let channel = manager.channel("echo");
    // When there are a thousand first calls
    let mut calls = JoinSet::new();
    for _ in 0..1_000 {
        let mut client = EchoClient::new(channel.clone());
        calls.spawn(async move { client.unary(slow(5)).await });
    }
    while let Some(result) = calls.join_next().await {
        result.unwrap().unwrap();
    }
    // Then all of them were made over at most four
    assert_eq!(proxy.accepted.load(SeqCst), 4);
    assert!(server.seen.most_at_once.load(SeqCst) <= 40);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn threads_that_have_many_calls_get_a_connection_each() {
    let server = EchoServer::start("one");
    let manager = manager(server.address(), connector(4));
    let (calls, mut failures) = callers(&manager.channel("echo"), 128);
    eventually("there are two", || connections(&manager) == 2).await;
    time::sleep(ms(200)).await;
    // No more than there are threads.
    assert_eq!(sockets_to(server.address.port()), 2);
    drop(calls);
    assert_eq!(failures.try_recv().ok(), None);
}

#[tokio::test]
async fn one_thread_with_many_calls_keeps_to_one() {
    let server = EchoServer::start("one");
    let manager = manager(server.address(), connector(4));
    let (calls, mut failures) = callers(&manager.channel("echo"), 128);
    eventually("there are many calls", || {
        server.seen.finished.load(SeqCst) > 2_000
    })
    .await;
    assert_eq!(sockets_to(server.address.port()), 1);
    drop(calls);
    assert_eq!(failures.try_recv().ok(), None);
}

#[tokio::test]
async fn where_another_cannot_be_had_calls_go_on_over_those_there_are() {
    // Given a peer that allows one call, and has stopped listening since it was connected
    let max_streams = Some(1);
    let mut server = EchoServer::start_with(
        "one",
        Options {
            max_streams,
            ..Options::default()
        },
    );
    let proxy = Proxy::start(server.address).await;
    let manager = manager(proxy.address(), connector(4));
    let channel = manager.channel("echo");
    let mut calls = held(&channel, &server, 1).await;
    // Nobody answers those that come now.
    proxy.set(support::proxy::Mode::SwallowAnswers);
    let mut client = EchoClient::new(channel.clone());
    let waits = tokio::spawn(async move { client.unary(quick()).await });
    eventually("another is dialled", || proxy.accepted.load(SeqCst) == 2).await;
    proxy.set(support::proxy::Mode::Pass);
    // When the first call ends, then the one that waits has its stream
    calls.abort_all();
    while calls.join_next().await.is_some() {}
    time::timeout(ms(5_000), waits)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    server.kill();
}

// === fewer ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn those_that_are_not_needed_any_more_are_closed_and_no_call_fails() {
    let max_streams = Some(4);
    let server = EchoServer::start_with(
        "one",
        Options {
            max_streams,
            ..Options::default()
        },
    );
    let manager = manager(server.address(), connector(4).spare_for(ms(100)).unwrap());
    let channel = manager.channel("echo");
    // Given a caller all the while, and fifteen calls more for some time
    let (_calls, mut failures) = callers(&channel, 1);
    let mut calls = held(&channel, &server, 15).await;
    assert_eq!(connections(&manager), 4);
    time::sleep(ms(300)).await;
    assert_eq!(connections(&manager), 4);
    // When they end, then so do the connections, and the caller does not notice
    calls.abort_all();
    let port = server.address.port();
    eventually("there is one", || {
        (connections(&manager), sockets_to(port)) == (1, 1)
    })
    .await;
    assert_eq!(failures.try_recv().ok(), None);
}

// === others in their place ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_is_too_old_is_replaced_and_finishes_its_calls() {
    let server = EchoServer::start("one");
    let proxy = Proxy::start(server.address).await;
    let connector = connector(1).max_age(Some(ms(100))).unwrap();
    let manager = manager(proxy.address(), connector);
    let mut events = manager.events();
    let channel = manager.channel("echo");
    // Given a call in flight, and callers all the while
    let long = {
        let mut client = EchoClient::new(channel.clone());
        tokio::spawn(async move { client.unary(slow(1_000)).await })
    };
    eventually("it has begun", || server.seen.started.load(SeqCst) == 1).await;
    let (calls, mut failures) = callers(&channel, 4);
    // When some connections have got too old
    eventually("five have been made", || proxy.accepted.load(SeqCst) >= 5).await;
    // Then the first call is still in flight, over the first, and ends well
    let port = proxy.address.port();
    eventually("there are two", || sockets_to(port) == 2).await;
    assert!(!long.is_finished());
    long.await.unwrap().unwrap();
    drop(calls);
    assert_eq!(failures.try_recv().ok(), None);
    eventually("one is left", || sockets_to(port) == 1).await;
    // And nobody was told of a loss.
    while let Some(event) = events.next().now_or_never().flatten() {
        assert!(
            !["lost", "attempt_failed"].contains(&event.kind.name()),
            "{event}"
        );
    }
}

// Scenario 8; in `tests/calls.rs` it is the server that says goodbye.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_fifty_calls_on_one_that_is_replaced_a_cancel_and_a_timeout_end_two() {
    let server = EchoServer::start("one");
    let proxy = Proxy::start(server.address).await;
    let connector = connector(1).max_age(Some(ms(400))).unwrap();
    let manager = manager(proxy.address(), connector);
    let channel = manager.channel("echo");
    let token = CancelToken::for_call();
    let calls: Vec<_> = (0..50)
        .map(|n| {
            let mut client = EchoClient::new(channel.clone());
            let mut request = Request::new(slow(2_000));
            match n {
                0 => drop(request.extensions_mut().insert(token.clone())),
                1 => request.set_timeout(ms(900)),
                _ => {}
            }
            tokio::spawn(async move { client.unary(request).await.map_err(|status| status.code()) })
        })
        .collect();
    eventually("all are there", || server.seen.started.load(SeqCst) == 50).await;
    assert_eq!(proxy.accepted.load(SeqCst), 1);
    // When another has taken its place, and takes calls
    eventually("another is there", || proxy.accepted.load(SeqCst) > 1).await;
    token.cancel();
    EchoClient::new(channel).unary(quick()).await.unwrap();
    // Then only those two end before their time.
    let mut ends = Vec::new();
    for call in calls {
        ends.push(call.await.unwrap().map(drop));
    }
    assert_eq!(ends[0], Err(Code::Cancelled));
    assert_eq!(ends[1], Err(Code::DeadlineExceeded));
    assert!(ends[2..].iter().all(Result::is_ok), "{ends:?}");
    assert!(proxy.accepted.load(SeqCst) >= 3);
}

#[tokio::test]
async fn one_that_is_too_old_stays_while_no_other_can_be_had() {
    // Given a connection that gets too old when its peer does not listen any more
    let server = EchoServer::start("one");
    let proxy = Proxy::start(server.address).await;
    let connector = connector(1).max_age(Some(ms(200))).unwrap();
    let manager = manager(proxy.address(), connector);
    let channel = manager.channel("echo");
    EchoClient::new(channel.clone())
        .unary(quick())
        .await
        .unwrap();
    proxy.set(support::proxy::Mode::SwallowNew);
    let (calls, mut failures) = callers(&channel, 2);
    // When another has been tried in vain
    eventually("another is dialled", || proxy.accepted.load(SeqCst) >= 2).await;
    let before = server.seen.finished.load(SeqCst);
    eventually("calls go on", || {
        server.seen.finished.load(SeqCst) > before + 100
    })
    .await;
    // Then no call has failed
    drop(calls);
    assert_eq!(failures.try_recv().ok(), None);
}

#[tokio::test]
async fn while_another_in_the_place_of_an_old_one_hangs_one_more_can_be_had() {
    let max_streams = Some(1);
    let server = EchoServer::start_with(
        "one",
        Options {
            max_streams,
            ..Options::default()
        },
    );
    let dials = Arc::new(AtomicUsize::new(0));
    let count = dials.clone();
    let connector = connector(2).max_age(Some(ms(200))).unwrap();
    let connector = connector.dial_with(move |address| {
        let nth = count.fetch_add(1, SeqCst);
        async move {
            if nth == 1 {
                std::future::pending::<()>().await;
            }
            Ok(tokio::net::TcpStream::connect(address).await?)
        }
    });
    let manager = manager(server.address(), connector);
    let channel = manager.channel("echo");
    // Given a connection that got too old with its one stream in use, and nobody who takes its place
    let _first = held(&channel, &server, 1).await;
    eventually("another is dialled", || dials.load(SeqCst) == 2).await;
    // When one more stream is needed
    let mut client = EchoClient::new(channel);
    let call = client.unary(quick());
    // Then it is there.
    time::timeout(ms(2_000), call).await.unwrap().unwrap();
    assert_eq!(dials.load(SeqCst), 3);
}

#[tokio::test]
async fn health_is_watched_over_whichever_connection_there_is() {
    let health = true;
    let server = EchoServer::start_with(
        "one",
        Options {
            health,
            ..Options::default()
        },
    );
    let says = async |status| {
        let health = server.health.as_ref().unwrap();
        health.set_service_status("", status).await;
    };
    says(tonic_health::ServingStatus::Serving).await;
    let proxy = Proxy::start(server.address).await;
    let connector = connector(1).max_age(Some(ms(100))).unwrap();
    let manager = manager(
        proxy.address(),
        connector.health_check(HealthCheck::Overall),
    );
    let mut events = manager.events();
    let channel = manager.channel("echo");
    EchoClient::new(channel.clone())
        .unary(quick())
        .await
        .unwrap();
    // Given some connections that were replaced: none is kept by its watch, and nobody was told of anything
    eventually("five have been made", || proxy.accepted.load(SeqCst) >= 5).await;
    eventually("one is left", || sockets_to(proxy.address.port()) == 1).await;
    while let Some(event) = events.next().now_or_never().flatten() {
        let name = event.kind.name();
        assert!(
            !["lost", "attempt_failed", "not_serving"].contains(&name),
            "{event}"
        );
    }
    // When it says that it does not serve, then that is heard
    says(tonic_health::ServingStatus::NotServing).await;
    let state = || manager.status().roles[0].endpoints[0].state;
    eventually("it is heard", || state() == Connectivity::NotServing).await;
    says(tonic_health::ServingStatus::Serving).await;
    eventually("it is heard again", || state() == Connectivity::Ready).await;
}

// === ends ===

#[tokio::test]
async fn a_deleted_session_ends_its_calls_over_all_connections_also_those_that_take_no_new_ones() {
    // Given three connections with a call each, of which the first is too old
    let max_streams = Some(1);
    let server = EchoServer::start_with(
        "one",
        Options {
            max_streams,
            ..Options::default()
        },
    );
    let registry = MemoryRegistry::new();
    let session = Session::new("echo", server.address()).with_id("one");
    let registration = registry.register(session).await.unwrap();
    let connector = connector(3).max_age(Some(ms(300))).unwrap();
    let manager = ConnectionManager::builder(registry)
        .connector(connector)
        .build();
    let channel = manager.channel("echo");
    let mut calls = held(&channel, &server, 3).await;
    let port = server.address.port();
    eventually("there are new ones beside them", || sockets_to(port) >= 4).await;
    // When its session is deleted
    let began = Instant::now();
    registration.deregister().await.unwrap();
    // Then all calls end, and say why
    while let Some(result) = calls.join_next().await {
        let status = result.unwrap().unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        assert!(status.message().contains("session deleted"), "{status:?}");
    }
    assert!(began.elapsed() < ms(1_000), "{:?}", began.elapsed());
    eventually("all are closed", || sockets_to(port) == 0).await;
}

#[tokio::test]
async fn when_one_of_several_breaks_the_others_go_on() {
    let max_streams = Some(2);
    let server = EchoServer::start_with(
        "one",
        Options {
            max_streams,
            ..Options::default()
        },
    );
    let proxy = Proxy::start(server.address).await;
    let manager = manager(proxy.address(), connector(2));
    let mut events = manager.events();
    let channel = manager.channel("echo");
    let first = held(&channel, &server, 2).await;
    let mut second = held(&channel, &server, 1).await;
    assert_eq!(connections(&manager), 2);
    // When the first of two breaks
    proxy.reset_first();
    let mut lost = 0;
    for result in first.join_all().await {
        let status = result.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        lost += 1;
    }
    assert_eq!(lost, 2);
    // Then the call over the other goes on, others follow, and the peer has not been lost
    EchoClient::new(channel.clone())
        .unary(quick())
        .await
        .unwrap();
    assert!(second.join_next().now_or_never().is_none());
    assert_eq!(connections(&manager), 1);
    while let Some(event) = events.next().now_or_never().flatten() {
        assert_ne!(event.kind.name(), "lost", "{event}");
    }
}

#[tokio::test]
async fn of_a_stopped_manager_no_connection_is_left_and_no_task() {
    let before = tasks();
    let max_streams = Some(1);
    let server = EchoServer::start_with(
        "one",
        Options {
            max_streams,
            ..Options::default()
        },
    );
    let manager = manager(server.address(), connector(4));
    let calls = held(&manager.channel("echo"), &server, 4).await;
    assert_eq!(sockets_to(server.address.port()), 4);
    manager.stop().await;
    for result in calls.join_all().await {
        assert_eq!(result.unwrap_err().code(), Code::Cancelled);
    }
    eventually("nothing is left", || {
        sockets_to(server.address.port()) == 0 && tasks() == before
    })
    .await;
}

#[tokio::test]
async fn of_a_channel_that_is_dropped_with_its_manager_connections_end_with_their_calls() {
    let before = tasks();
    let max_streams = Some(1);
    let server = EchoServer::start_with(
        "one",
        Options {
            max_streams,
            ..Options::default()
        },
    );
    let manager = manager(server.address(), connector(4));
    let mut calls = held(&manager.channel("echo"), &server, 3).await;
    drop(manager);
    calls.abort_all();
    while calls.join_next().await.is_some() {}
    eventually("nothing is left", || {
        sockets_to(server.address.port()) == 0 && tasks() == before
    })
    .await;
}

// === what the peer says ===

#[tokio::test]
async fn a_peer_that_allows_no_streams_at_all_is_not_asked_on_other_connections() {
    let max_streams = Some(0);
    let server = EchoServer::start_with(
        "one",
        Options {
            max_streams,
            ..Options::default()
        },
    );
    let proxy = Proxy::start(server.address).await;
    let connector = connector(4).spare_for(ms(50)).unwrap();
    let manager = manager(proxy.address(), connector);
    let channel = manager.channel("echo");
    // Given calls that wait for a stream
    let mut calls = JoinSet::new();
    for _ in 0..4 {
        let mut client = EchoClient::new(channel.clone());
        calls.spawn(async move {
            let mut request = tonic::Request::new(quick());
            request.set_timeout(ms(500));
            client.unary(request).await.map(drop)
        });
    }
    // Then their time is up
    for result in calls.join_all().await {
        assert_eq!(result.unwrap_err().code(), Code::DeadlineExceeded);
    }
    // And no other connection has come, or come and gone.
    assert_eq!(proxy.accepted.load(SeqCst), 1);
}

/// A fake, as no server lowers its limit to order: while a long request is on its way to it which it does not read, and so
/// the connection cannot write, it says that it allows one stream.
#[tokio::test]
async fn a_limit_that_is_lowered_while_nothing_can_be_written_is_heeded() {
    const INITIAL_WINDOW_SIZE: u8 = 4;
    const WINDOW: u32 = (1 << 31) - 1;
    let read_on = Arc::new(Notify::new());
    let reads = read_on.clone();
    let fake = Fake::sockets(move |nth, socket| {
        let reads = reads.clone();
        async move {
            let settings = fake::setting(INITIAL_WINDOW_SIZE, WINDOW);
            let mut peer = fake::ByHand::accept(socket, &settings).await?;
            if nth > 0 {
                return peer.serve().await;
            }
            let window = (WINDOW - 65_535).to_be_bytes();
            peer.send(&fake::frame(fake::WINDOW_UPDATE, 0, 0, &window))
                .await?;
            peer.called().await?;
            // What the sockets' buffers hold is written by then.
            time::sleep(ms(300)).await;
            let one = fake::setting(fake::MAX_CONCURRENT_STREAMS, 1);
            peer.send(&fake::frame(fake::SETTINGS, 0, 0, &one)).await?;
            time::sleep(ms(100)).await;
            reads.notify_one();
            peer.idle().await
        }
    });
    let manager = manager(fake.address(), connector(2));
    let channel = manager.channel("echo");
    // Given a call that has the one stream
    let mut client = EchoClient::new(channel.clone());
    let long = tokio::spawn(async move {
        let request = EchoRequest {
            message: "a".repeat(64 << 20),
            ..EchoRequest::default()
        };
        client.unary(request).await
    });
    read_on.notified().await;
    time::sleep(ms(300)).await;
    // When another is made, then it goes over another connection, and does not wait for that stream
    let mut client = EchoClient::new(channel.clone());
    let call = time::timeout(ms(5_000), client.unary(quick()));
    call.await.unwrap().unwrap();
    assert_eq!(fake.connections(), 2);
    assert!(!long.is_finished());
    long.abort();
}

/// A fake, as a real server's GOAWAY cannot be had to order: answers each call when told to, and says goodbye on the first
/// connection when told to.
struct Leaver {
    address: String,
    accepted: Arc<AtomicUsize>,
    goodbye: Arc<Notify>,
    answer: Arc<Notify>,
}

impl Leaver {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let leaver = Self {
            address: listener.local_addr().unwrap().to_string(),
            accepted: Arc::default(),
            goodbye: Arc::default(),
            answer: Arc::default(),
        };
        let (accepted, goodbye, answer) = (
            leaver.accepted.clone(),
            leaver.goodbye.clone(),
            leaver.answer.clone(),
        );
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let first = accepted.fetch_add(1, SeqCst) == 0;
                let (goodbye, answer) = (goodbye.clone(), answer.clone());
                tokio::spawn(async move {
                    let mut connection = h2::server::handshake(socket).await.unwrap();
                    loop {
                        tokio::select! {
                            stream = connection.accept() => match stream {
                                Some(Ok((_, respond))) => drop(tokio::spawn(answered(respond, first.then(|| answer.clone())))),
                                _ => break,
                            },
                            () = goodbye.notified(), if first => connection.graceful_shutdown(),
                        }
                    }
                });
            }
        });
        leaver
    }
}

async fn answered(mut respond: h2::server::SendResponse<Bytes>, when: Option<Arc<Notify>>) {
    if let Some(when) = when {
        when.notified().await;
    }
    let head = http::Response::builder().header("content-type", "application/grpc");
    let head = head.body(()).unwrap();
    let mut stream = respond.send_response(head, false).unwrap();
    stream
        .send_data(Bytes::from_static(&[0; 5]), false)
        .unwrap();
    let mut trailers = http::HeaderMap::new();
    trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
    stream.send_trailers(trailers).unwrap();
}

#[tokio::test]
async fn a_peer_that_says_goodbye_is_dialled_before_the_next_call_and_calls_in_flight_finish() {
    // Given a call in flight
    let leaver = Leaver::start().await;
    let manager = manager(leaver.address.clone(), connector(4));
    let channel = manager.channel("echo");
    let mut client = EchoClient::new(channel.clone());
    let long = tokio::spawn(async move { client.unary(quick()).await });
    eventually("it is connected", || connections(&manager) == 1).await;
    time::sleep(ms(50)).await;
    assert!(!long.is_finished());
    // When the peer says that it takes no new ones on this connection, then another is there at once, unasked
    let began = Instant::now();
    leaver.goodbye.notify_one();
    eventually("another is there", || {
        leaver.accepted.load(SeqCst) == 2 && connections(&manager) == 1
    })
    .await;
    assert!(began.elapsed() < ms(500), "{:?}", began.elapsed());
    // And calls go there, and the first one finishes.
    for _ in 0..10 {
        EchoClient::new(channel.clone())
            .unary(quick())
            .await
            .unwrap();
    }
    leaver.answer.notify_one();
    long.await.unwrap().unwrap();
    assert_eq!(leaver.accepted.load(SeqCst), 2);
    let lost = manager.status().roles[0].endpoints[0].last_error.clone();
    let lost = lost.map(|why| why.to_string());
    assert!(
        lost.as_ref()
            .is_none_or(|why| why.contains("the peer is closing the connection")),
        "{lost:?}"
    );
}

/// A fake of raw bytes, as no server can be had that minds pings and counts them: answers settings and pings, and after the
/// third ping, but for the handshake's, says that these are too many. When each of those came goes out.
async fn minds_pings() -> (String, mpsc::UnboundedReceiver<(usize, Instant)>) {
    const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (told, pings) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        for n in 0.. {
            let (mut socket, _) = listener.accept().await.unwrap();
            let told = told.clone();
            tokio::spawn(async move {
                socket.write_all(&SETTINGS).await?;
                socket.read_exact(&mut [0; 24]).await?;
                let mut count = 0;
                loop {
                    let mut head = [0; 9];
                    socket.read_exact(&mut head).await?;
                    let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
                    socket.read_exact(&mut payload).await?;
                    match (head[3], head[4]) {
                        (4, 0) => socket.write_all(&[0, 0, 0, 4, 1, 0, 0, 0, 0]).await?,
                        (6, 0) => {
                            let head = [0, 0, 8, 6, 1, 0, 0, 0, 0];
                            socket.write_all(&[&head[..], &payload].concat()).await?;
                            if count > 0 {
                                let _ = told.send((n, Instant::now()));
                            }
                            count += 1;
                        }
                        _ => {}
                    }
                    if count == 4 {
                        let words = b"too_many_pings";
                        let head = [0, 0, 8 + words.len() as u8, 7, 0, 0, 0, 0, 0];
                        let codes = [0, 0, 0, 0, 0, 0, 0, 11];
                        socket
                            .write_all(&[&head[..], &codes, words].concat())
                            .await?;
                        return Ok::<_, std::io::Error>(());
                    }
                }
            });
        }
    });
    (address, pings)
}

#[tokio::test]
async fn a_peer_that_minds_pings_gets_half_as_many_on_the_next_connection() {
    let (address, mut pings) = minds_pings().await;
    let connector = Connector::new().keepalive(Some(ms(50)), ms(1_000)).unwrap();
    let manager = manager(address, connector);
    let _channel = manager.channel("echo");
    // Given the pings of three connections
    let mut came: [Vec<Instant>; 3] = Default::default();
    while came[2].len() < 3 {
        let ping = time::timeout(ms(10_000), pings.recv()).await;
        let (connection, at) = ping.expect("there are no more pings").unwrap();
        came[connection].push(at);
    }
    // Then they are 50, 100 and 200 ms apart at least: the answer to each is something that was read
    for (connection, least) in [(0, 50), (1, 100), (2, 200)] {
        let [first, _, third] = came[connection][..] else {
            panic!("{came:?}");
        };
        let apart = (third - first) / 2;
        assert!(
            apart >= ms(least) && apart < ms(2 * least),
            "{connection}: {apart:?}"
        );
    }
}
