//! Calls that spread, fail fast and recover, in under fifteen seconds and in one process.
//!
//!     cargo run --example quickstart
//!
//! Three real tonic servers register in the embedded registry, and a client calls their role. One server
//! is killed, and comes back elsewhere. The program prints what is to be seen, and exits with 1 if any of
//! it is not as it should be. `demo/mod.rs` has the story.

mod demo;

use std::{process::ExitCode, time::Duration};

use switchboard::{
    Error,
    registry::{MemoryRegistry, Registration, Session},
};

impl demo::Home for MemoryRegistry {
    async fn register(&self, session: Session) -> Result<Registration, Error> {
        Self::register(self, session).await
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    // A server that died is forgotten after three seconds; the default is ten.
    let registry = match MemoryRegistry::new().with_ttl(Duration::from_secs(3)) {
        Ok(registry) => registry,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    demo::run("the embedded registry", registry).await
}
