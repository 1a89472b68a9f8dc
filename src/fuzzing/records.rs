//! What stands in a registry.

use std::panic::RefUnwindSafe;

use serde_json::Value;

use super::{Input, is_short_line};
use crate::{
    Session,
    registry::{
        BadRecord, Codec, Milvus, Naming, codec,
        session::{check_prefix, check_role},
    },
};

/// A record of grpc-go's naming; as [`milvus`].
pub fn naming(data: &[u8]) {
    let read = record(&Naming, data, "Addr");
    let Some((_, session, written)) = read else {
        return;
    };
    let is_others_key = session.id() == "active" && !session.is_exclusive();
    assert_eq!(written.is_none(), is_others_key);
}

/// A record that is read is a session that can work, written again it reads as the same; one that is not says why, in a
/// line.
///
/// The root, the role, the key, which after a `+` is under the role's prefix, and the value.
pub fn milvus(data: &[u8]) {
    let Some((key, session, written)) = record(&Milvus::new(), data, "Address") else {
        return;
    };
    match written {
        Some(written) => assert_eq!(written, key),
        None => assert!(!session.version().is_empty()),
    }
    assert!(session.id().parse::<i64>().is_ok_and(|id| id >= 0));
    assert_eq!(session.weight(), 1);
}

/// The key that was read, the session, and the key that it is written under if it can be.
fn record(
    codec: &dyn Codec,
    data: &[u8],
    address: &str,
) -> Option<(String, Session, Option<String>)> {
    let mut input = Input(data);
    let (root, role) = names(&mut input);
    let key = input.line();
    let key = match key.strip_prefix('+') {
        Some(rest) => codec.prefix(&root, &role) + rest,
        None => key.into_owned(),
    };
    let value = input.0;
    // Not by `codec::decode`, which would catch a panic.
    let session = match codec.decode(&root, &role, &key, value) {
        Ok(session) => session?,
        Err(bad) => {
            is_short_line(&bad.to_string());
            return None;
        }
    };
    assert!(key.starts_with(&codec.prefix(&root, &role)));
    assert_ne!(key, codec.counter(&root));
    assert_eq!(session.role(), role);
    session.validate().expect("what is read can work");
    // Some JSON is none to serde_json's own value: a number that is too large for it.
    if let Ok(whole) = serde_json::from_slice::<Value>(value) {
        assert_eq!(whole[address].as_str(), Some(session.address()));
    }
    assert!(codec.call_metadata(&session).len() <= 1);
    let written = comes_back(codec, &root, &session, 7);
    Some((key, session, written))
}

/// Valid ones, whatever is there.
fn names(input: &mut Input<'_>) -> (String, String) {
    let (root, role) = (input.line(), input.line());
    let root = match root.is_empty() || check_prefix(&root).is_ok() {
        true => root.into_owned(),
        false => "demo".to_owned(),
    };
    let role = match check_role(&role) {
        Ok(()) => role.into_owned(),
        Err(_) => "echo".to_owned(),
    };
    (root, role)
}

/// Its key, if the codec can hold it.
fn comes_back(codec: &dyn Codec, root: &str, session: &Session, lease: i64) -> Option<String> {
    let value = codec.encode(session, lease).ok()?;
    assert!(codec::encode(codec, session, lease).is_ok() || value.len() > BadRecord::LONGEST);
    let key = codec.key(root, session);
    assert!(key.starts_with(&codec.prefix(root, session.role())));
    assert_ne!(key, codec.counter(root));
    let read = codec.decode(root, session.role(), &key, &value);
    match read {
        Ok(read) => assert_eq!(read.as_ref(), Some(session)),
        Err(bad) => assert!(value.len() > BadRecord::LONGEST, "{bad}"),
    }
    // What begins like its key may be a role's, too.
    let (at, entry) = (
        session.role(),
        format!("{}-{}", session.role(), session.id()),
    );
    for (end, _) in entry.char_indices().chain([(entry.len(), ' ')]) {
        let other = &entry[..end];
        if other != at && check_role(other).is_ok() {
            let read = codec.decode(root, other, &key, &value);
            assert!(
                !matches!(read, Ok(Some(_))),
                "{other} reads {key}: {read:?}"
            );
        }
    }
    Some(key)
}

/// Whatever session is written reads as the same, and for nobody else.
///
/// The root, the role, the id, the address, the version, its flags and weight, the lease, and metadata.
pub fn session(data: &[u8]) {
    let mut input = Input(data);
    let (root, role) = names(&mut input);
    let (id, address, version) = (input.line(), input.line(), input.line());
    let flags = input.line();
    let weight = flags
        .trim_start_matches(|c: char| !c.is_ascii_digit())
        .parse();
    let lease = input.line().parse().unwrap_or(i64::MAX);
    let mut session = Session::new(role, address.into_owned());
    if !id.is_empty() {
        session = session.with_id(id.into_owned());
    }
    session = session
        .with_version(version.into_owned())
        .with_exclusive(flags.contains('x'))
        .with_stopping(flags.contains('s'))
        .with_weight(weight.unwrap_or(1));
    while !input.0.is_empty() {
        let line = input.line();
        let (key, value) = line.split_once('=').unwrap_or((&line, ""));
        session = session.with_metadata(key, value);
    }
    let is_valid = session.validate().is_ok();
    let codecs: [(&(dyn Codec + RefUnwindSafe), _); 2] =
        [(&Naming, ""), (&Milvus::new(), "LeaseID")];
    for (codec, says) in codecs {
        match codec.encode(&session, lease) {
            Ok(value) => {
                let value: Value = serde_json::from_slice(&value).expect("it is JSON");
                assert!(says.is_empty() || value[says].as_i64() == Some(lease));
            }
            Err(error) => assert_eq!(error.kind(), crate::Kind::Invalid),
        }
        if is_valid {
            comes_back(codec, &root, &session, lease);
        }
    }
}

/// A range of keys has all with its prefix and no others, and what etcd sends is taken as it is.
///
/// A prefix, counted, and a key, which as a whole is a message of etcd's, too.
#[cfg(feature = "etcd")]
pub fn etcd(data: &[u8]) {
    use bytes::Bytes;
    use prost::Message as _;

    use crate::registry::{
        inside::{LARGEST_PAGE, end_of, event, next_limit, pb},
        store::{Event, Scope},
    };

    let mut input = Input(data);
    let prefix = Bytes::copy_from_slice(input.counted());
    let end = end_of(&Scope::Prefix(prefix.clone()));
    let key = input.0;
    let below = [&*prefix, key].concat();
    for key in [key, &below, &end] {
        let is_in = *prefix <= *key && (*end == *b"\0" || *key < *end);
        // The range of all begins with the first key, which is not empty.
        assert_eq!(is_in, key.starts_with(&prefix), "{key:?}");
    }
    assert!(end_of(&Scope::Key(prefix)).is_empty());

    let positive = |n: i64| n.max(0) as u64;
    if let Ok(message) = pb::WatchResponse::decode(key) {
        for said in message.events {
            let (kv, deleted) = (said.kv.clone(), said.r#type == 1);
            match (event(said), kv) {
                (None, None) => {}
                (Some(Event::Delete(key)), Some(kv)) => assert!(deleted && key == kv.key),
                (Some(Event::Put(record)), Some(kv)) => {
                    assert!(!deleted && record.key == kv.key && record.size == kv.value.len());
                    assert!(record.value == kv.value || record.value.is_empty());
                    assert_eq!(record.created, positive(kv.create_revision));
                    assert_eq!(record.modified, positive(kv.mod_revision));
                }
                (event, kv) => panic!("{kv:?} is taken for {event:?}"),
            }
        }
    }
    if let Ok(message) = pb::RangeResponse::decode(key) {
        assert!((1..=LARGEST_PAGE).contains(&next_limit(&message.kvs)));
    }
}
