//! The bucket of a target that fails.

use super::Throttling;
use crate::sync::{
    Padded,
    atomic::{AtomicU32, Ordering},
    const_fn,
};

/// One token, in thousandths.
const TOKEN: u32 = 1000;

/// A target's bucket.
///
/// One number, which each change takes from what it was to what it is by a compare-and-swap. Relaxed: nothing is read on the
/// strength of it, and of two calls that meet either may be first.
#[derive(Debug)]
pub(crate) struct Throttle {
    throttling: Throttling,
    tokens: Padded<AtomicU32>,
}

// === impl Throttle ===

impl Throttle {
    const_fn! {
        /// A full one.
        pub(crate) fn new(throttling: Throttling) -> Self {
            Self {
                throttling,
                tokens: Padded(AtomicU32::new(throttling.max_tokens)),
            }
        }
    }

    /// As full as another, as C-core has it when a configuration is replaced.
    pub(crate) fn like(other: &Self, throttling: Throttling) -> Self {
        let (tokens, max) = (
            other.tokens.load(Ordering::Relaxed),
            other.throttling.max_tokens,
        );
        let scaled = u64::from(tokens) * u64::from(throttling.max_tokens) / u64::from(max.max(1));
        let throttle = Self::new(throttling);
        // It is no more than the maximum, which fits.
        throttle.tokens.store(scaled as u32, Ordering::Relaxed);
        throttle
    }

    pub(crate) const fn throttling(&self) -> Throttling {
        self.throttling
    }

    /// Takes a token out, and tells whether there may be another attempt.
    pub(crate) fn failed(&self) -> bool {
        let take = |tokens: u32| Some(tokens.saturating_sub(TOKEN));
        let before = self
            .tokens
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        let (Ok(before) | Err(before)) = before;
        self.is_enough(before.saturating_sub(TOKEN))
    }

    /// Puts some back. A full bucket, as most are, is not written to.
    #[inline]
    pub(crate) fn succeeded(&self) {
        let Throttling {
            max_tokens,
            token_ratio,
        } = self.throttling;
        if self.tokens.load(Ordering::Relaxed) < max_tokens {
            let put = |tokens: u32| Some(tokens.saturating_add(token_ratio).min(max_tokens));
            let _ = self
                .tokens
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, put);
        }
    }

    /// Whether there may be another attempt.
    pub(crate) fn allows(&self) -> bool {
        self.is_enough(self.tokens.load(Ordering::Relaxed))
    }

    #[cfg(test)]
    pub(super) fn tokens(&self) -> u32 {
        self.tokens.load(Ordering::Relaxed)
    }

    const fn is_enough(&self, tokens: u32) -> bool {
        tokens > self.throttling.max_tokens / 2
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Failed,
        Succeeded,
    }

    proptest! {
        /// Against the rules as directly as they can be said.
        #[test]
        fn it_is_a_bucket(
            max in 1_u32..20,
            ratio in 1_u32..3000,
            steps in prop::collection::vec(prop_oneof![Just(Step::Failed), Just(Step::Succeeded)], 0..200),
        ) {
            let throttle = Throttle::new(Throttling::new(max, f64::from(ratio) / 1000.0).unwrap());
            let (max, ratio) = (i64::from(max) * 1000, i64::from(ratio));
            let mut tokens = max;
            for step in steps {
                match step {
                    Step::Failed => {
                        tokens = (tokens - 1000).max(0);
                        prop_assert_eq!(throttle.failed(), tokens * 2 > max);
                    }
                    Step::Succeeded => {
                        tokens = (tokens + ratio).min(max);
                        throttle.succeeded();
                    }
                }
                prop_assert_eq!(i64::from(throttle.tokens()), tokens);
                prop_assert_eq!(throttle.allows(), tokens * 2 > max);
            }
        }
    }

    #[test]
    fn another_configuration_leaves_it_as_full_as_it_was() {
        let before = Throttle::new(Throttling::new(10, 0.1).unwrap());
        for _ in 0..5 {
            before.failed();
        }
        let after = Throttle::like(&before, Throttling::new(100, 1.0).unwrap());
        assert_eq!(after.tokens(), 50_000);
        assert!(!after.allows());
    }

    #[test]
    fn of_the_ratio_three_decimals_count() {
        let ratio = |ratio| Throttling::new(1, ratio).unwrap().token_ratio;
        assert_eq!(
            [ratio(0.1), ratio(0.0019), ratio(2.9999), ratio(1000.0)],
            [100, 1, 2999, 1_000_000]
        );
        for bad in [0.0, -1.0, f64::NAN, 1e9] {
            Throttling::new(1, bad).unwrap_err();
        }
    }
}

#[cfg(all(test, switchboard_loom))]
mod loom_tests {
    use std::sync::Arc;

    use loom::thread;

    use super::*;
    use crate::sync::in_every_order;

    /// One of four tokens, of which a success puts back one, that has so many taken out.
    fn with_failures(failures: usize) -> Arc<Throttle> {
        let throttle = Throttle::new(Throttling::new(4, 1.0).unwrap());
        for _ in 0..failures {
            throttle.failed();
        }
        Arc::new(throttle)
    }

    #[test]
    fn of_calls_that_fail_at_once_each_takes_a_token_and_only_those_before_half_are_repeated() {
        in_every_order(|| {
            let throttle = with_failures(0);
            let fail = |throttle: Arc<Throttle>| thread::spawn(move || throttle.failed());
            let others = [fail(throttle.clone()), fail(throttle.clone())];
            let mine = throttle.failed();
            let repeated = others.map(|other| other.join().unwrap());
            let repeated = usize::from(mine) + repeated.into_iter().filter(|more| *more).count();
            // 3 of 4 are more than half, 2 and 1 are not
            assert_eq!((throttle.tokens(), repeated), (1000, 1));
        });
    }

    #[test]
    fn a_success_beside_a_failure_is_not_lost() {
        in_every_order(|| {
            let throttle = with_failures(2);
            let other = throttle.clone();
            let other = thread::spawn(move || other.succeeded());
            throttle.failed();
            other.join().unwrap();
            assert_eq!(throttle.tokens(), 2000);
        });
    }

    #[test]
    fn successes_at_once_never_put_back_more_than_was_taken_out() {
        in_every_order(|| {
            let throttle = with_failures(1);
            let succeed = |throttle: Arc<Throttle>| thread::spawn(move || throttle.succeeded());
            let others = [succeed(throttle.clone()), succeed(throttle.clone())];
            assert!(throttle.tokens() <= 4000);
            others.into_iter().for_each(|other| other.join().unwrap());
            assert_eq!(throttle.tokens(), 4000);
        });
    }
}
