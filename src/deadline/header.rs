//! The header `grpc-timeout`: what a call's time is, on the wire.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::{error::Error, headers::find};

pub(crate) const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// The time that a request gives itself.
///
/// The header is at most eight digits and a unit
/// ([PROTOCOL-HTTP2.md](https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md)).
pub(crate) fn timeout_of(headers: &HeaderMap) -> Result<Option<Duration>, Error> {
    let Some(value) = find(headers, &GRPC_TIMEOUT) else {
        return Ok(None);
    };
    let invalid = || {
        let why = format!("{value:?} is not one to eight digits and one of H, M, S, m, u, n");
        Error::invalid("grpc-timeout", why)
    };
    let Some((unit, digits)) = value.as_bytes().split_last() else {
        return Err(invalid());
    };
    if digits.is_empty() || digits.len() > 8 {
        return Err(invalid());
    }
    let mut number = 0;
    for digit in digits {
        if !digit.is_ascii_digit() {
            return Err(invalid());
        }
        number = number * 10 + u64::from(digit - b'0');
    }
    Ok(Some(match unit {
        b'H' => Duration::from_secs(number * 3600),
        b'M' => Duration::from_secs(number * 60),
        b'S' => Duration::from_secs(number),
        b'm' => Duration::from_millis(number),
        b'u' => Duration::from_micros(number),
        b'n' => Duration::from_nanos(number),
        _ => return Err(invalid()),
    }))
}

/// The finest unit in which it fits into eight digits, rounded up, so that the server never gives up first.
pub(crate) fn header_of(timeout: Duration) -> HeaderValue {
    const MOST: u64 = 99_999_999;
    const UNITS: [(u64, u8); 6] = [
        (1, b'n'),
        (1_000, b'u'),
        (1_000_000, b'm'),
        (1_000_000_000, b'S'),
        (60_000_000_000, b'M'),
        (3_600_000_000_000, b'H'),
    ];
    // What is more are centuries, and says no less.
    let nanos = u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX);
    let (mut number, unit) = UNITS
        .iter()
        .map(|(size, unit)| (nanos.div_ceil(*size), *unit))
        .find(|(number, _)| *number <= MOST)
        .unwrap_or((MOST, b'H'));
    // By hand: this is on the path of every call that has a bound, and `format!` would allocate.
    let mut text = [0; 9];
    let mut rest = text.len();
    for (place, digit) in text.iter_mut().enumerate().rev() {
        rest = place;
        if place == 8 {
            *digit = unit;
            continue;
        }
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    let text = text.get(rest..).unwrap_or_default();
    HeaderValue::from_bytes(text).unwrap_or_else(|_| HeaderValue::from_static("99999999H"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn a_timeout_header_comes_back_as_it_was_or_a_little_longer() {
        for timeout in [
            Duration::from_nanos(1),
            Duration::from_millis(1),
            Duration::from_millis(1500),
            Duration::from_secs(86_400),
            Duration::from_secs(10_000_000_000),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(GRPC_TIMEOUT, header_of(timeout));
            let read = timeout_of(&headers).unwrap().unwrap();
            assert!(read >= timeout, "{timeout:?} was read as {read:?}");
            assert!(
                read.as_secs_f64() <= timeout.as_secs_f64() * 1.001,
                "{read:?}"
            );
        }
    }

    #[test]
    fn what_is_no_timeout_is_refused() {
        for bad in ["", "m", "5", "123456789m", "-1S", "1.5S", "5x", "5 S"] {
            let mut headers = HeaderMap::new();
            headers.insert(GRPC_TIMEOUT, HeaderValue::from_static(bad));
            let error = timeout_of(&headers).unwrap_err();
            assert_eq!(error.kind(), Kind::Invalid, "{bad}");
            assert!(error.to_string().contains("eight digits"), "{error}");
        }
    }
}
