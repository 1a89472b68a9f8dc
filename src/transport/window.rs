//! Flow-control windows that follow the path: as large as what is under way in a round trip, and no larger.
//!
//! A window that is smaller keeps a large answer waiting for leave to go on; one that is larger has it queue before the
//! answers of other calls. The estimate is that of gRPC's own clients ("BDP estimation", in grpc-go's `bdp_estimator.go`): the peer
//! is pinged while much comes; if most of a window came before its answer did, at a higher rate than ever, the window
//! may be what limits it, and becomes twice that. Theirs goes on growing where all that grows is the queue, and with it the time of
//! each ping; ours is twice what would have come without one, as BBR has it (Cardwell and others, 2016).

use std::{
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{self, Instant},
};

/// What HTTP/2 has where nothing is said.
pub(super) const LEAST: u32 = 65_535;

/// How much of the window has to have come, and by how much more than that the next is larger: grpc-go's beta and gamma.
const MOST_OF_IT: f64 = 0.66;
const GROWTH: f64 = 2.0;

/// By how much a rate has to be higher than ever: a window twice as large that does not even do that was not what limited it.
const HIGHER: f64 = 1.1;

/// Over so much more than the shortest round trip a longer one is a queue; and over so long, however near the peer is: a thread
/// that has to wait for its turn is no queue yet.
const QUEUED: u32 = 2;
const NEAR: Duration = Duration::from_micros(500);

/// How long there is no other sample after one that changed nothing: twice as long each time, from the one to the other.
const LULL: Duration = Duration::from_millis(10);
const LONGEST_LULL: Duration = Duration::from_secs(1);

/// No sample is due.
const NEVER: u64 = u64::MAX;

/// What a connection's socket, its task and that of its pings share of it.
#[derive(Debug)]
pub(super) struct Window {
    most: u32,
    /// How much was read, ever; the socket's alone to write.
    read: AtomicU64,
    /// At how much of that the next sample is due.
    due: AtomicU64,
    is_due: Notify,
    /// What it is to become, or 0.
    next: AtomicU32,
}

/// What samples have shown.
#[derive(Debug)]
pub(super) struct Estimate {
    window: u32,
    most: u32,
    /// Bytes a second, at most.
    rate: f64,
    round_trip: Duration,
    lull: Duration,
    not_before: Option<Instant>,
}

// === impl Window ===

impl Window {
    /// Up to this.
    pub(super) fn new(most: u32) -> Self {
        Self {
            most,
            read: AtomicU64::new(0),
            due: AtomicU64::new(u64::from(LEAST) / 2),
            is_due: Notify::new(),
            next: AtomicU32::new(0),
        }
    }

    /// So many bytes were read.
    pub(super) fn read(&self, bytes: usize) {
        let read = self.read.load(Ordering::Relaxed) + bytes as u64;
        self.read.store(read, Ordering::Relaxed);
        if read >= self.due.load(Ordering::Relaxed) {
            self.due.store(NEVER, Ordering::Relaxed);
            self.is_due.notify_one();
        }
    }

    pub(super) fn so_far(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    pub(super) fn estimate(&self) -> Estimate {
        Estimate {
            window: LEAST.min(self.most),
            most: self.most,
            rate: 0.0,
            round_trip: Duration::MAX,
            lull: LULL,
            not_before: None,
        }
    }

    /// Until so much has come that another sample may show something. Cancel safe but for the lull, which is begun anew.
    pub(super) async fn sample_due(&self, estimate: &Estimate) {
        self.is_due.notified().await;
        if let Some(not_before) = estimate.not_before {
            time::sleep_until(not_before).await;
        }
    }

    /// What came while the peer was asked for its answer, which took so long.
    pub(super) fn sampled(&self, estimate: &mut Estimate, bytes: u64, took: Duration) {
        if let Some(window) = estimate.sample(bytes, took) {
            self.next.store(window, Ordering::Relaxed);
        }
        if estimate.window < self.most {
            let due = self.so_far() + u64::from(estimate.window) / 2;
            self.due.store(due, Ordering::Relaxed);
        }
    }

    /// What it is to become, once.
    pub(super) fn take_next(&self) -> Option<u32> {
        match self.next.load(Ordering::Relaxed) {
            0 => None,
            _ => Some(self.next.swap(0, Ordering::Relaxed)),
        }
    }

    /// That could not be done yet; unless there is another by now.
    pub(super) fn put_back(&self, window: u32) {
        let _ = self
            .next
            .compare_exchange(0, window, Ordering::Relaxed, Ordering::Relaxed);
    }
}

// === impl Estimate ===

impl Estimate {
    /// What the window is to become, if so many bytes in a round trip of so long show that it limits them.
    fn sample(&mut self, bytes: u64, took: Duration) -> Option<u32> {
        let took = took.max(Duration::from_micros(1));
        let rate = bytes as f64 / took.as_secs_f64();
        self.round_trip = self.round_trip.min(took);
        let without_queue = (QUEUED * self.round_trip).max(NEAR).min(took);
        let bytes = bytes as f64;
        let window = f64::from(self.window);
        let limits = bytes >= MOST_OF_IT * window && rate > HIGHER * self.rate;
        self.rate = self.rate.max(rate);
        let next = GROWTH * rate * without_queue.as_secs_f64();
        let next = next.min(f64::from(self.most)) as u32;
        if !limits || next <= self.window {
            self.not_before = Some(Instant::now() + self.lull);
            self.lull = (2 * self.lull).min(LONGEST_LULL);
            return None;
        }
        self.window = next;
        self.lull = LULL;
        self.not_before = None;
        Some(next)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MOST: u32 = 2 << 20;

    /// A path that carries so many bytes a second, and so far.
    fn settles_at(rate: f64, round_trip: Duration) -> u32 {
        let window = Window::new(MOST);
        let mut estimate = window.estimate();
        for _ in 0..100 {
            // A window each round trip, which is longer by what queues.
            let took = round_trip
                .as_secs_f64()
                .max(f64::from(estimate.window) / rate);
            // A little more each time, as a rate is never quite the same.
            let took = took * (1.0 - 0.001 * fastrand::f64());
            estimate.sample(estimate.window.into(), Duration::from_secs_f64(took));
        }
        estimate.window
    }

    #[tokio::test]
    async fn it_grows_to_what_is_under_way_and_not_to_many_times_that() {
        for (rate, milliseconds) in [(10e6, 1), (10e6, 20), (50e6, 5), (100e6, 1), (100e6, 5)] {
            let round_trip = Duration::from_millis(milliseconds);
            let under_way = rate * round_trip.as_secs_f64();
            let settled = f64::from(settles_at(rate, round_trip));
            let least = under_way.min(f64::from(MOST));
            let most = (4.1 * under_way).max(2.1 * f64::from(LEAST));
            assert!(
                settled >= least && settled <= most,
                "{rate} at {round_trip:?}: {settled}"
            );
        }
        // And not beyond its bound.
        assert_eq!(settles_at(1e9, Duration::from_millis(50)), MOST);
    }

    #[tokio::test(start_paused = true)]
    async fn a_sample_is_due_when_much_has_come_and_less_often_where_nothing_changes() {
        let window = Window::new(MOST);
        let mut estimate = window.estimate();
        let due = async |estimate: &Estimate, within| {
            time::timeout(within, window.sample_due(estimate))
                .await
                .is_ok()
        };
        // Small answers are no reason
        window.read(1000);
        assert!(!due(&estimate, LULL).await);
        window.read(40_000);
        assert!(due(&estimate, LULL).await);
        // And after a sample that shows nothing there is a lull, longer each time.
        for n in 0..10 {
            window.sampled(&mut estimate, 10, LULL);
            assert_eq!(window.take_next(), None);
            window.read(100_000);
            let lull = (LULL * 2u32.pow(n)).min(LONGEST_LULL);
            let began = Instant::now();
            assert!(due(&estimate, 2 * LONGEST_LULL).await);
            let took = began.elapsed();
            assert!(took >= lull && took < lull + LULL, "{n}: {took:?}");
        }
        // One that does has none after it
        window.sampled(&mut estimate, 60_000, LULL / 10);
        assert_eq!(window.take_next(), Some(120_000));
        assert_eq!(window.take_next(), None);
        window.read(100_000);
        assert!(due(&estimate, LULL / 10).await);
        // And at its bound there is none at all.
        window.sampled(&mut estimate, 4 << 20, LULL / 100);
        assert_eq!(window.take_next(), Some(MOST));
        window.read(1 << 30);
        assert!(!due(&estimate, 10 * LONGEST_LULL).await);
    }

    #[test]
    fn what_could_not_be_done_is_kept_unless_there_is_another() {
        let window = Window::new(MOST);
        window.put_back(100_000);
        assert_eq!(window.take_next(), Some(100_000));
        window.next.store(300_000, Ordering::Relaxed);
        window.put_back(100_000);
        assert_eq!(window.take_next(), Some(300_000));
    }

    proptest! {
        #[test]
        fn it_never_shrinks_and_never_passes_its_bound(
            most in LEAST..=i32::MAX as u32,
            samples in prop::collection::vec((any::<u64>(), any::<u32>()), 0..50),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
            let _entered = runtime.enter();
            let mut estimate = Window::new(most).estimate();
            for (bytes, micros) in samples {
                let before = estimate.window;
                let next = estimate.sample(bytes, Duration::from_micros(micros.into()));
                prop_assert!(estimate.window >= before && estimate.window <= most);
                prop_assert!(next.is_none_or(|next| next == estimate.window && next > before));
            }
        }
    }
}
