//! Bad input and bad hosts: each is refused with its subject, its cause and the next step, and leaves nothing.

use banger_testkit::env::{Options, TestEnv, Vmm, names};
use banger_testkit::host::Host;
use banger_testkit::run::Output;
use serde_json::Value;
use std::collections::BTreeSet;

const INVALID: i32 = 2;
const DAEMON: i32 = 3;
const NOT_FOUND: i32 = 4;
const TAKEN: i32 = 5;
const NO_DRIVER: i32 = 7;
const NO_SPACE: i32 = 8;
const BAD_FILE: i32 = 9;

/// Refused with this exit code, naming each of `says`, and nothing is left of it.
#[track_caller]
fn assert_refused(env: &TestEnv, args: &[&str], status: i32, says: &[&str]) -> Output {
    let output = env.banger(args);
    assert!(
        output.status == status && output.stdout.is_empty() && output.stderr.contains("error:"),
        "{args:?} was to end with {status}: {output:?}"
    );
    for text in says {
        assert!(
            output.stderr.contains(text),
            "{args:?} was to say `{text}`: {}",
            output.stderr
        );
    }
    assert_eq!(env.vm_folders(), Vec::<String>::new(), "{args:?}");
    output
}

#[track_caller]
fn assert_empty(env: &TestEnv) {
    assert_eq!(env.vms(), Vec::<Value>::new());
    assert_eq!(env.vm_folders(), Vec::<String>::new());
    assert_eq!(env.taps(), Vec::<String>::new());
}

#[test]
#[ignore = "system test"]
fn values_that_are_not_allowed_are_named_with_what_is() {
    let test = "values_that_are_not_allowed_are_named_with_what_is";
    let Some(env) = TestEnv::scripted(test, "") else {
        return;
    };
    let long = "a".repeat(64);
    for name in [
        "", "Otter", "-otter", "otter-", "ot_ter", "ot ter", "../x", "ötter", &long,
    ] {
        let argument = format!("--name={name}");
        let says: &[&str] = if name.is_ascii() && !name.is_empty() {
            &[name, "name"]
        } else {
            &["name"]
        };
        let args = ["vm", "create", "--no-start", "--image", "tiny", &argument];
        assert_refused(&env, &args, INVALID, says);
    }
    for (option, value, says) in [
        ("--vcpu", "0", "16"),
        ("--vcpu", "17", "16"),
        ("--memory", "64", "128"),
        ("--memory", "40000", "32768"),
        ("--memory", "lots", "lots"),
    ] {
        let args = [
            "vm",
            "create",
            "--no-start",
            "--image",
            "tiny",
            option,
            value,
        ];
        assert_refused(&env, &args, INVALID, &[value, says]);
    }
    assert_empty(&env);
}

#[test]
#[ignore = "system test"]
fn the_daemon_itself_checks_what_the_command_line_lets_through() {
    let test = "the_daemon_itself_checks_what_the_command_line_lets_through";
    let Some(env) = TestEnv::scripted(test, "") else {
        return;
    };
    use banger_api::client::{Client, ClientError};
    use banger_api::endpoint::PostVms;
    use banger_api::error::ErrorCode;
    use banger_api::vm::CreateVm;
    env.ok(&["daemon", "start"]);
    let client = Client::new(env.socket());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.unwrap();
    let good = || CreateVm {
        image: Some("tiny".to_owned()),
        ..CreateVm::default()
    };
    for request in [
        CreateVm {
            name: Some("../../etc".to_owned()),
            ..good()
        },
        CreateVm {
            vcpus: Some(0),
            ..good()
        },
        CreateVm {
            vcpus: Some(17),
            ..good()
        },
        CreateVm {
            memory_mib: Some(64),
            ..good()
        },
        CreateVm {
            memory_mib: Some(40000),
            ..good()
        },
        CreateVm {
            overlay_bytes: Some(1),
            ..good()
        },
        CreateVm {
            disk_bytes: Some(u64::MAX),
            ..good()
        },
    ] {
        match runtime.block_on(client.call::<PostVms>(&[], &request)) {
            Err(ClientError::Refused(body)) => {
                assert_eq!(body.code, ErrorCode::InvalidRequest, "{body:?}");
            }
            other => panic!("{request:?} was not refused: {other:?}"),
        }
    }
    assert_empty(&env);
}

#[test]
#[ignore = "system test"]
fn an_image_or_vm_that_is_not_there_is_refused_with_what_may_be_meant() {
    let test = "an_image_or_vm_that_is_not_there_is_refused_with_what_may_be_meant";
    let Some(env) = TestEnv::scripted(test, "") else {
        return;
    };
    let create = |image: &'static str| ["vm", "create", "--no-start", "--image", image];
    assert_refused(&env, &create("tiyn"), NOT_FOUND, &["tiyn", "tiny", "hint:"]);
    assert_refused(
        &env,
        &create("nothing-like-it"),
        NOT_FOUND,
        &["nothing-like-it", "image list"],
    );
    let kernel = [
        "vm",
        "create",
        "--no-start",
        "--image",
        "tiny",
        "--kernel",
        "defualt",
    ];
    assert_refused(&env, &kernel, NOT_FOUND, &["defualt", "default", "hint:"]);
    for verb in [
        "start", "stop", "kill", "show", "delete", "logs", "why", "wait",
    ] {
        assert_refused(&env, &["vm", verb, "otter"], NOT_FOUND, &["otter", "hint:"]);
    }
    assert_empty(&env);
}

#[test]
#[ignore = "system test"]
fn a_kernel_that_is_none_is_refused_and_leaves_nothing() {
    let test = "a_kernel_that_is_none_is_refused_and_leaves_nothing";
    let Some(env) = TestEnv::scripted(test, "") else {
        return;
    };
    env.ok(&["daemon", "start"]);
    let kernels = || names(&env.data().join("kernels"));
    let before = kernels();
    let text = env.folder().join("kernel.txt");
    std::fs::write(&text, "this is no kernel\n").unwrap();
    let empty = env.folder().join("empty");
    std::fs::write(&empty, "").unwrap();
    let folder = env.folder().join("a-folder");
    std::fs::create_dir(&folder).unwrap();
    // Root reads everything; a link that goes round in a circle nobody can read.
    let unreadable = env.folder().join("circle");
    std::os::unix::fs::symlink(&unreadable, &unreadable).unwrap();
    let missing = env.folder().join("not-there");
    for path in [&text, &empty, &folder, &unreadable, &missing] {
        let path = path.to_str().unwrap();
        for args in [
            &["kernel", "import", path][..],
            &["kernel", "import", path, "--name", "own"],
        ] {
            assert_refused(&env, args, BAD_FILE, &[path, "hint:"]);
            assert_eq!(kernels(), before, "{args:?}");
        }
    }
    let listed = env.json(&["kernel", "list"]);
    assert_eq!(listed.as_array().unwrap().len(), 1);
}

#[test]
#[ignore = "system test"]
fn a_full_disk_stops_a_creation_and_leaves_nothing() {
    let test = "a_full_disk_stops_a_creation_and_leaves_nothing";
    let options = Options {
        state_bytes: Some(2 << 20),
        ..Options::default()
    };
    let Some(env) = TestEnv::with(test, &options) else {
        return;
    };
    env.ok(&["daemon", "start"]);
    let filler = env.state().join("filler");
    // Full to the last page: a write of one byte at a time would take ever so long.
    let mut length = 0_u64;
    for step in [64 << 10, 4 << 10] {
        loop {
            let file = std::fs::File::options()
                .create(true)
                .append(true)
                .open(&filler)
                .unwrap();
            if std::io::Write::write_all(&mut &file, &vec![1; step]).is_err() {
                file.set_len(length).unwrap();
                break;
            }
            length += step as u64;
        }
    }
    for args in [
        &[
            "vm",
            "create",
            "--no-start",
            "--image",
            "tiny",
            "--name",
            "otter",
        ][..],
        &["vm", "create", "--image", "tiny", "--name", "otter"],
        &[
            "vm",
            "create",
            "--no-start",
            "--image",
            "tiny",
            "--storage",
            "copy",
        ],
        &[
            "vm",
            "create",
            "--no-start",
            "--image",
            "tiny",
            "--disk-size",
            "1G",
        ],
    ] {
        assert_refused(&env, args, NO_SPACE, &["caused by:", "hint:"]);
    }
    assert_empty(&env);
    std::fs::remove_file(&filler).unwrap();
    env.ok(&[
        "vm",
        "create",
        "--no-start",
        "--image",
        "tiny",
        "--name",
        "otter",
    ]);
    env.ok(&["vm", "delete", "--purge", "otter"]);
    assert_empty(&env);
}

#[test]
#[ignore = "system test"]
fn a_vm_stops_and_goes_while_the_disk_is_full() {
    let test = "a_vm_stops_and_goes_while_the_disk_is_full";
    let options = Options {
        state_bytes: Some(4 << 20),
        ..Options::default()
    };
    let Some(env) = TestEnv::with(test, &options) else {
        return;
    };
    env.ok(&[
        "vm", "create", "--wait", "--image", "tiny", "--name", "otter",
    ]);
    let filler = env.state().join("filler");
    let file = std::fs::File::create(&filler).unwrap();
    while std::io::Write::write_all(&mut &file, &[1; 4096]).is_ok() {}
    drop(file);
    env.ok(&["vm", "stop", "otter"]);
    let host = env.host();
    assert_eq!(host.running("fake-vmm"), Vec::<i32>::new());
    assert_eq!(host.running("banger-shim"), Vec::<i32>::new());
    assert_eq!(env.taps(), Vec::<String>::new());
    std::fs::remove_file(&filler).unwrap();
    env.ok(&["vm", "delete", "--purge", "otter"]);
    assert_empty(&env);
}

#[test]
#[ignore = "system test"]
fn a_folder_in_the_sockets_place_is_named() {
    let Some(env) = TestEnv::scripted("a_folder_in_the_sockets_place_is_named", "") else {
        return;
    };
    std::fs::create_dir_all(env.socket()).unwrap();
    std::fs::set_permissions(
        env.socket().parent().unwrap(),
        std::os::unix::fs::PermissionsExt::from_mode(0o700),
    )
    .unwrap();
    let socket = env.socket().display().to_string();
    let says = [&*socket, "directory", "hint:"];
    for args in [
        &["vm", "list"][..],
        &["daemon", "start"],
        &["daemon", "status"],
    ] {
        assert_refused(&env, args, DAEMON, &says);
    }
    assert_eq!(env.host(), Host::default());
    std::fs::remove_dir(env.socket()).unwrap();
    env.ok(&["vm", "list"]);
}

#[test]
#[ignore = "system test"]
fn without_a_vmm_nothing_is_created_and_the_remedy_is_named() {
    let test = "without_a_vmm_nothing_is_created_and_the_remedy_is_named";
    let options = Options {
        vmm: Vmm::Missing,
        ..Options::default()
    };
    let Some(env) = TestEnv::with(test, &options) else {
        return;
    };
    let create = ["vm", "create", "--image", "tiny", "--name", "otter"];
    assert_refused(&env, &create, NO_DRIVER, &["/nonexistent/qemu", "hint:"]);
    env.ok(&["daemon", "stop"]);
    // Nor is one found where nothing is configured.
    let config = env.folder().join("config/banger/config.toml");
    let settings = std::fs::read_to_string(&config).unwrap();
    let without: String = settings
        .lines()
        .filter(|line| !line.starts_with("qemu"))
        .map(|line| format!("{line}\n"))
        .collect();
    std::fs::write(&config, without).unwrap();
    let output = env.banger_with(&[("PATH", "/nonexistent")], &create);
    assert_eq!(output.status, NO_DRIVER, "{output:?}");
    for text in ["qemu-system-x86_64", "hint:", "apt-get install"] {
        assert!(output.stderr.contains(text), "{output:?}");
    }
    assert_empty(&env);
}

#[test]
#[ignore = "system test"]
fn a_vmm_that_refuses_is_quoted_and_leaves_a_stopped_vm_and_no_port() {
    let test = "a_vmm_that_refuses_is_quoted_and_leaves_a_stopped_vm_and_no_port";
    let script = r#"{"exit_before_qmp": {"code": 1, "stderr": "no such machine today"}}"#;
    let Some(env) = TestEnv::scripted(test, script) else {
        return;
    };
    let create = [
        "vm", "create", "--image", "tiny", "--memory", "128", "--name", "otter",
    ];
    let output = env.banger(&create);
    assert_eq!(output.status, 10, "{output:?}");
    for text in [
        "otter",
        "no such machine today",
        "hint:",
        "`otter` was created",
    ] {
        assert!(output.stderr.contains(text), "{output:?}");
    }
    let vm = env.vm("otter");
    assert_eq!(vm["phase"]["state"], "stopped");
    assert_eq!(vm["phase"]["why"]["reason"], "start-failed");
    assert_eq!(env.taps(), Vec::<String>::new());
    assert!(
        !env.vm_folder(vm["id"].as_str().unwrap())
            .join("run")
            .exists()
    );
    env.script("{}");
    env.ok(&["vm", "start", "otter"]);
}

#[test]
#[ignore = "system test"]
fn a_long_home_works() {
    let options = Options {
        home_bytes: Some(90),
        ..Options::default()
    };
    let Some(env) = TestEnv::with("a_long_home_works", &options) else {
        return;
    };
    env.ok(&[
        "vm", "create", "--wait", "--image", "tiny", "--memory", "128", "--name", "otter",
    ]);
    env.ok(&["vm", "stop", "otter"]);
    env.ok(&["vm", "start", "otter"]);
    env.kill_daemon();
    assert_eq!(env.vm("otter")["phase"]["state"], "running");
    env.ok(&["vm", "stop", "otter"]);
    env.ok(&["vm", "delete", "--purge", "otter"]);
    assert_empty(&env);
}

#[test]
#[ignore = "system test"]
fn of_two_creations_of_one_name_at_once_one_succeeds() {
    let test = "of_two_creations_of_one_name_at_once_one_succeeds";
    let Some(env) = TestEnv::scripted(test, "") else {
        return;
    };
    env.ok(&["daemon", "start"]);
    for round in 0..10 {
        let name = format!("otter-{round}");
        let args = [
            "vm",
            "create",
            "--no-start",
            "--image",
            "tiny",
            "--name",
            &name,
        ];
        let running = [env.spawn(&args), env.spawn(&args)];
        let mut outputs = running.map(banger_testkit::run::Running::finish);
        outputs.sort_by_key(|output| output.status);
        assert_eq!(outputs[0].status, 0, "{outputs:?}");
        assert_eq!(outputs[1].status, TAKEN, "{outputs:?}");
        assert!(outputs[1].stderr.contains(&name) && outputs[1].stderr.contains("hint:"));
    }
    assert_eq!(env.vms().len(), 10);
    assert_eq!(env.vm_folders().len(), 10);
}

#[test]
#[ignore = "system test"]
fn of_two_first_commands_at_once_both_find_the_daemon() {
    let test = "of_two_first_commands_at_once_both_find_the_daemon";
    let Some(env) = TestEnv::scripted(test, "") else {
        return;
    };
    let args = [
        "vm",
        "create",
        "--no-start",
        "--image",
        "tiny",
        "--name",
        "otter",
    ];
    let running = [env.spawn(&args), env.spawn(&args)];
    let mut outputs = running.map(banger_testkit::run::Running::finish);
    outputs.sort_by_key(|output| output.status);
    assert_eq!(
        (outputs[0].status, outputs[1].status),
        (0, TAKEN),
        "{outputs:?}"
    );
    assert_eq!(env.host().running("bangerd").len(), 1);
}

#[test]
#[ignore = "system test"]
fn twenty_vms_created_at_once_are_all_there_with_addresses_of_their_own() {
    let test = "twenty_vms_created_at_once_are_all_there_with_addresses_of_their_own";
    let Some(env) = TestEnv::scripted(test, "") else {
        return;
    };
    env.ok(&["daemon", "start"]);
    let args = ["vm", "create", "--no-start", "--image", "tiny", "--json"];
    let running: Vec<_> = (0..20).map(|_| env.spawn(&args)).collect();
    let created: BTreeSet<String> = running
        .into_iter()
        .map(|running| {
            let output = running.finish();
            assert_eq!(output.status, 0, "{output:?}");
            let vm: Value = serde_json::from_str(&output.stdout).unwrap();
            vm["id"].as_str().unwrap().to_owned()
        })
        .collect();
    let vms = env.vms();
    let distinct = |key: &str| -> BTreeSet<String> {
        vms.iter()
            .map(|vm| vm[key].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(distinct("id"), created);
    assert_eq!(created.len(), 20);
    assert_eq!(distinct("address").len(), 20);
    assert_eq!(distinct("name").len(), 20);
    assert_eq!(distinct("mac").len(), 20);
    assert_eq!(env.vm_folders().len(), 20);
}
