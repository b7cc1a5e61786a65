//! The small helpers beside the daemon. `banger-netns` lives in the instance's network namespace, keeps it alive and
//! works in it.

pub mod enter;
pub mod serve;
