//! One server: what its own program would be, on threads of its own, so that it can be killed.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use switchboard::{
    Component, ConnectionManager, MemoryRegistry,
    component::{ComponentState, Step},
    manager::Status as ManagerStatus,
};
use tokio::{net::TcpListener, runtime::Runtime, sync::oneshot, time};
use tokio_stream::{StreamExt as _, wrappers::TcpListenerStream};
use tonic::{Request, Response, Status, Streaming, transport::Server};

use super::pb::{EchoRequest, EchoResponse, echo_client::EchoClient, echo_server};

/// What a server is.
#[derive(Clone, Copy)]
pub(crate) struct Program {
    pub(crate) role: &'static str,
    pub(crate) id: &'static str,
    pub(crate) depends_on: &'static [&'static str],
    pub(crate) watches: &'static [&'static str],
}

/// A server that runs, or has run, at its address.
pub(crate) struct Process {
    program: Program,
    registry: MemoryRegistry,
    address: SocketAddr,
    component: Arc<Component>,
    runtime: Option<Runtime>,
    ended: oneshot::Receiver<Result<(), switchboard::Error>>,
}

// === impl Program ===

impl Program {
    /// All of a server: a manager, a component, its services, and `run`.
    fn component(
        &self,
        registry: &MemoryRegistry,
        address: SocketAddr,
    ) -> anyhow::Result<Component> {
        let manager = ConnectionManager::builder(registry.clone()).build();
        let mut builder = Component::builder(self.role, manager)
            .id(self.id)
            .advertise(address.to_string())
            .drain(Duration::from_secs(5))
            // Five servers share this process, and its signals.
            .signals(false)
            .hook(|step| async move {
                if let Step::Stopping = step {
                    // The place to hand over what others need.
                }
            });
        for role in self.depends_on {
            builder = builder.depends_on(*role);
        }
        for role in self.watches {
            builder = builder.watches(*role);
        }
        Ok(builder.build()?)
    }
}

// === impl Process ===

impl Process {
    pub(crate) async fn start(registry: &MemoryRegistry, program: Program) -> anyhow::Result<Self> {
        // Below the ports that outgoing connections take, so that it is free when it comes back.
        let listener = loop {
            let port = fastrand::u16(12_000..30_000);
            if let Ok(listener) = TcpListener::bind(("127.0.0.1", port)).await {
                break listener;
            }
        };
        Self::run(registry.clone(), program, listener)
    }

    fn run(
        registry: MemoryRegistry,
        program: Program,
        listener: TcpListener,
    ) -> anyhow::Result<Self> {
        let address = listener.local_addr()?;
        let listener = listener.into_std()?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let entered = runtime.enter();
        let component = Arc::new(program.component(&registry, address)?);
        let incoming = TcpListenerStream::new(TcpListener::from_std(listener)?).map(|stream| {
            let stream = stream?;
            stream.set_nodelay(true)?;
            Ok::<_, std::io::Error>(stream)
        });
        let service = Service {
            program,
            manager: component.manager().clone(),
        };
        let server = Server::builder()
            .add_service(component.health())
            .add_service(echo_server::EchoServer::new(service))
            .serve_with_incoming_shutdown(incoming, component.stopping());
        drop(entered);
        let (end, ended) = oneshot::channel();
        let running = component.clone();
        runtime.spawn(async move {
            let _ = end.send(running.run(server).await);
        });
        Ok(Self {
            program,
            registry,
            address,
            component,
            runtime: Some(runtime),
            ended,
        })
    }

    pub(crate) fn name(&self) -> String {
        format!("{} {}", self.program.role, self.program.id)
    }

    pub(crate) fn status(&self) -> ManagerStatus {
        self.component.manager().status()
    }

    /// Waits until it is in this state.
    pub(crate) async fn is(&self, state: ComponentState) -> anyhow::Result<()> {
        let mut states = self.component.states();
        let wait = states.wait_for(|now| *now == state);
        match time::timeout(super::BOUND, wait).await {
            Ok(Ok(_)) => Ok(()),
            _ => anyhow::bail!("{} is {}, not {state}", self.name(), self.component.state()),
        }
    }

    /// Ends it with no word to anybody, as SIGKILL would: its session stays until its lease runs out.
    pub(crate) fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }

    /// Stops it as SIGTERM would, and waits for its end.
    pub(crate) async fn stop(&mut self) -> anyhow::Result<()> {
        self.component.shutdown();
        let ended = time::timeout(super::BOUND, &mut self.ended).await;
        ended.map_err(|_| anyhow::anyhow!("{} does not stop", self.name()))???;
        self.kill();
        Ok(())
    }

    /// The same program once more, at the same address.
    pub(crate) async fn restart(&mut self) -> anyhow::Result<()> {
        let listener = loop {
            match TcpListener::bind(self.address).await {
                Ok(listener) => break listener,
                // The old one's socket is closed by its own threads, in a moment.
                Err(_) => time::sleep(Duration::from_millis(2)).await,
            }
        };
        *self = Self::run(self.registry.clone(), self.program, listener)?;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Answers with its name, and with those whom it has called for it.
struct Service {
    program: Program,
    manager: ConnectionManager,
}

#[tonic::async_trait]
impl echo_server::Echo for Service {
    async fn unary(&self, _: Request<EchoRequest>) -> Result<Response<EchoResponse>, Status> {
        let mut server = format!("{} {}", self.program.role, self.program.id);
        // Whom it depends on, and one of those that it manages.
        if self.program.role == "querycoord" {
            for role in ["rootcoord", "node"] {
                let mut client = EchoClient::new(self.manager.channel(role));
                let answer = client.unary(EchoRequest::default()).await?;
                server += &format!(" > {}", answer.into_inner().server);
            }
        }
        Ok(Response::new(EchoResponse {
            server,
            ..EchoResponse::default()
        }))
    }

    async fn upload(
        &self,
        _: Request<Streaming<EchoRequest>>,
    ) -> Result<Response<EchoResponse>, Status> {
        Err(Status::unimplemented("not in this example"))
    }

    type DownloadStream = tokio_stream::Empty<Result<EchoResponse, Status>>;

    async fn download(
        &self,
        _: Request<EchoRequest>,
    ) -> Result<Response<Self::DownloadStream>, Status> {
        Err(Status::unimplemented("not in this example"))
    }

    type ChatStream = tokio_stream::Empty<Result<EchoResponse, Status>>;

    async fn chat(
        &self,
        _: Request<Streaming<EchoRequest>>,
    ) -> Result<Response<Self::ChatStream>, Status> {
        Err(Status::unimplemented("not in this example"))
    }
}
