//! What a peer says of its own health, as gRPC clients watch it: `grpc.health.v1.Health/Watch`, after
//! [gRFC A17](https://github.com/grpc/proposal/blob/master/A17-client-side-health-checking.md).

use std::{sync::Arc, time::Duration};

use futures_core::Stream;
use futures_util::stream;
use tokio::time;
use tonic::{Code, Status, Streaming};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus,
    health_client::HealthClient,
};

use super::{Connection, Connections, core::Core};
use crate::{Backoff, endpoint::Health, error::Peer};

/// Whose health a connection watches; see [`Connector::health_check`](super::Connector::health_check).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum HealthCheck {
    /// Nobody's: a peer that is connected can be called.
    #[default]
    Off,
    /// The server's as a whole, under the empty name.
    Overall,
    /// That of its role, under the role's name.
    Role,
    /// That of the service of this name.
    Service(Arc<str>),
}

/// How long it may take that one connection takes another's place.
const BETWEEN: Duration = Duration::from_millis(5);

/// The watch of one peer, over one of its connections at a time.
struct Watching {
    connections: Connections,
    service: String,
    answers: Option<Answers>,
    /// Streams that failed in a row without an answer.
    failures: u32,
    /// Until when there is no new one.
    pause: Option<Duration>,
    backoff: Backoff,
}

/// What comes over one connection, and what tells when that is about to close: it does so when this ends.
struct Answers {
    stream: Streaming<HealthCheckResponse>,
    over: Arc<Core>,
}

// === impl HealthCheck ===

impl HealthCheck {
    pub(super) fn service_of(&self, peer: &Peer) -> Option<String> {
        match self {
            Self::Off => None,
            Self::Overall => Some(String::new()),
            Self::Role => Some(peer.role.to_string()),
            Self::Service(name) => Some(name.to_string()),
        }
    }
}

/// What the peer says of this service's health. A server that knows of no health service is taken to be well, and
/// there is nothing more to come then; one whose stream fails is not, until the next one answers.
pub(super) fn watch(
    connections: Connections,
    service: String,
) -> impl Stream<Item = Health> + Send + 'static {
    let watching = Watching {
        connections,
        service,
        answers: None,
        failures: 0,
        pause: None,
        backoff: Backoff::default(),
    };
    stream::unfold(Some(watching), async |watching| {
        let mut watching = watching?;
        let (health, over) = watching.next().await;
        Some((health, (!over).then_some(watching)))
    })
}

// === impl Watching ===

impl Watching {
    /// The next word, and whether it is the last.
    async fn next(&mut self) -> (Health, bool) {
        loop {
            if let Some(pause) = self.pause.take() {
                time::sleep(pause).await;
            }
            let Some(answers) = &mut self.answers else {
                // Asking => (listening | unimplemented | failed)
                let Some(connection) = self.connections.for_ourselves() else {
                    if self.connections.is_over() {
                        // Whoever asks learns so otherwise.
                        return std::future::pending().await;
                    }
                    self.pause = Some(BETWEEN);
                    continue;
                };
                let over = connection.core.clone();
                let asked = tokio::select! {
                    biased;
                    () = over.leaves() => continue,
                    asked = self.ask(connection) => asked,
                };
                match asked {
                    Ok(answers) => self.answers = Some(answers),
                    Err(status) if status.code() == Code::Unimplemented => {
                        return (Health::Serving, true);
                    }
                    Err(status) => return (self.failed(&status), false),
                }
                continue;
            };
            // Listening => (listening | asking elsewhere | failed)
            let answer = tokio::select! {
                biased;
                () = answers.over.leaves() => {
                    self.answers = None;
                    continue;
                }
                answer = answers.stream.message() => answer,
            };
            match answer {
                Ok(Some(answer)) => {
                    self.failures = 0;
                    return (said(answer.status()), false);
                }
                Ok(None) => return (self.failed(&Status::unavailable("it ended")), false),
                Err(status) if status.code() == Code::Unimplemented => {
                    return (Health::Serving, true);
                }
                Err(status) => return (self.failed(&status), false),
            }
        }
    }

    async fn ask(&self, connection: Connection) -> Result<Answers, Status> {
        let request = HealthCheckRequest {
            service: self.service.clone(),
        };
        let over = connection.core.clone();
        let mut client = HealthClient::new(connection);
        let stream = client.watch(request).await?.into_inner();
        Ok(Answers { stream, over })
    }

    /// The stream that failed before it answered is made anew with backoff, one that has answered at once but for a
    /// moment.
    fn failed(&mut self, status: &Status) -> Health {
        self.answers = None;
        self.pause = Some(match self.failures {
            0 => Duration::from_millis(100),
            n => self.backoff.delay(n - 1),
        });
        self.failures = self.failures.saturating_add(1);
        Health::NotServing(format!("its health is not known: {}", status.message()).into())
    }
}

fn said(status: ServingStatus) -> Health {
    match status {
        ServingStatus::Serving => Health::Serving,
        ServingStatus::NotServing => Health::NotServing("it says NOT_SERVING".into()),
        ServingStatus::ServiceUnknown => Health::NotServing("it says SERVICE_UNKNOWN".into()),
        ServingStatus::Unknown => Health::NotServing("it says UNKNOWN".into()),
    }
}
