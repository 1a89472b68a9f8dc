//! How a component runs a server, and how it is asked to stop.

use std::{
    future::{Future, Ready, pending},
    sync::atomic::Ordering,
};

use tokio::task::JoinHandle;

use super::{Component, core::Stopper, server::Server, shutdown::Signals, state::ComponentState};
use crate::error::{BoxError, Error, Kind};

// === impl Component ===

impl Component {
    /// Runs a server from its start to its end: registers when it listens, and at SIGTERM, SIGINT (unless
    /// [without](super::Builder::signals)) or [`shutdown`](Component::shutdown) lets it finish what it is doing.
    ///
    /// The server is any future that ends when [`stopping`](Component::stopping) does, such as tonic's
    /// `serve_with_incoming_shutdown(incoming, component.stopping())`. It is polled in this one. That it listens is known by
    /// a TCP connection to [`listens_at`](super::Builder::listens_at), tried every 50 ms; after 5 s without one a warning
    /// says so, and it is tried on. A component that was [started](super::Builder::start) before is registered already.
    ///
    /// That it is this server and not another at the same address, its [`health`](Component::health) service tells. One
    /// that has none, or speaks TLS, is taken for this one. So bind first, as above, and run the server on that listener;
    /// or bind at the future's first poll, as tonic's `serve_with_shutdown` does: then it fails before anybody looks. A
    /// server that binds late, after other work of its own, could be registered before it fails, and with the
    /// same id take the other's session.
    ///
    /// The end of the server is a request to stop, too. The stop is that of [`stop`](Component::stop), with the server
    /// in its middle: it has [`drain`](super::Builder::drain) to end, and is then dropped. tonic's connections are
    /// tasks of their own; what is still in flight on them then ends with the runtime, which is when `main` returns.
    ///
    /// A second request during the stop ends it at once: the server is dropped, no hook is told any more, and the registry
    /// has 250 ms to hear of it.
    ///
    /// # Errors
    ///
    /// What went wrong, after all was stopped in order: the error of a start that failed, as
    /// [`Builder::start`](super::Builder::start) gives it; [`Kind::Component`] with the server's error as its source, or
    /// with the words of its panic; [`Kind::Stopped`] if a second request cut the stop short, or if it had stopped
    /// before. [`Kind::Invalid`] at once if it is run twice, or where the runtime cannot listen for signals.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops the server and leaves the component as it stands then; it can still be
    /// [stopped](Component::stop). It is not run again.
    pub async fn run<F, E>(&self, server: F) -> Result<(), Error>
    where
        F: Future<Output = Result<(), E>>,
        E: Into<BoxError>,
    {
        let core = &*self.core;
        let (true, Some(_turn)) = (
            !self.ran.swap(true, Ordering::Relaxed),
            self.core.turn(Stopper::Run),
        ) else {
            let why = "it is run already, or was, or is being stopped; a component is run once";
            return Err(Error::invalid("run", why).with_role(&core.peer.role));
        };
        if core.state().is_ending() {
            return Err(Error::new(Kind::Stopped).with_role(&core.peer.role));
        }
        let signals = match core.settings.signals {
            true => Some(Signals::listen()?),
            false => None,
        };
        let mut server = Server::new(&core.peer, server);
        let life = async {
            let requested = async {
                let mut requests = core.requests.subscribe();
                // There is no error: the sender is the core's.
                let _ = requests.wait_for(|n| *n > 0).await;
            };
            let served = async {
                if !self.begun.swap(true, Ordering::Relaxed) {
                    self.core.begin(&self.tasks, true).await?;
                }
                pending().await
            };
            let served = server.or(async {
                tokio::select! {
                    biased;
                    () = requested => Ok(()),
                    failed = served => failed,
                }
            });
            let began = served.await.unwrap_or(Ok(()));
            let ended = core.end(&mut server).await;
            began.and(server.failure()).and(ended)
        };
        let Some(signals) = signals else {
            return life.await;
        };
        tokio::select! {
            biased;
            never = signals.request(core) => match never {},
            result = life => result,
        }
    }

    /// Asks for what SIGTERM asks for: [`run`](Component::run) stops the server and ends. A second time, or while
    /// [`stop`](Component::stop) is at work, it cuts the stop short. Returns at once; without `run` nobody hears of it.
    pub fn shutdown(&self) {
        self.core.request();
    }

    /// Stops it, and returns when it is `Stopped`.
    ///
    /// In this order: `Stopping`, and not `SERVING` any more; the hook; the session says that it is stopping (2 s at
    /// most); a moment for those who call it to [hear](super::Builder::settle) of that; [`stopping`](Component::stopping)
    /// is ready; the server drains; the hook; the session is removed (2 s at most); the hook; the manager stops, unless
    /// it is [kept](super::Builder::keep_manager) or another component of it has not stopped; the hook; `Stopped`.
    /// What fails on the way is logged, and the stop goes on; the hooks of one step have 30 s together. So it takes as long
    /// as they do, the settling and the drain, and 6 s more at the very most.
    ///
    /// While it is [run](Component::run) this is a [`shutdown`](Component::shutdown) that is waited for: the future of
    /// `run` does the stop, and has to be polled, or dropped, for this one to end. Otherwise no
    /// server is known, and none is waited for: who has one ends it at `stopping`, and waits for it in the hook for
    /// [`Step::Drained`](super::Step::Drained).
    ///
    /// # Cancel safety
    ///
    /// Once polled the stop goes on without its waiter, and even without the component. Stopping twice is stopping once.
    pub async fn stop(&self) {
        let core = &*self.core;
        let mut states = core.states();
        let mut stopper = core.stopper.subscribe();
        let mut task: Option<JoinHandle<()>> = None;
        loop {
            let now = *stopper.borrow_and_update();
            match now {
                Stopper::Run => core.request_once(),
                Stopper::Stop => {}
                Stopper::Nobody => {
                    // Taken here: a component that is dropped sees it, before the task has done anything. If somebody
                    // else was faster, that is a change.
                    if let Some(turn) = self.core.turn(Stopper::Stop) {
                        let core = self.core.clone();
                        task = Some(self.tasks.runtime.spawn(async move {
                            let _turn = turn;
                            let mut none = Server::<Ready<Result<(), Error>>>::none(&core.peer);
                            let _ = core.end(&mut none).await;
                        }));
                    }
                }
            }
            let ended = async {
                match &mut task {
                    Some(task) => task.await,
                    None => pending().await,
                }
            };
            tokio::select! {
                biased;
                _ = states.wait_for(|state| *state == ComponentState::Stopped) => return,
                // Before the turn that it gives back, or that would be taken again and again.
                ended = ended => {
                    // Its runtime is gone, and all that it was with it.
                    if ended.is_err() {
                        core.ending.cancel();
                        core.draining.cancel();
                        return core.say_end(ComponentState::Stopped);
                    }
                    task = None;
                }
                // `run` was dropped: it is this one's turn.
                _ = stopper.changed() => {}
            }
        }
    }
}
