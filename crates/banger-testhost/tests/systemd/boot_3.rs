//! The third boot, after the power was lost.

use crate::host::{HELPER_SOCKET, PREFIX, eventually, root, state, try_root, xtask};
use crate::login::{Login, USER};
use std::path::Path;

#[test]
#[ignore = "runs inside the test host"]
fn nothing_was_lost_and_nothing_is_left_in_the_end() {
    eventually("a VM is back", || {
        try_root(&format!("pgrep -u {USER} 'firecracker|qemu'")).ok()
    });
    let mut otter = Login::new();
    otter.ok("banger vm wait calm --timeout 100s");
    let why = otter.ok("banger vm why calm");
    assert!(why.contains("host rebooted"), "{why}");
    let heron = otter.vm("heron");
    assert_eq!(
        heron["phase"]["why"]["reason"], "host-rebooted",
        "{heron:#}"
    );
    assert_eq!(heron["desired"], "on", "{heron:#}");
    assert_eq!(
        otter.ssh("calm", "cat /root/mark"),
        "before the power went\n"
    );
    otter.ok("banger vm start heron --wait");
    assert_eq!(
        otter.ssh("heron", "cat /root/mark"),
        "before the power went\n"
    );

    otter.ok("banger vm delete calm heron --force --purge");
    otter.ok("banger daemon disable");
    otter.ok("banger daemon stop");
    let leftovers = || root("ip -brief link; nft list ruleset; losetup --all; dmsetup ls");
    eventually("the host is as it was", || {
        let leftovers = leftovers().to_lowercase();
        let ours = leftovers.contains("banger") || leftovers.contains("\nbv");
        (!ours).then_some(())
    });

    // What somebody forgot to undo is no file of the installation, and is named.
    let wants = "/.config/systemd/user/default.target.wants";
    let link = format!("$(echo ~{USER}){wants}/bangerd.service");
    root(&format!(
        "mkdir -p $(dirname {link}) && ln -s /nowhere {link}"
    ));
    let said = xtask("uninstall");
    assert!(
        said.contains(&format!("{wants}/bangerd.service: {USER} had")),
        "{said}"
    );
    assert!(!said.contains("left running"), "{said}");
    root(&format!("rm {link}"));
    assert!(!Path::new(HELPER_SOCKET).exists());
    assert!(!Path::new("/run/banger").exists());
    assert_eq!(state("banger-helper.socket"), "inactive");
    // Where there is none, systemctl fails.
    let list = "list-unit-files --no-legend 'banger*'";
    let known = root(&format!("systemctl {list} || true"))
        + &otter.run(&format!("systemctl --user {list}")).stdout;
    assert_eq!(known, "", "{said}");
    let left = root(&format!(
        "find {PREFIX} /etc/systemd /etc/udev /lib/udev -name '*banger*'"
    ));
    assert_eq!(left, "", "{said}");
    otter.log_out();
}
