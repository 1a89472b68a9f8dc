//! The order in which a component starts.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;
use tokio::{
    net::TcpStream,
    time::{Instant, sleep, timeout},
};
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::{
    Tasks,
    core::{Core, lock},
    follow::Follower,
    hook::Step,
    state::ComponentState,
};
use crate::{
    error::{Error, Kind},
    transport::Connector,
};

/// How often it is looked whether the server listens.
const LOOK: Duration = Duration::from_millis(50);

/// How long one look may take.
const ANSWER: Duration = Duration::from_secs(1);

/// How long a server may take to listen before that is worth a warning.
const LATE: Duration = Duration::from_secs(5);

/// How often it is looked whether what the component needs is ready. A look is a lock and a load for each role; an event for
/// each endpoint of a thousand that come and go would cost more.
const NEEDS: Duration = Duration::from_millis(100);

// === impl Core ===

impl Core {
    /// All that comes after the declaration, up to the registration, which goes on by itself.
    pub(super) async fn begin(self: &Arc<Self>, tasks: &Tasks, is_run: bool) -> Result<(), Error> {
        self.hook(Step::Declared).await?;
        self.require().await?;
        let register = lock(&self.register).take();
        if register.is_some() && is_run {
            self.until_listening().await;
        }
        self.hook(Step::Required).await?;
        let Some(register) = register else {
            self.say(ComponentState::Healthy);
            return Ok(());
        };
        self.say(ComponentState::initializing("registering"));
        let registration = register.background().await?;
        let (states, events) = (registration.states(), registration.events());
        let _ = self.registered.set(states.clone());
        *self.registration.lock().await = Some(registration);
        tasks.spawn(Follower::new(self.clone(), states, events).run());
        Ok(())
    }

    /// Waits for all that is required, side by side.
    async fn require(&self) -> Result<(), Error> {
        let required: Vec<_> = self
            .dependencies
            .iter()
            .filter_map(|d| d.require.map(|(n, within)| (&*d.role, n, within)))
            .collect();
        if required.is_empty() {
            return Ok(());
        }
        let names: Vec<_> = required
            .iter()
            .map(|(role, n, _)| format!("{n} ready {role}"))
            .collect();
        let why = format!("waiting for {}", names.join(", "));
        self.say(ComponentState::initializing(why));
        let waits = required.into_iter().map(async |(role, n, within)| {
            // Of what is ready only that it is so counts.
            let ready = self.manager.ready(role, n, within).await.map(drop);
            ready.map_err(|error| (error.kind(), format!("{n} ready {role} ({error})")))
        });
        let missing: Vec<_> = join_all(waits)
            .await
            .into_iter()
            .filter_map(Result::err)
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let is = |kind| missing.iter().any(|(of, _)| *of == kind);
        let kind = match (is(Kind::Stopped), is(Kind::Invalid)) {
            (true, _) => Kind::Stopped,
            (_, true) => Kind::Invalid,
            // Kinds that name a role would name this one, which is not the one that is missing.
            _ => Kind::NotConnected,
        };
        let words: Vec<_> = missing.into_iter().map(|(_, words)| words).collect();
        let why = format!("it does not start without {}", words.join("; nor without "));
        Err(Error::new(kind).with_role(&self.peer.role).with_reason(why))
    }

    /// Until a connection to the server can be made.
    async fn until_listening(&self) {
        let address = self.settings.listens_at.as_ref();
        let address = &**address.unwrap_or(&self.peer.address);
        let why = format!("waiting for its server to listen at {address}");
        self.say(ComponentState::initializing(why));
        let (began, mut warned) = (Instant::now(), false);
        loop {
            let error = match timeout(ANSWER, TcpStream::connect(address)).await {
                Ok(Ok(stream)) if is_with_itself(&stream) => "nobody listens there".to_owned(),
                Ok(Ok(_)) => match timeout(ANSWER, self.is_another(address)).await {
                    Ok(true) => "another server listens there".to_owned(),
                    Ok(false) | Err(_) => return,
                },
                Ok(Err(error)) => error.to_string(),
                Err(_) => format!("no answer within {ANSWER:?}"),
            };
            if !warned && began.elapsed() >= LATE {
                warned = true;
                let (role, id) = (&*self.peer.role, &*self.peer.id);
                tracing::warn!(
                    role,
                    id,
                    address,
                    error,
                    "its server does not listen yet, and so it is not registered; where it listens elsewhere, say so with listens_at"
                );
            }
            sleep(LOOK).await;
        }
    }

    /// Whether somebody else's server listens there: its health service does not know what this process's does. One that
    /// has none, or speaks TLS, may be whose it likes.
    async fn is_another(&self, address: &str) -> bool {
        let Ok(connection) = Connector::new().connect_to(address).await else {
            return false;
        };
        let request = HealthCheckRequest {
            service: self.token.clone(),
        };
        let answer = HealthClient::new(connection).check(request).await;
        answer.is_err_and(|status| status.code() == Code::NotFound)
    }

    /// Tells those who watch its health when what it needs comes or goes.
    pub(super) async fn watch_needs(self: Arc<Self>) {
        loop {
            self.look_at_needs();
            sleep(NEEDS).await;
        }
    }
}

/// Whether both of its ends are the same. TCP makes such a connection where nobody listens, if the port that the system
/// picks for the one end happens to be that of the other: once in some ten thousand looks at a port of that range.
fn is_with_itself(stream: &TcpStream) -> bool {
    match (stream.local_addr(), stream.peer_addr()) {
        (Ok(local), Ok(peer)) => local == peer,
        // It has ended already, and somebody was there to end it.
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, TcpSocket};

    use super::*;

    #[tokio::test]
    async fn a_connection_with_itself_is_with_no_server() {
        let any = "127.0.0.1:0".parse().expect("an address");
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.bind(any).expect("a free port");
        let own = socket.local_addr().expect("it is bound");
        let stream = socket.connect(own).await.expect("it meets itself");
        assert!(is_with_itself(&stream));

        let listener = TcpListener::bind(any).await.expect("a free port");
        let at = listener.local_addr().expect("it is bound");
        let stream = TcpStream::connect(at).await.expect("it listens");
        assert!(!is_with_itself(&stream));
    }
}
