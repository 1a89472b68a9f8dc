//! Who calls are for, on the wire: what they carry, and a server that says that it is another.

mod support;

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering::SeqCst},
    time::{Duration, Instant},
};

use support::{
    eventually,
    proxy::Proxy,
    server::{
        EchoServer, Node, Options,
        pb::{EchoRequest, echo_client::EchoClient},
    },
};
use switchboard::{
    Backoff, Channel, ConnectionManager, Error, Kind, MemoryRegistry, Registration, Registry as _,
    Sent, Session,
    discover::{Change, Update},
    manager::{Connectivity, EndpointStatus},
    pool::PoolConfig,
    registry::Milvus,
};
use tokio::time;
use tokio_stream::StreamExt as _;
use tonic::{Code, Request, Status};

fn milvus() -> MemoryRegistry {
    MemoryRegistry::new().with_codec(Milvus::new())
}

fn server(node: &Arc<Node>) -> EchoServer {
    let options = Options {
        node: Some(node.clone()),
        ..Options::default()
    };
    EchoServer::start_with("echo", options)
}

/// A session of this id, with the server behind a proxy that counts who dials.
async fn behind_a_proxy(
    registry: &MemoryRegistry,
    id: i64,
    server: SocketAddr,
) -> (Proxy, Registration) {
    let proxy = Proxy::start(server).await;
    let session = Session::new("echo", proxy.address()).with_id(id);
    (proxy, registry.register(session).await.unwrap())
}

async fn call(channel: &Channel, delay_ms: u32) -> Result<String, Status> {
    let request = EchoRequest {
        delay_ms,
        ..EchoRequest::default()
    };
    let answer = EchoClient::new(channel.clone()).unary(request).await?;
    Ok(answer.into_inner().server)
}

fn kind(result: &Result<String, Status>) -> Option<Kind> {
    Error::of(result.as_ref().err()?).map(Error::kind)
}

fn endpoint(manager: &ConnectionManager, id: &str) -> Option<EndpointStatus> {
    let status = manager.status();
    let mut endpoints = status.roles.into_iter().flat_map(|role| role.endpoints);
    endpoints.find(|endpoint| &*endpoint.peer.id == id)
}

fn state(manager: &ConnectionManager, id: &str) -> Option<Connectivity> {
    endpoint(manager, id).map(|endpoint| endpoint.state)
}

#[tokio::test]
async fn calls_say_who_they_are_for_where_the_codec_does() {
    let node = Node::new(7);
    let server = server(&node);
    let session = Session::new("echo", server.address()).with_id(7);
    let in_a_cluster = Milvus::new().with_cluster("by-dev").unwrap();
    for (registry, expected) in [
        (milvus(), "7 -"),
        (MemoryRegistry::new().with_codec(in_a_cluster), "7 by-dev"),
        (MemoryRegistry::new(), "- -"),
    ] {
        let _registration = registry.register(session.clone()).await.unwrap();
        let manager = ConnectionManager::builder(registry).build();
        let channel = manager.channel("echo");
        for _ in 0..2 {
            call(&channel, 0).await.unwrap();
        }
        let asked = std::mem::take(&mut *node.asked.lock().unwrap());
        assert_eq!(asked, [expected; 2]);
    }
}

#[tokio::test]
async fn a_call_for_another_instance_is_not_executed_and_its_endpoint_is_offline() {
    let node = Node::new(8);
    let server = server(&node);
    let registry = milvus();
    let (proxy, mut registration) = behind_a_proxy(&registry, 7, server.address).await;
    let manager = ConnectionManager::builder(registry.clone()).build();
    let channel = manager.channel("echo");
    // What the registry says before is no reason to dial afterwards.
    eventually("it is connected", || {
        state(&manager, "7") == Some(Connectivity::Ready)
    })
    .await;
    let relabel = |session: Session| session.with_metadata("before", "");
    registration.update(relabel).await.unwrap();
    eventually("it was heard", || {
        let endpoint = endpoint(&manager, "7");
        endpoint.is_some_and(|endpoint| format!("{:?}", endpoint.target).contains("before"))
    })
    .await;

    let status = call(&channel, 0).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    let error = Error::of(&status).expect("it is an error of ours");
    assert_eq!(
        (error.kind(), error.sent()),
        (Kind::OtherInstance, Sent::Unprocessed)
    );
    assert_eq!(error.peer().map(|peer| &*peer.id), Some("7"));
    let message = status.message();
    for part in [
        "another instance answers there",
        &format!("echo 7 at {}", proxy.address()),
        "node not match[expectedNodeID=7][actualNodeID=8]",
    ] {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }

    // Without another call that would find it out.
    eventually("it is offline", || {
        state(&manager, "7") == Some(Connectivity::Offline)
    })
    .await;
    let last = endpoint(&manager, "7").and_then(|e| e.last_error).unwrap();
    assert!(last.to_string().contains("node not match"), "{last}");

    // Nobody dials in a loop, whoever calls; what calls fail with says why.
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(500) {
        for channel in [&channel, &channel.to(7)] {
            let result = call(channel, 0).await;
            assert_eq!(kind(&result), Some(Kind::NotConnected), "{result:?}");
            let message = result.unwrap_err().message().to_owned();
            assert!(message.contains("node not match"), "{message}");
        }
        time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(proxy.accepted.load(SeqCst), 1);

    // The registry's next word is followed once, and no further.
    let relabel = |session: Session| session.with_metadata("n", "1");
    registration.update(relabel).await.unwrap();
    eventually("it is connected again", || {
        state(&manager, "7") == Some(Connectivity::Ready)
    })
    .await;
    let result = call(&channel, 0).await;
    assert_eq!(kind(&result), Some(Kind::OtherInstance), "{result:?}");
    eventually("it is offline again", || {
        state(&manager, "7") == Some(Connectivity::Offline)
    })
    .await;
    assert_eq!(proxy.accepted.load(SeqCst), 2);
    assert_eq!(server.seen.started.load(SeqCst), 0, "none was executed");

    // And when its own server is there, it is as ever.
    node.id.store(7, SeqCst);
    let relabel = |session: Session| session.with_metadata("n", "2");
    registration.update(relabel).await.unwrap();
    eventually("it is connected", || {
        state(&manager, "7") == Some(Connectivity::Ready)
    })
    .await;
    call(&channel, 0).await.unwrap();
}

#[tokio::test]
async fn the_slow_probe_finds_the_instance_when_it_is_back() {
    let node = Node::new(8);
    let server = server(&node);
    let registry = milvus();
    let (proxy, _registration) = behind_a_proxy(&registry, 7, server.address).await;
    let probe = Backoff::constant(Duration::from_millis(300), 0.0).unwrap();
    let manager = ConnectionManager::builder(registry)
        .pools(PoolConfig::default().probe(Some(probe)))
        .build();
    let channel = manager.channel("echo");
    let result = call(&channel, 0).await;
    assert_eq!(kind(&result), Some(Kind::OtherInstance), "{result:?}");
    node.id.store(7, SeqCst);
    eventually("it was probed", || {
        proxy.accepted.load(SeqCst) == 2 && state(&manager, "7") == Some(Connectivity::Ready)
    })
    .await;
    call(&channel, 0).await.unwrap();
}

#[tokio::test]
async fn calls_in_flight_are_left_to_finish() {
    // Given a server that was 7 when calls began, and says that it is 8 now
    let node = Node::new(7);
    let server = server(&node);
    let registry = milvus();
    let (proxy, _registration) = behind_a_proxy(&registry, 7, server.address).await;
    let manager = ConnectionManager::builder(registry).build();
    let channel = manager.channel("echo");
    let slow: Vec<_> = (0..10)
        .map(|_| {
            let channel = channel.clone();
            tokio::spawn(async move { call(&channel, 1000).await })
        })
        .collect();
    eventually("they are there", || server.seen.started.load(SeqCst) == 10).await;
    node.id.store(8, SeqCst);
    // When another call is refused, and the endpoint goes offline
    let result = call(&channel, 0).await;
    assert_eq!(kind(&result), Some(Kind::OtherInstance), "{result:?}");
    eventually("it is offline", || {
        state(&manager, "7") == Some(Connectivity::Offline)
    })
    .await;
    assert_eq!(server.seen.finished.load(SeqCst), 0);
    // Then no new call goes out, and the old ones end well.
    let result = call(&channel, 0).await;
    assert_eq!(kind(&result), Some(Kind::NotConnected), "{result:?}");
    for call in slow {
        assert_eq!(call.await.unwrap().unwrap(), "echo");
    }
    assert_eq!(proxy.accepted.load(SeqCst), 1);
}

#[tokio::test]
async fn a_session_that_is_deleted_after_that_ends_them_all_the_same() {
    let node = Node::new(7);
    let server = server(&node);
    let registry = milvus();
    let session = Session::new("echo", server.address()).with_id(7);
    let registration = registry.register(session).await.unwrap();
    let manager = ConnectionManager::builder(registry).build();
    let channel = manager.channel("echo");
    let slow = tokio::spawn({
        let channel = channel.clone();
        async move { call(&channel, 60_000).await }
    });
    eventually("it is there", || server.seen.started.load(SeqCst) == 1).await;
    node.id.store(8, SeqCst);
    let result = call(&channel, 0).await;
    assert_eq!(kind(&result), Some(Kind::OtherInstance), "{result:?}");
    registration.deregister().await.unwrap();
    let result = time::timeout(Duration::from_secs(10), slow).await.unwrap();
    let result = result.unwrap();
    assert_eq!(kind(&result), Some(Kind::SessionDeleted), "{result:?}");
}

#[tokio::test]
async fn calls_of_anybody_go_on_to_those_who_are_who_they_say() {
    let node = Node::new(8);
    let server = server(&node);
    let registry = milvus();
    let (gone, _seven) = behind_a_proxy(&registry, 7, server.address).await;
    let (_here, _eight) = behind_a_proxy(&registry, 8, server.address).await;
    let manager = ConnectionManager::builder(registry).build();
    let channel = manager.channel("echo");
    let result = call(&channel.to(7), 0).await;
    assert_eq!(kind(&result), Some(Kind::OtherInstance), "{result:?}");
    eventually("it is offline", || {
        state(&manager, "7") == Some(Connectivity::Offline)
    })
    .await;
    for _ in 0..100 {
        call(&channel, 0).await.unwrap();
    }
    assert_eq!(gone.accepted.load(SeqCst), 1);
    let asked = node.asked.lock().unwrap().clone();
    assert_eq!(asked.iter().filter(|asked| *asked == "7 -").count(), 1);
}

#[tokio::test]
async fn what_a_server_hands_on_from_another_is_its_own_answer() {
    let node = Node::new(7);
    let server = server(&node);
    let registry = milvus();
    let (proxy, _registration) = behind_a_proxy(&registry, 7, server.address).await;
    let manager = ConnectionManager::builder(registry).build();
    let channel = manager.channel("echo");
    let request = EchoRequest {
        message: "node not match[expectedNodeID=9][actualNodeID=10]".to_owned(),
        fail_with: Code::Unknown as u32,
        ..EchoRequest::default()
    };
    let status = EchoClient::new(channel.clone()).unary(request).await;
    let status = status.unwrap_err();
    assert!(Error::of(&status).is_none(), "{status:?}");
    assert_eq!(status.code(), Code::Unknown);
    call(&channel, 0).await.unwrap();
    assert_eq!(state(&manager, "7"), Some(Connectivity::Ready));
    assert_eq!(proxy.accepted.load(SeqCst), 1);
}

#[tokio::test]
async fn a_server_that_is_not_told_who_is_meant_may_say_what_it_likes() {
    let server = EchoServer::start("echo");
    let registry = MemoryRegistry::new();
    let session = Session::new("echo", server.address()).with_id(7);
    let _registration = registry.register(session).await.unwrap();
    let manager = ConnectionManager::builder(registry).build();
    let channel = manager.channel("echo");
    let request = EchoRequest {
        message: "node not match".to_owned(),
        fail_with: Code::Unknown as u32,
        ..EchoRequest::default()
    };
    let status = EchoClient::new(channel.clone()).unary(request).await;
    let status = status.unwrap_err();
    assert!(Error::of(&status).is_none(), "{status:?}");
    assert_eq!(state(&manager, "7"), Some(Connectivity::Ready));
}

#[tokio::test]
async fn a_request_that_says_it_is_for_another_fails_and_is_not_sent() {
    let node = Node::new(7);
    let server = server(&node);
    let registry = milvus();
    let session = Session::new("echo", server.address()).with_id(7);
    let _registration = registry.register(session).await.unwrap();
    let manager = ConnectionManager::builder(registry).build();
    let mut client = EchoClient::new(manager.channel("echo"));
    for (says, fails) in [("8", true), ("7", false)] {
        let mut request = Request::new(EchoRequest::default());
        let metadata = request.metadata_mut();
        metadata.insert("serverid", says.parse().unwrap());
        let result = client.unary(request).await;
        let error = result.as_ref().err().and_then(|status| Error::of(status));
        let error = error.map(|error| (error.kind(), error.sent()));
        let expected = fails.then_some((Kind::Invalid, Sent::Unsent));
        assert_eq!(error, expected, "{says}: {result:?}");
    }
    assert_eq!(*node.asked.lock().unwrap(), ["7 -"]);
    assert_eq!(state(&manager, "7"), Some(Connectivity::Ready));
}

#[tokio::test]
async fn a_role_sees_its_own_sessions_and_hears_of_their_end_by_key() {
    let registry = milvus();
    let of = |name: &str, id: i64, port: u16, more: &str| {
        format!(r#"{{"ServerID":{id},"ServerName":"{name}","Address":"h:{port}"{more}}}"#)
    };
    registry.put("session/id", "10");
    registry.put("session/echo-7", of("echo", 7, 1, ""));
    registry.put("session/echo2-7", of("echo2", 7, 2, ""));
    registry.put("session/echo-node-5", of("echo-node", 5, 3, ""));
    registry.put("session/echo-9", of("echo", 9, 4, r#","Exclusive":true"#));
    registry.put("session/echo", of("echo", 8, 5, r#","Exclusive":true"#));
    let discovery = registry.discover("echo").unwrap();
    let skipped = discovery.skipped();
    let mut updates = discovery.updates();
    let mut next = async || {
        let next = time::timeout(Duration::from_secs(10), updates.next()).await;
        match next.expect("it is told").expect("it goes on") {
            Update::Change(Change::Insert(key, member)) => {
                format!("+{} {}", key.key, member.session().id())
            }
            Update::Change(Change::Remove(key)) => format!("-{}", key.key),
            Update::Synced => "synced".to_owned(),
            other => panic!("{other:?}"),
        }
    };
    let mut listed = [next().await, next().await];
    listed.sort();
    assert_eq!(listed, ["+session/echo 8", "+session/echo-7 7"]);
    assert_eq!(next().await, "synced");

    // A delete tells no value, and here it is of another role first.
    registry.delete("session/echo2-7");
    registry.delete("session/echo-7");
    assert_eq!(next().await, "-session/echo-7");
    // The standby takes over: under the other key.
    registry.delete("session/echo");
    assert_eq!(next().await, "-session/echo");
    registry.put("session/echo", of("echo", 9, 4, r#","Exclusive":true"#));
    assert_eq!(next().await, "+session/echo 9");
    assert_eq!(skipped.total(), 0, "nothing of it is worth a warning");
}
