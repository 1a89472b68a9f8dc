//! The state machine, on paused time, over the registry in memory.

use std::{
    sync::{Arc, Mutex, Weak, mpsc},
    time::Duration,
};

use futures_util::{FutureExt as _, StreamExt as _};
use tokio::{
    sync::{Semaphore, watch},
    time::{Instant, sleep, timeout},
};

use super::{Builder, Component, ComponentState, Step};
use crate::{
    ConnectionManager, Kind, MemoryRegistry,
    error::BoxError,
    events::EventKind,
    registry::{RegistrationEvent, RegistrationState},
};

const SECOND: Duration = Duration::from_secs(1);

fn manager(registry: &MemoryRegistry) -> ConnectionManager {
    ConnectionManager::builder(registry.clone()).build()
}

fn server(registry: &MemoryRegistry, id: &str) -> Builder {
    Component::builder("echo", manager(registry))
        .id(id)
        .advertise(format!("10.0.0.{id}:1"))
}

fn exclusive(registry: &MemoryRegistry, id: &str) -> Builder {
    server(registry, id).session(|session| session.with_exclusive(true))
}

/// The steps that a hook was told, and the states in which it was.
#[derive(Clone, Default)]
struct Steps(Arc<Mutex<Vec<String>>>);

impl Steps {
    fn tell(&self, step: &Step) {
        self.0.lock().unwrap().push(step.to_string());
    }

    fn all(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

async fn until(states: &mut watch::Receiver<ComponentState>, code: &str) -> ComponentState {
    let found = timeout(300 * SECOND, states.wait_for(|state| state.code() == code));
    if let Ok(Ok(state)) = found.await {
        return state.clone();
    }
    panic!("never {code}, but {}", *states.borrow());
}

#[tokio::test(start_paused = true)]
async fn it_starts_while_the_registry_is_down_and_is_healthy_when_that_is_back() {
    // Given a registry that is down
    let registry = MemoryRegistry::new();
    registry.set_available(false);

    // When a component starts, then it is there at once, and says what it waits for
    let began = Instant::now();
    let component = server(&registry, "1").depends_on("rootcoord").start();
    let component = component.await.expect("it waits for nobody");
    assert_eq!(began.elapsed(), Duration::ZERO);
    let mut states = component.states();
    assert_eq!(component.state().code(), "Initializing");
    states
        .wait_for(|state| state.to_string().contains("unavailable"))
        .await
        .expect("it says why");

    // When the registry is back, then it is healthy
    registry.set_available(true);
    until(&mut states, "Healthy").await;
    assert!(registry.record("echo/1").is_some());
}

#[tokio::test(start_paused = true)]
async fn an_outage_changes_nothing_for_a_server_however_long_it_is() {
    let registry = MemoryRegistry::new();
    let component = server(&registry, "1").start().await.expect("good");
    component.healthy().await.expect("it is registered");
    let mut states = component.states();
    states.mark_unchanged();

    // When the registry is down for longer than the TTL
    registry.set_available(false);
    sleep(60 * SECOND).await;

    // Then the registration is lost, as far as it can know, and the server serves
    let lost = component.registration();
    assert!(
        matches!(lost, Some(RegistrationState::Lost { .. })),
        "{lost:?}"
    );
    assert!(!states.has_changed().unwrap(), "{}", component.state());

    // And when its record was lost meanwhile, it is registered again
    registry.set_available(true);
    registry.delete("echo/1");
    sleep(10 * SECOND).await;
    assert!(registry.record("echo/1").is_some());
    assert!(component.state().is_serving(), "{}", component.state());
}

#[tokio::test(start_paused = true)]
async fn a_record_that_is_deleted_makes_it_abnormal_until_it_is_registered_again() {
    let registry = MemoryRegistry::new();
    let steps = Steps::default();
    let told = steps.clone();
    let component = server(&registry, "1")
        .hook(move |step| {
            told.tell(&step);
            std::future::ready(())
        })
        .start()
        .await
        .expect("good");
    component.healthy().await.expect("it is registered");
    let mut states = component.states();
    let mut events = component.manager().events();

    registry.delete("echo/1");

    let abnormal = until(&mut states, "Abnormal").await;
    assert!(abnormal.to_string().contains("deleted"), "{abnormal}");
    until(&mut states, "Healthy").await;
    // It is another generation, of which the program hears.
    let expected = ["Declared", "Required", "Registered", "Registered"];
    assert_eq!(steps.all(), expected);
    // And so does who reads events.
    let mut seen = Vec::new();
    while let Some(Some(event)) = events.next().now_or_never() {
        seen.push(event);
    }
    let words: Vec<_> = seen.iter().map(ToString::to_string).collect();
    let is = |wanted: &dyn Fn(&EventKind) -> bool| seen.iter().any(|event| wanted(&event.kind));
    assert!(
        is(&|kind| matches!(
            kind,
            EventKind::Registration {
                event: RegistrationEvent::Lost { .. },
                ..
            }
        )),
        "{words:?}"
    );
    assert!(
        is(&|kind| matches!(
            kind,
            EventKind::Component {
                state: ComponentState::Healthy,
                ..
            }
        )),
        "{words:?}"
    );
    assert!(
        words.contains(&"echo 1 at 10.0.0.1:1: Healthy".to_owned()),
        "{words:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn one_that_stands_by_takes_over_and_its_hook_runs_before_it_is_healthy() {
    // Given an active one, and one that stands by, with a hook that waits to be let go
    let registry = MemoryRegistry::new();
    let active = exclusive(&registry, "1").start().await.expect("good");
    active.healthy().await.expect("it is the only one");
    let (steps, go) = (Steps::default(), Arc::new(Semaphore::new(0)));
    let (told, gate) = (steps.clone(), go.clone());
    let standby = exclusive(&registry, "2")
        .hook(move |step| {
            told.tell(&step);
            let gate = gate.clone();
            async move {
                if let Step::Activated { .. } = step {
                    gate.acquire().await.expect("it is open").forget();
                }
            }
        })
        .start()
        .await
        .expect("good");
    let mut states = standby.states();
    let state = until(&mut states, "StandBy").await;
    assert!(
        state.to_string().contains("instance 1 at 10.0.0.1:1"),
        "{state}"
    );

    // When the active one stops
    active.stop().await;

    // Then the other is active, and not healthy before its hook is done
    let waits = |state: &ComponentState| state.to_string().contains("its hook runs");
    states.wait_for(waits).await.expect("it says so");
    sleep(30 * SECOND).await;
    assert!(waits(&standby.state()), "{}", standby.state());
    assert_eq!(steps.all(), ["Declared", "Required", "Activated"]);
    go.add_permits(1);
    until(&mut states, "Healthy").await;

    // When it is cut off for longer than its TTL, then it is not active any more, and hears of it
    registry.set_available(false);
    until(&mut states, "Abnormal").await;
    assert_eq!(steps.all().last().map(String::as_str), Some("Deactivated"));
    // And is again when the registry is back.
    registry.set_available(true);
    go.add_permits(1);
    until(&mut states, "Healthy").await;
    assert_eq!(steps.all()[3..], ["Deactivated", "Activated"]);
}

#[tokio::test(start_paused = true)]
async fn a_hook_that_fails_makes_it_abnormal_and_is_told_again() {
    let registry = MemoryRegistry::new();
    let left = Arc::new(Mutex::new(2));
    let component = server(&registry, "1").hook(move |step| {
        let left = left.clone();
        async move {
            let Step::Registered { .. } = step else {
                return Ok(());
            };
            let mut left = left.lock().unwrap();
            match *left {
                0 => Ok(()),
                1 => {
                    *left = 0;
                    drop(left);
                    panic!("at the second time")
                }
                _ => {
                    *left -= 1;
                    Err("the cache is cold")
                }
            }
        }
    });
    let component = component.start().await.expect("good");
    let mut states = component.states();
    let cold = until(&mut states, "Abnormal").await;
    assert!(
        cold.to_string()
            .contains("the hook for Registered failed: the cache is cold"),
        "{cold}"
    );
    states
        .wait_for(|state| state.to_string().contains("panicked: at the second time"))
        .await
        .expect("it is told again");
    until(&mut states, "Healthy").await;
}

#[tokio::test(start_paused = true)]
async fn a_hook_that_fails_or_panics_in_the_start_makes_it_fail() {
    let registry = MemoryRegistry::new();
    let failing = server(&registry, "1").hook(async |step: Step| match step {
        Step::Required => Err("no disk"),
        _ => Ok(()),
    });
    let error = failing.start().await.expect_err("its hook failed");
    assert_eq!(error.kind(), Kind::Component);
    assert_eq!(
        error.to_string(),
        "component failed, role echo: the hook for Required failed: no disk"
    );
    // The panic may come before there is a future, too.
    let panicking = server(&registry, "1").hook(|step: Step| {
        assert_ne!(step, Step::Declared, "not now");
        std::future::ready(())
    });
    let manager = panicking.manager().clone();
    let error = panicking.start().await.expect_err("its hook panicked");
    assert!(error.to_string().contains("panicked"), "{error}");
    assert!(error.to_string().contains("not now"), "{error}");
    // Nothing is left of either.
    assert!(manager.status().components.is_empty());
    assert!(registry.record("echo/1").is_none());
}

#[tokio::test(start_paused = true)]
async fn a_hook_that_hangs_holds_up_neither_the_state_nor_the_stop() {
    // Given a hook that never returns
    let registry = MemoryRegistry::new();
    let component = server(&registry, "1").hook(|step| async move {
        match step {
            Step::Registered { .. } | Step::Drained => std::future::pending().await,
            _ => {}
        }
    });
    let component = component.start().await.expect("good");
    let mut states = component.states();
    let waits = |state: &ComponentState| state.to_string().contains("its hook runs");
    states.wait_for(waits).await.expect("it says so");

    // Then that the record is lost is said all the same
    registry.delete("echo/1");
    until(&mut states, "Abnormal").await;
    states
        .wait_for(waits)
        .await
        .expect("it is registered again");

    // And it stops, when the hook of the stop has had its time
    let began = Instant::now();
    component.stop().await;
    assert_eq!(component.state(), ComponentState::Stopped);
    let took = began.elapsed();
    assert!(took > 30 * SECOND && took < 31 * SECOND, "{took:?}");
    assert!(registry.record("echo/1").is_none());
}

#[tokio::test(start_paused = true)]
async fn the_program_says_that_it_is_abnormal_and_that_it_has_recovered() {
    let registry = MemoryRegistry::new();
    let component = server(&registry, "1").start().await.expect("good");
    component.healthy().await.expect("it is registered");
    component.abnormal("the disk is full");
    assert_eq!(component.state().to_string(), "Abnormal: the disk is full");
    let status = component.manager().status();
    let shown = status.to_string();
    assert!(!status.components[0].serving, "{shown}");
    assert!(
        shown.contains("Abnormal for ") && shown.contains("ms (the disk is full)"),
        "{shown}"
    );
    let json = serde_json::to_value(&status).expect("it can be written");
    let component_json = &json["components"][0];
    assert_eq!(component_json["state"], "Abnormal");
    assert_eq!(component_json["why"], "the disk is full");
    // It is registered all the same.
    assert!(registry.record("echo/1").is_some());
    component.recovered();
    assert!(component.state().is_serving());
}

#[tokio::test(start_paused = true)]
async fn what_its_session_says_can_be_changed_while_there_is_one() {
    let registry = MemoryRegistry::new();
    let component = server(&registry, "1").build().expect("good");
    let zoned = |session: crate::Session| session.with_metadata("zone", "b");
    let early = component.update(zoned).await.expect_err("not begun");
    assert_eq!(early.kind(), Kind::Invalid, "{early}");
    component.begin().await.expect("good");
    component.healthy().await.expect("it is registered");
    component.update(zoned).await.expect("it is there");
    let record = registry.record("echo/1").expect("it is there").value;
    assert!(String::from_utf8_lossy(&record).contains("zone"));
    component.stop().await;
    let late = component.update(zoned).await.expect_err("stopped");
    assert_eq!(late.kind(), Kind::Invalid, "{late}");
}

#[tokio::test(start_paused = true)]
async fn a_successor_ends_it_and_it_says_what_to_expect() {
    let registry = MemoryRegistry::new();
    let component = server(&registry, "1").start().await.expect("good");
    component.healthy().await.expect("it is registered");
    let record = registry.record("echo/1").expect("it is there").value;
    let mut states = component.states();

    // When the same instance registers anew, elsewhere
    registry.delete("echo/1");
    registry.put("echo/1", record.to_vec());

    let stays = |state: &ComponentState| state.to_string().contains("its successor");
    let over = timeout(60 * SECOND, states.wait_for(stays)).await;
    let over = over.expect("in time").expect("it lives").to_string();
    assert!(over.contains("instance 1 at 10.0.0.1:1"), "{over}");
    assert!(over.contains("stop it"), "{over}");
    // And what is its successor's stays.
    component.stop().await;
    assert!(registry.record("echo/1").is_some());
}

#[tokio::test(start_paused = true)]
async fn what_is_required_and_missing_is_named_all_of_it() {
    let registry = MemoryRegistry::new();
    let began = Instant::now();
    let error = server(&registry, "1")
        .require("rootcoord", 1, 2 * SECOND)
        .require("indexcoord", 3, SECOND)
        .start()
        .await
        .expect_err("there is none");
    // Side by side: it is the longest that counts.
    assert!(began.elapsed() < 3 * SECOND, "{:?}", began.elapsed());
    let text = error.to_string();
    assert_eq!(error.kind(), Kind::NotConnected, "{text}");
    assert!(
        text.starts_with("role echo: it does not start without"),
        "{text}"
    );
    assert!(
        text.contains("without 1 ready rootcoord (no session"),
        "{text}"
    );
    assert!(
        text.contains("nor without 3 ready indexcoord (no session"),
        "{text}"
    );
    assert!(registry.record("echo/1").is_none());
}

#[tokio::test(start_paused = true)]
async fn what_cannot_work_is_refused_with_what_is_allowed() {
    let registry = MemoryRegistry::new();
    let good = || server(&registry, "1");
    let client = || Component::builder("echo", manager(&registry));
    let other = |session: crate::Session| crate::Session::new("other", session.address());
    let fixed = crate::registry::Fixed::new([]).expect("good");
    let fixed = ConnectionManager::builder(fixed).build();
    for (builder, says) in [
        (Component::builder("a b", manager(&registry)), "1 to 128"),
        (good().advertise("nowhere"), "host:port"),
        (good().advertise("unix:///run/a.sock"), "host:port"),
        (good().id("a/b"), "1 to 256 bytes"),
        (good().listens_at("nowhere"), "host:port"),
        (good().depends_on("a b"), "1 to 128"),
        (good().watches(""), "1 to 128"),
        (good().require("a", 0, SECOND), "at least 1"),
        (good().require("a", 1, Duration::ZERO), "between 1ms"),
        (good().serving_needs("a", 0), "at least 1"),
        (good().drain(Duration::MAX), "drain bound"),
        (good().settle(61 * SECOND), "60s"),
        (good().session(other), "stay as the builder has them"),
        (client().session(other), "advertise"),
        (client().listens_at("h:1"), "advertise"),
        (
            Component::builder("echo", fixed).advertise("h:1"),
            "takes no sessions",
        ),
    ] {
        let error = builder.build().expect_err(says);
        assert_eq!(error.kind(), Kind::Invalid, "{error}");
        assert!(error.to_string().contains(says), "{error}");
    }
    let stopped = manager(&registry);
    stopped.stop().await;
    let error = Component::builder("echo", stopped).advertise("h:1").build();
    assert_eq!(error.expect_err("stopped").kind(), Kind::Stopped);
}

#[test]
fn outside_a_runtime_it_is_an_error() {
    let error = server(&MemoryRegistry::new(), "1").build();
    assert_eq!(error.expect_err("no runtime").kind(), Kind::Invalid);
}

#[tokio::test(start_paused = true)]
async fn a_client_registers_nothing_and_is_healthy_at_once() {
    let registry = MemoryRegistry::new();
    let before = registry.revision();
    let component = Component::builder("proxy", manager(&registry))
        .depends_on("rootcoord")
        .start()
        .await
        .expect("good");
    assert!(component.state().is_serving());
    assert!(component.registration().is_none());
    assert_eq!(component.id(), format!("pid-{}", std::process::id()));
    assert_eq!(registry.revision(), before);
    let shown = component.manager().status().to_string();
    assert!(
        shown.contains("Healthy for ") && shown.contains("ms; rootcoord 0 ready\n"),
        "{shown}"
    );
}

#[tokio::test(start_paused = true)]
async fn dropping_it_removes_its_session_and_ends_its_tasks() {
    let registry = MemoryRegistry::new();
    let tasks = || {
        tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks()
    };
    let builder = server(&registry, "1").serving_needs("rootcoord", 1);
    let manager = builder.manager().clone();
    let component = builder.start().await.expect("good");
    component.healthy().await.expect("it is registered");
    let (states, stopping) = (component.states(), component.stopping());
    assert_eq!(manager.status().components.len(), 1);

    drop(component);

    assert!(manager.status().components.is_empty());
    assert_eq!(*states.borrow(), ComponentState::Stopped);
    stopping.await;
    drop((manager, states));
    // Its manager is held by nobody else.
    for _ in 0..1000 {
        sleep(Duration::from_millis(10)).await;
        if registry.record("echo/1").is_none() && tasks() == 0 {
            return;
        }
    }
    panic!("{} tasks, {:?}", tasks(), registry.record("echo/1"));
}

#[tokio::test(start_paused = true)]
async fn a_stop_takes_its_steps_in_order_and_twice_is_once() {
    // Given a component whose hook looks at what is so at each step
    let registry = MemoryRegistry::new();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let builder = server(&registry, "1").settle(SECOND);
    let (there, told, of) = (registry.clone(), seen.clone(), builder.manager().clone());
    let component = builder
        .hook(move |step| {
            let record = there.record("echo/1").map(|record| record.value);
            let stopping = record.map(|v| String::from_utf8_lossy(&v).contains("stopping"));
            let status = of.status();
            let state = status.components[0].state.code();
            told.lock()
                .unwrap()
                .push((step.to_string(), state, stopping, status.stopped));
            async { Err::<(), BoxError>("nobody minds".into()) }.map(move |failed| match state {
                "Stopping" => failed,
                _ => Ok(()),
            })
        })
        .start()
        .await
        .expect("good");
    component.healthy().await.expect("it is registered");
    let stopping = component.stopping();

    // When it is stopped, by two
    let began = Instant::now();
    let drained = async {
        stopping.clone().await;
        began.elapsed()
    };
    let ((), (), drained) = tokio::join!(component.stop(), component.stop(), drained);

    // Then all is in its order, whatever the hook says
    assert_eq!(drained.as_secs(), 1, "{drained:?}");
    let expected = [
        ("Declared", "Initializing", None, false),
        ("Required", "Initializing", None, false),
        ("Registered", "Initializing", Some(false), false),
        ("Stopping", "Stopping", Some(false), false),
        ("Drained", "Stopping", Some(true), false),
        ("Deregistered", "Stopping", None, false),
        ("Stopped", "Stopping", None, true),
    ];
    let seen = seen.lock().unwrap().clone();
    let seen: Vec<_> = seen.iter().map(|s| (&*s.0, s.1, s.2, s.3)).collect();
    assert_eq!(seen, expected);
    assert_eq!(component.state(), ComponentState::Stopped);
    let late = component.healthy().await.expect_err("it has stopped");
    assert_eq!(late.kind(), Kind::Stopped);
    let run = component.run(async { Ok::<(), BoxError>(()) }).await;
    assert!(run.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_stop_while_the_registry_is_away_is_bounded() {
    let registry = MemoryRegistry::new();
    let component = server(&registry, "1").start().await.expect("good");
    component.healthy().await.expect("it is registered");
    registry.set_available(false);
    let began = Instant::now();
    component.stop().await;
    assert!(began.elapsed() < 7 * SECOND, "{:?}", began.elapsed());
    assert_eq!(component.state(), ComponentState::Stopped);
}

#[test]
fn a_stop_ends_although_its_runtime_is_gone() {
    let runtime = || {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_all().build().expect("a runtime")
    };
    let (registry, own) = (MemoryRegistry::new(), runtime());
    let component = own.block_on(server(&registry, "1").start());
    let component = component.expect("good");
    drop(own);
    // And whoever waits for its drain is told, too.
    runtime().block_on(async {
        component.stop().await;
        component.stopping().await;
        component.stop().await;
    });
    assert_eq!(component.state(), ComponentState::Stopped);
}

#[tokio::test(start_paused = true)]
async fn a_stop_goes_on_without_its_waiter_and_without_the_component() {
    let registry = MemoryRegistry::new();
    let steps = Steps::default();
    let told = steps.clone();
    let component = server(&registry, "1").settle(SECOND).hook(move |step| {
        told.tell(&step);
        std::future::ready(())
    });
    let component = component.start().await.expect("good");
    component.healthy().await.expect("it is registered");
    let waiter = timeout(SECOND / 2, component.stop()).await;
    assert!(waiter.is_err());
    drop(component);
    sleep(2 * SECOND).await;
    assert!(registry.record("echo/1").is_none());
    assert_eq!(steps.all().last().map(String::as_str), Some("Stopped"));
}

#[tokio::test(start_paused = true)]
async fn a_stop_that_has_only_begun_goes_on_without_the_component() {
    let registry = MemoryRegistry::new();
    let steps = Steps::default();
    let told = steps.clone();
    let builder = server(&registry, "1");
    let manager = builder.manager().clone();
    let component = builder.hook(move |step| {
        told.tell(&step);
        std::future::ready(())
    });
    let component = component.start().await.expect("good");
    component.healthy().await.expect("it is registered");
    let mut states = component.states();

    // When it is dropped before its stop has done anything
    assert!(component.stop().now_or_never().is_none());
    drop(component);

    // Then it takes its steps all the same, and has not stopped, nor is gone, before it has
    assert_ne!(*states.borrow(), ComponentState::Stopped);
    assert_eq!(manager.status().components.len(), 1);
    until(&mut states, "Stopped").await;
    let all = ["Stopping", "Drained", "Deregistered", "Stopped"];
    assert_eq!(steps.all()[3..], all);
    assert!(registry.record("echo/1").is_none());
    assert!(manager.status().stopped);
    sleep(SECOND).await;
    assert!(manager.status().components.is_empty());
}

#[tokio::test]
async fn stops_at_the_same_instant_ask_once() {
    let registry = MemoryRegistry::new();
    let component = server(&registry, "1").build().expect("good");
    let mut requests = component.core.requests.subscribe();
    component.core.request_once();
    assert_eq!(*requests.borrow_and_update(), 1);
    // As the other of two that both found that nobody had asked.
    component.core.request_once();
    assert!(!requests.has_changed().expect("it lives"));
    // Who asks again in as many words does mean it.
    component.shutdown();
    assert_eq!(*requests.borrow(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_manager_outlives_the_first_of_its_components() {
    let registry = MemoryRegistry::new();
    let manager = manager(&registry);
    let of = |role: &str| Component::builder(role, manager.clone());
    let first = of("one").advertise("h:1").start().await.expect("good");
    let second = of("two").advertise("h:2").start().await.expect("good");
    first.stop().await;
    assert!(!manager.status().stopped);
    let kept = of("three").keep_manager(true).start().await.expect("good");
    second.stop().await;
    assert!(!manager.status().stopped);
    kept.stop().await;
    assert!(!manager.status().stopped);
    // Each counts for itself: the last one is not kept for.
    of("four").start().await.expect("good").stop().await;
    assert!(manager.status().stopped);
}

/// A subscriber that calls back into the component whose state it is told.
struct Meddler(Weak<Component>);

impl tracing::Subscriber for Meddler {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target() == "switchboard::events"
    }

    fn event(&self, _: &tracing::Event<'_>) {
        if let Some(component) = self.0.upgrade() {
            assert_eq!(component.manager().status().components.len(), 1);
            component.recovered();
        }
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::Id {
        tracing::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::Id, _: &tracing::Id) {}
    fn enter(&self, _: &tracing::Id) {}
    fn exit(&self, _: &tracing::Id) {}
}

#[tokio::test]
async fn who_is_told_of_its_state_may_change_it() {
    let registry = MemoryRegistry::new();
    let component = Arc::new(server(&registry, "1").start().await.expect("good"));
    component.healthy().await.expect("it is registered");
    let mut events = component.manager().events();

    // On a thread of its own, which may hang
    let (done, is_done) = mpsc::channel();
    let own = component.clone();
    std::thread::spawn(move || {
        let meddler = Meddler(Arc::downgrade(&own));
        tracing::subscriber::with_default(meddler, || own.abnormal("the disk is full"));
        done.send(())
    });

    let bound = Duration::from_secs(10);
    is_done.recv_timeout(bound).expect("it waits for nobody");
    assert_eq!(component.state(), ComponentState::Healthy);
    let mut told = Vec::new();
    while let Some(Some(event)) = events.next().now_or_never() {
        told.push(event.to_string());
    }
    let expected = [
        "echo 1 at 10.0.0.1:1: Abnormal: the disk is full",
        "echo 1 at 10.0.0.1:1: Healthy",
    ];
    assert_eq!(told, expected);
}

#[tokio::test(start_paused = true)]
async fn a_hook_of_the_start_that_hangs_does_not_hold_up_the_end_of_a_run() {
    for hangs in [Step::Declared, Step::Required] {
        let registry = MemoryRegistry::new();
        let component = Component::builder("proxy", manager(&registry))
            .signals(false)
            .hook(move |step| {
                let hangs = step == hangs;
                async move {
                    if hangs {
                        std::future::pending::<()>().await;
                    }
                }
            })
            .build()
            .expect("good");
        let began = Instant::now();
        let server = async {
            component.stopping().await;
            Ok::<(), BoxError>(())
        };
        let stop = async {
            sleep(SECOND).await;
            component.stop().await;
        };
        let (ran, ()) = tokio::join!(component.run(server), stop);
        ran.expect("it ends well");
        assert!(began.elapsed() < 2 * SECOND, "{:?}", began.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn one_that_stands_by_and_is_abnormal_is_still_so_when_it_takes_over() {
    let registry = MemoryRegistry::new();
    let active = exclusive(&registry, "1").start().await.expect("good");
    active.healthy().await.expect("it is the only one");
    let standby = exclusive(&registry, "2").start().await.expect("good");
    standby.recovered();
    standby.abnormal("the disk is full");
    until(&mut standby.states(), "Abnormal").await;
    active.stop().await;
    sleep(5 * SECOND).await;
    let registered = standby.registration();
    assert!(
        matches!(registered, Some(RegistrationState::Registered { .. })),
        "{registered:?}"
    );
    assert_eq!(standby.state().to_string(), "Abnormal: the disk is full");
    standby.recovered();
    assert_eq!(standby.state(), ComponentState::Healthy);
}

#[tokio::test(start_paused = true)]
async fn an_active_one_that_is_active_anew_while_its_hook_runs_takes_that_back_first() {
    let registry = MemoryRegistry::new();
    let (steps, go) = (Steps::default(), Arc::new(Semaphore::new(0)));
    let (told, gate) = (steps.clone(), go.clone());
    let component = exclusive(&registry, "1").hook(move |step| {
        told.tell(&step);
        let gate = gate.clone();
        async move {
            if let Step::Activated { .. } = step {
                gate.acquire().await.expect("it is open").forget();
            }
        }
    });
    let component = component.start().await.expect("good");
    let mut states = component.states();
    let waits = |state: &ComponentState| state.to_string().contains("its hook runs");
    states.wait_for(waits).await.expect("it says so");

    assert!(registry.delete("echo/active"));
    sleep(10 * SECOND).await;
    assert!(registry.record("echo/active").is_some());
    go.add_permits(2);
    until(&mut states, "Healthy").await;

    let taken = ["Activated", "Deactivated", "Activated"];
    assert_eq!(steps.all()[2..], taken);
}

#[tokio::test(start_paused = true)]
async fn a_hook_may_stop_its_component_and_may_drop_it() {
    // Given one that is stopped by its own hook, which waits for that
    let registry = MemoryRegistry::new();
    let own = Arc::new(Mutex::new(None::<Arc<Component>>));
    let of = own.clone();
    let component = server(&registry, "1").hook(move |step| {
        let component = of.lock().unwrap().clone();
        async move {
            if let (Step::Registered { .. }, Some(component)) = (step, component) {
                component.abnormal("it ends");
                assert_eq!(component.manager().status().components.len(), 1);
                component.stop().await;
            }
        }
    });
    let component = Arc::new(component.build().expect("good"));
    *own.lock().unwrap() = Some(component.clone());
    component.begin().await.expect("good");
    let began = Instant::now();
    until(&mut component.states(), "Stopped").await;
    assert!(began.elapsed() < 5 * SECOND, "{:?}", began.elapsed());
    assert!(registry.record("echo/1").is_none());
    // Its hook has it, and it has its hook.
    own.lock().unwrap().take();

    // And one that is dropped by it
    let own = Arc::new(Mutex::new(None::<Component>));
    let of = own.clone();
    let component = server(&registry, "2").hook(move |step| {
        if let Step::Registered { .. } = step {
            drop(of.lock().unwrap().take());
        }
        std::future::ready(())
    });
    let component = component.build().expect("good");
    let manager = component.manager().clone();
    component.begin().await.expect("good");
    let mut states = component.states();
    *own.lock().unwrap() = Some(component);
    until(&mut states, "Stopped").await;
    sleep(5 * SECOND).await;
    assert!(registry.record("echo/2").is_none());
    assert!(manager.status().components.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_stop_is_bounded_whatever_hangs() {
    let registry = MemoryRegistry::new();
    let component = server(&registry, "1").drain(10 * SECOND).signals(false);
    let component = component.hook(|step| async move {
        match step {
            Step::Stopping | Step::Drained | Step::Deregistered | Step::Stopped => {
                std::future::pending().await
            }
            _ => {}
        }
    });
    let component = component.start().await.expect("good");
    component.healthy().await.expect("it is registered");
    registry.set_available(false);
    let began = Instant::now();
    component.shutdown();
    let run = component.run(std::future::pending::<Result<(), BoxError>>());
    run.await.expect("it ends well");
    // Four hooks, the drain, two words to the registry, and the manager.
    let took = began.elapsed();
    assert!(took < (4 * 30 + 10 + 2 * 2 + 2 + 1) * SECOND, "{took:?}");
    assert_eq!(component.state(), ComponentState::Stopped);
}
