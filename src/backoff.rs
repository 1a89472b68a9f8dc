//! How long to wait before trying again: an exponential schedule with jitter.
//!
//! Pure: it reads no clock and keeps no state of its own. The caller counts its failures and asks for
//! the delay that follows the n-th; the random part is an argument, so that tests need no luck.

use std::time::Duration;

use crate::error::{Error, Kind};

/// A validated exponential schedule: `initial × multiplier^n`, at most `max`, spread by `± jitter`.
///
/// The default is gRPC's connection backoff: 1 s × 1.6, ± 20 %, at most 120 s
/// ([connection-backoff.md](https://github.com/grpc/grpc/blob/master/doc/connection-backoff.md)).
///
/// ```
/// use std::time::Duration;
/// use switchboard::Backoff;
///
/// let backoff = Backoff::new(Duration::from_millis(100), 2.0, Duration::from_secs(1), 0.0)?;
/// assert_eq!(backoff.delay(0), Duration::from_millis(100));
/// assert_eq!(backoff.delay(2), Duration::from_millis(400));
/// assert_eq!(backoff.delay(99), Duration::from_secs(1));
/// # Ok::<(), switchboard::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Backoff {
    initial: Duration,
    multiplier: f64,
    max: Duration,
    jitter: f64,
}

impl Backoff {
    /// The longest `max` that is accepted: one day. Longer is "never", which is not a backoff.
    pub const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

    /// A schedule from `initial`, growing by `multiplier` at each failure up to `max`, each delay spread
    /// evenly over `± jitter` of itself.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] unless `1 ms ≤ initial ≤ max ≤ 1 day`, `1 ≤ multiplier ≤ 10` and
    /// `0 ≤ jitter < 1`. A shorter first delay would be a busy loop.
    pub fn new(
        initial: Duration,
        multiplier: f64,
        max: Duration,
        jitter: f64,
    ) -> Result<Self, Error> {
        let invalid = |what: String| Err(Error::invalid("backoff", what));
        if initial < Duration::from_millis(1) || initial > max {
            return invalid(format!(
                "initial delay {initial:?} is not between 1 ms and the largest delay {max:?}"
            ));
        }
        if max > Self::LONGEST {
            return invalid(format!("largest delay {max:?} is over one day"));
        }
        if !(1.0..=10.0).contains(&multiplier) {
            return invalid(format!("multiplier {multiplier} is not between 1 and 10"));
        }
        if !(0.0..1.0).contains(&jitter) {
            return invalid(format!("jitter {jitter} is not at least 0 and under 1"));
        }
        Ok(Self {
            initial,
            multiplier,
            max,
            jitter,
        })
    }

    /// As gRPC's retry policies have it: anything above zero, for attempts that are few. Delays over a day are a day.
    #[cfg(feature = "service-config")]
    pub(crate) fn of_policy(
        initial: Duration,
        multiplier: f64,
        max: Duration,
        jitter: f64,
    ) -> Self {
        let max = max.min(Self::LONGEST);
        Self {
            initial: initial.min(max),
            multiplier,
            max,
            jitter,
        }
    }

    /// The same delay every time, spread by `± jitter`; for probes.
    ///
    /// # Errors
    ///
    /// As [`Backoff::new`].
    pub fn constant(delay: Duration, jitter: f64) -> Result<Self, Error> {
        Self::new(delay, 1.0, delay, jitter)
    }

    /// The delay after `failures` earlier failures (0 for the first), with a random spread.
    pub fn delay(&self, failures: u32) -> Duration {
        self.delay_at(failures, fastrand::f64())
    }

    /// As [`Backoff::delay`], with the random part given: `unit` in `0.0..1.0` runs over the spread.
    pub(crate) fn delay_at(&self, failures: u32, unit: f64) -> Duration {
        // f64 holds 1.6^n up to n = 1500 and is infinite beyond; `min` brings both down to `max`.
        let exponent = i32::try_from(failures).unwrap_or(i32::MAX);
        let grown = self.initial.as_secs_f64() * self.multiplier.powi(exponent);
        let capped = grown.min(self.max.as_secs_f64());
        let spread = 1.0 + self.jitter * (2.0 * unit - 1.0);
        Duration::try_from_secs_f64(capped * spread).unwrap_or(self.max)
    }

    /// The first delay, its growth, and the largest.
    #[cfg(all(feature = "service-config", any(fuzzing, test)))]
    pub(crate) const fn parts(&self) -> (Duration, f64, Duration) {
        (self.initial, self.multiplier, self.max)
    }

    /// The delay before the first repeat, without its spread.
    pub(crate) const fn initial(&self) -> Duration {
        self.initial
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            initial: Duration::from_secs(1),
            multiplier: 1.6,
            max: Duration::from_secs(120),
            jitter: 0.2,
        }
    }
}

/// Refuses a duration that cannot work, saying what is allowed.
pub(crate) fn check_duration(
    name: &'static str,
    value: Duration,
    least: Duration,
    most: Duration,
) -> Result<Duration, Error> {
    if value < least || value > most {
        return Err(Error::new(Kind::Invalid).with_reason(format!(
            "{name}: {value:?} is not between {least:?} and {most:?}"
        )));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_defaults_grow_to_two_minutes_and_stay_there() {
        let backoff = Backoff::default();
        assert_eq!(backoff.delay_at(0, 0.5), Duration::from_secs(1));
        assert_eq!(backoff.delay_at(1, 0.5), Duration::from_millis(1600));
        assert_eq!(backoff.delay_at(11, 0.5), Duration::from_secs(120));
        assert_eq!(backoff.delay_at(u32::MAX, 0.5), Duration::from_secs(120));
    }

    #[test]
    fn the_spread_is_twenty_percent_each_way() {
        let backoff = Backoff::default();
        assert_eq!(backoff.delay_at(0, 0.0), Duration::from_millis(800));
        assert!(backoff.delay_at(0, 0.999_999) < Duration::from_millis(1200));
        for _ in 0..1000 {
            let delay = backoff.delay(0).as_millis();
            assert!((800..=1200).contains(&delay), "{delay} ms");
        }
    }

    #[test]
    fn what_cannot_work_is_refused_with_what_is_allowed() {
        let ms = Duration::from_millis;
        for (result, names) in [
            (Backoff::new(ms(0), 2.0, ms(10), 0.1), "1 ms"),
            (Backoff::new(ms(20), 2.0, ms(10), 0.1), "largest delay"),
            (Backoff::new(ms(1), 0.5, ms(10), 0.1), "between 1 and 10"),
            (
                Backoff::new(ms(1), f64::NAN, ms(10), 0.1),
                "between 1 and 10",
            ),
            (Backoff::new(ms(1), 2.0, ms(10), 1.0), "under 1"),
            (Backoff::new(ms(1), 2.0, Duration::MAX, 0.1), "one day"),
        ] {
            let error = result.expect_err("must be refused");
            assert_eq!(error.kind(), Kind::Invalid);
            assert!(error.to_string().contains(names), "{error}");
        }
    }
}
