//! What holds for every codec, whatever it is given.

use proptest::{
    collection::{btree_map, vec},
    prelude::*,
    test_runner::{TestCaseError, TestCaseResult},
};
use serde_json::Value;

use super::*;

const ROOTS: [&str; 3] = ["", "demo", "by-dev/meta"];

fn codecs() -> [Box<dyn Codec>; 2] {
    [Box::new(Naming), Box::new(Milvus::new())]
}

fn root() -> impl Strategy<Value = &'static str> {
    proptest::sample::select(&ROOTS[..])
}

fn address() -> impl Strategy<Value = String> {
    let host = prop_oneof![
        any::<std::net::Ipv4Addr>().prop_map(|ip| ip.to_string()),
        any::<std::net::Ipv6Addr>().prop_map(|ip| format!("[{ip}]")),
        "[a-z][a-z0-9]{0,8}(\\.[a-z][a-z0-9]{0,8}){0,2}",
    ];
    (host, 1..=u16::MAX).prop_map(|(host, port)| format!("{host}:{port}"))
}

/// A session that any registry takes.
fn session() -> impl Strategy<Value = Session> {
    let labels = btree_map(".{0,12}", ".{0,12}", 0..4);
    let flags = (any::<bool>(), any::<bool>(), 1..=u32::MAX);
    let names = ("[A-Za-z0-9._-]{1,16}", "[^/\\p{Cc}]{1,16}");
    (names, address(), ".{0,16}", labels, flags)
        .prop_map(
            |((role, id), address, version, labels, (exclusive, stopping, weight))| {
                let session = Session::new(role, address)
                    .with_id(id)
                    .with_version(version)
                    .with_exclusive(exclusive)
                    .with_stopping(stopping)
                    .with_weight(weight);
                labels
                    .into_iter()
                    .fold(session, |session, (k, v)| session.with_metadata(k, v))
            },
        )
        .prop_filter("it is valid", |session| session.validate().is_ok())
}

/// The same as one that Milvus can have.
fn of_milvus(session: &Session, id: i64, version: (u16, u16, u16)) -> Session {
    let (major, minor, patch) = version;
    let session = session
        .clone()
        .with_id(id)
        .with_weight(1)
        .with_version(match patch {
            0 => String::new(),
            patch => format!("{major}.{minor}.{patch}"),
        });
    match session.role() {
        "id" => Session::new("ids", session.address()).with_id(id),
        _ => session,
    }
}

fn comes_back(codec: &dyn Codec, root: &str, session: Session, lease: i64) -> TestCaseResult {
    let (key, prefix) = (
        codec.key(root, &session),
        codec.prefix(root, session.role()),
    );
    prop_assert!(key.starts_with(&prefix), "{} is not under {}", key, prefix);
    let value = codec
        .encode(&session, lease)
        .map_err(|e| TestCaseError::fail(e.to_string()))?;
    let read = codec
        .decode(root, session.role(), &key, &value)
        .map_err(|e| TestCaseError::fail(e.to_string()))?;
    prop_assert_eq!(read, Some(session));
    Ok(())
}

/// Nothing panics over it, and what comes out can work.
fn only_what_is_valid(codec: &dyn Codec, root: &str, role: &str, key: &str, value: &[u8]) {
    if let Ok(Some(session)) = codec.decode(root, role, key, value) {
        assert_eq!(session.role(), role);
        session.validate().expect("what is decoded is valid");
        codec.call_metadata(&session);
    }
}

fn json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        address().prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            btree_map(".{0,8}", inner, 0..4).prop_map(|map| map.into_iter().collect::<Value>()),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_session_comes_back_as_it_was_written(
        root in root(),
        session in session(),
        id in 0..=i64::MAX,
        version in any::<(u16, u16, u16)>(),
        lease in any::<i64>(),
    ) {
        comes_back(&Naming, root, session.clone(), lease)?;
        comes_back(&Milvus::new(), root, of_milvus(&session, id, version), lease)?;
    }

    #[test]
    fn arbitrary_keys_and_values_never_panic(
        root in root(),
        role in "[A-Za-z0-9._-]{1,8}",
        rest in prop_oneof![".{0,16}", "-[0-9]{0,20}"],
        key in ".{0,32}",
        value in vec(any::<u8>(), 0..64),
    ) {
        for codec in codecs() {
            let near = codec.prefix(root, &role) + &rest;
            for key in [&key, &near] {
                only_what_is_valid(&*codec, root, &role, key, &value);
            }
        }
    }

    #[test]
    fn values_with_wrong_bytes_yield_only_valid_sessions(
        session in session(),
        id in 0..=i64::MAX,
        edits in vec((any::<proptest::sample::Index>(), 0..3u8, any::<u8>()), 1..6),
    ) {
        let session = of_milvus(&session, id, (1, 2, 3));
        for codec in codecs() {
            let (key, role) = (codec.key("demo", &session), session.role());
            let mut value = codec.encode(&session, 7).expect("it can be written");
            for (at, what, byte) in &edits {
                if value.is_empty() {
                    break;
                }
                let at = at.index(value.len());
                match what {
                    0 => value[at] = *byte,
                    1 => value.insert(at, *byte),
                    _ => drop(value.remove(at)),
                }
                only_what_is_valid(&*codec, "demo", role, &key, &value);
            }
        }
    }

    #[test]
    fn fields_with_wrong_values_yield_only_valid_sessions(
        session in session(),
        id in 0..=i64::MAX,
        exclusive in any::<bool>(),
        which in any::<proptest::sample::Index>(),
        deep in any::<bool>(),
        wrong in json(),
    ) {
        let session = of_milvus(&session, id, (1, 2, 3)).with_exclusive(exclusive);
        for codec in codecs() {
            let (key, role) = (codec.key("demo", &session), session.role());
            let value = codec.encode(&session, 7).expect("it can be written");
            let mut record: Value = serde_json::from_slice(&value).expect("it is JSON");
            let fields = match (deep, record.get("Metadata").is_some()) {
                (true, true) => record["Metadata"].as_object_mut(),
                _ => record.as_object_mut(),
            };
            let fields = fields.expect("they are objects");
            let name = fields.keys().nth(which.index(fields.len())).cloned();
            fields.insert(name.expect("it has one"), wrong.clone());
            only_what_is_valid(&*codec, "demo", role, &key, record.to_string().as_bytes());
        }
    }
}
