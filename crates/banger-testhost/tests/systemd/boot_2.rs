//! The second boot, after a reboot in order.

use crate::host::{and_then, eventually, root, state, try_root};
use crate::login::{Login, USER, manager};

#[test]
#[ignore = "runs inside the test host"]
fn vms_were_stopped_in_order_and_those_with_autostart_are_back_before_anybody_logs_in() {
    eventually("the user's systemd has started the daemon", || {
        try_root(&format!("pgrep -u {USER} -x bangerd")).ok()
    });
    eventually("the user's systemd is ready", || {
        (state(&manager()) == "active").then_some(())
    });
    assert_eq!(root("loginctl list-sessions --no-legend"), "");
    eventually("a VM is back", || {
        try_root(&format!("pgrep -u {USER} 'firecracker|qemu'")).ok()
    });

    let mut otter = Login::new();
    assert_eq!(otter.json("banger daemon status")["mode"], "helper");
    otter.ok("banger vm wait calm --timeout 100s");
    let why = otter.ok("banger vm why calm");
    assert!(why.contains("host shut down"), "{why}");
    let heron = otter.vm("heron");
    assert_eq!(
        heron["phase"]["why"]["reason"], "host-shut-down",
        "{heron:#}"
    );
    assert_eq!(heron["desired"], "on", "{heron:#}");

    otter.ok("banger vm restore");
    otter.ok("banger vm wait heron --timeout 100s");
    for name in ["calm", "heron"] {
        // It was not even synced: the guest did that when it was asked to stop.
        assert_eq!(otter.ssh(name, "cat /root/mark"), "before the reboot\n");
        otter.ssh(name, "echo before the power went > /root/mark && sync");
    }
    otter.log_out();
    and_then("reset");
}
