//! Our layers, and what a user would pick instead, over a service that answers gRPC requests and does nothing else.
//!
//! Both are whole: a request has the headers and the body that a generated client gives it, the service reads that body, and
//! the caller reads the response's, to its trailers. So what a layer puts around a body is in the figure.

use std::{
    convert::Infallible,
    hint::black_box,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, Version, header};
use http_body::Frame;
use http_body_util::Full;
use switchboard::{
    CancelLayer, CancelToken, DeadlineLayer, Gate, GateLayer, Pool, RetryLayer, RetryPolicy,
    ServiceConfig,
    config::{MethodConfig, MethodName},
    pool::Http,
    retry::Throttling,
};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;
use tower::{
    BoxError, Layer as _, Service, ServiceBuilder,
    balance::p2c::Balance,
    buffer::Buffer,
    discover::ServiceList,
    load::{CompleteOnResponse, PendingRequests},
    load_shed::LoadShedLayer,
    retry::{
        Policy,
        budget::{Budget as _, TpsBudget},
    },
    timeout::TimeoutLayer,
};
use tower_resilience::{
    circuitbreaker::CircuitBreakerLayer,
    retry::{RetryBudgetBuilder, RetryLayer as ResilienceRetryLayer},
    timelimiter::TimeLimiterLayer,
};

use super::{
    drive::{Answer, Ask, calls, shared},
    measure,
};

const ENDPOINTS: usize = 10;
/// Long enough that nothing ends by it.
const TIMEOUT: Duration = Duration::from_secs(20);
const ATTEMPTS: usize = 3;
const MESSAGE: &[u8] = &[0; 5];

/// The requests of tonic's generated clients.
type Tonic = Request<tonic::body::Body>;
/// Those that can be cloned, as tower's retries want it.
type Cloned = Request<Full<Bytes>>;
/// What tonic's channel answers.
type Answered = Response<tonic::body::Body>;

/// What stands between the caller and the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Stack {
    Nothing,
    /// Nothing, for requests that can be cloned.
    NothingCloned,
    Gate,
    LoadShed,
    CircuitBreaker,
    Cancel,
    /// `tokio_util`'s token in a boxed future: neither tower nor tower-resilience has a layer.
    CancelByHand,
    Deadline,
    Timeout,
    TimeLimiter,
    Retry,
    TowerRetry,
    ResilienceRetry,
    /// All our layers over a pool of ten.
    Full,
    /// Tower's retry with a budget, timeout and load shed over `Buffer` over `Balance` of ten.
    TowerFull,
    /// tower-resilience's three, over the same.
    ResilienceFull,
}

/// Whether the service answers when it is first polled, or the second time: as it does when there is a network between.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Answers {
    AtOnce,
    Later,
}

/// Reads a request and answers it.
#[derive(Clone, Copy, Debug)]
struct Bare(Answers);

/// Its future.
struct Answering {
    later: bool,
}

/// A response's message, and then its trailers.
#[derive(Debug)]
struct Echoed(Option<Frame<Bytes>>, Option<Frame<Bytes>>);

/// Repeats what failed, as long as the budget lasts.
#[derive(Clone, Debug)]
struct Again {
    budget: Arc<TpsBudget>,
    left: usize,
}

/// A call that a token ends.
#[derive(Clone, Debug)]
struct CancelledByHand<S>(S, CancellationToken);

fn head() -> Request<()> {
    let mut request = Request::new(());
    *request.method_mut() = Method::POST;
    *request.uri_mut() = http::Uri::from_static("/switchboard.bench.Echo/Unary");
    *request.version_mut() = Version::HTTP_2;
    let headers = request.headers_mut();
    headers.insert(header::TE, HeaderValue::from_static("trailers"));
    let grpc = HeaderValue::from_static("application/grpc");
    headers.insert(header::CONTENT_TYPE, grpc);
    let method = tonic::GrpcMethod::new("switchboard.bench.Echo", "Unary");
    request.extensions_mut().insert(method);
    request
}

impl Ask for Tonic {
    fn ask(_: u64) -> Self {
        head().map(|()| tonic::body::Body::new(Full::new(Bytes::from_static(MESSAGE))))
    }
}

impl Ask for Cloned {
    fn ask(_: u64) -> Self {
        head().map(|()| Full::new(Bytes::from_static(MESSAGE)))
    }
}

impl<B> Answer for Response<B>
where
    B: http_body::Body<Error: std::fmt::Debug> + Send,
{
    async fn end(self) {
        let mut body = pin!(self.into_body());
        while let Some(frame) = std::future::poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
            black_box(frame.ok());
        }
    }
}

impl<B> Service<Request<B>> for Bare
where
    B: http_body::Body,
{
    type Response = Answered;
    type Error = Infallible;
    type Future = Answering;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Answering {
        let mut cx = Context::from_waker(Waker::noop());
        let mut body = pin!(request.into_body());
        while let Poll::Ready(Some(frame)) = body.as_mut().poll_frame(&mut cx) {
            black_box(frame.is_ok());
        }
        Answering {
            later: self.0 == Answers::Later,
        }
    }
}

impl Future for Answering {
    type Output = Result<Answered, Infallible>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if std::mem::take(&mut self.later) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let mut trailers = HeaderMap::with_capacity(1);
        trailers.insert("grpc-status", HeaderValue::from_static("0"));
        let message = Frame::data(Bytes::from_static(MESSAGE));
        let echoed = Echoed(Some(message), Some(Frame::trailers(trailers)));
        Poll::Ready(Ok(Response::new(tonic::body::Body::new(echoed))))
    }
}

impl http_body::Body for Echoed {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let frame = self.0.take().or_else(|| self.1.take());
        Poll::Ready(frame.map(Ok))
    }
}

impl<E> Policy<Cloned, Answered, E> for Again {
    type Future = std::future::Ready<()>;

    fn retry(&mut self, _: &mut Cloned, result: &mut Result<Answered, E>) -> Option<Self::Future> {
        let failed = match result {
            Ok(response) => is_failure(response),
            Err(_) => true,
        };
        if !failed {
            self.budget.deposit();
            return None;
        }
        self.left = self.left.checked_sub(1)?;
        self.budget.withdraw().then(|| std::future::ready(()))
    }

    fn clone_request(&mut self, request: &Cloned) -> Option<Cloned> {
        Some(request.clone())
    }
}

/// By the trailers of a response that has nothing else.
fn is_failure<B>(response: &Response<B>) -> bool {
    let code = response.headers().get("grpc-status");
    code.is_some_and(|code| code != "0")
}

impl<S, Q> Service<Q> for CancelledByHand<S>
where
    S: Service<Q, Error: Into<BoxError>, Response: Send, Future: Send + 'static>,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.0.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Q) -> Self::Future {
        let answer = self.0.call(request);
        let token = self.1.clone();
        Box::pin(async move {
            match token.run_until_cancelled_owned(answer).await {
                Some(result) => result.map_err(Into::into),
                None => Err("cancelled".into()),
            }
        })
    }
}

/// What a user would configure: attempts, codes, and a bucket for when all fail.
fn config() -> ServiceConfig {
    let policy = RetryPolicy::new(ATTEMPTS as u32).expect("few").idempotent();
    let method = MethodConfig::new().retry(policy).expect("only one policy");
    ServiceConfig::new()
        .method(MethodName::all(), method)
        .expect("only one method")
        .throttling(Throttling::new(10, 0.1).expect("in bounds"))
}

async fn pool(bare: Bare) -> Pool<Bare, Http> {
    let list = ServiceList::new::<Tonic>(vec![bare; ENDPOINTS]);
    let pool = Pool::from_discover("bare", list).expect("it is made in a runtime");
    for id in 0..ENDPOINTS {
        let mut pinned = pool.to(id);
        calls::<Tonic, _>(&mut pinned, 1).await;
    }
    pool
}

type Measured = PendingRequests<Bare>;

fn balance(bare: Bare) -> Balance<ServiceList<Vec<Measured>>, Cloned> {
    let measured = |_| PendingRequests::new(bare, CompleteOnResponse::default());
    let services = (0..ENDPOINTS).map(measured).collect();
    Balance::new(ServiceList::new::<Cloned>(services))
}

fn again() -> tower::retry::RetryLayer<Again> {
    tower::retry::RetryLayer::new(Again {
        budget: Arc::new(TpsBudget::default()),
        left: ATTEMPTS - 1,
    })
}

fn resilience_retry<E>() -> ResilienceRetryLayer<Cloned, Answered, E> {
    let budget = RetryBudgetBuilder::new()
        .token_bucket()
        .max_tokens(10)
        .build()
        .expect("in bounds");
    ResilienceRetryLayer::builder()
        .max_attempts(ATTEMPTS)
        .retry_on_response(is_failure)
        .budget(budget)
        .build()
}

fn circuit_breaker() -> CircuitBreakerLayer {
    let layer = CircuitBreakerLayer::builder().build();
    layer.expect("the defaults are in bounds")
}

// === impl Stack ===

impl Stack {
    pub(crate) const ALL: [Self; 16] = [
        Self::Nothing,
        Self::NothingCloned,
        Self::Gate,
        Self::LoadShed,
        Self::CircuitBreaker,
        Self::Cancel,
        Self::CancelByHand,
        Self::Deadline,
        Self::Timeout,
        Self::TimeLimiter,
        Self::Retry,
        Self::TowerRetry,
        Self::ResilienceRetry,
        Self::Full,
        Self::TowerFull,
        Self::ResilienceFull,
    ];

    /// How long `count` calls take each of `callers`, which all call at the same time.
    ///
    /// `callers` want as many threads of the runtime.
    pub(crate) fn time(
        self,
        runtime: &Runtime,
        answers: Answers,
        callers: usize,
        count: u64,
    ) -> Duration {
        let bare = Bare(answers);
        runtime.block_on(async {
            match self {
                Self::Nothing => tonic(bare, callers, count).await,
                Self::NothingCloned => cloned(bare, callers, count).await,
                Self::Gate => {
                    let layer = GateLayer::new(Gate::new());
                    tonic(layer.layer(bare), callers, count).await
                }
                Self::LoadShed => tonic(LoadShedLayer::new().layer(bare), callers, count).await,
                Self::CircuitBreaker => tonic(circuit_breaker().layer(bare), callers, count).await,
                Self::Cancel => {
                    let layer = CancelLayer::new(CancelToken::new());
                    tonic(layer.layer(bare), callers, count).await
                }
                Self::CancelByHand => {
                    let service = CancelledByHand(bare, CancellationToken::new());
                    tonic(service, callers, count).await
                }
                Self::Deadline => {
                    tonic(DeadlineLayer::new(TIMEOUT).layer(bare), callers, count).await
                }
                Self::Timeout => {
                    tonic(TimeoutLayer::new(TIMEOUT).layer(bare), callers, count).await
                }
                Self::TimeLimiter => {
                    let layer = TimeLimiterLayer::builder()
                        .timeout_duration(TIMEOUT)
                        .build();
                    tonic(layer.layer(bare), callers, count).await
                }
                Self::Retry => tonic(RetryLayer::new(config()).layer(bare), callers, count).await,
                Self::TowerRetry => cloned(again().layer(bare), callers, count).await,
                Self::ResilienceRetry => {
                    cloned(resilience_retry().layer(bare), callers, count).await
                }
                Self::Full => {
                    let stack = ServiceBuilder::new()
                        .layer(DeadlineLayer::new(TIMEOUT))
                        .layer(CancelLayer::new(CancelToken::new()))
                        .layer(RetryLayer::new(config()))
                        .layer(GateLayer::new(Gate::new()))
                        .service(pool(bare).await);
                    tonic(stack, callers, count).await
                }
                Self::TowerFull => {
                    let stack = ServiceBuilder::new()
                        .layer(again())
                        .layer(TimeoutLayer::new(TIMEOUT))
                        .layer(LoadShedLayer::new())
                        .service(Buffer::new(balance(bare), 1024));
                    cloned(stack, callers, count).await
                }
                Self::ResilienceFull => {
                    let stack = ServiceBuilder::new()
                        .layer(resilience_retry())
                        .layer(
                            TimeLimiterLayer::builder()
                                .timeout_duration(TIMEOUT)
                                .build(),
                        )
                        .layer(circuit_breaker())
                        .service(Buffer::new(balance(bare), 1024));
                    cloned(stack, callers, count).await
                }
            }
        })
    }

    /// Allocations a call.
    pub(crate) fn allocations(self, runtime: &Runtime, answers: Answers) -> f64 {
        measure::allocations_a_call(|count| {
            self.time(runtime, answers, 1, count);
        })
    }

    /// What it adds to.
    pub(crate) const fn base(self) -> Self {
        match self {
            Self::NothingCloned
            | Self::TowerRetry
            | Self::ResilienceRetry
            | Self::TowerFull
            | Self::ResilienceFull => Self::NothingCloned,
            _ => Self::Nothing,
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::NothingCloned => "nothing, clonable requests",
            Self::Gate => "GateLayer",
            Self::LoadShed => "tower LoadShed",
            Self::CircuitBreaker => "tower-resilience CircuitBreaker",
            Self::Cancel => "CancelLayer",
            Self::CancelByHand => "CancellationToken by hand",
            Self::Deadline => "DeadlineLayer",
            Self::Timeout => "tower Timeout",
            Self::TimeLimiter => "tower-resilience TimeLimiter",
            Self::Retry => "RetryLayer",
            Self::TowerRetry => "tower Retry with TpsBudget",
            Self::ResilienceRetry => "tower-resilience Retry with budget",
            Self::Full => "all four layers over Pool",
            Self::TowerFull => "tower Retry, Timeout, LoadShed over Buffer(Balance)",
            Self::ResilienceFull => {
                "tower-resilience Retry, TimeLimiter, CircuitBreaker over Buffer(Balance)"
            }
        }
    }
}

async fn tonic<S>(mut service: S, callers: usize, count: u64) -> Duration
where
    S: Service<Tonic, Response: Answer, Future: Send, Error: std::fmt::Debug + Send>
        + Clone
        + Send
        + 'static,
{
    calls(&mut service, 100).await;
    shared(service, callers, count).await
}

async fn cloned<S>(mut service: S, callers: usize, count: u64) -> Duration
where
    S: Service<Cloned, Response: Answer, Future: Send, Error: std::fmt::Debug + Send>
        + Clone
        + Send
        + 'static,
{
    calls(&mut service, 100).await;
    shared(service, callers, count).await
}
