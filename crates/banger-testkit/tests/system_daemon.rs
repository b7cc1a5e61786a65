//! The daemon's life: what it leaves on the host, what survives it, and what it finds again.
//!
//! Real daemon, shim and namespace; a scripted program in the VMM's place.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use banger_api::client::{Client, Lines};
use banger_api::endpoint::{GetEvents, PostVms};
use banger_api::event::{Cursor, Event, EventKind, FollowEvents};
use banger_api::vm::CreateVm;
use banger_testkit::env::TestEnv;
use banger_testkit::host::{Host, openers};
use banger_testkit::run::{LIMIT, Output, PROMPT, eventually, signal, wait_exit};
use rustix::process::Signal;
use serde_json::Value;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Creates a running VM and waits until it is ready.
#[track_caller]
fn create(env: &TestEnv, name: &str) -> Value {
    let size = ["--image", "tiny", "--memory", "128"];
    env.json(&[&["vm", "create", "--wait", "--name", name][..], &size].concat())
}

#[track_caller]
fn create_stopped(env: &TestEnv, name: &str) -> Value {
    let size = ["--image", "tiny", "--memory", "128"];
    env.json(&[&["vm", "create", "--no-start", "--name", name][..], &size].concat())
}

fn id(vm: &Value) -> &str {
    vm["id"].as_str().unwrap()
}

fn pid(vm: &Value, which: &str) -> i32 {
    i32::try_from(vm["attempt"][which].as_i64().unwrap()).unwrap()
}

fn state(vm: &Value) -> &str {
    vm["phase"]["state"].as_str().unwrap()
}

/// A refusal: the code's exit code, and an error that names a next step.
#[track_caller]
fn assert_refused(output: &Output, status: i32, says: &str) {
    assert!(
        output.status == status && output.stderr.contains(says) && output.stderr.contains("hint:"),
        "not refused with {status} and `{says}`: {output:?}"
    );
}

#[test]
#[ignore = "system test"]
fn ten_lives_of_a_vm_leave_the_host_as_it_was() {
    let Some(env) = TestEnv::scripted("ten_lives_of_a_vm_leave_the_host_as_it_was", "") else {
        return;
    };
    let before = env.host();
    assert_eq!(before, Host::default());
    let mut namespaces = Vec::new();
    for _ in 0..10 {
        let vm = create(&env, "otter");
        let during = env.host();
        // What is asserted to be gone was there, and was seen.
        for program in ["bangerd", "banger-netns", "banger-shim", "fake-vmm"] {
            assert_eq!(during.running(program).len(), 1, "{program}: {during:?}");
        }
        assert_eq!(during.links.len(), 1, "{during:?}");
        assert_eq!(during.addresses.len(), 1, "{during:?}");
        assert!(!during.routes.is_empty(), "{during:?}");
        assert_eq!(during.namespaces.len(), 1, "{during:?}");
        assert_eq!(env.taps().len(), 1);
        assert_eq!(env.vm_folders(), [id(&vm)]);
        namespaces.extend(during.hold_namespaces());

        env.ok(&["vm", "stop", "otter"]);
        assert_eq!(env.taps(), Vec::<String>::new());
        assert!(!env.vm_folder(id(&vm)).join("run").exists());
        let idle = env.host();
        assert_eq!(idle.running("banger-shim"), Vec::<i32>::new());
        assert_eq!(idle.running("fake-vmm"), Vec::<i32>::new());

        env.ok(&["vm", "start", "otter"]);
        env.ok(&["vm", "wait", "otter"]);
        env.ok(&["vm", "stop", "otter"]);
        env.ok(&["vm", "delete", "--purge", "otter"]);
        assert_eq!(env.vm_folders(), Vec::<String>::new());
        assert_eq!(env.vms(), Vec::<Value>::new());
    }
    env.ok(&["daemon", "stop"]);
    assert_eq!(env.host(), before);
    for namespace in &namespaces {
        assert!(!namespace.is_used(), "{namespace:?} is left");
    }
    // A row would come back with the next daemon.
    assert_eq!(env.vms(), Vec::<Value>::new());
}

/// The numbers of the lines that `fake-vmm` counted on the console.
fn counted(console: &str) -> Vec<u64> {
    console
        .lines()
        .filter_map(|line| line.trim().strip_prefix("line ")?.parse().ok())
        .collect()
}

#[test]
#[ignore = "system test"]
fn a_vm_runs_on_while_its_daemon_is_killed_and_comes_back() {
    let test = "a_vm_runs_on_while_its_daemon_is_killed_and_comes_back";
    let Some(env) = TestEnv::scripted(test, r#"{"count_every_ms": 5}"#) else {
        return;
    };
    let vm = create(&env, "otter");
    let console = env.vm_folder(id(&vm)).join("console.log");
    let lines = |path: &Path| counted(&std::fs::read_to_string(path).unwrap_or_default()).len();
    let first_daemon = env.daemon_pid().unwrap();
    env.kill_daemon();
    let then = lines(&console);
    eventually("the console goes on without a daemon", || {
        (lines(&console) > then + 20).then_some(())
    });

    let listed = env.json(&["vm", "list"]);
    assert_ne!(env.daemon_pid().unwrap(), first_daemon);
    assert_eq!(state(&listed[0]), "running");
    assert_eq!(listed[0]["phase"]["reachable"], true);
    assert_eq!(pid(&listed[0], "vmm_pid"), pid(&vm, "vmm_pid"));
    assert_eq!(pid(&listed[0], "shim_pid"), pid(&vm, "shim_pid"));
    assert_eq!(env.taps().len(), 1);
    let then = lines(&console);
    eventually("the console goes on with the new daemon", || {
        (lines(&console) > then + 20).then_some(())
    });
    let numbers = counted(&env.ok(&["vm", "logs", "otter"]));
    assert!(numbers.len() > 40, "{numbers:?}");
    assert!(
        numbers
            .iter()
            .enumerate()
            .all(|(at, number)| *number == at as u64 + 1),
        "the console has a gap: {numbers:?}"
    );

    env.ok(&["vm", "stop", "otter"]);
    let stopped = env.vm("otter");
    assert_eq!(stopped["phase"]["why"]["reason"], "asked");
    assert!(
        wait_exit(pid(&vm, "vmm_pid"), Duration::ZERO),
        "the VMM lives"
    );
    assert_eq!(env.taps(), Vec::<String>::new());
}

/// Only kill is left for a VM that is alive and does not answer.
#[track_caller]
fn assert_only_kill_is_allowed(env: &TestEnv, overlay: &Path, vmm: i32) {
    for verb in [
        &["vm", "start", "otter"][..],
        &["vm", "stop", "otter"],
        &["vm", "restart", "otter"],
        &["vm", "pause", "otter"],
        &["vm", "resume", "otter"],
        &["vm", "set", "otter", "--memory", "256"],
        &["vm", "delete", "otter"],
        &["vm", "delete", "--purge", "otter"],
    ] {
        let output = env.banger(verb);
        assert_refused(&output, 5, "otter");
        assert_eq!(openers(overlay), [vmm], "after {verb:?}");
    }
    let vm = env.vm("otter");
    assert_eq!(state(&vm), "running");
    assert_eq!(vm["phase"]["reachable"], false);
    assert_eq!(vm["spec"]["memory_mib"], 128);
}

#[test]
#[ignore = "system test"]
fn a_vm_whose_shim_was_killed_can_only_be_killed() {
    let test = "a_vm_whose_shim_was_killed_can_only_be_killed";
    let Some(env) = TestEnv::scripted(test, "") else {
        return;
    };
    let vm = create(&env, "otter");
    let overlay = env.vm_folder(id(&vm)).join("overlay.img");
    let vmm = pid(&vm, "vmm_pid");
    assert_eq!(openers(&overlay), [vmm]);
    // A VMM that is stopped cannot notice that its parent is gone.
    signal(vmm, Signal::STOP);
    signal(pid(&vm, "shim_pid"), Signal::KILL);
    env.vm_becomes("otter", "unreachable", |vm| {
        vm["phase"]["reachable"] == false
    });
    assert_only_kill_is_allowed(&env, &overlay, vmm);
    let clean = env.banger(&["host", "clean", "--force"]);
    assert!(
        clean.status == 7
            && clean.stderr.contains("VM `otter` is live")
            && clean.stderr.contains("hint: `banger vm kill otter`"),
        "{clean:?}"
    );
    assert_eq!(openers(&overlay), [vmm]);

    env.ok(&["vm", "kill", "otter"]);
    assert_eq!(env.vm("otter")["phase"]["why"]["reason"], "killed");
    assert!(wait_exit(vmm, PROMPT), "the VMM lives");
    assert_eq!(openers(&overlay), Vec::<i32>::new());
    assert_eq!(env.taps(), Vec::<String>::new());
    env.ok(&["vm", "start", "otter"]);
    env.ok(&["vm", "wait", "otter"]);
}

#[test]
#[ignore = "system test"]
fn no_second_vmm_is_started_beside_one_that_is_stopped_and_deaf() {
    let test = "no_second_vmm_is_started_beside_one_that_is_stopped_and_deaf";
    let Some(env) = TestEnv::scripted(test, "") else {
        return;
    };
    let vm = create(&env, "otter");
    let overlay = env.vm_folder(id(&vm)).join("overlay.img");
    let vmm = pid(&vm, "vmm_pid");
    signal(vmm, Signal::STOP);
    env.kill_daemon();
    signal(pid(&vm, "shim_pid"), Signal::KILL);
    assert!(wait_exit(pid(&vm, "shim_pid"), LIMIT));
    env.vm_becomes("otter", "unreachable", |vm| {
        vm["phase"]["reachable"] == false
    });
    assert_only_kill_is_allowed(&env, &overlay, vmm);

    // A second daemon comes to the same view.
    env.ok(&["daemon", "restart"]);
    assert_eq!(env.vm("otter")["phase"]["reachable"], false);
    assert_eq!(openers(&overlay), [vmm]);

    env.ok(&["vm", "kill", "otter"]);
    assert!(wait_exit(vmm, PROMPT), "the VMM lives");
    env.ok(&["vm", "start", "otter"]);
    env.ok(&["vm", "wait", "otter"]);
    assert_eq!(openers(&overlay).len(), 1);
}

#[test]
#[ignore = "system test"]
fn a_vmm_that_ignores_everything_is_ended_when_its_time_is_up() {
    let test = "a_vmm_that_ignores_everything_is_ended_when_its_time_is_up";
    let Some(env) = TestEnv::scripted(test, r#"{"ignore_powerdown": true}"#) else {
        return;
    };
    let vm = create(&env, "otter");
    env.ok(&["vm", "stop", "otter", "--timeout", "200ms"]);
    assert_eq!(
        env.vm("otter")["phase"]["why"]["reason"],
        "asked-then-forced"
    );
    assert!(
        wait_exit(pid(&vm, "vmm_pid"), Duration::ZERO),
        "the VMM lives"
    );
}

/// What must be the same after a database was lost.
fn identity(vms: &[Value]) -> Vec<(String, String, String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut all: Vec<_> = vms
        .iter()
        .map(|vm| {
            let trashed = if vm["trashed_at"].is_null() {
                ""
            } else {
                "trashed "
            };
            (
                text(&vm["id"]),
                text(&vm["name"]),
                format!("{trashed}{} {}", state(vm), vm["attempt"]["vmm_pid"]),
                text(&vm["address"]),
            )
        })
        .collect();
    all.sort();
    all
}

/// A running VM, one that was stopped, one that never ran, and one in the trash.
fn population(env: &TestEnv) -> Vec<(String, String, String, String)> {
    create(env, "running");
    create(env, "stopped");
    env.ok(&["vm", "stop", "stopped"]);
    create_stopped(env, "fresh");
    create_stopped(env, "trashed");
    env.ok(&["vm", "delete", "trashed"]);
    let vms = env.vms();
    assert_eq!(vms.len(), 4);
    identity(&vms)
}

/// What is in the database's log and not yet in its file.
fn wal_bytes(env: &TestEnv) -> u64 {
    let wal = env.state().join("banger.db-wal");
    wal.metadata().map_or(0, |metadata| metadata.len())
}

fn remove_companions(env: &TestEnv) {
    for suffix in ["-wal", "-shm"] {
        let path = env.state().join(format!("banger.db{suffix}"));
        if path.exists() {
            std::fs::remove_file(path).unwrap();
        }
    }
}

#[test]
#[ignore = "system test"]
fn a_lost_database_is_made_again_from_the_folders() {
    let test = "a_lost_database_is_made_again_from_the_folders";
    let Some(env) = TestEnv::scripted(test, "") else {
        return;
    };
    let before = population(&env);
    env.ok(&["daemon", "stop"]);
    std::fs::remove_file(env.database()).unwrap();
    remove_companions(&env);
    assert_eq!(identity(&env.vms()), before);
    assert_notices(&env, "`stopped` was rebuilt from its folder");
    env.ok(&["vm", "stop", "running"]);
    env.ok(&["vm", "start", "fresh"]);
}

#[track_caller]
fn assert_notices(env: &TestEnv, wanted: &str) {
    let notices = env.json(&["daemon", "status"])["notices"].clone();
    assert!(notices.to_string().contains(wanted), "{notices}");
}

#[test]
#[ignore = "system test"]
fn a_truncated_database_is_made_again_and_the_daemon_says_so() {
    let test = "a_truncated_database_is_made_again_and_the_daemon_says_so";
    let Some(env) = TestEnv::scripted(test, "") else {
        return;
    };
    let before = population(&env);
    // How long the file is after, and whether what is left is recognisably damaged: an empty file is an empty database.
    for (what, length, damaged) in [
        ("100 bytes", Some(100), true),
        ("nothing", Some(0), false),
        ("half its pages", None, true),
    ] {
        env.ok(&["daemon", "stop"]);
        assert_eq!(wal_bytes(&env), 0, "the file alone is not whole");
        remove_companions(&env);
        let file = std::fs::File::options()
            .write(true)
            .open(env.database())
            .unwrap();
        let pages = file.metadata().unwrap().len() / 4096;
        assert!(pages > 2, "{what}: {pages} pages");
        file.set_len(length.unwrap_or(pages / 2 * 4096)).unwrap();
        drop(file);
        assert_eq!(identity(&env.vms()), before, "{what}");
        assert_notices(&env, "`running` was rebuilt from its folder");
        if damaged {
            assert_notices(&env, "the database was damaged");
        }
    }
    env.ok(&["vm", "stop", "running"]);
}

#[test]
#[ignore = "system test"]
fn a_newer_database_is_refused_and_not_touched() {
    let test = "a_newer_database_is_refused_and_not_touched";
    let Some(env) = TestEnv::scripted(test, "") else {
        return;
    };
    create_stopped(&env, "otter");
    env.ok(&["daemon", "stop"]);
    assert_eq!(wal_bytes(&env), 0);
    let ours = std::fs::read(env.database()).unwrap();
    let mut newer = ours.clone();
    // The schema's version in the header of a SQLite file, big end first.
    newer[60..64].copy_from_slice(&99_u32.to_be_bytes());
    std::fs::write(env.database(), &newer).unwrap();
    for args in [&["vm", "list"][..], &["daemon", "start"]] {
        let output = env.banger(args);
        assert_refused(&output, 11, "newer banger");
        assert!(output.stderr.contains("99"), "{output:?}");
    }
    assert!(
        std::fs::read(env.database()).unwrap() == newer,
        "the file changed"
    );
    assert_eq!(env.daemon_pid(), None);
    std::fs::write(env.database(), &ours).unwrap();
    assert_eq!(env.vms().len(), 1);
}

#[test]
#[ignore = "system test"]
fn stopping_the_daemon_stops_vms_only_if_asked() {
    let Some(env) = TestEnv::scripted("stopping_the_daemon_stops_vms_only_if_asked", "") else {
        return;
    };
    let vm = create(&env, "otter");
    env.ok(&["daemon", "stop"]);
    let left = env.host();
    assert_eq!(left.running("bangerd"), Vec::<i32>::new());
    assert_eq!(left.running("fake-vmm"), [pid(&vm, "vmm_pid")]);
    assert!(!env.socket().exists());

    env.ok(&["daemon", "restart"]);
    let again = env.vm("otter");
    assert_eq!(pid(&again, "vmm_pid"), pid(&vm, "vmm_pid"));
    env.ok(&["daemon", "restart"]);
    assert_eq!(pid(&env.vm("otter"), "vmm_pid"), pid(&vm, "vmm_pid"));

    env.ok(&["daemon", "stop"]);
    env.ok(&["daemon", "stop", "--vms"]);
    assert_eq!(env.host(), Host::default());
    let stopped = env.vm("otter");
    assert_eq!(state(&stopped), "stopped");
    assert_eq!(stopped["phase"]["why"]["reason"], "asked");
}

/// Two running VMs, of which `otter` has autostart.
fn otter_and_finch(env: &TestEnv) -> [Value; 2] {
    let vms = ["otter", "finch"].map(|name| create(env, name));
    env.ok(&["vm", "set", "otter", "--autostart", "on"]);
    vms
}

/// Waits until `otter` has come back by itself, finds `finch` stopped with `reason`, and has it restored.
#[track_caller]
fn assert_come_back(env: &TestEnv, reason: &str) {
    env.ok(&["daemon", "start"]);
    eventually("otter comes back by itself", || {
        (state(&env.vm("otter")) == "running").then_some(())
    });
    let finch = env.vm("finch");
    assert_eq!(
        (state(&finch), finch["desired"].as_str()),
        ("stopped", Some("on")),
        "{finch:#}"
    );
    assert_eq!(finch["phase"]["why"]["reason"], reason);
    env.ok(&["vm", "restore"]);
    assert_eq!(state(&env.vm("finch")), "running");
    env.ok(&["daemon", "stop", "--vms"]);
}

#[test]
#[ignore = "system test"]
fn vms_are_stopped_because_the_host_goes_down_and_only_then_and_are_still_to_run() {
    let Some(env) = TestEnv::scripted(
        "vms_are_stopped_because_the_host_goes_down_and_only_then_and_are_still_to_run",
        "",
    ) else {
        return;
    };
    // In systemd's place: the first word of its file is what it says of host and user.
    let programs = env.folder().join("systemd");
    std::fs::create_dir(&programs).unwrap();
    let systemctl = programs.join("systemctl");
    let says = |host: &str, user: &str| {
        let script =
            format!("#!/bin/sh\n[ \"$1\" = --user ] && echo {user} || echo {host}\nexit 1\n");
        std::fs::write(&systemctl, script).unwrap();
        let all = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&systemctl, all).unwrap();
    };
    let path = format!(
        "{}:{}",
        programs.display(),
        std::env::var("PATH").unwrap_or_default()
    );
    let stop = || {
        let output = env.banger_with(
            &[("PATH", &path)],
            &["daemon", "stop", "--vms", "--if-going-down"],
        );
        assert_eq!(output.status, 0, "{output:?}");
    };
    let vms = otter_and_finch(&env);
    says("running", "running");
    stop();
    let otter = env.vm("otter");
    assert_eq!(pid(&otter, "vmm_pid"), pid(&vms[0], "vmm_pid"));

    for (host, user, reason) in [
        ("running", "stopping", "user-logged-out"),
        ("stopping", "stopping", "host-shut-down"),
    ] {
        says(host, user);
        stop();
        assert_eq!(env.host(), Host::default());
        assert_come_back(&env, reason);
        env.ok(&["vm", "start", "otter"]);
        env.ok(&["vm", "start", "finch"]);
    }
    env.ok(&["daemon", "stop", "--vms"]);
}

#[test]
#[ignore = "system test"]
fn after_a_reboot_of_the_host_vms_say_so_and_come_back() {
    let Some(env) = TestEnv::scripted("after_a_reboot_of_the_host_vms_say_so_and_come_back", "")
    else {
        return;
    };
    let vms = otter_and_finch(&env);
    // What a power cut leaves: no process, and files of another boot.
    env.kill_daemon();
    for vm in &vms {
        for which in ["shim_pid", "vmm_pid"] {
            let pid = pid(vm, which);
            signal(pid, Signal::KILL);
            assert!(wait_exit(pid, LIMIT), "{which} does not die");
        }
        let path = env.vm_folder(id(vm)).join("run/attempt.json");
        let mut attempt: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        attempt["boot_id"] = "another".into();
        std::fs::write(&path, attempt.to_string()).unwrap();
    }
    std::fs::write(env.state().join("boot"), "another").unwrap();
    assert_come_back(&env, "host-rebooted");
}

#[test]
#[ignore = "system test"]
fn a_daemon_whose_stop_was_given_up_starts_vms_again() {
    let test = "a_daemon_whose_stop_was_given_up_starts_vms_again";
    let Some(env) = TestEnv::scripted(test, r#"{"ignore_powerdown": true}"#) else {
        return;
    };
    create(&env, "otter");
    create_stopped(&env, "fox");
    let mut stop = env.command("banger");
    let mut stop = stop.args(["daemon", "stop", "--vms"]).spawn().unwrap();
    env.vm_becomes("otter", "stopping", |vm| state(vm) == "stopping");
    assert_refused(&env.banger(&["vm", "start", "fox"]), 3, "going down");
    stop.kill().unwrap();
    stop.wait().unwrap();
    eventually("it starts VMs", || {
        (env.banger(&["vm", "start", "fox"]).status == 0).then_some(())
    });
    env.ok(&["vm", "delete", "--force", "--purge", "fox"]);
    env.ok(&["vm", "delete", "--force", "--purge", "otter"]);
}

#[test]
#[ignore = "system test"]
fn a_socket_that_was_removed_is_made_again() {
    let Some(env) = TestEnv::scripted("a_socket_that_was_removed_is_made_again", "") else {
        return;
    };
    env.ok(&["daemon", "start"]);
    let daemon = env.daemon_pid().unwrap();
    std::fs::remove_file(env.socket()).unwrap();
    let removed = std::time::Instant::now();
    eventually("the socket is made again", || {
        env.socket().exists().then_some(())
    });
    // The daemon looks every five seconds.
    assert!(removed.elapsed() < 2 * PROMPT);
    env.ok(&["vm", "list"]);
    assert_eq!(env.daemon_pid(), Some(daemon));
}

#[test]
#[ignore = "system test"]
fn the_socket_of_a_daemon_that_died_is_no_obstacle() {
    let Some(env) = TestEnv::scripted("the_socket_of_a_daemon_that_died_is_no_obstacle", "") else {
        return;
    };
    env.ok(&["daemon", "start"]);
    env.kill_daemon();
    assert!(env.socket().exists());
    env.ok(&["vm", "list"]);
}

fn on_runtime<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let work = async { tokio::time::timeout(LIMIT, work).await };
    runtime.unwrap().block_on(work).expect("it ends in time")
}

#[test]
#[ignore = "system test"]
fn a_repeated_creation_with_the_same_key_makes_one_vm() {
    let test = "a_repeated_creation_with_the_same_key_makes_one_vm";
    let Some(env) = TestEnv::scripted(test, "") else {
        return;
    };
    env.ok(&["daemon", "start"]);
    let client = Client::new(env.socket());
    let request = CreateVm {
        image: Some("tiny".to_owned()),
        memory_mib: Some(128),
        ..CreateVm::default()
    };
    let make = |key: &'static str| {
        let vm = on_runtime(client.call_identified::<PostVms>(&[], &request, Some(key)));
        vm.unwrap().0.id
    };
    let first = make("a");
    assert_eq!(make("a"), first);
    assert_ne!(make("b"), first);
    // The key is as durable as the VM.
    env.kill_daemon();
    env.ok(&["daemon", "start"]);
    assert_eq!(make("a"), first);
    assert_eq!(env.vms().len(), 2);
}

#[test]
#[ignore = "system test"]
fn events_go_on_after_a_cursor_and_tell_of_what_was_missed() {
    let test = "events_go_on_after_a_cursor_and_tell_of_what_was_missed";
    let Some(env) = TestEnv::scripted(test, "") else {
        return;
    };
    env.ok(&["daemon", "start"]);
    let client = Client::new(env.socket());
    let follow = async |after: Option<Cursor>| -> (Lines<Event>, Event) {
        let request = FollowEvents { after };
        let mut lines = client.lines::<GetEvents>(&[], &request).await.unwrap();
        let hello = lines.next().await.unwrap().unwrap();
        (lines, hello)
    };
    on_runtime(async {
        let (mut lines, hello) = follow(None).await;
        assert!(matches!(hello.kind, EventKind::Hello { missed: false }));
        create_stopped(&env, "first");
        let seen = lines.next().await.unwrap().unwrap();
        drop(lines);
        // The stream is broken; meanwhile more happens.
        create_stopped(&env, "second");
        let (mut lines, hello) = follow(Some(seen.cursor.clone())).await;
        assert!(
            matches!(hello.kind, EventKind::Hello { missed: false }),
            "{hello:?}"
        );
        let next = lines.next().await.unwrap().unwrap();
        assert_eq!(next.cursor.epoch, seen.cursor.epoch);
        assert_eq!(next.cursor.sequence, seen.cursor.sequence + 1);
        assert!(matches!(&next.kind, EventKind::VmChanged { vm } if vm.name.as_str() == "second"));
        // Another daemon knows nothing of that epoch, and says so.
        env.ok(&["daemon", "restart"]);
        let (_, hello) = follow(Some(next.cursor)).await;
        assert!(
            matches!(hello.kind, EventKind::Hello { missed: true }),
            "{hello:?}"
        );
    });
}

#[test]
#[ignore = "system test"]
fn the_daemon_serves_the_document_that_is_checked_in() {
    let test = "the_daemon_serves_the_document_that_is_checked_in";
    let Some(env) = TestEnv::scripted(test, "") else {
        return;
    };
    env.ok(&["daemon", "start"]);
    let mut stream = UnixStream::connect(env.socket()).unwrap();
    stream
        .write_all(b"GET /v1/openapi.json HTTP/1.0\r\nHost: banger\r\n\r\n")
        .unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    let (head, body) = reply.split_once("\r\n\r\n").unwrap();
    assert!(
        head.starts_with("HTTP/1.0 200") || head.starts_with("HTTP/1.1 200"),
        "{head}"
    );
    let served: Value = serde_json::from_str(body).unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../banger-api/openapi.json");
    let checked_in: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert!(served == checked_in, "the document served is another one");
}
