//! What a method's owner says of repeating its calls.

use std::time::Duration;

use tonic::Code;

use super::Codes;
#[cfg(doc)]
use crate::error::Kind;
use crate::{Backoff, backoff::check_duration, error::Error};

/// The most attempts that a policy may have; more are so many
/// ([A6](https://github.com/grpc/proposal/blob/master/A6-client-retries.md#maximum-number-of-retries)).
const MOST_ATTEMPTS: u32 = 5;

/// How the calls of a method are made again when they fail: one attempt after the other.
///
/// As a request's extension it is that call's, whatever is configured.
///
/// ```
/// use std::time::Duration;
/// use switchboard::{Backoff, RetryPolicy};
/// use tonic::Code;
///
/// let policy = RetryPolicy::new(4)?
///     .backoff(Backoff::new(Duration::from_millis(50), 2.0, Duration::from_secs(1), 0.2)?)
///     .on([Code::Unavailable, Code::Aborted])?
///     .idempotent();
/// # Ok::<(), switchboard::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RetryPolicy {
    attempts: u32,
    backoff: Backoff,
    codes: Codes,
    idempotent: bool,
}

/// How the calls of a method are made several times at once, for the answer that comes first.
///
/// To hedge a method is to say that it may be executed several times: it mostly will be. Only calls whose request is one
/// message are hedged; streams are made once.
///
/// As a request's extension it is that call's, whatever is configured; beside a [`RetryPolicy`] there it counts for nothing.
///
/// ```
/// use std::time::Duration;
/// use switchboard::HedgingPolicy;
/// use tonic::Code;
///
/// // A second attempt after 50 ms, unless there is an answer; at once, if the first is unavailable.
/// let policy = HedgingPolicy::new(2, Duration::from_millis(50))?.non_fatal([Code::Unavailable])?;
/// # Ok::<(), switchboard::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HedgingPolicy {
    attempts: u32,
    delay: Duration,
    codes: Codes,
}

/// When a service that fails is not burdened with more attempts
/// ([A6](https://github.com/grpc/proposal/blob/master/A6-client-retries.md#throttling-retry-attempts-and-hedged-rpcs)).
///
/// A bucket of tokens for each target, full in the beginning: a failure that a policy would repeat takes one out, and so does a server's
/// word not to try again; a call that goes well, whether it has a policy or not, puts `token_ratio` in. While it is half full or less, nothing is repeated by a policy and nothing hedged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Throttling {
    /// In thousandths, as is the ratio.
    pub(crate) max_tokens: u32,
    pub(crate) token_ratio: u32,
}

// === impl RetryPolicy ===

impl RetryPolicy {
    /// So many attempts, the first one included, on `UNAVAILABLE`, after gRPC's usual delays: 100 ms × 2, at most 1 s,
    /// ± 20 %. More than 5 attempts are 5.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] for fewer than 2.
    pub fn new(attempts: u32) -> Result<Self, Error> {
        let ms = Duration::from_millis;
        Ok(Self {
            attempts: check_attempts(attempts)?,
            backoff: Backoff::new(ms(100), 2.0, ms(1000), 0.2)?,
            codes: Codes::one(Code::Unavailable),
            idempotent: false,
        })
    }

    /// The delays between attempts. A server's pushback takes the place of one, and then they begin anew.
    #[must_use]
    pub const fn backoff(mut self, backoff: Backoff) -> Self {
        self.backoff = backoff;
        self
    }

    /// The failures after which there is another attempt, in place of those before.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] if `OK` is among them.
    pub fn on(mut self, codes: impl IntoIterator<Item = Code>) -> Result<Self, Error> {
        self.codes = Codes::of_failures("retry policy", codes)?;
        Ok(self)
    }

    /// States that to execute a call twice is the same as once. Without that, only what never reached a server, or was not
    /// processed by it, is repeated: a server's own `UNAVAILABLE` may come from halfway through.
    #[must_use]
    pub const fn idempotent(mut self) -> Self {
        self.idempotent = true;
        self
    }

    /// How many attempts there are, the first one included.
    pub const fn attempts(&self) -> u32 {
        self.attempts
    }

    /// The failures after which there is another attempt.
    pub const fn codes(&self) -> Codes {
        self.codes
    }

    /// The delays between attempts.
    pub const fn delays(&self) -> Backoff {
        self.backoff
    }

    /// Whether calls may be executed twice.
    pub const fn is_idempotent(&self) -> bool {
        self.idempotent
    }
}

// === impl HedgingPolicy ===

impl HedgingPolicy {
    /// So many attempts, each so long after the one before unless there is an answer; all at once if that is zero. More
    /// than 5 attempts are 5.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] for fewer than 2, and for a delay over one day.
    pub fn new(attempts: u32, delay: Duration) -> Result<Self, Error> {
        let most = Backoff::LONGEST;
        Ok(Self {
            attempts: check_attempts(attempts)?,
            delay: check_duration("hedging delay", delay, Duration::ZERO, most)?,
            codes: Codes::default(),
        })
    }

    /// The failures that leave the other attempts their chance, and have the next one made at once. Any other is the
    /// call's. Default: none.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] if `OK` is among them.
    pub fn non_fatal(mut self, codes: impl IntoIterator<Item = Code>) -> Result<Self, Error> {
        self.codes = Codes::of_failures("hedging policy", codes)?;
        Ok(self)
    }

    /// How many attempts there are, the first one included.
    pub const fn attempts(&self) -> u32 {
        self.attempts
    }

    /// How long after the one before each attempt is made.
    pub const fn delay(&self) -> Duration {
        self.delay
    }

    /// The failures that are not the call's.
    pub const fn codes(&self) -> Codes {
        self.codes
    }
}

fn check_attempts(attempts: u32) -> Result<u32, Error> {
    match attempts {
        0 | 1 => {
            let why = format!("{attempts} is not at least 2, the first one included");
            Err(Error::invalid("attempts", why))
        }
        more => Ok(more.min(MOST_ATTEMPTS)),
    }
}

// === impl Throttling ===

impl Throttling {
    /// A bucket of so many tokens, of which a call that goes well puts so much back. Three decimals of the ratio count.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`] unless `1 ≤ max_tokens ≤ 1,000` and `0.001 ≤ token_ratio ≤ 1,000`.
    pub fn new(max_tokens: u32, token_ratio: f64) -> Result<Self, Error> {
        let invalid = |why: String| Err(Error::invalid("throttling", why));
        if !(1..=1000).contains(&max_tokens) {
            return invalid(format!("{max_tokens} tokens are not between 1 and 1,000"));
        }
        if !(0.001..=1000.0).contains(&token_ratio) {
            return invalid(format!(
                "a token ratio of {token_ratio} is not between 0.001 and 1,000"
            ));
        }
        Ok(Self {
            max_tokens: max_tokens * 1000,
            // Within bounds, and cut off as A6 says.
            token_ratio: (token_ratio * 1000.0 + 1e-6) as u32,
        })
    }
}
