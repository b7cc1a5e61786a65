//! Puts the programs where the system looks for them, and takes them away.

use crate::dist::{Profile, place};
use crate::failure::{Failure, Result};
use crate::layout::{PROGRAMS, root};
use std::path::{Path, PathBuf};

/// What tells udev to leave our loop devices alone, from the checkout to below the prefix.
const UDEV_RULES: (&str, &str) = (
    "crates/banger-host/src/storage/60-banger.rules",
    "lib/udev/rules.d/60-banger.rules",
);

/// Where each program goes below `prefix`: the command into `bin`, what it starts into `libexec/banger`.
fn places(prefix: &Path) -> Vec<(&'static str, PathBuf)> {
    PROGRAMS
        .iter()
        .map(|program| match program.name {
            "banger" => ("banger", prefix.join("bin/banger")),
            name => (name, prefix.join("libexec/banger").join(name)),
        })
        .collect()
}

/// `prefix` below `$DESTDIR`, which package builders set.
fn below_destdir(prefix: &str, destdir: Option<&str>) -> Result<PathBuf> {
    if !prefix.starts_with('/') {
        return Err(Failure::new(format!(
            "the prefix `{prefix}` is not an absolute path"
        )));
    }
    Ok(match destdir {
        Some(destdir) if !destdir.is_empty() => {
            Path::new(destdir).join(prefix.trim_start_matches('/'))
        }
        _ => PathBuf::from(prefix),
    })
}

fn destination(prefix: &str) -> Result<PathBuf> {
    below_destdir(prefix, std::env::var("DESTDIR").ok().as_deref())
}

pub(crate) fn install(prefix: &str) -> Result<()> {
    let dist = Profile::Release.folder();
    for (name, to) in places(&destination(prefix)?) {
        let from = dist.join(name);
        if !from.exists() {
            return Err(
                Failure::new(format!("`{}` is not built", from.display())).hint("make build")
            );
        }
        place(&from, &to, 0o755)?;
        println!("{}", to.display());
    }
    let (from, to) = UDEV_RULES;
    let to = destination(prefix)?.join(to);
    place(&root().join(from), &to, 0o644)?;
    println!("{}", to.display());
    Ok(())
}

pub(crate) fn uninstall(prefix: &str) -> Result<()> {
    let prefix = destination(prefix)?;
    let rules = prefix.join(UDEV_RULES.1);
    for path in places(&prefix)
        .into_iter()
        .map(|(_, path)| path)
        .chain([rules])
    {
        match std::fs::remove_file(&path) {
            Ok(()) => println!("removed {}", path.display()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(Failure::io(format!("cannot remove `{}`", path.display()))(
                    error,
                ));
            }
        }
    }
    // Somebody else's files may be in it; then it stays.
    let _ = std::fs::remove_dir(prefix.join("libexec/banger"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destdir_goes_before_the_prefix() {
        assert_eq!(
            below_destdir("/usr/local", None).unwrap(),
            Path::new("/usr/local")
        );
        assert_eq!(
            below_destdir("/usr", Some("/tmp/pkg")).unwrap(),
            Path::new("/tmp/pkg/usr")
        );
        assert!(below_destdir("usr", None).is_err());
    }

    #[test]
    fn only_the_command_is_on_the_path() {
        let places = places(Path::new("/p"));
        assert!(places.contains(&("banger", PathBuf::from("/p/bin/banger"))));
        assert!(places.contains(&("bangerd", PathBuf::from("/p/libexec/banger/bangerd"))));
        assert_eq!(places.len(), PROGRAMS.len());
    }
}
