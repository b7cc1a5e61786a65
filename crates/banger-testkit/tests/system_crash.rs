//! The daemon aborts before and after every step of every verb, and once more while it recovers; and so does the
//! helper, at every change of the host that it makes. What is on the host is always what the records say, and every VM
//! is there wholly or not at all.
//!
//! The points are not listed anywhere: each verb is run once with `BANGER_CRASH_TRACE`, which notes all that it passes.
//! In every mode there are first aborts at all points of all verbs. Second aborts, during the repair, are for all of
//! them as root, and else for those verbs that change the host's network, in which alone the modes differ. With a real
//! guest there is one abort for each verb and mode.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod crash;

use banger_testkit::env::{TestEnv, Vmm};
use banger_testkit::machine::{Mode, on_a_thread};
use banger_testkit::run::eventually;
use crash::compare::assert_host_is_records;
use crash::place::{Place, two_at_a_time};
use crash::{
    CREATE, DELETE, FORCE, HELPED, NAT, PUBLISH, PURGE, RESET, SCENES, START, STOP, Scene,
    UNDELETE, assert_fired, banger, crash, file, jobs, lines, named_in_sources, ok, points,
    settled, traced,
};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// After the recovery: all is as the records say, what was acknowledged is there, and everything works on.
fn assert_recovered(place: &Place, env: TestEnv, scene: &Scene, at: &str) {
    let vm = settled(&env, scene.verb);
    // From here on, the VMM starts.
    if scene.status != 0 {
        env.script("{}");
    }
    assert_host_is_records(place, &env, at, vm.as_ref());
    match (&vm, scene.verb) {
        (None, "create" | "purge" | "forced purge" | "purge from the trash") => {
            ok(&env, CREATE, at)
        }
        // Its creation was acknowledged, and nobody asked for its end.
        (None, _) => panic!("{at}: the VM is lost"),
        (Some(vm), _) if !vm["trashed_at"].is_null() => {
            ok(&env, PURGE, at);
            // A name in the trash is free.
            ok(&env, CREATE, at);
        }
        (Some(_), _) => {}
    }
    ok(&env, START, at);
    // What of the network was thought to be there, though it was not, shows now.
    if scene.network {
        let vm = settled(&env, "start");
        assert_host_is_records(place, &env, &format!("{at}, started again"), vm.as_ref());
    }
    ok(&env, STOP, at);
    ok(&env, PURGE, at);
    assert_eq!(env.vm_folders(), Vec::<String>::new(), "{at}");
    assert_eq!(env.vms(), Vec::<Value>::new(), "{at}");
    place.leave(env, at);
}

/// What the recovery from an abort passes, as far as the VM's rest.
fn crash_once(place: &Place, scene: &Scene, point: &str) -> Vec<String> {
    let env = scene.env(place);
    crash(&env, scene, point);
    let (trace, text) = file(&env, "trace");
    let output = env.banger_with(&[("BANGER_CRASH_TRACE", &text)], &["daemon", "start"]);
    assert_eq!(output.status, 0, "after {point}: {output:?}");
    settled(&env, scene.verb);
    let passed = traced(&trace);
    let at = format!("{}: after {}, {point}", place.mode.name(), scene.verb);
    assert_recovered(place, env, scene, &at);
    passed
}

/// Aborts at `point`, then at `second` during the recovery. Whether the second was reached: a VMM that was asked to
/// end may be gone before the daemon is back, and then there is less to do.
fn crash_twice(place: &Place, scene: &Scene, point: &str, second: &str) -> bool {
    let env = scene.env(place);
    crash(&env, scene, point);
    let (log, text) = file(&env, "fired-again");
    let variables = [("BANGER_CRASH_AT", second), ("BANGER_CRASH_LOG", &text)];
    let output = env.banger_with(&variables, &["daemon", "start"]);
    assert!(
        matches!(output.status, 0 | 3),
        "{point}, {second}: {output:?}"
    );
    let reached = eventually("the recovery aborts or is over", || {
        if !lines(&log).is_empty() {
            return Some(true);
        }
        let listed = env.banger_with(&[("BANGER_NO_AUTOSTART", "1")], &["vm", "list", "--json"]);
        let vms: Value = serde_json::from_str(&listed.stdout).ok()?;
        let rests = |vm: &Value| {
            vm["phase"]["state"] == "stopped"
                || (vm["desired"] == "on" && vm["phase"]["ready"] == true)
        };
        let over = vms.as_array()?.iter().all(rests);
        (over && lines(&log).is_empty()).then_some(false)
    });
    // What is not the VM's own is brought in order a moment after it.
    let reached = reached || {
        let stopped = env.banger(&["daemon", "stop"]);
        let reached = !lines(&log).is_empty();
        assert!(reached || stopped.status == 0, "{point}: {stopped:?}");
        reached
    };
    if reached {
        // `daemon start` may have brought another one up when its daemon died before it answered.
        env.banger(&["daemon", "stop"]);
        assert_fired(&env, &log, second, None);
    }
    let (mode, verb) = (place.mode.name(), scene.verb);
    let at = format!("{mode}: after {verb}, {point} and {second}");
    assert_recovered(place, env, scene, &at);
    reached
}

/// Aborts of the daemon: once at every point, then again during the recovery.
fn abort_everywhere(mode: Mode, test: &str) {
    let Some(passed) = two_at_a_time(test, mode, &SCENES, |place, scene| points(place, scene))
    else {
        return;
    };
    let jobs = jobs(&SCENES, passed);
    // No point of the sources is without a verb that passes it.
    for named in named_in_sources() {
        let passed = jobs.iter().any(|(_, point)| point.starts_with(&named));
        assert!(passed, "no verb passes {named}");
    }
    let recoveries = two_at_a_time(test, mode, &jobs, |place, (scene, point)| {
        crash_once(place, scene, point)
    });
    let Some(recoveries) = recoveries else { return };
    let different: BTreeSet<_> = jobs.iter().map(|(_, point)| point).collect();
    println!(
        "CRASH POINTS, {}: {} of {} fired ({} different)",
        mode.name(),
        recoveries.len(),
        jobs.len(),
        different.len(),
    );

    // The second abort takes turns among what the recovery passes, so that each has its turn.
    let mut turns: BTreeMap<String, usize> = BTreeMap::new();
    let mut again = Vec::new();
    for ((scene, point), passed) in jobs.iter().zip(&recoveries) {
        if mode != Mode::Root && !scene.network {
            continue;
        }
        let rarest = passed
            .iter()
            .min_by_key(|second| turns.get(*second).copied().unwrap_or(0));
        if let Some(second) = rarest {
            *turns.entry(second.clone()).or_default() += 1;
            again.push((*scene, point.clone(), second.clone()));
        }
    }
    let reached = two_at_a_time(test, mode, &again, |place, (scene, point, second)| {
        crash_twice(place, scene, point, second)
    });
    let fired = reached.unwrap().iter().filter(|reached| **reached).count();
    println!(
        "SECOND ABORTS, {}: {fired} of {} fired, at {} different points",
        mode.name(),
        again.len(),
        turns.len()
    );
    assert!(
        fired * 2 > again.len(),
        "too few second aborts were reached"
    );
}

#[test]
#[ignore = "system test"]
fn as_root_an_abort_before_or_after_any_step_loses_and_leaves_nothing() {
    let test = "as_root_an_abort_before_or_after_any_step_loses_and_leaves_nothing";
    abort_everywhere(Mode::Root, test);
}

#[test]
#[ignore = "system test"]
fn with_the_helper_an_abort_before_or_after_any_step_loses_and_leaves_nothing() {
    let test = "with_the_helper_an_abort_before_or_after_any_step_loses_and_leaves_nothing";
    abort_everywhere(Mode::Helper, test);
}

#[test]
#[ignore = "system test"]
fn without_root_an_abort_before_or_after_any_step_loses_and_leaves_nothing() {
    let test = "without_root_an_abort_before_or_after_any_step_loses_and_leaves_nothing";
    abort_everywhere(Mode::Rootless, test);
}

/// A file that the helper may write, and its name.
fn of_helper(name: &str) -> (PathBuf, String) {
    let path = PathBuf::from("/run").join(name);
    let _ = std::fs::remove_file(&path);
    let text = path.display().to_string();
    (path, text)
}

/// What the helper passes in the verb of a scene, and what before.
fn helpers_points(place: &mut Place, scene: &Scene) -> (Vec<String>, BTreeSet<String>) {
    let (trace, text) = of_helper("trace");
    place.helper(&[("BANGER_CRASH_TRACE", &text)]);
    let env = scene.env(place);
    scene.prepare(&env, &[], scene.verb);
    let before = traced(&trace);
    let output = scene.try_it(&env, &[]);
    assert_eq!(output.status, 0, "{}: {output:?}", scene.verb);
    let passed = traced(&trace).split_off(before.len());
    assert!(!passed.is_empty(), "{} asks nothing of it", scene.verb);
    (passed, before.into_iter().collect())
}

/// The helper aborts at `point`, and another one comes; the daemon lives on.
fn crash_helper(place: &mut Place, scene: &Scene, point: &str) {
    let (log, text) = of_helper("fired");
    place.helper(&[("BANGER_CRASH_AT", point), ("BANGER_CRASH_LOG", &text)]);
    let env = scene.env(place);
    let at = format!("after {}, the helper's {point}", scene.verb);
    scene.prepare(&env, &[], &at);
    let output = scene.try_it(&env, &[]);
    eventually(&format!("{at} fires"), || {
        (lines(&log) == [point]).then_some(())
    });
    // Nobody notices.
    assert_eq!(output.status, 0, "{at}: {output:?}");
    assert_recovered(place, env, scene, &at);
}

#[test]
#[ignore = "system test"]
fn an_abort_of_the_helper_before_or_after_any_change_loses_and_leaves_nothing() {
    let test = "an_abort_of_the_helper_before_or_after_any_change_loses_and_leaves_nothing";
    let passed = two_at_a_time(test, Mode::Helper, &HELPED, helpers_points);
    let Some(passed) = passed else { return };
    let jobs = jobs(&HELPED, passed);
    let done = two_at_a_time(test, Mode::Helper, &jobs, |place, (scene, point)| {
        crash_helper(place, scene, point);
    });
    println!(
        "CRASH POINTS of the helper: {} of {} fired",
        done.unwrap().len(),
        jobs.len()
    );
}

/// One VM comes through an abort in every verb.
fn a_real_guest(mode: Mode, test: &str) {
    let Some(place) = Place::enter(test, mode) else {
        return;
    };
    let Some(env) = mode.env(test, Vmm::Real) else {
        return;
    };
    let abort = |args: &[&str], point: &str| {
        let (log, text) = file(&env, &point.replace(['/', ':'], "-"));
        let at = format!("{}: {point}", mode.name());
        // Those who were told come after this one.
        ok(&env, &["daemon", "stop"], &at);
        let variables = [("BANGER_CRASH_AT", point), ("BANGER_CRASH_LOG", &text)];
        let output = banger(&env, &variables, args);
        assert!(matches!(output.status, 0 | 3), "{at}: {output:?}");
        assert_fired(&env, &log, point, None);
        let verb = if args == FORCE { "purge" } else { args[1] };
        let vm = settled(&env, verb);
        assert_host_is_records(&place, &env, &at, vm.as_ref());
        println!("REAL GUEST, {}: came through {point}", mode.name());
        vm
    };
    let ssh = |line: &str| {
        let output = env.banger(&["vm", "ssh", crash::NAME, "--", line]);
        assert_eq!(output.status, 0, "{line}: {output:?}");
    };
    let ready = || {
        ok(&env, START, "after an abort");
        ok(&env, &["vm", "wait", crash::NAME], "after an abort");
    };
    let state = |vm: &Option<Value>| vm.as_ref().unwrap()["phase"]["state"].clone();

    abort(CREATE, "create/row:after");
    abort(START, "start/prove-life:before");
    ready();
    ssh("echo kept >/data/kept; echo gone >/root/gone; sync");
    assert_eq!(state(&abort(NAT, "set/network:after")), "running");
    ok(&env, NAT, "NAT after all");
    assert_eq!(state(&abort(PUBLISH, "set/record:before")), "running");
    ok(&env, PUBLISH, "the port after all");
    ssh("grep -q kept /data/kept && test -e /root/gone");
    assert_eq!(state(&abort(STOP, "stop/ask:after")), "stopped");
    abort(RESET, "reset/layer:before");
    let in_trash = abort(DELETE, "delete/record:after");
    assert!(!in_trash.unwrap()["trashed_at"].is_null());
    let vm = abort(UNDELETE, "undelete/record:before");
    if !vm.unwrap()["trashed_at"].is_null() {
        ok(&env, UNDELETE, "undelete after all");
    }
    ready();
    // What was promised to be thrown away is, and nothing else.
    ssh("grep -q kept /data/kept && test ! -e /root/gone");
    assert_eq!(abort(FORCE, "delete/unlink:before"), None);
    place.leave(env, test);
}

#[test]
#[ignore = "system test"]
fn as_root_a_real_guest_comes_through_an_abort_in_each_verb() {
    let test = "as_root_a_real_guest_comes_through_an_abort_in_each_verb";
    on_a_thread(test, move || a_real_guest(Mode::Root, test));
}

#[test]
#[ignore = "system test"]
fn with_the_helper_a_real_guest_comes_through_an_abort_in_each_verb() {
    let test = "with_the_helper_a_real_guest_comes_through_an_abort_in_each_verb";
    on_a_thread(test, move || a_real_guest(Mode::Helper, test));
}

#[test]
#[ignore = "system test"]
fn without_root_a_real_guest_comes_through_an_abort_in_each_verb() {
    let test = "without_root_a_real_guest_comes_through_an_abort_in_each_verb";
    on_a_thread(test, move || a_real_guest(Mode::Rootless, test));
}
