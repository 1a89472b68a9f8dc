//! What a gate shows to those who pass by, and whom it wakes.

use std::sync::Arc;

use loom::{future::block_on, thread};

use super::core::Core;
use crate::sync::in_every_order;

/// Lets another thread do something with a gate.
fn apart<T: 'static>(
    core: &Arc<Core>,
    act: impl FnOnce(&Core) -> T + 'static,
) -> thread::JoinHandle<T> {
    let core = core.clone();
    thread::spawn(move || act(&core))
}

#[test]
fn whoever_finds_it_shut_and_asks_is_told_why() {
    in_every_order(|| {
        let core = Arc::new(Core::new());
        let shutting = apart(&core, |core| core.shut("it is done for"));
        // Apart as well: what follows a spawn at once loom takes for a part of it, and tries in that order only.
        let passing = apart(&core, |core| {
            if !core.is_open() {
                assert_eq!(core.reason(), "it is done for");
            }
        });
        passing.join().unwrap();
        assert!(shutting.join().unwrap());
    });
}

#[test]
fn of_two_that_shut_it_one_does_and_its_reason_stays() {
    in_every_order(|| {
        let core = Arc::new(Core::new());
        let other = apart(&core, |core| core.shut("other"));
        let (mine, other) = (core.shut("mine"), other.join().unwrap());
        assert_ne!(mine, other);
        assert_eq!(core.reason(), if mine { "mine" } else { "other" });
    });
}

#[test]
fn what_passers_by_see_is_what_stands_behind_the_lock() {
    in_every_order(|| {
        let core = Arc::new(Core::new());
        core.shut("for now");
        let opening = apart(&core, Core::open);
        let shutting = apart(&core, |core| core.shut("again"));
        opening.join().unwrap();
        let again = shutting.join().unwrap();
        // Shut again if that came after the opening
        assert_eq!(core.is_open(), !again);
        assert_eq!(core.reason(), if again { "again" } else { "for now" });
    });
}

#[test]
fn whoever_waits_for_it_to_shut_is_woken() {
    in_every_order(|| {
        let core = Arc::new(Core::new());
        let shutting = apart(&core, |core| core.shut("it is done for"));
        block_on(core.went_shut());
        assert!(shutting.join().unwrap());
    });
}

#[test]
fn there_is_one_probe_and_what_it_found_counts_only_until_the_gate_is_shut() {
    in_every_order(|| {
        let core = Arc::new(Core::new());
        core.shut("for now");
        core.half_open();
        let probe = |core: &Core| {
            let epoch = core.take_slot();
            epoch.is_some_and(|epoch| {
                core.probed_good(epoch);
                true
            })
        };
        let shutting = apart(&core, |core| core.shut("for good"));
        let other = apart(&core, probe);
        let mine = probe(&core);
        let other = other.join().unwrap();
        assert!(!(mine && other), "two were let through");
        assert!(shutting.join().unwrap());
        assert!(!core.is_open());
        assert_eq!(core.reason(), "for good");
    });
}
