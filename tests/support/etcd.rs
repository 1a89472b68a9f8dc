//! An etcd of one's own: processes on free ports, with their data in temporary folders. One alone, or three that
//! make a cluster.

use std::{
    fs,
    net::TcpListener,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    process,
};
use tonic::{
    Code, Request, Status,
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

/// Nor is this: who leads.
#[derive(Clone, Copy, prost::Message)]
struct StatusRequest {}

#[derive(Clone, Copy, prost::Message)]
struct StatusResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<Answerer>,
    #[prost(uint64, tag = "4")]
    leader: u64,
}

#[derive(Clone, Copy, prost::Message)]
struct Answerer {
    #[prost(uint64, tag = "2")]
    member_id: u64,
}

/// An etcd process. Dropping it ends the process and removes its data.
#[derive(Debug)]
pub struct Etcd {
    folder: PathBuf,
    name: String,
    client_port: u16,
    peer_port: u16,
    /// All members, as `--initial-cluster` has them.
    cluster: String,
    options: Vec<String>,
    process: Option<Child>,
}

/// Three etcds that are one.
#[derive(Debug)]
pub struct Cluster {
    pub members: Vec<Etcd>,
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
        let folder = format!("switchboard-etcd-{}-{number}", std::process::id());
        let mut etcd = Self {
            folder: std::env::temp_dir().join(folder),
            name: format!("member-{number}"),
            client_port: free_port(),
            peer_port: free_port(),
            cluster: String::new(),
            options: Vec::new(),
            process: None,
        };
        etcd.cluster = etcd.as_a_member();
        etcd
    }

    /// The same with these more of etcd's options, from its next start on.
    pub fn with_options(mut self, options: &[&str]) -> Self {
        self.options = options.iter().map(|&option| option.to_owned()).collect();
        self
    }

    /// Whether this version of etcd has such an option.
    pub async fn knows_option(&self, option: &str) -> bool {
        let ran = process::Command::new(program())
            .arg("--help")
            .output()
            .await;
        let ran = ran.expect("etcd runs");
        let help = [ran.stdout, ran.stderr].concat();
        String::from_utf8_lossy(&help).contains(option)
    }

    fn as_a_member(&self) -> String {
        format!("{}={}", self.name, self.peer_endpoint())
    }

    fn peer_endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.peer_port)
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
            self.start_unattended();
            assert!(
                Instant::now() < deadline,
                "etcd does not answer at {}; its log is {}",
                self.endpoint(),
                self.folder.join("log").display()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Starts it with TLS for its clients, each of whom has to have a certificate of this authority; its own is one of
    /// that, too. Nothing here asks it anything then, for that is in plaintext.
    pub fn start_with_tls(&mut self, authority: &str, certificate: &str, key: &str) -> String {
        fs::create_dir_all(&self.folder).expect("a folder for etcd");
        let file = |name: &str, pem: &str| {
            let path = self.folder.join(name);
            fs::write(&path, pem).expect("a file for etcd");
            path.to_str().expect("UTF-8").to_owned()
        };
        let endpoint = self.endpoint().replace("http://", "https://");
        self.options = [
            ("--listen-client-urls", endpoint.clone()),
            ("--advertise-client-urls", endpoint.clone()),
            ("--trusted-ca-file", file("ca.pem", authority)),
            ("--cert-file", file("cert.pem", certificate)),
            ("--key-file", file("key.pem", key)),
        ]
        .into_iter()
        .flat_map(|(name, value)| [name.to_owned(), value])
        .chain(["--client-cert-auth".to_owned()])
        .collect();
        self.start_unattended();
        endpoint
    }

    /// Kills it, as a machine does that loses power.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// Kills it, and removes all that it knew; started again on its ports it is empty.
    pub fn lose_data(&mut self) {
        self.kill();
        let _ = fs::remove_dir_all(self.folder.join("data"));
    }

    /// Saves what it knows, to be restored.
    pub async fn save(&self) {
        let backup = self.folder.join("backup");
        let backup = backup.to_str().expect("UTF-8");
        self.etcdctl(&["snapshot", "save", backup]).await;
    }

    /// Kills it, and gives it what it knew when it was saved; started again it is at that revision.
    pub async fn lose_what_came_since(&mut self) {
        self.lose_data();
        let (backup, data) = (self.folder.join("backup"), self.folder.join("data"));
        let (backup, data) = (backup.to_str(), data.to_str());
        self.etcdctl(&[
            "snapshot",
            "restore",
            backup.expect("UTF-8"),
            "--data-dir",
            data.expect("UTF-8"),
            "--name",
            &self.name,
            "--initial-cluster",
            &self.cluster,
            "--initial-advertise-peer-urls",
            &self.peer_endpoint(),
        ])
        .await;
    }

    /// How many records there are under a prefix.
    pub async fn count(&self, prefix: &str) -> usize {
        let args = ["get", "--prefix", prefix, "--keys-only"];
        let keys = self.etcdctl(&args).await;
        keys.lines().filter(|line| !line.is_empty()).count()
    }

    /// Starts it if it is not running, and does not wait: a member may have nobody yet to agree with.
    pub fn start_unattended(&mut self) {
        if !self.is_running() {
            self.spawn();
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
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match self.kv().await.put(request.clone()).await {
                Ok(_) => return,
                // A member that has just come back may not be ready.
                Err(status) if status.code() == Code::Unavailable && Instant::now() < deadline => {}
                Err(status) => panic!("etcd takes no record: {status}"),
            }
        }
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

    /// Runs the etcdctl that stands beside the etcd, with this one as its endpoint; what it says, without the
    /// last line's end.
    pub async fn etcdctl(&self, args: &[&str]) -> String {
        let said = etcdctl(&self.endpoint(), args).await;
        said.unwrap_or_else(|error| panic!("etcdctl {args:?}: {error}"))
    }

    /// The same; what it complains of is no panic.
    pub async fn try_etcdctl(&self, args: &[&str]) -> Result<String, String> {
        etcdctl(&self.endpoint(), args).await
    }

    /// One of etcd's own metrics, such as how many watches it has (`etcd_debugging_mvcc_watcher_total`).
    pub async fn metric(&self, name: &str) -> u64 {
        let mut stream = TcpStream::connect(self.address())
            .await
            .expect("etcd accepts a connection");
        let request = format!("GET /metrics HTTP/1.0\r\nHost: {}\r\n\r\n", self.address());
        stream
            .write_all(request.as_bytes())
            .await
            .expect("a socket");
        let mut text = String::new();
        stream.read_to_string(&mut text).await.expect("an answer");
        let value = text.lines().find_map(|line| {
            let (key, value) = line.split_once(' ')?;
            (key == name).then(|| value.parse::<f64>().ok())?
        });
        value.unwrap_or_else(|| panic!("etcd has no metric {name}")) as u64
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
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            match self.try_compact().await {
                Ok(revision) => return revision,
                // It is choosing who leads.
                Err(status) => {
                    assert!(Instant::now() < deadline, "etcd does not compact: {status}")
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn try_compact(&self) -> Result<i64, Status> {
        let unavailable = |error: tonic::transport::Error| Status::unavailable(error.to_string());
        let channel = self.channel_or_error().await.map_err(unavailable)?;
        let request = pb::RangeRequest {
            key: Bytes::from_static(b"none"),
            ..Default::default()
        };
        let answer = KvClient::new(channel.clone()).range(request).await?;
        let header = answer.into_inner().header.expect("it has a header");
        let mut client = tonic::client::Grpc::new(channel);
        client.ready().await.map_err(unavailable)?;
        let request = CompactionRequest {
            revision: header.revision,
            physical: true,
        };
        let path = PathAndQuery::from_static("/etcdserverpb.KV/Compact");
        let codec = tonic_prost::ProstCodec::<CompactionRequest, pb::PutResponse>::default();
        match client.unary(Request::new(request), path, codec).await {
            // That was compacted already: nothing has happened since.
            Err(status) if status.code() == Code::OutOfRange => Ok(header.revision),
            answer => answer.map(|_| header.revision),
        }
    }

    /// Whether it leads its cluster; false if it does not say.
    pub async fn leads(&self) -> bool {
        let asked = async {
            let channel = self.channel_or_error().await.ok()?;
            let mut client = tonic::client::Grpc::new(channel);
            client.ready().await.ok()?;
            let path = PathAndQuery::from_static("/etcdserverpb.Maintenance/Status");
            let codec = tonic_prost::ProstCodec::<StatusRequest, StatusResponse>::default();
            let answer = client.unary(Request::new(StatusRequest {}), path, codec);
            Some(answer.await.ok()?.into_inner())
        };
        let answer = tokio::time::timeout(Duration::from_millis(500), asked).await;
        let Ok(Some(StatusResponse { header, leader })) = answer else {
            return false;
        };
        header.is_some_and(|header| header.member_id == leader)
    }

    /// Ends the lease of a record, as etcd does when nobody keeps it alive.
    pub async fn expire(&self, key: &str) {
        let id = self.record(key).await.expect("the record is there").lease;
        let mut leases = LeaseClient::new(self.channel().await);
        let revoked = leases.lease_revoke(pb::LeaseRevokeRequest { id }).await;
        revoked.expect("the record has a lease");
    }

    /// The same, if it is there and has one.
    pub async fn expire_if_there(&self, key: &str) {
        if let Some(pb::KeyValue { lease: id, .. }) = self.record(key).await {
            let mut leases = LeaseClient::new(self.channel().await);
            // It may have been over by itself meanwhile.
            let _ = leases.lease_revoke(pb::LeaseRevokeRequest { id }).await;
        }
    }

    /// The lease of a record, as etcdctl writes it: in hexadecimal digits; empty if there is no record.
    pub async fn lease(&self, key: &str) -> String {
        let record = self.record(key).await;
        record.map_or_else(String::new, |record| format!("{:x}", record.lease))
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
        let channel = self.channel_or_error().await;
        channel.expect("etcd accepts a connection")
    }

    async fn channel_or_error(&self) -> Result<Channel, tonic::transport::Error> {
        let endpoint = Channel::from_shared(self.endpoint()).expect("a good endpoint");
        let endpoint = endpoint.connect_timeout(Duration::from_secs(5));
        endpoint.timeout(Duration::from_secs(10)).connect().await
    }

    async fn record(&self, key: &str) -> Option<pb::KeyValue> {
        let request = pb::RangeRequest {
            key: Bytes::copy_from_slice(key.as_bytes()),
            ..Default::default()
        };
        let answer = self.kv().await.range(request).await.expect("etcd answers");
        answer.into_inner().kvs.into_iter().next()
    }

    fn is_running(&mut self) -> bool {
        matches!(self.process.as_mut().map(Child::try_wait), Some(Ok(None)))
    }

    /// Whether it answers, and so has a leader.
    async fn answers(&self) -> bool {
        if self.process.is_none() {
            return false;
        }
        let asked = async {
            let channel = self.channel_or_error().await.ok()?;
            let request = pb::RangeRequest {
                key: Bytes::from_static(b"none"),
                ..Default::default()
            };
            Some(KvClient::new(channel).range(request).await)
        };
        match tokio::time::timeout(Duration::from_secs(2), asked).await {
            Ok(Some(answer)) => answer.is_ok() || answer.is_err_and(|status| asks_who(&status)),
            Ok(None) | Err(_) => false,
        }
    }

    fn spawn(&mut self) {
        fs::create_dir_all(&self.folder).expect("a folder for etcd");
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.folder.join("log"))
            .expect("a log for etcd");
        let program = program();
        let client = self.endpoint();
        let peer = self.peer_endpoint();
        let process = Command::new(&program)
            // Leases of a second need elections in less.
            .args(["--heartbeat-interval", "50", "--election-timeout", "500"])
            .arg("--data-dir")
            .arg(self.folder.join("data"))
            .args(["--name", &self.name, "--initial-cluster", &self.cluster])
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
            .args(&self.options)
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

// === impl Cluster ===

impl Cluster {
    /// Starts three members and waits until each answers.
    pub async fn start() -> Self {
        let mut members: Vec<_> = (0..3).map(|_| Etcd::stopped()).collect();
        let all: Vec<_> = members.iter().map(Etcd::as_a_member).collect();
        for member in &mut members {
            member.cluster = all.join(",");
        }
        let mut cluster = Self { members };
        cluster.restart().await;
        cluster
    }

    /// Starts those that are not running, and waits until each answers.
    pub async fn restart(&mut self) {
        // All of them first: one alone has nobody to agree with.
        for member in &mut self.members {
            member.start_unattended();
        }
        for member in &mut self.members {
            member.restart().await;
        }
    }

    /// Kills all, and removes all that they knew.
    pub fn lose_data(&mut self) {
        for member in &mut self.members {
            member.lose_data();
        }
    }

    /// `http://host:port` of each.
    pub fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(Etcd::endpoint).collect()
    }

    /// The number of the member that leads, once one does.
    pub async fn leader(&self) -> usize {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            for (n, member) in self.members.iter().enumerate() {
                if member.leads().await {
                    return n;
                }
            }
            assert!(Instant::now() < deadline, "no member leads");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The number of a member that does not lead.
    pub async fn follower(&self) -> usize {
        (self.leader().await + 1) % self.members.len()
    }
}

/// Whether there is an etcd to start; if not, what to do.
pub fn is_here() -> Result<(), String> {
    let program = program();
    let ran = Command::new(&program)
        .arg("--version")
        .stdin(Stdio::null())
        .output();
    match ran {
        Ok(_) => Ok(()),
        Err(error) => Err(format!(
            "cannot start {program}: {error}; run ./tests/run, which gets etcd, or set SWITCHBOARD_ETCD to its path"
        )),
    }
}

fn program() -> String {
    std::env::var("SWITCHBOARD_ETCD").unwrap_or_else(|_| "etcd".to_owned())
}

async fn etcdctl(endpoint: &str, args: &[&str]) -> Result<String, String> {
    let program = PathBuf::from(program()).with_file_name("etcdctl");
    let ran = process::Command::new(&program)
        .env("ETCDCTL_API", "3")
        .args(["--endpoints", endpoint])
        .args(args)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|error| format!("cannot run {}: {error}", program.display()))?;
    if !ran.status.success() {
        return Err(String::from_utf8_lossy(&ran.stderr).into_owned());
    }
    let mut said = String::from_utf8_lossy(&ran.stdout).into_owned();
    if said.ends_with('\n') {
        said.pop();
    }
    Ok(said)
}

/// It is well, and would like to know who asks.
fn asks_who(status: &Status) -> bool {
    status.code() == Code::InvalidArgument && status.message().contains("user name is empty")
}

/// A port that was free a moment ago, and stays so: it is below those that the system gives to outgoing connections,
/// of which one could have it while its server is away.
pub fn free_port() -> u16 {
    loop {
        let port = fastrand::u16(10_000..32_000);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
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
