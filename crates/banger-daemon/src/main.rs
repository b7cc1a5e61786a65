//! `bangerd`: see the library.

fn main() -> std::process::ExitCode {
    banger_daemon::main()
}
