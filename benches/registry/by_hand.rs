//! What one would write without this crate, as plainly as it can be: no leases, no recovery, no staleness.

use std::collections::HashMap;

use serde::Deserialize;
use tonic::transport::{Channel, Endpoint};

use super::{
    etcd::Etcd,
    pb::{self, watch_client::WatchClient, watch_request::RequestUnion},
};

/// What grpc-go writes.
#[derive(Debug, Deserialize)]
pub(crate) struct Record {
    #[serde(rename = "Addr")]
    pub(crate) address: String,
    #[serde(rename = "Metadata")]
    #[allow(dead_code, reason = "kept, as somebody would who reads it")]
    metadata: serde_json::Value,
}

/// All sessions under a prefix, by key.
pub(crate) async fn list(etcd: &Etcd, prefix: &str) -> HashMap<String, Record> {
    let request = pb::RangeRequest {
        key: prefix.as_bytes().to_vec().into(),
        range_end: end_of(prefix),
        ..Default::default()
    };
    let mut kv = etcd.kv().await.max_decoding_message_size(usize::MAX);
    let answer = kv.range(request).await.expect("etcd answers").into_inner();
    let records = answer.kvs.iter().map(|kv| {
        let key = String::from_utf8_lossy(&kv.key).into_owned();
        (key, serde_json::from_slice(&kv.value).expect("it is JSON"))
    });
    records.collect()
}

/// The PUTs under a prefix from now on.
pub(crate) async fn watch(etcd: &Etcd, prefix: &str) -> tonic::Streaming<pb::WatchResponse> {
    let create = pb::WatchRequest {
        request_union: Some(RequestUnion::CreateRequest(pb::WatchCreateRequest {
            key: prefix.as_bytes().to_vec().into(),
            range_end: end_of(prefix),
            ..Default::default()
        })),
    };
    let requests = tokio_stream::StreamExt::chain(
        tokio_stream::once(create),
        tokio_stream::pending::<pb::WatchRequest>(),
    );
    let mut watches = WatchClient::new(connect(&etcd.address()).await);
    let mut watch = watches
        .watch(requests)
        .await
        .expect("etcd takes a watch")
        .into_inner();
    let created = watch
        .message()
        .await
        .expect("it lives")
        .expect("it goes on");
    assert!(created.created, "the first answer is that it is created");
    watch
}

pub(crate) async fn connect(address: &str) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("an address");
    let endpoint = endpoint.tcp_nodelay(true);
    endpoint.connect().await.expect("somebody listens there")
}

fn end_of(prefix: &str) -> tonic::codegen::Bytes {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end.into()
}
