use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Wake, Waker},
    time::Duration,
};

use super::*;

/// Counts how often it was woken.
#[derive(Default)]
struct Woken(AtomicUsize);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl Woken {
    fn times(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

struct Owner {
    timers: Timers,
    cancelled: AtomicBool,
}

impl Owner {
    fn here() -> Arc<Self> {
        Arc::new(Self {
            timers: Timers::new(tokio::runtime::Handle::current()),
            cancelled: AtomicBool::new(false),
        })
    }
}

impl Holder for Arc<Owner> {
    fn table(&self) -> Option<&Table> {
        Some(self.timers.table())
    }

    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    fn timers(&self) -> Option<&Timers> {
        Some(&self.timers)
    }
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

#[tokio::test(start_paused = true)]
async fn each_is_woken_when_its_time_is_up_and_not_before() {
    // Given calls with times in no order
    let owner = Owner::here();
    let times = [70, 3, 200, 50, 3, 1, 120];
    let mut calls: Vec<_> = times
        .iter()
        .map(|time| {
            let woken = Arc::<Woken>::default();
            let at = after(ms(*time));
            (*time, woken, Waiter::new(owner.clone(), at))
        })
        .collect();
    for (_, woken, waiter) in &mut calls {
        let waker = Waker::from(woken.clone());
        let cx = Context::from_waker(&waker);
        assert!(waiter.poll(&cx).is_pending());
    }
    // When time goes on, a millisecond at a time
    for now in 1..=220 {
        tokio::time::sleep(ms(1)).await;
        for (time, woken, waiter) in &mut calls {
            let waker = Waker::from(woken.clone());
            let cx = Context::from_waker(&waker);
            let over = woken.times() > 0 && waiter.poll(&cx) == Poll::Ready(Over::Expired);
            // Then each is woken within the grain
            assert!(!over || now >= *time, "{time} ms: woken after {now} ms");
            assert!(
                woken.times() > 0 || now < *time + 8,
                "{time} ms: not woken after {now}"
            );
        }
    }
    drop(calls);
    assert_eq!(owner.timers.table().armed(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_sweeper_ends_when_there_is_nothing_to_do_and_begins_again() {
    let owner = Owner::here();
    let metrics = tokio::runtime::Handle::current().metrics();
    let waker = Waker::noop();
    let cx = Context::from_waker(waker);
    for _ in 0..3 {
        assert_eq!(metrics.num_alive_tasks(), 0);
        let mut waiter = Waiter::new(owner.clone(), after(ms(20)));
        assert!(waiter.poll(&cx).is_pending());
        assert_eq!(metrics.num_alive_tasks(), 1);
        tokio::time::sleep(ms(40)).await;
        assert_eq!(waiter.poll(&cx), Poll::Ready(Over::Expired));
        drop(waiter);
        tokio::time::sleep(ms(1500)).await;
    }
    // Closed, it does not wait for the time of a call that is over
    let mut waiter = Waiter::new(owner.clone(), after(ms(3_600_000)));
    assert!(waiter.poll(&cx).is_pending());
    tokio::time::sleep(ms(1)).await;
    drop(waiter);
    owner.timers.close();
    tokio::time::sleep(ms(1)).await;
    assert_eq!(metrics.num_alive_tasks(), 0);
}

#[tokio::test]
async fn what_is_cancelled_is_woken_and_only_that() {
    let table = Table::new();
    let (one, other) = (Arc::<Woken>::default(), Arc::<Woken>::default());
    let (first, _) = table.arm(Waker::from(one.clone()), NEVER, 1);
    let (second, _) = table.arm(Waker::from(other.clone()), NEVER, 2);
    table.wake(Some(1));
    assert_eq!((one.times(), other.times()), (1, 0));
    let waker = Waker::from(other.clone());
    let cx = Context::from_waker(&waker);
    assert_eq!(table.look(first, &cx), Look::Woken);
    assert_eq!(table.look(second, &cx), Look::Waits);
    table.wake(None);
    assert_eq!((one.times(), other.times()), (1, 1));
    table.disarm(second);
    assert_eq!(table.armed(), 0);
}

#[tokio::test]
async fn a_slot_wakes_the_task_that_polled_last() {
    let table = Table::small();
    let (before, after) = (Arc::<Woken>::default(), Arc::<Woken>::default());
    let (key, _) = table.arm(Waker::from(before.clone()), NEVER, 0);
    let waker = Waker::from(after.clone());
    assert_eq!(table.look(key, &Context::from_waker(&waker)), Look::Moved);
    table.wake(None);
    assert_eq!((before.times(), after.times()), (0, 1));
}

/// A waker that is never the same as another, as far as can be told.
struct Unlike;

impl Wake for Unlike {
    fn wake(self: Arc<Self>) {}
}

#[tokio::test(start_paused = true)]
async fn a_waker_that_is_another_at_each_poll_holds_nobody_up() {
    let owner = Owner::here();
    let mut timed = timed::Timed::new(owner, after(ms(10)));
    for _ in 0..5 {
        let waker = Waker::from(Arc::new(Unlike));
        assert!(timed.poll(&mut Context::from_waker(&waker)).is_pending());
    }
    tokio::time::sleep(ms(20)).await;
    let over = timed.poll(&mut Context::from_waker(Waker::noop()));
    assert!(matches!(over, Poll::Ready(Ok(Over::Expired))), "{over:?}");
}

#[test]
fn a_call_that_moves_to_another_runtime_ends_there_although_nobody_drives_the_first() {
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap()
    };
    let (first, second) = (runtime(), runtime());
    let layer = crate::DeadlineLayer::new(ms(100));
    let never = tower::service_fn(|_: http::Request<()>| {
        std::future::pending::<Result<http::Response<tonic::body::Body>, crate::error::BoxError>>()
    });
    let mut service = tower::Layer::layer(&layer, never);
    let mut call = Box::pin(tower::Service::call(&mut service, http::Request::new(())));
    // Begun in the one
    first.block_on(async {
        assert!(
            futures_util::future::poll_immediate(&mut call)
                .await
                .is_none()
        );
    });
    // And awaited in the other
    let error = second.block_on(call).map(drop).unwrap_err();
    assert_eq!(error.kind(), crate::Kind::DeadlineExceeded);
    // As is one that begins there
    let late = tower::Service::call(&mut service, http::Request::new(()));
    let error = second.block_on(late).map(drop).unwrap_err();
    assert_eq!(error.kind(), crate::Kind::DeadlineExceeded);
}

#[test]
fn the_end_of_the_runtime_that_keeps_the_time_is_told() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    let owner = runtime.block_on(async { Owner::here() });
    let woken = Arc::<Woken>::default();
    let waker = Waker::from(woken.clone());
    let cx = Context::from_waker(&waker);
    let mut waiter = Waiter::new(owner.clone(), after(ms(50_000)));
    assert!(waiter.poll(&cx).is_pending());
    drop(runtime);
    assert_eq!(woken.times(), 1);
    assert_eq!(waiter.poll(&cx), Poll::Ready(Over::Untimed));
    let mut late = Waiter::new(owner.clone(), after(ms(50_000)));
    assert_eq!(late.poll(&cx), Poll::Ready(Over::Untimed));
}
