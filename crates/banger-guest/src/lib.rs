//! What runs inside a guest before its image's own init: `banger-init`, its agent, and the types both ends share.

pub mod agent_protocol;
pub mod boot_config;
