//! What discovery says of a role, as a test sees it.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::StreamExt as _;
use switchboard::{
    EtcdRegistry, Registry as _,
    discover::{Change, Key, Member, Skipped, Update, Updates},
};
use tokio::time::timeout;

/// What discovery has said of a role.
pub struct View {
    pub updates: Updates,
    pub skipped: Skipped,
    pub members: BTreeMap<Key, Arc<Member>>,
    pub synced: u32,
    /// Why it could not be known, each time.
    pub stale: Vec<String>,
    /// Whether what is known may be old.
    pub is_stale: bool,
    /// Whoever was said to be gone.
    pub removed: Vec<String>,
}

impl View {
    pub fn of(registry: &EtcdRegistry, role: &str) -> Self {
        let discovery = registry.discover(role).expect("a good role");
        Self {
            skipped: discovery.skipped(),
            updates: discovery.updates(),
            members: BTreeMap::new(),
            synced: 0,
            stale: Vec::new(),
            is_stale: false,
            removed: Vec::new(),
        }
    }

    /// The same, when it has the first list.
    pub async fn listed(registry: &EtcdRegistry, role: &str) -> Self {
        let mut view = Self::of(registry, role);
        let first = Duration::from_secs(10);
        view.until(first, "the first list", |v| v.synced > 0).await;
        view
    }

    pub async fn step(&mut self) {
        match self.updates.next().await.expect("discovery has no end") {
            Update::Change(Change::Insert(key, member)) => drop(self.members.insert(key, member)),
            Update::Change(Change::Remove(key)) => {
                let gone = self.members.remove(&key).expect("only what is there goes");
                self.removed.push(gone.session().id().to_owned());
            }
            Update::Synced => {
                self.synced += 1;
                self.is_stale = false;
            }
            Update::Stale(why) => {
                self.stale.push(why.to_string());
                self.is_stale = true;
            }
            other => panic!("{other:?}"),
        }
    }

    /// Reads on until this is so, and returns how long it took.
    pub async fn until(
        &mut self,
        bound: Duration,
        what: &str,
        is: impl Fn(&Self) -> bool,
    ) -> Duration {
        let began = Instant::now();
        while !is(self) {
            let left = bound.saturating_sub(began.elapsed());
            if timeout(left, self.step()).await.is_err() {
                let (ids, stale) = (self.ids(), &self.stale);
                panic!(
                    "not within {bound:?}: {what}; synced {}, {ids:?}, {stale:?}",
                    self.synced
                );
            }
        }
        began.elapsed()
    }

    /// Reads on for as long as something takes.
    pub async fn during<T>(&mut self, work: impl Future<Output = T>) -> T {
        tokio::pin!(work);
        loop {
            tokio::select! {
                biased;
                done = &mut work => return done,
                () = self.step() => {}
            }
        }
    }

    pub fn ids(&self) -> Vec<&str> {
        let mut ids: Vec<_> = self.members.values().map(|m| m.session().id()).collect();
        ids.sort_unstable();
        ids
    }

    pub fn has(&self, ids: &[&str]) -> bool {
        self.ids() == ids
    }

    /// The one with this id, if it is there.
    pub fn member(&self, id: &str) -> Option<&Arc<Member>> {
        self.members.values().find(|m| m.session().id() == id)
    }
}

pub async fn registry(endpoints: &[String]) -> EtcdRegistry {
    let registry = EtcdRegistry::connect(endpoints, "demo").await;
    registry.expect("good endpoints")
}

/// A value as grpc-go writes it.
pub fn value(address: &str) -> String {
    format!(r#"{{"Op":0,"Addr":"{address}","Metadata":null}}"#)
}
