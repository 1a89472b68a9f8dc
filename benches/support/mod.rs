//! What the benches share: servers in a process of their own, clients to compare, and the means to measure.

// Each bench is a crate of its own and uses a part of this. A bench has nobody to hand an error to.
#![allow(dead_code, clippy::expect_used)]

pub(crate) mod callers;
pub(crate) mod cores;
pub(crate) mod drive;
pub(crate) mod echo;
pub(crate) mod fleet;
pub(crate) mod layers;
pub(crate) mod measure;
pub(crate) mod paced;
pub(crate) mod pools;
pub(crate) mod raw;
pub(crate) mod servers;
