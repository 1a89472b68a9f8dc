//! How many calls may be under way, and how many may wait: a pool over services that are done when they are told to be.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll},
    time::Duration,
};

use switchboard::{
    Avoid, Error, InstanceId, Kind, Sent, WaitForReady,
    discover::{Change, Update},
    endpoint::{BoxError, BoxFuture, Connected, Lifeline, Peer, Target},
    pool::{Pool, PoolConfig},
};
use tokio::sync::{Notify, Semaphore, mpsc};
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

/// Answers with its name, and with the request's timeout, when the gate has a permit for it; counts those that are here.
/// Panics for a request that says so. While it is lazy, no clone is ready when it is first asked: all calls wait. While it is
/// stuck, "a" is never ready. While it is broken, it panics instead of being ready.
struct Gated {
    id: Arc<str>,
    here: Arc<Count>,
    common: Arc<Common>,
    asked: bool,
}

#[derive(Debug)]
struct Common {
    gate: Semaphore,
    lazy: AtomicBool,
    stuck: AtomicBool,
    broken: AtomicBool,
    /// Told, one connection is lost; its calls go on.
    lost: Notify,
    dialled: AtomicUsize,
    /// At all peers together, and the most that were at one.
    all: Count,
    most: AtomicUsize,
}

#[derive(Debug, Default)]
struct Count {
    now: AtomicUsize,
    most: AtomicUsize,
}

impl Count {
    fn up(&self) -> usize {
        let now = self.now.fetch_add(1, SeqCst) + 1;
        self.most.fetch_max(now, SeqCst);
        now
    }
}

/// A connection, as far as its endpoint is concerned.
#[derive(Debug)]
struct Line(Arc<Common>);

impl Lifeline for Line {
    fn closed(&self) -> BoxFuture<'_, Error> {
        Box::pin(async {
            self.0.lost.notified().await;
            Error::from(Kind::ConnectionLost)
        })
    }

    fn close(&self, _: Error) {}
}

struct Here(Arc<Count>, Arc<Common>);

impl Drop for Here {
    fn drop(&mut self) {
        self.0.now.fetch_sub(1, SeqCst);
        self.1.all.now.fetch_sub(1, SeqCst);
    }
}

impl Clone for Gated {
    fn clone(&self) -> Self {
        Self {
            id: self.id.clone(),
            here: self.here.clone(),
            common: self.common.clone(),
            asked: false,
        }
    }
}

impl Service<Request> for Gated {
    type Response = Response;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Response, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        if &*self.id == "a" && self.common.stuck.load(SeqCst) {
            return Poll::Pending;
        }
        if !std::mem::replace(&mut self.asked, true) && self.common.lazy.load(SeqCst) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        assert!(!self.common.broken.load(SeqCst), "as asked");
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Self::Future {
        assert_ne!(request.body(), "panic in call", "as asked");
        let Self {
            id, here, common, ..
        } = self.clone();
        common.most.fetch_max(here.up(), SeqCst);
        common.all.up();
        let counted = Here(here, common.clone());
        Box::pin(async move {
            let _counted = counted;
            assert_ne!(request.body(), "panic in poll", "as asked");
            drop(common.gate.acquire().await?);
            let mut response = Response::new(id.to_string());
            if let Some(timeout) = request.headers().get("grpc-timeout") {
                response.headers_mut().insert("timeout", timeout.clone());
            }
            Ok(response)
        })
    }
}

struct Scene {
    pool: Pool<Gated>,
    common: Arc<Common>,
    updates: mpsc::UnboundedSender<Update<String, Arc<Node>>>,
}

impl Scene {
    fn empty(config: PoolConfig) -> Self {
        let (updates, changes) = mpsc::unbounded_channel();
        let common = Arc::new(Common {
            gate: Semaphore::new(0),
            lazy: AtomicBool::new(false),
            stuck: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            lost: Notify::new(),
            dialled: AtomicUsize::new(0),
            all: Count::default(),
            most: AtomicUsize::new(0),
        });
        let template = common.clone();
        let connect = move |node: &Node| {
            let service = Gated {
                id: node.0.id.clone(),
                here: Arc::default(),
                common: template.clone(),
                asked: false,
            };
            template.dialled.fetch_add(1, SeqCst);
            let line = Arc::new(Line(template.clone()));
            Box::pin(async move { Ok(Connected::new(service).with_lifeline(line)) })
                as BoxFuture<'static, Result<Connected<Gated>, BoxError>>
        };
        let changes = UnboundedReceiverStream::new(changes);
        let pool = Pool::new("echo", config, changes, connect).unwrap();
        updates.send(Update::Synced).unwrap();
        Self {
            pool,
            common,
            updates,
        }
    }

    fn insert(&self, id: &str) {
        let node = Arc::new(Node(Arc::new(Peer::new("echo", id, "h:1"))));
        let change = Change::Insert(id.to_owned(), node);
        self.updates.send(Update::Change(change)).unwrap();
    }

    fn set_lazy(&self, lazy: bool) {
        self.common.lazy.store(lazy, SeqCst);
    }

    async fn of(ids: &[&str], config: PoolConfig) -> Self {
        let scene = Self::empty(config);
        for id in ids {
            scene.insert(id);
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
            error
                .to_string()
                .contains("role echo: 2 calls are in flight at each"),
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
    #[cfg(feature = "registry")]
    {
        let json = serde_json::to_value(scene.pool.status()).unwrap();
        assert_eq!(json["refused"]["peer"], 2, "{json}");
    }
    // One that is pinned to a full peer fails although the other has room again
    calls.remove(0);
    let full = [
        scene.begin(pinned("a")).await,
        scene.begin(pinned("b")).await,
    ];
    assert_eq!(full.iter().filter(|call| call.is_err()).count(), 1);
    drop(full);
    // And the place is held until the response's body is at its end
    scene.common.gate.add_permits(100);
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
async fn each_call_that_may_not_wait_is_counted_once_however_many_fail_without_a_pause() {
    // Given nobody to call, and none that may wait for somebody
    let scene = Scene::empty(config().wait_for_ready(true).max_waiting(0));
    // When so many calls fail in one task that it has to let others go first
    let pool = scene.pool.clone();
    let calls = tokio::spawn(async move {
        for _ in 0..1000 {
            let error = pool.clone().oneshot(request("")).await.unwrap_err();
            assert_eq!(error.kind(), Kind::Limit);
        }
    });
    calls.await.unwrap();
    // Then each has been refused, and told, once
    assert_eq!(scene.pool.status().refused.waiting, 1000);
}

#[tokio::test]
async fn a_service_that_panics_gives_its_place_back_also_to_a_call_that_waited() {
    let limits = config().max_in_flight_per_peer(Some(1)).unwrap();
    let limits = limits.max_in_flight(Some(1)).unwrap().max_waiting(1);
    let scene = Scene::of(&["a"], limits).await;
    scene.common.gate.add_permits(100);
    for lazy in [false, true] {
        scene.set_lazy(lazy);
        for how in ["panic in call", "panic in poll", "panic in call"] {
            let call = tokio::spawn(scene.pool.clone().oneshot(request(how)));
            assert!(call.await.unwrap_err().is_panic());
            scene.pool.clone().oneshot(request("")).await.unwrap();
        }
        // Also when it is only asked whether it is ready
        for _ in 0..3 {
            scene.common.broken.store(true, SeqCst);
            let call = tokio::spawn(scene.pool.clone().oneshot(request("")));
            assert!(call.await.unwrap_err().is_panic());
            scene.common.broken.store(false, SeqCst);
            scene.pool.clone().oneshot(request("")).await.unwrap();
        }
    }
    assert_eq!(scene.pool.status().refused.total(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn there_are_never_more_than_may_be_and_all_places_come_back() {
    // Given limits that eight callers can reach, one of them by each peer and one by the role
    for (per_peer, role, lazy) in [
        (Some(2), None, false),
        (Some(2), None, true),
        (None, Some(3), false),
        (Some(2), Some(3), false),
        (Some(2), Some(3), true),
    ] {
        let limits = config().max_in_flight_per_peer(per_peer).unwrap();
        let limits = limits.max_in_flight(role).unwrap();
        let scene = Scene::of(&["a", "b"], limits).await;
        scene.set_lazy(lazy);
        scene.common.gate.add_permits(1);
        // When they call, and drop their calls before they began, at any await, or at their end
        let callers: Vec<_> = (0..8)
            .map(|caller| {
                let pool = scene.pool.clone();
                tokio::spawn(async move {
                    for n in 0..400 {
                        let mut call = Box::pin(pool.clone().oneshot(request("")));
                        match (n + caller) % 4 {
                            0 => drop(call.await),
                            1 => {}
                            polls => {
                                for _ in 1..polls {
                                    let polled = futures_util::future::poll_immediate(&mut call);
                                    if polled.await.is_some() {
                                        break;
                                    }
                                }
                            }
                        }
                        tokio::task::yield_now().await;
                    }
                })
            })
            .collect();
        for caller in callers {
            caller.await.unwrap();
        }
        // Then there were never more than may be
        let seen = format!("{per_peer:?} {role:?} lazy {lazy}");
        let at_one = scene.common.most.load(SeqCst);
        let in_all = scene.common.all.most.load(SeqCst);
        assert!(
            (1..=per_peer.unwrap_or(8)).contains(&at_one),
            "{seen}: {at_one}"
        );
        assert!(
            (1..=role.unwrap_or(4)).contains(&in_all),
            "{seen}: {in_all}"
        );
        // And all places are free
        scene.set_lazy(false);
        let _closed = scene.common.gate.acquire().await.unwrap();
        let mut calls = Vec::new();
        for _ in 0..role.unwrap_or(4) {
            calls.push(scene.begin(request("")).await.expect(&seen));
        }
        assert_eq!(
            scene.begin(request("")).await.unwrap_err().kind(),
            Kind::Limit
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn there_never_wait_more_than_may_and_all_their_places_come_back() {
    // Given room for three to wait, and nobody to call
    let scene = Scene::empty(config().wait_for_ready(true).max_waiting(3));
    let (waiting, refused) = (Arc::new(Count::default()), Arc::new(AtomicUsize::new(0)));
    // When eight callers begin to wait and give up again
    let callers: Vec<_> = (0..8)
        .map(|_| {
            let (pool, waiting) = (scene.pool.clone(), waiting.clone());
            let refused = refused.clone();
            tokio::spawn(async move {
                for _ in 0..400 {
                    let mut call = Box::pin(pool.clone().oneshot(request("")));
                    tokio::select! {
                        biased;
                        result = &mut call => {
                            assert_eq!(result.unwrap_err().kind(), Kind::Limit);
                            refused.fetch_add(1, SeqCst);
                        }
                        () = std::future::ready(()) => {
                            waiting.up();
                            tokio::task::yield_now().await;
                            waiting.now.fetch_sub(1, SeqCst);
                        }
                    }
                    drop(call);
                    tokio::task::yield_now().await;
                }
            })
        })
        .collect();
    for caller in callers {
        caller.await.unwrap();
    }
    // Then no more than three did at once
    let (most, refused) = (waiting.most.load(SeqCst), refused.load(SeqCst));
    assert!((1..=3).contains(&most), "{most} waited");
    // Each refusal was counted
    let counted = scene.pool.status().refused.waiting;
    assert_eq!(counted, refused as u64);
    // And there is room for three again
    let mut calls = Vec::new();
    for _ in 0..3 {
        calls.push(scene.begin(request("")).await.unwrap());
    }
    let error = scene.begin(request("")).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Limit);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_place_is_a_calls_until_its_response_is_dropped_also_of_many_at_once() {
    // Given room for two calls at a peer and three in all, and peers that answer at once
    let limits = config().max_in_flight_per_peer(Some(2)).unwrap();
    let scene = Scene::of(&["a", "b"], limits.max_in_flight(Some(3)).unwrap()).await;
    scene.common.gate.add_permits(100);
    let held = Arc::new([Count::default(), Count::default(), Count::default()]);
    // When callers hold responses, pinned ones among them, and drop them
    let callers: Vec<_> = (0..8)
        .map(|caller| {
            let (pool, held) = (scene.pool.clone(), held.clone());
            tokio::spawn(async move {
                for n in 0..400 {
                    let request = match (n + caller) % 3 {
                        0 => request(""),
                        1 => pinned("a"),
                        _ => pinned("b"),
                    };
                    if let Ok(response) = pool.clone().oneshot(request).await {
                        let of = usize::from(response.body().get_ref() == "b");
                        let counts = [held.get(of).unwrap(), held.get(2).unwrap()];
                        for count in counts {
                            count.up();
                        }
                        tokio::task::yield_now().await;
                        for count in counts {
                            count.now.fetch_sub(1, SeqCst);
                        }
                        drop(response);
                    }
                    tokio::task::yield_now().await;
                }
            })
        })
        .collect();
    for caller in callers {
        caller.await.unwrap();
    }
    // Then there were never more than may be
    let most: Vec<_> = held.iter().map(|count| count.most.load(SeqCst)).collect();
    let [a, b, all] = most[..] else {
        panic!("{most:?}");
    };
    assert!(
        (1..=2).contains(&a) && (1..=2).contains(&b) && (1..=3).contains(&all),
        "{most:?}"
    );
    // And all places are free
    let mut responses = Vec::new();
    for id in ["a", "a", "b"] {
        responses.push(scene.pool.clone().oneshot(pinned(id)).await.unwrap());
    }
    let error = scene.pool.clone().oneshot(pinned("b")).await.unwrap_err();
    assert!(error.to_string().contains("in all"), "{error}");
}

#[tokio::test]
async fn calls_of_a_lost_connection_count_at_their_peer_until_they_end() {
    // Given a peer that is full, with a call that outlives its connection
    let limits = config().max_in_flight_per_peer(Some(1)).unwrap();
    let scene = Scene::of(&["a"], limits).await;
    scene.common.gate.add_permits(100);
    let response = scene.pool.clone().oneshot(request("")).await.unwrap();
    // When it is connected anew
    scene.common.lost.notify_one();
    let connected_anew = async {
        while scene.common.dialled.load(SeqCst) < 2 || scene.pool.status().ready() < 1 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let in_time = tokio::time::timeout(Duration::from_secs(10), connected_anew);
    in_time.await.expect("it is dialled again at once");
    // Then it is still full
    let error = scene.pool.clone().oneshot(request("")).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Limit, "{error}");
    drop(response);
    scene.pool.clone().oneshot(request("")).await.unwrap();
}

#[tokio::test]
async fn a_call_that_waited_finds_the_one_that_has_room_however_many_are_full() {
    // Given twelve peers, of which all but one are full
    let ids: Vec<String> = (0..12).map(|id| id.to_string()).collect();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    let limits = config().max_in_flight_per_peer(Some(1)).unwrap();
    let scene = Scene::of(&ids, limits).await;
    let mut held = Vec::new();
    for id in &ids[1..] {
        held.push(scene.begin(pinned(id)).await.unwrap());
    }
    scene.common.gate.add_permits(100);
    // When calls have to wait for whoever they picked
    scene.set_lazy(true);
    for _ in 0..50 {
        // Then each goes to the one that is not full
        let response = scene.pool.clone().oneshot(request("")).await.unwrap();
        assert_eq!(response.into_body().get_ref(), "0");
    }
    // And one that may go nowhere else fails, as do all when that one is full as well
    let error = scene.pool.clone().oneshot(pinned("7")).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Limit);
    let words =
        "limit reached, echo 7 at h:1: 1 call is in flight there, as many as may be at a peer";
    assert_eq!(error.to_string(), words);
    scene.set_lazy(false);
    let response = scene.pool.clone().oneshot(pinned("0")).await.unwrap();
    scene.set_lazy(true);
    let mut patient = request("");
    patient.extensions_mut().insert(WaitForReady(true));
    let error = scene.pool.clone().oneshot(patient).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Limit, "{error}");
    drop(response);
    scene.pool.clone().oneshot(request("")).await.unwrap();
    assert_eq!(scene.pool.status().refused.peer, 2);
}

#[tokio::test]
async fn a_call_that_waited_fails_at_once_if_the_role_is_full() {
    let limits = config().max_in_flight(Some(1)).unwrap().max_waiting(1);
    let scene = Scene::of(&["a", "b"], limits).await;
    let held = scene.begin(request("")).await.unwrap();
    scene.common.gate.add_permits(100);
    let mut waiting = Box::pin(scene.pool.clone().oneshot(request("")));
    let error = (&mut waiting).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Limit);
    // A place that is free when it begins to wait, and taken when it has waited; also while another peer is waited for
    drop(held);
    scene.common.stuck.store(true, SeqCst);
    scene.set_lazy(true);
    for _ in 0..20 {
        let mut waiting = Box::pin(scene.pool.clone().oneshot(request("")));
        assert!(
            futures_util::future::poll_immediate(&mut waiting)
                .await
                .is_none()
        );
        scene.set_lazy(false);
        let held = scene.pool.clone().oneshot(pinned("b")).await.unwrap();
        let error = futures_util::future::poll_immediate(waiting).await;
        let error = error.expect("at once").unwrap_err();
        assert_eq!(error.kind(), Kind::Limit);
        let words = "limit reached, role echo: 1 call is in flight, as many as may be in all";
        assert_eq!(error.to_string(), words);
        drop(held);
        scene.set_lazy(true);
    }
    let refused = scene.pool.status().refused;
    assert_eq!((refused.role, refused.peer, refused.waiting), (21, 0, 0));
    assert_eq!(refused.total(), 21);
}

#[tokio::test]
async fn without_limits_nothing_is_counted_or_told() {
    let scene = Scene::of(&["a"], config()).await;
    let mut calls = Vec::new();
    for _ in 0..1000 {
        calls.push(scene.begin(request("")).await.unwrap());
    }
    let status = scene.pool.status();
    assert_eq!(status.refused.total(), 0);
    assert!(!status.to_string().contains("limit"), "{status}");
}

#[tokio::test(start_paused = true)]
async fn what_has_waited_is_sent_with_the_time_that_remains_or_not_at_all() {
    let timed = || {
        let mut request = request("");
        let headers = request.headers_mut();
        headers.insert("grpc-timeout", "100m".parse().unwrap());
        request
    };
    for (wait, left) in [(40, Some("60000000n")), (100, None), (150, None)] {
        // Given a call that has 100 ms, and nobody who could take it
        let scene = Scene::empty(config().wait_for_ready(true));
        scene.common.gate.add_permits(100);
        let call = scene.begin(timed()).await.unwrap();
        // When there is somebody after a while
        tokio::time::sleep(Duration::from_millis(wait)).await;
        scene.insert("a");
        // Then it is told what remains
        match (call.await, left) {
            (Ok(response), Some(left)) => assert_eq!(response.headers()["timeout"], left),
            (Err(error), None) => {
                assert_eq!(error.kind(), Kind::DeadlineExceeded);
                assert_eq!(error.sent(), Sent::Unsent);
                assert_eq!(error.role(), Some("echo"));
                assert_eq!(scene.common.all.most.load(SeqCst), 0, "it was sent");
            }
            (result, _) => panic!("after {wait} ms: {result:?}"),
        }
        // And one that need not wait is sent as it is
        let response = scene.pool.clone().oneshot(timed()).await.unwrap();
        assert_eq!(response.headers()["timeout"], "100m");
    }
}

#[tokio::test]
async fn of_those_that_have_room_the_one_that_failed_last_is_the_last_choice() {
    let limits = config().max_in_flight_per_peer(Some(1)).unwrap();
    let scene = Scene::of(&["a", "b", "c", "d"], limits).await;
    let mut held = vec![scene.begin(pinned("a")).await.unwrap()];
    // One for that call, and the others.
    scene.common.gate.add_permits(1 + 1000);
    for n in 0..120 {
        scene.set_lazy(n % 2 == 1);
        // "a" is full; "b" and then "c" were tried
        let avoid = Avoid::new();
        for id in ["b", "c"] {
            avoid.add(&Peer::new("echo", id, "h:1"));
        }
        let mut went = Vec::new();
        for _ in 0..3 {
            let mut request = request("");
            request.extensions_mut().insert(avoid.clone());
            let response = scene.pool.clone().oneshot(request).await.unwrap();
            went.push(response.into_body().get_ref().clone());
        }
        // Nobody has been to "d"; then it is whoever was not the last.
        assert_eq!(went[0], "d", "{went:?}");
        assert_ne!(went[1], "d", "{went:?}");
        assert_ne!(went[2], went[1], "{went:?}");
    }
    // Where all others are full it is the last of all
    scene.set_lazy(false);
    let _closed = scene.common.gate.acquire_many(1000).await.unwrap();
    for id in ["b", "c"] {
        held.push(scene.begin(pinned(id)).await.unwrap());
    }
    let avoid = Avoid::new();
    avoid.add(&Peer::new("echo", "d", "h:1"));
    let mut request = request("");
    request.extensions_mut().insert(avoid);
    held.push(scene.begin(request).await.unwrap());
}

#[tokio::test]
async fn whom_earlier_attempts_went_to_is_passed_by_as_long_as_there_is_another() {
    let scene = Scene::of(&["a", "b", "c"], config()).await;
    scene.common.gate.add_permits(1000);
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
