//! One life over every storage driver, under both VMMs: what was written and synced outlives crashes, growth, resets,
//! another image, another storage and another VMM, and in the end nothing is left.

use super::inside::{World, boot, command, fixtures};
use super::storage::{attach_by_hand, devices};
use super::{has_firecracker, kill_daemon_and_look};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::Instant;

const NAME: &str = "otter";
const HOST_KEY: &str = "/etc/dropbear/dropbear_ed25519_host_key";
const MIB: u64 = 1 << 20;
/// Where a driver that shares blocks works.
const SHARING_BYTES: u64 = 3 << 30;

/// What lives where, and what it becomes.
struct Life {
    test: &'static str,
    storage: &'static str,
    other: &'static str,
    /// Makes a filesystem of its own, and looks whether that is whole.
    filesystem: Option<(&'static [&'static str], &'static [&'static str])>,
}

#[test]
#[ignore = "runs inside the test host"]
fn reflink_on_xfs_conforms_under_both_vmms() {
    lives(&Life {
        test: "reflink_on_xfs_conforms_under_both_vmms",
        storage: "reflink",
        other: "copy",
        filesystem: Some((&["mkfs.xfs", "-q"], &["xfs_repair", "-n"])),
    });
}

#[test]
#[ignore = "runs inside the test host"]
fn reflink_on_btrfs_conforms_under_both_vmms() {
    lives(&Life {
        test: "reflink_on_btrfs_conforms_under_both_vmms",
        storage: "reflink",
        // Its file is the one that btrfs would otherwise give new blocks with every write.
        other: "snapshot",
        filesystem: Some((&["mkfs.btrfs", "-q"], &["btrfs", "check", "--readonly"])),
    });
}

#[test]
#[ignore = "runs inside the test host"]
fn overlay_conforms_under_both_vmms() {
    lives(&Life {
        test: "overlay_conforms_under_both_vmms",
        storage: "overlay",
        other: "snapshot",
        filesystem: None,
    });
}

#[test]
#[ignore = "runs inside the test host"]
fn copy_conforms_under_both_vmms() {
    lives(&Life {
        test: "copy_conforms_under_both_vmms",
        storage: "copy",
        other: "overlay",
        filesystem: None,
    });
}

#[test]
#[ignore = "runs inside the test host"]
fn snapshot_conforms_under_both_vmms() {
    lives(&Life {
        test: "snapshot_conforms_under_both_vmms",
        storage: "snapshot",
        other: "overlay",
        filesystem: None,
    });
}

/// The whole of it. The first VMM is QEMU, the second one Firecracker where there is one.
fn lives(life: &Life) {
    let began = Instant::now();
    let second = if has_firecracker(life.test) {
        "firecracker"
    } else {
        "qemu"
    };
    let before = devices();
    let place = life.filesystem.map(Place::make);
    let world = match &place {
        Some(place) => World::on(&place.mounted),
        None => World::new(),
    };
    let guest = Guest {
        world: &world,
        life,
    };
    let mine = guest.is_made_and_crashes();
    guest.outlives_the_crash(&mine);
    let size = guest.starts_anew_with_its_disk_grown(&mine, second);
    guest.runs_under_the_other_vmm(&mine, second, size);
    guest.gets_another_storage(&mine, second);
    world.banger(&["vm", "delete", NAME]);
    assert_eq!(world.banger(&["vm", "list", "--json"]).trim(), "[]");
    world.banger(&["trash", "empty"]);
    assert_eq!(names(&world.path("state/banger/vms")), Vec::<String>::new());
    images_are_unharmed(&world);
    world.leaves_nothing();
    if let Some(place) = place {
        place.proves_whole();
    }
    assert_eq!(devices(), before);
    println!(
        "CONFORMANCE RUN: {} under qemu and {second}: {:.0} s",
        life.test,
        began.elapsed().as_secs_f64()
    );
}

/// What must never change.
struct Mine {
    id: String,
    address: String,
    host_key: String,
    /// Sums of what was written to `/data`.
    data: String,
}

/// A guest's words.
struct Said {
    host_key: String,
    more: Vec<String>,
    vm: Value,
}

struct Guest<'a> {
    world: &'a World,
    life: &'a Life,
}

impl Guest<'_> {
    fn ssh(&self, line: &str) -> String {
        self.world.ssh(NAME, line)
    }

    fn vm(&self) -> Value {
        self.world.vm(NAME)
    }

    /// It runs under this VMM, with what must never change, and its filesystems are sound. Answers what the guest says
    /// to `more`, all asked at once: an emulated machine takes its time over each command.
    fn runs_under(&self, vmm: &str, what: &str, mine: Option<&Mine>, more: &str) -> Said {
        let vm = self.vm();
        assert_eq!(vm["phase"]["ready"], true, "{vm:#}");
        assert_eq!(vm["attempt"]["driver"], vmm, "{vm:#}");
        assert_eq!(vm["attempt"]["accelerator"], "kvm", "{vm:#}");
        let storage = vm["spec"]["storage"].as_str().unwrap();
        println!(
            "{} RUN: {storage}, {what}: {}",
            vmm.to_uppercase(),
            boot(&vm)
        );
        let said = self.ssh(&format!(
            "cat /proc/mounts; dmesg | grep -i 'ext4-fs error'; echo ---; hostname; \
             md5sum < {HOST_KEY}; echo ---; {more}"
        ));
        let [mounts, itself, more] = said.splitn(3, "---\n").collect::<Vec<_>>()[..] else {
            panic!("{said}");
        };
        let root = match storage {
            "overlay" => " / overlay rw",
            _ => "/dev/vda / ext4 rw",
        };
        assert!(mounts.contains(root), "{mounts}");
        assert!(mounts.contains(" /data ext4 rw"), "{mounts}");
        assert!(!mounts.to_lowercase().contains("ext4-fs error"), "{mounts}");
        let (name, host_key) = itself.split_once('\n').unwrap();
        assert_eq!(name, NAME);
        if let Some(mine) = mine {
            let now = [vm["id"].as_str(), vm["address"].as_str(), Some(host_key)];
            assert_eq!(
                now,
                [&mine.id, &mine.address, &mine.host_key].map(|old| Some(old.as_str()))
            );
        }
        Said {
            host_key: host_key.to_owned(),
            more: more.lines().map(str::to_owned).collect(),
            vm,
        }
    }

    fn is_made_and_crashes(&self) -> Mine {
        self.world.banger(&[
            "vm",
            "create",
            "--name",
            NAME,
            "--image",
            "tiny",
            "--memory",
            "256",
            "--vcpu",
            "1",
            "--driver",
            "qemu",
            "--storage",
            self.life.storage,
            "--disk-size",
            "64M",
            "--overlay-size",
            "256M",
            "--wait",
        ]);
        let said = self.runs_under(
            "qemu",
            "create",
            None,
            "dd if=/dev/urandom of=/data/block bs=1M count=2 2>/dev/null; cp /data/block /root/block; sync; \
             md5sum < /data/block",
        );
        let vm = &said.vm;
        assert_eq!(vm["spec"]["storage"], self.life.storage);
        self.discards_what_it_removes(vm);
        let mine = Mine {
            id: vm["id"].as_str().unwrap().to_owned(),
            address: vm["address"].as_str().unwrap().to_owned(),
            host_key: said.host_key,
            data: said.more[0].clone(),
        };
        self.is_killed_while_it_writes(vm);
        mine
    }

    /// What the guest frees, the host has again, where the VMM passes it on and the storage takes it.
    fn discards_what_it_removes(&self, vm: &Value) {
        let mut places = vec![("/data", "disk.img")];
        // A guest cannot trim what overlayfs joins, and device-mapper's snapshots take no discards.
        if matches!(self.life.storage, "reflink" | "copy") {
            places.push(("/root", "overlay.img"));
        }
        for (folder, file) in places {
            let file = self.world.vm_file(vm, file);
            let taken = || banger_host::storage::allocated(&file).unwrap();
            let write = format!("dd if=/dev/urandom of={folder}/junk bs=1M count=16 2>&1; sync");
            self.ssh(&write);
            sync(&file);
            let full = taken();
            self.ssh(&format!("rm {folder}/junk; sync; fstrim {folder}"));
            sync(&file);
            let trimmed = taken();
            assert!(
                trimmed + 12 * MIB < full,
                "{}: {full} bytes before, {trimmed} after",
                file.display()
            );
        }
    }

    /// As if the host's memory had run out, say.
    fn is_killed_while_it_writes(&self, vm: &Value) {
        self.ssh(
            "(while :; do cp /data/block /data/again; cp /data/block /root/again; done) \
             > /dev/null 2>&1 < /dev/null & sleep 1",
        );
        let pid = vm["attempt"]["vmm_pid"].as_i64().unwrap();
        let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        kill_process(pid, Signal::KILL).unwrap();
        self.world
            .banger(&["vm", "wait", NAME, "--for", "stopped", "--timeout", "30s"]);
        let reason = self.world.stop_reason(NAME);
        assert_eq!(reason, "vmm-died");
    }

    fn outlives_the_crash(&self, mine: &Mine) {
        self.starts();
        let said = self.runs_under(
            "qemu",
            "after a crash",
            Some(mine),
            "md5sum < /root/block; md5sum < /data/block; \
             cat /dev/zero > /data/fill 2>/dev/null; sync; df /data | tail -n 1",
        );
        assert_eq!(said.more[..2], [&*mine.data, &*mine.data]);
        assert!(said.more[2].contains("100%"), "{:?}", said.more);
        if self.life.storage == "snapshot" {
            // The daemon's end changes nothing of what is attached.
            let attached = devices();
            kill_daemon_and_look(self.world, NAME, &said.vm["attempt"]["vmm_pid"]);
            assert_eq!(devices(), attached);
        }
        self.stops_whole();
    }

    fn starts(&self) {
        self.world.banger(&["vm", "start", NAME, "--wait"]);
    }

    /// Its VMM is another one from now on, and the daemon is a new one.
    fn starts_under(&self, vmm: &str) {
        self.world.banger(&["daemon", "stop"]);
        self.world
            .banger(&["vm", "start", NAME, "--driver", vmm, "--wait"]);
    }

    fn stops_whole(&self) {
        self.world.banger(&["vm", "stop", NAME]);
        let vm = self.vm();
        assert_eq!(vm["phase"]["why"]["reason"], "asked");
        self.is_clean(&vm);
    }

    /// Both filesystems are as they should be.
    fn is_clean(&self, vm: &Value) {
        is_clean(&self.world.vm_file(vm, "disk.img"));
        let layer = self.world.vm_file(vm, "overlay.img");
        if vm["spec"]["storage"] != "snapshot" {
            is_clean(&layer);
            return;
        }
        let image = vm["spec"]["image"]["id"].as_str();
        let image = image.or_else(|| vm["spec"]["image"].as_str()).unwrap();
        let image = self.world.path("data/banger/images").join(image);
        let overlay = vm["spec"]["overlay_bytes"].as_u64().unwrap();
        attach_by_hand(&image.join("root.img"), &layer, overlay, is_clean);
    }

    /// A reset, another image and a larger disk, all before one start. Answers the size of its `/`, in KiB.
    fn starts_anew_with_its_disk_grown(&self, mine: &Mine, vmm: &str) -> u64 {
        self.world.banger(&["vm", "reset", NAME]);
        self.is_clean(&self.vm());
        let change = ["--image", "second", "--disk-size", "96M"];
        for change in change.chunks(2) {
            self.world.banger(&[&["vm", "set", NAME], change].concat());
        }
        self.starts_under(vmm);
        let said = self.runs_under(
            vmm,
            "after a reset to another image",
            Some(mine),
            "md5sum < /data/block; cat /etc/second; ls /root | wc -l; df /data | tail -n 1; \
             rm /data/fill; dd if=/dev/urandom of=/root/new bs=1M count=2 2>/dev/null; \
             md5sum < /root/new > /data/sum; sync; df -k / | tail -n 1; fstrim /data 2>&1; true",
        );
        assert_eq!(said.more[..3], [&*mine.data, "second", "0"]);
        assert!(!said.more[3].contains("100%"), "{:?}", said.more);
        if vmm == "firecracker" {
            // It has no discard, and the guest knows.
            assert!(said.more[5].contains("not supported"), "{:?}", said.more);
        }
        self.is_killed_while_it_writes(&said.vm);
        kib(&said.more[4])
    }

    /// What one VMM's crash left is started by the other, with more room for what it writes to `/`.
    fn runs_under_the_other_vmm(&self, mine: &Mine, second: &str, before: u64) {
        self.world
            .banger(&["vm", "set", NAME, "--overlay-size", "320M"]);
        self.starts_under("qemu");
        let said = self.runs_under(
            "qemu",
            &format!("what {second} left"),
            Some(mine),
            "md5sum < /data/block; cat /etc/second /data/sum; md5sum < /root/new; df -k / | tail -n 1",
        );
        assert_eq!(said.more[..2], [&*mine.data, "second"]);
        assert_eq!(said.more[2], said.more[3]);
        // A filesystem keeps some of the 64 MiB for itself.
        let grown = kib(&said.more[4]);
        assert!(grown > before + (48 << 10), "{before} KiB, then {grown}");
        self.stops_whole();
    }

    fn gets_another_storage(&self, mine: &Mine, vmm: &str) {
        let other = self.life.other;
        self.world
            .banger(&["vm", "reset", NAME, "--storage", other]);
        self.starts_under(vmm);
        let said = self.runs_under(
            vmm,
            "after a reset to another storage",
            Some(mine),
            "md5sum < /data/block; cat /etc/second; ls /root | wc -l; touch /root/last; sync",
        );
        assert_eq!(said.more[..3], [&*mine.data, "second", "0"]);
        assert_eq!(said.vm["spec"]["storage"], other);
        self.stops_whole();
    }
}

/// The size that a line of `df -k` tells.
fn kib(line: &str) -> u64 {
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn sync(file: &Path) {
    banger_host::storage::sync_file(file).unwrap();
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    names.collect()
}

fn is_clean(filesystem: &Path) {
    succeeds(&["e2fsck", "-f", "-n"], filesystem);
}

fn succeeds(program: &[&str], subject: &Path) {
    let mut checked = command(program[0]);
    let output = checked.args(&program[1..]).arg(subject).output().unwrap();
    assert!(
        output.status.success(),
        "{program:?} {}: {}{}",
        subject.display(),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn images_are_unharmed(world: &World) {
    let images = world.path("data/banger/images");
    for name in names(&images) {
        let root = Path::new(&name).join("root.img");
        let same = command("cmp")
            .arg(fixtures().join("images").join(&root))
            .arg(images.join(&root))
            .status();
        assert!(same.unwrap().success(), "{name} was changed");
    }
}

/// A filesystem in a file, mounted.
struct Place {
    folder: tempfile::TempDir,
    mounted: PathBuf,
    check: &'static [&'static str],
    is_mounted: bool,
}

impl Place {
    fn make((mkfs, check): (&[&str], &'static [&'static str])) -> Self {
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let file = folder.path().join("filesystem");
        std::fs::File::create(&file)
            .unwrap()
            .set_len(SHARING_BYTES)
            .unwrap();
        succeeds(mkfs, &file);
        let mounted = folder.path().join("mounted");
        std::fs::create_dir(&mounted).unwrap();
        let status = command("mount")
            .args(["-o", "loop"])
            .args([&file, &mounted])
            .status();
        assert!(status.unwrap().success());
        Self {
            folder,
            mounted,
            check,
            is_mounted: true,
        }
    }

    fn proves_whole(mut self) {
        self.unmount();
        succeeds(self.check, &self.folder.path().join("filesystem"));
    }

    fn unmount(&mut self) {
        let status = command("umount").arg(&self.mounted).status();
        self.is_mounted = false;
        assert!(status.unwrap().success());
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.is_mounted {
            let _ = command("umount").arg("--lazy").arg(&self.mounted).status();
        }
    }
}
