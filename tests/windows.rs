//! Flow-control windows: those that were asked for, and those that follow the path.

mod support;

use std::{
    future::poll_fn,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use h2::{SendStream, server::SendResponse};
use support::{
    afar::Afar,
    fake::{self, Fake},
    server::pb::{EchoRequest, echo_client::EchoClient},
};
use switchboard::{Channel, ConnectionManager, Session, registry::Fixed, transport::Connector};
use tokio::time;
use tonic::Status;

/// The windows that a connection begins with by HTTP/2 itself, and ours at most.
const LEAST: usize = 65_535;
const MOST: usize = 2 << 20;

/// A server that looks, as each call comes, how much it may send of an answer at once. Fake, as no library of servers tells.
struct Looks {
    fake: Fake,
    windows: Arc<Mutex<Vec<usize>>>,
}

impl Looks {
    fn start() -> Self {
        let windows = Arc::new(Mutex::new(Vec::new()));
        let told = windows.clone();
        let fake = Fake::sockets(move |_, socket| {
            let told = told.clone();
            async move {
                let mut connection = h2::server::Builder::new()
                    .max_send_buffer_size(8 << 20)
                    .handshake(socket)
                    .await
                    .map_err(std::io::Error::other)?;
                while let Some(Ok((request, respond))) = connection.accept().await {
                    let large = request.uri().path().ends_with("Download");
                    tokio::spawn(answer(respond, large, told.clone()));
                }
                Ok(())
            }
        });
        Self { fake, windows }
    }

    /// What the last call found.
    fn last(&self) -> usize {
        *self.windows.lock().unwrap().last().expect("it was called")
    }
}

async fn answer(mut respond: SendResponse<Bytes>, large: bool, told: Arc<Mutex<Vec<usize>>>) {
    let mut answer = respond.send_response(fake::head(), false).unwrap();
    answer.reserve_capacity(1 << 30);
    let window = poll_fn(|cx| answer.poll_capacity(cx)).await;
    told.lock().unwrap().push(window.unwrap().unwrap());
    let messages = if large { 256 } else { 1 };
    for _ in 0..messages {
        if send(&mut answer, large).await.is_none() {
            return;
        }
    }
    let mut trailers = http::HeaderMap::new();
    trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
    let _ = answer.send_trailers(trailers);
}

/// One message of 64 KiB or of nothing, as the window allows it; none once nobody reads.
async fn send(answer: &mut SendStream<Bytes>, large: bool) -> Option<()> {
    // `bytes payload = 2`, of as much as there is.
    let mut message = match large {
        true => {
            let payload = vec![0; 64 << 10];
            let field = [&[0x12, 0x80, 0x80, 0x04][..], &payload].concat();
            let head = [&[0][..], &(field.len() as u32).to_be_bytes()].concat();
            Bytes::from([head, field].concat())
        }
        false => Bytes::from_static(&[0; 5]),
    };
    while !message.is_empty() {
        answer.reserve_capacity(message.len());
        if answer.capacity() == 0 {
            poll_fn(|cx| answer.poll_capacity(cx)).await?.ok()?;
        }
        let part = message.split_to(answer.capacity().min(message.len()));
        answer.send_data(part, false).ok()?;
    }
    Some(())
}

fn channel_to(address: String, adaptive: bool) -> (ConnectionManager, Channel) {
    let connector = Connector::new()
        .adaptive_windows(adaptive)
        .max_connections(1);
    let manager = ConnectionManager::builder(Fixed::new([Session::new("echo", address)]).unwrap())
        .connector(connector.unwrap())
        .build();
    let channel = manager.channel("echo");
    (manager, channel)
}

async fn small(channel: &Channel) {
    let mut client = EchoClient::new(channel.clone());
    client.unary(EchoRequest::default()).await.unwrap();
}

/// 16 MiB.
async fn large(channel: &Channel) -> Result<usize, Status> {
    let mut client = EchoClient::new(channel.clone());
    let answer = client.download(EchoRequest::default()).await?;
    let (mut answers, mut bytes) = (answer.into_inner(), 0);
    while let Some(answer) = answers.message().await? {
        bytes += answer.payload.len();
    }
    Ok(bytes)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn windows_are_what_was_asked_for_unless_they_are_to_follow_the_path() {
    let server = Looks::start();
    let (_manager, channel) = channel_to(server.fake.address(), false);
    small(&channel).await;
    assert_eq!(server.last(), MOST);
    large(&channel).await.unwrap();
    small(&channel).await;
    assert_eq!(server.last(), MOST);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn adaptive_windows_grow_by_large_answers_from_afar_and_not_by_small_ones() {
    let server = Looks::start();
    let afar = Afar::of(server.fake.address, Duration::from_millis(5)).await;
    let (_manager, channel) = channel_to(afar.address.to_string(), true);
    for _ in 0..50 {
        small(&channel).await;
        assert_eq!(server.last(), LEAST);
    }
    // Given an answer of 16 MiB, which would take 256 round trips
    let took = time::timeout(Duration::from_secs(30), large(&channel)).await;
    assert_eq!(took.expect("it hangs").unwrap(), 16 << 20);
    // Then the window has become as large as it may be, and no larger.
    small(&channel).await;
    let grown = server.last();
    assert!((4 * LEAST..=MOST).contains(&grown), "{grown}");
    for _ in 0..10 {
        large(&channel).await.unwrap();
    }
    small(&channel).await;
    assert_eq!(server.last(), MOST);
}

// A slow reader fills its own window and not the connection's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_does_not_read_keeps_no_other_from_reading() {
    let server = Looks::start();
    let (_manager, channel) = channel_to(server.fake.address(), true);
    for _ in 0..10 {
        large(&channel).await.unwrap();
    }
    let mut idle = Vec::new();
    for _ in 0..3 {
        let mut client = EchoClient::new(channel.clone());
        idle.push(client.download(EchoRequest::default()).await.unwrap());
    }
    let mut read = 0;
    for _ in 0..5 {
        let bytes = time::timeout(Duration::from_secs(30), large(&channel)).await;
        read += bytes.expect("it hangs").unwrap();
    }
    assert_eq!(read, 5 * (16 << 20));
}
