//! The cases that gRPC's implementations test each other with, through a managed channel: against tonic, and against
//! gRPC's C core, which is another implementation from the ground up. Each in plaintext and over TLS.
//!
//! The names, sizes and expected values are those of gRPC's interop test descriptions. Not here: what needs accounts at a
//! cloud, and compression, as tonic cannot say of one message of a stream that it is not to be compressed.

mod support;

use std::time::{Duration, Instant};

use futures_util::{FutureExt as _, Stream, StreamExt as _, stream};
use support::{
    eventually,
    interop::{
        self, INITIAL, Peer, TRAILING,
        pb::{
            EchoStatus, Empty, ResponseParameters, SimpleRequest, SimpleResponse,
            StreamingInputCallRequest, StreamingOutputCallRequest,
            test_service_client::TestServiceClient,
            unimplemented_service_client::UnimplementedServiceClient,
        },
        zeros,
    },
    tasks,
};
use switchboard::{
    CancelToken, Channel, ConnectionManager, Error, Kind, MemoryRegistry, Session,
    registry::Registration,
    transport::{Connector, TlsConfig},
};
use tokio::{sync::mpsc, time};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status, metadata::MetadataValue};

/// How long one case may take against one server.
const BOUND: Duration = Duration::from_secs(30);

const REQUEST_SIZES: [usize; 4] = [27_182, 8, 1_828, 45_904];
const RESPONSE_SIZES: [usize; 4] = [31_415, 9, 2_653, 58_979];

struct Client {
    channel: Channel,
    manager: ConnectionManager,
    _registration: Registration,
}

impl Client {
    async fn of(peer: &Peer) -> Self {
        Self::with(peer, |connector| connector).await
    }

    async fn with(peer: &Peer, with: impl FnOnce(Connector) -> Connector) -> Self {
        let mut connector = with(Connector::new());
        if let Some(ca) = &peer.ca {
            let tls = TlsConfig::new().ca_pem(ca.as_bytes()).unwrap();
            connector = connector.tls(tls).unwrap();
        }
        let registry = MemoryRegistry::new();
        let session = Session::new("test", &*peer.address).with_id("a");
        let registration = registry.register(session).await.unwrap();
        let manager = ConnectionManager::builder(registry)
            .connector(connector)
            .build();
        Self {
            channel: manager.channel("test"),
            manager,
            _registration: registration,
        }
    }

    fn test(&self) -> TestServiceClient<Channel> {
        TestServiceClient::new(self.channel.clone())
    }

    fn in_flight(&self) -> usize {
        let status = self.manager.status();
        status.roles[0].endpoints.iter().map(|e| e.in_flight).sum()
    }
}

/// Does this against each server, in a bound, and nothing of it is left.
async fn against_each(case: impl AsyncFn(&Client)) {
    for peer in interop::peers() {
        // Shown if it fails.
        println!("against {}", peer.name);
        let client = Client::of(peer).await;
        let within = time::timeout(BOUND, case(&client)).await;
        within.expect("it hangs");
        eventually("no call is left", || client.in_flight() == 0).await;
        client.manager.stop().await;
    }
}

fn large() -> SimpleRequest {
    SimpleRequest {
        response_size: 314_159,
        payload: zeros(271_828),
        response_status: None,
    }
}

fn is_large(response: &SimpleResponse) {
    let body = response.payload.as_ref().map(|payload| &payload.body);
    assert_eq!(body.map(|body| body.len()), Some(314_159));
    assert!(body.is_some_and(|body| body.iter().all(|&byte| byte == 0)));
}

/// A request for one response of this size, with a payload of that one.
fn ask(response: usize, payload: usize) -> StreamingOutputCallRequest {
    StreamingOutputCallRequest {
        response_parameters: vec![ResponseParameters {
            size: response as i32,
            interval_us: 0,
        }],
        payload: zeros(payload),
        response_status: None,
    }
}

fn end_with(code: Code, message: &str) -> Option<EchoStatus> {
    Some(EchoStatus {
        code: code as i32,
        message: message.to_owned(),
    })
}

/// Requests that are sent as they are given.
fn given<T: Send + 'static>() -> (mpsc::Sender<T>, ReceiverStream<T>) {
    let (give, requests) = mpsc::channel(1);
    (give, ReceiverStream::new(requests))
}

/// How a stream ends that is to go wrong, wherever that is found out.
async fn error_of<S>(client: &Client, request: Request<S>) -> Status
where
    S: Stream<Item = StreamingOutputCallRequest> + Send + 'static,
{
    match client.test().full_duplex_call(request).await {
        Ok(answers) => answers.into_inner().message().await.unwrap_err(),
        Err(status) => status,
    }
}

#[tokio::test]
async fn empty_unary() {
    against_each(async |client| {
        let response = client.test().empty_call(Empty {}).await.unwrap();
        assert_eq!(response.into_inner(), Empty {});
    })
    .await;
}

#[tokio::test]
async fn large_unary() {
    against_each(async |client| {
        let response = client.test().unary_call(large()).await.unwrap();
        is_large(response.get_ref());
    })
    .await;
}

#[tokio::test]
async fn client_streaming() {
    against_each(async |client| {
        let requests = REQUEST_SIZES.map(|size| StreamingInputCallRequest {
            payload: zeros(size),
        });
        let mut test = client.test();
        let answer = test.streaming_input_call(stream::iter(requests)).await;
        let answer = answer.unwrap().into_inner();
        assert_eq!(answer.aggregated_payload_size, 74_922);
    })
    .await;
}

#[tokio::test]
async fn server_streaming() {
    against_each(async |client| {
        let parameters = RESPONSE_SIZES.map(|size| ask(size, 0).response_parameters.remove(0));
        let request = StreamingOutputCallRequest {
            response_parameters: parameters.to_vec(),
            ..StreamingOutputCallRequest::default()
        };
        let answers = client.test().streaming_output_call(request).await.unwrap();
        let mut answers = answers.into_inner();
        let mut sizes = Vec::new();
        while let Some(answer) = answers.message().await.unwrap() {
            sizes.push(answer.payload.unwrap_or_default().body.len());
        }
        assert_eq!(sizes, RESPONSE_SIZES);
    })
    .await;
}

#[tokio::test]
async fn ping_pong() {
    against_each(async |client| {
        let (give, requests) = given();
        // The head of the response may come with the first message only.
        give.send(ask(RESPONSE_SIZES[0], REQUEST_SIZES[0]))
            .await
            .unwrap();
        let answers = client.test().full_duplex_call(requests).await.unwrap();
        let mut answers = answers.into_inner();
        for n in 0..4 {
            let answer = answers.message().await.unwrap().expect("an answer");
            let size = answer.payload.unwrap_or_default().body.len();
            assert_eq!(size, RESPONSE_SIZES[n]);
            if n < 3 {
                let next = ask(RESPONSE_SIZES[n + 1], REQUEST_SIZES[n + 1]);
                give.send(next).await.unwrap();
            }
        }
        drop(give);
        assert_eq!(answers.message().await.unwrap(), None);
    })
    .await;
}

#[tokio::test]
async fn empty_stream() {
    against_each(async |client| {
        let answers = client.test().full_duplex_call(stream::empty()).await;
        let mut answers = answers.unwrap().into_inner();
        assert_eq!(answers.message().await.unwrap(), None);
    })
    .await;
}

#[tokio::test]
async fn timeout_on_sleeping_server() {
    against_each(async |client| {
        let mut sleepy = ask(31_415, 27_182);
        sleepy.response_parameters[0].interval_us = 200_000;
        let mut request = Request::new(stream::iter([sleepy]).chain(stream::pending()));
        request.set_timeout(Duration::from_millis(1));
        let status = error_of(client, request).await;
        assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
        assert_eq!(
            Error::of(&status).map(Error::kind),
            Some(Kind::DeadlineExceeded)
        );
    })
    .await;
}

#[tokio::test]
async fn cancel_after_begin() {
    against_each(async |client| {
        // Given a call that is there, of which nothing was sent yet
        let token = CancelToken::for_call();
        let mut request = Request::new(stream::pending::<StreamingInputCallRequest>());
        request.extensions_mut().insert(token.clone());
        let mut test = client.test();
        let call = tokio::spawn(async move { test.streaming_input_call(request).await });
        eventually("it is in flight", || client.in_flight() == 1).await;
        // When it is cancelled, then it ends so
        token.cancel();
        let status = call.await.unwrap().unwrap_err();
        assert_eq!(status.code(), Code::Cancelled, "{status}");
    })
    .await;
}

#[tokio::test]
async fn cancel_after_first_response() {
    against_each(async |client| {
        let token = CancelToken::for_call();
        let (give, requests) = given();
        give.send(ask(31_415, 27_182)).await.unwrap();
        let mut request = Request::new(requests);
        request.extensions_mut().insert(token.clone());
        let answers = client.test().full_duplex_call(request).await.unwrap();
        let mut answers = answers.into_inner();
        let first = answers.message().await.unwrap().expect("an answer");
        assert_eq!(first.payload.unwrap_or_default().body.len(), 31_415);
        token.cancel();
        let status = answers.message().await.unwrap_err();
        assert_eq!(status.code(), Code::Cancelled, "{status}");
    })
    .await;
}

/// A status that is asked for comes back as it is, of a unary call and of a stream.
async fn comes_back(code: Code, message: &str) {
    against_each(async |client| {
        let request = SimpleRequest {
            response_status: end_with(code, message),
            ..SimpleRequest::default()
        };
        let of_unary = client.test().unary_call(request).await.unwrap_err();
        let request = StreamingOutputCallRequest {
            response_status: end_with(code, message),
            ..StreamingOutputCallRequest::default()
        };
        let of_duplex = error_of(client, Request::new(stream::iter([request]))).await;
        for status in [of_unary, of_duplex] {
            assert_eq!((status.code(), status.message()), (code, message));
        }
    })
    .await;
}

#[tokio::test]
async fn status_code_and_message() {
    comes_back(Code::Unknown, "test status message").await;
}

#[tokio::test]
async fn special_status_message() {
    let message = "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n";
    comes_back(Code::Unknown, message).await;
}

#[tokio::test]
async fn custom_metadata() {
    const VALUE: &str = "test_initial_metadata_value";
    const BINARY: &[u8] = &[0xab, 0xab, 0xab];
    fn with_metadata<T>(message: T) -> Request<T> {
        let mut request = Request::new(message);
        let metadata = request.metadata_mut();
        metadata.insert(INITIAL, VALUE.parse().unwrap());
        metadata.insert_bin(TRAILING, MetadataValue::from_bytes(BINARY));
        request
    }
    against_each(async |client| {
        // A unary response has both in one.
        let response = client.test().unary_call(with_metadata(large())).await;
        let response = response.unwrap();
        is_large(response.get_ref());
        let metadata = response.metadata();
        assert_eq!(
            metadata.get(INITIAL).map(|v| v.as_bytes()),
            Some(VALUE.as_bytes())
        );
        let trailing = metadata.get_bin(TRAILING).expect("it comes back");
        assert_eq!(trailing.to_bytes().unwrap(), BINARY);

        let requests = stream::iter([ask(314_159, 271_828)]);
        let request = with_metadata(requests);
        let answers = client.test().full_duplex_call(request).await.unwrap();
        let initial = answers.metadata().get(INITIAL).map(|v| v.as_bytes());
        assert_eq!(initial, Some(VALUE.as_bytes()));
        let mut answers = answers.into_inner();
        while answers.message().await.unwrap().is_some() {}
        let trailers = answers.trailers().await.unwrap().expect("trailers");
        let trailing = trailers.get_bin(TRAILING).expect("it comes back");
        assert_eq!(trailing.to_bytes().unwrap(), BINARY);
    })
    .await;
}

#[tokio::test]
async fn unimplemented_method() {
    against_each(async |client| {
        let status = client.test().unimplemented_call(Empty {}).await;
        assert_eq!(status.unwrap_err().code(), Code::Unimplemented);
    })
    .await;
}

#[tokio::test]
async fn unimplemented_service() {
    against_each(async |client| {
        let mut other = UnimplementedServiceClient::new(client.channel.clone());
        let status = other.unimplemented_call(Empty {}).await;
        assert_eq!(status.unwrap_err().code(), Code::Unimplemented);
    })
    .await;
}

/// Fails if the call does, or takes longer than any should.
async fn soaked(client: &Client, request: SimpleRequest, nth: usize) {
    let mut request = Request::new(request);
    request.set_timeout(Duration::from_secs(5));
    let size = request.get_ref().response_size as usize;
    let began = Instant::now();
    let response = client.test().unary_call(request).await;
    let response = response.unwrap_or_else(|status| panic!("call {nth}: {status}"));
    let got = response.into_inner().payload.unwrap_or_default().body.len();
    assert_eq!(got, size, "call {nth} took {:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rpc_soak() {
    against_each(async |client| {
        soaked(client, large(), 0).await;
        let events = client.manager.events();
        for n in 1..1_000 {
            // Large ones move windows; more of them would only move memory.
            let request = match n % 20 {
                0 => large(),
                _ => SimpleRequest {
                    response_size: 314,
                    payload: zeros(271),
                    response_status: None,
                },
            };
            soaked(client, request, n).await;
        }
        // All over the first call's connection; that there is one may be told late.
        let told = events.ready_chunks(100).next().now_or_never().flatten();
        let told = told.unwrap_or_default().into_iter();
        let told: Vec<_> = told.map(|event| event.kind.name()).collect();
        let redialled = ["lost", "connecting", "restored"].map(|name| told.contains(&name));
        assert_eq!(redialled, [false; 3], "{told:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn channel_soak() {
    for peer in interop::peers() {
        println!("against {}", peer.name);
        let before = tasks();
        for n in 0..100 {
            let client = Client::of(peer).await;
            soaked(&client, large(), n).await;
            client.manager.stop().await;
        }
        eventually("nothing is left", || tasks() <= before).await;
    }
}

/// A stream that says something, is silent for so long, and says something again.
async fn silent_for(client: &Client, silence: Duration) -> Result<(), Status> {
    let (give, requests) = given();
    give.send(ask(1, 1)).await.unwrap();
    let answers = client.test().full_duplex_call(requests).await?;
    let mut answers = answers.into_inner();
    answers.message().await?;
    time::sleep(silence).await;
    // It may have failed meanwhile.
    let _ = give.send(ask(1, 1)).await;
    answers.message().await?;
    Ok(())
}

// Any server of gRPC's own minds pings that come more often than each five minutes while it says nothing, unless it is told
// not to; its third warning is the end of the connection.
#[tokio::test]
async fn a_server_that_minds_pings_cuts_a_silent_call_once_and_gets_fewer() {
    for peer in interop::peers() {
        println!("against {}", peer.name);
        let pings = Duration::from_millis(200);
        let often = |c: Connector| c.keepalive(Some(pings), 100 * pings).unwrap();
        let client = Client::with(peer, often).await;
        // For twelve pings, were they not to become fewer.
        let mut results = Vec::new();
        for _ in 0..2 {
            results.push(silent_for(&client, 12 * pings).await);
        }
        match &results[..] {
            [Err(cut), Ok(())] if peer.name.contains("C core") => {
                assert_eq!(cut.code(), Code::Unavailable, "{cut}");
                let why = cut.message().to_lowercase().replace('_', " ");
                assert!(why.contains("too many pings"), "{cut}");
            }
            [Ok(()), Ok(())] if peer.name.contains("tonic") => {}
            _ => panic!("{}: {results:?}", peer.name),
        }
        client.manager.stop().await;
    }
}
