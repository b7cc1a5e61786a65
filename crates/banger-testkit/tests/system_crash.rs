//! The daemon aborts before and after every step of every verb, and once more while it recovers: what is on the host
//! is always what the records say, and every VM is there wholly or not at all.
//!
//! The points are not listed anywhere: each verb is run once with `BANGER_CRASH_TRACE`, which notes all that it passes.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use banger_testkit::env::TestEnv;
use banger_testkit::host::{Host, openers};
use banger_testkit::run::{LIMIT, eventually, wait_exit};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

const NAME: &str = "otter";
const CREATE: &[&str] = &[
    "vm",
    "create",
    "--name",
    NAME,
    "--image",
    "tiny",
    "--memory",
    "128",
    "--disk-size",
    "64M",
    "--no-start",
];
const START: &[&str] = &["vm", "start", NAME];
const STOP: &[&str] = &["vm", "stop", NAME];
const DELETE: &[&str] = &["vm", "delete", NAME];
const PURGE: &[&str] = &["vm", "delete", "--purge", NAME];
const FORCE: &[&str] = &["vm", "delete", "--force", "--purge", NAME];

const RESTART: &[&str] = &["vm", "restart", NAME];
const UNDELETE: &[&str] = &["vm", "undelete", NAME];
const RESET: &[&str] = &["vm", "reset", NAME];
const GROW: &[&str] = &["vm", "set", "--disk-size", "96M", NAME];
const NAT: &[&str] = &["nat", "up", NAME];
const PUBLISH: &[&str] = &["port", "add", NAME, PUBLISHED];
/// Stands for a port at an address of the loopback that no other world uses.
const PUBLISHED: &str = "{published}";

/// A verb, and what has to be done before it can be tried.
struct Scene {
    verb: &'static str,
    before: &'static [&'static [&'static str]],
    tried: &'static [&'static str],
    /// What the command ends with if nothing aborts it.
    status: i32,
}

const fn scene(
    verb: &'static str,
    before: &'static [&'static [&'static str]],
    tried: &'static [&'static str],
) -> Scene {
    Scene {
        verb,
        before,
        tried,
        status: 0,
    }
}

const SCENES: [Scene; 13] = [
    scene("create", &[], CREATE),
    scene("start", &[CREATE], START),
    Scene {
        status: 10,
        ..scene("failing start", &[CREATE], START)
    },
    scene("stop", &[CREATE, START], STOP),
    scene("restart", &[CREATE, START], RESTART),
    scene("delete", &[CREATE, START, STOP], DELETE),
    scene("purge", &[CREATE, START, STOP], PURGE),
    scene("forced purge", &[CREATE, START], FORCE),
    scene("undelete", &[CREATE, START, STOP, DELETE], UNDELETE),
    scene("reset", &[CREATE, START, STOP], RESET),
    scene("grow", &[CREATE, START, STOP], GROW),
    scene("nat up", &[CREATE, START], NAT),
    scene("port add", &[CREATE, START], PUBLISH),
];

/// The port of the host that a world publishes.
fn published(env: &TestEnv) -> SocketAddrV4 {
    let [_, b, c, _] = env.pool().octets();
    SocketAddrV4::new(Ipv4Addr::new(127, b, c, 1), 8080)
}

/// The arguments of a scene in this world.
fn in_world(env: &TestEnv, args: &[&str]) -> Vec<String> {
    let place = format!("{}:80", published(env));
    args.iter()
        .map(|arg| {
            if *arg == PUBLISHED {
                place.clone()
            } else {
                (*arg).to_owned()
            }
        })
        .collect()
}

impl Scene {
    fn env(&self) -> Option<TestEnv> {
        let script = match self.status {
            0 => "",
            _ => r#"{"exit_before_qmp": {"code": 1, "stderr": "not today"}}"#,
        };
        TestEnv::scripted("every_crash_point", script)
    }
}

fn lines(path: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

fn file(env: &TestEnv, name: &str) -> (PathBuf, String) {
    let path = env.folder().join(name);
    let text = path.display().to_string();
    (path, text)
}

/// All points that the verb of a scene passes, in order, each once.
fn points(scene: &Scene) -> Option<Vec<String>> {
    let env = scene.env()?;
    let (trace, text) = file(&env, "trace");
    let traced = |args: &[&str], status| {
        let args = in_world(&env, args);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let output = env.banger_with(&[("BANGER_CRASH_TRACE", &text)], &args);
        assert_eq!(output.status, status, "{args:?}: {output:?}");
    };
    for args in scene.before {
        traced(args, 0);
    }
    let passed_before = lines(&trace).len();
    traced(scene.tried, scene.status);
    let mut seen = BTreeSet::new();
    let passed = lines(&trace).split_off(passed_before);
    let points: Vec<String> = passed
        .into_iter()
        .filter(|point| seen.insert(point.clone()))
        .collect();
    assert!(!points.is_empty(), "{} passes no point", scene.verb);
    Some(points)
}

/// The steps, as `verb/step:`, that the daemon's sources name in full.
fn named_in_sources() -> BTreeSet<String> {
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("../banger-daemon/src")];
    let mut named = BTreeSet::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            for call in text.split("point(\"").skip(1) {
                let mut words = call.split('"');
                if let (Some(verb), Some(", "), Some(step)) =
                    (words.next(), words.next(), words.next())
                {
                    named.insert(format!("{verb}/{step}:"));
                }
            }
        }
    }
    assert!(named.len() > 10, "{named:?}");
    named
}

/// The daemon was told to abort at `point`, which the log must say; waits until it is gone.
#[track_caller]
fn assert_fired(env: &TestEnv, log: &Path, point: &str, daemon: Option<i32>) {
    eventually(&format!("{point} fires"), || {
        (lines(log) == [point]).then_some(())
    });
    if let Some(daemon) = daemon {
        assert!(wait_exit(daemon, LIMIT), "{point}: the daemon lives");
    }
    eventually("the daemon is gone", || {
        env.daemon_pid().is_none().then_some(())
    });
}

/// Brings a fresh world to the abort at `point`.
fn crash(env: &TestEnv, scene: &Scene, point: &str) {
    let (log, text) = file(env, "fired");
    let variables = [("BANGER_CRASH_AT", point), ("BANGER_CRASH_LOG", &text)];
    // A point that is passed on the way to the scene, too, is for the daemon that comes after.
    let early = scene.before.contains(&START) && point.starts_with("start/");
    for args in scene.before {
        let variables: &[_] = if early { &[] } else { &variables };
        let output = env.banger_with(variables, args);
        assert_eq!(output.status, 0, "{point}: {args:?}: {output:?}");
    }
    if early {
        env_ok(env, &["daemon", "stop"], point);
    }
    let daemon = env.daemon_pid();
    let tried = in_world(env, scene.tried);
    let tried: Vec<&str> = tried.iter().map(String::as_str).collect();
    let output = env.banger_with(&variables, &tried);
    // Some points come after the answer.
    assert!(
        output.status == 3 || output.status == scene.status,
        "{point}: {:?}: {output:?}",
        scene.tried
    );
    assert_fired(env, &log, point, daemon);
}

/// Waits until the VM rests: stopped, in the trash, or running as desired. `None` if there is none.
fn settled(env: &TestEnv, scene: &Scene) -> Option<Value> {
    eventually("the VM rests", || {
        let vms = env.vms();
        let Some(vm) = vms.first() else {
            return Some(None);
        };
        assert_eq!(vms.len(), 1, "{vms:?}");
        let rests = match vm["phase"]["state"].as_str().unwrap() {
            // A purge that was promised goes on by itself.
            "stopped" => vm["trashed_at"].is_null() || matches!(scene.verb, "delete" | "undelete"),
            "running" => vm["desired"] == "on" && vm["phase"]["ready"] == true,
            _ => false,
        };
        rests.then(|| Some(vm.clone()))
    })
}

/// The program that runs the VMs of a world.
fn vmm_program(env: &TestEnv) -> &'static str {
    if env.folder().join("vmm").exists() {
        "fake-vmm"
    } else {
        "qemu-system-x86_64"
    }
}

/// What the kernel sees is what the records explain.
fn assert_host_is_records(env: &TestEnv, at: &str, vm: Option<&Value>) {
    let running = vm.filter(|vm| vm["phase"]["state"] == "running");
    let shims: Vec<i32> = running
        .map(|vm| i32::try_from(vm["attempt"]["shim_pid"].as_i64().unwrap()).unwrap())
        .into_iter()
        .collect();
    // One that waited for its launch when the daemon died ends by itself, which takes a moment.
    let host = eventually("the shims are as recorded", || {
        let host = env.host();
        (host.running("banger-shim") == shims).then_some(host)
    });
    let vmms = host.running(vmm_program(env));
    let Some(vm) = vm else {
        assert_eq!(env.vm_folders(), Vec::<String>::new(), "{at}");
        assert_eq!(vmms, Vec::<i32>::new(), "{at}");
        assert_eq!(env.taps(), Vec::<String>::new(), "{at}");
        return;
    };
    let id = vm["id"].as_str().unwrap();
    assert_eq!(env.vm_folders(), [id], "{at}");
    let folder = env.vm_folder(id);
    for name in ["vm.json", "overlay.img", "disk.img"] {
        assert!(folder.join(name).is_file(), "{at}: no {name}");
    }
    if vm["phase"]["state"] == "running" {
        let pid = |which: &str| i32::try_from(vm["attempt"][which].as_i64().unwrap()).unwrap();
        assert_eq!(vmms, [pid("vmm_pid")], "{at}");
        assert_eq!(openers(&folder.join("overlay.img")), vmms, "{at}");
        let tap = format!("bt{}", &id.replace('-', "")[20..]);
        assert_eq!(env.taps(), [tap], "{at}");
        let wanted = (&vm["spec"]["nat"] == true, vm["spec"]["ports"] != json!([]));
        eventually("the network is as recorded", || {
            (network_now(env) == wanted).then_some(())
        });
    } else {
        assert_eq!(vmms, Vec::<i32>::new(), "{at}");
        assert_eq!(
            openers(&folder.join("overlay.img")),
            Vec::<i32>::new(),
            "{at}"
        );
        assert_eq!(env.taps(), Vec::<String>::new(), "{at}");
        assert!(!folder.join("run").exists(), "{at}: run/ is left");
    }
}

/// Whether the kernel lets the world's one VM out, and whether the host listens for it.
fn network_now(env: &TestEnv) -> (bool, bool) {
    let status = env.json(&["nat", "status"]);
    let listens = TcpStream::connect(published(env)).is_ok();
    (status["vms"][0]["nat_now"] == true, listens)
}

/// After the recovery: all is as the records say, what was acknowledged is there, and everything works on.
fn assert_recovered(env: &TestEnv, scene: &Scene, at: &str) {
    let vm = settled(env, scene);
    // From here on, the VMM starts.
    if scene.status != 0 {
        env.script("{}");
    }
    assert_host_is_records(env, at, vm.as_ref());
    match (&vm, scene.verb) {
        (None, "create" | "purge" | "forced purge") => env_ok(env, CREATE, at),
        // Its creation was acknowledged, and nobody asked for its end.
        (None, _) => panic!("{at}: the VM is lost"),
        (Some(vm), _) if !vm["trashed_at"].is_null() => {
            env_ok(env, PURGE, at);
            // A name in the trash is free.
            env_ok(env, CREATE, at);
        }
        (Some(_), _) => {}
    }
    env_ok(env, START, at);
    env_ok(env, STOP, at);
    env_ok(env, PURGE, at);
    assert_eq!(env.vm_folders(), Vec::<String>::new(), "{at}");
    assert_eq!(env.vms(), Vec::<Value>::new(), "{at}");
    let namespaces = env.host().hold_namespaces();
    env_ok(env, &["daemon", "stop"], at);
    assert_eq!(env.host(), Host::default(), "{at}");
    for namespace in &namespaces {
        assert!(!namespace.is_used(), "{at}: {namespace:?} is left");
    }
}

#[track_caller]
fn env_ok(env: &TestEnv, args: &[&str], at: &str) {
    let output = env.banger(args);
    assert!(
        output.status == 0,
        "{at}: {args:?}: {output:?}\n{}",
        env.daemon_log()
    );
}

/// What the recovery from an abort passes, as far as the VM's rest.
fn crash_once(scene: &Scene, point: &str) -> Vec<String> {
    let env = scene.env().unwrap();
    crash(&env, scene, point);
    let (trace, text) = file(&env, "trace");
    let output = env.banger_with(&[("BANGER_CRASH_TRACE", &text)], &["daemon", "start"]);
    assert_eq!(output.status, 0, "after {point}: {output:?}");
    settled(&env, scene);
    let passed = lines(&trace);
    assert_recovered(&env, scene, &format!("after {}, {point}", scene.verb));
    passed
}

/// Aborts at `point`, then at `second` during the recovery. Whether the second was reached: a VMM that was asked to
/// end may be gone before the daemon is back, and then there is less to do.
fn crash_twice(scene: &Scene, point: &str, second: &str) -> bool {
    let env = scene.env().unwrap();
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
    if reached {
        assert_fired(&env, &log, second, None);
    } else {
        env.ok(&["daemon", "stop"]);
    }
    assert_recovered(
        &env,
        scene,
        &format!("after {}, {point} and {second}", scene.verb),
    );
    reached
}

/// Does all jobs, two at a time; answers what each answered.
fn two_at_a_time<J: Sync, A: Send>(jobs: &[J], work: impl Fn(&J) -> A + Sync) -> Vec<A> {
    let next = AtomicUsize::new(0);
    let answers = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((at, job)) = {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    jobs.get(at).map(|job| (at, job))
                } {
                    let answer = work(job);
                    answers.lock().unwrap().insert(at, answer);
                }
            });
        }
    });
    let answers = answers.into_inner().unwrap();
    assert_eq!(answers.len(), jobs.len());
    answers.into_values().collect()
}

#[test]
#[ignore = "system test"]
fn an_abort_before_or_after_any_step_loses_and_leaves_nothing() {
    let mut jobs = Vec::new();
    for scene in &SCENES {
        let Some(points) = points(scene) else {
            return;
        };
        jobs.extend(points.into_iter().map(|point| (scene, point)));
    }
    // Every step has both sides, and no point of the sources is without a verb that passes it.
    for (_, point) in &jobs {
        let (step, side) = point.split_once(':').unwrap();
        let other = if side == "before" { "after" } else { "before" };
        let other = format!("{step}:{other}");
        assert!(jobs.iter().any(|(_, point)| *point == other), "no {other}");
    }
    for named in named_in_sources() {
        let passed = jobs.iter().any(|(_, point)| point.starts_with(&named));
        assert!(passed, "no verb passes {named}");
    }
    let recoveries = two_at_a_time(&jobs, |(scene, point)| crash_once(scene, point));
    println!(
        "CRASH POINTS: {} of {} fired ({} different)",
        recoveries.len(),
        jobs.len(),
        jobs.iter()
            .map(|(_, point)| point)
            .collect::<BTreeSet<_>>()
            .len(),
    );

    // The second abort takes turns among what the recovery passes, so that each has its turn.
    let mut turns: BTreeMap<String, usize> = BTreeMap::new();
    let mut again = Vec::new();
    for ((scene, point), passed) in jobs.iter().zip(&recoveries) {
        let rarest = passed
            .iter()
            .min_by_key(|second| turns.get(*second).copied().unwrap_or(0));
        if let Some(second) = rarest {
            *turns.entry(second.clone()).or_default() += 1;
            again.push((*scene, point.clone(), second.clone()));
        }
    }
    let reached = two_at_a_time(&again, |(scene, point, second)| {
        crash_twice(scene, point, second)
    });
    let fired = reached.iter().filter(|reached| **reached).count();
    println!(
        "SECOND ABORTS: {fired} of {} fired, at {} different points",
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
fn a_real_guest_comes_through_an_abort_in_each_verb() {
    let test = "a_real_guest_comes_through_an_abort_in_each_verb";
    for (scene, point) in [
        (&SCENES[0], "create/row:after"),
        (&SCENES[1], "start/prove-life:before"),
        (&SCENES[3], "stop/ask:after"),
        (&SCENES[5], "delete/record:before"),
        (&SCENES[6], "delete/unlink:before"),
    ] {
        let Some(env) = TestEnv::real(test) else {
            return;
        };
        let at = format!("after {}, {point}", scene.verb);
        crash(&env, scene, point);
        let vm = settled(&env, scene);
        assert_host_is_records(&env, &at, vm.as_ref());
        if vm.is_none() {
            assert_eq!(scene.verb, "purge", "{at}: the VM is lost");
            env_ok(&env, CREATE, &at);
        }
        env_ok(&env, START, &at);
        env_ok(&env, &["vm", "wait", NAME], &at);
        env_ok(&env, &["vm", "ssh", NAME, "--", "test -d /data"], &at);
        env_ok(&env, FORCE, &at);
        env_ok(&env, &["daemon", "stop"], &at);
        assert_eq!(env.host(), Host::default(), "{at}");
        println!("REAL GUEST: came through {point}");
    }
}
