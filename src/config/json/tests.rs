use proptest::prelude::*;

use super::*;

fn retry(fields: &str) -> String {
    format!(
        r#"{{"methodConfig":[{{"name":[{{}}],"retryPolicy":{{"maxAttempts":3,"initialBackoff":"0.1s","maxBackoff":"1s","backoffMultiplier":2,"retryableStatusCodes":["UNAVAILABLE"]{fields}}}}}]}}"#
    )
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn policy() -> RetryPolicy {
    let backoff = Backoff::new(ms(100), 2.0, ms(1000), 0.2).unwrap();
    RetryPolicy::new(3).unwrap().backoff(backoff).idempotent()
}

#[test]
fn the_json_says_what_the_builders_say() {
    let all = |config: MethodConfig| ServiceConfig::from(config);
    let hedge = HedgingPolicy::new(4, ms(500)).unwrap();
    let service = |name| MethodName::service(name).unwrap();
    let cases = [
        ("{}".to_owned(), ServiceConfig::new()),
        (r#"{"unknown": 1, "methodConfig": null}"#.to_owned(), ServiceConfig::new()),
        (retry(""), policy().into()),
        (
            retry(r#","retryableStatusCodes":["aborted",14]"#),
            policy().on([Code::Aborted, Code::Unavailable]).unwrap().into(),
        ),
        (retry(r#","maxAttempts":"9""#), RetryPolicy::new(5).unwrap().idempotent().into()),
        (
            retry(r#","initialBackoff":"3s""#),
            policy().backoff(Backoff::new(ms(1000), 2.0, ms(1000), 0.2).unwrap()).into(),
        ),
        (
            r#"{"method_config":[{"name":[{"service":""}],"timeout":"1.000340012s","wait_for_ready":true}]}"#.to_owned(),
            all(MethodConfig::new().timeout(Duration::new(1, 340_012)).unwrap().wait_for_ready(true)),
        ),
        (
            r#"{"methodConfig":[{"name":[{}],"hedgingPolicy":{"maxAttempts":4,"hedgingDelay":"0.5s","nonFatalStatusCodes":["INTERNAL"]}}]}"#.to_owned(),
            hedge.non_fatal([Code::Internal]).unwrap().into(),
        ),
        (
            r#"{"methodConfig":[{"name":[{"service":"a.A"},{"service":"a.B","method":"M"}],"waitForReady":false}, {"timeout":"1s"}],
               "retryThrottling":{"maxTokens":10,"tokenRatio":0.1},"healthCheckConfig":{"serviceName":"h"},
               "loadBalancingConfig":[{"other":{}},{"least_request_experimental":{"choiceCount":2}},{"round_robin":{}}]}"#.to_owned(),
            ServiceConfig::new()
                .method(service("a.A"), MethodConfig::new().wait_for_ready(false))
                .unwrap()
                .method(MethodName::method("a.B", "M").unwrap(), MethodConfig::new().wait_for_ready(false))
                .unwrap()
                .throttling(Throttling::new(10, 0.1).unwrap())
                .health_check("h"),
        ),
    ];
    for (json, expected) in cases {
        let read =
            ServiceConfig::from_json(&json).unwrap_or_else(|error| panic!("{json}: {error}"));
        assert_eq!(read, expected, "{json}");
    }
}

#[test]
fn what_is_wrong_is_named() {
    let cases = [
        ("[]".to_owned(), "the whole: [] is not an object"),
        (
            r#"{"methodConfig": 1}"#.to_owned(),
            "methodConfig: 1 is not a list",
        ),
        (
            r#"{"methodConfig": [{"name": [{"method": "M"}]}]}"#.to_owned(),
            "methodConfig[0].name[0]: there is a method and no service",
        ),
        (
            r#"{"methodConfig": [{"name": [{"service": "a/b"}]}]}"#.to_owned(),
            r#"methodConfig[0].name[0]: service: "a/b" is no name: it is empty, or has a slash"#,
        ),
        (
            r#"{"methodConfig": [{"name": [{"service": "a"}]}, {"name": [{"service": "a"}]}]}"#
                .to_owned(),
            "methodConfig[1].name[0]: service config: \"/a/\" is configured twice",
        ),
        (
            r#"{"methodConfig": [{"timeout": "-1s"}]}"#.to_owned(),
            r#"methodConfig[0].timeout: "-1s" is not a number of seconds with an s, such as "1.5s""#,
        ),
        (
            r#"{"methodConfig": [{"timeout": "1.0123456789s"}]}"#.to_owned(),
            r#"methodConfig[0].timeout: "1.0123456789s" is not a number of seconds with an s, such as "1.5s""#,
        ),
        (
            r#"{"methodConfig": [{"waitForReady": "yes"}]}"#.to_owned(),
            r#"methodConfig[0].waitForReady: "yes" is neither true nor false"#,
        ),
        (
            retry(r#","maxAttempts":1"#),
            "methodConfig[0].retryPolicy.maxAttempts: attempts: 1 is not at least 2, the first one included",
        ),
        (
            retry(r#","maxAttempts":2.5"#),
            "methodConfig[0].retryPolicy.maxAttempts: 2.5 is not a whole number from 0 up",
        ),
        (
            retry(r#","initialBackoff":"0s""#),
            "methodConfig[0].retryPolicy.initialBackoff: it is not more than zero",
        ),
        (
            retry(r#","backoffMultiplier":0"#),
            "methodConfig[0].retryPolicy.backoffMultiplier: 0 is not more than zero",
        ),
        (
            retry(r#","retryableStatusCodes":[]"#),
            "methodConfig[0].retryPolicy.retryableStatusCodes: there is none",
        ),
        (
            retry(r#","retryableStatusCodes":["OK"]"#),
            r#"methodConfig[0].retryPolicy.retryableStatusCodes[0]: "OK" is not the name or number of a failure, such as "UNAVAILABLE""#,
        ),
        (
            r#"{"methodConfig": [{"retryPolicy": {}}]}"#.to_owned(),
            "methodConfig[0].retryPolicy: maxAttempts is missing",
        ),
        (
            retry(r#"},"hedgingPolicy":{"maxAttempts":2"#),
            "methodConfig[0]: method config: a method is retried or hedged, not both",
        ),
        (
            r#"{"retryThrottling": {"maxTokens": 0, "tokenRatio": 1}}"#.to_owned(),
            "retryThrottling: throttling: 0 tokens are not between 1 and 1,000",
        ),
        (
            r#"{"loadBalancingConfig": [{"round_robin": {}}]}"#.to_owned(),
            "loadBalancingConfig: none of \"round_robin\" is known; least_request_experimental is",
        ),
        (
            r#"{"loadBalancingConfig": [{"least_request": {"choiceCount": 3}}]}"#.to_owned(),
            "loadBalancingConfig[0].least_request.choiceCount: a pool chooses the less loaded of 2",
        ),
    ];
    for (json, expected) in cases {
        let error = ServiceConfig::from_json(&json).unwrap_err();
        assert_eq!(
            error.reason().as_deref(),
            Some(&*format!("service config: {expected}")),
            "{json}"
        );
    }
    let error = ServiceConfig::from_json("{\n  \"a\": }").unwrap_err();
    assert!(error.to_string().contains("line 2 column 8"), "{error}");
}

#[test]
fn the_most_particular_name_is_a_methods_own() {
    let json = r#"{"methodConfig":[{"name":[{}],"timeout":"1s"},{"name":[{"service":"a.A"}],"timeout":"2s"},
        {"name":[{"service":"a.A","method":"M"}],"timeout":"3s"}]}"#;
    let config = ServiceConfig::from_json(json).unwrap();
    for (path, seconds) in [
        ("/a.A/M", 3),
        ("/a.A/N", 2),
        ("/a.B/M", 1),
        ("/a.A", 1),
        ("", 1),
        ("/", 1),
    ] {
        let timeout = config.for_path(path).timeout;
        assert_eq!(timeout, Some(Duration::from_secs(seconds)), "{path}");
    }
}

proptest! {
    #[test]
    fn nothing_panics(text in ".*") {
        let _ = ServiceConfig::from_json(&text);
    }

    #[test]
    fn nothing_panics_where_one_value_is_another(field in 0_usize..5, value in prop_oneof![
        Just("null".to_owned()), Just("{}".to_owned()), Just("[[]]".to_owned()), Just("1e999".to_owned()), Just("true".to_owned()),
        any::<i64>().prop_map(|n| n.to_string()), any::<f64>().prop_map(|n| format!("\"{n}s\"")), "\"[0-9.]{0,30}s\"",
    ]) {
        let name = ["maxAttempts", "initialBackoff", "maxBackoff", "backoffMultiplier", "retryableStatusCodes"][field];
        let _ = ServiceConfig::from_json(&retry(&format!(r#","{name}":{value}"#)));
    }
}
