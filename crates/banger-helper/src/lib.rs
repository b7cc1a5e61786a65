//! The small helpers beside the daemon. `banger-netns` lives in the instance's network namespace, keeps it alive and
//! works in it; `banger-helper` is root and does for ordinary users what needs root, from a closed list.

pub mod confine;
pub mod door;
pub mod enter;
pub mod root;
pub mod serve;
pub mod warnings;
pub mod way_out;
