//! Events as `tracing` has them.
//!
//! Alone in its process: what one thread's subscriber hears of a first event may depend on what others' do at that
//! moment.

mod support;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use support::{eventually, server::EchoServer, subscriber::OnEvent};
use switchboard::{
    Backoff, ConnectionManager, MemoryRegistry, Session, manager::Connectivity, pool::PoolConfig,
};

/// Takes down the fields of an event.
struct Reading<'a>(&'a mut BTreeMap<String, String>);

impl tracing::field::Visit for Reading<'_> {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        self.0.insert(field.name().to_owned(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &tracing::field::Field, value: &str) {
        self.0.insert(field.name().to_owned(), value.to_owned());
    }
}

#[tokio::test]
async fn tracing_has_the_events_too_under_names_that_stay() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let keep = seen.clone();
    let _guard = tracing::subscriber::set_default(OnEvent(move |event: &tracing::Event<'_>| {
        let mut fields = BTreeMap::new();
        event.record(&mut Reading(&mut fields));
        let level = event.metadata().level().to_string();
        fields.insert("level".to_owned(), level);
        keep.lock().unwrap().push(fields);
    }));
    let registry = MemoryRegistry::new();
    let mut server = EchoServer::start("a");
    let session = Session::new("echo", server.address()).with_id("a");
    let _of_a = registry.register(session).await.unwrap();
    // Fails twice within 10 ms, and is probed every 100 ms then.
    let every = |ms| Backoff::constant(Duration::from_millis(ms), 0.0).unwrap();
    let config = PoolConfig::default().attempts(2).unwrap();
    let config = config.backoff(every(10)).probe(Some(every(100)));
    let builder = ConnectionManager::builder(registry.clone());
    let manager = builder.pools(config).build();
    manager.depends_on("echo").unwrap();
    manager
        .ready("echo", 1, Duration::from_secs(5))
        .await
        .unwrap();
    server.killed().await;
    eventually("it is offline", || {
        manager.channels("echo").unwrap()[0].state() == Connectivity::Offline
    })
    .await;
    manager.stop().await;

    let seen = seen.lock().unwrap();
    let of = |name: &str| {
        let event = seen.iter().find(|e| e["event"] == name);
        event.unwrap_or_else(|| panic!("{name} is not in {seen:#?}"))
    };
    let keys = |name: &str| {
        let keys: Vec<_> = of(name).keys().map(String::as_str).collect();
        keys.join(" ")
    };
    assert_eq!(keys("watching"), "event level role");
    assert_eq!(keys("connected"), "address event generation id level role");
    assert_eq!(
        keys("offline"),
        "address attempts error event generation id level next_ms role"
    );
    let offline = of("offline");
    assert_eq!(offline["role"], "echo");
    assert_eq!(offline["id"], "a");
    assert_eq!(offline["address"], server.address());
    assert_eq!(offline["attempts"], "2");
    assert_eq!(offline["next_ms"], "100");
    assert!(
        offline["error"].contains("connection refused"),
        "{offline:?}"
    );
    assert_eq!(
        (&*of("connected")["level"], &*offline["level"]),
        ("INFO", "WARN")
    );
    of("stopped");
}
