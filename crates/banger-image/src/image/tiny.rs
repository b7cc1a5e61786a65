//! The tiny image: busybox and dropbear, taken out of their packages.

use super::{EPOCH, Material};
use crate::apt;
use crate::context::Context;
use crate::error::BuildError;
use crate::tree::{Kind, Tree};
use crate::unpack::read_package;
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;

const APPLETS: &str = include_str!("../../recipes/tiny/applets.txt");
const INITTAB: &str = include_str!("../../recipes/tiny/inittab");
const RC: &str = include_str!("../../recipes/tiny/rc");
/// The recipe beside its packages.
pub(super) const RECIPE: [&str; 3] = [APPLETS, INITTAB, RC];

pub(super) fn gather(packages: &[String], context: &Context) -> Result<Material, BuildError> {
    let host = apt::host()?;
    let mut tree = Tree::default();
    let mut taken = Vec::new();
    let mut seen = BTreeSet::new();
    let mut hash = Sha256::new();
    let mut waiting: Vec<String> = packages.to_vec();
    while !waiting.is_empty() {
        waiting.sort();
        waiting.dedup();
        waiting.retain(|name| seen.insert(name.clone()));
        if waiting.is_empty() {
            break;
        }
        // A call of apt takes longer than all the rest: one for every round of dependencies.
        for path in apt::download_all(&std::mem::take(&mut waiting), context)? {
            let package = read_package(&path, context)?;
            add_package(&mut tree, &package.tree);
            waiting.extend(package.depends.into_iter().filter(|d| is_library(d)));
            taken.push(package.version);
        }
    }
    taken.sort();
    for package in &taken {
        hash.update(format!("{}={}\n", package.name, package.version));
    }
    for part in RECIPE {
        hash.update(part);
    }
    customize(&mut tree);
    Ok(Material {
        tree,
        digest: hash.finalize().to_vec(),
        packages: taken,
        source: format!(
            "busybox and dropbear of {} {}",
            host.distribution, host.suite
        ),
        suite: host.suite,
        journal_blocks: 1024,
    })
}

fn is_library(package: &str) -> bool {
    package.starts_with("lib") || package.starts_with("zlib1g")
}

/// Takes the programs and the shared libraries of a package, at their place in a merged `/usr`.
fn add_package(tree: &mut Tree, package: &Tree) {
    for (path, entry) in package.entries() {
        if matches!(entry.kind, Kind::Directory | Kind::HardLink(_)) {
            continue;
        }
        let merged = if path.starts_with("usr/") {
            path.to_owned()
        } else {
            format!("usr/{path}")
        };
        if is_wanted(&merged) {
            let mut entry = entry.clone();
            entry.mtime = entry.mtime.min(EPOCH);
            tree.insert(&merged, entry);
        }
    }
}

fn is_wanted(path: &str) -> bool {
    let (folder, file) = path.rsplit_once('/').unwrap_or(("", path));
    match folder {
        "usr/bin" => file == "busybox" || file.starts_with("dropbear") || file == "dbclient",
        "usr/sbin" => file == "dropbear",
        "usr/lib64" => true,
        _ => {
            folder.starts_with("usr/lib/") && folder.ends_with("-linux-gnu") && file.contains(".so")
        }
    }
}

fn customize(tree: &mut Tree) {
    for (path, target) in [
        ("bin", "usr/bin"),
        ("sbin", "usr/sbin"),
        ("lib", "usr/lib"),
        ("lib64", "usr/lib64"),
    ] {
        tree.symlink(path, target, EPOCH);
    }
    for (path, mode) in [
        ("data", 0o755),
        ("dev", 0o755),
        ("etc/dropbear", 0o755),
        ("home", 0o755),
        ("mnt", 0o755),
        ("proc", 0o755),
        ("root", 0o700),
        ("run", 0o755),
        ("sys", 0o755),
        ("tmp", 0o1777),
        ("usr/lib/modules", 0o755),
        ("var/log", 0o755),
        ("var/tmp", 0o1777),
    ] {
        tree.directory(path, mode, EPOCH);
    }
    tree.symlink("var/run", "/run", EPOCH);
    for applet in APPLETS.lines() {
        let path = if applet.starts_with("usr/") {
            applet.to_owned()
        } else {
            format!("usr/{applet}")
        };
        if tree.get(&path).is_none() {
            tree.symlink(&path, "/usr/bin/busybox", EPOCH);
        }
    }
    for (path, mode, text) in [
        (
            "etc/passwd",
            0o644,
            "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
        ),
        (
            "etc/shadow",
            0o640,
            "root:*:19700:0:99999:7:::\nnobody:*:19700:0:99999:7:::\n",
        ),
        (
            "etc/group",
            0o644,
            "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
        ),
        ("etc/shells", 0o644, "/bin/sh\n/bin/ash\n"),
        (
            "etc/profile",
            0o644,
            "export PATH=/usr/sbin:/usr/bin:/sbin:/bin\n",
        ),
        (
            "etc/nsswitch.conf",
            0o644,
            "passwd: files\ngroup: files\nhosts: files dns\n",
        ),
        (
            "etc/os-release",
            0o644,
            "ID=banger-tiny\nNAME=\"banger tiny\"\nPRETTY_NAME=\"banger tiny\"\n",
        ),
        ("etc/hostname", 0o644, ""),
        ("etc/machine-id", 0o644, ""),
        ("etc/resolv.conf", 0o644, ""),
        ("etc/fstab", 0o644, ""),
        ("etc/inittab", 0o644, INITTAB),
        ("etc/rc", 0o755, RC),
    ] {
        tree.write(path, mode, EPOCH, text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_and_libraries_land_in_a_merged_usr() {
        let mut package = Tree::default();
        for path in [
            "bin/busybox",
            "usr/sbin/dropbear",
            "lib/x86_64-linux-gnu/libc.so.6",
            "usr/lib/x86_64-linux-gnu/gconv/BIG5.so",
            "usr/share/doc/x/copyright",
            "etc/evil",
        ] {
            package.write(path, 0o755, EPOCH + 100, "x");
        }
        package.symlink(
            "lib64/ld-linux-x86-64.so.2",
            "/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
            1,
        );
        let mut tree = Tree::default();
        add_package(&mut tree, &package);
        let files: Vec<&str> = tree
            .entries()
            .filter(|(_, entry)| !matches!(entry.kind, Kind::Directory))
            .map(|(path, entry)| {
                assert!(entry.mtime <= EPOCH);
                path
            })
            .collect();
        assert_eq!(
            files,
            [
                "usr/bin/busybox",
                "usr/lib/x86_64-linux-gnu/libc.so.6",
                "usr/lib64/ld-linux-x86-64.so.2",
                "usr/sbin/dropbear",
            ]
        );
    }

    #[test]
    fn every_applet_is_a_link_but_real_programs_stay() {
        let mut tree = Tree::default();
        tree.write("usr/bin/busybox", 0o755, 1, "x");
        customize(&mut tree);
        assert!(matches!(
            tree.get("usr/bin/busybox").unwrap().kind,
            Kind::File(_)
        ));
        for path in [
            "usr/sbin/init",
            "usr/bin/sh",
            "usr/sbin/poweroff",
            "usr/sbin/reboot",
        ] {
            assert!(
                matches!(tree.get(path).unwrap().kind, Kind::Symlink(_)),
                "{path}"
            );
        }
    }
}
