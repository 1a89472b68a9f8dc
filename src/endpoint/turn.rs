//! Whose turn it is to dial, where many want to at once.

use std::{future::Future, pin::pin, time::Duration};

use tokio::time;

/// How long a dial counts as one of those that may go on at once. One that takes longer waits for a peer that is far,
/// or silent, and costs nothing but its socket; were it to keep its place, 64 peers that are silent would keep all
/// others waiting for as long as an attempt may take. The first SYN is repeated after 1 s.
const BRISK: Duration = Duration::from_millis(500);

/// Dials once it has a place, and gives that back when it has, or has taken [`BRISK`].
///
/// Dropping the future gives it back too.
pub(crate) async fn in_turn<P, F: Future>(place: impl Future<Output = P>, dial: F) -> F::Output {
    let place = place.await;
    let mut dial = pin!(dial);
    tokio::select! {
        biased;
        result = &mut dial => return result,
        () = time::sleep(BRISK) => drop(place),
    }
    dial.await
}

#[cfg(test)]
mod tests {
    use std::{future::pending, sync::Arc};

    use tokio::sync::Semaphore;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_that_is_quick_has_its_place_until_it_ends_and_one_that_is_slow_for_a_while() {
        let places = Arc::new(Semaphore::new(1));
        // Given one that hangs
        let (hangs, free) = (places.clone(), places.clone());
        let hangs = tokio::spawn(in_turn(hangs.acquire_owned(), pending::<()>()));
        tokio::task::yield_now().await;
        assert_eq!(free.available_permits(), 0);
        // When another wants to dial, then it may after that while
        let began = time::Instant::now();
        let quick = time::sleep(BRISK / 2);
        in_turn(places.clone().acquire_owned(), async {
            assert_eq!(began.elapsed(), BRISK);
            assert_eq!(free.available_permits(), 0);
            quick.await;
        })
        .await;
        // And has given its place back.
        assert_eq!(free.available_permits(), 1);
        hangs.abort();
    }
}
