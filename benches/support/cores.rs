//! Which cores client and servers run on.
//!
//! Left alone, the kernel puts the two on one core or on two as it pleases, and keeps to it for seconds or
//! minutes. On a virtual machine, where waking an idle core takes longer than a call, that moves every
//! figure by a factor of two; so each scene says what it wants.

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

use super::servers::Servers;

/// Where a scene's client and its servers run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Cores {
    /// Both on one core, for calls one at a time: there is never work for a second.
    Shared,
    /// The client on one, the servers on another, for many calls at a time.
    Apart,
    /// Wherever the kernel likes, for a client of several threads.
    Any,
}

/// This thread and the servers where they were told to be, until dropped.
pub(crate) struct Placed {
    all: CpuSet,
    servers: Pid,
}

impl Cores {
    /// Places this thread, which has to be all there is of the client, and the servers. Where the system
    /// refuses, or has one core, everything stays as it is.
    pub(crate) fn place(self, servers: &Servers) -> Option<Placed> {
        let servers = Pid::from_raw(i32::try_from(servers.id()).ok()?);
        let all = sched_getaffinity(HERE).ok()?;
        let mut allowed = (0..CpuSet::count()).filter(|core| all.is_set(*core).unwrap_or(false));
        let (first, second) = (allowed.next()?, allowed.next()?);
        let (client_core, server_core) = match self {
            Self::Shared => (first, first),
            Self::Apart => (first, second),
            Self::Any => return None,
        };
        let placed = Placed { all, servers };
        sched_setaffinity(HERE, &only(client_core)?).ok()?;
        sched_setaffinity(servers, &only(server_core)?).ok()?;
        Some(placed)
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Shared => ", one core",
            Self::Apart => ", a core each",
            Self::Any => "",
        }
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        let _ = sched_setaffinity(HERE, &self.all);
        let _ = sched_setaffinity(self.servers, &self.all);
    }
}

/// The calling thread.
const HERE: Pid = Pid::from_raw(0);

fn only(core: usize) -> Option<CpuSet> {
    let mut set = CpuSet::new();
    set.set(core).ok()?;
    Some(set)
}
