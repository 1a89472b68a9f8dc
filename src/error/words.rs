//! Errors in words.
//!
//! tonic shows a status's message and not its sources, so everything stands in the message: the role, the
//! peer, the reason and the causes.

use std::{borrow::Cow, error::Error as StdError, fmt, sync::Arc};

use tokio::time::Instant;
use tonic::Status;

use super::{Error, Kind, Peer, SharedError};

/// Why, as far as it is known.
pub(super) enum Detail {
    None,
    Text(Cow<'static, str>),
    /// Sessions are known but none can take a call.
    Unready {
        known: usize,
        sample: Vec<Trouble>,
    },
    /// The one peer that was asked for cannot.
    Trouble(Trouble),
}

/// The state of a [`Trouble`] that is none: the peer is well, but takes no new calls.
pub(crate) const STOPPING: &str = "stopping";

/// The state of a peer that is connected, and says that it does not serve.
pub(crate) const NOT_SERVING: &str = "not serving";

/// Why a known peer could not take a call.
#[derive(Clone, Debug)]
pub(crate) struct Trouble {
    pub(crate) peer: Arc<Peer>,
    pub(crate) state: &'static str,
    pub(crate) attempts: u32,
    pub(crate) last: Option<(Instant, SharedError)>,
}

// === impl Error ===

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &*self.0;
        let role = self.role().unwrap_or("?");
        match inner.kind {
            Kind::Invalid => f.write_str("invalid argument")?,
            Kind::AlreadyRegistered => f.write_str("already registered")?,
            Kind::NoSession => write!(f, "no session of role {role} is registered")?,
            Kind::UnknownPeer => write!(f, "role {role}")?,
            Kind::NotConnected if inner.peer.is_some() => f.write_str("not connected")?,
            Kind::NotConnected => write!(f, "role {role}")?,
            // Without a role it is no call that failed, but a registration or the like.
            Kind::RegistryUnreachable => match self.role() {
                Some(role) => write!(f, "nothing is known of role {role}: registry unreachable")?,
                None => f.write_str("registry unreachable")?,
            },
            Kind::Busy => f.write_str("busy")?,
            Kind::Shut => f.write_str("gate shut")?,
            Kind::SessionDeleted => f.write_str("session deleted")?,
            Kind::ConnectionLost => f.write_str("connection lost")?,
            Kind::Refused => f.write_str("refused by the peer before processing")?,
            Kind::OtherInstance => f.write_str("another instance answers there")?,
            Kind::Reset => f.write_str("reset by the peer")?,
            Kind::DeadlineExceeded => f.write_str("deadline exceeded")?,
            Kind::Stopped => f.write_str("stopped")?,
            Kind::Limit => f.write_str("limit reached")?,
            Kind::Cancelled => f.write_str("cancelled")?,
            Kind::RequestBody => f.write_str("the request body failed")?,
            Kind::Internal => f.write_str("internal error")?,
            Kind::RegistryRefused => f.write_str("registry refused")?,
            Kind::Service => f.write_str("call failed")?,
            Kind::Component => f.write_str("component failed")?,
        }
        if let Some(peer) = &inner.peer {
            write!(f, ", {peer}")?;
        } else if let Some(role) = &inner.role
            && !matches!(
                inner.kind,
                Kind::NoSession
                    | Kind::UnknownPeer
                    | Kind::NotConnected
                    | Kind::RegistryUnreachable
            )
        {
            write!(f, ", role {role}")?;
        }
        match &inner.detail {
            Detail::None => {}
            detail => write!(f, ": {detail}")?,
        }
        // tonic prints a status's message and not its sources, so the causes stand in the message.
        let mut cause: Option<&(dyn StdError + 'static)> = match &inner.source {
            Some(source) => Some(&**source),
            None => None,
        };
        let mut last = String::new();
        while let Some(error) = cause {
            let text = match error.downcast_ref::<Status>() {
                Some(status) => status.message().to_owned(),
                None => error.to_string(),
            };
            // Many errors print their source themselves; saying it twice helps nobody.
            if !text.is_empty() && !last.contains(&text) {
                write!(f, ": {text}")?;
                last = text;
            }
            cause = match error.downcast_ref::<Self>() {
                Some(_) => None,
                // A status made from one of ours has its words already, as they were at that time.
                None if error.is::<Status>() => error.source().filter(|e| Self::of(*e).is_none()),
                None => error.source(),
            };
        }
        Ok(())
    }
}

// === impl Detail ===

impl fmt::Display for Detail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => Ok(()),
            Self::Text(text) => f.write_str(text),
            Self::Unready { known, sample } => {
                let stopping = !sample.is_empty() && sample.iter().all(|t| t.state == STOPPING);
                let unwell = !sample.is_empty() && sample.iter().all(|t| t.state == NOT_SERVING);
                match known {
                    1 if unwell => f.write_str("1 session is known, it does not serve: ")?,
                    n if unwell => write!(f, "{n} sessions are known, none serves: ")?,
                    1 if stopping => f.write_str("the 1 session that is known is stopping: ")?,
                    n if stopping => write!(f, "all {n} sessions that are known are stopping: ")?,
                    1 => f.write_str("1 session is known, it is not connected: ")?,
                    n => write!(f, "{n} sessions are known, none is connected: ")?,
                }
                for (i, trouble) in sample.iter().enumerate() {
                    if i > 0 {
                        f.write_str("; ")?;
                    }
                    write!(f, "{} {trouble}", trouble.name())?;
                }
                match known.saturating_sub(sample.len()) {
                    0 => Ok(()),
                    more => write!(f, "; and {more} more"),
                }
            }
            Self::Trouble(trouble) => trouble.fmt(f),
        }
    }
}

// === impl Trouble ===

impl Trouble {
    pub(crate) fn name(&self) -> String {
        let Peer { id, address, .. } = &*self.peer;
        match address.is_empty() || address == id {
            true => id.to_string(),
            false => format!("{address} (id {id})"),
        }
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.last {
            None => f.write_str(self.state),
            Some((at, error)) => {
                let ago = at.elapsed();
                write!(f, "{} (", Brief(&**error))?;
                match self.attempts {
                    0 => {}
                    1 => f.write_str("1 attempt, ")?,
                    n => write!(f, "{n} attempts, ")?,
                }
                match ago.as_secs() {
                    0 => write!(f, "last {} ms ago)", ago.as_millis()),
                    s => write!(f, "last {s} s ago)"),
                }
            }
        }
    }
}

/// Why a connection is not there, where that it is not is already said: "connection refused" for
/// "connection lost: connection refused". One line, whatever somebody's error has in it.
pub(crate) struct Brief<'a>(pub(crate) &'a (dyn StdError + 'static));

impl fmt::Display for Brief<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.0.to_string();
        let brief = match self.0.downcast_ref::<Error>() {
            Some(error) if error.kind() == Kind::ConnectionLost => {
                text.strip_prefix("connection lost: ").unwrap_or(&text)
            }
            _ => &text,
        };
        for (n, line) in brief.split(char::is_control).enumerate() {
            f.write_str(if n == 0 { "" } else { " " })?;
            f.write_str(line)?;
        }
        Ok(())
    }
}

/// Quoted, and cut so that a message stays readable.
pub(crate) fn shown(text: &str) -> String {
    match text.char_indices().nth(80) {
        None => format!("{text:?}"),
        Some((cut, _)) => format!("{:?}... ({} bytes)", &text[..cut], text.len()),
    }
}
