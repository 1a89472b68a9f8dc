//! Servers of gRPC's test service: tonic's in this process, and gRPC's C core in one of Python's. Each in plaintext and
//! over TLS.

use std::{
    future::Future,
    io::{BufRead as _, BufReader, Read as _},
    net::TcpListener,
    path::Path,
    pin::Pin,
    process::{Child, Command, Stdio},
    sync::OnceLock,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::StreamExt as _;
use http_body_util::BodyExt as _;
use tokio::{runtime::Runtime, sync::mpsc, time};
use tokio_stream::{
    Stream,
    wrappers::{ReceiverStream, TcpListenerStream},
};
use tonic::{
    Request, Response, Status, Streaming,
    body::Body,
    transport::{Identity, Server, ServerTlsConfig},
};
use tower::Service;

use self::pb::{
    EchoStatus, Empty, Payload, SimpleRequest, SimpleResponse, StreamingInputCallRequest,
    StreamingInputCallResponse, StreamingOutputCallRequest, StreamingOutputCallResponse,
    test_service_server::{TestService, TestServiceServer},
};
use super::certificates::{Ca, Issued};

#[allow(clippy::all, unreachable_pub, missing_docs, reason = "generated")]
pub mod pb {
    include!(concat!(env!("CARGO_MANIFEST_DIR"), "/proto/gen/test.rs"));
}

/// What is sent back where it comes from: the one in the head, the other at the end.
pub const INITIAL: &str = "x-grpc-test-echo-initial";
pub const TRAILING: &str = "x-grpc-test-echo-trailing-bin";

/// A server of the test service.
#[derive(Debug)]
pub struct Peer {
    pub name: &'static str,
    pub address: String,
    /// Who has issued its certificate, in PEM; none in plaintext.
    pub ca: Option<String>,
}

/// So much of nothing.
pub fn zeros(size: usize) -> Option<Payload> {
    let body = Bytes::from(vec![0; size]);
    Some(Payload { body })
}

/// All of them, started by the first who asks, for all tests of this process.
pub fn peers() -> &'static [Peer] {
    static RUNNING: OnceLock<Running> = OnceLock::new();
    &RUNNING.get_or_init(Running::start).peers
}

/// A static is not dropped: the process of Python's ends with its standard input, which is closed when this one ends.
struct Running {
    peers: Vec<Peer>,
    _runtime: Runtime,
    _python: Child,
}

impl Running {
    fn start() -> Self {
        let ca = Ca::new("ca");
        let issued = ca.issue(&["127.0.0.1"]);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let (plaintext, tls) = (tonic(&runtime, None), tonic(&runtime, Some(&issued)));
        let (python, theirs_plaintext, theirs_tls) = python(&issued);
        let peer = |name, port: u16, ca| Peer {
            name,
            address: format!("127.0.0.1:{port}"),
            ca,
        };
        Self {
            peers: vec![
                peer("tonic in plaintext", plaintext, None),
                peer("tonic over TLS", tls, Some(ca.pem())),
                peer("the C core in plaintext", theirs_plaintext, None),
                peer("the C core over TLS", theirs_tls, Some(ca.pem())),
            ],
            _runtime: runtime,
            _python: python,
        }
    }
}

// === the C core ===

/// Starts it, and says its ports when it listens.
fn python(issued: &Issued) -> (Child, u16, u16) {
    let folder = std::env::temp_dir().join(format!("switchboard-interop-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (certificate, key) = (folder.join("certificate.pem"), folder.join("key.pem"));
    std::fs::write(&certificate, &issued.certificate).unwrap();
    std::fs::write(&key, &issued.key).unwrap();

    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/interop_server.py");
    let mut command = Command::new("python3");
    if let Some(grpcio) = std::env::var_os("SWITCHBOARD_GRPCIO") {
        command.env("PYTHONPATH", grpcio);
    }
    let started = command
        // What it compiles is not to stand beside the tests.
        .args([Path::new("-B"), &script, &certificate, &key])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut python = started.unwrap_or_else(|error| panic!("cannot start python3: {error}"));
    let mut line = String::new();
    let said = python.stdout.take().expect("it is piped");
    BufReader::new(said).read_line(&mut line).unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    let ports: Vec<u16> = line
        .split_whitespace()
        .filter_map(|port| port.parse().ok())
        .collect();
    let [plaintext, tls] = ports[..] else {
        let mut why = String::new();
        if let Some(mut errors) = python.stderr.take() {
            let _ = errors.read_to_string(&mut why);
        }
        panic!(
            "gRPC's own server does not start; run ./tests/run, which gets grpcio, or set SWITCHBOARD_GRPCIO to the \
             folder that it is installed in (pip install --target FOLDER grpcio). It said: {line}{why}"
        );
    };
    // Nobody reads what it says from now on.
    if let Some(errors) = python.stderr.take() {
        std::thread::spawn(move || std::io::copy(&mut { errors }, &mut std::io::sink()));
    }
    (python, plaintext, tls)
}

// === tonic ===

/// Starts one, and says its port.
fn tonic(runtime: &Runtime, issued: Option<&Issued>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut server = Server::builder();
    if let Some(issued) = issued {
        let identity = Identity::from_pem(&issued.certificate, &issued.key);
        let tls = ServerTlsConfig::new().identity(identity);
        server = server.tls_config(tls).unwrap();
    }
    runtime.spawn(async move {
        let incoming = TcpListenerStream::new(tokio::net::TcpListener::from_std(listener).unwrap());
        let incoming = incoming.map(|socket| {
            let socket = socket?;
            socket.set_nodelay(true)?;
            Ok::<_, std::io::Error>(socket)
        });
        server
            .layer(tower::layer::layer_fn(EchoesMetadata))
            .add_service(TestServiceServer::new(Tonic))
            .serve_with_incoming(incoming)
            .await
            .unwrap();
    });
    port
}

/// Sends back what it is asked to. It is around the service, as that cannot say anything after a response that went well.
#[derive(Clone)]
struct EchoesMetadata<S>(S);

impl<S> Service<http::Request<Body>> for EchoesMetadata<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Future: Send + 'static>,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let [initial, trailing] =
            [INITIAL, TRAILING].map(|name| request.headers().get(name).cloned());
        let answering = self.0.call(request);
        Box::pin(async move {
            let mut response = answering.await?;
            if let Some(value) = initial {
                response.headers_mut().insert(INITIAL, value);
            }
            Ok(response.map(|body| {
                Body::new(body.map_frame(move |mut frame| {
                    if let (Some(trailers), Some(value)) = (frame.trailers_mut(), &trailing) {
                        trailers.insert(TRAILING, value.clone());
                    }
                    frame
                }))
            }))
        })
    }
}

struct Tonic;

/// The error that it is asked to end with, if it is.
fn asked(status: Option<EchoStatus>) -> Result<(), Status> {
    match status {
        Some(status) if status.code != 0 => Err(Status::new(status.code.into(), status.message)),
        _ => Ok(()),
    }
}

fn size(payload: Option<Payload>) -> i32 {
    payload.map_or(0, |payload| payload.body.len() as i32)
}

type Answer = Result<StreamingOutputCallResponse, Status>;
type Answers = Pin<Box<dyn Stream<Item = Answer> + Send>>;

/// Gives what one request asks for; false if there is nothing more to give.
async fn answer(request: StreamingOutputCallRequest, to: &mpsc::Sender<Answer>) -> bool {
    if let Err(status) = asked(request.response_status) {
        let _ = to.send(Err(status)).await;
        return false;
    }
    for parameters in request.response_parameters {
        time::sleep(Duration::from_micros(parameters.interval_us as u64)).await;
        let payload = zeros(parameters.size as usize);
        let response = StreamingOutputCallResponse { payload };
        if to.send(Ok(response)).await.is_err() {
            return false;
        }
    }
    true
}

#[tonic::async_trait]
impl TestService for Tonic {
    async fn empty_call(&self, _: Request<Empty>) -> Result<Response<Empty>, Status> {
        Ok(Response::new(Empty {}))
    }

    async fn unary_call(
        &self,
        request: Request<SimpleRequest>,
    ) -> Result<Response<SimpleResponse>, Status> {
        let request = request.into_inner();
        asked(request.response_status)?;
        let payload = zeros(request.response_size as usize);
        Ok(Response::new(SimpleResponse { payload }))
    }

    async fn streaming_input_call(
        &self,
        request: Request<Streaming<StreamingInputCallRequest>>,
    ) -> Result<Response<StreamingInputCallResponse>, Status> {
        let mut requests = request.into_inner();
        let mut total = StreamingInputCallResponse::default();
        while let Some(request) = requests.message().await? {
            total.aggregated_payload_size += size(request.payload);
        }
        Ok(Response::new(total))
    }

    type StreamingOutputCallStream = Answers;

    async fn streaming_output_call(
        &self,
        request: Request<StreamingOutputCallRequest>,
    ) -> Result<Response<Answers>, Status> {
        let (to, answers) = mpsc::channel(1);
        tokio::spawn(async move { answer(request.into_inner(), &to).await });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    type FullDuplexCallStream = Answers;

    async fn full_duplex_call(
        &self,
        request: Request<Streaming<StreamingOutputCallRequest>>,
    ) -> Result<Response<Answers>, Status> {
        let mut requests = request.into_inner();
        let (to, answers) = mpsc::channel(1);
        tokio::spawn(async move {
            while let Ok(Some(request)) = requests.message().await {
                if !answer(request, &to).await {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn unimplemented_call(&self, _: Request<Empty>) -> Result<Response<Empty>, Status> {
        Err(Status::unimplemented("it is not"))
    }
}
