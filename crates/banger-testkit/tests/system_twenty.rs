//! Twenty VMs live their whole life, with `fake-vmm` as their VMM, and the host afterwards is byte for byte the host
//! before: rules, links, routes, loop devices, device-mapper and all settings of the network, in every mode.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use banger_testkit::env::{TestEnv, Vmm};
use banger_testkit::host::Host;
use banger_testkit::machine::{Helper, Machine, Mode, differences, ledger, on_a_thread, sh};
use banger_testkit::run::{LIMIT, eventually};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Instant;

const COUNT: usize = 20;

/// Somebody else's rules, with a set and a chain that packets pass.
const FOREIGN: &str = "table inet somebody {
	set some {
		type ipv4_addr
		elements = { 198.51.100.7 }
	}
	chain forward {
		type filter hook forward priority 10; policy accept;
		ip daddr @some drop
	}
}
table ip nat {
	chain POSTROUTING {
		type nat hook postrouting priority 100; policy accept;
		oifname \"wan7\" masquerade
	}
}";

#[test]
#[ignore = "system test"]
fn as_root_a_life_of_twenty_vms_leaves_the_host_byte_for_byte_as_it_was() {
    tell(
        Mode::Root,
        "as_root_a_life_of_twenty_vms_leaves_the_host_byte_for_byte_as_it_was",
    );
}

#[test]
#[ignore = "system test"]
fn with_the_helper_a_life_of_twenty_vms_leaves_the_host_byte_for_byte_as_it_was() {
    tell(
        Mode::Helper,
        "with_the_helper_a_life_of_twenty_vms_leaves_the_host_byte_for_byte_as_it_was",
    );
}

#[test]
#[ignore = "system test"]
fn without_root_a_life_of_twenty_vms_leaves_the_host_byte_for_byte_as_it_was() {
    tell(
        Mode::Rootless,
        "without_root_a_life_of_twenty_vms_leaves_the_host_byte_for_byte_as_it_was",
    );
}

/// All that can be seen of the host's plumbing, by what shows it.
fn picture(machine: &Machine) -> BTreeMap<String, String> {
    let mut picture: BTreeMap<String, String> = machine
        .settings()
        .into_iter()
        .map(|(path, text)| (path.display().to_string(), text))
        .collect();
    for line in [
        "nft list ruleset",
        "ip -d -j link",
        "ip -d -j address",
        "ip -d -j -4 route show table all",
        "ip -d -j -6 route show table all",
        "ip -d -j -4 rule",
        "ip -d -j -6 rule",
        "ip -j neigh show nud permanent",
        "ip netns list",
    ] {
        picture.insert(line.to_owned(), sh(line).replace("},{", "},\n{"));
    }
    picture.insert("ledger".to_owned(), format!("{:?}", ledger()));
    let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    picture.insert("mounts".to_owned(), mounts);
    picture
}

/// Loop devices and mappings are the whole machine's, and others may use them meanwhile: these are ours.
fn devices(env: &TestEnv) -> String {
    let folder = env.folder().display();
    sh(&format!(
        "losetup -l -J | grep -F '{folder}' || true; \
         if [ -e /dev/mapper/control ] && command -v dmsetup >/dev/null; then dmsetup ls | grep -i '^banger-' || true; fi"
    ))
}

/// A first VM in a machine of its own: the kernel loads the modules that it takes, whose settings stay.
fn load_modules(mode: Mode, test: &'static str) -> bool {
    let made = on_a_thread(test, move || {
        let _machine = Machine::enter(test, mode)?;
        let _helper = (mode == Mode::Helper).then(|| Helper::start(&[]));
        let env = mode.env(test, Vmm::Scripted(String::new()))?;
        create(&env, "first");
        env.ok(&["nat", "up", "first"]);
        env.ok(&["vm", "start", "first", "--wait"]);
        env.ok(&["vm", "delete", "--force", "--purge", "first"]);
        end(&env);
        Some(())
    });
    made.is_some()
}

fn create(env: &TestEnv, name: &str) {
    let size = ["--memory", "128", "--disk-size", "64M", "--no-start"];
    let create = ["vm", "create", "--name", name, "--image", "tiny"];
    env.ok(&[&create[..], &size].concat());
}

fn end(env: &TestEnv) {
    env.ok(&["daemon", "stop"]);
    // What holds an ordinary user's way out ends by itself, after the keeper.
    eventually("all of the world has ended", || {
        (env.host() == Host::default()).then_some(())
    });
}

fn tell(mode: Mode, test: &'static str) {
    on_a_thread(test, move || {
        if load_modules(mode, test) {
            live(mode, test);
        }
    });
}

fn live(mode: Mode, test: &'static str) {
    let Some(machine) = Machine::enter(test, mode) else {
        return;
    };
    sh(&format!("nft '{FOREIGN}'"));
    let Some(env) = mode.env(test, Vmm::Scripted(String::new())) else {
        return;
    };
    let before = picture(&machine);
    let helper = (mode == Mode::Helper).then(|| Helper::start(&[]));

    let names: Vec<String> = (1..=COUNT)
        .map(|number| format!("vm-{number:02}"))
        .collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let all = |verb: &[&str]| {
        env.ok(&[verb, &names].concat());
    };
    for name in &names {
        create(&env, name);
    }
    all(&["vm", "start", "--wait"]);
    all(&["nat", "up"]);
    let [_, b, c, _] = env.pool().octets();
    let address = Ipv4Addr::new(127, b, c, 1);
    for (name, port) in names.iter().zip(8000..) {
        let place = SocketAddrV4::new(address, port);
        env.ok(&["port", "add", name, &format!("{place}:80")]);
        env.ok(&["port", "add", name, &format!("{place}:53/udp")]);
    }
    for pair in names.chunks(2) {
        env.ok(&["net", "join", pair[0], pair[1]]);
    }
    // What is asserted to be gone was there.
    assert_eq!(env.taps().len(), COUNT);
    let status = env.json(&["nat", "status"]);
    let vms = status["vms"].as_array().unwrap();
    assert_eq!(vms.len(), COUNT);
    for vm in vms {
        assert_eq!(vm["nat_now"], true, "{vm}");
        assert_eq!(vm["ports"][1]["open"], true, "{vm}");
    }
    assert_eq!(machine.forwards(), mode != Mode::Rootless);
    assert_eq!(env.host().links.len(), usize::from(mode != Mode::Rootless));
    let during = picture(&machine);
    assert!(mode == Mode::Rootless || during != before);

    all(&["vm", "stop"]);
    all(&["vm", "reset"]);
    all(&["vm", "start", "--wait"]);
    all(&["vm", "delete", "--force"]);
    for name in &names {
        env.ok(&["vm", "undelete", name]);
    }
    all(&["vm", "start", "--wait"]);
    all(&["vm", "delete", "--force", "--purge"]);
    assert_eq!(env.vm_folders(), Vec::<String>::new());
    end(&env);
    drop(helper);
    assert_eq!(devices(&env), "");

    let deadline = Instant::now() + LIMIT;
    let mut after = picture(&machine);
    // The kernel takes links down a moment after their namespace.
    while after != before && Instant::now() < deadline {
        std::thread::sleep(std::time::Duration::from_millis(50));
        after = picture(&machine);
    }
    let mut left = String::new();
    for name in before
        .keys()
        .chain(after.keys().filter(|name| !before.contains_key(*name)))
    {
        let text =
            |picture: &BTreeMap<String, String>| picture.get(name).cloned().unwrap_or_default();
        let (before, after) = (text(&before), text(&after));
        if before != after {
            left += &format!("{name}:\n{}", differences(&before, &after));
        }
    }
    assert!(
        left.is_empty() && before == after,
        "the host is another than before:\n{left}"
    );
    let bytes: usize = after.values().map(String::len).sum();
    println!(
        "TWENTY VMS, {}: {bytes} bytes of {} tables and settings are as before",
        mode.name(),
        after.len()
    );
}
