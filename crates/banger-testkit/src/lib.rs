//! Small real programs and helpers that tests of several crates share.

pub mod skip;
