//! What an installation gives an ordinary user.

use crate::host::{HELPER_SOCKET, install, root, state};
use crate::login::Login;
use std::path::Path;

#[test]
#[ignore = "runs inside the test host"]
fn an_ordinary_users_daemon_finds_the_helper_which_systemd_starts_when_it_is_asked() {
    install();
    assert!(Path::new(HELPER_SOCKET).exists());
    assert_eq!(state("banger-helper.socket"), "active");
    assert_eq!(state("banger-helper.service"), "inactive");

    let mut otter = Login::new();
    otter.has_images();
    assert_eq!(
        otter.ok("sh -c 'command -v banger'"),
        "/usr/local/bin/banger\n"
    );
    otter.ok("banger daemon start");
    let status = otter.json("banger daemon status");
    assert_eq!(status["mode"], "helper", "{status:#}");
    assert_eq!(state("banger-helper.service"), "active");
    let doctor = otter.run("banger doctor").stdout;
    assert!(doctor.contains("mode: helper: `banger-helper`"), "{doctor}");
    // Programs of administrators are not on this user's PATH, and are found.
    assert!(!doctor.contains("bad  "), "{doctor}");
    // It is confined as its unit and its own code say.
    let pid = root("systemctl show --property=MainPID --value banger-helper.service");
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.trim())).unwrap();
    assert!(status.contains("NoNewPrivs:\t1"), "{status}");
    assert!(status.contains("Seccomp:\t2"), "{status}");
    otter.ok("banger daemon stop");
    otter.log_out();
}
