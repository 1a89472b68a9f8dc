//! Unary gRPC by hand over `h2`: the least that a call can cost.

use std::{
    future::poll_fn,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use h2::client::SendRequest;
use http::{HeaderValue, Method, Request, Uri, Version, header};
use prost::Message as _;
use tokio::net::TcpStream;

use super::{
    callers::{Caller, message},
    echo::EchoResponse,
};

/// One connection to each server, taken in turn; it balances nothing.
#[derive(Clone)]
pub(crate) struct RawH2 {
    servers: Arc<[(SendRequest<Bytes>, Uri)]>,
    next: Arc<AtomicUsize>,
}

impl RawH2 {
    pub(crate) async fn connect(addresses: &[SocketAddr]) -> Self {
        let mut servers = Vec::new();
        for address in addresses {
            let io = TcpStream::connect(address)
                .await
                .expect("the server listens");
            io.set_nodelay(true).expect("a socket option");
            // Its guard against hostile servers takes many small answers at once for an attack.
            let (send, connection) = h2::client::Builder::new()
                .data_frame_budget(usize::MAX)
                .handshake(io)
                .await
                .expect("it speaks HTTP/2");
            tokio::spawn(connection);
            let uri = format!("http://{address}/switchboard.demo.v1.Echo/Unary");
            servers.push((send, uri.parse().expect("a valid URI")));
        }
        Self {
            servers: servers.into(),
            next: Arc::default(),
        }
    }

    fn request(uri: &Uri) -> Request<()> {
        let mut request = Request::new(());
        *request.method_mut() = Method::POST;
        *request.version_mut() = Version::HTTP_2;
        *request.uri_mut() = uri.clone();
        let headers = request.headers_mut();
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
        let grpc = HeaderValue::from_static("application/grpc");
        headers.insert(header::CONTENT_TYPE, grpc);
        request
    }
}

impl Caller for RawH2 {
    async fn call(&mut self) {
        let (send, uri) = match &*self.servers {
            [only] => only,
            several => &several[self.next.fetch_add(1, Ordering::Relaxed) % several.len()],
        };
        // A clone a call: one handle takes one call at a time once streams have to queue.
        let mut send = send.clone();
        poll_fn(|cx| send.poll_ready(cx))
            .await
            .expect("it is connected");
        let (response, mut body) = send
            .send_request(Self::request(uri), false)
            .expect("the request is sent");
        body.send_data(framed(), true).expect("the message is sent");

        let response = response.await.expect("the call is answered");
        assert_eq!(response.status(), 200);
        let mut body = response.into_body();
        let mut data = BytesMut::new();
        while let Some(chunk) = body.data().await {
            let chunk = chunk.expect("the answer arrives");
            let _ = body.flow_control().release_capacity(chunk.len());
            data.extend_from_slice(&chunk);
        }
        let trailers = body.trailers().await.expect("the call ends");
        let status = trailers.and_then(|trailers| trailers.get("grpc-status").cloned());
        assert_eq!(status, Some(HeaderValue::from_static("0")));
        data.advance(PREFIX);
        EchoResponse::decode(data.freeze()).expect("the answer is a message");
    }
}

/// A flag and a length before each message.
const PREFIX: usize = 5;

fn framed() -> Bytes {
    let message = message();
    let len = message.encoded_len();
    let mut data = BytesMut::with_capacity(PREFIX + len);
    data.put_u8(0);
    data.put_u32(u32::try_from(len).expect("a small message"));
    message.encode(&mut data).expect("there is room");
    data.freeze()
}
