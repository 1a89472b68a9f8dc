//! Service configs.

use serde_json::{Value, json};

use crate::{Error, ServiceConfig};

/// A config is JSON to serde_json, and printed as itself, in another spelling or in the names of the proto it reads as the
/// same; what is none says where, in a line.
pub fn config(data: &[u8]) {
    let text = &*String::from_utf8_lossy(data);
    let read = ServiceConfig::from_json(text);
    let Ok(json) = serde_json::from_str::<Value>(text) else {
        let error = read.expect_err("it is no JSON");
        assert!(error.to_string().contains("no JSON"), "{error}");
        super::is_readable(&error);
        return;
    };
    // What is left out, written as null, is left out.
    let mut nulled = json.clone();
    if let Some(object) = nulled.as_object_mut() {
        for name in ["retryThrottling", "methodConfig", "healthCheckConfig"] {
            object.entry(name).or_insert(Value::Null);
        }
    }
    for spelt in [
        json.to_string(),
        format!(" {json:#}\n"),
        snake(&json).to_string(),
    ] {
        // serde_json may read a number that it has written as the one beside it.
        if serde_json::from_str::<Value>(&spelt)
            .is_ok_and(|again| again == json || again == snake(&json))
        {
            same(&read, &ServiceConfig::from_json(&spelt));
        }
    }
    if !["retry_throttling", "method_config", "health_check_config"]
        .iter()
        .any(|name| json.get(name).is_some())
    {
        same(&read, &ServiceConfig::from_json(&nulled.to_string()));
    }
    let methods = json.get("methodConfig").and_then(Value::as_array);
    for method in methods.into_iter().flatten() {
        if let Some(text) = method.get("timeout").and_then(Value::as_str) {
            takes(text);
        }
    }
    match read {
        Ok(config) => {
            assert!(json.is_object());
            let printed = config.to_json().to_string();
            let again = ServiceConfig::from_json(&printed);
            assert_eq!(again.expect("what is printed can be read"), config);
        }
        Err(error) => super::is_readable(&error),
    }
}

/// A time is exactly what it says, in the billionths of a second that it says.
fn takes(text: &str) {
    let json = json!({ "methodConfig": [{ "name": [{}], "timeout": text }] });
    let read = ServiceConfig::from_json(&json.to_string()).ok();
    let read = read.and_then(|config| config.for_path("/a/b").timeout);
    assert_eq!(read.map(|time| time.as_nanos()), nanos(text), "{text:?}");
}

fn nanos(text: &str) -> Option<u128> {
    let (whole, part) = match text.strip_suffix('s')?.split_once('.') {
        Some(parts) => parts,
        None => (text.strip_suffix('s')?, ""),
    };
    let all_digits = |text: &str| text.chars().all(|c| c.is_ascii_digit());
    if whole.is_empty() || part.len() > 9 || !all_digits(whole) || !all_digits(part) {
        return None;
    }
    let digit = |nanos, c: char| nanos * 10 + u128::from(c.to_digit(10).unwrap_or(0));
    let whole = whole.trim_start_matches('0');
    let all = whole.chars().take(20).chain(part.chars()).fold(0, digit);
    let nanos = all * 10_u128.pow(9 - part.len() as u32);
    // Ten years.
    (nanos <= 3650 * 86_400 * 1_000_000_000).then_some(nanos)
}

fn same(one: &Result<ServiceConfig, Error>, other: &Result<ServiceConfig, Error>) {
    match (one, other) {
        (Ok(one), Ok(other)) => assert_eq!(one, other),
        (Err(_), Err(_)) => {}
        _ => panic!("{one:?} is spelt as {other:?}"),
    }
}

/// In the names of the proto, where there is no other of that name.
fn snake(value: &Value) -> Value {
    const NAMES: [(&str, &str); 18] = [
        ("methodConfig", "method_config"),
        ("waitForReady", "wait_for_ready"),
        ("retryPolicy", "retry_policy"),
        ("hedgingPolicy", "hedging_policy"),
        ("retryThrottling", "retry_throttling"),
        ("maxTokens", "max_tokens"),
        ("tokenRatio", "token_ratio"),
        ("healthCheckConfig", "health_check_config"),
        ("serviceName", "service_name"),
        ("loadBalancingConfig", "load_balancing_config"),
        ("choiceCount", "choice_count"),
        ("maxAttempts", "max_attempts"),
        ("initialBackoff", "initial_backoff"),
        ("maxBackoff", "max_backoff"),
        ("backoffMultiplier", "backoff_multiplier"),
        ("retryableStatusCodes", "retryable_status_codes"),
        ("hedgingDelay", "hedging_delay"),
        ("nonFatalStatusCodes", "non_fatal_status_codes"),
    ];
    match value {
        Value::Object(object) => {
            let named = object.iter().map(|(name, value)| {
                let found = NAMES.iter().find(|(camel, _)| camel == name);
                let free = found.filter(|(_, snake)| !object.contains_key(*snake));
                (
                    free.map_or(&**name, |(_, snake)| snake).to_owned(),
                    snake(value),
                )
            });
            Value::Object(named.collect())
        }
        Value::Array(items) => items.iter().map(snake).collect(),
        other => other.clone(),
    }
}
