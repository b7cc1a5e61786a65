//! What the verbs about ports, NAT, names, overlays, the trash and the host do to real daemons, with `fake-vmm` as
//! their VMM. Each test has a host of its own: network and `/run`.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use banger_testkit::env::TestEnv;
use banger_testkit::host::Host;
use banger_testkit::run::{LIMIT, Output, eventually, signal, wait_exit};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::process::Signal;
use rustix::thread::UnshareFlags;
use serde_json::Value;
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

/// A world on a host of its own, which is this thread's and that of what it starts.
fn world(test: &str) -> Option<TestEnv> {
    if rustix::process::geteuid().is_root() {
        leave_the_host();
    }
    TestEnv::scripted(test, "")
}

#[expect(unsafe_code, reason = "unshare may break what threads share")]
fn leave_the_host() {
    let own = UnshareFlags::NEWNET | UnshareFlags::NEWNS;
    // SAFETY: only namespaces are unshared, never the table of descriptors.
    unsafe { rustix::thread::unshare_unsafe(own) }.unwrap();
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .unwrap();
    mount("tmpfs", "/run", "tmpfs", MountFlags::empty(), None).unwrap();
    // A way out that leads nowhere.
    for command in [
        "link set lo up",
        "link add wan0 type veth peer name wan1",
        "address add 192.0.2.2/24 dev wan0",
        "link set wan0 up",
        "link set wan1 up",
        "route add default via 192.0.2.1 dev wan0",
    ] {
        run("ip", command);
    }
}

/// Changes the test's own network.
fn run(program: &str, arguments: &str) {
    #[expect(clippy::disallowed_methods, reason = "changes the test's own network")]
    let status = std::process::Command::new(program)
        .args(arguments.split(' '))
        .status();
    assert!(status.unwrap().success(), "{program} {arguments}");
}

const SIZE: [&str; 4] = ["--image", "tiny", "--memory", "128"];

/// Creates a running VM and waits until it is ready.
#[track_caller]
fn create(env: &TestEnv, name: &str, more: &[&str]) -> Value {
    let create = ["vm", "create", "--wait", "--name", name];
    env.json(&[&create[..], &SIZE, more].concat())
}

#[track_caller]
fn create_stopped(env: &TestEnv, name: &str) -> Value {
    let create = ["vm", "create", "--no-start", "--name", name];
    env.json(&[&create[..], &SIZE].concat())
}

fn text<'a>(vm: &'a Value, key: &str) -> &'a str {
    vm[key].as_str().unwrap()
}

fn state(vm: &Value) -> &str {
    vm["phase"]["state"].as_str().unwrap()
}

#[track_caller]
fn assert_refused(output: &Output, status: i32, says: &str) {
    assert!(
        output.status == status && output.stderr.contains(says) && output.stderr.contains("hint:"),
        "not refused with {status} and `{says}`: {output:?}"
    );
}

/// The TCP ports that are listened to in this thread's network.
fn listening() -> Vec<u16> {
    let table = std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap();
    let mut ports: Vec<u16> = table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let (_, port) = words.get(1)?.split_once(':')?;
            // 0A is the state of listening.
            (*words.get(3)? == "0A").then(|| u16::from_str_radix(port, 16).ok())?
        })
        .collect();
    ports.sort_unstable();
    // The name server's.
    ports.retain(|port| *port != 53);
    ports
}

#[test]
#[ignore = "system test"]
fn a_published_port_is_open_while_its_vm_runs_and_no_longer() {
    let Some(env) = world("a_published_port_is_open_while_its_vm_runs_and_no_longer") else {
        return;
    };
    let vm = create(&env, "otter", &["-p", "8080:80", "-p", "5353:53/udp"]);
    assert_eq!(vm["spec"]["ports"].as_array().unwrap().len(), 2);
    assert_eq!(listening(), [8080]);

    env.ok(&["port", "add", "otter", "8443:443"]);
    assert_eq!(listening(), [8080, 8443]);
    let ports = env.json(&["port", "list", "otter"])[0]["ports"].clone();
    assert_eq!(ports.as_array().unwrap().len(), 3);
    for port in ports.as_array().unwrap() {
        assert_eq!(port["open"], true, "{ports}");
    }
    env.ok(&["port", "rm", "otter", "8080", "5353/udp"]);
    assert_eq!(listening(), [8443]);
    assert_refused(&env.banger(&["port", "rm", "otter", "8080"]), 4, "8080");

    // The place is taken, by another VM or by another program.
    create_stopped(&env, "fox");
    let taken = env.banger(&["port", "add", "fox", "8443:443"]);
    assert_refused(&taken, 5, "`otter` has 127.0.0.1:8443:443/tcp there");
    let somebody = TcpListener::bind("127.0.0.1:9090").unwrap();
    let taken = env.banger(&["port", "add", "otter", "9090:90"]);
    assert_refused(&taken, 5, "cannot listen on 127.0.0.1:9090");
    drop(somebody);
    assert_eq!(
        env.vm("otter")["spec"]["ports"].as_array().unwrap().len(),
        1
    );

    // The port outlives the daemon, not the VM.
    env.kill_daemon();
    assert_eq!(listening(), [8443]);
    env.ok(&["vm", "stop", "otter"]);
    assert_eq!(listening(), Vec::<u16>::new());
    env.ok(&["vm", "start", "otter", "--wait"]);
    assert_eq!(listening(), [8443]);
    env.ok(&["vm", "delete", "--force", "otter"]);
    assert_eq!(listening(), Vec::<u16>::new());
}

#[test]
#[ignore = "system test"]
fn a_port_that_somebody_else_has_does_not_keep_a_vm_from_starting() {
    let test = "a_port_that_somebody_else_has_does_not_keep_a_vm_from_starting";
    let Some(env) = world(test) else { return };
    let somebody = TcpListener::bind("127.0.0.1:8080").unwrap();
    let create = ["vm", "create", "--name", "otter", "-p", "8080:80"];
    let created = env.banger(&[&create[..], &SIZE].concat());
    assert_eq!(created.status, 0, "{created:?}");
    assert!(
        created
            .stderr
            .contains("warning: the port 127.0.0.1:8080:80/tcp is closed: "),
        "{created:?}"
    );
    let shown = env.ok(&["vm", "show", "otter"]);
    assert!(shown.contains("127.0.0.1:8080:80/tcp (closed: "), "{shown}");
    let doctor = env.banger(&["doctor"]);
    assert!(
        doctor.status == 7
            && doctor
                .stdout
                .contains("port: 127.0.0.1:8080 (tcp) of VM `otter` is closed: ")
            && doctor.stdout.contains("`ss -ltnp` shows who listens"),
        "{doctor:?}"
    );
    let repair = env.banger(&["doctor", "--repair"]);
    assert_refused(
        &repair,
        7,
        "left: VM `otter`: cannot listen on 127.0.0.1:8080",
    );
    drop(somebody);
    eventually("the port is open", || {
        env.banger(&["doctor", "--repair"]);
        (env.json(&["port", "list"])[0]["ports"][0]["open"] == true).then_some(())
    });
}

#[test]
#[ignore = "system test"]
fn an_old_problem_of_a_vm_stands_in_the_way_of_no_later_change() {
    let test = "an_old_problem_of_a_vm_stands_in_the_way_of_no_later_change";
    let Some(env) = world(test) else { return };
    let [first, _second] = [8080, 8081].map(|port| TcpListener::bind(("127.0.0.1", port)).unwrap());
    create(&env, "otter", &["-p", "8080:80", "-p", "8081:81"]);
    env.ok(&["nat", "up", "otter"]);
    env.ok(&["port", "add", "otter", "9090:90"]);
    assert_eq!(listening(), [8080, 8081, 9090]);

    // What is asked for again is tried again, and a refusal changes nothing else.
    let again = env.banger(&["port", "add", "otter", "8080:80"]);
    assert_refused(&again, 5, "cannot listen on 127.0.0.1:8080");
    let elsewhere = TcpListener::bind("127.0.0.1:8082").unwrap();
    let taken = env.banger(&["port", "add", "otter", "8082:82"]);
    assert_refused(&taken, 5, "cannot listen on 127.0.0.1:8082");
    drop((first, elsewhere));
    // A program that another test starts at this moment has them too, until it is one.
    eventually("the ports are free", || {
        (listening() == [8081, 9090]).then_some(())
    });
    assert_eq!(env.json(&["nat", "status"])["vms"][0]["nat_now"], true);
    env.ok(&["port", "add", "otter", "8080:80"]);
    assert_eq!(listening(), [8080, 8081, 9090]);
    env.ok(&["port", "rm", "otter", "8081", "8080", "9090"]);
    assert_eq!(listening(), [8081]);
}

#[test]
#[ignore = "system test"]
fn nat_holds_at_once_and_is_gone_with_the_vm() {
    let Some(env) = world("nat_holds_at_once_and_is_gone_with_the_vm") else {
        return;
    };
    create(&env, "otter", &["--nat"]);
    let now = |env: &TestEnv| {
        let status = env.json(&["nat", "status", "otter"]);
        let state = text(&status["way_out"], "state").to_owned();
        (status["vms"][0]["nat_now"] == true, state)
    };
    assert_eq!(now(&env), (true, "open".to_owned()));
    let status = env.ok(&["nat", "status"]);
    assert!(status.contains("way out  by wan0"), "{status}");
    env.ok(&["nat", "down", "otter"]);
    assert_eq!(now(&env), (false, "closed".to_owned()));
    env.ok(&["nat", "up", "otter"]);
    assert_eq!(now(&env), (true, "open".to_owned()));
    // Private networks by their own switch, which holds at once and stays.
    let private = |env: &TestEnv| {
        let status = env.json(&["nat", "status", "otter"]);
        let vm = &status["vms"][0];
        [&vm["nat_private"], &vm["nat_private_now"]].map(|on| *on == true)
    };
    assert_eq!(private(&env), [false, false]);
    let up = env.ok(&["nat", "up", "otter", "--private"]);
    assert_eq!(up, "otter: NAT is on, for private networks too\n");
    assert_eq!(private(&env), [true, true]);
    assert_eq!(
        env.json(&["vm", "show", "otter"])["spec"]["nat_private"],
        true
    );
    env.ok(&["vm", "set", "otter", "--nat-private", "off"]);
    assert_eq!(private(&env), [false, false]);
    assert_eq!(now(&env), (true, "open".to_owned()));
    env.ok(&["vm", "stop", "otter"]);
    assert_eq!(now(&env), (false, "closed".to_owned()));
    let up = env.ok(&["nat", "up", "otter"]);
    assert_eq!(up, "otter: NAT is on from its next start\n");
    env.ok(&["vm", "set", "otter", "--nat", "off"]);
    assert_eq!(env.vm("otter")["spec"]["nat"], false);
}

#[test]
#[ignore = "system test"]
fn a_limit_that_nobody_holds_is_refused_and_a_scope_that_fails_is_told() {
    let test = "a_limit_that_nobody_holds_is_refused_and_a_scope_that_fails_is_told";
    let Some(env) = world(test) else {
        return;
    };
    let says = "the CPU limit of VM `otter`, 50%, would not hold";
    let create = [
        "vm",
        "create",
        "--wait",
        "--name",
        "otter",
        "--cpu-limit",
        "50%",
    ];
    assert_refused(&env.banger(&[&create[..], &SIZE].concat()), 7, says);
    assert_eq!(state(&env.vm("otter")), "stopped");
    env.ok(&["vm", "set", "otter", "--cpu-limit", "none"]);
    env.ok(&["vm", "start", "otter"]);
    let layers = |env: &TestEnv| {
        let attempt = &env.vm("otter")["attempt"];
        attempt["sandbox"].to_string() + &attempt["sandbox_missing"].to_string()
    };
    // Without systemd there is nothing to say of it.
    assert!(!layers(&env).contains("cgroup"));
    let set = ["vm", "set", "otter", "--cpu-limit", "50%"];
    assert_refused(&env.banger(&set), 7, says);
    let limit = |env: &TestEnv| env.vm("otter")["spec"]["cpu_limit"].clone();
    assert!(limit(&env).is_null());
    env.ok(&["vm", "kill", "otter"]);
    env.ok(&set);
    assert_eq!(limit(&env), 50);
    let shown = env.ok(&["vm", "show", "otter"]);
    assert!(shown.contains("cpu limit   50%\n"), "{shown}");
    assert_refused(&env.banger(&["vm", "start", "otter"]), 7, says);
    env.ok(&["vm", "set", "otter", "--cpu-limit", "none"]);

    // One that takes every connection and answers nobody.
    let runtime = match rustix::process::geteuid().is_root() {
        true => Path::new("/run").to_owned(),
        false => env.folder().join("runtime"),
    };
    std::fs::create_dir(runtime.join("systemd")).unwrap();
    let broken = UnixListener::bind(runtime.join("systemd/private")).unwrap();
    std::thread::spawn(move || broken.incoming().for_each(drop));
    env.ok(&["vm", "start", "otter"]);
    assert!(layers(&env).contains("cgroup: cannot talk to systemd at"));
    let why = env.ok(&["vm", "why", "otter"]);
    assert!(why.contains("lacks its layer `cgroup`"), "{why}");
}

#[test]
#[ignore = "system test"]
fn who_closes_the_way_out_later_is_named_with_what_helps() {
    let test = "who_closes_the_way_out_later_is_named_with_what_helps";
    let Some(env) = world(test) else { return };
    create(&env, "otter", &["--nat"]);
    let status = env.banger(&["nat", "status"]);
    assert_eq!((status.status, status.stderr.as_str()), (0, ""));
    run(
        "nft",
        "add table ip filter; add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }",
    );
    let status = env.banger(&["nat", "status"]);
    assert!(
        status
            .stdout
            .contains("but closed by somebody else's rules")
            && status
                .stderr
                .contains("warning: guests do not reach the internet: ")
            && status.stderr.contains("FORWARD")
            && status.stderr.contains("hint: as root: iptables "),
        "{status:?}"
    );
    run("nft", "delete table ip filter");
    assert_eq!(env.banger(&["nat", "status"]).stderr, "");
}

#[test]
#[ignore = "system test"]
fn joined_vms_part_whoever_of_the_two_is_named_first() {
    let test = "joined_vms_part_whoever_of_the_two_is_named_first";
    let Some(env) = world(test) else { return };
    create_stopped(&env, "otter");
    create_stopped(&env, "fox");
    env.ok(&["net", "join", "otter", "fox"]);
    let joins = || {
        let status = env.json(&["net", "status"]);
        let vms = status["vms"].as_array().unwrap();
        vms.iter().map(|vm| vm["joins"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(
        joins(),
        [serde_json::json!(["otter"]), serde_json::json!(["fox"])]
    );
    assert!(
        env.ok(&["vm", "show", "fox"])
            .contains("joins       otter\n")
    );
    env.ok(&["net", "leave", "fox", "otter"]);
    assert_eq!(joins(), [serde_json::json!([]), serde_json::json!([])]);
    assert_refused(&env.banger(&["net", "join", "otter", "otter"]), 2, "itself");
}

#[test]
#[ignore = "system test"]
fn a_vm_gets_another_name_while_it_runs() {
    let Some(env) = world("a_vm_gets_another_name_while_it_runs") else {
        return;
    };
    let vm = create(&env, "otter", &[]);
    create_stopped(&env, "fox");
    let taken = env.banger(&["vm", "set", "otter", "--name", "fox"]);
    assert_refused(&taken, 5, "there is already a VM `fox`");
    env.ok(&["vm", "set", "otter", "--name", "owl", "--autostart", "on"]);
    let renamed = env.vm("owl");
    assert_eq!(state(&renamed), "running");
    assert_eq!(renamed["spec"]["autostart"], true);
    for key in ["id", "address", "mac", "host_key"] {
        assert_eq!(renamed[key], vm[key], "{key}");
    }
    assert_eq!(env.banger(&["vm", "show", "otter"]).status, 4);
    let names = env.ok(&["dns", "list"]);
    assert!(
        names.contains("owl.vm") && !names.contains("otter.vm"),
        "{names}"
    );
    let refused = env.banger(&["vm", "set", "owl", "--disk-size", "64M"]);
    assert_refused(&refused, 5, "it is running");
}

/// The UUID of the ext4 in a file.
fn filesystem(path: &Path) -> [u8; 16] {
    let mut uuid = [0; 16];
    let file = std::fs::File::open(path).unwrap();
    // The superblock is at 1024, its UUID at 0x68 of it.
    file.read_exact_at(&mut uuid, 1024 + 0x68).unwrap();
    uuid
}

#[test]
#[ignore = "system test"]
fn a_reset_throws_the_overlay_away_and_nothing_else() {
    let Some(env) = world("a_reset_throws_the_overlay_away_and_nothing_else") else {
        return;
    };
    let disk = ["--disk-size", "64M", "--storage", "overlay"];
    let vm = create(&env, "otter", &disk);
    let folder = env.vm_folder(text(&vm, "id"));
    let files = || {
        (
            filesystem(&folder.join("overlay.img")),
            filesystem(&folder.join("disk.img")),
        )
    };
    assert_refused(&env.banger(&["vm", "reset", "otter"]), 5, "it is running");
    env.ok(&["vm", "stop", "otter"]);
    let (overlay, disk) = files();
    assert_eq!(
        env.ok(&["vm", "reset", "otter"]),
        "otter: reset (overlay)\n"
    );
    let (fresh, same) = files();
    assert_ne!(fresh, overlay);
    assert_eq!(same, disk);
    env.ok(&["vm", "start", "otter", "--wait"]);
    let after = env.vm("otter");
    for key in ["id", "name", "address", "mac", "host_key", "spec"] {
        assert_eq!(after[key], vm[key], "{key}");
    }

    env.ok(&["vm", "stop", "otter"]);
    env.ok(&["vm", "reset", "otter", "--storage", "copy"]);
    assert_eq!(env.vm("otter")["spec"]["storage"], "copy");
    env.ok(&["vm", "set", "otter", "--disk-size", "96M"]);
    let grown = folder.join("disk.img").metadata().unwrap().len();
    assert_eq!(grown, 96 << 20);
    let shrunk = env.banger(&["vm", "set", "otter", "--disk-size", "64M"]);
    assert_refused(&shrunk, 2, "cannot shrink");
    env.ok(&["vm", "start", "otter", "--wait"]);
}

#[test]
#[ignore = "system test"]
fn a_stopped_vm_gets_another_driver_kernel_and_overlay_size() {
    let Some(env) = world("a_stopped_vm_gets_another_driver_kernel_and_overlay_size") else {
        return;
    };
    let settings = env.folder().join("config/banger/config.toml");
    let before = std::fs::read_to_string(&settings).unwrap();
    std::fs::write(
        &settings,
        before + "firecracker = \"/nonexistent/firecracker\"\n",
    )
    .unwrap();
    env.add_kernel("second");
    let sizes = ["--overlay-size", "64M", "--storage", "overlay"];
    let vm = create(&env, "otter", &[&["--driver", "qemu"], &sizes[..]].concat());
    for change in [
        ["--driver", "auto"],
        ["--kernel", "second"],
        ["--overlay-size", "96M"],
    ] {
        let live = env.banger(&[&["vm", "set", "otter"][..], &change].concat());
        assert_refused(&live, 5, "it is running");
    }
    let live = env.banger(&["vm", "start", "otter", "--driver", "auto"]);
    assert_refused(&live, 5, "it is running");
    env.ok(&["vm", "stop", "otter"]);

    // A driver that is not there is said at the start, with the way back.
    let missing = env.banger(&["vm", "start", "otter", "--driver", "firecracker"]);
    assert_refused(&missing, 7, "named in config.toml is not there");
    let way_back = "banger vm start otter --driver auto";
    assert!(missing.stderr.contains(way_back), "{missing:?}");
    assert_eq!(env.vm("otter")["spec"]["driver"], "firecracker");
    env.ok(&["vm", "set", "otter", "--driver", "auto"]);
    assert_eq!(env.vm("otter")["spec"]["driver"], "auto");

    let overlay = env.vm_folder(text(&vm, "id")).join("overlay.img");
    env.ok(&["vm", "set", "otter", "--overlay-size", "96M"]);
    assert_eq!(overlay.metadata().unwrap().len(), 96 << 20);
    let shrunk = env.banger(&["vm", "set", "otter", "--overlay-size", "64M"]);
    assert_refused(&shrunk, 2, "cannot shrink the overlay");

    env.ok(&["vm", "set", "otter", "--kernel", "second"]);
    assert_eq!(env.vm("otter")["kernel_name"], "second");
    let pinned = env.banger(&["kernel", "delete", "second"]);
    assert_refused(&pinned, 5, "1 VM(s): otter");
    env.ok(&["vm", "start", "otter", "--wait"]);
    assert_eq!(env.vm("otter")["attempt"]["driver"], "qemu");
    env.ok(&["vm", "stop", "otter"]);
    env.ok(&["vm", "set", "otter", "--kernel", "default"]);
    env.ok(&["kernel", "delete", "second"]);
    env.ok(&["vm", "start", "otter", "--wait"]);
}

#[test]
#[ignore = "system test"]
fn a_vm_comes_back_from_the_trash_under_another_name_if_its_own_is_taken() {
    let test = "a_vm_comes_back_from_the_trash_under_another_name_if_its_own_is_taken";
    let Some(env) = world(test) else { return };
    let first = create_stopped(&env, "otter");
    env.ok(&["vm", "delete", "otter"]);
    create_stopped(&env, "otter");
    let trash = env.ok(&["trash", "list"]);
    assert!(
        trash.contains("DELETED") && trash.contains("otter"),
        "{trash}"
    );
    let taken = env.banger(&["vm", "undelete", text(&first, "id")]);
    assert_refused(&taken, 5, "there is already a VM `otter`");
    assert!(taken.stderr.contains("--name OTHER"), "{taken:?}");
    env.ok(&["vm", "undelete", "otter", "--name", "old-otter"]);
    let back = env.vm("old-otter");
    assert_eq!(back["id"], first["id"]);
    assert_eq!(back["address"], first["address"]);
    assert!(back["trashed_at"].is_null());
    let there = env.banger(&["vm", "undelete", "old-otter", "--name", "fox"]);
    assert_refused(&there, 5, "`old-otter` is not in the trash");

    // Neither are its ports changed in the trash: whoever has one now gives it up.
    let port = |name| {
        [
            &[
                "vm",
                "create",
                "--no-start",
                "--name",
                name,
                "-p",
                "8080:80",
            ][..],
            &SIZE,
        ]
        .concat()
    };
    env.ok(&port("elk"));
    env.ok(&["vm", "delete", "elk"]);
    env.ok(&port("owl"));
    let taken = env.banger(&["vm", "undelete", "elk"]);
    assert_refused(&taken, 5, "`owl` has 127.0.0.1:8080:80/tcp there");
    let way = "banger port rm owl 127.0.0.1:8080/tcp`, then `banger vm undelete elk` again";
    assert!(taken.stderr.contains(way), "{taken:?}");
    env.ok(&["port", "rm", "owl", "127.0.0.1:8080/tcp"]);
    env.ok(&["vm", "undelete", "elk"]);
    env.ok(&["vm", "delete", "--purge", "elk", "owl"]);

    let image = env.json(&["image", "show", "tiny"]);
    assert_eq!(image["kernel"], first["spec"]["kernel"]);
    // What the trash still needs of an image is told by name.
    env.ok(&["vm", "delete", "old-otter"]);
    let pinned = env.banger(&["image", "delete", "tiny"]);
    assert_refused(&pinned, 5, "2 VM(s): old-otter (in the trash), otter");
    assert_eq!(env.ok(&["trash", "empty"]), "old-otter: purged\n");
    assert_eq!(env.ok(&["trash", "empty"]), "");
    assert_eq!(env.vms().len(), 1);
    assert!(!env.vm_folder(text(&first, "id")).exists());
    assert_eq!(env.banger(&["vm", "undelete", "old-otter"]).status, 4);
}

/// Whoever asked has left: what was begun is done to its end all the same.
#[test]
#[ignore = "system test"]
fn the_trash_is_emptied_to_its_end_whoever_waits() {
    use std::io::Write;
    let Some(env) = world("the_trash_is_emptied_to_its_end_whoever_waits") else {
        return;
    };
    let names: Vec<String> = (0..13).map(|number| format!("fox-{number}")).collect();
    for name in &names {
        create_stopped(&env, name);
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    env.ok(&[&["vm", "delete"], &names[..]].concat());
    let mut asked = std::os::unix::net::UnixStream::connect(env.socket()).unwrap();
    asked
        .write_all(b"POST /v1/trash/empty HTTP/1.1\r\nhost: banger\r\ncontent-length: 0\r\n\r\n")
        .unwrap();
    eventually("some are gone", || {
        (env.vm_folders().len() < names.len()).then_some(())
    });
    drop(asked);
    eventually("all are gone", || env.vm_folders().is_empty().then_some(()));
    assert_eq!(env.vms(), Vec::<Value>::new());
}

#[test]
#[ignore = "system test"]
fn what_was_running_before_a_crash_is_restored_and_nothing_else() {
    let test = "what_was_running_before_a_crash_is_restored_and_nothing_else";
    let Some(env) = world(test) else { return };
    let vm = create(&env, "otter", &["--autostart"]);
    create(&env, "fox", &[]);
    create(&env, "owl", &[]);
    env.ok(&["vm", "stop", "owl"]);
    for vm in [&vm, &env.vm("fox")] {
        let pid = i32::try_from(vm["attempt"]["vmm_pid"].as_i64().unwrap()).unwrap();
        signal(pid, Signal::KILL);
        assert!(wait_exit(pid, LIMIT));
        env.vm_becomes(text(vm, "name"), "stopped", |vm| state(vm) == "stopped");
    }
    assert_eq!(
        env.ok(&["vm", "restore", "--autostart"]),
        "otter: started\n"
    );
    assert_eq!(env.ok(&["vm", "restore"]), "fox: started\n");
    assert_eq!(env.ok(&["vm", "restore"]), "");
    assert_eq!(state(&env.vm("owl")), "stopped");
}

#[test]
#[ignore = "system test"]
fn the_host_is_listed_and_cleaned_and_vms_keep_their_files() {
    let test = "the_host_is_listed_and_cleaned_and_vms_keep_their_files";
    let Some(env) = world(test) else { return };
    let vm = create(&env, "otter", &["--nat", "-p", "8080:80"]);
    let kinds = |env: &TestEnv| {
        let objects = env.json(&["host", "ls"]);
        let mut kinds: Vec<String> = objects
            .as_array()
            .unwrap()
            .iter()
            .map(|object| {
                assert_eq!(object["expected"], true, "{objects}");
                text(object, "kind").to_owned()
            })
            .collect();
        kinds.dedup();
        kinds
    };
    let all = kinds(&env);
    for kind in [
        "process",
        "namespace",
        "tap",
        "published-port",
        "veth",
        "nft-table",
    ] {
        assert!(all.iter().any(|known| known == kind), "{kind}: {all:?}");
    }
    assert_refused(&env.banger(&["host", "clean"]), 5, "otter are live");
    assert_eq!(state(&env.vm("otter")), "running");
    let done = env.ok(&["host", "clean", "--force"]);
    assert!(done.contains("removed tap "), "{done}");
    assert_eq!(kinds(&env), ["process"]);
    let left: Host = env.host();
    assert_eq!(left.links, Vec::<String>::new());
    assert_eq!(left.running("banger-netns"), Vec::<i32>::new());
    assert_eq!(listening(), Vec::<u16>::new());
    assert_eq!(state(&env.vm("otter")), "stopped");
    assert!(env.vm_folder(text(&vm, "id")).join("overlay.img").exists());
    env.ok(&["vm", "start", "otter", "--wait"]);
    env.ok(&["doctor", "--repair"]);
}
