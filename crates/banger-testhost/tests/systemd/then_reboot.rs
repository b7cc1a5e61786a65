//! The end of the first boot.

use crate::host::{and_then, install};
use crate::login::Login;

#[test]
#[ignore = "runs inside the test host"]
fn vms_run_when_the_host_is_rebooted() {
    install();
    let mut otter = Login::new();
    otter.ok("banger vm start calm heron --wait");
    for name in ["calm", "heron"] {
        otter.ssh(name, "echo before the reboot > /root/mark");
    }
    otter.log_out();
    and_then("reboot");
}
