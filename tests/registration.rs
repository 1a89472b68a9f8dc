//! Registrations against a real etcd: what is registered stays so, whatever becomes of etcd, of the record, or of
//! the process.
//!
//! A registry of its own connection stands for another process; where it has to be one, this test binary runs
//! itself once more.

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    collections::HashSet,
    future::IntoFuture as _,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, future};
use support::{
    etcd::Etcd,
    eventually, eventually_async,
    load::Load,
    proxy::{Mode, Proxy},
    server::{
        EchoServer,
        pb::{EchoRequest, echo_client::EchoClient},
    },
    view::{self, View},
};
use switchboard::{
    Channel, ConnectionManager, EtcdRegistry, Kind, Registration, Session,
    pool::status::Discovery,
    registry::{RegistrationEvent, RegistrationEvents, RegistrationState},
};
use tokio::{
    process::{Child, Command},
    time::{sleep, timeout},
};

const SECOND: Duration = Duration::from_secs(1);

/// A registry with connections of its own, as another process has them.
async fn registry(etcd: &Etcd, ttl: u32) -> EtcdRegistry {
    let registry = view::registry(&[etcd.endpoint()]).await;
    registry.with_ttl(ttl * SECOND).expect("a good TTL")
}

fn echo(id: &str, address: &str) -> Session {
    Session::new("echo", address).with_id(id)
}

async fn registered(registry: &EtcdRegistry, session: Session) -> Registration {
    registry.register(session).await.expect("its key is free")
}

/// The events of a registration, and what they were so far.
struct Events {
    events: RegistrationEvents,
    seen: Vec<RegistrationEvent>,
}

impl Events {
    fn of(registration: &Registration) -> Self {
        Self {
            events: registration.events(),
            seen: Vec::new(),
        }
    }

    /// Reads on to such an event, and returns how long that took.
    async fn until(
        &mut self,
        bound: Duration,
        what: &str,
        is: impl Fn(&RegistrationEvent) -> bool,
    ) -> Duration {
        let began = Instant::now();
        loop {
            let left = bound.saturating_sub(began.elapsed());
            let Ok(Some(event)) = timeout(left, self.events.next()).await else {
                panic!("not within {bound:?}: {what}; {}", self.words());
            };
            let found = is(&event);
            self.seen.push(event);
            if found {
                return began.elapsed();
            }
        }
    }

    fn words(&self) -> String {
        let words: Vec<_> = self.seen.iter().map(ToString::to_string).collect();
        words.join("; ")
    }
}

fn is_lost(event: &RegistrationEvent) -> bool {
    matches!(event, RegistrationEvent::Lost { .. })
}

fn is_restored(event: &RegistrationEvent) -> bool {
    matches!(event, RegistrationEvent::Restored { .. })
}

fn is_registered(registration: &Registration) -> bool {
    matches!(registration.state(), RegistrationState::Registered { .. })
}

async fn call(channel: &Channel) -> Option<String> {
    let request = EchoRequest::default();
    let answer = EchoClient::new(channel.clone()).unary(request).await.ok()?;
    Some(answer.into_inner().server)
}

async fn until_called(channel: &Channel, by: &str) {
    eventually_async(&format!("{by} answers"), || async {
        call(channel).await.is_some_and(|server| server == by)
    })
    .await;
}

/// Scenario 14.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_may_be_away_for_longer_than_the_ttl_and_nobody_is_called_less() {
    // Given a server and its caller, each with a registry of its own, and a TTL of a second
    let mut etcd = Etcd::start().await;
    let server = EchoServer::start("a");
    let registration = registered(&registry(&etcd, 1).await, echo("a", &server.address())).await;
    let mut events = Events::of(&registration);
    let manager = ConnectionManager::builder(registry(&etcd, 1).await).build();
    let channel = manager.channel("echo");
    until_called(&channel, "a").await;
    let load = Load::start(&channel, 0);

    // When etcd is killed, and is away until the lease is over
    etcd.kill();
    events.until(5 * SECOND, "its lease is over", is_lost).await;
    sleep(2 * SECOND).await;

    // Then the status says that it is stale, since when and why
    let status = manager.status().to_string();
    let Discovery::Stale { why, .. } = &manager.status().roles[0].discovery else {
        panic!("it is not stale: {status}");
    };
    assert!(why.to_string().contains(&etcd.address()), "{why}");

    // When it is back, then the server is registered again within two seconds, as it says
    etcd.restart().await;
    let took = events.until(2 * SECOND, "it is back", is_restored).await;
    eprintln!("etcd was away; registered again {took:?} after its return");
    assert!(is_registered(&registration), "{:?}", registration.state());
    let is_fresh = || matches!(manager.status().roles[0].discovery, Discovery::Fresh);
    eventually("the caller's view is fresh", is_fresh).await;
    assert!(etcd.get("demo/echo/a").await.is_some());

    // And no call has failed
    let answered = load.all_answered().await;
    eprintln!("{answered} calls were answered meanwhile");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_slept_for_longer_than_the_ttl_has_its_sessions_again() {
    // Given a session
    let etcd = Etcd::start().await;
    let registry = registry(&etcd, 1).await;
    let registration = registered(&registry, echo("a", "a:1")).await;
    let mut events = Events::of(&registration);

    // When etcd sleeps until the lease is over, and wakes up
    etcd.pause();
    events
        .until(10 * SECOND, "its lease is over", is_lost)
        .await;
    etcd.resume();

    // Then it is registered within two seconds
    let took = events.until(2 * SECOND, "it is back", is_restored).await;
    eprintln!("etcd slept; registered again {took:?} after it woke up");
    eventually_async("the record is there", async || {
        etcd.get("demo/echo/a").await.is_some()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_can_start_while_etcd_is_down() {
    // Given an etcd that is down
    let mut etcd = Etcd::stopped();
    let registering = registry(&etcd, 2).await.register(echo("a", "a:1"));

    // When a session is registered in the background, then it says why it is not yet
    let registration = registering.background().await.expect("it does not wait");
    let mut events = Events::of(&registration);
    let is_unreachable =
        |event: &RegistrationEvent| matches!(event, RegistrationEvent::Unreachable { .. });
    events.until(8 * SECOND, "it says so", is_unreachable).await;
    let state = registration.state().to_string();
    assert!(state.contains(&etcd.address()), "{state}");

    // When etcd comes, then it is registered within two seconds
    etcd.restart().await;
    let is_there =
        |event: &RegistrationEvent| matches!(event, RegistrationEvent::Registered { .. });
    let took = events.until(2 * SECOND, "it is registered", is_there).await;
    eprintln!("started before etcd; registered {took:?} after that came");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hundreds_of_sessions_are_registered_again_when_etcd_is_back() {
    // Given 300 sessions, of three processes
    let mut etcd = Etcd::start().await;
    let mut all = Vec::new();
    for process in 0..3 {
        let registry = registry(&etcd, 2).await;
        let sessions = (0..100).map(|n| {
            let id = format!("{process}-{n}");
            registry
                .register(echo(&id, &format!("{id}:1")))
                .into_future()
        });
        let registered = future::try_join_all(sessions).await;
        all.extend(registered.expect("all are free"));
    }
    let mut view = View::listed(&registry(&etcd, 2).await, "echo").await;

    for what in ["restarted", "emptied"] {
        // When etcd is away for longer than the TTL, or loses its data
        match what {
            "restarted" => {
                etcd.kill();
                let is_lost =
                    |r: &Registration| matches!(r.state(), RegistrationState::Lost { .. });
                eventually("their leases are over", || all.iter().all(is_lost)).await;
            }
            _ => etcd.lose_data(),
        }
        view.during(etcd.restart()).await;

        // Then all are registered within two seconds, and none was said to be gone
        let back = Instant::now();
        eventually_async("all are there", async || {
            all.iter().all(is_registered) && etcd.count("demo/echo/").await == 300
        })
        .await;
        let took = back.elapsed();
        eprintln!("{what}: 300 sessions are registered {took:?} after");
        assert!(took < 2 * SECOND, "{what}: {took:?}");
        let exact = |v: &View| v.members.len() == 300 && !v.is_stale;
        view.until(6 * SECOND, "the view is exact", exact).await;
        eprintln!("{what}: the view is fresh {:?} after", back.elapsed());
        assert!(what == "emptied" || view.removed.is_empty());
    }
}

/// Scenario 15.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_restarted_at_its_address_is_registered_at_once() {
    let etcd = Etcd::start().await;
    let mut view = View::listed(&registry(&etcd, 10).await, "echo").await;
    for session in [echo("a", "a:1"), echo("b", "b:1").with_exclusive(true)] {
        // Given a server that was killed, whose lease has most of ten seconds to go
        let id = session.id().to_owned();
        registered(&registry(&etcd, 10).await, session.clone())
            .await
            .abandon();
        view.until(SECOND, "the first", |v| v.member(&id).is_some())
            .await;
        let first = view.member(&id).expect("it is there").generation();

        // When it is started again at its address
        let began = Instant::now();
        let again = registered(&registry(&etcd, 10).await, session.clone()).await;
        let took = began.elapsed();

        // Then it is registered within a second, as another generation
        eprintln!("restarted; {id} was registered after {took:?}");
        assert!(took < SECOND, "{id}: {took:?}");
        assert!(is_registered(&again), "{:?}", again.state());
        view.until(SECOND, "the second", |v| {
            v.member(&id).is_some_and(|m| m.generation() > first)
        })
        .await;
        // And it stays, when the first's lease would be over.
        again.deregister().await.expect("etcd answers");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_restarted_elsewhere_waits_for_the_end_of_its_old_lease() {
    // Given a server that was killed
    let etcd = Etcd::start().await;
    registered(&registry(&etcd, 2).await, echo("a", "a:1"))
        .await
        .abandon();

    // When it comes back at another address, then that may be another, who is still there
    let registry = registry(&etcd, 2).await;
    let refused = registry.register(echo("a", "a:2")).await;
    let error = refused.expect_err("its key is held");
    assert_eq!(error.kind(), Kind::AlreadyRegistered);
    let says = "key demo/echo/a is held by instance a at a:1";
    assert!(error.to_string().contains(says), "{error}");

    // When it waits, then it is registered as soon as the lease is over
    let began = Instant::now();
    let waiting = registry.register(echo("a", "a:2")).wait(10 * SECOND);
    let registration = waiting.expect("good").await.expect("it becomes free");
    eprintln!("waited {:?} for a lease of 2 s", began.elapsed());
    assert!(began.elapsed() < 5 * SECOND, "{:?}", began.elapsed());
    assert!(is_registered(&registration));
}

/// What befalls a standby.
#[derive(Clone, Copy, Debug)]
enum Trouble {
    None,
    ItsConnectionBreaks,
    ItsConnectionIsSilent,
    EtcdIsRestarted,
    ItsLeasesAreRevoked,
}

/// Scenario 16.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_takes_over_from_an_active_that_died() {
    future::join_all([
        takes_over(Trouble::None),
        takes_over(Trouble::ItsConnectionBreaks),
        takes_over(Trouble::ItsConnectionIsSilent),
        takes_over(Trouble::EtcdIsRestarted),
        takes_over(Trouble::ItsLeasesAreRevoked),
    ])
    .await;
}

async fn takes_over(trouble: Trouble) {
    const TTL: u32 = 2;
    // Given an active, and a standby that reaches etcd through a proxy
    let mut etcd = Etcd::start().await;
    let proxy = Proxy::start(etcd.address().parse().expect("host:port")).await;
    let proxied = view::registry(&[format!("http://{}", proxy.address())]).await;
    let proxied = proxied.with_ttl(TTL * SECOND).expect("a good TTL");
    let one = |address| Session::new("coord", address).with_exclusive(true);
    let active = registered(&registry(&etcd, TTL).await, one("a:1")).await;
    let standby = registered(&proxied, one("b:1")).await;
    let RegistrationState::StandBy { active: holder } = standby.state() else {
        panic!("{trouble:?}: {}", standby.state());
    };
    assert!(holder.to_string().contains("a:1"), "{holder}");
    let mut events = Events::of(&standby);

    // When something befalls it, and the active dies
    match trouble {
        Trouble::None => {}
        Trouble::ItsConnectionBreaks => proxy.reset(),
        Trouble::ItsConnectionIsSilent => proxy.set(Mode::Swallow),
        Trouble::EtcdIsRestarted => {
            etcd.kill();
            etcd.restart().await;
        }
        Trouble::ItsLeasesAreRevoked => {
            let holds = etcd.lease("demo/coord/active").await;
            let all = etcd.etcdctl(&["lease", "list"]).await;
            // The first line says how many.
            for lease in all.lines().skip(1).filter(|lease| *lease != holds) {
                etcd.etcdctl(&["lease", "revoke", lease]).await;
            }
        }
    }
    active.abandon();
    let died = Instant::now();
    if let Trouble::ItsConnectionIsSilent = trouble {
        // Its connection is well again when the active's time is over.
        eventually_async("the active's record goes", async || {
            etcd.get("demo/coord/active").await.is_none()
        })
        .await;
        proxy.set(Mode::Pass);
    }

    // Then the standby is active within the TTL and two seconds
    let is_active =
        |event: &RegistrationEvent| matches!(event, RegistrationEvent::Registered { .. });
    let what = format!("{trouble:?}: it takes over");
    events.until(15 * SECOND, &what, is_active).await;
    let took = died.elapsed();
    eprintln!("{trouble:?}: the standby took over {took:?} after the active's death, TTL {TTL} s");
    let bound = match trouble {
        // It may have asked while nobody answered, and has to find that out first.
        Trouble::ItsConnectionIsSilent => 10 * SECOND,
        _ => (TTL + 2) * SECOND,
    };
    assert!(took < bound, "{trouble:?}: {took:?}");
    let record = etcd.get("demo/coord/active").await.expect("it is there");
    let record = String::from_utf8(record).expect("JSON");
    assert!(record.contains(r#""Addr":"b:1""#), "{trouble:?}: {record}");
    standby.deregister().await.expect("etcd answers");
}

/// Scenario 10.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_says_it_is_stopping_gets_no_calls_even_from_who_was_not_there() {
    // Given two servers, and a call in flight to the one
    let etcd = Etcd::start().await;
    let (a, b) = (EchoServer::start("a"), EchoServer::start("b"));
    let mut going = registered(&registry(&etcd, 2).await, echo("a", &a.address())).await;
    let _stays = registered(&registry(&etcd, 2).await, echo("b", &b.address())).await;
    let manager = ConnectionManager::builder(registry(&etcd, 2).await).build();
    let channel = manager.channel("echo");
    for id in ["a", "b"] {
        until_called(&channel.to(id), id).await;
    }
    let before = a.seen.started.load(SeqCst);
    let mut client = EchoClient::new(channel.to("a"));
    let request = EchoRequest {
        delay_ms: 2000,
        ..EchoRequest::default()
    };
    let in_flight = tokio::spawn(async move { client.unary(request).await });
    eventually("it is there", || a.seen.started.load(SeqCst) > before).await;

    // When it says that it is stopping, then it gets no new calls within half a second
    going.stopping().await.expect("etcd answers");
    let said = Instant::now();
    let mut last = said;
    while said.elapsed() < SECOND {
        if call(&channel).await.as_deref() == Some("a") {
            last = Instant::now();
        }
    }
    let late = last - said;
    eprintln!("stopping; the last call came {late:?} later");
    assert!(late < SECOND / 2, "{late:?}");

    // And who comes now knows it from the first list
    let late = ConnectionManager::builder(registry(&etcd, 2).await).build();
    let late = late.channel("echo");
    for _ in 0..50 {
        assert_eq!(call(&late).await.as_deref(), Some("b"));
    }

    // When its lease is lost, then it is stopping all the same when it returns
    let mut events = Events::of(&going);
    etcd.expire("demo/echo/a").await;
    events.until(3 * SECOND, "it returns", is_restored).await;
    let record = etcd.get("demo/echo/a").await.expect("it is there");
    let record = String::from_utf8(record).expect("JSON");
    assert!(record.contains(r#""stopping":true"#), "{record}");
    drop(in_flight);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_in_flight_to_a_server_that_is_stopping_finishes() {
    // Given a call in flight
    let etcd = Etcd::start().await;
    let a = EchoServer::start("a");
    let mut going = registered(&registry(&etcd, 2).await, echo("a", &a.address())).await;
    let manager = ConnectionManager::builder(registry(&etcd, 2).await).build();
    let mut client = EchoClient::new(manager.channel("echo"));
    let request = EchoRequest {
        delay_ms: 1500,
        ..EchoRequest::default()
    };
    let in_flight = tokio::spawn(async move { client.unary(request).await });
    eventually("it is there", || a.seen.started.load(SeqCst) > 0).await;

    // When its server says that it is stopping, and then is gone from the registry
    going.stopping().await.expect("etcd answers");
    eventually("that is seen", || {
        let status = manager.status();
        let endpoint = &status.roles[0].endpoints[0];
        endpoint.state == switchboard::manager::Connectivity::Stopping
    })
    .await;
    going.deregister().await.expect("etcd answers");

    // Then it finishes
    let answer = in_flight
        .await
        .expect("no panic")
        .expect("it is let finish");
    assert_eq!(answer.into_inner().server, "a");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_that_etcdctl_revokes_and_a_key_that_it_deletes_are_registered_again() {
    // Given a session
    let etcd = Etcd::start().await;
    let registry = registry(&etcd, 5).await;
    let registration = registered(&registry, echo("a", "a:1")).await;
    let mut events = Events::of(&registration);
    let mut view = View::listed(&registry, "echo").await;
    let key = "demo/echo/a";

    for what in ["revoked", "deleted"] {
        let before = view.member("a").expect("it is there").generation();
        let lease = etcd.lease(key).await;
        // When its lease is revoked, or its key deleted
        match what {
            "revoked" => drop(etcd.etcdctl(&["lease", "revoke", &lease]).await),
            _ => drop(etcd.etcdctl(&["del", key]).await),
        }
        // Then that is told, and it is registered again within two seconds, as another generation
        let lost = events.until(2 * SECOND, what, is_lost).await;
        let took = lost + events.until(2 * SECOND, "it is back", is_restored).await;
        eprintln!("{what}; registered again {took:?} later");
        assert!(took < 2 * SECOND, "{what}: {took:?}");
        view.until(2 * SECOND, "it is seen", |v| {
            v.member("a").is_some_and(|m| m.generation() > before)
        })
        .await;
        // Under a lease that lives.
        let lease = etcd.lease(key).await;
        let left = etcd.etcdctl(&["lease", "timetolive", &lease]).await;
        assert!(left.contains("granted with TTL(5s)"), "{left}");
    }
    assert!(is_registered(&registration));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_etcdctl_writes_over_is_put_right_under_its_lease() {
    // Given a session, and its record
    let etcd = Etcd::start().await;
    let registry = registry(&etcd, 5).await;
    let mut registration = registered(&registry, echo("a", "a:1")).await;
    let mut events = Events::of(&registration);
    let key = "demo/echo/a";
    let (record, lease) = (etcd.get(key).await, etcd.lease(key).await);
    let generation = registration.registered().await.expect("it is");

    // When somebody writes over it: without its lease, with the same words, or with those of another
    let same = String::from_utf8(record.clone().expect("it is there")).expect("JSON");
    for words in [same.as_str(), &view::value("other:1"), "{"] {
        let began = Instant::now();
        etcd.etcdctl(&["put", key, words]).await;

        // Then it is put right, under its lease
        eventually_async("it is put right", async || {
            etcd.get(key).await == record && etcd.lease(key).await == lease
        })
        .await;
        eprintln!(
            "written over with {words}; put right after {:?}",
            began.elapsed()
        );
        assert!(began.elapsed() < 2 * SECOND, "{:?}", began.elapsed());
    }

    // And it is the same generation, of which there is nothing to tell
    assert_eq!(registration.registered().await.ok(), Some(generation));
    registration
        .update(|session| session.with_version("2"))
        .await
        .expect("it is ours");
    registration.deregister().await.expect("etcd answers");
    assert_eq!(etcd.get(key).await, None);
    let is_ended = |event: &RegistrationEvent| matches!(event, RegistrationEvent::Ended);
    events.until(SECOND, "it ends", is_ended).await;
    assert_eq!(events.seen.len(), 2, "{}", events.words());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_another_took_is_registered_again_when_that_is_gone() {
    // Given a session whose lease was lost while it could not reach etcd, and another that took its key
    let etcd = Etcd::start().await;
    let proxy = Proxy::start(etcd.address().parse().expect("host:port")).await;
    let proxied = view::registry(&[format!("http://{}", proxy.address())]).await;
    let registration = registered(
        &proxied.with_ttl(SECOND).expect("a good TTL"),
        echo("a", "a:1"),
    )
    .await;
    let mut events = Events::of(&registration);
    proxy.set(Mode::Swallow);
    eventually_async("its record goes", async || {
        etcd.get("demo/echo/a").await.is_none()
    })
    .await;
    let other = registered(&registry(&etcd, 1).await, echo("a", "other:1")).await;

    // When it reaches etcd again, then it says who has its key, and leaves it to that
    proxy.set(Mode::Pass);
    let is_taken = |event: &RegistrationEvent| match event {
        RegistrationEvent::Taken { by } => by.to_string().contains("other:1"),
        _ => false,
    };
    events.until(15 * SECOND, "it is taken", is_taken).await;
    assert!(is_registered(&other), "{:?}", other.state());

    // When the other goes, then it is registered again
    other.deregister().await.expect("etcd answers");
    let took = events.until(2 * SECOND, "it is back", is_restored).await;
    eprintln!("taken; registered again {took:?} after the other went");
    let record = etcd.get("demo/echo/a").await.expect("it is there");
    assert!(String::from_utf8_lossy(&record).contains("a:1"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_given_up_is_gone_and_leaves_no_lease() {
    // Given sessions, one of them registered anew a few times
    let etcd = Etcd::start().await;
    let registry = registry(&etcd, 60).await;
    let ended = registered(&registry, echo("ended", "ended:1")).await;
    let dropped = registered(&registry, echo("dropped", "dropped:1")).await;
    let mut events = Events::of(&dropped);
    for _ in 0..2 {
        etcd.expire("demo/echo/dropped").await;
        events.until(5 * SECOND, "it is back", is_restored).await;
    }

    // When they are given up
    ended.deregister().await.expect("etcd answers");
    assert_eq!(etcd.get("demo/echo/ended").await, None, "when it returns");
    drop(dropped);

    // Then their records are gone, and their leases
    eventually_async("the dropped one goes", async || {
        etcd.get("demo/echo/dropped").await.is_none()
    })
    .await;
    eventually_async("no lease is left", async || {
        etcd.etcdctl(&["lease", "list"]).await.trim() == "found 0 leases"
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_lost_its_data_has_its_sessions_again_and_no_call_fails() {
    // Given three servers, each in its own process as it were, and a caller who was there before them
    let mut etcd = Etcd::start().await;
    let caller = registry(&etcd, 3).await;
    let mut view = View::listed(&caller, "echo").await;
    let manager = ConnectionManager::builder(caller).build();
    let channel = manager.channel("echo");
    let servers: Vec<_> = ["a", "b", "c"].map(EchoServer::start).into();
    let proxy = Proxy::start(etcd.address().parse().expect("host:port")).await;
    let mut registrations = Vec::new();
    for server in &servers {
        let registry = view::registry(&[format!("http://{}", proxy.address())]).await;
        let registry = registry.with_ttl(3 * SECOND).expect("a good TTL");
        registrations.push(registered(&registry, echo(&server.id, &server.address())).await);
    }
    for server in &servers {
        until_called(&channel.to(server.id.as_str()), &server.id).await;
    }
    view.until(SECOND, "all are seen", |v| v.has(&["a", "b", "c"]))
        .await;
    let mut events: Vec<_> = registrations.iter().map(Events::of).collect();
    let load = Load::start(&channel, 20);

    // When etcd loses all its data, and comes back empty, and the caller is there before the servers
    proxy.delay(SECOND / 20);
    etcd.lose_data();
    view.during(etcd.restart()).await;
    let back = Instant::now();

    // Then all of them return by themselves, as they say
    for events in &mut events {
        events.until(3 * SECOND, "it is back", is_restored).await;
    }
    eprintln!(
        "data was lost; all are registered {:?} after",
        back.elapsed()
    );
    let doubts = |v: &View| v.stale.iter().any(|why| why.contains("was rebuilt"));
    view.until(SECOND, "it was there first", doubts).await;
    let is_exact = |v: &View| v.has(&["a", "b", "c"]) && !v.is_stale;
    view.until(6 * SECOND, "the view is exact", is_exact).await;
    eprintln!(
        "data was lost; the view is fresh {:?} after",
        back.elapsed()
    );

    // And at no time was one of them missing, nor did a call fail
    let answered = load.all_answered().await;
    eprintln!("{answered} calls were answered meanwhile");

    // And who does not return is gone in the end
    registrations.remove(0).abandon();
    view.until(8 * SECOND, "it goes", |v| v.has(&["b", "c"]))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_does_not_return_to_an_etcd_that_lost_its_data_is_gone_after_a_while() {
    // Given two sessions, one of which has nobody any more
    let mut etcd = Etcd::start().await;
    let mut view = View::listed(&registry(&etcd, 3).await, "echo").await;
    let _stays = registered(&registry(&etcd, 3).await, echo("stays", "stays:1")).await;
    registered(&registry(&etcd, 60).await, echo("dead", "dead:1"))
        .await
        .abandon();
    view.until(SECOND, "both", |v| v.has(&["dead", "stays"]))
        .await;

    // When etcd loses its data
    etcd.lose_data();
    view.during(etcd.restart()).await;
    let back = Instant::now();

    // Then the one returns, and the other is kept for some seconds and no longer
    view.until(8 * SECOND, "the dead one goes", |v| v.has(&["stays"]))
        .await;
    eprintln!(
        "data was lost; the dead one went {:?} after",
        back.elapsed()
    );
    assert!(back.elapsed() > SECOND, "{:?}", back.elapsed());
    view.until(2 * SECOND, "it is fresh", |v| !v.is_stale).await;
    let went: Vec<_> = view.removed.iter().filter(|id| **id != "stays").collect();
    assert_eq!(went.len(), 1, "one went, once: {:?}", view.removed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_is_restored_from_a_backup_is_brought_up_to_date_by_those_who_live() {
    // Given a backup, and what came after it: one session was changed, one came, and one went
    let mut etcd = Etcd::start().await;
    let mut view = View::listed(&registry(&etcd, 3).await, "echo").await;
    let mut changed = registered(&registry(&etcd, 3).await, echo("changed", "changed:1")).await;
    let gone = registered(&registry(&etcd, 3).await, echo("gone", "gone:1")).await;
    etcd.save().await;
    changed
        .update(|session| session.with_version("2"))
        .await
        .expect("etcd answers");
    gone.deregister().await.expect("etcd answers");
    let came = registered(&registry(&etcd, 3).await, echo("came", "came:1")).await;
    let newest = |v: &View| {
        v.has(&["came", "changed"])
            && v.member("changed")
                .is_some_and(|m| m.session().version() == "2")
    };
    view.until(SECOND, "the newest", newest).await;

    // When etcd is restored from it
    etcd.lose_what_came_since().await;
    view.during(etcd.restart()).await;
    let back = Instant::now();

    // Then what is acknowledged is there again within two seconds: the change, and the one that came
    eventually_async("it says what it said last", async || {
        let record = etcd.get("demo/echo/changed").await.unwrap_or_default();
        String::from_utf8_lossy(&record).contains(r#""version":"2""#)
    })
    .await;
    eventually_async("who came is there", async || {
        etcd.get("demo/echo/came").await.is_some()
    })
    .await;
    eprintln!("restored; brought up to date {:?} after", back.elapsed());
    assert!(back.elapsed() < 2 * SECOND, "{:?}", back.elapsed());

    // And who went is gone when its TTL is over, and the view is exact
    let exact = |v: &View| newest(v) && !v.is_stale;
    view.until(10 * SECOND, "it is exact", exact).await;
    eprintln!("restored; the view is exact {:?} after", back.elapsed());
    for registration in [&changed, &came] {
        assert!(is_registered(registration), "{}", registration.state());
    }
}

/// The backup has a record of the instance as it was before it was restarted, under a lease that it knows nothing of.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_of_before_a_restart_that_a_backup_brings_back_is_no_successor() {
    // Given a backup of before a server was restarted at its address
    let mut etcd = Etcd::start().await;
    let old = registered(&registry(&etcd, 3).await, echo("7", "h:1")).await;
    etcd.save().await;
    old.abandon();
    let new = registered(
        &registry(&etcd, 3).await,
        echo("7", "h:1").with_version("2"),
    )
    .await;
    let mut events = Events::of(&new);

    // When etcd is restored from it
    etcd.lose_what_came_since().await;
    etcd.restart().await;

    // Then the server that lives is registered again, when the TTL of before is over at the latest
    events.until(15 * SECOND, "it is back", is_restored).await;
    assert!(is_registered(&new), "{}", new.state());
    let record = etcd.get("demo/echo/7").await.unwrap_or_default();
    let record = String::from_utf8_lossy(&record);
    assert!(record.contains(r#""version":"2""#), "{record}");
}

/// A lease and a revision say nothing of another cluster.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_stands_by_after_data_was_lost_does_not_take_the_active_along_when_it_goes() {
    // Given an active that was the first to write to etcd, and is cut off
    let mut etcd = Etcd::start().await;
    let proxy = Proxy::start(etcd.address().parse().expect("host:port")).await;
    let proxied = view::registry(&[format!("http://{}", proxy.address())]).await;
    let one = |address| Session::new("coord", address).with_exclusive(true);
    let first = registered(&proxied.with_ttl(SECOND).expect("good"), one("a:1")).await;
    let mut events = Events::of(&first);
    proxy.set(Mode::Swallow);

    // And an etcd that lost its data, to which another was the first to write
    etcd.lose_data();
    etcd.restart().await;
    let second = registered(&registry(&etcd, 1).await, one("b:1")).await;
    assert_eq!(
        first.registered().await.ok(),
        second.registered().await.ok(),
        "the same revision"
    );

    // When the first finds out, then it stands by
    proxy.set(Mode::Pass);
    let stands_by =
        |event: &RegistrationEvent| matches!(event, RegistrationEvent::StandingBy { .. });
    events.until(15 * SECOND, "it stands by", stands_by).await;

    // When it goes, then the second is not touched
    first.deregister().await.expect("etcd answers");
    let mut events = Events::of(&second);
    assert!(is_registered(&second), "{:?}", second.state());
    let record = etcd.get("demo/coord/active").await;
    let record = String::from_utf8(record.expect("it is there")).expect("JSON");
    assert!(record.contains("b:1"), "{record}");
    second.deregister().await.expect("etcd answers");
    let is_ended = |event: &RegistrationEvent| matches!(event, RegistrationEvent::Ended);
    events.until(SECOND, "it ends", is_ended).await;
    assert_eq!(events.seen.len(), 2, "{}", events.words());
}

/// Not a test: what the next two run in a process of its own. Here it has nobody to register for.
#[tokio::test]
async fn a_process_that_registers() {
    let Ok(endpoint) = std::env::var("REGISTER_AT") else {
        return;
    };
    let registry = view::registry(&[endpoint]).await;
    let registry = registry.with_ttl(2 * SECOND).expect("a good TTL");
    let _registration = registered(&registry, echo("a", "a:1")).await;
    future::pending().await
}

fn process_that_registers(etcd: &Etcd) -> Child {
    let this = std::env::current_exe().expect("this test binary");
    let mut command = Command::new(this);
    command
        .args(["--exact", "a_process_that_registers"])
        .env("REGISTER_AT", etcd.endpoint())
        .stdout(Stdio::null())
        .kill_on_drop(true);
    command.spawn().expect("it can run itself")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_session_of_a_process_that_is_killed_ends_with_its_ttl() {
    // Given a process that holds a session with a TTL of two seconds, for longer than that
    let etcd = Etcd::start().await;
    let mut view = View::listed(&registry(&etcd, 2).await, "echo").await;
    let mut process = process_that_registers(&etcd);
    view.until(10 * SECOND, "it comes", |v| v.has(&["a"])).await;
    let _ = timeout(4 * SECOND, async {
        loop {
            view.step().await;
        }
    })
    .await;
    assert!(view.removed.is_empty(), "{:?}", view.removed);

    // When it is killed, then its session ends when its TTL is over
    process.kill().await.expect("it runs");
    let took = view.until(5 * SECOND, "it goes", |v| v.has(&[])).await;
    eprintln!("killed; its session of 2 s ended after {took:?}");
    assert!(took > SECOND / 2, "{took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_slept_for_longer_than_its_ttl_registers_again() {
    // Given a process that holds a session
    let etcd = Etcd::start().await;
    let mut view = View::listed(&registry(&etcd, 2).await, "echo").await;
    let process = process_that_registers(&etcd);
    view.until(10 * SECOND, "it comes", |v| v.has(&["a"])).await;

    // When it is stopped until its session is gone, and goes on
    let signal = async |name: &str| {
        let id = process.id().expect("it runs").to_string();
        let sent = Command::new("kill").args([name, &id]).status().await;
        assert!(sent.is_ok_and(|status| status.success()), "{name}");
    };
    signal("-STOP").await;
    view.until(6 * SECOND, "it goes", |v| v.has(&[])).await;
    signal("-CONT").await;

    // Then it is registered again within two seconds
    let took = view
        .until(2 * SECOND, "it returns", |v| v.has(&["a"]))
        .await;
    eprintln!("stopped and resumed; registered again after {took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_stays_through_restarts_of_etcd() {
    // Given a session that is updated all the time, each time with a higher number
    let mut etcd = Etcd::start().await;
    let proxy = Proxy::start(etcd.address().parse().expect("host:port")).await;
    let proxied = view::registry(&[format!("http://{}", proxy.address())]).await;
    let proxied = proxied.with_timeout(SECOND / 2).expect("a good bound");
    let mut registration =
        registered(&proxied.with_ttl(SECOND).expect("good"), echo("a", "a:1")).await;
    let acknowledged = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicU64::new(0));
    let updates = tokio::spawn({
        let (acknowledged, stop) = (acknowledged.clone(), stop.clone());
        async move {
            let (mut n, mut failed) = (0, 0);
            while stop.load(SeqCst) == 0 {
                n += 1;
                let change = |session: Session| session.with_metadata("n", n.to_string());
                match registration.update(change).await {
                    Ok(()) => acknowledged.store(n, SeqCst),
                    Err(_) => failed += 1,
                }
                sleep(Duration::from_millis(2)).await;
            }
            (registration, n, failed)
        }
    });
    let there = async |etcd: &Etcd| {
        let record = String::from_utf8(etcd.get("demo/echo/a").await?).expect("JSON");
        let (_, n) = record.split_once(r#""n":""#)?;
        n.split('"').next().expect("a string").parse::<u64>().ok()
    };
    let mut looks = 0;
    let mut look = async |etcd: &Etcd, what: &str| {
        // Read before: what is read after is to be no older.
        let before = acknowledged.load(SeqCst);
        if let Some(n) = there(etcd).await {
            looks += 1;
            assert!(
                n >= before,
                "{what}: {n} is there, {before} was acknowledged"
            );
        }
    };

    // When etcd is killed and restarted, and connections are reset and silent, then at no time is there less than
    // what was acknowledged. (A session that is not there at the moment is one that is being registered again.)
    for round in 0..12 {
        let what = match round % 4 {
            0 => {
                etcd.kill();
                etcd.restart().await;
                "restarted"
            }
            1 => {
                proxy.reset();
                "reset"
            }
            2 => {
                proxy.set(Mode::SwallowAnswers);
                sleep(SECOND / 2).await;
                proxy.set(Mode::Pass);
                proxy.reset();
                "answers lost"
            }
            _ => {
                etcd.expire_if_there("demo/echo/a").await;
                "expired"
            }
        };
        let until = Instant::now() + SECOND / 2;
        while Instant::now() < until {
            look(&etcd, what).await;
        }
    }

    // And in the end what the registration says is what is there
    stop.store(1, SeqCst);
    let (mut registration, n, failed) = updates.await.expect("no panic");
    eprintln!("{n} updates, {failed} of them failed; looked {looks} times");
    let last = |session: Session| session.with_metadata("n", "1000000");
    while let Err(error) = registration.update(last).await {
        assert_eq!(error.kind(), Kind::RegistryUnreachable, "{error}");
    }
    eventually_async("it is there", async || {
        there(&etcd).await == Some(1_000_000)
    })
    .await;
    assert!(failed > 0 && looks > 20, "nothing was tried");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_who_ask_at_the_same_time_are_given_fifty_ids() {
    // Given five processes
    let etcd = Etcd::start().await;
    let mut registries = Vec::new();
    for _ in 0..5 {
        registries.push(registry(&etcd, 10).await);
    }

    // When each asks for ten ids at the same time
    let asking = (0..50).map(|n| registries[n % 5].allocate_id());
    let ids = future::try_join_all(asking).await.expect("etcd answers");

    // Then they are fifty, from 1
    let all: HashSet<_> = ids.iter().copied().collect();
    assert_eq!(all, (1..=50).collect(), "{ids:?}");
    let counter = etcd.get("demo/id").await;
    assert_eq!(counter.as_deref(), Some(&b"51"[..]));
}
