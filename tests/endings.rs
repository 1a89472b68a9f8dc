//! What a call's end says, and that it comes: where runtimes end, bodies are read on, peers are busy, and servers keep time too.

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::{FutureExt as _, StreamExt as _, stream};
use http_body_util::BodyExt as _;
use support::{
    eventually,
    fake::{self, Fake},
    server::{
        EchoServer,
        pb::{EchoRequest, EchoResponse, echo_client::EchoClient},
    },
};
use switchboard::{
    Backoff, CancelLayer, CancelToken, Channel, ConnectionManager, DeadlineLayer, Error,
    HedgingPolicy, Kind, MemoryRegistry, RetryLayer, RetryPolicy, Sent, ServiceConfig, Session,
    WaitForReady,
    config::{MethodConfig, MethodName},
    pool::{Plain, Pool, PoolConfig},
    registry::Fixed,
    retry::Throttling,
};
use tokio::{runtime::Runtime, time};
use tonic::{Code, Request, Status, body::Body};
use tower::{BoxError, Layer as _, Service, ServiceExt as _, discover::ServiceList, service_fn};

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn paused(attempts: u32, pause: Duration) -> RetryPolicy {
    let policy = RetryPolicy::new(attempts).unwrap();
    let backoff = Backoff::constant(pause, 0.0).unwrap();
    policy.backoff(backoff).idempotent()
}

fn manager(servers: &[&EchoServer]) -> ConnectionManager {
    let session =
        |server: &&EchoServer| Session::new("echo", server.address()).with_id(&*server.id);
    let fixed = Fixed::new(servers.iter().map(session)).unwrap();
    ConnectionManager::builder(fixed).build()
}

fn slow(delay_ms: u32) -> EchoRequest {
    EchoRequest {
        delay_ms,
        ..EchoRequest::default()
    }
}

async fn call(channel: &Channel, request: EchoRequest) -> Result<EchoResponse, Status> {
    let response = EchoClient::new(channel.clone()).unary(request).await?;
    Ok(response.into_inner())
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

// === runtimes ===

/// A manager on one runtime, and a channel that is connected.
fn elsewhere(server: &EchoServer, policy: RetryPolicy) -> (Runtime, ConnectionManager, Channel) {
    let theirs = runtime();
    let (manager, channel) = theirs.block_on(async {
        let manager = manager(&[server]);
        manager.configure("echo", policy).unwrap();
        let channel = manager.channel("echo");
        call(&channel, slow(0)).await.unwrap();
        (manager, channel)
    });
    (theirs, manager, channel)
}

/// Runs a future outside of any runtime.
fn outside<F: Future>(future: F) -> F::Output {
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Arc::new(Unpark(std::thread::current())).into();
    let mut future = std::pin::pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            Poll::Pending => std::thread::park(),
        }
    }
}

// Laws 1 and 12.
#[test]
fn a_call_that_pauses_ends_with_an_error_when_the_managers_runtime_ends() {
    for in_a_runtime in [true, false] {
        let server = EchoServer::start("a");
        let (theirs, _manager, channel) = elsewhere(&server, paused(3, ms(1500)));
        server.seen.fail_with([Status::unavailable("as scripted")]);
        let pausing = std::thread::spawn(move || {
            let call = async move { call(&channel, slow(0)).await };
            match in_a_runtime {
                true => runtime().block_on(call),
                false => outside(call),
            }
        });
        while server.seen.finished.load(SeqCst) < 2 {
            std::thread::sleep(ms(1));
        }
        std::thread::sleep(ms(100));
        theirs.shutdown_background();
        let status = pausing.join().expect("no panic").unwrap_err();
        let error = Error::of(&status).expect("ours");
        assert_eq!((error.kind(), error.sent()), (Kind::Stopped, Sent::Sent));
    }
}

// Laws 1 and 12.
#[test]
fn a_call_in_flight_ends_with_an_error_when_the_managers_runtime_ends() {
    let server = EchoServer::start("a");
    let (theirs, _manager, channel) = elsewhere(&server, paused(3, ms(20)));
    let mine = runtime();
    let in_flight = mine.spawn(async move { call(&channel, slow(60_000)).await });
    mine.block_on(eventually("it is there", || {
        server.seen.started.load(SeqCst) == 2
    }));
    theirs.shutdown_background();
    let ended = mine.block_on(async { time::timeout(Duration::from_secs(5), in_flight).await });
    let status = ended.expect("it ends").expect("no panic").unwrap_err();
    let error = Error::of(&status).expect("ours");
    assert_eq!(error.sent(), Sent::Sent, "{status}");
}

// Laws 1 and 12.
#[test]
fn a_call_that_waits_ends_with_an_error_when_the_managers_runtime_ends() {
    let (theirs, mine) = (runtime(), runtime());
    let (_manager, channel) = theirs.block_on(async {
        let manager = ConnectionManager::builder(MemoryRegistry::new()).build();
        let channel = manager.channel("echo");
        call(&channel, slow(0)).await.unwrap_err();
        (manager, channel)
    });
    let waiting = mine.spawn(async move {
        let mut request = Request::new(slow(0));
        request.extensions_mut().insert(WaitForReady(true));
        EchoClient::new(channel).unary(request).await
    });
    std::thread::sleep(ms(100));
    theirs.shutdown_background();
    let ended = mine.block_on(async { time::timeout(Duration::from_secs(5), waiting).await });
    let status = ended.expect("it ends").expect("no panic").unwrap_err();
    assert_eq!(Error::of(&status).map(Error::kind), Some(Kind::Stopped));
}

// Law 1.
#[test]
fn a_call_waits_no_longer_than_it_may_where_nobody_drives_the_managers_runtime() {
    let theirs = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let (_manager, channel) = theirs.block_on(async {
        let manager = ConnectionManager::builder(MemoryRegistry::new())
            .pools(PoolConfig::default().max_wait(ms(200)).unwrap())
            .build();
        let channel = manager.channel("echo");
        call(&channel, slow(0)).await.unwrap_err();
        (manager, channel)
    });
    let mine = runtime();
    let ended = mine.block_on(async {
        let mut request = Request::new(slow(0));
        request.extensions_mut().insert(WaitForReady(true));
        time::timeout(
            Duration::from_secs(3),
            EchoClient::new(channel).unary(request),
        )
        .await
    });
    ended.expect("it ends").unwrap_err();
}

// === bodies ===

// A peer's own status is the call's, whoever reads on in the request meanwhile.
#[tokio::test(start_paused = true)]
async fn a_request_that_is_read_on_in_a_pause_does_not_hide_the_peers_status() {
    let calls = Arc::new(AtomicUsize::new(0));
    let service = service_fn(move |request: http::Request<Body>| {
        calls.fetch_add(1, SeqCst);
        // As hyper does it: a task of its own, which learns later that nobody wants the rest.
        let reads_on = tokio::spawn(request.into_body().collect());
        drop(reads_on);
        async {
            tokio::task::yield_now().await;
            let head = http::Response::builder().header("grpc-status", 14);
            Ok::<_, BoxError>(head.body(Body::empty())?)
        }
    });
    let service = RetryLayer::new(paused(2, ms(100))).layer(service);
    let pieces = stream::iter(0..400).then(|_| async {
        time::sleep(ms(1)).await;
        Ok::<_, BoxError>(http_body::Frame::data(Bytes::from_static(&[0; 4096])))
    });
    let body = http_body_util::StreamBody::new(Box::pin(pieces));
    let response = service.oneshot(http::Request::new(body)).await;
    let response = response.expect("the peer's own status");
    assert_eq!(response.headers()["grpc-status"], "14");
}

// `sent()` of what failed in a response's body: there was a response.
#[tokio::test(start_paused = true)]
async fn what_fails_after_the_head_has_been_executed() {
    fn fails() -> Result<http_body::Frame<Bytes>, Error> {
        Err(Error::new(Kind::ConnectionLost))
    }
    let service = service_fn(|_: http::Request<()>| async {
        let body = http_body_util::StreamBody::new(stream::iter([fails()]));
        Ok::<_, BoxError>(http::Response::new(body))
    });
    let deadline = DeadlineLayer::new(ms(100)).layer(service);
    let cancel = CancelLayer::new(CancelToken::new()).layer(service);
    let pool = Pool::<_>::from_discover("echo", ServiceList::new::<http::Request<()>>([service]));
    let request = || http::Request::new(());
    let body = deadline.oneshot(request()).await.unwrap().into_body();
    let first = body.collect().await.unwrap_err();
    let body = cancel.oneshot(request()).await.unwrap().into_body();
    let second = body.collect().await.unwrap_err();
    let body = pool.unwrap().oneshot(request()).await.unwrap().into_body();
    let third = body.collect().await.unwrap_err();
    assert_eq!([first.sent(), second.sent(), third.sent()], [Sent::Sent; 3]);
}

// === words ===

fn says_whose(status: &Status) {
    let error = Error::of(status).expect("ours");
    assert_eq!(error.role(), Some("echo"), "no role: {status}");
}

fn says_who(status: &Status) {
    says_whose(status);
    let peer = Error::of(status).and_then(Error::peer);
    assert_eq!(peer.map(|peer| &*peer.id), Some("a"), "no peer: {status}");
}

// Law 1: an error names the role, the peer and the reason.
#[tokio::test]
async fn a_call_that_ends_in_its_body_says_at_whom() {
    let server = EchoServer::start("a");
    let manager = manager(&[&server]);
    let endless = EchoRequest {
        count: 1000,
        delay_ms: 60_000,
        ..EchoRequest::default()
    };
    let token = CancelToken::for_call();
    for how in ["deadline", "token", "stop"] {
        let channel = manager.channel("echo");
        let mut request = Request::new(endless.clone());
        match how {
            "deadline" => request.set_timeout(ms(300)),
            "token" => drop(request.extensions_mut().insert(token.clone())),
            _ => {}
        }
        let answers = EchoClient::new(channel.clone()).download(request).await;
        let mut answers = answers.unwrap().into_inner();
        match how {
            "token" => token.cancel(),
            "stop" => channel.stop(),
            _ => {}
        }
        let status = loop {
            match answers.message().await {
                Ok(message) => assert!(message.is_some()),
                Err(status) => break status,
            }
        };
        says_who(&status);
    }
}

// Law 1.
#[tokio::test]
async fn a_call_that_ends_in_a_pause_says_whose_it_is() {
    let server = EchoServer::start("a");
    let manager = manager(&[&server]);
    manager
        .configure("echo", paused(3, Duration::from_secs(60)))
        .unwrap();
    let channel = manager.channel("echo");
    server.seen.fail_with([Status::unavailable("as scripted")]);
    let token = CancelToken::for_call();
    let mut request = Request::new(slow(0));
    request.extensions_mut().insert(token.clone());
    let pausing = tokio::spawn(async move { EchoClient::new(channel).unary(request).await });
    eventually("it has failed", || server.seen.finished.load(SeqCst) == 1).await;
    time::sleep(ms(50)).await;
    token.cancel();
    says_whose(&pausing.await.unwrap().unwrap_err());
}

// Law 1.
#[tokio::test]
async fn a_hedged_call_whose_time_is_up_says_whose_it_is() {
    let server = EchoServer::start("a");
    let manager = manager(&[&server]);
    manager
        .configure("echo", HedgingPolicy::new(2, ms(50)).unwrap())
        .unwrap();
    let channel = manager.channel("echo");
    let mut request = Request::new(slow(60_000));
    request.set_timeout(ms(300));
    let status = EchoClient::new(channel).unary(request).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    says_whose(&status);
}

// What was never sent is not said to have been.
#[tokio::test]
async fn a_call_that_is_stopped_in_a_pause_and_never_got_out_says_so() {
    let closed = support::etcd::free_port();
    let session = Session::new("echo", format!("127.0.0.1:{closed}")).with_id("a");
    let manager = ConnectionManager::builder(Fixed::new([session]).unwrap())
        .pools(PoolConfig::default().attempts(1).unwrap())
        .build();
    manager
        .configure("echo", paused(3, Duration::from_secs(60)))
        .unwrap();
    let channel = manager.channel("echo");
    let mut plain = RetryPolicy::new(2).unwrap();
    plain = plain.on([Code::Aborted]).unwrap();
    // Until it is known to be offline
    let mut request = Request::new(slow(0));
    request.extensions_mut().insert(plain);
    EchoClient::new(channel.clone())
        .unary(request)
        .await
        .unwrap_err();
    let same = channel.clone();
    let pausing = tokio::spawn(async move { call(&same, slow(0)).await });
    time::sleep(ms(200)).await;
    assert!(!pausing.is_finished());
    channel.stop();
    let status = pausing.await.unwrap().unwrap_err();
    assert_eq!(Error::of(&status).map(Error::sent), Some(Sent::Unsent));
}

// === throttling ===

// A6: every outgoing RPC, regardless of service or method, changes the count.
#[tokio::test]
async fn a_call_without_a_policy_that_goes_well_fills_the_bucket_too() {
    let server = EchoServer::start("a");
    let manager = manager(&[&server]);
    let echo = "switchboard.demo.v1.Echo";
    let upload = MethodName::method(echo, "Upload").unwrap();
    let repeated = MethodConfig::new().retry(paused(3, ms(1))).unwrap();
    let config = ServiceConfig::new()
        .method(upload, repeated)
        .unwrap()
        .throttling(Throttling::new(4, 1.0).unwrap());
    manager.configure("echo", config).unwrap();
    let channel = manager.channel("echo");
    let upload = || {
        let mut client = EchoClient::new(channel.clone());
        async move { client.upload(stream::iter([slow(0)])).await }
    };
    let unavailable = || Status::unavailable("as scripted");
    server.seen.fail_with([unavailable(), unavailable()]);
    upload().await.unwrap_err();
    assert_eq!(server.seen.started.load(SeqCst), 2, "it is empty by half");
    for _ in 0..10 {
        call(&channel, slow(0)).await.unwrap();
    }
    server.seen.fail_with([unavailable()]);
    upload().await.expect("it is full again");
}

// === waiting ===

/// Is ready, or never.
#[derive(Clone)]
struct Maybe {
    ready: bool,
}

impl Service<u32> for Maybe {
    type Response = u32;
    type Error = BoxError;
    type Future = std::future::Ready<Result<u32, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        match self.ready {
            true => Poll::Ready(Ok(())),
            false => Poll::Pending,
        }
    }

    fn call(&mut self, request: u32) -> Self::Future {
        std::future::ready(Ok(request))
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_finds_the_one_that_has_room_however_many_are_busy() {
    let services = (0..20).map(|n| Maybe { ready: n == 7 });
    let list = ServiceList::new::<u32>(services);
    let pool = Pool::<_, Plain>::from_discover("echo", list).unwrap();
    time::sleep(ms(100)).await;
    let mut missed = 0;
    for n in 0..100 {
        let answer = time::timeout(Duration::from_secs(1), pool.clone().oneshot(n)).await;
        missed += usize::from(answer.is_err());
    }
    assert_eq!(missed, 0, "so many of 100 waited beside one that was free");
}

/// Is ready when it is told to be.
#[derive(Clone, Default)]
struct Later {
    ready: Arc<std::sync::atomic::AtomicBool>,
    wakers: Arc<std::sync::Mutex<Vec<std::task::Waker>>>,
}

impl Service<u32> for Later {
    type Response = u32;
    type Error = BoxError;
    type Future = std::future::Ready<Result<u32, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.wakers.lock().unwrap().push(cx.waker().clone());
        match self.ready.load(SeqCst) {
            true => Poll::Ready(Ok(())),
            false => Poll::Pending,
        }
    }

    fn call(&mut self, request: u32) -> Self::Future {
        std::future::ready(Ok(request))
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_that_waits_finds_the_one_that_becomes_free_however_many_are_busy() {
    let services: Vec<_> = (0..20).map(|_| Later::default()).collect();
    let free = services[7].clone();
    let list = ServiceList::new::<u32>(services);
    let pool = Pool::<_, Plain>::from_discover("echo", list).unwrap();
    time::sleep(ms(100)).await;
    let waiting: Vec<_> = (0..100)
        .map(|n| tokio::spawn(pool.clone().oneshot(n)))
        .collect();
    time::sleep(ms(100)).await;
    free.ready.store(true, SeqCst);
    let wakers: Vec<_> = free.wakers.lock().unwrap().drain(..).collect();
    wakers.into_iter().for_each(std::task::Waker::wake);
    time::sleep(Duration::from_secs(5)).await;
    let missed = waiting.iter().filter(|call| !call.is_finished()).count();
    assert_eq!(
        missed, 0,
        "so many of 100 wait beside one that has become free"
    );
}

/// Is ready when it is polled for the first time, and its clones never.
struct Once {
    first: bool,
}

impl Clone for Once {
    fn clone(&self) -> Self {
        Self { first: false }
    }
}

impl Service<http::Request<Body>> for Once {
    type Response = http::Response<Body>;
    type Error = BoxError;
    type Future = std::future::Ready<Result<http::Response<Body>, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        match self.first {
            true => Poll::Ready(Ok(())),
            false => Poll::Pending,
        }
    }

    fn call(&mut self, _: http::Request<Body>) -> Self::Future {
        let head = http::Response::builder().header("grpc-status", 14);
        std::future::ready(head.body(Body::empty()).map_err(Into::into))
    }
}

#[tokio::test(start_paused = true)]
async fn one_call_is_cancelled_also_while_the_service_of_its_next_attempt_is_awaited() {
    let service = RetryLayer::new(paused(3, ms(1))).layer(Once { first: true });
    let token = CancelToken::for_call();
    let mut request = http::Request::new(Body::empty());
    request.extensions_mut().insert(token.clone());
    let call = tokio::spawn(service.oneshot(request));
    time::sleep(ms(100)).await;
    token.cancel();
    let ended = time::timeout(Duration::from_secs(5), call).await;
    let error = ended.expect("it ends").unwrap().unwrap_err();
    assert_eq!(error.kind(), Kind::Cancelled);
}

#[tokio::test(start_paused = true)]
async fn one_hedged_call_is_cancelled_also_between_its_attempts() {
    let service = service_fn(|_: http::Request<Body>| async {
        let head = http::Response::builder()
            .header("grpc-status", 14)
            .header("grpc-retry-pushback-ms", 60_000);
        Ok::<_, BoxError>(head.body(Body::empty())?)
    });
    let policy = HedgingPolicy::new(2, ms(50)).unwrap();
    let policy = policy.non_fatal([Code::Unavailable]).unwrap();
    let service = RetryLayer::new(policy).layer(service);
    let token = CancelToken::for_call();
    let mut request = http::Request::new(Body::empty());
    request.extensions_mut().insert(token.clone());
    let call = tokio::spawn(service.oneshot(request));
    time::sleep(ms(100)).await;
    token.cancel();
    let ended = time::timeout(Duration::from_secs(5), call).await;
    let error = ended.expect("it ends").unwrap().unwrap_err();
    assert_eq!(error.kind(), Kind::Cancelled);
}

// Law 12.
#[tokio::test]
async fn a_call_that_is_polled_after_its_end_does_not_panic() {
    let service = service_fn(|_: http::Request<Body>| async {
        Ok::<_, BoxError>(http::Response::new(Body::empty()))
    });
    let mut service = RetryLayer::transparent().layer(service);
    let mut call = Box::pin(service.call(http::Request::new(Body::empty())));
    (&mut call).await.unwrap();
    let again = std::panic::AssertUnwindSafe((&mut call).map(|result| result.map(drop)));
    let error = again.catch_unwind().await.expect("no panic").unwrap_err();
    assert_eq!(error.kind(), Kind::Internal);
}

// A deadline inside is one of each attempt, and a policy may say that it is followed by another.
#[tokio::test(start_paused = true)]
async fn an_attempt_whose_own_time_is_up_is_followed_by_another_where_the_policy_says_so() {
    let calls = Arc::new(AtomicUsize::new(0));
    let count = calls.clone();
    let service = service_fn(move |_: http::Request<Body>| {
        let first = count.fetch_add(1, SeqCst) == 0;
        async move {
            if first {
                std::future::pending::<()>().await;
            }
            Ok::<_, BoxError>(http::Response::new(Body::empty()))
        }
    });
    let policy = paused(3, ms(1)).on([Code::DeadlineExceeded]).unwrap();
    let service = tower::ServiceBuilder::new()
        .layer(DeadlineLayer::new(Duration::from_secs(5)))
        .layer(RetryLayer::new(policy))
        .layer(DeadlineLayer::new(ms(100)))
        .service(service);
    let answer = service.oneshot(http::Request::new(Body::empty())).await;
    answer.expect("the second attempt answers");
    assert_eq!(calls.load(SeqCst), 2);
}

// === owners ===

#[tokio::test]
async fn attempts_are_not_multiplied_by_a_layer_without_a_policy() {
    let calls = Arc::new(AtomicUsize::new(0));
    let count = calls.clone();
    let refusing = service_fn(move |_: http::Request<Body>| {
        count.fetch_add(1, SeqCst);
        async {
            let error = Error::new(Kind::Refused).with_sent(Sent::Unprocessed);
            Err::<http::Response<Body>, _>(error)
        }
    });
    let inner = RetryLayer::new(paused(3, ms(1))).layer(refusing);
    let request = || http::Request::new(Body::empty());
    inner.clone().oneshot(request()).await.unwrap_err();
    let alone = calls.swap(0, SeqCst);
    let outer = RetryLayer::transparent().layer(inner);
    outer.oneshot(request()).await.unwrap_err();
    assert_eq!(calls.load(SeqCst), alone);
}

// === servers that keep time ===

/// Resets each stream when its time is up, as grpc-go's server does; after the head of its response, if it is to.
fn keeps_time(head_first: bool) -> Fake {
    Fake::streams(move |_, request, mut respond| {
        tokio::spawn(async move {
            let answer = head_first.then(|| respond.send_response(fake::head(), false).unwrap());
            time::sleep(fake::timeout_of(&request)).await;
            match answer {
                Some(mut answer) => answer.send_reset(h2::Reason::CANCEL),
                None => respond.send_reset(h2::Reason::CANCEL),
            }
        });
    })
}

// Scenario 23.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_servers_reset_when_the_time_is_up_is_deadline_exceeded() {
    for head_first in [false, true] {
        let server = keeps_time(head_first);
        let session = Session::new("echo", server.address()).with_id("a");
        let manager = ConnectionManager::builder(Fixed::new([session]).unwrap()).build();
        manager
            .ready("echo", 1, Duration::from_secs(5))
            .await
            .unwrap();
        let mut others = Vec::new();
        for n in 0..60 {
            let channel = manager.channel("echo");
            let mut request = Request::new(slow(0));
            request.set_timeout(ms(20 + n % 7));
            let began = Instant::now();
            let status = EchoClient::new(channel).unary(request).await.unwrap_err();
            if status.code() != Code::DeadlineExceeded {
                others.push((began.elapsed(), status.code(), status.message().to_owned()));
            }
        }
        let n = others.len();
        assert!(
            n == 0,
            "{n} of 60, head first {head_first}: {:?}",
            &others[..2.min(n)]
        );
    }
}

// === configuration ===

#[test]
fn what_grpc_allows_in_a_retry_policy_is_taken() {
    for (initial, most, factor) in [
        ("0.1s", "1s", "0.5"),
        ("0.1s", "1s", "20"),
        ("0.0005s", "1s", "2"),
        ("1s", "100000s", "2"),
    ] {
        let json = format!(
            r#"{{"methodConfig": [{{"name": [{{}}], "retryPolicy": {{
                "maxAttempts": 3, "initialBackoff": "{initial}", "maxBackoff": "{most}",
                "backoffMultiplier": {factor}, "retryableStatusCodes": ["UNAVAILABLE"]
            }}}}]}}"#
        );
        ServiceConfig::from_json(&json).unwrap();
    }
}

// A call is repeated once because a peer has refused it, and that is all, also of one that is hedged.
#[tokio::test(start_paused = true)]
async fn a_hedged_call_that_is_refused_is_repeated_once_uncounted() {
    let calls = Arc::new(AtomicUsize::new(0));
    let count = calls.clone();
    let refusing = service_fn(move |_: http::Request<Body>| {
        count.fetch_add(1, SeqCst);
        async {
            let error = Error::new(Kind::Refused).with_sent(Sent::Unprocessed);
            Err::<http::Response<Body>, _>(error)
        }
    });
    let policy = HedgingPolicy::new(2, ms(50)).unwrap();
    let policy = policy.non_fatal([Code::Unavailable]).unwrap();
    let service = RetryLayer::new(policy).layer(refusing);
    let request = http::Request::new(Body::empty());
    let error = service.oneshot(request).await.unwrap_err();
    assert_eq!(error.sent(), Sent::Unprocessed);
    assert_eq!(calls.load(SeqCst), 3);
}

// What never got out is repeated as long as there is time, also of one that is hedged.
#[tokio::test(start_paused = true)]
async fn a_hedged_call_that_does_not_get_out_is_repeated_until_it_does() {
    let calls = Arc::new(AtomicUsize::new(0));
    let seen = calls.clone();
    let late = service_fn(move |_: http::Request<Body>| {
        let nth = seen.fetch_add(1, SeqCst);
        async move {
            match nth {
                0..40 => Err(Error::new(Kind::ConnectionLost)),
                _ => Ok(http::Response::new(Body::empty())),
            }
        }
    });
    let policy = HedgingPolicy::new(2, Duration::from_secs(60)).unwrap();
    let service = RetryLayer::new(policy).layer(late);
    let began = time::Instant::now();
    let request = http::Request::new(Body::empty());
    service.oneshot(request).await.unwrap();
    assert_eq!(calls.load(SeqCst), 41);
    let paused = began.elapsed();
    assert!(
        (Duration::from_secs(2)..Duration::from_secs(10)).contains(&paused),
        "{paused:?}"
    );
}

/// Says in its body's trailers what it is told to.
fn trailing(
    codes: &'static [u16],
) -> (
    Arc<AtomicUsize>,
    impl Service<http::Request<Body>, Response = http::Response<Body>, Error = BoxError, Future: Send>
    + Clone,
) {
    let calls = Arc::new(AtomicUsize::new(0));
    let count = calls.clone();
    let service = service_fn(move |_: http::Request<Body>| {
        let n = count.fetch_add(1, SeqCst);
        async move {
            let mut trailers = http::HeaderMap::new();
            trailers.insert("grpc-status", codes[n % codes.len()].into());
            let body = http_body_util::Full::new(Bytes::from_static(&[0; 5]));
            let body = body.with_trailers(std::future::ready(Some(Ok(trailers))));
            Ok::<_, BoxError>(http::Response::new(Body::new(body)))
        }
    });
    (calls, service)
}

// Scenario 22, and what trailers count for.
#[tokio::test(start_paused = true)]
async fn what_fails_in_its_trailers_is_not_repeated_and_counts_for_the_bucket() {
    let (calls, service) = trailing(&[14]);
    let config = ServiceConfig::from(paused(3, ms(1)));
    let config = config.throttling(Throttling::new(2, 1.0).unwrap());
    let mut retry = RetryLayer::new(config).layer(service);
    let request = || http::Request::new(Body::empty());
    for _ in 0..2 {
        let response = (&mut retry).oneshot(request()).await.unwrap();
        response.into_body().collect().await.unwrap();
    }
    assert_eq!(calls.load(SeqCst), 2);
}

// Law 1: nothing hangs, not during stop.
#[tokio::test]
async fn calls_between_two_attempts_end_when_the_manager_stops() {
    let server = EchoServer::start("a");
    let hour = Duration::from_secs(100);
    let hedged = HedgingPolicy::new(2, ms(10)).unwrap();
    let hedged = hedged.non_fatal([Code::Unavailable]).unwrap();
    for hedges in [false, true] {
        let manager = manager(&[&server]);
        match hedges {
            false => manager.configure("echo", paused(3, hour)).unwrap(),
            true => manager.configure("echo", hedged).unwrap(),
        }
        let channel = manager.channel("echo");
        let mut failure = Status::unavailable("as scripted");
        if hedges {
            let pushback = tonic::metadata::MetadataValue::from_static("100000");
            failure
                .metadata_mut()
                .insert("grpc-retry-pushback-ms", pushback);
        }
        let before = server.seen.finished.load(SeqCst);
        server.seen.fail_with([failure]);
        let pausing = tokio::spawn(async move { call(&channel, slow(0)).await });
        eventually("it has failed", || {
            server.seen.finished.load(SeqCst) > before
        })
        .await;
        time::sleep(ms(50)).await;
        assert!(!pausing.is_finished());
        let began = Instant::now();
        manager.stop().await;
        let ended = time::timeout(Duration::from_secs(3), pausing).await;
        let status = ended
            .expect("it ends with the manager")
            .unwrap()
            .unwrap_err();
        assert!(began.elapsed() < Duration::from_secs(1));
        assert_eq!(status.code(), Code::Cancelled, "{status}");
        assert_eq!(Error::of(&status).map(Error::sent), Some(Sent::Sent));
    }
}

// What is in flight has its grace, also if it is hedged.
#[tokio::test]
async fn a_hedged_call_finishes_within_the_grace_of_a_stop() {
    let server = EchoServer::start("a");
    let manager = manager(&[&server]);
    manager
        .configure("echo", HedgingPolicy::new(2, ms(200)).unwrap())
        .unwrap();
    let channel = manager.channel("echo");
    let hedged = tokio::spawn(async move { call(&channel, slow(600)).await });
    eventually("it is there", || server.seen.started.load(SeqCst) == 1).await;
    manager.stop_gracefully(Duration::from_secs(5)).await;
    hedged.await.unwrap().expect("it has had the time");
    assert_eq!(server.seen.started.load(SeqCst), 1);
}

// Law 1.
#[tokio::test]
async fn a_call_whose_own_request_is_at_fault_says_whose_it_is() {
    let server = EchoServer::start("a");
    let manager = manager(&[&server]);
    let channel = manager.channel("echo");
    let fails = stream::iter([Err::<http_body::Frame<Bytes>, _>(Status::aborted(
        "as asked",
    ))]);
    let body = http_body_util::StreamBody::new(fails);
    let request = http::Request::new(Body::new(body));
    let failed = channel.clone().oneshot(request).await.unwrap_err();
    assert_eq!(failed.kind(), Kind::RequestBody);
    let mut request = http::Request::new(Body::empty());
    let soon = http::HeaderValue::from_static("soon");
    request.headers_mut().insert("grpc-timeout", soon);
    let invalid = channel.oneshot(request).await.unwrap_err();
    assert_eq!(invalid.kind(), Kind::Invalid);
    assert_eq!([failed.role(), invalid.role()], [Some("echo"); 2]);
}

/// Is never ready, and says so with an error.
#[derive(Clone)]
struct Closed;

impl Service<http::Request<Body>> for Closed {
    type Response = http::Response<Body>;
    type Error = BoxError;
    type Future = std::future::Pending<Result<http::Response<Body>, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Err("closed".into()))
    }

    fn call(&mut self, _: http::Request<Body>) -> Self::Future {
        std::future::pending()
    }
}

// What was not called has not been executed.
#[tokio::test]
async fn a_call_of_a_service_that_is_not_ready_was_not_sent() {
    let request = || http::Request::new(Body::empty());
    let deadline = DeadlineLayer::new(ms(100)).layer(Closed);
    let cancel = CancelLayer::new(CancelToken::new()).layer(Closed);
    let retry = RetryLayer::transparent().layer(Closed);
    let errors = [
        deadline.oneshot(request()).await.unwrap_err(),
        cancel.oneshot(request()).await.unwrap_err(),
        retry.oneshot(request()).await.unwrap_err(),
    ];
    assert_eq!(errors.map(|error| error.sent()), [Sent::Unsent; 3]);
}

/// Can be called once; no clone of it can.
#[derive(Debug)]
struct Single {
    is_first: bool,
}

impl Clone for Single {
    fn clone(&self) -> Self {
        Self { is_first: false }
    }
}

impl Service<http::Request<Body>> for Single {
    type Response = http::Response<Body>;
    type Error = Error;
    type Future = std::future::Ready<Result<Self::Response, Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(match self.is_first {
            true => Ok(()),
            false => Err(Error::new(Kind::Stopped)),
        })
    }

    fn call(&mut self, _: http::Request<Body>) -> Self::Future {
        let error = Error::new(Kind::ConnectionLost);
        std::future::ready(Err(error.with_reason("as scripted")))
    }
}

#[tokio::test]
async fn a_call_that_nobody_takes_again_says_why_it_was_to_be_made_again() {
    let retry = RetryLayer::transparent().layer(Single { is_first: true });
    let error = retry.oneshot(http::Request::new(Body::empty())).await;
    let error = error.unwrap_err();
    assert_eq!(
        (error.kind(), error.sent()),
        (Kind::ConnectionLost, Sent::Unsent)
    );
}
