//! Peers that only pretend: they do in HTTP/2, or instead of it, what no real server can be brought to do to order.
//!
//! Each is on a runtime and thread of its own, so that its tasks are not among those of the test.

use std::{
    future::Future,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    runtime::Runtime,
};

pub type Request = http::Request<h2::RecvStream>;
pub type Respond = h2::server::SendResponse<Bytes>;

/// A peer that listens until it is dropped, and does what it is told to.
#[derive(Debug)]
pub struct Fake {
    pub address: SocketAddr,
    connections: Arc<AtomicUsize>,
    runtime: Option<Runtime>,
}

impl Fake {
    /// Does this with each connection, of which it is told which it is, from 0.
    pub fn sockets<F>(serve: impl Fn(usize, TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = io::Result<()>> + Send + 'static,
    {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let count = connections.clone();
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            while let Ok((socket, _)) = listener.accept().await {
                socket.set_nodelay(true).unwrap();
                tokio::spawn(serve(count.fetch_add(1, Ordering::SeqCst), socket));
            }
        });
        Self {
            address,
            connections,
            runtime: Some(runtime),
        }
    }

    /// Speaks HTTP/2 properly, and does this with each stream, of which it is told which one of its connection it is,
    /// from 0.
    pub fn streams(serve: impl Fn(usize, Request, Respond) + Send + Sync + 'static) -> Self {
        let serve = Arc::new(serve);
        Self::sockets(move |_, socket| {
            let serve = serve.clone();
            async move {
                let mut connection = h2::server::handshake(socket)
                    .await
                    .map_err(io::Error::other)?;
                let mut nth = 0;
                while let Some(Ok((request, respond))) = connection.accept().await {
                    serve(nth, request, respond);
                    nth += 1;
                }
                Ok(())
            }
        })
    }

    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// How many connections it has taken so far.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// The head of a response that goes well so far.
pub fn head() -> http::Response<()> {
    let head = http::Response::builder().header("content-type", "application/grpc");
    head.body(()).unwrap()
}

/// Answers with one message, of nothing, and OK.
pub fn answer(mut respond: Respond) {
    let mut stream = respond.send_response(head(), false).unwrap();
    stream
        .send_data(Bytes::from_static(&[0; 5]), false)
        .unwrap();
    let mut trailers = http::HeaderMap::new();
    trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
    stream.send_trailers(trailers).unwrap();
}

/// How much time a call says that it has.
pub fn timeout_of(request: &Request) -> Duration {
    let timeout = request.headers()["grpc-timeout"].to_str().unwrap();
    let (number, unit) = timeout.split_at(timeout.len() - 1);
    let number: u64 = number.parse().unwrap();
    match unit {
        "n" => Duration::from_nanos(number),
        "u" => Duration::from_micros(number),
        "m" => Duration::from_millis(number),
        _ => panic!("{timeout}"),
    }
}

// === by hand ===

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PUSH_PROMISE: u8 = 5;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const ACK: u8 = 1;
pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;
pub const PADDED: u8 = 8;

/// A frame as it is on the wire, whether that makes sense or not.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// A parameter of the connection, as a SETTINGS frame has it.
pub fn setting(parameter: u8, value: u32) -> Vec<u8> {
    [&[0, parameter], &value.to_be_bytes()[..]].concat()
}

pub const MAX_CONCURRENT_STREAMS: u8 = 3;

/// The head of a response that goes well so far, in HPACK: `:status` 200 and the content type.
pub fn head_block() -> Vec<u8> {
    [b"\x88\x0f\x10\x10", &b"application/grpc"[..]].concat()
}

/// The same as a frame.
pub fn head_of(stream: u32) -> Vec<u8> {
    frame(HEADERS, END_HEADERS, stream, &head_block())
}

/// A message of nothing.
pub fn message_of(stream: u32) -> Vec<u8> {
    frame(DATA, 0, stream, &[0; 5])
}

/// Trailers with status OK.
pub fn ok_of(stream: u32) -> Vec<u8> {
    let block = [b"\x00\x0b", &b"grpc-status"[..], b"\x010"].concat();
    frame(HEADERS, END_HEADERS | END_STREAM, stream, &block)
}

/// A frame that was read.
#[derive(Debug)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Bytes,
}

/// A connection of which each frame is written by hand.
pub struct ByHand {
    socket: TcpStream,
    read: BytesMut,
}

impl ByHand {
    /// Hears the client out, and says these settings.
    pub async fn accept(socket: TcpStream, settings: &[u8]) -> io::Result<Self> {
        let mut this = Self {
            socket,
            read: BytesMut::new(),
        };
        this.has_read(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".len())
            .await?;
        this.read.advance(24);
        this.send(&frame(SETTINGS, 0, 0, settings)).await?;
        Ok(this)
    }

    /// Says this.
    pub async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.socket.write_all(bytes).await
    }

    /// The next frame; settings are acknowledged and pings answered before. Nothing that was read is lost when it is
    /// dropped before its end.
    pub async fn next(&mut self) -> io::Result<Frame> {
        self.has_read(9).await?;
        let length = u32::from_be_bytes([0, self.read[0], self.read[1], self.read[2]]) as usize;
        self.has_read(9 + length).await?;
        let mut head = self.read.split_to(9);
        head.advance(3);
        let frame = Frame {
            kind: head.get_u8(),
            flags: head.get_u8(),
            stream: head.get_u32(),
            payload: self.read.split_to(length).freeze(),
        };
        if matches!(frame.kind, SETTINGS | PING) && frame.flags & ACK == 0 {
            let payload = if frame.kind == PING {
                &frame.payload[..]
            } else {
                &[]
            };
            self.send(&self::frame(frame.kind, ACK, 0, payload)).await?;
        }
        Ok(frame)
    }

    /// The stream of the next call.
    pub async fn called(&mut self) -> io::Result<u32> {
        loop {
            let frame = self.next().await?;
            if frame.kind == HEADERS {
                return Ok(frame.stream);
            }
        }
    }

    /// Answers with one message, of nothing, and OK.
    pub async fn answer(&mut self, stream: u32) -> io::Result<()> {
        let answer = [head_of(stream), message_of(stream), ok_of(stream)];
        self.send(&answer.concat()).await
    }

    /// Answers every call from here on.
    pub async fn serve(&mut self) -> io::Result<()> {
        loop {
            let stream = self.called().await?;
            self.answer(stream).await?;
        }
    }

    /// Answers none from here on, until the client hangs up.
    pub async fn idle(&mut self) -> io::Result<()> {
        loop {
            self.next().await?;
        }
    }

    /// The socket, for who wants to say something else.
    pub fn into_socket(self) -> TcpStream {
        self.socket
    }

    async fn has_read(&mut self, bytes: usize) -> io::Result<()> {
        while self.read.len() < bytes {
            if self.socket.read_buf(&mut self.read).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }
}
