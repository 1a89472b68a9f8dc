//! Request bodies that can be sent more than once.

use std::{
    fmt,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker, ready},
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body as _, Frame, SizeHint};
use tonic::Status;

use crate::error::{Error, Kind};

/// The request body of one attempt of a call.
///
/// A unary call's is its message, shared and not copied. A stream is read once, and what was read is kept, up to the
/// layer's bound, for the next attempt.
#[derive(Debug)]
pub struct Body {
    kind: Form,
}

enum Form {
    /// All there is: nothing, or one message.
    Whole(Option<Bytes>),
    Replay(Replay),
}

/// What a call keeps of its request's body, to send it again.
#[derive(Debug)]
pub(super) enum Source {
    Whole(Option<Bytes>),
    Tape(Tape),
    /// It cannot be sent again: it is larger than what may be kept.
    Spent,
}

/// A stream's beginning, and the stream. A clone is the same tape.
#[derive(Clone)]
pub(super) struct Tape(Arc<Mutex<Reel>>);

struct Reel {
    source: tonic::body::Body,
    /// What was read, while it is kept; later what the one reader has not had yet.
    pieces: Vec<Option<Piece>>,
    bytes: usize,
    most: usize,
    /// Nothing more is kept, and nobody begins anew.
    committed: bool,
    /// Which attempt reads on; those before it are over.
    attempt: u32,
    over: bool,
}

#[derive(Clone)]
enum Piece {
    Data(Bytes),
    Trailers(HeaderMap),
}

/// One attempt's place on a tape.
struct Replay {
    tape: Tape,
    attempt: u32,
    at: usize,
}

// === impl Source ===

impl Source {
    /// Looks at a body: whether it is all there, as a unary call's is.
    pub(super) fn of(mut body: tonic::body::Body, most: usize) -> Result<(Body, Self), Error> {
        let failed = |error: Status| Error::new(Kind::RequestBody).with_source(error);
        let mut cx = Context::from_waker(Waker::noop());
        let mut look = |body: &mut tonic::body::Body| match body.is_end_stream() {
            true => Poll::Ready(None),
            false => Pin::new(body).poll_frame(&mut cx),
        };
        let mut pieces = Vec::new();
        let mut over = false;
        for _ in 0..2 {
            match look(&mut body) {
                Poll::Ready(Some(frame)) => pieces.extend(Piece::of(frame.map_err(failed)?)),
                Poll::Ready(None) => {
                    over = true;
                    break;
                }
                // Whoever reads on polls again, with a waker.
                Poll::Pending => break,
            }
        }
        let bytes = pieces.iter().map(Piece::len).sum();
        let whole = match (over, pieces.as_slice()) {
            (true, []) => Some(None),
            (true, [Piece::Data(message)]) => Some(Some(message.clone())),
            _ => None,
        };
        if let Some(whole) = whole {
            let source = match bytes > most {
                true => Self::Spent,
                false => Self::Whole(whole.clone()),
            };
            return Ok((Body::whole(whole), source));
        }
        let tape = Tape(Arc::new(Mutex::new(Reel {
            source: body,
            pieces: pieces.into_iter().map(Some).collect(),
            bytes,
            most,
            committed: bytes > most,
            attempt: 0,
            over,
        })));
        let body = Body::replay(tape.clone(), 0);
        Ok((body, Self::Tape(tape)))
    }

    /// The body of the next attempt; none if it cannot be sent again.
    pub(super) fn again(&self) -> Option<Body> {
        match self {
            Self::Whole(message) => Some(Body::whole(message.clone())),
            Self::Tape(tape) => tape.rewind(),
            Self::Spent => None,
        }
    }

    /// Whether it could be sent again.
    pub(super) fn is_there(&self) -> bool {
        match self {
            Self::Whole(_) => true,
            Self::Tape(tape) => !tape.lock().committed,
            Self::Spent => false,
        }
    }

    /// There will be no other attempt.
    pub(super) fn commit(self) {
        if let Self::Tape(tape) = self {
            tape.lock().committed = true;
        }
    }
}

// === impl Tape ===

impl Tape {
    /// A new attempt reads from the beginning, and the one before it no more.
    fn rewind(&self) -> Option<Body> {
        let mut reel = self.lock();
        if reel.committed {
            return None;
        }
        reel.attempt += 1;
        let attempt = reel.attempt;
        drop(reel);
        Some(Body::replay(self.clone(), attempt))
    }

    /// The stream is read under it: of two attempts that overlap for a moment only one may, and the one that is over
    /// does no more than return.
    fn lock(&self) -> MutexGuard<'_, Reel> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Tape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.try_lock() {
            Ok(reel) => f
                .debug_struct("Tape")
                .field("bytes", &reel.bytes)
                .field("committed", &reel.committed)
                .finish_non_exhaustive(),
            Err(_) => f.debug_struct("Tape").finish_non_exhaustive(),
        }
    }
}

// === impl Reel ===

impl Reel {
    fn poll_next(
        &mut self,
        at: &mut usize,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(kept) = self.pieces.get_mut(*at) {
            *at += 1;
            let piece = match self.committed {
                // Nobody reads it again.
                true => kept.take(),
                false => kept.clone(),
            };
            if self.committed && *at == self.pieces.len() {
                self.pieces = Vec::new();
            }
            return Poll::Ready(piece.map(|piece| Ok(piece.frame())));
        }
        if self.over {
            return Poll::Ready(None);
        }
        let frame = match ready!(Pin::new(&mut self.source).poll_frame(cx)) {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => {
                // It fails whoever reads it, so nobody is to begin anew.
                self.over = true;
                self.committed = true;
                return Poll::Ready(Some(Err(error)));
            }
            None => {
                self.over = true;
                return Poll::Ready(None);
            }
        };
        let Some(piece) = Piece::of(frame) else {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        };
        if !self.committed {
            self.bytes = self.bytes.saturating_add(piece.len());
            if self.bytes > self.most {
                self.committed = true;
                self.pieces = Vec::new();
            } else {
                self.pieces.push(Some(piece.clone()));
                *at += 1;
            }
        }
        Poll::Ready(Some(Ok(piece.frame())))
    }
}

// === impl Piece ===

impl Piece {
    /// None for a kind of frame that is neither, which HTTP does not have yet.
    fn of(frame: Frame<Bytes>) -> Option<Self> {
        match frame.into_data() {
            Ok(data) => Some(Self::Data(data)),
            Err(frame) => frame.into_trailers().ok().map(Self::Trailers),
        }
    }

    fn frame(self) -> Frame<Bytes> {
        match self {
            Self::Data(data) => Frame::data(data),
            Self::Trailers(trailers) => Frame::trailers(trailers),
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Data(data) => data.len(),
            Self::Trailers(trailers) => trailers
                .iter()
                .map(|(n, v)| n.as_str().len() + v.len())
                .sum(),
        }
    }
}

// === impl Body ===

impl Body {
    const fn whole(message: Option<Bytes>) -> Self {
        Self {
            kind: Form::Whole(message),
        }
    }

    const fn replay(tape: Tape, attempt: u32) -> Self {
        Self {
            kind: Form::Replay(Replay {
                tape,
                attempt,
                at: 0,
            }),
        }
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match &mut self.kind {
            Form::Whole(message) => Poll::Ready(message.take().map(|data| Ok(Frame::data(data)))),
            Form::Replay(replay) => {
                let mut reel = replay.tape.lock();
                if reel.attempt != replay.attempt {
                    let why = "another attempt of the call has taken its place";
                    return Poll::Ready(Some(Err(Status::cancelled(why))));
                }
                reel.poll_next(&mut replay.at, cx)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.kind, Form::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Form::Whole(None) => SizeHint::with_exact(0),
            Form::Whole(Some(message)) => SizeHint::with_exact(message.len() as u64),
            Form::Replay(_) => SizeHint::default(),
        }
    }
}

impl From<Body> for tonic::body::Body {
    fn from(body: Body) -> Self {
        Self::new(body)
    }
}

impl fmt::Debug for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole(message) => {
                let bytes = message.as_ref().map_or(0, Bytes::len);
                f.debug_tuple("Whole").field(&bytes).finish()
            }
            Self::Replay(replay) => f.debug_tuple("Replay").field(&replay.attempt).finish(),
        }
    }
}
