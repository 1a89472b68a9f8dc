//! Waiting until enough endpoints are ready, and saying what is missing.

use std::{sync::Arc, time::Duration};

use tokio::time;

use super::{
    service::Shared,
    snapshot::{Entry, Resolution, Snapshot},
};
use crate::error::{Error, Kind};

/// How many endpoints an error names at most.
const NAMED: usize = 3;

impl<S> Shared<S> {
    /// Waits until `n` endpoints are ready that take anybody's calls.
    ///
    /// # Errors
    ///
    /// What is missing when the time is up, or that the pool has ended.
    pub(crate) async fn enough(&self, n: usize, within: Duration) -> Result<(), Error> {
        let _held = self.interest.hold();
        let mut time_up = std::pin::pin!(time::sleep(within));
        loop {
            // Interest first: nothing that happens after the look is missed.
            let changed = self.next_change();
            {
                let snapshot = self.snapshot.load();
                match &snapshot.resolution {
                    Resolution::Stopped(_) => return Err(self.missing(&snapshot, n, within)),
                    Resolution::Idle => self.interest.want(),
                    _ if up(&snapshot) >= n => return Ok(()),
                    _ => {}
                }
            }
            tokio::select! {
                biased;
                () = changed => {}
                () = &mut time_up => {
                    return Err(self.missing(&self.snapshot.load_full(), n, within));
                }
            }
        }
    }

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
            Resolution::Pending | Resolution::Idle => Error::new(Kind::RegistryUnreachable)
                .with_reason(format!("it did not answer within {within:?}; {wanted}")),
            Resolution::Failed(why) => Error::new(Kind::RegistryUnreachable)
                .with_reason(format!("still after {within:?}; {wanted}"))
                .with_shared_source(why.clone()),
            Resolution::Known { .. } if snapshot.all.len() == 0 => {
                Error::new(Kind::NoSession).with_reason(format!("{wanted} after {within:?}"))
            }
            Resolution::Known { .. } => {
                let (up, known) = (up(snapshot), snapshot.all.len());
                let mut text =
                    format!("{up} of {known} known are ready after {within:?}, {wanted}");
                let unready = |entry: &&Arc<Entry<S>>| {
                    let ready = entry.ready.as_ref().is_some_and(|ready| !ready.is_down());
                    !ready || entry.target.stopping()
                };
                let unready = snapshot.all.values().filter(unready);
                for (i, entry) in unready.take(NAMED).enumerate() {
                    let trouble = entry.trouble();
                    text += if i == 0 { ": " } else { "; " };
                    text += &format!("{} {trouble}", trouble.name());
                }
                match (known - up).saturating_sub(NAMED) {
                    0 => {}
                    more => text += &format!("; and {more} more"),
                }
                Error::new(Kind::NotConnected).with_reason(text)
            }
        };
        error.with_role(&self.role)
    }
}

fn up<S>(snapshot: &Snapshot<S>) -> usize {
    let ready = snapshot.ready.iter();
    ready.filter(|ready| !ready.is_down()).count()
}
