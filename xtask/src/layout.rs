//! Where things are in the checkout and in the build folder.

use std::path::{Path, PathBuf};

/// The programs that make up banger, in the order they are named everywhere.
pub(crate) const PROGRAMS: [Program; 6] = [
    Program::new("banger", false),
    Program::new("bangerd", false),
    Program::new("banger-netns", false),
    Program::new("banger-helper", false),
    Program::new("banger-shim", true),
    Program::new("banger-init", true),
];

/// The target that static programs are built for: naming it keeps the flags away from build scripts and macros.
pub(crate) const STATIC_TARGET: &str = "x86_64-unknown-linux-gnu";

/// One of banger's programs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Program {
    pub(crate) name: &'static str,
    /// Whether it runs in the guest or once per VM, and so is small and static.
    pub(crate) is_static: bool,
}

impl Program {
    const fn new(name: &'static str, is_static: bool) -> Self {
        Self { name, is_static }
    }
}

/// The checkout.
pub(crate) fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// The build folder.
pub(crate) fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => root().join(folder),
        None => root().join("target"),
    }
}
