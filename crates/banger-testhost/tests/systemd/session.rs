//! What becomes of VMs when their user logs out, and in again.

use crate::host::{eventually, install, root, state};
use crate::login::{Login, USER, manager};
use serde_json::Value;
use std::path::Path;

#[test]
#[ignore = "runs inside the test host"]
fn vms_are_stopped_in_order_when_their_user_logs_out_but_not_with_linger_and_come_back_with_autostart()
 {
    install();
    let mut otter = Login::new();
    otter.ok("banger daemon enable --no-linger");
    let doctor = otter.run("banger doctor").stdout;
    assert!(doctor.contains("linger is off"), "{doctor}");
    let calm = vmm(&otter.create("calm", "--autostart"));
    let heron = vmm(&otter.create("heron", ""));
    for vmm in [calm, heron] {
        let groups = std::fs::read_to_string(format!("/proc/{vmm}/cgroup")).unwrap();
        assert!(groups.contains("/bangerd.service"), "{groups}");
    }

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

/// The process of a VM that runs.
#[track_caller]
fn vmm(vm: &Value) -> u64 {
    assert_eq!(vm["phase"]["state"], "running", "{vm:#}");
    vm["attempt"]["vmm_pid"].as_u64().unwrap()
}

fn lives(pid: u64) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}
