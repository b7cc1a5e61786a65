//! What becomes of VMs when their user logs out, and in again.

use crate::host::{eventually, install, root, state, try_root};
use crate::login::{CREATE, Login, USER, manager};
use serde_json::Value;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a guest that does nothing but work is looked at.
const LOOK: Duration = Duration::from_secs(5);

#[test]
#[ignore = "runs inside the test host"]
fn a_vm_outlives_the_session_that_started_it_and_no_limit_is_promised_that_would_not_hold() {
    install();
    // Sessions end with all that is in them, and users' managers get no CPU controller.
    root(&format!(
        "systemctl stop {}
         mkdir -p /run/systemd/logind.conf.d /run/systemd/system/user@.service.d
         printf '[Login]\nKillUserProcesses=yes\n' > /run/systemd/logind.conf.d/test.conf
         printf '[Service]\nDelegate=\nDelegate=pids memory\n' > /run/systemd/system/user@.service.d/test.conf
         systemctl daemon-reload && systemctl restart systemd-logind && loginctl enable-linger {USER}",
        manager()
    ));
    let mut otter = Login::new();
    let calm = otter.create("calm", "");
    is_in_its_scope(&calm);
    for line in [
        &format!("{CREATE} --name fox --cpu-limit 50%"),
        "banger vm set calm --cpu-limit 50%",
    ] {
        let said = otter.run(line);
        let stderr = root("cat /tmp/otter.stderr");
        assert_ne!(said.status, 0, "{said:?}");
        assert!(stderr.contains("`cpu` is not delegated"), "{stderr}");
        assert!(stderr.contains("Delegate=cpu"), "{stderr}");
    }
    let calm_now = otter.vm("calm");
    assert!(calm_now["spec"]["cpu_limit"].is_null(), "{calm_now:#}");
    otter.ok("banger vm set fox --cpu-limit none");
    otter.ok("banger vm start fox --wait");
    otter.ok("banger vm delete fox --force --purge");

    let calm = vmm(&calm);
    otter.log_out();
    eventually("the session has ended with the daemon in it", || {
        try_root(&format!("pgrep -u {USER} -x bangerd"))
            .is_err()
            .then_some(())
    });
    assert!(lives(calm));
    let mut otter = Login::new();
    assert_eq!(vmm(&otter.vm("calm")), calm);
    otter.ssh("calm", "true");
    otter.ok("banger vm delete calm --force --purge");
    eventually("nothing is left of the scopes", || {
        let units = otter.ok("systemctl --user list-units --all --no-legend banger-*.scope");
        units.trim().is_empty().then_some(())
    });
    otter.ok("banger daemon stop");
    otter.log_out();
    root(&format!(
        "rm -r /run/systemd/logind.conf.d /run/systemd/system/user@.service.d
         systemctl daemon-reload && systemctl restart systemd-logind
         loginctl disable-linger {USER}; systemctl stop {}",
        manager()
    ));
}

#[test]
#[ignore = "runs inside the test host"]
fn vms_are_stopped_in_order_when_their_user_logs_out_but_not_with_linger_and_come_back_with_autostart()
 {
    install();
    let mut otter = Login::new();
    otter.ok("banger daemon enable --no-linger");
    let doctor = otter.run("banger doctor").stdout;
    assert!(doctor.contains("linger is off"), "{doctor}");
    let calm = otter.create("calm", "--autostart");
    let heron = otter.create("heron", "--cpu-limit 150%");
    let scopes = [&calm, &heron].map(is_in_its_scope);
    assert_ne!(scopes[0], scopes[1]);
    assert_eq!(cpu_limit(&scopes[1]), "150000 100000");
    let objects = otter.ok("banger host ls");
    assert!(objects.contains(&scopes[0]), "{objects}");
    takes_no_more_than_it_may(&mut otter, &scopes[0]);
    let [calm, heron] = [&calm, &heron].map(vmm);

    // The daemon is restarted under them, in order and not.
    otter.ok("systemctl --user restart bangerd");
    assert_eq!(vmm(&otter.vm("calm")), calm);
    let daemon = otter.json("banger daemon status")["pid"].clone();
    root(&format!("kill -KILL {daemon}"));
    eventually("systemd starts it again", || {
        let said = otter.run("banger daemon status --json").stdout;
        let status: Value = serde_json::from_str(&said).ok()?;
        (status["pid"].is_u64() && status["pid"] != daemon).then_some(())
    });
    assert_eq!(vmm(&otter.vm("calm")), calm);
    otter.log_out();
    eventually("the user's systemd has ended", || {
        (state(&manager()) == "inactive").then_some(())
    });
    assert!(!lives(calm) && !lives(heron));

    let mut otter = Login::new();
    otter.ok("banger vm wait calm --timeout 100s");
    let why = otter.ok("banger vm why calm");
    assert!(why.contains("user logged out"), "{why}");
    let stopped = otter.vm("heron");
    assert_eq!(
        stopped["phase"]["why"]["reason"], "user-logged-out",
        "{stopped:#}"
    );
    assert_eq!(stopped["desired"], "on", "{stopped:#}");

    let calm = vmm(&otter.vm("calm"));
    otter.ok("banger daemon enable");
    let doctor = otter.run("banger doctor").stdout;
    assert!(
        doctor.contains("are shut down cleanly before it goes down"),
        "{doctor}"
    );
    assert_eq!(vmm(&otter.vm("calm")), calm);
    otter.log_out();
    eventually("the session has ended", || {
        let sessions = root("loginctl list-sessions --no-legend");
        (!sessions.contains(USER)).then_some(())
    });
    assert_eq!(state(&manager()), "active");
    assert!(lives(calm));
    let mut otter = Login::new();
    assert_eq!(vmm(&otter.vm("calm")), calm);
    otter.ssh("calm", "true");
    otter.log_out();
}

/// The scope of a VM, with shim and VMM in it.
#[track_caller]
fn is_in_its_scope(vm: &Value) -> String {
    let attempt = &vm["attempt"];
    let [vmm, shim] = ["vmm_pid", "shim_pid"].map(|process| {
        let process = &attempt[process];
        std::fs::read_to_string(format!("/proc/{process}/cgroup")).unwrap()
    });
    assert_eq!(vmm, shim);
    let group = vmm.trim().strip_prefix("0::").unwrap();
    assert!(group.contains("/app-banger.slice/banger-"), "{group}");
    assert!(group.ends_with(".scope"), "{group}");
    let layers = attempt["sandbox"].as_array().unwrap();
    assert!(layers.contains(&"cgroup".into()), "{vm:#}");
    group.to_owned()
}

fn of_cgroup(group: &str, file: &str) -> String {
    let path = format!("/sys/fs/cgroup{group}/{file}");
    std::fs::read_to_string(path).unwrap().trim().to_owned()
}

fn cpu_limit(group: &str) -> String {
    of_cgroup(group, "cpu.max")
}

/// A limit of a VM that runs holds at once, however busy its guest is, and goes as it came.
fn takes_no_more_than_it_may(otter: &mut Login, group: &str) {
    let used = || {
        let counted = of_cgroup(group, "cpu.stat");
        let used = counted.lines().next().unwrap();
        let used = used.strip_prefix("usage_usec ").unwrap().parse().unwrap();
        Duration::from_micros(used)
    };
    otter.ok(
        "banger vm ssh calm -- 'sh -c \"while :; do :; done\" > /dev/null 2>&1 < /dev/null & echo $! > /tmp/busy'",
    );
    otter.ok("banger vm set calm --cpu-limit 20%");
    assert_eq!(cpu_limit(group), "20000 100000");
    assert_eq!(otter.vm("calm")["spec"]["cpu_limit"], 20);
    let (begun, before) = (Instant::now(), used());
    std::thread::sleep(LOOK);
    let share = (used() - before).as_secs_f64() / begun.elapsed().as_secs_f64();
    println!(
        "LIMIT: of 20 % of a CPU a busy guest takes {:.1} %",
        share * 100.0
    );
    assert!(share < 0.24 && share > 0.05, "{share}");
    // A daemon that comes up brings back what was changed by hand.
    otter.ok(
        "systemctl --user set-property --runtime $(basename GROUP) CPUQuota=70%"
            .replace("GROUP", group)
            .as_str(),
    );
    assert_eq!(cpu_limit(group), "70000 100000");
    otter.ok("systemctl --user restart bangerd");
    otter.ok("banger vm show calm");
    assert_eq!(cpu_limit(group), "20000 100000");
    otter.ok("banger vm set calm --cpu-limit none");
    assert_eq!(cpu_limit(group), "max 100000");
    otter.ssh("calm", "kill $(cat /tmp/busy)");
}

/// The process of a VM that runs.
#[track_caller]
fn vmm(vm: &Value) -> u64 {
    assert_eq!(vm["phase"]["state"], "running", "{vm:#}");
    vm["attempt"]["vmm_pid"].as_u64().unwrap()
}

fn lives(pid: u64) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}
