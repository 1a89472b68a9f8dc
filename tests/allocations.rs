//! Picking allocates nothing: counted, in a test binary of its own, for the counter is the global allocator.

use std::{convert::Infallible, future::Future as _, pin::pin, task::Context, task::Waker};

use switchboard::pool::{Plain, Pool};
use tower::{Service as _, ServiceExt as _, discover::ServiceList, service_fn};

#[tokio::test]
async fn a_call_through_a_ready_pool_allocates_nothing() {
    let double = service_fn(|n: u32| std::future::ready(Ok::<_, Infallible>(2 * n)));
    let list = ServiceList::new::<u32>(vec![double; 10]);
    let mut pool = Pool::<_, Plain>::from_discover("double", list).unwrap();
    // The first calls wait for the endpoints, and set up what a thread needs once.
    for id in 0..10 {
        assert_eq!(pool.to(id).oneshot(21).await.unwrap(), 42);
    }
    assert_eq!(pool.call(21).await.unwrap(), 42);

    let made = allocation_counter::measure(|| {
        let mut context = Context::from_waker(Waker::noop());
        for n in 0..1000 {
            let call = pin!(pool.call(n));
            assert!(call.poll(&mut context).is_ready(), "it had to wait");
        }
    });
    assert_eq!(made.count_total, 0, "{made:?}");

    // And the counter counts: a call that has to wait is boxed.
    let mut nobody = pool.to("nobody");
    let made = allocation_counter::measure(|| drop(nobody.call(1)));
    assert!(made.count_total > 0, "{made:?}");
}
