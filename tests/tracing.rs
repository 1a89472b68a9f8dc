//! Events as `tracing` has them.
//!
//! Alone in its process: what one thread's subscriber hears of a first event may depend on what others' do at that
//! moment.

mod support;

use std::{collections::BTreeMap, time::Duration};

use support::{eventually, server::EchoServer};
use switchboard::{
    Backoff, ConnectionManager, MemoryRegistry, Session, manager::Connectivity, pool::PoolConfig,
};

/// Keeps the fields of each event of ours.
#[derive(Clone, Default)]
struct Fields(std::sync::Arc<std::sync::Mutex<Vec<BTreeMap<String, String>>>>);

struct Reading<'a>(&'a mut BTreeMap<String, String>);

impl tracing::field::Visit for Reading<'_> {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        self.0.insert(field.name().to_owned(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &tracing::field::Field, value: &str) {
        self.0.insert(field.name().to_owned(), value.to_owned());
    }
}

impl tracing::Subscriber for Fields {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target() == "switchboard::events"
    }

    fn event(&self, event: &tracing::Event<'_>) {
        let mut fields = BTreeMap::new();
        event.record(&mut Reading(&mut fields));
        let level = event.metadata().level().to_string();
        fields.insert("level".to_owned(), level);
        self.0.lock().unwrap().push(fields);
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
async fn tracing_has_the_events_too_under_names_that_stay() {
    let fields = Fields::default();
    let _guard = tracing::subscriber::set_default(fields.clone());
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

    let seen = fields.0.lock().unwrap();
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
