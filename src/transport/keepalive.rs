//! The task that watches whether a connection's peer still answers.

use std::{sync::Arc, time::Duration};

use h2::{Ping, PingPong};
use tokio::time::{self, Instant};

use super::connection::Core;
use crate::error::Kind;

/// Pings after `interval` without a read, and closes after `timeout` more without one.
///
/// Any read counts as a sign of life, not only the answer to the ping: that may be stuck behind a large
/// message. Ends with the connection; holds none of its handles.
pub(super) async fn run(
    core: Arc<Core>,
    mut pings: PingPong,
    interval: Duration,
    timeout: Duration,
    while_idle: bool,
) {
    let watch = async {
        loop {
            // Quiet => (quiet | asked)
            let due = Instant::from_std(core.last_read()) + interval;
            if due > Instant::now() {
                time::sleep_until(due).await;
                continue;
            }
            if !while_idle && core.streams() == 0 {
                time::sleep(interval).await;
                continue;
            }
            // Asked => (quiet | dead). The answer is awaited even after another sign of life: h2 has
            // room for one ping at a time.
            let asked = Instant::now();
            let answer = pings.ping(Ping::opaque());
            tokio::pin!(answer);
            loop {
                let due = asked.max(Instant::from_std(core.last_read())) + timeout;
                match time::timeout_at(due, &mut answer).await {
                    Ok(Ok(_)) => break,
                    // The connection is ending, and says why itself.
                    Ok(Err(_)) => return,
                    Err(_) if due < Instant::from_std(core.last_read()) + timeout => {}
                    Err(_) => {
                        let why = format!("keepalive: no answer within {timeout:?}");
                        core.close_because(Kind::ConnectionLost, Some(why));
                        return;
                    }
                }
            }
        }
    };
    tokio::select! {
        biased;
        () = core.ended().cancelled() => {}
        () = watch => {}
    }
}
