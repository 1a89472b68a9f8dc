//! What peers, servers and proxies send.

use std::time::Duration;

use http::{HeaderMap, HeaderValue, Response, StatusCode};
use tonic::{Code, Status};

use super::Input;
use crate::{
    Backoff, Error, Kind, RetryPolicy,
    deadline::{GRPC_TIMEOUT, header_of, timeout_of},
    gate::{Classify as _, GrpcStatus},
    retry::{Failure, LONGEST_PUSHBACK, Nature, Progress, Pushback, Verdict},
};
#[cfg(feature = "transport")]
use crate::{
    error::Sent,
    headers::without_wrong_details,
    transport::inside::{Frames, GoAway, Identity, Said},
};

/// What follows frames in pieces finds what is there when they lie before it as a whole.
///
/// How many lengths of reads, these, and the frames.
#[cfg(feature = "transport")]
pub fn frames(data: &[u8]) {
    let mut input = Input(data);
    let reads = input.counted();
    let wire = input.0;
    let said = said_by(wire);
    follow(wire, &said, [wire.len()].into_iter());
    follow(wire, &said, [1].into_iter());
    if !reads.is_empty() {
        let reads = reads.iter().map(|&read| usize::from(read) + 1);
        follow(wire, &said, reads);
    }
}

/// What one frame says, and where it ends.
#[cfg(feature = "transport")]
enum Word {
    Going(usize, GoAway),
    Streams(usize, u32),
}

/// By RFC 9113 alone: 4.1, 6.5.1, 6.8.
#[cfg(feature = "transport")]
fn said_by(wire: &[u8]) -> Vec<Word> {
    let (mut said, mut at) = (Vec::new(), 0);
    while let Some(&[a, b, c, kind, flags, _, _, _, _]) = wire.get(at..at + 9) {
        let from = at + 9;
        at = from + u32::from_be_bytes([0, a, b, c]) as usize;
        let Some(payload) = wire.get(from..at) else {
            break;
        };
        match kind {
            4 if flags & 1 == 0 => {
                let mut limits = payload.chunks_exact(6).filter(|s| s[..2] == [0, 3]);
                let last = limits.next_back().map(|s| [s[2], s[3], s[4], s[5]]);
                said.extend(last.map(|value| Word::Streams(at, u32::from_be_bytes(value))));
            }
            7 if payload.len() >= 8 => {
                let code = [payload[4], payload[5], payload[6], payload[7]];
                let words = &payload[8..payload.len().min(8 + 128)];
                let going = GoAway {
                    reason: u32::from_be_bytes(code).into(),
                    words: words.escape_ascii().to_string(),
                };
                said.push(Word::Going(at, going));
            }
            _ => {}
        }
    }
    said
}

/// Each read tells the last of what has ended in it.
#[cfg(feature = "transport")]
fn follow(wire: &[u8], said: &[Word], reads: impl Iterator<Item = usize> + Clone) {
    let mut frames = Frames::default();
    let (mut from, mut words) = (0, said.iter().peekable());
    for read in reads.cycle() {
        if from >= wire.len() {
            break;
        }
        let to = wire.len().min(from + read);
        let found = frames.read(&wire[from..to]);
        let (mut going, mut streams) = (None, None);
        let end = |word: &Word| match word {
            Word::Going(end, _) | Word::Streams(end, _) => *end,
        };
        while let Some(word) = words.next_if(|word| end(word) <= to) {
            match word {
                Word::Going(_, word) => going = Some(word),
                Word::Streams(_, limit) => streams = Some(*limit),
            }
        }
        assert_eq!(found.as_ref(), going, "read {from}..{to}");
        assert_eq!(frames.take_streams(), streams, "read {from}..{to}");
        if let Some(found) = found {
            super::is_short_line(&found.to_string());
        }
        from = to;
    }
    assert!(words.next().is_none());
}

/// `grpc-timeout` is read as exactly what it says, or refused, and written so that it reads as the same; any other time as
/// hardly more, and never as less.
///
/// The header's value; its first twelve bytes are a time, too.
pub fn timeout(data: &[u8]) {
    if let Some((seconds, rest)) = data.split_first_chunk()
        && let Some(nanos) = rest.first_chunk()
    {
        let nanos = u32::from_be_bytes(*nanos) % 1_000_000_000;
        writes(Duration::new(u64::from_be_bytes(*seconds), nanos));
        // Most times are short.
        writes(Duration::new(u64::from_be_bytes(*seconds) >> 40, nanos));
    }
    let Ok(value) = HeaderValue::from_bytes(data) else {
        return;
    };
    let mut headers = HeaderMap::new();
    headers.insert(GRPC_TIMEOUT, value);
    // In the order of the names, so that one or the other way of looking it up is taken.
    for n in 0..usize::from(data.len().is_multiple_of(2)) * 16 {
        let name = http::HeaderName::from_bytes(format!("x-{n}").as_bytes());
        headers.insert(name.expect("a name"), HeaderValue::from_static("x"));
    }
    let nanos = said_nanos(data);
    match timeout_of(&headers) {
        Ok(read) => {
            let read = read.expect("it is there");
            assert_eq!(Some(read.as_nanos()), nanos);
            if read.as_nanos() <= u64::MAX.into() {
                assert_eq!(reads(&header_of(read)), read);
            }
            writes(read);
        }
        Err(error) => {
            assert_eq!(error.kind(), Kind::Invalid);
            assert_eq!(nanos, None);
        }
    }
}

fn said_nanos(value: &[u8]) -> Option<u128> {
    let text = str::from_utf8(value).ok()?;
    let unit = text.chars().last()?;
    let (_, each) = [
        ('H', 3_600_000_000_000),
        ('M', 60_000_000_000),
        ('S', 1_000_000_000),
        ('m', 1_000_000),
        ('u', 1_000),
        ('n', 1_u128),
    ]
    .into_iter()
    .find(|(name, _)| *name == unit)?;
    let digits = text.strip_suffix(unit)?;
    let is_number = (1..=8).contains(&digits.len()) && digits.chars().all(|c| c.is_ascii_digit());
    is_number.then(|| each * digits.parse::<u128>().expect("eight digits"))
}

fn writes(timeout: Duration) {
    let read = reads(&header_of(timeout));
    // Some centuries are as good as more.
    let longest = Duration::from_nanos(u64::MAX);
    assert!(
        read >= timeout.min(longest),
        "{timeout:?} is read as {read:?}"
    );
    // The next unit is at most 1000 times as much as one that has eight digits.
    let more = read.saturating_sub(timeout);
    assert!(more <= timeout / 99_999, "{timeout:?} is read as {read:?}");
}

fn reads(header: &HeaderValue) -> Duration {
    let mut headers = HeaderMap::new();
    headers.insert(GRPC_TIMEOUT, header.clone());
    let read = timeout_of(&headers).expect("what is written can be read");
    read.expect("it is there")
}

/// A failure is of the code and the pushback that gRPC says, and attempts come to an end.
///
/// The HTTP status, and the headers.
pub fn failure(data: &[u8]) {
    let mut input = Input(data);
    let status = StatusCode::from_bytes(input.bytes()).unwrap_or(StatusCode::OK);
    let mut response = Response::new(());
    *response.status_mut() = status;
    *response.headers_mut() = input.headers();
    let headers = response.headers();
    let code = headers.get("grpc-status").map(HeaderValue::as_bytes);

    let failure = Failure::of_response(&response);
    let verdict = GrpcStatus.classify(&Ok(response.clone()));
    let Some(failure) = failure else {
        assert!(code == Some(b"0") || (code.is_none() && status == 200));
        assert_eq!(verdict, crate::gate::Verdict::Good);
        return;
    };
    let number = (1..=16).find(|number| code == Some(number.to_string().as_bytes()));
    match code {
        Some(_) => assert_eq!(failure.code, Code::from(number.unwrap_or(2))),
        None => assert!(failure.code != Code::Ok && status != 200),
    }
    let is_bad = failure.code == Code::Unavailable && (code.is_some() || status != 429);
    assert_eq!(verdict == crate::gate::Verdict::Bad, is_bad);
    assert_eq!(failure.nature, Nature::Sent);

    let said: Vec<_> = headers.get_all("grpc-retry-pushback-ms").iter().collect();
    let expected = match said[..] {
        [] => Pushback::None,
        [said] => match said_millis(said.as_bytes()) {
            Some(millis) => Pushback::After(Duration::from_millis(millis)),
            None => Pushback::Stop,
        },
        _ => Pushback::Stop,
    };
    assert_eq!(failure.pushback, expected);

    let policy = RetryPolicy::new(3).and_then(|policy| policy.on([failure.code]));
    let policy = policy.expect("a policy").idempotent();
    let mut progress = Progress::new();
    let mut made = 1;
    while let Verdict::After(delay) = progress.after(failure, true, Some(&policy), None) {
        made += 1;
        match failure.pushback {
            Pushback::After(said) => assert_eq!(delay, said),
            _ => assert!(delay <= Duration::from_millis(1200)),
        }
    }
    let most = match failure.pushback {
        Pushback::Stop => 1,
        _ => 3,
    };
    assert_eq!(made, most);
}

/// At most a day.
fn said_millis(value: &[u8]) -> Option<u64> {
    let all_digits = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
    let text = str::from_utf8(value).ok().filter(|_| all_digits)?;
    let digits = text.trim_start_matches('0');
    let millis = match digits.len() {
        0 => 0,
        1..=8 => digits.parse().expect("eight digits"),
        _ => return None,
    };
    let day = Backoff::LONGEST;
    assert_eq!(day, LONGEST_PUSHBACK);
    (Duration::from_millis(millis) <= day).then_some(millis)
}

/// A call is refused as another's only in these words, and certainly unprocessed only where it was for us.
///
/// Our id, and the headers.
#[cfg(feature = "transport")]
pub fn refusal(data: &[u8]) {
    const EXPECTED: &str = "expectedNodeID=";
    let mut input = Input(data);
    let id = input.line().parse().unwrap_or(7_u64).to_string();
    let mut head = input.headers();
    without_wrong_details(&mut head);
    let mut metadata = HeaderMap::new();
    metadata.insert("serverid", id.parse().expect("a number"));
    let refusal = Identity::new(metadata).refusal(&head);

    let status = Status::from_header_map(&head);
    let said = status.as_ref().map_or("", Status::message);
    let is_failure = status.as_ref().is_some_and(|s| s.code() != Code::Ok);
    // Up to the first that is no digit.
    let meant = said.find(EXPECTED).map(|at| {
        let from = at + EXPECTED.len();
        let digits = said[from..].bytes().take_while(u8::is_ascii_digit);
        &said[from..from + digits.count()]
    });
    let is_ours = meant.is_none_or(|meant| meant == id);
    let Some((kept, sent)) = refusal else {
        assert!(!is_failure || !said.contains("node not match") || !is_ours);
        return;
    };
    assert!(is_failure && said.contains("node not match") && is_ours);
    assert_eq!(sent == Sent::Unprocessed, meant.is_some());
    assert_eq!(sent == Sent::Sent, meant.is_none());
    assert!(kept.len() <= 256 && said.starts_with(&kept));
    assert!(kept.len() == said.len() || kept.len() > 256 - 4);
}

/// Errors come back whole from a status, and their words over the wire; the code of a peer's status is kept.
///
/// A digit for the kind and one for how far it got, the reason, and the headers.
pub fn status(data: &[u8]) {
    const KINDS: [Kind; 10] = [
        Kind::Invalid,
        Kind::NoSession,
        Kind::NotConnected,
        Kind::SessionDeleted,
        Kind::ConnectionLost,
        Kind::Refused,
        Kind::OtherInstance,
        Kind::DeadlineExceeded,
        Kind::Cancelled,
        Kind::Internal,
    ];
    let mut input = Input(data);
    let number = input.line().parse().unwrap_or(0_usize);
    let kind = KINDS[number % 10];
    let sent = [
        crate::Sent::Unsent,
        crate::Sent::Unprocessed,
        crate::Sent::Sent,
    ][number / 10 % 3];
    let reason = input.line();
    let error = Error::new(kind).with_reason(reason.clone().into_owned());
    let error = error.with_sent(sent);
    let (code, words) = (error.code(), error.to_string());
    assert!(words.contains(&*reason));
    let status = Status::from(error);
    comes_back(&status, code, &words);
    let found = Error::of(&status).expect("it is there");
    assert_eq!((found.kind(), found.sent()), (kind, sent));
    assert_eq!(found.reason().as_deref(), Some(&*reason));
    // As a generated client does it, and one that wraps that once more.
    let boxed = Status::from_error(Box::new(status));
    assert_eq!(boxed.message(), words);
    let again = Error::from_service(Box::new(boxed));
    assert_eq!(again.code(), code);
    assert_eq!(again.to_string(), format!("call failed: {words}"));
    assert_eq!(Error::of(&again).map(Error::kind), Some(Kind::Service));

    let mut head = input.headers();
    without_wrong_details(&mut head);
    let Some(status) = Status::from_header_map(&head) else {
        assert!(!head.contains_key("grpc-status"));
        return;
    };
    let details = head.get("grpc-status-details-bin");
    assert_eq!(
        status.details().is_empty(),
        details.is_none_or(|d| d.is_empty())
    );
    let (code, words) = (status.code(), status.message().to_owned());
    let error = Error::from_service(Box::new(status));
    assert_eq!(error.code(), code);
    assert!(error.to_string().contains(&words));
    assert!(Error::of(&Status::from(error)).is_some_and(|e| e.kind() == Kind::Service));
}

/// Who has no transport of ours has to trust another's.
#[cfg(not(feature = "transport"))]
fn without_wrong_details(head: &mut HeaderMap) {
    head.remove("grpc-status-details-bin");
}

fn comes_back(status: &Status, code: Code, words: &str) {
    assert_eq!((status.code(), status.message()), (code, words));
    let head = status.clone().into_http::<()>().into_parts().0.headers;
    let read = Status::from_header_map(&head).expect("it is one");
    assert_eq!((read.code(), read.message()), (code, words));
}

/// What a proxy says comes to the same wherever reads cut it, and what comes after its answer is the peer's, whole.
///
/// How many lengths of reads, these, and the answer.
#[cfg(feature = "transport")]
pub fn proxy_answer(data: &[u8]) {
    let mut input = Input(data);
    let reads = input.counted();
    let answer = &input.0[..input.0.len().min(2048)];
    let whole = ask(answer, [answer.len().max(1)].into_iter());
    let single = ask(answer, [1].into_iter());
    let cut = ask(answer, reads.iter().map(|&read| usize::from(read) + 1));
    assert_eq!(single, whole);
    // Without lengths nothing was read.
    assert!(cut == whole || reads.is_empty());
    match (whole, answered(answer)) {
        (Ended::Refused(line), Ended::Refused(all)) => {
            super::is_short_line(&line);
            assert!(line.chars().count() <= 80 && line[..3] == all[..3]);
        }
        (whole, expected) => assert_eq!(whole, expected),
    }
}

/// By what RFC 9112 calls lines, and a head.
#[cfg(feature = "transport")]
fn answered(text: &[u8]) -> Ended {
    let mut from = 0;
    loop {
        let rest = &text[from..];
        let begins = rest.iter().zip(b"HTTP/1.").all(|(a, b)| a == b);
        let Some(end) = rest.iter().position(|&b| b == b'\n').filter(|_| begins) else {
            return if begins {
                Ended::Silent
            } else {
                Ended::Nonsense
            };
        };
        let code = match rest[..end].trim_ascii_end() {
            [_, _, _, _, _, _, _, _, b' ', code @ ..] => code,
            _ => return Ended::Nonsense,
        };
        let is_code = code.len() >= 3
            && code[..3].iter().all(u8::is_ascii_digit)
            && code.get(3).is_none_or(|&b| b == b' ');
        if !is_code {
            return Ended::Nonsense;
        }
        if !b"12".contains(&code[0]) {
            return Ended::Refused(String::from_utf8_lossy(code).into_owned());
        }
        let ends = (end..rest.len()).find_map(|at| match &rest[at..] {
            [b'\n', b'\n', ..] => Some(at + 2),
            [b'\n', b'\r', b'\n', ..] => Some(at + 3),
            _ => None,
        });
        match ends {
            Some(length) if code[0] == b'1' => from += length,
            Some(length) => return Ended::Open(from + length),
            None => return Ended::Silent,
        }
    }
}

#[cfg(feature = "transport")]
#[derive(Clone, Debug, PartialEq, Eq)]
enum Ended {
    /// After so many bytes, all told.
    Open(usize),
    Refused(String),
    Nonsense,
    /// It would say more.
    Silent,
}

/// As `Proxy::connect` does it.
#[cfg(feature = "transport")]
fn ask(answer: &[u8], reads: impl Iterator<Item = usize> + Clone) -> Ended {
    let (mut from, mut to) = (0, 0);
    let mut reads = reads.cycle();
    loop {
        match Said::read(&answer[from..to]) {
            Said::Open(length) => return Ended::Open(from + length),
            Said::Refused(line) => return Ended::Refused(line),
            Said::Nonsense => return Ended::Nonsense,
            Said::Wait(length) => {
                assert!(length > 0 && from + length <= to);
                from += length;
            }
            Said::Part if to == answer.len() => return Ended::Silent,
            Said::Part => match reads.next() {
                Some(read) => to = answer.len().min(to + read),
                None => return Ended::Silent,
            },
        }
    }
}
