//! Installs the system packages that banger stands on, where they are missing, and nothing where they are not.

use crate::command::{capture, command, find, run};
use crate::failure::{Failure, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the packages are for. Each includes the ones before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Purpose {
    Run,
    Test,
    Bench,
}

/// A package, and what tells that it, or something as good, is there.
struct Need {
    package: &'static str,
    purpose: Purpose,
    witness: Witness,
}

enum Witness {
    Program(&'static str),
    File(&'static str),
}

const fn program(package: &'static str, purpose: Purpose, name: &'static str) -> Need {
    Need {
        package,
        purpose,
        witness: Witness::Program(name),
    }
}

const fn file(package: &'static str, purpose: Purpose, path: &'static str) -> Need {
    Need {
        package,
        purpose,
        witness: Witness::File(path),
    }
}

const NEEDS: &[Need] = &[
    program("gcc", Purpose::Run, "cc"),
    file(
        "libc6-dev",
        Purpose::Run,
        "/usr/lib/x86_64-linux-gnu/libc.a",
    ),
    program("qemu-system-x86", Purpose::Run, "qemu-system-x86_64"),
    file(
        "qemu-system-data",
        Purpose::Run,
        "/usr/share/qemu/qboot.rom",
    ),
    program("mmdebstrap", Purpose::Run, "mmdebstrap"),
    program("uidmap", Purpose::Run, "newuidmap"),
    program("e2fsprogs", Purpose::Run, "mke2fs"),
    program("nftables", Purpose::Run, "nft"),
    program("iproute2", Purpose::Run, "ip"),
    program("openssh-client", Purpose::Run, "ssh"),
    program("kmod", Purpose::Run, "depmod"),
    file(
        "ca-certificates",
        Purpose::Run,
        "/etc/ssl/certs/ca-certificates.crt",
    ),
    program("curl", Purpose::Test, "curl"),
    program("procps", Purpose::Test, "ps"),
    program("passt", Purpose::Test, "pasta"),
    program("xfsprogs", Purpose::Test, "mkfs.xfs"),
    program("btrfs-progs", Purpose::Test, "mkfs.btrfs"),
    program("strace", Purpose::Bench, "strace"),
    program("dnsmasq-base", Purpose::Bench, "dnsmasq"),
];

/// Signs the packages that images are made from.
const DEBIAN_KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

impl Need {
    fn is_met(&self) -> bool {
        match self.witness {
            Witness::Program(name) => find(name).is_some(),
            Witness::File(path) => Path::new(path).exists(),
        }
    }
}

/// The packages for `purpose` that are missing.
fn missing(purpose: Purpose, distribution: &OsRelease) -> Vec<&'static str> {
    let mut packages: Vec<&str> = NEEDS
        .iter()
        .filter(|need| need.purpose <= purpose && !need.is_met())
        .map(|need| need.package)
        .collect();
    if distribution.id == "debian" && !Path::new(DEBIAN_KEYRING).exists() {
        packages.push("debian-archive-keyring");
    }
    packages
}

/// Sees to it that everything for `purpose` is installed. Asks apt for nothing when it is.
pub(crate) fn ensure(purpose: Purpose) -> Result<()> {
    let distribution = OsRelease::read();
    let packages = missing(purpose, &distribution);
    if packages.is_empty() {
        return Ok(());
    }
    eprintln!("missing packages: {}", packages.join(" "));
    if find("apt-get").is_none() {
        return Err(Failure::new(format!(
            "these packages, or their like, are missing, and there is no apt-get to install them: {}",
            packages.join(" ")
        ))
        .hint("install them the way this machine does it, then repeat the command"));
    }
    install(&packages, &distribution)?;
    let left = missing(purpose, &distribution);
    if left.is_empty() {
        Ok(())
    } else {
        Err(Failure::new(format!(
            "still missing after the installation: {}",
            left.join(" ")
        )))
    }
}

fn install(packages: &[&str], distribution: &OsRelease) -> Result<()> {
    let mut plan = simulate(packages)?;
    if plan == Plan::Impossible || !has_lists() {
        run(&mut apt(&["update"])?)?;
        plan = simulate(packages)?;
    }
    match plan {
        Plan::Clean => {
            if run(apt(&["install", "-y", "--no-install-recommends"])?.args(packages)).is_ok() {
                return Ok(());
            }
            // The lists were older than what the mirror still has.
            run(&mut apt(&["update"])?)?;
            run(apt(&["install", "-y", "--no-install-recommends"])?.args(packages))
        }
        Plan::Removes(removed) if distribution.id == "debian" => {
            eprintln!("a plain installation would remove {removed}: taking QEMU from backports");
            install_qemu_from_backports(packages, distribution)
        }
        Plan::Impossible if distribution.id == "debian" => {
            eprintln!("a plain installation does not resolve: taking QEMU from backports");
            install_qemu_from_backports(packages, distribution)
        }
        Plan::Removes(removed) => Err(Failure::new(format!(
            "installing {} would remove {removed}",
            packages.join(" ")
        ))
        .hint("install them by hand as you see fit, then repeat the command")),
        Plan::Impossible => Err(Failure::new(format!(
            "apt finds no way to install {}",
            packages.join(" ")
        ))
        .hint(format!("apt-get install {}", packages.join(" ")))),
    }
}

/// What apt would do.
#[derive(Debug, PartialEq, Eq)]
enum Plan {
    Clean,
    Removes(String),
    Impossible,
}

fn simulate(packages: &[&str]) -> Result<Plan> {
    let simulated = capture(
        command("apt-get")
            .env("LC_ALL", "C")
            .args(["-s", "install", "--no-install-recommends"])
            .args(packages),
    )?;
    Ok(read_plan(simulated.success, &simulated.stdout))
}

fn read_plan(success: bool, stdout: &str) -> Plan {
    if !success {
        return Plan::Impossible;
    }
    let removed: Vec<&str> = stdout
        .lines()
        .filter_map(|line| line.strip_prefix("Remv "))
        .filter_map(|rest| rest.split_whitespace().next())
        .collect();
    if removed.is_empty() {
        Plan::Clean
    } else {
        Plan::Removes(removed.join(", "))
    }
}

fn has_lists() -> bool {
    std::fs::read_dir("/var/lib/apt/lists").is_ok_and(|entries| {
        entries
            .flatten()
            .any(|entry| entry.file_name().to_string_lossy().contains("_Packages"))
    })
}

/// apt-get, as root, asking nothing.
fn apt(args: &[&str]) -> Result<Command> {
    let mut apt = as_root("env")?;
    apt.args(["DEBIAN_FRONTEND=noninteractive", "LC_ALL=C", "apt-get"])
        .args(args);
    Ok(apt)
}

fn as_root(program: &str) -> Result<Command> {
    if rustix::process::geteuid().is_root() {
        return Ok(command(program));
    }
    let Some(sudo) = find("sudo") else {
        return Err(Failure::new(
            "packages must be installed, which needs root, and there is no sudo",
        )
        .hint("as root: cargo xtask deps"));
    };
    let mut sudo = command(sudo);
    sudo.arg(program);
    Ok(sudo)
}

/// On a machine with newer parts of QEMU than its release has, only as new a QEMU fits. All else is the release's.
fn install_qemu_from_backports(packages: &[&str], distribution: &OsRelease) -> Result<()> {
    let (qemu, others): (Vec<&str>, Vec<&str>) = packages
        .iter()
        .partition(|package| package.starts_with("qemu-"));
    if qemu.is_empty() {
        return Err(
            Failure::new(format!("apt finds no way to install {}", others.join(" ")))
                .hint(format!("apt-get install {}", others.join(" "))),
        );
    }
    install_from_backports(&qemu, distribution)?;
    if others.is_empty() {
        return Ok(());
    }
    run(apt(&["install", "-y", "--no-install-recommends"])?.args(others))
}

/// Installs with the release's backports as one more source. That source and its lists are in a folder of their own,
/// which is removed afterwards, so the machine's apt configuration stays as it is.
fn install_from_backports(packages: &[&str], distribution: &OsRelease) -> Result<()> {
    let listed = capture(command("apt-get").env("LC_ALL", "C").args([
        "indextargets",
        "--format",
        "$(ORIGIN)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(SIGNED_BY)",
        "Created-By: Packages",
    ]))?;
    let suite = format!("{}-backports", distribution.codename);
    let Some(sources) = private_sources(&listed.stdout, &distribution.codename) else {
        return Err(Failure::new(format!(
            "apt has no Debian source for `{}` to derive `{suite}` from",
            distribution.codename
        ))
        .hint("see /etc/apt/sources.list and /etc/apt/sources.list.d"));
    };
    let folder = std::env::temp_dir().join(format!("banger-apt-{}", std::process::id()));
    let installed = (|| {
        make_private(&folder, &sources)?;
        let options = [
            format!("Dir::State::lists={}", folder.join("lists").display()),
            format!(
                "Dir::Etc::sourcelist={}",
                folder.join("sources.list").display()
            ),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
        ];
        let apt = |rest: &[&str]| -> Result<Command> {
            let mut apt = apt(&[])?;
            for option in &options {
                apt.args(["-o", option]);
            }
            apt.args(rest);
            Ok(apt)
        };
        run(&mut apt(&["update"])?)?;
        run(apt(&["install", "-y", "--no-install-recommends", "-t", &suite])?.args(packages))
    })();
    // Root wrote into it.
    run(as_root("rm")?.arg("-rf").arg(&folder))?;
    installed
}

fn make_private(folder: &Path, sources: &str) -> Result<()> {
    let cannot = |path: &Path| Failure::io(format!("cannot make `{}`", path.display()));
    // Fails where it exists: nobody else's folder is used, also in a shared /tmp.
    std::fs::create_dir(folder).map_err(cannot(folder))?;
    let lists: PathBuf = folder.join("lists/partial");
    std::fs::create_dir_all(&lists).map_err(cannot(&lists))?;
    let list = folder.join("sources.list");
    std::fs::write(&list, sources).map_err(cannot(&list))
}

/// The machine's own Debian sources and, from the same place, the backports of `codename`, as a `sources.list`.
/// `targets` are lines of origin, URI, suite, component and key, separated by `|`.
fn private_sources(targets: &str, codename: &str) -> Option<String> {
    let mut lines = Vec::new();
    let mut backports = None;
    for target in targets.lines() {
        let fields: Vec<&str> = target.split('|').collect();
        let &["Debian", uri, suite, component, key] = fields.as_slice() else {
            continue;
        };
        // A field that apt does not know stays as it was asked for; one with spaces is a key in place.
        let key = match key {
            key if key.starts_with('/') && !key.contains(' ') => key,
            _ => DEBIAN_KEYRING,
        };
        let line = |suite: &str, component: &str| {
            format!("deb [signed-by={key}] {uri} {suite} {component}")
        };
        lines.push(line(suite, component));
        if suite == codename && component == "main" {
            backports = Some(line(&format!("{codename}-backports"), "main"));
        }
    }
    lines.push(backports?);
    lines.sort();
    lines.dedup();
    Some(lines.join("\n") + "\n")
}

/// Which distribution this is.
struct OsRelease {
    id: String,
    codename: String,
}

impl OsRelease {
    fn read() -> Self {
        let text = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
        let field = |name: &str| {
            text.lines()
                .filter_map(|line| line.split_once('='))
                .find(|(key, _)| *key == name)
                .map(|(_, value)| value.trim_matches('"').to_owned())
                .unwrap_or_default()
        };
        Self {
            id: field("ID"),
            codename: field("VERSION_CODENAME"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_that_removes_something_is_not_clean() {
        let removing = "Remv qemu-utils [1:10.0.2]\nInst qemu-system-x86 (1:7.2)\n";
        assert_eq!(
            read_plan(true, removing),
            Plan::Removes("qemu-utils".to_owned())
        );
        assert_eq!(read_plan(true, "Inst uidmap (1:4.13)\n"), Plan::Clean);
        assert_eq!(read_plan(false, ""), Plan::Impossible);
    }

    #[test]
    fn backports_come_from_the_machines_own_debian_source() {
        let targets = "Debian|http://mirror/debian/|bookworm|main|$(SIGNED_BY)\n\
                       Debian|http://mirror/security/|bookworm-security|main|/k.gpg\n\
                       Other|http://other/|stable|main|/o.gpg\n";
        assert_eq!(
            private_sources(targets, "bookworm").unwrap(),
            "deb [signed-by=/k.gpg] http://mirror/security/ bookworm-security main\n\
             deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://mirror/debian/ bookworm main\n\
             deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://mirror/debian/ bookworm-backports main\n"
        );
        assert_eq!(private_sources(targets, "trixie"), None);
    }
}
