//! The pool over services that are not ours: any tower `Discover` drives it, any connector feeds it.
//!
//! The peers here are in-process services, because what is looked at (attempts, losses, panics, readiness)
//! cannot be provoked to order with real ones; the other tests have those.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll},
    time::Duration,
};

use switchboard::{
    Backoff, Error, Kind, Sent,
    discover::{Change, Update},
    endpoint::{BoxError, BoxFuture, Connected, Lifeline, Peer, Target},
    pool::{
        InstanceId, Plain, Pool, PoolConfig,
        status::{Connectivity, Discovery},
    },
};
use tokio::{sync::mpsc, time};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tower::{Service, ServiceExt as _, discover::ServiceList, service_fn};

// === the peers ===

/// A target by name; `stopping` may change while it is registered, and a `bug` panics when it is asked.
#[derive(Debug)]
struct Node {
    peer: Arc<Peer>,
    stopping: bool,
    bug: bool,
}

impl Target for Node {
    fn peer(&self) -> &Arc<Peer> {
        &self.peer
    }

    fn stopping(&self) -> bool {
        assert!(!self.bug, "a bug of the user's");
        self.stopping
    }
}

fn node(id: &str) -> Arc<Node> {
    Arc::new(Node {
        peer: Arc::new(Peer::new("echo", id, format!("{id}:1"))),
        stopping: false,
        bug: false,
    })
}

/// Answers with its name, `delay` milliseconds after the call; done for once `line` is cut.
#[derive(Clone, Debug)]
struct Named {
    id: Arc<str>,
    line: Arc<Line>,
}

#[derive(Debug, Default)]
struct Line {
    cut: CancellationToken,
    why: Mutex<Option<Kind>>,
    bug: bool,
}

impl Lifeline for Line {
    fn closed(&self) -> BoxFuture<'_, Error> {
        Box::pin(async {
            assert!(!self.bug, "a bug of the user's");
            self.cut.cancelled().await;
            Error::new(self.why.lock().unwrap().unwrap_or(Kind::ConnectionLost))
        })
    }

    fn close(&self, why: Error) {
        self.why.lock().unwrap().get_or_insert(why.kind());
        self.cut.cancel();
    }
}

impl Service<u64> for Named {
    type Response = Arc<str>;
    type Error = Error;
    type Future = BoxFuture<'static, Result<Arc<str>, Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        match self.line.cut.is_cancelled() {
            true => Poll::Ready(Err(Error::new(Kind::ConnectionLost))),
            false => Poll::Ready(Ok(())),
        }
    }

    fn call(&mut self, delay: u64) -> Self::Future {
        let Self { id, line } = self.clone();
        Box::pin(async move {
            tokio::select! {
                () = time::sleep(Duration::from_millis(delay)) => Ok(id),
                why = line.closed() => Err(why.with_sent(Sent::Sent)),
            }
        })
    }
}

/// Where nodes are dialled: counts attempts, and refuses, hangs or panics as told.
#[derive(Clone, Default)]
struct Net {
    attempts: Arc<Mutex<Vec<(String, time::Duration)>>>,
    manner: Arc<Mutex<Manner>>,
    lines: Lines,
    born: Arc<std::sync::OnceLock<time::Instant>>,
}

type Lines = Arc<Mutex<Vec<(String, Arc<Line>)>>>;

#[derive(Clone, Copy, Default, PartialEq)]
enum Manner {
    #[default]
    Accept,
    Refuse,
    Hang,
    Panic,
    HangUp,
    /// Connects, with a lifeline that panics.
    BadLine,
}

impl Net {
    fn connector(
        &self,
    ) -> impl Fn(&Node) -> BoxFuture<'static, Result<Connected<Named>, BoxError>> + Send + Sync + 'static
    {
        let net = self.clone();
        move |node: &Node| {
            let (net, id) = (net.clone(), node.peer.id.clone());
            Box::pin(async move {
                let born = *net.born.get_or_init(time::Instant::now);
                net.attempts
                    .lock()
                    .unwrap()
                    .push((id.to_string(), born.elapsed()));
                let manner = *net.manner.lock().unwrap();
                let line = Arc::new(Line {
                    bug: manner == Manner::BadLine,
                    ..Line::default()
                });
                match manner {
                    Manner::Refuse => return Err("connection refused".into()),
                    Manner::Panic => panic!("a bug of the user's"),
                    Manner::Hang => std::future::pending().await,
                    Manner::HangUp => line.close(Error::new(Kind::ConnectionLost)),
                    Manner::Accept | Manner::BadLine => {}
                }
                net.lines
                    .lock()
                    .unwrap()
                    .push((id.to_string(), line.clone()));
                let service = Named {
                    id,
                    line: line.clone(),
                };
                Ok(Connected::new(service).with_lifeline(line))
            })
        }
    }

    fn set(&self, manner: Manner) {
        *self.manner.lock().unwrap() = manner;
    }

    fn attempts(&self) -> Vec<u128> {
        let attempts = self.attempts.lock().unwrap();
        attempts.iter().map(|(_, at)| at.as_millis()).collect()
    }

    fn line(&self, id: &str) -> Arc<Line> {
        let lines = self.lines.lock().unwrap();
        let (_, line) = lines
            .iter()
            .rfind(|(known, _)| known == id)
            .expect("it was dialled");
        line.clone()
    }
}

type Updates = mpsc::UnboundedSender<Update<String, Arc<Node>>>;

fn pool_over(net: &Net, config: PoolConfig) -> (Pool<Named, Plain>, Updates) {
    let (tx, rx) = mpsc::unbounded_channel();
    let updates = UnboundedReceiverStream::new(rx);
    let pool = Pool::new("echo", config, updates, net.connector()).unwrap();
    (pool, tx)
}

fn insert(updates: &Updates, node: Arc<Node>) {
    let id = node.peer.id.clone();
    insert_at(updates, &id, node);
}

fn insert_at(updates: &Updates, key: &str, node: Arc<Node>) {
    let change = Change::Insert(key.to_owned(), node);
    updates.send(Update::Change(change)).unwrap();
}

fn remove(updates: &Updates, id: &str) {
    updates
        .send(Update::Change(Change::Remove(id.to_owned())))
        .unwrap();
}

async fn until(pool: &Pool<Named, Plain>, id: &str, state: Connectivity) {
    let wait = async {
        loop {
            let status = pool.status();
            if status
                .endpoints
                .iter()
                .any(|e| &*e.peer.id == id && e.state == state)
            {
                return;
            }
            time::sleep(Duration::from_millis(1)).await;
        }
    };
    let waited = time::timeout(Duration::from_secs(300), wait).await;
    assert!(waited.is_ok(), "{id} is not {state}:\n{}", pool.status());
}

fn steady() -> PoolConfig {
    let backoff = Backoff::new(Duration::from_secs(1), 1.6, Duration::from_secs(120), 0.0).unwrap();
    let probe = Backoff::constant(Duration::from_secs(30), 0.0).unwrap();
    PoolConfig::default().backoff(backoff).probe(Some(probe))
}

// === discovery ===

#[tokio::test]
async fn towers_own_service_list_drives_it() {
    let double = service_fn(|n: u32| async move { Ok::<_, Infallible>(2 * n) });
    let list = ServiceList::new::<u32>(vec![double; 3]);
    let pool = Pool::<_, Plain>::from_discover("double", list).unwrap();
    for n in 0..100 {
        assert_eq!(pool.clone().oneshot(n).await.unwrap(), 2 * n);
    }
    let ids: Vec<_> = pool
        .status()
        .endpoints
        .iter()
        .map(|e| e.peer.id.clone())
        .collect();
    assert_eq!(ids, ["0", "1", "2"].map(Arc::from));
}

#[tokio::test]
async fn a_channel_of_tower_changes_drives_it_and_replaces_by_key() {
    let named =
        |name: &'static str| service_fn(move |(): ()| async move { Ok::<_, Infallible>(name) });
    let (tx, rx) = mpsc::unbounded_channel();
    let pool = Pool::<_, Plain>::from_discover("name", UnboundedReceiverStream::new(rx)).unwrap();
    tx.send(Ok::<_, BoxError>(Change::Insert("k", named("old"))))
        .unwrap();
    assert_eq!(pool.clone().oneshot(()).await.unwrap(), "old");
    tx.send(Ok(Change::Insert("k", named("new")))).unwrap();
    let new = async {
        while pool.clone().oneshot(()).await.unwrap() != "new" {
            tokio::task::yield_now().await;
        }
    };
    time::timeout(Duration::from_secs(5), new)
        .await
        .expect("the new service takes over");
    // An error is not the end: what is known stays so, as stale, until the next change.
    let discovery = || pool.status().discovery;
    assert!(matches!(discovery(), Discovery::Fresh), "{}", pool.status());
    tx.send(Err("a hiccup".into())).unwrap();
    let stale = async {
        while !matches!(discovery(), Discovery::Stale { .. }) {
            tokio::task::yield_now().await;
        }
    };
    time::timeout(Duration::from_secs(5), stale)
        .await
        .expect("it says that it is stale");
    assert!(
        pool.status().to_string().contains("a hiccup"),
        "{}",
        pool.status()
    );
    assert_eq!(pool.clone().oneshot(()).await.unwrap(), "new");
    tx.send(Ok(Change::Remove("k"))).unwrap();
    let gone = async {
        while pool.clone().oneshot(()).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    time::timeout(Duration::from_secs(5), gone)
        .await
        .expect("it is removed");
    assert!(matches!(discovery(), Discovery::Fresh), "{}", pool.status());
    assert_eq!(pool.oneshot(()).await.unwrap_err().kind(), Kind::NoSession);
}

#[tokio::test(start_paused = true)]
async fn a_tower_discover_that_has_said_nothing_yet_is_waited_for() {
    let double = service_fn(|n: u32| async move { Ok::<_, Infallible>(2 * n) });
    let (tx, rx) = mpsc::unbounded_channel();
    let pool = Pool::<_, Plain>::from_discover("double", UnboundedReceiverStream::new(rx)).unwrap();
    let waiting = tokio::spawn(pool.clone().oneshot(21));
    time::sleep(Duration::from_secs(5)).await;
    assert!(!waiting.is_finished(), "silence was taken for nobody");
    assert!(
        matches!(pool.status().discovery, Discovery::Pending),
        "{}",
        pool.status()
    );
    tx.send(Ok::<_, BoxError>(Change::Insert("k", double)))
        .unwrap();
    assert_eq!(waiting.await.unwrap().unwrap(), 42);
}

#[tokio::test(start_paused = true)]
async fn a_tower_discover_is_stale_from_its_error_to_its_next_change() {
    let double = service_fn(|n: u32| async move { Ok::<_, Infallible>(2 * n) });
    let (tx, rx) = mpsc::unbounded_channel();
    let pool = Pool::<_, Plain>::from_discover("double", UnboundedReceiverStream::new(rx)).unwrap();
    tx.send(Ok(Change::Insert("a", double))).unwrap();
    assert_eq!(pool.clone().oneshot(1).await.unwrap(), 2);
    tx.send(Err(BoxError::from("dns is away"))).unwrap();
    // However long it then says nothing: that is no sign that it is well.
    time::sleep(Duration::from_secs(3600)).await;
    let status = pool.status();
    assert!(
        matches!(status.discovery, Discovery::Stale { .. }),
        "{status}"
    );
    assert!(status.to_string().contains("dns is away"), "{status}");
    assert_eq!(pool.clone().oneshot(1).await.unwrap(), 2);
    tx.send(Ok(Change::Insert("b", double))).unwrap();
    time::sleep(Duration::from_millis(1)).await;
    let status = pool.status();
    assert!(matches!(status.discovery, Discovery::Fresh), "{status}");
    assert_eq!(status.endpoints.len(), 2, "{status}");
}

#[tokio::test(start_paused = true)]
async fn before_the_first_answer_calls_wait_and_after_a_first_failure_they_do_not() {
    let net = Net::default();
    let (pool, updates) = pool_over(&net, PoolConfig::default());
    let waiting = tokio::spawn(pool.clone().oneshot(0));
    time::sleep(Duration::from_secs(5)).await;
    assert!(!waiting.is_finished(), "nothing is known yet");
    updates
        .send(Update::Stale(Arc::from(BoxError::from("no route to etcd"))))
        .unwrap();
    let error = waiting.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), Kind::RegistryUnreachable);
    assert_eq!(
        error.to_string(),
        "nothing is known of role echo: registry unreachable: no route to etcd"
    );
    // All comes up when it does.
    insert(&updates, node("a"));
    updates.send(Update::Synced).unwrap();
    until(&pool, "a", Connectivity::Ready).await;
    assert_eq!(&*pool.oneshot(0).await.unwrap(), "a");
}

#[tokio::test(start_paused = true)]
async fn a_registry_that_fails_later_changes_nothing_but_the_status() {
    let net = Net::default();
    let (pool, updates) = pool_over(&net, PoolConfig::default());
    insert(&updates, node("a"));
    updates.send(Update::Synced).unwrap();
    until(&pool, "a", Connectivity::Ready).await;
    updates
        .send(Update::Stale(Arc::from(BoxError::from("etcd is away"))))
        .unwrap();
    time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(&*pool.clone().oneshot(0).await.unwrap(), "a");
    let status = pool.status();
    assert!(
        matches!(status.discovery, Discovery::Stale { .. }),
        "{status}"
    );
    assert!(status.to_string().contains("etcd is away"), "{status}");
}

#[tokio::test(start_paused = true)]
async fn a_discovery_stream_that_panics_leaves_what_it_said() {
    use tokio_stream::StreamExt as _;
    let net = Net::default();
    let said = vec![
        Update::Change(Change::Insert("a".to_owned(), node("a"))),
        Update::Synced,
    ];
    let updates = tokio_stream::iter(said).chain(tokio_stream::iter(0..1).map(|_| panic!("a bug")));
    let pool =
        Pool::<_, Plain>::new("echo", PoolConfig::default(), updates, net.connector()).unwrap();
    until(&pool, "a", Connectivity::Ready).await;
    assert_eq!(&*pool.clone().oneshot(0).await.unwrap(), "a");
    assert!(
        pool.status().to_string().contains("panicked"),
        "{}",
        pool.status()
    );
}

#[tokio::test(start_paused = true)]
async fn a_change_of_metadata_keeps_the_connection() {
    let net = Net::default();
    let (pool, updates) = pool_over(&net, PoolConfig::default());
    insert(&updates, node("a"));
    updates.send(Update::Synced).unwrap();
    until(&pool, "a", Connectivity::Ready).await;
    for _ in 0..10 {
        insert(&updates, node("a"));
    }
    time::sleep(Duration::from_secs(1)).await;
    assert_eq!(net.attempts().len(), 1);
    assert_eq!(pool.status().endpoints[0].state, Connectivity::Ready);
}

#[tokio::test(start_paused = true)]
async fn a_target_that_panics_is_skipped_and_hurts_no_other() {
    let net = Net::default();
    let (pool, updates) = pool_over(&net, steady());
    let bug = Arc::new(Node {
        peer: node("bug").peer.clone(),
        stopping: false,
        bug: true,
    });
    insert(&updates, node("a"));
    insert(&updates, bug.clone());
    insert(&updates, node("b"));
    // Nor does one that was well take its place with it.
    insert_at(&updates, "a", bug);
    updates.send(Update::Synced).unwrap();
    for id in ["a", "b"] {
        until(&pool, id, Connectivity::Ready).await;
        assert_eq!(&*pool.to(id).oneshot(0).await.unwrap(), id);
    }
    let status = pool.status();
    assert_eq!(status.endpoints.len(), 2, "{status}");
    let error = pool.to("bug").oneshot(0).await.unwrap_err();
    assert_eq!(error.kind(), Kind::UnknownPeer, "{error}");
    // What it says later is heard.
    remove(&updates, "a");
    insert(&updates, node("c"));
    until(&pool, "c", Connectivity::Ready).await;
    assert_eq!(pool.status().endpoints.len(), 2, "{}", pool.status());
}

#[tokio::test(start_paused = true)]
async fn of_two_targets_with_one_id_the_one_that_stays_is_who_is_meant() {
    for gone in ["k1", "k2"] {
        let net = Net::default();
        let (pool, updates) = pool_over(&net, steady());
        for key in ["k1", "k2"] {
            insert_at(&updates, key, node("7"));
        }
        updates.send(Update::Synced).unwrap();
        until(&pool, "7", Connectivity::Ready).await;
        remove(&updates, gone);
        time::sleep(Duration::from_secs(1)).await;
        let status = pool.status();
        assert_eq!(status.endpoints.len(), 1, "without {gone}: {status}");
        for pool in [pool.clone(), pool.to("7")] {
            let answer = pool.oneshot(0).await;
            assert_eq!(
                answer.as_deref().ok(),
                Some("7"),
                "without {gone}: {answer:?}"
            );
        }
        remove(&updates, if gone == "k1" { "k2" } else { "k1" });
        time::sleep(Duration::from_secs(1)).await;
        let error = pool.to("7").oneshot(0).await.unwrap_err();
        assert_eq!(error.kind(), Kind::UnknownPeer, "{error}");
    }
}

// === waiting and failing ===

#[tokio::test(start_paused = true)]
async fn nobody_registered_fails_at_once_and_waits_if_asked_to() {
    let net = Net::default();
    let (pool, updates) = pool_over(&net, PoolConfig::default().wait_for_ready(true));
    let (hasty, hasty_updates) = pool_over(&net, PoolConfig::default());
    updates.send(Update::Synced).unwrap();
    hasty_updates.send(Update::Synced).unwrap();
    let began = time::Instant::now();
    for _ in 0..100 {
        let error = hasty.clone().oneshot(0).await.unwrap_err();
        assert_eq!(
            (error.kind(), error.sent()),
            (Kind::NoSession, Sent::Unsent)
        );
    }
    assert_eq!(began.elapsed(), Duration::ZERO);

    let patient: Vec<_> = (0..100)
        .map(|_| tokio::spawn(pool.clone().oneshot(0)))
        .collect();
    time::sleep(Duration::from_secs(10)).await;
    insert(&updates, node("a"));
    for call in patient {
        assert_eq!(&*call.await.unwrap().unwrap(), "a");
    }
    // However patient, there is a bound.
    remove(&updates, "a");
    time::sleep(Duration::from_millis(1)).await;
    let began = time::Instant::now();
    let error = pool.oneshot(0).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NoSession);
    assert_eq!(began.elapsed().as_secs(), 30);
}

#[tokio::test(start_paused = true)]
async fn calls_wait_for_a_first_attempt_and_not_for_a_later_one() {
    let net = Net::default();
    net.set(Manner::Hang);
    let config = steady().attempt_timeout(Duration::from_secs(2)).unwrap();
    let (pool, updates) = pool_over(&net, config);
    insert(&updates, node("a"));
    updates.send(Update::Synced).unwrap();
    let began = time::Instant::now();
    let error = pool.clone().oneshot(0).await.unwrap_err();
    assert_eq!(
        began.elapsed().as_millis(),
        2000,
        "it waited for the attempt"
    );
    assert_eq!(error.kind(), Kind::NotConnected);
    let text = error.to_string();
    assert!(
        text.starts_with("role echo: 1 session is known, it is not connected: a:1 (id a) not connected within 2s (1 attempt, last "),
        "{text}"
    );
    let began = time::Instant::now();
    pool.clone().oneshot(0).await.unwrap_err();
    assert_eq!(began.elapsed(), Duration::ZERO);
    // Asked for by name it is the same, and an unknown name is told apart.
    let error = pool.to("a").oneshot(0).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotConnected);
    assert_eq!(error.peer().map(|p| &*p.id), Some("a"));
    let error = pool.to("b").oneshot(0).await.unwrap_err();
    assert_eq!(error.kind(), Kind::UnknownPeer);
    assert_eq!(error.to_string(), "role echo: instance b is not registered");
}

#[tokio::test(start_paused = true)]
async fn a_service_that_is_busy_is_waited_for_within_the_bound() {
    // Never ready: as a full concurrency limit is.
    #[derive(Clone)]
    struct Busy;
    impl Service<()> for Busy {
        type Response = ();
        type Error = Infallible;
        type Future = std::future::Ready<Result<(), Infallible>>;
        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Pending
        }
        fn call(&mut self, (): ()) -> Self::Future {
            unreachable!("called without being ready")
        }
    }
    let pool = Pool::<_, Plain>::from_discover("busy", ServiceList::new::<()>(vec![Busy])).unwrap();
    let began = time::Instant::now();
    let error = pool.clone().oneshot(()).await.unwrap_err();
    assert_eq!(began.elapsed().as_secs(), 30);
    assert!(
        error
            .to_string()
            .starts_with("busy, busy 0: it has no room"),
        "{error}"
    );
    assert_eq!(error.sent(), Sent::Unsent);
    // And not beyond a stop.
    let waiting = tokio::spawn(pool.clone().oneshot(()));
    time::sleep(Duration::from_secs(1)).await;
    pool.stop().await;
    assert_eq!(waiting.await.unwrap().unwrap_err().kind(), Kind::Stopped);
}

// === dialling ===

#[tokio::test(start_paused = true)]
async fn three_attempts_with_backoff_then_offline_then_slow_probes() {
    let net = Net::default();
    net.set(Manner::Refuse);
    let (pool, updates) = pool_over(&net, steady());
    insert(&updates, node("a"));
    updates.send(Update::Synced).unwrap();
    time::sleep(Duration::from_secs(70)).await;
    assert_eq!(net.attempts(), [0, 1000, 2600, 32_600, 62_600]);
    assert_eq!(pool.status().endpoints[0].state, Connectivity::Offline);
    let error = pool.clone().oneshot(0).await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("a:1 (id a) connection refused (5 attempts, last "),
        "{error}"
    );

    // A word of the registry dials at once; a flood of words does not dial a flood.
    for _ in 0..50 {
        insert(&updates, node("a"));
        time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(net.attempts().len(), 6, "{:?}", net.attempts());

    // And what comes back is used without anybody's doing.
    net.set(Manner::Accept);
    until(&pool, "a", Connectivity::Ready).await;
    assert_eq!(&*pool.oneshot(0).await.unwrap(), "a");
}

#[tokio::test(start_paused = true)]
async fn without_a_probe_only_the_registry_brings_it_back() {
    let net = Net::default();
    net.set(Manner::Refuse);
    let (pool, updates) = pool_over(&net, steady().probe(None));
    insert(&updates, node("a"));
    time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(net.attempts().len(), 3);
    net.set(Manner::Accept);
    insert(&updates, node("a"));
    until(&pool, "a", Connectivity::Ready).await;
    assert_eq!(net.attempts().len(), 4);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_accepts_and_hangs_up_is_dialled_with_backoff() {
    let net = Net::default();
    net.set(Manner::HangUp);
    let (_pool, updates) = pool_over(&net, steady());
    insert(&updates, node("a"));
    time::sleep(Duration::from_secs(10)).await;
    // One is forgiven; after that it is a failure like any other.
    assert_eq!(net.attempts(), [0, 0, 1000, 2600]);
}

#[tokio::test(start_paused = true)]
async fn a_connector_that_panics_has_failed_and_hurts_no_other() {
    let net = Net::default();
    net.set(Manner::Panic);
    let (pool, updates) = pool_over(&net, steady());
    insert(&updates, node("a"));
    until(&pool, "a", Connectivity::Retrying).await;
    net.set(Manner::Accept);
    insert(&updates, node("b"));
    until(&pool, "b", Connectivity::Ready).await;
    assert_eq!(&*pool.clone().oneshot(0).await.unwrap(), "b");
    until(&pool, "a", Connectivity::Ready).await;
}

#[tokio::test(start_paused = true)]
async fn a_lifeline_that_panics_is_dialled_again_with_backoff() {
    let net = Net::default();
    net.set(Manner::BadLine);
    let (pool, updates) = pool_over(&net, steady());
    insert(&updates, node("a"));
    insert(&updates, node("b"));
    time::sleep(Duration::from_secs(10)).await;
    let attempts = net.attempts();
    // Both, and neither in a busy loop.
    assert!((4..=12).contains(&attempts.len()), "{attempts:?}");
    net.set(Manner::Accept);
    for id in ["a", "b"] {
        until(&pool, id, Connectivity::Ready).await;
    }
    assert_eq!(&*pool.to("a").oneshot(0).await.unwrap(), "a");
    // And its pool can be stopped still.
    pool.stop().await;
    assert!(updates.is_closed(), "the driver has let go of discovery");
}

// === going and coming ===

#[tokio::test(start_paused = true)]
async fn a_deleted_session_fails_its_calls_in_flight_with_its_name() {
    let net = Net::default();
    let (pool, updates) = pool_over(&net, steady());
    insert(&updates, node("a"));
    updates.send(Update::Synced).unwrap();
    until(&pool, "a", Connectivity::Ready).await;
    let calls: Vec<_> = (0..20)
        .map(|_| tokio::spawn(pool.clone().oneshot(60_000)))
        .collect();
    time::sleep(Duration::from_millis(10)).await;
    assert_eq!(pool.status().endpoints[0].in_flight, 20);
    remove(&updates, "a");
    let began = time::Instant::now();
    for call in calls {
        let error = call.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), Kind::SessionDeleted);
        assert_eq!(error.to_string(), "session deleted, echo a at a:1");
        assert_eq!(error.code(), tonic::Code::Unavailable);
    }
    assert_eq!(began.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_stopping_session_gets_no_new_picks_and_finishes_its_calls() {
    let net = Net::default();
    let (pool, updates) = pool_over(&net, steady());
    insert(&updates, node("a"));
    insert(&updates, node("b"));
    updates.send(Update::Synced).unwrap();
    until(&pool, "a", Connectivity::Ready).await;
    until(&pool, "b", Connectivity::Ready).await;
    let last = tokio::spawn(pool.to("a").oneshot(5_000));
    time::sleep(Duration::from_millis(10)).await;
    let stopping = Node {
        peer: node("a").peer.clone(),
        stopping: true,
        bug: false,
    };
    insert(&updates, Arc::new(stopping));
    until(&pool, "a", Connectivity::Stopping).await;
    for _ in 0..100 {
        assert_eq!(&*pool.clone().oneshot(0).await.unwrap(), "b");
    }
    // Pinned calls still go there, until it is gone.
    assert_eq!(&*pool.to("a").oneshot(0).await.unwrap(), "a");
    remove(&updates, "a");
    time::sleep(Duration::from_millis(10)).await;
    let error = pool.to("a").oneshot(0).await.unwrap_err();
    assert_eq!(error.kind(), Kind::UnknownPeer);
    assert_eq!(&*last.await.unwrap().unwrap(), "a");
    // What has no calls left and does not close by itself is closed at the bound.
    let line = net.line("a");
    time::timeout(Duration::from_secs(31), line.closed())
        .await
        .unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_lost_connection_is_passed_by_at_once_and_dialled_again() {
    let net = Net::default();
    let (pool, updates) = pool_over(&net, steady());
    for id in ["a", "b"] {
        insert(&updates, node(id));
        until(&pool, id, Connectivity::Ready).await;
    }
    time::sleep(Duration::from_secs(2)).await;
    net.set(Manner::Refuse);
    net.line("a").close(Error::new(Kind::ConnectionLost));
    // Not even one call finds it: the first that tries passes it by.
    for _ in 0..100 {
        assert_eq!(&*pool.clone().oneshot(0).await.unwrap(), "b");
    }
    net.set(Manner::Accept);
    until(&pool, "a", Connectivity::Ready).await;
}

#[tokio::test(start_paused = true)]
async fn the_load_of_a_dropped_call_is_given_back() {
    let net = Net::default();
    let (pool, updates) = pool_over(&net, steady());
    insert(&updates, node("a"));
    until(&pool, "a", Connectivity::Ready).await;
    let in_flight = || pool.status().endpoints[0].in_flight;
    let mut calls: Vec<_> = (0..3)
        .map(|_| Box::pin(pool.clone().oneshot(1000)))
        .collect();
    for call in &mut calls {
        let polled =
            std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut *call).poll(cx).is_pending()));
        assert!(polled.await);
    }
    assert_eq!(in_flight(), 3);
    calls.pop();
    assert_eq!(in_flight(), 2);
    for call in calls {
        call.await.unwrap();
    }
    assert_eq!(in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn stop_ends_calls_waiting_calls_and_tasks() {
    let net = Net::default();
    let (pool, updates) = pool_over(&net, steady().wait_for_ready(true));
    insert(&updates, node("a"));
    updates.send(Update::Synced).unwrap();
    until(&pool, "a", Connectivity::Ready).await;
    let in_flight = tokio::spawn(pool.clone().oneshot(60_000));
    let waiting = tokio::spawn(pool.to("nobody").oneshot(0));
    time::sleep(Duration::from_millis(10)).await;
    pool.stop().await;
    for call in [in_flight, waiting] {
        let error = call.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), Kind::Stopped);
        assert_eq!(error.code(), tonic::Code::Cancelled);
    }
    assert_eq!(
        pool.clone().oneshot(0).await.unwrap_err().kind(),
        Kind::Stopped
    );
    pool.stop().await;
    assert!(updates.is_closed(), "the driver has let go of discovery");
}

#[tokio::test(start_paused = true)]
async fn dropping_the_last_clone_ends_the_driver_and_its_endpoints() {
    let net = Net::default();
    let (pool, updates) = pool_over(&net, steady());
    insert(&updates, node("a"));
    until(&pool, "a", Connectivity::Ready).await;
    let other = pool.clone();
    drop(pool);
    assert_eq!(&*other.clone().oneshot(0).await.unwrap(), "a");
    let line = Arc::downgrade(&net.line("a"));
    net.lines.lock().unwrap().clear();
    drop(other);
    time::timeout(Duration::from_secs(1), updates.closed())
        .await
        .expect("the driver ends");
    time::sleep(Duration::from_millis(1)).await;
    assert_eq!(line.strong_count(), 0, "the connection is held by nobody");
}

#[test]
fn a_pool_cannot_be_made_outside_a_runtime_and_says_so() {
    let list = ServiceList::new::<()>(vec![service_fn(|(): ()| async { Ok::<_, Infallible>(()) })]);
    let error = Pool::<_, Plain>::from_discover("x", list).unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid);
    assert!(
        error.to_string().contains("outside a tokio runtime"),
        "{error}"
    );
}

#[test]
fn a_pool_cannot_be_made_in_a_runtime_without_a_timer_and_says_so() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let _entered = runtime.enter();
    let list = ServiceList::new::<()>(vec![service_fn(|(): ()| async { Ok::<_, Infallible>(()) })]);
    let error = Pool::<_, Plain>::from_discover("x", list).unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid);
    assert!(error.to_string().contains("enable_time"), "{error}");
}

#[tokio::test]
async fn a_pinned_pool_refuses_a_request_for_another_instance() {
    let answers = |id: &'static str| {
        service_fn(move |_: http::Request<()>| async move {
            Ok::<_, Infallible>(http::Response::new(id.to_owned()))
        })
    };
    let list = ServiceList::new::<http::Request<()>>(["zero", "one"].map(answers));
    let pool: Pool<_> = Pool::from_discover("x", list).unwrap();
    let request = |instance: Option<&str>| {
        let mut request = http::Request::new(());
        if let Some(id) = instance {
            request.extensions_mut().insert(InstanceId::from(id));
        }
        request
    };
    for (pinned, asked, answer) in [
        (None, Some("1"), "one"),
        (Some("1"), None, "one"),
        (Some("1"), Some("1"), "one"),
    ] {
        let pool = pinned.map_or(pool.clone(), |id: &str| pool.to(id));
        let response = pool.oneshot(request(asked)).await.unwrap();
        let body = http_body_util::BodyExt::collect(response.into_body());
        assert_eq!(
            body.await.unwrap().to_bytes(),
            answer,
            "{pinned:?} {asked:?}"
        );
    }
    let error = pool.to("0").oneshot(request(Some("1"))).await.unwrap_err();
    assert_eq!((error.kind(), error.sent()), (Kind::Invalid, Sent::Unsent));
    let text = error.to_string();
    assert!(
        text.contains("asks for 1") && text.contains("pinned to 0"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_go_on_while_everything_changes_under_them() {
    let net = Net::default();
    let (pool, updates) = pool_over(&net, steady());
    // One that stays, so that there is always somewhere to go, and forty that come and go.
    insert(&updates, node("stays"));
    until(&pool, "stays", Connectivity::Ready).await;
    let done = Arc::new(AtomicUsize::new(0));
    let callers: Vec<_> = (0..4)
        .map(|_| {
            let (mut pool, done) = (pool.clone(), done.clone());
            tokio::spawn(async move {
                for _ in 0..5_000 {
                    match pool.call(0).await {
                        Ok(_) => {}
                        // In flight there when it was deleted.
                        Err(error) => assert_eq!(error.kind(), Kind::SessionDeleted, "{error}"),
                    }
                    done.fetch_add(1, SeqCst);
                    tokio::task::yield_now().await;
                }
            })
        })
        .collect();
    let mut n = 0;
    while done.load(SeqCst) < 20_000 {
        insert(&updates, node(&format!("n{}", n % 40)));
        remove(&updates, &format!("n{}", (n + 20) % 40));
        n += 1;
        // A breath now and then: the flood is to be applied, not to pile up.
        if n % 20 == 0 {
            time::sleep(Duration::from_millis(1)).await;
        }
    }
    for caller in callers {
        caller.await.unwrap();
    }
    for id in 0..40 {
        remove(&updates, &format!("n{id}"));
    }
    let alone = async {
        while pool.status().endpoints.len() > 1 {
            tokio::task::yield_now().await;
        }
    };
    time::timeout(Duration::from_secs(10), alone)
        .await
        .expect("only one stays");
    assert_eq!(pool.status().endpoints[0].in_flight, 0);
    assert_eq!(
        &*pool.to(InstanceId::from("stays")).oneshot(0).await.unwrap(),
        "stays"
    );
}

/// Dials that take this long, all of which are counted; `hang` never answers.
async fn dialled(config: PoolConfig, nodes: &[&str], each: Duration) -> (usize, Duration) {
    let counts = Arc::new((AtomicUsize::new(0), AtomicUsize::new(0)));
    let connect = {
        let counts = counts.clone();
        move |node: &Node| {
            let (id, counts) = (node.peer.id.clone(), counts.clone());
            async move {
                let (now, most) = &*counts;
                most.fetch_max(now.fetch_add(1, SeqCst) + 1, SeqCst);
                match &*id {
                    "hang" => std::future::pending().await,
                    _ => time::sleep(each).await,
                }
                now.fetch_sub(1, SeqCst);
                let line = Arc::new(Line::default());
                Ok::<_, BoxError>(Connected::new(Named { id, line }))
            }
        }
    };
    let (updates, stream) = mpsc::unbounded_channel();
    let stream = UnboundedReceiverStream::new(stream);
    let pool = Pool::<_, Plain>::new("echo", config, stream, connect).unwrap();
    let began = time::Instant::now();
    for (key, id) in nodes.iter().enumerate() {
        let _ = updates.send(Update::Change(Change::Insert(key, node(id))));
    }
    let _ = updates.send(Update::Synced);
    let good = nodes.iter().filter(|id| **id != "hang").count();
    while pool.status().ready() < good {
        time::sleep(Duration::from_millis(1)).await;
    }
    (counts.1.load(SeqCst), began.elapsed())
}

#[tokio::test(start_paused = true)]
async fn no_more_dials_go_on_at_once_than_may() {
    let ids: Vec<_> = (0..200).map(|n| n.to_string()).collect();
    let ids: Vec<_> = ids.iter().map(String::as_str).collect();
    let each = Duration::from_millis(20);
    let few = PoolConfig::default().max_dials(8).unwrap();
    let (most, took) = dialled(few, &ids, each).await;
    assert_eq!(most, 8);
    assert!((500..600).contains(&took.as_millis()), "{took:?}");
    let (most, took) = dialled(PoolConfig::default(), &ids, each).await;
    assert_eq!(most, 64);
    assert!(took < 5 * each, "{took:?}");
    for wrong in [0, 10_001] {
        let error = PoolConfig::default().max_dials(wrong).unwrap_err();
        assert!(
            error.to_string().contains("between 1 and 10,000"),
            "{error}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn dials_into_the_void_hold_up_the_others_for_half_a_second_and_not_for_an_attempt() {
    let mut ids = vec!["hang"; 64];
    ids.extend(["a", "b", "c"]);
    let (_, took) = dialled(PoolConfig::default(), &ids, Duration::from_millis(20)).await;
    assert!((500..600).contains(&took.as_millis()), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn an_error_of_several_lines_stands_in_one() {
    let (pool, updates) = pool_over(&Net::default(), steady());
    let why = BoxError::from("one\ntwo\tthree");
    updates.send(Update::Stale(why.into())).unwrap();
    time::sleep(Duration::from_secs(1)).await;
    let status = pool.status().to_string();
    assert_eq!(
        status,
        "echo: 0 of 0 ready, registry failed: one two three\n"
    );
}
