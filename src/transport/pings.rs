//! The task that pings a connection's peer: to see whether it still answers, and how far it has read.

use std::{sync::Arc, time::Duration};

use h2::{Ping, PingPong};
use tokio::time::{self, Instant};

use super::core::Core;
use crate::error::Kind;

/// How long cancelled calls keep their streams after the answer that lets them go, so that a server that
/// answers pings while it is still taking calls in gets to do so: four times as long as it took to answer, within these. A
/// busy one takes longer over both.
const BREATH: Duration = Duration::from_millis(1);
const DEEP_BREATH: Duration = Duration::from_millis(20);

/// When the peer is pinged for its own sake.
#[derive(Clone, Copy, Debug)]
pub(super) struct Keepalive {
    pub(super) interval: Option<Duration>,
    pub(super) timeout: Duration,
    pub(super) while_idle: bool,
}

/// Pings when nothing was read for the interval, and when cancelled calls wait for it; closes the connection
/// when then nothing is read for the timeout.
///
/// Any read counts as a sign of life, not only the answer: that may be stuck behind a large message. Ends
/// with the connection; holds none of its handles.
pub(super) async fn run(core: Arc<Core>, mut pings: PingPong, keepalive: Keepalive) {
    let watch = async {
        loop {
            // Quiet => Asked
            tokio::select! {
                () = core.resets().wanted() => {}
                () = quiet(&core, &keepalive) => core.keeps_alive(),
            }
            // Asked => (Quiet | dead). The answer is awaited even after another sign of life: h2 has
            // room for one ping at a time.
            let asked = Instant::now();
            let answer = pings.ping(Ping::opaque());
            tokio::pin!(answer);
            loop {
                let due = asked.max(core.last_read()) + keepalive.timeout;
                match time::timeout_at(due, &mut answer).await {
                    Ok(Ok(_)) => break,
                    // The connection is ending, and says why itself.
                    Ok(Err(_)) => return,
                    Err(_) if due < core.last_read() + keepalive.timeout => {}
                    // Without keepalive nobody is given up on; nor are cancelled calls held for ever.
                    Err(_) if keepalive.interval.is_none() => {
                        core.resets().confirmed();
                        time::sleep(keepalive.timeout).await;
                    }
                    Err(_) => {
                        let why = format!("keepalive: no answer within {:?}", keepalive.timeout);
                        core.close_because(Kind::ConnectionLost, Some(why));
                        return;
                    }
                }
            }
            time::sleep((4 * asked.elapsed()).clamp(BREATH, DEEP_BREATH)).await;
            core.resets().confirmed();
        }
    };
    tokio::select! {
        biased;
        () = core.ended().cancelled() => {}
        () = watch => {}
    }
}

/// Until the peer is to be asked whether it is still there.
async fn quiet(core: &Core, keepalive: &Keepalive) {
    let Some(interval) = keepalive.interval else {
        return std::future::pending().await;
    };
    loop {
        let due = core.last_read() + interval;
        if due > Instant::now() {
            time::sleep_until(due).await;
        } else if !keepalive.while_idle && core.streams() == 0 {
            time::sleep(interval).await;
        } else {
            return;
        }
    }
}
