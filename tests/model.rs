//! A view of a real etcd against a reference map: whatever happens to the records, to the history and to the
//! connections, after each healing the view is exactly what is there.
//!
//! The seed is printed when it fails; `SWITCHBOARD_SEED` sets it, and `SWITCHBOARD_STEPS` how long it goes on.

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use support::{
    etcd::{
        Etcd,
        pb::{self, kv_client::KvClient},
    },
    proxy::{Mode, Proxy},
    view::{self, View, value},
};
use tonic::transport::Channel;

/// A registry that is back is known exactly within this time, wherever it was.
const HEALED: Duration = Duration::from_secs(2);

/// So many records can be there, valid and not.
const KEYS: usize = 24;

/// What is there, by id.
type Model = BTreeMap<String, String>;

struct Scene {
    random: fastrand::Rng,
    etcd: Etcd,
    proxy: Proxy,
    view: View,
    model: Model,
    /// What was done lately, to be shown.
    done: Vec<String>,
    steps: usize,
    healings: usize,
    slowest: Duration,
}

impl Scene {
    async fn new(seed: u64) -> Self {
        let etcd = Etcd::start().await;
        let proxy = Proxy::start(etcd.address().parse().expect("host:port")).await;
        let registry = view::registry(&[format!("http://{}", proxy.address())]).await;
        Self {
            random: fastrand::Rng::with_seed(seed),
            view: View::listed(&registry, "echo").await,
            etcd,
            proxy,
            model: Model::new(),
            done: Vec::new(),
            steps: 0,
            healings: 0,
            slowest: Duration::ZERO,
        }
    }

    fn did(&mut self, what: String) {
        self.steps += 1;
        self.done.push(what);
        if self.done.len() > 60 {
            self.done.remove(0);
        }
    }

    /// One record is written, or deleted, or made something that is no session.
    async fn change(&mut self, kv: &mut KvClient<Channel>) {
        let id = format!("k{}", self.random.usize(..KEYS));
        // Each address is one record's: of two with the same, the older would be barred.
        let address = format!("{id}-{}:1", self.random.u16(..));
        match self.random.u8(..10) {
            0..6 => {
                put(kv, &id, value(&address)).await;
                self.did(format!("put {id} {address}"));
                self.model.insert(id, address);
            }
            6 => {
                put(kv, &id, "{".to_owned()).await;
                self.did(format!("spoil {id}"));
                self.model.remove(&id);
            }
            7 => {
                // Another generation.
                delete(kv, &id).await;
                put(kv, &id, value(&address)).await;
                self.did(format!("replace {id} {address}"));
                self.model.insert(id, address);
            }
            _ => {
                delete(kv, &id).await;
                self.did(format!("delete {id}"));
                self.model.remove(&id);
            }
        }
    }

    async fn changes(&mut self) {
        let mut kv = self.etcd.kv().await;
        for _ in 0..self.random.usize(1..32) {
            self.change(&mut kv).await;
            if self.random.u8(..24) == 0 {
                self.etcd.compact().await;
                self.did("compact".to_owned());
            }
        }
    }

    /// One round: something breaks or nothing does, things change meanwhile, it heals, and the view is exact.
    async fn round(&mut self) {
        match self.random.u8(..12) {
            0..5 => self.changes().await,
            5..8 => {
                self.proxy.reset();
                self.did("reset".to_owned());
                self.changes().await;
            }
            8..10 => {
                // Nobody can come back before this is over.
                self.proxy.set(Mode::Swallow);
                self.did("silence".to_owned());
                self.changes().await;
                self.etcd.compact().await;
                self.proxy.set(Mode::Pass);
                self.proxy.reset();
                self.did("reset".to_owned());
            }
            10 => {
                self.etcd.kill();
                self.etcd.restart().await;
                self.did("restart".to_owned());
                self.changes().await;
            }
            _ => {
                self.proxy.set(Mode::SwallowAnswers);
                self.did("no answers".to_owned());
                self.changes().await;
                self.proxy.set(Mode::Pass);
                self.proxy.reset();
                self.did("reset".to_owned());
            }
        }
        let expected = self.model.clone();
        let is = |view: &View| shown(view) == expected && !view.is_stale;
        let took = self.view.until(HEALED, "the view is exact", is).await;
        self.slowest = self.slowest.max(took);
        self.healings += 1;
    }
}

fn key(id: &str) -> Bytes {
    format!("demo/echo/{id}").into()
}

async fn put(kv: &mut KvClient<Channel>, id: &str, value: String) {
    let request = pb::PutRequest {
        key: key(id),
        value: value.into(),
        lease: 0,
    };
    kv.put(request).await.expect("etcd takes a record");
}

async fn delete(kv: &mut KvClient<Channel>, id: &str) {
    let request = pb::DeleteRangeRequest {
        key: key(id),
        range_end: Bytes::new(),
    };
    kv.delete_range(request).await.expect("etcd deletes");
}

fn shown(view: &View) -> Model {
    let members = view.members.values().map(|member| {
        let session = member.session();
        (session.id().to_owned(), session.address().to_owned())
    });
    members.collect()
}

/// Prints what is needed to see it again, unless all went well.
struct Told<'a>(&'a mut Scene, u64);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        let Self(scene, seed) = self;
        if std::thread::panicking() {
            eprintln!(
                "SWITCHBOARD_SEED={seed}, step {}; lately {:#?}\nthere is {:#?}\nshown is {:#?}",
                scene.steps,
                scene.done,
                scene.model,
                shown(&scene.view)
            );
        }
    }
}

async fn run(seed: u64, steps: usize) {
    let began = Instant::now();
    let mut scene = Scene::new(seed).await;
    let told = Told(&mut scene, seed);
    while told.0.steps < steps {
        told.0.round().await;
    }
    let Scene {
        steps,
        healings,
        slowest,
        ..
    } = told.0;
    eprintln!(
        "seed {seed}: {steps} steps, {healings} times exact, the slowest after {slowest:?}; {:?} in all",
        began.elapsed()
    );
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().expect("a number"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_happens_the_view_is_exact_after_each_healing() {
    let steps = number("SWITCHBOARD_STEPS").unwrap_or(2100) as usize;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let seed = number("SWITCHBOARD_SEED");
    let first = seed.unwrap_or_else(|| now.expect("after 1970").as_millis() as u64);
    eprintln!("SWITCHBOARD_SEED={first}");
    // Three at the same time, which wait more than they work.
    let runs = (0..3).map(|n| tokio::spawn(run(first.wrapping_add(n), steps / 3)));
    for run in runs.collect::<Vec<_>>() {
        run.await.expect("no panic");
    }
}
