//! What the size of flow-control windows does: to an answer from afar, of which one window comes a round trip, and to small
//! calls on a connection that brings much. Beside them tonic's channel, with its own windows and with adaptive ones.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use switchboard::{ConnectionManager, Session, registry::Fixed, transport::Connector};
use tokio::{task::JoinSet, time};
use tonic::{Status, body::Body, transport::Endpoint};
use tower::{ServiceExt as _, util::BoxCloneSyncService};

use self::afar::Afar;
use crate::{
    report::{info, micros},
    support::{
        callers::message,
        echo::{EchoRequest, echo_client::EchoClient},
        measure::{Threads, median, quantile},
        servers::Servers,
    },
};

#[path = "../../tests/support/afar.rs"]
#[allow(unreachable_pub, reason = "the tests' too")]
mod afar;

const ROUNDS: usize = 5;
const SLICE: Duration = Duration::from_millis(400);

/// How far: as from one region to the next.
const ROUND_TRIP: Duration = Duration::from_millis(10);

/// Of the messages of an answer.
const MESSAGE: u32 = 16 << 10;

const SIZES: [Windows; 10] = [
    Windows::Kib(64),
    Windows::Kib(256),
    Windows::Kib(1024),
    Windows::Kib(2048),
    Windows::Kib(4096),
    Windows::Kib(16384),
    Windows::Adaptive(2048),
    Windows::Adaptive(16384),
    Windows::Tonic,
    Windows::TonicAdaptive,
];

/// Whose.
#[derive(Clone, Copy)]
enum Windows {
    /// Ours, of so many KiB for a stream, and four times that for a connection.
    Kib(u32),
    /// Ours, adaptive, up to so many KiB.
    Adaptive(u32),
    Tonic,
    TonicAdaptive,
}

type Client = EchoClient<BoxCloneSyncService<http::Request<Body>, http::Response<Body>, Status>>;

pub(crate) fn run() {
    let servers = Servers::start(1);
    let address = servers.addresses(1)[0];
    let runtime = Threads::Two.runtime();
    runtime.block_on(async {
        let afar = Afar::of(address, ROUND_TRIP / 2).await;
        let (mut rates, mut beside) =
            (vec![Vec::new(); SIZES.len()], vec![Vec::new(); SIZES.len()]);
        for _ in 0..ROUNDS {
            for (n, windows) in SIZES.iter().enumerate() {
                rates[n].push(download(windows.connect(afar.address).await).await);
                beside[n].push(small_beside_large(windows.connect(address).await).await);
            }
        }
        for ((windows, rates), beside) in SIZES.iter().zip(&mut rates).zip(&mut beside) {
            let (name, of) = windows.name();
            let what = format!("MB a second of one answer from {ROUND_TRIP:?} away; {of}");
            info(&format!("windows_afar_{name}"), median(rates), &what);
            for (quantile, which) in ["p50", "p99"].iter().enumerate() {
                let mut each: Vec<f64> = beside.iter().map(|of| micros(of[quantile])).collect();
                let what = format!("us, {which} of a small call beside two such answers; {of}");
                info(
                    &format!("windows_beside_{which}_{name}"),
                    median(&mut each),
                    &what,
                );
            }
        }
    });
}

impl Windows {
    fn name(self) -> (String, String) {
        match self {
            Self::Kib(kib) => (format!("{kib}kib"), format!("windows of {kib} KiB")),
            Self::Adaptive(kib) => {
                let of = format!("adaptive windows of up to {kib} KiB");
                (format!("adaptive_{kib}kib"), of)
            }
            Self::Tonic => ("tonic".to_owned(), "tonic's Channel".to_owned()),
            Self::TonicAdaptive => {
                let of = "tonic's Channel, http2_adaptive_window";
                ("tonic_adaptive".to_owned(), of.to_owned())
            }
        }
    }

    /// Over one connection.
    async fn connect(self, to: SocketAddr) -> Client {
        let boxed = match self {
            Self::Kib(kib) | Self::Adaptive(kib) => {
                let servers = Fixed::new([Session::new("echo", to.to_string())]);
                let connector = Connector::new()
                    .adaptive_windows(matches!(self, Self::Adaptive(_)))
                    .windows(kib << 10, kib << 12);
                let connector = connector.and_then(|c| c.max_connections(1));
                let manager = ConnectionManager::builder(servers.expect("a valid session"))
                    .connector(connector.expect("in bounds"))
                    .build();
                let channel = manager.channel("echo").map_response(|r| r.map(Body::new));
                BoxCloneSyncService::new(channel.map_err(Into::into))
            }
            Self::Tonic | Self::TonicAdaptive => {
                let endpoint = Endpoint::from_shared(format!("http://{to}")).expect("a valid URI");
                let endpoint = endpoint.http2_adaptive_window(matches!(self, Self::TonicAdaptive));
                let channel = endpoint.connect().await.expect("the server listens");
                BoxCloneSyncService::new(channel.map_err(|error| Status::from_error(error.into())))
            }
        };
        let mut client = EchoClient::new(boxed);
        client.unary(message()).await.expect("it is answered");
        client
    }
}

/// Megabytes a second of one answer without end, once it is under way.
async fn download(mut client: Client) -> f64 {
    let mut answers = endless(&mut client).await;
    let (begins, mut bytes) = (Instant::now() + SLICE / 2, 0);
    let end = begins + SLICE;
    loop {
        let answer = answers.message().await.expect("it goes on");
        let answer = answer.expect("it has no end");
        let now = Instant::now();
        if now >= end {
            return bytes as f64 / 1e6 / SLICE.as_secs_f64();
        }
        if now >= begins {
            bytes += answer.payload.len();
        }
    }
}

/// The median and the 99th percentile of a small call's time while two answers without end are read.
async fn small_beside_large(client: Client) -> [Duration; 2] {
    let mut large = JoinSet::new();
    for _ in 0..2 {
        let mut client = client.clone();
        large.spawn(async move {
            let mut answers = endless(&mut client).await;
            while let Ok(Some(_)) = answers.message().await {}
        });
    }
    time::sleep(SLICE / 4).await;
    let (mut client, end) = (client, Instant::now() + SLICE);
    let mut took = Vec::new();
    while Instant::now() < end {
        let began = Instant::now();
        client.unary(message()).await.expect("it is answered");
        took.push(u32::try_from(began.elapsed().as_nanos()).unwrap_or(u32::MAX));
    }
    [500, 990].map(|per_mille| quantile(&mut took, per_mille))
}

async fn endless(client: &mut Client) -> tonic::Streaming<crate::support::echo::EchoResponse> {
    let request = EchoRequest {
        count: u32::MAX,
        size: MESSAGE,
        ..EchoRequest::default()
    };
    let answer = client.download(request).await;
    answer.expect("it is answered").into_inner()
}
