//! Echo servers in a process of their own, so that the client's process is the client and nothing else.

use std::{
    env,
    io::{self, BufRead as _, BufReader, Read as _},
    net::SocketAddr,
    pin::Pin,
    process::{Child, Command, Stdio},
    thread,
};

use futures_core::Stream;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{net::TcpListener, runtime, task::JoinSet};
use tokio_stream::{StreamExt as _, wrappers::TcpListenerStream};
use tonic::{Request, Response, Status, Streaming, transport::Server};

use super::echo::{
    EchoRequest, EchoResponse,
    echo_server::{Echo, EchoServer},
};

/// How many servers a process that is started with it runs, instead of the bench.
const ROLE: &str = "SWITCHBOARD_BENCH_SERVERS";

/// In place of a number: one server, that allows any number of calls on a connection.
const ROOMY: &str = "roomy";

/// Before a port: one server, that listens there.
const AT: &str = "at ";

/// A process with tonic servers, ended when this is dropped.
pub(crate) struct Servers {
    process: Child,
    addresses: Vec<SocketAddr>,
}

impl Servers {
    /// Starts this very program anew, as `count` servers on free ports, and waits until they listen.
    pub(crate) fn start(count: usize) -> Self {
        Self::start_with(count, &count.to_string())
    }

    /// One that allows any number of calls on a connection.
    pub(crate) fn start_roomy() -> Self {
        Self::start_with(1, ROOMY)
    }

    /// One on this port, on which another may have listened before.
    pub(crate) fn start_at(port: u16) -> Self {
        Self::start_with(1, &format!("{AT}{port}"))
    }

    /// They stand still, and their connections with them, until they go on.
    pub(crate) fn stand_still(&self) {
        self.signal(Signal::SIGSTOP);
    }

    pub(crate) fn go_on(&self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&self, signal: Signal) {
        let process = i32::try_from(self.id()).expect("a process's id");
        kill(Pid::from_raw(process), signal).expect("it is there, and ours");
    }

    fn start_with(count: usize, role: &str) -> Self {
        let mut process = Command::new(env::current_exe().expect("this program has a path"))
            .env(ROLE, role)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the servers' process starts");
        let out = process.stdout.take().expect("stdout is piped");
        let addresses = BufReader::new(out)
            .lines()
            .take(count)
            .map(|line| {
                let line = line.expect("the servers say where they listen");
                line.parse().expect("a line is an address")
            })
            .collect();
        Self { process, addresses }
    }

    /// Their process, to be told where to run. Its main thread is all of it but one that sleeps.
    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    /// The first `count` of them.
    pub(crate) fn addresses(&self, count: usize) -> &[SocketAddr] {
        &self.addresses[..count]
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// First in a bench's `main`: in a process that was started as servers, runs them and does not return.
pub(crate) fn run_if_asked() {
    let Ok(role) = env::var(ROLE) else {
        return;
    };
    let (count, port, streams) = match &*role {
        ROOMY => (1, 0, Some(u32::MAX)),
        role => match role.strip_prefix(AT) {
            Some(port) => (1, port.parse().expect("a port"), None),
            None => (role.parse().expect("a number of servers"), 0, None),
        },
    };
    // A parent that is gone, in whatever way, has closed our stdin.
    thread::spawn(|| {
        let _ = io::stdin().read(&mut [0]);
        std::process::exit(0);
    });
    // One thread: servers on all cores would take from the client what it needs to be measured.
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(serve(count, port, streams));
    std::process::exit(0);
}

async fn serve(count: usize, port: u16, streams: Option<u32>) {
    let mut servers = JoinSet::new();
    for _ in 0..count {
        // All of 127.0.0.0/8 leads here: so one server can stand for thousands, each at an address of its own.
        let listener = TcpListener::bind(("0.0.0.0", port)).await;
        let listener = listener.expect("a free port");
        let port = listener.local_addr().expect("its address").port();
        println!("127.0.0.1:{port}");
        let mut server = Server::builder();
        if streams.is_some() {
            server = server.max_concurrent_streams(streams);
        }
        let server = server.add_service(EchoServer::new(Answering));
        servers.spawn(async move {
            // As tonic's own listener does.
            let incoming = TcpListenerStream::new(listener)
                .map(|accepted| accepted.inspect(|stream| drop(stream.set_nodelay(true))));
            server.serve_with_incoming(incoming).await
        });
    }
    while servers.join_next().await.is_some() {}
}

/// Answers unary calls with their payload, and streams as they ask to.
struct Answering;

type Answers = Pin<Box<dyn Stream<Item = Result<EchoResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Echo for Answering {
    type DownloadStream = Answers;
    type ChatStream = Answers;

    async fn unary(&self, request: Request<EchoRequest>) -> Result<Response<EchoResponse>, Status> {
        Ok(Response::new(EchoResponse {
            payload: request.into_inner().payload,
            ..EchoResponse::default()
        }))
    }

    async fn upload(
        &self,
        request: Request<Streaming<EchoRequest>>,
    ) -> Result<Response<EchoResponse>, Status> {
        let mut requests = request.into_inner();
        let mut answer = EchoResponse::default();
        while let Some(request) = requests.message().await? {
            answer.messages += 1;
            answer.bytes += request.payload.len() as u64;
        }
        Ok(Response::new(answer))
    }

    async fn download(&self, request: Request<EchoRequest>) -> Result<Response<Answers>, Status> {
        let EchoRequest { count, size, .. } = request.into_inner();
        let answer = EchoResponse {
            payload: vec![7; size as usize].into(),
            ..EchoResponse::default()
        };
        let answers = (0..count).map(move |_| Ok(answer.clone()));
        Ok(Response::new(Box::pin(tokio_stream::iter(answers))))
    }

    async fn chat(&self, _: Request<Streaming<EchoRequest>>) -> Result<Response<Answers>, Status> {
        Err(Status::unimplemented("benches do not chat"))
    }
}
