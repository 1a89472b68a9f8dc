//! What a call's end says, and that it comes, where several things happen to it at once.

mod support;

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
        mpsc,
    },
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use support::{
    fake::{self, Fake},
    server::pb::{EchoRequest, echo_client::EchoClient},
};
use switchboard::{
    ConnectionManager, DeadlineLayer, Error, HedgingPolicy, Kind, RetryLayer, Sent, Session,
    discover::{Change, Update},
    endpoint::{BoxFuture, Connected, Peer, Target},
    pool::{Plain, Pool, PoolConfig},
    registry::Fixed,
};
use tokio::{sync::Notify, time};
use tonic::{Code, body::Body};
use tower::{BoxError, Layer as _, Service, ServiceExt as _, service_fn};

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Is never ready, or answers when it is told to.
#[derive(Clone)]
struct Told(Option<Arc<Notify>>);

impl Service<u32> for Told {
    type Response = u32;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<u32, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        match self.0 {
            Some(_) => Poll::Ready(Ok(())),
            None => Poll::Pending,
        }
    }

    fn call(&mut self, request: u32) -> Self::Future {
        let told = self.0.clone();
        Box::pin(async move {
            if let Some(told) = told {
                told.notified().await;
            }
            Ok(request)
        })
    }
}

#[derive(Debug)]
struct Node(Arc<Peer>);

impl Target for Node {
    fn peer(&self) -> &Arc<Peer> {
        &self.0
    }
}

/// So many that are never ready, and one that is and answers when it is told to.
fn pool(busy: usize, told: Arc<Notify>, config: PoolConfig) -> Pool<Told, Plain> {
    let nodes = (0..=busy).map(|n| {
        let id = n.to_string();
        let node = Arc::new(Node(Arc::new(Peer::new("echo", id.as_str(), "h:1"))));
        Update::Change(Change::Insert(id, node))
    });
    let updates: Vec<_> = nodes.chain([Update::Synced]).collect();
    let updates = stream::iter(updates).chain(stream::pending());
    let last = busy.to_string();
    let connect = move |node: &Node| {
        let told = (*node.0.id == *last).then(|| told.clone());
        Box::pin(async move { Ok(Connected::new(Told(told))) })
            as BoxFuture<'static, Result<Connected<Told>, BoxError>>
    };
    Pool::new("echo", config, updates, connect).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_call_that_waits_beside_one_that_is_full_finds_it_when_it_has_room_again() {
    for busy in [1, 3, 20] {
        let told = Arc::new(Notify::new());
        let config = PoolConfig::default()
            .max_in_flight_per_peer(Some(1))
            .unwrap();
        let pool = pool(busy, told.clone(), config);
        time::sleep(ms(100)).await;
        let first = tokio::spawn(pool.clone().oneshot(0));
        time::sleep(ms(2500)).await;
        let waiting = tokio::spawn(pool.clone().oneshot(1));
        time::sleep(ms(100)).await;
        assert!(!first.is_finished() && !waiting.is_finished(), "refused");
        told.notify_one();
        time::sleep(ms(1)).await;
        assert!(first.is_finished());
        told.notify_one();
        let found = time::timeout(Duration::from_secs(5), waiting).await;
        assert!(
            found.is_ok(),
            "it waits beside one that has room, for {busy} busy ones"
        );
    }
}

// A6: a server that says so has no more attempts made.
#[tokio::test(start_paused = true)]
async fn a_server_that_wants_no_more_attempts_gets_none_also_where_another_did_not_get_out() {
    let calls = Arc::new(AtomicUsize::new(0));
    let count = calls.clone();
    let service = service_fn(move |_: http::Request<Body>| {
        let nth = count.fetch_add(1, SeqCst);
        async move {
            match nth {
                // Wants no more
                0 => {
                    time::sleep(ms(150)).await;
                    let head = http::Response::builder()
                        .header("grpc-status", 14)
                        .header("grpc-retry-pushback-ms", -1);
                    Ok(head.body(Body::empty()).unwrap())
                }
                // Was not processed: made again, once and uncounted
                1 => {
                    time::sleep(ms(200)).await;
                    Err(Error::new(Kind::Refused).with_sent(Sent::Unprocessed))
                }
                _ => {
                    time::sleep(Duration::from_secs(60)).await;
                    Ok(http::Response::new(Body::empty()))
                }
            }
        }
    });
    let policy = HedgingPolicy::new(5, ms(100)).unwrap();
    let policy = policy.non_fatal([Code::Unavailable]).unwrap();
    let service = RetryLayer::new(policy).layer(service);
    service
        .oneshot(http::Request::new(Body::empty()))
        .await
        .unwrap();
    assert_eq!(
        calls.load(SeqCst),
        3,
        "two, and the one that was refused again"
    );
}

// What an inner layer keeps too little of the request for is left to an outer one.
#[tokio::test(start_paused = true)]
async fn what_a_layer_inside_could_not_repeat_is_repeated_by_one_outside() {
    for (kind, sent) in [
        (Kind::Refused, Sent::Unprocessed),
        (Kind::ConnectionLost, Sent::Unsent),
    ] {
        let calls = Arc::new(AtomicUsize::new(0));
        let count = calls.clone();
        let service = service_fn(move |_: http::Request<Body>| {
            let nth = count.fetch_add(1, SeqCst);
            async move {
                match nth {
                    0 => Err(Error::new(kind).with_sent(sent)),
                    _ => Ok(http::Response::new(Body::empty())),
                }
            }
        });
        let inside = RetryLayer::transparent().buffer(4).layer(service);
        let service = RetryLayer::<Body>::transparent().layer(inside);
        let body = Body::new(http_body_util::Full::new(bytes::Bytes::from_static(
            b"more than four",
        )));
        let result = service.oneshot(http::Request::new(body)).await;
        assert!(result.is_ok(), "{kind:?}: {:?}", result.err());
        assert_eq!(calls.load(SeqCst), 2);
    }
}

/// A server that says CANCELLED when a call's time is up, as tonic's does.
fn cancels_in_time() -> Fake {
    Fake::streams(|_, request, mut respond| {
        tokio::spawn(async move {
            time::sleep(fake::timeout_of(&request)).await;
            let head = http::Response::builder().header("grpc-status", 1);
            let _ = respond.send_response(head.body(()).unwrap(), true);
        });
    })
}

// Law 1
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_its_server_ends_in_time_says_at_whom() {
    let server = cancels_in_time();
    let session = Session::new("echo", server.address()).with_id("a");
    let manager = ConnectionManager::builder(Fixed::new([session]).unwrap()).build();
    manager
        .ready("echo", 1, Duration::from_secs(5))
        .await
        .unwrap();
    for n in 0..60 {
        let mut request = tonic::Request::new(EchoRequest::default());
        request.set_timeout(ms(20 + n % 7));
        let channel = manager.channel("echo");
        let status = EchoClient::new(channel).unary(request).await.unwrap_err();
        let error = Error::of(&status).expect("ours");
        assert_eq!(error.kind(), Kind::DeadlineExceeded);
        assert!(error.peer().is_some(), "{status}");
    }
}

#[test]
fn a_call_that_moves_on_ends_where_nobody_drives_the_runtime_that_it_was_on() {
    let (ended, ends) = mpsc::channel();
    std::thread::spawn(move || {
        let runtime = || {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap()
        };
        let never = service_fn(|_: http::Request<Body>| {
            std::future::pending::<Result<http::Response<Body>, BoxError>>()
        });
        let service = DeadlineLayer::new(ms(300)).layer(never);
        let request = || http::Request::new(Body::empty());
        let (first, second, third) = (runtime(), runtime(), runtime());
        // Its layer's times are kept on the first
        let error = first
            .block_on(service.clone().oneshot(request()))
            .unwrap_err();
        assert_eq!(error.kind(), Kind::DeadlineExceeded);
        let mut call = Box::pin(service.oneshot(request()));
        second.block_on(async {
            let _ = time::timeout(ms(50), &mut call).await.unwrap_err();
        });
        let error = third.block_on(call).unwrap_err();
        ended.send(error.kind()).unwrap();
        drop(second);
    });
    let kind = ends.recv_timeout(Duration::from_secs(5));
    assert_eq!(kind.expect("it ends"), Kind::DeadlineExceeded);
}
