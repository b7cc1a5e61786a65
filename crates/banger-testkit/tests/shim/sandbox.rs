//! What a VMM that its guest has taken over can still do: next to nothing.

use super::{Vm, started};
use banger_vmm::lock;
use banger_vmm::protocol::{Descriptor, Launched};
use banger_vmm::sandbox::{Applied, Layer};
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, BorrowedFd};
use std::process::{Child, Stdio};

/// A process that keeps namespaces of its own, as an instance's keeper does.
struct Keeper(Child);

impl Keeper {
    /// Makes a network namespace, and a user namespace around it if `user`, in which it runs `first`. None, with the
    /// reason told, if it cannot.
    fn new(test: &str, user: bool, first: &str) -> Option<Self> {
        #[expect(
            clippy::disallowed_methods,
            reason = "tests make namespaces of their own"
        )]
        let mut command = std::process::Command::new("unshare");
        if user {
            command.args(["--user", "--map-root-user"]);
        }
        let mut child = command
            .args(["--net", "sh", "-ec"])
            .arg(format!("{first}\necho there\nexec sleep 600"))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let mut line = String::new();
        let output = child.stdout.take().unwrap();
        BufReader::new(output).read_line(&mut line).unwrap();
        let keeper = Self(child);
        if line.trim() != "there" {
            eprintln!("SKIPPED: {test}: no namespaces can be made here");
            return None;
        }
        Some(keeper)
    }

    fn namespace(&self, kind: &str) -> std::fs::File {
        std::fs::File::open(format!("/proc/{}/ns/{kind}", self.0.id())).unwrap()
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts `vm` in namespaces of `keeper`.
fn start(vm: &mut Vm, keeper: &Keeper, user: bool) -> (i32, Vec<Applied>) {
    let lock = lock::try_lock(&vm.path("vm.lock")).unwrap();
    let namespaces = [keeper.namespace("user"), keeper.namespace("net")];
    let mut kinds = vec![Descriptor::Lock];
    let mut descriptors: Vec<BorrowedFd<'_>> = vec![lock.as_fd()];
    if user {
        kinds.push(Descriptor::UserNamespace);
        descriptors.push(namespaces[0].as_fd());
    }
    kinds.push(Descriptor::NetworkNamespace);
    descriptors.push(namespaces[1].as_fd());
    let launch = vm.launch(vm.plan(), kinds);
    let (launched, child) = started(&launch, &descriptors);
    vm.shim = child;
    match launched {
        Launched::Running {
            vmm_pid, sandbox, ..
        } => (vmm_pid, sandbox),
        Launched::Failed { .. } => panic!("{launched:?}"),
    }
}

fn tries(test: &str, user: bool) {
    let Some(keeper) = Keeper::new(test, user, "") else {
        return;
    };
    let mut vm = Vm::new("");
    let other = tempfile::tempdir().unwrap();
    let secret = other.path().join("disk.img");
    std::fs::write(&secret, "another VM's").unwrap();
    let own = |name: &str| vm.path(name).display().to_string();
    let in_folder = |name: &str| vm.run_dir().join(name).display().to_string();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listening = listener.local_addr().unwrap().to_string();
    let refused = [
        ("read", "/etc/passwd".to_owned()),
        ("read", "/proc/self/status".to_owned()),
        ("read", secret.display().to_string()),
        ("read", own("vm.lock")),
        ("list", vm.folder.path().display().to_string()),
        ("list", "/".to_owned()),
        ("write", own("root,with,commas.img")),
        ("write", "/usr/lib/os-release".to_owned()),
        ("make", "/made".to_owned()),
        ("make", own("made")),
        ("make", in_folder("made")),
        ("link", in_folder("link")),
        ("signal", std::process::id().to_string()),
        ("connect", listening),
    ];
    let allowed = [
        ("read", own("root,with,commas.img")),
        ("read", own("disk.img")),
        ("write", own("disk.img")),
        ("write", "/dev/null".to_owned()),
        ("list", in_folder("")),
        ("socket", "own.sock".to_owned()),
        ("signal", "1".to_owned()),
    ];
    let script = serde_json::json!({ "try": refused.iter().chain(&allowed).collect::<Vec<_>>() });
    std::fs::write(vm.run_dir().join("fake-vmm.script"), script.to_string()).unwrap();
    let (vmm_pid, applied) = start(&mut vm, &keeper, user);
    vm.connect_ready();
    vm.wait_console("fake login:");

    let missing: Vec<_> = applied.iter().filter(|it| it.missing.is_some()).collect();
    if !missing.is_empty() {
        eprintln!("SKIPPED: {test}: this host refuses a part of the sandbox: {missing:?}");
        return;
    }
    let layers: Vec<Layer> = applied.iter().map(|it| it.layer).collect();
    assert_eq!(layers.len(), 7, "{layers:?}");
    let console = vm.console();
    let outcome = |what: &str, on: &str| {
        let said = format!("tried to {what} {on}: ");
        let (_, rest) = console.split_once(&said).unwrap();
        rest.lines().next().unwrap().trim().to_owned()
    };
    for (what, on) in &refused {
        assert_ne!(outcome(what, on), "done", "{what} {on}");
    }
    for (what, on) in &allowed {
        assert_eq!(outcome(what, on), "done", "{what} {on}");
    }

    let status = std::fs::read_to_string(format!("/proc/{vmm_pid}/status")).unwrap();
    for line in [
        "NoNewPrivs:\t1",
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000000",
    ] {
        assert!(status.contains(line), "{status}");
    }
    let own_namespace = |kind: &str| {
        let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
        of(&vmm_pid.to_string()) != of("self")
    };
    for kind in ["user", "mnt", "pid", "ipc", "net"] {
        assert!(own_namespace(kind), "{kind}");
    }
    // It is found and killed by its lock all the same.
    assert!(
        lock::holders(&vm.path("vm.lock"))
            .unwrap()
            .contains(&vmm_pid)
    );
}

#[test]
fn a_vmm_that_was_taken_over_reaches_nothing_but_its_own_files() {
    tries(
        "a_vmm_that_was_taken_over_reaches_nothing_but_its_own_files",
        false,
    );
}

#[test]
fn nor_does_it_in_the_user_namespace_of_an_instance() {
    tries("nor_does_it_in_the_user_namespace_of_an_instance", true);
}

#[test]
fn a_layer_that_the_host_refuses_is_left_out_and_told_and_the_others_hold() {
    let test = "a_layer_that_the_host_refuses_is_left_out_and_told_and_the_others_hold";
    let limits = "cd /proc/sys/user; echo 0 >max_mnt_namespaces; echo 0 >max_pid_namespaces";
    let Some(keeper) = Keeper::new(test, true, limits) else {
        return;
    };
    let mut vm = Vm::new(r#"{"try": [["read", "/etc/passwd"], ["write", "/dev/null"]]}"#);
    let (_, applied) = start(&mut vm, &keeper, true);
    vm.connect_ready();
    vm.wait_console("fake login:");
    let missing: Vec<Layer> = applied
        .iter()
        .filter(|applied| applied.missing.is_some())
        .map(|applied| applied.layer)
        .collect();
    if missing.contains(&Layer::Landlock) {
        eprintln!("SKIPPED: {test}: this kernel has no Landlock");
        return;
    }
    assert_eq!(missing, [Layer::Pid, Layer::Mount], "{applied:?}");
    let console = vm.console();
    assert!(
        console.contains("tried to read /etc/passwd: Permission denied"),
        "{console}"
    );
    assert!(
        console.contains("tried to write /dev/null: done"),
        "{console}"
    );
    let log = std::fs::read_to_string(vm.path("vmm.log")).unwrap();
    assert!(log.contains("without the sandbox's layer `mount`"), "{log}");
}

/// A script runs who knows what, so it keeps the host's files in view, and this is told.
#[test]
fn a_program_that_is_a_script_runs_without_a_root_of_its_own_and_this_is_told() {
    use std::os::unix::fs::PermissionsExt;
    let mut vm = Vm::new("");
    let program = vm.path("wrapped");
    let text = format!(
        "#!/bin/sh\nexec {} \"$@\"\n",
        env!("CARGO_BIN_EXE_fake-vmm")
    );
    std::fs::write(&program, text).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let lock = lock::try_lock(&vm.path("vm.lock")).unwrap();
    let mut launch = vm.launch(vm.plan(), vec![Descriptor::Lock]);
    launch.program = program;
    let (launched, child) = started(&launch, &[lock.as_fd()]);
    vm.shim = child;
    let Launched::Running { sandbox, .. } = launched else {
        panic!("{launched:?}");
    };
    let missing = |layer: Layer| {
        let applied = sandbox.iter().find(|applied| applied.layer == layer);
        applied.unwrap().missing.clone().unwrap_or_default()
    };
    assert!(missing(Layer::Mount).contains("script"), "{sandbox:?}");
    assert_eq!(missing(Layer::Capabilities), "");
    let (_client, status) = vm.connect_ready();
    assert_eq!(status.sandbox, sandbox);
    let log = std::fs::read_to_string(vm.path("vmm.log")).unwrap();
    assert!(log.contains("without the sandbox's layer `mount`"), "{log}");
}
