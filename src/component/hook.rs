//! What a program does of its own at each step of its server's life.

use std::{any::Any, fmt, future::Future, panic::AssertUnwindSafe, sync::Arc};

use futures_util::FutureExt as _;
use tokio::sync::Mutex;

use crate::{
    endpoint::BoxFuture,
    error::{BoxError, Error, Kind, Peer},
    registry::Session,
};

/// A step in the life of a component, as a [hook](super::Builder::hook) is told it. Its `Display` is one word.
///
/// They come in this order. Those of the start come once; a registration that is lost and made again, or an exclusive one
/// that stands by and takes over, tells `Registered`, or `Deactivated` and `Activated`, each time.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Step {
    /// All that it depends on and watches is declared, and being connected. Nothing was waited for. The place to open
    /// what needs nobody: files, caches.
    Declared,
    /// What it [requires](super::Builder::require) is ready, and its server listens, if it is one that is
    /// [run](super::Component::run). Next it is registered. The place to load from others what it needs before
    /// it may be called.
    Required,
    /// The registry has it, for the first time or as another generation. When the hook returns it is `Healthy`;
    /// callers can see it already.
    Registered {
        /// The registry's revision at which its key came into being.
        generation: u64,
    },
    /// It is exclusive, and is the active one from here on, in this generation. When the hook returns it is `Healthy`;
    /// callers can see it already. The place to take over what only the active one does.
    Activated {
        /// The registry's revision at which its key came into being.
        generation: u64,
    },
    /// It is exclusive, was active, and is so no more, as far as it can know: another may be. The place to end what
    /// only the active one does. Told only if `Activated` was taken well, and not when it is stopped.
    Deactivated,
    /// It is being stopped. It is not `SERVING` any more; callers are about to hear of it, and its server still takes
    /// their calls.
    Stopping,
    /// Its server has ended: no call is in flight any more, unless they took longer than
    /// [they may](super::Builder::drain). The place to write what must be kept, while nobody has taken its place.
    Drained,
    /// It is registered no more, if the registry could be told. An exclusive one's successor takes over now. The
    /// manager still runs.
    Deregistered,
    /// The manager has stopped, unless it is [kept](super::Builder::keep_manager). When the hook returns it is `Stopped`.
    Stopped,
}

/// What a hook returns: nothing, or a result.
///
/// Implemented for `()` and for `Result<(), E>` with any error.
pub trait Outcome {
    /// As a result.
    ///
    /// # Errors
    ///
    /// The hook's own.
    fn into_result(self) -> Result<(), BoxError>;
}

type Hook = Arc<dyn Fn(Step) -> BoxFuture<'static, Result<(), BoxError>> + Send + Sync>;

/// A change that the program makes to its session before it is registered.
pub(super) type Change = Box<dyn FnOnce(Session) -> Session + Send>;

/// All hooks of a component.
#[derive(Default)]
pub(super) struct Hooks {
    all: Vec<Hook>,
    /// They run one after the other, whoever tells them.
    turn: Mutex<()>,
}

// === impl Step ===

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Declared => "Declared",
            Self::Required => "Required",
            Self::Registered { .. } => "Registered",
            Self::Activated { .. } => "Activated",
            Self::Deactivated => "Deactivated",
            Self::Stopping => "Stopping",
            Self::Drained => "Drained",
            Self::Deregistered => "Deregistered",
            Self::Stopped => "Stopped",
        })
    }
}

// === impl Outcome ===

impl Outcome for () {
    fn into_result(self) -> Result<(), BoxError> {
        Ok(())
    }
}

impl<E: Into<BoxError>> Outcome for Result<(), E> {
    fn into_result(self) -> Result<(), BoxError> {
        self.map_err(Into::into)
    }
}

// === impl Hooks ===

impl Hooks {
    pub(super) fn add<F, Fut>(&mut self, hook: F)
    where
        F: Fn(Step) -> Fut + Send + Sync + 'static,
        Fut: Future<Output: Outcome> + Send + 'static,
    {
        self.all.push(Arc::new(move |step| {
            let future = hook(step);
            Box::pin(async move { future.await.into_result() })
        }));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Tells all of them a step, one after the other, up to the first that fails.
    pub(super) async fn tell(&self, of: &Peer, step: Step) -> Result<(), Error> {
        let _turn = self.turn.lock().await;
        for hook in &self.all {
            // The call too: it is the user's code before it is a future.
            let told = AssertUnwindSafe(async { hook(step.clone()).await }).catch_unwind();
            match told.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    return Err(
                        failed(of, format!("the hook for {step} failed")).with_source(error)
                    );
                }
                Err(panic) => {
                    let why = words(&*panic);
                    return Err(failed(of, format!("the hook for {step} panicked: {why}")));
                }
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Hooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hooks")
            .field("hooks", &self.all.len())
            .finish_non_exhaustive()
    }
}

/// The error of what a program does of its own.
pub(super) fn failed(of: &Peer, why: String) -> Error {
    Error::new(Kind::Component)
        .with_role(&of.role)
        .with_reason(why)
}

/// What a panic said.
pub(super) fn words(panic: &(dyn Any + Send)) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (None, Some(text)) => text,
        (None, None) => "it did not say why",
    }
}
