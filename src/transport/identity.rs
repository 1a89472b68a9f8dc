//! Who the calls of a connection are for, and what happens when whoever answers says that it is another.

use std::{fmt, sync::OnceLock};

use h2::RecvStream;
use http::{HeaderMap, Response};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use crate::error::{Error, Kind, Sent};

/// The metadata that each call of a connection carries, and the answer that it is for somebody else.
pub(crate) struct Identity {
    metadata: HeaderMap,
    /// What the peer said, once.
    denied: OnceLock<String>,
    told: CancellationToken,
}

/// What the refusal of a call for another instance contains, as Milvus words it:
/// `node not match[expectedNodeID=7][actualNodeID=8]`.
const NOT_MATCH: &str = "node not match";

/// What stands in it before the id that the call was for.
const EXPECTED: &str = "expectedNodeID=";

/// How many bytes of what a peer says are kept.
const MOST: usize = 256;

// === impl Identity ===

impl Identity {
    pub(crate) fn new(metadata: HeaderMap) -> Self {
        Self {
            metadata,
            denied: OnceLock::new(),
            told: CancellationToken::new(),
        }
    }

    /// Adds it to the headers of a request.
    ///
    /// A request that says something else under one of its names is for somebody else: with the one value it would be
    /// executed by whom it is not for, with the other whoever took this address would have no reason to refuse
    /// it. So it fails, and neither silently wins.
    #[inline]
    pub(super) fn put_into(&self, headers: &mut HeaderMap) -> Result<(), Error> {
        match self.metadata.is_empty() {
            true => Ok(()),
            false => self.put(headers),
        }
    }

    fn put(&self, headers: &mut HeaderMap) -> Result<(), Error> {
        for (name, value) in &self.metadata {
            if let Some(other) = headers.get_all(name).iter().find(|v| *v != value) {
                let why = format!("{name} is {other:?}, at an instance of {value:?}");
                return Err(Error::invalid("metadata", why));
            }
            headers.insert(name, value.clone());
        }
        Ok(())
    }

    /// The error of a call whose answer is that the peer is another instance. The connection takes no new calls then.
    #[inline]
    pub(super) fn denial(&self, response: &Response<RecvStream>) -> Option<Error> {
        match self.metadata.is_empty() {
            true => None,
            false => self.read(response),
        }
    }

    /// Only the head is looked at, and only where it is all of the answer (gRPC's trailers-only): before that a
    /// call has been executed at least in part.
    fn read(&self, response: &Response<RecvStream>) -> Option<Error> {
        if !response.body().is_end_stream() {
            return None;
        }
        let (said, sent) = self.refusal(response.headers())?;
        let error = refused(&said).with_sent(sent);
        self.deny(&said);
        Some(error)
    }

    /// Whoever answers is another, as it says.
    pub(super) fn deny(&self, said: &str) {
        let _ = self.denied.set(said.to_owned());
        self.told.cancel();
    }

    /// What the head of an answer says, if it refuses the call as another's, and whether it may have been executed.
    pub(crate) fn refusal(&self, head: &HeaderMap) -> Option<(String, Sent)> {
        // Decoded, and not searched as it is: spaces need no percent-encoding in grpc-message, and grpc-go's
        // are plain, but tonic's servers send `node%20not%20match`.
        let status = Status::from_header_map(head)?;
        let said = status.message();
        if status.code() == Code::Ok || !said.contains(NOT_MATCH) {
            return None;
        }
        // A server that called another, and was refused there, may hand that on as its own status. It has
        // executed this call; the id that was expected is then not ours. Where none is named it cannot be told.
        let sent = match said.split_once(EXPECTED) {
            Some((_, expected)) => {
                let id = expected.split(|c: char| !c.is_ascii_digit()).next()?;
                self.metadata.values().find(|value| *value == id)?;
                Sent::Unprocessed
            }
            None => Sent::Sent,
        };
        let end = said.char_indices().map(|(at, c)| at + c.len_utf8());
        let end = end.take_while(|end| *end <= MOST).last().unwrap_or(0);
        Some((said[..end].to_owned(), sent))
    }

    /// Whether the peer has said that it is another.
    #[inline]
    pub(super) fn is_denied(&self) -> bool {
        self.denied.get().is_some()
    }

    /// Why a new call may not go out, once that is so.
    pub(super) fn error(&self) -> Option<Error> {
        self.denied.get().map(|said| refused(said))
    }

    /// Until the peer says that it is another.
    pub(super) async fn denied(&self) -> Error {
        self.told.cancelled().await;
        self.error()
            .unwrap_or_else(|| Error::new(Kind::OtherInstance))
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("metadata", &self.metadata)
            .field("denied", &self.denied.get())
            .finish_non_exhaustive()
    }
}

fn refused(said: &str) -> Error {
    Error::new(Kind::OtherInstance).with_reason(format!("it says {said:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        let mut metadata = HeaderMap::new();
        metadata.insert("serverid", 7.into());
        metadata.insert("cluster", http::HeaderValue::from_static("by-dev"));
        Identity::new(metadata)
    }

    #[test]
    fn it_is_added_and_what_says_another_is_refused() {
        let mut headers = HeaderMap::new();
        headers.insert("te", http::HeaderValue::from_static("trailers"));
        identity().put_into(&mut headers).unwrap();
        assert_eq!(headers.len(), 3);
        assert_eq!(
            (&headers["serverid"], &headers["cluster"]),
            (&"7".parse().unwrap(), &"by-dev".parse().unwrap())
        );
        // The same once more is the same.
        identity().put_into(&mut headers).unwrap();
        assert_eq!(headers.len(), 3);
        // Also as the second of two.
        headers.append("serverid", 8.into());
        let error = identity().put_into(&mut headers).unwrap_err();
        assert_eq!((error.kind(), error.sent()), (Kind::Invalid, Sent::Unsent));
        assert!(error.to_string().contains(r#"serverid is "8""#), "{error}");
    }

    #[test]
    fn without_one_nothing_is_added() {
        let mut headers = HeaderMap::new();
        let identity = Identity::new(HeaderMap::new());
        identity.put_into(&mut headers).unwrap();
        assert_eq!(headers.capacity(), 0);
    }

    #[test]
    fn a_refusal_is_told_by_its_words() {
        for (code, message, expected) in [
            // grpc-go's, with plain spaces; tonic's, with none.
            ("2", "node not match", Some("node not match")),
            ("2", "node%20not%20match", Some("node not match")),
            (
                "2",
                "node not match[expectedNodeID=7][actualNodeID=8]",
                Some("node not match[expectedNodeID=7][actualNodeID=8]"),
            ),
            (
                "2",
                "expectedNodeID=7, actualNodeID=8: node not match",
                Some("expectedNodeID=7, actualNodeID=8: node not match"),
            ),
            // Handed on from a call of the server's own.
            (
                "2",
                "node not match[expectedNodeID=77][actualNodeID=8]",
                None,
            ),
            (
                "2",
                "load: node not match[expectedNodeID=][actualNodeID=8]",
                None,
            ),
            ("0", "node not match", None),
            ("2", "node does not match", None),
            ("2", "", None),
        ] {
            let mut head = HeaderMap::new();
            head.insert("grpc-status", code.parse().unwrap());
            head.insert("grpc-message", message.parse().unwrap());
            let said = identity().refusal(&head);
            // Where it says whom it was for, it is this server's own word.
            let sent = match message.contains("NodeID=7") {
                true => Sent::Unprocessed,
                false => Sent::Sent,
            };
            let expected = expected.map(|said| (said.to_owned(), sent));
            assert_eq!(said, expected, "{code} {message}");
        }
        assert_eq!(identity().refusal(&HeaderMap::new()), None);
        let mut head = HeaderMap::new();
        head.insert("grpc-status", "2".parse().unwrap());
        let long = format!("node not match {}", "%C3%BC".repeat(1000));
        head.insert("grpc-message", long.parse().unwrap());
        let (said, _) = identity().refusal(&head).unwrap();
        assert!((250..=256).contains(&said.len()), "{}", said.len());
    }
}
