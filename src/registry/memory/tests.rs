use std::future::IntoFuture as _;

use futures_util::{FutureExt as _, StreamExt as _};

use tokio::time;

use super::*;
use crate::{
    discover::{Change, Update},
    registry::store::{Broken, Event, Scope, Store as _},
};

const SECOND: Duration = Duration::from_secs(1);

fn echo() -> Session {
    Session::new("echo", "h:1").with_id(7)
}

fn scope() -> Scope {
    Scope::Prefix("echo/".into())
}

fn ids(registry: &MemoryRegistry) -> Vec<String> {
    let listing = registry.shared.lock().history.list(&scope());
    let keys = listing
        .records
        .iter()
        .map(|r| String::from_utf8_lossy(&r.key).into_owned());
    keys.collect()
}

#[test]
fn it_is_made_and_written_without_a_runtime() {
    let registry = MemoryRegistry::new();
    registry.put("echo/1", "x");
    assert!(registry.delete("echo/1"));
    assert!(!registry.delete("echo/1"));
    assert_eq!(registry.revision(), 3);
    let registered = registry.register(echo()).into_future().now_or_never();
    let error = registered
        .expect("at once")
        .expect_err("there is no runtime");
    assert!(
        error.to_string().contains("outside a tokio runtime"),
        "{error}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_key_that_is_held_is_refused_and_the_holder_named() {
    let registry = MemoryRegistry::new();
    let held = registry
        .register(echo().with_version("2.6"))
        .await
        .expect("it is free");
    let other = Session::new("echo", "h:2").with_id(7);
    let error = registry
        .register(other.clone())
        .await
        .expect_err("it is held");
    assert_eq!(error.kind(), Kind::AlreadyRegistered);
    assert_eq!(
        error.to_string(),
        "already registered, role echo: key echo/7 is held by instance 7 at h:1, version 2.6"
    );
    drop(held);
    // It is removed in the background.
    let waiting = registry.register(other).wait(SECOND).expect("a good wait");
    let _held = waiting.await.expect("it is free again");
    let bad = registry.register(Session::new("echo", "nowhere")).await;
    assert_eq!(bad.expect_err("no address").kind(), Kind::Invalid);
}

#[tokio::test(start_paused = true)]
async fn an_abandoned_session_ends_with_its_ttl_and_watchers_hear_of_it() {
    let registry = MemoryRegistry::new()
        .with_ttl(2 * SECOND)
        .expect("a good TTL");
    let held = registry.register(echo()).await.expect("it is free");
    let mut updates = registry.discover("echo").expect("a good role").updates();
    for _ in 0..2 {
        updates.next().await;
    }
    time::sleep(60 * SECOND).await;
    assert_eq!(ids(&registry), ["echo/7"], "it is kept while it is held");

    let before = Instant::now();
    held.abandon();
    let update = updates.next().await;
    assert!(
        matches!(update, Some(Update::Change(Change::Remove(_)))),
        "{update:?}"
    );
    let took = before.elapsed();
    // Its last sign of life was up to a third of the TTL ago.
    assert!(
        took >= 4 * SECOND / 3 && took < 2 * SECOND + SECOND / 10,
        "{took:?}"
    );
    assert!(ids(&registry).is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_outage_stops_clients_and_expiry_and_leases_start_again_after_it() {
    let registry = MemoryRegistry::new();
    let mut held = registry.register(echo()).await.expect("it is free");
    let other = registry
        .register(Session::new("echo", "h:2"))
        .await
        .expect("it is free");
    other.abandon();
    time::sleep(9 * SECOND).await;
    registry.set_available(false);
    let error = held.stopping().await.expect_err("an outage");
    assert_eq!(error.kind(), Kind::RegistryUnreachable);
    assert!(!held.session().is_stopping());
    let error = registry
        .register(Session::new("echo", "h:3"))
        .await
        .expect_err("an outage");
    assert!(
        error.to_string().starts_with("registry unreachable: "),
        "{error}"
    );
    time::sleep(60 * SECOND).await;
    registry.set_available(true);
    time::sleep(9 * SECOND).await;
    assert_eq!(ids(&registry), ["echo/7", "echo/h:2"]);
    time::sleep(2 * SECOND).await;
    assert_eq!(ids(&registry), ["echo/7"]);
    held.stopping().await.expect("it is over");

    registry.set_available(false);
    held.deregister().await.expect_err("an outage");
    registry.set_available(true);
    assert_eq!(ids(&registry), ["echo/7"]);
    time::sleep(10 * SECOND).await;
    assert!(ids(&registry).is_empty(), "it ends with its TTL");
}

#[tokio::test(start_paused = true)]
async fn an_update_keeps_the_generation_and_who_it_is() {
    let registry = MemoryRegistry::new();
    let mut held = registry.register(echo()).await.expect("it is free");
    held.update(|s| s.with_weight(3))
        .await
        .expect("a good change");
    assert_eq!(held.session().weight(), 3);
    let record = registry
        .shared
        .lock()
        .history
        .get(b"echo/7")
        .cloned()
        .expect("it is there");
    assert_eq!((record.created, record.modified), (2, 3));

    let error = held.update(|s| s.with_id(8)).await.expect_err("another");
    assert_eq!(error.kind(), Kind::Invalid);
    let error = held
        .update(|s| s.with_weight(0))
        .await
        .expect_err("no weight");
    assert_eq!(error.kind(), Kind::Invalid);

    let error = held.update(|s| s.with_exclusive(true)).await;
    assert_eq!(error.expect_err("another key").kind(), Kind::Invalid);
}

#[tokio::test(start_paused = true)]
async fn a_watch_begins_where_it_is_told_and_not_before_what_is_compacted() {
    let registry = MemoryRegistry::new();
    for value in ["a", "b", "c"] {
        registry.put("echo/1", value);
    }
    registry.put("other/1", "x");
    let mut watch = registry
        .shared
        .clone()
        .watch(&scope(), 3)
        .await
        .expect("history is there");
    let events = watch.next().await.expect("no end").expect("not compacted");
    assert_eq!(events.len(), 2, "{events:?}");
    assert!(
        matches!(&events[0], Event::Put(r) if (r.created, r.modified) == (2, 3)),
        "{events:?}"
    );

    registry.compact();
    registry.put("echo/1", "d");
    assert_eq!(
        watch
            .next()
            .await
            .expect("no end")
            .expect("it was up to date")
            .len(),
        1
    );
    let mut late = registry
        .shared
        .clone()
        .watch(&scope(), 3)
        .await
        .expect("established");
    let broken = late.next().await;
    assert!(
        matches!(broken, Some(Err(Broken::Compacted { at: 5 }))),
        "{broken:?}"
    );
    assert!(late.next().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn history_is_bounded() {
    let registry = MemoryRegistry::new();
    for n in 0..10_100 {
        registry.put("echo/1", n.to_string());
    }
    let mut watch = registry
        .shared
        .clone()
        .watch(&scope(), 2)
        .await
        .expect("established");
    let broken = watch.next().await;
    assert!(
        matches!(broken, Some(Err(Broken::Compacted { .. }))),
        "{broken:?}"
    );
}
