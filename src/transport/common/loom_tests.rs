//! The lives of several connections to one peer: who comes, leaves, ends and closes at the same time.
//!
//! Loom sees the lock, and not the words that are written once before it is asked for: each of those is done at once.

use loom::thread;
use tokio::runtime::Runtime;

use super::*;
use crate::{sync::in_every_order, transport::core::Ending};

fn runtime() -> Runtime {
    runtime::Builder::new_current_thread().build().unwrap()
}

/// What so many connections have in common, and they, none of which has been let in.
fn connections<const N: usize>() -> (Arc<Common>, [Arc<Core>; N]) {
    let connector = Connector::new();
    let to = connector.dialer.destination("127.0.0.1:1").unwrap();
    let common = Arc::new(Common::new(to, HeaderMap::new(), &connector));
    let cores = std::array::from_fn(|_| Arc::new(Core::new(common.clone(), None)));
    (common, cores)
}

fn apart<T: 'static>(
    core: &Arc<Core>,
    act: impl FnOnce(&Arc<Core>) -> T + 'static,
) -> thread::JoinHandle<T> {
    let core = core.clone();
    thread::spawn(move || act(&core))
}

fn ends(core: &Arc<Core>) {
    Ending::of(core.clone()).because(Ok(()));
}

fn leaves(core: &Arc<Core>) {
    core.leave(|| "goodbye".to_owned());
}

/// What an endpoint is told.
fn told(common: &Common) -> (bool, bool) {
    (common.over.is_cancelled(), common.ended.is_cancelled())
}

fn models(test: impl Fn() + Send + Sync + 'static) {
    in_every_order(move || {
        let runtime = runtime();
        let _here = runtime.enter();
        test();
    });
}

#[test]
fn one_that_leaves_as_it_is_let_in_is_not_or_is_known_to_leave() {
    models(|| {
        let (common, [one]) = connections();
        let leaver = apart(&one, leaves);
        let admitted = common.admit(&one).is_ok();
        leaver.join().unwrap();
        assert_eq!(told(&common), (admitted, false));
        ends(&one);
        assert_eq!(told(&common), (admitted, admitted));
    });
}

#[test]
fn one_that_ends_as_it_is_let_in_is_not_or_is_known_to_have_ended() {
    models(|| {
        let (common, [one]) = connections();
        let ender = apart(&one, ends);
        let admitted = common.admit(&one).is_ok();
        ender.join().unwrap();
        assert_eq!(told(&common), (admitted, admitted));
        assert!(common.lock().alive.is_empty());
    });
}

#[test]
fn that_is_over_once_both_leave_and_not_before() {
    models(|| {
        let (common, both) = connections::<2>();
        both.iter().for_each(|core| common.admit(core).unwrap());
        let others = [leaves, ends];
        let others = both.iter().zip(others).map(|(core, act)| apart(core, act));
        for other in others.collect::<Vec<_>>() {
            other.join().unwrap();
        }
        assert_eq!(told(&common), (true, false));
        ends(&both[0]);
        assert_eq!(told(&common), (true, true));
    });
}

#[test]
fn one_that_takes_the_place_of_another_comes_in_time_or_not_at_all() {
    models(|| {
        let (common, [old, new]) = connections();
        common.admit(&old).unwrap();
        let ender = apart(&old, ends);
        // As the keeper does it.
        let admitted = common.admit(&new).is_ok();
        if admitted {
            leaves(&old);
        }
        ender.join().unwrap();
        assert_eq!(told(&common), (!admitted, !admitted));
        assert_eq!(common.connections(), usize::from(admitted));
    });
}

#[test]
fn no_connection_outlives_a_close() {
    models(|| {
        let (common, [one, other]) = connections();
        common.admit(&one).unwrap();
        let closer = apart(&one, |core| {
            core.common.close(Error::new(Kind::SessionDeleted));
        });
        let admitted = common.admit(&other).is_ok();
        closer.join().unwrap();
        for core in [&one, &other] {
            let closed = core.why_leaving().map(|(kind, _)| kind);
            let lives = Arc::ptr_eq(core, &one) || admitted;
            assert_eq!(closed, lives.then_some(Kind::SessionDeleted));
        }
        assert_eq!(told(&common), (true, false));
        ends(&one);
        ends(&other);
        assert_eq!(told(&common), (true, true));
    });
}
