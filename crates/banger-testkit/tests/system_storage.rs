//! What storage does to VMs: whole daemons, with `fake-vmm` as their VMM and the test as their guest.

#![expect(clippy::unwrap_used, reason = "all of this is a test")]

use banger_testkit::env::{Options, TestEnv};
use banger_testkit::run::eventually;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

const STATE_BYTES: u64 = 64 << 20;
/// The free bytes at which who grows is paused: a tenth of a small filesystem.
const PAUSE_AT: u64 = STATE_BYTES / 10;

fn free(env: &TestEnv) -> u64 {
    let facts = rustix::fs::statvfs(env.state()).unwrap();
    facts.f_bavail * facts.f_frsize
}

fn phase(env: &TestEnv) -> (String, String) {
    let phase = &env.json(&["vm", "show", "otter"])["phase"];
    let word = |key: &str| phase[key].as_str().unwrap_or_default().to_owned();
    (word("state"), word("by"))
}

fn is(env: &TestEnv, state: &str, by: &str) -> bool {
    phase(env) == (state.to_owned(), by.to_owned())
}

/// The file that the guest of the only VM writes to.
fn overlay(env: &TestEnv) -> PathBuf {
    let mut folders = std::fs::read_dir(env.state().join("vms")).unwrap();
    folders.next().unwrap().unwrap().path().join("overlay.img")
}

#[test]
#[ignore = "system test"]
fn a_vm_that_fills_the_host_waits_for_room_and_one_that_does_not_runs_on() {
    let test = "a_vm_that_fills_the_host_waits_for_room_and_one_that_does_not_runs_on";
    let options = Options {
        state_bytes: Some(STATE_BYTES),
        ..Options::default()
    };
    let Some(env) = TestEnv::with(test, &options) else {
        return;
    };
    let create = [
        "vm", "create", "--wait", "--image", "tiny", "--name", "otter",
    ];
    env.ok(&create);
    let vm = env.vm("otter");

    // Somebody else fills the host: nobody is paused for that.
    let filler = File::create(env.state().join("filler")).unwrap();
    let fill = free(&env) - PAUSE_AT * 3 / 4;
    rustix::fs::fallocate(&filler, rustix::fs::FallocateFlags::empty(), 0, fill).unwrap();
    assert!(is(&env, "running", ""));

    // The guest writes on, page by page, as long as it runs.
    let overlay = File::options().write(true).open(overlay(&env)).unwrap();
    let mut written = 0;
    eventually("it is paused", || {
        if free(&env) > 64 << 10 {
            overlay
                .write_all_at(&[7; 4096], (16 << 20) + written)
                .unwrap();
            written += 4096;
        }
        is(&env, "paused", "full-disk").then_some(())
    });
    let left = free(&env);
    assert!(left > 0, "{left} bytes");
    println!("PAUSED: {left} of {STATE_BYTES} bytes left, {written} written");
    let why = env.ok(&["vm", "why", "otter"]);
    assert!(why.contains("the host's filesystem has"), "{why}");
    let refused = env.banger(&["vm", "resume", "otter"]);
    assert!(refused.status != 0, "{refused:?}");
    assert!(refused.stderr.contains("MiB free"), "{refused:?}");
    assert!(is(&env, "paused", "full-disk"));
    // Not by force either: it would lose what it has not written yet.
    let clean = env.banger(&["host", "clean", "--force"]);
    assert!(
        clean.status == 7
            && clean.stderr.contains("VM `otter` is live")
            && clean.stderr.contains("hint: "),
        "{clean:?}"
    );
    assert!(is(&env, "paused", "full-disk"));

    // Over a restart of the daemon it is still known why it is paused.
    env.ok(&["daemon", "stop"]);
    assert!(is(&env, "paused", "full-disk"));

    // A wish that it stops, which an earlier daemon stored last of all, waits until it can follow.
    env.ok(&["daemon", "stop"]);
    env.edit_mirror(vm["id"].as_str().unwrap(), |record| {
        record["desired"] = "off".into();
    });
    assert!(is(&env, "paused", "full-disk"));

    drop(filler);
    std::fs::remove_file(env.state().join("filler")).unwrap();
    let stopped = env.vm_becomes("otter", "stopped", |vm| vm["phase"]["state"] == "stopped");
    assert_eq!(stopped["phase"]["why"]["reason"], "asked");
    let why = env.ok(&["vm", "why", "otter"]);
    assert!(why.contains("the host has room again"), "{why}");
    env.ok(&["vm", "delete", "--purge", "otter"]);
}

#[test]
#[ignore = "system test"]
fn a_vm_in_the_trash_gives_way_to_one_that_is_made() {
    let options = Options {
        state_bytes: Some(24 << 20),
        ..Options::default()
    };
    let Some(env) = TestEnv::with("a_vm_in_the_trash_gives_way_to_one_that_is_made", &options)
    else {
        return;
    };
    // Each takes nine MiB of the image's blocks: there is room for two.
    let create = |name| {
        let place = ["--image", "tiny", "--storage", "copy", "--no-start"];
        env.ok(&[&["vm", "create", "--name", name][..], &place].concat());
    };
    let names = |args: &[&str]| -> Vec<String> {
        let vms = env.json(args);
        let names = vms.as_array().unwrap().iter();
        names
            .map(|vm| vm["name"].as_str().unwrap().to_owned())
            .collect()
    };
    create("ant");
    env.ok(&["vm", "delete", "ant"]);
    create("bee");
    assert_eq!(names(&["vm", "list", "--trash"]), ["ant"]);
    create("cat");
    assert_eq!(names(&["vm", "list", "--trash"]), Vec::<String>::new());
    assert_eq!(names(&["vm", "list"]), ["bee", "cat"]);
    // With nothing left to give way, it is the new one that is refused.
    let refused = env.banger(&[
        "vm",
        "create",
        "--name",
        "dog",
        "--image",
        "tiny",
        "--storage",
        "copy",
        "--no-start",
    ]);
    assert_eq!(refused.status, 8, "{refused:?}");
    assert_eq!(names(&["vm", "list"]), ["bee", "cat"]);
}
