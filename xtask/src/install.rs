//! Puts the programs where the system looks for them, and takes them away.

use crate::command::{capture, command, find, run};
use crate::dist::{Profile, place, write};
use crate::failure::{Failure, Result};
use crate::layout::{PROGRAMS, root};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What tells udev to leave our loop devices alone, from the checkout to below the prefix.
const UDEV_RULES: (&str, &str) = (
    "crates/banger-host/src/storage/60-banger.rules",
    "lib/udev/rules.d/60-banger.rules",
);

/// The units of the root helper, from the checkout to below the prefix. Units say where programs are.
const UNITS: [&str; 2] = ["banger-helper.socket", "banger-helper.service"];
const UNITS_FROM: &str = "crates/banger-helper/units";
const UNITS_TO: &str = "lib/systemd/system";
/// The units of each user's daemon, which each user enables.
const USER_UNITS: [&str; 2] = ["bangerd.service", "banger-guests.service"];
const USER_UNITS_FROM: &str = "crates/banger-daemon/units";
const USER_UNITS_TO: &str = "lib/systemd/user";
/// What lets the keeper make user namespaces where AppArmor lets nobody else, in the checkout.
const PROFILE: &str = "crates/banger-helper/apparmor/banger-netns";
/// Where profiles are, below `$DESTDIR` and whatever the prefix.
const PROFILES_TO: &str = "etc/apparmor.d";
/// There is this, among them, where AppArmor is new enough to restrict user namespaces, and to read the profile.
const PROFILE_ABI: &str = "abi/4.0";
/// What AppArmor says of itself, where the kernel has it.
const APPARMOR_ENABLED: &str = "/sys/module/apparmor/parameters/enabled";
/// What the helper remembers of the host.
const REMEMBERED: &str = "/run/banger";
/// The one file in it that is no instance's.
const FORWARDING: &str = "forwarding.json";
/// Prefixes below which systemd looks for units.
const SEARCHED: [&str; 2] = ["/usr", "/usr/local"];

/// Where a shell looks for completions, below the prefix.
const COMPLETIONS: [(&str, &str); 3] = [
    ("bash", "share/bash-completion/completions/banger"),
    ("fish", "share/fish/vendor_completions.d/banger.fish"),
    ("zsh", "share/zsh/site-functions/_banger"),
];

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
    for path in install_units(prefix, &destination(prefix)?)? {
        println!("{}", path.display());
    }
    if let Some(profile) = install_profile(prefix, &top())? {
        println!("{}", profile.display());
        load_profile("-r", &profile);
    }
    let banger = dist.join("banger");
    let script = |shell: &str| {
        let printed = capture(command(&banger).args(["completions", shell]))?;
        match printed.success {
            true => Ok(printed.stdout),
            false => Err(Failure::new(format!(
                "`{} completions {shell}` failed: {}",
                banger.display(),
                printed.stderr
            ))),
        }
    };
    for path in install_completions(&destination(prefix)?, script)? {
        println!("{}", path.display());
    }
    if is_live(prefix) {
        systemctl(&["daemon-reload"])?;
        systemctl(&["enable", "--now", UNITS[0]])?;
        // One that watches over instances goes on as the new program; it remembers all that it needs.
        systemctl(&["try-restart", UNITS[1]])?;
        println!("banger-helper serves at /run/banger-helper.sock");
        println!("each user: `banger daemon enable` starts the daemon with this host");
    }
    Ok(())
}

/// The files of the checkout that are installed, by their path in it.
pub(crate) fn sources() -> impl Iterator<Item = PathBuf> {
    units()
        .map(|(from, _)| from)
        .chain([UDEV_RULES.0.into(), PROFILE.into()])
}

/// All units, from the checkout to below the prefix.
fn units() -> impl Iterator<Item = (PathBuf, PathBuf)> {
    let paths = |units: [&'static str; 2], from: &'static str, to: &'static str| {
        units.map(|unit| (Path::new(from).join(unit), Path::new(to).join(unit)))
    };
    paths(UNITS, UNITS_FROM, UNITS_TO).into_iter().chain(paths(
        USER_UNITS,
        USER_UNITS_FROM,
        USER_UNITS_TO,
    ))
}

/// Puts the units below `to`, with the programs' place as it will be once `to` is `prefix`. Says where they are.
fn install_units(prefix: &str, to: &Path) -> Result<Vec<PathBuf>> {
    let below = |folder: &str| Path::new(prefix).join(folder).display().to_string();
    let mut installed = Vec::new();
    for (from, unit) in units() {
        let from = root().join(from);
        let to = to.join(unit);
        let text = std::fs::read_to_string(&from)
            .map_err(Failure::io(format!("cannot read `{}`", from.display())))?;
        let text = text
            .replace("@LIBEXEC@", &below("libexec/banger"))
            .replace("@BIN@", &below("bin"));
        write(&to, text.as_bytes(), 0o644)?;
        installed.push(to);
    }
    Ok(installed)
}

/// `$DESTDIR`, or the root folder.
fn top() -> PathBuf {
    match std::env::var_os("DESTDIR") {
        Some(destdir) if !destdir.is_empty() => destdir.into(),
        _ => "/".into(),
    }
}

fn libexec(prefix: &str) -> String {
    Path::new(prefix)
        .join("libexec/banger")
        .display()
        .to_string()
}

/// Puts the profile below `top`, if that has AppArmor's of the version that reads it. Says where it is.
fn install_profile(prefix: &str, top: &Path) -> Result<Option<PathBuf>> {
    let folder = top.join(PROFILES_TO);
    if !folder.join(PROFILE_ABI).exists() {
        return Ok(None);
    }
    let from = root().join(PROFILE);
    let to = folder.join("banger-netns");
    if rustix::fs::access(&folder, rustix::fs::Access::WRITE_OK).is_err() {
        println!(
            "left out {}: AppArmor may deny an ordinary user's VMs their network without it; install as root",
            to.display()
        );
        return Ok(None);
    }
    let text = std::fs::read_to_string(&from)
        .map_err(Failure::io(format!("cannot read `{}`", from.display())))?;
    write(
        &to,
        text.replace("@LIBEXEC@", &libexec(prefix)).as_bytes(),
        0o644,
    )?;
    Ok(Some(to))
}

/// Has the kernel take the profile (`-r`) or forget it (`-R`), where it has AppArmor and no package is built.
fn load_profile(verb: &str, profile: &Path) {
    let enabled = std::fs::read_to_string(APPARMOR_ENABLED);
    let is_enabled = enabled.is_ok_and(|enabled| enabled.starts_with('Y'));
    let Some(parser) = find("apparmor_parser").filter(|_| is_enabled && top() == Path::new("/"))
    else {
        return;
    };
    let said = capture(command(parser).arg(verb).arg(profile));
    match said {
        Ok(said) if said.success => {}
        Ok(said) => println!(
            "AppArmor does not take {}: {}",
            profile.display(),
            said.stderr.trim()
        ),
        Err(failure) => println!("AppArmor does not take {}: {failure}", profile.display()),
    }
}

/// Removes the profile, unless it is that of an installation below another prefix.
fn uninstall_profile(prefix: &str, top: &Path) -> Result<()> {
    let profile = top.join(PROFILES_TO).join("banger-netns");
    let text = std::fs::read_to_string(&profile).unwrap_or_default();
    if !text.contains(&format!("\"{}/", libexec(prefix))) {
        return Ok(());
    }
    load_profile("-R", &profile);
    std::fs::remove_file(&profile).map_err(Failure::io(format!(
        "cannot remove `{}`",
        profile.display()
    )))?;
    println!("removed {}", profile.display());
    Ok(())
}

/// A person of this host.
#[derive(Debug)]
struct Person {
    name: String,
    uid: u32,
    home: PathBuf,
}

/// Those that a file like `/etc/passwd` knows.
fn people(passwd: &str) -> Vec<Person> {
    let person = |line: &str| {
        let mut fields = line.split(':');
        let (name, uid) = (fields.next()?, fields.nth(1)?);
        Some(Person {
            name: name.to_owned(),
            uid: uid.parse().ok()?,
            home: fields.nth(2)?.into(),
        })
    };
    passwd.lines().filter_map(person).collect()
}

/// What runs of the programs in `libexec`: number, user, and name of each process.
fn running(libexec: &Path) -> Vec<(u32, u32, String)> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let ours = processes.filter_map(|process| {
        let number = process.file_name().to_str()?.parse().ok()?;
        let program = std::fs::read_link(process.path().join("exe")).ok()?;
        let name = program.strip_prefix(libexec).ok()?.to_str()?;
        // Its file may be gone already.
        let name = name.strip_suffix(" (deleted)").unwrap_or(name);
        Some((number, process.metadata().ok()?.uid(), name.to_owned()))
    });
    let mut ours: Vec<_> = ours.collect();
    ours.sort();
    ours
}

/// What a user's systemd starts of ours, because that user asked for it.
fn wanted(home: &Path) -> Vec<PathBuf> {
    let folders = std::fs::read_dir(home.join(".config/systemd/user"));
    let folders = folders.into_iter().flatten().flatten();
    let mut wanted: Vec<PathBuf> = folders
        .map(|folder| folder.path())
        .filter(|folder| folder.extension().is_some_and(|is| is == "wants"))
        .flat_map(|folder| USER_UNITS.map(|unit| folder.join(unit)))
        .filter(|link| link.symlink_metadata().is_ok())
        .collect();
    wanted.sort();
    wanted
}

/// What an uninstallation leaves to others: whose daemons and VMs run, and what is theirs.
fn left(people: &[Person], running: &[(u32, u32, String)]) -> Vec<String> {
    let mut left = Vec::new();
    for person in people {
        let count = |program: &str| {
            let own = |(_, uid, name): &&(u32, u32, String)| *uid == person.uid && name == program;
            running.iter().filter(own).count()
        };
        let (daemons, vms) = (count("bangerd"), count("banger-shim"));
        let name = &person.name;
        if daemons + vms > 0 {
            left.push(format!(
                "left running: {daemons} daemon(s) and {vms} VM(s) of {name}; to end them in order, install again, \
                 have {name} run `banger daemon stop --vms`, and uninstall then"
            ));
        }
        let wanted = wanted(&person.home);
        for link in &wanted {
            left.push(format!(
                "left {}: {name} had the daemon start with the host; `rm` it",
                link.display()
            ));
        }
        if !wanted.is_empty() {
            left.push(format!(
                "`loginctl disable-linger {name}` ends what went with it, if {name} needs it for nothing else"
            ));
        }
    }
    left
}

/// Puts what `script` has for each shell below `to`. Says where it is.
fn install_completions(to: &Path, script: impl Fn(&str) -> Result<String>) -> Result<Vec<PathBuf>> {
    let mut installed = Vec::new();
    for (shell, path) in COMPLETIONS {
        let path = to.join(path);
        write(&path, script(shell)?.as_bytes(), 0o644)?;
        installed.push(path);
    }
    Ok(installed)
}

/// Whether what is installed is what the running systemd sees: no package is built, and it looks there.
fn is_live(prefix: &str) -> bool {
    let destdir = std::env::var_os("DESTDIR").is_some_and(|destdir| !destdir.is_empty());
    !destdir
        && SEARCHED.contains(&prefix.trim_end_matches('/'))
        && Path::new("/run/systemd/system").is_dir()
}

fn systemctl(args: &[&str]) -> Result<()> {
    run(command("systemctl").args(args))
}

pub(crate) fn uninstall(prefix: &str) -> Result<()> {
    let live = is_live(prefix);
    // Before it is known only by files that are gone.
    let running = running(Path::new(&libexec(prefix)));
    uninstall_profile(prefix, &top())?;
    let prefix = destination(prefix)?;
    let rules = prefix.join(UDEV_RULES.1);
    let units = units().map(|(_, unit)| prefix.join(unit));
    let completions = COMPLETIONS.map(|(_, path)| prefix.join(path));
    if live && prefix.join(UNITS_TO).join(UNITS[0]).exists() {
        systemctl(&["disable", "--now", UNITS[0], UNITS[1]])?;
    }
    for path in places(&prefix)
        .into_iter()
        .map(|(_, path)| path)
        .chain([rules])
        .chain(units)
        .chain(completions)
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
    if live {
        systemctl(&["daemon-reload"])?;
        if !forget(Path::new(REMEMBERED)) {
            println!(
                "left {REMEMBERED}: it tells of daemons that still have something on this host; \
                 `banger daemon stop --vms` by whoever runs them ends that, and so does a reboot"
            );
        }
    }
    if top() == Path::new("/") {
        let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
        for line in left(&people(&passwd), &running) {
            println!("{line}");
        }
    }
    Ok(())
}

/// Removes what is remembered of the host, unless an instance is still in it. Says whether it is gone.
fn forget(folder: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return true;
    };
    let tells = entries.flatten().any(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        name.ends_with(".json") && name != FORWARDING
    });
    !tells && std::fs::remove_dir_all(folder).is_ok()
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
    fn the_units_name_the_programs_where_they_will_be_and_nothing_is_left_to_fill_in() {
        let folder = tempfile::tempdir().unwrap();
        let installed = install_units("/usr/local", &folder.path().join("usr/local")).unwrap();
        let below = folder.path().join("usr/local/lib/systemd");
        let read = |unit: &str| std::fs::read_to_string(below.join(unit)).unwrap();
        let service = read("system/banger-helper.service");
        assert!(service.contains("ExecStart=/usr/local/libexec/banger/banger-helper\n"));
        assert!(read("system/banger-helper.socket").contains("=/run/banger-helper.sock\n"));
        let daemon = read("user/bangerd.service");
        assert!(daemon.contains("ExecStart=/usr/local/libexec/banger/bangerd\n"));
        let guests = read("user/banger-guests.service");
        assert!(guests.contains("ExecStop=/usr/local/bin/banger daemon stop --vms "));
        assert_eq!(installed.len(), 4);
        for path in installed {
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(!text.contains('@'), "{}", path.display());
        }
    }

    #[test]
    fn every_shell_finds_its_own_completion_below_the_prefix() {
        let folder = tempfile::tempdir().unwrap();
        let to = below_destdir("/usr", folder.path().to_str()).unwrap();
        let installed = install_completions(&to, |shell| Ok(format!("of {shell}"))).unwrap();
        let below = folder.path().join("usr/share");
        for (shell, path) in [
            ("bash", "bash-completion/completions/banger"),
            ("fish", "fish/vendor_completions.d/banger.fish"),
            ("zsh", "zsh/site-functions/_banger"),
        ] {
            let path = below.join(path);
            assert_eq!(
                std::fs::read_to_string(&path).unwrap(),
                format!("of {shell}")
            );
            assert!(installed.contains(&path));
        }
        let failed = install_completions(&to, |_| Err(Failure::new("no")));
        assert!(failed.is_err());
    }

    /// A restart of the daemon leaves VMs alone, whoever asks for it, and the guests' unit goes first.
    #[test]
    fn vms_outlive_their_daemon_and_are_stopped_before_it() {
        let read =
            |unit: &str| std::fs::read_to_string(root().join(USER_UNITS_FROM).join(unit)).unwrap();
        let (daemon, guests) = (read(USER_UNITS[0]), read(USER_UNITS[1]));
        assert!(daemon.contains("\nKillMode=process\n"));
        assert!(daemon.contains("\nWants=banger-guests.service\n"));
        assert!(guests.contains("\nAfter=bangerd.service\n"));
        assert!(!guests.contains("Requires=") && !guests.contains("PartOf="));
    }

    #[test]
    fn what_is_remembered_goes_unless_it_tells_of_an_instance() {
        let folder = tempfile::tempdir().unwrap();
        let remembered = folder.path().join("banger");
        assert!(forget(&remembered));
        std::fs::create_dir(&remembered).unwrap();
        for file in ["lock", FORWARDING] {
            std::fs::write(remembered.join(file), "").unwrap();
        }
        let instance = remembered.join("01a20e53-3f27-762a-9de1-f8d82e70b440.json");
        std::fs::write(&instance, "{}").unwrap();
        assert!(!forget(&remembered));
        assert!(instance.exists());
        std::fs::remove_file(&instance).unwrap();
        assert!(forget(&remembered));
        assert!(!remembered.exists());
    }

    #[test]
    fn the_profile_goes_where_apparmor_reads_it_and_away_with_its_own_installation() {
        let folder = tempfile::tempdir().unwrap();
        let top = folder.path();
        assert_eq!(install_profile("/usr/local", top).unwrap(), None);
        std::fs::create_dir_all(top.join("etc/apparmor.d/abi")).unwrap();
        assert_eq!(install_profile("/usr/local", top).unwrap(), None);
        std::fs::write(top.join("etc/apparmor.d/abi/4.0"), "").unwrap();
        let profile = install_profile("/usr/local", top).unwrap().unwrap();
        assert_eq!(profile, top.join("etc/apparmor.d/banger-netns"));
        let text = std::fs::read_to_string(&profile).unwrap();
        let attached = "profile banger-netns \"/usr/local/libexec/banger/banger-netns\" flags=(unconfined) {\n";
        assert!(text.contains(attached), "{text}");
        assert!(text.contains("\n  userns,\n") && text.contains("\nabi <abi/4.0>,\n"));
        assert!(!text.contains('@'));
        uninstall_profile("/usr", top).unwrap();
        assert!(profile.exists());
        uninstall_profile("/usr/local", top).unwrap();
        assert!(!profile.exists());
        uninstall_profile("/usr/local", top).unwrap();
    }

    /// AppArmor's own word, where there is one that reads profiles of this version.
    #[test]
    fn apparmor_reads_the_profile() {
        let abi = Path::new("/etc/apparmor.d").join(PROFILE_ABI);
        let Some(parser) = find("apparmor_parser").filter(|_| abi.exists()) else {
            let why = "no apparmor_parser with abi 4.0 here";
            println!("SKIPPED: apparmor_reads_the_profile: {why}");
            return;
        };
        let folder = tempfile::tempdir().unwrap();
        let text = std::fs::read_to_string(root().join(PROFILE)).unwrap();
        let profile = folder.path().join("banger-netns");
        std::fs::write(&profile, text.replace("@LIBEXEC@", "/usr/libexec/banger")).unwrap();
        let said = capture(command(parser).args(["-Q", "-K"]).arg(&profile)).unwrap();
        assert!(said.success, "{}", said.stderr);
    }

    #[test]
    fn what_is_left_to_others_is_said_with_how_it_goes() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().join("otter");
        let wants = home.join(".config/systemd/user/default.target.wants");
        std::fs::create_dir_all(&wants).unwrap();
        // It leads nowhere any more.
        let link = wants.join("bangerd.service");
        std::os::unix::fs::symlink("/usr/lib/systemd/user/bangerd.service", &link).unwrap();
        let passwd = format!(
            "root:x:0:0:root:/root-that-is-not-there:/bin/sh\nbad line\notter:x:1000:1000::{}:/bin/sh\n",
            home.display()
        );
        let people = people(&passwd);
        assert_eq!(people.len(), 2);
        let process = |number, uid, name: &str| (number, uid, name.to_owned());
        let running = [
            process(7, 1000, "bangerd"),
            process(8, 1000, "banger-shim"),
            process(9, 1000, "banger-netns"),
        ];
        let said = left(&people, &running);
        assert_eq!(said.len(), 3, "{said:?}");
        assert!(said[0].contains("1 daemon(s) and 1 VM(s) of otter"));
        assert!(said[0].contains("banger daemon stop --vms"));
        assert!(said[1].contains(&link.display().to_string()));
        assert!(said[2].contains("loginctl disable-linger otter"));
        assert!(left(&people[..1], &running).is_empty());
    }

    #[test]
    fn what_runs_is_found_by_its_program() {
        let own = std::env::current_exe().unwrap();
        let own = own.canonicalize().unwrap();
        let found = running(own.parent().unwrap());
        let name = own.file_name().unwrap().to_str().unwrap();
        let uid = rustix::process::geteuid().as_raw();
        assert!(found.contains(&(std::process::id(), uid, name.to_owned())));
        assert!(running(Path::new("/no/such/folder")).is_empty());
    }

    #[test]
    fn only_the_command_is_on_the_path() {
        let places = places(Path::new("/p"));
        assert!(places.contains(&("banger", PathBuf::from("/p/bin/banger"))));
        assert!(places.contains(&("bangerd", PathBuf::from("/p/libexec/banger/bangerd"))));
        assert_eq!(places.len(), PROGRAMS.len());
    }
}
