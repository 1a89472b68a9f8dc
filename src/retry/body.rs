//! Request bodies that can be sent more than once.

use std::{
    fmt, mem,
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
    /// What was read, while it is kept; later what its reader has not had yet.
    pieces: Vec<Option<Piece>>,
    /// Where the attempt that reads is.
    at: usize,
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
}

// === impl Source ===

impl Source {
    /// Looks at a body: whether it is all there, as a unary call's is.
    pub(super) fn of(mut body: tonic::body::Body, most: usize) -> Result<(Body, Self), Error> {
        // Whoever reads on polls again, with a waker.
        let mut cx = Context::from_waker(Waker::noop());
        let mut look = |body: &mut tonic::body::Body| match body.is_end_stream() {
            true => Poll::Ready(None),
            false => Pin::new(body).poll_frame(&mut cx),
        };
        let first = match look(&mut body) {
            Poll::Ready(Some(frame)) => frame.map_err(failed)?,
            Poll::Ready(None) => return Ok(Self::whole(None, most)),
            Poll::Pending => return Ok(Self::stream(body, Vec::new(), most)),
        };
        let first = match first.into_data() {
            Ok(data) => data,
            Err(frame) => {
                let pieces = Piece::of(frame).into_iter().collect();
                return Ok(Self::stream(body, pieces, most));
            }
        };
        match look(&mut body) {
            Poll::Ready(None) => Ok(Self::whole(Some(first), most)),
            Poll::Ready(Some(second)) => {
                let second = Piece::of(second.map_err(failed)?);
                let pieces = [Some(Piece::Data(first)), second].into_iter().flatten();
                Ok(Self::stream(body, pieces.collect(), most))
            }
            Poll::Pending => Ok(Self::stream(body, vec![Piece::Data(first)], most)),
        }
    }

    fn whole(message: Option<Bytes>, most: usize) -> (Body, Self) {
        let source = match message.as_ref().map_or(0, Bytes::len) > most {
            true => Self::Spent,
            false => Self::Whole(message.clone()),
        };
        (Body::whole(message), source)
    }

    fn stream(source: tonic::body::Body, pieces: Vec<Piece>, most: usize) -> (Body, Self) {
        let bytes = pieces.iter().map(Piece::cost).sum();
        let tape = Tape(Arc::new(Mutex::new(Reel {
            source,
            pieces: pieces.into_iter().map(Some).collect(),
            at: 0,
            bytes,
            most,
            committed: bytes > most,
            attempt: 0,
            over: false,
        })));
        (Body::replay(tape.clone(), 0), Self::Tape(tape))
    }

    /// The body of the next attempt; none if it cannot be sent again.
    pub(super) fn again(&self) -> Option<Body> {
        match self {
            Self::Whole(message) => Some(Body::whole(message.clone())),
            Self::Tape(tape) => tape.rewind(),
            Self::Spent => None,
        }
    }

    /// Whether it can be sent again. It stays so: the attempt before, which may not know yet that it is over, reads no more.
    pub(super) fn take_back(&self) -> bool {
        match self {
            Self::Whole(_) => true,
            Self::Tape(tape) => tape.take_back(),
            Self::Spent => false,
        }
    }

    /// There will be no other attempt.
    pub(super) fn commit(self) {
        if let Self::Tape(tape) = self {
            let mut reel = tape.lock();
            reel.committed = true;
            reel.forget();
        }
    }
}

// === impl Tape ===

impl Tape {
    /// The attempt that reads does so no more; false if it has read too much for another to begin anew.
    fn take_back(&self) -> bool {
        let mut reel = self.lock();
        if !reel.committed {
            reel.attempt += 1;
        }
        !reel.committed
    }

    /// A new attempt reads from the beginning, and the one before it no more.
    fn rewind(&self) -> Option<Body> {
        let mut reel = self.lock();
        if reel.committed {
            return None;
        }
        reel.attempt += 1;
        reel.at = 0;
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
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(kept) = self.pieces.get_mut(self.at) {
            self.at += 1;
            let piece = match self.committed {
                // Nobody reads it again.
                true => kept.take(),
                false => kept.clone(),
            };
            if self.committed {
                self.forget();
            }
            return Poll::Ready(piece.map(|piece| Ok(piece.frame())));
        }
        if self.over {
            return Poll::Ready(None);
        }
        // A stream that panics is not read again.
        let committed = mem::replace(&mut self.committed, true);
        let frame = ready!(self.poll_source(committed, cx));
        self.committed = committed;
        let frame = match frame {
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
            self.bytes = self.bytes.saturating_add(piece.cost());
            if self.bytes > self.most {
                self.committed = true;
                self.forget();
            } else {
                self.pieces.push(Some(piece.clone()));
                self.at += 1;
            }
        }
        Poll::Ready(Some(Ok(piece.frame())))
    }

    fn poll_source(
        &mut self,
        committed: bool,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = Pin::new(&mut self.source).poll_frame(cx);
        if frame.is_pending() {
            self.committed = committed;
        }
        frame
    }

    /// Lets go of what its one reader has had.
    fn forget(&mut self) {
        if self.at >= self.pieces.len() {
            self.pieces = Vec::new();
            self.at = 0;
        }
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

    /// What it takes to keep it. A stream of empty messages is not for nothing.
    fn cost(&self) -> usize {
        let bytes = match self {
            Self::Data(data) => data.len(),
            Self::Trailers(trailers) => {
                let sizes = trailers.iter().map(|(n, v)| n.as_str().len() + v.len());
                sizes.sum()
            }
        };
        bytes + size_of::<Self>()
    }
}

fn failed(error: Status) -> Error {
    Error::new(Kind::RequestBody).with_source(error)
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
            kind: Form::Replay(Replay { tape, attempt }),
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
                    let why = "the attempt is over, and another may take its place";
                    return Poll::Ready(Some(Err(Status::cancelled(why))));
                }
                reel.poll_next(cx)
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
