//! All connections to one peer, as one service.
//!
//! One is there from the start. A call takes the one with the fewest calls; others come and go by what calls meet, in a
//! task beside them ([`keeper`]): never on a caller's path.

mod keeper;
mod size;

use std::{
    cell::Cell,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker, ready},
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use tokio::time::Instant;
use tower_service::Service;

pub(super) use self::size::Size;
use super::{
    Body, Connection, Connector, common::Common, dial::Destination, request::ResponseFuture,
    slots::Waiting,
};
use crate::{
    endpoint::Lifeline,
    error::{BoxError, Error, Kind, Sent},
};

/// All connections to one peer, as one tower service; a clone is another handle on the same ones.
///
/// A call goes over the connection that has the fewest. There is one at first. Another is opened when the peer allows no
/// more streams on those there are, or on a multi-threaded runtime when each has many calls, up to
/// [`Connector::max_connections`]; one is closed when fewer would have done for
/// [`Connector::spare_for`]. One that is too old ([`Connector::max_age`]), or that its peer is closing (GOAWAY), takes
/// no new calls and finishes its own.
///
/// `poll_ready` is pending while all streams of all connections are in use, and fails once none takes calls any more. Of
/// clones that wait, each is woken by a stream of whichever connection. When the last handle is dropped, each connection
/// closes as its last call ends.
pub struct Connections {
    set: Arc<Set>,
    /// For the call that follows.
    picked: Option<Connection>,
    waiting: Waiting,
}

/// What all handles share. The connections' own handles are here and nowhere else: so they close with the last of these.
struct Set {
    open: ArcSwap<Vec<Member>>,
    common: Arc<Common>,
}

/// One of the connections that take calls.
#[derive(Clone)]
struct Member {
    connection: Connection,
    /// When another is to take its place.
    due: Option<Instant>,
    /// Which TLS configuration it was made with, at least.
    tls: u64,
}

/// What a look at the connections found.
enum Pick {
    Picked(Connection),
    /// All streams are in use.
    Full,
    /// None of them takes calls any more.
    Over,
}

// === impl Connections ===

impl Connections {
    /// Makes the first one.
    ///
    /// Dropping the future closes what was opened.
    pub(super) async fn open(
        connector: Connector,
        to: Destination,
        identity: HeaderMap,
    ) -> Result<Self, Error> {
        let common = Arc::new(Common::new(to, identity, &connector));
        let tls = connector.tls_number();
        let first = connector.open(&common).await?;
        let set = Arc::new(Set {
            open: ArcSwap::from_pointee(vec![Member::new(first, &connector, tls)]),
            common,
        });
        tokio::spawn(keeper::run(&set, connector));
        Ok(Self {
            set,
            picked: None,
            waiting: Waiting::default(),
        })
    }

    /// The lifeline of all of them, to be told of their end and to close them.
    pub fn lifeline(&self) -> Arc<dyn Lifeline> {
        self.set.common.clone()
    }

    /// How many connections take calls.
    pub fn len(&self) -> usize {
        self.set.common.connections()
    }

    /// Whether no connection takes calls any more.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many calls are using them.
    pub fn streams(&self) -> usize {
        let open = self.set.open.load();
        open.iter().map(|member| member.connection.streams()).sum()
    }

    /// Whether none takes calls any more, and none will.
    #[cfg(feature = "health")]
    pub(super) fn is_over(&self) -> bool {
        self.set.is_over()
    }

    /// One of them, for questions of our own; none at the instant at which one takes another's place.
    #[cfg(feature = "health")]
    pub(super) fn for_ourselves(&self) -> Option<Connection> {
        match self.set.pick() {
            Pick::Picked(connection) => Some(connection.for_ourselves()),
            Pick::Full => self.set.any().map(Connection::for_ourselves),
            Pick::Over => None,
        }
    }

    fn poll_pick(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        // Asked twice it holds one stream, and does not wait for another that it has itself.
        if self
            .picked
            .as_ref()
            .is_some_and(|picked| !picked.core.is_leaving())
        {
            return Poll::Ready(Ok(()));
        }
        self.picked = None;
        loop {
            match self.set.pick() {
                Pick::Picked(connection) => {
                    self.waiting.end();
                    self.picked = Some(connection);
                    return Poll::Ready(Ok(()));
                }
                Pick::Over if self.set.is_over() => {
                    return Poll::Ready(Err(self.set.why_over()));
                }
                found => {
                    let set = &self.set;
                    // Otherwise the list has changed since it was loaded, or is about to: a connection leaves when another
                    // has taken its place.
                    if matches!(found, Pick::Full) {
                        set.common.all_full();
                    }
                    // Woken by a stream that is free, a peer that allows more, or a connection that comes or goes.
                    ready!(
                        self.waiting
                            .poll(&set.common.slot_free, || set.note_limits(), cx)
                    );
                }
            }
        }
    }
}

impl<B> Service<Request<B>> for Connections
where
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<Body>;
    type Error = Error;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.poll_pick(cx)
    }

    fn call(&mut self, request: Request<B>) -> ResponseFuture {
        let picked = self.picked.take().or_else(|| self.set.any());
        match picked {
            Some(mut connection) => connection.call(request),
            None => ResponseFuture::failed(self.set.why_over()),
        }
    }
}

impl Clone for Connections {
    fn clone(&self) -> Self {
        Self {
            set: self.set.clone(),
            picked: None,
            waiting: Waiting::default(),
        }
    }
}

impl fmt::Debug for Connections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Connections")
            .field(&self.set.common)
            .finish()
    }
}

// === impl Set ===

impl Set {
    /// The connection for a call: of those with a stream for it, the one with the fewest calls, or the one that this
    /// thread prefers if that has hardly more.
    #[inline]
    fn pick(&self) -> Pick {
        // Whoever answers is another: also where all streams are in use, and there is nothing to wait for.
        if self.common.identity.is_denied() {
            return Pick::Over;
        }
        let open = self.open.load();
        match open.as_slice() {
            [only] if only.connection.core.is_leaving() => Pick::Over,
            [only] => only.picked().unwrap_or(Pick::Over),
            several => self.pick_of(several),
        }
    }

    fn pick_of(&self, open: &[Member]) -> Pick {
        // Each look but the last has ruled one out, or somebody else has taken a stream.
        for _ in 0..2 * open.len() {
            let mut usable = false;
            let mut best: Option<(&Member, usize)> = None;
            let preferred = preference(open.len());
            for (n, member) in open.iter().enumerate() {
                let core = &member.connection.core;
                if core.is_leaving() {
                    continue;
                }
                usable = true;
                if !core.has_slot() {
                    continue;
                }
                let handicap = if n == preferred { 0 } else { STICKY };
                let load = core.streams() + handicap;
                if best.is_none_or(|(_, least)| load < least) {
                    best = Some((member, load));
                }
            }
            let Some((best, _)) = best else {
                return if usable { Pick::Full } else { Pick::Over };
            };
            match best.picked() {
                // It is passed by at the next look. To wait now, with room elsewhere, would be to wait for nobody.
                Some(Pick::Full) | None => {}
                Some(picked) => return picked,
            }
        }
        // It has lost each race, and there may be room yet. Who waits has seen each of them full: the next stream of any is told.
        let mut usable = false;
        for member in open.iter().filter(|m| !m.connection.core.is_leaving()) {
            match member.picked() {
                Some(Pick::Full) => usable = true,
                Some(picked) => return picked,
                None => {}
            }
        }
        if usable { Pick::Full } else { Pick::Over }
    }

    /// Any of them, whether it has a stream or not.
    fn any(&self) -> Option<Connection> {
        let open = self.open.load();
        let mut usable = open.iter().filter(|m| !m.connection.core.is_leaving());
        usable.next().map(|member| member.connection.clone())
    }

    /// Notes how many streams the peer allows on each of them.
    fn note_limits(&self) {
        for Member { connection, .. } in self.open.load().iter() {
            let limit = || connection.send.current_max_send_streams();
            connection.core.note_limit(limit);
        }
    }

    fn is_over(&self) -> bool {
        self.common.why_over().is_some() || self.common.identity.is_denied()
    }

    fn why_over(&self) -> Error {
        let why = self
            .common
            .identity
            .error()
            .or_else(|| self.common.why_over());
        why.unwrap_or_else(|| Error::new(Kind::ConnectionLost))
            .with_sent(Sent::Unsent)
    }
}

impl Drop for Set {
    fn drop(&mut self) {
        self.common.seal();
    }
}

// === impl Member ===

impl Member {
    /// Made by this connector, of whose TLS configurations the one of this number was in force when that began.
    fn new(connection: Connection, connector: &Connector, tls: u64) -> Self {
        Self {
            connection,
            tls,
            due: connector.size.age().map(|age| Instant::now() + age),
        }
    }

    /// It for a call, unless it turns out to take none any more.
    #[inline]
    fn picked(&self) -> Option<Pick> {
        let mut connection = self.connection.clone();
        // A new handle has no stream of its own that it would have to wait for.
        match connection.poll_usable(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(())) => {
                // Taken here and now: with a look alone, several callers would find the same last one, and all but one would
                // wait for it in h2, whatever room the others have.
                connection.slot = connection.core.try_take_slot();
                Some(match connection.slot {
                    Some(_) => Pick::Picked(connection),
                    None => Pick::Full,
                })
            }
            Poll::Pending => Some(Pick::Full),
            Poll::Ready(Err(why)) => {
                // It is not this connection that is at an end if whoever answers is another: all are, and say so.
                if why.kind() != Kind::OtherInstance {
                    connection.core.leave(|| match why.reason() {
                        Some(why) => why,
                        None => why.to_string(),
                    });
                }
                None
            }
        }
    }
}

/// How many more calls the connection that a thread prefers may have.
const STICKY: usize = 8;

/// Which of so many connections this thread prefers. Threads that keep to different ones meet at neither's lock.
fn preference(of: usize) -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static MINE: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    if of < 2 {
        return 0;
    }
    MINE.with(|mine| {
        if mine.get() == usize::MAX {
            mine.set(NEXT.fetch_add(1, Ordering::Relaxed) % (usize::MAX / 2));
        }
        mine.get() % of
    })
}
