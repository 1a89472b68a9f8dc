//! Which endpoint a call goes to.

use std::sync::Arc;

use super::snapshot::Snapshot;
use crate::endpoint::ready::Ready;

/// The less loaded of two that chance picks: the power of two choices.
///
/// Two random choices bring the fullest of n peers from ln n / ln ln n calls over the average down to
/// ln ln n (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 1996). Load is calls
/// in flight: no clock is read and nothing is averaged on the call path.
pub(crate) fn least_loaded_of_two<S>(snapshot: &Snapshot<S>) -> Option<&Arc<Ready<S>>> {
    let ready = &snapshot.ready;
    let len = ready.len();
    if len < 2 {
        return ready.get(0).filter(|only| !only.is_down());
    }
    let one = fastrand::usize(..len);
    // One of the others: a choice between a peer and itself would be none.
    let other = (one + fastrand::usize(1..len)) % len;
    match (up(snapshot, one), up(snapshot, other)) {
        (Some(one), Some(other)) => Some(if one.load.current() <= other.load.current() {
            one
        } else {
            other
        }),
        (Some(one), None) | (None, Some(one)) => Some(one),
        // Both have just gone down and the next snapshot is not there yet: whoever is up will do.
        (None, None) => (1..len).find_map(|step| up(snapshot, (other + step) % len)),
    }
}

/// The one instance that was asked for, if it is connected.
pub(crate) fn pinned<'a, S>(snapshot: &'a Snapshot<S>, id: &str) -> Option<&'a Arc<Ready<S>>> {
    let entry = snapshot.all.get(id)?;
    entry.ready.as_ref().filter(|ready| !ready.is_down())
}

fn up<S>(snapshot: &Snapshot<S>, index: usize) -> Option<&Arc<Ready<S>>> {
    snapshot.ready.get(index).filter(|ready| !ready.is_down())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Peer;

    fn snapshot(of: usize) -> Snapshot<()> {
        let mut snapshot = Snapshot::empty();
        for id in 0..of {
            let peer = Peer::new("echo", id.to_string(), "");
            snapshot
                .ready
                .push(Arc::new(Ready::new((), &peer, id as u64, None)));
        }
        snapshot
    }

    #[test]
    fn none_of_nothing_and_the_only_one_of_one() {
        assert!(least_loaded_of_two(&snapshot(0)).is_none());
        let one = snapshot(1);
        assert!(least_loaded_of_two(&one).is_some());
        one.ready.get(0).unwrap().mark_down("gone");
        assert!(least_loaded_of_two(&one).is_none());
    }

    #[test]
    fn of_two_the_less_loaded_always() {
        let two = snapshot(2);
        let _busy = two.ready.get(0).unwrap().load.acquire();
        for _ in 0..100 {
            assert_eq!(least_loaded_of_two(&two).unwrap().key, 1);
        }
    }

    #[test]
    fn whatever_is_up_is_found_however_few() {
        let many = snapshot(300);
        for index in (0..300).filter(|index| *index != 211) {
            many.ready.get(index).unwrap().mark_down("gone");
        }
        for _ in 0..1000 {
            assert_eq!(least_loaded_of_two(&many).unwrap().key, 211);
        }
    }

    #[test]
    fn calls_that_stay_spread_within_what_two_choices_promise() {
        let many = snapshot(100);
        let mut held = Vec::new();
        for _ in 0..10_000 {
            held.push(least_loaded_of_two(&many).unwrap().load.acquire());
        }
        let most = many.ready.iter().map(|r| r.load.current()).max().unwrap();
        // 100 each on average; ln ln 100 is 1.5. One random choice would give about 127.
        assert!(most <= 105, "the fullest has {most}");
    }
}
