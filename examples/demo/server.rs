//! A small tonic server that registers itself, and can be killed.

use std::net::SocketAddr;

use switchboard::registry::{Registration, Session};
use tokio::{net::TcpListener, runtime::Runtime};
use tokio_stream::{StreamExt as _, wrappers::TcpListenerStream};
use tonic::{Request, Response, Status, Streaming, transport::Server};

use super::{
    Home,
    pb::{EchoRequest, EchoResponse, echo_server},
};

/// A server on threads of its own: killing it closes its sockets at once, as the end of its process would.
pub(crate) struct Node {
    pub(crate) address: SocketAddr,
    runtime: Option<Runtime>,
    registration: Option<Registration>,
}

impl Node {
    /// Listens, then registers.
    pub(crate) async fn start(home: &impl Home, id: &'static str) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        runtime.spawn(async move {
            let incoming = TcpListenerStream::new(TcpListener::from_std(listener)?).map(|stream| {
                let stream = stream?;
                stream.set_nodelay(true)?;
                Ok::<_, std::io::Error>(stream)
            });
            let service = echo_server::EchoServer::new(Echo { id });
            Server::builder()
                .add_service(service)
                .serve_with_incoming(incoming)
                .await?;
            anyhow::Ok(())
        });
        let session = Session::new("echo", address.to_string()).with_id(id);
        let registration = home.register(session).await?;
        Ok(Self {
            address,
            runtime: Some(runtime),
            registration: Some(registration),
        })
    }

    /// Ends it with no word to anybody: its session stays until its lease runs out.
    pub(crate) fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
        if let Some(registration) = self.registration.take() {
            registration.abandon();
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

struct Echo {
    id: &'static str,
}

#[tonic::async_trait]
impl echo_server::Echo for Echo {
    async fn unary(&self, request: Request<EchoRequest>) -> Result<Response<EchoResponse>, Status> {
        Ok(Response::new(EchoResponse {
            message: request.into_inner().message,
            server: self.id.to_owned(),
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
