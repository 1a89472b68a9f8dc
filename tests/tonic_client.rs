//! What a generated client does over a channel of tonic's, it does over ours: compression, limits of size, origins,
//! interceptors, a user agent of its own.

mod support;

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use support::server::{
    Seen, echo,
    pb::{EchoRequest, EchoResponse, echo_client::EchoClient},
};
use switchboard::{Channel, ConnectionManager, MemoryRegistry, Session, registry::Registration};
use tokio::{net::TcpListener, task::JoinSet};
use tokio_stream::{StreamExt as _, wrappers::TcpListenerStream};
use tonic::{
    Code, Request, Response, Status,
    codec::CompressionEncoding::{self, Gzip, Zstd},
    service::interceptor::InterceptedService,
    transport::{Endpoint, Server},
};

type Notes = Arc<Mutex<Vec<(String, String)>>>;

/// A server that takes and sends what is compressed so, and notes the headers that this is about.
struct Fixture {
    address: SocketAddr,
    seen: Arc<Seen>,
    notes: Notes,
    channel: Channel,
    _manager: ConnectionManager,
    _registration: Registration,
    _server: JoinSet<()>,
}

impl Fixture {
    async fn new(encodings: &[CompressionEncoding]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (seen, notes) = (Arc::new(Seen::default()), Notes::default());
        let mut service = echo("a", &seen).max_decoding_message_size(64 << 20);
        for encoding in encodings {
            service = service
                .accept_compressed(*encoding)
                .send_compressed(*encoding);
        }
        let noting = notes.clone();
        let service = InterceptedService::new(service, move |request: Request<()>| {
            for name in ["grpc-encoding", "x-mine"] {
                if let Some(value) = request.metadata().get(name) {
                    let note = (name.to_owned(), value.to_str().unwrap().to_owned());
                    noting.lock().unwrap().push(note);
                }
            }
            Ok(request)
        });
        let mut server = JoinSet::new();
        server.spawn(async move {
            let incoming = TcpListenerStream::new(listener);
            let served = Server::builder().add_service(service);
            served.serve_with_incoming(incoming).await.unwrap();
        });
        let registry = MemoryRegistry::new();
        let session = Session::new("echo", address.to_string());
        let registration = registry.register(session).await.unwrap();
        let manager = ConnectionManager::builder(registry).build();
        Self {
            address,
            seen,
            notes,
            channel: manager.channel("echo"),
            _manager: manager,
            _registration: registration,
            _server: server,
        }
    }

    fn noted(&self) -> Vec<(String, String)> {
        std::mem::take(&mut self.notes.lock().unwrap())
    }

    fn client(&self) -> EchoClient<Channel> {
        EchoClient::new(self.channel.clone())
    }

    /// The same over tonic's own channel.
    fn theirs(&self) -> EchoClient<tonic::transport::Channel> {
        let uri = format!("http://{}", self.address);
        EchoClient::new(Endpoint::from_shared(uri).unwrap().connect_lazy())
    }
}

fn message(text: &str) -> EchoRequest {
    EchoRequest {
        message: text.to_owned(),
        ..EchoRequest::default()
    }
}

fn large() -> EchoRequest {
    EchoRequest {
        payload: vec![7; 100_000].into(),
        ..message("large")
    }
}

fn encoding_of(answer: &Response<impl Sized>) -> Option<&str> {
    let encoding = answer.metadata().get("grpc-encoding")?;
    encoding.to_str().ok()
}

#[tokio::test]
async fn messages_are_compressed_both_ways() {
    for (encoding, name) in [(Gzip, "gzip"), (Zstd, "zstd")] {
        let fixture = Fixture::new(&[encoding]).await;
        let mut client = fixture
            .client()
            .send_compressed(encoding)
            .accept_compressed(encoding);
        let answer = client.unary(large()).await.unwrap();
        assert_eq!(encoding_of(&answer), Some(name));
        assert_eq!(answer.get_ref().payload, large().payload);

        let requests = tokio_stream::iter(vec![large(), large(), large()]);
        let answer = client.chat(requests).await.unwrap();
        assert_eq!(encoding_of(&answer), Some(name));
        let answers: Vec<EchoResponse> = answer.into_inner().map(Result::unwrap).collect().await;
        assert_eq!(answers.len(), 3);
        assert!(answers.iter().all(|answer| answer.bytes == 100_000));
        let note = ("grpc-encoding".to_owned(), name.to_owned());
        assert_eq!(fixture.noted(), [note.clone(), note]);

        // And who does not say that it takes such is answered without.
        let answer = fixture.client().unary(large()).await.unwrap();
        assert_eq!(encoding_of(&answer), None);
    }
}

#[tokio::test]
async fn a_server_that_does_not_take_a_compression_says_so() {
    let fixture = Fixture::new(&[]).await;
    let ours = fixture.client().send_compressed(Gzip).unary(large()).await;
    let theirs = fixture.theirs().send_compressed(Gzip).unary(large()).await;
    let (ours, theirs) = (ours.unwrap_err(), theirs.unwrap_err());
    assert_eq!(ours.code(), Code::Unimplemented);
    assert_eq!(
        (ours.code(), ours.message()),
        (theirs.code(), theirs.message())
    );
}

#[tokio::test]
async fn limits_of_size_hold_with_the_status_that_tonic_has() {
    let fixture = Fixture::new(&[]).await;

    // What comes is too large.
    let mut ours = fixture.client().max_decoding_message_size(1000);
    let mut theirs = fixture.theirs().max_decoding_message_size(1000);
    let (a, b) = (ours.unary(large()).await, theirs.unary(large()).await);
    let (a, b) = (a.unwrap_err(), b.unwrap_err());
    assert_eq!(a.code(), Code::OutOfRange, "{a:?}");
    assert_eq!((a.code(), a.message()), (b.code(), b.message()));
    // And the connection is as good as before.
    ours.unary(message("small")).await.unwrap();

    // What goes is too large: it is not sent. The status is that of the one who encodes.
    let mut ours = fixture.client().max_encoding_message_size(1000);
    let before = fixture
        .seen
        .started
        .load(std::sync::atomic::Ordering::SeqCst);
    let status = ours.unary(large()).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
    assert!(
        status
            .message()
            .contains("encoded message length too large"),
        "{status:?}"
    );
    let after = fixture
        .seen
        .started
        .load(std::sync::atomic::Ordering::SeqCst);
    assert_eq!(before, after);
    let requests = tokio_stream::iter(vec![message("small"), large()]);
    let status = ours.upload(requests).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
    ours.unary(message("small")).await.unwrap();
}

#[tokio::test]
async fn interceptors_go_around_a_channel_on_either_side() {
    let fixture = Fixture::new(&[]).await;
    let mine = |request: Request<()>| -> Result<Request<()>, Status> {
        let mut request = request;
        request
            .metadata_mut()
            .insert("x-mine", "yes".parse().unwrap());
        Ok(request)
    };
    let note = [("x-mine".to_owned(), "yes".to_owned())];

    let mut client = EchoClient::with_interceptor(fixture.channel.clone(), mine);
    client.unary(message("hello")).await.unwrap();
    assert_eq!(fixture.noted(), note);
    let service = InterceptedService::new(fixture.channel.clone(), mine);
    let mut client = EchoClient::new(service);
    client.unary(message("hello")).await.unwrap();
    assert_eq!(fixture.noted(), note);

    // One that refuses: nothing is sent.
    let refuses = |_: Request<()>| -> Result<Request<()>, Status> {
        Err(Status::unauthenticated("who are you"))
    };
    let mut client = EchoClient::with_interceptor(fixture.channel.clone(), refuses);
    let status = client.unary(message("hello")).await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::Unauthenticated, "who are you")
    );
    assert!(fixture.noted().is_empty());
}

#[tokio::test]
async fn a_request_may_bring_its_own_user_agent() {
    let fixture = Fixture::new(&[]).await;
    let mut client = fixture.client();
    client.unary(message("hello")).await.unwrap();
    let mut request = Request::new(message("hello"));
    let mine = "mine/1".parse().unwrap();
    request.metadata_mut().insert("user-agent", mine);
    client.unary(request).await.unwrap();
    let agents = fixture.seen.user_agents.lock().unwrap().clone();
    let ours = concat!("switchboard/", env!("CARGO_PKG_VERSION"));
    assert_eq!(agents, [ours, "mine/1"]);
}

#[tokio::test]
async fn an_origin_gives_its_path_and_neither_scheme_nor_authority_as_over_tonic() {
    // Given a server that answers with the URI of each call.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut server = JoinSet::new();
    server.spawn(async move {
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut connection = h2::server::handshake(socket).await.unwrap();
                while let Some(Ok((request, mut respond))) = connection.accept().await {
                    let answer = http::Response::builder()
                        .header("content-type", "application/grpc")
                        .header("grpc-status", "9")
                        .header("grpc-message", request.uri().to_string())
                        .body(())
                        .unwrap();
                    respond.send_response(answer, true).unwrap();
                }
            });
        }
    });
    let registry = MemoryRegistry::new();
    let session = Session::new("echo", address.to_string());
    let _registration = registry.register(session).await.unwrap();
    let manager = ConnectionManager::builder(registry).build();
    let origin = || {
        "https://elsewhere.example:1/below"
            .parse::<http::Uri>()
            .unwrap()
    };
    let mut ours = EchoClient::with_origin(manager.channel("echo"), origin());
    let uri = Endpoint::from_shared(format!("http://{address}")).unwrap();
    let mut theirs = EchoClient::with_origin(uri.connect_lazy(), origin());

    // When it is called through both, then they say the same.
    let status = |result: Result<Response<EchoResponse>, Status>| result.unwrap_err();
    let limit = Duration::from_secs(5);
    let ours = tokio::time::timeout(limit, ours.unary(message("a")))
        .await
        .unwrap();
    let theirs = tokio::time::timeout(limit, theirs.unary(message("a")))
        .await
        .unwrap();
    let (ours, theirs) = (status(ours), status(theirs));
    let expected = format!("http://{address}/below/switchboard.demo.v1.Echo/Unary");
    assert_eq!(theirs.message(), expected);
    assert!(ours.message().starts_with(&expected), "{ours:?}");
}
