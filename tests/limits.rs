//! How many calls may be under way, and how many may wait: a pool over services that are done when they are told to be.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll},
    time::Duration,
};

use switchboard::{
    Avoid, Error, InstanceId, Kind, Sent, WaitForReady,
    discover::{Change, Update},
    endpoint::{BoxError, BoxFuture, Connected, Peer, Target},
    pool::{Pool, PoolConfig},
};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tower::{Service, ServiceExt as _};

type Request = http::Request<String>;
type Response = http::Response<String>;

#[derive(Debug)]
struct Node(Arc<Peer>);

impl Target for Node {
    fn peer(&self) -> &Arc<Peer> {
        &self.0
    }
}

/// Answers with its name when the gate has a permit for it; counts those that are here. Panics for a request that says so.
#[derive(Clone)]
struct Gated {
    id: Arc<str>,
    gate: Arc<Semaphore>,
    here: Arc<AtomicUsize>,
    most: Arc<AtomicUsize>,
}

struct Here(Arc<AtomicUsize>);

impl Drop for Here {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

impl Service<Request> for Gated {
    type Response = Response;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Response, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Self::Future {
        assert_ne!(request.body(), "panic in call", "as asked");
        let Self {
            id,
            gate,
            here,
            most,
        } = self.clone();
        let now = here.fetch_add(1, SeqCst) + 1;
        most.fetch_max(now, SeqCst);
        let counted = Here(here);
        Box::pin(async move {
            let _counted = counted;
            assert_ne!(request.body(), "panic in poll", "as asked");
            drop(gate.acquire().await?);
            Ok(Response::new(id.to_string()))
        })
    }
}

struct Scene {
    pool: Pool<Gated>,
    gate: Arc<Semaphore>,
    most: Arc<AtomicUsize>,
    updates: mpsc::UnboundedSender<Update<String, Arc<Node>>>,
}

impl Scene {
    fn empty(config: PoolConfig) -> Self {
        let (updates, changes) = mpsc::unbounded_channel();
        let (gate, most) = (Arc::new(Semaphore::new(0)), Arc::<AtomicUsize>::default());
        let template = (gate.clone(), most.clone());
        let connect = move |node: &Node| {
            let service = Gated {
                id: node.0.id.clone(),
                gate: template.0.clone(),
                here: Arc::default(),
                most: template.1.clone(),
            };
            Box::pin(async move { Ok(Connected::new(service)) })
                as BoxFuture<'static, Result<Connected<Gated>, BoxError>>
        };
        let changes = UnboundedReceiverStream::new(changes);
        let pool = Pool::new("echo", config, changes, connect).unwrap();
        updates.send(Update::Synced).unwrap();
        Self {
            pool,
            gate,
            most,
            updates,
        }
    }

    async fn of(ids: &[&str], config: PoolConfig) -> Self {
        let scene = Self::empty(config);
        for id in ids {
            let node = Arc::new(Node(Arc::new(Peer::new("echo", *id, "h:1"))));
            let change = Change::Insert((*id).to_owned(), node);
            scene.updates.send(Update::Change(change)).unwrap();
        }
        while scene.pool.status().ready() < ids.len() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        scene
    }

    /// A call that is under way, or has failed at once.
    async fn begin(&self, request: Request) -> Result<Begun, Error> {
        let mut call = Box::pin(self.pool.clone().oneshot(request));
        match futures_util::future::poll_immediate(&mut call).await {
            Some(Err(error)) => Err(error),
            Some(Ok(_)) => panic!("nobody has let it go on"),
            None => Ok(call),
        }
    }
}

type Begun = std::pin::Pin<Box<tower::util::Oneshot<Pool<Gated>, Request>>>;

fn request(body: &str) -> Request {
    Request::new(body.to_owned())
}

fn pinned(id: &str) -> Request {
    let mut request = request("");
    request.extensions_mut().insert(InstanceId::from(id));
    request
}

fn config() -> PoolConfig {
    PoolConfig::default()
}

#[tokio::test]
async fn a_peer_that_is_full_is_passed_by_and_only_if_all_are_a_call_fails() {
    // Given two peers with room for two calls each
    let scene = Scene::of(
        &["a", "b"],
        config().max_in_flight_per_peer(Some(2)).unwrap(),
    )
    .await;
    // When there are four calls, each has a place
    let mut calls = Vec::new();
    for _ in 0..4 {
        calls.push(scene.begin(request("")).await.unwrap());
    }
    // Then the fifth fails at once, also if it would wait for a peer
    let mut patient = request("");
    patient.extensions_mut().insert(WaitForReady(true));
    for request in [request(""), patient] {
        let error = scene.begin(request).await.unwrap_err();
        assert_eq!((error.kind(), error.sent()), (Kind::Limit, Sent::Unsent));
        assert_eq!(error.code(), tonic::Code::Unavailable);
        assert!(
            error.to_string().contains("2 calls are in flight there"),
            "{error}"
        );
    }
    assert_eq!(scene.pool.status().refused.peer, 2);
    assert!(
        scene
            .pool
            .status()
            .to_string()
            .contains("2 calls over a limit")
    );
    // One that is pinned to a full peer fails although the other has room again
    calls.remove(0);
    let full = [
        scene.begin(pinned("a")).await,
        scene.begin(pinned("b")).await,
    ];
    assert_eq!(full.iter().filter(|call| call.is_err()).count(), 1);
    drop(full);
    // And the place is held until the response's body is at its end
    scene.gate.add_permits(100);
    let mut responses = Vec::new();
    for call in calls {
        responses.push(call.await.unwrap());
    }
    responses.push(scene.pool.clone().oneshot(request("")).await.unwrap());
    let error = scene.pool.clone().oneshot(request("")).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Limit);
    drop(responses);
    scene.pool.clone().oneshot(request("")).await.unwrap();
}

#[tokio::test]
async fn a_role_has_a_limit_over_all_peers() {
    let scene = Scene::of(&["a", "b"], config().max_in_flight(Some(3)).unwrap()).await;
    let mut calls = Vec::new();
    for _ in 0..3 {
        calls.push(scene.begin(request("")).await.unwrap());
    }
    let error = scene.begin(request("")).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Limit);
    assert_eq!(error.role(), Some("echo"));
    assert!(
        error.to_string().contains("3 calls are in flight"),
        "{error}"
    );
    assert_eq!(scene.pool.status().refused.role, 1);
    calls.pop();
    calls.push(scene.begin(request("")).await.unwrap());
}

#[tokio::test]
async fn calls_that_wait_are_limited_too() {
    let scene = Scene::empty(config().wait_for_ready(true).max_waiting(2));
    let waiting = [
        scene.begin(request("")).await,
        scene.begin(request("")).await,
    ];
    assert!(waiting.iter().all(Result::is_ok));
    let error = scene.begin(request("")).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Limit);
    assert!(error.to_string().contains("2 calls do"), "{error}");
    assert_eq!(scene.pool.status().refused.waiting, 1);
    drop(waiting);
    assert!(scene.begin(request("")).await.is_ok());
    let none = Scene::empty(config().wait_for_ready(true).max_waiting(0));
    let error = none.begin(request("")).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Limit);
}

#[tokio::test]
async fn a_service_that_panics_gives_its_place_back() {
    let limits = config().max_in_flight_per_peer(Some(1)).unwrap();
    let scene = Scene::of(&["a"], limits.max_in_flight(Some(1)).unwrap()).await;
    scene.gate.add_permits(100);
    for how in ["panic in call", "panic in poll", "panic in call"] {
        let call = tokio::spawn(scene.pool.clone().oneshot(request(how)));
        assert!(call.await.unwrap_err().is_panic());
        scene.pool.clone().oneshot(request("")).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn there_are_never_more_than_may_be_and_all_places_come_back() {
    let scene = Scene::of(&["a"], config().max_in_flight_per_peer(Some(5)).unwrap()).await;
    scene.gate.add_permits(1);
    let callers: Vec<_> = (0..8)
        .map(|caller| {
            let pool = scene.pool.clone();
            tokio::spawn(async move {
                for n in 0..500 {
                    let call = pool.clone().oneshot(request(""));
                    match (n + caller) % 3 {
                        0 => drop(call.await),
                        // Dropped in the middle, or before it began.
                        1 => drop(futures_util::future::poll_immediate(Box::pin(call)).await),
                        _ => drop(call),
                    }
                    tokio::task::yield_now().await;
                }
            })
        })
        .collect();
    for caller in callers {
        caller.await.unwrap();
    }
    let most = scene.most.load(SeqCst);
    assert!((1..=5).contains(&most), "{most} at once");
    let mut calls = Vec::new();
    let permit = scene.gate.acquire().await.unwrap();
    for _ in 0..5 {
        calls.push(scene.begin(request("")).await.unwrap());
    }
    drop(permit);
}

#[tokio::test]
async fn whom_earlier_attempts_went_to_is_passed_by_as_long_as_there_is_another() {
    let scene = Scene::of(&["a", "b", "c"], config()).await;
    scene.gate.add_permits(1000);
    for _ in 0..50 {
        let avoid = Avoid::new();
        let mut went = Vec::new();
        for _ in 0..6 {
            let mut request = request("");
            request.extensions_mut().insert(avoid.clone());
            let response = scene.pool.clone().oneshot(request).await.unwrap();
            went.push(std::mem::take(&mut response.into_body().into_inner()));
        }
        let mut first = went[..3].to_vec();
        first.sort_unstable();
        assert_eq!(first, ["a", "b", "c"], "{went:?}");
        for pair in went.windows(2) {
            assert_ne!(pair[0], pair[1], "{went:?}");
        }
    }
    // Nobody else is there, or may have it
    let avoid = Avoid::new();
    for _ in 0..3 {
        let mut request = pinned("a");
        request.extensions_mut().insert(avoid.clone());
        scene.pool.clone().oneshot(request).await.unwrap();
    }
}

#[test]
fn limits_have_bounds() {
    for bad in [0, 1_000_001] {
        let error = config().max_in_flight(Some(bad)).unwrap_err();
        assert!(
            error.to_string().contains("between 1 and 1,000,000"),
            "{error}"
        );
        config().max_in_flight_per_peer(Some(bad)).unwrap_err();
    }
    config().max_in_flight(None).unwrap();
}
