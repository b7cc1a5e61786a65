//! What only the test host can show. `cargo xtask test` runs these inside it; elsewhere they are ignored.
//!
//! A test that runs Firecracker says so by a line `FIRECRACKER RUN: <what>: <figures>`, which is counted.

#![expect(clippy::unwrap_used, reason = "all of this is a test")]

#[path = "inside/conformance.rs"]
mod conformance;
#[path = "inside/faults.rs"]
mod faults;
#[path = "inside/helper.rs"]
mod helper;
mod inside;
#[path = "inside/lives.rs"]
mod lives;
#[path = "inside/storage.rs"]
mod storage;

use inside::{Seconds, World, boot};
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The kernel's last word before the guest's own.
const INIT_RUNS: &str = "Run /init as init process";

/// The only folder in the fixtures' `store`.
fn fixture(store: &str) -> PathBuf {
    let store = Path::new(&std::env::var("BANGER_TEST_FIXTURES").unwrap())
        .join("banger")
        .join(store);
    let mut folders = std::fs::read_dir(&store).unwrap();
    folders.next().unwrap().unwrap().path()
}

/// Runs the program, at most for a minute, until it prints `expected`, then ends it. Gives the time that took.
fn until_it_prints(expected: &str, program: &str, args: &[&str]) -> Duration {
    let start = Instant::now();
    #[expect(
        clippy::disallowed_methods,
        reason = "a VMM that is ended at its guest's first word"
    )]
    let mut child = Command::new("timeout")
        .args(["--kill-after=1", "60", program])
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    let mut found = None;
    for line in BufReader::new(child.stdout.take().unwrap()).split(b'\n') {
        let line = String::from_utf8_lossy(&line.unwrap()).into_owned();
        if line.contains(expected) {
            found = Some(start.elapsed());
            break;
        }
        said.push_str(&format!("{line}\n"));
    }
    // `timeout` hands the signal on.
    let pid = rustix::process::Pid::from_child(&child);
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    child.wait().unwrap();
    found.unwrap_or_else(|| panic!("`{program}` never printed `{expected}`, but\n{said}"))
}

#[test]
#[ignore = "runs inside the test host"]
fn an_ordinary_kernel_boots_under_qemu_with_kvm() {
    let kernel = fixture("kernels");
    let [vmlinux, initrd] =
        ["vmlinux", "initrd.img"].map(|file| kernel.join(file).display().to_string());
    let time = until_it_prints(
        INIT_RUNS,
        "qemu-system-x86_64",
        &[
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-machine",
            "q35",
            "-bios",
            "qboot.rom",
            "-accel",
            "kvm",
            "-cpu",
            "host",
            "-m",
            "256",
            "-serial",
            "stdio",
            "-kernel",
            &vmlinux,
            "-initrd",
            &initrd,
            "-append",
            "console=ttyS0 reboot=t panic=-1",
        ],
    );
    println!("QEMU with KVM: init after {:.1} s", time.as_secs_f64());
}

#[test]
#[ignore = "runs inside the test host"]
fn the_same_kernel_boots_under_firecracker() {
    if !has_firecracker("the_same_kernel_boots_under_firecracker") {
        return;
    }
    let (kernel, image) = (fixture("kernels"), fixture("images"));
    let config = format!(
        r#"{{"boot-source": {{"kernel_image_path": "{kernel}/vmlinux", "initrd_path": "{kernel}/initrd.img",
             "boot_args": "console=ttyS0 reboot=k panic=-1"}},
            "drives": [{{"drive_id": "root", "path_on_host": "{image}/root.img",
             "is_root_device": false, "is_read_only": true}}],
            "machine-config": {{"vcpu_count": 1, "mem_size_mib": 256}}}}"#,
        kernel = kernel.display(),
        image = image.display(),
    );
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    std::fs::write(&path, config).unwrap();
    let time = until_it_prints(
        INIT_RUNS,
        "firecracker",
        &["--no-api", "--config-file", path.to_str().unwrap()],
    );
    println!(
        "FIRECRACKER RUN: the default kernel with banger's initrd, by hand: init after {:.1} s",
        time.as_secs_f64()
    );
}

#[test]
#[ignore = "runs inside the test host"]
fn the_probe_says_that_kvm_runs_guests_and_firecracker_is_the_default() {
    let start = Instant::now();
    let output = inside::command("banger-netns")
        .arg("--probe-kvm")
        .output()
        .unwrap();
    let probed = Seconds(start.elapsed());
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        r#"{"verdict":"works"}"#
    );
    let world = World::unprobed();
    let daemon = world.timed(&["daemon", "start"]);
    let start = Instant::now();
    let drivers = world.json(&["driver", "list"]);
    let listed = Seconds(start.elapsed());
    let driver = |name: &str| {
        let drivers = drivers.as_array().unwrap();
        drivers
            .iter()
            .find(|driver| driver["driver"] == name)
            .unwrap()
    };
    let qemu = driver("qemu");
    assert_eq!(
        (&qemu["usable"], &qemu["reason"]),
        (&true.into(), &"with KVM".into())
    );
    println!("PROBE: instructions {probed}, daemon up {daemon}, a kernel's first word {listed}");
    // It comes to an end; how fast, the line above says, which depends on what else this machine does.
    assert!(listed.0 < Duration::from_secs(30), "{listed}");
    if has_firecracker("the_probe_says_that_kvm_runs_guests_and_firecracker_is_the_default") {
        let firecracker = driver("firecracker");
        assert_eq!(
            (&firecracker["usable"], &firecracker["default"]),
            (&true.into(), &true.into())
        );
    }
    world.leaves_nothing();
}

#[test]
#[ignore = "runs inside the test host"]
fn a_vm_lives_its_whole_life_under_qemu_with_kvm() {
    let world = World::new();
    let vm = create(&world, "calm", &["--driver", "qemu"]);
    assert_eq!(
        (&vm["attempt"]["driver"], &vm["attempt"]["accelerator"]),
        (&"qemu".into(), &"kvm".into())
    );
    is_sandboxed(&vm);
    println!("QEMU RUN: create: {}", boot(&vm));
    pauses_and_resumes(&world, "calm");
    let took = world.timed(&["vm", "stop", "calm"]);
    assert_eq!(world.stop_reason("calm"), "asked");
    println!("QEMU RUN: stop: {took}");
    for (command, reason) in [("poweroff", "guest-poweroff"), ("reboot", "guest-reboot")] {
        let stages = world.start("calm");
        let (why, took) = world.ends_itself("calm", command);
        assert_eq!(why, reason);
        println!("QEMU RUN: start, then {command} from inside: {stages}; stopped {took} after");
    }
    world.banger(&["vm", "start", "calm"]);
    let took = world.timed(&["vm", "kill", "calm"]);
    assert_eq!(world.stop_reason("calm"), "killed");
    println!("QEMU RUN: kill: {took}");
    world.banger(&["vm", "delete", "calm", "--purge"]);
    world.leaves_nothing();
}

#[test]
#[ignore = "runs inside the test host"]
fn a_vm_lives_its_whole_life_under_firecracker() {
    if !has_firecracker("a_vm_lives_its_whole_life_under_firecracker") {
        return;
    }
    let world = World::new();
    let vm = create(&world, "otter", &[]);
    assert_eq!(vm["attempt"]["driver"], "firecracker", "{vm:#}");
    println!("FIRECRACKER RUN: create: {}", boot(&vm));
    is_sandboxed(&vm);
    assert_eq!(world.ssh("otter", "hostname").trim(), "otter");
    println!(
        "FIRECRACKER RUN: the shim while it runs: PSS {} KiB",
        pss_kib(&vm["attempt"]["shim_pid"])
    );
    pauses_and_resumes(&world, "otter");
    // Asked for when the guest was ready, and answered before the pause was.
    let metrics = std::fs::read_to_string(world.vm_file(&vm, "metrics.log")).unwrap();
    let first: Value = serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
    assert!(first["utc_timestamp_ms"].is_u64(), "{metrics}");
    println!("FIRECRACKER RUN: metrics: {} bytes", metrics.len());
    world.ssh("otter", "echo kept > /root/mark && sync");

    let taken_over = kill_daemon_and_look(&world, "otter", &vm["attempt"]["vmm_pid"]);
    println!("FIRECRACKER RUN: daemon killed: taken over after {taken_over}, same VMM");
    let took = world.timed(&["vm", "stop", "otter"]);
    assert_eq!(world.stop_reason("otter"), "asked");
    println!("FIRECRACKER RUN: stop by the agent: {took}");
    for (command, reason) in [("poweroff", "guest-poweroff"), ("reboot", "guest-reboot")] {
        let stages = world.start("otter");
        let (why, took) = world.ends_itself("otter", command);
        assert_eq!(why, reason);
        println!(
            "FIRECRACKER RUN: start, then {command} from inside: {stages}; stopped {took} after"
        );
    }
    world.banger(&["vm", "start", "otter"]);
    let took = world.timed(&["vm", "kill", "otter"]);
    assert_eq!(world.stop_reason("otter"), "killed");
    println!("FIRECRACKER RUN: kill: {took}");

    // Without its VMM, the driver that is left runs the same files.
    world.banger(&["daemon", "stop"]);
    world.configure("[driver]\nfirecracker = \"/nonexistent/firecracker\"\n");
    let stages = world.start("otter");
    assert_eq!(world.vm("otter")["attempt"]["driver"], "qemu");
    assert_eq!(world.ssh("otter", "cat /root/mark").trim(), "kept");
    println!("QEMU RUN: what ran under Firecracker before: {stages}");
    world.banger(&["vm", "stop", "otter"]);
    world.banger(&["vm", "delete", "otter", "--purge"]);
    world.leaves_nothing();
}

/// A small VM of the tiny image that is ready.
fn create(world: &World, name: &str, options: &[&str]) -> Value {
    let args = [
        "vm", "create", "--name", name, "--image", "tiny", "--memory", "256", "--vcpu", "1",
        "--wait",
    ];
    world.banger(&[&args[..], options].concat());
    let vm = world.vm(name);
    assert_eq!(vm["phase"]["ready"], true, "{vm:#}");
    vm
}

/// This kernel refuses no part of the sandbox.
fn is_sandboxed(vm: &Value) {
    let attempt = &vm["attempt"];
    assert_eq!(attempt["sandbox_missing"], serde_json::json!([]));
    assert_eq!(attempt["sandbox"].as_array().map(Vec::len), Some(7));
}

fn pauses_and_resumes(world: &World, name: &str) {
    let pause = world.timed(&["vm", "pause", name]);
    let vm = world.vm(name);
    assert_eq!(vm["phase"]["state"], "paused", "{vm:#}");
    let resume = world.timed(&["vm", "resume", name]);
    let start = Instant::now();
    world.ssh(name, "true");
    let ssh = Seconds(start.elapsed());
    let driver = vm["attempt"]["driver"].as_str().unwrap().to_uppercase();
    println!("{driver} RUN: pause, resume: {pause}, {resume}; ssh afterwards: {ssh}");
}

/// SIGKILLs the daemon and has another one started, which finds the VM as it was. Gives the time that took.
fn kill_daemon_and_look(world: &World, name: &str, vmm: &Value) -> Seconds {
    let daemon = world.json(&["daemon", "status"])["pid"].clone();
    let pid = rustix::process::Pid::from_raw(i32::try_from(daemon.as_i64().unwrap()).unwrap());
    rustix::process::kill_process(pid.unwrap(), rustix::process::Signal::KILL).unwrap();
    let start = Instant::now();
    let vms = world.json(&["vm", "list"]);
    let took = Seconds(start.elapsed());
    assert_eq!(vms[0]["phase"]["state"], "running", "{vms:#}");
    assert_eq!(vms[0]["phase"]["reachable"], true, "{vms:#}");
    assert_ne!(world.json(&["daemon", "status"])["pid"], daemon);
    assert_eq!(&world.vm(name)["attempt"]["vmm_pid"], vmm);
    world.ssh(name, "true");
    took
}

fn pss_kib(pid: &Value) -> u64 {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let pss = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
    pss.unwrap().trim().trim_end_matches(" kB").parse().unwrap()
}

/// Whether a Firecracker came along; says that the test is skipped if not.
fn has_firecracker(test: &str) -> bool {
    let found = Path::new("/usr/local/bin/firecracker").exists();
    if !found {
        eprintln!("SKIPPED: {test}: no firecracker came along");
    }
    found
}
