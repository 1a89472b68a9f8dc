//! A real tonic server on a runtime and thread of its own, so that it can be killed like a process: its
//! sockets are closed by the kernel, and nothing it had in flight is finished.

use std::{
    collections::VecDeque,
    net::{SocketAddr, TcpListener},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{runtime::Runtime, sync::oneshot};
use tokio_stream::{Stream, StreamExt as _, wrappers::TcpListenerStream};
use tonic::{
    Code, Request, Response, Status, Streaming,
    service::interceptor::InterceptedService,
    transport::{Server, ServerTlsConfig},
};
use tonic_health::server::HealthReporter;

use self::pb::{EchoRequest, EchoResponse, echo_server};

#[allow(clippy::all, unreachable_pub, missing_docs, reason = "generated")]
pub mod pb {
    include!(concat!(env!("CARGO_MANIFEST_DIR"), "/proto/gen/echo.rs"));
}

/// A running server; dropping it kills it.
pub struct EchoServer {
    pub address: SocketAddr,
    pub id: String,
    pub seen: Arc<Seen>,
    /// What it says of its health, if it does.
    pub health: Option<HealthReporter>,
    runtime: Option<Runtime>,
    stop: Option<oneshot::Sender<()>>,
}

/// What a server has seen.
#[derive(Default)]
pub struct Seen {
    pub started: AtomicUsize,
    pub finished: AtomicUsize,
    /// Dropped before they were finished: cancelled by the client, or the connection was lost.
    pub cancelled: AtomicUsize,
    pub most_at_once: AtomicUsize,
    now: AtomicUsize,
    pub timeouts: Mutex<Vec<String>>,
    pub user_agents: Mutex<Vec<String>>,
    /// What each call said of attempts before it, `-` for nothing.
    pub previous: Mutex<Vec<String>>,
    /// What the next calls fail with: unary ones at once, uploads after their first message.
    pub script: Mutex<VecDeque<Status>>,
}

/// How a server is set up.
#[derive(Clone, Default)]
pub struct Options {
    pub max_streams: Option<u32>,
    pub address: Option<SocketAddr>,
    pub node: Option<Arc<Node>>,
    pub tls: Option<ServerTlsConfig>,
    /// Whether it serves `grpc.health.v1`; nothing is said at first.
    pub health: bool,
    /// Is told of each unary call's message, when it begins to be executed.
    pub witness: Option<Witness>,
}

/// Who is told what a server executes.
pub type Witness = Arc<dyn Fn(&str) + Send + Sync>;

/// Who a server is, where calls say who they are for: as Milvus checks it, before anything is executed.
#[derive(Default)]
pub struct Node {
    pub id: AtomicI64,
    /// The `serverid` and `cluster` of each call, `-` where it had none.
    pub asked: Mutex<Vec<String>>,
}

impl Node {
    pub fn new(id: i64) -> Arc<Self> {
        Arc::new(Self {
            id: id.into(),
            ..Self::default()
        })
    }

    fn check(&self, request: &Request<()>) -> Result<(), Status> {
        let header = |name| request.metadata().get(name).map(|v| v.to_str().unwrap());
        let (expected, cluster) = (header("serverid"), header("cluster"));
        let asked = format!("{} {}", expected.unwrap_or("-"), cluster.unwrap_or("-"));
        self.asked.lock().unwrap().push(asked);
        let actual = self.id.load(Ordering::SeqCst);
        match expected {
            Some(expected) if expected != actual.to_string() => Err(Status::unknown(format!(
                "node not match[expectedNodeID={expected}][actualNodeID={actual}]"
            ))),
            _ => Ok(()),
        }
    }
}

impl EchoServer {
    pub fn start(id: &str) -> Self {
        Self::start_with(id, Options::default())
    }

    pub fn start_at(id: &str, address: SocketAddr) -> Self {
        Self::start_with(
            id,
            Options {
                address: Some(address),
                ..Options::default()
            },
        )
    }

    pub fn start_with(id: &str, options: Options) -> Self {
        let address = options
            .address
            .unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], super::etcd::free_port())));
        let listener = bind(address);
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Seen::default());
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let (stop, stopped) = oneshot::channel();
        let (health, of_health) = match options.health {
            true => {
                let (reporter, service) = tonic_health::server::health_reporter();
                (Some(reporter), Some(service))
            }
            false => (None, None),
        };
        let service = Echo {
            id: id.to_owned(),
            seen: seen.clone(),
            witness: options.witness.clone(),
        };
        runtime.spawn(async move {
            listener.set_nonblocking(true).unwrap();
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let incoming = TcpListenerStream::new(listener).map(|stream| {
                let stream = stream?;
                stream.set_nodelay(true)?;
                Ok::<_, std::io::Error>(stream)
            });
            let mut server = Server::builder();
            if let Some(tls) = options.tls {
                server = server.tls_config(tls).unwrap();
            }
            server
                .max_concurrent_streams(options.max_streams)
                .add_optional_service(of_health)
                .add_service(InterceptedService::new(
                    echo_server::EchoServer::new(service).max_decoding_message_size(64 << 20),
                    move |request| {
                        options
                            .node
                            .as_ref()
                            .map_or(Ok(()), |node| node.check(&request))?;
                        Ok(request)
                    },
                ))
                .serve_with_incoming_shutdown(incoming, async {
                    let _ = stopped.await;
                })
                .await
                .unwrap();
        });
        Self {
            address,
            id: id.to_owned(),
            seen,
            health,
            runtime: Some(runtime),
            stop: Some(stop),
        }
    }

    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Ends it at once, as SIGKILL would.
    pub fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }

    /// The same, and waits until its port refuses.
    pub async fn killed(&mut self) {
        self.kill();
        let address = self.address;
        super::eventually_async("its port is closed", || async move {
            tokio::net::TcpStream::connect(address)
                .await
                .is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
        })
        .await;
    }

    /// GOAWAY, then the calls in flight, then the end.
    pub fn stop_gracefully(&mut self) {
        self.stop.take();
    }
}

impl Drop for EchoServer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The service alone, for servers that are run by other means.
pub fn echo(id: &str, seen: &Arc<Seen>) -> echo_server::EchoServer<impl echo_server::Echo> {
    echo_server::EchoServer::new(Echo {
        id: id.to_owned(),
        seen: seen.clone(),
        witness: None,
    })
}

// The port of a server that was just killed may take a moment to be free.
fn bind(address: SocketAddr) -> TcpListener {
    for _ in 0..200 {
        let socket =
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.set_reuse_address(true).unwrap();
        if socket.bind(&address.into()).is_ok() && socket.listen(1024).is_ok() {
            return socket.into();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("{address} does not become free");
}

#[derive(Clone)]
struct Echo {
    id: String,
    seen: Arc<Seen>,
    witness: Option<Witness>,
}

/// Counts a call as started, and as finished or cancelled.
struct Counted {
    seen: Arc<Seen>,
    finished: bool,
}

impl Seen {
    /// The next calls fail with these.
    pub fn fail_with(&self, statuses: impl IntoIterator<Item = Status>) {
        self.script.lock().unwrap().extend(statuses);
    }

    fn scripted(&self) -> Option<Status> {
        self.script.lock().unwrap().pop_front()
    }

    fn start<T>(self: &Arc<Self>, request: &Request<T>) -> Counted {
        let header = |name| {
            let value = request.metadata().get(name)?;
            Some(value.to_str().unwrap().to_owned())
        };
        self.timeouts.lock().unwrap().extend(header("grpc-timeout"));
        self.user_agents
            .lock()
            .unwrap()
            .extend(header("user-agent"));
        let previous = header("grpc-previous-rpc-attempts");
        let previous = previous.unwrap_or_else(|| "-".to_owned());
        self.previous.lock().unwrap().push(previous);
        self.started.fetch_add(1, Ordering::SeqCst);
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most_at_once.fetch_max(now, Ordering::SeqCst);
        Counted {
            seen: self.clone(),
            finished: false,
        }
    }
}

impl Counted {
    fn finish(&mut self) {
        self.finished = true;
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.seen.now.fetch_sub(1, Ordering::SeqCst);
        let counter = match self.finished {
            true => &self.seen.finished,
            false => &self.seen.cancelled,
        };
        counter.fetch_add(1, Ordering::SeqCst);
    }
}

async fn pause(request: &EchoRequest) -> Result<(), Status> {
    if request.delay_ms > 0 {
        tokio::time::sleep(Duration::from_millis(request.delay_ms.into())).await;
    }
    match request.fail_with {
        0 => Ok(()),
        code => Err(Status::new(
            Code::from_i32(code as i32),
            format!("as asked: {}", request.message),
        )),
    }
}

type Answers = Pin<Box<dyn Stream<Item = Result<EchoResponse, Status>> + Send>>;

#[tonic::async_trait]
impl echo_server::Echo for Echo {
    async fn unary(&self, request: Request<EchoRequest>) -> Result<Response<EchoResponse>, Status> {
        let mut call = self.seen.start(&request);
        let request = request.into_inner();
        if let Some(witness) = &self.witness {
            witness(&request.message);
        }
        let scripted = self.seen.scripted();
        let result = match scripted {
            Some(status) => Err(status),
            None => pause(&request).await,
        };
        call.finish();
        result?;
        Ok(Response::new(EchoResponse {
            message: request.message,
            bytes: request.payload.len() as u64,
            payload: request.payload,
            server: self.id.clone(),
            messages: 1,
        }))
    }

    async fn upload(
        &self,
        request: Request<Streaming<EchoRequest>>,
    ) -> Result<Response<EchoResponse>, Status> {
        let mut call = self.seen.start(&request);
        let mut requests = request.into_inner();
        let mut answer = EchoResponse {
            server: self.id.clone(),
            ..EchoResponse::default()
        };
        while let Some(request) = requests.message().await? {
            if let Err(status) = pause(&request).await {
                call.finish();
                return Err(status);
            }
            if let Some(status) = self.seen.scripted() {
                call.finish();
                return Err(status);
            }
            answer.messages += 1;
            answer.bytes += request.payload.len() as u64;
            answer.message = request.message;
        }
        call.finish();
        Ok(Response::new(answer))
    }

    type DownloadStream = Answers;

    async fn download(&self, request: Request<EchoRequest>) -> Result<Response<Answers>, Status> {
        let mut call = self.seen.start(&request);
        let request = request.into_inner();
        let server = self.id.clone();
        let (tx, rx) = tokio::sync::mpsc::channel(1);
        tokio::spawn(async move {
            for n in 0..request.count {
                let answer = pause(&request).await.map(|()| EchoResponse {
                    message: request.message.clone(),
                    payload: vec![n as u8; request.size as usize].into(),
                    server: server.clone(),
                    messages: n + 1,
                    bytes: 0,
                });
                if tx.send(answer).await.is_err() {
                    return;
                }
            }
            call.finish();
        });
        let answers = tokio_stream::wrappers::ReceiverStream::new(rx);
        Ok(Response::new(Box::pin(answers)))
    }

    type ChatStream = Answers;

    async fn chat(
        &self,
        request: Request<Streaming<EchoRequest>>,
    ) -> Result<Response<Answers>, Status> {
        let mut call = self.seen.start(&request);
        let mut requests = request.into_inner();
        let server = self.id.clone();
        let (tx, rx) = tokio::sync::mpsc::channel(1);
        tokio::spawn(async move {
            let mut messages = 0;
            loop {
                let answer = match requests.message().await {
                    Ok(Some(request)) => {
                        messages += 1;
                        pause(&request).await.map(|()| EchoResponse {
                            message: request.message,
                            bytes: request.payload.len() as u64,
                            payload: request.payload,
                            server: server.clone(),
                            messages,
                        })
                    }
                    Ok(None) => {
                        call.finish();
                        return;
                    }
                    Err(status) => Err(status),
                };
                if tx.send(answer).await.is_err() {
                    return;
                }
            }
        });
        let answers = tokio_stream::wrappers::ReceiverStream::new(rx);
        Ok(Response::new(Box::pin(answers)))
    }
}
