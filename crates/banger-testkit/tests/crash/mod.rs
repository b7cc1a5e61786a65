//! Verbs and the points that they pass; places where worlds are; what must be the same after a crash.

pub(crate) mod compare;
pub(crate) mod place;

use banger_testkit::env::{TestEnv, Vmm};
use banger_testkit::run::{LIMIT, eventually, wait_exit};
use place::Place;
use serde_json::Value;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};

pub(crate) const NAME: &str = "otter";
pub(crate) const CREATE: &[&str] = &[
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
pub(crate) const START: &[&str] = &["vm", "start", NAME];
pub(crate) const STOP: &[&str] = &["vm", "stop", NAME];
pub(crate) const DELETE: &[&str] = &["vm", "delete", NAME];
pub(crate) const PURGE: &[&str] = &["vm", "delete", "--purge", NAME];
pub(crate) const FORCE: &[&str] = &["vm", "delete", "--force", "--purge", NAME];
pub(crate) const UNDELETE: &[&str] = &["vm", "undelete", NAME];
pub(crate) const RESET: &[&str] = &["vm", "reset", NAME];
pub(crate) const NAT: &[&str] = &["nat", "up", NAME];
pub(crate) const PUBLISH: &[&str] = &["port", "add", NAME, PUBLISHED];
const RESTART: &[&str] = &["vm", "restart", NAME];
const SET: &[&str] = &[
    "vm",
    "set",
    "--disk-size",
    "96M",
    "--overlay-size",
    "9G",
    "--kernel",
    OTHER_KERNEL,
    NAME,
];
const END: &[&str] = &["daemon", "stop"];
/// Beside the one that VMs are made with.
const OTHER_KERNEL: &str = "other";
/// Stands for a port at an address of the loopback that no other world uses.
const PUBLISHED: &str = "{published}";

/// What a command ends with that its daemon did not answer to the end.
const UNREACHABLE: i32 = 3;

/// A verb, and what has to be done before it can be tried.
pub(crate) struct Scene {
    pub(crate) verb: &'static str,
    before: &'static [&'static [&'static str]],
    tried: &'static [&'static str],
    /// What the command ends with if nothing aborts it.
    pub(crate) status: i32,
    /// It changes what is on the host's network.
    pub(crate) network: bool,
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
        network: false,
    }
}

const fn of_network(scene: Scene) -> Scene {
    Scene {
        network: true,
        ..scene
    }
}

/// Every verb.
pub(crate) const SCENES: [Scene; 14] = [
    scene("create", &[], CREATE),
    of_network(scene("start", &[CREATE, NAT, PUBLISH], START)),
    Scene {
        status: 10,
        ..scene("failing start", &[CREATE], START)
    },
    of_network(scene("nat up", &[CREATE, START], NAT)),
    of_network(scene("port add", &[CREATE, START], PUBLISH)),
    of_network(scene("stop", &[CREATE, NAT, PUBLISH, START], STOP)),
    scene("restart", &[CREATE, START], RESTART),
    of_network(scene("delete", &[CREATE, START, STOP], DELETE)),
    scene("purge", &[CREATE, START, STOP], PURGE),
    scene("forced purge", &[CREATE, START], FORCE),
    scene("purge from the trash", &[CREATE, DELETE], PURGE),
    scene("undelete", &[CREATE, START, STOP, DELETE], UNDELETE),
    scene("reset", &[CREATE, START, STOP], RESET),
    scene("set", &[CREATE, START, STOP], SET),
];

/// Those in which the helper does something.
pub(crate) const HELPED: [Scene; 4] = [
    scene("start", &[CREATE, NAT, PUBLISH], START),
    scene("nat up", &[CREATE, START], NAT),
    scene("stop", &[CREATE, NAT, START], STOP),
    scene("daemon stop", &[CREATE, START, STOP], END),
];

/// The port of the host that a world publishes.
pub(crate) fn published(env: &TestEnv) -> SocketAddrV4 {
    let [_, b, c, _] = env.pool().octets();
    SocketAddrV4::new(Ipv4Addr::new(127, b, c, 1), 8080)
}

/// `banger` in this world, with what stands for its port filled in.
pub(crate) fn banger(
    env: &TestEnv,
    variables: &[(&str, &str)],
    args: &[&str],
) -> banger_testkit::run::Output {
    let place = format!("{}:80", published(env));
    let fill = |arg: &&str| {
        if *arg == PUBLISHED {
            place.clone()
        } else {
            (*arg).to_owned()
        }
    };
    let args: Vec<String> = args.iter().map(fill).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    env.banger_with(variables, &args)
}

#[track_caller]
pub(crate) fn ok(env: &TestEnv, args: &[&str], at: &str) {
    let output = banger(env, &[], args);
    assert!(
        output.status == 0,
        "{at}: {args:?}: {output:?}\n{}",
        env.daemon_log()
    );
}

impl Scene {
    pub(crate) fn env(&self, place: &Place) -> TestEnv {
        let script = match self.status {
            0 => "",
            _ => r#"{"exit_before_qmp": {"code": 1, "stderr": "not today"}}"#,
        };
        let vmm = Vmm::Scripted(script.to_owned());
        let env = place.mode.env("every_crash_point", vmm);
        let env = env.expect("where the first world was there is room for others");
        if self.tried.contains(&OTHER_KERNEL) {
            env.add_kernel(OTHER_KERNEL);
        }
        env
    }

    /// Does all that comes before the verb, with the `variables`.
    pub(crate) fn prepare(&self, env: &TestEnv, variables: &[(&str, &str)], at: &str) {
        for args in self.before {
            let output = banger(env, variables, args);
            assert_eq!(output.status, 0, "{at}: {args:?}: {output:?}");
        }
    }

    /// Tries the verb, whatever comes of it.
    pub(crate) fn try_it(
        &self,
        env: &TestEnv,
        variables: &[(&str, &str)],
    ) -> banger_testkit::run::Output {
        banger(env, variables, self.tried)
    }
}

pub(crate) fn lines(path: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

/// What was traced, but for what a thread does by itself, now or a moment later.
pub(crate) fn traced(path: &Path) -> Vec<String> {
    let mut points = lines(path);
    points.retain(|point| !point.starts_with("settle/"));
    points
}

pub(crate) fn file(env: &TestEnv, name: &str) -> (PathBuf, String) {
    let path = env.folder().join(name);
    let text = path.display().to_string();
    (path, text)
}

/// Whoever does things to the network does them one after another, some of them after the answer to a command: when it
/// answers to this, it has done the others.
fn all_is_done(env: &TestEnv, variables: &[(&str, &str)]) {
    let output = banger(env, variables, &["nat", "status"]);
    assert_eq!(output.status, 0, "{output:?}");
}

/// All points that the verb of a scene passes, in order, each once; and those that were passed before.
pub(crate) fn points(place: &Place, scene: &Scene) -> (Vec<String>, BTreeSet<String>) {
    let env = scene.env(place);
    let (trace, text) = file(&env, "trace");
    let variables = [("BANGER_CRASH_TRACE", text.as_str())];
    scene.prepare(&env, &variables, scene.verb);
    if !scene.before.is_empty() {
        all_is_done(&env, &variables);
    }
    let before = traced(&trace);
    let output = scene.try_it(&env, &variables);
    assert_eq!(output.status, scene.status, "{}: {output:?}", scene.verb);
    all_is_done(&env, &variables);
    if matches!(scene.verb, "start" | "port add") {
        compare::remember(place, &env);
    }
    let mut seen = BTreeSet::new();
    let passed = traced(&trace).split_off(before.len());
    let points: Vec<String> = passed
        .into_iter()
        .filter(|point| seen.insert(point.clone()))
        .collect();
    assert!(!points.is_empty(), "{} passes no point", scene.verb);
    (points, before.into_iter().collect())
}

/// Whether a point is a step of a verb: all others are changes of network or host, which several verbs make.
fn is_of_a_verb(point: &str) -> bool {
    let verbs = [
        "create/",
        "start/",
        "stop/",
        "delete/",
        "undelete/",
        "set/",
        "reset/",
    ];
    verbs.iter().any(|verb| point.starts_with(verb))
}

/// The jobs of all scenes: each point of a verb in each scene that passes it, each change of network or host in the
/// first scene that makes it.
pub(crate) fn jobs(
    scenes: &[Scene],
    passed: Vec<(Vec<String>, BTreeSet<String>)>,
) -> Vec<(&Scene, String)> {
    let mut known = BTreeSet::new();
    let mut jobs = Vec::new();
    for (scene, (points, before)) in scenes.iter().zip(passed) {
        for point in points {
            let is_new = !before.contains(&point) && known.insert(point.clone());
            if is_of_a_verb(&point) || is_new {
                jobs.push((scene, point));
            }
        }
    }
    // Every step has both sides.
    for (_, point) in &jobs {
        let (step, side) = point.split_once(':').unwrap();
        let other = if side == "before" { "after" } else { "before" };
        let other = format!("{step}:{other}");
        assert!(jobs.iter().any(|(_, point)| *point == other), "no {other}");
    }
    jobs
}

/// The steps, as `verb/step:`, that the daemon's sources name in full.
pub(crate) fn named_in_sources() -> BTreeSet<String> {
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
pub(crate) fn assert_fired(env: &TestEnv, log: &Path, point: &str, daemon: Option<i32>) {
    let deadline = std::time::Instant::now() + LIMIT / 3;
    // Twice, if it comes after the answer to a command that is followed by another one.
    let fired = || {
        let lines = lines(log);
        !lines.is_empty() && lines.iter().all(|line| line == point)
    };
    while !fired() {
        assert!(
            std::time::Instant::now() < deadline,
            "{point} has not fired, but {:?}: {} {}",
            lines(log),
            env.banger(&["vm", "list"]).stdout,
            env.banger(&["dns", "status"]).stdout
        );
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    if let Some(daemon) = daemon {
        assert!(wait_exit(daemon, LIMIT), "{point}: the daemon lives");
    }
    eventually("the daemon is gone", || {
        env.daemon_pid().is_none().then_some(())
    });
}

/// Brings a fresh world to the abort at `point`.
pub(crate) fn crash(env: &TestEnv, scene: &Scene, point: &str) {
    let (log, text) = file(env, "fired");
    let variables = [("BANGER_CRASH_AT", point), ("BANGER_CRASH_LOG", &text)];
    // A point that is passed on the way to the scene, too, is for the daemon that comes after.
    let early = scene.before.contains(&START) && point.starts_with("start/");
    scene.prepare(env, if early { &[] } else { &variables }, point);
    if early {
        ok(env, END, point);
    }
    // The verb itself starts no successor of the daemon that aborts, which would abort as well.
    let started = env.banger_with(&variables, &["daemon", "start"]);
    assert!(
        matches!(started.status, 0 | UNREACHABLE),
        "{point}: {started:?}"
    );
    let daemon = env.daemon_pid();
    let alone = [variables[0], variables[1], ("BANGER_NO_AUTOSTART", "1")];
    let output = scene.try_it(env, &alone);
    // Some points come after the answer.
    assert!(
        output.status == UNREACHABLE || output.status == scene.status,
        "{point}: {}: {output:?}",
        scene.verb
    );
    let shown = Shown(scene.verb);
    assert_fired(env, &log, point, daemon);
    drop(shown);
}

/// Says of which scene it was, if it fails.
struct Shown(&'static str);

impl Drop for Shown {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("in the scene `{}`", self.0);
        }
    }
}

/// What was last seen of a VM that does not rest.
struct Seen<'a>(&'a str, RefCell<Vec<Value>>);

impl Drop for Seen<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("after {}: {:#?}", self.0, self.1.borrow());
        }
    }
}

/// Waits until the VM rests: stopped, in the trash, or running as desired. `None` if there is none.
pub(crate) fn settled(env: &TestEnv, verb: &str) -> Option<Value> {
    let seen = Seen(verb, Vec::new().into());
    eventually("the VM rests", || {
        let vms = env.vms();
        *seen.1.borrow_mut() = vms.clone();
        let Some(vm) = vms.first() else {
            return Some(None);
        };
        assert_eq!(vms.len(), 1, "{vms:?}");
        let mirror = env.vm_folder(vm["id"].as_str().unwrap()).join("vm.json");
        let rests = match vm["phase"]["state"].as_str().unwrap() {
            // A purge that was promised goes on by itself.
            "stopped" => std::fs::read_to_string(mirror)
                .is_ok_and(|record| record.contains(r#""purging": false"#)),
            "running" => vm["desired"] == "on" && vm["phase"]["ready"] == true,
            _ => false,
        };
        rests.then(|| Some(vm.clone()))
    })
}
