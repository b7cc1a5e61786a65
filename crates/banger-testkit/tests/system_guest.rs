//! Real guests under emulation, each test a path from end to end.

use banger_testkit::env::TestEnv;
use banger_testkit::run::Running;
use banger_testkit::skip::skip;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

const TINY: [&str; 4] = ["--image", "tiny", "--memory", "192"];

fn create(env: &TestEnv, name: &str, more: &[&str]) -> Value {
    let mut args = vec!["vm", "create", "--name", name, "--wait", "--vcpu", "1"];
    args.extend(TINY);
    args.extend(more);
    env.ok(&args);
    env.vm(name)
}

fn ssh(env: &TestEnv, name: &str, command: &str) -> String {
    env.ok(&["vm", "ssh", name, "--", command])
}

/// The system's own `ssh` by what `banger ssh-config` prints, of a program whose path has a space.
fn plain_ssh(env: &TestEnv, host: &str, command: &str) -> String {
    let folder = env.folder().join("my programs");
    std::fs::create_dir(&folder).expect("the world's folder is ours");
    let program = folder.join("banger");
    std::fs::copy(env.libexec().join("banger"), &program).expect("the program is there");
    let mut printing = env.command(&program.display().to_string());
    let printed = Running::start(printing.arg("ssh-config")).finish();
    let config = folder.join("ssh.config");
    std::fs::write(&config, printed.stdout).expect("the folder is ours");
    let mut ssh = env.command("/usr/bin/ssh");
    ssh.arg("-F")
        .arg(&config)
        .args(["-o", "BatchMode=yes", host, command]);
    let said = Running::start(&mut ssh).finish();
    assert_eq!(said.status, 0, "{said:?}");
    said.stdout
}

#[test]
#[ignore = "system test"]
fn a_guest_keeps_its_files_and_outlives_its_daemon() {
    let Some(env) = TestEnv::real("a_guest_keeps_its_files_and_outlives_its_daemon") else {
        return;
    };
    let created = create(&env, "calm-otter", &["--disk-size", "1G"]);
    for stage in ["vmm_up", "kernel", "banger_init", "agent", "ssh", "ready"] {
        assert!(
            created["boot"][stage].is_u64(),
            "{stage}: {}",
            created["boot"]
        );
    }
    let attempt = &created["attempt"];
    if attempt["sandbox_missing"] == serde_json::json!([]) {
        assert_eq!(attempt["sandbox"].as_array().map(Vec::len), Some(7));
    } else {
        skip(
            "a_guest_keeps_its_files_and_outlives_its_daemon",
            format!("this host refuses a part of the sandbox: {attempt}"),
        );
    }
    let failed = env.banger(&["vm", "ssh", "calm-otter", "--", "exit 7"]);
    assert_eq!(failed.status, 7, "{}", failed.stderr);
    assert_eq!(ssh(&env, "calm-otter", "hostname").trim(), "calm-otter");
    assert_eq!(plain_ssh(&env, "calm-otter.vm", "hostname"), "calm-otter\n");
    ssh(
        &env,
        "calm-otter",
        "echo kept >/root/file; echo data >/data/file; sync",
    );

    let console = env
        .state()
        .join("vms")
        .join(created["id"].as_str().unwrap())
        .join("console.log");
    let before = std::fs::read(&console).unwrap();
    env.kill_daemon();
    let after = env.vm("calm-otter");
    assert_eq!(after["phase"]["state"], "running", "{after}");
    assert_eq!(after["attempt"]["vmm_pid"], created["attempt"]["vmm_pid"]);
    assert_eq!(ssh(&env, "calm-otter", "cat /root/file").trim(), "kept");
    assert!(
        std::fs::read(&console).unwrap().starts_with(&before),
        "the console lost something"
    );

    env.ok(&["vm", "stop", "calm-otter"]);
    let stopped = env.vm("calm-otter");
    assert_eq!(stopped["phase"]["why"]["reason"], "asked", "{stopped}");
    env.ok(&["vm", "start", "calm-otter"]);
    env.ok(&["vm", "wait", "calm-otter"]);
    assert_eq!(
        ssh(&env, "calm-otter", "cat /root/file /data/file"),
        "kept\ndata\n"
    );
    assert!(env.ok(&["vm", "logs", "calm-otter"]).contains("Power down"));
    env.ok(&["vm", "delete", "--force", "--purge", "calm-otter"]);
    assert_eq!(env.vm_folders(), Vec::<String>::new());
}

#[test]
#[ignore = "system test"]
fn a_guest_that_powers_off_or_reboots_is_stopped_with_that_reason() {
    let Some(env) = TestEnv::real("a_guest_that_powers_off_or_reboots_is_stopped_with_that_reason")
    else {
        return;
    };
    create(&env, "otter", &["--storage", "copy"]);
    let free = ssh(&env, "otter", "df -m / | tail -n 1 | awk '{print $4}'");
    assert!(
        free.trim().parse::<u64>().unwrap() > 7000,
        "the copy was not grown: {free}"
    );
    for (command, reason) in [("poweroff", "guest-poweroff"), ("reboot", "guest-reboot")] {
        env.ok(&["vm", "start", "otter"]);
        env.ok(&["vm", "wait", "otter"]);
        env.banger(&["vm", "ssh", "otter", "--", command]);
        env.ok(&["vm", "wait", "otter", "--for", "stopped"]);
        let vm = env.vm("otter");
        assert_eq!(vm["phase"]["why"]["reason"], reason, "{vm}");
    }
    assert_eq!(env.vm("otter")["phase"]["state"], "stopped");
}

#[test]
#[ignore = "system test"]
fn a_paused_guest_goes_on_where_it_was() {
    let Some(env) = TestEnv::real("a_paused_guest_goes_on_where_it_was") else {
        return;
    };
    create(&env, "otter", &[]);
    env.ok(&["vm", "pause", "otter"]);
    assert_eq!(env.vm("otter")["phase"]["state"], "paused");
    let refused = env.banger(&["vm", "start", "otter"]);
    assert_eq!(refused.status, 5);
    assert!(
        refused.stderr.contains("banger vm resume otter"),
        "{}",
        refused.stderr
    );
    env.ok(&["vm", "resume", "otter"]);
    assert_eq!(ssh(&env, "otter", "echo there").trim(), "there");
    env.ok(&["vm", "kill", "otter"]);
    assert_eq!(env.vm("otter")["phase"]["why"]["reason"], "killed");
}

/// Everything as an ordinary user, in a mount namespace with a tun node that such a user may open.
#[test]
#[ignore = "system test"]
fn an_ordinary_user_runs_a_guest_without_any_root() {
    const TEST: &str = "an_ordinary_user_runs_a_guest_without_any_root";
    let Some(env) = TestEnv::real(TEST) else {
        return;
    };
    let home = tempfile::tempdir().unwrap();
    if let Err(why) = share(env.data(), home.path()) {
        skip(TEST, why);
        return;
    }
    let script = home.path().join("as-user.sh");
    std::fs::write(&script, AS_USER).unwrap();
    #[expect(
        clippy::disallowed_methods,
        reason = "tests make namespaces of their own"
    )]
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "--", "sh"])
        .arg(&script)
        .arg(home.path())
        .arg(env.libexec())
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .output()
        .unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{text}");
    assert!(text.contains("guest says otter"), "{text}");
    assert!(text.contains("mode rootless"), "{text}");
    assert!(text.contains("after the daemon's death: otter"), "{text}");
    assert!(text.contains("by its name: otter"), "{text}");
    assert!(text.contains("without the node: /dev/net/tun"), "{text}");
    if text.contains("sandbox missing") {
        skip(TEST, "this host refuses a part of the sandbox");
    } else {
        let layers = "sandbox user, network, pid, mount, ipc, capabilities, landlock";
        assert!(text.contains(layers), "{text}");
    }
}

/// `$1` is the user's home, `$2` the folder of programs.
const AS_USER: &str = r#"
set -eu
home=$1 programs=$2
mount -t tmpfs tmpfs /mnt
mknod /mnt/tun c 10 200
chmod 0666 /mnt/tun
mknod /mnt/closed c 10 200
chmod 0600 /mnt/closed
mount --bind /mnt/closed /dev/net/tun
chown -R 65534:65534 "$home"
as_user() {
    setpriv --reuid 65534 --regid 65534 --clear-groups \
        env -i HOME="$home" PATH="$home/bin:/usr/sbin:/usr/bin:/sbin:/bin" sh -euc "$1"
}
mkdir "$home/bin"
cp "$programs"/* "$home/bin/"
chown -R 65534:65534 "$home/bin"
as_user '
    banger vm create --name otter --image tiny --memory 192 --no-start >/dev/null
    if banger vm start otter >/dev/null 2>"$HOME/error"; then echo "it started without the node"; exit 1; fi
    echo "without the node: $(grep -o /dev/net/tun "$HOME/error" | head -n 1)"
    banger daemon stop >/dev/null
'
mount --bind /mnt/tun /dev/net/tun
as_user '
    trap "banger daemon stop --vms >/dev/null" EXIT
    banger vm start otter >/dev/null
    banger vm wait otter >/dev/null
    echo "guest says $(banger vm ssh otter -- hostname)"
    banger daemon status | sed "s/  */ /"
    banger vm show otter | sed "s/  */ /" | grep ^sandbox
    kill -KILL "$(banger daemon status --json | sed -n "s/.*\"pid\": *\([0-9]*\).*/\1/p")"
    echo "after the daemon'"'"'s death: $(banger vm ssh otter -- hostname)"
    banger ssh-config > "$HOME/ssh.config"
    echo "by its name: $(ssh -F "$HOME/ssh.config" otter.vm hostname)"
    banger vm stop otter >/dev/null
    banger vm delete --purge otter >/dev/null
'
"#;

/// Copies the fixtures for another user.
fn share(data: &Path, home: &Path) -> Result<(), String> {
    use std::os::unix::fs::PermissionsExt;
    let target: PathBuf = home.join(".local/share/banger");
    std::fs::create_dir_all(&target).map_err(|error| error.to_string())?;
    std::fs::set_permissions(home, std::fs::Permissions::from_mode(0o755))
        .map_err(|error| error.to_string())?;
    for folder in ["images", "kernels"] {
        #[expect(clippy::disallowed_methods, reason = "cp keeps holes and modes")]
        let copied = Command::new("cp")
            .arg("-a")
            .arg(data.join(folder))
            .arg(&target)
            .status();
        match copied {
            Ok(status) if status.success() => {}
            other => return Err(format!("the fixtures could not be copied: {other:?}")),
        }
    }
    Ok(())
}
