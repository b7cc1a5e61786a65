//! `fake-firecracker`: a small real program that says that it is Firecracker, and does nothing else.

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some("--version") {
        println!("Firecracker v1.12.0");
        return ExitCode::SUCCESS;
    }
    eprintln!("fake-firecracker: only --version is known");
    ExitCode::FAILURE
}
