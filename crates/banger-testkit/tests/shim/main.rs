//! The shim with a real process in the VMM's place.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod sandbox;

use banger_core::spec::Driver;
use banger_vmm::client::Client;
use banger_vmm::driver::{Accelerator, DriveConfig, MachineConfig, Plan, Vmm};
use banger_vmm::firecracker::Firecracker;
use banger_vmm::lock::{self, LockError};
use banger_vmm::protocol::{
    Descriptor, Event, Exit, FromShim, LastEvent, Launch, Launched, Ring, Status, Verb,
};
use banger_vmm::qemu::Qemu;
use banger_vmm::{exit, launch, process};
use rustix::process::Signal;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(20);

fn deadline() -> Instant {
    Instant::now() + LIMIT
}

/// Starts a shim and launches it.
#[track_caller]
fn started(launch: &Launch, descriptors: &[BorrowedFd<'_>]) -> (Launched, Option<Child>) {
    let waiting = launch::spawn(&shim_program()).unwrap();
    waiting.launch(launch, descriptors).unwrap()
}

fn shim_program() -> PathBuf {
    let program = Path::new(env!("CARGO_BIN_EXE_fake-vmm")).with_file_name("banger-shim");
    assert!(
        program.is_file(),
        "{} is missing: run `cargo build -p banger-vmm --bin banger-shim` first",
        program.display()
    );
    program
}

/// One VM's folder, and at most one run of it. Dropping it ends what still runs.
struct Vm {
    folder: tempfile::TempDir,
    shim: Option<Child>,
}

impl Vm {
    fn new(script: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let vm = Self { folder, shim: None };
        std::fs::create_dir_all(vm.run_dir()).unwrap();
        if !script.is_empty() {
            std::fs::write(vm.run_dir().join("fake-vmm.script"), script).unwrap();
        }
        for disk in ["root,with,commas.img", "disk.img"] {
            std::fs::write(vm.folder.path().join(disk), "disk").unwrap();
        }
        vm
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Lets happen what the script says under `on_go`.
    fn go(&self) {
        std::fs::write(self.run_dir().join("go"), "").unwrap();
    }

    /// Longer than a socket's path may be.
    fn run_dir(&self) -> PathBuf {
        self.path(&format!("{}/run", "long-".repeat(24)))
    }

    fn plan(&self) -> Plan {
        Qemu::new(env!("CARGO_BIN_EXE_fake-vmm"))
            .plan(&self.machine())
            .unwrap()
    }

    fn machine(&self) -> MachineConfig {
        MachineConfig {
            id: "0198aa".to_owned(),
            name: "calm-otter".to_owned(),
            vcpus: 1,
            memory_mib: 128,
            kernel: "/nonexistent/vmlinux".into(),
            initrd: "/nonexistent/initrd".into(),
            kernel_args: Vec::new(),
            drives: vec![
                DriveConfig {
                    path: self.path("root,with,commas.img"),
                    read_only: true,
                },
                DriveConfig {
                    path: self.path("disk.img"),
                    read_only: false,
                },
            ],
            nic: None,
            run_dir: self.run_dir(),
            accelerator: Accelerator::Tcg,
            cid: 3,
            firmware: None,
        }
    }

    fn launch(&self, plan: Plan, descriptors: Vec<Descriptor>) -> Launch {
        let ring = |name: &str| Ring {
            path: self.path(name),
            max_bytes: 64 * 1024,
        };
        Launch {
            vm: "0198aa".to_owned(),
            attempt: "attempt-1".to_owned(),
            descriptors,
            program: plan.program,
            args: plan.args,
            control: plan.control,
            sandbox: plan.sandbox,
            cgroup: None,
            shim_socket: self.run_dir().join("shim.sock"),
            console: ring("console.log"),
            log: ring("vmm.log"),
            metrics: ring("metrics.log"),
            exit_file: self.path("exit.json"),
        }
    }

    fn try_start(&mut self) -> Launched {
        let lock = lock::try_lock(&self.path("vm.lock")).unwrap();
        let launch = self.launch(self.plan(), vec![Descriptor::Lock]);
        let (launched, child) = started(&launch, &[lock.as_fd()]);
        self.shim = child;
        launched
    }

    fn start(script: &str) -> (Self, i32) {
        let mut vm = Self::new(script);
        match vm.try_start() {
            Launched::Running { vmm_pid, .. } => (vm, vmm_pid),
            failed => panic!("{failed:?}"),
        }
    }

    fn connect(&self) -> (Client, Status) {
        Client::connect(&self.run_dir().join("shim.sock"), LIMIT).unwrap()
    }

    fn connect_ready(&self) -> (Client, Status) {
        let (mut client, status) = self.connect();
        let status = wait_for_status(&mut client, status, |status| status.ready);
        (client, status)
    }

    fn wait_exit(&mut self) -> Exit {
        self.shim.take().unwrap().wait().unwrap();
        let exit = exit::read(&self.path("exit.json")).unwrap().unwrap();
        drop(lock::wait_free(&self.path("vm.lock"), deadline()).unwrap());
        assert!(!self.run_dir().join("shim.sock").exists());
        exit
    }

    fn is_locked(&self) -> bool {
        matches!(
            lock::try_lock(&self.path("vm.lock")),
            Err(LockError::Held(_))
        )
    }

    fn console(&self) -> String {
        let read = |name: &str| std::fs::read(self.path(name)).unwrap_or_default();
        let bytes = [read("console.log.1"), read("console.log")].concat();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until the console has `text`, told of its growth by the kernel.
    fn wait_console(&self, text: &str) {
        use rustix::fs::inotify;
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
        inotify::add_watch(
            &watch,
            self.folder.path(),
            inotify::WatchFlags::MODIFY | inotify::WatchFlags::CREATE,
        )
        .unwrap();
        let until = deadline();
        while !self.console().contains(text) {
            assert!(Instant::now() < until, "no `{text}` in: {}", self.console());
            process::wait_any(
                std::slice::from_ref(&watch),
                until.saturating_duration_since(Instant::now()),
            )
            .unwrap();
            let _ = rustix::io::read(&watch, &mut [0; 4096]);
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let lock = self.path("vm.lock");
        // The VMM only: its shim then reaps it and ends by itself.
        let shim = self.shim.as_ref().map(|shim| shim.id() as i32);
        for pid in lock::holders(&lock).unwrap_or_default() {
            if Some(pid) != shim {
                let _ = process::kill_holder(pid, &lock, Signal::KILL);
            }
        }
        if let Some(mut shim) = self.shim.take() {
            let _ = shim.wait();
        }
        if lock.exists() {
            let _ = lock::wait_free(&lock, deadline());
        }
    }
}

fn wait_for_status(
    client: &mut Client,
    mut status: Status,
    wanted: impl Fn(&Status) -> bool,
) -> Status {
    let until = deadline();
    while !wanted(&status) {
        if let FromShim::Status(newer) = client.next(until).unwrap().expect("the shim lives") {
            status = newer;
        }
    }
    status
}

fn wait_for_exit_event(client: &mut Client) -> Exit {
    let until = deadline();
    loop {
        if let FromShim::Event(Event::Exited { exit }) =
            client.next(until).unwrap().expect("an exit comes first")
        {
            return exit;
        }
    }
}

fn request(client: &mut Client, verb: Verb) {
    client.request(verb, deadline()).unwrap().unwrap();
}

#[test]
fn a_launched_vmm_answers_becomes_ready_and_its_boot_is_timed() {
    let (vm, vmm_pid) = Vm::start("");
    let (mut client, status) = vm.connect_ready();
    assert_eq!(status.vmm_pid, vmm_pid);
    assert_eq!(status.driver, Driver::Qemu);
    assert_eq!(
        (status.vm.as_str(), status.attempt.as_str()),
        ("0198aa", "attempt-1")
    );
    assert!(status.agent && !status.paused && !status.disk_full);
    let boot = status.boot;
    let times = [
        boot.vmm_up,
        boot.kernel,
        boot.banger_init,
        boot.agent,
        boot.ssh,
        boot.ready,
    ];
    assert!(times.iter().all(Option::is_some), "{times:?}");
    request(&mut client, Verb::Ping);
    vm.wait_console("fake login:");
}

#[test]
fn news_of_the_agents_port_in_the_middle_of_a_line_costs_no_word() {
    let (vm, _) = Vm::start(r#"{"port_told_late": true}"#);
    let (_, status) = vm.connect_ready();
    assert!(status.ready && status.agent);
}

/// What descriptors of a process are, as `/proc` writes it.
fn descriptors(pid: u32) -> Vec<String> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let links = entries
        .flatten()
        .filter_map(|entry| entry.path().read_link().ok());
    links.map(|link| link.display().to_string()).collect()
}

#[test]
fn a_vm_that_runs_takes_no_inotify_instance_of_which_a_user_has_few() {
    let (vm, _) = Vm::start("");
    let (mut client, _) = vm.connect_ready();
    request(&mut client, Verb::Ping);
    let shim = vm.shim.as_ref().unwrap().id();
    let open = descriptors(shim);
    assert!(
        !open.iter().any(|link| link.contains("inotify")),
        "{open:?}"
    );
}

#[test]
fn a_vmm_starts_where_the_user_has_no_inotify_instance_left() {
    use std::os::unix::fs::PermissionsExt;
    let mut vm = Vm::new("");
    let program = vm.path("shim-without-inotify");
    let script = format!(
        "#!/bin/sh\nexec unshare --user --map-root-user sh -ec \
         'echo 0 >/proc/sys/user/max_inotify_instances; exec \"$0\"' {}\n",
        shim_program().display()
    );
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    let lock = lock::try_lock(&vm.path("vm.lock")).unwrap();
    let launch = vm.launch(vm.plan(), vec![Descriptor::Lock]);
    let waiting = launch::spawn(&program).unwrap();
    let (launched, child) = waiting.launch(&launch, &[lock.as_fd()]).unwrap();
    vm.shim = child;
    drop(lock);
    assert!(matches!(launched, Launched::Running { .. }), "{launched:?}");
    let (mut client, _) = vm.connect_ready();
    request(&mut client, Verb::Shutdown);
    assert_eq!(vm.wait_exit().last_event, LastEvent::GuestPoweroff);
}

#[test]
fn pause_and_resume_are_seen_by_every_client_and_the_clock_is_set() {
    let (vm, _) = Vm::start("");
    let (mut first, _) = vm.connect_ready();
    let (mut second, status) = vm.connect();
    request(&mut first, Verb::Pause);
    let status = wait_for_status(&mut second, status, |status| status.paused);
    assert!(!status.disk_full);
    assert_eq!(
        first.request(Verb::Shutdown, deadline()).unwrap(),
        Err("the guest is paused".to_owned())
    );
    request(&mut first, Verb::Resume);
    wait_for_status(&mut second, status, |status| !status.paused);
    vm.wait_console("the clock was set");
}

#[test]
fn a_guest_that_powers_off_reboots_or_panics_says_so_in_its_exit() {
    for (script, event) in [
        (r#"{"on_go": "poweroff"}"#, LastEvent::GuestPoweroff),
        (r#"{"on_go": "reboot"}"#, LastEvent::GuestReboot),
        (r#"{"on_go": "panic"}"#, LastEvent::GuestPanic),
        (r#"{"on_go": "die"}"#, LastEvent::None),
    ] {
        let (mut vm, _) = Vm::start(script);
        let (mut client, _) = vm.connect();
        vm.go();
        let told = wait_for_exit_event(&mut client);
        assert_eq!(client.next(deadline()).unwrap(), None);
        let exit = vm.wait_exit();
        assert_eq!(exit, told);
        assert_eq!(exit.last_event, event, "{script}");
        assert_eq!(exit.code, Some(i32::from(event == LastEvent::None)));
        assert!(!exit.shutdown_asked);
    }
}

#[test]
fn shutdown_goes_by_the_agent_where_there_is_one() {
    let (mut vm, _) = Vm::start("");
    let (mut client, _) = vm.connect_ready();
    request(&mut client, Verb::Shutdown);
    let exit = vm.wait_exit();
    assert_eq!(exit.last_event, LastEvent::GuestPoweroff);
    assert!(exit.shutdown_asked);
    assert!(vm.console().contains("the agent was asked to power off"));
}

#[test]
fn shutdown_goes_by_the_button_where_there_is_no_agent() {
    let (mut vm, _) = Vm::start(r#"{"no_agent": true}"#);
    let (mut client, status) = vm.connect();
    assert!(!status.agent && !status.ready);
    request(&mut client, Verb::Shutdown);
    assert_eq!(vm.wait_exit().last_event, LastEvent::GuestPoweroff);
    assert!(vm.console().contains("the button was pressed"));
}

#[test]
fn a_guest_that_ignores_shutdown_is_asked_by_the_button_next_and_dies_by_kill() {
    let (mut vm, _) = Vm::start(r#"{"ignore_powerdown": true}"#);
    let (mut client, _) = vm.connect_ready();
    request(&mut client, Verb::Shutdown);
    request(&mut client, Verb::Shutdown);
    vm.wait_console("the button was pressed");
    request(&mut client, Verb::Kill);
    let exit = wait_for_exit_event(&mut client);
    assert_eq!(exit.signal, Some(Signal::KILL.as_raw()));
    assert_eq!(exit.last_event, LastEvent::Ended);
    assert!(exit.shutdown_asked);
    vm.wait_exit();
}

#[test]
fn terminate_reaches_the_vmm_though_its_shim_ignores_sigterm() {
    let (mut vm, _) = Vm::start("");
    let (mut client, status) = vm.connect_ready();
    let shim = process::open(status.shim_pid).unwrap();
    rustix::process::pidfd_send_signal(&shim, Signal::TERM).unwrap();
    request(&mut client, Verb::Terminate);
    let exit = vm.wait_exit();
    assert_eq!((exit.signal, exit.code), (None, Some(0)));
    assert_eq!(exit.last_event, LastEvent::Ended);
}

#[test]
fn a_full_disk_of_the_host_is_told_apart_from_a_persons_pause() {
    let (vm, _) = Vm::start(r#"{"on_go": "disk_full"}"#);
    let (mut client, status) = vm.connect();
    vm.go();
    let status = wait_for_status(&mut client, status, |status| status.paused);
    assert!(status.disk_full);
    request(&mut client, Verb::Resume);
    let status = wait_for_status(&mut client, status, |status| !status.paused);
    assert!(!status.disk_full);
}

#[test]
fn a_vmm_that_dies_at_once_is_a_failure_in_its_own_words_and_leaves_nothing() {
    let script = r#"{"exit_before_qmp": {"code": 3, "stderr": "no such\u001b[2J device"}}"#;
    let mut vm = Vm::new(script);
    let Launched::Failed { error, stderr } = vm.try_start() else {
        panic!("it cannot run");
    };
    assert!(error.contains("fake-vmm") && error.contains('3'), "{error}");
    assert_eq!(stderr, "no such\\u{1b}[2J device");
    assert!(!vm.is_locked());
    assert!(!vm.path("exit.json").exists());
    let left: Vec<_> = std::fs::read_dir(vm.run_dir())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, ["fake-vmm.script"]);
}

#[test]
fn a_program_that_is_missing_is_named() {
    let vm = Vm::new("");
    let lock = lock::try_lock(&vm.path("vm.lock")).unwrap();
    let mut launch = vm.launch(vm.plan(), vec![Descriptor::Lock]);
    launch.program = "/nonexistent/qemu".into();
    let (launched, _) = started(&launch, &[lock.as_fd()]);
    let Launched::Failed { error, .. } = launched else {
        panic!("it cannot run");
    };
    assert!(error.contains("/nonexistent/qemu"), "{error}");
    assert!(!vm.run_dir().join("shim.sock").exists());
}

#[test]
fn a_vm_whose_lock_somebody_else_holds_is_not_launched() {
    let vm = Vm::new("");
    let _holder = lock::try_lock(&vm.path("vm.lock")).unwrap();
    let other = std::fs::File::open(vm.path("vm.lock")).unwrap();
    let launch = vm.launch(vm.plan(), vec![Descriptor::Lock]);
    let (launched, _) = started(&launch, &[other.as_fd()]);
    assert!(matches!(launched, Launched::Failed { error, .. } if error.contains("lock")));
}

#[test]
fn the_vmm_inherits_lock_and_keepalive_and_nothing_else() {
    let mut vm = Vm::new("");
    let lock = lock::try_lock(&vm.path("vm.lock")).unwrap();
    let (_keeper, keepalive): (OwnedFd, OwnedFd) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let network = std::fs::File::open("/proc/self/ns/net").unwrap();
    let mut descriptors: Vec<BorrowedFd<'_>> = vec![lock.as_fd(), keepalive.as_fd()];
    let mut kinds = vec![Descriptor::Lock, Descriptor::Keepalive];
    if rustix::process::geteuid().is_root() {
        descriptors.push(network.as_fd());
        kinds.push(Descriptor::NetworkNamespace);
    } else {
        eprintln!(
            "SKIPPED: the_vmm_inherits_lock_and_keepalive_and_nothing_else: the part with a network namespace needs root"
        );
    }
    // What a careless daemon leaves open for all its children.
    let (_careless, leak) = rustix::pipe::pipe().unwrap();
    rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty()).unwrap();
    let launch = vm.launch(vm.plan(), kinds);
    let (launched, child) = started(&launch, &descriptors);
    vm.shim = child;
    let Launched::Running {
        vmm_pid, shim_pid, ..
    } = launched
    else {
        panic!("{launched:?}");
    };
    let (_client, _) = vm.connect_ready();
    let open = |pid: i32| -> Vec<String> {
        std::fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
            .map(|target| target.display().to_string())
            .collect()
    };
    let count = |targets: &[String], wanted: &str| {
        targets
            .iter()
            .filter(|target| target.contains(wanted))
            .count()
    };
    let vmm = open(vmm_pid);
    assert_eq!(count(&vmm, "vm.lock"), 1, "{vmm:?}");
    // Standard output and error, and the keepalive.
    assert_eq!(count(&vmm, "pipe:"), 3, "{vmm:?}");
    assert_eq!(count(&vmm, "/dev/null"), 1, "{vmm:?}");
    assert_eq!(count(&vmm, ".img"), 2, "{vmm:?}");
    // Sockets are its own: two listeners, and the shim's connections with a clone for each thread.
    let others: Vec<_> = vmm
        .iter()
        .filter(|target| {
            !["vm.lock", "pipe:", "/dev/null", ".img", "socket:"]
                .iter()
                .any(|known| target.contains(known))
        })
        .collect();
    assert!(others.is_empty(), "{others:?}");
    let shim = open(shim_pid);
    assert_eq!(count(&shim, "net:["), 0, "{shim:?}");
    let parent = std::fs::read_to_string(format!("/proc/{vmm_pid}/stat")).unwrap();
    let parent = parent.rsplit_once(") ").unwrap().1;
    assert_eq!(parent.split(' ').nth(1), Some(&*shim_pid.to_string()));
}

/// A VM of the Firecracker driver.
fn start_firecracker(script: &str) -> Vm {
    let mut vm = Vm::new("");
    std::fs::write(vm.run_dir().join("fake-firecracker.script"), script).unwrap();
    let mut machine = vm.machine();
    machine.accelerator = Accelerator::Kvm;
    let plan = Firecracker::new(env!("CARGO_BIN_EXE_fake-firecracker")).plan(&machine);
    let plan = plan.unwrap();
    for (path, bytes) in &plan.files {
        std::fs::write(path, bytes).unwrap();
    }
    let lock = lock::try_lock(&vm.path("vm.lock")).unwrap();
    let launch = vm.launch(plan, vec![Descriptor::Lock]);
    let (launched, child) = started(&launch, &[lock.as_fd()]);
    vm.shim = child;
    assert!(matches!(launched, Launched::Running { .. }), "{launched:?}");
    vm
}

#[test]
fn firecrackers_metrics_and_log_are_kept_bounded_and_its_pipes_go_with_it() {
    let mut vm = start_firecracker(r#"{"flood_metrics_bytes": 2000000}"#);
    let (mut client, _) = vm.connect_ready();
    // The guest is ready, so the metrics are asked for; the answers come in the order of the questions.
    request(&mut client, Verb::Pause);
    request(&mut client, Verb::Resume);
    // The agent is deaf, so the second time it is the button.
    request(&mut client, Verb::Shutdown);
    request(&mut client, Verb::Shutdown);
    let exit = vm.wait_exit();
    assert_eq!(exit.code, Some(0), "{exit:?}");
    let read = |name: &str| std::fs::read_to_string(vm.path(name)).unwrap_or_default();
    let metrics = read("metrics.log.1") + &read("metrics.log");
    assert!(
        (30_000..=64 * 1024).contains(&metrics.len()),
        "{}",
        metrics.len()
    );
    assert!(metrics.ends_with("{\"flushed\":true}\n"));
    assert!(read("vmm.log").contains("its log"));
    let left: Vec<_> = std::fs::read_dir(vm.run_dir())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .filter(|name| name.to_string_lossy().contains("pipe"))
        .collect();
    assert_eq!(left, [""; 0]);
}

/// A multiboot kernel of a few instructions: prints `hello` on the serial port, then runs `then`.
fn tiny_kernel(then: &[u8]) -> Vec<u8> {
    const MAGIC: u32 = 0x1bad_b002;
    // The addresses follow, as this is no ELF file.
    const FLAGS: u32 = 1 << 16;
    const LOAD: u32 = 0x10_0000;
    const HEADER_BYTES: u32 = 32;
    let mut code = vec![0xba, 0xf8, 0x03, 0x00, 0x00]; // mov edx, 0x3f8
    for &byte in b"hello\n" {
        code.extend([0xb0, byte, 0xee]); // mov al, byte; out dx, al
    }
    // A second or so goes by, as QEMU would else be gone before it was ever talked to.
    code.extend([0xb9, 0x00, 0x00, 0x00, 0x10, 0xe2, 0xfe]); // mov ecx, 0x10000000; loop
    code.extend(then);
    let end = LOAD + HEADER_BYTES + code.len() as u32;
    let words = [
        MAGIC,
        FLAGS,
        0u32.wrapping_sub(MAGIC + FLAGS),
        LOAD,
        LOAD,
        end,
        end,
        LOAD + HEADER_BYTES,
    ];
    let mut kernel: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    kernel.extend(code);
    kernel
}

/// A VM under the real QEMU, with such a kernel.
fn start_qemu(test: &str, then: &[u8]) -> Option<Vm> {
    const QEMU: &str = "/usr/bin/qemu-system-x86_64";
    if !Path::new(QEMU).exists() {
        eprintln!("SKIPPED: {test}: there is no {QEMU}");
        return None;
    }
    let mut vm = Vm::new("");
    let mut machine = vm.machine();
    machine.kernel = vm.path("kernel");
    machine.initrd = vm.path("disk.img");
    std::fs::write(&machine.kernel, tiny_kernel(then)).unwrap();
    for drive in &machine.drives {
        std::fs::write(&drive.path, [0; 4096]).unwrap();
    }
    let lock = lock::try_lock(&vm.path("vm.lock")).unwrap();
    let plan = Qemu::new(QEMU).plan(&machine).unwrap();
    let launch = vm.launch(plan, vec![Descriptor::Lock]);
    let (launched, child) = started(&launch, &[lock.as_fd()]);
    vm.shim = child;
    assert!(matches!(launched, Launched::Running { .. }), "{launched:?}");
    Some(vm)
}

#[test]
fn the_real_qemu_takes_the_command_line_and_pauses_resumes_and_dies() {
    let Some(mut vm) = start_qemu(
        "the_real_qemu_takes_the_command_line_and_pauses_resumes_and_dies",
        &[0xf4, 0xeb, 0xfd], // hlt; jmp
    ) else {
        return;
    };
    vm.wait_console("hello");
    let (mut client, status) = vm.connect();
    assert!(!status.paused && !status.agent);
    request(&mut client, Verb::Pause);
    let status = wait_for_status(&mut client, status, |status| status.paused);
    request(&mut client, Verb::Resume);
    wait_for_status(&mut client, status, |status| !status.paused);
    request(&mut client, Verb::Terminate);
    let exit = vm.wait_exit();
    assert_eq!(exit.last_event, LastEvent::Ended);
}

#[test]
fn a_guest_of_the_real_qemu_powers_off_or_resets() {
    let name = "a_guest_of_the_real_qemu_powers_off_or_resets";
    for (then, event) in [
        // mov dx, 0x604; mov ax, 0x2000; out dx, ax: sleep state S5.
        (
            &[
                0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x20, 0x66, 0xef, 0xf4,
            ][..],
            LastEvent::GuestPoweroff,
        ),
        // mov al, 0xfe; out 0x64, al: the keyboard controller's reset line.
        (&[0xb0, 0xfe, 0xe6, 0x64, 0xf4], LastEvent::GuestReboot),
    ] {
        let Some(mut vm) = start_qemu(name, then) else {
            return;
        };
        let exit = vm.wait_exit();
        assert_eq!((exit.last_event, exit.code), (event, Some(0)), "{exit:?}");
        assert!(vm.console().contains("hello"));
    }
}

/// What stands for a daemon: this test program, run again for [`spawner`] alone.
const SPAWNER: &str = "BANGER_TEST_SPAWNER";

#[test]
fn spawner() {
    let Some(folder) = std::env::var_os(SPAWNER) else {
        return;
    };
    let folder = PathBuf::from(folder);
    let lock = lock::try_lock(&folder.join("vm.lock")).unwrap();
    let launch: Launch =
        serde_json::from_slice(&std::fs::read(folder.join("launch.json")).unwrap()).unwrap();
    let (launched, _child) = started(&launch, &[lock.as_fd()]);
    assert!(matches!(launched, Launched::Running { .. }), "{launched:?}");
    rustix::process::kill_process(rustix::process::getpid(), Signal::KILL).unwrap();
}

#[test]
fn a_vm_outlives_its_killed_spawner_and_its_console_has_no_gap() {
    let mut vm = Vm::new(r#"{"flood_console_bytes": 20000}"#);
    let launch = vm.launch(vm.plan(), vec![Descriptor::Lock]);
    std::fs::write(vm.path("launch.json"), serde_json::to_vec(&launch).unwrap()).unwrap();
    #[expect(clippy::disallowed_methods, reason = "a test that runs itself again")]
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "spawner", "--nocapture"])
        .env(SPAWNER, vm.folder.path())
        .status()
        .unwrap();
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&status),
        Some(9)
    );
    assert!(vm.is_locked());
    let (mut client, status) = vm.connect_ready();
    assert_eq!(status.vm, "0198aa");
    vm.wait_console("the flood is over");
    let console = vm.console();
    assert!(console.starts_with("Linux version"));
    assert_eq!(console.matches(&"x".repeat(98)).count(), 200);
    request(&mut client, Verb::Shutdown);
    wait_for_exit_event(&mut client);
    drop(lock::wait_free(&vm.path("vm.lock"), deadline()).unwrap());
    assert!(vm.path("exit.json").exists());
    vm.shim = None;
}

#[test]
fn a_killed_shim_leaves_a_locked_vm_that_can_only_be_killed() {
    let (mut vm, vmm_pid) = Vm::start("");
    let (_client, status) = vm.connect_ready();
    let lock = vm.path("vm.lock");
    assert_eq!(
        {
            let mut both = vec![status.shim_pid, vmm_pid];
            both.sort_unstable();
            both
        },
        lock::holders(&lock).unwrap()
    );
    process::kill_holder(status.shim_pid, &lock, Signal::KILL).unwrap();
    vm.shim.take().unwrap().wait().unwrap();
    assert!(vm.is_locked());
    assert_eq!(lock::holders(&lock).unwrap(), [vmm_pid]);
    // A stopped VMM is not a dead one.
    process::kill_holder(vmm_pid, &lock, Signal::STOP).unwrap();
    assert!(vm.is_locked());
    process::kill_holder(vmm_pid, &lock, Signal::KILL).unwrap();
    drop(lock::wait_free(&lock, deadline()).unwrap());
    assert!(process::kill_holder(vmm_pid, &lock, Signal::KILL).is_err());
}

#[test]
fn a_flooding_guest_fills_no_disk_and_keeps_nobody_waiting() {
    let (vm, _) = Vm::start(r#"{"flood_console_bytes": 20000000, "flood_agent_lines": 20000}"#);
    let (mut client, status) = vm.connect();
    request(&mut client, Verb::Ping);
    let mut warnings = 0;
    let mut ready = status.ready;
    let until = deadline();
    while !ready {
        match client.next(until).unwrap().unwrap() {
            FromShim::Status(status) => ready = status.ready,
            FromShim::Event(Event::GuestWarning { text }) => {
                assert_eq!(text, "\\u{1b}[31mwarning");
                warnings += 1;
            }
            _ => {}
        }
    }
    assert!(warnings <= 64, "{warnings}");
    vm.wait_console("the flood is over");
    let size = |name: &str| std::fs::metadata(vm.path(name)).unwrap().len();
    assert!(size("console.log") + size("console.log.1") <= 64 * 1024);
    assert!(size("vmm.log") <= 32 * 1024);
}

#[test]
fn a_client_that_does_not_read_is_dropped_and_others_are_served() {
    let (vm, _) = Vm::start("");
    let (mut good, _) = vm.connect_ready();
    let mut slow = banger_vmm::client::connect(&vm.run_dir().join("shim.sock")).unwrap();
    slow.set_write_timeout(Some(LIMIT)).unwrap();
    let line = b"{\"id\":1,\"verb\":\"ping\"}\n".repeat(1000);
    let dropped = (0..1000).any(|_| slow.write_all(&line).is_err());
    assert!(dropped);
    request(&mut good, Verb::Ping);
}

#[test]
fn a_client_that_talks_rubbish_is_dropped() {
    use std::io::Read;
    let (vm, _) = Vm::start("");
    let mut rude = banger_vmm::client::connect(&vm.run_dir().join("shim.sock")).unwrap();
    rude.set_read_timeout(Some(LIMIT)).unwrap();
    rude.write_all(b"GET / HTTP/1.1\n").unwrap();
    let mut all = String::new();
    // The end may come as a reset, as the shim leaves nothing of ours unread.
    let _ = rude.read_to_string(&mut all);
    let (mut good, _) = vm.connect();
    request(&mut good, Verb::Ping);
}
