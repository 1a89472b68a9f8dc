//! The naming format of etcd.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{BadRecord, Codec, object, rest};
use crate::{error::Error, registry::Session};

/// The naming format of etcd, as grpc-go's etcd resolver reads and writes it.
///
/// The key is `<root>/<role>/<id>`, or `<root>/<role>/active` for an exclusive session; the value a JSON object:
///
/// ```json
/// {"Op":0,"Addr":"10.0.0.5:21123","Metadata":{"id":"7","version":"2.6.0","weight":1,"metadata":{"zone":"a"}}}
/// ```
///
/// Of a record that another program wrote, whatever its `Metadata` is, the id is the rest of the key, unless
/// the metadata is an object with an `id`, a string or an integer. Fields that are unknown, or of another
/// type than ours, are skipped.
///
/// What is written has any id but `active`, whose key is that of exclusive sessions; what is read may have it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Naming;

/// What stands in the place of the id in the key that the exclusive sessions of a role compete for.
const ACTIVE: &str = "active";
// === impl Naming ===

impl Codec for Naming {
    fn prefix(&self, root: &str, role: &str) -> String {
        // With the slash: `foo` does not see `foo_other`.
        match root {
            "" => format!("{role}/"),
            root => format!("{root}/{role}/"),
        }
    }

    fn key(&self, root: &str, session: &Session) -> String {
        let name = match session.is_exclusive() {
            true => ACTIVE,
            false => session.id(),
        };
        self.prefix(root, session.role()) + name
    }

    fn encode(&self, session: &Session, _lease: i64) -> Result<Vec<u8>, Error> {
        if session.id() == ACTIVE && !session.is_exclusive() {
            let why =
                "\"active\" cannot be one: its key is that of the exclusive sessions of its role";
            return Err(Error::invalid("id", why));
        }
        let record = Written {
            op: 0,
            addr: session.address(),
            metadata: Extra {
                id: session.id(),
                version: session.version(),
                weight: session.weight(),
                exclusive: session.is_exclusive(),
                stopping: session.is_stopping(),
                metadata: session.metadata(),
            },
        };
        serde_json::to_vec(&record).map_err(|e| Error::invalid("session", e))
    }

    fn decode(
        &self,
        root: &str,
        role: &str,
        key: &str,
        value: &[u8],
    ) -> Result<Option<Session>, BadRecord> {
        let prefix = self.prefix(root, role);
        let rest = match rest(&prefix, key)? {
            "" => return Err(BadRecord::Key("it ends with the prefix".into())),
            rest if rest.contains('/') => {
                return Err(BadRecord::Key("it goes on with a slash".into()));
            }
            rest => rest,
        };
        let record: Read = object(value)?;
        match record.op {
            0 => {}
            1 => return Err(BadRecord::Deleted),
            op => return Err(BadRecord::Unparsable(format!("unknown Op {op}").into())),
        }
        if record.addr.is_empty() {
            return Err(BadRecord::NoAddress);
        }
        let session = Session::new(role, record.addr).with_id(rest);
        let session = match record.metadata {
            Value::Object(extra) => with_extra(session, extra),
            // Another program's, which is none of our business.
            _ => session,
        };
        session.validate().map_err(BadRecord::Invalid)?;
        Ok(Some(session))
    }
}

fn with_extra(mut session: Session, extra: serde_json::Map<String, Value>) -> Session {
    for (name, value) in extra {
        session = match (name.as_str(), value) {
            ("id", Value::String(id)) => session.with_id(id),
            ("id", Value::Number(id)) if id.is_i64() || id.is_u64() => {
                session.with_id(id.to_string())
            }
            ("version", Value::String(version)) => session.with_version(version),
            ("weight", Value::Number(weight)) => match weight.as_u64().map(u32::try_from) {
                Some(Ok(weight @ 1..)) => session.with_weight(weight),
                _ => session,
            },
            ("exclusive", Value::Bool(exclusive)) => session.with_exclusive(exclusive),
            ("stopping", Value::Bool(stopping)) => session.with_stopping(stopping),
            ("metadata", Value::Object(entries)) => {
                entries
                    .into_iter()
                    .fold(session, |session, (key, value)| match value {
                        Value::String(value) => session.with_metadata(key, value),
                        _ => session,
                    })
            }
            _ => session,
        };
    }
    session
}

#[derive(Serialize)]
struct Written<'a> {
    #[serde(rename = "Op")]
    op: u8,
    #[serde(rename = "Addr")]
    addr: &'a str,
    #[serde(rename = "Metadata")]
    metadata: Extra<'a>,
}

#[derive(Serialize)]
struct Extra<'a> {
    id: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    version: &'a str,
    weight: u32,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    exclusive: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    stopping: bool,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    metadata: &'a BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Read {
    // Go writes zero values or leaves them out, as the writer likes.
    #[serde(rename = "Op", default)]
    op: i64,
    #[serde(rename = "Addr", default)]
    addr: String,
    #[serde(rename = "Metadata", default)]
    metadata: Value,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(key: &str, value: &str) -> Result<Session, BadRecord> {
        Naming
            .decode("demo", "echo", key, value.as_bytes())
            .map(|session| session.expect("all under its prefix is the role's"))
    }

    #[test]
    fn a_session_comes_back_as_it_was_written() {
        let plain = Session::new("echo", "h:1");
        let full = Session::new("echo", "[::1]:80")
            .with_id(7)
            .with_version("2.6.0")
            .with_metadata("zone", "a \"b\" ü")
            .with_weight(u32::MAX)
            .with_stopping(true);
        for session in [plain, full] {
            let key = Naming.key("demo", &session);
            let value = Naming.encode(&session, 0).expect("it can be written");
            let back = Naming
                .decode("demo", "echo", &key, &value)
                .expect("it can be read");
            assert_eq!(back, Some(session));
        }
    }

    #[test]
    fn nobody_takes_the_key_of_the_exclusive_by_its_id() {
        let active = Session::new("echo", "h:1").with_id("active");
        let refused = Naming.encode(&active, 0).expect_err("it is another's key");
        assert!(refused.to_string().contains("\"active\""), "{refused}");
        let exclusive = active.with_exclusive(true);
        assert_eq!(Naming.key("demo", &exclusive), "demo/echo/active");
        Naming.encode(&exclusive, 0).expect("that is its own");
    }

    #[test]
    fn what_is_written_is_what_the_format_says() {
        let session = Session::new("echo", "h:1").with_id(7);
        assert_eq!(Naming.key("demo", &session), "demo/echo/7");
        assert_eq!(Naming.key("", &session), "echo/7");
        let value = Naming.encode(&session, 0).expect("it can be written");
        assert_eq!(
            String::from_utf8_lossy(&value),
            r#"{"Op":0,"Addr":"h:1","Metadata":{"id":"7","weight":1}}"#
        );
    }

    #[test]
    fn records_of_grpc_go_are_read() {
        for (metadata, id) in [
            ("null", "rest"),
            ("42", "rest"),
            ("\"text\"", "rest"),
            ("[1,{}]", "rest"),
            (r#"{"zone":"a"}"#, "rest"),
            (r#"{"id":"9"}"#, "9"),
            (r#"{"id":9}"#, "9"),
            (r#"{"id":18446744073709551615}"#, "18446744073709551615"),
            (r#"{"id":-3}"#, "-3"),
            (r#"{"id":1.5}"#, "rest"),
            (
                r#"{"id":null,"weight":"heavy","stopping":1,"metadata":[]}"#,
                "rest",
            ),
            (r#"{"weight":0}"#, "rest"),
            (r#"{"weight":4294967296}"#, "rest"),
            (r#"{"metadata":{"n":1}}"#, "rest"),
        ] {
            let value = format!(r#"{{"Op":0,"Addr":"10.0.0.5:1","Metadata":{metadata}}}"#);
            let session = decode("demo/echo/rest", &value).expect(metadata);
            let expected = Session::new("echo", "10.0.0.5:1").with_id(id);
            assert_eq!(session, expected, "{metadata}");
        }
        let lean = decode("demo/echo/a", r#"{"Addr":"h:1","Unknown":{"x":[1]}}"#).expect("lean");
        assert_eq!(lean, Session::new("echo", "h:1").with_id("a"));
    }

    #[test]
    fn bad_records_say_what_is_bad() {
        let good = r#"{"Op":0,"Addr":"h:1","Metadata":null}"#;
        let huge = format!(r#"{{"Addr":"h:1","Metadata":"{}"}}"#, "x".repeat(1 << 20));
        let nested = format!(r#"{{"Addr":"h:1","Metadata":{}"#, "[".repeat(1 << 16));
        for (key, value, says) in [
            ("demo/echo/a", "", "empty"),
            ("demo/echo/a", "{", "cannot be read"),
            ("demo/echo/a", "\u{0}", "cannot be read"),
            ("demo/echo/a", "[]", "cannot be read"),
            ("demo/echo/a", r#"[0,"h:1",null]"#, "not a JSON object"),
            ("demo/echo/a", "null", "cannot be read"),
            ("demo/echo/a", "10.0.0.5:1", "cannot be read"),
            ("demo/echo/a", &nested, "cannot be read"),
            ("demo/echo/a", &huge, "1048576 are allowed"),
            ("demo/echo/a", r#"{"Op":1,"Addr":"h:1"}"#, "deleted"),
            ("demo/echo/a", r#"{"Op":2,"Addr":"h:1"}"#, "unknown Op 2"),
            (
                "demo/echo/a",
                r#"{"Op":"x","Addr":"h:1"}"#,
                "cannot be read",
            ),
            (
                "demo/echo/a",
                r#"{"Op":0,"Addr":"","Metadata":null}"#,
                "no address",
            ),
            (
                "demo/echo/a",
                r#"{"Op":0,"Addr":"","Metadata":{}}"#,
                "no address",
            ),
            ("demo/echo/a", r#"{"Op":0,"Addr":"nowhere"}"#, "host:port"),
            (
                "demo/echo/a",
                r#"{"Addr":"h:1","Metadata":{"id":"a/b"}}"#,
                "1 to 256 bytes",
            ),
            (
                "demo/echo/a",
                r#"{"Addr":"h:1","Metadata":{"id":""}}"#,
                "1 to 256 bytes",
            ),
            ("demo/echo/", good, "not one of our keys"),
            ("demo/echo/a/b", good, "not one of our keys"),
            ("demo/echo_other/a", good, "not one of our keys"),
            ("other/echo/a", good, "not one of our keys"),
        ] {
            let bad = decode(key, value).expect_err(says);
            assert!(bad.to_string().contains(says), "{key}: {bad}");
        }
        let bytes = Naming.decode("demo", "echo", "demo/echo/a", &[0xff, 0xfe]);
        assert!(matches!(bytes, Err(BadRecord::Unparsable(_))), "{bytes:?}");
    }
}
