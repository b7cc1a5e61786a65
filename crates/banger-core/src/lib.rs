//! What banger knows without touching anything: names, sizes, specs, phases and the decision table.
//!
//! Nothing here does I/O, waits, reads the clock, the environment or randomness; such facts come in as arguments.

pub mod addr;
pub mod decide;
pub mod id;
pub mod name;
pub mod phase;
pub mod publish;
pub mod size;
pub mod spec;
pub mod watermark;
pub mod words;
