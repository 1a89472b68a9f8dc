//! Calls to a service in a process, one after the other or from several tasks at once.

use std::{
    hint::{black_box, spin_loop},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::task::JoinSet;
use tower::{Service, ServiceExt as _};

/// What is asked.
pub(crate) trait Ask: Send + 'static {
    fn ask(i: u64) -> Self;
}

/// What is answered, which is taken to its end.
pub(crate) trait Answer: Send {
    fn end(self) -> impl Future<Output = ()> + Send;
}

impl Ask for u64 {
    fn ask(i: u64) -> Self {
        i
    }
}

impl Answer for u64 {
    async fn end(self) {
        black_box(self);
    }
}

/// The time of the slowest of several tasks that each call a clone, all at the same time.
pub(crate) async fn shared<Q, S>(mut service: S, callers: usize, count: u64) -> Duration
where
    Q: Ask,
    S: Service<Q, Response: Answer, Future: Send, Error: std::fmt::Debug + Send>
        + Clone
        + Send
        + 'static,
{
    if callers == 1 {
        return calls(&mut service, count).await;
    }
    let waiting = Arc::new(AtomicUsize::new(callers));
    let start = Arc::new(OnceLock::new());
    let mut tasks = JoinSet::new();
    for _ in 0..callers {
        let (mut service, waiting, start) = (service.clone(), waiting.clone(), start.clone());
        tasks.spawn(async move {
            // Spinning: a thread that had to be woken would begin when the other is half done. One that is
            // not running at the start has begun all the same, or two on one core would look fast.
            // Nor does it spin for ever: the other may be waiting behind this one, on the same thread.
            waiting.fetch_sub(1, Ordering::AcqRel);
            let mut spins = 0u32;
            while waiting.load(Ordering::Acquire) > 0 {
                spin_loop();
                spins = spins.wrapping_add(1);
                if spins.is_multiple_of(10_000) {
                    tokio::task::yield_now().await;
                }
            }
            let began = *start.get_or_init(Instant::now);
            calls(&mut service, count).await;
            began.elapsed()
        });
    }
    let times = tasks.join_all().await;
    times.into_iter().max().unwrap_or_default()
}

pub(crate) async fn calls<Q, S>(service: &mut S, count: u64) -> Duration
where
    Q: Ask,
    S: Service<Q, Response: Answer, Error: std::fmt::Debug>,
{
    let began = Instant::now();
    for i in 0..count {
        let ready = service.ready().await.expect("it is ready");
        let answer = black_box(ready.call(Q::ask(i)).await).expect("it answers");
        answer.end().await;
    }
    began.elapsed()
}
