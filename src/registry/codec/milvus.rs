//! The sessions of Milvus.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use http::{HeaderMap, HeaderValue};
use serde::{Deserialize, Serialize};

use super::{BadRecord, Codec, object, rest};
use crate::{error::Error, registry::Session};

/// The format of Milvus's sessions, as its `sessionutil` reads and writes them.
///
/// The key is `<root>/session/<role>-<id>`, or `<root>/session/<role>` for an exclusive session; the value a JSON
/// object:
///
/// ```json
/// {"ServerID":7,"ServerName":"querynode","Address":"10.0.0.5:21123","TriggerKill":true,
///  "Version":"2.6.0","IndexEngineVersion":{},"ScalarIndexEngineVersion":{},
///  "LeaseID":8448064511126318204,"HostName":"qn-0"}
/// ```
///
/// and `Exclusive`, `Stopping` and `ServerLabels`, which are a session's metadata, where they say something.
/// [`Milvus`] itself holds what a process says of itself and a [`Session`] does not:
///
/// ```
/// use switchboard::{MemoryRegistry, Session, registry::Milvus};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), switchboard::Error> {
/// let codec = Milvus::new().with_host_name("qn-0").with_cluster("by-dev")?;
/// let registry = MemoryRegistry::new().with_codec(codec);
/// let session = Session::new("querynode", "10.0.0.5:21123").with_id(7).with_version("2.6.0");
/// let registration = registry.register(session).await?;
/// # drop(registration);
/// # Ok(())
/// # }
/// ```
///
/// # What is written
///
/// Refused, as [`Kind::Invalid`](crate::Kind::Invalid), is what a Milvus process could not read or would read as
/// something else:
///
/// - an id that is not a decimal number of 0 to 9,223,372,036,854,775,807 (so one has to be given: the default,
///   the address, is none);
/// - the role `id`, whose key is that of the counter of ids;
/// - a version that is neither empty nor semantic, such as `2.6.0-rc.1`: over one such record Milvus gives up a
///   whole list;
/// - a weight other than 1, for which there is no place.
///
/// # What is read
///
/// The whole key has to match, for the prefix of `querynode` is also that of `querynode2-7`; what stands under
/// another's key is passed over in silence. So is a `<role>-<id>` that says `Exclusive`: it stands by, and is not to be
/// called. `ServerID` may be missing where the key has an id, and must not be another: a removal is told by key, and
/// calls go out under the id, so a record that says both would be called as one instance and removed as another.
/// Unknown fields are skipped.
///
/// # What calls carry
///
/// The metadata `serverid`, and `cluster` if one is set. A server that is another instance by now answers
/// `node not match`, and the call fails as [`Kind::OtherInstance`](crate::Kind::OtherInstance).
#[derive(Clone, Debug)]
pub struct Milvus {
    host_name: Arc<str>,
    trigger_kill: bool,
    cluster: Option<HeaderValue>,
}

/// The last part of the counter's key, which so can be no role.
const COUNTER: &str = "id";

// === impl Milvus ===

impl Milvus {
    /// The format with no host name and no cluster, and `TriggerKill` set.
    pub fn new() -> Self {
        Self {
            host_name: "".into(),
            trigger_kill: true,
            cluster: None,
        }
    }

    /// The same with the `HostName` of the sessions that it writes. Default: empty, and then left out.
    #[must_use]
    pub fn with_host_name(mut self, name: impl Into<Arc<str>>) -> Self {
        self.host_name = name.into();
        self
    }

    /// The same with the `TriggerKill` of the sessions that it writes: whether their servers end themselves when they
    /// lose them. Default yes. It is told to others; nothing here acts on it.
    #[must_use]
    pub fn with_trigger_kill(mut self, trigger_kill: bool) -> Self {
        self.trigger_kill = trigger_kill;
        self
    }

    /// The same with the cluster that calls say they are for, in the metadata `cluster`. Default: none, and then
    /// it is not sent.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid) if it is empty or not visible ASCII.
    pub fn with_cluster(mut self, cluster: &str) -> Result<Self, Error> {
        self.cluster = match HeaderValue::from_str(cluster) {
            Ok(value) if !value.is_empty() => Some(value),
            _ => {
                let why = format!("{cluster:?} is not visible ASCII");
                return Err(Error::invalid("cluster", why));
            }
        };
        Ok(self)
    }
}

impl Default for Milvus {
    fn default() -> Self {
        Self::new()
    }
}

impl Codec for Milvus {
    fn prefix(&self, root: &str, role: &str) -> String {
        // No separator: the key of an exclusive session ends here.
        match root {
            "" => format!("session/{role}"),
            root => format!("{root}/session/{role}"),
        }
    }

    fn key(&self, root: &str, session: &Session) -> String {
        let prefix = self.prefix(root, session.role());
        match session.is_exclusive() {
            true => prefix,
            false => format!("{prefix}-{}", session.id()),
        }
    }

    fn counter(&self, root: &str) -> String {
        self.prefix(root, COUNTER)
    }

    fn encode(&self, session: &Session, lease: i64) -> Result<Vec<u8>, Error> {
        let id = check(session)?;
        let record = Written {
            id,
            name: session.role(),
            address: session.address(),
            exclusive: session.is_exclusive(),
            stopping: session.is_stopping(),
            trigger_kill: self.trigger_kill,
            version: session.version(),
            index_engine: Empty {},
            scalar_index_engine: Empty {},
            lease,
            host_name: &self.host_name,
            labels: session.metadata(),
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
        let rest = rest(&self.prefix(root, role), key)?;
        let keyed = match rest.strip_prefix('-').map(decimal) {
            Some(Some(id)) => Some(id),
            None if rest.is_empty() && role != COUNTER => None,
            // Another role's, or the counter.
            _ => return Ok(None),
        };
        let record: Read = object(value)?;
        if let Some(name) = record.name.filter(|name| name != role) {
            // `data-5` is instance 5 of `data`, and the one instance of `data-5`: the value says of which.
            let entry = format!("{role}{rest}");
            let numbered = || format!("{name}-{}", record.id.unwrap_or(0));
            if entry == name || entry == numbered() {
                return Ok(None);
            }
            let why = "the value's ServerName is of another role, whose key this is not";
            return Err(BadRecord::Key(why.into()));
        }
        if keyed.is_some() && record.exclusive.unwrap_or(false) {
            return Ok(None);
        }
        let id = match (keyed, record.id) {
            (Some(keyed), Some(id)) if keyed != id => {
                let why = format!("it is of id {keyed}, and its value's ServerID is {id}");
                return Err(BadRecord::Key(why.into()));
            }
            (Some(id), _) => id,
            (None, Some(id @ 0..)) => id,
            (None, Some(id)) => {
                return Err(BadRecord::Unparsable(
                    format!("ServerID {id} is negative").into(),
                ));
            }
            (None, None) => return Err(BadRecord::Unparsable("it has no ServerID".into())),
        };
        let address = record.address.filter(|address| !address.is_empty());
        let session = Session::new(role, address.ok_or(BadRecord::NoAddress)?)
            .with_id(id)
            .with_version(record.version.unwrap_or_default())
            .with_exclusive(keyed.is_none())
            .with_stopping(record.stopping.unwrap_or(false));
        let labels = record.labels.unwrap_or_default().into_iter();
        let session = labels.fold(session, |session, (k, v)| session.with_metadata(k, v));
        session.validate().map_err(BadRecord::Invalid)?;
        Ok(Some(session))
    }

    fn call_metadata(&self, session: &Session) -> HeaderMap {
        let mut metadata = HeaderMap::new();
        // Milvus says `ServerID` and `Cluster`; on the wire of HTTP/2 all names are lower-case.
        if let Some(id) = decimal(session.id()) {
            metadata.insert("serverid", id.into());
        }
        if let Some(cluster) = &self.cluster {
            metadata.insert("cluster", cluster.clone());
        }
        metadata
    }
}

/// Refuses what Milvus could not read, and gives the id of what it can.
fn check(session: &Session) -> Result<i64, Error> {
    if session.role() == COUNTER {
        let why = "\"id\" cannot be one: its key is that of the counter of ids";
        return Err(Error::invalid("role", why));
    }
    if !version_can_be_read(session.version()) {
        let why = format!(
            "{:?} is neither empty nor semantic, such as 2.6.0 or 2.6.0-rc.1",
            session.version()
        );
        return Err(Error::invalid("version", why));
    }
    if session.weight() != 1 {
        let why = format!("{}: a Milvus session has none, so only 1", session.weight());
        return Err(Error::invalid("weight", why));
    }
    decimal(session.id()).ok_or_else(|| {
        let why = format!(
            "{:?} is not a decimal number of 0 to {}, as a Milvus session's has to be",
            session.id(),
            i64::MAX
        );
        Error::invalid("id", why)
    })
}

/// The number, if this is how Milvus writes it: `07` and `+7` are no ids, or one instance could have two keys.
fn decimal(id: &str) -> Option<i64> {
    let digits = id.bytes().all(|b| b.is_ascii_digit());
    let shortest = id == "0" || !id.starts_with('0');
    // An empty one, and one that is too large, fail in the parsing.
    (digits && shortest).then(|| id.parse().ok()).flatten()
}

/// Whether Milvus's parser takes this version, by the grammar of <https://semver.org>.
fn version_can_be_read(version: &str) -> bool {
    if version.is_empty() {
        return true;
    }
    let (version, build) = match version.split_once('+') {
        Some((version, build)) => (version, Some(build)),
        None => (version, None),
    };
    let (core, pre) = match version.split_once('-') {
        Some((core, pre)) => (core, Some(pre)),
        None => (version, None),
    };
    let named = |part: &str| {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        !part.is_empty() && part.bytes().all(allowed)
    };
    let all_digits = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
    let pre_release = |part: &str| named(part) && (!all_digits(part) || decimal(part).is_some());
    core.split('.').count() == 3
        && core.split('.').all(|part| decimal(part).is_some())
        && pre.is_none_or(|pre| pre.split('.').all(pre_release))
        && build.is_none_or(|build| build.split('.').all(named))
}

// In the order of Milvus's fields.
#[derive(Serialize)]
struct Written<'a> {
    #[serde(rename = "ServerID")]
    id: i64,
    #[serde(rename = "ServerName")]
    name: &'a str,
    #[serde(rename = "Address")]
    address: &'a str,
    #[serde(rename = "Exclusive", skip_serializing_if = "std::ops::Not::not")]
    exclusive: bool,
    #[serde(rename = "Stopping", skip_serializing_if = "std::ops::Not::not")]
    stopping: bool,
    #[serde(rename = "TriggerKill")]
    trigger_kill: bool,
    #[serde(rename = "Version")]
    version: &'a str,
    #[serde(rename = "IndexEngineVersion")]
    index_engine: Empty,
    #[serde(rename = "ScalarIndexEngineVersion")]
    scalar_index_engine: Empty,
    // Beyond 2^53: an integer all the way, or it would come out as another.
    #[serde(rename = "LeaseID")]
    lease: i64,
    #[serde(rename = "HostName", skip_serializing_if = "str::is_empty")]
    host_name: &'a str,
    #[serde(rename = "ServerLabels", skip_serializing_if = "BTreeMap::is_empty")]
    labels: &'a BTreeMap<String, String>,
}

#[derive(Serialize)]
struct Empty {}

// All optional: Go leaves out what is zero, and takes null for it.
#[derive(Deserialize)]
struct Read {
    #[serde(rename = "ServerID")]
    id: Option<i64>,
    #[serde(rename = "ServerName")]
    name: Option<String>,
    #[serde(rename = "Address")]
    address: Option<String>,
    #[serde(rename = "Exclusive")]
    exclusive: Option<bool>,
    #[serde(rename = "Stopping")]
    stopping: Option<bool>,
    #[serde(rename = "Version")]
    version: Option<String>,
    #[serde(rename = "ServerLabels")]
    labels: Option<HashMap<String, String>>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;

    /// The example of the format, on one line, as it is stored.
    const EXAMPLE: &str = concat!(
        r#"{"ServerID":7,"ServerName":"querynode","Address":"10.0.0.5:21123","TriggerKill":true,"#,
        r#""Version":"2.6.0","IndexEngineVersion":{},"ScalarIndexEngineVersion":{},"#,
        r#""LeaseID":8448064511126318204,"HostName":"qn-0"}"#
    );

    fn example() -> Session {
        Session::new("querynode", "10.0.0.5:21123")
            .with_id(7)
            .with_version("2.6.0")
    }

    fn decode(role: &str, key: &str, value: &str) -> Result<Option<Session>, BadRecord> {
        Milvus::new().decode("by-dev", role, key, value.as_bytes())
    }

    #[test]
    fn the_example_is_read_and_written_byte_for_byte() {
        let codec = Milvus::new().with_host_name("qn-0");
        let key = codec.key("by-dev", &example());
        assert_eq!(key, "by-dev/session/querynode-7");
        let value = codec.encode(&example(), 8_448_064_511_126_318_204).unwrap();
        assert_eq!(String::from_utf8(value).unwrap(), EXAMPLE);
        let read = decode("querynode", &key, EXAMPLE).unwrap();
        assert_eq!(read, Some(example()));
    }

    #[test]
    fn what_is_optional_stands_where_milvus_has_it() {
        let session = example()
            .with_exclusive(true)
            .with_stopping(true)
            .with_metadata("zone", "b")
            .with_metadata("disk", "ssd");
        let codec = Milvus::new().with_trigger_kill(false);
        let value = String::from_utf8(codec.encode(&session, i64::MAX).unwrap()).unwrap();
        assert_eq!(
            value,
            concat!(
                r#"{"ServerID":7,"ServerName":"querynode","Address":"10.0.0.5:21123","Exclusive":true,"#,
                r#""Stopping":true,"TriggerKill":false,"Version":"2.6.0","IndexEngineVersion":{},"#,
                r#""ScalarIndexEngineVersion":{},"LeaseID":9223372036854775807,"#,
                r#""ServerLabels":{"disk":"ssd","zone":"b"}}"#
            )
        );
        let key = codec.key("by-dev", &session);
        assert_eq!(key, "by-dev/session/querynode");
        let read = decode("querynode", &key, &value).unwrap();
        assert_eq!(read, Some(session));
    }

    #[test]
    fn keys_are_those_of_milvus() {
        let codec = Milvus::new();
        for (root, prefix, counter) in [
            ("", "session/querynode", "session/id"),
            (
                "by-dev/meta",
                "by-dev/meta/session/querynode",
                "by-dev/meta/session/id",
            ),
        ] {
            assert_eq!(codec.prefix(root, "querynode"), prefix);
            assert_eq!(codec.key(root, &example()), format!("{prefix}-7"));
            assert_eq!(codec.key(root, &example().with_exclusive(true)), prefix);
            assert_eq!(codec.counter(root), counter);
        }
    }

    #[test]
    fn what_is_not_of_the_role_is_passed_over_in_silence() {
        let of = |name: &str, id: i64| {
            format!(r#"{{"ServerID":{id},"ServerName":"{name}","Address":"h:1"}}"#)
        };
        let standby = r#"{"ServerID":7,"ServerName":"rootcoord","Address":"h:1","Exclusive":true}"#
            .to_owned();
        for (role, entry, value) in [
            ("querynode", "querynode2-7", of("querynode2", 7)),
            ("querynode", "querynode2", of("querynode2", 7)),
            ("querynode", "querynode-2-7", of("querynode-2", 7)),
            ("data", "data-node-5", of("data-node", 5)),
            // Of which it is, the key does not tell.
            ("data", "data-5", of("data-5", 1)),
            ("data-5", "data-5", of("data", 5)),
            ("data-5", "data-5-1", of("data-5-1", 3)),
            // Written by nobody under such an id; a role may be named so.
            ("querynode", "querynode-07", of("querynode-07", 7)),
            ("querynode", "querynode-+7", of("querynode", 7)),
            ("querynode", "querynode--7", of("querynode", -7)),
            ("querynode", "querynode-", of("querynode", 7)),
            ("querynode", "querynode-7/x", of("querynode", 7)),
            ("querynode", "querynode-7 ", of("querynode", 7)),
            ("querynode", "querynode-٧", of("querynode", 7)),
            (
                "querynode",
                "querynode-9223372036854775808",
                of("querynode", 7),
            ),
            // The counter of ids.
            ("id", "id", "8".to_owned()),
            ("i", "id", "8".to_owned()),
            ("querynode", "querynode2-7", "{".to_owned()),
            ("rootcoord", "rootcoord-7", standby),
        ] {
            let read = decode(role, &format!("by-dev/session/{entry}"), &value);
            assert!(
                matches!(read, Ok(None)),
                "{role} reads {entry} {value}: {read:?}"
            );
        }
    }

    #[test]
    fn what_other_versions_write_is_read() {
        let full = example().with_stopping(true).with_metadata("zone", "b");
        let seven = Session::new("querynode", "h:1").with_id(7);
        let active = seven.clone().with_exclusive(true);
        for (entry, value, expected) in [
            ("querynode-7", r#"{"ServerID":7,"Address":"h:1"}"#, &seven),
            // Go's zero values, left out or null; unknown fields of whatever type.
            (
                "querynode-7",
                r#"{"Address":"h:1","Exclusive":null,"Version":null,"ServerLabels":null,"ServerName":null}"#,
                &seven,
            ),
            (
                "querynode-7",
                r#" {"Address":"h:1","ServerID":7,"LeaseID":1e400,"HostName":[],"New":{"x":[[]]}}"#,
                &seven,
            ),
            (
                "querynode-7",
                r#"{"ServerID":7,"ServerName":"querynode","Address":"10.0.0.5:21123","Stopping":true,"Version":"2.6.0","IndexEngineVersion":{"CurrentIndexVersion":6},"LeaseID":1,"ServerLabels":{"zone":"b"}}"#,
                &full,
            ),
            // The key says that it is exclusive, whatever the value does.
            ("querynode", r#"{"ServerID":7,"Address":"h:1"}"#, &active),
            (
                "querynode",
                r#"{"ServerID":7,"Address":"h:1","Exclusive":true}"#,
                &active,
            ),
        ] {
            let read = decode("querynode", &format!("by-dev/session/{entry}"), value);
            assert_eq!(read.expect(value).as_ref(), Some(expected), "{value}");
        }
        let largest = format!(r#"{{"ServerID":{},"Address":"h:1"}}"#, i64::MAX);
        let key = format!("by-dev/session/querynode-{}", i64::MAX);
        let read = decode("querynode", &key, &largest).unwrap().unwrap();
        assert_eq!(read.id(), "9223372036854775807");
    }

    #[test]
    fn bad_records_say_what_is_bad() {
        let huge = format!(
            r#"{{"ServerID":7,"Address":"h:1","X":"{}"}}"#,
            "x".repeat(1 << 20)
        );
        for (entry, value, says) in [
            ("querynode-7", "", "empty"),
            ("querynode-7", "7", "not a JSON object"),
            ("querynode-7", "null", "not a JSON object"),
            (
                "querynode-7",
                r#"[7,"querynode","h:1"]"#,
                "not a JSON object",
            ),
            ("querynode-7", "{", "cannot be read"),
            ("querynode-7", "\u{0}", "cannot be read"),
            ("querynode-7", &huge, "1048576 are allowed"),
            ("querynode-7", r#"{"ServerID":7}"#, "no address"),
            (
                "querynode-7",
                r#"{"ServerID":7,"Address":""}"#,
                "no address",
            ),
            (
                "querynode-7",
                r#"{"ServerID":7,"Address":"nowhere"}"#,
                "host:port",
            ),
            (
                "querynode-7",
                r#"{"ServerID":"7","Address":"h:1"}"#,
                "cannot be read",
            ),
            (
                "querynode-7",
                r#"{"ServerID":7.0,"Address":"h:1"}"#,
                "cannot be read",
            ),
            (
                "querynode-7",
                r#"{"ServerID":18446744073709551615,"Address":"h:1"}"#,
                "cannot be read",
            ),
            (
                "querynode-7",
                r#"{"ServerID":7,"Address":1}"#,
                "cannot be read",
            ),
            (
                "querynode-7",
                r#"{"ServerID":7,"Address":"h:1","Stopping":"no"}"#,
                "cannot be read",
            ),
            (
                "querynode-7",
                r#"{"ServerID":7,"Address":"h:1","Exclusive":1}"#,
                "cannot be read",
            ),
            (
                "querynode-7",
                r#"{"ServerID":7,"Address":"h:1","Version":2.6}"#,
                "cannot be read",
            ),
            (
                "querynode-7",
                r#"{"ServerID":7,"Address":"h:1","ServerLabels":{"n":1}}"#,
                "cannot be read",
            ),
            (
                "querynode-7",
                r#"{"ServerID":7,"ServerID":8,"Address":"h:1"}"#,
                "duplicate",
            ),
            (
                "querynode-7",
                r#"{"ServerID":8,"Address":"h:1"}"#,
                "it is of id 7, and its value's ServerID is 8",
            ),
            (
                "querynode-7",
                r#"{"ServerID":7,"ServerName":"datanode","Address":"h:1"}"#,
                "of another role",
            ),
            ("querynode", r#"{"Address":"h:1"}"#, "no ServerID"),
            (
                "querynode",
                r#"{"ServerID":-7,"Address":"h:1"}"#,
                "negative",
            ),
        ] {
            let bad =
                decode("querynode", &format!("by-dev/session/{entry}"), value).expect_err(says);
            assert!(bad.to_string().contains(says), "{entry} {value}: {bad}");
        }
        let bad = decode("querynode", "other/session/querynode-7", EXAMPLE).unwrap_err();
        assert!(matches!(bad, BadRecord::Key(_)), "{bad}");
        let bytes = Milvus::new().decode(
            "",
            "querynode",
            "session/querynode-7",
            b"{\"Address\":\"\xff\"}",
        );
        assert!(matches!(bytes, Err(BadRecord::Unparsable(_))), "{bytes:?}");
    }

    #[test]
    fn what_milvus_could_not_read_is_not_written() {
        let id = |id: &str| example().with_id(id);
        let version = |version: &str| example().with_version(version);
        let allowed = "decimal number of 0 to 9223372036854775807";
        for (session, says) in [
            (Session::new("querynode", "10.0.0.5:21123"), allowed),
            (id("seven"), allowed),
            (id("-7"), allowed),
            (id("+7"), allowed),
            (id("07"), allowed),
            (id("7.0"), allowed),
            (id("9223372036854775808"), allowed),
            (Session::new("id", "h:1").with_id(7), "counter of ids"),
            (
                Session::new("id", "h:1").with_id(7).with_exclusive(true),
                "counter of ids",
            ),
            (example().with_weight(2), "so only 1"),
            (version("v2.6.0"), "semantic"),
            (version("2.6"), "semantic"),
            (version("2.06.0"), "semantic"),
            (version("2.6.0-"), "semantic"),
            (version("2.6.0-01"), "semantic"),
            (version("2.6.0+ü"), "semantic"),
            (version("master"), "semantic"),
        ] {
            let error = Milvus::new().encode(&session, 1).expect_err(says);
            assert_eq!(error.kind(), Kind::Invalid);
            assert!(error.to_string().contains(says), "{error}");
        }
        for session in [
            id("0"),
            id("9223372036854775807"),
            version(""),
            version("2.6.0-rc.1+build.007"),
            version("2.6.0-0-a"),
        ] {
            Milvus::new().encode(&session, 1).unwrap();
        }
    }

    #[test]
    fn calls_carry_the_id_and_the_cluster_if_there_is_one() {
        let metadata = Milvus::new().call_metadata(&example());
        assert_eq!(metadata.len(), 1);
        assert_eq!(metadata["serverid"], "7");
        let codec = Milvus::new().with_cluster("by-dev").unwrap();
        let metadata = codec.call_metadata(&example());
        assert_eq!(metadata.len(), 2);
        assert_eq!(metadata["cluster"], "by-dev");
        for cluster in ["", "a\nb", "ü\u{0}"] {
            let error = Milvus::new().with_cluster(cluster).unwrap_err();
            assert!(error.to_string().contains("visible ASCII"), "{error}");
        }
    }
}
