//! Host effects: the only crate, beside the VMM drivers, that touches the machine. All of it is synchronous.

pub mod op;
