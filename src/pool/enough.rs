//! Waiting until enough endpoints are ready, and saying what is missing.

use std::{sync::Arc, time::Duration};

use super::{
    service::{Pool, Shared},
    snapshot::{Entry, Resolution, Snapshot},
    status::EndpointStatus,
};
use crate::error::{Error, Kind};

/// How many endpoints an error names at most.
const NAMED: usize = 3;

impl<S, P> Pool<S, P> {
    /// Waits until `n` endpoints are ready that take anybody's calls.
    ///
    /// # Errors
    ///
    /// What is missing when the time is up, or that the pool has ended.
    pub(crate) async fn enough(
        &self,
        n: usize,
        within: Duration,
    ) -> Result<Vec<EndpointStatus>, Error> {
        let shared = self.shared();
        let _held = shared.interest.hold();
        // On the pool's own runtime, if whoever waits is in none.
        let mut time_up = self.sleep(within);
        let mut last = false;
        loop {
            // Interest first: nothing that happens after the look is missed.
            let changed = shared.next_change();
            {
                let snapshot = shared.snapshot.load();
                match &snapshot.resolution {
                    Resolution::Stopped(_) => return Err(shared.missing(&snapshot, n, within)),
                    _ if snapshot.asleep => shared.interest.want(),
                    _ if up(&snapshot).count() >= n => {
                        let mut up: Vec<_> = up(&snapshot).map(|e| EndpointStatus::of(e)).collect();
                        up.sort_by(|a, b| a.peer.id.cmp(&b.peer.id));
                        return Ok(up);
                    }
                    _ => {}
                }
                if last {
                    return Err(shared.missing(&snapshot, n, within));
                }
            }
            tokio::select! {
                biased;
                // Also where each look finds something new, one is the last.
                () = changed => last = time_up.is_over(),
                () = &mut time_up => last = true,
            }
        }
    }
}

impl<S> Shared<S> {
    fn missing(&self, snapshot: &Snapshot<S>, n: usize, within: Duration) -> Error {
        let wanted = match n {
            1 => "1 is wanted".to_owned(),
            n => format!("{n} are wanted"),
        };
        let error = match &snapshot.resolution {
            Resolution::Stopped(why) => {
                let error = Error::new(Kind::Stopped);
                match why {
                    Some(why) => error.with_reason(*why),
                    None => error,
                }
            }
            Resolution::Pending => Error::new(Kind::RegistryUnreachable)
                .with_reason(format!("it did not answer within {within:?}; {wanted}")),
            Resolution::Failed(why) => Error::new(Kind::RegistryUnreachable)
                .with_reason(format!("still after {within:?}; {wanted}"))
                .with_shared_source(why.clone()),
            Resolution::Known { .. } if snapshot.all.len() == 0 => {
                Error::new(Kind::NoSession).with_reason(format!("{wanted} after {within:?}"))
            }
            Resolution::Known { .. } => {
                let (up, known) = (up(snapshot).count(), snapshot.all.len());
                let mut text =
                    format!("{up} of {known} known are ready after {within:?}, {wanted}");
                let unready = snapshot.all.values().filter(|entry| !is_up(entry));
                for (i, entry) in unready.take(NAMED).enumerate() {
                    let trouble = entry.trouble();
                    text += if i == 0 { ": " } else { "; " };
                    text += &format!("{} {trouble}", trouble.name());
                }
                match known.saturating_sub(up + NAMED) {
                    0 => {}
                    more => text += &format!("; and {more} more"),
                }
                Error::new(Kind::NotConnected).with_reason(text)
            }
        };
        error.with_role(&self.role)
    }
}

/// Those that take anybody's calls.
fn up<S>(snapshot: &Snapshot<S>) -> impl Iterator<Item = &Arc<Entry<S>>> {
    snapshot.all.values().filter(|entry| is_up(entry))
}

fn is_up<S>(entry: &Entry<S>) -> bool {
    let ready = entry.ready.as_ref().is_some_and(|ready| !ready.is_down());
    ready && !entry.target.stopping()
}
