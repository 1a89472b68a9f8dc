//! Servers that are far away.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::mpsc,
    task::JoinSet,
    time,
};

/// A server as it is seen from afar: what is sent comes so much later, however much of it is under way.
pub struct Afar {
    pub address: SocketAddr,
    _links: JoinSet<()>,
}

impl Afar {
    pub async fn of(server: SocketAddr, one_way: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let mut accepting = JoinSet::new();
        accepting.spawn(async move {
            let mut links = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let Ok(server) = TcpStream::connect(server).await else {
                    continue;
                };
                for socket in [&client, &server] {
                    let _ = socket.set_nodelay(true);
                }
                let ((from_client, to_client), (from_server, to_server)) =
                    (client.into_split(), server.into_split());
                links.spawn(carry(from_client, to_server, one_way));
                links.spawn(carry(from_server, to_client, one_way));
            }
        });
        Self {
            address,
            _links: accepting,
        }
    }
}

async fn carry(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, one_way: Duration) {
    let (send, mut under_way) = mpsc::unbounded_channel::<(Instant, Vec<u8>)>();
    let arrives = async move {
        while let Some((at, bytes)) = under_way.recv().await {
            time::sleep_until(at.into()).await;
            if to.write_all(&bytes).await.is_err() {
                return;
            }
        }
    };
    let leaves = async move {
        loop {
            let mut bytes = vec![0; 64 << 10];
            match from.read(&mut bytes).await {
                Ok(read @ 1..) => {
                    bytes.truncate(read);
                    if send.send((Instant::now() + one_way, bytes)).is_err() {
                        return;
                    }
                }
                _ => return,
            }
        }
    };
    tokio::join!(arrives, leaves);
}
