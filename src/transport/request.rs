//! One call: from an `http::Request` to the head of its response.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll, Waker, ready},
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, header::USER_AGENT, uri};
use http_body::{Body as _, Frame};
use tower_service::Service;

use super::{body::Body, connection::Connection, core::Slot, pump::Pump, resets::Cancelled};
use crate::{
    error::{BoxError, Error, Kind, Sent},
    headers::without_wrong_details,
};

/// The head of the response of a call through a [`Connection`].
///
/// Dropping it lets go of the request and resets the stream: at once, unless more than 16 were dropped within
/// a second without an answer; then when the peer has answered a ping, or a few if they are hundreds. A
/// server that gets too many resets at a time closes the connection under all other calls.
#[must_use = "futures do nothing unless polled"]
pub struct ResponseFuture {
    state: State,
    serves: bool,
}

enum State {
    Waiting {
        // First, so that its stream is let go of before its slot is given to another.
        response: h2::client::ResponseFuture,
        pump: Option<Pump>,
        slot: Slot,
    },
    Failed(Error),
    Done,
}

/// What a look at a request's body found.
enum Ahead {
    /// It is all there: nothing, or one message.
    Complete(Option<Bytes>),
    /// There is, or may be, more to come.
    Partial(Option<Frame<Bytes>>, Option<Frame<Bytes>>),
}

impl<B> Service<Request<B>> for Connection
where
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<Body>;
    type Error = Error;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Self::poll_ready(self, cx)
    }

    fn call(&mut self, request: Request<B>) -> ResponseFuture {
        let state = match self.send(request) {
            Ok(state) => state,
            Err(error) => State::Failed(error),
        };
        ResponseFuture {
            state,
            serves: self.serves,
        }
    }
}

impl Connection {
    fn send<B>(&mut self, request: Request<B>) -> Result<State, Error>
    where
        B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<BoxError>,
    {
        let (mut head, mut body) = request.into_parts();
        self.core.common.identity.put_into(&mut head.headers)?;
        self.check(&head.headers)?;
        let ahead =
            look(&mut body).map_err(|error| Error::new(Kind::RequestBody).with_source(error))?;

        let mut target = uri::Parts::default();
        target.scheme = Some(self.core.common.scheme.clone());
        target.authority = Some(self.core.common.to.authority.clone());
        target.path_and_query = head.uri.into_parts().path_and_query;
        if target.path_and_query.is_none() {
            target.path_and_query = Some(uri::PathAndQuery::from_static("/"));
        }
        head.uri = http::Uri::from_parts(target)
            .map_err(|error| Error::new(Kind::Invalid).with_source(error))?;
        head.headers
            .entry(USER_AGENT)
            .or_insert_with(|| self.core.common.user_agent.clone());
        let head = Request::from_parts(head, ());

        let end = matches!(ahead, Ahead::Complete(None));
        let taken = self.slot.take();
        let slot = taken.unwrap_or_else(|| self.core.take_slot());
        let (response, stream) = match self.send.send_request(head, end) {
            Ok(started) => started,
            Err(error) => return Err(self.unsent(error)),
        };
        // An error of the sending side never decides a call: the stream may have ended meanwhile, and
        // its response says how.
        let pump = match ahead {
            Ahead::Complete(None) => None,
            // A message and the end of the stream in one frame; h2 splits it if the window is small.
            Ahead::Complete(Some(message)) => match Pump::send_all(stream, message) {
                Ok(pump) => pump,
                Err((stream, message)) => {
                    let queued = [Some(Frame::data(message)), None];
                    Some(Pump::start(&self.core.common.runtime, stream, queued, body))
                }
            },
            Ahead::Partial(first, second) => {
                let queued = [first, second];
                Some(Pump::start(&self.core.common.runtime, stream, queued, body))
            }
        };
        Ok(State::Waiting {
            response,
            pump,
            slot,
        })
    }

    /// Refuses headers that would cost others their connection.
    fn check(&self, headers: &HeaderMap) -> Result<(), Error> {
        let sizes = headers
            .iter()
            .map(|(name, value)| name.as_str().len() + value.len() + 32);
        let (size, most) = (sizes.sum::<usize>(), self.core.common.max_header_list_size);
        if size > most {
            let why = format!("{size} bytes of headers; at most {most} are sent");
            return Err(Error::invalid("metadata", why));
        }
        Ok(())
    }

    /// Why a request was not taken: the connection, if that is at an end; otherwise the request.
    fn unsent(&mut self, error: h2::Error) -> Error {
        let mut context = Context::from_waker(Waker::noop());
        match self.send.poll_ready(&mut context) {
            Poll::Ready(Err(_)) => self.core.classify(error),
            _ => Error::new(Kind::Invalid)
                .with_reason("HTTP/2 cannot send this request")
                .with_source(error),
        }
        .with_sent(Sent::Unsent)
    }
}

/// Polls a body at most twice, without a waker: a unary one is complete then, and needs no task.
fn look<B>(body: &mut B) -> Result<Ahead, BoxError>
where
    B: http_body::Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    if body.is_end_stream() {
        return Ok(Ahead::Complete(None));
    }
    let mut context = Context::from_waker(Waker::noop());
    let first = match Pin::new(&mut *body).poll_frame(&mut context) {
        Poll::Pending => return Ok(Ahead::Partial(None, None)),
        Poll::Ready(None) => return Ok(Ahead::Complete(None)),
        Poll::Ready(Some(frame)) => match frame.map_err(Into::into)?.into_data() {
            Ok(data) => data,
            Err(trailers) => return Ok(Ahead::Partial(Some(trailers), None)),
        },
    };
    if body.is_end_stream() {
        return Ok(Ahead::Complete(Some(first)));
    }
    Ok(match Pin::new(body).poll_frame(&mut context) {
        Poll::Ready(None) => Ahead::Complete(Some(first)),
        Poll::Pending => Ahead::Partial(Some(Frame::data(first)), None),
        Poll::Ready(Some(second)) => {
            let second = second.map_err(Into::into)?;
            Ahead::Partial(Some(Frame::data(first)), Some(second))
        }
    })
}

// === impl ResponseFuture ===

impl ResponseFuture {
    /// Of a call that nobody took.
    pub(super) const fn failed(error: Error) -> Self {
        Self {
            state: State::Failed(error),
            serves: false,
        }
    }
}

impl Future for ResponseFuture {
    type Output = Result<Response<Body>, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let State::Waiting { response, .. } = &mut self.state {
            let result = ready!(Pin::new(response).poll(cx));
            let State::Waiting { pump, slot, .. } = std::mem::replace(&mut self.state, State::Done)
            else {
                return Poll::Pending;
            };
            return Poll::Ready(match result {
                Ok(mut response) => {
                    if self.serves {
                        slot.core.common.served();
                    }
                    without_wrong_details(response.headers_mut());
                    if let Some(error) = slot.core.common.identity.denial(&response) {
                        return Poll::Ready(Err(error));
                    }
                    Ok(response.map(|stream| Body::new(stream, pump, slot)))
                }
                Err(error) => Err(match pump.and_then(|pump| pump.failure()) {
                    Some(failure) => failure,
                    None => slot.core.classify(error),
                }),
            });
        }
        Poll::Ready(Err(match std::mem::replace(&mut self.state, State::Done) {
            State::Failed(error) => error,
            _ => Error::new(Kind::Internal).with_reason("polled after it was ready"),
        }))
    }
}

impl Drop for ResponseFuture {
    fn drop(&mut self) {
        let state = std::mem::replace(&mut self.state, State::Done);
        if let State::Waiting {
            response,
            pump,
            slot,
        } = state
        {
            let core = slot.core.clone();
            core.resets().cancel(Cancelled {
                _response: response,
                pump,
                _slot: slot,
            });
        }
    }
}

impl fmt::Debug for ResponseFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &self.state {
            State::Waiting { .. } => "waiting",
            State::Failed(_) => "failed",
            State::Done => "done",
        };
        f.debug_tuple("ResponseFuture").field(&state).finish()
    }
}
