//! A session that says that it is elsewhere now: its calls go on where it was until it is reached where it is.

mod support;

use std::{net::SocketAddr, sync::atomic::Ordering::SeqCst, time::Duration};

use support::{
    etcd::free_port,
    eventually,
    load::Load,
    proxy::Blackhole,
    server::{
        EchoServer, Options,
        pb::{EchoRequest, echo_client::EchoClient},
    },
    sockets_to,
};
use switchboard::{
    Backoff, Channel, ConnectionManager, Error, Kind, MemoryRegistry, Registration, Session,
    manager::{Builder, Connectivity},
    pool::{PoolConfig, status::EndpointStatus},
    transport::{Connector, HealthCheck},
};
use tokio::{
    task::JoinHandle,
    time::{sleep, timeout},
};
use tonic::Status;
use tonic_health::ServingStatus;

/// A session of role `echo` with id 7 that has been called where it is, and then has moved.
struct Moved {
    old: EchoServer,
    registry: MemoryRegistry,
    registration: Registration,
    manager: ConnectionManager,
    channel: Channel,
}

/// Where nobody is for now: refused at once.
fn nobody() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], free_port()))
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A manager that tries again four times a second, for ever.
fn eager(registry: &MemoryRegistry) -> Builder {
    let every = Backoff::constant(ms(250), 0.2).unwrap();
    let pools = PoolConfig::default().backoff(every).probe(Some(every));
    ConnectionManager::builder(registry.clone()).pools(pools)
}

impl Moved {
    /// Who is connected at `old`.
    async fn from(old: EchoServer, with: impl FnOnce(Builder) -> Builder) -> Self {
        let registry = MemoryRegistry::new();
        let session = Session::new("echo", old.address()).with_id(7);
        let registration = registry.register(session).await.unwrap();
        let manager = with(eager(&registry)).build();
        let channel = manager.channel("echo");
        assert_eq!(call(&channel, 0).await.unwrap(), "old");
        Self {
            old,
            registry,
            registration,
            manager,
            channel,
        }
    }

    async fn to(&mut self, address: impl ToString) {
        let to = address.to_string();
        let moved = self.registration.update(|s| s.with_address(to));
        moved.await.unwrap();
    }

    fn shown(&self) -> EndpointStatus {
        let status = self.manager.status();
        let [role] = &status.roles[..] else {
            panic!("{status}")
        };
        let [endpoint] = &role.endpoints[..] else {
            panic!("{status}")
        };
        endpoint.clone()
    }

    /// It has been tried where it is now, in vain.
    async fn tried(&self) {
        eventually("it is tried where it is", || self.shown().attempts > 0).await;
    }

    /// So many calls that are answered in a minute, where it was.
    async fn in_flight(&self, n: usize) -> Vec<JoinHandle<Result<String, Status>>> {
        let before = self.old.seen.started.load(SeqCst);
        let calls = (0..n).map(|_| {
            let channel = self.channel.clone();
            tokio::spawn(async move { call(&channel, 60_000).await })
        });
        let calls = calls.collect();
        let started = || self.old.seen.started.load(SeqCst) - before;
        eventually("all are in flight", || started() == n).await;
        calls
    }
}

async fn call(channel: &Channel, delay_ms: u32) -> Result<String, Status> {
    let request = EchoRequest {
        delay_ms,
        ..EchoRequest::default()
    };
    let answer = EchoClient::new(channel.clone()).unary(request).await?;
    Ok(answer.into_inner().server)
}

async fn called(channel: &Channel, id: &str) {
    for channel in [channel.clone(), channel.to(7)] {
        assert_eq!(call(&channel, 0).await.unwrap(), id);
    }
}

/// Says of its health whether it serves.
async fn says(server: &EchoServer, serves: bool) {
    let reporter = server.health.as_ref().expect("it serves health");
    let status = match serves {
        true => ServingStatus::Serving,
        false => ServingStatus::NotServing,
    };
    reporter.set_service_status("echo", status).await;
}

async fn all_end_with(kind: Kind, calls: Vec<JoinHandle<Result<String, Status>>>) {
    for call in calls {
        let status = timeout(Duration::from_secs(1), call).await;
        let status = status.expect("at once").unwrap().unwrap_err();
        assert_eq!(Error::of(&status).map(Error::kind), Some(kind), "{status}");
    }
}

#[tokio::test]
async fn calls_go_on_where_it_was_until_it_is_reached_where_it_is() {
    let mut it = Moved::from(EchoServer::start("old"), |builder| builder).await;
    let channel = it.channel.clone();
    let (long, ()) = tokio::join!(call(&channel, 3000), async {
        let load = Load::start(&it.channel, 0);
        // Nothing answers there, then nobody listens there, then it does.
        let nowhere = Blackhole::new();
        it.to(&nowhere.address).await;
        sleep(ms(300)).await;
        let to = nobody();
        it.to(to).await;
        it.tried().await;
        called(&it.channel, "old").await;

        let shown = it.shown();
        assert_eq!(shown.state, Connectivity::Ready);
        assert_eq!(*shown.peer.address, to.to_string());
        assert_eq!(*shown.former.unwrap().address, it.old.address());
        let why = shown.last_error.unwrap().to_string();
        assert!(why.contains("refused"), "{why}");
        let table = it.manager.status().to_string();
        let where_it_is = format!("{to}, still {}", it.old.address());
        assert!(table.contains(&where_it_is), "{table}");
        let json = serde_json::to_value(it.manager.status()).unwrap();
        let json = &json["roles"][0]["instances"][0];
        assert_eq!(json["address"], to.to_string());
        assert_eq!(json["former_address"], it.old.address());

        let new = EchoServer::start_at("new", to);
        eventually("it is reached", || new.seen.started.load(SeqCst) > 20).await;
        called(&it.channel, "new").await;
        let shown = it.shown();
        assert_eq!((shown.state, shown.attempts), (Connectivity::Ready, 0));
        assert!(shown.former.is_none() && shown.last_error.is_none());
        assert_eq!(sockets_to(it.old.address.port()), 1, "a call goes on there");
        // No call has failed on the way.
        load.all_answered().await;
        let at_old = it.old.seen.started.load(SeqCst);
        sleep(ms(100)).await;
        called(&it.channel, "new").await;
        assert_eq!(it.old.seen.started.load(SeqCst), at_old);
        assert_eq!(sockets_to(to.port()), 1);
    });
    assert_eq!(long.unwrap(), "old");
    eventually("it is closed with its last call", || {
        sockets_to(it.old.address.port()) == 0
    })
    .await;
}

#[tokio::test]
async fn once_it_is_lost_where_it_was_only_where_it_is_counts() {
    let mut it = Moved::from(EchoServer::start("old"), |builder| builder).await;
    let to = nobody();
    it.to(to).await;
    it.tried().await;
    called(&it.channel, "old").await;
    // When it ends where it was, and another is there
    let address = it.old.address;
    it.old.killed().await;
    let other = EchoServer::start_at("other", address);
    eventually("its loss is seen", || it.shown().former.is_none()).await;
    // Then calls fail at once, and name where it is,
    let status = timeout(ms(500), call(&it.channel.to(7), 0)).await;
    let status = status.expect("at once").unwrap_err();
    assert!(status.message().contains(&to.to_string()), "{status}");
    // and nobody goes back.
    sleep(Duration::from_secs(1)).await;
    assert_eq!(sockets_to(address.port()), 0);
    assert_eq!(other.seen.started.load(SeqCst), 0);
    let _new = EchoServer::start_at("new", to);
    eventually("it is reached", || it.shown().state == Connectivity::Ready).await;
    called(&it.channel, "new").await;
}

#[tokio::test]
async fn where_it_was_no_other_connection_is_opened() {
    // Given a peer that would be given another connection for a second call
    let one_stream = Options {
        max_streams: Some(1),
        ..Options::default()
    };
    let old = EchoServer::start_with("old", one_stream);
    let mut it = Moved::from(old, |builder| builder).await;
    it.to(nobody()).await;
    it.tried().await;
    // Then such calls follow one another, as whoever else could be reached there might not be it.
    let calls = (0..8).map(|_| call(&it.channel, 100));
    for answer in futures_util::future::join_all(calls).await {
        assert_eq!(answer.unwrap(), "old");
    }
    assert_eq!(it.shown().connections, 1);
    assert_eq!(it.old.seen.most_at_once.load(SeqCst), 1);
}

#[tokio::test]
async fn what_ends_the_session_ends_it_where_it_was() {
    let mut it = Moved::from(EchoServer::start("old"), |builder| builder).await;
    let calls = it.in_flight(5).await;
    it.to(nobody()).await;
    it.tried().await;
    it.registration.deregister().await.unwrap();
    all_end_with(Kind::SessionDeleted, calls).await;
    let status = call(&it.channel, 0).await.unwrap_err();
    assert_eq!(Error::of(&status).unwrap().kind(), Kind::NoSession);
    eventually("it is closed", || sockets_to(it.old.address.port()) == 0).await;
}

#[tokio::test]
async fn one_that_has_moved_and_stops_takes_no_more_calls_where_it_was() {
    for at_once in [false, true] {
        let mut it = Moved::from(EchoServer::start("old"), |builder| builder).await;
        let long = tokio::spawn({
            let channel = it.channel.clone();
            async move { call(&channel, 1000).await }
        });
        let seen = it.old.seen.clone();
        let started = || seen.started.load(SeqCst);
        eventually("it is in flight", || started() == 2).await;
        let to = nobody();
        if !at_once {
            it.to(to).await;
            it.tried().await;
        }
        let stops = it
            .registration
            .update(|s| s.with_address(to.to_string()).with_stopping(true));
        stops.await.unwrap();
        eventually("that is known", || it.shown().target.stopping()).await;
        assert!(it.shown().former.is_none());
        let status = call(&it.channel, 0).await.unwrap_err();
        let kind = Error::of(&status).map(Error::kind);
        assert_eq!(kind, Some(Kind::NotConnected), "{status}");
        assert_eq!(long.await.unwrap().unwrap(), "old", "it finishes");
        assert_eq!(started(), 2);
        eventually("it is closed", || sockets_to(it.old.address.port()) == 0).await;
    }
}

#[tokio::test]
async fn where_another_has_taken_its_address_it_is_not_called_where_it_was_either() {
    let mut it = Moved::from(EchoServer::start("old"), |builder| builder).await;
    let calls = it.in_flight(3).await;
    let other = EchoServer::start("other");
    let to = nobody();
    it.to(to).await;
    it.tried().await;
    // Given a younger session at the address that it claims
    let session = Session::new("echo", to.to_string()).with_id(8);
    let _held = it.registry.register(session).await.unwrap();
    drop(other);
    // Then it is not to be called, wherever that would be.
    let barred = || {
        let status = it.manager.status();
        let mut all = status.roles[0].endpoints.iter();
        all.any(|e| &*e.peer.id == "7" && e.state == Connectivity::Barred)
    };
    eventually("it is barred", barred).await;
    all_end_with(Kind::SessionDeleted, calls).await;
    let status = call(&it.channel.to(7), 0).await.unwrap_err();
    let why = format!("its address {to} now belongs to instance 8");
    assert!(status.message().contains(&why), "{status}");
    eventually("it is closed", || sockets_to(it.old.address.port()) == 0).await;
}

#[tokio::test]
async fn what_is_said_where_it_is_counts_and_not_what_was_said_where_it_was() {
    let health = |id: &str| {
        let options = Options {
            health: true,
            ..Options::default()
        };
        EchoServer::start_with(id, options)
    };
    let old = health("old");
    says(&old, true).await;
    let check = Connector::new().health_check(HealthCheck::Role);
    let mut it = Moved::from(old, |builder| builder.connector(check)).await;
    let to = nobody();
    it.to(to).await;
    it.tried().await;
    // Where it was it says that it does not serve, then that it does.
    says(&it.old, false).await;
    eventually("it is believed", || it.shown().state != Connectivity::Ready).await;
    assert!(call(&it.channel, 0).await.is_err());
    says(&it.old, true).await;
    eventually("that too", || it.shown().state == Connectivity::Ready).await;
    called(&it.channel, "old").await;
    // Where it is, it says that it does not.
    let new = EchoServer::start_with(
        "new",
        Options {
            health: true,
            address: Some(to),
            ..Options::default()
        },
    );
    eventually("it is believed", || {
        it.shown().state == Connectivity::NotServing
    })
    .await;
    assert!(call(&it.channel, 0).await.is_err());
    eventually("where it was it is closed", || {
        sockets_to(it.old.address.port()) == 0
    })
    .await;
    says(&new, true).await;
    eventually("it serves", || it.shown().state == Connectivity::Ready).await;
    called(&it.channel, "new").await;
}

#[tokio::test]
async fn a_role_that_nobody_uses_lets_go_of_it_where_it_was() {
    let idle = |builder: Builder| builder.idle_after(Some(Duration::from_secs(1))).unwrap();
    let mut it = Moved::from(EchoServer::start("old"), idle).await;
    let to = nobody();
    it.to(to).await;
    it.tried().await;
    eventually("it is idle", || it.manager.status().roles[0].idle).await;
    eventually("it is closed", || sockets_to(it.old.address.port()) == 0).await;
    // Whoever wakes it finds it where it is.
    let _new = EchoServer::start_at("new", to);
    called(&it.channel, "new").await;
    assert_eq!(sockets_to(it.old.address.port()), 0);
}

#[tokio::test]
async fn a_stop_closes_it_where_it_was() {
    let mut it = Moved::from(EchoServer::start("old"), |builder| builder).await;
    let calls = it.in_flight(3).await;
    it.to(nobody()).await;
    it.tried().await;
    it.manager.stop().await;
    all_end_with(Kind::Stopped, calls).await;
    assert_eq!(sockets_to(it.old.address.port()), 0);
}
