//! Peers that break HTTP/2, or speak something else: what that costs is one call at most. It ends within a bound, with an
//! error that says at whom; the next is made elsewhere, or there when the peer has come to its senses; nothing panics,
//! and nothing is left behind. With the cases of gRPC's `http2_interop`, whose servers misbehave a little.
//!
//! All of these peers are fakes that write their frames by hand (`support/fake.rs`): no real server does this to order,
//! and h2 would not let us.

mod support;

use std::{
    future::Future,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Once,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::{future::join_all, stream};
use http_body_util::BodyExt as _;
use support::{
    eventually,
    fake::{
        ACK, ByHand, CONTINUATION, DATA, END_HEADERS, END_STREAM, Fake, GOAWAY, HEADERS,
        MAX_CONCURRENT_STREAMS, PADDED, PING, PUSH_PROMISE, RST_STREAM, SETTINGS, WINDOW_UPDATE,
        frame, head_block, head_of, message_of, ok_of, setting,
    },
    server::{
        EchoServer, Options,
        pb::{EchoRequest, echo_client::EchoClient},
    },
    sockets_to, tasks,
};
use switchboard::{
    Backoff, Channel, ConnectionManager, Error, Kind, MemoryRegistry, RetryPolicy, Sent, Session,
    WaitForReady, pool::PoolConfig, registry::Registration, transport::Connector,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::Notify,
    time,
};
use tonic::{Code, Request, Status, body::Body};
use tower::ServiceExt as _;

/// What anything may take here, on a machine that is busy with other things.
const BOUND: Duration = Duration::from_secs(10);

/// How long an attempt to connect may take where that is what ends it.
const SHORT: Duration = Duration::from_millis(300);

type Doing = Pin<Box<dyn Future<Output = io::Result<()>> + Send>>;

/// What is sent to the stream of a call.
type Made = fn(u32) -> Vec<u8>;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

// === the caller's side ===

/// A manager that knows one peer, `a`, and soon dials again.
struct Client {
    manager: ConnectionManager,
    channel: Channel,
    registry: MemoryRegistry,
    _registration: Registration,
    tasks_before: usize,
    panics_before: usize,
    address: SocketAddr,
}

impl Client {
    async fn of(fake: &Fake) -> Self {
        Self::with(fake, Connector::new()).await
    }

    async fn with(fake: &Fake, connector: Connector) -> Self {
        Self::within(fake, connector, BOUND).await
    }

    /// With so much time for each attempt to connect.
    async fn within(fake: &Fake, connector: Connector, attempt: Duration) -> Self {
        let panics_before = panics();
        let tasks_before = tasks();
        let registry = MemoryRegistry::new();
        let session = Session::new("echo", fake.address()).with_id("a");
        let registration = registry.register(session).await.unwrap();
        let backoff = Backoff::constant(ms(50), 0.0).unwrap();
        let pools = PoolConfig::default()
            .attempt_timeout(attempt)
            .unwrap()
            .backoff(backoff)
            .probe(Some(backoff))
            .max_wait(BOUND)
            .unwrap();
        let manager = ConnectionManager::builder(registry.clone())
            .connector(connector)
            .pools(pools)
            .build();
        Self {
            channel: manager.channel("echo"),
            manager,
            registry,
            _registration: registration,
            tasks_before,
            panics_before,
            address: fake.address,
        }
    }

    /// A call that fails within the bound, and says at whom.
    async fn fails(&self, case: &str, within: Option<Duration>) -> Status {
        let began = Instant::now();
        let called = time::timeout(BOUND, call(&self.channel, within)).await;
        let result = called.unwrap_or_else(|_| panic!("{case}: the call hangs"));
        let status = result.expect_err(case);
        println!("{case}: after {:?}: {status}", began.elapsed());
        let error = Error::of(&status);
        let error = error.unwrap_or_else(|| panic!("{case}: not ours: {status}"));
        assert_eq!(error.role(), Some("echo"), "{case}: {status}");
        // One of those that could not be called, or the one that was.
        let says = status.message();
        let whom = [
            format!("{} (id a)", self.address),
            format!("echo a at {}", self.address),
        ];
        let named = whom.iter().any(|name| says.contains(name));
        assert!(named, "{case}: at whom? {status}");
        status
    }

    /// Stops it, after which there is nothing left of it.
    async fn ends(self, case: &str) {
        self.manager.stop().await;
        let port = self.address.port();
        let (tasks_before, panics_before) = (self.tasks_before, self.panics_before);
        drop((
            self.registry,
            self._registration,
            self.channel,
            self.manager,
        ));
        eventually(&format!("{case}: no socket is left"), || {
            sockets_to(port) == 0
        })
        .await;
        eventually(&format!("{case}: no task is left"), || {
            tasks() <= tasks_before
        })
        .await;
        assert_eq!(panics(), panics_before, "{case}: something panics");
    }
}

/// How many messages are answered; in this time, if it has one. It waits for nobody.
async fn call(channel: &Channel, within: Option<Duration>) -> Result<usize, Status> {
    let mut request = Request::new(EchoRequest::default());
    if let Some(within) = within {
        request.set_timeout(within);
    }
    read(channel, request).await
}

async fn read(channel: &Channel, request: Request<EchoRequest>) -> Result<usize, Status> {
    let answers = EchoClient::new(channel.clone()).download(request).await?;
    let (mut answers, mut messages) = (answers.into_inner(), 0);
    while answers.message().await?.is_some() {
        messages += 1;
    }
    Ok(messages)
}

/// A call that waits until somebody is there, for a while, and goes well.
async fn goes_well(channel: &Channel, case: &str) {
    let mut request = Request::new(EchoRequest {
        count: 1,
        ..EchoRequest::default()
    });
    request.extensions_mut().insert(WaitForReady(true));
    let called = time::timeout(BOUND, read(channel, request)).await;
    let result = called.unwrap_or_else(|_| panic!("{case}: the next call hangs"));
    let messages = result.unwrap_or_else(|status| panic!("{case}: the next call fails: {status}"));
    assert_eq!(messages, 1, "{case}");
}

/// How often something has panicked so far that is not a test.
fn panics() -> usize {
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    static WATCHED: Once = Once::new();
    WATCHED.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let of_a_test = |file: &str| file.starts_with("tests/");
            if !panic.location().is_some_and(|at| of_a_test(at.file())) {
                PANICS.fetch_add(1, SeqCst);
            }
            usual(panic);
        }));
    });
    PANICS.load(SeqCst)
}

// === instead of HTTP/2 ===

/// Does this with every connection, until it has recovered.
fn until_it_recovers(
    misbehave: impl Fn(TcpStream) -> Doing + Send + 'static,
) -> (Fake, Arc<AtomicBool>) {
    let recovered = Arc::new(AtomicBool::new(false));
    let has = recovered.clone();
    let fake = Fake::sockets(move |_, socket| match has.load(SeqCst) {
        true => Box::pin(async { ByHand::accept(socket, &[]).await?.serve().await }),
        false => misbehave(socket),
    });
    (fake, recovered)
}

/// Reads and forgets, until the client hangs up.
async fn ignore(mut socket: TcpStream) -> io::Result<()> {
    let mut scratch = [0; 4096];
    while socket.read(&mut scratch).await? > 0 {}
    Ok(())
}

/// Says this as soon as the client has begun, and nothing else.
fn says(bytes: &[u8]) -> impl Fn(TcpStream) -> Doing + Send + 'static {
    let bytes = bytes.to_vec();
    move |mut socket| {
        let bytes = bytes.clone();
        Box::pin(async move {
            socket.read_u8().await?;
            socket.write_all(&bytes).await?;
            ignore(socket).await
        })
    }
}

/// A peer with which no connection comes about costs its callers no more than the bound that they have, keeps nobody from
/// another, and is used as soon as it can be.
async fn is_passed_by(
    case: &str,
    reason: &str,
    misbehave: impl Fn(TcpStream) -> Doing + Send + 'static,
) {
    // Given a peer that never behaves
    let (fake, recovered) = until_it_recovers(misbehave);
    let attempt = match reason.starts_with("not connected") {
        true => SHORT,
        false => BOUND,
    };
    let client = Client::within(&fake, Connector::new(), attempt).await;
    // When it is called, then that fails, with why
    let status = client.fails(case, None).await;
    assert_eq!(status.code(), Code::Unavailable, "{case}: {status}");
    let error = Error::of(&status).expect("ours");
    assert_eq!(
        (error.kind(), error.sent()),
        (Kind::NotConnected, Sent::Unsent),
        "{case}: {status}"
    );
    assert!(
        status.message().contains(reason),
        "{case}: not {reason:?}: {status}"
    );
    // When another is there, then all calls are its
    let other = EchoServer::start("other");
    let session = Session::new("echo", other.address()).with_id("other");
    let registered = client.registry.register(session).await.unwrap();
    for _ in 0..10 {
        goes_well(&client.channel, case).await;
    }
    assert_eq!(other.seen.started.load(SeqCst), 10, "{case}");
    // When it behaves again, then it is called again
    recovered.store(true, SeqCst);
    goes_well(&client.channel.to("a"), case).await;
    drop(registered);
    client.ends(case).await;
}

#[tokio::test]
async fn a_peer_that_says_nothing_is_passed_by() {
    is_passed_by(
        "silence",
        "not connected within 300ms, waiting for its HTTP/2 settings",
        |socket| Box::pin(ignore(socket)),
    )
    .await;
}

#[tokio::test]
async fn a_peer_that_answers_no_ping_is_passed_by() {
    is_passed_by(
        "settings alone",
        "not connected within 300ms, waiting for its HTTP/2 settings",
        says(&frame(SETTINGS, 0, 0, &[])),
    )
    .await;
}

#[tokio::test]
async fn a_peer_that_hangs_up_is_passed_by() {
    is_passed_by("hanging up at once", "HTTP/2 handshake failed", |_| {
        Box::pin(async { Ok(()) })
    })
    .await;
    let half = frame(SETTINGS, 0, 0, &setting(MAX_CONCURRENT_STREAMS, 100))[..11].to_vec();
    is_passed_by(
        "half a frame",
        "HTTP/2 handshake failed",
        move |mut socket| {
            let half = half.clone();
            Box::pin(async move {
                socket.read_u8().await?;
                socket.write_all(&half).await
            })
        },
    )
    .await;
}

#[tokio::test]
async fn a_peer_that_speaks_http1_is_passed_by() {
    let answer = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    is_passed_by("HTTP/1.1", "HTTP/2 handshake failed", says(answer)).await;
}

#[tokio::test]
async fn a_peer_that_sends_a_tls_alert_is_passed_by() {
    let alert = [21, 3, 3, 0, 2, 2, 70];
    is_passed_by("a TLS alert", "the peer speaks TLS", says(&alert)).await;
}

#[tokio::test]
async fn a_peer_that_sends_noise_is_passed_by() {
    for seed in 0..12 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut noise = vec![0; random.usize(1..20_000)];
        random.fill(&mut noise);
        is_passed_by(
            &format!("noise of seed {seed}"),
            "not connected",
            says(&noise),
        )
        .await;
    }
}

#[tokio::test]
async fn a_peer_that_goes_away_before_it_was_called_is_passed_by() {
    let settings = frame(SETTINGS, 0, 0, &[]);
    let goaway = frame(GOAWAY, 0, 0, &[0; 8]);
    let both = [settings, goaway].concat();
    is_passed_by("GOAWAY at once", "HTTP/2 handshake failed", says(&both)).await;
}

// === in HTTP/2, when called ===

/// Behaves until it is called, and then does this; once, but for connections after that one.
/// tonic panics over them, in whatever task reads the status.
#[tokio::test]
async fn details_of_a_status_that_are_no_base64_are_left_out() {
    fn failed_of(stream: u32, head: &[u8]) -> Vec<u8> {
        let mut block = head.to_vec();
        for (name, value) in [
            ("grpc-status", "8"),
            ("grpc-message", "full"),
            ("grpc-status-details-bin", "!!"),
        ] {
            block.extend([0, name.len() as u8]);
            block.extend(name.bytes());
            block.push(value.len() as u8);
            block.extend(value.bytes());
        }
        frame(HEADERS, END_HEADERS | END_STREAM, stream, &block)
    }
    let cases: [(_, Made); 2] = [
        ("in trailers alone", |stream| {
            failed_of(stream, &head_block())
        }),
        ("after a message", |stream| {
            [head_of(stream), message_of(stream), failed_of(stream, b"")].concat()
        }),
    ];
    for (case, bytes) in cases {
        let (fake, _) = once_called(sends(bytes));
        let client = Client::of(&fake).await;
        let status = call(&client.channel, None).await.expect_err(case);
        assert_eq!(status.code(), Code::ResourceExhausted, "{case}: {status}");
        assert_eq!(status.message(), "full", "{case}");
        assert!(status.details().is_empty(), "{case}");
        goes_well(&client.channel, case).await;
        assert_eq!(fake.connections(), 1, "{case}");
        client.ends(case).await;
    }
}

fn once_called(
    misbehave: impl Fn(ByHand, u32) -> Doing + Send + Sync + 'static,
) -> (Fake, Arc<AtomicUsize>) {
    let misbehave = Arc::new(misbehave);
    let calls = Arc::new(AtomicUsize::new(0));
    let count = calls.clone();
    let fake = Fake::sockets(move |nth, socket| {
        let (misbehave, calls) = (misbehave.clone(), count.clone());
        async move {
            let mut connection = ByHand::accept(socket, &[]).await?;
            if nth == 0 {
                let stream = connection.called().await?;
                calls.fetch_add(1, SeqCst);
                return misbehave(connection, stream).await;
            }
            loop {
                let stream = connection.called().await?;
                calls.fetch_add(1, SeqCst);
                connection.answer(stream).await?;
            }
        }
    });
    (fake, calls)
}

/// Sends what that makes of the stream's number, and then answers whatever else it is asked.
fn sends(
    bytes: impl Fn(u32) -> Vec<u8> + Send + Sync + 'static,
) -> impl Fn(ByHand, u32) -> Doing + Send + Sync + 'static {
    move |mut connection, stream| {
        let bytes = bytes(stream);
        Box::pin(async move {
            connection.send(&bytes).await?;
            connection.serve().await
        })
    }
}

/// A peer that does this when it is called costs that call, which was executed for all one knows and is not made again,
/// and no other. Says how the call has ended, and how many connections it took.
async fn costs_one_call(
    case: &str,
    misbehave: impl Fn(ByHand, u32) -> Doing + Send + Sync + 'static,
) -> (Status, usize) {
    let (fake, calls) = once_called(misbehave);
    let client = Client::of(&fake).await;
    let status = client.fails(case, None).await;
    let error = Error::of(&status).expect("ours");
    assert_eq!(error.sent(), Sent::Sent, "{case}: {status}");
    assert_eq!(calls.load(SeqCst), 1, "{case}: it is made again");
    for _ in 0..10 {
        goes_well(&client.channel, case).await;
    }
    let connections = fake.connections();
    client.ends(case).await;
    (status, connections)
}

/// The same, where the connection cannot be used any more.
async fn costs_a_connection(
    case: &str,
    misbehave: impl Fn(ByHand, u32) -> Doing + Send + Sync + 'static,
) {
    let (status, connections) = costs_one_call(case, misbehave).await;
    let kind = Error::of(&status).map(Error::kind);
    assert_eq!(kind, Some(Kind::ConnectionLost), "{case}: {status}");
    let why = "connection error detected: ";
    assert!(status.message().contains(why), "{case}: {status}");
    assert_eq!(connections, 2, "{case}");
}

#[tokio::test]
async fn a_frame_of_a_wrong_size_costs_one_call() {
    let cases: [(&str, Made); 5] = [
        ("a ping of 7 bytes", |_| frame(PING, 0, 0, &[0; 7])),
        ("settings of 5 bytes", |_| frame(SETTINGS, 0, 0, &[0; 5])),
        ("a window update of 3 bytes", |_| {
            frame(WINDOW_UPDATE, 0, 0, &[0; 3])
        }),
        ("a reset of 5 bytes", |stream| {
            frame(RST_STREAM, 0, stream, &[0; 5])
        }),
        ("a frame larger than any may be", |stream| {
            [head_of(stream), frame(DATA, 0, stream, &vec![0; 1 << 20])].concat()
        }),
    ];
    for (case, bytes) in cases {
        costs_a_connection(case, sends(bytes)).await;
    }
}

#[tokio::test]
async fn a_response_on_a_stream_that_was_not_opened_costs_one_call() {
    let cases: [(&str, Made); 6] = [
        ("headers on one of ours", |_| head_of(1001)),
        ("headers on one of theirs", |_| head_of(2)),
        ("data", |_| message_of(1001)),
        ("data on the connection", |_| message_of(0)),
        ("a reset", |_| frame(RST_STREAM, 0, 1001, &[0, 0, 0, 8])),
        ("a window update", |_| {
            frame(WINDOW_UPDATE, 0, 1001, &[0, 0, 0, 8])
        }),
    ];
    for (case, bytes) in cases {
        costs_a_connection(case, sends(bytes)).await;
    }
}

#[tokio::test]
async fn frames_out_of_order_cost_one_call() {
    let cases: [(&str, Made); 6] = [
        ("a continuation of nothing", |stream| {
            frame(CONTINUATION, END_HEADERS, stream, &head_block())
        }),
        ("a ping amid headers", |stream| {
            [
                frame(HEADERS, 0, stream, &head_block()),
                frame(PING, 0, 0, &[0; 8]),
            ]
            .concat()
        }),
        ("headers that continue elsewhere", |stream| {
            let begun = frame(HEADERS, 0, stream, &head_block()[..4]);
            let goes_on = frame(CONTINUATION, END_HEADERS, stream + 2, &head_block()[4..]);
            [begun, goes_on].concat()
        }),
        ("a push", |stream| {
            let promised = [&[0, 0, 0, 2][..], &head_block()].concat();
            frame(PUSH_PROMISE, END_HEADERS, stream, &promised)
        }),
        ("settings that were not sent, acknowledged", |_| {
            frame(SETTINGS, ACK, 0, &[]).repeat(2)
        }),
        ("an index that HPACK's table does not have", |stream| {
            frame(HEADERS, END_HEADERS, stream, &[0xff, 0xff, 0x7f])
        }),
    ];
    for (case, bytes) in cases {
        costs_a_connection(case, sends(bytes)).await;
    }
}

#[tokio::test]
async fn a_response_that_makes_no_sense_costs_one_call() {
    costs_a_connection("data before headers", sends(message_of)).await;
    let (status, connections) = costs_one_call(
        "a head without a status",
        sends(|stream| frame(HEADERS, END_HEADERS, stream, &head_block()[1..])),
    )
    .await;
    assert_eq!(connections, 1, "it was the stream's alone: {status}");
    assert_eq!(status.code(), Code::Internal, "{status}");
}

#[tokio::test]
async fn a_window_that_overflows_costs_one_call() {
    costs_a_connection(
        "more of the connection's window than there can be",
        sends(|_| frame(WINDOW_UPDATE, 0, 0, &((1u32 << 31) - 1).to_be_bytes())),
    )
    .await;
}

#[tokio::test]
async fn a_streams_window_that_overflows_costs_one_call_and_no_connection() {
    let case = "more of a stream's window than there can be";
    let (fake, _) = once_called(sends(|stream| {
        let much = (1u32 << 31) - 1;
        let update = frame(WINDOW_UPDATE, 0, stream, &much.to_be_bytes());
        [head_of(stream), update].concat()
    }));
    let client = Client::of(&fake).await;
    // A request that goes on: the window of one that is all sent is nobody's concern.
    let mut echo = EchoClient::new(client.channel.clone());
    let read = async {
        let answers = echo.chat(stream::pending()).await?;
        answers.into_inner().message().await
    };
    let read = time::timeout(BOUND, read).await.expect("it hangs");
    let status = read.expect_err("it overflows");
    assert!(status.message().contains("echo a at "), "{status}");
    goes_well(&client.channel, case).await;
    assert_eq!(fake.connections(), 1);
    client.ends(case).await;
}

/// Data that nobody has allowed, to a caller who does not read.
#[tokio::test]
async fn more_data_than_the_window_has_costs_one_call() {
    let case = "data beyond the window";
    let all_sent = Arc::new(Notify::new());
    let told = all_sent.clone();
    let (fake, _) = once_called(move |mut connection, stream| {
        let told = told.clone();
        Box::pin(async move {
            connection.send(&head_of(stream)).await?;
            // Of a message of 1 MiB, 128 KiB.
            let begins = frame(DATA, 0, stream, &[0, 0, 0x10, 0, 0]);
            let more = frame(DATA, 0, stream, &[0; 16_384]).repeat(8);
            let much = [begins, more].concat();
            // It may have hung up before it is all there.
            let _ = connection.send(&much).await;
            told.notify_one();
            connection.serve().await
        })
    });
    let connector = Connector::new().windows(65_535, 65_535).unwrap();
    let client = Client::with(&fake, connector).await;
    let mut echo = EchoClient::new(client.channel.clone());
    let answers = echo.download(EchoRequest::default()).await;
    all_sent.notified().await;
    let status = match answers {
        Ok(answers) => {
            let mut answers = answers.into_inner();
            let read = time::timeout(BOUND, answers.message()).await;
            read.expect("it hangs").expect_err("it was not allowed")
        }
        Err(status) => status,
    };
    println!("{case}: {status}");
    assert!(status.message().contains("echo a at "), "{status}");
    goes_well(&client.channel, case).await;
    client.ends(case).await;
}

/// Headers that take little to send and much to keep: one large one, and so many times its index in HPACK's table.
fn bomb(stream: u32, times: usize) -> Vec<u8> {
    // A name of 1 byte and a value of 4,000: its length is 127 and 3,873 in bytes of 7 bits.
    let mut block = [
        head_block(),
        b"\x40\x01x\x7f\xa1\x1e".to_vec(),
        vec![b'x'; 4000],
    ]
    .concat();
    block.extend(vec![0x80 | 62; times]);
    frame(HEADERS, END_HEADERS | END_STREAM, stream, &block)
}

#[tokio::test]
async fn a_header_list_that_is_too_large_costs_one_call() {
    // 16 MiB are taken. It is the stream's concern alone, as what is beyond is decoded and not kept.
    let (status, connections) =
        costs_one_call("48 MB of headers", sends(|s| bomb(s, 12_000))).await;
    assert_eq!(connections, 1, "{status}");
    assert_eq!(status.code(), Code::Internal, "{status}");
}

#[tokio::test]
async fn headers_that_do_not_end_cost_one_call() {
    costs_a_connection("a flood of continuations", |mut connection, stream| {
        Box::pin(async move {
            connection
                .send(&frame(HEADERS, 0, stream, &head_block()))
                .await?;
            let flood = frame(CONTINUATION, 0, stream, &[]).repeat(1000);
            loop {
                connection.send(&flood).await?;
            }
        })
    })
    .await;
}

/// Without end, and what the client says to it is read, or it is not.
async fn storms(kind: &'static str, reads: bool) {
    let case = &*format!("a storm of {kind}, reading {reads}");
    let storm = match kind {
        "settings" => frame(SETTINGS, 0, 0, &setting(MAX_CONCURRENT_STREAMS, 100)),
        _ => frame(PING, 0, 0, &[7; 8]),
    };
    let (fake, _) = once_called(move |connection, _| {
        let storm = storm.repeat(1000);
        Box::pin(async move {
            let (mut from, mut to) = connection.into_socket().into_split();
            let reading = async {
                let mut scratch = vec![0; 1 << 16];
                while reads && from.read(&mut scratch).await? > 0 {}
                match reads {
                    true => Ok(()),
                    false => std::future::pending::<io::Result<()>>().await,
                }
            };
            tokio::select! {
                ended = reading => ended,
                ended = async { loop { to.write_all(&storm).await? } } => ended,
            }
        })
    });
    let connector = Connector::new().keepalive(Some(ms(200)), ms(300)).unwrap();
    let client = Client::with(&fake, connector).await;
    // A connection whose peer reads is one that works, as far as anybody can know: a call ends when its time is up. One
    // that takes no answers is given up.
    let (within, kind) = match reads {
        true => (Some(ms(500)), Kind::DeadlineExceeded),
        false => (None, Kind::ConnectionLost),
    };
    let status = client.fails(case, within).await;
    let error = Error::of(&status).expect("ours");
    assert_eq!(
        (error.kind(), error.sent()),
        (kind, Sent::Sent),
        "{case}: {status}"
    );
    if !reads {
        goes_well(&client.channel, case).await;
    }
    client.ends(case).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_settings_holds_up_no_call_for_ever() {
    storms("settings", true).await;
    storms("settings", false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_pings_holds_up_no_call_for_ever() {
    storms("pings", true).await;
    storms("pings", false).await;
}

// === gRPC's http2_interop ===

#[tokio::test]
async fn after_a_goaway_the_next_call_goes_over_another_connection() {
    let case = "goaway";
    let fake = Fake::sockets(|nth, socket| async move {
        let mut connection = ByHand::accept(socket, &[]).await?;
        if nth == 0 {
            let stream = connection.called().await?;
            connection.answer(stream).await?;
            let last = [&stream.to_be_bytes()[..], &[0; 4]].concat();
            connection.send(&frame(GOAWAY, 0, 0, &last)).await?;
            // What is above it is not looked at.
            return connection.idle().await;
        }
        connection.serve().await
    });
    let client = Client::of(&fake).await;
    goes_well(&client.channel, case).await;
    for _ in 0..5 {
        goes_well(&client.channel, case).await;
    }
    assert_eq!(fake.connections(), 2);
    client.ends(case).await;
}

#[tokio::test]
async fn a_reset_ends_a_response_that_has_begun_and_repeats_nothing() {
    const NO_ERROR: u32 = 0;
    const INTERNAL_ERROR: u32 = 2;
    const REFUSED_STREAM: u32 = 7;
    const CANCEL: u32 = 8;
    let cases: [(&str, Made, usize); 3] = [
        ("a reset after the head", |_| Vec::new(), 0),
        (
            "a reset amid a message",
            |stream| frame(DATA, 0, stream, &[0, 0, 0, 0, 9, 1, 2]),
            0,
        ),
        ("a reset after a message", message_of, 1),
    ];
    for (case, data, messages) in cases {
        for (reason, code) in [
            (NO_ERROR, Code::Internal),
            (INTERNAL_ERROR, Code::Internal),
            (REFUSED_STREAM, Code::Unavailable),
            (CANCEL, Code::Cancelled),
        ] {
            let case = format!("{case}, for reason {reason}");
            let (fake, calls) = once_called(sends(move |stream| {
                let reset = frame(RST_STREAM, 0, stream, &reason.to_be_bytes());
                [head_of(stream), data(stream), reset].concat()
            }));
            // Given a caller who would have it repeated, whatever happens
            let client = Client::of(&fake).await;
            let codes = [
                Code::Internal,
                Code::Unavailable,
                Code::Cancelled,
                Code::Unknown,
            ];
            let policy = RetryPolicy::new(5).unwrap().on(codes).unwrap().idempotent();
            client.manager.configure("echo", policy).unwrap();
            // When the response has begun and ends so
            let mut echo = EchoClient::new(client.channel.clone());
            let answers = echo.download(EchoRequest::default()).await;
            let mut answers = answers.expect(&case).into_inner();
            let mut read = 0;
            let status = loop {
                match answers.message().await {
                    Ok(Some(_)) => read += 1,
                    Ok(None) => panic!("{case}: a response without its end is taken for whole"),
                    Err(status) => break status,
                }
            };
            // Then that is the call's end
            assert_eq!((read, status.code()), (messages, code), "{case}: {status}");
            let error = Error::of(&status).unwrap_or_else(|| panic!("{case}: {status}"));
            assert_eq!(
                (error.kind(), error.sent()),
                (Kind::Reset, Sent::Sent),
                "{case}"
            );
            assert!(error.peer().is_some(), "{case}: {status}");
            assert_eq!(calls.load(SeqCst), 1, "{case}");
            // And the connection's other calls are not concerned
            goes_well(&client.channel, &case).await;
            assert_eq!(fake.connections(), 1, "{case}");
            client.ends(&case).await;
        }
    }
}

/// A server that has said all does not want the rest of the request.
#[tokio::test]
async fn a_reset_after_the_end_of_a_response_is_nothing() {
    let cases: [(&str, Made); 2] = [
        ("a reset after trailers", |stream| {
            [head_of(stream), message_of(stream), ok_of(stream)].concat()
        }),
        ("a reset after a head that is all", |stream| {
            let status = [b"\x00\x0b", &b"grpc-status"[..], b"\x010"].concat();
            let block = [head_block(), status].concat();
            frame(HEADERS, END_HEADERS | END_STREAM, stream, &block)
        }),
    ];
    for (case, response) in cases {
        let (fake, _) = once_called(sends(move |stream| {
            let no_error = frame(RST_STREAM, 0, stream, &[0; 4]);
            [response(stream), no_error].concat()
        }));
        let client = Client::of(&fake).await;
        // A request that goes on.
        let body = stream::pending::<Result<http_body::Frame<Bytes>, Status>>();
        let body = Body::new(http_body_util::StreamBody::new(body));
        let called = async {
            let response = client
                .channel
                .clone()
                .oneshot(http::Request::new(body))
                .await?;
            let (head, body) = response.into_parts();
            let collected = body.collect().await?;
            let trailers = collected.trailers().and_then(|t| t.get("grpc-status"));
            Ok::<_, Error>(trailers.or(head.headers.get("grpc-status")).cloned())
        };
        let ended = time::timeout(BOUND, called).await.expect("it hangs");
        let status = ended.unwrap_or_else(|error| panic!("{case}: {error}"));
        assert_eq!(
            status.as_ref().map(|s| s.as_bytes()),
            Some(&b"0"[..]),
            "{case}"
        );
        client.ends(case).await;
    }
}

#[tokio::test]
async fn many_pings_are_all_answered_and_calls_go_on() {
    const PINGS: u64 = 1000;
    let case = "pings";
    let fake = Fake::sockets(|_, socket| async move {
        let mut connection = ByHand::accept(socket, &[]).await?;
        loop {
            let stream = connection.called().await?;
            connection.send(&head_of(stream)).await?;
            for n in 0..PINGS {
                connection
                    .send(&frame(PING, 0, 0, &n.to_be_bytes()))
                    .await?;
            }
            // In their order, and before it says more.
            let mut answered = 0u64;
            while answered < PINGS {
                let next = connection.next().await?;
                if (next.kind, next.flags) == (PING, ACK) {
                    assert_eq!(next.payload[..], answered.to_be_bytes());
                    answered += 1;
                }
            }
            connection
                .send(&[message_of(stream), ok_of(stream)].concat())
                .await?;
        }
    });
    let client = Client::of(&fake).await;
    for _ in 0..3 {
        goes_well(&client.channel, case).await;
    }
    assert_eq!(fake.connections(), 1);
    client.ends(case).await;
}

#[tokio::test]
async fn calls_at_a_peer_that_allows_one_stream_take_turns() {
    let options = Options {
        max_streams: Some(1),
        ..Options::default()
    };
    let server = EchoServer::start_with("a", options);
    let registry = MemoryRegistry::new();
    let session = Session::new("echo", server.address()).with_id("a");
    let _registration = registry.register(session).await.unwrap();
    let connector = Connector::new().max_connections(1).unwrap();
    let manager = ConnectionManager::builder(registry)
        .connector(connector)
        .build();
    let channel = manager.channel("echo");
    let calls = (0..15).map(|_| {
        let request = EchoRequest {
            delay_ms: 5,
            ..EchoRequest::default()
        };
        let mut client = EchoClient::new(channel.clone());
        async move { client.unary(request).await }
    });
    let all = time::timeout(BOUND, join_all(calls))
        .await
        .expect("it hangs");
    for result in all {
        result.unwrap();
    }
    assert_eq!(server.seen.most_at_once.load(SeqCst), 1);
}

/// What fills frames up counts for the windows as data does, and has to be given back too.
#[tokio::test]
async fn a_message_in_padded_frames_of_one_byte_comes_whole() {
    const BYTES: usize = 2000;
    let case = "padding";
    let fake = Fake::sockets(|_, socket| async move {
        let mut connection = ByHand::accept(socket, &[]).await?;
        let stream = connection.called().await?;
        connection.send(&head_of(stream)).await?;
        // An EchoResponse whose payload, field 2, is that long.
        let payload = [&[0x12, 0xd0, 0x0f][..], &[9; BYTES]].concat();
        let length = (payload.len() as u32).to_be_bytes();
        let message = [&[0][..], &length, &payload].concat();
        // On the stream, and on the connection.
        let mut windows = [65_535i64; 2];
        for byte in message {
            let padded = frame(
                DATA,
                PADDED,
                stream,
                &[&[255, byte][..], &[0; 255]].concat(),
            );
            let cost = (padded.len() - 9) as i64;
            while windows.iter().any(|&window| window < cost) {
                let next = connection.next().await?;
                if next.kind == WINDOW_UPDATE {
                    let more = u32::from_be_bytes(next.payload[..].try_into().unwrap());
                    windows[usize::from(next.stream == 0)] += i64::from(more);
                }
            }
            connection.send(&padded).await?;
            windows = windows.map(|window| window - cost);
        }
        connection.send(&ok_of(stream)).await?;
        connection.idle().await
    });
    let connector = Connector::new().windows(65_535, 65_535).unwrap();
    let client = Client::with(&fake, connector).await;
    let mut echo = EchoClient::new(client.channel.clone());
    let called = time::timeout(BOUND, echo.unary(EchoRequest::default())).await;
    let answer = called.expect("it hangs").unwrap().into_inner();
    assert_eq!(answer.payload, vec![9; BYTES]);
    client.ends(case).await;
}
