//! How far etcd was known to be, so that one that lost its data is told from one that went on.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// What all answers of one etcd together say of its revision.
///
/// A feed alone knows too little: what it was told by its watch, and what was written elsewhere, is no list. An etcd
/// that was emptied may be further than the last list when it is first seen, and not have all who will return.
#[derive(Debug, Default)]
pub(super) struct Past(Mutex<Known>);

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Known {
    revision: u64,
    /// How often etcd was found to be further back.
    losses: u64,
}

// === impl Past ===

impl Past {
    /// What is known before something is asked.
    pub(super) fn before(&self) -> Known {
        *self.known()
    }

    /// An answer said this. One to a question of before a loss says nothing of what came after it.
    pub(super) fn reached(&self, before: Known, revision: u64) {
        let mut known = self.known();
        if known.losses == before.losses {
            known.revision = known.revision.max(revision);
        }
    }

    /// A list said this, which is never older than what was known when it was asked for; how often etcd had lost its
    /// data by then.
    pub(super) fn listed(&self, before: Known, revision: u64) -> u64 {
        if revision >= before.revision {
            self.reached(before, revision);
            return before.losses;
        }
        let mut known = self.known();
        // Others may have seen the same.
        if known.losses == before.losses {
            *known = Known {
                revision,
                losses: before.losses + 1,
            };
        }
        known.losses
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_before_what_was_known_is_a_loss_to_all_who_ask_later() {
        let past = Past::default();
        let ask = |revision| past.listed(past.before(), revision);
        assert_eq!((ask(5), ask(5), ask(7)), (0, 0, 0));

        // Given a watch that tells of more, and a list that was asked for before it did
        let (early, late) = (past.before(), past.before());
        past.reached(past.before(), 20);
        assert_eq!(
            past.listed(early, 19),
            0,
            "it was no older than what was known"
        );

        // When a list is older, then that is a loss, and one only
        let (one, other) = (past.before(), past.before());
        assert_eq!((past.listed(one, 3), past.listed(other, 4)), (1, 1));
        assert_eq!(ask(4), 1);

        // Then what still comes of before changes nothing
        past.reached(late, 30);
        assert_eq!(past.listed(late, 30), 0);
        assert_eq!(ask(5), 1);
        assert_eq!(ask(4), 2);
    }
}
