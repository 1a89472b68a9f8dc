//! What is done to etcd, to servers and to their network, in a random order that a seed decides.

use std::{collections::BTreeMap, time::Duration};

use fastrand::Rng;
use tokio::time;

use crate::{
    support::etcd::Cluster,
    world::{Affliction, SERVERS, World},
};

pub(crate) struct Chaos {
    random: Rng,
    /// How often each was done, and how long it took at most until all was well again; none if it never was.
    done: BTreeMap<String, (u32, Option<Duration>)>,
}

/// One thing that was done.
pub(crate) struct Done {
    pub(crate) what: String,
    /// How long it took from the undoing until all was well again, if it ever was.
    pub(crate) took: Option<Duration>,
    /// It took longer than it may.
    pub(crate) too_long: bool,
}

/// How long it may take until all is well again, once nothing is being done to anybody, and etcd answers.
const QUIET: Duration = Duration::from_secs(2);

/// Where etcd itself was in trouble: its members answer, and yet agree on nothing for a while.
const QUIET_ETCD: Duration = Duration::from_secs(8);

// === impl Chaos ===

impl Chaos {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            random: Rng::with_seed(seed),
            done: BTreeMap::new(),
        }
    }

    /// Does something to one, and half of the time something to the network of another meanwhile; undoes it, and waits
    /// until all is well.
    pub(crate) async fn once(&mut self, world: &mut World, etcds: &mut Cluster) -> Done {
        let mut ids = SERVERS;
        self.random.shuffle(&mut ids);
        let [one, two, other, ..] = ids;
        let a_while = self.a_while();
        let (how, aside) = match self.random.u8(0..8) {
            0 => (
                Some(Affliction::Reset),
                format!("; connections to {other} are reset"),
            ),
            1 => (
                Some(Affliction::Slow),
                format!("; the network of {other} is slow"),
            ),
            2 => (
                Some(Affliction::Silent),
                format!("; the network of {other} loses all"),
            ),
            3 => (Some(Affliction::Paused), format!("; {other} stands still")),
            _ => (None, String::new()),
        };
        let beside = how.map(|how| tokio::spawn(world.afflict(other, how, a_while)));
        let (what, may_take) = self.strike([one, two], world, etcds).await;
        if let Some(beside) = beside {
            let _ = beside.await;
        }
        let took = world.until_well().await;
        let (times, longest) = self
            .done
            .entry(what.to_owned())
            .or_insert((0, Some(Duration::ZERO)));
        *times += 1;
        *longest = longest.and_then(|longest| Some(longest.max(took?)));
        Done {
            what: format!("{one} {two}: {what}{aside}"),
            too_long: took.is_none_or(|took| took > may_take),
            took,
        }
    }

    fn a_while(&mut self) -> Duration {
        Duration::from_millis(self.random.u64(300..5000))
    }

    async fn strike(
        &mut self,
        [id, second]: [&'static str; 2],
        world: &mut World,
        etcds: &mut Cluster,
    ) -> (&'static str, Duration) {
        let member = self.random.usize(..etcds.members.len());
        let other = (member + 1) % etcds.members.len();
        let a_while = self.a_while();
        let of_servers = self.random.u8(0..3) > 0;
        if of_servers {
            let what = match self.random.u8(0..8) {
                0 => {
                    world.kill_server(id).await;
                    time::sleep(a_while).await;
                    world.start_server(id, None).await;
                    "a server is killed, and started at another address"
                }
                1 => {
                    let address = world.kill_server(id).await;
                    world.start_server(id, address).await;
                    "a server is killed, and started where it was at once"
                }
                2 => {
                    let addresses = [world.kill_server(id).await, world.kill_server(second).await];
                    world.start_server(id, addresses[1]).await;
                    world.start_server(second, addresses[0]).await;
                    "two servers are killed, and each started where the other was"
                }
                3 => {
                    world.stop_server(id).await;
                    world.start_server(id, None).await;
                    "a server says that it stops, and is started anew"
                }
                4 => {
                    for _ in 0..20 {
                        world.update_server(id, self.random.u32(..)).await;
                    }
                    "a server says other things of itself"
                }
                5 => {
                    world.move_server(id).await;
                    "a server says that it is elsewhere, and then is"
                }
                6 => {
                    world.unregister(id).await;
                    time::sleep(a_while).await;
                    world.register_again(id).await;
                    "a server that goes on loses its session, and has another"
                }
                _ => {
                    time::sleep(a_while).await;
                    "nothing is done to anybody"
                }
            };
            return (what, QUIET);
        }
        let what = match self.random.u8(0..8) {
            0 => {
                etcds.members[member].kill();
                time::sleep(a_while).await;
                etcds.restart().await;
                "an etcd is killed, and started again"
            }
            1 => {
                etcds.members[member].pause();
                time::sleep(a_while).await;
                etcds.members[member].resume();
                "an etcd is paused, and goes on"
            }
            2 => {
                let leader = etcds.leader().await;
                etcds.members[leader].kill();
                time::sleep(a_while).await;
                etcds.restart().await;
                "the etcd that leads is killed, and started again"
            }
            3 => {
                etcds.members[member].pause();
                etcds.members[other].pause();
                time::sleep(a_while).await;
                etcds.members[member].resume();
                etcds.members[other].resume();
                "two of three etcds are paused, and go on"
            }
            4 => {
                for member in &mut etcds.members {
                    member.kill();
                }
                time::sleep(a_while).await;
                etcds.restart().await;
                "all etcds are killed, and started again"
            }
            5 => {
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
            6 => {
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
        (what, QUIET_ETCD)
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
