//! The bucket of a target that fails.

use std::sync::atomic::{AtomicU32, Ordering};

use super::Throttling;
use crate::sync::Padded;

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
    /// A full one.
    pub(crate) const fn new(throttling: Throttling) -> Self {
        Self {
            throttling,
            tokens: Padded(AtomicU32::new(throttling.max_tokens)),
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

    const fn is_enough(&self, tokens: u32) -> bool {
        tokens > self.throttling.max_tokens / 2
    }
}
