//! How calls end, and how often they are made: through channels, to real tonic servers over real sockets.

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use support::{
    eventually,
    server::{
        EchoServer,
        pb::{EchoRequest, EchoResponse, echo_client::EchoClient},
    },
};
use switchboard::{
    Backoff, CancelToken, Channel, ConnectionManager, Error, HedgingPolicy, Kind, RetryLayer,
    RetryPolicy, Sent, ServiceConfig, Session, WaitForReady,
    config::{MethodConfig, MethodName},
    pool::PoolConfig,
    registry::Fixed,
    retry::Throttling,
};
use tokio::time;
use tonic::{Code, Request, Status, metadata::MetadataValue};
use tower::{Layer as _, Service, ServiceBuilder, ServiceExt as _};

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn manager(servers: &[&EchoServer]) -> ConnectionManager {
    let session =
        |server: &&EchoServer| Session::new("echo", server.address()).with_id(&*server.id);
    let fixed = Fixed::new(servers.iter().map(session)).unwrap();
    ConnectionManager::builder(fixed).build()
}

fn channel(
    servers: &[&EchoServer],
    config: impl Into<ServiceConfig>,
) -> (ConnectionManager, Channel) {
    let manager = manager(servers);
    manager.configure("echo", config).unwrap();
    let channel = manager.channel("echo");
    (manager, channel)
}

/// Until all are connected.
async fn connected(manager: &ConnectionManager, n: usize) {
    manager
        .ready("echo", n, Duration::from_secs(10))
        .await
        .unwrap();
}

async fn call(channel: &Channel, request: EchoRequest) -> Result<EchoResponse, Status> {
    let response = EchoClient::new(channel.clone()).unary(request).await?;
    Ok(response.into_inner())
}

fn nothing() -> EchoRequest {
    EchoRequest::default()
}

fn slow(delay_ms: u32) -> EchoRequest {
    EchoRequest {
        delay_ms,
        ..EchoRequest::default()
    }
}

fn quick(attempts: u32) -> RetryPolicy {
    let backoff = Backoff::constant(ms(1), 0.0).unwrap();
    RetryPolicy::new(attempts)
        .unwrap()
        .backoff(backoff)
        .idempotent()
}

fn unavailable() -> Status {
    Status::unavailable("as scripted")
}

fn pushing_back(values: &[&'static str]) -> Status {
    let mut status = unavailable();
    for value in values {
        let value = MetadataValue::from_static(value);
        status
            .metadata_mut()
            .append("grpc-retry-pushback-ms", value);
    }
    status
}

fn kind(status: &Status) -> Option<Kind> {
    Error::of(status).map(Error::kind)
}

// === retry ===

// Scenario 22.
#[tokio::test]
async fn a_failure_before_the_first_message_is_repeated_by_the_policy_and_each_attempt_says_which_it_is()
 {
    let server = EchoServer::start("a");
    let (manager, channel) = channel(&[&server], quick(3));
    server.seen.fail_with([unavailable(), unavailable()]);
    call(&channel, nothing()).await.unwrap();
    assert_eq!(*server.seen.previous.lock().unwrap(), ["-", "1", "2"]);
    let status = manager.status();
    assert_eq!(status.roles[0].repeated.by_policy, 2);
    assert!(
        status.to_string().contains(", 2 calls made again\n"),
        "{status}"
    );
    let json = serde_json::to_value(&status).unwrap();
    assert_eq!(json["roles"][0]["repeated"]["by_policy"], 2, "{json}");

    // There are three attempts, and not four.
    server
        .seen
        .fail_with([unavailable(), unavailable(), unavailable()]);
    let status = call(&channel, nothing()).await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::Unavailable, "as scripted")
    );
    assert_eq!(server.seen.started.load(SeqCst), 6);
}

#[tokio::test]
async fn without_a_policy_or_for_another_code_a_call_is_executed_once() {
    let server = EchoServer::start("a");
    let (manager, channel) = channel(&[&server], ServiceConfig::new());
    server.seen.fail_with([unavailable()]);
    call(&channel, nothing()).await.unwrap_err();
    // Not idempotent: what was executed once is not again.
    manager
        .configure("echo", RetryPolicy::new(3).unwrap())
        .unwrap();
    server.seen.fail_with([unavailable()]);
    call(&channel, nothing()).await.unwrap_err();
    manager.configure("echo", quick(3)).unwrap();
    server.seen.fail_with([Status::resource_exhausted("full")]);
    let status = call(&channel, nothing()).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!(server.seen.started.load(SeqCst), 3);
}

#[tokio::test]
async fn a_call_has_a_policy_of_its_own_and_a_method_another_than_its_service() {
    let server = EchoServer::start("a");
    let echo = "switchboard.demo.v1.Echo";
    let method = MethodName::method(echo, "Unary").unwrap();
    let config = ServiceConfig::new()
        .method(
            MethodName::service(echo).unwrap(),
            MethodConfig::new().retry(quick(5)).unwrap(),
        )
        .unwrap()
        .method(method, MethodConfig::new())
        .unwrap();
    let (_manager, channel) = channel(&[&server], config);
    server.seen.fail_with([unavailable()]);
    call(&channel, nothing()).await.unwrap_err();

    server.seen.fail_with([unavailable()]);
    let mut request = Request::new(nothing());
    request.extensions_mut().insert(quick(2));
    EchoClient::new(channel.clone())
        .unary(request)
        .await
        .unwrap();

    server.seen.fail_with([unavailable()]);
    let stream = tokio_stream::iter([nothing(), nothing()]);
    let answer = EchoClient::new(channel).upload(stream).await.unwrap();
    assert_eq!(
        answer.into_inner().messages,
        2,
        "the stream was sent again from its beginning"
    );
    assert_eq!(server.seen.started.load(SeqCst), 5);
}

// Scenario 21.
#[tokio::test]
async fn a_servers_pushback_is_the_delay_or_the_end() {
    let server = EchoServer::start("a");
    let (manager, channel) = channel(&[&server], quick(3));
    connected(&manager, 1).await;
    server.seen.fail_with([pushing_back(&["200"])]);
    let began = Instant::now();
    call(&channel, nothing()).await.unwrap();
    let took = began.elapsed();
    assert!((ms(200)..ms(300)).contains(&took), "{took:?}");

    for no in [
        &["-1"][..],
        &["soon"],
        &["+5"],
        &["1", "1"],
        &["99999999999999999999"],
    ] {
        let before = server.seen.started.load(SeqCst);
        server.seen.fail_with([pushing_back(no)]);
        call(&channel, nothing()).await.unwrap_err();
        assert_eq!(server.seen.started.load(SeqCst), before + 1, "{no:?}");
    }
    // There would be no time left for it: the failure itself is the answer.
    server.seen.fail_with([pushing_back(&["5000"])]);
    let mut request = Request::new(nothing());
    request.set_timeout(Duration::from_secs(2));
    let began = Instant::now();
    let status = EchoClient::new(channel).unary(request).await.unwrap_err();
    assert_eq!(status.message(), "as scripted");
    assert!(began.elapsed() < Duration::from_secs(1));
}

#[tokio::test]
async fn a_response_that_has_begun_is_the_calls() {
    let server = EchoServer::start("a");
    let (_manager, channel) = channel(&[&server], quick(3));
    let request = EchoRequest {
        count: 1,
        fail_with: Code::Unavailable as u32,
        ..EchoRequest::default()
    };
    let mut answers = EchoClient::new(channel)
        .download(request)
        .await
        .unwrap()
        .into_inner();
    let status = answers.message().await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(server.seen.started.load(SeqCst), 1);
}

#[tokio::test]
async fn a_request_that_is_larger_than_what_is_kept_is_made_once() {
    let server = EchoServer::start("a");
    let (_manager, channel) = channel(&[&server], quick(3));
    let of = |size| EchoRequest {
        payload: vec![0; size].into(),
        ..EchoRequest::default()
    };
    // One message, and a stream whose first message is.
    server.seen.fail_with([unavailable()]);
    call(&channel, of(RetryLayer::BUFFER + 1))
        .await
        .unwrap_err();
    assert_eq!(server.seen.started.load(SeqCst), 1);
    server.seen.fail_with([unavailable()]);
    let stream = tokio_stream::iter([of(RetryLayer::BUFFER + 1), nothing()]);
    EchoClient::new(channel.clone())
        .upload(stream)
        .await
        .unwrap_err();
    assert_eq!(server.seen.started.load(SeqCst), 2);
    // Just as large as may be, with its frame's head.
    server.seen.fail_with([unavailable()]);
    call(&channel, of(RetryLayer::BUFFER - 64)).await.unwrap();
    assert_eq!(server.seen.started.load(SeqCst), 4);
}

#[tokio::test]
async fn another_attempt_goes_to_another_peer() {
    let (good, bad) = (EchoServer::start("good"), EchoServer::start("bad"));
    let (manager, channel) = channel(&[&good, &bad], quick(2));
    connected(&manager, 2).await;
    bad.seen.fail_with((0..200).map(|_| unavailable()));
    for _ in 0..100 {
        let answer = call(&channel, nothing()).await.unwrap();
        assert_eq!(answer.server, "good");
    }
    assert!(bad.seen.started.load(SeqCst) > 10, "it was tried as well");
}

#[tokio::test]
async fn a_service_that_fails_is_left_alone_until_it_does_well_again() {
    let server = EchoServer::start("a");
    let config = ServiceConfig::from(quick(2)).throttling(Throttling::new(4, 0.5).unwrap());
    let (_manager, channel) = channel(&[&server], config);
    let attempts = async |fails: usize| {
        let before = server.seen.started.load(SeqCst);
        server.seen.fail_with((0..fails).map(|_| unavailable()));
        let result = call(&channel, nothing()).await;
        server.seen.script.lock().unwrap().clear();
        (server.seen.started.load(SeqCst) - before, result.is_ok())
    };
    // Four tokens: the first failure leaves three, which is enough, and the second two, which is not.
    assert_eq!(attempts(2).await, (2, false));
    assert_eq!(attempts(2).await, (1, false));
    // One is left. Three that do well make it two and a half, and another failure is one too many.
    for _ in 0..3 {
        assert_eq!(attempts(0).await, (1, true));
    }
    assert_eq!(attempts(1).await, (1, false));
    // Full again
    for _ in 0..6 {
        assert_eq!(attempts(0).await, (1, true));
    }
    assert_eq!(attempts(1).await, (2, true));
}

#[tokio::test]
async fn tonics_own_channel_can_be_what_is_repeated_over() {
    let server = EchoServer::start("a");
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", server.address()));
    let tonics = endpoint.unwrap().connect_lazy();
    let service = ServiceBuilder::new()
        .layer(RetryLayer::new(quick(3)))
        .service(tonics);
    server.seen.fail_with([unavailable(), unavailable()]);
    let mut request = Request::new(nothing());
    request
        .metadata_mut()
        .insert("kept", MetadataValue::from_static("yes"));
    request.set_timeout(Duration::from_secs(60));
    EchoClient::new(service).unary(request).await.unwrap();
    assert_eq!(*server.seen.previous.lock().unwrap(), ["-", "1", "2"]);
    assert_eq!(server.seen.timeouts.lock().unwrap().len(), 3);
}

#[tokio::test]
async fn of_nested_layers_the_outermost_repeats() {
    let server = EchoServer::start("a");
    let (_manager, channel) = channel(&[&server], quick(3));
    let service = ServiceBuilder::new()
        .layer(RetryLayer::new(quick(2)))
        .service(channel);
    server.seen.fail_with((0..9).map(|_| unavailable()));
    EchoClient::new(service).unary(nothing()).await.unwrap_err();
    assert_eq!(server.seen.started.load(SeqCst), 2);
}

// === hedging ===

#[tokio::test]
async fn a_hedged_call_has_the_first_answer_and_cancels_the_others() {
    let (one, other) = (EchoServer::start("one"), EchoServer::start("other"));
    let (manager, channel) = channel(&[&one, &other], HedgingPolicy::new(2, ms(50)).unwrap());
    connected(&manager, 2).await;
    // Whoever has the first is slow.
    let began = Instant::now();
    let answer = call(&channel, slow(400)).await.unwrap();
    let took = began.elapsed();
    assert!((ms(400)..ms(600)).contains(&took), "{took:?}");
    let started = || [&one, &other].map(|server| server.seen.started.load(SeqCst));
    assert_eq!(
        started(),
        [1, 1],
        "one attempt each; {} was first",
        answer.server
    );
    eventually("the other is cancelled", || {
        [&one, &other]
            .iter()
            .any(|server| server.seen.cancelled.load(SeqCst) == 1)
    })
    .await;
    let previous = [&one, &other].map(|server| server.seen.previous.lock().unwrap().concat());
    assert!(previous.contains(&"1".to_owned()), "{previous:?}");
    let repeated = manager.status().roles[0].repeated;
    assert_eq!((repeated.hedged, repeated.total()), (1, 1));
}

#[tokio::test]
async fn a_failure_that_is_not_fatal_has_the_next_attempt_made_at_once_and_another_is_the_calls() {
    let server = EchoServer::start("a");
    let policy = HedgingPolicy::new(3, Duration::from_secs(60)).unwrap();
    let policy = policy.non_fatal([Code::Unavailable]).unwrap();
    let (_manager, channel) = channel(&[&server], policy);
    server.seen.fail_with([unavailable(), unavailable()]);
    let began = Instant::now();
    call(&channel, nothing()).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(5));
    assert_eq!(server.seen.started.load(SeqCst), 3);

    server
        .seen
        .fail_with([unavailable(), Status::internal("a bug")]);
    let status = call(&channel, nothing()).await.unwrap_err();
    assert_eq!(status.code(), Code::Internal);
    server
        .seen
        .fail_with([unavailable(), unavailable(), unavailable()]);
    let status = call(&channel, nothing()).await.unwrap_err();
    assert_eq!(status.message(), "as scripted", "all have failed");
    server.seen.fail_with([pushing_back(&["-1"])]);
    call(&channel, nothing()).await.unwrap_err();
    assert_eq!(server.seen.started.load(SeqCst), 3 + 2 + 3 + 1);
}

/// Services that end as they are told to: the first never does.
fn scripted(
    later: impl Fn() -> Error + Clone + Send + 'static,
) -> impl Service<
    http::Request<tonic::body::Body>,
    Response = http::Response<()>,
    Error = Error,
    Future: Send,
> + Clone {
    let calls = Arc::new(AtomicUsize::new(0));
    tower::service_fn(move |_| {
        let (calls, later) = (calls.clone(), later.clone());
        async move {
            match calls.fetch_add(1, SeqCst) {
                0 => std::future::pending().await,
                _ => Err::<http::Response<()>, _>(later()),
            }
        }
    })
}

// Law 7: those under way may have been executed.
#[tokio::test(start_paused = true)]
async fn a_failure_that_ends_attempts_under_way_says_that_the_call_may_have_been_executed() {
    let policy = HedgingPolicy::new(3, ms(10)).unwrap();
    let fatal = || Error::new(Kind::Invalid).with_reason("as scripted");
    let mut service = RetryLayer::new(policy).layer(scripted(fatal));
    let request = http::Request::new(tonic::body::Body::empty());
    let error = (&mut service).oneshot(request).await.unwrap_err();
    assert_eq!((error.kind(), error.sent()), (Kind::Invalid, Sent::Sent));
}

#[tokio::test(start_paused = true)]
async fn a_hedge_that_nobody_can_take_leaves_the_first_attempt_alone() {
    for kind in [Kind::Limit, Kind::NotConnected] {
        let policy = HedgingPolicy::new(3, ms(10)).unwrap();
        let mut service = RetryLayer::new(policy).layer(scripted(move || Error::new(kind)));
        let request = http::Request::new(tonic::body::Body::empty());
        let call = (&mut service).oneshot(request);
        let ended = time::timeout(Duration::from_secs(60), call).await;
        assert!(ended.is_err(), "{kind:?} ended it: {ended:?}");
    }
}

#[tokio::test]
async fn a_hedge_over_the_roles_limit_is_not_made() {
    let server = EchoServer::start("a");
    let session = Session::new("echo", server.address()).with_id("a");
    let manager = ConnectionManager::builder(Fixed::new([session]).unwrap())
        .pools(PoolConfig::default().max_in_flight(Some(1)).unwrap())
        .build();
    let policy = HedgingPolicy::new(3, ms(20)).unwrap();
    manager.configure("echo", policy).unwrap();
    let channel = manager.channel("echo");
    connected(&manager, 1).await;
    call(&channel, slow(200)).await.unwrap();
    assert_eq!(server.seen.started.load(SeqCst), 1);
}

// === deadlines ===

// Scenario 23.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_its_timeout_is_a_call_is_over_then_and_the_server_knows() {
    let server = EchoServer::start("a");
    let (manager, channel) = channel(&[&server], quick(3));
    connected(&manager, 1).await;
    let mut calls = Vec::new();
    for timeout in (0..=10).chain(0..=10) {
        let mut request = Request::new(slow(500));
        request.set_timeout(ms(timeout));
        let mut client = EchoClient::new(channel.clone());
        calls.push(tokio::spawn(async move {
            let began = Instant::now();
            let status = client.unary(request).await.unwrap_err();
            (timeout, status, began.elapsed())
        }));
    }
    for call in calls {
        let (timeout, status, took) = call.await.unwrap();
        assert_eq!(
            status.code(),
            Code::DeadlineExceeded,
            "{timeout} ms: {status}"
        );
        assert!(
            took >= ms(timeout) && took < ms(timeout + 100),
            "{timeout} ms: {took:?}"
        );
    }
    let seen = &server.seen;
    eventually("the server knows of all", || {
        seen.cancelled.load(SeqCst) == seen.started.load(SeqCst)
    })
    .await;
    assert_eq!(seen.finished.load(SeqCst), 0);
}

#[tokio::test]
async fn a_deadline_covers_all_attempts_and_each_is_told_what_remains() {
    let server = EchoServer::start("a");
    let backoff = Backoff::constant(ms(100), 0.0).unwrap();
    let (manager, channel) = channel(&[&server], quick(5).backoff(backoff));
    connected(&manager, 1).await;
    server.seen.fail_with([unavailable(), unavailable()]);
    let mut request = Request::new(slow(5000));
    request.set_timeout(ms(500));
    let began = Instant::now();
    let status = EchoClient::new(channel).unary(request).await.unwrap_err();
    let took = began.elapsed();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    assert_eq!(Error::of(&status).map(Error::sent), Some(Sent::Sent));
    assert!((ms(500)..ms(600)).contains(&took), "{took:?}");
    let told: Vec<u64> = (server.seen.timeouts.lock().unwrap().iter())
        .map(|told| told.trim_end_matches(['n', 'u']).parse().unwrap())
        .collect();
    assert_eq!(told.len(), 3, "{told:?}");
    let units: Vec<_> = server.seen.timeouts.lock().unwrap().clone();
    let left = |n: usize| match units[n].ends_with('n') {
        true => told[n] / 1_000_000,
        false => told[n] / 1000,
    };
    assert!(
        left(0) > 480 && (350..=400).contains(&left(1)) && (200..=300).contains(&left(2)),
        "{units:?}"
    );
}

#[tokio::test]
async fn a_deadline_covers_the_body_and_a_configured_one_those_that_say_nothing() {
    let server = EchoServer::start("a");
    let (manager, channel) = channel(&[&server], MethodConfig::new().timeout(ms(300)).unwrap());
    connected(&manager, 1).await;
    let endless = || EchoRequest {
        count: 1000,
        delay_ms: 20,
        ..EchoRequest::default()
    };
    for (own, bound) in [(None, 300), (Some(100), 100), (Some(5000), 300)] {
        let mut request = Request::new(endless());
        if let Some(own) = own {
            request.set_timeout(ms(own));
        }
        let began = Instant::now();
        let mut answers = EchoClient::new(channel.clone())
            .download(request)
            .await
            .unwrap()
            .into_inner();
        let status = loop {
            match answers.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("it ended"),
                Err(status) => break status,
            }
        };
        let took = began.elapsed();
        assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
        assert!(
            (ms(bound)..ms(bound + 100)).contains(&took),
            "{own:?}: {took:?}"
        );
    }
    eventually("the server has given up", || {
        server.seen.cancelled.load(SeqCst) == 3
    })
    .await;
}

#[tokio::test]
async fn a_call_that_waited_tells_the_server_what_remains() {
    let server = EchoServer::start("late");
    let registry = switchboard::MemoryRegistry::new();
    let manager = ConnectionManager::builder(registry.clone()).build();
    manager
        .configure("echo", MethodConfig::new().wait_for_ready(true))
        .unwrap();
    let channel = manager.channel("echo");
    let waiting = tokio::spawn(async move {
        let mut request = Request::new(nothing());
        request.set_timeout(Duration::from_secs(10));
        EchoClient::new(channel).unary(request).await
    });
    time::sleep(ms(500)).await;
    let session = Session::new("echo", server.address());
    let _registration = registry.register(session).await.unwrap();
    waiting.await.unwrap().unwrap();
    let told = server.seen.timeouts.lock().unwrap()[0].clone();
    let told: u64 = told.trim_end_matches('u').parse().unwrap();
    assert!((5_000_000..9_500_000).contains(&told), "{told} us");
}

// === cancellation ===

#[tokio::test]
async fn one_call_is_cancelled_by_its_own_token_wherever_it_is() {
    let server = EchoServer::start("a");
    let pause = Backoff::constant(Duration::from_secs(60), 0.0).unwrap();
    let (manager, channel) = channel(&[&server], quick(3).backoff(pause));
    connected(&manager, 1).await;
    let with = |token: &CancelToken, request: EchoRequest| {
        let mut request = Request::new(request);
        request.extensions_mut().insert(token.clone());
        request
    };
    // In flight
    let token = CancelToken::for_call();
    let request = with(&token, slow(60_000));
    let mut client = EchoClient::new(channel.clone());
    let in_flight = tokio::spawn(async move { client.unary(request).await });
    eventually("it is there", || server.seen.started.load(SeqCst) == 1).await;
    token.cancel();
    let status = in_flight.await.unwrap().unwrap_err();
    assert_eq!(
        (status.code(), kind(&status)),
        (Code::Cancelled, Some(Kind::Cancelled))
    );
    eventually("the server knows", || {
        server.seen.cancelled.load(SeqCst) == 1
    })
    .await;
    // Not even sent
    let status = EchoClient::new(channel.clone())
        .unary(with(&token, nothing()))
        .await
        .unwrap_err();
    assert_eq!(Error::of(&status).map(Error::sent), Some(Sent::Unsent));
    // Between two attempts
    let token = CancelToken::for_call();
    let request = with(&token, nothing());
    server.seen.fail_with([unavailable()]);
    let mut client = EchoClient::new(channel.clone());
    let between = tokio::spawn(async move { client.unary(request).await });
    eventually("it has failed", || server.seen.finished.load(SeqCst) == 1).await;
    token.cancel();
    let status = between.await.unwrap().unwrap_err();
    assert_eq!(kind(&status), Some(Kind::Cancelled), "{status}");
    assert_eq!(Error::of(&status).map(Error::sent), Some(Sent::Sent));
    // In its body
    let token = CancelToken::for_call();
    let request = with(
        &token,
        EchoRequest {
            count: 9,
            delay_ms: 60_000,
            ..nothing()
        },
    );
    let mut answers = EchoClient::new(channel)
        .download(request)
        .await
        .unwrap()
        .into_inner();
    token.cancel();
    let status = answers.message().await.unwrap_err();
    assert_eq!(kind(&status), Some(Kind::Cancelled), "{status}");
}

#[tokio::test]
async fn a_channel_that_is_stopped_ends_its_calls_and_those_of_its_clones_alone() {
    let server = EchoServer::start("a");
    let (manager, channel) = channel(&[&server], ServiceConfig::new());
    let others = manager.channel("echo");
    let pinned = channel.to("a");
    let spawn = |channel: &Channel| {
        let channel = channel.clone();
        tokio::spawn(async move { call(&channel, slow(1500)).await })
    };
    let mine: Vec<_> = (0..50).map(|_| spawn(&channel)).collect();
    let theirs = [spawn(&others), spawn(&pinned)];
    eventually("all are there", || server.seen.started.load(SeqCst) == 52).await;
    channel.clone().stop();
    let began = Instant::now();
    for call in mine {
        let status = call.await.unwrap().unwrap_err();
        assert_eq!(
            (status.code(), kind(&status)),
            (Code::Cancelled, Some(Kind::Stopped))
        );
        assert!(
            status.message().contains("the channel was stopped"),
            "{status}"
        );
    }
    assert!(began.elapsed() < ms(500), "{:?}", began.elapsed());
    let status = call(&channel, nothing()).await.unwrap_err();
    assert_eq!(Error::of(&status).map(Error::sent), Some(Sent::Unsent));
    for call in theirs {
        call.await.unwrap().unwrap();
    }
}

// Scenario 8.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_cancels_one_that_times_out_and_a_connection_that_is_replaced_hurt_no_other() {
    let mut server = EchoServer::start("a");
    let (manager, channel) = channel(&[&server], ServiceConfig::new());
    connected(&manager, 1).await;
    let token = CancelToken::for_call();
    let calls: Vec<_> = (0..50)
        .map(|n| {
            let mut client = EchoClient::new(channel.clone());
            let mut request = Request::new(slow(1500));
            match n {
                0 => drop(request.extensions_mut().insert(token.clone())),
                1 => request.set_timeout(ms(700)),
                _ => {}
            }
            tokio::spawn(async move { client.unary(request).await.map_err(|status| status.code()) })
        })
        .collect();
    eventually("all are there", || server.seen.started.load(SeqCst) == 50).await;
    token.cancel();
    // It says goodbye, and takes no more calls on this connection.
    server.stop_gracefully();
    let mut ends = Vec::new();
    for call in calls {
        ends.push(call.await.unwrap().map(drop));
    }
    assert_eq!(ends[0], Err(Code::Cancelled));
    assert_eq!(ends[1], Err(Code::DeadlineExceeded));
    assert!(ends[2..].iter().all(Result::is_ok), "{ends:?}");
}

// === configuration ===

#[tokio::test]
async fn a_configuration_is_replaced_while_calls_are_made() {
    let server = EchoServer::start("a");
    let (manager, channel) = channel(&[&server], MethodConfig::new().timeout(ms(100)).unwrap());
    connected(&manager, 1).await;
    let status = call(&channel, slow(300)).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    manager.configure("echo", ServiceConfig::new()).unwrap();
    call(&channel, slow(300)).await.unwrap();
    manager.configure("echo", quick(2)).unwrap();
    server.seen.fail_with([unavailable()]);
    call(&channel, nothing()).await.unwrap();
}

#[tokio::test]
async fn calls_of_a_method_wait_for_an_instance_and_one_call_may_say_otherwise() {
    let registry = switchboard::MemoryRegistry::new();
    let manager = ConnectionManager::builder(registry)
        .service_configs(MethodConfig::new().wait_for_ready(true))
        .build();
    let channel = manager.channel("echo");
    let mut client = EchoClient::new(channel.clone());
    let mut request = Request::new(nothing());
    request.set_timeout(ms(200));
    let status = client.unary(request).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "it waited: {status}");
    let mut request = Request::new(nothing());
    request.extensions_mut().insert(WaitForReady(false));
    let status = client.unary(request).await.unwrap_err();
    assert_eq!(kind(&status), Some(Kind::NoSession), "{status}");
}
