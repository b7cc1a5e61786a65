//! What the kernel sees is what the records explain.

use super::place::Place;
use super::published;
use banger_testkit::env::TestEnv;
use banger_testkit::host::openers;
use banger_testkit::machine::{Mode, differences, ledger, sh, try_sh};
use banger_testkit::run::{LIMIT, eventually};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::TcpStream;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Mode, NAT, and what the namespace of a VM that nothing befell looks like.
static UNHARMED: Mutex<BTreeMap<(Mode, bool), String>> = Mutex::new(BTreeMap::new());
/// For how long nothing changes in a namespace that is done.
const STILL: Duration = Duration::from_millis(300);

/// Rules, routing policy, routes and settings of a namespace, in words that are the same for every VM.
fn namespace(env: &TestEnv, keeper: i32, vm: &Value) -> Result<String, String> {
    let look = "nft --stateless list ruleset; ip -j -4 rule; ip -j -6 rule; ip -j -4 route show table all; \
         cd /proc/sys/net/ipv4; cat ip_forward conf/br0/forwarding conf/br0/rp_filter conf/br0/proxy_arp";
    let text = inside(keeper, look)?;
    let id = vm["id"].as_str().unwrap().replace('-', "");
    let mac = vm["mac"].as_str().unwrap_or("no MAC");
    let address = vm["address"].as_str().unwrap();
    let mut text = text
        .replace(&format!("bt{}", &id[20..]), "TAP")
        .replace(mac, "MAC")
        // Whether anybody has the TAP open makes no difference.
        .replace("\"linkdown\"", "");
    for after in [' ', ',', '"', ':', '\n'] {
        text = text.replace(&format!("{address}{after}"), &format!("ADDRESS{after}"));
    }
    // Every world has another pool, of sixteen times 256 addresses.
    let [a, b, c, _] = env.pool().octets();
    for number in 0..16 {
        text = text.replace(
            &format!("{a}.{b}.{}.", c + number),
            &format!("POOL.{number}."),
        );
    }
    Ok(text.replace("},{", "},\n{"))
}

/// What `line` prints in a keeper's namespace; one of a daemon that was killed may be about to end.
fn inside(keeper: i32, line: &str) -> Result<String, String> {
    try_sh(&format!(
        "nsenter --net=/proc/{keeper}/ns/net sh -ec '{line}'"
    ))
}

/// The words of a text that begin so, without repetitions.
fn words(text: &str, prefix: &str) -> Vec<String> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    let mut words: Vec<String> = words
        .filter(|word| word.starts_with(prefix))
        .map(str::to_owned)
        .collect();
    words.dedup();
    words
}

/// Remembers what the namespace of a VM looks like that nothing has befallen.
pub(crate) fn remember(place: &Place, env: &TestEnv) {
    let vm = env.vms().remove(0);
    let keeper = env.keeper().unwrap();
    let look = || namespace(env, keeper, &vm).unwrap();
    let still = eventually("the namespace is done", || {
        let before = look();
        std::thread::sleep(STILL);
        (look() == before).then_some(before)
    });
    let key = (place.mode, vm["spec"]["nat"] == true);
    let mut unharmed = UNHARMED.lock().unwrap_or_else(PoisonError::into_inner);
    unharmed.insert(key, still);
}

/// The program that runs the VMs of a world.
fn vmm_program(env: &TestEnv) -> &'static str {
    if env.folder().join("vmm").exists() {
        "fake-vmm"
    } else {
        "qemu-system-x86_64"
    }
}

fn is_running(vm: &Value) -> bool {
    vm["phase"]["state"] == "running"
}

/// Processes, files, and the network inside and outside, in a world with this VM or none. Some of it is put right a
/// moment later, by whoever is told of the difference.
pub(crate) fn assert_host_is_records(place: &Place, env: &TestEnv, at: &str, vm: Option<&Value>) {
    let deadline = std::time::Instant::now() + LIMIT;
    let compare = || {
        processes(env, vm)?;
        network(place, env, vm)?;
        files(env, vm)?;
        expected(env)
    };
    while let Err(why) = compare() {
        assert!(
            std::time::Instant::now() < deadline,
            "{at}: {why}\n{}",
            env.daemon_log()
        );
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

fn processes(env: &TestEnv, vm: Option<&Value>) -> Result<(), String> {
    let recorded = |which: &str| -> Vec<i32> {
        let running = vm.filter(|vm| is_running(vm)).into_iter();
        running
            .map(|vm| i32::try_from(vm["attempt"][which].as_i64().unwrap()).unwrap())
            .collect()
    };
    let host = env.host();
    // One that waited for its launch when the daemon died ends by itself.
    equal("shims", host.running("banger-shim"), recorded("shim_pid"))?;
    equal("VMMs", host.running(vmm_program(env)), recorded("vmm_pid"))
}

fn files(env: &TestEnv, vm: Option<&Value>) -> Result<(), String> {
    let Some(vm) = vm else {
        return equal("folders of VMs", env.vm_folders(), Vec::new());
    };
    let id = vm["id"].as_str().unwrap();
    equal("folders of VMs", env.vm_folders(), vec![id.to_owned()])?;
    let folder = env.vm_folder(id);
    for name in ["vm.json", "overlay.img", "disk.img"] {
        equal(name, folder.join(name).is_file(), true)?;
    }
    let writers = env.host().running(vmm_program(env));
    let overlay = folder.join("overlay.img");
    equal("who has the overlay open", openers(&overlay), writers)?;
    equal("run/ is there", folder.join("run").exists(), is_running(vm))
}

/// The ledger explains all that it shows.
fn expected(env: &TestEnv) -> Result<(), String> {
    let ledger = env.json(&["host", "ls"]);
    let mut objects = ledger.as_array().unwrap().iter();
    match objects.find(|object| object["expected"] != true) {
        Some(object) => Err(format!("left over: {object}")),
        None => Ok(()),
    }
}

fn equal<T: PartialEq + std::fmt::Debug>(what: &str, is: T, wanted: T) -> Result<(), String> {
    if is == wanted {
        Ok(())
    } else {
        Err(format!("{what}: {is:?}, not {wanted:?}"))
    }
}

fn network(place: &Place, env: &TestEnv, vm: Option<&Value>) -> Result<(), String> {
    let running = vm.filter(|vm| is_running(vm));
    let nat = running.is_some_and(|vm| vm["spec"]["nat"] == true);
    let ports = running.is_some_and(|vm| vm["spec"]["ports"] != json!([]));

    // The host's side: link, routes, table and memory come and go together.
    let host = env.host();
    let links = words(&sh("ip -j link"), "bv");
    let attached = links.len();
    match (place.mode, running) {
        (Mode::Rootless, _) => equal("links of the host", attached, 0)?,
        (_, Some(_)) => equal("links of the host", attached, 1)?,
        // As long as the daemon has its namespace.
        (_, None) => equal("links of the host", attached.min(1), attached)?,
    }
    equal("links", &host.links, &links)?;
    equal("addresses", host.addresses.len(), attached)?;
    equal("routes", host.routes.is_empty(), attached == 0)?;
    let tables = words(&sh("nft list tables"), "banger_");
    equal("tables of the host", tables.len(), attached)?;
    let mut remembered = ledger();
    let lent = remembered.remove("forwarding.json");
    equal("memory of instances", remembered.len(), attached)?;
    let forwarded = nat && place.mode != Mode::Rootless;
    equal("forwarding", place.machine.forwards(), forwarded)?;
    equal("memory of forwarding", lent.is_some(), forwarded)?;
    // One program of two names, in one build for each kind of processor.
    let is_pasta = |name: &str| name.starts_with("passt") || name.starts_with("pasta");
    let ways_out = host.processes.iter();
    let ways_out = ways_out
        .filter(|process| is_pasta(&process.program))
        .count();
    match place.mode {
        // It stays as long as the namespace.
        Mode::Rootless if nat => equal("ways out", ways_out, 1)?,
        Mode::Rootless => equal("ways out", ways_out.min(1), ways_out)?,
        _ => equal("ways out", ways_out, 0)?,
    }

    // The namespace's side.
    let tap = |vm: &Value| format!("bt{}", &vm["id"].as_str().unwrap().replace('-', "")[20..]);
    if let Some(keeper) = env.keeper() {
        let taps = words(&inside(keeper, "ip -j link")?, "bt");
        equal("taps", taps, running.map(tap).into_iter().collect())?;
        let rules = inside(keeper, "nft list ruleset")?;
        let known = UNHARMED.lock().unwrap_or_else(PoisonError::into_inner);
        let unharmed = known.get(&(place.mode, nat)).cloned();
        drop(known);
        // A way out that nobody needs any more stays as long as the namespace.
        let is_left = place.mode == Mode::Rootless && !nat && ways_out > 0;
        if let (Some(vm), Some(unharmed), false) = (running, unharmed, is_left) {
            let now = namespace(env, keeper, vm)?;
            if now != unharmed {
                let differs = differences(&unharmed, &now);
                return Err(format!(
                    "the namespace is another than unharmed:\n{differs}"
                ));
            }
        }
        if let Some(vm) = vm {
            let known = rules.contains(vm["address"].as_str().unwrap());
            equal("known to the rules", known, running.is_some())?;
        }
        let (_, let_out) = rules.split_once("set nat_vms {").unwrap_or_default();
        let (let_out, _) = let_out.split_once("\n\t}").unwrap_or_default();
        equal("let out", let_out.contains("elements"), nat)?;
    } else {
        equal("there is a keeper", false, running.is_some())?;
    }
    if running.is_some() {
        let status = env.json(&["nat", "status"]);
        equal("NAT as told", &status["vms"][0]["nat_now"], &json!(nat))?;
    }
    let listens = TcpStream::connect(published(env)).is_ok();
    equal("the host listens", listens, ports)
}
