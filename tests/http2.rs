//! Peers that refuse, go away and misbehave, in HTTP/2's own terms.
//!
//! These are fakes (`support/fake.rs`), because a real tonic server cannot be brought to do it to order.

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;
use h2::Reason;
use http_body_util::BodyExt as _;
use support::{
    eventually,
    fake::{self, ByHand, Fake, GOAWAY, MAX_CONCURRENT_STREAMS, SETTINGS, frame, setting},
    server::{
        EchoServer,
        pb::{EchoRequest, echo_client::EchoClient},
    },
};
use switchboard::{
    Channel, ConnectionManager, Error, Kind, Sent, Session, pool::PoolConfig, registry::Fixed,
    transport::Connector,
};
use tokio::{net::TcpStream, sync::Notify, time};
use tonic::{Code, Status};
use tower::ServiceExt as _;

fn channel_to(address: &str) -> (ConnectionManager, Channel) {
    let session = Session::new("echo", address).with_id("a");
    let manager = ConnectionManager::builder(Fixed::new([session]).unwrap())
        .pools(
            PoolConfig::default()
                .max_wait(Duration::from_secs(5))
                .unwrap(),
        )
        .build();
    let channel = manager.channel("echo");
    (manager, channel)
}

async fn call(channel: &Channel) -> Result<(), Status> {
    let call = EchoClient::new(channel.clone())
        .unary(EchoRequest::default())
        .await;
    call.map(drop)
}

#[tokio::test]
async fn a_refused_stream_was_not_processed_is_repeated_once_and_hurts_no_other() {
    let fake = Fake::streams(|stream, _, mut respond| match stream {
        0 | 2 | 3 => respond.send_reset(Reason::REFUSED_STREAM),
        _ => fake::answer(respond),
    });
    let (_manager, channel) = channel_to(&fake.address());
    // Refused, and repeated at once
    call(&channel).await.unwrap();
    // Refused again when it is repeated
    let status = call(&channel).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    let error = Error::of(&status).unwrap();
    assert_eq!(
        (error.kind(), error.sent()),
        (Kind::Refused, Sent::Unprocessed)
    );
    call(&channel).await.unwrap();
    assert_eq!(fake.connections(), 1, "the connection is as good as before");
}

// Another transport's word for it is understood too.
#[tokio::test]
async fn a_refused_stream_is_repeated_through_tonics_own_channel() {
    let fake = Fake::streams(|stream, _, mut respond| match stream {
        0 => respond.send_reset(Reason::REFUSED_STREAM),
        _ => fake::answer(respond),
    });
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", fake.address));
    let service = tower::ServiceBuilder::new()
        .layer(switchboard::RetryLayer::transparent())
        .service(endpoint.unwrap().connect_lazy());
    let result = EchoClient::new(service).unary(EchoRequest::default()).await;
    result.unwrap();
    assert_eq!(fake.connections(), 1, "it goes out once more");
}

// A server that says so after it has answered has it wrong, and is not to be believed: a repetition could be
// the second execution.
#[tokio::test]
async fn a_stream_refused_after_its_answer_began_may_have_been_processed() {
    /// The caller has read what there is.
    static READ: tokio::sync::Notify = tokio::sync::Notify::const_new();
    let fake = Fake::streams(|stream, _, mut respond| {
        let mut answer = respond.send_response(fake::head(), false).unwrap();
        // The first has headers only, the second a message too.
        if stream > 0 {
            answer
                .send_data(Bytes::from_static(&[0; 5]), false)
                .unwrap();
        }
        tokio::spawn(async move {
            READ.notified().await;
            answer.send_reset(Reason::REFUSED_STREAM);
        });
    });
    let (_manager, channel) = channel_to(&fake.address());
    for messages in 0..2 {
        let mut answers = EchoClient::new(channel.clone())
            .download(EchoRequest::default())
            .await
            .unwrap()
            .into_inner();
        for _ in 0..messages {
            answers.message().await.unwrap().expect("it has a message");
        }
        READ.notify_one();
        let status = answers.message().await.unwrap_err();
        let error = Error::of(&status).unwrap();
        assert_eq!(
            (error.kind(), error.sent()),
            (Kind::Reset, Sent::Sent),
            "after {messages} messages: {status}"
        );
    }
    assert_eq!(fake.connections(), 1, "it was the stream's end alone");
}

#[tokio::test]
async fn a_reset_has_grpcs_code_for_it_and_may_have_been_processed() {
    for (reason, code) in [
        (Reason::CANCEL, Code::Cancelled),
        (Reason::ENHANCE_YOUR_CALM, Code::ResourceExhausted),
        (Reason::INADEQUATE_SECURITY, Code::PermissionDenied),
        (Reason::PROTOCOL_ERROR, Code::Internal),
        (Reason::INTERNAL_ERROR, Code::Internal),
    ] {
        let fake = Fake::streams(move |_, _, mut respond| respond.send_reset(reason));
        let (_manager, channel) = channel_to(&fake.address());
        let status = call(&channel).await.unwrap_err();
        assert_eq!(status.code(), code, "{reason:?}: {status}");
        let error = Error::of(&status).unwrap();
        assert_eq!((error.kind(), error.sent()), (Kind::Reset, Sent::Sent));
    }
}

#[tokio::test]
async fn calls_above_a_goaway_are_made_again_on_the_next_connection() {
    let server = EchoServer::start("a");
    let behind = server.address;
    let fake = Fake::sockets(move |nth, mut client| async move {
        if nth > 0 {
            let mut server = TcpStream::connect(behind).await?;
            tokio::io::copy_bidirectional(&mut client, &mut server).await?;
            return Ok(());
        }
        // The first connection goes away at its third call: only the first was taken, and is never answered. No library
        // says that. The next ones are a real server's.
        let mut connection = ByHand::accept(client, &[]).await?;
        for _ in 0..3 {
            connection.called().await?;
        }
        let last_stream_1_no_error = [0, 0, 0, 1, 0, 0, 0, 0];
        let goaway = frame(GOAWAY, 0, 0, &last_stream_1_no_error);
        connection.send(&goaway).await?;
        connection.idle().await
    });
    let (manager, channel) = channel_to(&fake.address());
    let in_flight = || {
        let status = manager.status();
        let endpoint = status.roles[0].endpoints.first();
        endpoint.map_or(0, |endpoint| endpoint.in_flight)
    };
    let mut calls = Vec::new();
    for n in 1..=3 {
        let channel = channel.clone();
        calls.push(tokio::spawn(async move { call(&channel).await }));
        if n < 3 {
            eventually("it is in flight", || in_flight() == n).await;
        }
    }
    // Those above it wait for the next connection, and are made there.
    calls.pop().unwrap().await.unwrap().unwrap();
    calls.pop().unwrap().await.unwrap().unwrap();
    assert_eq!(manager.status().roles[0].repeated.unprocessed, 2);
    // New calls wait for the new connection; the first is still the old one's.
    for _ in 0..10 {
        call(&channel).await.unwrap();
    }
    let first = calls.pop().unwrap();
    assert!(
        !first.is_finished(),
        "it was taken, and is not answered yet"
    );
    // And is ended with the manager, though its connection takes no calls any more.
    manager.stop().await;
    let status = first.await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::Cancelled, "{status}");
}

// As servers do to have their clients balanced anew, grpc-go's after `MaxConnectionAge`, nginx after so many requests.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_says_goodbye_every_thousand_calls_fails_none_of_256_at_once() {
    const CALLERS: usize = 256;
    const CALLS: usize = 100;
    const GOODBYE: usize = 1000;
    let executed = Arc::new(AtomicUsize::new(0));
    let count = executed.clone();
    let fake = Fake::sockets(move |_, socket| {
        let count = count.clone();
        async move {
            let connection = h2::server::handshake(socket).await;
            let mut connection = connection.map_err(std::io::Error::other)?;
            let mut taken = 0;
            while let Some(Ok((_, respond))) = connection.accept().await {
                let count = count.clone();
                tokio::spawn(async move {
                    time::sleep(Duration::from_millis(fastrand::u64(0..3))).await;
                    count.fetch_add(1, SeqCst);
                    fake::answer(respond);
                });
                taken += 1;
                if taken == GOODBYE {
                    connection.graceful_shutdown();
                }
            }
            Ok(())
        }
    });
    let (_manager, channel) = channel_to(&fake.address());
    let callers = (0..CALLERS).map(|_| {
        let channel = channel.clone();
        tokio::spawn(async move {
            for _ in 0..CALLS {
                call(&channel).await?;
            }
            Ok::<_, Status>(())
        })
    });
    for caller in futures_util::future::join_all(callers).await {
        caller.unwrap().unwrap();
    }
    // Each once, on the one connection or the next.
    assert_eq!(executed.load(SeqCst), CALLERS * CALLS);
    let connections = fake.connections();
    assert!(
        connections >= CALLERS * CALLS / GOODBYE - 4,
        "{connections}"
    );
}

#[tokio::test]
async fn a_graceful_stop_lets_calls_finish_and_sends_new_ones_elsewhere() {
    let (mut going, staying) = (EchoServer::start("going"), EchoServer::start("staying"));
    let sessions = [
        Session::new("echo", going.address()).with_id("going"),
        Session::new("echo", staying.address()).with_id("staying"),
    ];
    let manager = ConnectionManager::builder(Fixed::new(sessions).unwrap()).build();
    let channel = manager.channel("echo");
    let unary = |channel: &Channel, delay_ms| {
        let request = EchoRequest {
            delay_ms,
            ..EchoRequest::default()
        };
        let mut client = EchoClient::new(channel.clone());
        async move {
            client
                .unary(request)
                .await
                .map(|answer| answer.into_inner().server)
        }
    };
    for id in ["going", "staying"] {
        unary(&channel.to(id), 0).await.unwrap();
    }
    let long: Vec<_> = (0..20)
        .map(|_| tokio::spawn(unary(&channel.to("going"), 500)))
        .collect();
    eventually("all are there", || going.seen.started.load(SeqCst) == 21).await;
    going.stop_gracefully();
    // From here on, not one fails.
    for _ in 0..200 {
        unary(&channel, 0).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    for call in long {
        assert_eq!(call.await.unwrap().unwrap(), "going");
    }
}

// A server of any library says that it does not want the rest (RST_STREAM, NO_ERROR); HTTP/2 does not demand it.
#[tokio::test]
async fn an_answer_to_half_of_a_request_gives_its_stream_back() {
    // Given a peer that takes one call at a time, has room for half of its message, and answers at once
    let fake = Fake::sockets(|_, socket| async move {
        let one = setting(MAX_CONCURRENT_STREAMS, 1);
        ByHand::accept(socket, &one).await?.serve().await
    });
    let session = Session::new("echo", fake.address());
    let manager = ConnectionManager::builder(Fixed::new([session]).unwrap())
        .connector(Connector::new().max_connections(1).unwrap())
        .build();
    let mut client = EchoClient::new(manager.channel("echo"));
    let large = EchoRequest {
        payload: vec![0; 200_000].into(),
        ..EchoRequest::default()
    };
    // Then each call is answered, and the next one has a stream.
    for n in 0..5 {
        let calls = async {
            client.unary(large.clone()).await?;
            // One message, which is there when the stream has begun, and the end.
            let parts = tokio_stream::iter([EchoRequest::default(), large.clone()]);
            client.upload(parts).await
        };
        let calls = time::timeout(Duration::from_secs(2), calls).await;
        calls.unwrap_or_else(|_| panic!("{n}: it hangs")).unwrap();
    }
    assert_eq!(fake.connections(), 1);
}

#[tokio::test]
async fn calls_that_wait_for_a_stream_go_when_the_peer_allows_more() {
    let (allow, streams) = (Arc::new(Notify::new()), Arc::new(AtomicUsize::new(0)));
    let (told, seen) = (allow.clone(), streams.clone());
    // It allows no stream, and 100 once it is told to. It answers none.
    let fake = Fake::sockets(move |_, socket| {
        let (told, seen) = (told.clone(), seen.clone());
        async move {
            let none = setting(MAX_CONCURRENT_STREAMS, 0);
            let mut connection = ByHand::accept(socket, &none).await?;
            loop {
                tokio::select! {
                    () = told.notified() => {
                        let many = setting(MAX_CONCURRENT_STREAMS, 100);
                        connection.send(&frame(SETTINGS, 0, 0, &many)).await?;
                    }
                    called = connection.called() => {
                        called?;
                        seen.fetch_add(1, SeqCst);
                    }
                }
            }
        }
    });
    let (manager, channel) = channel_to(&fake.address());
    manager
        .ready("echo", 1, Duration::from_secs(5))
        .await
        .unwrap();
    // Given calls that wait, for there is no stream
    let calls: Vec<_> = (0..3)
        .map(|_| {
            let channel = channel.clone();
            tokio::spawn(async move { call(&channel).await })
        })
        .collect();
    time::sleep(Duration::from_millis(200)).await;
    assert_eq!(streams.load(SeqCst), 0);
    // When the peer allows some, and nobody else calls
    allow.notify_one();
    // Then all go, long before they have waited enough
    let allowed = time::Instant::now();
    eventually("all go", || streams.load(SeqCst) == 3).await;
    let took = allowed.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert!(calls.iter().all(|call| !call.is_finished()));
    manager.stop().await;
    for call in calls {
        let status = call.await.unwrap().unwrap_err();
        assert_eq!(status.code(), Code::Cancelled, "{status}");
    }
}

/// A call with this body, as it is.
async fn raw_call(
    channel: &Channel,
    frames: impl IntoIterator<Item = http_body::Frame<Bytes>>,
) -> Result<(), Error> {
    let frames: Vec<_> = frames.into_iter().map(Ok::<_, Status>).collect();
    let body = http_body_util::StreamBody::new(tokio_stream::iter(frames));
    let request = http::Request::new(tonic::body::Body::new(body));
    let response = channel.clone().oneshot(request).await?;
    response.into_body().collect().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_larger_than_any_window_is_sent_in_parts() {
    // Given a server that counts what comes, and answers at the end
    const SIZE: usize = (1 << 31) + 10;
    let came = Arc::new(AtomicUsize::new(0));
    let of = came.clone();
    let fake = Fake::streams(move |_, request, respond| {
        let of = of.clone();
        tokio::spawn(async move {
            let mut body = request.into_body();
            while let Some(Ok(data)) = body.data().await {
                of.fetch_add(data.len(), SeqCst);
                let _ = body.flow_control().release_capacity(data.len());
            }
            fake::answer(respond);
        });
    });
    let (_manager, channel) = channel_to(&fake.address());
    // The pages are the system's one of zeros.
    let large = http_body::Frame::data(Bytes::from(vec![0; SIZE]));
    raw_call(&channel, [large]).await.unwrap();
    assert_eq!(came.load(SeqCst), SIZE);
}

#[tokio::test]
async fn a_request_whose_trailers_cannot_be_sent_fails_and_has_no_end() {
    let server = EchoServer::start("a");
    let (_manager, channel) = channel_to(&server.address());
    let mut trailers = http::HeaderMap::new();
    trailers.insert("connection", http::HeaderValue::from_static("close"));
    let frames = [http_body::Frame::trailers(trailers)];
    let result = time::timeout(Duration::from_secs(5), raw_call(&channel, frames));
    let error = result.await.expect("it hangs").unwrap_err();
    assert_eq!(error.kind(), Kind::RequestBody, "{error}");
    call(&channel).await.unwrap();
}
