use std::iter;

use super::*;
use crate::{Backoff, retry::Throttling};

fn failure(code: Code, nature: Nature) -> Failure {
    Failure {
        code,
        nature,
        pushback: Pushback::None,
    }
}

fn policy(attempts: u32, codes: impl IntoIterator<Item = Code>, idempotent: bool) -> RetryPolicy {
    let backoff = Backoff::new(Duration::from_millis(100), 2.0, Duration::from_secs(1), 0.0);
    let policy = RetryPolicy::new(attempts)
        .unwrap()
        .backoff(backoff.unwrap());
    let policy = policy.on(codes).unwrap();
    match idempotent {
        true => policy.idempotent(),
        false => policy,
    }
}

/// How a call goes whose every attempt fails like this: its verdicts, up to the last.
fn verdicts(
    failure: Failure,
    policy: Option<&RetryPolicy>,
    throttle: Option<&Throttle>,
) -> Vec<Verdict> {
    let mut progress = Progress::new();
    let mut verdicts = Vec::new();
    while verdicts.len() < 12 && verdicts.last() != Some(&Verdict::Final) {
        verdicts.push(progress.after(failure, true, policy, throttle));
    }
    verdicts
}

#[test]
fn each_code_however_far_it_got_with_each_policy_is_repeated_as_often_as_is_safe() {
    use Verdict::{After, AtOnce, Final};
    let delays = [100, 200, 400, 800, 1000].map(|ms| After(Duration::from_millis(ms)));
    let mut checked = 0;
    for code in (1..=16).map(Code::from) {
        for listed in [false, true] {
            for idempotent in [false, true] {
                for attempts in [None, Some(2), Some(3), Some(5)] {
                    for nature in [Nature::Final, Nature::Refused, Nature::Unsent, Nature::Sent] {
                        let codes = iter::once(code).filter(|_| listed);
                        let policy = attempts.map(|n| policy(n, codes, idempotent));
                        let seen = verdicts(failure(code, nature), policy.as_ref(), None);

                        // What is certain not to have been processed is repeated once, at once, uncounted.
                        let once = iter::once(AtOnce).filter(|_| nature == Nature::Refused);
                        // A policy's attempts, if the code is listed and it cannot have been executed, or may be twice.
                        let safe = nature != Nature::Sent || idempotent;
                        let more = match attempts {
                            Some(n) if listed && safe && nature != Nature::Final => n as usize - 1,
                            _ => 0,
                        };
                        let repeated = delays.into_iter().take(more);
                        let expected: Vec<_> = once.chain(repeated).chain([Final]).collect();
                        let case = (code, listed, idempotent, attempts, nature);
                        assert_eq!(seen, expected, "{case:?}");
                        checked += 1;
                    }
                }
            }
        }
    }
    assert_eq!(checked, 16 * 2 * 2 * 4 * 4);
}

#[test]
fn what_cannot_be_sent_again_is_not() {
    let policy = policy(5, [Code::Unavailable], true);
    for nature in [Nature::Lost, Nature::Refused, Nature::Unsent, Nature::Sent] {
        let mut progress = Progress::new();
        let failure = failure(Code::Unavailable, nature);
        assert_eq!(
            progress.after(failure, false, Some(&policy), None),
            Verdict::Final,
            "{nature:?}"
        );
    }
}

#[test]
fn what_never_got_out_is_repeated_at_once_and_soon_with_pauses() {
    let seen = verdicts(failure(Code::Unavailable, Nature::Lost), None, None);
    let soon = |ms| Verdict::Soon(Duration::from_millis(ms));
    assert_eq!(&seen[..3], &[Verdict::AtOnce; 3]);
    assert_eq!(&seen[3..], &[1, 2, 4, 8, 16, 32, 64, 100, 100].map(soon));
    // It does not count against the policy's attempts, nor for the throttle.
    let throttle = Throttle::new(Throttling::new(1, 1.0).unwrap());
    let policy = policy(2, [Code::Unavailable], true);
    let mut progress = Progress::new();
    for _ in 0..9 {
        progress.after(
            failure(Code::Unavailable, Nature::Lost),
            true,
            Some(&policy),
            Some(&throttle),
        );
    }
    assert_eq!((progress.made, throttle.allows()), (1, true));
}

#[test]
fn a_pushback_is_the_delay_and_then_the_backoff_begins_anew() {
    let policy = policy(5, [Code::Unavailable], true);
    let mut progress = Progress::new();
    let mut after = |pushback| {
        let failure = Failure {
            pushback,
            ..failure(Code::Unavailable, Nature::Sent)
        };
        progress.after(failure, true, Some(&policy), None)
    };
    let ms = Duration::from_millis;
    assert_eq!(after(Pushback::None), Verdict::After(ms(100)));
    assert_eq!(after(Pushback::After(ms(7))), Verdict::After(ms(7)));
    assert_eq!(after(Pushback::None), Verdict::After(ms(100)));
    assert_eq!(after(Pushback::Stop), Verdict::Final);
}

#[test]
fn every_failure_that_a_policy_knows_counts_whatever_else_forbids_another_attempt() {
    let left = |failure: Failure, again, idempotent| {
        let throttle = Throttle::new(Throttling::new(4, 1.0).unwrap());
        let policy = policy(2, [Code::Unavailable], idempotent);
        let mut progress = Progress::new();
        let first = progress.after(failure, again, Some(&policy), Some(&throttle));
        if first != Verdict::Final {
            progress.after(failure, again, Some(&policy), Some(&throttle));
        }
        throttle.tokens()
    };
    let sent = |code, pushback| Failure {
        pushback,
        ..failure(code, Nature::Sent)
    };
    // Both attempts; one that is not repeated; one that cannot be; a code that is not listed; a server's no.
    assert_eq!(
        left(sent(Code::Unavailable, Pushback::None), true, true),
        2000
    );
    assert_eq!(
        left(sent(Code::Unavailable, Pushback::None), true, false),
        3000
    );
    assert_eq!(
        left(sent(Code::Unavailable, Pushback::None), false, true),
        3000
    );
    assert_eq!(left(sent(Code::Aborted, Pushback::None), true, true), 4000);
    assert_eq!(left(sent(Code::Aborted, Pushback::Stop), true, true), 3000);
}

#[test]
fn of_our_own_errors_only_those_are_repeated_that_say_that_nothing_was_processed() {
    let nature = |kind, sent, pinned| {
        let error = Error::new(kind).with_sent(sent);
        Failure::of_error(&error, pinned).nature
    };
    for sent in [Sent::Unsent, Sent::Unprocessed, Sent::Sent] {
        for kind in [
            Kind::Invalid,
            Kind::Stopped,
            Kind::Cancelled,
            Kind::DeadlineExceeded,
            Kind::RequestBody,
            Kind::Limit,
        ] {
            assert_eq!(
                nature(kind, sent, false),
                Nature::Final,
                "{kind:?} {sent:?}"
            );
        }
    }
    for kind in [
        Kind::NoSession,
        Kind::UnknownPeer,
        Kind::NotConnected,
        Kind::Busy,
        Kind::Shut,
    ] {
        assert_eq!(
            nature(kind, Sent::Unsent, false),
            Nature::Unsent,
            "{kind:?}"
        );
    }
    for kind in [
        Kind::ConnectionLost,
        Kind::SessionDeleted,
        Kind::Reset,
        Kind::Service,
    ] {
        assert_eq!(nature(kind, Sent::Sent, false), Nature::Sent, "{kind:?}");
    }
    // Given to a connection that had just gone, or that its peer had just said goodbye to.
    for kind in [Kind::ConnectionLost, Kind::SessionDeleted, Kind::Refused] {
        assert_eq!(nature(kind, Sent::Unsent, false), Nature::Lost, "{kind:?}");
    }
    assert_eq!(
        nature(Kind::ConnectionLost, Sent::Unsent, true),
        Nature::Lost
    );
    assert_eq!(
        nature(Kind::Refused, Sent::Unprocessed, true),
        Nature::Refused
    );
    // Another instance may have it, unless this one was meant.
    assert_eq!(
        nature(Kind::OtherInstance, Sent::Unprocessed, false),
        Nature::Refused
    );
    assert_eq!(
        nature(Kind::OtherInstance, Sent::Unprocessed, true),
        Nature::Final
    );
}

// As another transport would hand it on, and as somebody's request body might.
#[cfg(feature = "transport")]
#[test]
fn a_refusal_that_no_peer_has_sent_is_not_believed_nor_one_behind_a_status() {
    #[derive(Debug)]
    struct Wrapped(Box<dyn std::error::Error + Send + Sync>);
    impl std::fmt::Display for Wrapped {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("transport error")
        }
    }
    impl std::error::Error for Wrapped {
        fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
            Some(&*self.0)
        }
    }
    let of = |error: Box<dyn std::error::Error + Send + Sync>| {
        let error = Error::from_service(Box::new(Wrapped(error)));
        Failure::of_error(&error, false).nature
    };
    // It says nothing of who has reset it.
    assert_eq!(
        of(Box::new(h2::Error::from(h2::Reason::REFUSED_STREAM))),
        Nature::Sent
    );
    let mut status = tonic::Status::unavailable("of another call");
    status.set_source(std::sync::Arc::new(h2::Error::from(
        h2::Reason::REFUSED_STREAM,
    )));
    assert_eq!(of(Box::new(status)), Nature::Sent);
}

#[test]
fn a_response_has_failed_if_it_says_so_in_its_head() {
    let of = |status: u16, code: Option<&str>| {
        let mut response = Response::builder().status(status);
        if let Some(code) = code {
            response = response.header("grpc-status", code);
        }
        let failure = Failure::of_response(&response.body(()).unwrap());
        failure.map(|failure| failure.code)
    };
    assert_eq!(of(200, None), None);
    assert_eq!(of(200, Some("0")), None);
    assert_eq!(of(200, Some("14")), Some(Code::Unavailable));
    assert_eq!(of(200, Some("x")), Some(Code::Unknown));
    assert_eq!(of(503, None), Some(Code::Unavailable));
    assert_eq!(of(404, None), Some(Code::Unimplemented));
    assert_eq!(of(503, Some("8")), Some(Code::ResourceExhausted));
}
