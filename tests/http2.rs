//! Peers that refuse, go away and misbehave, in HTTP/2's own terms.
//!
//! These are fakes on raw `h2`, because a real tonic server cannot be brought to do it to order.

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
use support::{
    eventually,
    server::{
        EchoServer,
        pb::{EchoRequest, echo_client::EchoClient},
    },
};
use switchboard::{
    Channel, ConnectionManager, Error, Kind, Sent, Session, pool::PoolConfig, registry::Fixed,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{Notify, mpsc},
    time,
};
use tonic::{Code, Status};

/// What a fake does with the n-th stream of a connection.
type Script = fn(stream: usize, respond: &mut Respond);

type Respond = h2::server::SendResponse<Bytes>;

fn answer(respond: &mut Respond) {
    let head = http::Response::builder()
        .header("content-type", "application/grpc")
        .body(())
        .unwrap();
    let mut stream = respond.send_response(head, false).unwrap();
    stream
        .send_data(Bytes::from_static(&[0; 5]), false)
        .unwrap();
    let mut trailers = http::HeaderMap::new();
    trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
    stream.send_trailers(trailers).unwrap();
}

/// Serves connections by the script; counts them.
async fn fake(script: Script) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let connections = Arc::new(AtomicUsize::new(0));
    let counter = connections.clone();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            counter.fetch_add(1, SeqCst);
            tokio::spawn(async move {
                let mut connection = h2::server::handshake(socket).await.unwrap();
                let mut streams = 0;
                while let Some(Ok((_request, mut respond))) = connection.accept().await {
                    script(streams, &mut respond);
                    streams += 1;
                }
            });
        }
    });
    (address, connections)
}

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
    let (address, connections) = fake(|stream, respond| match stream {
        0 | 2 | 3 => respond.send_reset(Reason::REFUSED_STREAM),
        _ => answer(respond),
    })
    .await;
    let (_manager, channel) = channel_to(&address);
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
    assert_eq!(
        connections.load(SeqCst),
        1,
        "the connection is as good as before"
    );
}

// Another transport's word for it is understood too.
#[tokio::test]
async fn a_refused_stream_is_repeated_through_tonics_own_channel() {
    let (address, connections) = fake(|stream, respond| match stream {
        0 => respond.send_reset(Reason::REFUSED_STREAM),
        _ => answer(respond),
    })
    .await;
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}"));
    let service = tower::ServiceBuilder::new()
        .layer(switchboard::RetryLayer::transparent())
        .service(endpoint.unwrap().connect_lazy());
    let result = EchoClient::new(service).unary(EchoRequest::default()).await;
    result.unwrap();
    assert_eq!(connections.load(SeqCst), 1, "it goes out once more");
}

// A server that says so after it has answered has it wrong, and is not to be believed: a repetition could be
// the second execution.
#[tokio::test]
async fn a_stream_refused_after_its_answer_began_may_have_been_processed() {
    /// The caller has read what there is.
    static READ: tokio::sync::Notify = tokio::sync::Notify::const_new();
    let (address, connections) = fake(|stream, respond| {
        let head = http::Response::builder()
            .header("content-type", "application/grpc")
            .body(())
            .unwrap();
        let mut answer = respond.send_response(head, false).unwrap();
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
    })
    .await;
    let (_manager, channel) = channel_to(&address);
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
    assert_eq!(connections.load(SeqCst), 1, "it was the stream's end alone");
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
        let script: Script = match reason {
            Reason::CANCEL => |_, respond| respond.send_reset(Reason::CANCEL),
            Reason::ENHANCE_YOUR_CALM => |_, respond| respond.send_reset(Reason::ENHANCE_YOUR_CALM),
            Reason::INADEQUATE_SECURITY => {
                |_, respond| respond.send_reset(Reason::INADEQUATE_SECURITY)
            }
            Reason::PROTOCOL_ERROR => |_, respond| respond.send_reset(Reason::PROTOCOL_ERROR),
            _ => |_, respond| respond.send_reset(Reason::INTERNAL_ERROR),
        };
        let (address, _) = fake(script).await;
        let (_manager, channel) = channel_to(&address);
        let status = call(&channel).await.unwrap_err();
        assert_eq!(status.code(), code, "{reason:?}: {status}");
        let error = Error::of(&status).unwrap();
        assert_eq!((error.kind(), error.sent()), (Kind::Reset, Sent::Sent));
    }
}

const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;

/// A frame of the connection's own.
fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0, 0, payload.len() as u8, kind, flags, 0, 0, 0, 0];
    frame.extend_from_slice(payload);
    frame
}

/// Speaks just enough HTTP/2 by hand to say a GOAWAY that no library says: after `streams` requests, that
/// only the first was taken. It stays open, and answers nothing.
async fn goes_away_after(streams: u8, mut socket: TcpStream) -> std::io::Result<()> {
    let mut preface = [0; 24];
    socket.read_exact(&mut preface).await?;
    socket.write_all(&frame(SETTINGS, 0, &[])).await?;
    let mut seen = 0;
    loop {
        let mut head = [0; 9];
        socket.read_exact(&mut head).await?;
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        socket.read_exact(&mut payload).await?;
        match (head[3], head[4]) {
            (SETTINGS, 0) => socket.write_all(&frame(SETTINGS, 1, &[])).await?,
            (PING, 0) => socket.write_all(&frame(PING, 1, &payload)).await?,
            (HEADERS, _) => {
                seen += 1;
                if seen == streams {
                    let last_stream_1_no_error = [0, 0, 0, 1, 0, 0, 0, 0];
                    socket
                        .write_all(&frame(GOAWAY, 0, &last_stream_1_no_error))
                        .await?;
                }
            }
            _ => {}
        }
    }
}

#[tokio::test]
async fn calls_above_a_goaway_are_made_again_on_the_next_connection() {
    let server = EchoServer::start("a");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let behind = server.address;
    tokio::spawn(async move {
        // The first connection goes away at its third call; the next ones are a real server's.
        let (first, _) = listener.accept().await.unwrap();
        tokio::spawn(goes_away_after(3, first));
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut server = TcpStream::connect(behind).await.unwrap();
                tokio::io::copy_bidirectional(&mut client, &mut server).await
            });
        }
    });
    let (manager, channel) = channel_to(&address);
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

/// Speaks just enough HTTP/2 by hand to change its mind: it allows no stream, and 100 once it is told to. It answers none.
async fn allows_later(
    mut socket: TcpStream,
    allow: Arc<Notify>,
    streams: Arc<AtomicUsize>,
) -> std::io::Result<()> {
    const ACK: u8 = 1;
    const MAX_CONCURRENT_STREAMS: u8 = 3;
    let allowing = |streams: u8| frame(SETTINGS, 0, &[0, MAX_CONCURRENT_STREAMS, 0, 0, 0, streams]);
    let mut preface = [0; 24];
    socket.read_exact(&mut preface).await?;
    socket.write_all(&allowing(0)).await?;
    let (mut reading, mut writing) = socket.into_split();
    // Frames are read by a task of their own: no read of half a one is given up.
    let (told, mut frames) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut head = [0; 9];
        while reading.read_exact(&mut head).await.is_ok() {
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; length as usize];
            reading.read_exact(&mut payload).await.unwrap();
            let _ = told.send((head[3], head[4], payload));
        }
    });
    loop {
        let answer = tokio::select! {
            () = allow.notified() => allowing(100),
            read = frames.recv() => match read {
                Some((SETTINGS, 0, _)) => frame(SETTINGS, ACK, &[]),
                Some((PING, 0, payload)) => frame(PING, ACK, &payload),
                Some((HEADERS, ..)) => {
                    streams.fetch_add(1, SeqCst);
                    continue;
                }
                Some(_) => continue,
                None => return Ok(()),
            },
        };
        writing.write_all(&answer).await?;
    }
}

#[tokio::test]
async fn calls_that_wait_for_a_stream_go_when_the_peer_allows_more() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (allow, streams) = (Arc::new(Notify::new()), Arc::new(AtomicUsize::new(0)));
    let (told, seen) = (allow.clone(), streams.clone());
    tokio::spawn(async move {
        let (socket, _) = listener.accept().await.unwrap();
        allows_later(socket, told, seen).await
    });
    let (manager, channel) = channel_to(&address);
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
