//! `host ls`, `host clean` and `doctor` of whole daemons, on machines of the tests' own, with `fake-vmm` as the VMM:
//! what there is and whose it is, and that what is left over goes or is told with what helps.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use banger_testkit::env::TestEnv;
use banger_testkit::machine::{Machine, Mode, in_a_world, ledger, sh};
use banger_testkit::run::{LIMIT, Output, eventually, signal, wait_exit};
use rustix::process::Signal;
use serde_json::Value;
use std::path::Path;

/// On a machine and in a world of its own; nothing may be left of them.
fn on_a_machine(mode: Mode, test: &'static str, look: fn(&Machine, &TestEnv)) {
    in_a_world(mode, test, move |machine, env| look(machine, &env));
}

fn create(env: &TestEnv, more: &[&str]) -> Value {
    let create = ["vm", "create", "--wait", "--name", "otter"];
    let size = ["--image", "tiny", "--memory", "128"];
    env.json(&[&create[..], &size, more].concat())
}

fn pid(vm: &Value, which: &str) -> i32 {
    i32::try_from(vm["attempt"][which].as_i64().unwrap()).unwrap()
}

/// Kind, name, and whether it is explained.
fn objects(env: &TestEnv) -> Vec<(String, String, bool)> {
    let objects = env.json(&["host", "ls"]);
    let objects = objects.as_array().unwrap().iter();
    let word = |object: &Value, key: &str| object[key].as_str().unwrap().to_owned();
    objects
        .map(|object| {
            let expected = object["expected"] == true;
            (word(object, "kind"), word(object, "name"), expected)
        })
        .collect()
}

fn count(objects: &[(String, String, bool)], kind: &str, name: &str) -> usize {
    let fits = |object: &&(String, String, bool)| object.0 == kind && object.1.contains(name);
    objects.iter().filter(fits).count()
}

/// Something is left, with its cause and the next command.
#[track_caller]
fn assert_left(output: &Output, says: &[&str]) {
    let told = |word: &&str| output.stderr.contains(*word);
    assert!(
        output.status == 7
            && output.stderr.contains("left: ")
            && output.stderr.contains("hint: ")
            && says.iter().all(told),
        "{says:?}: {output:?}"
    );
}

fn assert_cleaned(env: &TestEnv) {
    assert_eq!(objects(env).len(), 1, "{:?}", objects(env));
    assert_eq!(env.host().running("banger-netns"), Vec::<i32>::new());
    assert_eq!(env.vm("otter")["phase"]["state"], "stopped");
    let overlay = env.vm_folder(env.vm("otter")["id"].as_str().unwrap());
    assert!(overlay.join("overlay.img").exists());
    env.ok(&["vm", "start", "otter", "--wait"]);
    assert_eq!(env.banger(&["doctor", "--repair"]).stdout, "");
    env.ok(&["host", "clean", "--force"]);
}

#[test]
#[ignore = "system test"]
fn without_root_the_way_out_is_listed_and_goes_with_the_rest() {
    let test = "without_root_the_way_out_is_listed_and_goes_with_the_rest";
    on_a_machine(Mode::Rootless, test, |_, env| {
        create(env, &["--nat", "-p", "127.0.0.1:8080:80"]);
        let there = objects(env);
        assert!(there.iter().all(|object| object.2), "{there:?}");
        assert_eq!(count(&there, "process", "(pas"), 1, "{there:?}");
        // The keeper, and who holds `pasta`, which is called `passt.avx2` where that is what it becomes.
        assert_eq!(count(&there, "process", "(banger-netns)"), 2, "{there:?}");
        assert_eq!(count(&there, "published-port", "127.0.0.1:8080"), 1);
        let refused = env.banger(&["host", "clean"]);
        assert!(
            refused.status == 5 && refused.stderr.contains("--force"),
            "{refused:?}"
        );
        let done = env.ok(&["host", "clean", "--force"]);
        assert!(
            done.contains("(pas") && done.contains("removed tap "),
            "{done}"
        );
        assert_cleaned(env);
    });
}

#[test]
#[ignore = "system test"]
fn with_the_helper_what_root_made_is_listed_and_goes_with_the_rest() {
    let test = "with_the_helper_what_root_made_is_listed_and_goes_with_the_rest";
    on_a_machine(Mode::Helper, test, |machine, env| {
        create(env, &["--nat"]);
        let there = objects(env);
        assert!(there.iter().all(|object| object.2), "{there:?}");
        for (kind, name) in [
            ("veth", "bv"),
            ("nft-table", "banger_"),
            ("forwarding", "wan0"),
        ] {
            assert_eq!(count(&there, kind, name), 1, "{kind}: {there:?}");
        }
        assert!(!ledger().is_empty());
        let done = env.ok(&["host", "clean", "--force"]);
        assert!(done.contains("removed veth bv"), "{done}");
        assert_eq!(ledger().len(), 0, "{:?}", ledger());
        assert!(!machine.forwards());
        assert_cleaned(env);
    });
}

/// Somebody who keeps a namespace.
struct Holder(std::process::Child);

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A namespace that somebody holds keeps its veth on the host though its keeper is gone.
fn a_veth_of_nobody(env: &TestEnv) -> Holder {
    create(env, &[]);
    let keeper = env.keeper().unwrap();
    #[expect(clippy::disallowed_methods, reason = "holds a namespace by hand")]
    let holder = std::process::Command::new("nsenter")
        .arg(format!("--net=/proc/{keeper}/ns/net"))
        .args(["sleep", "600"])
        .spawn()
        .unwrap();
    let holder = Holder(holder);
    eventually("it is inside", || {
        let inside = std::fs::read_link(format!("/proc/{}/ns/net", holder.0.id())).ok()?;
        (Some(inside) == std::fs::read_link(format!("/proc/{keeper}/ns/net")).ok()).then_some(())
    });
    env.ok(&["vm", "stop", "otter"]);
    signal(keeper, Signal::KILL);
    assert!(wait_exit(keeper, LIMIT));
    holder
}

fn what_the_host_keeps_of_nobody_goes(env: &TestEnv, verb: &[&str]) {
    let holder = a_veth_of_nobody(env);
    let left = eventually("it is left over", || {
        let there = objects(env);
        let veth = there.iter().find(|object| object.0 == "veth")?;
        (!veth.2).then(|| there.clone())
    });
    assert_eq!(count(&left, "nft-table", "banger_"), 1, "{left:?}");
    let done = env.ok(verb);
    assert!(done.contains("removed veth bv"), "{done}");
    assert_eq!(objects(env).len(), 1, "{:?}", objects(env));
    drop(holder);
    env.ok(&["vm", "delete", "--purge", "otter"]);
}

#[test]
#[ignore = "system test"]
fn what_the_host_keeps_of_nobody_goes_by_either_verb() {
    let test = "what_the_host_keeps_of_nobody_goes_by_either_verb";
    on_a_machine(Mode::Root, test, |_, env| {
        what_the_host_keeps_of_nobody_goes(env, &["doctor", "--repair"]);
        what_the_host_keeps_of_nobody_goes(env, &["host", "clean"]);
    });
}

#[test]
#[ignore = "system test"]
fn a_process_without_its_folder_is_told_and_ends_only_by_force() {
    let test = "a_process_without_its_folder_is_told_and_ends_only_by_force";
    on_a_machine(Mode::Root, test, |_, env| {
        let vm = create(env, &[]);
        let folder = env.vm_folder(vm["id"].as_str().unwrap());
        env.ok(&["daemon", "stop"]);
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(env.vm("otter")["phase"]["state"], "stopped");
        let vmm = pid(&vm, "vmm_pid");
        let left = objects(env);
        let of_vmm = left
            .iter()
            .find(|object| object.1.starts_with(&format!("{vmm} (")));
        assert!(!of_vmm.unwrap().2, "{left:?}");
        for verb in [&["doctor", "--repair"][..], &["host", "clean"]] {
            assert_left(
                &env.banger(verb),
                &["folder was removed", "host clean --force"],
            );
            assert!(Path::new(&format!("/proc/{vmm}")).exists());
        }
        let done = env.ok(&["host", "clean", "--force"]);
        assert!(done.contains(&format!("ended process {vmm} (")), "{done}");
        assert_eq!(objects(env).len(), 1, "{:?}", objects(env));
        env.ok(&["vm", "delete", "--purge", "otter"]);
    });
}

#[test]
#[ignore = "system test"]
fn who_holds_a_lock_and_is_not_ours_is_told_and_left_alone() {
    let test = "who_holds_a_lock_and_is_not_ours_is_told_and_left_alone";
    on_a_machine(Mode::Root, test, |_, env| {
        let vm = create(env, &[]);
        env.ok(&["vm", "stop", "otter"]);
        let lock = env.vm_folder(vm["id"].as_str().unwrap()).join("vm.lock");
        let held = std::fs::File::open(&lock).unwrap();
        eventually("the lock is free", || held.try_lock().ok());
        let own = std::process::id();
        for verb in [&["doctor", "--repair"][..], &["host", "clean"]] {
            let kill = format!("`kill {own}`");
            assert_left(&env.banger(verb), &["banger did not start it", &kill]);
        }
        // Not by closing it, of which another test's child may hold a copy until it becomes another program.
        held.unlock().unwrap();
        assert_eq!(env.banger(&["doctor", "--repair"]).status, 0);
    });
}

#[test]
#[ignore = "system test"]
fn a_repair_that_does_not_open_the_way_out_says_why_and_ends_with_7() {
    let test = "a_repair_that_does_not_open_the_way_out_says_why_and_ends_with_7";
    on_a_machine(Mode::Root, test, |_, env| {
        create(env, &["--nat"]);
        sh("nft 'add table ip filter; \
            add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }'");
        let repair = env.banger(&["doctor", "--repair"]);
        assert_left(&repair, &["FORWARD", "as root: "]);
        let doctor = env.banger(&["doctor"]);
        assert!(
            doctor.status == 7 && doctor.stdout.contains("FORWARD"),
            "{doctor:?}"
        );
        sh("nft delete table ip filter");
        let repair = env.banger(&["doctor", "--repair"]);
        assert_eq!(
            (repair.status, repair.stdout.as_str()),
            (0, ""),
            "{repair:?}"
        );
    });
}

#[test]
#[ignore = "system test"]
fn without_a_route_of_the_host_pasta_says_why_and_not_to_try_again_alone() {
    let test = "without_a_route_of_the_host_pasta_says_why_and_not_to_try_again_alone";
    on_a_machine(Mode::Rootless, test, |_, env| {
        create(env, &["--nat"]);
        let pasta = || {
            let there = objects(env);
            let pasta = there.iter().find(|object| object.1.contains("(pas"))?;
            pasta.1.split(' ').next()?.parse::<i32>().ok()
        };
        let pid = pasta().unwrap();
        sh("ip route delete default");
        signal(pid, Signal::KILL);
        assert!(wait_exit(pid, LIMIT));
        let repair = env.banger(&["doctor", "--repair"]);
        assert_left(&repair, &["way to the internet", "passt"]);
        let doctor = env.banger(&["doctor"]);
        assert!(
            doctor.status == 7
                && doctor.stdout.contains("passt")
                && !doctor.stdout.contains("hint: `banger doctor --repair`"),
            "{doctor:?}"
        );
        let status = env.banger(&["nat", "status"]);
        assert!(
            status.stderr.contains("hint: guests get out by `pasta`"),
            "{status:?}"
        );
        sh("ip route add default via 192.0.2.1 dev wan0");
        let repair = env.banger(&["doctor", "--repair"]);
        assert!(
            repair.status == 0 && repair.stdout.contains("by `pasta`"),
            "{repair:?}"
        );
        assert!(pasta().is_some());
    });
}

#[test]
#[ignore = "system test"]
fn user_namespaces_that_are_forbidden_are_told_before_the_first_vm() {
    let test = "user_namespaces_that_are_forbidden_are_told_before_the_first_vm";
    on_a_machine(Mode::Rootless, test, |_, env| {
        let line = |text: &str| {
            let lines: Vec<String> = text.lines().map(str::to_owned).collect();
            let at = lines
                .iter()
                .position(|line| line.contains("user namespaces: "));
            at.map(|at| lines[at..lines.len().min(at + 2)].join("\n"))
                .unwrap()
        };
        let doctor = env.banger(&["doctor"]);
        assert!(line(&doctor.stdout).starts_with("good"), "{doctor:?}");
        assert!(doctor.stdout.contains("mode: rootless"), "{doctor:?}");
        let mode = env.json(&["daemon", "status"])["mode_why"].clone();
        assert!(mode.as_str().unwrap().contains("config.toml"), "{mode}");
        // A keeper that meets what a machine with AppArmor's restriction has; the real probe is `banger-helper`'s test.
        let keeper = env.libexec().join("banger-netns");
        let aside = keeper.with_extension("aside");
        std::fs::rename(&keeper, &aside).unwrap();
        let says = r#"{"error":"user namespaces are not allowed for this user: AppArmor restricts them; as root run `it`"}"#;
        std::fs::write(&keeper, format!("#!/bin/sh\nprintf '%s\\n' '{says}'\n")).unwrap();
        std::fs::set_permissions(&keeper, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .unwrap();
        let doctor = env.banger(&["doctor"]);
        std::fs::rename(&aside, &keeper).unwrap();
        let said = line(&doctor.stdout);
        assert!(
            doctor.status == 7
                && said.starts_with("bad ")
                && said.contains("AppArmor restricts them")
                && said.contains("hint: as root run `it`"),
            "{doctor:?}"
        );
    });
}
