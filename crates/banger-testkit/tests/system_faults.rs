//! What somebody does to the host by hand while a VM runs, the same in every mode: it is put right by itself or by
//! `doctor --repair`, reported, or left alone where it is not ours. With `fake-vmm` as the VMM.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use banger_testkit::env::{TestEnv, Vmm};
use banger_testkit::host::Host;
use banger_testkit::machine::{Machine, Mode, in_a_world, ledger, sh};
use banger_testkit::run::{LIMIT, eventually, signal, wait_exit};
use rustix::process::Signal;
use serde_json::Value;
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};

#[test]
#[ignore = "system test"]
fn as_root_what_is_broken_by_hand_is_repaired_reported_or_left_alone() {
    tell(
        Mode::Root,
        "as_root_what_is_broken_by_hand_is_repaired_reported_or_left_alone",
    );
}

#[test]
#[ignore = "system test"]
fn with_the_helper_what_is_broken_by_hand_is_repaired_reported_or_left_alone() {
    tell(
        Mode::Helper,
        "with_the_helper_what_is_broken_by_hand_is_repaired_reported_or_left_alone",
    );
}

#[test]
#[ignore = "system test"]
fn without_root_what_is_broken_by_hand_is_repaired_reported_or_left_alone() {
    tell(
        Mode::Rootless,
        "without_root_what_is_broken_by_hand_is_repaired_reported_or_left_alone",
    );
}

fn tell(mode: Mode, test: &'static str) {
    in_a_world(mode, test, move |machine, env| {
        let world = World { mode, machine, env };
        world.begin();
        world.a_vmm_that_is_killed_takes_its_port_along();
        world.a_port_that_is_deleted_is_told_and_made_again();
        world.a_bridge_that_is_removed_is_made_again_with_its_ports();
        world.tables_that_are_flushed_are_whole_again();
        world.a_way_out_that_is_cut_is_made_again();
        world.a_namespace_that_loses_its_keeper_gets_another();
        world.a_copied_state_folder_is_another_instance_and_harms_not_the_first(test);
        world.what_has_our_name_and_is_not_ours_is_named_and_left_alone();
        world.end();
    });
}

struct World<'a> {
    mode: Mode,
    machine: &'a Machine,
    env: TestEnv,
}

impl World<'_> {
    fn published(&self) -> SocketAddrV4 {
        let [_, b, c, _] = self.env.pool().octets();
        SocketAddrV4::new(Ipv4Addr::new(127, b, c, 1), 8080)
    }

    /// Two VMs that are joined, both with a way out, one with a port of the host.
    fn begin(&self) {
        for name in ["otter", "owl"] {
            let size = ["--image", "tiny", "--memory", "128", "--no-start", "--nat"];
            let create = ["vm", "create", "--name", name];
            self.env.ok(&[&create[..], &size].concat());
        }
        let port = format!("{}:80", self.published());
        self.env.ok(&["port", "add", "otter", &port]);
        self.env.ok(&["net", "join", "otter", "owl"]);
        self.start();
    }

    fn start(&self) {
        self.env.ok(&["vm", "start", "otter", "owl", "--wait"]);
        self.whole("a start");
    }

    /// A line of shell in the namespace.
    #[track_caller]
    fn inside(&self, line: &str) -> String {
        let keeper = self.env.keeper().unwrap();
        sh(&format!(
            "nsenter --net=/proc/{keeper}/ns/net sh -ec '{line}'"
        ))
    }

    fn pid(&self, which: &str) -> i32 {
        let vm = self.env.vm("otter");
        i32::try_from(vm["attempt"][which].as_i64().unwrap()).unwrap()
    }

    /// All that the two VMs should have, by the kernel's word.
    fn now(&self) -> Result<(), String> {
        let check = |what: &str, holds: bool| holds.then_some(()).ok_or_else(|| what.to_owned());
        let keeper = self.env.keeper().ok_or("no keeper")?;
        let links = sh(&format!(
            "nsenter --net=/proc/{keeper}/ns/net ip -j -d link"
        ));
        let links: Value = serde_json::from_str(&links).unwrap();
        let links = links.as_array().unwrap();
        let up = |link: &Value| {
            let flags = link["flags"].as_array();
            flags.is_some_and(|flags| flags.contains(&"UP".into()))
        };
        let ports = links.iter().filter(|link| {
            let name = link["ifname"].as_str().unwrap_or_default();
            let isolated = &link["linkinfo"]["info_slave_data"]["isolated"] == true;
            name.starts_with("bt") && link["master"] == "br0" && up(link) && isolated
        });
        check("two ports of the bridge", ports.count() == 2)?;
        let named = |name: &str| links.iter().any(|link| link["ifname"] == name && up(link));
        check("bridge", named("br0"))?;
        check("uplink", named("up0"))?;
        let rules = sh(&format!(
            "nsenter --net=/proc/{keeper}/ns/net nft list ruleset"
        ));
        for name in ["otter", "owl"] {
            let vm = self.env.vm(name);
            let address = vm["address"].as_str().unwrap().to_owned();
            // The address a guest sends with, joins and NAT.
            check("known to the rules", rules.matches(&address).count() >= 3)?;
        }
        let gateway = self.gateway();
        let addresses = sh(&format!(
            "nsenter --net=/proc/{keeper}/ns/net ip -j address show dev br0"
        ));
        check("the bridge's address", addresses.contains(&gateway))?;
        let status = self.env.json(&["nat", "status"]);
        for vm in status["vms"].as_array().unwrap() {
            check("NAT", vm["nat_now"] == true)?;
        }
        check("way out", status["way_out"]["state"] == "open")?;
        check("port", TcpStream::connect(self.published()).is_ok())?;
        if self.mode != Mode::Rootless {
            check("forwarding", self.machine.forwards())?;
            check("veth", self.env.host().links.len() == 1)?;
            check("route", !self.env.host().routes.is_empty())?;
            // Of each instance, and of what forwards.
            check("memory", ledger().len() >= 2)?;
            check("table", sh("nft list tables").contains("banger_"))?;
        }
        let objects = self.env.json(&["host", "ls"]);
        let objects = objects.as_array().unwrap();
        check(
            "ledger",
            objects.iter().all(|object| object["expected"] == true),
        )
    }

    fn gateway(&self) -> String {
        let pool = banger_core::addr::Pool::at(self.env.pool());
        pool.gateway().to_string()
    }

    #[track_caller]
    fn whole(&self, after: &str) {
        let deadline = std::time::Instant::now() + LIMIT;
        while let Err(why) = self.now() {
            assert!(
                std::time::Instant::now() < deadline,
                "{}: after {after}: {why}\n{}",
                self.mode.name(),
                self.env.daemon_log()
            );
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }

    #[track_caller]
    fn repair(&self, says: &str) {
        let output = self.env.banger(&["doctor", "--repair"]);
        assert!(
            output.status == 0 && output.stdout.contains(says),
            "{says}: {output:?}"
        );
        self.whole("a repair");
        let again = self.env.banger(&["doctor", "--repair"]);
        assert!(
            again.status == 0
                && again.stdout.is_empty()
                && again.stderr.contains("nothing differs from the records"),
            "after {says}: {again:?}"
        );
    }

    fn a_vmm_that_is_killed_takes_its_port_along(&self) {
        signal(self.pid("vmm_pid"), Signal::KILL);
        let vm = self
            .env
            .vm_becomes("otter", "stopped", |vm| vm["phase"]["state"] == "stopped");
        assert_ne!(vm["phase"]["why"]["reason"], "asked", "{vm}");
        assert_eq!(self.env.taps().len(), 1);
        assert!(TcpStream::connect(self.published()).is_err());
        self.start();
    }

    fn a_port_that_is_deleted_is_told_and_made_again(&self) {
        let tap = format!("bt{}", &self.id("otter").replace('-', "")[20..]);
        self.inside(&format!("ip link delete {tap}"));
        self.repair(&tap);
    }

    fn id(&self, name: &str) -> String {
        self.env.vm(name)["id"].as_str().unwrap().to_owned()
    }

    fn a_bridge_that_is_removed_is_made_again_with_its_ports(&self) {
        self.inside("ip link delete br0");
        self.repair("made the bridge `br0`");
        // The name server is heard again, at the same place.
        let port = format!(":{:04X} ", 53);
        eventually("the name server is heard", || {
            let listening = self.inside("cat /proc/net/udp");
            listening.contains(&port).then_some(())
        });
    }

    fn tables_that_are_flushed_are_whole_again(&self) {
        let rules = || {
            let keeper = self.env.keeper().unwrap();
            let inside =
                format!("nsenter --net=/proc/{keeper}/ns/net nft --stateless list ruleset");
            (sh("nft --stateless list ruleset"), sh(&inside))
        };
        let whole = rules();
        sh("nft flush ruleset");
        self.inside("nft flush ruleset");
        eventually("the rules", || (rules() == whole).then_some(()));
        self.whole("a flush");
    }

    fn a_way_out_that_is_cut_is_made_again(&self) {
        if self.mode == Mode::Rootless {
            let pasta = |host: &Host| {
                let ways = host.processes.iter();
                let mut ways = ways.filter(|process| process.program.starts_with("pas"));
                ways.next().map(|process| process.pid)
            };
            let pid = pasta(&self.env.host()).unwrap();
            signal(pid, Signal::KILL);
            assert!(wait_exit(pid, LIMIT));
            self.repair("made the way out `up0`, by `pasta`");
        } else {
            let veth = self.env.host().links.remove(0);
            sh(&format!("ip link delete {veth}"));
            self.repair(&format!("made the veth `{veth}`"));
        }
    }

    fn a_namespace_that_loses_its_keeper_gets_another(&self) {
        let namespaces = self.env.host().namespaces;
        let keeper = self.env.keeper().unwrap();
        signal(keeper, Signal::KILL);
        assert!(wait_exit(keeper, LIMIT));
        self.whole("the keeper's end");
        assert_eq!(self.env.host().namespaces, namespaces);
        // With the daemon gone as well, it is the VM's shim that knows the way.
        let keeper = self.env.keeper().unwrap();
        self.env.kill_daemon();
        signal(keeper, Signal::KILL);
        assert!(wait_exit(keeper, LIMIT));
        self.env.ok(&["daemon", "start"]);
        self.whole("the end of keeper and daemon");
        assert_eq!(self.env.host().namespaces, namespaces);
    }

    fn a_copied_state_folder_is_another_instance_and_harms_not_the_first(&self, test: &str) {
        let copy = self.mode.env(test, Vmm::Scripted(String::new())).unwrap();
        let folder = copy.state().parent().unwrap().display();
        // Sockets cannot be copied, and nobody would miss them.
        sh(&format!(
            "cp -a {}/. {folder}/banger/ 2>/dev/null || true",
            self.env.state().display()
        ));
        let before = (self.pid("vmm_pid"), self.pid("shim_pid"));
        let instance = |env: &TestEnv| std::fs::read(env.state().join("instance.json")).unwrap();
        assert_eq!(instance(&copy), instance(&self.env));

        // The same VMs, which do not run here.
        let states = copy.json(&["vm", "list"]);
        for vm in states.as_array().unwrap() {
            assert_eq!(vm["phase"]["state"], "stopped", "{vm}");
        }
        assert_ne!(instance(&copy), instance(&self.env));
        self.whole("the copy's first look");
        // Its port of the host is taken, by the first one.
        copy.ok(&["vm", "start", "otter", "owl", "--wait"]);
        self.whole("the copy's start");
        assert_ne!(copy.vm("otter")["address"], self.env.vm("otter")["address"]);
        copy.ok(&["vm", "delete", "--force", "--purge", "otter", "owl"]);
        copy.ok(&["daemon", "stop"]);
        drop(copy);
        self.whole("the copy's end");
        assert_eq!((self.pid("vmm_pid"), self.pid("shim_pid")), before);
    }

    /// A link and a table of somebody else, who has taken our names while nothing of ours was there.
    fn what_has_our_name_and_is_not_ours_is_named_and_left_alone(&self) {
        if self.mode == Mode::Rootless {
            return;
        }
        let veth = self.env.host().links.remove(0);
        self.end();
        let table = veth.replacen("bv", "banger_", 1);
        for (object, foreign, show, remove) in [
            (
                &veth,
                format!("ip link add {veth} type bridge"),
                format!("ip -d -j link show {veth}"),
                format!("ip link delete {veth}"),
            ),
            (
                &table,
                format!("nft add table inet {table}"),
                format!("nft list table inet {table}"),
                format!("nft delete table inet {table}"),
            ),
        ] {
            sh(&foreign);
            let before = sh(&show);
            let refused = self.env.banger(&["vm", "start", "otter"]);
            assert!(refused.status != 0, "{refused:?}");
            assert!(refused.stderr.contains(object.as_str()), "{refused:?}");
            assert_eq!(sh(&show), before);
            self.end();
            assert_eq!(sh(&show), before);
            sh(&remove);
        }
        self.start();
    }

    /// Nothing of the world is on the host.
    fn end(&self) {
        self.env.ok(&["daemon", "stop", "--vms"]);
        eventually("all of the world has ended", || {
            (self.env.host().processes.is_empty()).then_some(())
        });
    }
}
