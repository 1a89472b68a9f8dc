//! How many connections to have: pure, with the time as an argument.

use std::time::Duration;

use tokio::{
    runtime::{Handle, RuntimeFlavor},
    time::Instant,
};

use crate::transport::core::CROWD;

/// What a connector says of how many connections a peer may have, and for how long.
#[derive(Clone, Copy, Debug)]
pub(in crate::transport) struct Size {
    pub(in crate::transport) most: usize,
    pub(in crate::transport) spare_for: Duration,
    pub(in crate::transport) max_age: Option<Duration>,
}

/// What is seen of the connections at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seen {
    /// How many take calls.
    pub(super) connections: usize,
    /// How many calls they have.
    pub(super) streams: usize,
    /// How many streams each may have, as far as is known.
    pub(super) streams_each: usize,
    /// A call has found all streams in use since the last look.
    pub(super) full: bool,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    More,
    Fewer,
    /// As it is, and when to look again unless there are news.
    Same(Option<Instant>),
}

/// Follows what is seen.
#[derive(Debug)]
pub(super) struct Sizing {
    size: Size,
    /// How many are worth having for the sake of threads.
    worth: usize,
    /// How many looks in a row have found a crowd.
    crowds: u32,
    /// Since when fewer would have done.
    spare_since: Option<Instant>,
}

/// A crowd counts when it is there at this many looks in a row, this far apart.
const CROWDS: u32 = 4;
const CROWD_LOOK: Duration = Duration::from_millis(5);

/// How far apart looks are that find out whether fewer would do, as a part of the time for which they have to.
const SPARE_LOOKS: u32 = 30;

/// How far ages are spread, to each side: as gRPC's servers do with theirs
/// ([gRFC A9](https://github.com/grpc/proposal/blob/master/A9-server-side-conn-mgt.md)).
const JITTER: f64 = 0.1;

// === impl Size ===

impl Size {
    /// How old a connection gets that is made now.
    pub(super) fn age(&self) -> Option<Duration> {
        let spread = 1.0 + JITTER * (2.0 * fastrand::f64() - 1.0);
        self.max_age.map(|age| age.mul_f64(spread))
    }
}

// === impl Sizing ===

impl Sizing {
    /// On the runtime where it is called.
    pub(super) fn new(size: Size) -> Self {
        let runtime = Handle::current();
        // Calls on one thread never meet at a connection's lock.
        let threads = match runtime.runtime_flavor() {
            RuntimeFlavor::CurrentThread => 1,
            _ => runtime.metrics().num_workers(),
        };
        Self::with_threads(size, threads)
    }

    fn with_threads(size: Size, threads: usize) -> Self {
        Self {
            worth: size.most.min(threads),
            size,
            crowds: 0,
            spare_since: None,
        }
    }

    /// Whether a crowd would call for another.
    pub(super) fn minds_crowds(&self, connections: usize) -> bool {
        self.crowds == 0 && connections < self.worth
    }

    /// What follows from what is seen now.
    pub(super) fn look(&mut self, seen: Seen, crowd: bool, now: Instant) -> Need {
        if seen.full && seen.connections < self.size.most {
            self.crowds = 0;
            self.spare_since = None;
            return Need::More;
        }
        let mut next = None;
        // Calm => crowded => (crowded | More)
        if seen.connections < self.worth && (crowd || self.crowds > 0) {
            if seen.streams > CROWD * seen.connections {
                self.crowds += 1;
                next = Some(now + CROWD_LOOK);
            } else {
                self.crowds = 0;
            }
            if self.crowds >= CROWDS {
                self.crowds = 0;
                self.spare_since = None;
                return Need::More;
            }
        } else {
            self.crowds = 0;
        }
        // Needed => spare => (spare | Fewer)
        if seen.connections < 2 || seen.full || !self.fewer_would_do(seen) {
            self.spare_since = None;
        } else {
            let since = *self.spare_since.get_or_insert(now);
            if now.duration_since(since) >= self.size.spare_for {
                self.spare_since = None;
                return Need::Fewer;
            }
        }
        if seen.connections > 1 {
            let spare = now + self.size.spare_for / SPARE_LOOKS;
            next = Some(next.map_or(spare, |next| next.min(spare)));
        }
        Need::Same(next)
    }

    /// Whether one less would be half empty.
    fn fewer_would_do(&self, seen: Seen) -> bool {
        let comfort = match seen.connections <= self.worth {
            true => seen.streams_each.min(CROWD),
            false => seen.streams_each,
        };
        let room = comfort.saturating_mul(seen.connections - 1);
        seen.streams <= room / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPARE: Duration = Duration::from_secs(30);

    /// With so many connections at most, on so many threads.
    fn sizing(most: usize, threads: usize) -> Sizing {
        let size = Size {
            most,
            spare_for: SPARE,
            max_age: None,
        };
        Sizing::with_threads(size, threads)
    }

    fn seen(connections: usize, streams: usize) -> Seen {
        Seen {
            connections,
            streams,
            streams_each: usize::MAX,
            full: false,
        }
    }

    /// Looks as often as it asks to, until it needs something or this long has passed.
    fn until(sizing: &mut Sizing, seen: Seen, crowd: bool, limit: Duration) -> (Need, Duration) {
        let began = Instant::now();
        let mut now = began;
        let mut need = sizing.look(seen, crowd, now);
        while let Need::Same(Some(next)) = need {
            if next - began > limit {
                break;
            }
            now = next;
            need = sizing.look(seen, false, now);
        }
        (need, now - began)
    }

    #[test]
    fn a_full_house_needs_more_at_once_up_to_the_most() {
        let full = |connections| Seen {
            full: true,
            streams_each: 100,
            ..seen(connections, 100 * connections)
        };
        // On one thread as well.
        let mut sizing = sizing(3, 1);
        for (connections, need) in [(1, true), (2, true), (3, false), (4, false)] {
            let is = sizing.look(full(connections), false, Instant::now());
            assert_eq!(is == Need::More, need, "{connections}: {is:?}");
        }
    }

    #[test]
    fn a_crowd_needs_more_when_it_stays_and_as_many_as_there_are_threads() {
        let crowd = |connections: usize| seen(connections, (CROWD + 1) * connections);
        let more = |most, threads, connections| {
            let mut sizing = sizing(most, threads);
            let (need, after) = until(&mut sizing, crowd(connections), true, SPARE);
            (need == Need::More).then_some(after)
        };
        let soon = Some((CROWDS - 1) * CROWD_LOOK);
        assert_eq!(more(4, 2, 1), soon);
        assert_eq!(more(4, 2, 2), None);
        assert_eq!(more(4, 8, 3), soon);
        assert_eq!(more(4, 8, 4), None);
        assert_eq!(more(4, 1, 1), None);
        // One that is gone at the next look does not.
        let mut sizing = sizing(4, 2);
        let now = Instant::now();
        assert!(matches!(
            sizing.look(crowd(1), true, now),
            Need::Same(Some(_))
        ));
        assert!(!sizing.minds_crowds(1));
        assert_eq!(sizing.look(seen(1, CROWD), false, now), Need::Same(None));
        assert!(sizing.minds_crowds(1));
        // Nor does what was none when it was told.
        assert_eq!(sizing.look(crowd(1), false, now), Need::Same(None));
    }

    #[test]
    fn fewer_would_do_when_the_others_are_half_empty_for_long() {
        let fewer = |connections, streams, streams_each| {
            let mut sizing = sizing(8, 4);
            let seen = Seen {
                streams_each,
                ..seen(connections, streams)
            };
            let (need, after) = until(&mut sizing, seen, false, 2 * SPARE);
            assert!(after >= SPARE || need != Need::Fewer, "{after:?}");
            need == Need::Fewer
        };
        let none = usize::MAX;
        for (connections, streams, each, expected) in [
            (1, 0, none, false),
            (2, 0, none, true),
            // Opened for threads: the other one's comfort is a crowd less.
            (2, CROWD / 2, none, true),
            (2, CROWD / 2 + 1, none, false),
            (4, 3 * CROWD / 2, none, true),
            (4, 3 * CROWD / 2 + 1, none, false),
            // A peer that allows less.
            (4, 6, 4, true),
            (4, 7, 4, false),
            // More than there are threads: they were opened for their streams alone.
            (5, 200, 100, true),
            (5, 201, 100, false),
        ] {
            let is = fewer(connections, streams, each);
            assert_eq!(is, expected, "{connections}, {streams}, {each}");
        }
    }

    #[test]
    fn what_is_needed_in_between_is_not_spare() {
        let mut sizing = sizing(4, 2);
        let began = Instant::now();
        let at = |part: u32| began + SPARE * part / 10;
        assert_ne!(sizing.look(seen(2, 0), false, at(0)), Need::Fewer);
        assert_ne!(sizing.look(seen(2, 60), false, at(8)), Need::Fewer);
        assert_ne!(sizing.look(seen(2, 0), false, at(9)), Need::Fewer);
        assert_ne!(sizing.look(seen(2, 0), false, at(18)), Need::Fewer);
        assert_eq!(sizing.look(seen(2, 0), false, at(19)), Need::Fewer);
    }

    #[test]
    fn ages_are_spread_by_a_tenth_to_each_side() {
        let size = Size {
            most: 1,
            spare_for: SPARE,
            max_age: Some(Duration::from_secs(100)),
        };
        let ages: Vec<_> = (0..1_000).filter_map(|_| size.age()).collect();
        let [least, most] =
            [ages.iter().min(), ages.iter().max()].map(|age| age.unwrap().as_secs_f64());
        assert!(
            (90.0..92.0).contains(&least) && (108.0..=110.0).contains(&most),
            "{least}, {most}"
        );
    }
}
