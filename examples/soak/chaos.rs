//! What is done to etcd and to servers, in a random order that a seed decides.

use std::{collections::BTreeMap, time::Duration};

use fastrand::Rng;
use tokio::time;

use crate::{
    support::etcd::Cluster,
    world::{SERVERS, World},
};

pub(crate) struct Chaos {
    random: Rng,
    number: u32,
    /// How often each was done, and the longest time until all was well again; none if it never was.
    done: BTreeMap<&'static str, (u32, Option<Duration>)>,
}

// === impl Chaos ===

impl Chaos {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            random: Rng::with_seed(seed),
            number: 0,
            done: BTreeMap::new(),
        }
    }

    /// Does one thing, undoes it, and waits until all is well; what, and how long that took from the undoing.
    pub(crate) async fn once(
        &mut self,
        world: &mut World,
        etcds: &mut Cluster,
    ) -> (&'static str, Option<Duration>) {
        self.number += 1;
        let id = SERVERS[self.random.usize(..SERVERS.len())];
        let member = self.random.usize(..etcds.members.len());
        let other = (member + 1) % etcds.members.len();
        let a_while = Duration::from_millis(self.random.u64(500..8000));
        let what = match self.random.u8(0..12) {
            0 => {
                world.kill_server(id).await;
                time::sleep(a_while).await;
                world.start_server(id, None).await;
                "a server is killed, and started at another address"
            }
            1 => {
                let address = world.kill_server(id).await;
                world.start_server(id, address.as_deref()).await;
                "a server is killed, and started where it was at once"
            }
            2 => {
                world.stop_server(id).await;
                world.start_server(id, None).await;
                "a server says that it stops, and is started anew"
            }
            3 => {
                for _ in 0..20 {
                    world.update_server(id, self.random.u32(..)).await;
                }
                "a server says other things of itself"
            }
            4 => {
                etcds.members[member].kill();
                time::sleep(a_while).await;
                etcds.restart().await;
                "an etcd is killed, and started again"
            }
            5 => {
                etcds.members[member].pause();
                time::sleep(a_while).await;
                etcds.members[member].resume();
                "an etcd is paused, and goes on"
            }
            6 => {
                let leader = etcds.leader().await;
                etcds.members[leader].kill();
                time::sleep(a_while).await;
                etcds.restart().await;
                "the etcd that leads is killed, and started again"
            }
            7 => {
                etcds.members[member].pause();
                etcds.members[other].pause();
                time::sleep(a_while).await;
                etcds.members[member].resume();
                etcds.members[other].resume();
                "two of three etcds are paused, and go on"
            }
            8 => {
                for member in &mut etcds.members {
                    member.kill();
                }
                time::sleep(a_while).await;
                etcds.restart().await;
                "all etcds are killed, and started again"
            }
            9 => {
                // What happens while nobody can see it, and is forgotten before anybody can.
                let endpoint = &etcds.members[member];
                endpoint.pause();
                world.kill_server(id).await;
                etcds.members[other].compact().await;
                world.start_server(id, None).await;
                etcds.members[other].compact().await;
                etcds.members[member].resume();
                "a server moves and history is compacted, an etcd being paused"
            }
            10 => {
                world.update_server(id, self.random.u32(..)).await;
                etcds.members[other].compact().await;
                "history is compacted"
            }
            _ => {
                world.disturb_all();
                etcds.lose_data();
                etcds.restart().await;
                world.disturb_all();
                "all etcds lose their data"
            }
        };
        let took = world.until_well().await;
        let (times, longest) = self.done.entry(what).or_insert((0, Some(Duration::ZERO)));
        *times += 1;
        *longest = longest.and_then(|longest| Some(longest.max(took?)));
        (what, took)
    }

    pub(crate) fn all_well(&self) -> bool {
        self.done.values().all(|(_, longest)| longest.is_some())
    }

    pub(crate) fn print(&self) {
        for (what, (times, longest)) in &self.done {
            let longest = match longest {
                Some(longest) => format!("at most {longest:.1?}"),
                None => "NOT WELL".to_owned(),
            };
            println!("  {times:>4} x  {what:<62} {longest}");
        }
    }
}
