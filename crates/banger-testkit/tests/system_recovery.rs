//! What is broken by hand, and what becomes of it: whole daemons, with `fake-vmm` as their VMM.

use banger_testkit::env::TestEnv;
use banger_testkit::host::Host;
use banger_testkit::run::{LIMIT, eventually, signal, wait_exit};
use banger_testkit::skip::skip;
use rustix::process::Signal;
use serde_json::Value;
use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::os::unix::fs::MetadataExt;

/// An address of the loopback that no other world uses.
fn published(env: &TestEnv) -> SocketAddrV4 {
    let [_, b, c, _] = env.pool().octets();
    SocketAddrV4::new(Ipv4Addr::new(127, b, c, 1), 8080)
}

/// A VM that runs, has NAT, and leads a port of the host into its guest.
fn otter(env: &TestEnv) -> Value {
    let port = format!("{}:80", published(env));
    env.json(&[
        "vm",
        "create",
        "--name",
        "otter",
        "--image",
        "tiny",
        "--nat",
        "--publish",
        &port,
    ])
}

fn keeper(env: &TestEnv) -> Option<i32> {
    env.host().running("banger-netns").first().copied()
}

fn kill(pid: i32) {
    signal(pid, Signal::KILL);
}

#[track_caller]
fn eventually_whole(env: &TestEnv, namespaces: &BTreeSet<String>, not: i32) {
    eventually("another keeper holds the same network", || {
        let now = keeper(env).filter(|now| *now != not)?;
        let status = env.json(&["nat", "status"]);
        let vm = &status["vms"][0];
        let whole = vm["nat_now"] == true
            && vm["ports"][0]["open"] == true
            && env.taps().len() == 1
            && TcpStream::connect(published(env)).is_ok();
        whole.then_some(now)
    });
    assert_eq!(env.host().namespaces, *namespaces);
}

#[test]
#[ignore = "system test"]
fn a_namespace_that_loses_its_keeper_gets_another_and_its_vms_notice_nothing() {
    let test = "a_namespace_that_loses_its_keeper_gets_another_and_its_vms_notice_nothing";
    let Some(env) = TestEnv::scripted(test, "") else {
        return;
    };
    let before = otter(&env);
    let host = env.host();
    let first = keeper(&env).unwrap();
    kill(first);
    eventually_whole(&env, &host.namespaces, first);

    // With the daemon gone as well, it is the VM's shim that knows the way.
    let second = keeper(&env).unwrap();
    env.kill_daemon();
    kill(second);
    assert!(wait_exit(second, LIMIT));
    env.ok(&["daemon", "start"]);
    eventually_whole(&env, &host.namespaces, second);

    let after = env.vm("otter");
    assert_eq!(after["attempt"]["vmm_pid"], before["attempt"]["vmm_pid"]);
    env.ok(&["vm", "stop", "otter"]);
    assert!(TcpStream::connect(published(&env)).is_err());
    env.ok(&["vm", "delete", "--purge", "otter"]);
    env.ok(&["daemon", "stop"]);
    assert_eq!(env.host(), Host::default());
}

#[test]
#[ignore = "system test"]
fn a_vm_that_no_daemon_can_talk_to_keeps_its_network_as_long_as_it_lives() {
    let test = "a_vm_that_no_daemon_can_talk_to_keeps_its_network_as_long_as_it_lives";
    let Some(env) = TestEnv::scripted(test, "") else {
        return;
    };
    let vm = otter(&env);
    let pid = |key: &str| i32::try_from(vm["attempt"][key].as_i64().unwrap()).unwrap();
    let before = env.host();
    // A VMM that is stopped cannot notice that its parent is gone.
    signal(pid("vmm_pid"), Signal::STOP);
    env.kill_daemon();
    kill(pid("shim_pid"));
    assert!(wait_exit(pid("shim_pid"), LIMIT));
    env.ok(&["daemon", "start"]);
    env.vm_becomes("otter", "unreachable", |vm| {
        vm["phase"]["reachable"] == false
    });
    let network = || {
        let status = env.json(&["nat", "status"]);
        let vm = &status["vms"][0];
        let nat = vm["nat_now"] == true && status["way_out"]["state"] == "open";
        nat && vm["ports"][0]["open"] == true
    };
    assert!(network());
    assert_eq!(env.host().links, before.links);
    assert!(TcpStream::connect(published(&env)).is_ok());

    env.ok(&["vm", "kill", "otter"]);
    assert!(!network());
    env.ok(&["vm", "start", "otter"]);
    assert!(network());
}

#[test]
#[ignore = "system test"]
fn an_old_database_put_back_loses_no_vm_and_no_change() {
    let Some(env) = TestEnv::scripted("an_old_database_put_back_loses_no_vm_and_no_change", "")
    else {
        return;
    };
    let create = |name| {
        env.ok(&[
            "vm",
            "create",
            "--name",
            name,
            "--image",
            "tiny",
            "--no-start",
        ]);
    };
    create("ant");
    env.ok(&["daemon", "stop"]);
    let old = std::fs::read(env.database()).unwrap();
    create("bee");
    env.ok(&["vm", "set", "--memory", "333", "ant"]);
    env.ok(&["vm", "delete", "bee"]);
    env.ok(&["daemon", "stop"]);
    std::fs::write(env.database(), old).unwrap();

    let vms = env.vms();
    let fact = |vm: &Value| {
        (
            vm["name"].as_str().unwrap().to_owned(),
            vm["trashed_at"].is_null(),
        )
    };
    let facts: BTreeSet<_> = vms.iter().map(fact).collect();
    let wanted = [("ant".to_owned(), true), ("bee".to_owned(), false)];
    assert_eq!(facts, BTreeSet::from(wanted));
    assert_eq!(env.vm("ant")["spec"]["memory_mib"], 333);
    let status = env.ok(&["daemon", "status"]);
    assert!(status.contains("was newer than the database"), "{status}");
}

#[test]
#[ignore = "system test"]
fn names_that_moved_since_an_old_database_are_given_back_whole() {
    let test = "names_that_moved_since_an_old_database_are_given_back_whole";
    let Some(env) = TestEnv::scripted(test, "") else {
        return;
    };
    let create = |name| {
        env.json(&[
            "vm",
            "create",
            "--name",
            name,
            "--image",
            "tiny",
            "--no-start",
        ])
    };
    let ids = ["ant", "bee", "cat"].map(|name| create(name)["id"].clone());
    env.ok(&["daemon", "stop"]);
    let old = std::fs::read(env.database()).unwrap();
    // Two swap their names, and one name goes to a VM that the old database does not know.
    for [from, to] in [["ant", "x"], ["bee", "ant"], ["x", "bee"], ["cat", "dog"]] {
        env.ok(&["vm", "set", from, "--name", to]);
    }
    let new = create("cat")["id"].clone();
    env.ok(&["daemon", "stop"]);
    std::fs::write(env.database(), &old).unwrap();

    let names = |env: &TestEnv| {
        [&ids[0], &ids[1], &ids[2], &new].map(|id| {
            let vm = env.vms().into_iter().find(|vm| vm["id"] == *id);
            vm.unwrap()["name"].as_str().unwrap().to_owned()
        })
    };
    assert_eq!(names(&env), ["bee", "ant", "dog", "cat"]);

    // A folder that lost its mirror leaves the row, whose name another VM has by now.
    env.ok(&["daemon", "stop"]);
    std::fs::write(env.database(), &old).unwrap();
    let mirror = env.vm_folder(ids[0].as_str().unwrap()).join("vm.json");
    std::fs::remove_file(mirror).unwrap();
    assert_eq!(names(&env), ["ant", "ant-2", "dog", "cat"]);
    env.ok(&["daemon", "stop"]);
    assert_eq!(names(&env), ["ant", "ant-2", "dog", "cat"]);
}

#[test]
#[ignore = "system test"]
fn a_paused_vm_that_was_to_stop_goes_on_and_is_asked() {
    let Some(env) = TestEnv::scripted("a_paused_vm_that_was_to_stop_goes_on_and_is_asked", "")
    else {
        return;
    };
    let vm = otter(&env);
    env.ok(&["vm", "pause", "otter"]);
    env.ok(&["daemon", "stop"]);
    env.edit_mirror(vm["id"].as_str().unwrap(), |record| {
        record["desired"] = "off".into();
    });
    let stopped = env.vm_becomes("otter", "stopped", |vm| vm["phase"]["state"] == "stopped");
    assert_eq!(stopped["phase"]["why"]["reason"], "asked");
}

#[test]
#[ignore = "system test"]
fn a_reset_that_was_promised_is_finished_by_a_start_or_told() {
    let test = "a_reset_that_was_promised_is_finished_by_a_start_or_told";
    let Some(env) = TestEnv::scripted(test, "") else {
        return;
    };
    let vm = otter(&env);
    env.ok(&["vm", "stop", "otter"]);
    env.ok(&["daemon", "stop"]);
    let id = vm["id"].as_str().unwrap();
    env.edit_mirror(id, |record| record["reset_pending"] = true.into());
    // Its place is taken, so the fresh overlay cannot be made.
    let folder = env.vm_folder(id);
    let in_the_way = folder.join("overlay.fresh");
    std::fs::create_dir(&in_the_way).unwrap();
    let refused = env.banger(&["vm", "start", "otter"]);
    assert!(refused.status != 0, "{refused:?}");
    let why = env.ok(&["vm", "why", "otter"]);
    assert!(
        why.contains("cannot finish the reset that was started earlier"),
        "{why}"
    );

    std::fs::remove_dir(&in_the_way).unwrap();
    let written = || folder.join("overlay.img").metadata().unwrap().ino();
    let before = written();
    env.ok(&["vm", "start", "otter"]);
    assert_ne!(written(), before);
    env.ok(&["vm", "delete", "--force", "--purge", "otter"]);
}

#[test]
#[ignore = "system test"]
fn a_run_whose_file_was_torn_by_a_power_cut_is_told() {
    let Some(env) = TestEnv::scripted("a_run_whose_file_was_torn_by_a_power_cut_is_told", "")
    else {
        return;
    };
    let vm = otter(&env);
    env.kill_daemon();
    for which in ["shim_pid", "vmm_pid"] {
        let pid = i32::try_from(vm["attempt"][which].as_i64().unwrap()).unwrap();
        kill(pid);
        assert!(wait_exit(pid, LIMIT));
    }
    let run = env.vm_folder(vm["id"].as_str().unwrap()).join("run");
    std::fs::write(run.join("attempt.json"), "").unwrap();
    let stopped = env.vm("otter");
    assert_eq!(stopped["phase"]["state"], "stopped");
    assert_eq!(stopped["phase"]["why"]["reason"], "unknown");
    let why = env.ok(&["vm", "why", "otter"]);
    assert!(why.contains("attempt.json"), "{why}");
    assert!(!run.exists());
    env.ok(&["vm", "start", "otter"]);
    env.ok(&["vm", "delete", "--force", "--purge", "otter"]);
}

#[test]
#[ignore = "system test"]
fn a_disk_that_is_gone_is_named_and_nothing_is_made_in_its_place() {
    let test = "a_disk_that_is_gone_is_named_and_nothing_is_made_in_its_place";
    let Some(env) = TestEnv::scripted(test, "") else {
        return;
    };
    let vm = otter(&env);
    env.ok(&["vm", "stop", "otter"]);
    let overlay = env
        .vm_folder(vm["id"].as_str().unwrap())
        .join("overlay.img");
    let aside = env.folder().join("aside");
    std::fs::rename(&overlay, &aside).unwrap();
    let refused = env.banger(&["vm", "start", "otter"]);
    assert!(refused.status != 0, "{refused:?}");
    assert!(refused.stderr.contains("overlay.img"), "{refused:?}");
    assert!(!overlay.exists());
    std::fs::rename(&aside, &overlay).unwrap();
    env.ok(&["vm", "start", "otter"]);
    env.ok(&["vm", "delete", "--force", "--purge", "otter"]);
}

#[test]
#[ignore = "system test"]
fn a_port_that_was_deleted_by_hand_is_told_and_made_again_by_the_next_start() {
    let test = "a_port_that_was_deleted_by_hand_is_told_and_made_again_by_the_next_start";
    let Some(env) = TestEnv::scripted(test, "") else {
        return;
    };
    otter(&env);
    let keeper = keeper(&env).unwrap();
    let tap = env.taps().remove(0);
    #[expect(clippy::disallowed_methods, reason = "breaks the host by hand")]
    let deleted = std::process::Command::new("nsenter")
        .arg(format!("--net=/proc/{keeper}/ns/net"))
        .args(["--", "ip", "link", "delete", &tap])
        .status();
    assert!(deleted.unwrap().success());
    let repaired = env.banger(&["doctor", "--repair"]);
    assert!(repaired.stdout.contains(&tap), "{repaired:?}");
    assert_eq!(env.taps(), std::slice::from_ref(&tap));
    env.ok(&["vm", "restart", "otter"]);
    assert_eq!(env.taps(), [tap]);
    env.ok(&["vm", "delete", "--force", "--purge", "otter"]);
    assert_eq!(env.taps(), Vec::<String>::new());
}

#[test]
#[ignore = "system test"]
fn a_lock_that_somebody_else_holds_refuses_the_start_and_kills_nobody() {
    let test = "a_lock_that_somebody_else_holds_refuses_the_start_and_kills_nobody";
    let Some(env) = TestEnv::scripted(test, "") else {
        return;
    };
    let vm = otter(&env);
    env.ok(&["vm", "stop", "otter"]);
    let lock = env.vm_folder(vm["id"].as_str().unwrap()).join("vm.lock");
    let held = std::fs::File::open(&lock).unwrap();
    eventually("the lock is free", || held.try_lock().ok());
    let refused = env.banger(&["vm", "start", "otter"]);
    assert_eq!(refused.status, 5, "{refused:?}");
    assert!(refused.stderr.contains("vm.lock"), "{refused:?}");
    assert_eq!(env.vm("otter")["phase"]["state"], "stopped");
    assert_eq!(env.vm("otter")["phase"]["why"]["reason"], "asked");
    // Not by closing it, of which another test's child may hold a copy until it becomes another program.
    held.unlock().unwrap();
    env.ok(&["vm", "start", "otter"]);
    env.ok(&["vm", "delete", "--force", "--purge", "otter"]);
}

#[test]
#[ignore = "system test"]
fn a_whole_name_in_the_trash_is_meant_before_a_prefix_outside_it() {
    let test = "a_whole_name_in_the_trash_is_meant_before_a_prefix_outside_it";
    let Some(env) = TestEnv::scripted(test, "") else {
        return;
    };
    for name in ["otter", "otter-2"] {
        env.ok(&[
            "vm",
            "create",
            "--name",
            name,
            "--image",
            "tiny",
            "--no-start",
        ]);
    }
    env.ok(&["vm", "delete", "otter"]);
    env.ok(&["vm", "delete", "--purge", "otter"]);
    assert_eq!(env.vms().len(), 1);
    assert_eq!(env.vm("otter-2")["phase"]["state"], "stopped");
    // Alone, its prefix is enough.
    env.ok(&["vm", "delete", "--purge", "otter"]);
    assert_eq!(env.vms(), Vec::<Value>::new());
}

#[test]
#[ignore = "system test"]
fn a_folder_that_is_removed_while_its_vm_runs_ends_as_stopped() {
    let test = "a_folder_that_is_removed_while_its_vm_runs_ends_as_stopped";
    let Some(env) = TestEnv::scripted(test, "") else {
        return;
    };
    let vm = otter(&env);
    let pid = |which: &str| i32::try_from(vm["attempt"][which].as_i64().unwrap()).unwrap();
    std::fs::remove_dir_all(env.vm_folder(vm["id"].as_str().unwrap())).unwrap();
    kill(pid("vmm_pid"));
    env.vm_becomes("otter", "stopped", |vm| vm["phase"]["state"] == "stopped");
    env.ok(&["vm", "delete", "--purge", "otter"]);
    assert_eq!(env.vms(), Vec::<Value>::new());
}

/// What stands between the daemon and the clock of the host: it adds the seconds that a file says.
const CLOCK: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    const char *path = getenv("TEST_CLOCK");
    FILE *file = path && !failed && clock == CLOCK_REALTIME ? fopen(path, "r") : NULL;
    long seconds = 0;
    if (file) {
        if (fscanf(file, "%ld", &seconds) == 1) now->tv_sec += seconds;
        fclose(file);
    }
    return failed;
}
"#;

#[test]
#[ignore = "system test"]
fn a_clock_that_is_set_back_or_forward_costs_no_vm_and_empties_no_trash() {
    let test = "a_clock_that_is_set_back_or_forward_costs_no_vm_and_empties_no_trash";
    let Some(env) = TestEnv::scripted(test, "") else {
        return;
    };
    let (source, library) = (env.folder().join("clock.c"), env.folder().join("clock.so"));
    std::fs::write(&source, CLOCK).unwrap();
    #[expect(clippy::disallowed_methods, reason = "makes what the test needs")]
    let compiled = std::process::Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .args([&library, &source])
        .status();
    if !compiled.is_ok_and(|status| status.success()) {
        skip(test, "there is no C compiler for a clock of the test's own");
        return;
    }
    let clock = env.folder().join("clock");
    let text = |path: &std::path::Path| path.display().to_string();
    let (library, path) = (text(&library), text(&clock));
    let variables = [("LD_PRELOAD", library.as_str()), ("TEST_CLOCK", &path)];
    let ok = |args: &[&str]| {
        let output = env.banger_with(&variables, args);
        assert_eq!(
            output.status,
            0,
            "{args:?}: {output:?}\n{}",
            env.daemon_log()
        );
        output.stdout
    };
    let json = |args: &[&str]| -> Value {
        serde_json::from_str(&ok(&[args, &["--json"]].concat())).unwrap()
    };
    let create = |name| {
        let create = ["vm", "create", "--wait", "--image", "tiny", "--memory"];
        json(&[&create[..], &["128", "--name", name]].concat())
    };
    let names = |list: &[&str]| -> Vec<String> {
        let vms = json(&[&["vm", "list"], list].concat());
        let vms = vms.as_array().unwrap().iter();
        vms.map(|vm| vm["name"].as_str().unwrap().to_owned())
            .collect()
    };
    let year = |vm: &Value| -> u32 { vm["created_at"].as_str().unwrap()[..4].parse().unwrap() };

    std::fs::write(&clock, "0").unwrap();
    create("otter");
    create("owl");
    ok(&["vm", "delete", "--force", "owl"]);
    for days in [-800, 800] {
        let otter = json(&["vm", "show", "otter"]);
        // While the daemon runs, and then for one that has never seen another time.
        std::fs::write(&clock, format!("{}", i64::from(days) * 86_400)).unwrap();
        for restart in [false, true] {
            if restart {
                ok(&["daemon", "stop"]);
            }
            assert_eq!(names(&[]), ["otter"], "{days} {restart}");
            assert_eq!(names(&["--trash"]), ["owl"], "{days} {restart}");
            let now = json(&["vm", "show", "otter"]);
            assert_eq!(now["attempt"]["vmm_pid"], otter["attempt"]["vmm_pid"]);
            // It really is another time.
            let fox = create("fox");
            assert!(year(&fox).abs_diff(year(&otter)) >= 2, "{fox}");
            ok(&["vm", "pause", "fox"]);
            ok(&["vm", "resume", "fox"]);
            ok(&["vm", "stop", "fox"]);
            ok(&["vm", "start", "fox", "--wait"]);
            ok(&["vm", "why", "fox"]);
            ok(&["vm", "delete", "--force", "fox"]);
            ok(&["vm", "undelete", "fox"]);
            ok(&["vm", "delete", "--purge", "fox"]);
        }
        ok(&["vm", "restart", "otter"]);
        std::fs::write(&clock, "0").unwrap();
        ok(&["vm", "stop", "otter"]);
        ok(&["vm", "start", "otter", "--wait"]);
        assert_eq!(names(&["--trash"]), ["owl"]);
        let otter = json(&["vm", "show", "otter"]);
        assert_eq!(otter["phase"]["state"], "running", "{otter}");
        ok(&["vm", "undelete", "owl"]);
        ok(&["vm", "delete", "owl"]);
    }
    ok(&["vm", "delete", "--force", "--purge", "otter"]);
    ok(&["vm", "delete", "--purge", "owl"]);
    ok(&["daemon", "stop"]);
    assert_eq!(env.host(), Host::default());
}
