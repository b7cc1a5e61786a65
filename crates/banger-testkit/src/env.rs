//! A world of its own for a test: home folder, settings, fixtures, daemon.

use crate::host::{self, Host};
use crate::run::{LIMIT, Output, Running, eventually, signal, wait_exit};
use crate::skip::skip;
use rustix::process::Signal;
use serde_json::Value;
use std::net::Ipv4Addr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Files up to this size are copied into a world; larger ones, which nobody writes to, are linked.
const COPY_UP_TO: u64 = 4 << 20;

/// What stands behind the VMs of a world.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Vmm {
    /// `fake-vmm` with this script (JSON, or nothing).
    Scripted(String),
    /// The machine's QEMU.
    Real,
    /// A program that is not there.
    Missing,
}

/// How a world is made.
#[derive(Debug, Clone)]
pub struct Options {
    /// What runs the VMs.
    pub vmm: Vmm,
    /// Makes the path of `HOME` exactly so many bytes long, and sets none of the XDG variables.
    pub home_bytes: Option<usize>,
    /// Puts the state folder on a filesystem of so many bytes, in memory.
    pub state_bytes: Option<u64>,
    /// Whose the world is, and who runs `banger` in it; without one, root.
    pub user: Option<u32>,
    /// The mode that the settings ask for.
    pub mode: Option<&'static str>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            vmm: Vmm::Scripted(String::new()),
            home_bytes: None,
            state_bytes: None,
            user: None,
            mode: None,
        }
    }
}

/// A world of its own. Dropping it ends everything in it, and fails the test if something is left.
#[derive(Debug)]
pub struct TestEnv {
    root: Option<tempfile::TempDir>,
    folder: PathBuf,
    variables: Vec<(String, String)>,
    state: PathBuf,
    runtime: PathBuf,
    data: PathBuf,
    libexec: PathBuf,
    pool: Ipv4Addr,
    /// Held as long as the world has its pool.
    _pool_taken: UnixListener,
    mounted: bool,
    user: Option<u32>,
}

impl TestEnv {
    /// A world whose VMs are `fake-vmm` with `script`. Answers `None`, and says why, where it cannot be.
    ///
    /// # Panics
    /// It cannot be made although the machine has all that it takes.
    pub fn scripted(test: &str, script: &str) -> Option<Self> {
        let vmm = Vmm::Scripted(script.to_owned());
        Self::with(
            test,
            &Options {
                vmm,
                ..Options::default()
            },
        )
    }

    /// A world whose VMs are real guests.
    ///
    /// # Panics
    /// As [`TestEnv::scripted`].
    pub fn real(test: &str) -> Option<Self> {
        let vmm = Vmm::Real;
        Self::with(
            test,
            &Options {
                vmm,
                ..Options::default()
            },
        )
    }

    /// A world made as `options` say.
    ///
    /// # Panics
    /// As [`TestEnv::scripted`].
    pub fn with(test: &str, options: &Options) -> Option<Self> {
        let libexec = programs();
        let fixtures =
            variable("BANGER_TEST_FIXTURES").unwrap_or_else(|| build_folder().join("fixtures"));
        for (path, how) in [
            (libexec.join("banger"), "cargo xtask dist --debug"),
            (fixtures.join("banger/images"), "cargo xtask test"),
        ] {
            if !path.exists() {
                skip(test, format!("`{}` is missing: `{how}`", path.display()));
                return None;
            }
        }
        if !rustix::process::geteuid().is_root() {
            skip(test, "it looks into processes and namespaces as root");
            return None;
        }
        if options.vmm == Vmm::Real && !on_path("qemu-system-x86_64") {
            skip(test, "QEMU is not installed");
            return None;
        }
        if options.home_bytes.is_some() && Path::new("/run/user/0").is_dir() {
            skip(
                test,
                "root's own folder below /run/user comes before one below HOME: its daemon is not ours to use",
            );
            return None;
        }
        let (pool, taken) = take_pool();
        let root = tempfile::Builder::new()
            .prefix("banger-")
            .tempdir()
            .expect("the folder for temporary files is writable");
        let folder = root.path().to_owned();
        let mut env = Self {
            variables: Vec::new(),
            state: folder.join("state/banger"),
            runtime: folder.join("runtime/banger"),
            data: folder.join("data/banger"),
            root: Some(root),
            folder,
            libexec,
            pool,
            _pool_taken: taken,
            mounted: false,
            user: options.user,
        };
        env.furnish(options, &fixtures);
        Some(env)
    }

    fn furnish(&mut self, options: &Options, fixtures: &Path) {
        let text = |path: &Path| path.display().to_string();
        let mut home = self.folder.join("home");
        let mut config = self.folder.join("config/banger");
        if let Some(bytes) = options.home_bytes {
            let missing = bytes.saturating_sub(self.folder.as_os_str().len() + 1);
            home = self.folder.join("h".repeat(missing));
            self.state = home.join(".local/state/banger");
            self.runtime = self.state.join("run");
            self.data = home.join(".local/share/banger");
            config = home.join(".config/banger");
        } else {
            for (name, below) in [
                ("XDG_STATE_HOME", "state"),
                ("XDG_DATA_HOME", "data"),
                ("XDG_CACHE_HOME", "cache"),
                ("XDG_CONFIG_HOME", "config"),
                ("XDG_RUNTIME_DIR", "runtime"),
            ] {
                self.variables
                    .push((name.to_owned(), text(&self.folder.join(below))));
            }
            make_private(&self.folder.join("runtime"));
        }
        for folder in [&home, &config, &self.data, &self.state] {
            std::fs::create_dir_all(folder).expect("the world's folder is ours");
        }
        self.variables.push(("HOME".to_owned(), text(&home)));
        let path = std::env::var("PATH").unwrap_or_default();
        self.variables.push(("PATH".to_owned(), path));
        if options.user.is_some() {
            // The build folder may be in a place that only root enters.
            let programs = self.folder.join("bin");
            std::fs::create_dir(&programs).expect("the world's folder is ours");
            for name in names(&self.libexec) {
                link_or_copy(&self.libexec.join(&name), &programs.join(&name));
            }
            self.libexec = programs;
        }
        self.variables
            .push(("BANGER_LIBEXEC".to_owned(), text(&self.libexec)));
        if let Some(bytes) = options.state_bytes {
            self.mount_state(bytes);
        }
        let mode = options.mode.map(|mode| format!("mode = \"{mode}\"\n"));
        let mut settings = format!(
            "[network]\npool = \"{}/20\"\n{}[driver]\n",
            self.pool,
            mode.unwrap_or_default()
        );
        match &options.vmm {
            Vmm::Real => settings.push_str("choice = \"qemu\"\n"),
            Vmm::Missing => settings.push_str("choice = \"qemu\"\nqemu = \"/nonexistent/qemu\"\n"),
            Vmm::Scripted(script) => {
                // Its own program, since the script lies in its prefix.
                let program = self.folder.join("vmm/fake-vmm");
                for folder in ["vmm", "share/qemu"] {
                    std::fs::create_dir_all(self.folder.join(folder)).expect("the folder is ours");
                }
                let built = build_folder().join("debug/fake-vmm");
                link_or_copy(&built, &program);
                if !script.is_empty() {
                    self.script(script);
                }
                settings.push_str(&format!(
                    "choice = \"qemu\"\nqemu = \"{}\"\n",
                    program.display()
                ));
            }
        }
        std::fs::write(config.join("config.toml"), settings).expect("the folder is ours");
        for store in ["images", "kernels"] {
            take_over(&fixtures.join("banger").join(store), &self.data.join(store));
        }
        if let Some(user) = options.user {
            give(&self.folder, user);
        }
    }

    fn mount_state(&mut self, bytes: u64) {
        let options = format!("size={bytes},mode=700\0");
        let options = std::ffi::CStr::from_bytes_with_nul(options.as_bytes())
            .expect("numbers hold no zero byte");
        rustix::mount::mount(
            "tmpfs",
            &self.state,
            "tmpfs",
            rustix::mount::MountFlags::NOSUID,
            options,
        )
        .expect("root may mount a tmpfs");
        self.mounted = true;
    }

    /// What `fake-vmm` does from its next start on.
    ///
    /// # Panics
    /// The script cannot be written.
    pub fn script(&self, script: &str) {
        std::fs::write(self.folder.join("share/qemu/fake-vmm.script"), script)
            .expect("the folder is ours");
    }

    /// The world's own folder; everything of it is inside.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The daemon's state folder.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// The folder of images, kernels and keys.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// Gives the world a second kernel, as good as its first, before its daemon comes up.
    ///
    /// # Panics
    /// There is no first one, or no room.
    pub fn add_kernel(&self, name: &str) {
        let shelf = self.data.join("kernels");
        let first = names(&shelf)
            .into_iter()
            .next()
            .expect("the fixtures' kernel is there");
        let id = "01a229ae-555b-72dc-9e79-5e19a732d6d8";
        let added = shelf.join(id);
        take_over(&shelf.join(first), &added);
        let manifest = added.join("kernel.json");
        let bytes = std::fs::read(&manifest).expect("a kernel has a manifest");
        let mut value: Value = serde_json::from_slice(&bytes).expect("the manifest is JSON");
        value["id"] = id.into();
        value["name"] = name.into();
        std::fs::write(&manifest, value.to_string()).expect("the world's folder is ours");
        if let Some(user) = self.user {
            give(&added, user);
        }
    }

    /// The folder of the project's programs.
    pub fn libexec(&self) -> &Path {
        &self.libexec
    }

    /// The base of the world's /20.
    pub fn pool(&self) -> Ipv4Addr {
        self.pool
    }

    /// The host's address on the veth to the guests.
    pub fn host_address(&self) -> String {
        banger_core::addr::Pool::at(self.pool).host().to_string()
    }

    /// The daemon's socket.
    pub fn socket(&self) -> PathBuf {
        self.runtime.join("bangerd.sock")
    }

    /// The database.
    pub fn database(&self) -> PathBuf {
        self.state.join("banger.db")
    }

    /// The folder of a VM.
    pub fn vm_folder(&self, id: &str) -> PathBuf {
        self.state.join("vms").join(id)
    }

    /// Changes the record in a VM's folder, as a daemon would that could not write its database any more: the next one
    /// believes it.
    ///
    /// # Panics
    /// There is no record, or it cannot be written.
    pub fn edit_mirror(&self, id: &str, edit: impl FnOnce(&mut Value)) {
        let path = self.vm_folder(id).join("vm.json");
        let bytes = std::fs::read(&path).expect("the mirror is there");
        let mut file: Value = serde_json::from_slice(&bytes).expect("the mirror is JSON");
        let record = &mut file["meta"];
        edit(record);
        let version = record["record_version"].as_u64().expect("a version");
        record["record_version"] = (version + 1000).into();
        std::fs::write(&path, file.to_string()).expect("the mirror can be written");
    }

    /// The names in the folder of VMs, sorted.
    pub fn vm_folders(&self) -> Vec<String> {
        names(&self.state.join("vms"))
    }

    /// `program` of the project with the world's environment and nothing else of this process's.
    pub fn command(&self, program: &str) -> Command {
        #[expect(
            clippy::disallowed_methods,
            reason = "tests run the project's own programs"
        )]
        let mut command = Command::new(self.libexec.join(program));
        command
            .env_clear()
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .current_dir(&self.folder);
        if let Some(user) = self.user {
            command.uid(user).gid(user);
        }
        command
    }

    /// Starts `banger` and does not wait for it.
    pub fn spawn(&self, args: &[&str]) -> Running {
        Running::start(self.command("banger").args(args))
    }

    /// Runs `banger`.
    pub fn banger(&self, args: &[&str]) -> Output {
        self.spawn(args).finish()
    }

    /// Runs `banger` with more variables; a daemon that it starts has them, too.
    pub fn banger_with(&self, variables: &[(&str, &str)], args: &[&str]) -> Output {
        let mut command = self.command("banger");
        command.envs(variables.iter().copied()).args(args);
        Running::start(&mut command).finish()
    }

    /// Runs `banger`, which must succeed; answers its stdout.
    ///
    /// # Panics
    /// It fails.
    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.banger(args);
        assert!(
            output.status == 0,
            "banger {args:?} ended with {}:\n{}{}\nthe daemon's log:\n{}",
            output.status,
            output.stdout,
            output.stderr,
            self.daemon_log(),
        );
        output.stdout
    }

    /// Runs `banger … --json`, which must succeed; answers what it printed.
    ///
    /// # Panics
    /// It fails, or prints no JSON.
    #[track_caller]
    pub fn json(&self, args: &[&str]) -> Value {
        let args: Vec<&str> = args.iter().copied().chain(["--json"]).collect();
        let stdout = self.ok(&args);
        serde_json::from_str(&stdout)
            .unwrap_or_else(|error| panic!("banger {args:?} printed no JSON ({error}): {stdout}"))
    }

    /// All VMs, those in the trash last.
    ///
    /// # Panics
    /// The daemon does not answer.
    #[track_caller]
    pub fn vms(&self) -> Vec<Value> {
        [&["vm", "list"][..], &["vm", "list", "--trash"][..]]
            .into_iter()
            .flat_map(|args| self.json(args).as_array().cloned().unwrap_or_default())
            .collect()
    }

    /// One VM.
    ///
    /// # Panics
    /// There is none of that name.
    #[track_caller]
    pub fn vm(&self, name: &str) -> Value {
        self.json(&["vm", "show", name])
    }

    /// Waits until a VM is as `wanted` says, and answers it.
    ///
    /// # Panics
    /// It does not become so.
    #[track_caller]
    pub fn vm_becomes(&self, name: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        eventually(&format!("VM `{name}` is {what}"), || {
            Some(self.vm(name)).filter(|vm| wanted(vm))
        })
    }

    /// The end of the daemon's log.
    pub fn daemon_log(&self) -> String {
        let text = std::fs::read_to_string(self.state.join("bangerd.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    /// The daemon's process id, if it runs.
    pub fn daemon_pid(&self) -> Option<i32> {
        self.host().running("bangerd").first().copied()
    }

    /// Ends the daemon with SIGKILL and waits until it is gone.
    ///
    /// # Panics
    /// It does not run, or does not die.
    #[track_caller]
    pub fn kill_daemon(&self) {
        let pid = self.daemon_pid().expect("the daemon runs");
        signal(pid, Signal::KILL);
        assert!(wait_exit(pid, LIMIT), "the daemon does not die");
    }

    /// What the world has on the host.
    pub fn host(&self) -> Host {
        Host::look(&self.folder, self.pool, self.veth().as_deref())
    }

    /// The name of the link to the instance's namespace, once there is an instance.
    fn veth(&self) -> Option<String> {
        let text = std::fs::read(self.state.join("instance.json")).ok()?;
        let instance: Value = serde_json::from_slice(&text).ok()?;
        let id = instance["id"].as_str()?.replace('-', "");
        Some(format!("bv{}", &id[id.len().checked_sub(12)?..]))
    }

    /// The ports in the instance's namespace; none if there is no namespace.
    pub fn taps(&self) -> Vec<String> {
        self.keeper().map(host::taps).unwrap_or_default()
    }

    /// The process that keeps the instance's namespace, if there is one: not the one that holds a way out, which is
    /// the same program.
    pub fn keeper(&self) -> Option<i32> {
        let outside = std::fs::read_link("/proc/thread-self/ns/net").ok();
        let inside = |pid: &i32| {
            std::fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|own| Some(own) != outside)
        };
        let keepers = self.host().running("banger-netns");
        keepers.into_iter().find(inside)
    }

    /// Ends everything, whatever state it is in. What was left is answered as text.
    fn end(&mut self) -> Result<(), String> {
        let mut problems = Vec::new();
        if self.daemon_pid().is_some() || !self.host().processes.is_empty() {
            let output = self.banger(&["daemon", "stop", "--vms"]);
            if output.status != 0 {
                problems.push(format!("daemon stop: {}", output.stderr));
            }
        }
        // The keeper ends by itself when nobody needs it any more, and what holds an ordinary user's way out after it.
        for ending in self.host().running("banger-netns") {
            wait_exit(ending, LIMIT / 10);
        }
        let mut left = self.host();
        // The kernel takes apart what its last process held a moment later.
        let deadline = Instant::now() + LIMIT / 10;
        while left.processes.is_empty() && !left.is_only_mounts() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
            left = self.host();
        }
        let state = self.state.display().to_string();
        if self.mounted {
            left.mounts.retain(|mount| *mount != state);
        }
        // A VM that the test made deaf does not stop; whatever is left is ended the hard way.
        for process in &left.processes {
            signal(process.pid, Signal::KILL);
            wait_exit(process.pid, LIMIT);
        }
        if self.mounted {
            let flags = rustix::mount::UnmountFlags::DETACH;
            if let Err(error) = rustix::mount::unmount(&self.state, flags) {
                problems.push(format!("the state folder stays mounted: {error}"));
            }
            self.mounted = false;
        }
        if left != Host::default() {
            problems.push(format!("left on the host: {left:?}"));
        }
        if let Some(root) = self.root.take()
            && let Err(error) = root.close()
        {
            problems.push(format!("the folder stays: {error}"));
        }
        if problems.is_empty() {
            Ok(())
        } else {
            Err(problems.join("\n"))
        }
    }
}

impl Drop for TestEnv {
    fn drop(&mut self) {
        let failing = std::thread::panicking();
        let log = self.daemon_log();
        if failing {
            eprintln!("the daemon's log:\n{log}");
        }
        // Ending may itself panic: not while another panic is under way, and never without ending the rest.
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.end()));
        let outcome = ended.unwrap_or_else(|_| Err("the world could not be ended".to_owned()));
        if let Err(problems) = outcome {
            if failing {
                eprintln!("{problems}");
            } else {
                panic!("{problems}\nthe daemon's log:\n{log}");
            }
        }
    }
}

/// A /20 of a private network that hardly anybody has, and that no other world uses now.
fn take_pool() -> (Ipv4Addr, UnixListener) {
    let first = Ipv4Addr::new(100, 126, 0, 0).to_bits();
    (0..32)
        .find_map(|number: u32| {
            let name = format!("banger-test-pool-{number}");
            let address = SocketAddr::from_abstract_name(name).ok()?;
            let taken = UnixListener::bind_addr(&address).ok()?;
            Some((Ipv4Addr::from_bits(first + (number << 12)), taken))
        })
        .expect("fewer than 32 worlds at a time")
}

/// The folder of the project's programs, as root has it.
pub fn programs() -> PathBuf {
    variable("BANGER_LIBEXEC").unwrap_or_else(|| build_folder().join("dist-debug"))
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).map(PathBuf::from)
}

/// Cargo's build folder, in which the running test was built.
fn build_folder() -> PathBuf {
    let test = std::env::current_exe().expect("a test is a program");
    test.ancestors()
        .find(|folder| folder.join("CACHEDIR.TAG").exists())
        .map_or_else(|| PathBuf::from("target"), Path::to_owned)
}

pub(crate) fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// The names in a folder, sorted; none if it is not there.
pub fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn make_private(folder: &Path) {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .expect("the world's folder is ours");
}

fn link_or_copy(from: &Path, to: &Path) {
    if std::fs::hard_link(from, to).is_err() {
        std::fs::copy(from, to)
            .unwrap_or_else(|error| panic!("cannot copy `{}`: {error}", from.display()));
    }
}

/// Gives all that is in `path` to `user`, but for what other worlds have as well, which nobody writes to.
fn give(path: &Path, user: u32) {
    let metadata = std::fs::symlink_metadata(path).expect("the world's folder is ours");
    if metadata.is_dir() {
        for name in names(path) {
            give(&path.join(name), user);
        }
    } else if metadata.nlink() > 1 {
        return;
    }
    std::os::unix::fs::lchown(path, Some(user), Some(user)).expect("root gives files away");
}

/// Brings a store of images or kernels into a world.
fn take_over(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("the world's folder is ours");
    for entry in std::fs::read_dir(from).expect("the fixtures are there") {
        let entry = entry.expect("the fixtures can be listed");
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        let metadata = entry.metadata().expect("the fixtures can be looked at");
        if metadata.is_dir() {
            take_over(&from, &to);
        } else if metadata.len() > COPY_UP_TO {
            link_or_copy(&from, &to);
        } else {
            std::fs::copy(&from, &to).expect("the fixtures can be copied");
        }
    }
}
