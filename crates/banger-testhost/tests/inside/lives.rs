//! VMs of an ordinary user live on snapshots that the helper makes, and leave nothing.

use super::helper::{ALICE, DEVICES, Helper};
use super::inside::{Seconds, World, command};
use super::storage::{device_of, devices, eventually, is_valid, read_at, write_at};
use rustix::process::{Pid, Signal};
use std::os::unix::fs::MetadataExt;
use std::time::Instant;

const MIB: u64 = 1 << 20;
const NAME: &str = "otter";

/// What a life cycle must leave as it was, word for word.
fn picture() -> Vec<String> {
    [
        ("losetup", &["-l", "-J"][..]),
        ("dmsetup", &["ls"]),
        ("ip", &["-d", "-j", "link"]),
        ("ip", &["-j", "route", "show", "table", "all"]),
        ("nft", &["list", "ruleset"]),
    ]
    .into_iter()
    .map(|(program, args)| {
        let output = command(program).args(args).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    })
    .collect()
}

/// Ends daemon and helper, after which the host is as it was.
fn leave(world: &World, helper: Helper, before: &Vec<String>) {
    world.banger(&["daemon", "stop"]);
    eventually("the host is as before", || {
        (picture() == *before).then_some(())
    });
    helper.stop();
}

fn signal(pid: &serde_json::Value, signal: Signal) {
    let pid = i32::try_from(pid.as_i64().unwrap()).unwrap();
    rustix::process::kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

#[test]
#[ignore = "runs inside the test host"]
fn a_guest_of_an_ordinary_user_lives_on_a_snapshot_by_the_helper() {
    let before = picture();
    let world = World::of(ALICE);
    let helper = Helper::start();
    let start = Instant::now();
    let create = [
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
        "--storage",
        "snapshot",
        "--overlay-size",
        "256M",
        "--wait",
    ];
    world.banger(&create);
    let vm = world.vm(NAME);
    assert_eq!(vm["spec"]["storage"], "snapshot");
    assert_eq!(world.json(&["nat", "status"])["mode"], "helper");
    let said = world.ssh(NAME, "cat /proc/mounts; echo kept > /root/mark; sync");
    assert!(said.contains("/dev/vda / ext4 rw"), "{said}");
    world.banger(&["vm", "stop", NAME]);
    assert_eq!(devices(), Vec::<String>::new());
    let driver = vm["attempt"]["driver"].as_str().unwrap().to_uppercase();
    println!(
        "{driver} RUN: an ordinary user's snapshot by the helper: made, written and stopped in {}",
        Seconds(start.elapsed())
    );
    world.banger(&["vm", "delete", NAME, "--purge"]);
    leave(&world, helper, &before);
}

#[test]
#[ignore = "runs inside the test host"]
fn a_users_snapshot_is_filled_and_grown_and_outlives_daemon_and_helper() {
    let before = picture();
    let world = World::of(ALICE).with_played_guests("[network]\nmode = \"helper\"\n");
    let mut helper = Helper::start();
    let create = [
        "vm",
        "create",
        "--name",
        NAME,
        "--image",
        "tiny",
        "--memory",
        "128",
        "--storage",
        "snapshot",
        "--overlay-size",
        "1G",
        "--wait",
    ];
    world.banger(&create);
    let vm = world.vm(NAME);
    let file = world.vm_file(&vm, "overlay.img");
    let device = device_of(vm["id"].as_str().unwrap()).unwrap();
    assert_eq!(device.metadata().unwrap().uid(), ALICE);
    let first = file.metadata().unwrap().len();
    let block = vec![0x5a; 8 * MIB as usize];
    // Beyond four fifths, where it grows.
    for number in 0..55 {
        write_at(&device, (32 + number * 8) * MIB, &block);
    }
    eventually("it grows", || {
        (file.metadata().unwrap().len() > first).then_some(())
    });
    assert!(is_valid(&vm));
    // The helper dies while the VM runs, and so does the daemon.
    helper.restart();
    let daemon = world.json(&["daemon", "status"])["pid"].clone();
    signal(&daemon, Signal::KILL);
    // Paused for a moment, if nobody answered for as long as it would take to fill the file.
    eventually("it runs on", || {
        (world.vm(NAME)["phase"]["state"] == "running").then_some(())
    });
    assert_eq!(devices().len(), DEVICES);
    for number in 55..70 {
        write_at(&device, (32 + number * 8) * MIB, &block);
    }
    assert!(is_valid(&vm));
    world.banger(&["vm", "stop", NAME]);
    assert_eq!(devices(), Vec::<String>::new());
    helper.restart();
    world.banger(&["vm", "start", NAME, "--wait"]);
    let device = device_of(vm["id"].as_str().unwrap()).unwrap();
    for number in 0..70 {
        let at = (32 + number * 8) * MIB;
        assert_eq!(read_at(&device, at), [0x5a; 20], "at {at}");
    }
    world.banger(&["vm", "delete", NAME, "--force", "--purge"]);
    leave(&world, helper, &before);
}

#[test]
#[ignore = "runs inside the test host"]
fn the_life_of_twenty_vms_on_snapshots_leaves_the_host_byte_for_byte_as_it_was() {
    const COUNT: usize = 20;
    let before = picture();
    let world = World::of(ALICE).with_played_guests("[network]\nmode = \"helper\"\n");
    let helper = Helper::start();
    let names: Vec<String> = (1..=COUNT).map(|number| format!("vm-{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let all = |verb: &[&str]| world.banger(&[verb, &names].concat());
    let create = ["--image", "tiny", "--memory", "128", "--disk-size", "64M"];
    let stored = [
        "--storage",
        "snapshot",
        "--overlay-size",
        "64M",
        "--no-start",
    ];
    for name in &names {
        world.banger(&[&["vm", "create", "--name", name], &create[..], &stored].concat());
    }
    all(&["vm", "start", "--wait"]);
    all(&["nat", "up"]);
    // They share the image's loop device.
    assert_eq!(devices().len(), 1 + COUNT * (DEVICES - 1));
    assert_ne!(picture(), before);
    all(&["vm", "stop"]);
    assert_eq!(devices(), Vec::<String>::new());
    all(&["vm", "delete", "--purge"]);
    leave(&world, helper, &before);
    let bytes: usize = before.iter().map(String::len).sum();
    println!("TWENTY VMS, snapshot: {bytes} bytes are as before");
}
