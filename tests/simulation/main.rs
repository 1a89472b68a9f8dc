//! The crate at the size that no test machine has: 10,000 endpoints and 1,000 clients, on tokio's paused clock.
//!
//! What is real: [`Pool`](switchboard::Pool) with its driver, its snapshots and its choice of endpoint; one endpoint task for
//! each endpoint of each client, with its gate, its turn to dial, its [`Backoff`](switchboard::Backoff) and its probes. They are
//! used as any program can use them: a stream of [`Update`](switchboard::discover::Update)s, fed by hand, and a
//! [`Connect`](switchboard::endpoint::Connect).
//!
//! What is on paper ([`world`]): servers, and the network. A dial takes a time that is written down, and is then answered,
//! refused, or never answered. A call takes its server's time, one after the other, or stays until it is dropped. A server dies
//! for all its clients at the same instant, and the registry reaches all of them at the same instant: that is harder on a server
//! than a network is, which spreads both. There are no sockets, no HTTP/2, no TLS and no etcd. Computing takes no time, so
//! nothing here says how fast anything is.
//!
//! What the paused clock does not govern is what the crate only tells: the times in a pool's status, and how long ago, in errors
//! and events, are by the system's clocks. Nothing is decided by them, and nothing here looks at them.
//!
//! What the scale is:
//!
//! | | clients | endpoints of each | endpoint tasks |
//! | --- | --- | --- | --- |
//! | a server that all know dies and comes back ([`storm`]) | 1,000 | it and 49 of 10,000, each known by 4 or 5 | 50,000 |
//! | all endpoints restart at once, or half of them fall silent ([`restart`]) | 1 | 10,000 | 10,000 |
//! | calls of one client spread ([`spread`]) | 1 | 10,000 | 10,000 |
//! | calls of all clients spread ([`spread`]) | 1,000 | 50 of 10,000, each known by 5 | 50,000 |
//!
//! 1,000 clients that know all 10,000 endpoints would be ten million tasks. They would show nothing else: clients share nothing,
//! and a server sees only those that know it.
//!
//! Chance is seeded: that of the paper, and, as all tasks are on the test's thread, that of the crate. `SWITCHBOARD_SEED` sets it,
//! `--nocapture --test-threads=1` shows the figures. All of it takes 20 s of a processor in a debug build, and 300 MB.

mod restart;
mod spread;
mod storm;
mod world;
