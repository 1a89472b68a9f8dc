//! The one error of this crate: what kind, which role and peer, why, and whether the request was sent.
//!
//! It is one pointer wide, allocated only when something failed, and put into words only when somebody
//! reads it. [`std::error::Error::source`] leads through the `tonic::Status` that it stands for: that
//! is how tonic's generated clients, which search the chain for one, come to the right code and the
//! full message without knowing this crate.

mod words;

use std::{borrow::Cow, error::Error as StdError, fmt, sync::Arc, sync::OnceLock};

use tonic::{Code, Status};

use self::words::Detail;
pub(crate) use self::words::{Brief, NOT_SERVING, STOPPING, Trouble, shown};

/// A boxed error of any kind, as tower and tonic use it.
pub type BoxError = Box<dyn StdError + Send + Sync>;

/// An error that several may hold: what one failed dial leaves behind for every call that meets it.
pub type SharedError = Arc<dyn StdError + Send + Sync>;

/// What went wrong with a call, a connection or an argument.
///
/// A program can match on [`Error::kind`] and [`Error::sent`]; a person reads the message, which names
/// the role, the peer and the reason. From the `tonic::Status` that a generated client returns it is
/// got back with [`Error::of`].
pub struct Error(Box<Inner>);

struct Inner {
    kind: Kind,
    sent: Sent,
    role: Option<Arc<str>>,
    peer: Option<Arc<Peer>>,
    detail: Detail,
    source: Option<SharedError>,
    /// Whoever makes calls again has given up: what may be repeated uncounted, was.
    given_up: bool,
    // Put together when first asked for: a call that fails in a loop pays for no words nobody reads.
    status: OnceLock<Status>,
}

/// The kind of an [`Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// An argument cannot work: an address, a role, a duration. `INVALID_ARGUMENT`.
    Invalid,
    /// The session's place in the registry is taken by another that is alive. `ALREADY_EXISTS`.
    AlreadyRegistered,
    /// No session of the role is registered. `UNAVAILABLE`.
    NoSession,
    /// The one instance that was asked for is not registered. `UNAVAILABLE`.
    UnknownPeer,
    /// Sessions are registered, but none is connected. `UNAVAILABLE`.
    NotConnected,
    /// Who is connected has no room for another call: all streams that it allows are in use. `UNAVAILABLE`.
    Busy,
    /// A limit that was set is reached: on calls in flight, or on calls that wait. It is not repeated. `UNAVAILABLE`.
    Limit,
    /// A [`Gate`](crate::Gate) is shut; the reason says why. `UNAVAILABLE`.
    Shut,
    /// The registry has never answered, so nothing is known of the role. `UNAVAILABLE`.
    RegistryUnreachable,
    /// The registry answered, and refused: a permission is missing, a limit is reached, others were faster too often.
    /// Its own `Status` is the source, if it has one, and gives the code; else `FAILED_PRECONDITION`.
    RegistryRefused,
    /// The peer's session was deleted from the registry, or its address was taken by another. `UNAVAILABLE`.
    SessionDeleted,
    /// The connection was lost or could not be made. `UNAVAILABLE`.
    ConnectionLost,
    /// The peer said that it did not process the call: `REFUSED_STREAM`, or a GOAWAY below it. `UNAVAILABLE`.
    Refused,
    /// Whoever answers at the peer's address says that it is another instance, and did not process the call.
    /// `UNAVAILABLE`.
    OtherInstance,
    /// The peer reset this call alone; the code follows gRPC's mapping of HTTP/2 error codes.
    Reset,
    /// The call's time was up. `DEADLINE_EXCEEDED`.
    DeadlineExceeded,
    /// The caller's side ended it: the pool or the manager was stopped. `CANCELLED`.
    Stopped,
    /// The caller's side ended it, by a [`CancelToken`](crate::CancelToken). `CANCELLED`.
    Cancelled,
    /// The request's own body failed; its error is the source. `CANCELLED`, unless the source says otherwise.
    RequestBody,
    /// Something that should not happen: a peer that breaks the protocol, a service that panicked. `INTERNAL`.
    Internal,
    /// An error of the service inside, which is the source. Its own `Status` if it has one, else `UNKNOWN`.
    Service,
    /// What a program does of its own in its component failed or panicked: its server, a hook. `INTERNAL`, unless the
    /// source says otherwise.
    Component,
}

/// How far a failed call's request got. Of several attempts, the one that got furthest counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Sent {
    /// It never left this process. Repeating it is always safe.
    Unsent,
    /// The peer said that it did not process it. Repeating it is safe.
    Unprocessed,
    /// It was sent, or may have been: it may have been executed.
    Sent,
}

/// One server instance, as errors and status name it: role, id, address, generation.
///
/// The generation makes it itself and not its successor: a server that registers again is another peer,
/// whatever its id and its address.
///
/// A response through a [`Pool`](crate::Pool) that says in its head that the call has failed (`grpc-status` other than 0) has
/// the peer that it came from as an extension, so that layers above know whom to [`Avoid`](crate::Avoid).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Peer {
    /// The kind of server, such as `querynode`.
    pub role: Arc<str>,
    /// The instance's id, unique in its role.
    pub id: Arc<str>,
    /// Where it listens, `host:port` or a Unix domain socket; empty when the pool was not told.
    pub address: Arc<str>,
    /// The registry's `create_revision` of its session; 0 when there is no registry.
    pub generation: u64,
}

// === impl Error ===

impl Error {
    /// An error of this kind, which was not sent; for connectors and services of one's own.
    ///
    /// ```
    /// use switchboard::{Error, Kind};
    ///
    /// let error = Error::new(Kind::ConnectionLost).with_reason("the tunnel is down");
    /// assert_eq!(error.to_string(), "connection lost: the tunnel is down");
    /// assert_eq!(tonic::Status::from(error).code(), tonic::Code::Unavailable);
    /// ```
    pub fn new(kind: Kind) -> Self {
        Self(Box::new(Inner {
            kind,
            sent: Sent::Unsent,
            role: None,
            peer: None,
            detail: Detail::None,
            source: None,
            given_up: false,
            status: OnceLock::new(),
        }))
    }

    /// Says why, in a few words without a full stop.
    #[must_use]
    pub fn with_reason(mut self, reason: impl Into<Cow<'static, str>>) -> Self {
        self.0.detail = Detail::Text(reason.into());
        self.changed()
    }

    /// Keeps what caused it.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<BoxError>) -> Self {
        self.0.source = Some(Arc::from(source.into()));
        self.changed()
    }

    /// Says how far the request got.
    #[must_use]
    pub fn with_sent(mut self, sent: Sent) -> Self {
        self.0.sent = sent;
        self.changed()
    }

    /// The error inside a status that a generated client returned, if it came from this crate.
    ///
    /// ```
    /// use switchboard::{Error, Kind};
    ///
    /// let status = tonic::Status::from(Error::new(Kind::NoSession));
    /// assert_eq!(Error::of(&status).map(Error::kind), Some(Kind::NoSession));
    /// ```
    pub fn of<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(found) = error.downcast_ref::<Self>() {
                return Some(found);
            }
            // An `Arc` that carries an error is an error itself, but not the one inside.
            if let Some(shared) = error.downcast_ref::<SharedError>()
                && let Some(found) = shared.downcast_ref::<Self>()
            {
                return Some(found);
            }
            next = error.source();
        }
        None
    }

    /// What kind of failure it is.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// How far the request got: whether the peer may have executed the call.
    pub fn sent(&self) -> Sent {
        self.0.sent
    }

    /// The role that was called, if one was.
    pub fn role(&self) -> Option<&str> {
        match (&self.0.role, &self.0.peer) {
            (Some(role), _) => Some(role),
            (None, Some(peer)) => Some(&peer.role),
            (None, None) => None,
        }
    }

    /// The peer that it happened with, if one had been picked.
    pub fn peer(&self) -> Option<&Peer> {
        self.0.peer.as_deref()
    }

    /// Why, without the role, the peer and the cause; `None` if the kind says it all.
    pub fn reason(&self) -> Option<String> {
        match &self.0.detail {
            Detail::None => None,
            detail => Some(detail.to_string()),
        }
    }

    /// The gRPC code that it stands for.
    pub fn code(&self) -> Code {
        self.status().code()
    }

    pub(crate) fn invalid(what: &'static str, why: impl fmt::Display) -> Self {
        Self::new(Kind::Invalid).with_reason(format!("{what}: {why}"))
    }

    /// Says that the request got so far, or further.
    pub(crate) fn with_sent_at_least(self, sent: Sent) -> Self {
        match self.0.sent < sent {
            true => self.with_sent(sent),
            false => self,
        }
    }

    pub(crate) fn with_shared_source(mut self, source: SharedError) -> Self {
        self.0.source = Some(source);
        self.changed()
    }

    pub(crate) fn with_role(mut self, role: &Arc<str>) -> Self {
        self.0.role = Some(role.clone());
        self.changed()
    }

    pub(crate) fn with_peer(mut self, peer: &Arc<Peer>) -> Self {
        self.0.peer = Some(peer.clone());
        self.changed()
    }

    /// Says that whoever makes calls again has given up.
    pub(crate) fn given_up(mut self) -> Self {
        self.0.given_up = true;
        self
    }

    /// Whether somebody inside has repeated it, uncounted, as often as it may be.
    pub(crate) fn is_given_up(&self) -> bool {
        self.0.given_up
    }

    /// Names the role and the peer that the other one names.
    pub(crate) fn with_names_of(mut self, other: &Self) -> Self {
        self.0.role = other.0.role.clone().or(self.0.role);
        self.0.peer = other.0.peer.clone().or(self.0.peer);
        self.changed()
    }

    pub(crate) fn unready(mut self, known: usize, sample: Vec<Trouble>) -> Self {
        self.0.detail = Detail::Unready { known, sample };
        self.changed()
    }

    pub(crate) fn trouble(mut self, trouble: Trouble) -> Self {
        self.0.peer = Some(trouble.peer.clone());
        self.0.detail = Detail::Trouble(trouble);
        self.changed()
    }

    /// What a service inside returned, made ours: kept if it is one already, wrapped otherwise.
    pub(crate) fn from_service(error: BoxError) -> Self {
        match error.downcast::<Self>() {
            Ok(ours) => *ours,
            Err(other) => Self::new(Kind::Service)
                .with_sent(Sent::Sent)
                .with_source(other),
        }
    }

    /// The same of a service inside that cannot be called: no call has got anywhere.
    pub(crate) fn from_ready(error: BoxError) -> Self {
        Self::from_service(error).with_sent(Sent::Unsent)
    }

    // A status made before a change would tell the old story.
    fn changed(mut self) -> Self {
        self.0.status = OnceLock::new();
        self
    }

    fn status(&self) -> &Status {
        self.0.status.get_or_init(|| {
            let code = match self.0.kind {
                Kind::Invalid => Code::InvalidArgument,
                Kind::AlreadyRegistered => Code::AlreadyExists,
                Kind::NoSession
                | Kind::UnknownPeer
                | Kind::NotConnected
                | Kind::Busy
                | Kind::Limit
                | Kind::Shut
                | Kind::RegistryUnreachable
                | Kind::SessionDeleted
                | Kind::ConnectionLost
                | Kind::Refused
                | Kind::OtherInstance => Code::Unavailable,
                Kind::DeadlineExceeded => Code::DeadlineExceeded,
                Kind::Stopped | Kind::Cancelled => Code::Cancelled,
                Kind::Internal => Code::Internal,
                Kind::Reset => self.inner_code().unwrap_or(Code::Unknown),
                Kind::Component => self.inner_code().unwrap_or(Code::Internal),
                Kind::RequestBody => self.inner_code().unwrap_or(Code::Cancelled),
                Kind::RegistryRefused => self.inner_code().unwrap_or(Code::FailedPrecondition),
                Kind::Service => self.inner_code().unwrap_or(Code::Unknown),
            };
            let mut status = Status::new(code, self.to_string());
            if let Some(source) = &self.0.source {
                status.set_source(source.clone());
            }
            status
        })
    }

    /// What caused it, without the status that it stands for.
    #[cfg(feature = "transport")]
    pub(crate) fn cause(&self) -> Option<&(dyn StdError + 'static)> {
        match &self.0.source {
            Some(source) => Some(&**source),
            None => None,
        }
    }

    fn inner_code(&self) -> Option<Code> {
        let mut next: Option<&(dyn StdError + 'static)> = match &self.0.source {
            Some(source) => Some(&**source),
            None => None,
        };
        while let Some(error) = next {
            if let Some(status) = error.downcast_ref::<Status>() {
                return Some(status.code());
            }
            #[cfg(feature = "transport")]
            if let Some(error) = error.downcast_ref::<h2::Error>() {
                return error.reason().map(code_of_reset);
            }
            next = error.source();
        }
        None
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error")
            .field("kind", &self.0.kind)
            .field("sent", &self.0.sent)
            .field("message", &self.to_string())
            .finish_non_exhaustive()
    }
}

impl StdError for Error {
    /// The `tonic::Status` that this error stands for, whose own source is the cause.
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(self.status())
    }
}

impl From<Error> for Status {
    /// A status with the error's code and message; its source is the error, see [`Error::of`].
    fn from(error: Error) -> Self {
        let mut status = Status::new(error.code(), error.to_string());
        status.set_source(Arc::new(error));
        status
    }
}

// === impl Peer ===

impl Peer {
    /// A peer of this name; the generation is 0 until [`Peer::with_generation`].
    pub fn new(
        role: impl Into<Arc<str>>,
        id: impl Into<Arc<str>>,
        address: impl Into<Arc<str>>,
    ) -> Self {
        Self {
            role: role.into(),
            id: id.into(),
            address: address.into(),
            generation: 0,
        }
    }

    /// The same with its generation.
    #[must_use]
    pub fn with_generation(mut self, generation: u64) -> Self {
        self.generation = generation;
        self
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.role, self.id)?;
        if !self.address.is_empty() && self.address != self.id {
            write!(f, " at {}", self.address)?;
        }
        Ok(())
    }
}

/// The gRPC code of a stream reset, after
/// [PROTOCOL-HTTP2.md](https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md#errors).
#[cfg(feature = "transport")]
fn code_of_reset(reason: h2::Reason) -> Code {
    match reason {
        h2::Reason::NO_ERROR
        | h2::Reason::PROTOCOL_ERROR
        | h2::Reason::INTERNAL_ERROR
        | h2::Reason::FLOW_CONTROL_ERROR
        | h2::Reason::SETTINGS_TIMEOUT
        | h2::Reason::FRAME_SIZE_ERROR
        | h2::Reason::COMPRESSION_ERROR
        | h2::Reason::CONNECT_ERROR => Code::Internal,
        h2::Reason::REFUSED_STREAM => Code::Unavailable,
        h2::Reason::CANCEL => Code::Cancelled,
        h2::Reason::ENHANCE_YOUR_CALM => Code::ResourceExhausted,
        h2::Reason::INADEQUATE_SECURITY => Code::PermissionDenied,
        _ => Code::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    fn refused() -> SharedError {
        Arc::new(std::io::Error::from(std::io::ErrorKind::ConnectionRefused))
    }

    #[test]
    fn nothing_registered_reads_otherwise_than_nothing_connected() {
        let role: Arc<str> = "echo".into();
        let none = Error::new(Kind::NoSession).with_role(&role);
        assert_eq!(none.to_string(), "no session of role echo is registered");

        let now = Instant::now();
        let trouble = |port: u16| Trouble {
            peer: Arc::new(Peer::new("echo", "a", format!("10.0.0.5:{port}"))),
            state: "offline",
            attempts: 4,
            last: Some((now, refused())),
        };
        let down = Error::new(Kind::NotConnected)
            .with_role(&role)
            .unready(3, vec![trouble(1), trouble(2)]);
        let text = down.to_string();
        assert!(
            text.starts_with(
                "role echo: 3 sessions are known, none is connected: 10.0.0.5:1 (id a) connection refused (4 attempts, last "
            ),
            "{text}"
        );
        assert!(text.ends_with("; and 1 more"), "{text}");
    }

    #[test]
    fn a_status_carries_code_message_and_the_error_itself() {
        let peer = Arc::new(Peer::new("echo", "7", "10.0.0.5:21123"));
        let error = Error::new(Kind::SessionDeleted)
            .with_sent(Sent::Sent)
            .with_peer(&peer);
        // As a generated client does it: the boxed error of the service becomes a status.
        let status = Status::from_error(Box::new(error));
        assert_eq!(status.code(), Code::Unavailable);
        assert_eq!(
            status.message(),
            "session deleted, echo 7 at 10.0.0.5:21123"
        );
        let back = Error::of(&status).expect("the error is in the status's sources");
        assert_eq!(back.kind(), Kind::SessionDeleted);
        assert_eq!(back.sent(), Sent::Sent);
        assert_eq!(back.peer().map(|p| &*p.id), Some("7"));
    }

    #[test]
    fn an_error_is_found_under_the_boxes_of_other_layers() {
        #[derive(Debug)]
        struct Wrapped(BoxError);
        impl fmt::Display for Wrapped {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("wrapped")
            }
        }
        impl StdError for Wrapped {
            fn source(&self) -> Option<&(dyn StdError + 'static)> {
                Some(&*self.0)
            }
        }
        let wrapped = Wrapped(Box::new(Error::new(Kind::NoSession)));
        let status = Status::from_error(Box::new(wrapped));
        assert_eq!(status.code(), Code::Unavailable);
        assert_eq!(Error::of(&status).map(Error::kind), Some(Kind::NoSession));
    }

    #[test]
    fn the_code_of_a_wrapped_service_is_its_own() {
        let inner = Status::resource_exhausted("full");
        let error = Error::from_service(Box::new(inner));
        assert_eq!(error.kind(), Kind::Service);
        assert_eq!(error.code(), Code::ResourceExhausted);
        assert_eq!(error.to_string(), "call failed: full");
    }

    #[test]
    fn causes_are_told_once() {
        let io = std::io::Error::other("no route");
        let error = Error::new(Kind::ConnectionLost).with_source(io);
        assert_eq!(error.to_string(), "connection lost: no route");
        assert_eq!(Status::from(error).message(), "connection lost: no route");
        // As a generated client inside hands it on; "ago" differs each time that it is put into words.
        let ago = Instant::now();
        let unready = Error::new(Kind::NotConnected).unready(
            1,
            vec![Trouble {
                peer: Arc::new(Peer::new("etcd", "h:1", "h:1")),
                state: "offline",
                attempts: 1,
                last: Some((ago, refused())),
            }],
        );
        let status = Status::from(unready);
        std::thread::sleep(std::time::Duration::from_millis(3));
        let text = Error::new(Kind::RegistryUnreachable)
            .with_source(status)
            .to_string();
        assert_eq!(text.matches("h:1").count(), 1, "{text}");
    }
}
