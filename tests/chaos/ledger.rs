//! What callers asked for, what servers executed, and whether the two agree.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use switchboard::Sent;

use crate::{support::server::Witness, world::Wrong};

/// How long after the end of its session a server may get calls.
const HEARD_OF: Duration = Duration::from_millis(500);

/// How long one that it has got may take until it is executed, on a machine that has more to do than it can.
const UNDER_WAY: Duration = Duration::from_millis(500);

/// The records of both sides, call by call.
#[derive(Default)]
pub(crate) struct Ledger {
    next: AtomicU64,
    executions: [Mutex<HashMap<u64, Vec<Execution>>>; 16],
    calls: [Mutex<HashMap<u64, Call>>; 16],
    /// From when to when a server that went on had no session.
    unregistered: Mutex<Vec<(&'static str, Instant, Option<Instant>)>>,
}

/// One call, as its caller saw it.
pub(crate) struct Call {
    pub(crate) began: Instant,
    /// Whom alone it was for, as it said itself.
    pub(crate) only: Option<&'static str>,
    /// Whether it may be executed more than once.
    pub(crate) repeatable: bool,
    /// What its failure said of how far it got; none if it was answered, or its caller gave it up.
    pub(crate) failed: Option<Sent>,
}

/// One execution, as its server saw it.
struct Execution {
    server: &'static str,
    at: Instant,
}

// === impl Ledger ===

impl Ledger {
    /// A number for a call, which is its message.
    pub(crate) fn number(&self) -> u64 {
        self.next.fetch_add(1, Relaxed)
    }

    pub(crate) fn ended(&self, number: u64, call: Call) {
        lock(&self.calls[number as usize % 16]).insert(number, call);
    }

    /// Who writes down what this server executes.
    pub(crate) fn witness(self: &Arc<Self>, server: &'static str) -> Witness {
        let ledger = self.clone();
        Arc::new(move |message| {
            let Ok(number) = message.parse::<u64>() else {
                return;
            };
            let mut executions = lock(&ledger.executions[number as usize % 16]);
            let at = Instant::now();
            executions
                .entry(number)
                .or_default()
                .push(Execution { server, at });
        })
    }

    /// Who executed a call, and how long after it began: to tell what became of one that failed.
    pub(crate) fn executed(&self, number: u64, began: Instant) -> String {
        let executions = lock(&self.executions[number as usize % 16]);
        let of = executions.get(&number).map_or(&[][..], Vec::as_slice);
        let each = of.iter().map(|execution| {
            let after = execution.at.saturating_duration_since(began);
            format!("by {} after {after:.0?}", execution.server)
        });
        match of {
            [] => "executed by nobody".to_owned(),
            _ => format!("executed {}", each.collect::<Vec<_>>().join(", ")),
        }
    }

    /// Who executed a call, however often.
    pub(crate) fn executed_by(&self, number: u64) -> Vec<&'static str> {
        let executions = lock(&self.executions[number as usize % 16]);
        let of = executions.get(&number).map_or(&[][..], Vec::as_slice);
        of.iter().map(|execution| execution.server).collect()
    }

    /// It has no session from now on, until it is [registered](Ledger::registered).
    pub(crate) fn unregistered(&self, server: &'static str) {
        lock(&self.unregistered).push((server, Instant::now(), None));
    }

    pub(crate) fn registered(&self, server: &'static str) {
        for (id, _, until) in &mut *lock(&self.unregistered) {
            if *id == server {
                until.get_or_insert_with(Instant::now);
            }
        }
    }

    /// What of it must not be, once all calls have ended.
    pub(crate) fn judge(&self) -> (Counts, Wrong) {
        let mut counts = Counts::default();
        let mut wrong = Wrong::new();
        let mut is_wrong = |what: &str| *wrong.entry(what.to_owned()).or_default() += 1;
        let unregistered = lock(&self.unregistered);
        for (calls, executions) in self.calls.iter().zip(&self.executions) {
            let executions = lock(executions);
            for (number, call) in &*lock(calls) {
                let executed = executions.get(number).map_or(&[][..], Vec::as_slice);
                counts.calls += 1;
                counts.executions += executed.len() as u64;
                counts.again += u64::from(executed.len() > 1);
                if !call.repeatable && executed.len() > 1 {
                    is_wrong("a call that may be executed once was executed twice");
                }
                if matches!(call.failed, Some(Sent::Unsent | Sent::Unprocessed)) {
                    counts.unsent += 1;
                    if !executed.is_empty() {
                        is_wrong("a call that was reported unsent was executed");
                    }
                }
                for execution in executed {
                    if call.only.is_some_and(|id| id != execution.server) {
                        is_wrong("a call for one server was executed by another");
                    }
                    // Its first attempt, or a later one.
                    let gone = |(server, from, until): &(&str, Instant, Option<Instant>)| {
                        let long = call.began > *from + HEARD_OF
                            || execution.at > *from + HEARD_OF + UNDER_WAY;
                        *server == execution.server
                            && long
                            && until.is_none_or(|until| execution.at < until)
                    };
                    if unregistered.iter().any(gone) {
                        is_wrong("a call went to a server whose session was long gone");
                    }
                }
            }
        }
        (counts, wrong)
    }
}

/// How much was judged.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) calls: u64,
    pub(crate) executions: u64,
    /// Calls that were executed more than once.
    pub(crate) again: u64,
    /// Calls that failed and were reported unsent.
    pub(crate) unsent: u64,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A ledger that saw each of the things that must not be: one that finds none of them is worth nothing.
pub(crate) fn try_out() {
    let ledger = Arc::new(Ledger::default());
    let witness = ledger.witness("a");
    let call = |repeatable, failed| Call {
        began: Instant::now(),
        only: Some("a"),
        repeatable,
        failed,
    };
    let execute = |number: u64| witness(&number.to_string());
    // All is as it should be.
    execute(ledger.number());
    ledger.ended(0, call(false, None));
    ledger.ended(ledger.number(), call(false, Some(Sent::Unsent)));
    execute(ledger.number());
    execute(2);
    ledger.ended(2, call(true, None));
    assert_eq!(ledger.judge().1, Wrong::new());
    // Nothing is.
    execute(ledger.number());
    execute(3);
    ledger.ended(3, call(false, None));
    execute(ledger.number());
    ledger.ended(4, call(true, Some(Sent::Unprocessed)));
    ledger.unregistered("a");
    let late = Call {
        began: Instant::now() + 2 * HEARD_OF,
        ..call(true, None)
    };
    execute(ledger.number());
    ledger.ended(5, late);
    ledger.registered("a");
    // A later attempt went there, and not to whom it was for.
    let long_ago = Instant::now().checked_sub(2 * (HEARD_OF + UNDER_WAY));
    let long_ago = long_ago.expect("this machine runs for longer");
    lock(&ledger.unregistered).push(("b", long_ago, None));
    let number = ledger.number();
    ledger.witness("b")(&number.to_string());
    let before = Call {
        began: long_ago,
        ..call(true, None)
    };
    ledger.ended(number, before);
    let mut expected: BTreeMap<_, _> = [
        "a call that may be executed once was executed twice",
        "a call that was reported unsent was executed",
        "a call for one server was executed by another",
    ]
    .map(|what| (what.to_owned(), 1))
    .into();
    expected.insert(
        "a call went to a server whose session was long gone".to_owned(),
        2,
    );
    assert_eq!(ledger.judge().1, expected);
}
