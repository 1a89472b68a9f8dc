//! The pool and what a user would pick instead, over a service that does nothing.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    hint::black_box,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use switchboard::{Gate, GateLayer, Kind, Pool, pool::Plain};
use tokio::runtime::Runtime;
use tower::{
    Service, ServiceExt as _,
    balance::p2c::Balance,
    buffer::Buffer,
    discover::ServiceList,
    layer::Layer as _,
    load::{CompleteOnResponse, PendingRequests},
};

use super::{
    drive::{calls, shared},
    measure,
};

/// Answers at once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Inner;

/// Which service the calls go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Through {
    /// The inner service itself: what all others add to.
    Inner,
    /// A gate of ours before it, which is open.
    Gate,
    /// Our pool.
    Pool,
    /// Tower's `Balance`. It is no `Clone`: a caller must have it for itself.
    Balance,
    /// `Buffer` over `Balance`, which is what makes it one that can be shared.
    BufferBalance,
}

impl Service<u64> for Inner {
    type Response = u64;
    type Error = Infallible;
    type Future = Ready<Result<u64, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: u64) -> Self::Future {
        ready(Ok(black_box(request)))
    }
}

/// A pool over `endpoints` inner services, all of them ready.
pub(crate) async fn pool(endpoints: usize) -> Pool<Inner, Plain> {
    let list = ServiceList::new::<u64>(vec![Inner; endpoints]);
    let mut pool = Pool::from_discover("inner", list).expect("it is made in a runtime");
    for id in 0..endpoints {
        let mut pinned = pool.to(id);
        calls::<u64, _>(&mut pinned, 1).await;
    }
    calls::<u64, _>(&mut pool, 1000).await;
    pool
}

type Measured = PendingRequests<Inner>;

/// Power of two choices over calls in flight, as the pool does it.
fn balance(endpoints: usize) -> Balance<ServiceList<Vec<Measured>>, u64> {
    let measured = |_| PendingRequests::new(Inner, CompleteOnResponse::default());
    let services = (0..endpoints).map(measured).collect();
    Balance::new(ServiceList::new::<u64>(services))
}

// === impl Through ===

impl Through {
    /// How long `count` calls take each of `callers`, which all call at the same time.
    ///
    /// `callers` want as many threads of the runtime.
    pub(crate) fn time(
        self,
        runtime: &Runtime,
        endpoints: usize,
        callers: usize,
        count: u64,
    ) -> Duration {
        runtime.block_on(async {
            match self {
                Self::Inner => shared::<u64, _>(Inner, callers, count).await,
                Self::Gate => {
                    let layer = GateLayer::new(Gate::new());
                    shared::<u64, _>(layer.layer(Inner), callers, count).await
                }
                Self::Pool => shared::<u64, _>(pool(endpoints).await, callers, count).await,
                Self::Balance => {
                    assert_eq!(callers, 1, "Balance is not shared");
                    let mut balance = balance(endpoints);
                    calls::<u64, _>(&mut balance, 1000).await;
                    calls::<u64, _>(&mut balance, count).await
                }
                Self::BufferBalance => {
                    let mut buffer = Buffer::new(balance(endpoints), 1024);
                    calls::<u64, _>(&mut buffer, 1000).await;
                    shared::<u64, _>(buffer, callers, count).await
                }
            }
        })
    }

    /// Allocations a call.
    pub(crate) fn allocations(self, runtime: &Runtime, endpoints: usize) -> f64 {
        measure::allocations_a_call(|count| {
            self.time(runtime, endpoints, 1, count);
        })
    }

    /// How many calls take it some 5 ms.
    pub(crate) const fn slice(self) -> u64 {
        match self {
            Self::Inner | Self::Gate | Self::Pool => 150_000,
            Self::Balance => 50_000,
            Self::BufferBalance => 5_000,
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Inner => "inner",
            Self::Gate => "gate, open",
            Self::Pool => "pool",
            Self::Balance => "Balance",
            Self::BufferBalance => "Buffer(Balance)",
        }
    }
}

/// How long a call takes to fail that has nowhere to go.
pub(crate) fn time_nowhere(runtime: &Runtime, count: u64) -> Duration {
    runtime.block_on(async {
        let list = ServiceList::new::<u64>(Vec::<Inner>::new());
        let mut pool = Pool::<_, Plain>::from_discover("nobody", list).expect("in a runtime");
        assert!(pool.ready().await.expect("always").call(0).await.is_err());
        let began = Instant::now();
        for i in 0..count {
            let failed = pool.call(i).await;
            assert!(black_box(failed).is_err());
        }
        began.elapsed()
    })
}

/// How long a call takes to fail at a gate that is shut, with a reason that is `owned` or a literal.
pub(crate) fn time_shut(runtime: &Runtime, owned: bool, count: u64) -> Duration {
    runtime.block_on(async {
        let gate = Gate::new();
        match owned {
            true => gate.shut(String::from("session deleted")),
            false => gate.shut("session deleted"),
        };
        let mut service = GateLayer::new(gate).layer(Inner);
        let failed = service.ready().await.expect("always").call(0).await;
        assert_eq!(failed.expect_err("it is shut").kind(), Kind::Shut);
        let began = Instant::now();
        for i in 0..count {
            let ready = service.ready().await.expect("always");
            assert!(black_box(ready.call(i).await).is_err());
        }
        began.elapsed()
    })
}
