//! The task of one endpoint: dial, stay connected, dial again, give up, probe.

use std::{panic::AssertUnwindSafe, pin::pin, sync::Arc, time::Duration};

use futures_util::{FutureExt as _, StreamExt as _};
use tokio::{
    sync::{Notify, Semaphore, mpsc, watch},
    time,
};

use super::{
    Connect, Connected, Dialing, Health, HealthStream, Lifeline, Target, limiter::Limiter,
    ready::Ready, step, turn::in_turn,
};
use crate::error::{BoxError, Error, Kind, SharedError};

/// What an endpoint tells its driver.
#[derive(Debug)]
pub(crate) enum Event<S> {
    /// An attempt begins; `first` since it was registered or since its connection was lost.
    Connecting { first: bool },
    /// It takes calls.
    Connected(Arc<Ready<S>>),
    /// It is connected, and says that it is not to be called; `Connected` follows when it is.
    NotServing { why: SharedError },
    /// Its connection is gone; an attempt, or an event of a failure, follows at once.
    Lost { why: SharedError },
    /// An attempt failed, the `attempts`-th in a row; `offline` when it was the last. `next` is how long it is until
    /// the next one, if the registry says nothing before.
    Failed {
        why: SharedError,
        attempts: u32,
        offline: bool,
        next: Option<Duration>,
    },
}

/// What a driver tells an endpoint; the last word counts.
#[derive(Clone, Debug, Default)]
pub(crate) enum Command {
    #[default]
    Run,
    /// Goes on with the connection that it has, and makes no other.
    Stay,
    /// Takes no new calls, and closes when those in flight are done or this long has passed.
    Drain(Duration),
    /// Fails the calls in flight with an error that says this, and ends.
    Close(Kind, Option<String>),
}

/// The task's means. Events go out under `key`.
pub(crate) struct Endpoint<T, C: Connect<T>> {
    pub(crate) key: u64,
    pub(crate) target: Arc<T>,
    pub(crate) connect: Arc<C>,
    pub(crate) dialing: Dialing,
    pub(crate) limiter: Option<Arc<Limiter>>,
    pub(crate) events: mpsc::UnboundedSender<(u64, Event<C::Service>)>,
    pub(crate) commands: watch::Receiver<Command>,
    /// The registry has spoken of this session again: dial now.
    pub(crate) nudge: Arc<Notify>,
    /// As many as may dial at once in this pool, and how many of those may be probing whoever is offline.
    pub(crate) dials: Arc<Semaphore>,
    pub(crate) probes: Arc<Semaphore>,
    /// Connections that take no new calls and are finishing their own.
    pub(crate) retired: Vec<Arc<dyn Lifeline>>,
}

/// Words of the registry that come faster than this are taken together: each of them dials.
const NUDGES: Duration = Duration::from_secs(1);

/// How long a peer whose health is asked may take to say anything.
const FIRST_WORD: Duration = Duration::from_secs(5);

impl<T: Target, C: Connect<T>> Endpoint<T, C> {
    /// Runs until told to end, also after a panic, which a user's connector or lifeline may have.
    pub(crate) async fn supervise(mut self) {
        let mut panics = 0;
        while AssertUnwindSafe(self.run()).catch_unwind().await.is_err() {
            let why: SharedError = Arc::from(BoxError::from("the endpoint's task panicked"));
            let delay = self.dialing.backoff.delay(panics);
            self.tell(Event::Lost { why: why.clone() });
            self.tell(Event::Failed {
                why,
                attempts: panics.saturating_add(1),
                offline: false,
                next: Some(delay),
            });
            panics = panics.saturating_add(1);
            if let Err(Ended(command)) = self.pause(Some(delay), None).await {
                return self.end(command, None).await;
            }
        }
    }

    /// Runs until told to end. Aborting it (the driver is gone) drops its hold on the connection, which
    /// then closes as its last call ends.
    async fn run(&mut self) {
        // Failures in a row. A connection that breaks before it was of use, and before the first backoff
        // would be over, is one too, or a peer that accepts and hangs up would be dialled in a busy
        // loop; once is forgiven.
        let mut attempts: u32 = 0;
        let mut forgive = true;
        let mut first = true;
        let mut last_nudge = None;
        let mut offline = false;
        loop {
            // Connecting => (Connected | Failed | ended)
            self.tell(Event::Connecting { first });
            first = false;
            let mut disowned = false;
            let why = match self.attempt(offline).await {
                Err(Ended(command)) => return self.end(command, None).await,
                Ok(Err(why)) => why,
                Ok(Ok(Connected {
                    service,
                    lifeline,
                    health,
                })) => {
                    let since = time::Instant::now();
                    offline = false;
                    // Connected => (Lost | ended)
                    let why = match self.serve(service, lifeline.as_ref(), health).await {
                        Err(Ended(command)) => return self.end(command, lifeline).await,
                        Ok(why) => why,
                    };
                    disowned = why.kind() == Kind::OtherInstance;
                    let why: SharedError = Arc::new(why);
                    self.tell(Event::Lost { why: why.clone() });
                    let served = lifeline.as_ref().is_some_and(|l| l.has_served());
                    if served || since.elapsed() >= self.dialing.backoff.initial() {
                        attempts = 0;
                        forgive = true;
                    }
                    self.retire(lifeline);
                    if matches!(*self.commands.borrow(), Command::Stay) {
                        // Lost => ended, as its driver will say once it has heard of that.
                        let Ended(command) = ended(&mut self.commands).await;
                        return self.end(command, None).await;
                    }
                    // What the registry said while it was connected is no word on what is to be done now.
                    let _ = self.nudge.notified().now_or_never();
                    if disowned {
                        // Lost => offline, at once. Its address is another's now, who would be dialled in a
                        // loop and refuse each time: where this session is, only the registry can say.
                    } else if std::mem::take(&mut forgive) {
                        // Lost => Connecting, at once.
                        first = true;
                        continue;
                    }
                    why
                }
            };

            // Failed => (waiting | offline) => Connecting
            attempts = attempts.saturating_add(1);
            offline = disowned || attempts >= self.dialing.attempts;
            let delay = if offline {
                self.dialing.probe.map(|probe| probe.delay(0))
            } else {
                Some(self.dialing.backoff.delay(attempts - 1))
            };
            self.tell(Event::Failed {
                why,
                attempts,
                offline,
                next: delay,
            });
            match self.pause(delay, last_nudge).await {
                Err(Ended(command)) => return self.end(command, None).await,
                Ok(Pause::Over) => {}
                Ok(Pause::Nudged) => {
                    // What failed before the registry spoke says little about what it spoke of.
                    attempts = 0;
                    offline = false;
                    last_nudge = Some(time::Instant::now());
                }
            }
        }
    }

    async fn attempt(
        &mut self,
        probing: bool,
    ) -> Result<Result<Connected<C::Service>, SharedError>, Ended> {
        let (connect, target) = (self.connect.clone(), self.target.clone());
        // Inside the future, so that a connector that panics before its first await is caught too.
        let dial = async move { connect.connect(&target).await };
        let dial = AssertUnwindSafe(dial).catch_unwind();
        let (dials, probes) = (self.dials.clone(), self.probes.clone());
        let bound = self.dialing.attempt_timeout;
        let place = async move {
            // Nobody ever closes it; if somebody did, dialling would go on without a bound.
            // A probe is in no hurry: whoever was just lost need not queue behind thousands that are long gone.
            let probe = match probing {
                true => probes.acquire_owned().await.ok(),
                false => None,
            };
            (probe, dials.acquire_owned().await.ok())
        };
        let result = tokio::select! {
            biased;
            ended = ended(&mut self.commands) => return Err(ended),
            result = in_turn(place, async { step::within(bound, dial).await }) => result,
        };
        Ok(match result {
            Ok(Ok(Ok(connected))) => Ok(connected),
            Ok(Ok(Err(error))) => Err(Arc::from(error)),
            Ok(Err(_panic)) => Err(Arc::from(BoxError::from("the connector panicked"))),
            Err(too_late) => Err(Arc::from(BoxError::from(too_late))),
        })
    }

    /// Until the connection takes no more calls, with the reason.
    async fn serve(
        &mut self,
        service: C::Service,
        lifeline: Option<&Arc<dyn Lifeline>>,
        mut health: Option<HealthStream>,
    ) -> Result<Error, Ended> {
        let limiter = self.limiter.clone();
        let ready = Ready::new(service, self.target.peer(), self.key, limiter);
        let ready = Arc::new(ready.with_lifeline(lifeline));
        // Not known => (serving | not serving) => ...
        let mut serves = match health {
            None => {
                self.tell(Event::Connected(ready.clone()));
                Some(true)
            }
            Some(_) => None,
        };
        let mut silent = pin!(time::sleep(FIRST_WORD));
        loop {
            let word = tokio::select! {
                biased;
                ended = ended(&mut self.commands) => return Err(ended),
                why = over(lifeline) => {
                    ready.mark_down(why.to_string());
                    return Ok(why);
                }
                word = next_word(&mut health) => word,
                () = ready.went_down(), if serves == Some(true) => {
                    // A service may say so an instant before its lifeline can say why.
                    let why = time::timeout(Duration::from_millis(5), over(lifeline));
                    return Ok(why.await.unwrap_or_else(|_| {
                        Error::new(Kind::ConnectionLost).with_reason("it takes no new calls")
                    }));
                }
                () = &mut silent, if serves.is_none() => {
                    let why = format!("it did not say whether it serves within {FIRST_WORD:?}");
                    Health::NotServing(why.into())
                }
            };
            match word {
                Health::Serving if serves == Some(true) => {}
                Health::Serving => {
                    serves = Some(true);
                    ready.mark_up();
                    self.tell(Event::Connected(ready.clone()));
                }
                Health::NotServing(why) => {
                    serves = Some(false);
                    ready.mark_down(why.clone());
                    let why = Arc::from(BoxError::from(why));
                    self.tell(Event::NotServing { why });
                }
            }
        }
    }

    /// Keeps the lifeline of a connection that may still be finishing calls, to end those too if the
    /// session is deleted.
    fn retire(&mut self, lifeline: Option<Arc<dyn Lifeline>>) {
        self.retired.extend(lifeline);
        self.retired
            .retain(|lifeline| lifeline.closed().now_or_never().is_none());
    }

    /// Ends all connections as told, and returns when they are gone.
    async fn end(&mut self, command: Command, lifeline: Option<Arc<dyn Lifeline>>) {
        self.retire(lifeline);
        let (kind, reason) = match command {
            Command::Close(kind, reason) => (kind, reason),
            Command::Run | Command::Stay | Command::Drain(_) => {
                let bound = match command {
                    Command::Drain(bound) => bound,
                    _ => self.dialing.drain,
                };
                let drained = async {
                    tokio::select! {
                        () = all_closed(&self.retired) => None,
                        why = closing(&mut self.commands) => Some(why),
                    }
                };
                match time::timeout(bound, drained).await {
                    Ok(None) => return,
                    Ok(Some(why)) => why,
                    Err(_elapsed) => {
                        let why = format!("not done {bound:?} after it stopped");
                        (Kind::SessionDeleted, Some(why))
                    }
                }
            }
        };
        for lifeline in &self.retired {
            let why = Error::new(kind).with_peer(self.target.peer());
            lifeline.close(match &reason {
                Some(reason) => why.with_reason(reason.clone()),
                None => why,
            });
        }
        let _ = time::timeout(Duration::from_secs(1), all_closed(&self.retired)).await;
    }

    async fn pause(
        &mut self,
        delay: Option<Duration>,
        last_nudge: Option<time::Instant>,
    ) -> Result<Pause, Ended> {
        let sleep = async {
            match delay {
                Some(delay) => time::sleep(delay).await,
                None => std::future::pending().await,
            }
        };
        let nudged = async {
            if let Some(last) = last_nudge {
                time::sleep_until(last + NUDGES).await;
            }
            self.nudge.notified().await;
        };
        tokio::select! {
            biased;
            ended = ended(&mut self.commands) => Err(ended),
            () = nudged => Ok(Pause::Nudged),
            () = sleep => Ok(Pause::Over),
        }
    }

    fn tell(&self, event: Event<C::Service>) {
        // A failed send means that the driver is gone: this task is about to be aborted.
        let _ = self.events.send((self.key, event));
    }
}

/// Told to end, and how.
struct Ended(Command);

enum Pause {
    Over,
    Nudged,
}

/// What the peer says next of its health.
async fn next_word(health: &mut Option<HealthStream>) -> Health {
    if let Some(words) = health {
        if let Some(word) = words.next().await {
            return word;
        }
        // The last one holds.
        *health = None;
    }
    std::future::pending().await
}

/// Until it takes no new calls, is closed, or its peer has said that it is another.
async fn over(lifeline: Option<&Arc<dyn Lifeline>>) -> Error {
    let Some(lifeline) = lifeline else {
        return std::future::pending().await;
    };
    tokio::select! {
        biased;
        // First: that tells more, and a peer may close after it.
        why = lifeline.disowned() => why,
        why = lifeline.leaving() => why,
        why = lifeline.closed() => why,
    }
}

async fn all_closed(lifelines: &[Arc<dyn Lifeline>]) {
    for lifeline in lifelines {
        lifeline.closed().await;
    }
}

/// The command to end, in whichever way. The end of the sender, which is the driver's, is one too: no word is left of
/// it but `Run` or `Stay`.
async fn ended(commands: &mut watch::Receiver<Command>) -> Ended {
    let command = commands.wait_for(|command| !matches!(command, Command::Run | Command::Stay));
    Ended(match command.await {
        Ok(command) => command.clone(),
        Err(_) => Command::Run,
    })
}

/// The command to close, which may follow the one to drain.
async fn closing(commands: &mut watch::Receiver<Command>) -> (Kind, Option<String>) {
    loop {
        match commands.changed().await {
            Ok(()) => {
                if let Command::Close(kind, reason) = &*commands.borrow_and_update() {
                    return (*kind, reason.clone());
                }
            }
            // The driver has let go of it: nobody is left to order it closed.
            Err(_) => std::future::pending().await,
        }
    }
}
