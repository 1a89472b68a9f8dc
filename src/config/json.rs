//! gRPC's service config in JSON, as
//! [service_config.proto](https://github.com/grpc/grpc-proto/blob/master/grpc/service_config/service_config.proto) has it.

use std::{fmt, str::FromStr, time::Duration};

use serde_json::{Map, Value};
use tonic::Code;

use super::{MethodConfig, MethodName, ServiceConfig};
#[cfg(doc)]
use crate::error::Kind;
use crate::{
    Backoff, HedgingPolicy, RetryPolicy,
    error::{Error, shown},
    retry::Throttling,
};

/// What a pool does with its instances, by gRPC's names for it.
const LEAST_REQUEST: [&str; 2] = ["least_request_experimental", "least_request"];

/// How many names of policies an error has: the first ones, and the last.
const MOST_NAMES: usize = 4;

/// The names of codes 1 to 16.
const CODES: [&str; 16] = [
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// The longest time that is taken: some 300 years, as in protobuf's `Duration` ten thousand.
const LONGEST_SECONDS: u64 = 10_000_000_000;

/// A value, and where it stands: `methodConfig[1].retryPolicy`.
struct At<'a> {
    value: &'a Value,
    path: String,
}

// === impl ServiceConfig ===

impl ServiceConfig {
    /// Reads gRPC's own JSON: `methodConfig` with `name`, `timeout`, `waitForReady`, `retryPolicy` and `hedgingPolicy`;
    /// `retryThrottling`; `loadBalancingConfig`; `healthCheckConfig`. Names may be in camel case or as in the proto, what is
    /// not known is left alone, and null is as if it were not there.
    ///
    /// A `retryPolicy` is [idempotent](RetryPolicy::idempotent): to list a code is gRPC's way to allow the repetition. Its
    /// delays are spread by ± 20 %; a largest delay under the first one is the first too, and one over a day is a day. More than five attempts are five. A
    /// method's `timeout` is at most ten years. Of
    /// `loadBalancingConfig` the first policy that is known counts, which is `least_request_experimental` with a choice of two: a
    /// pool does nothing else.
    ///
    /// ```
    /// use switchboard::ServiceConfig;
    ///
    /// let config: ServiceConfig = r#"{
    ///     "methodConfig": [{
    ///         "name": [{ "service": "echo.Echo" }],
    ///         "timeout": "1.5s",
    ///         "retryPolicy": {
    ///             "maxAttempts": 3,
    ///             "initialBackoff": "0.1s", "maxBackoff": "1s", "backoffMultiplier": 2,
    ///             "retryableStatusCodes": ["UNAVAILABLE"]
    ///         }
    ///     }],
    ///     "retryThrottling": { "maxTokens": 10, "tokenRatio": 0.1 }
    /// }"#.parse()?;
    ///
    /// let error = ServiceConfig::from_json(r#"{"methodConfig": [{"timeout": "soon"}]}"#).unwrap_err();
    /// assert!(error.to_string().contains("methodConfig[0].timeout"));
    /// # Ok::<(), switchboard::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`], naming the field, what it was and what is allowed.
    pub fn from_json(json: &str) -> Result<Self, Error> {
        let value: Value = serde_json::from_str(json)
            .map_err(|error| Error::invalid("service config", "no JSON").with_source(error))?;
        let top = At {
            value: &value,
            path: String::new(),
        };
        top.object()?;
        let mut config = Self::new();
        for method in top.list("methodConfig")? {
            let names = method.list("name")?;
            let of = method_config(&method)?;
            for name in names {
                let read = name_of(&name)?;
                config = config
                    .method(read, of.clone())
                    .map_err(|error| name.is(error.reason().unwrap_or_default()))?;
            }
        }
        if let Some(throttling) = top.field("retryThrottling")? {
            let max = throttling.needs("maxTokens")?;
            let ratio = throttling.needs("tokenRatio")?;
            let read = Throttling::new(max.whole()?, ratio.number()?);
            config = config.throttling(read.map_err(|error| throttling.wrong(&error))?);
        }
        if let Some(health) = top.field("healthCheckConfig")?
            && let Some(service) = health.field("serviceName")?
        {
            config = config.health_check(service.text()?);
        }
        balancing(&top)?;
        Ok(config)
    }
}

impl FromStr for ServiceConfig {
    type Err = Error;

    /// As [`ServiceConfig::from_json`].
    fn from_str(json: &str) -> Result<Self, Error> {
        Self::from_json(json)
    }
}

fn name_of(name: &At<'_>) -> Result<MethodName, Error> {
    let text = |field| match name.field(field)? {
        Some(value) => value.text().map(str::to_owned),
        None => Ok(String::new()),
    };
    let (service, method) = (text("service")?, text("method")?);
    let read = match (service.as_str(), method.as_str()) {
        ("", "") => Ok(MethodName::all()),
        ("", _) => return Err(name.is("there is a method and no service")),
        (service, "") => MethodName::service(service),
        (service, method) => MethodName::method(service, method),
    };
    read.map_err(|error| name.wrong(&error))
}

fn method_config(method: &At<'_>) -> Result<MethodConfig, Error> {
    let mut config = MethodConfig::new();
    if let Some(timeout) = method.field("timeout")? {
        let read = config.timeout(timeout.duration()?);
        config = read.map_err(|error| timeout.wrong(&error))?;
    }
    if let Some(wait) = method.field("waitForReady")? {
        config = config.wait_for_ready(wait.flag()?);
    }
    if let Some(policy) = method.field("retryPolicy")? {
        config = config.retry(retry_policy(&policy)?)?;
    }
    if let Some(policy) = method.field("hedgingPolicy")? {
        let read = config.hedge(hedging_policy(&policy)?);
        config = read.map_err(|error| method.wrong(&error))?;
    }
    Ok(config)
}

fn retry_policy(policy: &At<'_>) -> Result<RetryPolicy, Error> {
    let attempts = policy.needs("maxAttempts")?;
    let read = RetryPolicy::new(attempts.whole()?).map_err(|error| attempts.wrong(&error))?;
    let [initial, max] = [policy.needs("initialBackoff")?, policy.needs("maxBackoff")?];
    let (first, most) = (initial.duration()?, max.duration()?);
    for (at, delay) in [(&initial, first), (&max, most)] {
        if delay.is_zero() {
            return Err(at.is("it is not more than zero"));
        }
    }
    let multiplier = policy.needs("backoffMultiplier")?;
    let factor = multiplier.number()?;
    if !factor.is_finite() || factor <= 0.0 {
        return Err(multiplier.is(format!("{factor} is not more than zero")));
    }
    let backoff = Backoff::of_policy(first, factor, most, 0.2);
    let codes = policy.needs("retryableStatusCodes")?;
    let read = read
        .on(codes_of(policy, "retryableStatusCodes")?)
        .map_err(|error| codes.wrong(&error))?;
    if read.codes().is_empty() {
        return Err(codes.is("there is none"));
    }
    Ok(read.backoff(backoff).idempotent())
}

fn hedging_policy(policy: &At<'_>) -> Result<HedgingPolicy, Error> {
    let attempts = policy.needs("maxAttempts")?;
    let delay = match policy.field("hedgingDelay")? {
        Some(delay) => delay.duration()?,
        None => Duration::ZERO,
    };
    let read = HedgingPolicy::new(attempts.whole()?, delay);
    let read = read.map_err(|error| policy.wrong(&error))?;
    let read = read.non_fatal(codes_of(policy, "nonFatalStatusCodes")?);
    read.map_err(|error| policy.wrong(&error))
}

fn codes_of(policy: &At<'_>, field: &'static str) -> Result<Vec<Code>, Error> {
    policy.list(field)?.iter().map(At::code).collect()
}

/// Of the policies in order, the first that is known counts; it has to be what pools do.
fn balancing(top: &At<'_>) -> Result<(), Error> {
    let policies = top.list("loadBalancingConfig")?;
    let mut names = Vec::new();
    for policy in &policies {
        let [(name, settings)] = &policy.object()?.iter().collect::<Vec<_>>()[..] else {
            return Err(policy.is("it is not one policy under its name"));
        };
        if !LEAST_REQUEST.contains(&name.as_str()) {
            names.truncate(MOST_NAMES - 1);
            names.push(shown(name));
            continue;
        }
        let settings = At {
            value: settings,
            path: format!("{}.{name}", policy.path),
        };
        if let Some(count) = settings.field("choiceCount")?
            && count.whole()? != 2
        {
            return Err(count.is("a pool chooses the less loaded of 2"));
        }
        return Ok(());
    }
    match policies.is_empty() {
        true => Ok(()),
        false => Err(Error::invalid(
            "service config",
            format!(
                "loadBalancingConfig: none of {} is known; {} is",
                names.join(", "),
                LEAST_REQUEST[0]
            ),
        )),
    }
}

// === impl At ===

impl<'a> At<'a> {
    /// An error about this field.
    fn is(&self, why: impl fmt::Display) -> Error {
        let path = match self.path.as_str() {
            "" => "the whole",
            path => path,
        };
        Error::invalid("service config", format!("{path}: {why}"))
    }

    /// What stands there, on one line, and cut so that a message stays readable.
    fn words(&self) -> String {
        let text = self.value.to_string();
        let end = text
            .char_indices()
            .nth(80)
            .map_or(text.len(), |(end, _)| end);
        // JSON leaves some as they are.
        let words = text[..end].replace(char::is_control, "\u{fffd}");
        match end == text.len() {
            true => words,
            false => format!("{words}... ({} bytes)", text.len()),
        }
    }

    /// The same, with the words of who refused it.
    fn wrong(&self, error: &Error) -> Error {
        self.is(error.reason().unwrap_or_default())
    }

    fn object(&self) -> Result<&'a Map<String, Value>, Error> {
        let object = self.value.as_object();
        object.ok_or_else(|| self.is(format!("{} is not an object", self.words())))
    }

    /// A field of it, under either of its names.
    fn field(&self, name: &str) -> Result<Option<At<'a>>, Error> {
        let object = self.object()?;
        let snake: String = name.chars().fold(String::new(), |mut snake, letter| {
            if letter.is_ascii_uppercase() {
                snake.push('_');
            }
            snake.push(letter.to_ascii_lowercase());
            snake
        });
        let value = object.get(name).or_else(|| object.get(&snake));
        Ok(value.filter(|value| !value.is_null()).map(|value| At {
            value,
            path: match self.path.as_str() {
                "" => name.to_owned(),
                path => format!("{path}.{name}"),
            },
        }))
    }

    fn needs(&self, name: &'static str) -> Result<At<'a>, Error> {
        let field = self.field(name)?;
        field.ok_or_else(|| self.is(format!("{name} is missing")))
    }

    /// The items of a list among its fields; none if it is not there.
    fn list(&self, name: &str) -> Result<Vec<At<'a>>, Error> {
        let Some(At { value, path }) = self.field(name)? else {
            return Ok(Vec::new());
        };
        let Some(items) = value.as_array() else {
            let at = At { value, path };
            return Err(at.is(format!("{} is not a list", at.words())));
        };
        let items = items.iter().enumerate();
        Ok(items
            .map(|(n, value)| At {
                value,
                path: format!("{path}[{n}]"),
            })
            .collect())
    }

    fn text(&self) -> Result<&'a str, Error> {
        let text = self.value.as_str();
        text.ok_or_else(|| self.is(format!("{} is not a string", self.words())))
    }

    fn flag(&self) -> Result<bool, Error> {
        let flag = self.value.as_bool();
        flag.ok_or_else(|| self.is(format!("{} is neither true nor false", self.words())))
    }

    fn number(&self) -> Result<f64, Error> {
        let number = match self.value {
            Value::String(text) => text.parse().ok(),
            value => value.as_f64(),
        };
        number.ok_or_else(|| self.is(format!("{} is not a number", self.words())))
    }

    /// Also as a string, and as 3.0, as protobuf's JSON has it.
    fn whole(&self) -> Result<u32, Error> {
        let number = self.number()?;
        match number.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(&number) {
            true => Ok(number as u32),
            false => Err(self.is(format!("{} is not a whole number from 0 up", self.words()))),
        }
    }

    /// Seconds with up to nine decimals, and an `s`.
    fn duration(&self) -> Result<Duration, Error> {
        let invalid = || {
            self.is(format!(
                "{} is not a number of seconds with an s, such as \"1.5s\"",
                self.words()
            ))
        };
        let text = self.text().map_err(|_| invalid())?;
        let number = text.strip_suffix('s').ok_or_else(invalid)?;
        let (seconds, decimals) = number.split_once('.').unwrap_or((number, ""));
        let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        if seconds.is_empty() || decimals.len() > 9 || !digits(seconds) || !digits(decimals) {
            return Err(invalid());
        }
        let seconds: u64 = seconds.parse().map_err(|_| invalid())?;
        let nanos: u32 = format!("{decimals:0<9}").parse().map_err(|_| invalid())?;
        match seconds <= LONGEST_SECONDS {
            true => Ok(Duration::new(seconds, nanos)),
            false => Err(self.is(format!("{} is over {LONGEST_SECONDS} s", self.words()))),
        }
    }

    /// By its name or its number.
    fn code(&self) -> Result<Code, Error> {
        let number = match self.value {
            Value::String(name) => {
                let is = |known: &str| known.eq_ignore_ascii_case(name);
                CODES.iter().position(|known| is(known)).map(|n| n + 1)
            }
            value => value.as_u64().and_then(|n| usize::try_from(n).ok()),
        };
        match number {
            Some(number @ 1..=16) => Ok(Code::from(number as i32)),
            _ => Err(self.is(format!(
                "{} is not the name or number of a failure, such as \"UNAVAILABLE\"",
                self.words()
            ))),
        }
    }
}

#[cfg(any(fuzzing, test))]
mod printed;
#[cfg(test)]
mod tests;
