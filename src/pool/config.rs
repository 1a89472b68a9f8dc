//! How a pool dials and waits, and how many calls it lets in.

use std::time::Duration;

#[cfg(doc)]
use super::WaitForReady;
#[cfg(doc)]
use crate::error::Kind;
use crate::{Backoff, backoff::check_duration, endpoint::Dialing, error::Error};

/// How a pool's endpoints dial, how long its calls wait, and how many there may be.
///
/// ```
/// use std::time::Duration;
/// use switchboard::{Backoff, pool::PoolConfig};
///
/// let config = PoolConfig::default()
///     .attempt_timeout(Duration::from_secs(5))?
///     .attempts(5)?
///     .probe(None);
/// # Ok::<(), switchboard::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct PoolConfig {
    attempt_timeout: Duration,
    attempts: u32,
    backoff: Backoff,
    probe: Option<Backoff>,
    pub(crate) drain: Duration,
    pub(super) max_dials: usize,
    pub(super) max_in_flight: Option<usize>,
    pub(super) max_in_flight_per_peer: Option<usize>,
    pub(super) max_waiting: usize,
    pub(crate) max_wait: Duration,
    pub(crate) wait_for_ready: bool,
}

// === impl PoolConfig ===

impl PoolConfig {
    /// How long one attempt to connect an instance may take, name resolution included. Default 30 s; 1 ms to 10 min. Further
    /// connections to one that is connected have 20 s, see
    /// [`max_connections`](crate::transport::Connector::max_connections).
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] outside these bounds.
    pub fn attempt_timeout(mut self, timeout: Duration) -> Result<Self, Error> {
        let (least, most) = (Duration::from_millis(1), Duration::from_secs(600));
        self.attempt_timeout = check_duration("attempt timeout", timeout, least, most)?;
        Ok(self)
    }

    /// How many attempts in a row fail before an endpoint is offline. Default 3; 1 to 1,000.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] outside these bounds.
    pub fn attempts(mut self, attempts: u32) -> Result<Self, Error> {
        if !(1..=1000).contains(&attempts) {
            let why = format!("{attempts} is not between 1 and 1,000");
            return Err(Error::invalid("attempts", why));
        }
        self.attempts = attempts;
        Ok(self)
    }

    /// The delays between attempts. Default gRPC's: 1 s × 1.6, ± 20 %, at most 120 s.
    ///
    /// Its first delay is also how long a connection must have lived for its loss to be repaired at
    /// once every time; one that breaks sooner is dialled at once but one time, then with backoff.
    #[must_use]
    pub const fn backoff(mut self, backoff: Backoff) -> Self {
        self.backoff = backoff;
        self
    }

    /// How often an offline endpoint is tried again with no word from discovery, if at all. Default every
    /// 30 s ± 20 %: a server that merely opened its port late gets no new event.
    #[must_use]
    pub const fn probe(mut self, probe: Option<Backoff>) -> Self {
        self.probe = probe;
        self
    }

    /// How long calls in flight may take to finish once a session that was stopping is gone, before its
    /// connection is closed. Default 30 s; up to one day.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] outside these bounds.
    pub fn drain(mut self, bound: Duration) -> Result<Self, Error> {
        self.drain = check_duration("drain bound", bound, Duration::ZERO, Backoff::LONGEST)?;
        Ok(self)
    }

    /// How many endpoints of a pool may be dialling at once; the others wait for their turn, and their attempt's time
    /// begins with it. Default 64; 1 to 10,000.
    ///
    /// It keeps thousands of handshakes from going on at the same moment. A dial that has gone unanswered for
    /// 500 ms costs nothing but its socket and does not count any longer, so that peers that are silent do not hold
    /// up those that answer: however many they are, 128 a second have their turn.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] outside these bounds.
    pub fn max_dials(mut self, dials: usize) -> Result<Self, Error> {
        if !(1..=10_000).contains(&dials) {
            let why = format!("{dials} is not between 1 and 10,000");
            return Err(Error::invalid("dials at once", why));
        }
        self.max_dials = dials;
        Ok(self)
    }

    /// How long a call waits for a ready endpoint when its own deadline is later, or missing. Default
    /// 30 s; up to one day. Zero means that no call ever waits. Of a call that is made again it bounds each attempt's wait.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] outside these bounds.
    pub fn max_wait(mut self, bound: Duration) -> Result<Self, Error> {
        self.max_wait = check_duration("longest wait", bound, Duration::ZERO, Backoff::LONGEST)?;
        Ok(self)
    }

    /// Whether calls that do not say ([`WaitForReady`]) wait for a ready endpoint. Default no: they fail fast.
    #[must_use]
    pub const fn wait_for_ready(mut self, wait: bool) -> Self {
        self.wait_for_ready = wait;
        self
    }

    /// How many calls of the role may be in flight at once, all peers together, from their sending to the end of their
    /// response. One more fails at once with [`Kind::Limit`], *unsent*; it neither waits nor is repeated. Default `None`: any
    /// number. 1 to 1,000,000.
    ///
    /// This is gRPC's circuit breaking ([A32](https://github.com/grpc/proposal/blob/master/A32-xds-circuit-breaking.md)). All
    /// threads write one count for it, and wait for each other's writes.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] outside these bounds.
    pub fn max_in_flight(mut self, calls: Option<usize>) -> Result<Self, Error> {
        self.max_in_flight = check_limit("calls in flight", calls)?;
        Ok(self)
    }

    /// The same for each peer: a call goes to another one that has room, and fails if there is none, or if it is pinned.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] outside these bounds.
    pub fn max_in_flight_per_peer(mut self, calls: Option<usize>) -> Result<Self, Error> {
        self.max_in_flight_per_peer = check_limit("calls in flight at a peer", calls)?;
        Ok(self)
    }

    /// How many calls of the role may wait at once for an endpoint, or for room at one. One more fails at once with
    /// [`Kind::Limit`], *unsent*. It bounds what an outage costs in memory. Default 65,536; zero means that no call ever waits.
    #[must_use]
    pub const fn max_waiting(mut self, calls: usize) -> Self {
        self.max_waiting = calls;
        self
    }

    pub(crate) const fn dialing(&self) -> Dialing {
        Dialing {
            attempt_timeout: self.attempt_timeout,
            attempts: self.attempts,
            backoff: self.backoff,
            probe: self.probe,
            drain: self.drain,
            max_in_flight: self.max_in_flight_per_peer,
        }
    }
}

fn check_limit(what: &'static str, limit: Option<usize>) -> Result<Option<usize>, Error> {
    match limit {
        Some(calls) if !(1..=1_000_000).contains(&calls) => {
            let why = format!("{calls} is not between 1 and 1,000,000");
            Err(Error::invalid(what, why))
        }
        limit => Ok(limit),
    }
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            attempt_timeout: Duration::from_secs(30),
            attempts: 3,
            backoff: Backoff::default(),
            probe: Backoff::constant(Duration::from_secs(30), 0.2).ok(),
            drain: Duration::from_secs(30),
            max_dials: 64,
            max_in_flight: None,
            max_in_flight_per_peer: None,
            max_waiting: 65_536,
            max_wait: Duration::from_secs(30),
            wait_for_ready: false,
        }
    }
}
