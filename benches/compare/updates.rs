//! Changes of the set while picks go on: absolute figures, for tower has nothing to compare them with.

use std::time::Duration;

use tokio::time::sleep;

use crate::{
    report::{info, micros},
    support::{
        fleet::Fleet,
        measure::{Threads, median},
    },
};

const ENDPOINTS: usize = 10_000;
const CHANGES: usize = 1_000;

pub(crate) fn run() {
    let runtime = Threads::One.runtime();
    let fleet = runtime.block_on(Fleet::new(ENDPOINTS));

    let still = fleet.picking();
    runtime.block_on(async { sleep(Duration::from_secs(1)).await });
    let still = still.p99();

    let changing = fleet.picking();
    let [mut went, mut came] = [(); 2].map(|()| Vec::new());
    runtime.block_on(async {
        for id in 0..CHANGES {
            went.push(micros(fleet.remove(id).await));
            came.push(micros(fleet.insert(id).await));
            sleep(Duration::from_millis(1)).await;
        }
    });
    let changing = changing.p99();

    info(
        "change_us_gone_10000",
        median(&mut went),
        "µs from the word that one of 10,000 is gone until no call goes there",
    );
    info(
        "change_us_come_10000",
        median(&mut came),
        "µs from the word of a new one until calls go there, its task included",
    );
    info(
        "picks_p99_ns_still",
        micros(still) * 1e3,
        "ns a pick with its call and two clock reads, 99th percentile",
    );
    info(
        "picks_p99_ns_changing",
        micros(changing) * 1e3,
        "ns, the same with 1,000 to 2,000 changes a second",
    );
}
