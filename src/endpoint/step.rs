//! In which step an attempt to connect is, so that one that runs out of time can say so.

use std::{
    borrow::Cow,
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time;

type Step = Option<Cow<'static, str>>;

tokio::task_local! {
    /// That of the attempt that is being polled.
    static STEP: Arc<Mutex<Step>>;
}

/// What comes of an attempt that may take this long, or what to say of one that took longer.
pub(crate) async fn within<F: Future>(bound: Duration, attempt: F) -> Result<F::Output, String> {
    let step = Arc::<Mutex<Step>>::default();
    let attempt = STEP.scope(step.clone(), attempt);
    time::timeout(bound, attempt)
        .await
        .map_err(|_elapsed| match &*lock(&step) {
            Some(step) => format!("not connected within {bound:?}, {step}"),
            None => format!("not connected within {bound:?}"),
        })
}

/// What the attempt does next, as the end of a sentence: "connecting to 10.0.0.5:21123". Not told anybody outside of one.
#[cfg(any(feature = "transport", test))]
pub(crate) fn next(step: impl Into<Cow<'static, str>>) {
    let _ = STEP.try_with(|at| *lock(at) = Some(step.into()));
}

fn lock(step: &Mutex<Step>) -> std::sync::MutexGuard<'_, Step> {
    step.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    const BOUND: Duration = Duration::from_secs(2);

    #[tokio::test(start_paused = true)]
    async fn one_that_runs_out_of_time_says_in_which_step() {
        let none = within(BOUND, pending::<()>()).await;
        assert_eq!(none.unwrap_err(), "not connected within 2s");
        let attempt = within(BOUND, async {
            next("resolving h");
            time::sleep(BOUND / 2).await;
            next("shaking hands");
            pending::<()>().await;
        });
        // Another beside it, of the same task, has steps of its own.
        let other = within(BOUND / 4, async {
            next("waiting");
            pending::<()>().await;
        });
        let (attempt, other) = tokio::join!(attempt, other);
        assert_eq!(
            attempt.unwrap_err(),
            "not connected within 2s, shaking hands"
        );
        assert_eq!(other.unwrap_err(), "not connected within 500ms, waiting");
        assert_eq!(within(BOUND, async { 7 }).await, Ok(7));
        // Of no attempt at all.
        next("anything");
    }
}
