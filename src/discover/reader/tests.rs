use std::{collections::BTreeMap, sync::Mutex, time::Duration};

use bytes::Bytes;
use futures_util::{FutureExt as _, Stream, StreamExt as _, stream};
use tokio::{
    sync::mpsc,
    time::{self, Instant},
};

use super::*;
use crate::{
    Backoff, Error, Registry as _,
    discover::{Change, Discovery},
    endpoint::{BoxFuture, Target as _},
    error::BoxError,
    registry::{
        MemoryRegistry, Naming, Session,
        feed::Hub,
        store::{Broken, Listing, Scope, Store, Watch, Write, Written},
    },
};

type Told = Result<Vec<Event>, Broken>;

/// A store that does as it is told.
#[derive(Debug, Default)]
struct Scripted {
    lists: Mutex<VecDeque<Result<Listing, BoxError>>>,
    watches: Mutex<VecDeque<mpsc::UnboundedReceiver<Told>>>,
    calls: Mutex<Vec<String>>,
    started: Mutex<Option<Instant>>,
}

impl Scripted {
    fn next_list(&self, revision: u64, records: &[Record]) -> &Self {
        let records = records.to_vec();
        self.lists.lock().unwrap().push_back(Ok(Listing {
            records,
            revision,
            cluster: 0,
        }));
        self
    }

    fn no_list(&self, why: &str) -> &Self {
        self.lists.lock().unwrap().push_back(Err(why.into()));
        self
    }

    fn next_watch(&self) -> mpsc::UnboundedSender<Result<Vec<Event>, Broken>> {
        let (tx, rx) = mpsc::unbounded_channel();
        self.watches.lock().unwrap().push_back(rx);
        tx
    }

    fn call(&self, what: String) {
        let mut started = self.started.lock().unwrap();
        let at = started.get_or_insert_with(Instant::now).elapsed();
        self.calls
            .lock()
            .unwrap()
            .push(format!("{what} {}", at.as_millis()));
    }

    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }
}

impl Store for Scripted {
    fn list<'a>(&'a self, scope: &'a Scope) -> BoxFuture<'a, Result<Listing, BoxError>> {
        assert_eq!(*scope, Scope::Prefix("demo/echo/".into()));
        self.call("list".to_owned());
        let next = self.lists.lock().unwrap().pop_front();
        Box::pin(async move {
            match next {
                Some(result) => result,
                None => std::future::pending().await,
            }
        })
    }

    fn watch(self: Arc<Self>, _: &Scope, from: u64) -> BoxFuture<'_, Result<Watch, Broken>> {
        self.call(format!("watch from {from}"));
        let next = self.watches.lock().unwrap().pop_front();
        Box::pin(async move {
            let Some(rx) = next else {
                return Err(Broken::Lost("no watch".into()));
            };
            let watch: Watch = Box::pin(stream::unfold(rx, async |mut rx| {
                Some((rx.recv().await?, rx))
            }));
            Ok(watch)
        })
    }

    fn get<'a>(&'a self, _: &'a Bytes) -> BoxFuture<'a, Result<Option<Record>, Error>> {
        unreachable!("discovery only lists and watches")
    }

    fn grant(&self, _: i64, _: Duration) -> BoxFuture<'_, Result<(), Error>> {
        unreachable!("discovery only lists and watches")
    }

    fn keep_alive(&self, _: i64, _: Duration) -> BoxFuture<'_, Result<bool, Error>> {
        unreachable!("discovery only lists and watches")
    }

    fn revoke(&self, _: i64) -> BoxFuture<'_, Result<(), Error>> {
        unreachable!("discovery only lists and watches")
    }

    fn write(&self, _: Write) -> BoxFuture<'_, Result<Written, Error>> {
        unreachable!("discovery only lists and watches")
    }
}

fn record(id: u32, created: u64, modified: u64) -> Record {
    let session = Session::new("echo", format!("h:{id}")).with_id(id);
    let value = Naming.encode(&session, 0).expect("it can be written");
    raw(&id.to_string(), &value, created, modified)
}

fn raw(id: &str, value: &[u8], created: u64, modified: u64) -> Record {
    let key = format!("demo/echo/{id}");
    Record::new(key.as_bytes(), value, created, modified, 0)
}

fn hub(store: Arc<dyn Store>) -> Arc<Hub> {
    let ms = Duration::from_millis;
    // Without a spread, so that times can be told.
    let backoff = Backoff::new(ms(100), 2.0, ms(1000), 0.0).expect("a good backoff");
    Hub::new(store, backoff)
}

fn discovery(hub: &Arc<Hub>, codec: impl Codec) -> Discovery {
    Discovery::reading(Settings {
        news: hub.subscribe(Scope::Prefix("demo/echo/".into())),
        codec: Arc::new(codec),
        root: "demo".into(),
        role: "echo".into(),
    })
}

fn show(update: Update<Key, Arc<Member>>) -> String {
    match update {
        Update::Change(Change::Insert(key, m)) if m.barred().is_some() => format!("!{key}"),
        Update::Change(Change::Insert(key, _)) => format!("+{key}"),
        Update::Change(Change::Remove(key)) => format!("-{key}"),
        Update::Synced => "synced".to_owned(),
        Update::Stale(why) => format!("stale: {why}"),
    }
    .replace("demo/echo/", "")
}

/// All that is said until nothing more comes for a while.
async fn heard(
    updates: &mut (impl Stream<Item = Update<Key, Arc<Member>>> + Unpin),
) -> Vec<String> {
    let mut heard = Vec::new();
    let quiet = Duration::from_millis(50);
    while let Ok(Some(update)) = time::timeout(quiet, updates.next()).await {
        heard.push(show(update));
    }
    heard
}

#[tokio::test(start_paused = true)]
async fn a_watch_goes_on_from_the_revision_after_the_list() {
    let store = Arc::new(Scripted::default());
    store.next_list(10, &[record(1, 3, 3)]);
    let watch = store.next_watch();
    let mut updates = discovery(&hub(store.clone()), Naming).updates();
    assert_eq!(heard(&mut updates).await, ["+1@3", "synced"]);
    assert_eq!(store.calls(), ["list 0", "watch from 11 0"]);

    watch
        .send(Ok(vec![
            Event::Put(record(2, 11, 11)),
            Event::Delete("demo/echo/1".into()),
        ]))
        .unwrap();
    watch.send(Ok(vec![])).unwrap();
    watch
        .send(Ok(vec![Event::Delete("demo/echo/9".into())]))
        .unwrap();
    assert_eq!(heard(&mut updates).await, ["-1@3", "+2@11"]);
}

#[tokio::test(start_paused = true)]
async fn a_broken_watch_is_followed_by_a_list_and_the_difference() {
    for why in [
        Some(Broken::Compacted { at: 12 }),
        Some(Broken::Lost("reset".into())),
        None,
    ] {
        let store = Arc::new(Scripted::default());
        store.next_list(10, &[record(1, 3, 3), record(2, 4, 4), record(3, 5, 5)]);
        let watch = store.next_watch();
        let mut updates = discovery(&hub(store.clone()), Naming).updates();
        assert_eq!(heard(&mut updates).await.len(), 4);
        time::advance(Duration::from_secs(1)).await;
        store.calls();

        // 1 stays, 2 changes, 3 goes, 4 comes.
        store.next_list(20, &[record(1, 3, 3), record(2, 4, 15), record(4, 16, 16)]);
        let _watch = store.next_watch();
        let before = Instant::now();
        match why {
            Some(why) => watch.send(Err(why)).unwrap(),
            None => drop(watch),
        }
        let mut all = Vec::new();
        while !all.iter().any(|a| a == "synced") {
            all.push(show(updates.next().await.expect("it has no end")));
        }
        assert!(all[0].starts_with("stale: the watch"), "{all:?}");
        assert_eq!(all[1..], ["-3@5", "+2@4", "+4@16", "synced"]);
        assert!(
            before.elapsed() <= Duration::from_millis(500),
            "{:?}",
            before.elapsed()
        );
        assert!(heard(&mut updates).await.is_empty());
        let calls = store.calls();
        assert!(
            calls[0].starts_with("list") && calls[1].starts_with("watch from 21"),
            "{calls:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn failures_back_off_and_are_told_when_they_change() {
    let store = Arc::new(Scripted::default());
    store
        .no_list("refused")
        .no_list("refused")
        .no_list("timed out")
        .no_list("timed out");
    // Then a list, but no watch; then all is well.
    store
        .next_list(10, &[record(1, 3, 3)])
        .next_list(11, &[record(1, 3, 3)]);
    let mut updates = discovery(&hub(store.clone()), Naming).updates();
    let mut all = Vec::new();
    while all.iter().filter(|a| *a == "synced").count() < 2 {
        all.push(show(updates.next().await.expect("it has no end")));
    }
    assert_eq!(
        all,
        [
            "stale: refused",
            "stale: timed out",
            "+1@3",
            "synced",
            "stale: the watch broke: no watch",
            "synced"
        ]
    );
    assert_eq!(
        store.calls(),
        [
            "list 0",
            "list 100",
            "list 300",
            "list 700",
            "list 1500",
            "watch from 11 1500",
            "list 2500",
            "watch from 12 2500"
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_breaks_at_once_each_time_is_no_busy_loop() {
    let store = Arc::new(Scripted::default());
    for revision in 0..20 {
        store.next_list(revision, &[]);
        drop(store.next_watch());
    }
    let mut updates = discovery(&hub(store.clone()), Naming).updates();
    let deadline = Instant::now() + Duration::from_secs(5);
    while time::timeout_at(deadline, updates.next()).await.is_ok() {}
    // At 0, 100, 300, 700, 1500, 2500, 3500 and 4500.
    let lists = store
        .calls()
        .iter()
        .filter(|c| c.starts_with("list"))
        .count();
    assert_eq!(lists, 8);
}

#[tokio::test(start_paused = true)]
async fn who_is_forgotten_by_a_registry_that_was_rebuilt_has_a_while_to_return() {
    // Given four sessions, of which the last was seen by a watch
    let store = Arc::new(Scripted::default());
    store.next_list(4, &[record(1, 2, 2), record(2, 3, 3), record(3, 4, 4)]);
    let first = store.next_watch();
    let mut updates = discovery(&hub(store.clone()), Naming).updates();
    assert_eq!(heard(&mut updates).await.len(), 4);
    first.send(Ok(vec![Event::Put(record(4, 5, 5))])).unwrap();
    assert_eq!(heard(&mut updates).await, ["+4@5"]);

    // When the registry begins anew, and one of them is back: at the revision of the first list, but not of all that
    // was seen
    store.next_list(4, &[record(3, 4, 4)]);
    let watch = store.next_watch();
    time::advance(Duration::from_secs(1)).await;
    drop(first);
    assert!(matches!(updates.next().await, Some(Update::Stale(_))));

    // Then nobody is taken for gone, and that it is not known for certain is told
    time::advance(Duration::from_secs(1)).await;
    let told = heard(&mut updates).await;
    assert_eq!(told[0], "synced");
    assert!(told[1].contains("does not know 3 of those"), "{told:?}");

    // And who returns, be it with the same words under the same revisions, is not forgotten when the time is over
    let same = record(2, 3, 3);
    watch
        .send(Ok(vec![Event::Put(same), Event::Put(record(1, 7, 7))]))
        .unwrap();
    // Its end was not seen: it stops before it goes.
    assert_eq!(heard(&mut updates).await, ["+1@2", "-1@2", "+1@7"]);
    let mut told = Vec::new();
    while told.last().is_none_or(|last| last != "synced") {
        told.push(show(updates.next().await.expect("it has no end")));
    }
    assert_eq!(told, ["-4@5", "synced"]);
}

#[tokio::test(start_paused = true)]
async fn an_empty_list_is_looked_at_twice() {
    let store = Arc::new(Scripted::default());
    store.next_list(4, &[record(1, 2, 2)]);
    drop(store.next_watch());
    store.next_list(9, &[]).next_list(10, &[record(1, 2, 2)]);
    drop(store.next_watch());
    store.next_list(11, &[]).next_list(12, &[]);
    let _watch = store.next_watch();
    let mut updates = discovery(&hub(store.clone()), Naming).updates();
    let mut told = Vec::new();
    while told.iter().filter(|told| *told == "synced").count() < 3 {
        told.push(show(updates.next().await.expect("it has no end")));
    }
    let doubt =
        "stale: the registry answered with nothing under *, where there were 1; it is asked again";
    let broken = "stale: the watch broke: it ended";
    assert_eq!(
        told,
        [
            "+1@2", "synced", broken, doubt, "synced", broken, doubt, "-1@2", "synced"
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_bad_record_costs_only_itself_and_is_counted_once() {
    let store = Arc::new(Scripted::default());
    let bad = raw("bad", b"{", 4, 4);
    let mut not_text = record(9, 5, 5);
    not_text.key = Bytes::from_static(b"demo/echo/\xff");
    store.next_list(10, &[bad.clone(), record(1, 3, 3), not_text.clone()]);
    let watch = store.next_watch();
    let discovery = discovery(&hub(store.clone()), Naming);
    let skipped = discovery.skipped();
    let mut updates = discovery.updates();
    assert_eq!(heard(&mut updates).await, ["+1@3", "synced"]);
    assert_eq!((skipped.now(), skipped.total()), (2, 2));

    // Listed again as they were; then one is mended, and a good one is spoilt.
    store.next_list(12, &[bad, record(1, 3, 3), not_text]);
    let second = store.next_watch();
    drop(watch);
    assert!(matches!(updates.next().await, Some(Update::Stale(_))));
    assert!(matches!(updates.next().await, Some(Update::Synced)));
    assert!(heard(&mut updates).await.is_empty());
    assert_eq!((skipped.now(), skipped.total()), (2, 2));
    let mut mended = record(7, 4, 13);
    mended.key = "demo/echo/bad".into();
    let spoilt = raw("1", b"", 3, 14);
    second
        .send(Ok(vec![Event::Put(mended), Event::Put(spoilt)]))
        .unwrap();
    assert_eq!(heard(&mut updates).await, ["-1@3", "+bad@4"]);
    assert_eq!((skipped.now(), skipped.total()), (2, 3));
    let gone = Event::Delete("demo/echo/1".into());
    second.send(Ok(vec![gone])).unwrap();
    assert!(heard(&mut updates).await.is_empty());
    assert_eq!((skipped.now(), skipped.total()), (1, 3));
}

/// [`Naming`], with a decoder that panics over some values.
#[derive(Debug)]
struct Panicky;

impl Codec for Panicky {
    fn prefix(&self, root: &str, role: &str) -> String {
        Naming.prefix(root, role)
    }

    fn key(&self, root: &str, session: &Session) -> String {
        Naming.key(root, session)
    }

    fn encode(&self, session: &Session, lease: i64) -> Result<Vec<u8>, crate::Error> {
        Naming.encode(session, lease)
    }

    fn decode(
        &self,
        root: &str,
        role: &str,
        key: &str,
        value: &[u8],
    ) -> Result<Option<Session>, BadRecord> {
        match value {
            b"plain" => panic!("a plain bug"),
            b"formatted" => panic!("a bug over {key}"),
            b"other" => std::panic::panic_any(42),
            _ => Naming.decode(root, role, key, value),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_codec_that_panics_over_a_record_costs_only_that_record() {
    // Given a codec that panics over three of the four records that are listed
    let store = Arc::new(Scripted::default());
    store.next_list(
        10,
        &[
            raw("a", b"plain", 2, 2),
            record(1, 3, 3),
            raw("b", b"formatted", 4, 4),
            raw("c", b"other", 5, 5),
        ],
    );
    let watch = store.next_watch();
    let discovery = discovery(&hub(store.clone()), Panicky);
    let skipped = discovery.skipped();
    let mut updates = discovery.updates();

    // When the role is discovered
    let first = heard(&mut updates).await;

    // Then the fourth is there, and the three are counted
    assert_eq!(first, ["+1@3", "synced"]);
    assert_eq!((skipped.now(), skipped.total()), (3, 3));

    // When the watch brings one more of either
    let events = vec![
        Event::Put(raw("d", b"plain", 11, 11)),
        Event::Put(record(2, 12, 12)),
    ];
    watch.send(Ok(events)).unwrap();

    // Then it is the same
    assert_eq!(heard(&mut updates).await, ["+2@12"]);
    assert_eq!((skipped.now(), skipped.total()), (4, 4));
}

#[test]
fn the_panic_of_a_codec_is_in_the_words_of_the_bad_record() {
    for (value, says) in [
        ("plain", "the codec panicked over it: a plain bug"),
        ("formatted", "the codec panicked over it: a bug over k"),
        ("other", "the codec panicked over it"),
    ] {
        let decoded = codec::decode(&Panicky, "demo", "echo", "k", value.as_bytes());
        assert_eq!(decoded.expect_err(says).to_string(), says);
    }
}

/// What is known of the role from what was said, and whether it is up to date.
#[derive(Default)]
struct View {
    members: BTreeMap<Key, Arc<Member>>,
    synced: bool,
}

impl View {
    fn take(&mut self, update: Update<Key, Arc<Member>>) {
        match update {
            Update::Change(Change::Insert(key, member)) => drop(self.members.insert(key, member)),
            Update::Change(Change::Remove(key)) => {
                self.members.remove(&key).expect("only what is there goes");
            }
            Update::Synced => self.synced = true,
            Update::Stale(_) => self.synced = false,
        }
    }
}

#[tokio::test(start_paused = true)]
async fn through_outages_and_compactions_the_view_is_exact_in_the_end() {
    for seed in 0..10 {
        let mut random = fastrand::Rng::with_seed(seed);
        let registry = MemoryRegistry::new();
        let mut updates = registry.discover("echo").expect("a good role").updates();
        let mut view = View::default();
        for _ in 0..200 {
            match random.u8(0..12) {
                0 => registry.compact(),
                1 => registry.set_available(false),
                2 | 3 => registry.set_available(true),
                4..7 => drop(registry.delete(&format!("echo/{}", random.u8(0..10)))),
                _ => {
                    let id = random.u8(0..10);
                    let session = Session::new("echo", format!("h:{}", random.u8(1..20)));
                    let value = Naming
                        .encode(&session.with_id(u32::from(id)), 0)
                        .expect("good");
                    registry.put(format!("echo/{id}"), value);
                }
            }
            if random.bool() {
                time::advance(Duration::from_millis(random.u64(0..300))).await;
            }
            // The feed's task has its turn, and then we.
            for _ in 0..4 {
                tokio::task::yield_now().await;
                while let Some(Some(update)) = updates.next().now_or_never() {
                    view.take(update);
                }
            }
        }
        registry.set_available(true);
        let settle = Instant::now() + Duration::from_secs(10);
        while let Ok(Some(update)) = time::timeout_at(settle, updates.next()).await {
            view.take(update);
        }
        assert!(view.synced, "seed {seed}");
        let mut fresh = View::default();
        let mut again = registry.discover("echo").expect("a good role").updates();
        while !fresh.synced {
            fresh.take(again.next().await.expect("it has no end"));
        }
        assert_eq!(view.members, fresh.members, "seed {seed}");
    }
}

#[tokio::test(start_paused = true)]
async fn tower_sees_changes_and_errors_but_no_end() {
    fn is_discover<D: tower::discover::Discover>(discover: D) -> D {
        discover
    }
    let registry = MemoryRegistry::new();
    let _one = registry
        .register(Session::new("echo", "h:1"))
        .await
        .expect("it is free");
    let mut discovery = is_discover(registry.discover("echo").expect("a good role"));
    let first = discovery.next().await;
    assert!(matches!(first, Some(Ok(Change::Insert(..)))), "{first:?}");
    registry.set_available(false);
    let error = discovery
        .next()
        .await
        .expect("no end")
        .expect_err("an outage");
    assert_eq!(error.kind(), crate::Kind::RegistryUnreachable);
    assert!(
        error.to_string().contains("role echo are the last known"),
        "{error}"
    );
}
