//! Storage drivers that need device-mapper, a udev or filesystems of their own.

use super::has_firecracker;
use super::inside::{World, assert_inside, command};
use banger_core::id::{InstanceId, VmId};
use banger_host::op::{HostAnswer, HostOp, SnapshotState};
use banger_host::storage::ops::{CHUNK_SECTORS, list, perform};
use serde_json::Value;
use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use uuid::Uuid;

const MIB: u64 = 1 << 20;
const UID: u32 = 0;
pub(crate) const LIMIT: Duration = Duration::from_secs(180);

/// One VM's files, without a VM.
struct Vm {
    folder: tempfile::TempDir,
    instance: InstanceId,
    vm: VmId,
}

impl Vm {
    fn new() -> Self {
        let id = Uuid::now_v7;
        let vm = Self {
            folder: tempfile::tempdir_in("/var/tmp").unwrap(),
            instance: InstanceId::from_uuid(id()),
            vm: VmId::from_uuid(id()),
        };
        std::fs::write(vm.image(), vec![0x11; 4 * MIB as usize]).unwrap();
        File::create(vm.cow()).unwrap().set_len(MIB).unwrap();
        vm
    }

    /// Another VM of the same instance and image.
    fn sibling(&self) -> Self {
        let mut other = Self::new();
        other.instance = self.instance;
        std::fs::remove_file(other.image()).unwrap();
        std::fs::hard_link(self.image(), other.image()).unwrap();
        other
    }

    fn image(&self) -> PathBuf {
        self.folder.path().join("root.img")
    }

    fn cow(&self) -> PathBuf {
        self.folder.path().join("overlay.img")
    }

    fn attach(&self) -> Result<PathBuf, String> {
        let (instance, vm) = (self.instance, self.vm);
        let op = HostOp::AttachSnapshot {
            instance,
            vm,
            sectors: 8 * MIB / 512,
        };
        let image = File::open(self.image()).unwrap();
        let cow = OpenOptions::new().read(true).write(true).open(self.cow());
        let cow = cow.unwrap();
        match perform(UID, &op, &[image.as_fd(), cow.as_fd()]) {
            Ok(HostAnswer::Device { path }) => Ok(path.into()),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(banger_host::error_chain(&error)),
        }
    }

    fn detach(&self) {
        let (instance, vm) = (self.instance, self.vm);
        let op = HostOp::DetachSnapshot { instance, vm };
        assert_eq!(perform(UID, &op, &[]).unwrap(), HostAnswer::Done);
    }

    fn ask(&self, grow: bool) -> SnapshotState {
        let (instance, vm) = (self.instance, self.vm);
        let op = if grow {
            HostOp::GrowSnapshot { instance, vm }
        } else {
            HostOp::SnapshotStatus { instance, vm }
        };
        match perform(UID, &op, &[]).unwrap() {
            HostAnswer::Snapshot(state) => state,
            other => panic!("{other:?}"),
        }
    }

    fn used(&self) -> (u64, u64) {
        match self.ask(false) {
            SnapshotState::Valid {
                used_sectors,
                total_sectors,
            } => (used_sectors, total_sectors),
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let op = HostOp::DetachSnapshot {
                instance: self.instance,
                vm: self.vm,
            };
            let _ = perform(UID, &op, &[]);
        }
    }
}

/// Waits for what comes by itself.
pub(crate) fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The node of the snapshot of the VM with this id.
pub(crate) fn device_of(id: &str) -> Option<PathBuf> {
    let entries = std::fs::read_dir("/sys/block").unwrap();
    entries
        .map(|entry| entry.unwrap())
        .find(|entry| {
            let uuid = std::fs::read_to_string(entry.path().join("dm/uuid"));
            uuid.is_ok_and(|uuid| uuid.trim_end().ends_with(id))
        })
        .map(|entry| Path::new("/dev").join(entry.file_name()))
}

pub(crate) fn write_at(device: &Path, at: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(device).unwrap();
    file.write_all_at(bytes, at).unwrap();
    file.sync_all().unwrap();
}

/// What stands there, as much as a word.
pub(crate) fn read_at(device: &Path, at: u64) -> Vec<u8> {
    let mut bytes = vec![0; 20];
    let file = std::fs::File::open(device).unwrap();
    file.read_exact_at(&mut bytes, at).unwrap();
    bytes
}

/// The kernel has not dropped the snapshot of this VM.
pub(crate) fn is_valid(vm: &Value) -> bool {
    let output = command("dmsetup").arg("status").output().unwrap();
    let status = String::from_utf8_lossy(&output.stdout).into_owned();
    let id = vm["id"].as_str().unwrap();
    let line = status.lines().find(|line| line.contains(&format!("{id}:")));
    let line = line.unwrap_or_else(|| panic!("{status}"));
    line.contains('/') && !line.contains("Invalid")
}

fn write(device: &Path, at: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(device).unwrap();
    file.write_all_at(bytes, at).unwrap();
    file.sync_all().unwrap();
}

fn read(device: &Path, at: u64) -> u8 {
    let mut byte = [0];
    File::open(device)
        .unwrap()
        .read_exact_at(&mut byte, at)
        .unwrap();
    byte[0]
}

/// Shows `look` the device that the files of a VM make.
pub(crate) fn attach_by_hand(image: &Path, cow: &Path, new_bytes: u64, look: impl FnOnce(&Path)) {
    let id = Uuid::now_v7;
    let (instance, vm) = (InstanceId::from_uuid(id()), VmId::from_uuid(id()));
    let sectors = (image.metadata().unwrap().len() + new_bytes) / 512;
    let op = HostOp::AttachSnapshot {
        instance,
        vm,
        sectors,
    };
    let image = File::open(image).unwrap();
    let cow = OpenOptions::new().read(true).write(true).open(cow).unwrap();
    let answer = perform(UID, &op, &[image.as_fd(), cow.as_fd()]).unwrap();
    let HostAnswer::Device { path } = answer else {
        panic!("{answer:?}");
    };
    look(path.as_ref());
    perform(UID, &HostOp::DetachSnapshot { instance, vm }, &[]).unwrap();
}

/// Devices of device-mapper and attached loop devices.
pub(crate) fn devices() -> Vec<String> {
    let devices = std::fs::read_dir("/sys/block").unwrap();
    let mut devices: Vec<String> = devices
        .map(|device| device.unwrap())
        .filter(|device| {
            device.path().join("dm").exists() || device.path().join("loop/backing_file").exists()
        })
        .map(|device| device.file_name().to_string_lossy().into_owned())
        .collect();
    devices.sort();
    devices
}

#[test]
#[ignore = "runs inside the test host"]
fn a_snapshot_keeps_what_was_written_and_leaves_the_image_alone() {
    let before = devices();
    let vm = Vm::new();
    let device = vm.attach().unwrap();
    assert_eq!((read(&device, 0), read(&device, 4 * MIB)), (0x11, 0));
    write(&device, 0, &[0x22; 4096]);
    write(&device, 6 * MIB, &[0x33; 4096]);
    assert_eq!(std::fs::read(vm.image()).unwrap()[0], 0x11);
    vm.detach();
    vm.detach();
    assert_eq!(vm.ask(false), SnapshotState::Absent);
    assert_eq!(devices(), before);
    assert_eq!(list(UID), []);

    let device = vm.attach().unwrap();
    assert_eq!((read(&device, 0), read(&device, 6 * MIB)), (0x22, 0x33));
    // As after a daemon that died in the middle: the next start makes it anew.
    let device = vm
        .attach()
        .unwrap_or_else(|error| panic!("{error}; was {device:?}"));
    assert_eq!((read(&device, 0), read(&device, 6 * MIB)), (0x22, 0x33));
    vm.detach();
    assert_eq!(devices(), before);
}

#[test]
#[ignore = "runs inside the test host"]
fn the_vms_of_an_image_share_one_loop_device_and_it_ends_with_the_last_of_them() {
    let before = devices();
    let one = Vm::new();
    let other = one.sibling();
    let device = one.attach().unwrap();
    let alone = devices().len() - before.len();
    assert_eq!(
        alone,
        4,
        "two loops, an origin and a snapshot: {:?}",
        devices()
    );
    other.attach().unwrap();
    assert_eq!(devices().len() - before.len(), 7);
    assert_eq!(list(UID).len(), 4);
    other.detach();
    assert_eq!(devices().len() - before.len(), 4);
    write(&device, 0, b"still there");
    one.detach();
    assert_eq!(devices(), before);
}

/// Whether `host ls` explains the snapshot of this VM, and what it says of the loop devices below; nothing if there is
/// none.
fn explained(world: &World, vm: &Vm) -> Option<(bool, usize)> {
    let objects = world.json(&["host", "ls"]);
    let objects = objects.as_array().unwrap();
    let file = vm.cow().display().to_string();
    let loops = objects.iter().filter(|object| {
        object["kind"] == "loop" && object["name"].as_str().unwrap().contains(&file)
    });
    let loops = loops.count();
    let name = format!("BANGER-{UID}-{}-{}", vm.instance, vm.vm);
    let snapshot = objects.iter().find(|object| object["name"] == name)?;
    Some((snapshot["expected"] == true, loops))
}

#[test]
#[ignore = "runs inside the test host"]
fn a_snapshot_of_nobody_goes_by_either_verb_and_one_that_is_open_is_told() {
    let world = World::new();
    let before = devices();
    world.json(&["host", "ls"]);
    let text = std::fs::read(world.path("state/banger/instance.json")).unwrap();
    let facts: Value = serde_json::from_slice(&text).unwrap();
    let own: InstanceId = facts["id"].as_str().unwrap().parse().unwrap();
    // Of a VM that no record knows.
    let mut unknown = Vm::new();
    unknown.instance = own;
    for verb in [&["doctor", "--repair"][..], &["host", "clean"]] {
        let device = unknown.attach().unwrap();
        assert_eq!(explained(&world, &unknown), Some((false, 1)));
        if verb[0] == "doctor" {
            let open = File::open(&device).unwrap();
            let (status, said) = world.tries(&[], verb);
            assert!(
                status == 7 && said.contains("left: snapshot BANGER-0-") && said.contains("hint: "),
                "{said}"
            );
            drop(open);
        }
        let done = world.banger(verb);
        assert!(done.contains("removed snapshot BANGER-0-"), "{done}");
        assert!(done.contains("removed loop loop"), "{done}");
        assert_eq!(devices(), before);
    }
    // Another instance's is its own daemon's, until its folder was removed.
    let other = Vm::new();
    other.attach().unwrap();
    assert_eq!(explained(&world, &other), Some((true, 1)));
    world.banger(&["host", "clean"]);
    assert_eq!(explained(&world, &other), Some((true, 1)));
    std::fs::remove_file(other.cow()).unwrap();
    assert_eq!(
        explained(&world, &other).map(|(expected, _)| expected),
        Some(false)
    );
    world.banger(&["host", "clean"]);
    assert_eq!(devices(), before);
    world.leaves_nothing();
}

#[test]
#[ignore = "runs inside the test host"]
fn a_snapshot_that_is_grown_in_time_is_never_lost() {
    let before = devices();
    let vm = Vm::new();
    let device = vm.attach().unwrap();
    let (first, total) = vm.used();
    assert_eq!(total, MIB / 512);
    // Twice what the file holds at first.
    for chunk in 0..512_u64 {
        let (used, total) = vm.used();
        if used * 10 >= total * 8 {
            let cow = OpenOptions::new().write(true).open(vm.cow()).unwrap();
            cow.set_len((total * 512) + MIB).unwrap();
            let grown = vm.ask(true);
            let SnapshotState::Valid { total_sectors, .. } = grown else {
                panic!("{grown:?}");
            };
            assert_eq!(total_sectors, total + MIB / 512);
        }
        write(&device, chunk * CHUNK_SECTORS * 512, &[0x44; 4096]);
    }
    let (used, total) = vm.used();
    assert!(
        used > first + 2 * MIB / 512 - 64 && used < total,
        "{used} of {total}"
    );
    vm.detach();
    let device = vm.attach().unwrap();
    assert_eq!(read(&device, 511 * 4096), 0x44);
    vm.detach();
    assert_eq!(devices(), before);
}

#[test]
#[ignore = "runs inside the test host"]
fn a_snapshot_that_nobody_grew_is_told_to_be_lost() {
    let vm = Vm::new();
    let device = vm.attach().unwrap();
    let file = OpenOptions::new().write(true).open(&device).unwrap();
    let written = file
        .write_all_at(&[0x55; 3 * MIB as usize], 0)
        .and_then(|()| file.sync_all());
    assert!(written.is_err());
    drop(file);
    let state = vm.ask(false);
    assert!(matches!(state, SnapshotState::Lost { .. }), "{state:?}");
    vm.detach();
    assert_eq!(std::fs::read(vm.image()).unwrap()[0], 0x11);
}

#[test]
#[ignore = "runs inside the test host"]
fn a_device_of_somebody_else_with_our_name_is_refused_and_not_touched() {
    let vm = Vm::new();
    let name = format!("BANGER-{UID}-{}-{}", vm.instance, vm.vm);
    let dmsetup = |args: &[&str]| {
        let output = command("dmsetup")
            .args(args)
            .env("DM_DISABLE_UDEV", "1")
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let before = devices();
    dmsetup(&["create", &name, "--table", "0 2048 zero"]);
    let table = dmsetup(&["table", &name]);
    let error = vm.attach().unwrap_err();
    assert!(
        error.contains("not ours") && error.contains(&name),
        "{error}"
    );
    vm.detach();
    assert_eq!(dmsetup(&["table", &name]), table);
    dmsetup(&["remove", &name]);
    assert_eq!(devices(), before);
}

#[test]
#[ignore = "runs inside the test host"]
fn a_guest_of_firecracker_that_fills_the_host_waits_and_loses_nothing() {
    if has_firecracker("a_guest_of_firecracker_that_fills_the_host_waits_and_loses_nothing") {
        fills_the_host("firecracker");
    }
}

#[test]
#[ignore = "runs inside the test host"]
fn a_guest_of_qemu_that_fills_the_host_waits_and_loses_nothing() {
    fills_the_host("qemu");
}

/// On a filesystem that is really full.
fn fills_the_host(driver: &str) {
    let world = World::new();
    let state = world.path("state");
    std::fs::create_dir_all(&state).unwrap();
    let mount = |options: &str| {
        let mut mount = command("mount");
        mount
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(&state);
        assert!(mount.status().unwrap().success());
    };
    mount("size=200M");
    let options = [
        "vm",
        "create",
        "--name",
        "filler",
        "--image",
        "tiny",
        "--memory",
        "256",
        "--vcpu",
        "1",
        "--wait",
        "--driver",
        driver,
        "--storage",
        "overlay",
        "--overlay-size",
        "1G",
    ];
    world.banger(&options);
    let write = "dd if=/dev/urandom of=/root/block bs=1M count=1 2>&1; \
                 (for n in $(seq 300); do cat /root/block; done > /root/big; sync; \
                 echo $? > /root/done) > /dev/null 2>&1 < /dev/null &";
    world.ssh("filler", write);
    let until = |by: &str| {
        eventually(&format!("by `{by}`"), || {
            let vm = world.vm("filler");
            (vm["phase"]["by"].as_str().unwrap_or_default() == by).then_some(())
        });
    };
    until("full-disk");
    let facts = rustix::fs::statvfs(&state).unwrap();
    let left = facts.f_bavail * facts.f_frsize;
    println!(
        "{} RUN: paused with {} KiB of 200 MiB left",
        driver.to_uppercase(),
        left >> 10
    );
    assert!(left > 0);
    mount("remount,size=800M");
    until("");
    eventually("all is written", || {
        let said = world.ssh("filler", "test -e /root/done && echo there || true");
        (said == "there\n").then_some(())
    });
    let checked = "cat /root/done; \
                   tail -c 1048576 /root/big | cmp - /root/block; dmesg | grep -ci 'i/o error'; true";
    let said = world.ssh("filler", checked);
    assert_eq!(
        said.split_whitespace().collect::<Vec<_>>(),
        ["0", "0"],
        "{said}"
    );
    world.banger(&["vm", "delete", "filler", "--force", "--purge"]);
    world.banger(&["daemon", "stop"]);
    assert!(command("umount").arg(&state).status().unwrap().success());
}

/// udev, for as long as this lives, with banger's rules.
struct Udev;

impl Udev {
    fn start() -> Self {
        assert_inside();
        let rules = Path::new("/run/udev/rules.d");
        std::fs::create_dir_all(rules).unwrap();
        std::fs::write(rules.join("60-banger.rules"), RULES).unwrap();
        // Goes into the background once it can be reached.
        let udev = command("/usr/lib/systemd/systemd-udevd")
            .arg("--daemon")
            .status();
        assert!(udev.unwrap().success());
        Self
    }
}

impl Drop for Udev {
    fn drop(&mut self) {
        let _ = command("udevadm").args(["control", "--exit"]).status();
        let _ = std::fs::remove_dir_all("/run/udev");
    }
}

const RULES: &str = include_str!("../../../banger-host/src/storage/60-banger.rules");

fn udevadm(args: &[&str]) {
    let status = command("udevadm").args(args).status();
    assert!(status.unwrap().success());
}

/// What is below `/dev/disk`.
fn disk_names() -> Vec<String> {
    let output = command("find").arg("/dev/disk").output().unwrap();
    let names = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut names: Vec<String> = names.lines().map(str::to_owned).collect();
    names.sort();
    names
}

#[test]
#[ignore = "runs inside the test host"]
fn an_image_with_the_hosts_own_uuid_takes_no_name_of_the_host() {
    let _udev = Udev::start();
    udevadm(&["trigger", "--settle", "--subsystem-match=block"]);
    let vm = Vm::new();
    // A disk of the host: a loop device, too, but none of ours.
    let uuid = Uuid::now_v7().to_string();
    let hosts = vm.folder.path().join("disk");
    make_ext4(&hosts, &uuid);
    let attached = command("losetup")
        .args(["--find", "--show"])
        .arg(&hosts)
        .output();
    let hosts = String::from_utf8(attached.unwrap().stdout).unwrap();
    udevadm(&["settle"]);
    let images = vm.folder.path().join("banger/images/one");
    let vms = vm.folder.path().join("banger/vms/one");
    for folder in [&images, &vms] {
        std::fs::create_dir_all(folder).unwrap();
    }
    let (image, cow) = (images.join("root.img"), vms.join("overlay.img"));
    std::fs::rename(vm.image(), &image).unwrap();
    std::fs::rename(vm.cow(), &cow).unwrap();
    make_ext4(&image, &uuid);
    let before = disk_names();
    assert!(
        before.iter().any(|name| name.contains(uuid.as_str())),
        "udev names a disk that it is not told to leave alone: {before:?}"
    );
    let links = || std::fs::read_link(format!("/dev/disk/by-uuid/{}", uuid.as_str()));
    let own = links().unwrap();
    let op = HostOp::AttachSnapshot {
        instance: vm.instance,
        vm: vm.vm,
        sectors: 8 * MIB / 512,
    };
    let image = File::open(&image).unwrap();
    let cow = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&cow)
        .unwrap();
    for _ in 0..2 {
        perform(UID, &op, &[image.as_fd(), cow.as_fd()]).unwrap();
        udevadm(&["settle"]);
        assert_eq!(disk_names(), before);
        assert_eq!(links().unwrap(), own);
        udevadm(&["trigger", "--settle", "--subsystem-match=block"]);
        assert_eq!(disk_names(), before);
        assert_eq!(links().unwrap(), own);
    }
    vm.detach();
    udevadm(&["settle"]);
    assert_eq!(disk_names(), before);
    let detached = command("losetup").args(["--detach", hosts.trim()]).status();
    assert!(detached.unwrap().success());
}

fn make_ext4(file: &Path, uuid: &str) {
    File::create(file).unwrap().set_len(4 * MIB).unwrap();
    let made = command("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-U", uuid])
        .arg(file)
        .status();
    assert!(made.unwrap().success());
}
