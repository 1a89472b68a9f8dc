//! An etcd of one's own: a process on free ports, with its data in a temporary folder.

use std::{
    fs,
    net::TcpListener,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use tonic::{
    Request,
    codegen::{Bytes, http::uri::PathAndQuery},
    transport::Channel,
};

#[allow(
    clippy::all,
    dead_code,
    missing_debug_implementations,
    missing_docs,
    rust_2018_idioms,
    unreachable_pub,
    reason = "generated"
)]
pub mod pb {
    include!(concat!(env!("CARGO_MANIFEST_DIR"), "/proto/gen/etcd.rs"));
}

use pb::{kv_client::KvClient, lease_client::LeaseClient};

/// Not in our small proto, which has what the crate needs. Its answer is a header, as a put's is.
#[derive(Clone, Copy, prost::Message)]
struct CompactionRequest {
    #[prost(int64, tag = "1")]
    revision: i64,
    #[prost(bool, tag = "2")]
    physical: bool,
}

/// An etcd process. Dropping it ends the process and removes its data.
#[derive(Debug)]
pub struct Etcd {
    folder: PathBuf,
    client_port: u16,
    peer_port: u16,
    process: Option<Child>,
}

impl Etcd {
    /// Starts one and waits until it answers.
    pub async fn start() -> Self {
        let mut etcd = Self::stopped();
        etcd.restart().await;
        etcd
    }

    /// One that is not running yet; its endpoint is known already.
    pub fn stopped() -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let number = LAST.fetch_add(1, Ordering::Relaxed);
        let name = format!("switchboard-etcd-{}-{number}", std::process::id());
        Self {
            folder: std::env::temp_dir().join(name),
            client_port: free_port(),
            peer_port: free_port(),
            process: None,
        }
    }

    /// `http://host:port`.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.client_port)
    }

    /// `host:port`.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.client_port)
    }

    /// Starts it if it is not running, on the same ports and data, and waits until it answers.
    pub async fn restart(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !self.answers().await {
            // It may have failed to start: another process can have had the port for a moment.
            match self.process.as_mut().map(Child::try_wait) {
                Some(Ok(None)) => {}
                _ => self.spawn(),
            }
            assert!(
                Instant::now() < deadline,
                "etcd does not answer at {}; its log is {}",
                self.endpoint(),
                self.folder.join("log").display()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Kills it, as a machine does that loses power.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// Stops its process where it is: it keeps its sockets and says nothing.
    pub fn pause(&self) {
        self.signal("STOP");
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.signal("CONT");
    }

    /// Writes a record.
    pub async fn put(&self, key: &str, value: impl Into<Vec<u8>>) {
        let request = pb::PutRequest {
            key: Bytes::copy_from_slice(key.as_bytes()),
            value: value.into().into(),
            lease: 0,
        };
        self.kv()
            .await
            .put(request)
            .await
            .expect("etcd takes a record");
    }

    /// Deletes a record; whether there was one.
    pub async fn delete(&self, key: &str) -> bool {
        let request = pb::DeleteRangeRequest {
            key: Bytes::copy_from_slice(key.as_bytes()),
            range_end: Bytes::new(),
        };
        let answer = self.kv().await.delete_range(request).await;
        answer.expect("etcd deletes a record").into_inner().deleted > 0
    }

    /// The value of a record, if there is one.
    pub async fn get(&self, key: &str) -> Option<Vec<u8>> {
        self.record(key).await.map(|kv| kv.value.to_vec())
    }

    /// The current revision.
    pub async fn revision(&self) -> i64 {
        let request = pb::RangeRequest {
            key: Bytes::from_static(b"none"),
            ..Default::default()
        };
        let answer = self.kv().await.range(request).await.expect("etcd answers");
        answer
            .into_inner()
            .header
            .expect("it has a header")
            .revision
    }

    /// Forgets all history up to now, and returns the revision.
    pub async fn compact(&self) -> i64 {
        let revision = self.revision().await;
        let mut client = tonic::client::Grpc::new(self.channel().await);
        client.ready().await.expect("a channel is ready");
        let request = CompactionRequest {
            revision,
            physical: true,
        };
        let path = PathAndQuery::from_static("/etcdserverpb.KV/Compact");
        let codec = tonic_prost::ProstCodec::<CompactionRequest, pb::PutResponse>::default();
        let answer = client.unary(Request::new(request), path, codec).await;
        answer.expect("etcd compacts");
        revision
    }

    /// Ends the lease of a record, as etcd does when nobody keeps it alive.
    pub async fn expire(&self, key: &str) {
        let id = self.record(key).await.expect("the record is there").lease;
        let mut leases = LeaseClient::new(self.channel().await);
        let revoked = leases.lease_revoke(pb::LeaseRevokeRequest { id }).await;
        revoked.expect("the record has a lease");
    }

    /// A plain watch of this prefix from now on, on a connection of its own.
    pub async fn watch(&self, prefix: &str) -> PlainWatch {
        let mut end = prefix.as_bytes().to_vec();
        if let Some(last) = end.last_mut() {
            *last += 1;
        }
        let create = pb::WatchRequest {
            request_union: Some(pb::watch_request::RequestUnion::CreateRequest(
                pb::WatchCreateRequest {
                    key: Bytes::copy_from_slice(prefix.as_bytes()),
                    range_end: end.into(),
                    ..Default::default()
                },
            )),
        };
        // Kept open: the end of the requests would be the end of the watch.
        let requests = tokio_stream::StreamExt::chain(
            tokio_stream::once(create),
            tokio_stream::pending::<pb::WatchRequest>(),
        );
        let mut client = pb::watch_client::WatchClient::new(self.channel().await);
        let answers = client.watch(requests).await.expect("etcd takes a watch");
        let mut watch = PlainWatch {
            answers: answers.into_inner(),
        };
        assert!(
            watch.next().await.is_empty(),
            "the first answer is that it is created"
        );
        watch
    }

    /// A client that keeps one connection; for many writes.
    pub async fn kv(&self) -> KvClient<Channel> {
        KvClient::new(self.channel().await)
    }

    async fn channel(&self) -> Channel {
        let endpoint = Channel::from_shared(self.endpoint()).expect("a good endpoint");
        let endpoint = endpoint.connect_timeout(Duration::from_secs(5));
        endpoint.connect().await.expect("etcd accepts a connection")
    }

    async fn record(&self, key: &str) -> Option<pb::KeyValue> {
        let request = pb::RangeRequest {
            key: Bytes::copy_from_slice(key.as_bytes()),
            ..Default::default()
        };
        let answer = self.kv().await.range(request).await.expect("etcd answers");
        answer.into_inner().kvs.into_iter().next()
    }

    async fn answers(&self) -> bool {
        if self.process.is_none() {
            return false;
        }
        let Ok(endpoint) = Channel::from_shared(self.endpoint()) else {
            return false;
        };
        let endpoint = endpoint.timeout(Duration::from_secs(2));
        let Ok(channel) = endpoint.connect().await else {
            return false;
        };
        let request = pb::RangeRequest {
            key: Bytes::from_static(b"none"),
            ..Default::default()
        };
        KvClient::new(channel).range(request).await.is_ok()
    }

    fn spawn(&mut self) {
        fs::create_dir_all(&self.folder).expect("a folder for etcd");
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.folder.join("log"))
            .expect("a log for etcd");
        let program = std::env::var("SWITCHBOARD_ETCD").unwrap_or_else(|_| "etcd".to_owned());
        let client = self.endpoint();
        let peer = format!("http://127.0.0.1:{}", self.peer_port);
        let process = Command::new(&program)
            // Leases of a second need elections in less.
            .args(["--heartbeat-interval", "50", "--election-timeout", "500"])
            .arg("--data-dir")
            .arg(self.folder.join("data"))
            .args(["--name", "one", "--initial-cluster", &format!("one={peer}")])
            .args([
                "--listen-client-urls",
                &client,
                "--advertise-client-urls",
                &client,
            ])
            .args([
                "--listen-peer-urls",
                &peer,
                "--initial-advertise-peer-urls",
                &peer,
            ])
            .args(["--log-level", "warn"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn();
        self.process = Some(process.unwrap_or_else(|error| {
            panic!("cannot start {program}: {error}; run ./tests/run, which gets etcd, or set SWITCHBOARD_ETCD to its path")
        }));
    }

    fn signal(&self, signal: &str) {
        let process = self.process.as_ref().expect("etcd is running");
        let kill = Command::new("kill")
            .args([&format!("-{signal}"), &process.id().to_string()])
            .status();
        assert!(
            kill.is_ok_and(|status| status.success()),
            "cannot send SIG{signal} to etcd"
        );
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
        if !std::thread::panicking() {
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("it has an address").port()
}

/// A watch that nothing is made of.
pub struct PlainWatch {
    answers: tonic::Streaming<pb::WatchResponse>,
}

impl PlainWatch {
    /// The keys of the next events.
    pub async fn next(&mut self) -> Vec<String> {
        let answer = self.answers.message().await.expect("the watch lives");
        let events = answer.expect("the watch has no end").events;
        let keys = events.into_iter().filter_map(|event| event.kv);
        keys.map(|kv| String::from_utf8_lossy(&kv.key).into_owned())
            .collect()
    }
}
