//! The `banger` program against a daemon that answers from fixed text, and against none.

#![expect(clippy::unwrap_used, reason = "a test's failure is a panic")]

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A home of its own for each test, with a fake `bangerd` that is stopped at the end.
struct TestEnv {
    folder: tempfile::TempDir,
}

impl TestEnv {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let env = Self { folder };
        std::fs::create_dir(env.path("libexec")).unwrap();
        // A copy, since a build is identified by its file. Made by another process: what this one has open for writing
        // while another of its threads starts something cannot be run.
        let copied = copy(&fake_bangerd(), &env.path("libexec/bangerd"));
        assert!(copied.success());
        env
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    #[expect(clippy::disallowed_methods, reason = "the program under test")]
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_banger"));
        command
            .args(arguments)
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", self.path("home"))
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .env("BANGER_LIBEXEC", self.path("libexec"))
            .stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Run {
        Run::of(self.command(arguments).output().unwrap())
    }

    fn run_with(&self, variable: (&str, &str), arguments: &[&str]) -> Run {
        Run::of(
            self.command(arguments)
                .env(variable.0, variable.1)
                .output()
                .unwrap(),
        )
    }

    fn state(&self, name: &str) -> String {
        let path = self.path("home/.local/state/banger").join(name);
        std::fs::read_to_string(path).unwrap_or_default()
    }

    fn starts(&self) -> usize {
        self.state("starts").lines().count()
    }
}

impl Drop for TestEnv {
    fn drop(&mut self) {
        let _ = self.command(&["daemon", "stop"]).output();
    }
}

#[expect(clippy::disallowed_methods, reason = "makes a copy for the test")]
fn copy(from: &Path, to: &Path) -> std::process::ExitStatus {
    Command::new("cp").arg(from).arg(to).status().unwrap()
}

fn fake_bangerd() -> PathBuf {
    let tests = std::env::current_exe().unwrap();
    let built = tests
        .parent()
        .and_then(Path::parent)
        .unwrap()
        .join("examples/fake-bangerd");
    assert!(
        built.is_file(),
        "run the whole package's tests, so that {} is built",
        built.display()
    );
    built
}

/// How the program ended.
#[derive(Debug)]
struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Run {
    fn of(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    #[track_caller]
    fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self:?}");
        self
    }
}

#[test]
fn the_daemon_is_started_when_it_is_needed_and_only_then() {
    let env = TestEnv::new();
    env.run(&["--version"]).expect(0);
    env.run(&["explain"]).expect(0);
    env.run(&["version"]).expect(0);
    let status = env.run(&["daemon", "status"]).expect(3);
    assert_eq!(status.stdout, "daemon  not running\n");
    assert_eq!(
        env.run(&["daemon", "status", "--json"]).expect(3).stdout,
        "null\n"
    );
    assert_eq!(env.starts(), 0);
    let list = env.run(&["vm", "list"]).expect(0);
    assert!(
        list.stdout.contains("calm-otter  stopped (never started)"),
        "{list:?}"
    );
    env.run(&["vm", "list"]).expect(0);
    assert_eq!(env.starts(), 1);
    env.run(&["daemon", "status"]).expect(0);
    env.run(&["daemon", "stop"]).expect(0);
    env.run(&["daemon", "status"]).expect(3);
    let again = env.run(&["daemon", "stop"]).expect(0);
    assert_eq!(again.stderr, "the daemon does not run\n");
}

#[test]
fn several_commands_at_once_start_exactly_one_daemon() {
    let env = TestEnv::new();
    let children: Vec<_> = (0..6)
        .map(|_| {
            env.command(&["vm", "list"])
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    for child in children {
        Run::of(child.wait_with_output().unwrap()).expect(0);
    }
    assert_eq!(env.starts(), 1);
}

#[test]
fn a_stale_socket_is_no_hindrance() {
    let env = TestEnv::new();
    std::fs::create_dir_all(env.path("run/banger")).unwrap();
    set_mode(&env.path("run/banger"), 0o700);
    drop(std::os::unix::net::UnixListener::bind(env.path("run/banger/bangerd.sock")).unwrap());
    env.run(&["vm", "list"]).expect(0);
}

#[test]
fn a_daemon_of_another_build_is_replaced_but_not_twice_in_a_minute() {
    let env = TestEnv::new();
    env.run_with(("FAKE_BUILD", "old"), &["vm", "list"])
        .expect(0);
    assert_eq!(env.starts(), 1);
    let replaced = env
        .run_with(("FAKE_BUILD", "older"), &["vm", "list"])
        .expect(0);
    assert!(
        replaced.stderr.contains("it is replaced (VMs run on)"),
        "{replaced:?}"
    );
    assert_eq!(env.starts(), 2);
    assert!(
        env.state("requests")
            .contains("POST /v1/daemon/stop HTTP/1.1{\"vms\":false}")
    );
    env.run(&["vm", "list"]).expect(0);
    assert_eq!(env.starts(), 2);
    env.run(&["daemon", "restart"]).expect(0);
    assert_eq!(env.starts(), 3);
}

#[test]
fn without_autostart_nothing_is_started() {
    let env = TestEnv::new();
    let run = env
        .run_with(("BANGER_NO_AUTOSTART", "1"), &["vm", "list"])
        .expect(3);
    assert!(
        run.stderr
            .starts_with("error: cannot connect to the daemon's socket"),
        "{run:?}"
    );
    assert!(
        run.stderr.contains("hint: BANGER_NO_AUTOSTART is set"),
        "{run:?}"
    );
    assert_eq!(env.starts(), 0);
}

#[test]
fn what_a_daemon_says_before_it_fails_is_passed_on() {
    let env = TestEnv::new();
    let run = env
        .run_with(("FAKE_BANGERD", "error"), &["vm", "list"])
        .expect(11);
    assert_eq!(
        run.stderr,
        "error: the database is newer\nhint: install a newer banger\n"
    );
    let run = env
        .run_with(("FAKE_BANGERD", "silent-exit"), &["vm", "list"])
        .expect(3);
    assert!(
        run.stderr
            .contains("ended before it was ready (exit status: 4)"),
        "{run:?}"
    );
    assert!(
        run.stderr
            .contains("caused by: cannot find my \\x1b[31mfeet\n"),
        "{run:?}"
    );
    let run = env
        .run_with(("FAKE_BANGERD", "garbage"), &["vm", "list"])
        .expect(3);
    assert!(
        run.stderr
            .contains("said something else than that it is ready"),
        "{run:?}"
    );
    std::fs::remove_file(env.path("libexec/bangerd")).unwrap();
    let run = env.run(&["vm", "list"]);
    if run.code != Some(0) {
        // Beside the program under test a real one may have been built.
        assert!(
            run.stderr.contains("cannot find the program `bangerd`"),
            "{run:?}"
        );
        run.expect(3);
    }
}

#[test]
fn what_is_in_the_way_of_the_socket_is_named() {
    let env = TestEnv::new();
    let socket = env.path("run/banger/bangerd.sock");
    std::fs::create_dir_all(&socket).unwrap();
    let run = env.run(&["vm", "list"]).expect(3);
    assert!(run.stderr.contains("is a directory"), "{run:?}");
    std::fs::remove_dir(&socket).unwrap();
    set_mode(&env.path("run/banger"), 0o777);
    let run = env.run(&["vm", "list"]).expect(7);
    assert!(
        run.stderr
            .contains("others may write to the runtime folder"),
        "{run:?}"
    );
    assert_eq!(env.starts(), 0);
}

#[test]
fn a_long_home_is_no_hindrance() {
    let env = TestEnv::new();
    let home = env.path(&"h".repeat(90));
    let list = |arguments: &[&str]| {
        let mut command = env.command(arguments);
        command.env("HOME", &home).env_remove("XDG_RUNTIME_DIR");
        command
    };
    if banger_runtime_is_home() {
        // The fake binds the plain path, so only what the client does first is seen here.
        let output = list(&["daemon", "status"]).output().unwrap();
        Run::of(output).expect(3);
    } else {
        eprintln!(
            "SKIPPED: a_long_home_is_no_hindrance: /run/user of this uid exists and would be used"
        );
    }
}

/// Whether without XDG_RUNTIME_DIR the socket is below HOME.
fn banger_runtime_is_home() -> bool {
    use std::os::unix::fs::MetadataExt;
    let uid = std::fs::metadata("/proc/self").unwrap().uid();
    !Path::new(&format!("/run/user/{uid}")).exists()
}

#[test]
fn bad_values_are_refused_before_anything_is_sent() {
    let env = TestEnv::new();
    for (arguments, says) in [
        (
            vec!["vm", "create", "--name", "Bad_Name"],
            "only a-z, 0-9 and hyphens are allowed",
        ),
        (
            vec!["vm", "create", "--vcpu", "0"],
            "0 vCPUs asked for; 1 to 16 are allowed",
        ),
        (
            vec!["vm", "create", "--vcpu", "17"],
            "17 vCPUs asked for; 1 to 16 are allowed",
        ),
        (
            vec!["vm", "create", "--memory", "64"],
            "64 MiB of memory asked for",
        ),
        (
            vec!["vm", "create", "--memory", "40000"],
            "40000 MiB of memory asked for",
        ),
        (
            vec!["vm", "create", "--no-start", "--wait"],
            "cannot be used with",
        ),
        (vec!["vm", "set", "otter"], "required"),
        (vec!["vm", "set", "otter", "--nat", "maybe"], "on, off"),
        (
            vec!["vm", "create", "-p", "80"],
            "is not a published port; write [ADDRESS:]HOST:GUEST[/udp]",
        ),
        (vec!["vm", "start", "otter", "--timeout", "5s"], "--wait"),
        (
            vec!["vm", "undelete", "otter", "--name", "Otter"],
            "only a-z, 0-9 and hyphens are allowed",
        ),
        (vec!["vm", "reset"], "required"),
        (vec!["port", "add", "otter"], "required"),
        (
            vec!["port", "add", "otter", "8080:x"],
            "is not a published port",
        ),
        (
            vec!["port", "rm", "otter", "x"],
            "is not a port of the host; write [ADDRESS:]HOST[/udp]",
        ),
        (vec!["nat", "up"], "required"),
        (vec!["net", "join", "otter"], "required"),
        (
            vec!["vm", "wait", "otter", "--timeout", "soon"],
            "is not a duration",
        ),
        (
            vec!["driver", "install", "--sha256", "abc"],
            "64 hexadecimal digits",
        ),
        (
            vec!["trash", "empty", "otter"],
            "`banger vm delete --purge otter` removes this one alone",
        ),
        (vec!["explain", "no-such-code"], "no-such-code"),
        (vec!["vm"], "Usage"),
    ] {
        let run = env.run(&arguments).expect(2);
        assert!(run.stderr.contains(says), "{arguments:?}: {run:?}");
        assert_eq!(run.stdout, "");
    }
    for arguments in [
        vec!["kernel", "import", "/nowhere/vmlinux"],
        vec!["image", "build", "--packages", "/nowhere/packages.apt"],
        vec!["driver", "install", "--from", "/nowhere/firecracker"],
    ] {
        let run = env.run(&arguments).expect(9);
        assert!(run.stderr.starts_with("error: cannot read"), "{run:?}");
        assert!(run.stderr.contains("/nowhere/"), "{run:?}");
    }
    assert_eq!(env.starts(), 0);
}

#[test]
fn a_refusal_of_the_daemon_is_rendered_with_its_exit_code() {
    let env = TestEnv::new();
    let run = env.run(&["vm", "show", "nobody"]).expect(4);
    assert_eq!(
        run.stderr,
        "error: there is no vm `nobody`\nhint: did you mean `calm-otter`?\n"
    );
    assert_eq!(run.stdout, "");
}

#[test]
fn a_verb_for_several_vms_does_all_it_can() {
    let env = TestEnv::new();
    let run = env.run(&["vm", "stop", "fox", "nobody", "owl"]).expect(4);
    assert_eq!(
        run.stdout,
        "fox: stopped (never started)\nowl: stopped (never started)\n"
    );
    assert_eq!(
        run.stderr,
        "error: there is no vm `nobody`\nhint: did you mean `calm-otter`?\n"
    );
}

#[test]
fn json_is_the_apis_own_objects() {
    let env = TestEnv::new();
    let list: serde_json::Value =
        serde_json::from_str(&env.run(&["vm", "list", "--json"]).expect(0).stdout).unwrap();
    assert_eq!(list[0]["name"], "calm-otter");
    assert_eq!(list[0]["phase"]["state"], "stopped");
    assert_eq!(list[0]["address"], "172.16.0.2");
    let one: serde_json::Value =
        serde_json::from_str(&env.run(&["vm", "start", "fox", "--json"]).expect(0).stdout).unwrap();
    assert_eq!(one["name"], "fox");
    let several: serde_json::Value = serde_json::from_str(
        &env.run(&["vm", "start", "fox", "owl", "--json"])
            .expect(0)
            .stdout,
    )
    .unwrap();
    assert_eq!(several[1]["name"], "owl");
}

#[test]
fn create_prints_name_address_and_the_next_step() {
    let env = TestEnv::new();
    let run = env
        .run(&["vm", "create", "--no-start", "--memory", "2G"])
        .expect(0);
    assert_eq!(
        run.stdout,
        "name     calm-otter\naddress  172.16.0.2\nphase    stopped (never started)\n"
    );
    assert_eq!(run.stderr, "next: banger vm start calm-otter\n");
    let sent = env.state("requests");
    assert!(sent.contains("\"memory_mib\":2048"), "{sent}");
    assert!(sent.contains("\"start\":false"), "{sent}");
}

#[test]
fn the_verbs_about_the_network_send_what_they_say() {
    let env = TestEnv::new();
    let words = [
        "vm",
        "create",
        "--no-start",
        "--nat",
        "-p",
        "8080:80",
        "--autostart",
    ];
    let created = env.run(&words).expect(0);
    let alone = "warning: nothing starts the daemon with this host, so `calm-otter` does not";
    assert!(created.stderr.contains(alone), "{created:?}");
    assert!(created.stderr.contains("hint: "), "{created:?}");
    let set = env
        .run(&["vm", "set", "fox", "--autostart", "on"])
        .expect(0);
    assert!(set.stderr.contains("so `fox` does not"), "{set:?}");
    let set = env.run(&["vm", "set", "fox", "--autostart", "off"]);
    assert_eq!(set.expect(0).stderr, "");
    env.run(&["vm", "set", "fox", "--name", "owl", "--nat", "off"])
        .expect(0);
    let up = env.run(&["nat", "up", "fox", "owl"]).expect(0);
    assert_eq!(up.stdout, "fox: NAT is off\nowl: NAT is off\n");
    env.run(&["port", "add", "fox", "0.0.0.0:53:5353/udp"])
        .expect(0);
    env.run(&["port", "rm", "fox", "8080"]).expect(0);
    let join = env.run(&["net", "join", "fox", "owl"]).expect(0);
    assert_eq!(join.stdout, "fox and owl reach each other\n");
    env.run(&["net", "leave", "fox", "owl"]).expect(0);
    env.run(&["vm", "undelete", "fox", "--name", "owl"])
        .expect(0);
    env.run(&["vm", "reset", "fox", "--storage", "copy"])
        .expect(0);
    env.run(&["vm", "restore", "--autostart"]).expect(0);
    let sent = env.state("requests");
    for says in [
        "POST /v1/vms HTTP/1.1{\"autostart\":true,",
        "\"nat\":true,\"nat_private\":false,\"overlay_bytes\":null,\"ports\":[{\"guest_port\":80,\"listen\":\"127.0.0.1:8080\",\"protocol\":\"tcp\"}]",
        "\"name\":\"owl\",\"nat\":false,",
        "PATCH /v1/vms/owl",
        "POST /v1/vms/fox/ports HTTP/1.1{\"guest_port\":5353,\"listen\":\"0.0.0.0:53\",\"protocol\":\"udp\"}",
        "DELETE /v1/vms/fox/ports?listen=127.0.0.1%3A8080&protocol=tcp",
        "POST /v1/vms/fox/joins HTTP/1.1{\"other\":\"owl\"}",
        "DELETE /v1/vms/fox/joins?other=owl",
        "POST /v1/vms/fox/undelete HTTP/1.1{\"name\":\"owl\"}",
        "POST /v1/vms/fox/reset HTTP/1.1{\"storage\":\"copy\"}",
        "POST /v1/restore HTTP/1.1{\"autostart\":true}",
    ] {
        assert!(sent.contains(says), "{says} is not in\n{sent}");
    }
}

#[test]
fn who_closes_the_way_out_is_told_with_what_helps() {
    let env = TestEnv::new();
    let status = env.run(&["nat", "status"]).expect(0);
    assert!(
        status.stdout.contains("calm-otter  172.16.0.2  on   on"),
        "{status:?}"
    );
    assert!(
        status.stderr.starts_with(
            "warning: guests do not reach the internet: chain FORWARD of table ip filter"
        ) && status
            .stderr
            .contains("hint: as root: iptables -I DOCKER-USER -j ACCEPT\n"),
        "{status:?}"
    );
    env.run(&["nat", "status", "owl"]).expect(4);
    let value: serde_json::Value = serde_json::from_str(
        &env.run(&["nat", "status", "calm", "--json"])
            .expect(0)
            .stdout,
    )
    .unwrap();
    assert_eq!(value["vms"][0]["nat_now"], true);
    assert_eq!(value["way_out"]["by"][0], "eth0");
    let ports = env.run(&["port", "list"]).expect(0);
    assert!(
        ports
            .stdout
            .contains("127.0.0.1:8080/tcp  80     1            open"),
        "{ports:?}"
    );
    let joins = env.run(&["net", "status"]).expect(0);
    assert!(
        joins.stdout.contains("calm-otter  172.16.0.2  fox"),
        "{joins:?}"
    );
}

#[test]
fn what_is_left_of_a_repair_or_in_the_trash_is_an_exit_code() {
    let env = TestEnv::new();
    let list = env.run(&["host", "ls"]).expect(0);
    assert!(
        list.stdout.contains("bt1f2e3d4c5b  calm-otter  left over"),
        "{list:?}"
    );
    let clean = env.run(&["host", "clean"]).expect(0);
    assert_eq!(clean.stdout, "removed tap bt1f2e3d4c5b\n");
    let repair = env.run(&["doctor", "--repair"]).expect(7);
    assert_eq!(repair.stdout, "loaded the rules\n");
    assert_eq!(
        repair.stderr,
        "warning: left: veth bv1\ncaused by: it is busy\nhint: end who uses it\n"
    );
    // Without a terminal there is nobody to ask.
    let empty = env.run(&["trash", "empty"]).expect(8);
    assert_eq!(empty.stdout, "calm-otter: purged\n");
    assert_eq!(empty.stderr, "error: cannot purge `fox`\n");
    let restore = env.run(&["vm", "restore"]).expect(0);
    assert_eq!(restore.stdout, "calm-otter: started\n");
    let names = env.run(&["dns", "list"]).expect(0);
    assert_eq!(
        names.stdout,
        "NAME           ADDRESS\ncalm-otter.vm  172.16.0.2\n"
    );
}

/// A terminal: the person's side of it, and the program's.
fn terminal() -> (std::fs::File, std::fs::File) {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let person = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&person).unwrap();
    unlockpt(&person).unwrap();
    let name = ptsname(&person, Vec::new()).unwrap();
    let terminal = std::fs::File::options()
        .read(true)
        .write(true)
        .open(name.to_str().unwrap())
        .unwrap();
    (person.into(), terminal)
}

/// Runs the program at a terminal whose person answers `answer`; what it said is in `stdout`.
fn at_a_terminal(env: &TestEnv, arguments: &[&str], answer: &str) -> Run {
    let (mut person, terminal) = terminal();
    // Typed ahead: a terminal keeps what was typed until it is read.
    person.write_all(answer.as_bytes()).unwrap();
    let mut command = env.command(arguments);
    command
        .stdin(terminal.try_clone().unwrap())
        .stderr(terminal)
        .stdout(Stdio::piped());
    Run::of(command.output().unwrap())
}

/// A program at a terminal that is read as it speaks.
struct Spoken {
    child: std::process::Child,
    person: std::fs::File,
    said: String,
}

impl Spoken {
    fn start(env: &TestEnv, arguments: &[&str]) -> Self {
        let (person, terminal) = terminal();
        let mut command = env.command(arguments);
        let child = command.stderr(terminal).stdout(Stdio::piped()).spawn();
        Self {
            child: child.unwrap(),
            person,
            said: String::new(),
        }
    }

    /// Reads until it has said `words`, or has ended.
    fn hear(&mut self, words: &str) {
        let mut buffer = [0; 4096];
        while !self.said.contains(words) {
            // A terminal whose other side is closed is an error.
            match self.person.read(&mut buffer) {
                Ok(0) | Err(_) => break,
                Ok(bytes) => self
                    .said
                    .push_str(&String::from_utf8_lossy(&buffer[..bytes])),
            }
        }
    }

    fn interrupt(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    }
}

#[test]
fn what_takes_long_says_so_at_a_terminal_and_what_goes_on_after_ctrl_c() {
    let env = TestEnv::new();
    env.run_with(("FAKE_BANGERD", "slow"), &["daemon", "start"])
        .expect(0);
    let verbs: [(&[&str], &str, &str); 12] = [
        (&["vm", "create"], "the VM to be made", "vm list"),
        (
            &["vm", "create", "--storage", "copy"],
            "a copy of its image",
            "vm list",
        ),
        (&["vm", "start", "fox"], "the start of fox", "vm list"),
        (
            &["vm", "stop", "fox", "owl"],
            "the shutdown of fox, owl",
            "vm list",
        ),
        (&["vm", "restart", "fox"], "the restart of fox", "vm list"),
        (
            &["vm", "set", "fox", "--driver", "qemu"],
            "the change of fox",
            "vm show fox",
        ),
        (&["vm", "reset", "fox"], "a fresh `/` of fox", "vm why"),
        (
            &["vm", "delete", "fox"],
            "the deletion of fox",
            "trash list",
        ),
        (&["vm", "restore"], "stopped VMs to start", "vm list"),
        (&["trash", "empty"], "to be removed", "trash list"),
        (&["host", "clean", "--force"], "the VMs to stop", "host ls"),
        (
            &["daemon", "stop", "--vms"],
            "the VMs to shut down",
            "daemon stop",
        ),
    ];
    let mut all: Vec<Spoken> = verbs
        .iter()
        .map(|(arguments, ..)| Spoken::start(&env, arguments))
        .collect();
    for (spoken, (arguments, what, look)) in all.iter_mut().zip(verbs) {
        spoken.hear("waiting for ");
        spoken.interrupt();
        spoken.hear("never said");
        let code = spoken.child.wait().unwrap().code();
        let said = &spoken.said;
        assert_eq!(code, Some(130), "{arguments:?}: {said}");
        assert!(said.contains(what), "{arguments:?}: {said}");
        let (_, after) = said.split_once("no longer waiting; ").unwrap();
        let look = format!("`banger {look}");
        assert!(after.contains(&look), "{arguments:?}: {said}");
    }
}

#[test]
fn what_cannot_be_undone_asks_at_a_terminal() {
    let env = TestEnv::new();
    for arguments in [
        &["vm", "reset", "fox"][..],
        &["vm", "delete", "--purge", "fox"],
        &["vm", "set", "fox", "--image", "web"],
        &["trash", "empty"],
    ] {
        at_a_terminal(&env, arguments, "no\n").expect(130);
    }
    assert_eq!(env.starts(), 0);
    at_a_terminal(&env, &["vm", "delete", "fox"], "").expect(0);
    at_a_terminal(&env, &["vm", "reset", "fox"], "yes\n").expect(0);
    at_a_terminal(&env, &["vm", "reset", "--yes", "owl"], "").expect(0);
    let sent = env.state("requests");
    assert!(
        sent.contains("fox/reset") && sent.contains("owl/reset"),
        "{sent}"
    );
}

#[test]
fn ssh_to_a_stopped_vm_says_how_to_start_it() {
    let env = TestEnv::new();
    let run = env.run(&["vm", "ssh", "fox", "--", "true"]).expect(5);
    assert_eq!(
        run.stderr,
        "error: vm `fox` is stopped (never started)\nhint: `banger vm start fox`\n"
    );
}

#[test]
fn the_daemons_log_is_read_without_the_daemon() {
    let env = TestEnv::new();
    let missing = env.run(&["daemon", "logs"]).expect(9);
    assert!(
        missing
            .stderr
            .contains("hint: the daemon makes it when it starts"),
        "{missing:?}"
    );
    std::fs::create_dir_all(env.path("home/.local/state/banger")).unwrap();
    std::fs::write(
        env.path("home/.local/state/banger/bangerd.log"),
        "one\ntwo\n",
    )
    .unwrap();
    assert_eq!(env.run(&["daemon", "logs"]).expect(0).stdout, "one\ntwo\n");
    assert_eq!(
        env.run(&["daemon", "logs", "-n", "1"]).expect(0).stdout,
        "two\n"
    );
    assert_eq!(env.starts(), 0);
}

#[test]
fn completion_never_starts_the_daemon_and_never_complains() {
    let env = TestEnv::new();
    let complete = |words: &[&str]| {
        let mut command = env.command(&[&["--", "banger"], words, &[""]].concat());
        command
            .env("COMPLETE", "bash")
            .env("_CLAP_COMPLETE_INDEX", (words.len() + 1).to_string())
            .env("_CLAP_IFS", "\n");
        Run::of(command.output().unwrap()).expect(0)
    };
    let none = complete(&["vm", "show"]);
    assert!(!none.stdout.contains("calm-otter"), "{none:?}");
    assert_eq!(none.stderr, "");
    assert_eq!(env.starts(), 0);
    env.run(&["daemon", "start"]).expect(0);
    let some = complete(&["vm", "show"]);
    assert!(some.stdout.contains("calm-otter"), "{some:?}");
    let places = complete(&["port", "rm", "calm-otter"]);
    assert!(places.stdout.contains("8080"), "{places:?}");
    let deleted = complete(&["vm", "delete"]).stdout;
    assert!(deleted.contains("calm-otter") && !deleted.contains("old-owl"));
    let purged = complete(&["vm", "delete", "--purge"]).stdout;
    assert!(purged.contains("calm-otter") && purged.contains("old-owl"));
    let script = env.run(&["completions", "bash"]).expect(0);
    assert!(script.stdout.contains("COMPLETE=\"bash\""), "{script:?}");
    // The function that the last line calls is the one that is defined.
    let script = env.run(&["completions", "zsh"]).expect(0).stdout;
    let defined = "function _clap_dynamic_completer_banger()";
    assert!(
        script.contains(defined) && script.starts_with("#compdef banger\n"),
        "{script}"
    );
}

#[test]
fn explain_tells_of_every_code() {
    let env = TestEnv::new();
    let all = env.run(&["explain"]).expect(0);
    for code in banger_api::error::ErrorCode::ALL {
        assert!(all.stdout.contains(code.name()), "{code:?}");
        let one = env.run(&["explain", code.name()]).expect(0);
        assert!(
            one.stdout
                .contains(&format!("(exit code {})", code.exit_code())),
            "{one:?}"
        );
    }
    let help = env.run(&["--help"]).expect(0);
    assert!(
        help.stdout.contains("Exit codes:\n  0    done\n"),
        "{help:?}"
    );
}

fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}
