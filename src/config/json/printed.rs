//! A config as JSON, for those who check that it reads as the same.

use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::{
    ServiceConfig,
    config::{MethodConfig, Repeat},
    retry::Codes,
};

impl ServiceConfig {
    /// As [`ServiceConfig::from_json`] reads it. Policies are as they came from there: idempotent, spread by ± 20 %.
    pub(crate) fn to_json(&self) -> Value {
        let mut methods: Vec<_> = self
            .methods
            .iter()
            .map(|(path, config)| {
                let (service, method) = path[1..].split_once('/').unwrap_or_default();
                of_method(json!({ "service": service, "method": method }), config)
            })
            .collect();
        if self.has_others {
            methods.push(of_method(json!({}), &self.others));
        }
        let mut json = Map::new();
        json.insert("methodConfig".to_owned(), methods.into());
        if let Some(throttling) = self.throttling {
            let ratio = throttling.token_ratio;
            let throttling = json!({
                "maxTokens": throttling.max_tokens / 1000,
                "tokenRatio": format!("{}.{:03}", ratio / 1000, ratio % 1000),
            });
            json.insert("retryThrottling".to_owned(), throttling);
        }
        if let Some(service) = &self.health_service {
            let health = json!({ "serviceName": &**service });
            json.insert("healthCheckConfig".to_owned(), health);
        }
        json.into()
    }
}

fn of_method(name: Value, config: &MethodConfig) -> Value {
    let mut json = json!({
        "name": [name],
        "timeout": config.timeout.map(seconds),
        "waitForReady": config.wait_for_ready,
    });
    match config.repeat() {
        Repeat::Transparent => {}
        Repeat::Retry(policy) => {
            let (initial, multiplier, max) = policy.delays().parts();
            json["retryPolicy"] = json!({
                "maxAttempts": policy.attempts(),
                "initialBackoff": seconds(initial),
                "maxBackoff": seconds(max),
                "backoffMultiplier": multiplier.to_string(),
                "retryableStatusCodes": numbers(policy.codes()),
            });
        }
        Repeat::Hedge(policy) => {
            json["hedgingPolicy"] = json!({
                "maxAttempts": policy.attempts(),
                "hedgingDelay": seconds(policy.delay()),
                "nonFatalStatusCodes": numbers(policy.codes()),
            });
        }
    }
    json
}

fn seconds(time: Duration) -> String {
    format!("{}.{:09}s", time.as_secs(), time.subsec_nanos())
}

fn numbers(codes: Codes) -> Vec<i32> {
    codes.iter().map(i32::from).collect()
}
