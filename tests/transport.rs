//! The transport under a generated client, against real tonic servers: all four kinds of calls, flow
//! control both ways, cancellation, stream limits, keepalive, loss.

mod support;

use std::{
    sync::{Arc, atomic::Ordering::SeqCst},
    time::{Duration, Instant},
};

use bytes::Bytes;
use support::{
    eventually,
    proxy::{Blackhole, Mode, Proxy},
    server::{
        EchoServer, Options,
        pb::{EchoRequest, echo_client::EchoClient},
    },
};
use switchboard::{
    Channel, ConnectionManager, Error, Kind, Sent,
    pool::PoolConfig,
    registry::{Fixed, Session},
    transport::Connector,
};
use tokio_stream::StreamExt as _;
use tonic::{Code, Request};

fn over_one_connection_to(address: &str) -> (ConnectionManager, Channel) {
    let session = Session::new("echo", address);
    let manager = ConnectionManager::builder(Fixed::new([session]).unwrap())
        .connector(Connector::new().max_connections(1).unwrap())
        .build();
    let channel = manager.channel("echo");
    (manager, channel)
}

fn channel_to(address: &str) -> (ConnectionManager, Channel) {
    let session = Session::new("echo", address).with_id("a");
    let manager = ConnectionManager::builder(Fixed::new([session]).unwrap()).build();
    let channel = manager.channel("echo");
    (manager, channel)
}

fn message(text: &str) -> EchoRequest {
    EchoRequest {
        message: text.to_owned(),
        ..EchoRequest::default()
    }
}

fn slow(ms: u32) -> EchoRequest {
    EchoRequest {
        delay_ms: ms,
        ..message("slow")
    }
}

#[tokio::test]
async fn a_unary_call_comes_back_with_its_answer() {
    let server = EchoServer::start("a");
    let (_manager, channel) = channel_to(&server.address());
    let answer = EchoClient::new(channel)
        .unary(message("hello"))
        .await
        .unwrap();
    assert_eq!(answer.get_ref().message, "hello");
    assert_eq!(answer.get_ref().server, "a");
    let agents = server.seen.user_agents.lock().unwrap().clone();
    assert!(agents[0].starts_with("switchboard/"), "{agents:?}");
}

#[tokio::test]
async fn a_status_in_trailers_comes_back_as_it_was_sent() {
    let server = EchoServer::start("a");
    let (_manager, channel) = channel_to(&server.address());
    let mut client = EchoClient::new(channel);
    let request = EchoRequest {
        fail_with: Code::FailedPrecondition as u32,
        ..message("no")
    };
    let status = client.unary(request.clone()).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert_eq!(status.message(), "as asked: no");
    assert!(Error::of(&status).is_none(), "it is the peer's own status");

    // After messages, in real trailers.
    let request = EchoRequest {
        count: 1,
        ..request
    };
    let mut answers = client.download(request).await.unwrap().into_inner();
    let status = answers.message().await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
}

#[tokio::test]
async fn messages_larger_than_any_window_go_both_ways() {
    let server = EchoServer::start("a");
    let (_manager, channel) = channel_to(&server.address());
    let mut client = EchoClient::new(channel).max_decoding_message_size(64 << 20);
    let payload: Bytes = (0..20_000_000u32)
        .map(|n| n as u8)
        .collect::<Vec<_>>()
        .into();
    let request = EchoRequest {
        payload: payload.clone(),
        ..message("large")
    };
    let answer = client.unary(request).await.unwrap().into_inner();
    assert!(
        answer.payload == payload,
        "{} bytes came back",
        answer.payload.len()
    );
}

#[tokio::test]
async fn an_upload_longer_than_any_window_is_taken_whole() {
    let server = EchoServer::start("a");
    let (_manager, channel) = channel_to(&server.address());
    let requests = tokio_stream::iter(0..300).map(|_| EchoRequest {
        payload: vec![7; 100_000].into(),
        ..EchoRequest::default()
    });
    let answer = EchoClient::new(channel).upload(requests).await.unwrap();
    assert_eq!(answer.get_ref().messages, 300);
    assert_eq!(answer.get_ref().bytes, 30_000_000);
}

#[tokio::test]
async fn a_download_waits_for_a_slow_reader_and_loses_nothing() {
    let server = EchoServer::start("a");
    let (_manager, channel) = channel_to(&server.address());
    let mut client = EchoClient::new(channel);
    let request = EchoRequest {
        count: 400,
        size: 100_000,
        ..EchoRequest::default()
    };
    let mut answers = client.download(request).await.unwrap().into_inner();
    // Nobody reads: the server must come to a stop at the windows, far from 40 MB.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(
        server.seen.finished.load(SeqCst),
        0,
        "it was sent without being read"
    );
    // Another call on the same connection is not held up by the stream that nobody reads.
    client.clone().unary(message("meanwhile")).await.unwrap();
    let mut expected = 0;
    while let Some(answer) = answers.message().await.unwrap() {
        expected += 1;
        assert_eq!(answer.messages, expected);
        assert_eq!(answer.payload.len(), 100_000);
    }
    assert_eq!(expected, 400);
}

#[tokio::test]
async fn a_chat_goes_back_and_forth_and_ends_by_half_close() {
    let server = EchoServer::start("a");
    let (_manager, channel) = channel_to(&server.address());
    let (tx, rx) = tokio::sync::mpsc::channel(1);
    let requests = tokio_stream::wrappers::ReceiverStream::new(rx);
    let mut answers = EchoClient::new(channel)
        .chat(requests)
        .await
        .unwrap()
        .into_inner();
    for n in 0..100 {
        tx.send(message(&n.to_string())).await.unwrap();
        let answer = answers.message().await.unwrap().unwrap();
        assert_eq!(answer.message, n.to_string());
    }
    drop(tx);
    assert!(answers.message().await.unwrap().is_none());
    eventually("the server's half is done", || {
        server.seen.finished.load(SeqCst) == 1
    })
    .await;
}

#[tokio::test]
async fn an_upload_is_sent_while_nobody_polls_the_response() {
    let server = EchoServer::start("a");
    let (_manager, channel) = channel_to(&server.address());
    let (tx, rx) = tokio::sync::mpsc::channel(1);
    let requests = tokio_stream::wrappers::ReceiverStream::new(rx);
    let mut answers = EchoClient::new(channel)
        .chat(requests)
        .await
        .unwrap()
        .into_inner();
    for n in 0..10 {
        // Would hang at the second if it took a poll of `answers` to send.
        tokio::time::timeout(Duration::from_secs(5), tx.send(message(&n.to_string())))
            .await
            .expect("the request is not sent by itself")
            .unwrap();
    }
    drop(tx);
    let mut count = 0;
    while answers.message().await.unwrap().is_some() {
        count += 1;
    }
    assert_eq!(count, 10);
}

#[tokio::test]
async fn a_server_that_answers_early_ends_the_upload() {
    let server = EchoServer::start("a");
    let (_manager, channel) = channel_to(&server.address());
    let (tx, rx) = tokio::sync::mpsc::channel(1);
    tx.send(EchoRequest {
        fail_with: Code::ResourceExhausted as u32,
        ..message("enough")
    })
    .await
    .unwrap();
    let requests = tokio_stream::wrappers::ReceiverStream::new(rx);
    let status = EchoClient::new(channel).upload(requests).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    tokio::time::timeout(Duration::from_secs(1), tx.closed())
        .await
        .expect("the rest of the request is let go of");
}

// Scenario 24.
#[tokio::test]
async fn a_dropped_call_is_cancelled_at_the_server_and_gives_its_load_back() {
    let server = EchoServer::start("a");
    let (manager, channel) = channel_to(&server.address());
    let in_flight = || manager.status().roles[0].endpoints[0].in_flight;
    let mut client = EchoClient::new(channel);
    client.unary(message("warm")).await.unwrap();

    let call = tokio::spawn({
        let mut client = client.clone();
        async move { client.unary(slow(10_000)).await }
    });
    eventually("it is there", || server.seen.started.load(SeqCst) == 2).await;
    assert_eq!(in_flight(), 1);
    call.abort();
    let dropped = Instant::now();
    eventually("the server sees it", || {
        server.seen.cancelled.load(SeqCst) == 1
    })
    .await;
    assert!(
        dropped.elapsed() < Duration::from_millis(100),
        "{:?}",
        dropped.elapsed()
    );
    assert_eq!(in_flight(), 0);

    // A response stream dropped in the middle is a dropped call too.
    let request = EchoRequest {
        count: 1000,
        size: 100_000,
        ..EchoRequest::default()
    };
    let mut answers = client.download(request).await.unwrap().into_inner();
    answers.message().await.unwrap().unwrap();
    assert_eq!(in_flight(), 1);
    drop(answers);
    let dropped = Instant::now();
    eventually("the server sees it", || {
        server.seen.cancelled.load(SeqCst) == 2
    })
    .await;
    let took = dropped.elapsed();
    assert!(took < Duration::from_millis(100), "a stream: {took:?}");
    assert_eq!(in_flight(), 0);

    // And so is an upload dropped before it was answered.
    let (tx, rx) = tokio::sync::mpsc::channel(1);
    let requests = tokio_stream::wrappers::ReceiverStream::new(rx);
    let call = tokio::spawn({
        let mut client = client.clone();
        async move { client.upload(requests).await }
    });
    tx.send(message("one")).await.unwrap();
    eventually("it is there", || server.seen.started.load(SeqCst) == 4).await;
    call.abort();
    let dropped = Instant::now();
    // hyper's server shows its handler a cancelled upload as one that has ended, so either will do.
    eventually("the server sees it", || {
        server.seen.cancelled.load(SeqCst) + server.seen.finished.load(SeqCst) == 4
    })
    .await;
    let took = dropped.elapsed();
    assert!(took < Duration::from_millis(100), "an upload: {took:?}");
    assert_eq!(in_flight(), 0);
    client.unary(message("still well")).await.unwrap();
}

#[tokio::test]
async fn a_thousand_cancelled_calls_leave_the_connection_to_the_others() {
    let server = EchoServer::start_with(
        "a",
        Options {
            max_streams: Some(150),
            ..Options::default()
        },
    );
    let (manager, channel) = channel_to(&server.address());
    let in_flight = || manager.status().roles[0].endpoints[0].in_flight;
    let client = EchoClient::new(channel);
    client.clone().unary(message("warm")).await.unwrap();
    let patient = tokio::spawn({
        let mut client = client.clone();
        async move { client.unary(slow(1500)).await }
    });
    let many = |count| -> Vec<_> {
        let call = |_| {
            let mut client = client.clone();
            tokio::spawn(async move { client.unary(slow(60_000)).await })
        };
        (0..count).map(call).collect()
    };
    for round in 0..20 {
        let calls = many(100);
        // Cancelled wherever they are by then: waiting for a stream, on their way, or there.
        tokio::time::sleep(Duration::from_millis(round % 6)).await;
        for call in calls {
            call.abort();
        }
    }
    let aborted = Instant::now();
    // All that came to the server are cancelled there; nothing else would end them within a minute.
    let seen = &server.seen;
    let cancelled = || seen.cancelled.load(SeqCst);
    let there = || {
        let over = cancelled() + seen.finished.load(SeqCst);
        seen.started.load(SeqCst) - over
    };
    eventually("all cancels arrive", || there() <= 1).await;
    let took = aborted.elapsed();
    println!(
        "{} of 2,000 came there, and were cancelled {took:?} after the last",
        cancelled()
    );
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert!(cancelled() > 100, "only {} came so far", cancelled());
    patient
        .await
        .unwrap()
        .expect("one call's fate is not another's");
    assert_eq!((in_flight(), seen.finished.load(SeqCst)), (0, 2));
    // And every stream can be had again.
    let calls = many(150);
    eventually("there is room for 150", || there() == 150).await;
    for call in calls {
        call.abort();
    }
    eventually("those are cancelled too", || there() == 0).await;
    assert_eq!(in_flight(), 0);
}

#[tokio::test]
async fn calls_cancelled_on_a_long_line_give_their_streams_back_soon_and_kill_no_other() {
    let server = EchoServer::start_with(
        "a",
        Options {
            max_streams: Some(201),
            ..Options::default()
        },
    );
    let proxy = Proxy::start(server.address).await;
    let (manager, channel) = channel_to(&proxy.address());
    let mut client = EchoClient::new(channel);
    let in_flight = || manager.status().roles[0].endpoints[0].in_flight;
    // The other call: it answers for as long as it is asked.
    let (tx, rx) = tokio::sync::mpsc::channel(1);
    let requests = tokio_stream::wrappers::ReceiverStream::new(rx);
    let mut answers = client.chat(requests).await.unwrap().into_inner();
    tx.send(message("before")).await.unwrap();
    answers.message().await.unwrap().unwrap();

    proxy.delay(Duration::from_millis(40));
    let calls: Vec<_> = (0..200)
        .map(|_| {
            let mut client = client.clone();
            tokio::spawn(async move { client.unary(slow(60_000)).await })
        })
        .collect();
    eventually("all are there", || server.seen.started.load(SeqCst) == 201).await;
    assert_eq!(in_flight(), 201);
    for call in &calls {
        call.abort();
    }
    let began = Instant::now();
    // No stream is free but those of the cancelled.
    client.unary(message("after")).await.unwrap();
    let first = began.elapsed();
    eventually("every cancel arrives", || {
        server.seen.cancelled.load(SeqCst) == 200
    })
    .await;
    let last = began.elapsed();
    println!("a stream after {first:?}, all cancelled after {last:?}");
    // Three rounds of 80 ms by themselves.
    assert!(last < Duration::from_secs(1), "{first:?}, {last:?}");
    assert_eq!(in_flight(), 1);
    tx.send(message("still well")).await.unwrap();
    let answer = answers.message().await.unwrap().unwrap();
    assert_eq!(answer.message, "still well");
    drop(tx);
    assert!(answers.message().await.unwrap().is_none());
    drop(answers);
    assert_eq!(in_flight(), 0);
    assert_eq!(proxy.accepted.load(SeqCst), 1, "one connection is enough");
}

#[tokio::test]
async fn a_dropped_uploads_body_is_dropped_with_it_even_when_its_reset_waits() {
    let server = EchoServer::start("a");
    let proxy = Proxy::start(server.address).await;
    let (_manager, channel) = channel_to(&proxy.address());
    let client = EchoClient::new(channel);
    let seen = server.seen.clone();
    // More than are reset before the peer has shown that it keeps up.
    let calls: Vec<_> = (0..40)
        .map(|_| {
            let mut client = client.clone();
            tokio::spawn(async move { client.unary(slow(60_000)).await })
        })
        .collect();
    let owned = Arc::new(());
    let upload = tokio::spawn({
        let (mut client, owned) = (client.clone(), owned.clone());
        let requests =
            tokio_stream::iter(0..1)
                .chain(tokio_stream::pending())
                .map(move |n: i32| {
                    let _owned = &owned;
                    message(&n.to_string())
                });
        async move { client.upload(requests).await }
    });
    eventually("all are there", || seen.started.load(SeqCst) == 41).await;
    assert_eq!(Arc::strong_count(&owned), 2);

    // From here on an answer takes two seconds.
    proxy.delay(Duration::from_secs(1));
    for call in calls {
        call.abort();
        let _ = call.await;
    }
    upload.abort();
    let _ = upload.await;
    let began = Instant::now();
    eventually("the body is dropped", || Arc::strong_count(&owned) == 1).await;
    let took = began.elapsed();
    let (cancelled, finished) = (
        || seen.cancelled.load(SeqCst),
        || seen.finished.load(SeqCst),
    );
    assert!(took < Duration::from_millis(500), "it took {took:?}");
    assert_eq!((cancelled(), finished()), (0, 0), "nothing is there yet");
    // The server is told in the end. (hyper shows a handler a cancelled upload as one that has ended.)
    eventually("every cancel arrives", || cancelled() + finished() == 41).await;
    println!(
        "the body after {took:?}, the server after {:?}",
        began.elapsed()
    );
    assert!(
        began.elapsed() > Duration::from_secs(2),
        "its reset did not wait: {:?}",
        began.elapsed()
    );
    assert_eq!(proxy.accepted.load(SeqCst), 1);
}

#[tokio::test]
async fn a_peer_that_is_full_is_passed_by_while_another_has_room() {
    let full = EchoServer::start_with(
        "full",
        Options {
            max_streams: Some(1),
            ..Options::default()
        },
    );
    let roomy = EchoServer::start("roomy");
    let sessions = [
        Session::new("echo", full.address()).with_id("full"),
        Session::new("echo", roomy.address()).with_id("roomy"),
    ];
    let connector = Connector::new().max_connections(1).unwrap();
    let manager = ConnectionManager::builder(Fixed::new(sessions).unwrap())
        .connector(connector)
        .build();
    let channel = manager.channel("echo");
    let mut held = Vec::new();
    // By its load alone, the full one would be the pick.
    for (id, calls) in [("full", 1), ("roomy", 3)] {
        let client = EchoClient::new(channel.to(id));
        client.clone().unary(message("warm")).await.unwrap();
        held.extend((0..calls).map(|_| {
            let mut client = client.clone();
            tokio::spawn(async move { client.unary(slow(60_000)).await })
        }));
    }
    eventually("all are held", || {
        full.seen.started.load(SeqCst) == 2 && roomy.seen.started.load(SeqCst) == 4
    })
    .await;
    let began = Instant::now();
    for n in 0..50 {
        let mut request = Request::new(message("anybody"));
        request.set_timeout(Duration::from_secs(5));
        let answer = EchoClient::new(channel.clone()).unary(request).await;
        let answer = answer.unwrap_or_else(|s| panic!("call {n}: {s}\n{}", manager.status()));
        assert_eq!(answer.get_ref().server, "roomy");
    }
    let took = began.elapsed();
    assert!(took < Duration::from_secs(2), "50 calls took {took:?}");
    // Who asks for the full one waits for it.
    let pinned = tokio::spawn({
        let mut client = EchoClient::new(channel.to("full"));
        async move { client.unary(message("you")).await }
    });
    held.swap_remove(0).abort();
    let answer = pinned.await.unwrap().unwrap();
    assert_eq!(answer.get_ref().server, "full");
}

#[tokio::test]
async fn metadata_that_is_too_large_costs_only_its_own_call() {
    let server = EchoServer::start("a");
    let proxy = Proxy::start(server.address).await;
    let (manager, channel) = channel_to(&proxy.address());
    let mut client = EchoClient::new(channel);
    client.unary(message("warm")).await.unwrap();
    let others: Vec<_> = (0..10)
        .map(|_| {
            let mut client = client.clone();
            tokio::spawn(async move { client.unary(slow(1000)).await })
        })
        .collect();
    eventually("all are there", || server.seen.started.load(SeqCst) == 11).await;
    let mut with = async |size: usize| {
        let mut request = Request::new(message("large"));
        let value = "x".repeat(size).parse().unwrap();
        request.metadata_mut().insert("x-large", value);
        client.unary(request).await.map(drop)
    };
    with(10_000).await.expect("that is not too large");
    // More than this server takes, and less than we refuse: it says so, and to this call alone.
    for size in [20_000, 60_000] {
        let status = with(size).await.unwrap_err();
        println!("{size} bytes: {status}");
    }
    for size in [66_000, 200_000, 1_000_000] {
        let status = with(size).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{size}: {status}");
        let error = Error::of(&status).unwrap();
        assert_eq!(
            (error.kind(), error.sent()),
            (Kind::Invalid, Sent::Unsent),
            "{size}: {status}"
        );
        assert!(status.message().contains("at most 65536"), "{status}");
    }
    for other in others {
        other
            .await
            .unwrap()
            .expect("another call's headers are its own");
    }
    assert_eq!(server.seen.started.load(SeqCst), 12);
    assert_eq!(proxy.accepted.load(SeqCst), 1, "the connection is as good");
    assert_eq!(manager.status().roles[0].endpoints[0].in_flight, 0);
}

#[test]
fn a_body_that_outlives_its_runtime_ends_with_an_error() {
    let server = EchoServer::start("a");
    let (first, second) = (runtime(), runtime());
    let (_manager, channel) = {
        let _entered = first.enter();
        channel_to(&server.address())
    };
    let bodies = [None, Some(Duration::from_secs(60))].map(|timeout| {
        let mut request = Request::new(EchoRequest {
            count: 1000,
            ..slow(20)
        });
        if let Some(timeout) = timeout {
            request.set_timeout(timeout);
        }
        second.block_on(async {
            let mut client = EchoClient::new(channel.clone());
            let mut answers = client.download(request).await.unwrap().into_inner();
            answers.message().await.unwrap().expect("it is well");
            (timeout, answers)
        })
    });
    // A call, too, that has no answer yet.
    let waiting = second.spawn({
        let mut client = EchoClient::new(channel.clone());
        async move { client.unary(slow(60_000)).await }
    });
    second.block_on(eventually("it is there", || {
        server.seen.started.load(SeqCst) == 3
    }));
    first.shutdown_timeout(Duration::from_secs(5));
    second.block_on(async {
        for (timeout, mut answers) in bodies {
            let status = loop {
                match answers.message().await {
                    Ok(answer) => drop(answer.expect("it does not end as if it were whole")),
                    Err(status) => break status,
                }
            };
            println!("timeout {timeout:?}: {status}");
            let error = Error::of(&status).expect("ours");
            assert_eq!(error.sent(), Sent::Sent, "timeout {timeout:?}: {status}");
        }
        let status = waiting.await.unwrap().unwrap_err();
        println!("a call: {status}");
        let status = EchoClient::new(channel).unary(message("x")).await;
        assert_eq!(status.unwrap_err().code(), Code::Cancelled);
    });
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

#[tokio::test]
async fn the_peers_limit_on_streams_is_kept_to() {
    let server = EchoServer::start_with(
        "a",
        Options {
            max_streams: Some(5),
            ..Options::default()
        },
    );
    let (_manager, channel) = over_one_connection_to(&server.address());
    let calls: Vec<_> = (0..60)
        .map(|_| {
            let mut client = EchoClient::new(channel.clone());
            tokio::spawn(async move { client.unary(slow(10)).await })
        })
        .collect();
    for call in calls {
        call.await.unwrap().unwrap();
    }
    assert_eq!(server.seen.most_at_once.load(SeqCst), 5);

    // With all streams taken, one more waits no longer than its deadline, and takes nobody's place.
    let held: Vec<_> = (0..5)
        .map(|_| {
            let mut client = EchoClient::new(channel.clone());
            tokio::spawn(async move { client.unary(slow(700)).await })
        })
        .collect();
    eventually("all are taken", || server.seen.started.load(SeqCst) == 65).await;
    let mut request = Request::new(message("late"));
    request.set_timeout(Duration::from_millis(100));
    let began = Instant::now();
    let status = EchoClient::new(channel.clone())
        .unary(request)
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(
        began.elapsed() < Duration::from_millis(200),
        "{:?}",
        began.elapsed()
    );
    for call in held {
        call.await.unwrap().unwrap();
    }
    EchoClient::new(channel)
        .unary(message("after"))
        .await
        .unwrap();
}

#[tokio::test]
async fn streams_that_end_together_are_given_to_as_many_who_wait() {
    // Given a peer that allows two streams, which are taken, and three calls that wait for one
    let options = Options {
        max_streams: Some(2),
        ..Options::default()
    };
    let server = EchoServer::start_with("a", options);
    let (_manager, channel) = over_one_connection_to(&server.address());
    let mut held = Vec::new();
    for _ in 0..2 {
        let request = EchoRequest {
            count: 1000,
            ..slow(20)
        };
        let mut client = EchoClient::new(channel.clone());
        held.push(client.download(request).await.unwrap());
    }
    let waiting: Vec<_> = (0..3)
        .map(|_| {
            let mut client = EchoClient::new(channel.clone());
            tokio::spawn(async move { client.unary(message("next")).await })
        })
        .collect();
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    assert_eq!(server.seen.started.load(SeqCst), 2, "they wait");
    // When both end, before any of those who wait has run
    drop(held);
    // Then nobody sleeps beside a stream that is free
    for (n, call) in waiting.into_iter().enumerate() {
        let answer = tokio::time::timeout(Duration::from_secs(5), call).await;
        let answer = answer.unwrap_or_else(|_| panic!("call {n} was not woken"));
        answer.unwrap().unwrap();
    }
}

// Scenario 7, with one peer; `tests/pool.rs` has the part with two.
#[tokio::test]
async fn a_peer_that_falls_silent_is_found_out_by_keepalive() {
    let server = EchoServer::start("a");
    let proxy = Proxy::start(server.address).await;
    let session = Session::new("echo", proxy.address()).with_id("a");
    let keepalive = Connector::new()
        .keepalive(Some(Duration::from_millis(500)), Duration::from_millis(500))
        .unwrap();
    let manager = ConnectionManager::builder(Fixed::new([session]).unwrap())
        .connector(keepalive)
        .build();
    let mut client = EchoClient::new(manager.channel("echo"));
    client.unary(message("warm")).await.unwrap();
    // Quiet for three intervals: pings are answered, and nothing is dialled anew.
    tokio::time::sleep(Duration::from_millis(1700)).await;
    assert_eq!(proxy.accepted.load(SeqCst), 1);

    let call = tokio::spawn(async move { client.unary(slow(60_000)).await });
    eventually("it is there", || server.seen.started.load(SeqCst) == 2).await;
    proxy.set(Mode::Swallow);
    let began = Instant::now();
    let status = call.await.unwrap().unwrap_err();
    assert!(
        began.elapsed() < Duration::from_millis(1500),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("keepalive"), "{status}");
    assert_eq!(Error::of(&status).map(Error::sent), Some(Sent::Sent));
}

#[tokio::test]
async fn a_long_call_that_says_nothing_outlives_many_keepalives() {
    let server = EchoServer::start("a");
    let session = Session::new("echo", server.address()).with_id("a");
    let keepalive = Connector::new()
        .keepalive(Some(Duration::from_millis(50)), Duration::from_millis(300))
        .unwrap();
    let manager = ConnectionManager::builder(Fixed::new([session]).unwrap())
        .connector(keepalive)
        .build();
    let mut client = EchoClient::new(manager.channel("echo"));
    client.unary(slow(1500)).await.unwrap();
}

#[tokio::test]
async fn a_lost_connection_fails_its_calls_at_once_and_is_dialled_again() {
    let server = EchoServer::start("a");
    let proxy = Proxy::start(server.address).await;
    let (_manager, channel) = channel_to(&proxy.address());
    let mut client = EchoClient::new(channel);
    client.unary(message("warm")).await.unwrap();
    let call = tokio::spawn({
        let mut client = client.clone();
        async move { client.unary(slow(60_000)).await }
    });
    eventually("it is there", || server.seen.started.load(SeqCst) == 2).await;
    let began = Instant::now();
    proxy.reset();
    let status = call.await.unwrap().unwrap_err();
    assert!(
        began.elapsed() < Duration::from_millis(100),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    let error = Error::of(&status).expect("the error is in the status");
    assert_eq!(error.kind(), Kind::ConnectionLost);
    assert_eq!(error.peer().map(|peer| &*peer.id), Some("a"));
    // The next call waits for the redial and does not fail.
    client.unary(message("again")).await.unwrap();
    assert_eq!(proxy.accepted.load(SeqCst), 2);
}

// Scenario 9, the caller's side; scenario 23 in part.
#[tokio::test]
async fn a_deadline_holds_while_connecting_calling_and_reading() {
    let blackhole = Blackhole::new();
    let (_manager, channel) = channel_to(&blackhole.address());
    let with_timeout = |request: EchoRequest, ms| {
        let mut request = Request::new(request);
        request.set_timeout(Duration::from_millis(ms));
        request
    };
    let began = Instant::now();
    let status = EchoClient::new(channel)
        .unary(with_timeout(message("x"), 100))
        .await
        .unwrap_err();
    assert!(
        began.elapsed() < Duration::from_millis(150),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(status.message().contains("connecting"), "{status}");
    assert_eq!(Error::of(&status).map(Error::sent), Some(Sent::Unsent));

    let server = EchoServer::start("a");
    let (_manager, channel) = channel_to(&server.address());
    let mut client = EchoClient::new(channel);
    client.unary(message("warm")).await.unwrap();
    for ms in [1, 2, 5, 10] {
        let status = client.unary(with_timeout(slow(500), ms)).await.unwrap_err();
        assert_eq!(status.code(), Code::DeadlineExceeded, "{ms} ms: {status}");
    }
    let status = client.unary(with_timeout(slow(500), 0)).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert_eq!(Error::of(&status).map(Error::sent), Some(Sent::Unsent));

    // The headers come at once, the messages never: reading is under the deadline too.
    let request = EchoRequest {
        count: 5,
        ..slow(10_000)
    };
    let mut answers = client
        .download(with_timeout(request, 100))
        .await
        .unwrap()
        .into_inner();
    let status = answers.message().await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    eventually("all are cancelled", || {
        server.seen.cancelled.load(SeqCst) >= 1
    })
    .await;
}

// What a machine makes of localhost is its own affair: one address, or also ::1, which refuses here. That
// all of several are tried is tested over given lists, in `src/transport/dial/tcp.rs`.
#[tokio::test]
async fn a_peer_is_dialled_by_name() {
    let server = EchoServer::start("a");
    let name = format!("localhost:{}", server.address.port());
    let addresses: Vec<_> = tokio::net::lookup_host(&name).await.unwrap().collect();
    println!("{name} is {addresses:?}");
    let (manager, channel) = channel_to(&name);
    let answer = EchoClient::new(channel).unary(message("by name")).await;
    assert_eq!(answer.unwrap().get_ref().server, "a");
    let peer = manager.status().roles[0].endpoints[0].peer.clone();
    assert_eq!(
        *peer.address, name,
        "it is called what it was registered as"
    );
}

#[tokio::test]
async fn a_peer_that_does_not_speak_http2_is_never_called_ready() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let garbage = tokio::spawn(async move {
        loop {
            use tokio::io::AsyncWriteExt as _;
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.write_all(b"220 mail.example ESMTP\r\n").await;
        }
    });
    let (manager, channel) = channel_to(&address);
    let status = EchoClient::new(channel)
        .unary(message("x"))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(
        status.message().contains("none is connected")
            || status.message().contains("not connected"),
        "{status}"
    );
    assert_eq!(manager.status().roles[0].endpoints[0].in_flight, 0);
    garbage.abort();
}

#[tokio::test]
async fn a_silent_peer_fails_the_attempt_when_its_time_is_up() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let session = Session::new("echo", address).with_id("a");
    let config = PoolConfig::default()
        .attempt_timeout(Duration::from_millis(200))
        .unwrap();
    let manager = ConnectionManager::builder(Fixed::new([session]).unwrap())
        .pools(config)
        .build();
    let began = Instant::now();
    let status = EchoClient::new(manager.channel("echo"))
        .unary(message("x"))
        .await
        .unwrap_err();
    assert!(
        began.elapsed() < Duration::from_millis(400),
        "{:?}",
        began.elapsed()
    );
    assert!(
        status
            .message()
            .contains("not connected within 200ms, waiting for its HTTP/2 settings"),
        "{status}"
    );
}

#[tokio::test]
async fn it_works_inside_anybodys_tower_stack_and_interceptors() {
    use tower::ServiceBuilder;
    use tower_http::{set_header::SetRequestHeaderLayer, trace::TraceLayer};

    let server = EchoServer::start("a");
    let (_manager, channel) = channel_to(&server.address());
    let agent = http::HeaderValue::from_static("mine/1");
    let stack = ServiceBuilder::new()
        .concurrency_limit(10)
        .timeout(Duration::from_secs(5))
        .layer(TraceLayer::new_for_grpc())
        .layer(SetRequestHeaderLayer::overriding(
            http::header::USER_AGENT,
            agent,
        ))
        .service(channel.clone());
    EchoClient::new(stack)
        .unary(message("stacked"))
        .await
        .unwrap();
    assert_eq!(server.seen.user_agents.lock().unwrap()[0], "mine/1");

    let mut intercepted =
        EchoClient::with_interceptor(channel.clone(), |mut request: Request<()>| {
            request
                .metadata_mut()
                .insert("user-agent", "intercepted/1".parse().unwrap());
            Ok(request)
        });
    intercepted.unary(message("intercepted")).await.unwrap();

    let boxed = tower::util::BoxCloneSyncService::new(channel.clone());
    EchoClient::new(boxed)
        .unary(message("boxed"))
        .await
        .unwrap();
    let buffered = tower::buffer::Buffer::new(channel, 8);
    EchoClient::new(buffered)
        .unary(message("buffered"))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_tonic_endpoint_can_serve_instead_of_our_transport() {
    use switchboard::{
        Pool, Registry as _,
        discover::Member,
        endpoint::{BoxError, Connected},
    };

    let server = EchoServer::start("a");
    let registry = Fixed::new([Session::new("echo", server.address()).with_id("a")]).unwrap();
    let connect = |member: &Member| {
        let uri = format!("http://{}", member.session().address());
        async move {
            let endpoint = tonic::transport::Endpoint::from_shared(uri)?;
            Ok::<_, BoxError>(Connected::new(endpoint.connect().await?))
        }
    };
    let updates = registry.discover("echo").unwrap().updates();
    let pool: Pool<_> = Pool::new("echo", PoolConfig::default(), updates, connect).unwrap();
    let answer = EchoClient::new(pool.clone())
        .unary(message("hello"))
        .await
        .unwrap();
    assert_eq!(answer.get_ref().server, "a");
    EchoClient::new(pool.to("a"))
        .unary(message("hello"))
        .await
        .unwrap();
    let status = EchoClient::new(pool.to("b"))
        .unary(message("hello"))
        .await
        .unwrap_err();
    assert_eq!(status.message(), "role echo: instance b is not registered");
}

#[test]
fn a_channel_is_what_callers_need_it_to_be() {
    fn is<T: Clone + Send + Sync + Unpin + std::fmt::Debug + 'static>() {}
    is::<Channel>();
    is::<ConnectionManager>();
    fn sends<T: Send>() {}
    sends::<switchboard::manager::ResponseFuture>();
    sends::<switchboard::manager::ResponseBody>();
}
