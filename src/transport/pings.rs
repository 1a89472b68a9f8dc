//! The task that pings a connection's peer: to see whether it still answers, how far it has read, and how far it is.

use std::{sync::Arc, time::Duration};

use h2::{Ping, PingPong};
use tokio::time::{self, Instant};

use super::{core::Core, window::Estimate};
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

/// Pings when nothing was read for the interval, when cancelled calls wait for it, and when a window may be what keeps answers
/// waiting; closes the connection
/// when then nothing is read for the timeout.
///
/// Any read counts as a sign of life, not only the answer: that may be stuck behind a large message. Ends
/// with the connection; holds none of its handles.
pub(super) async fn run(core: Arc<Core>, mut pings: PingPong, keepalive: Keepalive) {
    let watch = async {
        let mut estimate = core.window().map(|window| window.estimate());
        loop {
            let mut only_sampled = false;
            // Quiet => Asked
            tokio::select! {
                biased;
                () = core.resets().wanted() => {}
                () = sample_due(&core, estimate.as_ref()) => only_sampled = true,
                () = quiet(&core, &keepalive) => core.keeps_alive(),
            }
            // Asked => (Quiet | dead). The answer is awaited even after another sign of life: h2 has
            // room for one ping at a time.
            let asked = Instant::now();
            let read_before = core.window().map_or(0, |window| window.so_far());
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
            if let (Some(window), Some(estimate)) = (core.window(), &mut estimate) {
                let bytes = window.so_far() - read_before;
                window.sampled(estimate, bytes, asked.elapsed());
            }
            if only_sampled {
                continue;
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

/// Until the peer is to be asked how far it is; never, where windows are what they are.
async fn sample_due(core: &Core, estimate: Option<&Estimate>) {
    match (core.window(), estimate) {
        (Some(window), Some(estimate)) => window.sample_due(estimate).await,
        _ => std::future::pending().await,
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
