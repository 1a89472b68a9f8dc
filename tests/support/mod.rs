//! What the integration tests have in common: things to start, stop, break and mend.

#![allow(dead_code, reason = "each test file uses another part of it")]
#![allow(
    unreachable_pub,
    reason = "a module of each test file, never of a crate"
)]
#![allow(
    clippy::expect_used,
    reason = "a test that cannot be set up has failed"
)]

pub mod etcd;
