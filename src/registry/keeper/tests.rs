use std::sync::Mutex;

use futures_util::{FutureExt as _, StreamExt as _};

use super::*;
use crate::{
    endpoint::BoxFuture,
    registry::{
        MemoryRegistry, Registration, RegistrationEvents,
        store::{Broken, Listing, Record, Store, Watch},
    },
};

const SECOND: Duration = Duration::from_secs(1);

fn echo() -> Session {
    Session::new("echo", "h:1").with_id(7)
}

fn session(address: &str) -> Session {
    Session::new("echo", address.to_owned()).with_id(7)
}

async fn held(registry: &MemoryRegistry, session: Session) -> (Registration, RegistrationEvents) {
    let registration = registry.register(session).await.expect("it is free");
    let mut events = registration.events();
    let first = next(&mut events).await;
    assert!(first.starts_with("registered"), "{first}");
    (registration, events)
}

/// The next event, in words.
async fn next(events: &mut RegistrationEvents) -> String {
    let event = time::timeout(60 * SECOND, events.next()).await;
    event.expect("in time").expect("it goes on").to_string()
}

/// What stands under the key of `echo()`, and whether it is under a lease.
async fn there(registry: &MemoryRegistry) -> Option<(Session, u64, bool)> {
    let record = registry.record("echo/7")?;
    let decoded = codec::decode(
        &crate::registry::Naming,
        "",
        "echo",
        "echo/7",
        &record.value,
    );
    let session = decoded.ok().flatten()?;
    Some((session, record.created, record.lease != 0))
}

#[tokio::test(start_paused = true)]
async fn what_is_deleted_is_registered_again_as_another_generation() {
    // Given a registration
    let registry = MemoryRegistry::new();
    let (registration, mut events) = held(&registry, echo()).await;
    let (_, first, _) = there(&registry).await.expect("it is there");
    let before = Instant::now();

    // When somebody deletes its key
    registry.delete("echo/7");

    // Then it is told, and is there again at once, under the same id
    assert_eq!(next(&mut events).await, "lost: its record was deleted");
    assert!(next(&mut events).await.starts_with("restored"));
    assert!(before.elapsed() < SECOND / 2, "{:?}", before.elapsed());
    let (session, generation, leased) = there(&registry).await.expect("it is back");
    assert_eq!(session, echo());
    assert!(generation > first && leased);
    assert_eq!(registration.registered().await.expect("it is"), generation);
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_is_gone_is_replaced() {
    let registry = MemoryRegistry::new();
    let (mut registration, mut events) = held(&registry, echo()).await;
    registration
        .update(|s| s.with_version("2"))
        .await
        .expect("it is ours");
    registry.end_lease_of("echo/7");
    // By its key's feed, and not only by the next beat.
    assert!(next(&mut events).await.starts_with("lost"));
    assert!(next(&mut events).await.starts_with("restored"));
    let (session, _, leased) = there(&registry).await.expect("it is back");
    assert_eq!(session.version(), "2", "as it was last written");
    assert!(leased);
    time::sleep(60 * SECOND).await;
    assert!(there(&registry).await.is_some(), "it is kept alive");
}

#[tokio::test(start_paused = true)]
async fn a_key_that_another_takes_is_left_to_it_until_it_goes() {
    // Given a registration whose key another takes while it is not looking
    let registry = MemoryRegistry::new();
    let (mut registration, mut events) = held(&registry, echo()).await;
    registry.delete("echo/7");
    let other = session("other:1");
    let value = codec::encode(&crate::registry::Naming, &other, 0).expect("good");
    registry.put("echo/7", value);

    // Then it is told who, and leaves it alone
    assert!(next(&mut events).await.starts_with("lost"));
    let taken = next(&mut events).await;
    assert_eq!(taken, "its key is taken by instance 7 at other:1");
    time::sleep(30 * SECOND).await;
    assert!(events.next().now_or_never().is_none(), "that is said once");
    assert_eq!(there(&registry).await.expect("it is there").0, other);

    // And what it is to say meanwhile is said when the key is free
    registration
        .update(|s| s.with_version("2"))
        .await
        .expect("it is kept");
    registry.delete("echo/7");
    assert!(next(&mut events).await.starts_with("restored"));
    let (session, _, _) = there(&registry).await.expect("it is back");
    assert_eq!((session.address(), session.version()), ("h:1", "2"));
}

#[tokio::test(start_paused = true)]
async fn a_record_that_was_written_over_is_put_under_its_lease_again() {
    let registry = MemoryRegistry::new();
    let (_registration, mut events) = held(&registry, echo()).await;
    let (_, generation, _) = there(&registry).await.expect("it is there");
    // As `etcdctl put` does: the value is another's, and no lease ends it.
    registry.put("echo/7", "{}");
    time::sleep(SECOND).await;
    let (session, now, leased) = there(&registry).await.expect("it is mended");
    assert_eq!((session, now, leased), (echo(), generation, true));
    assert!(events.next().now_or_never().is_none(), "nothing was lost");
}

/// The registry as another process would see it.
fn elsewhere(registry: &MemoryRegistry) -> MemoryRegistry {
    registry.clone().with_backoff(Backoff::default())
}

#[tokio::test(start_paused = true)]
async fn whoever_is_restarted_takes_over_from_itself_at_once() {
    // Given a registration that is kept alive, by whoever does not know yet that it is dead
    let registry = MemoryRegistry::new();
    let (old, mut events) = held(&registry, echo()).await;
    let (_, first, _) = there(&registry).await.expect("it is there");

    // When the same instance registers once more, elsewhere: same role, id and address
    let before = Instant::now();
    let new = elsewhere(&registry)
        .register(echo().with_version("2"))
        .await;
    let new = new.expect("it was its own");

    // Then it has the key, under another generation, and the old one ends
    assert!(before.elapsed() < SECOND / 10, "{:?}", before.elapsed());
    assert!(next(&mut events).await.starts_with("lost"));
    let taken = next(&mut events).await;
    assert!(
        taken.contains("taken by instance 7 at h:1, version 2"),
        "{taken}"
    );
    assert_eq!(next(&mut events).await, "ended");
    time::sleep(60 * SECOND).await;
    let (session, generation, _) = there(&registry).await.expect("it is there");
    assert_eq!(session.version(), "2");
    assert!(generation > first);
    assert!(
        matches!(new.state(), RegistrationState::Registered { generation: g } if g == generation)
    );
    let error = old.deregister().await.expect_err("it has nothing any more");
    assert_eq!(error.kind(), Kind::SessionDeleted);
    assert!(error.to_string().contains("its successor"), "{error}");
    time::sleep(SECOND).await;
    assert!(
        there(&registry).await.is_some(),
        "the old one took nothing with it"
    );
}

#[tokio::test(start_paused = true)]
async fn who_was_waited_for_is_no_successor_when_it_dies() {
    for exclusive in [true, false] {
        // Given one that waits for the key, which the same instance holds through another handle
        let registry = MemoryRegistry::new();
        let session = echo().with_exclusive(exclusive);
        let (first, _) = held(&registry, session.clone()).await;
        let second = registry.register(session).background().await;
        let second = second.expect("it waits");
        let mut events = second.events();
        let waits = next(&mut events).await;
        assert!(waits.contains("instance 7 at h:1"), "{waits}");
        time::sleep(2 * SECOND).await;

        // When that dies and leaves its record to the TTL
        let before = Instant::now();
        first.abandon();

        // Then whoever waited has it
        let event = next(&mut events).await;
        assert!(event.starts_with("registered"), "{event}");
        assert!(before.elapsed() < 12 * SECOND, "{:?}", before.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn what_nobody_could_read_is_not_written() {
    let registry = MemoryRegistry::new();
    let large = echo().with_metadata("blob", "x".repeat(1 << 20));
    let refused = registry.register(large).await.err();
    assert_eq!(refused.map(|error| error.kind()), Some(Kind::Invalid));
    let (mut registration, _events) = held(&registry, echo()).await;
    let blob = "x".repeat(1 << 20);
    let refused = registration.update(|s| s.with_metadata("blob", blob)).await;
    assert_eq!(refused.map_err(|error| error.kind()), Err(Kind::Invalid));
    let before = registry.revision();
    time::sleep(60 * SECOND).await;
    assert_eq!(registry.revision(), before, "it is left in peace");
}

#[tokio::test(start_paused = true)]
async fn what_a_handle_of_this_process_holds_is_refused_and_free_once_it_is_dropped() {
    let registry = MemoryRegistry::new();
    let (registration, _events) = held(&registry, echo()).await;
    let error = registry.register(echo()).await.expect_err("it is held");
    assert_eq!(error.kind(), Kind::AlreadyRegistered);
    drop(registration);
    let (_registration, _events) = held(&registry, echo()).await;
    time::sleep(60 * SECOND).await;
    assert!(there(&registry).await.is_some());
}

#[tokio::test(start_paused = true)]
async fn nobody_counts_on_a_lease_that_was_not_confirmed_for_its_ttl() {
    let registry = MemoryRegistry::new();
    let (_registration, mut events) = held(&registry, echo()).await;
    let (_, generation, _) = there(&registry).await.expect("it is there");
    let before = Instant::now();
    registry.set_available(false);
    assert!(next(&mut events).await.starts_with("not confirmed"));
    let lost = next(&mut events).await;
    assert!(
        lost.contains("has not confirmed its lease for 10s"),
        "{lost}"
    );
    let took = before.elapsed();
    assert!(took <= MemoryRegistry::TTL + SECOND, "{took:?}");
    registry.set_available(true);
    // It was given more time, as etcd does.
    assert_eq!(
        next(&mut events).await,
        format!("restored, generation {generation}")
    );
}

#[tokio::test(start_paused = true)]
async fn a_key_of_another_is_refused_or_waited_for() {
    let registry = MemoryRegistry::new();
    let (other, _events) = held(&registry, session("other:1")).await;
    let error = registry.register(echo()).await.expect_err("it is held");
    assert_eq!(error.kind(), Kind::AlreadyRegistered);
    let error = registry
        .register(echo())
        .wait(5 * SECOND)
        .expect("a good wait")
        .await;
    let error = error.expect_err("it is held for longer");
    assert!(
        error.to_string().contains("held by instance 7 at other:1"),
        "{error}"
    );

    other.abandon();
    // That the registry is away for a part of it makes no difference.
    registry.set_available(false);
    let away = registry.clone();
    tokio::spawn(async move {
        time::sleep(3 * SECOND).await;
        away.set_available(true);
    });
    let before = Instant::now();
    let registration = registry
        .register(echo())
        .wait(15 * SECOND)
        .expect("a good wait");
    let registration = registration.await.expect("it becomes free");
    assert!(before.elapsed() <= 14 * SECOND, "{:?}", before.elapsed());
    assert_eq!(registration.session(), &echo());
    let error = registry
        .register(echo())
        .wait(Duration::ZERO)
        .expect_err("no wait");
    assert_eq!(error.kind(), Kind::Invalid);
}

#[tokio::test(start_paused = true)]
async fn of_exclusive_sessions_one_is_active_and_the_next_takes_over() {
    let registry = MemoryRegistry::new();
    let exclusive = |n: u32| {
        Session::new("root", format!("h:{n}"))
            .with_id(n)
            .with_exclusive(true)
    };
    let (one, _) = held(&registry, exclusive(1)).await;
    let mut two = registry.register(exclusive(2)).await.expect("it stands by");
    let mut events = two.events();
    assert_eq!(
        next(&mut events).await,
        "standing by; active is instance 1 at h:1"
    );
    // What it is to say is said when it is active.
    two.update(|s| s.with_version("2"))
        .await
        .expect("it is kept");
    let three = registry.register(exclusive(3)).await.expect("it stands by");
    three
        .deregister()
        .await
        .expect("there is nothing to remove");
    time::sleep(60 * SECOND).await;
    assert!(matches!(one.state(), RegistrationState::Registered { .. }));
    assert!(two.registered().now_or_never().is_none());

    let died = Instant::now();
    one.abandon();
    two.registered().await.expect("it takes over");
    let took = died.elapsed();
    assert!(took <= MemoryRegistry::TTL + SECOND, "{took:?}");
    assert!(next(&mut events).await.starts_with("registered"));
    let record = registry.record("root/active").expect("it is there");
    assert!(String::from_utf8_lossy(&record.value).contains("\"version\":\"2\""));
}

#[tokio::test(start_paused = true)]
async fn in_the_background_it_waits_for_a_registry_that_is_away() {
    let registry = MemoryRegistry::new();
    registry.set_available(false);
    let error = registry.register(echo()).await.expect_err("it is away");
    assert_eq!(error.kind(), Kind::RegistryUnreachable);
    let registration = registry
        .register(echo())
        .background()
        .await
        .expect("at once");
    let mut events = registration.events();
    assert!(next(&mut events).await.starts_with("not confirmed"));
    time::sleep(30 * SECOND).await;
    assert!(registration.registered().now_or_never().is_none());
    registry.set_available(true);
    let back = Instant::now();
    registration.registered().await.expect("it is there now");
    assert!(back.elapsed() < SECOND, "{:?}", back.elapsed());
    assert!(next(&mut events).await.starts_with("registered"));
}

#[tokio::test(start_paused = true)]
async fn an_outage_is_told_and_what_is_still_there_is_not_lost() {
    let registry = MemoryRegistry::new();
    let (mut registration, mut events) = held(&registry, echo()).await;
    let (_, generation, _) = there(&registry).await.expect("it is there");
    registry.set_available(false);
    assert!(next(&mut events).await.starts_with("not confirmed"));
    let state = registration.state();
    assert!(
        matches!(state, RegistrationState::Unreachable { .. }),
        "{state}"
    );
    let error = registration.stopping().await.expect_err("it is away");
    assert_eq!(error.kind(), Kind::RegistryUnreachable);
    assert!(!registration.session().is_stopping());
    time::sleep(SECOND).await;
    registry.set_available(true);
    assert_eq!(next(&mut events).await, "confirmed again");
    assert_eq!(there(&registry).await, Some((echo(), generation, true)));
}

#[tokio::test(start_paused = true)]
async fn a_key_that_is_deleted_time_and_again_is_no_busy_loop() {
    let registry = MemoryRegistry::new();
    let (_registration, _events) = held(&registry, echo()).await;
    let before = registry.revision();
    let until = Instant::now() + 10 * SECOND;
    while Instant::now() < until {
        registry.delete("echo/7");
        time::sleep(Duration::from_millis(1)).await;
    }
    // Each time there are two: a write and its delete.
    let times = (registry.revision() - before) / 2;
    assert!((8..40).contains(&times), "{times} times in 10 s");
}

#[tokio::test(start_paused = true)]
async fn nothing_is_left_of_a_registration_that_is_let_go_of() {
    let registry = MemoryRegistry::new();
    let gone = || async {
        time::sleep(SECOND).await;
        there(&registry).await.is_none()
    };
    // By its handle, by who waits for it, before and while it is made.
    drop(held(&registry, echo()).await);
    assert!(gone().await);
    let mut making = registry.register(echo()).into_future();
    assert!(
        (&mut making).now_or_never().is_none(),
        "its task has not run"
    );
    drop(making);
    assert!(gone().await);
    let (registration, mut events) = held(&registry, echo()).await;
    registration.deregister().await.expect("it answers");
    assert!(there(&registry).await.is_none());
    assert_eq!(next(&mut events).await, "ended");
    assert!(events.next().await.is_none(), "that was the last");
    let alive = tokio::runtime::Handle::current()
        .metrics()
        .num_alive_tasks();
    assert_eq!(alive, 0, "no task is left");
}

#[tokio::test(start_paused = true)]
async fn ids_are_given_once() {
    let registry = MemoryRegistry::new();
    let ids = (0..100).map(|_| registry.allocate_id());
    let ids: Result<Vec<_>, _> = future::join_all(ids).await.into_iter().collect();
    let mut ids = ids.expect("the counter counts");
    ids.sort_unstable();
    assert_eq!(ids, (1..=100).collect::<Vec<_>>());
    registry.put("id", "7");
    assert_eq!(registry.allocate_id().await.expect("a number"), 7);
    for bad in ["", "x", "-1", "18446744073709551615"] {
        registry.put("id", bad);
        let error = registry.allocate_id().await.expect_err(bad);
        assert!(
            error.to_string().contains("not a number below 2^64 - 1"),
            "{error}"
        );
    }
}

/// What a registration says and what the registry has, after whatever happens to it.
#[tokio::test(start_paused = true)]
async fn whatever_happens_it_is_there_in_the_end_exactly_as_it_was_last_told() {
    for seed in 0..30 {
        let mut random = fastrand::Rng::with_seed(seed);
        let registry = MemoryRegistry::new();
        let (mut registration, _events) = held(&registry, echo()).await;
        for step in 0..200_u32 {
            match random.u8(0..12) {
                0 => registry.set_available(false),
                1 | 2 => registry.set_available(true),
                3 => registry.compact(),
                4 | 5 => drop(registry.delete("echo/7")),
                6 => registry.put("echo/7", "x"),
                7 => registry.end_lease_of("echo/7"),
                8 => {
                    let version = step.to_string();
                    let update = registration.update(|s| s.with_version(version));
                    // It may be refused, by an outage.
                    let _ = update.await;
                }
                _ => {}
            }
            if random.bool() {
                time::sleep(Duration::from_millis(random.u64(0..2000))).await;
            }
        }
        registry.set_available(true);
        // What another has put there is another's.
        registry.delete("echo/7");
        time::sleep(20 * SECOND).await;
        let (session, generation, leased) = there(&registry).await.expect("it is there");
        assert!(leased, "seed {seed}");
        assert_eq!(&session, registration.session(), "seed {seed}");
        assert_eq!(registration.registered().await.expect("it is"), generation);
        registration.deregister().await.expect("it answers");
        assert!(there(&registry).await.is_none(), "seed {seed}");
    }
}

/// A store that revokes leases, but not these, and says which it was asked to.
#[derive(Debug)]
struct Keeps {
    kept: &'static [i64],
    asked: Mutex<Vec<i64>>,
}

impl Store for Keeps {
    fn list<'a>(&'a self, _: &'a Scope) -> BoxFuture<'a, Result<Listing, BoxError>> {
        unreachable!("leases are revoked and nothing else")
    }

    fn watch(self: Arc<Self>, _: &Scope, _: u64) -> BoxFuture<'_, Result<Watch, Broken>> {
        unreachable!("leases are revoked and nothing else")
    }

    fn get<'a>(&'a self, _: &'a Bytes) -> BoxFuture<'a, Result<Option<Record>, Error>> {
        unreachable!("leases are revoked and nothing else")
    }

    fn grant(&self, _: i64, _: Duration) -> BoxFuture<'_, Result<(), Error>> {
        unreachable!("leases are revoked and nothing else")
    }

    fn keep_alive(&self, _: i64, _: Duration) -> BoxFuture<'_, Result<bool, Error>> {
        unreachable!("leases are revoked and nothing else")
    }

    fn write(&self, _: Write) -> BoxFuture<'_, Result<Written, Error>> {
        unreachable!("leases are revoked and nothing else")
    }

    fn revoke(&self, lease: i64) -> BoxFuture<'_, Result<(), Error>> {
        self.asked.lock().unwrap().push(lease);
        let result =
            match self.kept.contains(&lease) {
                false => Ok(()),
                true => Err(Error::new(Kind::RegistryUnreachable)
                    .with_reason(format!("lease {lease} stays"))),
            };
        Box::pin(std::future::ready(result))
    }
}

#[tokio::test]
async fn all_leases_are_revoked_whichever_of_them_fail_and_the_first_error_is_told() {
    for (kept, told) in [
        (&[][..], None),
        (&[2][..], Some("lease 2 stays")),
        (&[3][..], Some("lease 3 stays")),
        (&[1, 2, 3][..], Some("lease 1 stays")),
    ] {
        // Given a live lease, 1, two that are doubtful, and a store that fails to revoke some
        let store = Arc::new(Keeps {
            kept,
            asked: Mutex::default(),
        });
        let home = Home::new(store.clone(), Backoff::default(), "", SECOND);
        let (_updates, updated) = mpsc::channel(1);
        let mut keeper = Keeper::new(home, Arc::new(echo()), Board::new(), updated, Weak::new());
        keeper.confirm(1);
        keeper.doubtful = vec![3, 2];

        // When it is released
        let released = keeper.release().await;

        // Then each was asked for, the live one first, and the first error is reported
        assert_eq!(*store.asked.lock().unwrap(), [1, 2, 3]);
        match (released, told) {
            (Ok(()), None) => {}
            (Err(error), Some(told)) => assert!(error.to_string().contains(told), "{error}"),
            (released, told) => panic!("{released:?} instead of {told:?}"),
        }
    }
}

/// The memory's store, where leases run out just before the first so many writes that would need them.
#[derive(Debug)]
struct Hasty {
    store: Arc<dyn Store>,
    left: Mutex<u32>,
    writes: Mutex<u32>,
}

impl Store for Hasty {
    fn list<'a>(&'a self, scope: &'a Scope) -> BoxFuture<'a, Result<Listing, BoxError>> {
        self.store.list(scope)
    }

    fn watch(self: Arc<Self>, scope: &Scope, from: u64) -> BoxFuture<'_, Result<Watch, Broken>> {
        let _ = (scope, from);
        unreachable!("nothing is watched")
    }

    fn get<'a>(&'a self, key: &'a Bytes) -> BoxFuture<'a, Result<Option<Record>, Error>> {
        self.store.get(key)
    }

    fn grant(&self, lease: i64, ttl: Duration) -> BoxFuture<'_, Result<(), Error>> {
        self.store.grant(lease, ttl)
    }

    fn keep_alive(&self, lease: i64, ttl: Duration) -> BoxFuture<'_, Result<bool, Error>> {
        self.store.keep_alive(lease, ttl)
    }

    fn write(&self, write: Write) -> BoxFuture<'_, Result<Written, Error>> {
        *self.writes.lock().unwrap() += 1;
        let runs_out = {
            let mut left = self.left.lock().unwrap();
            let runs_out = *left > 0;
            *left = left.saturating_sub(1);
            runs_out
        };
        Box::pin(async move {
            if runs_out {
                self.store.revoke(write.lease).await?;
            }
            self.store.write(write).await
        })
    }

    fn revoke(&self, lease: i64) -> BoxFuture<'_, Result<(), Error>> {
        self.store.revoke(lease)
    }
}

#[tokio::test]
async fn a_lease_that_ran_out_before_anything_was_under_it_is_replaced_once() {
    for (times, held, writes) in [(0, true, 1), (1, true, 2), (2, false, 2)] {
        let memory = MemoryRegistry::new();
        let store = Arc::new(Hasty {
            store: memory.store(),
            left: Mutex::new(times),
            writes: Mutex::default(),
        });
        let home = Home::new(store.clone(), Backoff::default(), "", SECOND);
        let (_updates, updated) = mpsc::channel(1);
        let mut keeper = Keeper::new(home, Arc::new(echo()), Board::new(), updated, Weak::new());
        let claimed = keeper.claim().await;
        match claimed {
            Ok(Claimed::Held(_)) => assert!(held, "{times}"),
            Ok(_) => panic!("it is nobody else's"),
            Err(error) => assert!(!held && error.kind() == Kind::RegistryRefused, "{error}"),
        }
        assert_eq!(*store.writes.lock().unwrap(), writes, "{times}");
    }
}
