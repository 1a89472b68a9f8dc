use std::time::Duration;

use futures_util::{FutureExt as _, future};
use tokio::time::{self, Instant};

use super::*;
use crate::{
    Session,
    endpoint::BoxFuture,
    error::BoxError,
    registry::{
        MemoryRegistry, Register,
        home::{self, Home},
        store::{Broken, Watch, Write, Written},
    },
};

/// A store that notes when it is asked for lists and beats.
#[derive(Debug)]
struct Noting {
    inner: Arc<dyn Store>,
    lists: Mutex<Vec<Instant>>,
    beats: Mutex<Vec<Instant>>,
}

impl Noting {
    fn new(registry: &MemoryRegistry) -> Arc<Self> {
        Arc::new(Self {
            inner: registry.store(),
            lists: Mutex::default(),
            beats: Mutex::default(),
        })
    }

    /// How many came in the busiest 50 ms of all after this, and when the last of them came that was the first of
    /// whoever asked.
    fn busiest(of: &Mutex<Vec<Instant>>, after: Instant) -> (usize, usize) {
        let all = of.lock().unwrap();
        let since: Vec<_> = all.iter().filter(|at| **at >= after).collect();
        let window = |from: &Instant| {
            let within = |at: &&&Instant| (0..50).contains(&(***at - *from).as_millis());
            since
                .iter()
                .filter(within)
                .filter(|at| ***at >= *from)
                .count()
        };
        (
            since.iter().map(|at| window(at)).max().unwrap_or(0),
            since.len(),
        )
    }
}

impl Store for Noting {
    fn list<'a>(&'a self, scope: &'a Scope) -> BoxFuture<'a, Result<Listing, BoxError>> {
        self.lists.lock().unwrap().push(Instant::now());
        self.inner.list(scope)
    }

    fn watch(self: Arc<Self>, scope: &Scope, from: u64) -> BoxFuture<'_, Result<Watch, Broken>> {
        let (inner, scope) = (self.inner.clone(), scope.clone());
        Box::pin(async move { inner.watch(&scope, from).await })
    }

    fn get<'a>(&'a self, key: &'a Bytes) -> BoxFuture<'a, Result<Option<Record>, Error>> {
        self.inner.get(key)
    }

    fn grant(&self, lease: i64, ttl: Duration) -> BoxFuture<'_, Result<(), Error>> {
        self.inner.grant(lease, ttl)
    }

    fn keep_alive(&self, lease: i64, within: Duration) -> BoxFuture<'_, Result<bool, Error>> {
        self.beats.lock().unwrap().push(Instant::now());
        self.inner.keep_alive(lease, within)
    }

    fn revoke(&self, lease: i64) -> BoxFuture<'_, Result<(), Error>> {
        self.inner.revoke(lease)
    }

    fn write(&self, write: Write) -> BoxFuture<'_, Result<Written, Error>> {
        self.inner.write(write)
    }
}

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

#[tokio::test(start_paused = true)]
async fn a_thousand_watchers_come_back_spread_out() {
    // Given a thousand who watch, each for itself
    let registry = MemoryRegistry::new();
    let store = Noting::new(&registry);
    let watchers: Vec<_> = (0..1000)
        .map(|_| {
            let hub = Hub::new(store.clone(), home::backoff());
            let mut subscription = hub.subscribe(Scope::Prefix("echo/".into()));
            tokio::spawn(async move {
                loop {
                    subscription.next().await;
                }
            })
        })
        .collect();
    time::sleep(ms(100)).await;
    assert_eq!(store.lists.lock().unwrap().len(), 1000);

    // When all watches break at the same time, and the registry is there
    let broken = Instant::now();
    registry.set_available(false);
    registry.set_available(true);
    time::sleep(ms(1000)).await;

    // Then they list anew within half a second, and never too many of them at a time
    let (busiest, all) = Noting::busiest(&store.lists, broken);
    assert_eq!(all, 1000);
    assert!(busiest < 200, "{busiest} in 50 ms");

    // When it is away for a while, and returns
    registry.set_available(false);
    time::sleep(ms(20_000)).await;
    let back = Instant::now();
    registry.set_available(true);
    time::sleep(ms(1300)).await;

    // Then it is the same, within their longest delay
    let (busiest, all) = Noting::busiest(&store.lists, back);
    assert_eq!(all, 1000);
    assert!(busiest < 150, "{busiest} in 50 ms");
    watchers.iter().for_each(|watcher| watcher.abort());
}

#[tokio::test(start_paused = true)]
async fn a_thousand_registrations_beat_spread_out_and_so_they_come_back() {
    // Given a thousand who registered in the same moment, each for itself
    let registry = MemoryRegistry::new();
    let store = Noting::new(&registry);
    let registering = (0..1000).map(|n| {
        let home = Home::new(store.clone(), home::backoff(), "", MemoryRegistry::TTL);
        let session = Session::new("echo", format!("h:{}", n + 1));
        std::future::IntoFuture::into_future(Register::new(home, session))
    });
    let registered = future::join_all(registering).await;
    assert!(registered.iter().all(Result::is_ok));

    // Then their beats are spread over a second, from the first
    let began = Instant::now();
    time::sleep(ms(10_000)).await;
    let (busiest, all) = Noting::busiest(&store.beats, began);
    assert!((3000..5000).contains(&all), "{all} in 10 s");
    assert!(busiest < 120, "{busiest} in 50 ms");

    // And so they are when the registry was away, and has them all again within two seconds
    registry.set_available(false);
    time::sleep(ms(30_000)).await;
    let back = Instant::now();
    registry.set_available(true);
    let all = future::join_all(registered.iter().flatten().map(|one| one.registered()));
    time::timeout(ms(2000), all)
        .await
        .expect("all are there in time");
    let (busiest, _) = Noting::busiest(&store.beats, back);
    assert!(busiest < 250, "{busiest} in 50 ms");
}

#[tokio::test(start_paused = true)]
async fn readers_share_one_task_which_ends_with_the_last_of_them() {
    let registry = MemoryRegistry::new();
    let store = Noting::new(&registry);
    let hub = Hub::new(store.clone(), home::backoff());
    let alive = || {
        tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks()
    };
    let mut readers: Vec<_> = (0..10)
        .map(|_| hub.subscribe(Scope::Prefix("echo/".into())))
        .collect();
    for reader in &mut readers {
        assert!(matches!(&*reader.next().await, News::Listed(records) if records.is_empty()));
    }
    assert_eq!((alive(), store.lists.lock().unwrap().len()), (1, 1));
    readers.truncate(1);
    registry.put("echo/1", "x");
    assert!(matches!(&*readers[0].next().await, News::Happened(events) if events.len() == 1));
    drop(readers);
    time::sleep(ms(1)).await;
    assert_eq!((alive(), hub.feeds().len()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn who_falls_behind_gets_the_whole_and_holds_up_nobody() {
    let registry = MemoryRegistry::new();
    let hub = Hub::new(registry.store(), home::backoff());
    let mut slow = hub.subscribe(Scope::Prefix("echo/".into()));
    let mut quick = hub.subscribe(Scope::Prefix("echo/".into()));
    slow.next().await;
    quick.next().await;
    for n in 0..2 * NEWS {
        registry.put(format!("echo/{}", n % 10), n.to_string());
        assert!(matches!(&*quick.next().await, News::Happened(_)), "{n}");
    }
    let News::Listed(records) = &*slow.next().await else {
        panic!("it is told all that is there");
    };
    assert_eq!(records.len(), 10);
    assert!(slow.next().now_or_never().is_none(), "and nothing twice");
    registry.put("echo/1", "last");
    assert!(matches!(&*slow.next().await, News::Happened(_)));
}

#[test]
fn a_feed_goes_on_when_the_runtime_of_its_first_reader_ends() {
    // Given two readers, each on a runtime of its own; the first was there first
    let runtime = || {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime")
    };
    let (first, second) = (runtime(), runtime());
    let registry = MemoryRegistry::new();
    let hub = Hub::new(registry.store(), home::backoff());
    let mut one = hub.subscribe(Scope::Prefix("echo/".into()));
    let mut other = hub.subscribe(Scope::Prefix("echo/".into()));
    first.block_on(one.next());
    second.block_on(other.next());

    // When its runtime ends, while the other reads and somebody reads inside the ended one
    let handle = first.handle().clone();
    let reading = second.spawn(async move {
        let mut told = Vec::new();
        let has_it = |news: &News| match news {
            News::Listed(records) => !records.is_empty(),
            News::Happened(_) => true,
            _ => false,
        };
        while told.last().is_none_or(|news: &Arc<News>| !has_it(news)) {
            told.push(other.next().await);
        }
        told
    });
    drop(first);
    registry.put("echo/1", "x");
    let told = second.block_on(async { time::timeout(ms(5000), reading).await });
    let told = told.expect("it goes on").expect("no panic");

    // Then the other is told that what it knows may be old, and then what is there
    assert!(
        told.iter().any(|news| matches!(&**news, News::Failed(_))),
        "{told:?}"
    );

    // And a reader inside the ended one is told, or goes on through the other's, but does not hang
    let _entered = handle.enter();
    let refused = one.next().now_or_never();
    drop(refused);
}
