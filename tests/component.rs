//! Whole servers: how they start, say how they are, and stop; with tonic servers over sockets.
//!
//! Signals go to a process of their own: this test binary runs itself once more.

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    env, future, io,
    net::SocketAddr,
    process::Stdio,
    sync::{Arc, Mutex, atomic::Ordering::SeqCst},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use support::{
    etcd::{Etcd, free_port},
    eventually, eventually_async,
    server::{
        EchoServer, Seen, echo,
        pb::{EchoRequest, echo_client::EchoClient},
    },
    view,
};
use switchboard::{
    Channel, Component, ConnectionManager, Error, Kind, MemoryRegistry, Session,
    component::{Builder, ComponentState, Step},
    registry::RegistrationState,
};
use tokio::{
    net::TcpListener,
    process::{Child, Command},
    sync::{Notify, oneshot},
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{
    Code, Status, Streaming,
    transport::{self, Endpoint, Server},
};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus,
    health_client::HealthClient,
};

const SECOND: Duration = Duration::from_secs(1);

fn manager(registry: &MemoryRegistry) -> ConnectionManager {
    ConnectionManager::builder(registry.clone()).build()
}

fn free_address() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], free_port()))
}

async fn call(channel: &Channel, delay_ms: u32) -> Result<String, Status> {
    let request = EchoRequest {
        delay_ms,
        ..EchoRequest::default()
    };
    let answer = EchoClient::new(channel.clone()).unary(request).await?;
    Ok(answer.into_inner().server)
}

/// An echo server with health, that ends with its component; it listens when it is let go.
async fn serve(
    component: &Component,
    at: SocketAddr,
    seen: Arc<Seen>,
    go: impl Future<Output = ()>,
) -> Result<(), transport::Error> {
    let (health, stopping) = (component.health(), component.stopping());
    let id = component.id().to_owned();
    go.await;
    let listener = TcpListener::bind(at).await.expect("a free port");
    Server::builder()
        .add_service(health)
        .add_service(echo(&id, &seen))
        .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stopping)
        .await
}

/// A component that runs an echo server.
struct Node {
    component: Arc<Component>,
    at: SocketAddr,
    seen: Arc<Seen>,
    run: JoinHandle<Result<(), Error>>,
}

impl Node {
    fn start(registry: &MemoryRegistry, id: &str, with: impl FnOnce(Builder) -> Builder) -> Self {
        Self::start_when(future::ready(()), registry, id, with)
    }

    fn start_when(
        go: impl Future<Output = ()> + Send + 'static,
        registry: &MemoryRegistry,
        id: &str,
        with: impl FnOnce(Builder) -> Builder,
    ) -> Self {
        let at = free_address();
        let builder = Component::builder("echo", manager(registry))
            .id(id)
            .advertise(at.to_string())
            .signals(false);
        let component = Arc::new(with(builder).build().expect("it can work"));
        let (seen, own) = (Arc::new(Seen::default()), component.clone());
        let of = seen.clone();
        let run = tokio::spawn(async move {
            let server = serve(&own, at, of, go);
            own.run(server).await
        });
        Self {
            component,
            at,
            seen,
            run,
        }
    }

    async fn healthy(registry: &MemoryRegistry, id: &str) -> Self {
        let node = Self::start(registry, id, |builder| builder);
        node.component.healthy().await.expect("it lives");
        node
    }

    async fn ended(self, within: Duration) -> Result<(), Error> {
        let ended = timeout(within, self.run).await;
        ended.expect("in time").expect("it does not panic")
    }
}

async fn state(component: &Component, is: impl FnMut(&ComponentState) -> bool) -> ComponentState {
    let mut states = component.states();
    let found = timeout(20 * SECOND, states.wait_for(is));
    if let Ok(Ok(state)) = found.await {
        return state.clone();
    }
    panic!("it never came to this: {}", component.state());
}

/// Waits until a client can call so many.
async fn ready(client: &ConnectionManager, n: usize) {
    let ready = client.ready("echo", n, 10 * SECOND).await.map(drop);
    ready.expect("they are there");
}

/// How many sessions of a role the registry has, as a client sees it.
fn sessions(client: &ConnectionManager) -> usize {
    client.status().roles[0].endpoints.len()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_registers_only_when_its_server_listens() {
    // Given a component whose server takes its time
    let registry = MemoryRegistry::new();
    let (go, gone) = oneshot::channel();
    let when = async { gone.await.expect("it is let go") };
    let node = Node::start_when(when, &registry, "a", |builder| builder);
    let says = |state: &ComponentState| state.to_string().contains("to listen at");
    state(&node.component, says).await;
    sleep(200 * Duration::from_millis(1)).await;
    assert_eq!(registry.revision(), MemoryRegistry::new().revision());

    // When it listens, then it is registered, healthy and called
    go.send(()).expect("it waits");
    node.component.healthy().await.expect("it lives");
    let client = manager(&registry);
    assert_eq!(call(&client.channel("echo"), 0).await.unwrap(), "a");
    let status = node.component.manager().status();
    assert_eq!(status.components[0].state, ComponentState::Healthy);
    let shown = status.to_string();
    let line = format!("component echo a at {}: Healthy for ", node.at);
    assert!(shown.starts_with(&line), "{shown}");
    assert!(shown.contains("; registered, generation "), "{shown}");

    node.component.shutdown();
    node.ended(5 * SECOND).await.expect("it ends well");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_stops_in_order_and_no_call_fails() {
    // Given two servers under calls
    let registry = MemoryRegistry::new();
    let client = manager(&registry);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (told, looks) = (seen.clone(), client.clone());
    let node = Node::start(&registry, "a", |builder| {
        builder.hook(move |step| {
            told.lock().unwrap().push((step, sessions(&looks)));
            future::ready(())
        })
    });
    let channel = client.channel("echo");
    node.component.healthy().await.expect("it lives");
    let other = Node::healthy(&registry, "b").await;
    ready(&client, 2).await;
    let slow = {
        let a = channel.to("a");
        tokio::spawn(async move { call(&a, 1_500).await })
    };
    eventually("it is under way", || node.seen.started.load(SeqCst) == 1).await;

    // When one is stopped
    let began = Instant::now();
    node.component.shutdown();
    let calls = async {
        while began.elapsed() < 2 * SECOND {
            call(&channel, 0).await.expect("there is another");
            sleep(Duration::from_millis(1)).await;
        }
    };
    let (ended, ()) = tokio::join!(node.ended(5 * SECOND), calls);

    // Then what was in flight has finished, and all came in its order
    ended.expect("it ends well");
    assert_eq!(slow.await.unwrap().expect("it has its time"), "a");
    let took = began.elapsed();
    assert!(took < 3 * SECOND, "{took:?}");
    let seen = seen.lock().unwrap().clone();
    let steps: Vec<_> = seen.iter().map(|(step, _)| step.to_string()).collect();
    let start = ["Declared", "Required", "Registered"];
    let stop = ["Stopping", "Drained", "Deregistered", "Stopped"];
    assert_eq!(steps, [&start[..], &stop[..]].concat());
    let drained = seen.iter().find(|(step, _)| *step == Step::Drained);
    assert_eq!(
        drained.unwrap().1,
        2,
        "its session is there while it drains"
    );
    eventually("one is left", || sessions(&client) == 1).await;
    other.component.stop().await;
    other.ended(5 * SECOND).await.expect("it ends well");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_longer_than_the_drain_bound_is_cut() {
    // Given a server on a runtime of its own, as a process has it
    let registry = MemoryRegistry::new();
    let client = manager(&registry);
    let channel = client.channel("echo");
    let (started, component) = oneshot::channel();
    let (of, seen) = (registry.clone(), Arc::new(Seen::default()));
    let own = seen.clone();
    let process = std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(async move {
            let at = free_address();
            let builder = Component::builder("echo", manager(&of)).advertise(at.to_string());
            let component = builder.drain(SECOND / 2).signals(false).build();
            let component = Arc::new(component.expect("it can work"));
            let _ = started.send(component.clone());
            let server = serve(&component, at, own, future::ready(()));
            component.run(server).await
        })
    });
    let component = component.await.expect("it starts");
    component.healthy().await.expect("it lives");
    ready(&client, 1).await;
    let long = tokio::spawn(async move { call(&channel, 60_000).await });
    eventually("it is under way", || seen.started.load(SeqCst) == 1).await;

    // When it is stopped, then it ends at its bound, and so does the call
    let began = Instant::now();
    component.shutdown();
    let status = timeout(5 * SECOND, long).await.expect("in time").unwrap();
    let status = status.expect_err("it was cut");
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    let took = began.elapsed();
    assert!(took > SECOND / 2 && took < 3 * SECOND, "{took:?}");
    let ended = tokio::task::spawn_blocking(|| process.join()).await;
    ended.unwrap().expect("no panic").expect("it ends well");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_request_ends_it_at_once_and_its_session_is_gone() {
    let registry = MemoryRegistry::new();
    let client = manager(&registry);
    let channel = client.channel("echo");
    let node = Node::healthy(&registry, "a").await;
    ready(&client, 1).await;
    let long = tokio::spawn(async move { call(&channel, 60_000).await });
    eventually("it is under way", || node.seen.started.load(SeqCst) == 1).await;
    node.component.shutdown();
    node.component.stopping().await;
    sleep(SECOND / 5).await;
    assert!(!node.run.is_finished());

    let began = Instant::now();
    node.component.shutdown();
    let component = node.component.clone();
    let error = node.ended(SECOND).await.expect_err("it was cut short");
    assert_eq!(error.kind(), Kind::Stopped, "{error}");
    assert!(error.to_string().contains("asked again"), "{error}");
    assert!(began.elapsed() < SECOND / 2, "{:?}", began.elapsed());
    assert_eq!(component.state(), ComponentState::Stopped);
    eventually("its session is gone", || sessions(&client) == 0).await;
    long.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_server_fails_with_is_returned_when_all_is_stopped() {
    for (panics, says) in [
        (false, "its server failed: the port is gone"),
        (true, "its server panicked: a bug"),
    ] {
        // Given a server that fails once it was healthy
        let registry = MemoryRegistry::new();
        let client = manager(&registry);
        client.depends_on("echo").expect("a good role");
        let at = free_address();
        let fail = Arc::new(Notify::new());
        let component = Component::builder("echo", manager(&registry))
            .advertise(at.to_string())
            .build()
            .expect("it can work");
        let server = async {
            let listener = TcpListener::bind(at).await?;
            let accept = async {
                loop {
                    drop(listener.accept().await);
                }
            };
            tokio::select! {
                () = fail.notified() => {}
                () = accept => {}
            }
            assert!(!panics, "a bug");
            Err(io::Error::other("the port is gone"))
        };
        let failing = async {
            component.healthy().await.expect("it lives");
            eventually("it is seen", || sessions(&client) == 1).await;
            fail.notify_one();
        };
        let (ran, ()) = tokio::join!(timeout(5 * SECOND, component.run(server)), failing);

        // Then it is stopped in order, and says so
        let error = ran.expect("in time").expect_err("its server failed");
        assert_eq!(error.kind(), Kind::Component);
        let text = error.to_string();
        assert_eq!(text, format!("component failed, role echo: {says}"));
        assert_eq!(component.state(), ComponentState::Stopped);
        assert!(component.manager().status().stopped);
        eventually("its session is gone", || sessions(&client) == 0).await;
        // It does not run twice.
        let again = component.run(future::ready(Ok::<(), Error>(()))).await;
        assert_eq!(again.expect_err("twice").kind(), Kind::Invalid);
    }
}

#[tokio::test]
async fn a_server_that_cannot_listen_ends_it_before_it_is_registered() {
    // Given another that listens where it wants to
    let registry = MemoryRegistry::new();
    let other = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let at = other.local_addr().expect("it is bound");
    let component = Component::builder("echo", manager(&registry))
        .advertise(at.to_string())
        .build()
        .expect("it can work");
    let server = async { TcpListener::bind(at).await.map(drop) };
    let ran = timeout(5 * SECOND, component.run(server)).await;
    let error = ran.expect("in time").expect_err("it failed");
    assert!(error.to_string().contains("in use"), "{error}");
    assert_eq!(registry.revision(), MemoryRegistry::new().revision());
}

#[tokio::test]
async fn what_it_waits_for_does_not_hold_up_its_end() {
    // Given one that waits for another, and one that waits for its own server
    let registry = MemoryRegistry::new();
    let requires = Node::start(&registry, "a", |builder| {
        builder.require("rootcoord", 1, 600 * SECOND)
    });
    let listens = Node::start_when(future::pending(), &registry, "b", |builder| {
        builder.drain(SECOND / 5)
    });
    let waits = |state: &ComponentState| state.to_string().contains("waiting for");
    for node in [requires, listens] {
        state(&node.component, waits).await;
        let began = Instant::now();
        node.component.shutdown();
        node.ended(5 * SECOND).await.expect("it ends well");
        assert!(began.elapsed() < SECOND, "{:?}", began.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_waits_with_every_dependency_down() {
    // Given dependencies that are registered and dead, others that are not, and a registry that goes away
    let registry = MemoryRegistry::new();
    let dead = Session::new("rootcoord", free_address().to_string());
    let dead = registry.register(dead).await.expect("good");
    registry.set_available(false);

    // When a component starts, then it does at once
    let began = Instant::now();
    let component = Component::builder("querycoord", manager(&registry))
        .depends_on("rootcoord")
        .depends_on("indexcoord")
        .watches("querynode")
        .advertise("127.0.0.1:1")
        .start()
        .await
        .expect("it waits for nobody");
    assert!(began.elapsed() < SECOND / 5, "{:?}", began.elapsed());
    registry.set_available(true);
    component.healthy().await.expect("it lives");

    // And what comes later is picked up.
    let server = EchoServer::start("a");
    let session = Session::new("indexcoord", server.address());
    let registration = registry.register(session).await.expect("good");
    let ready = || {
        let status = component.manager().status();
        let dependencies = status.components[0].dependencies.clone();
        let ready: Vec<_> = dependencies.iter().map(|d| (&*d.role, d.ready)).collect();
        ready == [("rootcoord", 0), ("indexcoord", 1), ("querynode", 0)]
    };
    eventually("it is connected", ready).await;
    drop((dead, registration));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_may_be_down_at_its_start_and_for_longer_than_the_ttl() {
    // Given an etcd that is down
    let mut etcd = Etcd::stopped();
    let registry = async || {
        let registry = view::registry(&[etcd.endpoint()]).await;
        registry.with_ttl(SECOND).expect("a good TTL")
    };
    let (own, other) = (registry().await, registry().await);
    let client = ConnectionManager::builder(other).build();
    let channel = client.channel("echo");
    let server = EchoServer::start("a");

    // When a server starts, then it does, and is healthy and called when etcd is up
    let component = Component::builder("echo", ConnectionManager::builder(own).build())
        .advertise(server.address())
        .start()
        .await
        .expect("it waits for nobody");
    assert_eq!(component.state().code(), "Initializing");
    etcd.restart().await;
    let healthy = timeout(10 * SECOND, component.healthy()).await;
    healthy.expect("in time").expect("it lives");
    ready(&client, 1).await;

    // When etcd is away for longer than the TTL, then nothing of that changes
    etcd.kill();
    let began = Instant::now();
    while began.elapsed() < 4 * SECOND {
        assert!(component.state().is_serving(), "{}", component.state());
        assert_eq!(call(&channel, 0).await.unwrap(), "a");
        sleep(SECOND / 20).await;
    }
    etcd.restart().await;
    let registered = || {
        matches!(
            component.registration(),
            Some(RegistrationState::Registered { .. })
        )
    };
    eventually("it is registered", registered).await;
    let healthy = timeout(10 * SECOND, component.healthy()).await;
    healthy.expect("in time").expect("it lives");
    assert_eq!(call(&channel, 0).await.unwrap(), "a");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_required_is_waited_for_before_it_is_registered() {
    let registry = MemoryRegistry::new();
    let client = manager(&registry);
    client.depends_on("echo").expect("a good role");
    let node = Node::start(&registry, "a", |builder| {
        builder.require("rootcoord", 1, 20 * SECOND)
    });
    let waits =
        |state: &ComponentState| state.to_string().contains("waiting for 1 ready rootcoord");
    state(&node.component, waits).await;
    let server = EchoServer::start("root");
    let session = Session::new("rootcoord", server.address());
    let registration = registry.register(session).await.expect("good");
    node.component.healthy().await.expect("it lives");
    drop(registration);
    node.component.shutdown();
    node.ended(5 * SECOND).await.expect("it ends well");

    // One whose requirement is never met ends, and says what was missing
    let node = Node::start(&registry, "b", |builder| {
        builder.require("indexcoord", 2, SECOND / 5)
    });
    let error = node.ended(5 * SECOND).await.expect_err("there is none");
    assert!(error.to_string().contains("2 ready indexcoord"), "{error}");
    eventually("neither is registered", || sessions(&client) == 0).await;
}

/// A client of a server's health.
struct Health(HealthClient<transport::Channel>);

impl Health {
    fn of(at: SocketAddr) -> Self {
        let endpoint = Endpoint::from_shared(format!("http://{at}")).expect("a good address");
        Self(HealthClient::new(endpoint.connect_lazy()))
    }

    async fn check(&mut self, service: &str) -> Result<ServingStatus, Status> {
        let service = service.to_owned();
        let answer = self.0.check(HealthCheckRequest { service }).await?;
        Ok(answer.into_inner().status())
    }

    async fn watch(&mut self, service: &str) -> Streaming<HealthCheckResponse> {
        let service = service.to_owned();
        let answer = self.0.watch(HealthCheckRequest { service }).await;
        answer.expect("it can be watched").into_inner()
    }
}

async fn next(watch: &mut Streaming<HealthCheckResponse>) -> Option<ServingStatus> {
    let next = timeout(10 * SECOND, watch.message()).await;
    let next = next.expect("in time").expect("no error");
    next.map(|answer| answer.status())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn its_health_is_served_with_what_it_needs() {
    use ServingStatus::{NotServing, ServiceUnknown, Serving};

    // Given a server that needs another, while the registry is down
    let registry = MemoryRegistry::new();
    registry.set_available(false);
    let node = Node::start(&registry, "a", |b| {
        b.serving_needs("rootcoord", 1).settle(2 * SECOND)
    });
    let mut health = Health::of(node.at);
    eventually_async("it answers", async || {
        Health::of(node.at).check("").await.is_ok()
    })
    .await;
    assert_eq!(health.check("echo").await.unwrap(), NotServing);
    assert_eq!(health.check("").await.unwrap(), NotServing);
    let unknown = health.check("other").await.expect_err("there is none");
    assert_eq!(unknown.code(), Code::NotFound);
    let mut role = health.watch("echo").await;
    let mut all = health.watch("").await;
    let mut other = health.watch("other").await;
    assert_eq!(next(&mut role).await, Some(NotServing));
    assert_eq!(next(&mut all).await, Some(NotServing));
    assert_eq!(next(&mut other).await, Some(ServiceUnknown));

    // When it is healthy and what it needs is there, then it serves
    registry.set_available(true);
    node.component.healthy().await.expect("it lives");
    assert_eq!(health.check("echo").await.unwrap(), NotServing);
    let shown = node.component.manager().status().to_string();
    assert!(shown.contains(", not serving; "), "{shown}");
    assert!(shown.contains("rootcoord 0 ready of 1 needed"), "{shown}");
    let root = EchoServer::start("root");
    let session = Session::new("rootcoord", root.address());
    let registration = registry.register(session).await.expect("good");
    for watch in [&mut role, &mut all] {
        assert_eq!(next(watch).await, Some(Serving));
    }
    assert_eq!(health.check("echo").await.unwrap(), Serving);

    // When that goes, and comes, and the program says what it thinks
    registration.deregister().await.expect("it can");
    assert_eq!(next(&mut role).await, Some(NotServing));
    let session = Session::new("rootcoord", root.address());
    let registration = registry.register(session).await.expect("good");
    assert_eq!(next(&mut role).await, Some(Serving));
    node.component.abnormal("the disk is full");
    assert_eq!(next(&mut role).await, Some(NotServing));
    node.component.recovered();
    assert_eq!(next(&mut role).await, Some(Serving));

    // When it stops, then who watches hears of it, and does not hold up the server
    node.component.shutdown();
    assert_eq!(next(&mut role).await, Some(NotServing));
    // Until they have, it takes new connections too.
    let new = Health::of(node.at).check("").await;
    assert_eq!(new.expect("it still serves"), NotServing);
    assert_eq!(next(&mut role).await, None);
    assert_eq!(next(&mut other).await, None);
    node.ended(5 * SECOND).await.expect("it ends well");
    drop(registration);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_stands_by_is_well_but_does_not_serve_until_it_is_active() {
    // Given two exclusive servers
    let registry = MemoryRegistry::new();
    let client = manager(&registry);
    let channel = client.channel("echo");
    let exclusive = |b: Builder| b.session(|session| session.with_exclusive(true));
    let active = Node::start(&registry, "a", exclusive);
    active.component.healthy().await.expect("it is alone");
    let standby = Node::start(&registry, "b", exclusive);
    let stands_by = |state: &ComponentState| matches!(state, ComponentState::StandBy { .. });
    state(&standby.component, stands_by).await;
    let mut health = Health::of(standby.at);
    assert_eq!(
        health.check("echo").await.unwrap(),
        ServingStatus::NotServing
    );
    assert_eq!(health.check("").await.unwrap(), ServingStatus::Serving);
    ready(&client, 1).await;
    assert_eq!(call(&channel, 0).await.unwrap(), "a");

    // When the active one is stopped, then the other is active, and called
    active.component.shutdown();
    active.ended(5 * SECOND).await.expect("it ends well");
    standby.component.healthy().await.expect("it lives");
    assert_eq!(health.check("echo").await.unwrap(), ServingStatus::Serving);
    eventually_async("it is called", async || {
        call(&channel, 0).await.is_ok_and(|id| id == "b")
    })
    .await;
    standby.component.shutdown();
    standby.ended(5 * SECOND).await.expect("it ends well");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_dropped_in_its_run_can_still_be_stopped() {
    let registry = MemoryRegistry::new();
    let client = manager(&registry);
    client.depends_on("echo").expect("a good role");
    let node = Node::healthy(&registry, "a").await;
    node.run.abort();
    timeout(5 * SECOND, node.component.stop())
        .await
        .expect("in time");
    assert_eq!(node.component.state(), ComponentState::Stopped);
    eventually("its session is gone", || sessions(&client) == 0).await;
}

/// Not a test, but the process of those below.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_serves() {
    let Ok(at) = env::var("SERVE_AT") else {
        return;
    };
    let at: SocketAddr = at.parse().expect("an address");
    let component = Component::builder("echo", manager(&MemoryRegistry::new()))
        .id("child")
        .advertise(at.to_string())
        .build()
        .expect("it can work");
    let server = serve(&component, at, Arc::default(), future::ready(()));
    component.run(server).await.expect("it ends well");
}

fn process_that_serves(at: SocketAddr) -> Child {
    let this = env::current_exe().expect("this test binary");
    let mut command = Command::new(this);
    command
        .args(["--exact", "a_process_that_serves"])
        .env("SERVE_AT", at.to_string())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    command.spawn().expect("it can run itself")
}

fn send(signal: Signal, to: &Child) {
    let id = to.id().expect("it runs");
    let id = i32::try_from(id).expect("an id of a process");
    kill(Pid::from_raw(id), signal).expect("it can be sent");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_ends_well_at_sigterm_and_at_once_at_a_second_signal() {
    for (delay_ms, second) in [(1_500, None), (60_000, Some(Signal::SIGINT))] {
        // Given a process with a call in flight
        let at = free_address();
        let mut process = process_that_serves(at);
        eventually_async("it serves", async || {
            Health::of(at)
                .check("echo")
                .await
                .is_ok_and(|status| status == ServingStatus::Serving)
        })
        .await;
        let endpoint = Endpoint::from_shared(format!("http://{at}")).expect("a good address");
        let mut client = EchoClient::new(endpoint.connect().await.expect("it listens"));
        let request = EchoRequest {
            delay_ms,
            ..EchoRequest::default()
        };
        let call = tokio::spawn(async move { client.unary(request).await });
        sleep(SECOND / 2).await;

        // When it is told to stop
        send(Signal::SIGTERM, &process);
        if let Some(second) = second {
            sleep(SECOND / 2).await;
            assert!(process.try_wait().expect("it can be asked").is_none());
            send(second, &process);
        }

        // Then it finishes, and ends well; or ends at once, and says that it did not
        let ended = timeout(5 * SECOND, process.wait()).await;
        let ended = ended.expect("in time").expect("it has ended");
        assert_eq!(ended.success(), second.is_none(), "{ended}");
        let answer = call.await.unwrap();
        assert_eq!(answer.is_ok(), second.is_none(), "{answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_it_needs_for_a_moment_leaves_nobody_with_a_wrong_health() {
    use ServingStatus::{NotServing, Serving};

    // Given a server that needs another
    let registry = MemoryRegistry::new();
    let node = Node::start(&registry, "a", |b| b.serving_needs("rootcoord", 1));
    node.component.healthy().await.expect("it lives");
    let manager = node.component.manager().clone();
    let root = EchoServer::start("root");
    let mut health = Health::of(node.at);
    for _ in 0..10 {
        // When that is there for a moment in which somebody begins to watch
        let session = Session::new("rootcoord", root.address());
        let registration = registry.register(session).await.expect("good");
        let ready = manager.ready("rootcoord", 1, 10 * SECOND).await.map(drop);
        ready.expect("it is there");
        let mut watch = health.watch("echo").await;
        let mut last = next(&mut watch).await;
        registration.deregister().await.expect("it can");
        eventually("it is gone", || {
            manager.status().components[0].dependencies[0].ready == 0
        })
        .await;

        // Then the last that is heard is that it does not serve
        while let Ok(Ok(word)) = timeout(SECOND / 4, watch.message()).await {
            last = word.map(|word| word.status());
        }
        assert!(last == Some(NotServing), "{last:?} is not what holds");
        assert_ne!(health.check("echo").await.expect("it answers"), Serving);
    }
    node.component.shutdown();
    node.ended(5 * SECOND).await.expect("it ends well");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_that_is_not_answered_does_not_keep_a_session_of_one_that_has_stopped() {
    // Given a server whose session is being changed, several times, while etcd does not answer
    let etcd = Etcd::start().await;
    let registry = view::registry(&[etcd.endpoint()]).await;
    let component = Component::builder("echo", ConnectionManager::builder(registry).build())
        .advertise(free_address().to_string())
        .start()
        .await
        .expect("it waits for nobody");
    component.healthy().await.expect("it lives");
    let component = Arc::new(component);
    etcd.pause();
    let zoned = |session: Session| session.with_metadata("zone", "b");
    let changes = [(); 4].map(|()| {
        let own = component.clone();
        tokio::spawn(async move { own.update(zoned).await })
    });
    sleep(SECOND / 5).await;

    // When it is stopped, and etcd is back
    let began = Instant::now();
    component.stop().await;
    assert!(began.elapsed() < 8 * SECOND, "{:?}", began.elapsed());
    assert_eq!(component.state(), ComponentState::Stopped);
    etcd.resume();

    // Then its session is gone although the component is not, and does not come back
    eventually_async("it is gone", async || etcd.count("").await == 0).await;
    sleep(2 * SECOND).await;
    assert_eq!(etcd.count("").await, 0);
    for change in changes {
        let changed = timeout(SECOND, change).await.expect("it has ended");
        changed.expect("no panic").expect_err("nobody answered");
    }
}

#[tokio::test]
async fn one_that_binds_late_is_not_taken_for_another_that_listens_where_it_will() {
    let registry = MemoryRegistry::new();
    let first = Node::start(&registry, "a", |builder| builder);
    state(&first.component, ComponentState::is_serving).await;

    // The same server once more, by mistake, at the same address; it comes to binding only after a while.
    let component = Component::builder("echo", manager(&registry))
        .id("a")
        .advertise(first.at.to_string())
        .signals(false)
        .build()
        .unwrap();
    let (health, stopping) = (component.health(), component.stopping());
    let server = async {
        sleep(SECOND).await;
        let listener = TcpListener::bind(first.at).await?;
        Server::builder()
            .add_service(health)
            .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stopping)
            .await
            .map_err(io::Error::other)
    };
    let mut states = component.states();
    let error = component.run(server).await.unwrap_err();
    assert!(error.to_string().contains("in use"), "{error}");
    // It was never registered, and the other one never lost its place.
    assert!(component.registration().is_none());
    assert_eq!(*states.borrow_and_update(), ComponentState::Stopped);
    assert_eq!(first.component.state(), ComponentState::Healthy);
    let client = manager(&registry);
    ready(&client, 1).await;
    assert_eq!(call(&client.channel("echo"), 0).await.unwrap(), "a");
}
