//! The default image: Debian by mmdebstrap, changed so that it boots fast and holds no secret.

use super::work_folder::WorkFolder;
use super::{EPOCH, Material, PackageVersion};
use crate::apt::{self, Host};
use crate::context::Context;
use crate::error::BuildError;
use crate::run::{Program, find};
use crate::tree::{Entry, Kind, Tree};
use crate::unpack::{copy, field, spool_file};
use sha2::{Digest, Sha256};
use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const UNITS: &str = include_str!("../../recipes/debian/units.txt");
const SSH_SERVICE: &str = include_str!("../../recipes/debian/ssh.service");
const SSHD_CONFIG: &str = include_str!("../../recipes/debian/sshd.conf");
const SYSTEM_CONFIG: &str = include_str!("../../recipes/debian/system.conf");
const SERIAL_AUTOLOGIN: &str = include_str!("../../recipes/debian/serial-autologin.conf");
/// The recipe beside its packages.
pub(super) const RECIPE: [&str; 5] = [
    UNITS,
    SSH_SERVICE,
    SSHD_CONFIG,
    SYSTEM_CONFIG,
    SERIAL_AUTOLOGIN,
];

/// The largest archive that mmdebstrap may give.
const MAX_ARCHIVE: u64 = 32 << 30;
/// What dpkg is told to leave out, now and for packages that a person installs later.
const LEFT_OUT: [&str; 6] = [
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-include=/usr/share/locale/locale.alias",
];

pub(super) fn gather(packages: &[String], context: &Context) -> Result<Material, BuildError> {
    let host = apt::host()?;
    let sources = apt::sources(&host)?;
    let mode = choose_mode()?;
    context.tell(
        "packages",
        &format!("{} {} by mmdebstrap", host.distribution, host.suite),
    );
    let (file, digest) = bootstrap(&host, &sources, packages, mode, context)?;
    let mut tree = Tree::default();
    context.tell("index", "reading the archive");
    tree.add_tar(&Arc::new(file), "mmdebstrap's archive", context)?;
    let installed = installed(&tree)?;
    customize(&mut tree);

    let mut hash = Sha256::new();
    hash.update(&digest);
    // The recipe is as much a part of the content as the packages.
    for part in RECIPE {
        hash.update(part);
    }
    Ok(Material {
        tree,
        digest: hash.finalize().to_vec(),
        packages: installed,
        source: format!("{} {} by mmdebstrap", host.distribution, host.suite),
        suite: host.suite,
        journal_blocks: 4096,
    })
}

/// `unshare` works for root too and never touches the host; `root` only where user namespaces are off.
fn choose_mode() -> Result<&'static str, BuildError> {
    if find("mmdebstrap").is_none() {
        return Err(BuildError::ProgramMissing {
            program: "mmdebstrap",
            package: "mmdebstrap",
        });
    }
    if rustix::process::geteuid().is_root() {
        let limit = std::fs::read_to_string("/proc/sys/user/max_user_namespaces");
        let off = limit.is_ok_and(|text| text.trim() == "0");
        return Ok(if off { "root" } else { "unshare" });
    }
    for program in ["newuidmap", "newgidmap"] {
        if find(program).is_none() {
            return Err(BuildError::ProgramMissing {
                program,
                package: "uidmap",
            });
        }
    }
    let uid = rustix::process::geteuid().as_raw();
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let user = user_name(&passwd, uid).unwrap_or_else(|| uid.to_string());
    for file in ["/etc/subuid", "/etc/subgid"] {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        if !has_range(&text, &user, uid) {
            return Err(BuildError::NoSubordinateIds { user, file });
        }
    }
    Ok("unshare")
}

fn user_name(passwd: &str, uid: u32) -> Option<String> {
    passwd.lines().find_map(|line| {
        let mut parts = line.split(':');
        let name = parts.next()?;
        (parts.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
    })
}

/// Whether a `/etc/subuid` gives the user a range of at least 65536 ids.
fn has_range(text: &str, user: &str, uid: u32) -> bool {
    text.lines().any(|line| {
        let mut parts = line.split(':');
        let owner = parts.next();
        let count = parts
            .nth(1)
            .and_then(|count| count.trim().parse::<u64>().ok());
        (owner == Some(user) || owner == Some(uid.to_string().as_str()))
            && count.is_some_and(|count| count >= 65536)
    })
}

/// Runs mmdebstrap; its archive goes to a file without a name. Returns the archive and its digest.
fn bootstrap(
    host: &Host,
    sources: &[String],
    packages: &[String],
    mode: &str,
    context: &Context,
) -> Result<(std::fs::File, Vec<u8>), BuildError> {
    let mut arguments: Vec<OsString> = [
        format!("--mode={mode}"),
        "--variant=minbase".to_owned(),
        "--format=tar".to_owned(),
        format!("--include={}", packages.join(",")),
    ]
    .map(OsString::from)
    .into();
    arguments.extend(LEFT_OUT.map(|option| format!("--dpkgopt={option}").into()));
    arguments.extend([host.suite.as_str(), "-"].map(OsString::from));
    arguments.extend(sources.iter().map(OsString::from));
    let folder = context.cache_dir.as_path();
    let work = WorkFolder::make()?;
    let mut file = spool_file(folder)?;
    let mut hash = Sha256::new();
    let mut told = 0;
    let program = Program {
        name: "mmdebstrap",
        package: "mmdebstrap",
        arguments,
        // A user's cache may be closed to the ids that mmdebstrap runs as.
        folder: Some(Path::new("/")),
        environment: vec![
            ("SOURCE_DATE_EPOCH", EPOCH.to_string().into()),
            ("TMPDIR", work.path().into()),
        ],
        limit: Duration::from_secs(3600),
        stage: Some("packages"),
    };
    let outcome = program.stream(context, &mut |pipe| {
        let name = ("mmdebstrap's archive", folder);
        copy(
            pipe,
            &mut file,
            name,
            MAX_ARCHIVE,
            context,
            &mut |chunk, done| {
                hash.update(chunk);
                if done - told >= 16 << 20 {
                    told = done;
                    context.tell_amount("archive", "taking the archive", Some(done), None);
                }
            },
        )
        .map(drop)
    })?;
    outcome.check("mmdebstrap")?;
    Ok((file, hash.finalize().to_vec()))
}

/// The packages in the tree's dpkg status, in order of name.
fn installed(tree: &Tree) -> Result<Vec<PackageVersion>, BuildError> {
    let path = "var/lib/dpkg/status";
    let content = tree
        .file(path)
        .ok_or_else(|| BuildError::archive("mmdebstrap's archive", format!("it has no `{path}`")))?
        .read(path, 64 << 20)?;
    Ok(parse_status(&String::from_utf8_lossy(&content)))
}

fn parse_status(text: &str) -> Vec<PackageVersion> {
    let mut packages: Vec<_> = text
        .split("\n\n")
        .filter(|stanza| field(stanza, "Status").is_some_and(|s| s.ends_with(" installed")))
        .filter_map(|stanza| {
            Some(PackageVersion {
                name: field(stanza, "Package")?,
                version: field(stanza, "Version")?,
            })
        })
        .collect();
    packages.sort();
    packages
}

/// Makes a plain Debian tree into banger's default image.
fn customize(tree: &mut Tree) {
    let doomed: Vec<String> = tree
        .entries()
        .map(|(path, _)| path)
        .filter(|path| {
            path.starts_with("etc/ssh/ssh_host_")
                || path
                    .strip_prefix("var/lib/apt/lists/")
                    .is_some_and(|rest| !rest.is_empty())
                || path
                    .strip_prefix("var/cache/apt/")
                    .is_some_and(|rest| rest.ends_with(".bin"))
                || path
                    .strip_prefix("var/log/")
                    .is_some_and(|rest| rest.ends_with(".log"))
        })
        .map(str::to_owned)
        .collect();
    for path in &doomed {
        tree.remove(path);
    }
    for (path, mode) in [
        ("data", 0o755),
        ("dev", 0o755),
        ("proc", 0o755),
        ("sys", 0o755),
        ("run", 0o755),
        ("tmp", 0o1777),
        ("usr/lib/modules", 0o755),
        ("var/lib/apt/lists/partial", 0o700),
    ] {
        tree.directory(path, mode, EPOCH);
    }
    // banger-init writes the machine's id, name and resolver at each start.
    for path in [
        "etc/machine-id",
        "etc/hostname",
        "etc/resolv.conf",
        "etc/fstab",
    ] {
        tree.write(path, 0o644, EPOCH, "");
    }
    tree.symlink("var/lib/dbus/machine-id", "/etc/machine-id", EPOCH);
    tree.write(
        "etc/ssh/sshd_config.d/banger.conf",
        0o644,
        EPOCH,
        SSHD_CONFIG,
    );
    tree.write(
        "etc/systemd/system.conf.d/banger.conf",
        0o644,
        EPOCH,
        SYSTEM_CONFIG,
    );
    tree.write("etc/systemd/system/ssh.service", 0o644, EPOCH, SSH_SERVICE);
    for link in ["sshd.service", "multi-user.target.wants/ssh.service"] {
        let path = format!("etc/systemd/system/{link}");
        tree.symlink(&path, "/etc/systemd/system/ssh.service", EPOCH);
    }
    tree.symlink(
        "etc/systemd/system/default.target",
        "/lib/systemd/system/multi-user.target",
        EPOCH,
    );
    tree.symlink(
        "etc/systemd/system/getty.target.wants/serial-getty@ttyS0.service",
        "/lib/systemd/system/serial-getty@.service",
        EPOCH,
    );
    tree.write(
        "etc/systemd/system/serial-getty@.service.d/banger.conf",
        0o644,
        EPOCH,
        SERIAL_AUTOLOGIN,
    );
    for rule in UNITS.lines().filter_map(Rule::parse) {
        rule.apply(tree);
    }
    quiet_pam(tree);
}

/// One line of `units.txt`.
#[derive(Debug, PartialEq, Eq)]
enum Rule<'a> {
    Mask(&'a str),
    Later(&'a str),
    NoGenerator(&'a str),
}

impl<'a> Rule<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        match line.trim().split_once(' ')? {
            ("mask", unit) => Some(Self::Mask(unit)),
            ("later", unit) => Some(Self::Later(unit)),
            ("no-generator", name) => Some(Self::NoGenerator(name)),
            _ => None,
        }
    }

    fn apply(&self, tree: &mut Tree) {
        match self {
            Self::Mask(unit) => {
                tree.symlink(&format!("etc/systemd/system/{unit}"), "/dev/null", EPOCH);
            }
            Self::Later(unit) => {
                let path = format!("etc/systemd/system/{unit}.d/after-ssh.conf");
                // A login that comes while they start goes first; a login on the console is one itself.
                let nice = if unit.ends_with(".service") && !unit.contains("getty") {
                    "[Service]\nNice=10\n"
                } else {
                    ""
                };
                tree.write(
                    &path,
                    0o644,
                    EPOCH,
                    format!("[Unit]\nAfter=ssh.service\n{nice}"),
                );
            }
            Self::NoGenerator(name) => {
                tree.symlink(
                    &format!("etc/systemd/system-generators/{name}"),
                    "/dev/null",
                    EPOCH,
                );
            }
        }
    }
}

/// A login by ssh runs no scripts for a message of the day.
fn quiet_pam(tree: &mut Tree) {
    let path = "etc/pam.d/sshd";
    let Some(Ok(content)) = tree.file(path).map(|content| content.read(path, 1 << 20)) else {
        return;
    };
    let text: String = String::from_utf8_lossy(&content)
        .lines()
        .map(|line| {
            let dynamic = line.starts_with("session") && line.contains("motd=/run/motd.dynamic");
            format!("{}{line}\n", if dynamic { "# " } else { "" })
        })
        .collect();
    let mode = tree.get(path).map_or(0o644, |entry| entry.mode);
    let content = crate::tree::Content::Bytes(text.into_bytes().into());
    tree.insert(path, Entry::new(Kind::File(content), mode, EPOCH));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link<'a>(tree: &'a Tree, path: &str) -> Option<&'a str> {
        match &tree.get(path)?.kind {
            Kind::Symlink(target) => Some(target),
            _ => None,
        }
    }

    #[test]
    fn secrets_and_identity_are_taken_out() {
        let mut tree = Tree::default();
        tree.write("etc/ssh/ssh_host_rsa_key", 0o600, 1, "secret");
        tree.write("etc/ssh/sshd_config", 0o644, 1, "");
        tree.write("etc/machine-id", 0o444, 1, "uninitialized\n");
        tree.write("var/lib/apt/lists/some_InRelease", 0o644, 1, "x");
        tree.write("var/log/dpkg.log", 0o644, 1, "x");
        customize(&mut tree);
        assert!(tree.get("etc/ssh/ssh_host_rsa_key").is_none());
        assert!(tree.get("etc/ssh/sshd_config").is_some());
        assert!(tree.get("var/lib/apt/lists/some_InRelease").is_none());
        assert!(tree.get("var/lib/apt/lists/partial").is_some());
        assert!(tree.get("var/log/dpkg.log").is_none());
        assert_eq!(tree.file("etc/machine-id").unwrap().length(), 0);
    }

    #[test]
    fn mount_points_are_there() {
        let mut tree = Tree::default();
        customize(&mut tree);
        for path in ["data", "dev", "proc", "sys", "run", "tmp"] {
            assert!(
                matches!(tree.get(path).unwrap().kind, Kind::Directory),
                "{path}"
            );
        }
        assert_eq!(tree.get("tmp").unwrap().mode, 0o1777);
    }

    #[test]
    fn units_are_masked_or_made_to_wait_for_ssh() {
        let mut tree = Tree::default();
        customize(&mut tree);
        let units = "etc/systemd/system";
        assert_eq!(
            link(&tree, &format!("{units}/apt-daily.timer")),
            Some("/dev/null")
        );
        let later = |unit: &str| {
            let path = format!("{units}/{unit}.d/after-ssh.conf");
            tree.file(&path).unwrap().read("", 1000).unwrap()
        };
        let after = "[Unit]\nAfter=ssh.service\n";
        let polite = format!("{after}[Service]\nNice=10\n");
        assert_eq!(later("systemd-udevd.service"), polite.as_bytes());
        assert_eq!(later("dev-mqueue.mount"), after.as_bytes());
        assert_eq!(Rule::parse("# mask x"), None);
        assert_eq!(Rule::parse("mask x.service"), Some(Rule::Mask("x.service")));
        let known = UNITS
            .lines()
            .filter(|line| !line.starts_with('#') && !line.is_empty())
            .all(|line| Rule::parse(line).is_some());
        assert!(known);
    }

    #[test]
    fn only_the_dynamic_message_of_the_day_is_taken_out_of_pam() {
        let mut tree = Tree::default();
        let text = "session optional pam_motd.so motd=/run/motd.dynamic\nsession optional pam_motd.so noupdate\n";
        tree.write("etc/pam.d/sshd", 0o644, 1, text);
        quiet_pam(&mut tree);
        let changed = tree.file("etc/pam.d/sshd").unwrap().read("", 1000).unwrap();
        assert_eq!(changed, format!("# {text}").into_bytes());
    }

    #[test]
    fn dpkgs_status_gives_installed_packages_only() {
        let text = "Package: b\nStatus: install ok installed\nVersion: 2\n\nPackage: a\nVersion: 1:1-1\nStatus: install ok installed\nDescription: x\n Version: 9\n\nPackage: c\nStatus: deinstall ok config-files\nVersion: 3\n";
        let packages = parse_status(text);
        let listed: Vec<String> = packages
            .iter()
            .map(|p| format!("{}={}", p.name, p.version))
            .collect();
        assert_eq!(listed, ["a=1:1-1", "b=2"]);
    }

    #[test]
    fn a_user_needs_a_whole_range_of_subordinate_ids() {
        let text = "alice:100000:65536\nbob:165536:1000\n1003:200000:65536\n";
        assert!(has_range(text, "alice", 1001));
        assert!(!has_range(text, "bob", 1002));
        assert!(has_range(text, "carol", 1003));
        assert!(!has_range(text, "dave", 1004));
        assert_eq!(
            user_name("root:x:0:0::/:/bin/sh\nal:x:7:7::/:/x\n", 7).as_deref(),
            Some("al")
        );
    }
}
