//! A look at the frames that a peer sends, on their way to h2, which keeps to itself that a GOAWAY was among them.
//!
//! h2 refuses new streams from then on, one call after the other; a connection that carries long calls would be found
//! out by the next one.

use std::fmt;

use h2::Reason;

/// Follows frames, however they are cut into reads, as far as it takes to find a GOAWAY.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    head: [u8; HEAD],
    /// How much of the head is here.
    have: usize,
    /// How much of the payload is to come.
    left: usize,
    /// What there is of the payload of a GOAWAY.
    going: Option<Vec<u8>>,
    /// This frame is of settings, and what of them is of interest.
    settings: Option<Settings>,
    /// The last limit of streams that has come since that was last asked.
    streams: Option<u32>,
}

/// What has come of one frame of settings (RFC 9113, 6.5.1): of each an identifier and a value.
#[derive(Debug, Default)]
struct Settings {
    setting: [u8; SETTING],
    /// How much of it is here.
    have: usize,
    streams: Option<u32>,
}

/// A peer's word that it takes no new calls on this connection (RFC 9113, 6.8).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GoAway {
    pub(crate) reason: Reason,
    /// What it adds for people to read, as far as it is kept.
    pub(crate) words: String,
}

/// The head of a frame: length, type, flags, stream (RFC 9113, 4.1).
const HEAD: usize = 9;

/// The types of frames that are looked for, and the flag of one that only says that another was read.
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const ACK: u8 = 1;

/// One setting: two bytes that say which, four of its value; and the one that limits streams,
/// SETTINGS_MAX_CONCURRENT_STREAMS.
const SETTING: usize = 6;
const MAX_CONCURRENT_STREAMS: [u8; 2] = [0, 3];

/// The last stream's id and the code, before the words.
const CODES: usize = 8;

/// How many bytes of the words are kept.
const WORDS: usize = 128;

// === impl Frames ===

impl Frames {
    /// Takes in what was read; returns the last GOAWAY that is complete by now.
    pub(crate) fn read(&mut self, mut bytes: &[u8]) -> Option<GoAway> {
        let mut found = None;
        while !bytes.is_empty() {
            if self.have == 0
                && let Some((head, rest)) = bytes.split_first_chunk()
            {
                // Most frames are here as a whole, and none of those that are looked for.
                let ([_, _, _, kind, ..], length) = (*head, length_of(*head));
                if kind != GOAWAY
                    && kind != SETTINGS
                    && let Some((_, rest)) = rest.split_at_checked(length)
                {
                    bytes = rest;
                    continue;
                }
                self.begin(*head);
                bytes = rest;
            } else if self.have < HEAD {
                let part = bytes.len().min(HEAD - self.have);
                let (head, rest) = bytes.split_at(part);
                self.head[self.have..self.have + part].copy_from_slice(head);
                self.have += part;
                bytes = rest;
                if self.have < HEAD {
                    break;
                }
                self.begin(self.head);
            }
            let part = bytes.len().min(self.left);
            if let Some(going) = &mut self.going {
                let room = (CODES + WORDS).saturating_sub(going.len());
                going.extend_from_slice(&bytes[..part.min(room)]);
            }
            if let Some(settings) = &mut self.settings {
                settings.read(&bytes[..part]);
            }
            self.left -= part;
            bytes = &bytes[part..];
            if self.left == 0 {
                self.have = 0;
                if let Some(settings) = self.settings.take() {
                    self.streams = settings.streams.or(self.streams);
                }
                if let Some(going) = self.going.take() {
                    found = GoAway::parse(&going).or(found);
                }
            }
        }
        found
    }

    /// How many streams the peer allows, if it has said so since this was last asked.
    pub(crate) fn take_streams(&mut self) -> Option<u32> {
        self.streams.take()
    }

    #[inline]
    fn begin(&mut self, head: [u8; HEAD]) {
        let [_, _, _, kind, flags, ..] = head;
        self.have = HEAD;
        self.left = length_of(head);
        if kind == GOAWAY {
            self.going = Some(Vec::new());
        }
        if kind == SETTINGS && flags & ACK == 0 {
            self.settings = Some(Settings::default());
        }
    }
}

/// How long the payload is that follows this head.
fn length_of([a, b, c, ..]: [u8; HEAD]) -> usize {
    usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c)
}

// === impl Settings ===

impl Settings {
    fn read(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.setting[self.have] = *byte;
            self.have += 1;
            if self.have == SETTING {
                self.have = 0;
                if let [a, b, value @ ..] = self.setting
                    && [a, b] == MAX_CONCURRENT_STREAMS
                {
                    self.streams = Some(u32::from_be_bytes(value));
                }
            }
        }
    }
}

// === impl GoAway ===

impl GoAway {
    fn parse(payload: &[u8]) -> Option<Self> {
        let (codes, words) = payload.split_at_checked(CODES)?;
        let reason = codes.last_chunk().map(|code| u32::from_be_bytes(*code))?;
        Some(Self {
            reason: reason.into(),
            words: words.escape_ascii().to_string(),
        })
    }

    /// Whether it closes for being pinged more often than it allows.
    pub(crate) fn minds_pings(&self) -> bool {
        self.reason == Reason::ENHANCE_YOUR_CALM && self.words == "too_many_pings"
    }
}

impl fmt::Display for GoAway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the peer is closing the connection")?;
        match (self.reason, self.words.as_str()) {
            (Reason::NO_ERROR, "") => Ok(()),
            (Reason::NO_ERROR, words) => write!(f, ": {words}"),
            (reason, "") => write!(f, ": {reason:?}"),
            (reason, words) => write!(f, ": {reason:?}, {words}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let [_, length @ ..] = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[..], &[kind, 0, 0, 0, 0, 0], payload].concat()
    }

    fn go_away(reason: Reason, words: &str) -> Vec<u8> {
        let codes = [0x7fff_ffff, u32::from(reason)]
            .map(u32::to_be_bytes)
            .concat();
        frame(GOAWAY, &[&codes, words.as_bytes()].concat())
    }

    #[test]
    fn it_reads_as_what_the_peer_says() {
        let said = |reason, words: &str| {
            let found = Frames::default().read(&go_away(reason, words));
            found.unwrap().to_string()
        };
        let closing = "the peer is closing the connection";
        assert_eq!(said(Reason::NO_ERROR, ""), closing);
        assert_eq!(
            said(Reason::NO_ERROR, "max_age"),
            format!("{closing}: max_age")
        );
        assert_eq!(
            said(Reason::INTERNAL_ERROR, ""),
            format!("{closing}: INTERNAL_ERROR")
        );
        let pings = Frames::default().read(&go_away(Reason::ENHANCE_YOUR_CALM, "too_many_pings"));
        let pings = pings.unwrap();
        assert!(pings.minds_pings());
        assert_eq!(
            pings.to_string(),
            format!("{closing}: ENHANCE_YOUR_CALM, too_many_pings")
        );
        let mut odd = go_away(Reason::NO_ERROR, "");
        odd.splice(.., frame(GOAWAY, &[0, 0, 0, 0, 0, 0, 0, 0, 7, 255]));
        let odd = Frames::default().read(&odd).unwrap();
        assert_eq!(odd.to_string(), format!("{closing}: \\x07\\xff"));
    }

    #[test]
    fn a_limit_of_streams_is_seen_once_all_settings_have_come() {
        let mut frames = Frames::default();
        let settings = frame(SETTINGS, &[0, 4, 0, 3, 0, 3, 0, 3, 0, 0, 1, 2]);
        for (n, byte) in settings.iter().enumerate() {
            assert_eq!(frames.read(&[*byte]), None);
            let seen = frames.take_streams();
            assert_eq!(seen, (n + 1 == settings.len()).then_some(258));
        }
        // Of two the last one holds, as in one frame.
        let twice = [0, 3, 0, 0, 0, 1, 0, 3, 0, 0, 0, 2].repeat(2);
        assert_eq!(frames.read(&frame(SETTINGS, &twice)), None);
        assert_eq!(frames.take_streams(), Some(2));
        assert_eq!(frames.take_streams(), None);
        // Others, an acknowledgement, a part of one, and what only looks like it.
        let mut ack = frame(SETTINGS, &twice);
        ack[4] = ACK;
        let other = frame(SETTINGS, &[0, 4, 0, 0, 0, 3]);
        let part = frame(SETTINGS, &[0, 3, 0, 0]);
        let data = frame(0, &[0, 3, 0, 0, 0, 1]);
        assert_eq!(frames.read(&[ack, other, part, data].concat()), None);
        assert_eq!(frames.take_streams(), None);
    }

    #[test]
    fn what_is_too_short_is_none_and_what_is_long_is_not_kept_whole() {
        let mut frames = Frames::default();
        assert_eq!(frames.read(&frame(GOAWAY, &[0; CODES - 1])), None);
        let long = "a".repeat(100_000);
        let found = frames.read(&go_away(Reason::NO_ERROR, &long)).unwrap();
        assert_eq!(found.words.len(), WORDS);
        assert!(frames.read(&go_away(Reason::NO_ERROR, "")).is_some());
    }

    proptest! {
        #[test]
        fn it_is_found_wherever_reads_cut(
            before in prop::collection::vec((0u8..7, 0usize..300), 0..8),
            after in prop::collection::vec((8u8..20, 0usize..300), 0..4),
            cuts in prop::collection::vec(1usize..40, 1..20),
        ) {
            // Payloads that look like the head of a GOAWAY.
            let noise = |(kind, length): &(u8, usize)| frame(*kind, &[0, 0, 0, GOAWAY].repeat(100)[..*length]);
            let wire: Vec<u8> = before.iter().flat_map(noise)
                .chain(go_away(Reason::NO_ERROR, "max_age"))
                .chain(after.iter().flat_map(noise))
                .collect();
            let (mut frames, mut found, mut rest) = (Frames::default(), Vec::new(), &wire[..]);
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (read, left) = rest.split_at(rest.len().min(*cut));
                found.extend(frames.read(read));
                rest = left;
            }
            prop_assert_eq!(found.len(), 1);
            prop_assert_eq!(&found[0].words, "max_age");
        }

        #[test]
        fn garbage_does_it_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..2_000)) {
            let mut frames = Frames::default();
            for part in bytes.chunks(7) {
                let _ = frames.read(part);
            }
        }
    }
}
