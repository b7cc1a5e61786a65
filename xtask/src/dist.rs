//! Builds all programs and gathers them in one folder, where they find each other.

use crate::command::{cargo, run};
use crate::failure::{Failure, Result};
use crate::layout::{PROGRAMS, Program, STATIC_TARGET, root, target};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// How the programs that are not static are built. The static ones are always small.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    Debug,
    Release,
}

impl Profile {
    /// The folder that the programs are gathered in.
    pub(crate) fn folder(self) -> PathBuf {
        match self {
            Self::Debug => target().join("dist-debug"),
            Self::Release => target().join("dist"),
        }
    }

    fn cargo_folder(self) -> PathBuf {
        match self {
            Self::Debug => target().join("debug"),
            Self::Release => target().join("release"),
        }
    }
}

/// Builds everything and gathers the programs. Returns their folder.
pub(crate) fn dist(profile: Profile) -> Result<PathBuf> {
    build(profile)?;
    build_static()?;
    gather(profile)
}

/// Builds the workspace. Always the whole of it: a single package resolves other features and builds twice.
fn build(profile: Profile) -> Result<()> {
    let mut command = cargo();
    command
        .current_dir(root())
        .args(["build", "--workspace", "--locked"]);
    match profile {
        // Also the tests, so that what follows builds nothing.
        Profile::Debug => command.arg("--all-targets"),
        // What is not shipped would only take time.
        Profile::Release => {
            command.args(["--release", "--exclude=xtask", "--exclude=banger-test*"])
        }
    };
    run(&mut command)
}

fn build_static() -> Result<()> {
    run(cargo()
        .current_dir(root())
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .args(["build", "--locked", "--profile", "static"])
        .args(["--target", STATIC_TARGET])
        .args(["-p", "banger-guest", "--bin", "banger-init"])
        .args(["-p", "banger-vmm", "--bin", "banger-shim"]))
}

fn gather(profile: Profile) -> Result<PathBuf> {
    let folder = profile.folder();
    std::fs::create_dir_all(&folder).map_err(Failure::io(format!(
        "cannot make the folder `{}`",
        folder.display()
    )))?;
    let static_folder = target().join(STATIC_TARGET).join("static");
    for Program { name, is_static } in PROGRAMS {
        let from = if is_static {
            static_folder.join(name)
        } else {
            profile.cargo_folder().join(name)
        };
        place(&from, &folder.join(name), 0o755)?;
    }
    eprintln!("programs are in {}", folder.display());
    Ok(folder)
}

/// Puts a copy of `from` at `to`, unless it is there already. The copy replaces `to` by a rename, so that a program
/// that runs from there goes on unharmed, and an unchanged one stays the very same file.
pub(crate) fn place(from: &Path, to: &Path, mode: u32) -> Result<()> {
    let bytes =
        std::fs::read(from).map_err(Failure::io(format!("cannot read `{}`", from.display())))?;
    write(to, &bytes, mode)
}

/// As [`place`], with what the file is to hold.
pub(crate) fn write(to: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let cannot = || Failure::io(format!("cannot write `{}`", to.display()));
    if std::fs::read(to).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    if let Some(parent) = to.parent() {
        std::fs::create_dir_all(parent).map_err(cannot())?;
    }
    let mut partial = to.as_os_str().to_owned();
    partial.push(".partial");
    std::fs::write(&partial, bytes).map_err(cannot())?;
    std::fs::set_permissions(&partial, std::fs::Permissions::from_mode(mode)).map_err(cannot())?;
    std::fs::rename(&partial, to).map_err(cannot())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn placing_an_unchanged_program_leaves_the_file_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("a/b/to"));
        let inode = || std::fs::metadata(&to).unwrap().ino();
        std::fs::write(&from, "one").unwrap();
        place(&from, &to, 0o755).unwrap();
        let first = inode();
        assert_eq!(std::fs::metadata(&to).unwrap().mode() & 0o7777, 0o755);
        place(&from, &to, 0o755).unwrap();
        assert_eq!(inode(), first);
        std::fs::write(&from, "two").unwrap();
        place(&from, &to, 0o755).unwrap();
        assert_ne!(inode(), first);
        assert_eq!(std::fs::read(&to).unwrap(), b"two");
    }
}
