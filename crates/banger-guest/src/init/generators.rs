//! systemd's generators that would find nothing to do: each is a program that its boot waits for.

use super::rooted::Root;
use super::text;
use rustix::fs::Dir;

/// Where systemd looks for a generator first.
pub(crate) const MASKS: &str = "run/systemd/system-generators";
const FSTAB: &str = "systemd-fstab-generator";
const SYSV: &str = "systemd-sysv-generator";

/// The generators that have nothing to do in this root.
pub(crate) fn idle(root: &Root, unit_directories: &[&str]) -> Vec<&'static str> {
    let mut idle = Vec::new();
    let no_mounts = match root.read("etc/fstab") {
        Ok(fstab) => text::fstab_is_empty(&String::from_utf8_lossy(&fstab)),
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    };
    if no_mounts {
        idle.push(FSTAB);
    }
    if !has_scripts_without_unit(root, unit_directories) {
        idle.push(SYSV);
    }
    idle
}

/// For `systemd-tmpfiles`: the masks go once the boot is past them, so that a `systemctl daemon-reload` runs all
/// generators again.
pub(crate) fn unmask(generators: &[&str]) -> String {
    generators
        .iter()
        .map(|name| format!("r! /{MASKS}/{name}\n"))
        .collect()
}

/// Whether `/etc/init.d` holds what has no unit of its own. What cannot be read may.
fn has_scripts_without_unit(root: &Root, unit_directories: &[&str]) -> bool {
    let directory = match root.directory("etc/init.d") {
        Ok(directory) => directory,
        Err(error) => return error.kind() != std::io::ErrorKind::NotFound,
    };
    let Ok(scripts) = Dir::read_from(&directory) else {
        return true;
    };
    for script in scripts {
        let Ok(script) = script else {
            return true;
        };
        let name = script.file_name().to_string_lossy();
        if name.starts_with('.') {
            continue;
        }
        let unit = format!("{}.service", name.strip_suffix(".sh").unwrap_or(&name));
        let has_unit = unit_directories.iter().any(|directory| {
            let path = format!("{directory}/{unit}");
            root.is_link(&path) || root.is_file(&path)
        });
        if !has_unit {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{create_dir_all, write};
    use std::os::unix::fs::symlink;

    const UNITS: [&str; 2] = ["etc/systemd/system", "lib/systemd/system"];

    fn tree() -> tempfile::TempDir {
        let tree = tempfile::tempdir().unwrap();
        for directory in ["etc/init.d", UNITS[0], UNITS[1]] {
            create_dir_all(tree.path().join(directory)).unwrap();
        }
        tree
    }

    #[test]
    fn generators_without_work_are_idle() {
        let tree = tree();
        write(tree.path().join("etc/fstab"), "# nothing\n\n").unwrap();
        for script in ["dbus", "hwclock.sh"] {
            write(tree.path().join("etc/init.d").join(script), "").unwrap();
        }
        write(tree.path().join(UNITS[1]).join("dbus.service"), "").unwrap();
        symlink(
            "/dev/null",
            tree.path().join(UNITS[0]).join("hwclock.service"),
        )
        .unwrap();
        let root = Root::open(tree.path()).unwrap();
        assert_eq!(idle(&root, &UNITS), [FSTAB, SYSV]);
    }

    #[test]
    fn a_mount_and_a_script_without_a_unit_keep_their_generators() {
        let tree = tree();
        write(tree.path().join("etc/fstab"), "tmpfs /scratch tmpfs\n").unwrap();
        write(tree.path().join("etc/init.d/old-daemon"), "").unwrap();
        let root = Root::open(tree.path()).unwrap();
        assert!(idle(&root, &UNITS).is_empty());
    }

    #[test]
    fn every_mask_is_taken_back() {
        let text = "r! /run/systemd/system-generators/systemd-fstab-generator\n";
        assert_eq!(unmask(&[FSTAB]), text);
    }
}
