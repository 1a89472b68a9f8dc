//! What tower expects of a service, asked of every layer alone, of all of them in every order, and of the whole stack over a
//! pool; with tower's own layers around and inside.
//!
//! The service inside is not a real one: it insists on what a caller may not do, which real ones forgive.

use std::{
    collections::HashMap,
    panic::AssertUnwindSafe,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use futures_util::{FutureExt as _, future::BoxFuture};
use http::{Request, Response};
use switchboard::{
    CancelLayer, CancelToken, Channel, ConnectionManager, DeadlineLayer, Gate, GateLayer,
    HedgingPolicy, Pool, RetryLayer, RetryPolicy, cancel, deadline, gate, retry,
};
use tokio::time::timeout;
use tonic::body::Body;
use tower::{
    BoxError, Layer, Service, ServiceBuilder, ServiceExt as _, discover::ServiceList,
    limit::ConcurrencyLimitLayer, util::BoxCloneSyncService,
};

type Boxed = BoxCloneSyncService<Request<Body>, Response<Body>, BoxError>;

/// Is ready at its second poll, answers at the third of its future, and panics if it is called before it is ready, or when it
/// is asked to.
#[derive(Debug)]
struct Strict {
    polled: usize,
    under_way: Arc<AtomicUsize>,
}

struct UnderWay(Arc<AtomicUsize>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

impl Clone for Strict {
    fn clone(&self) -> Self {
        Self {
            polled: 0,
            under_way: self.under_way.clone(),
        }
    }
}

impl Service<Request<Body>> for Strict {
    type Response = Response<Body>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Response<Body>, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.polled += 1;
        if self.polled < 2 {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        assert!(
            std::mem::take(&mut self.polled) >= 2,
            "called before it was ready"
        );
        self.under_way.fetch_add(1, SeqCst);
        let under_way = UnderWay(self.under_way.clone());
        let panics = request.uri().path().to_owned();
        assert_ne!(panics, "/panic/call", "as asked");
        Box::pin(async move {
            let _under_way = under_way;
            for _ in 0..2 {
                tokio::task::yield_now().await;
                assert_ne!(panics, "/panic/poll", "as asked");
            }
            Ok(Response::builder()
                .header("grpc-status", 0)
                .body(Body::empty())?)
        })
    }
}

fn boxed<S, B>(service: S) -> Boxed
where
    S: Service<Request<Body>, Response = Response<B>> + Clone + Send + Sync + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
    B: http_body::Body<Data = bytes::Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    let service = ServiceBuilder::new()
        .map_response(|response: Response<B>| response.map(Body::new))
        .map_err(Into::<BoxError>::into)
        .service(service);
    BoxCloneSyncService::new(service)
}

const LAYERS: [&str; 5] = ["deadline", "retry", "cancel", "gate", "hedge"];

fn with(layer: &str, inner: Boxed) -> Boxed {
    match layer {
        "deadline" => boxed(DeadlineLayer::new(Duration::from_secs(60)).layer(inner)),
        "retry" => {
            let policy = RetryPolicy::new(3).unwrap().idempotent();
            boxed(RetryLayer::new(policy).layer(inner))
        }
        "cancel" => boxed(CancelLayer::new(CancelToken::new()).layer(inner)),
        "gate" => boxed(GateLayer::new(Gate::new()).layer(inner)),
        "hedge" => {
            let policy = HedgingPolicy::new(2, Duration::from_secs(60)).unwrap();
            boxed(RetryLayer::new(policy).layer(inner))
        }
        other => panic!("{other}"),
    }
}

fn orders(of: &[&'static str]) -> Vec<Vec<&'static str>> {
    if of.is_empty() {
        return vec![Vec::new()];
    }
    let mut all = Vec::new();
    for (n, first) in of.iter().enumerate() {
        let mut others = of.to_vec();
        others.remove(n);
        for mut order in orders(&others) {
            order.insert(0, *first);
            all.push(order);
        }
    }
    all
}

/// Every stack, over a service that has room for so many calls at once.
async fn stacks(room: usize) -> HashMap<String, (Boxed, Arc<AtomicUsize>)> {
    let inner = || {
        let under_way = Arc::<AtomicUsize>::default();
        let strict = Strict {
            polled: 0,
            under_way: under_way.clone(),
        };
        let limited = ServiceBuilder::new()
            .layer(ConcurrencyLimitLayer::new(room))
            .service(strict);
        (boxed(limited), under_way)
    };
    let mut stacks = HashMap::new();
    let alone = LAYERS.map(|layer| vec![layer]);
    for order in orders(&LAYERS[..4]).into_iter().chain(alone) {
        let (service, under_way) = inner();
        let service = order
            .iter()
            .rev()
            .fold(service, |inner, layer| with(layer, inner));
        stacks.insert(order.join(" "), (service, under_way));
    }
    // Over a pool, with tower's layers in between.
    let (service, under_way) = inner();
    let pool: Pool<Boxed> =
        Pool::from_discover("strict", ServiceList::new::<Request<Body>>(vec![service])).unwrap();
    let stack = ["deadline", "retry", "cancel", "gate"];
    let pooled = stack
        .iter()
        .rev()
        .fold(boxed(pool), |inner, layer| with(layer, inner));
    stacks.insert(
        "over a pool".to_owned(),
        (pooled.clone(), under_way.clone()),
    );
    let between = ServiceBuilder::new()
        .layer(DeadlineLayer::new(Duration::from_secs(60)))
        .buffer(8)
        .layer(RetryLayer::transparent())
        .load_shed()
        .layer(CancelLayer::new(CancelToken::new()))
        .timeout(Duration::from_secs(60))
        .service(pooled);
    stacks.insert("between tower's".to_owned(), (boxed(between), under_way));
    stacks
}

fn request(path: &str) -> Request<Body> {
    let mut request = Request::new(Body::empty());
    *request.uri_mut() = path.parse().unwrap();
    request
}

/// A call that must end well, and soon.
async fn works(name: &str, service: &Boxed) {
    let call = service.clone().oneshot(request("/echo/say"));
    match timeout(Duration::from_secs(5), call).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => panic!("{name}: {error}"),
        Err(_) => panic!("{name}: it hangs"),
    }
}

#[tokio::test]
async fn a_clone_is_made_before_it_is_ready_and_one_that_was_ready_is_dropped() {
    for (name, (service, _)) in stacks(1).await {
        // Readied, cloned, and dropped without a call: what it took of the one place is given back.
        for _ in 0..3 {
            let mut first = service.clone();
            timeout(Duration::from_secs(5), first.ready())
                .await
                .unwrap()
                .unwrap();
            let clone = first.clone();
            drop(first);
            works(&name, &clone).await;
        }
        // Called several times by the same handle
        let mut one = service.clone();
        for _ in 0..3 {
            let call = one.ready().await.unwrap().call(request("/echo/say"));
            let ended = timeout(Duration::from_secs(5), call).await;
            let ended = ended.unwrap_or_else(|_| panic!("{name}: it hangs"));
            ended.unwrap_or_else(|error| panic!("{name}: {error}"));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clones_are_called_at_the_same_time() {
    for (name, (service, under_way)) in stacks(3).await {
        if name == "between tower's" {
            // It sheds what it has no room for.
            continue;
        }
        let calls: Vec<_> = (0..50)
            .map(|_| {
                let (name, service) = (name.clone(), service.clone());
                tokio::spawn(async move { works(&name, &service).await })
            })
            .collect();
        for call in calls {
            call.await.unwrap();
        }
        assert_eq!(under_way.load(SeqCst), 0, "{name}");
    }
}

#[tokio::test]
async fn towers_layers_may_stand_outside() {
    for (name, (service, _)) in stacks(2).await {
        works(
            &name,
            &boxed(ServiceBuilder::new().buffer(4).service(service.clone())),
        )
        .await;
        works(
            &name,
            &boxed(
                ServiceBuilder::new()
                    .concurrency_limit(1)
                    .service(service.clone()),
            ),
        )
        .await;
        works(
            &name,
            &boxed(
                ServiceBuilder::new()
                    .timeout(Duration::from_secs(5))
                    .service(service.clone()),
            ),
        )
        .await;
        // Whether it sheds depends on how ready it is; it must not be called before.
        let shed = ServiceBuilder::new().load_shed().service(service.clone());
        let _ = shed.oneshot(request("/echo/say")).await;
        works(&name, &service).await;
    }
}

#[tokio::test]
async fn a_call_may_be_dropped_wherever_it_is() {
    for (name, (service, under_way)) in stacks(1).await {
        for polls in 0..12 {
            let mut ready = service.clone();
            timeout(Duration::from_secs(5), ready.ready())
                .await
                .unwrap()
                .unwrap();
            {
                let mut call = pin!(ready.call(request("/echo/say")));
                let mut cx = Context::from_waker(Waker::noop());
                for _ in 0..polls {
                    if call.as_mut().poll(&mut cx).is_ready() {
                        break;
                    }
                    tokio::task::yield_now().await;
                }
            }
            drop(ready);
            works(&name, &service).await;
        }
        tokio::task::yield_now().await;
        assert_eq!(under_way.load(SeqCst), 0, "{name}");
    }
}

#[tokio::test]
async fn a_service_that_panics_hurts_no_later_call() {
    for (name, (service, under_way)) in stacks(1).await {
        for how in ["/panic/call", "/panic/poll"] {
            if name == "between tower's" {
                // Buffer's worker is where it panics then, which is the end of Buffer.
                continue;
            }
            let call = AssertUnwindSafe(service.clone().oneshot(request(how)));
            assert!(call.catch_unwind().await.is_err(), "{name}: {how}");
            works(&name, &service).await;
        }
        if name != "between tower's" {
            assert_eq!(under_way.load(SeqCst), 0, "{name}");
        }
    }
}

#[test]
fn what_users_name_is_send_sync_and_clone() {
    fn is<T: Send + Sync + Clone>() {}
    fn travels<T: Send + 'static>() {}
    type Whole = deadline::Deadline<retry::Retry<cancel::Cancel<gate::Gated<Boxed>>>>;
    is::<Whole>();
    is::<(DeadlineLayer, RetryLayer, CancelLayer, GateLayer)>();
    is::<(Channel, ConnectionManager, CancelToken)>();
    travels::<<Whole as Service<Request<Body>>>::Future>();
    travels::<<Whole as Service<Request<Body>>>::Response>();
    travels::<<Channel as Service<Request<Body>>>::Future>();
    travels::<<Channel as Service<Request<Body>>>::Response>();
}
