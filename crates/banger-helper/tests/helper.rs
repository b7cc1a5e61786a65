//! `banger-helper` as the machine's users meet it, honest and other: the program itself, as root, in networks that the
//! tests make.

#![expect(clippy::unwrap_used, reason = "a test fails where it fails")]

mod machine;

use banger_host::host_side::{HelperClient, HelperError, MAX_INSTANCES};
use banger_host::net::seqpacket::{self, Place};
use banger_host::op::{HostAnswer, HostOp, HostReply, TOO_MANY_REQUESTS};
use banger_host::seldom;
use machine::{Instance, Machine, SERVER, forwards, run, sh, wait_for};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::process::{Pid, Signal, Uid};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_banger-helper");
const ALICE: u32 = 54_321;
const BOB: u32 = 54_322;

/// A running helper; it is killed at the end.
struct Helper {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
    folder: PathBuf,
    _directory: tempfile::TempDir,
}

impl Helper {
    fn start(machine: &Machine) -> Self {
        Self::start_with(machine, &[])
    }

    fn start_with(machine: &Machine, args: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(directory.path(), everybody).unwrap();
        let socket = directory.path().join("helper.sock");
        let log = directory.path().join("log");
        let child = launch(&socket, &machine.folder, &log, args);
        Self {
            child,
            socket,
            log,
            folder: machine.folder.clone(),
            _directory: directory,
        }
    }

    /// Kills it, and starts it again as systemd would.
    fn restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = launch(&self.socket, &self.folder, &self.log, &[]);
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    fn status(&self, field: &str) -> String {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(path).unwrap();
        let mut lines = status.lines().filter_map(|line| line.split_once(":\t"));
        lines.find(|(name, _)| *name == field).unwrap().1.to_owned()
    }

    /// Does `op` as the user `uid`.
    fn ask(
        &self,
        uid: u32,
        op: &HostOp,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<HostAnswer, HelperError> {
        as_user(uid, || {
            let client = HelperClient::connect(&self.socket)?;
            client.request(op, descriptors).map(|(answer, _)| answer)
        })
    }

    fn attach(&self, user: &User, instance: &Instance) -> Result<HostAnswer, HelperError> {
        self.ask(user.uid, &instance.attach(), &[instance.namespace.as_fd()])
    }

    /// Why `op` is refused.
    fn refusal(&self, uid: u32, op: &HostOp, descriptors: &[BorrowedFd<'_>]) -> String {
        match self.ask(uid, op, descriptors) {
            Err(HelperError::Refused { why, .. }) => why,
            other => panic!("{op:?}: {other:?}"),
        }
    }

    /// Sends one message as it is; the answer, if there is one.
    fn send(&self, uid: u32, message: &[u8], descriptors: &[BorrowedFd<'_>]) -> Option<HostReply> {
        as_user(uid, || {
            let connection = connect(&self.socket);
            if seqpacket::send(&connection, message, descriptors).is_err() {
                return None;
            }
            let limit = Instant::now() + Duration::from_secs(20);
            let (bytes, _) = seqpacket::receive(&connection, Some(limit))
                .ok()
                .flatten()?;
            Some(serde_json::from_slice(&bytes).unwrap())
        })
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn launch(socket: &Path, folder: &Path, log: &Path, args: &[&str]) -> Child {
    let log = std::fs::File::options()
        .append(true)
        .create(true)
        .open(log)
        .unwrap();
    #[expect(
        clippy::disallowed_methods,
        reason = "a process that a test holds on to"
    )]
    let mut command = Command::new(PROGRAM);
    let child = command
        .arg("--listen")
        .arg(socket)
        .arg("--folder")
        .arg(folder)
        .args(args)
        .env("LD_PRELOAD", "")
        .stderr(log)
        .spawn()
        .unwrap();
    wait_for("the helper", || {
        Place::open(socket)
            .and_then(|place| {
                Ok(rustix::net::connect(
                    seqpacket::socket()?,
                    &place.address()?,
                )?)
            })
            .is_ok()
    });
    child
}

fn connect(socket: &Path) -> OwnedFd {
    let connection = seqpacket::socket().unwrap();
    let place = Place::open(socket).unwrap();
    rustix::net::connect(&connection, &place.address().unwrap()).unwrap();
    connection
}

/// Runs `work` in a thread that belongs to the user.
fn as_user<T: Send>(uid: u32, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                let user = Uid::from_raw(uid);
                rustix::thread::set_thread_res_uid(user, user, user).unwrap();
                work()
            })
            .join()
            .unwrap()
    })
}

/// An ordinary user with processes that hold namespaces.
struct User {
    uid: u32,
    holders: Vec<Child>,
}

impl User {
    fn new(uid: u32) -> Self {
        Self {
            uid,
            holders: Vec::new(),
        }
    }

    /// A network namespace inside a user namespace that the user made.
    fn namespace(&mut self) -> OwnedFd {
        let uid = self.uid.to_string();
        #[expect(
            clippy::disallowed_methods,
            reason = "a process that a test holds on to"
        )]
        let mut command = Command::new("setpriv");
        let mut child = command
            .args(["--reuid", &uid, "--regid", &uid, "--clear-groups"])
            .args([
                "unshare",
                "-Urn",
                "sh",
                "-ec",
                "ip link set lo up; echo; exec sleep 600",
            ])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 1];
        let mut words = child.stdout.take().unwrap();
        std::io::Read::read_exact(&mut words, &mut ready).unwrap();
        let path = format!("/proc/{}/ns/net", child.id());
        self.holders.push(child);
        std::fs::File::open(path).unwrap().into()
    }

    fn instance(&mut self, number: u8) -> Instance {
        let mut instance = Instance::new(number);
        instance.namespace = self.namespace();
        instance
    }
}

impl Drop for User {
    fn drop(&mut self) {
        for holder in &mut self.holders {
            let _ = holder.kill();
            let _ = holder.wait();
        }
    }
}

/// A machine, and the first user's instance, where users may have namespaces.
fn world(test: &str) -> Option<(Machine, Helper, User)> {
    let machine = Machine::new(test)?;
    let uid = ALICE.to_string();
    let mut probe = vec!["--reuid", &uid, "--regid", &uid, "--clear-groups"];
    probe.extend(["unshare", "-Urn", "true"]);
    if banger_host::exec::Run::new("setpriv")
        .args(probe)
        .run()
        .is_err()
    {
        eprintln!("SKIPPED: {test}: user namespaces are not allowed here");
        return None;
    }
    let helper = Helper::start(&machine);
    Some((machine, helper, User::new(ALICE)))
}

#[test]
fn an_ordinary_user_gets_a_way_out_and_leaves_nothing() {
    let Some((machine, helper, mut alice)) =
        world("an_ordinary_user_gets_a_way_out_and_leaves_nothing")
    else {
        return;
    };
    let before = machine.state();
    let instance = alice.instance(1);
    helper.attach(&alice, &instance).unwrap();
    instance.configure();
    let HostAnswer::Nat(report) = helper.ask(ALICE, &instance.ensure_nat(), &[]).unwrap() else {
        panic!("no report");
    };
    assert_eq!(report.uplinks, ["eth0"]);
    assert!(instance.reach(&machine.internet, SERVER).is_some());
    let HostAnswer::Owned { objects } = helper.ask(ALICE, &HostOp::ListOwned {}, &[]).unwrap()
    else {
        panic!("no list");
    };
    assert_eq!(objects.len(), 3, "{objects:?}");
    let words = format!("banger uid={ALICE} instance={}", instance.id);
    assert!(sh("ip -d link").contains(&words) && run("nft", &["list", "ruleset"]).contains(&words));
    helper.ask(ALICE, &instance.detach(), &[]).unwrap();
    assert_eq!(machine.state(), before);
    // All of it went in without a word.
    assert_eq!(helper.log(), "");
}

#[test]
fn it_keeps_few_rights() {
    let Some((_machine, helper, _)) = world("it_keeps_few_rights") else {
        return;
    };
    // CAP_CHOWN 0, CAP_NET_ADMIN 12, CAP_NET_RAW 13, CAP_SYS_ADMIN 21, CAP_MKNOD 27.
    let kept = [0, 12, 13, 21, 27]
        .iter()
        .fold(0_u64, |set, number| set | 1 << number);
    let kept = format!("{kept:016x}");
    for field in ["CapEff", "CapPrm", "CapBnd"] {
        assert_eq!(helper.status(field), kept, "{field}");
    }
    for field in ["CapInh", "CapAmb"] {
        assert_eq!(helper.status(field), "0000000000000000", "{field}");
    }
    assert_eq!(helper.status("NoNewPrivs"), "1");
    assert_eq!(helper.status("Seccomp"), "2");
}

#[test]
fn another_user_touches_nothing_of_the_first() {
    let Some((machine, helper, mut alice)) = world("another_user_touches_nothing_of_the_first")
    else {
        return;
    };
    let mut bob = User::new(BOB);
    let instance = alice.instance(1);
    helper.attach(&alice, &instance).unwrap();
    helper.ask(ALICE, &instance.ensure_nat(), &[]).unwrap();
    let before = machine.state();
    let resolved = HostOp::EnsureResolved {
        instance: instance.id,
        pool: instance.pool,
        dns: instance.pool.gateway(),
    };
    for op in [
        instance.detach(),
        instance.ensure_nat(),
        instance.remove_nat(),
        resolved,
    ] {
        let why = helper.refusal(BOB, &op, &[]);
        assert!(
            why.contains(&format!("is not ours: it does not say `banger uid={BOB} ")),
            "{why}"
        );
    }
    // Neither the first user's namespace for his own instance, nor his own for the first user's, nor root's for any.
    let mut theirs = Instance::new(2);
    theirs.namespace = instance.namespace.try_clone().unwrap();
    let why = helper.refusal(BOB, &theirs.attach(), &[theirs.namespace.as_fd()]);
    assert!(
        why.contains(&format!(
            "is not one that uid {BOB} made (its owner is uid {ALICE})"
        )),
        "{why}"
    );
    let own = bob.namespace();
    let why = helper.refusal(BOB, &instance.attach(), &[own.as_fd()]);
    assert!(why.contains("is not ours"), "{why}");
    for namespace in [machine::here(), machine::new_namespace()] {
        let why = helper.refusal(BOB, &Instance::new(2).attach(), &[namespace.as_fd()]);
        assert!(why.contains("(its owner is uid 0)"), "{why}");
    }
    // An id that ends as hers does has the same names.
    let mut alike = bob.instance(1);
    alike.id = "0198c2a4-7d1e-7b3a-0000-1f2e3d4c5b01".parse().unwrap();
    let why = helper.refusal(BOB, &alike.attach(), &[alike.namespace.as_fd()]);
    assert!(why.contains("is not ours"), "{why}");
    let why = helper.refusal(ALICE, &alike.detach(), &[]);
    assert!(why.contains("is not ours"), "{why}");
    assert!(matches!(
        helper.ask(BOB, &HostOp::ListOwned {}, &[]),
        Ok(HostAnswer::Owned { objects }) if objects.is_empty()
    ));
    assert_eq!(machine.state(), before);
    let log = helper.log();
    assert!(
        log.contains(&format!("refused uid={BOB} op=detach-veth: ")),
        "{log}"
    );
    assert!(
        log.contains(&format!("refused uid={BOB} op=attach-veth: ")),
        "{log}"
    );
}

#[test]
fn a_descriptor_of_anything_else_is_refused() {
    let Some((machine, helper, mut alice)) = world("a_descriptor_of_anything_else_is_refused")
    else {
        return;
    };
    let before = machine.state();
    let instance = alice.instance(1);
    let (pipe, _writer) = std::io::pipe().unwrap();
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let open = |path: &str| -> OwnedFd { std::fs::File::open(path).unwrap().into() };
    let holder = alice.holders[0].id();
    let descriptors = [
        open("/etc/shadow"),
        open("/"),
        open("/dev/null"),
        open(&format!("/proc/{holder}/ns/user")),
        open(&format!("/proc/{holder}/ns/mnt")),
        pipe.into(),
        socket.into(),
        machine::new_namespace(),
    ];
    for descriptor in &descriptors {
        let why = helper.refusal(ALICE, &instance.attach(), &[descriptor.as_fd()]);
        assert!(
            why.contains("is no network namespace") || why.contains("is not one that uid"),
            "{why}"
        );
    }
    let namespace = instance.namespace.as_fd();
    for (op, given) in [
        (instance.attach(), &[][..]),
        (instance.attach(), &[namespace, namespace][..]),
        (instance.detach(), &[namespace][..]),
        (HostOp::ListOwned {}, &[namespace; 8][..]),
    ] {
        let why = helper.refusal(ALICE, &op, given);
        assert!(
            why.contains(&format!("descriptors, not {}", given.len())),
            "{why}"
        );
    }
    assert_eq!(machine.state(), before);
    // None of them is kept.
    let folder = format!("/proc/{}/fd", helper.child.id());
    wait_for("all to be closed", || {
        std::fs::read_dir(&folder).unwrap().count() < 12
    });
}

#[test]
fn a_request_that_makes_no_sense_is_refused_with_words() {
    let Some((machine, helper, mut alice)) =
        world("a_request_that_makes_no_sense_is_refused_with_words")
    else {
        return;
    };
    let before = machine.state();
    let id = Instance::new(1).id;
    let pool = "172.31.16.0/20";
    let deep = format!("{{\"op\":{}", "[".repeat(5000));
    for (message, said) in [
        ("{}".to_owned(), "not understood"),
        ("nonsense".to_owned(), "not understood"),
        (deep, "not understood"),
        (
            "{\"op\":\"run-shell\",\"command\":\"id\"}".to_owned(),
            "unknown variant `run-shell`",
        ),
        (
            "{\"op\":\"hello\",\"more\":1}".to_owned(),
            "unknown field `more`",
        ),
        (
            "{\"op\":\"detach-veth\",\"instance\":\"../../etc/passwd\"}".to_owned(),
            "not understood",
        ),
        (
            "{\"op\":\"detach-veth\",\"instance\":\"eth0\"}".to_owned(),
            "not understood",
        ),
        (
            "{\"op\":\"detach-veth\",\"instance\":\"\\u001b[31m\\n\"}".to_owned(),
            "not understood",
        ),
        (
            format!(
                "{{\"op\":\"ensure-nat\",\"instance\":\"{id}\",\"pool\":\"{pool}; flush ruleset\"}}"
            ),
            "not understood",
        ),
        (
            format!("{{\"op\":\"ensure-nat\",\"instance\":\"{id}\",\"pool\":\"{pool}\"}}"),
            "not attached",
        ),
        (
            format!(
                "{{\"op\":\"ensure-resolved\",\"instance\":\"{id}\",\"pool\":\"{pool}\",\"dns\":\"8.8.8.8\"}}"
            ),
            "not attached",
        ),
        ("x".repeat(20_000), "a request of 20000 bytes is too long"),
    ] {
        let reply = helper.send(ALICE, message.as_bytes(), &[]).unwrap();
        let why = reply.result.unwrap_err();
        assert!(
            why.contains(said) && !why.contains(['\n', '\u{1b}']),
            "{message}: {why}"
        );
    }
    let namespace = alice.namespace();
    for pool in [
        "0.0.0.0/0",
        "10.0.0.0/8",
        "8.8.0.0/20",
        "127.0.0.0/20",
        "172.31.16.0/21",
    ] {
        let message =
            format!("{{\"op\":\"attach-veth\",\"instance\":\"{id}\",\"pool\":\"{pool}\"}}");
        let reply = helper
            .send(ALICE, message.as_bytes(), &[namespace.as_fd()])
            .unwrap();
        assert!(
            reply.result.unwrap_err().contains("cannot be a pool"),
            "{pool}"
        );
    }
    // One that the host's own network overlaps.
    sh("ip route add 172.31.20.0/24 via 198.51.100.2");
    let instance = alice.instance(1);
    let why = helper.refusal(ALICE, &instance.attach(), &[instance.namespace.as_fd()]);
    assert!(
        why.contains("route 172.31.20.0/24 via 198.51.100.2 dev eth0 overlaps"),
        "{why}"
    );
    sh("ip route del 172.31.20.0/24");
    // One longer than any message, and one that is cut off by the end of its sender.
    assert!(
        helper
            .send(ALICE, &vec![b' '; 400_000], &[])
            .is_none_or(|reply| reply.result.is_err())
    );
    as_user(ALICE, || {
        let connection = connect(&helper.socket);
        seqpacket::send(&connection, b"{\"op\":\"detach-", &[]).unwrap();
    });
    assert!(helper.ask(ALICE, &HostOp::Hello {}, &[]).is_ok());
    assert_eq!(machine.state(), before);
    let log = helper.log();
    assert!(
        log.contains(&format!(
            "refused uid={ALICE} op=receive: the request is not understood"
        )),
        "{log}"
    );
    assert!(!log.contains('\u{1b}'));
}

#[test]
fn ten_thousand_requests_at_once_keep_nobody_else_out() {
    let Some((machine, helper, _)) = world("ten_thousand_requests_at_once_keep_nobody_else_out")
    else {
        return;
    };
    let before = machine.state();
    let hello = serde_json::to_vec(&HostOp::Hello {}).unwrap();
    let (served, turned_away) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..10 {
            scope.spawn(|| {
                for _ in 0..20 {
                    // Fifty connections stand open together in each of ten threads.
                    as_user(ALICE, || {
                        let connections: Vec<OwnedFd> =
                            (0..50).map(|_| connect(&helper.socket)).collect();
                        for connection in &connections {
                            let _ = seqpacket::send(connection, &hello, &[]);
                        }
                        for connection in &connections {
                            let limit = Some(Instant::now() + Duration::from_secs(20));
                            let reply = seqpacket::receive(connection, limit).ok().flatten();
                            let reply: Option<HostReply> =
                                reply.map(|(bytes, _)| serde_json::from_slice(&bytes).unwrap());
                            let counter = match reply {
                                Some(HostReply { result: Ok(_) }) => &served,
                                _ => &turned_away,
                            };
                            counter.fetch_add(1, Ordering::Relaxed);
                        }
                    });
                }
            });
        }
        // Somebody else, meanwhile.
        for _ in 0..20 {
            helper.ask(BOB, &HostOp::ListOwned {}, &[]).unwrap();
        }
        let threads: usize = helper.status("Threads").parse().unwrap();
        assert!(
            threads <= 2 + banger_helper::root::CLIENTS,
            "{threads} threads"
        );
    });
    let (served, turned_away) = (served.into_inner(), turned_away.into_inner());
    assert_eq!(served + turned_away, 10_000);
    assert!(
        served > 0 && turned_away > 0,
        "{served} served, {turned_away} turned away"
    );
    assert!(helper.ask(ALICE, &HostOp::Hello {}, &[]).is_ok());
    let lines = helper.log().lines().count();
    assert!(lines < 500, "{lines} lines");
    assert_eq!(machine.state(), before);
}

#[test]
fn a_client_that_never_reads_or_never_speaks_harms_itself_alone() {
    let Some((_machine, helper, _)) =
        world("a_client_that_never_reads_or_never_speaks_harms_itself_alone")
    else {
        return;
    };
    let hello = serde_json::to_vec(&HostOp::Hello {}).unwrap();
    let deaf: Vec<OwnedFd> = as_user(ALICE, || {
        (0..banger_helper::root::CLIENTS_PER_USER)
            .map(|number| {
                let connection = connect(&helper.socket);
                rustix::io::ioctl_fionbio(&connection, true).unwrap();
                // Half of them are silent from the start.
                if number % 2 == 0 {
                    let limit = Instant::now() + Duration::from_millis(500);
                    while Instant::now() < limit {
                        let _ = seqpacket::send(&connection, &hello, &[]);
                    }
                }
                connection
            })
            .collect()
    });
    assert!(helper.ask(BOB, &HostOp::Hello {}, &[]).is_ok());
    let place = Place::open(&helper.socket).unwrap();
    let limit = Duration::from_secs(20);
    let asked = || seqpacket::exchange(&place, &hello, &[], limit);
    let (turned_away, _) = as_user(ALICE, asked).unwrap();
    let turned_away: HostReply = serde_json::from_slice(&turned_away).unwrap();
    assert_eq!(turned_away.result.unwrap_err(), TOO_MANY_REQUESTS);
    // Longer than the time that each of them has.
    let limit = Instant::now() + Duration::from_secs(40);
    let said = |what: &str| helper.log().contains(what);
    while !said("it does not hear the answer")
        || !said(&format!("refused uid={ALICE} op=receive: timed out"))
        || helper.ask(ALICE, &HostOp::Hello {}, &[]).is_err()
    {
        assert!(Instant::now() < limit, "never let go: {}", helper.log());
        std::thread::sleep(Duration::from_millis(200));
    }
    drop(deaf);
}

#[test]
fn one_user_has_so_many_instances_and_no_more() {
    let Some((machine, helper, mut alice)) = world("one_user_has_so_many_instances_and_no_more")
    else {
        return;
    };
    let mut instances = Vec::new();
    for number in 0..MAX_INSTANCES {
        let instance = alice.instance(u8::try_from(number).unwrap() + 1);
        helper.attach(&alice, &instance).unwrap();
        instances.push(instance);
    }
    let before = machine.state();
    let last = alice.instance(9);
    let why = helper.refusal(ALICE, &last.attach(), &[last.namespace.as_fd()]);
    assert!(why.contains("has 4 instances attached already"), "{why}");
    assert_eq!(machine.state(), before);
    helper.ask(ALICE, &instances[0].detach(), &[]).unwrap();
    helper.attach(&alice, &last).unwrap();
    // Another user has room of his own.
    let mut bob = User::new(BOB);
    let theirs = bob.instance(10);
    helper.attach(&bob, &theirs).unwrap();
}

#[test]
fn the_helper_repairs_what_is_flushed_also_after_it_was_killed() {
    let Some((machine, mut helper, mut alice)) =
        world("the_helper_repairs_what_is_flushed_also_after_it_was_killed")
    else {
        return;
    };
    let before = machine.state();
    let instance = alice.instance(1);
    helper.attach(&alice, &instance).unwrap();
    instance.configure();
    helper.ask(ALICE, &instance.ensure_nat(), &[]).unwrap();
    let rules = || run("nft", &["list", "ruleset"]);
    let whole = rules();
    let started = Instant::now();
    machine::repaired_within_a_second("the rules", "nft flush ruleset", &|| rules() == whole);
    assert!(instance.reach(&machine.internet, SERVER).is_some());
    // Whoever does so all the time does not fill the log.
    for _ in 0..20 {
        sh("nft flush ruleset");
        wait_for("the rules", || rules() == whole);
    }
    let log = helper.log();
    let lines = log.matches("they are repaired").count();
    // One at once, and one in each pause, however slow this machine is.
    let most = 1 + started.elapsed().as_secs() / seldom::PAUSE.as_secs();
    assert!((1..=most).contains(&(lines as u64)), "{log}");

    rustix::process::kill_process(
        Pid::from_raw(helper.child.id().cast_signed()).unwrap(),
        Signal::STOP,
    )
    .unwrap();
    sh("nft flush ruleset");
    helper.restart();
    wait_for("the rules", || rules() == whole);
    // It still knows what `eth0` was before.
    helper.ask(ALICE, &instance.remove_nat(), &[]).unwrap();
    assert!(!forwards("eth0"));
    helper.ask(ALICE, &instance.ensure_nat(), &[]).unwrap();
    // The user's namespace ends, with nobody to ask for anything: all goes by itself.
    drop(instance);
    drop(alice);
    wait_for("the host as it was", || machine.state() == before);
}

#[test]
fn it_ends_when_it_is_idle_and_only_then() {
    let Some((machine, first, mut alice)) = world("it_ends_when_it_is_idle_and_only_then") else {
        return;
    };
    drop(first);
    // As systemd starts it: with the socket as its fourth descriptor.
    let directory = tempfile::tempdir().unwrap();
    let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(directory.path(), everybody).unwrap();
    let socket = directory.path().join("helper.sock");
    let listener = banger_helper::door::listen(&socket).unwrap();
    let start = || {
        let line = "exec 3<&0 0</dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"";
        #[expect(
            clippy::disallowed_methods,
            reason = "a process that a test holds on to"
        )]
        let mut command = Command::new("sh");
        command
            .args(["-c", line, "sh", PROGRAM, "--idle", "3", "--folder"])
            .arg(&machine.folder)
            .stdin(listener.try_clone().unwrap())
            .spawn()
            .unwrap()
    };
    let helper = |child| Helper {
        child,
        socket: socket.clone(),
        log: directory.path().join("log"),
        folder: machine.folder.clone(),
        _directory: tempfile::tempdir().unwrap(),
    };
    let mut idle = helper(start());
    assert!(idle.ask(ALICE, &HostOp::Hello {}, &[]).is_ok());
    wait_for("its end", || idle.child.try_wait().unwrap().is_some());
    assert!(idle.child.wait().unwrap().success());

    // Made first, as the helper waits only so long for whom it serves.
    let instance = alice.instance(1);
    let mut busy = helper(start());
    busy.attach(&alice, &instance).unwrap();
    std::thread::sleep(Duration::from_millis(4500));
    assert!(
        busy.child.try_wait().unwrap().is_none(),
        "it watches over the instance's rules"
    );
    busy.ask(ALICE, &instance.detach(), &[]).unwrap();
    wait_for("its end", || busy.child.try_wait().unwrap().is_some());
}
