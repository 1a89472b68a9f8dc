//! A small TCP proxy that can swallow, delay and reset; and an address at which nobody ever answers.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{Notify, watch},
    task::JoinSet,
};

/// What the proxy does with what comes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Pass,
    /// Takes everything and passes nothing on, in both directions, as a dead link does.
    Swallow,
    /// Passes on what is asked, and not what is answered.
    SwallowAnswers,
    /// Passes, but for connections that are made now: of those nothing.
    SwallowNew,
    /// Neither reads nor writes, and accepts all: as a process does that was stopped. Nothing is lost.
    Hold,
}

/// A running proxy; dropping it closes all that goes through it.
pub struct Proxy {
    pub address: SocketAddr,
    mode: watch::Sender<Mode>,
    resets: watch::Sender<u64>,
    reset_first: Arc<Notify>,
    delay_ms: Arc<AtomicU64>,
    pub accepted: Arc<AtomicUsize>,
    last_accepted: Arc<Mutex<Option<Instant>>>,
    _task: JoinSet<()>,
}

impl Proxy {
    pub async fn start(to: SocketAddr) -> Self {
        Self::start_at(SocketAddr::from(([127, 0, 0, 1], 0)), to).await
    }

    /// At this address, where another may have listened just before.
    pub async fn start_at(address: SocketAddr, to: SocketAddr) -> Self {
        // With SO_REUSEADDR, as tokio binds.
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (mode, modes) = watch::channel(Mode::Pass);
        let (resets, reset) = watch::channel(0);
        let delay_ms = Arc::new(AtomicU64::new(0));
        let accepted = Arc::new(AtomicUsize::new(0));
        let reset_first = Arc::new(Notify::new());
        let first = reset_first.clone();
        let mut task = JoinSet::new();
        let last_accepted = Arc::new(Mutex::new(None));
        let (delay, count, last) = (delay_ms.clone(), accepted.clone(), last_accepted.clone());
        task.spawn(async move {
            let mut links = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let is_first = count.fetch_add(1, Ordering::SeqCst) == 0;
                *last.lock().unwrap() = Some(Instant::now());
                // It belongs to each reset from here on.
                let mut reset = reset.clone();
                reset.mark_unchanged();
                let first = first.clone();
                let of_first = async move {
                    match is_first {
                        true => first.notified().await,
                        false => std::future::pending().await,
                    }
                };
                let (modes, delay) = (modes.clone(), delay.clone());
                links.spawn(async move {
                    if *modes.borrow() == Mode::SwallowNew {
                        std::future::pending::<()>().await;
                    }
                    tokio::select! {
                        () = link(client, to, modes, reset, delay) => {}
                        () = of_first => {}
                    }
                });
            }
        });
        Self {
            address,
            mode,
            resets,
            reset_first,
            delay_ms,
            accepted,
            last_accepted,
            _task: task,
        }
    }

    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// When it was last dialled.
    pub fn last_accepted(&self) -> Option<Instant> {
        *self.last_accepted.lock().unwrap()
    }

    pub fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }

    /// Delays everything in both directions.
    pub fn delay(&self, delay: Duration) {
        self.delay_ms
            .store(delay.as_millis() as u64, Ordering::SeqCst);
    }

    /// Ends the first connection with RST.
    pub fn reset_first(&self) {
        self.reset_first.notify_one();
    }

    /// Ends all connections with RST.
    pub fn reset(&self) {
        self.resets.send_modify(|n| *n += 1);
    }
}

async fn link(
    client: TcpStream,
    to: SocketAddr,
    modes: watch::Receiver<Mode>,
    mut reset: watch::Receiver<u64>,
    delay: Arc<AtomicU64>,
) {
    let Ok(server) = TcpStream::connect(to).await else {
        return;
    };
    for stream in [&client, &server] {
        stream.set_nodelay(true).unwrap();
        // Closing is then a reset.
        socket2::SockRef::from(stream)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
    }
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    tokio::select! {
        () = copy(client_read, server_write, Mode::SwallowAnswers, modes.clone(), delay.clone()) => {}
        () = copy(server_read, client_write, Mode::Pass, modes, delay) => {}
        _ = reset.changed() => {}
    }
}

async fn copy(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    // Passes in this mode as well.
    also: Mode,
    mut modes: watch::Receiver<Mode>,
    delay: Arc<AtomicU64>,
) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let read = match from.read(&mut buffer).await {
            Ok(0) | Err(_) => {
                // A dead link does not pass on that the other side hung up, either.
                if *modes.borrow() == Mode::Swallow {
                    std::future::pending::<()>().await;
                }
                return;
            }
            Ok(read) => read,
        };
        // Its end is the proxy's.
        let _ = modes.wait_for(|mode| *mode != Mode::Hold).await;
        let delay = delay.load(Ordering::SeqCst);
        if delay > 0 {
            tokio::time::sleep(Duration::from_millis(delay)).await;
        }
        let mode = *modes.borrow();
        let passes = [Mode::Pass, Mode::SwallowNew, also].contains(&mode);
        if passes && to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}

/// An address that answers nothing, not even SYN: its accept queue is full and stays so.
pub struct Blackhole {
    pub address: SocketAddr,
    _listener: socket2::Socket,
    _queue: Vec<socket2::Socket>,
}

impl Blackhole {
    pub fn new() -> Self {
        let stream =
            || socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        let listener = stream();
        listener
            .bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())
            .unwrap();
        listener.listen(0).unwrap();
        let address = listener.local_addr().unwrap();
        let queue: Vec<_> = (0..4)
            .map(|_| {
                let socket = stream();
                socket.set_nonblocking(true).unwrap();
                let _ = socket.connect(&address);
                socket
            })
            .collect();
        Self {
            address: address.as_socket().unwrap(),
            _listener: listener,
            _queue: queue,
        }
    }

    pub fn address(&self) -> String {
        self.address.to_string()
    }
}
