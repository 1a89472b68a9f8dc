//! How often peers are pinged that have said that it is too often.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::Backoff;

/// The keepalive intervals of peers that mind shorter ones, by their addresses; all clones of a connector share it.
///
/// gRPC's servers close a connection on which they are pinged more often than they allow, with a GOAWAY that says
/// `too_many_pings`. Each such word doubles the interval of later connections to that address, as
/// [gRFC A8](https://github.com/grpc/proposal/blob/master/A8-client-side-keepalive.md) asks of clients; up to a day.
#[derive(Clone, Default)]
pub(super) struct Polite(Arc<Mutex<HashMap<Box<str>, Duration>>>);

/// More than this, and all begin anew.
const MOST: usize = 4096;

impl Polite {
    /// The interval for a new connection there.
    pub(super) fn interval(&self, address: &str, configured: Duration) -> Duration {
        match self.lock().get(address) {
            Some(asked) => configured.max(*asked),
            None => configured,
        }
    }

    /// The peer there minds being pinged so often. Of several connections that were pinged alike, all may say so.
    pub(super) fn minds(&self, address: &str, used: Duration) {
        let mut intervals = self.lock();
        if intervals.len() >= MOST && !intervals.contains_key(address) {
            intervals.clear();
        }
        let doubled = used.saturating_mul(2).min(Backoff::LONGEST);
        let interval = intervals.entry(address.into()).or_default();
        *interval = doubled.max(*interval);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Box<str>, Duration>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Polite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.lock().iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn each_word_doubles_the_interval_of_that_peer_alone() {
        let polite = Polite::default();
        assert_eq!(polite.interval("a:1", SECOND), SECOND);
        polite.minds("a:1", SECOND);
        // Another connection of the same interval says the same.
        polite.minds("a:1", SECOND);
        assert_eq!(polite.interval("a:1", SECOND), 2 * SECOND);
        assert_eq!(polite.interval("b:1", SECOND), SECOND);
        polite.minds("a:1", 2 * SECOND);
        assert_eq!(polite.interval("a:1", SECOND), 4 * SECOND);
        // One that is configured to be more patient stays so.
        assert_eq!(polite.interval("a:1", 9 * SECOND), 9 * SECOND);
        polite.minds("a:1", Backoff::LONGEST);
        assert_eq!(polite.interval("a:1", SECOND), Backoff::LONGEST);
    }

    #[test]
    fn a_great_many_peers_are_not_kept_in_mind_for_ever() {
        let polite = Polite::default();
        for n in 0..2 * MOST {
            polite.minds(&format!("10.0.0.1:{n}"), SECOND);
        }
        assert!(polite.lock().len() <= MOST);
        let last = format!("10.0.0.1:{}", 2 * MOST - 1);
        assert_eq!(polite.interval(&last, SECOND), 2 * SECOND);
    }
}
