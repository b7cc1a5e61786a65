//! What goes wrong with snapshots: the daemon aborts before and after every step that has to do with storage, a file
//! goes or is cut, the host is full. The guests are played: who writes is the test.

use super::helper::{ALICE, DEVICES, Helper};
use super::inside::{World, command};
use super::storage::{LIMIT, device_of, devices, eventually, is_valid, read_at, write_at};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

const NAME: &str = "otter";
const MIB: u64 = 1 << 20;

const CREATE: &[&str] = &[
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
    "64M",
    "--disk-size",
    "64M",
    "--wait",
];
const START: &[&str] = &["vm", "start", NAME, "--wait"];
const STOP: &[&str] = &["vm", "stop", NAME];
const RESET: &[&str] = &["vm", "reset", NAME];
const GROW: &[&str] = &["vm", "set", NAME, "--disk-size", "96M"];
const PURGE: &[&str] = &["vm", "delete", NAME, "--force", "--purge"];

/// The steps that make, attach, change, detach or remove something of a VM's storage.
const STEPS: [&str; 7] = [
    "stage",
    "open-files",
    "close-storage",
    "sync",
    "layer",
    "disk",
    "unlink",
];

/// Those of them in which an ordinary user's daemon asks the helper.
const HELPED_STEPS: [&str; 2] = ["open-files", "close-storage"];

/// How the device that plays the guest's root begins.
const WORD: &[u8; 20] = b"written by the guest";
/// Where it is written: behind the image's own blocks.
const PLACE: u64 = 32 * MIB;

fn lines(path: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

/// The root of a running VM, and the node of its device.
fn node(world: &World) -> PathBuf {
    let id = world.vm(NAME)["id"].as_str().unwrap().to_owned();
    device_of(&id).unwrap()
}

/// How a VM is before a verb is tried.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Is {
    Nowhere,
    Running,
    Stopped,
}

struct Scene {
    before: Is,
    tried: &'static [&'static str],
    /// The layer that the guest wrote to is thrown away by it.
    forgets: bool,
}

const fn scene(before: Is, tried: &'static [&'static str], forgets: bool) -> Scene {
    Scene {
        before,
        tried,
        forgets,
    }
}

const SCENES: [(&str, Scene); 6] = [
    ("create", scene(Is::Nowhere, CREATE, true)),
    ("start", scene(Is::Stopped, START, false)),
    ("stop", scene(Is::Running, STOP, false)),
    ("reset", scene(Is::Stopped, RESET, true)),
    ("grow", scene(Is::Stopped, GROW, false)),
    ("purge", scene(Is::Running, PURGE, true)),
];

#[test]
#[ignore = "runs inside the test host"]
fn an_abort_at_any_step_of_storage_leaves_no_device_that_no_record_explains() {
    let before = devices();
    let world = World::new().with_played_guests("");
    abort_everywhere("as root", &world, &STEPS, &before);
    world.leaves_nothing();
    assert_eq!(devices(), before);
}

#[test]
#[ignore = "runs inside the test host"]
fn with_the_helper_an_abort_at_a_step_of_storage_leaves_no_device_that_no_record_explains() {
    let before = devices();
    let _helper = Helper::start();
    let world = World::of(ALICE).with_played_guests("[network]\nmode = \"helper\"\n");
    abort_everywhere("with the helper", &world, &HELPED_STEPS, &before);
    world.leaves_nothing();
    assert_eq!(devices(), before);
}

/// Aborts at both sides of each of the `steps` that a verb passes, each in the first verb that does.
fn abort_everywhere(how: &str, world: &World, steps: &[&str], before: &[String]) {
    let mut done = BTreeSet::new();
    for (verb, scene) in &SCENES {
        let mut points = points(world, verb, scene, steps);
        assert_eq!(devices(), before, "{verb}");
        // What several verbs pass is the same step.
        points.retain(|point| done.insert(point.clone()));
        for point in &points {
            aborts(world, scene, point);
            recovers(world, verb, scene, point, before);
        }
        println!("CRASH POINTS: snapshot {how}, {verb}: {}", points.join(" "));
    }
    let passed = |step: &&str| {
        done.iter()
            .any(|point| point.contains(&format!("/{step}:")))
    };
    assert!(steps.iter().all(passed), "of {steps:?} only {done:?}");
    println!("CRASH POINTS: snapshot {how}: {}, all fired", done.len());
}

/// Brings the world to where the verb can be tried, with something written by the guest.
fn prepare(world: &World, scene: &Scene) {
    if scene.before == Is::Nowhere {
        return;
    }
    world.banger(CREATE);
    write_at(&node(world), PLACE, WORD);
    if scene.before == Is::Stopped {
        world.banger(STOP);
    }
}

/// The storage steps that the verb passes, each once, in order.
fn points(world: &World, verb: &str, scene: &Scene, steps: &[&str]) -> Vec<String> {
    prepare(world, scene);
    world.banger(&["daemon", "stop"]);
    let trace = world.path(&format!("trace-{verb}"));
    let text = trace.display().to_string();
    let (status, said) = world.tries(&[("BANGER_CRASH_TRACE", &text)], scene.tried);
    assert_eq!(status, 0, "{verb}: {said}");
    let mut seen = BTreeSet::new();
    let points: Vec<String> = lines(&trace)
        .into_iter()
        .filter(|point| {
            let step = point.split(['/', ':']).nth(1).unwrap_or_default();
            steps.contains(&step) && seen.insert(point.clone())
        })
        .collect();
    if scene.tried != PURGE {
        world.banger(PURGE);
    }
    points
}

fn aborts(world: &World, scene: &Scene, point: &str) {
    prepare(world, scene);
    world.banger(&["daemon", "stop"]);
    let fired = world.path("fired");
    let _ = std::fs::remove_file(&fired);
    let text = fired.display().to_string();
    world.tries(
        &[("BANGER_CRASH_AT", point), ("BANGER_CRASH_LOG", &text)],
        scene.tried,
    );
    eventually(&format!("{point} fires"), || {
        (lines(&fired) == [point]).then_some(())
    });
}

/// Another daemon comes up, and what is attached is what the records say.
fn recovers(world: &World, verb: &str, scene: &Scene, point: &str, before: &[String]) {
    let vm = eventually(&format!("the VM rests after {verb}, {point}"), || {
        let vms = world.json(&["vm", "list"]);
        let vm = vms.as_array().unwrap().first().cloned();
        let Some(vm) = vm else {
            return Some(None);
        };
        let rests = match vm["phase"]["state"].as_str().unwrap() {
            // One that is to run is started by nobody but a person.
            "stopped" => true,
            "running" => vm["phase"]["ready"] == true,
            _ => false,
        };
        rests.then_some(Some(vm))
    });
    let runs = vm
        .as_ref()
        .is_some_and(|vm| vm["phase"]["state"] == "running");
    let expected = if runs { DEVICES } else { 0 };
    eventually(&format!("{expected} devices after {verb}, {point}"), || {
        (devices().len() - before.len() == expected).then_some(())
    });
    if vm.is_none() {
        assert!(scene.forgets, "{verb}, {point}: the VM is lost");
        return;
    }
    if expected == 0 {
        world.banger(START);
    }
    let found = read_at(&node(world), PLACE);
    if !scene.forgets {
        assert_eq!(found, WORD, "{verb}, {point}");
    }
    world.banger(PURGE);
    eventually("nothing is attached", || {
        (devices() == before).then_some(())
    });
}

#[test]
#[ignore = "runs inside the test host"]
fn half_of_a_snapshot_is_taken_apart_and_what_is_missing_or_cut_is_told() {
    let before = devices();
    let world = World::new().with_played_guests("");
    world.banger(CREATE);
    // The same image, and what must not be harmed.
    let other: Vec<&str> = CREATE
        .iter()
        .map(|arg| if *arg == NAME { "owl" } else { arg })
        .collect();
    world.banger(&other);
    let owl = device_of(world.vm("owl")["id"].as_str().unwrap()).unwrap();
    write_at(&owl, PLACE, WORD);
    write_at(&node(&world), PLACE, WORD);
    world.banger(STOP);
    let vm = world.vm(NAME);
    let (file, aside) = (world.vm_file(&vm, "overlay.img"), world.path("aside"));
    let alone = devices();

    std::fs::rename(&file, &aside).unwrap();
    refuses(&world, &file, "No such file");
    // Nothing is made in its place.
    assert!(!file.exists());
    std::fs::copy(&aside, &file).unwrap();
    let whole = file.metadata().unwrap().len();
    let cut = OpenOptions::new().write(true).open(&file).unwrap();
    cut.set_len(whole / 2).unwrap();
    refuses(&world, &file, "is not the copy-on-write file");
    assert_eq!(file.metadata().unwrap().len(), whole / 2);
    cut.set_len(whole).unwrap();
    cut.write_all_at(&[0; 512], 0).unwrap();
    refuses(&world, &file, "is not the copy-on-write file");
    assert_eq!(devices(), alone);

    std::fs::rename(&aside, &file).unwrap();
    world.banger(START);
    assert_eq!(read_at(&node(&world), PLACE), WORD);
    assert_eq!(read_at(&owl, PLACE), WORD);
    world.banger(STOP);

    // As an attach that was broken off between its two devices leaves it.
    let instance = std::fs::read_to_string(world.path("state/banger/instance.json")).unwrap();
    let instance: Value = serde_json::from_str(&instance).unwrap();
    let half = |vm: &str| {
        let name = format!("BANGER-0-{}-{vm}-origin", instance["id"].as_str().unwrap());
        let status = command("dmsetup")
            .args(["create", &name, "--uuid", &name, "--table", "0 2048 zero"])
            .env("DM_DISABLE_UDEV", "1")
            .status();
        assert!(status.unwrap().success());
    };
    world.banger(&["daemon", "stop"]);
    half(vm["id"].as_str().unwrap());
    // Of a VM that nobody knows.
    half("0198c2a4-7d1e-7b3a-8e5f-1f2e3d4c5b6a");
    assert_eq!(devices().len(), alone.len() + 2);
    world.banger(&["daemon", "start"]);
    eventually("the halves are taken apart", || {
        (devices() == alone).then_some(())
    });
    for name in [NAME, "owl"] {
        world.banger(&["vm", "delete", name, "--force", "--purge"]);
    }
    assert_eq!(devices(), before);
    world.leaves_nothing();
}

fn refuses(world: &World, file: &Path, why: &str) {
    let (status, said) = world.tries(&[], &["vm", "start", NAME, "--wait"]);
    assert!(status != 0, "{said}");
    assert!(
        said.contains(why) && said.contains(&file.display().to_string()),
        "{said}"
    );
    assert!(said.contains("nothing was changed"), "{said}");
    assert_eq!(world.vm(NAME)["phase"]["state"], "stopped");
}

#[test]
#[ignore = "runs inside the test host"]
fn a_snapshot_that_cannot_grow_pauses_its_vm_and_is_never_lost() {
    let before = devices();
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
    // Room for the file as it is at first, and not for the next step.
    mount("size=700M");
    let world = world.with_played_guests("");
    let create: Vec<&str> = CREATE
        .iter()
        .map(|arg| if *arg == "64M" { "1G" } else { arg })
        .collect();
    world.banger(&create);
    let device = node(&world);
    let vm = world.vm(NAME);
    let file = world.vm_file(&vm, "overlay.img");
    assert_eq!(file.metadata().unwrap().len(), 512 * MIB);
    // The guest writes on, as long as it runs.
    let block = vec![0x5a; MIB as usize];
    let mut written = 0;
    let state_now = || {
        let vm = world.vm(NAME);
        let phase = &vm["phase"];
        let word = |key: &str| phase[key].as_str().unwrap_or_default().to_owned();
        (word("state"), word("by"))
    };
    let paused = ("paused".to_owned(), "full-disk".to_owned());
    let began = Instant::now();
    while state_now() != paused {
        assert!(
            began.elapsed() < LIMIT,
            "never paused: {written} MiB written"
        );
        // A step that the pause catches up with.
        let chunks = if written < 400 { 40 } else { 2 };
        for _ in 0..chunks {
            write_at(&device, (64 + written) * MIB, &block);
            written += 1;
        }
    }
    println!("SNAPSHOT RUN: paused with {written} of 512 MiB written");
    assert!(written >= 400, "{written}");
    assert!(is_valid(&vm), "after {written} MiB");
    let why = world.banger(&["vm", "why", NAME]);
    assert!(why.contains("its copy-on-write file is full"), "{why}");
    let (status, said) = world.tries(&[], &["vm", "resume", NAME]);
    assert!(
        status != 0 && said.contains("its copy-on-write file is full"),
        "{said}"
    );
    mount("remount,size=2G");
    eventually("it goes on", || (state_now().0 == "running").then_some(()));
    assert!(file.metadata().unwrap().len() > 512 * MIB);
    for chunk in 0..written {
        assert_eq!(read_at(&device, (64 + chunk) * MIB), vec![0x5a; WORD.len()]);
    }
    write_at(&device, PLACE, WORD);
    assert!(is_valid(&vm));
    world.banger(PURGE);
    assert_eq!(devices(), before);
    world.banger(&["daemon", "stop"]);
    let unmounted = command("umount").arg(&state).status();
    assert!(unmounted.unwrap().success());
}
