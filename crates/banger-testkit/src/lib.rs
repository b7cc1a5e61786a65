//! Small real programs and helpers that tests of several crates share.

pub mod env;
pub mod host;
pub mod machine;
pub mod run;
pub mod skip;
