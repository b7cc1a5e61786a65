//! Host effects: the only crate, beside the VMM drivers, that touches the machine. All of it is synchronous.

pub mod crash;
pub mod exec;
pub mod host_side;
pub mod net;
pub mod op;
pub mod probe;
pub mod seldom;
pub mod storage;
pub mod systemd;

/// An error and its causes on one line, joined by `: `.
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
