//! How often peers are pinged that have said that it is too often.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// The keepalive intervals of peers that mind shorter ones, by their addresses; all clones of a connector share it.
///
/// gRPC's servers close a connection on which they are pinged more often than they allow, with a GOAWAY that says
/// `too_many_pings`. Each such word doubles the interval of later connections to that address, as
/// [gRFC A8](https://github.com/grpc/proposal/blob/master/A8-client-side-keepalive.md) asks of clients; up to [`LONGEST`],
/// and until [`FORGET`] has passed: another server may have that address by then.
#[derive(Clone, Default)]
pub(super) struct Polite(Arc<Mutex<HashMap<Box<str>, Asked>>>);

/// What a peer has asked for, and when it said so last.
#[derive(Clone, Copy, Debug)]
struct Asked {
    interval: Duration,
    at: Instant,
}

/// More than this, and all begin anew.
const MOST: usize = 4096;

/// The longest interval that a peer's word leads to: gRPC's servers allow a ping each 5 minutes unless they are configured
/// otherwise. A longer one would leave dead peers unnoticed.
const LONGEST: Duration = Duration::from_secs(600);

/// For how long a word counts.
const FORGET: Duration = Duration::from_secs(24 * 3600);

impl Polite {
    /// The interval for a new connection there.
    pub(super) fn interval(&self, address: &str, configured: Duration) -> Duration {
        self.interval_at(address, configured, Instant::now())
    }

    fn interval_at(&self, address: &str, configured: Duration, now: Instant) -> Duration {
        let asked = self.lock().get(address).and_then(|asked| asked.by(now));
        asked.map_or(configured, |asked| asked.max(configured))
    }

    /// The peer there minds being pinged so often. Of several connections that were pinged alike, all may say so.
    pub(super) fn minds(&self, address: &str, used: Duration) {
        self.minds_at(address, used, Instant::now());
    }

    fn minds_at(&self, address: &str, used: Duration, at: Instant) {
        let mut peers = self.lock();
        if peers.len() >= MOST && !peers.contains_key(address) {
            peers.clear();
        }
        let doubled = used.saturating_mul(2).min(LONGEST);
        let before = peers.get(address).and_then(|asked| asked.by(at));
        let interval = before.map_or(doubled, |before| before.max(doubled));
        peers.insert(address.into(), Asked { interval, at });
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Box<str>, Asked>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Asked ===

impl Asked {
    /// The interval, unless that is forgotten by now.
    fn by(&self, now: Instant) -> Option<Duration> {
        (now.saturating_duration_since(self.at) < FORGET).then_some(self.interval)
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
        polite.minds("a:1", LONGEST);
        assert_eq!(polite.interval("a:1", SECOND), LONGEST);
        assert_eq!(polite.interval("a:1", 2 * LONGEST), 2 * LONGEST);
    }

    #[test]
    fn what_a_peer_minded_long_ago_is_forgotten() {
        let polite = Polite::default();
        let now = Instant::now();
        polite.minds_at("a:1", 8 * SECOND, now);
        let then = |after| polite.interval_at("a:1", SECOND, now + after);
        assert_eq!(then(FORGET - SECOND), 16 * SECOND);
        assert_eq!(then(FORGET), SECOND);
        // It begins anew then.
        polite.minds_at("a:1", SECOND, now + FORGET);
        assert_eq!(then(FORGET), 2 * SECOND);
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
