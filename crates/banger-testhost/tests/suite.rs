//! What only the test host can show. `cargo xtask test` runs these inside it; elsewhere they are ignored.
//!
//! A test that runs Firecracker says so by a line `FIRECRACKER RUN: <what>: <figures>`, which is counted.

#![expect(clippy::unwrap_used, reason = "all of this is a test")]

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
    if !Path::new("/usr/local/bin/firecracker").exists() {
        eprintln!("SKIPPED: the_same_kernel_boots_under_firecracker: no firecracker came along");
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
