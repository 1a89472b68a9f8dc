//! Where atomics and locks come from, and what they need beside themselves.
//!
//! A protocol of atomics takes them from here. They are std's; in unit tests under `cfg(switchboard_loom)` they are
//! those of [loom](https://docs.rs/loom), which runs a test in every order that the memory model allows. Such tests are
//! named `loom_tests`, and `.ci/run` says how they are run. `Arc` is std's there too: nothing here relies on what its
//! count orders, and without loom's its receivers stay what they are.

#[cfg(all(test, switchboard_loom))]
mod modelled;

use std::ops::Deref;

#[cfg(not(all(test, switchboard_loom)))]
pub(crate) use std::sync::{Mutex, MutexGuard, RwLock, atomic};

#[cfg(all(test, switchboard_loom))]
pub(crate) use modelled::{Mutex, MutexGuard, RwLock, atomic, in_every_order, within};

/// A function that is `const`; but for loom's atomics, which come to be at run time.
macro_rules! const_fn {
    ($(#[$attribute:meta])* $visible:vis fn $($rest:tt)*) => {
        #[cfg(not(all(test, switchboard_loom)))]
        $(#[$attribute])*
        $visible const fn $($rest)*

        #[cfg(all(test, switchboard_loom))]
        $(#[$attribute])*
        $visible fn $($rest)*
    };
}
pub(crate) use const_fn;

/// A value on a cache line of its own: what one thread writes does not slow down the others that read its
/// neighbours. Two threads over ten endpoints: 51 ns a call with it, 130 without.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct Padded<T>(pub(crate) T);

impl<T> Deref for Padded<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}
