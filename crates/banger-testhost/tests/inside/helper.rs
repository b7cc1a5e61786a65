//! What `banger-helper` does with snapshots when other users, and their owner, try what they may not: nothing.

use super::inside::{assert_inside, command};
use super::storage::{devices, eventually, read_at, write_at};
use banger_core::id::{InstanceId, VmId};
use banger_host::host_side::{HelperClient, HelperError};
use banger_host::op::{HostAnswer, HostOp, OwnedObject, SnapshotState};
use banger_host::storage::dm::{Control, Target};
use banger_host::storage::ops::MAX_SNAPSHOTS;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, Uid};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use uuid::Uuid;

const SOCKET: &str = "/run/banger-helper.sock";
pub(super) const ALICE: u32 = 54_321;
const BOB: u32 = 54_322;
const MIB: u64 = 1 << 20;
/// The snapshot and its origin, the image's loop device and the file's.
pub(super) const DEVICES: usize = 4;

/// `banger-helper`, as its unit would have started it.
pub(super) struct Helper {
    child: Child,
    log: tempfile::NamedTempFile,
}

impl Helper {
    pub(super) fn start() -> Self {
        assert_inside();
        let log = tempfile::NamedTempFile::new().unwrap();
        let child = launch(&log);
        Self { child, log }
    }

    /// Kills it, and starts it again as systemd would.
    pub(super) fn restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = launch(&self.log);
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.log.path()).unwrap()
    }

    /// As its unit would.
    pub(super) fn stop(mut self) {
        let pid = Pid::from_child(&self.child);
        rustix::process::kill_process(pid, Signal::TERM).unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(SOCKET);
        if std::thread::panicking() {
            eprintln!("the helper's log:\n{}", self.log());
        }
    }
}

fn launch(log: &tempfile::NamedTempFile) -> Child {
    let log = OpenOptions::new().append(true).open(log.path()).unwrap();
    let child = command("/mnt/bin/banger-helper")
        .args(["--listen", SOCKET])
        .stderr(log)
        .spawn()
        .unwrap();
    eventually("the helper listens", || {
        HelperClient::connect(SOCKET.as_ref()).ok()
    });
    child
}

/// Runs `work` in a thread that belongs to the user.
fn as_user<T: Send>(uid: u32, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let user = Uid::from_raw(uid);
            rustix::thread::set_thread_res_uid(user, user, user).unwrap();
            work()
        });
        thread.join().unwrap()
    })
}

fn ask(uid: u32, op: &HostOp, given: &[BorrowedFd<'_>]) -> Result<HostAnswer, String> {
    as_user(uid, || {
        let client = HelperClient::connect(SOCKET.as_ref()).unwrap();
        match client.request(op, given) {
            Ok((answer, _)) => Ok(answer),
            Err(HelperError::Refused { why, .. }) => Err(why),
            Err(other) => panic!("{op:?}: {other:?}"),
        }
    })
}

/// A user's files of one VM, and its ids.
struct Files {
    uid: u32,
    folder: tempfile::TempDir,
    instance: InstanceId,
    vm: VmId,
}

impl Files {
    fn of(uid: u32) -> Self {
        Self::of_kind(uid, 0x11)
    }

    fn of_kind(uid: u32, content: u8) -> Self {
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let files = Self {
            uid,
            folder,
            instance: InstanceId::from_uuid(Uuid::now_v7()),
            vm: VmId::from_uuid(Uuid::now_v7()),
        };
        std::fs::write(files.image(), vec![content; MIB as usize]).unwrap();
        File::create(files.cow()).unwrap().set_len(2 * MIB).unwrap();
        for path in [files.image(), files.cow(), files.folder.path().to_owned()] {
            std::os::unix::fs::chown(path, Some(uid), Some(uid)).unwrap();
        }
        files
    }

    fn image(&self) -> PathBuf {
        self.folder.path().join("root.img")
    }

    fn cow(&self) -> PathBuf {
        self.folder.path().join("overlay.img")
    }

    fn attach_op(&self) -> HostOp {
        HostOp::AttachSnapshot {
            instance: self.instance,
            vm: self.vm,
            sectors: 2 * MIB / 512,
        }
    }

    fn detach_op(&self) -> HostOp {
        let (instance, vm) = (self.instance, self.vm);
        HostOp::DetachSnapshot { instance, vm }
    }

    fn open(&self) -> (OwnedFd, OwnedFd) {
        as_user(self.uid, || {
            let image = File::open(self.image()).unwrap();
            (image.into(), open_both(&self.cow()))
        })
    }

    fn attach(&self) -> Result<PathBuf, String> {
        let (image, cow) = self.open();
        let given = [image.as_fd(), cow.as_fd()];
        match ask(self.uid, &self.attach_op(), &given)? {
            HostAnswer::Device { path } => Ok(path.into()),
            other => panic!("{other:?}"),
        }
    }

    fn detach(&self) {
        assert_eq!(
            ask(self.uid, &self.detach_op(), &[]).unwrap(),
            HostAnswer::Done
        );
    }
}

fn open_both(path: &Path) -> OwnedFd {
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.unwrap().into()
}

#[test]
#[ignore = "runs inside the test host"]
fn nothing_but_the_callers_own_plain_files_becomes_a_snapshot() {
    let before = devices();
    let helper = Helper::start();
    let alice = Files::of(ALICE);
    let (image, cow) = alice.open();
    let refused = |image: &OwnedFd, cow: &OwnedFd, said: &str| {
        let why = ask(ALICE, &alice.attach_op(), &[image.as_fd(), cow.as_fd()]).unwrap_err();
        assert!(why.contains(said), "{why}");
        assert_eq!(devices(), before, "{why}");
    };
    let open = |path: &str, flags: OFlags| {
        rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).unwrap()
    };
    // Handed to this user by somebody who may open it: that is not enough.
    let shadow = open("/etc/shadow", OFlags::RDONLY);
    refused(
        &shadow,
        &cow,
        "the image of a snapshot must be a file of uid 54321, and is one of uid 0",
    );
    refused(
        &image,
        &open("/etc/shadow", OFlags::RDWR),
        "must be a file of uid 54321",
    );
    // What everybody may read is not the own, either.
    let bob = Files::of(BOB);
    for path in [bob.folder.path(), &bob.image(), &bob.cow()] {
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o777)).unwrap();
    }
    refused(&bob.open().0, &cow, "is one of uid 54322");
    refused(&image, &bob.open().1, "is one of uid 54322");
    // Her own, opened for something else.
    let own = |path: &Path, flags: OFlags| as_user(ALICE, || open(path.to_str().unwrap(), flags));
    refused(
        &own(&alice.image(), OFlags::RDWR),
        &cow,
        "open for reading alone",
    );
    refused(
        &own(&alice.image(), OFlags::PATH),
        &cow,
        "open for reading alone",
    );
    let and_writing = "open for reading and writing";
    refused(&image, &own(&alice.cow(), OFlags::RDONLY), and_writing);
    refused(&image, &own(&alice.cow(), OFlags::WRONLY), and_writing);
    refused(
        &image,
        &own(&alice.cow(), OFlags::RDWR | OFlags::APPEND),
        "not for appending",
    );
    refused(&image, &own(&alice.cow(), OFlags::PATH), and_writing);
    // Of every other kind.
    let (pipe, end) = std::io::pipe().unwrap();
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut disks = std::fs::read_dir("/dev")
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let disk = disks.find(|path| path.ends_with("vda")).unwrap();
    let pid = rustix::process::pidfd_open(
        rustix::process::getpid(),
        rustix::process::PidfdFlags::empty(),
    );
    let others: Vec<OwnedFd> = vec![
        pipe.into(),
        end.into(),
        socket.into(),
        pid.unwrap(),
        open("/dev/null", OFlags::RDWR),
        open(disk.to_str().unwrap(), OFlags::RDONLY),
        open("/dev/loop-control", OFlags::RDWR),
        open("/proc/self/ns/net", OFlags::RDONLY),
        open("/", OFlags::RDONLY),
    ];
    for other in &others {
        let why = ask(ALICE, &alice.attach_op(), &[other.as_fd(), cow.as_fd()]).unwrap_err();
        assert!(why.contains("must be a"), "{why}");
        let why = ask(ALICE, &alice.attach_op(), &[image.as_fd(), other.as_fd()]).unwrap_err();
        assert!(why.contains("must be a"), "{why}");
    }
    assert_eq!(devices(), before);
    on_an_overlayfs(&alice, |stacked| {
        refused(
            &own(&stacked.join("root.img"), OFlags::RDONLY),
            &cow,
            "cannot be on overlayfs",
        );
        refused(
            &image,
            &own(&stacked.join("overlay.img"), OFlags::RDWR),
            "cannot be on overlayfs",
        );
    });
    let log = helper.log();
    assert!(
        log.contains("refused uid=54321 op=attach-snapshot: "),
        "{log}"
    );
    // After all of that she is served.
    alice.attach().unwrap();
    alice.detach();
    assert_eq!(devices(), before);
}

/// Shows `look` the user's folder through an overlayfs.
fn on_an_overlayfs(files: &Files, look: impl FnOnce(&Path)) {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let [upper, work, joined] = ["upper", "work", "joined"].map(|name| folder.path().join(name));
    for folder in [&upper, &work, &joined] {
        std::fs::create_dir(folder).unwrap();
    }
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        files.folder.path().display(),
        upper.display(),
        work.display()
    );
    let mounted = command("mount")
        .args(["-t", "overlay", "-o", &options, "overlay"])
        .arg(&joined)
        .status();
    assert!(mounted.unwrap().success());
    look(&joined);
    assert!(command("umount").arg(&joined).status().unwrap().success());
}

#[test]
#[ignore = "runs inside the test host"]
fn another_user_reaches_nothing_of_a_snapshot() {
    let before = devices();
    let _helper = Helper::start();
    let alice = Files::of(ALICE);
    let device = alice.attach().unwrap();
    write_at(&device, MIB, b"of alice, and private");
    let attached = devices();
    let (instance, vm) = (alice.instance, alice.vm);
    // The ids are no secret, and no key.
    assert_eq!(ask(BOB, &alice.detach_op(), &[]).unwrap(), HostAnswer::Done);
    for op in [
        HostOp::SnapshotStatus { instance, vm },
        HostOp::GrowSnapshot { instance, vm },
    ] {
        let absent = HostAnswer::Snapshot(SnapshotState::Absent);
        assert_eq!(ask(BOB, &op, &[]).unwrap(), absent);
    }
    let owned = |uid| match ask(uid, &HostOp::ListOwned {}, &[]).unwrap() {
        HostAnswer::Owned { objects } => objects,
        other => panic!("{other:?}"),
    };
    assert_eq!(owned(BOB), Vec::<OwnedObject>::new());
    assert_eq!(owned(ALICE).len(), 2);
    assert_eq!(devices(), attached);
    // With her ids and his files he gets a device of his own.
    let mut bob = Files::of_kind(BOB, 0x22);
    bob.instance = alice.instance;
    bob.vm = alice.vm;
    let his = bob.attach().unwrap();
    assert_ne!(his, device);
    assert_eq!(read_at(&his, 0), [0x22; 20]);
    assert_eq!(read_at(&device, 0), [0x11; 20]);
    assert_eq!(&read_at(&device, MIB), b"of alice, and privat");
    // By the kernel's own rules neither opens what is the other's, and nobody what lies below.
    let opens = |uid, path: &Path| as_user(uid, || File::open(path).is_ok());
    assert!(opens(ALICE, &device) && opens(BOB, &his));
    assert!(!opens(BOB, &device) && !opens(ALICE, &his));
    for name in devices() {
        let node = Path::new("/dev").join(name);
        if node != device {
            assert!(!opens(ALICE, &node), "{}", node.display());
        }
    }
    bob.detach();
    assert_eq!(devices(), attached);
    alice.detach();
    assert_eq!(devices(), before);
    // Root's own device with the name that hers would have.
    let name = format!("BANGER-{ALICE}-{instance}-{vm}");
    let dmsetup = |args: &[&str]| {
        let made = command("dmsetup")
            .args(args)
            .env("DM_DISABLE_UDEV", "1")
            .status();
        assert!(made.unwrap().success());
    };
    dmsetup(&["create", &name, "--table", "0 2048 zero"]);
    let why = alice.attach().unwrap_err();
    assert!(why.contains("that is not ours"), "{why}");
    alice.detach();
    assert_eq!(devices().len(), before.len() + 1);
    dmsetup(&["remove", &name]);
    assert_eq!(devices(), before);
}

#[test]
#[ignore = "runs inside the test host"]
fn what_is_swapped_while_an_operation_runs_is_never_used() {
    const ROUNDS: usize = 40;
    let before = devices();
    let _helper = Helper::start();
    let alice = Files::of(ALICE);
    let over = AtomicBool::new(false);
    let folder = alice.folder.path();
    std::thread::scope(|scope| {
        // Her paths lead to the shadow file, to another image, and back, as fast as it goes.
        let swapping = scope.spawn(|| {
            as_user(ALICE, || {
                let other = folder.join("other");
                std::fs::write(&other, vec![0x99; MIB as usize]).unwrap();
                let mut rounds = 0_u64;
                while !over.load(Ordering::Relaxed) {
                    for name in ["root.img", "overlay.img"] {
                        let (path, aside) = (folder.join(name), folder.join("aside"));
                        let link = folder.join("link");
                        let target = if rounds.is_multiple_of(2) {
                            "/etc/shadow"
                        } else {
                            "other"
                        };
                        std::os::unix::fs::symlink(target, &link).unwrap();
                        std::fs::hard_link(&path, &aside).unwrap();
                        std::fs::rename(&link, &path).unwrap();
                        std::fs::rename(&aside, &path).unwrap();
                    }
                    rounds += 1;
                }
                rounds
            })
        });
        let held = || {
            let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let image = rustix::fs::open(alice.image(), OFlags::RDONLY | flags, Mode::empty());
            let cow = rustix::fs::open(alice.cow(), OFlags::RDWR | flags, Mode::empty());
            Some((image.ok()?, cow.ok()?))
        };
        for _ in 0..ROUNDS {
            let (image, cow) = as_user(ALICE, || eventually("both are files", held));
            let answer = ask(ALICE, &alice.attach_op(), &[image.as_fd(), cow.as_fd()]).unwrap();
            let HostAnswer::Device { path } = answer else {
                panic!("{answer:?}");
            };
            assert_eq!(read_at(path.as_ref(), 0), [0x11; 20]);
            alice.detach();
        }
        over.store(true, Ordering::Relaxed);
        let rounds = swapping.join().unwrap();
        println!("SWAPPED: {rounds} times during {ROUNDS} attaches");
        assert!(rounds as usize > ROUNDS);
    });
    assert_eq!(devices(), before);

    // Her files lose their content under the very descriptors, and have it again: only she is harmed.
    over.store(false, Ordering::Relaxed);
    let bob = Files::of_kind(BOB, 0x22);
    let his = bob.attach().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (image, cow) = (open_both(&alice.image()), open_both(&alice.cow()));
            while !over.load(Ordering::Relaxed) {
                for (file, bytes) in [(&image, MIB), (&cow, 2 * MIB)] {
                    rustix::fs::ftruncate(file, 0).unwrap();
                    rustix::fs::ftruncate(file, bytes).unwrap();
                }
            }
        });
        let mut made = 0;
        for _ in 0..ROUNDS {
            made += usize::from(alice.attach().is_ok());
            alice.detach();
        }
        over.store(true, Ordering::Relaxed);
        println!("CUT: {made} of {ROUNDS} attaches went through");
    });
    assert_eq!(read_at(&his, 0), [0x22; 20]);
    bob.detach();
    assert_eq!(devices(), before);
}

#[test]
#[ignore = "runs inside the test host"]
fn sizes_and_names_that_make_no_sense_are_refused() {
    let before = devices();
    let _helper = Helper::start();
    let alice = Files::of(ALICE);
    let (image, cow) = alice.open();
    let given = [image.as_fd(), cow.as_fd()];
    for (sectors, said) in [
        (0, "smaller than its image"),
        (2047, "smaller than its image"),
        (1 << 40, "larger than"),
        (u64::MAX / 512, "larger than"),
        (u64::MAX, "larger than"),
    ] {
        let op = HostOp::AttachSnapshot {
            instance: alice.instance,
            vm: alice.vm,
            sectors,
        };
        let why = ask(ALICE, &op, &given).unwrap_err();
        assert!(why.contains(said), "{sectors}: {why}");
        assert_eq!(devices(), before);
    }
    let socket = banger_host::net::seqpacket::Place::open(SOCKET.as_ref()).unwrap();
    for (instance, vm, sectors) in [
        ("../../etc", alice.vm.to_string().as_str(), "8"),
        (
            &alice.instance.to_string(),
            "../../../dev/mapper/control",
            "8",
        ),
        (&alice.instance.to_string(), "x; reboot", "8"),
        (&alice.instance.to_string(), "\\u0000", "8"),
        (&alice.instance.to_string(), &alice.vm.to_string(), "-1"),
        (&alice.instance.to_string(), &alice.vm.to_string(), "1e30"),
    ] {
        let message = format!(
            r#"{{"op":"attach-snapshot","instance":"{instance}","vm":"{vm}","sectors":{sectors}}}"#
        );
        let reply = as_user(ALICE, || {
            let connection = banger_host::net::seqpacket::socket().unwrap();
            rustix::net::connect(&connection, &socket.address().unwrap()).unwrap();
            banger_host::net::seqpacket::send(&connection, message.as_bytes(), &given).unwrap();
            let limit = Instant::now() + Duration::from_secs(20);
            banger_host::net::seqpacket::receive(&connection, Some(limit))
                .unwrap()
                .unwrap()
                .0
        });
        let reply = String::from_utf8_lossy(&reply).into_owned();
        assert!(reply.contains("not understood"), "{reply}");
    }
    assert_eq!(devices(), before);
}

#[test]
#[ignore = "runs inside the test host"]
fn who_holds_a_device_open_or_has_too_many_keeps_nobody_else_waiting() {
    let before = devices();
    let _helper = Helper::start();
    let (alice, bob) = (Files::of(ALICE), Files::of(BOB));
    let device = alice.attach().unwrap();
    let held = as_user(ALICE, || File::open(&device).unwrap());
    std::thread::scope(|scope| {
        let detaching = scope.spawn(|| ask(ALICE, &alice.detach_op(), &[]));
        let began = Instant::now();
        let mut turns = 0;
        while began.elapsed() < Duration::from_secs(3) || (turns == 0 && !detaching.is_finished()) {
            bob.attach().unwrap();
            bob.detach();
            turns += usize::from(!detaching.is_finished());
        }
        assert!(turns > 0, "one user waited for the other's device");
        let why = detaching.join().unwrap().unwrap_err();
        assert!(why.contains("busy"), "{why}");
    });
    drop(held);
    alice.detach();
    assert_eq!(devices(), before);

    // As many as anybody may have. What counts is their names; so they are made of nothing.
    let control = Control::open().unwrap();
    let name = |_| {
        let files = (Uuid::now_v7(), Uuid::now_v7());
        format!("BANGER-{ALICE}-{}-{}-origin", files.0, files.1)
    };
    let names: Vec<String> = (0..MAX_SNAPSHOTS).map(name).collect();
    let zeros = [Target {
        start: 0,
        sectors: 8,
        kind: "zero".to_owned(),
        text: String::new(),
    }];
    for name in &names {
        control.create(name, name, &zeros, true).unwrap();
    }
    let why = alice.attach().unwrap_err();
    assert!(why.contains("has 256 snapshots already"), "{why}");
    bob.attach().unwrap();
    bob.detach();
    for name in &names {
        control.remove(name).unwrap();
    }
    alice.attach().unwrap();
    alice.detach();
    assert_eq!(devices(), before);
}
