//! Starting when much is down, and starting and stopping often.

mod support;

use std::{
    net::SocketAddr,
    sync::atomic::Ordering::SeqCst,
    time::{Duration, Instant},
};

use futures_util::StreamExt as _;
use support::{
    etcd::{Etcd, free_port},
    eventually,
    proxy::{Blackhole, Proxy},
    server::{
        EchoServer, Options,
        pb::{EchoRequest, echo_client::EchoClient},
    },
    sockets_to, tasks,
};
use switchboard::{
    Channel, ConnectionManager, EtcdRegistry, MemoryRegistry, Session,
    manager::{Connectivity, InstanceChange},
    registry::Fixed,
};
use tonic::Status;

async fn call(channel: &Channel) -> Result<String, Status> {
    let request = EchoRequest::default();
    let answer = EchoClient::new(channel.clone()).unary(request).await?;
    Ok(answer.into_inner().server)
}

/// One server at many addresses: 127.0.0.1, 127.0.0.2, and so on, at one port.
fn everywhere() -> EchoServer {
    let address = SocketAddr::from(([0, 0, 0, 0], free_port()));
    let options = Options {
        address: Some(address),
        ..Options::default()
    };
    EchoServer::start_with("good", options)
}

/// 500 nodes: 199 are good, one is good and slow, 250 refuse, 50 are silent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_500_nodes_the_good_ones_are_usable_when_the_slowest_of_them_is() {
    let good = everywhere();
    let port = good.address.port();
    let slowness = Duration::from_millis(700);
    let slow = Proxy::start(SocketAddr::from(([127, 0, 0, 1], port))).await;
    slow.delay(slowness);
    let silent: Vec<_> = (0..50).map(|_| Blackhole::new()).collect();
    let refuses = free_port();
    let mut addresses: Vec<(String, String)> = Vec::new();
    let mut add = |what: &str, n: usize, address: String| {
        addresses.push((format!("{what}-{n}"), address));
    };
    for n in 1..=199 {
        add("good", n, format!("127.0.0.{n}:{port}"));
    }
    add("good", 200, slow.address());
    for n in 1..=250 {
        add("refuses", n, format!("127.0.1.{n}:{refuses}"));
    }
    for (n, silent) in silent.iter().enumerate() {
        add("silent", n, silent.address());
    }
    fastrand::shuffle(&mut addresses);
    let sessions = addresses
        .iter()
        .map(|(id, address)| Session::new("node", &**address).with_id(&**id));
    let registry = Fixed::new(sessions).unwrap();

    let before = tasks();
    let began = Instant::now();
    let manager = ConnectionManager::builder(registry).build();
    let channel = manager.channel("node");
    // Whoever calls has not to wait for the slow ones, and not for the last of the others either.
    assert_eq!(call(&channel).await.unwrap(), "good");
    let first = began.elapsed();
    let ready = manager.ready("node", 199, Duration::from_secs(20)).await;
    ready.unwrap_or_else(|error| panic!("{error}"));
    let most = began.elapsed();
    let ready = manager.ready("node", 200, Duration::from_secs(20)).await;
    ready.unwrap_or_else(|error| panic!("{error}"));
    let all = began.elapsed();
    println!("the first after {first:?}, 199 after {most:?}, all 200 after {all:?}");
    assert!(first < Duration::from_secs(1), "{first:?}");
    // The slow one takes several times its delay: TCP's handshake, HTTP/2's and a ping go through the proxy.
    assert!(all < 4 * slowness + Duration::from_secs(1), "{all:?}");
    let state = |what: &str, state: Connectivity| {
        let status = manager.status();
        let of_them = status.roles[0].endpoints.iter();
        let of_them = of_them.filter(|e| e.peer.id.starts_with(what));
        of_them.filter(|e| e.state == state).count()
    };
    assert_eq!(state("good", Connectivity::Ready), 200);
    assert_eq!(state("silent", Connectivity::Connecting), 50);
    assert_eq!(state("refuses", Connectivity::Ready), 0);
    eventually("those that refuse are offline", || {
        state("refuses", Connectivity::Offline) == 250
    })
    .await;
    // And it ends at once, with fifty dials under way.
    let stopping = Instant::now();
    manager.stop().await;
    assert!(stopping.elapsed() < Duration::from_secs(1));
    drop((manager, channel));
    eventually("no task is left", || tasks() == before).await;
}

#[tokio::test]
async fn with_etcd_and_every_dependency_down_a_manager_starts_at_once_and_finds_them_later() {
    let mut etcd = Etcd::stopped();
    let registry = EtcdRegistry::connect([etcd.endpoint()], "test")
        .await
        .unwrap();
    let began = Instant::now();
    let manager = ConnectionManager::builder(registry.clone()).build();
    let roles = ["root", "query", "data", "index"];
    let mut watches = Vec::new();
    for role in roles {
        manager.depends_on(role).unwrap();
        watches.push(manager.watch(role));
        assert!(manager.channels(role).unwrap().is_empty());
    }
    println!("{}", manager.status());
    assert!(
        began.elapsed() < Duration::from_millis(200),
        "{:?}",
        began.elapsed()
    );
    for role in roles {
        let began = Instant::now();
        call(&manager.channel(role)).await.unwrap_err();
        assert!(began.elapsed() < Duration::from_secs(1));
    }
    // Etcd comes, and the dependencies after it, the last of those that were asked for first.
    etcd.restart().await;
    let mut held = Vec::new();
    for role in roles.iter().rev() {
        let server = EchoServer::start(role);
        let session = Session::new(*role, server.address());
        let registration = registry
            .register(session)
            .wait(Duration::from_secs(10))
            .unwrap()
            .await
            .unwrap();
        held.push((server, registration));
    }
    let all = roles.map(|role| manager.ready(role, 1, Duration::from_secs(5)));
    for ready in futures_util::future::join_all(all).await {
        ready.unwrap_or_else(|error| panic!("{error}"));
    }
    for (role, watch) in roles.iter().zip(&mut watches) {
        assert_eq!(call(&manager.channel(role)).await.unwrap(), *role);
        while !matches!(watch.next().await, Some(InstanceChange::Ready(_))) {}
    }
}

/// Of this process, in KiB.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_thousand_starts_and_stops_leave_no_task_no_socket_and_no_memory() {
    let registry = MemoryRegistry::new();
    let server = EchoServer::start("a");
    let session = Session::new("echo", server.address()).with_id("a");
    let _held = registry.register(session).await.unwrap();
    let before = tasks();
    let mut after_100 = 0;
    for n in 0..1_000 {
        let manager = ConnectionManager::builder(registry.clone()).build();
        let mut watch = manager.watch("echo");
        let mut events = manager.events();
        let channel = manager.channel("echo");
        call(&channel).await.unwrap();
        while !matches!(watch.next().await, Some(InstanceChange::Ready(_))) {}
        assert!(events.next().await.is_some());
        // Stopped, stopped with a call in flight, only dropped, released.
        match n % 4 {
            0 => manager.stop().await,
            1 => {
                let started = server.seen.started.load(SeqCst);
                let long = EchoRequest {
                    delay_ms: 60_000,
                    ..EchoRequest::default()
                };
                let mut client = EchoClient::new(channel.clone());
                let calling = tokio::spawn(async move { client.unary(long).await });
                eventually("it is in flight", || {
                    server.seen.started.load(SeqCst) > started
                })
                .await;
                manager.stop().await;
                calling.await.unwrap().unwrap_err();
            }
            2 => {}
            _ => assert!(manager.release("echo").unwrap()),
        }
        drop((manager, channel, watch, events));
        if n == 100 {
            after_100 = resident();
        }
    }
    eventually("no task is left", || tasks() == before).await;
    eventually("no socket is left", || {
        sockets_to(server.address.port()) == 0
    })
    .await;
    let grown = resident().saturating_sub(after_100);
    println!("{grown} KiB more after 1,000 than after 100");
    // A manager that stayed would keep its connection's windows and buffers: 100 KiB and more.
    assert!(grown < 8 * 1024, "{grown} KiB more than after 100");
}
