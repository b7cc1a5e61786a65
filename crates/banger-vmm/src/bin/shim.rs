//! `banger-shim`: the parent of one VMM. See [`banger_vmm::shim`].

use std::process::ExitCode;

fn main() -> ExitCode {
    banger_vmm::shim::run()
}
