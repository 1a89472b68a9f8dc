//! What others write with a real etcdctl is seen, and what we write is what they expect, byte for byte.

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod support;

use std::time::Duration;

use support::{
    etcd::Etcd,
    eventually_async,
    view::{self, View},
};
use switchboard::{
    EtcdRegistry, Session,
    registry::{Milvus, RegistrationState},
};

const SECOND: Duration = Duration::from_secs(1);

async fn registry(etcd: &Etcd) -> EtcdRegistry {
    view::registry(&[etcd.endpoint()]).await
}

/// The value of a key, as etcdctl prints it.
async fn value_of(etcd: &Etcd, key: &str) -> String {
    etcd.etcdctl(&["get", key, "--print-value-only"]).await
}

/// The lease of a key, as etcdctl's JSON has it: in decimal digits.
async fn lease_of(etcd: &Etcd, key: &str) -> String {
    let json = etcd.etcdctl(&["get", key, "-w", "json"]).await;
    let (_, lease) = json.split_once(r#""lease":"#).expect("it has a lease");
    let digits: String = lease.chars().take_while(char::is_ascii_digit).collect();
    assert!(digits.len() > 1, "{json}");
    digits
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_of_grpc_gos_naming_are_seen_as_etcdctl_puts_them() {
    // Given records as grpc-go's endpoints manager writes them, and some that are none
    let etcd = Etcd::start().await;
    for (key, value) in [
        (
            "demo/echo/10.0.0.1:1",
            r#"{"Op":0,"Addr":"10.0.0.1:1","Metadata":null}"#,
        ),
        (
            "demo/echo/two",
            r#"{"Op":0,"Addr":"10.0.0.2:1","Metadata":"any"}"#,
        ),
        (
            "demo/echo/three",
            r#"{"Op":0,"Addr":"10.0.0.3:1","Metadata":{"Weight":5,"id":33}}"#,
        ),
        ("demo/echo/four", r#"{"Addr":"10.0.0.4:1"}"#),
        // Another service, whose name begins the same.
        (
            "demo/echo_other/1",
            r#"{"Op":0,"Addr":"10.0.0.9:1","Metadata":null}"#,
        ),
        // Deleted, and invalid by grpc-go's own word.
        (
            "demo/echo/five",
            r#"{"Op":1,"Addr":"10.0.0.5:1","Metadata":null}"#,
        ),
        ("demo/echo/six", r#"{"Op":0,"Addr":"","Metadata":null}"#),
    ] {
        etcd.etcdctl(&["put", key, value]).await;
    }

    // When they are listed, then those that are sessions are there
    let mut view = View::listed(&registry(&etcd).await, "echo").await;
    assert_eq!(view.ids(), ["10.0.0.1:1", "33", "four", "two"]);
    let address = |id| view.member(id).map(|m| m.session().address().to_owned());
    assert_eq!(address("33").as_deref(), Some("10.0.0.3:1"));
    assert_eq!(view.skipped.now(), 2);

    // When one is changed and one deleted, then that is seen
    let moved = r#"{"Op":0,"Addr":"10.0.0.22:1","Metadata":null}"#;
    etcd.etcdctl(&["put", "demo/echo/two", moved]).await;
    let is_moved = |v: &View| {
        v.member("two")
            .is_some_and(|m| m.session().address() == "10.0.0.22:1")
    };
    view.until(SECOND, "it moves", is_moved).await;
    etcd.etcdctl(&["del", "demo/echo/four"]).await;
    view.until(SECOND, "it goes", |v| v.member("four").is_none())
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_registered_can_be_read_by_grpc_go() {
    // Given a session that says all it can
    let etcd = Etcd::start().await;
    let session = Session::new("echo", "10.0.0.5:21123")
        .with_id(7)
        .with_version("2.6.0")
        .with_metadata("zone", "a");

    // When it is registered
    let mut held = registry(&etcd)
        .await
        .register(session)
        .await
        .expect("it is free");

    // Then etcdctl prints it as grpc-go would write it, under a lease
    assert_eq!(
        value_of(&etcd, "demo/echo/7").await,
        concat!(
            r#"{"Op":0,"Addr":"10.0.0.5:21123","Metadata":"#,
            r#"{"id":"7","version":"2.6.0","weight":1,"metadata":{"zone":"a"}}}"#
        )
    );
    let before = lease_of(&etcd, "demo/echo/7").await;
    held.stopping().await.expect("it is ours");
    assert_eq!(
        value_of(&etcd, "demo/echo/7").await,
        concat!(
            r#"{"Op":0,"Addr":"10.0.0.5:21123","Metadata":"#,
            r#"{"id":"7","version":"2.6.0","weight":1,"stopping":true,"metadata":{"zone":"a"}}}"#
        )
    );
    assert_eq!(lease_of(&etcd, "demo/echo/7").await, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_of_milvus_are_seen_as_etcdctl_puts_them() {
    // Given sessions as Milvus writes them, and what stands beside them
    let etcd = Etcd::start().await;
    let session = |id: i64, name: &str, more: &str| {
        format!(
            concat!(
                r#"{{"ServerID":{id},"ServerName":"{name}","Address":"10.0.0.{id}:21123",{more}"TriggerKill":true,"#,
                r#""Version":"2.6.0","IndexEngineVersion":{{}},"ScalarIndexEngineVersion":{{}},"#,
                r#""LeaseID":8448064511126318204,"HostName":"qn-0"}}"#
            ),
            id = id,
            name = name,
            more = more,
        )
    };
    for (key, value) in [
        ("querynode-7", session(7, "querynode", "")),
        (
            "querynode-8",
            session(8, "querynode", r#""Stopping":true,"#),
        ),
        ("querynode2-9", session(9, "querynode2", "")),
        ("rootcoord", session(3, "rootcoord", r#""Exclusive":true,"#)),
        // It stands by.
        (
            "rootcoord-5",
            session(5, "rootcoord", r#""Exclusive":true,"#),
        ),
        ("id", "10".to_owned()),
    ] {
        let key = format!("demo/session/{key}");
        etcd.etcdctl(&["put", &key, &value]).await;
    }

    // When a role is looked at, then its own are there and no others
    let registry = registry(&etcd).await.with_codec(Milvus::new());
    let mut nodes = View::listed(&registry, "querynode").await;
    assert_eq!(nodes.ids(), ["7", "8"]);
    let seven = nodes.member("7").expect("it is there").session().clone();
    let expected = Session::new("querynode", "10.0.0.7:21123")
        .with_id(7)
        .with_version("2.6.0");
    assert_eq!(seven, expected);
    let eight = nodes.member("8").expect("it is there");
    assert!(eight.session().is_stopping());
    let mut coord = View::listed(&registry, "rootcoord").await;
    assert_eq!(coord.ids(), ["3"]);
    assert_eq!((nodes.skipped.now(), coord.skipped.now()), (0, 0));

    // When they change and go, then that is seen
    let stopping = session(7, "querynode", r#""Stopping":true,"#);
    etcd.etcdctl(&["put", "demo/session/querynode-7", &stopping])
        .await;
    let stops = |v: &View| v.member("7").is_some_and(|m| m.session().is_stopping());
    nodes.until(SECOND, "it stops", stops).await;
    etcd.etcdctl(&["del", "demo/session/querynode-7"]).await;
    nodes.until(SECOND, "it goes", |v| v.has(&["8"])).await;
    // The standby takes over.
    let five = session(5, "rootcoord", r#""Exclusive":true,"#);
    etcd.etcdctl(&["put", "demo/session/rootcoord", &five])
        .await;
    coord.until(SECOND, "another", |v| v.has(&["5"])).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_registered_in_milvuss_form_is_milvuss_byte_for_byte() {
    // Given Milvus's counter of ids
    let etcd = Etcd::start().await;
    etcd.etcdctl(&["put", "demo/session/id", "41"]).await;
    let registry = registry(&etcd)
        .await
        .with_codec(Milvus::new().with_host_name("qn-0"));

    // When an id is taken from it, then it is what stood there, and the next one stands there
    let id = registry.allocate_id().await.expect("etcd answers");
    assert_eq!(id, 41);
    assert_eq!(value_of(&etcd, "demo/session/id").await, "42");

    // When a session is registered under it
    let session = Session::new("querynode", "10.0.0.5:21123")
        .with_id(id)
        .with_version("2.6.0");
    let mut held = registry.register(session).await.expect("it is free");
    let key = "demo/session/querynode-41";
    let expected = |stopping: &str, lease: &str| {
        format!(
            concat!(
                r#"{{"ServerID":41,"ServerName":"querynode","Address":"10.0.0.5:21123",{}"TriggerKill":true,"#,
                r#""Version":"2.6.0","IndexEngineVersion":{{}},"ScalarIndexEngineVersion":{{}},"#,
                r#""LeaseID":{},"HostName":"qn-0"}}"#
            ),
            stopping, lease
        )
    };

    // Then it is Milvus's, and its LeaseID is that of its key
    let lease = lease_of(&etcd, key).await;
    assert_eq!(value_of(&etcd, key).await, expected("", &lease));

    // When it loses its lease, then that is so of the next
    etcd.etcdctl(&["lease", "revoke", &etcd.lease(key).await])
        .await;
    eventually_async("it is registered again", async || {
        !etcd.lease(key).await.is_empty()
    })
    .await;
    let lease = lease_of(&etcd, key).await;
    assert_eq!(value_of(&etcd, key).await, expected("", &lease));

    // When it is stopping, then it says so where Milvus does, under the same lease
    held.stopping().await.expect("it is ours");
    assert_eq!(lease_of(&etcd, key).await, lease);
    let stopping = expected(r#""Stopping":true,"#, &lease);
    assert_eq!(value_of(&etcd, key).await, stopping);
    held.deregister().await.expect("etcd answers");
    assert_eq!(value_of(&etcd, key).await, "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_in_milvuss_form_stands_by_while_milvus_has_one() {
    // Given an active coordinator of Milvus, and a new cluster's counter, which is not there yet
    let etcd = Etcd::start().await;
    let registry = registry(&etcd).await.with_codec(Milvus::new());
    let id = registry.allocate_id().await.expect("etcd answers");
    assert_eq!((id, &*value_of(&etcd, "demo/session/id").await), (1, "2"));
    let active = concat!(
        r#"{"ServerID":9,"ServerName":"rootcoord","Address":"10.0.0.9:53100","Exclusive":true,"#,
        r#""TriggerKill":true,"Version":"2.6.0","IndexEngineVersion":{},"ScalarIndexEngineVersion":{},"#,
        r#""LeaseID":8448064511126318204}"#
    );
    let key = "demo/session/rootcoord";
    etcd.etcdctl(&["put", key, active]).await;

    // When ours is registered, then it stands by, and says for whom
    let session = Session::new("rootcoord", "10.0.0.5:53100")
        .with_id(id)
        .with_exclusive(true);
    let held = registry.register(session).await.expect("it stands by");
    let state = held.state();
    let RegistrationState::StandBy { active } = &state else {
        panic!("{state}");
    };
    assert!(active.to_string().contains("9 at 10.0.0.9:53100"));

    // When that is gone, then ours is active, in Milvus's form
    etcd.etcdctl(&["del", key]).await;
    held.registered().await.expect("it takes over");
    let lease = lease_of(&etcd, key).await;
    assert_eq!(
        value_of(&etcd, key).await,
        format!(
            concat!(
                r#"{{"ServerID":1,"ServerName":"rootcoord","Address":"10.0.0.5:53100","Exclusive":true,"#,
                r#""TriggerKill":true,"Version":"","IndexEngineVersion":{{}},"ScalarIndexEngineVersion":{{}},"#,
                r#""LeaseID":{}}}"#
            ),
            lease
        )
    );
}
