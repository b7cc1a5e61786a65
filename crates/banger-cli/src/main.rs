//! The `banger` program.

fn main() -> std::process::ExitCode {
    banger_cli::main()
}
