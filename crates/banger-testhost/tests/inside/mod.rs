//! One test's banger: a home of its own, its daemon, and what the machine was before.

#![allow(dead_code, reason = "not every suite uses all of it")]

use serde_json::Value;
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Seconds that any one command may take.
const COMMAND_SECONDS: &str = "90";

/// What one daemon found out about KVM, for all that come later in this boot: it takes seconds here.
const KVM_WORKS: &str = "/run/kvm-works.json";

/// How long what a daemon leaves may take to be gone after it.
const TEARDOWN_LIMIT: Duration = Duration::from_secs(60);

/// A daemon's world. Ends its VMs and its daemon when it goes.
pub(crate) struct World {
    home: tempfile::TempDir,
    before: BTreeSet<String>,
    /// Whose it is; without one, root's.
    user: Option<u32>,
}

/// These tests load modules, mount, and start and end udev: not on anybody's own machine.
///
/// # Panics
/// This is not the test host.
pub(crate) fn assert_inside() {
    assert!(
        std::path::Path::new("/mnt/suite").exists(),
        "this test runs inside the test host: `cargo xtask test`"
    );
}

impl World {
    /// An empty one, whose daemon finds the tests' images and kernel.
    pub(crate) fn new() -> Self {
        // Hard links: the copy's files are never written to, only replaced.
        Self::made("/var/tmp".as_ref(), &["-al"])
    }

    /// As [`World::new`], in a folder of another filesystem.
    pub(crate) fn on(folder: &Path) -> Self {
        Self::made(folder, &["-a"])
    }

    /// As [`World::new`], with a daemon that has to find out what KVM is good for.
    pub(crate) fn unprobed() -> Self {
        let world = Self::new();
        std::fs::remove_dir_all(world.path("state")).unwrap();
        world
    }

    fn made(folder: &Path, taken_over: &[&str]) -> Self {
        assert_inside();
        let home = tempfile::tempdir_in(folder).unwrap();
        let before = host_objects();
        let world = Self {
            home,
            before,
            user: None,
        };
        let data = world.path("data/banger");
        std::fs::create_dir_all(&data).unwrap();
        copy(taken_over, &fixtures().join("."), &data);
        let state = world.path("state/banger");
        std::fs::create_dir_all(&state).unwrap();
        std::fs::set_permissions(&state, PermissionsExt::from_mode(0o700)).unwrap();
        if Path::new(KVM_WORKS).exists() {
            copy(&[], KVM_WORKS.as_ref(), &state.join("kvm.json"));
        }
        world
    }

    /// As [`World::new`], of an ordinary user.
    pub(crate) fn of(user: u32) -> Self {
        let mut world = Self::new();
        world.user = Some(user);
        // As udev has it.
        let everybody = PermissionsExt::from_mode(0o666);
        std::fs::set_permissions("/dev/net/tun", everybody).unwrap();
        // ssh runs for nobody whom it cannot name.
        let line = format!("user-{user}:x:{user}:{user}::/nonexistent:/bin/sh\n");
        let users = std::fs::read_to_string("/etc/passwd").unwrap();
        if !users.contains(&line) {
            std::fs::write("/etc/passwd", users + &line).unwrap();
        }
        world.give(&[]);
        // What is linked is root's, as what a package had put there would be; this user's images are the own.
        for store in ["images", "kernels"] {
            let store = world.path("data/banger").join(store);
            let linked = store.with_extension("linked");
            std::fs::rename(&store, &linked).unwrap();
            copy(&["-r"], &linked, &store);
            std::fs::remove_dir_all(&linked).unwrap();
        }
        world.give(&["-R"]);
        world
    }

    fn give(&self, options: &[&str]) {
        let user = self.user.unwrap_or_default();
        let status = command("chown")
            .args(options)
            .arg(format!("{user}:{user}"))
            .arg(self.home.path())
            .status();
        assert!(status.unwrap().success());
    }

    /// Its VMs are played by `fake-vmm`: no guest boots, and who writes is the test.
    pub(crate) fn with_played_guests(self, settings: &str) -> Self {
        let program = self.path("vmm/fake-vmm");
        for folder in ["vmm", "share/qemu"] {
            std::fs::create_dir_all(self.path(folder)).unwrap();
        }
        copy(&[], "/mnt/fake-vmm".as_ref(), &program);
        self.configure(&format!(
            "{settings}[driver]\nchoice = \"qemu\"\nqemu = \"{}\"\n",
            program.display()
        ));
        if self.user.is_some() {
            self.give(&["-R"]);
        }
        self
    }

    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.home.path().join(path)
    }

    /// Writes the daemon's settings.
    pub(crate) fn configure(&self, settings: &str) {
        let folder = self.path("config/banger");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("config.toml"), settings).unwrap();
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = match self.user {
            None => command("timeout"),
            Some(user) => {
                let mut command = command("setpriv");
                command
                    .args(["--clear-groups", "--reuid", &user.to_string()])
                    .args(["--regid", &user.to_string(), "timeout"])
                    .current_dir("/");
                command
            }
        };
        command
            .args([COMMAND_SECONDS, "banger"])
            .args(args)
            .env("HOME", self.home.path())
            .env("XDG_CONFIG_HOME", self.path("config"))
            .env("XDG_STATE_HOME", self.path("state"))
            .env("XDG_DATA_HOME", self.path("data"))
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env("XDG_RUNTIME_DIR", self.path("run"));
        command
    }

    /// Runs banger, which must succeed, and gives its standard output.
    pub(crate) fn banger(&self, args: &[&str]) -> String {
        let output = self.command(args).output().unwrap();
        assert!(
            output.status.success(),
            "`banger {}` failed: {}\n{}{}{}",
            args.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
            self.story(),
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// As [`World::banger`]. Gives what it wrote to standard output and what it told beside.
    pub(crate) fn told(&self, args: &[&str]) -> String {
        let (status, said) = self.said(args);
        assert!(status.success(), "{args:?}: {said}{}", self.story());
        said
    }

    /// As [`World::told`], whether it succeeds or not.
    pub(crate) fn told_anyway(&self, args: &[&str]) -> String {
        self.said(args).1
    }

    fn said(&self, args: &[&str]) -> (ExitStatus, String) {
        let output = self.command(args).output().unwrap();
        let said = [output.stdout, output.stderr].map(|said| String::from_utf8(said).unwrap());
        (output.status, said.concat())
    }

    /// Runs banger with one more variable, which a daemon that it starts has, too. Gives exit code and what it said.
    pub(crate) fn tries(&self, variables: &[(&str, &str)], args: &[&str]) -> (i32, String) {
        let mut command = self.command(args);
        let output = command.envs(variables.iter().copied()).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        (output.status.code().unwrap_or(-1), said)
    }

    /// As [`World::banger`], with the time that it took.
    pub(crate) fn timed(&self, args: &[&str]) -> Seconds {
        let start = Instant::now();
        self.banger(args);
        Seconds(start.elapsed())
    }

    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let args = [args, &["--json"]].concat();
        serde_json::from_str(&self.banger(&args)).unwrap()
    }

    /// The VM as it is now.
    pub(crate) fn vm(&self, name: &str) -> Value {
        self.json(&["vm", "show", name])
    }

    /// Runs a command in the guest, which must succeed there.
    pub(crate) fn ssh(&self, name: &str, guest_command: &str) -> String {
        self.banger(&["vm", "ssh", name, "--", guest_command])
    }

    /// Starts a stopped VM and waits until it is ready. Gives the stages of its boot.
    pub(crate) fn start(&self, name: &str) -> String {
        self.banger(&["vm", "start", name]);
        self.banger(&["vm", "wait", name, "--timeout", "80s"]);
        boot(&self.vm(name))
    }

    /// Has the guest end itself and waits for it. Gives the reason that banger saw.
    pub(crate) fn ends_itself(&self, name: &str, guest_command: &str) -> (String, Seconds) {
        // The connection may go down before the command's exit code comes.
        let _ = self
            .command(&["vm", "ssh", name, "--", guest_command])
            .output();
        let start = Instant::now();
        self.banger(&["vm", "wait", name, "--for", "stopped", "--timeout", "30s"]);
        let took = Seconds(start.elapsed());
        (self.stop_reason(name), took)
    }

    pub(crate) fn stop_reason(&self, name: &str) -> String {
        let vm = self.vm(name);
        assert_eq!(vm["phase"]["state"], "stopped", "{vm:#}");
        vm["phase"]["why"]["reason"].as_str().unwrap().to_owned()
    }

    /// A file in the VM's folder.
    pub(crate) fn vm_file(&self, vm: &Value, name: &str) -> PathBuf {
        let id = vm["id"].as_str().unwrap();
        self.path("state/banger/vms").join(id).join(name)
    }

    /// What happened to each VM, for a failed test.
    fn story(&self) -> String {
        let folders = std::fs::read_dir(self.path("state/banger/vms"));
        let mut story = String::new();
        for folder in folders.into_iter().flatten().flatten() {
            let id = folder.file_name().to_string_lossy().into_owned();
            let why = self.command(&["vm", "why", &id]).output().unwrap();
            story.push_str(&String::from_utf8_lossy(&why.stdout));
            for file in ["console.log", "vmm.log"] {
                let text = std::fs::read(folder.path().join(file)).unwrap_or_default();
                let end = text.len().saturating_sub(2000);
                let text = String::from_utf8_lossy(&text[end..]);
                story.push_str(&format!("--- {file}\n{}\n", text.escape_debug()));
            }
        }
        story.replace("\\n", "\n")
    }

    /// Stops the daemon, which has no running VM; the machine is then what it was before.
    pub(crate) fn leaves_nothing(self) {
        self.banger(&["daemon", "stop"]);
        // The namespace's keeper ends because the daemon did, and the kernel takes a namespace apart afterwards.
        let deadline = Instant::now() + TEARDOWN_LIMIT;
        while host_objects() != self.before && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(50));
        }
        assert_eq!(host_objects(), self.before);
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let state = self.path("state/banger");
        if state.exists() {
            let _ = self.command(&["daemon", "stop", "--vms"]).output();
        }
        let kvm = std::fs::read_to_string(state.join("kvm.json"));
        if let Ok(kvm) = kvm
            && kvm.contains(r#""verdict":"works""#)
        {
            let _ = std::fs::write(KVM_WORKS, kvm);
        }
    }
}

/// A time for people.
#[derive(Clone, Copy)]
pub(crate) struct Seconds(pub(crate) Duration);

impl std::fmt::Display for Seconds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.1} s", self.0.as_secs_f64())
    }
}

/// The stages of a boot, in seconds from the request to start.
pub(crate) fn boot(vm: &Value) -> String {
    let stages: Vec<String> = ["vmm_up", "kernel", "agent", "banger_init", "ssh", "ready"]
        .iter()
        .map(|stage| {
            let ms = vm["boot"][stage]
                .as_f64()
                .unwrap_or_else(|| panic!("the boot's stage {stage} was never told: {vm:#}"));
            format!("{stage} {:.1} s", ms / 1000.0)
        })
        .collect();
    stages.join(", ")
}

pub(crate) fn command(program: &str) -> Command {
    #[expect(
        clippy::disallowed_methods,
        reason = "a test runs the programs as a person would"
    )]
    Command::new(program)
}

/// The tests' images and kernels, on the filesystem that the tests' homes are on. Beside `tiny` there is `second`,
/// which is the same but for a file that says so.
pub(crate) fn fixtures() -> &'static Path {
    static COPY: OnceLock<PathBuf> = OnceLock::new();
    COPY.get_or_init(|| {
        let target = PathBuf::from("/var/tmp/fixtures");
        let from = Path::new(&std::env::var("BANGER_TEST_FIXTURES").unwrap()).join("banger");
        copy(&["-r"], &from, &target);
        let mut images = std::fs::read_dir(target.join("images")).unwrap();
        second_image(&images.next().unwrap().unwrap().path());
        target
    })
}

/// Makes the image `second` beside this one.
fn second_image(first: &Path) {
    let id = Uuid::now_v7().to_string();
    let folder = first.with_file_name(&id);
    copy(&["-r"], first, &folder);
    let root = folder.join("root.img");
    let output = |program: &str, args: &[&str]| {
        let output = command(program).args(args).arg(&root).output().unwrap();
        assert!(output.status.success(), "{program}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let word = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(word.path(), "second\n").unwrap();
    let write = format!("write {} etc/second", word.path().display());
    let uuid = Uuid::now_v7().to_string();
    output("chmod", &["u+w"]);
    output("debugfs", &["-w", "-R", &write]);
    output("tune2fs", &["-U", &uuid]);
    let sum = output("sha256sum", &[]);
    let manifest = folder.join("image.json");
    let text = std::fs::read_to_string(&manifest).unwrap();
    let mut facts: Value = serde_json::from_str(&text).unwrap();
    facts["id"] = id.into();
    facts["name"] = "second".into();
    facts["uuid"] = uuid.into();
    facts["sha256"] = sum.split_whitespace().next().unwrap().into();
    std::fs::write(&manifest, facts.to_string()).unwrap();
}

fn copy(options: &[&str], from: &Path, to: &Path) {
    let status = command("cp").args(options).arg(from).arg(to).status();
    assert!(status.unwrap().success());
}

/// What banger could leave behind, from the kernel's own view: processes, namespaces, links, routes and rules.
fn host_objects() -> BTreeSet<String> {
    let mut objects = BTreeSet::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let process = entry.path();
        let Ok(program) = std::fs::read_link(process.join("exe")) else {
            continue;
        };
        let name = program.file_name().unwrap().to_string_lossy();
        if name.starts_with("banger") || name.starts_with("qemu") || name.starts_with("firecracker")
        {
            objects.insert(format!("process {} {name}", process.display()));
        }
        // None when it is ending.
        if let Ok(namespace) = std::fs::read_link(process.join("ns/net")) {
            objects.insert(format!("namespace {}", namespace.display()));
        }
    }
    for (what, program, args) in [
        ("link", "ip", &["-brief", "link"][..]),
        ("address", "ip", &["-brief", "address"]),
        ("route", "ip", &["route", "show", "table", "all"]),
        ("rule", "nft", &["list", "ruleset"]),
    ] {
        let output = command(program).args(args).output().unwrap();
        assert!(output.status.success(), "`{program}` failed");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        objects.extend(text.lines().map(|line| format!("{what} {}", line.trim())));
    }
    objects
}
