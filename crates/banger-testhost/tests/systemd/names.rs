//! Names of guests, by the host's systemd-resolved.

use crate::host::{eventually, install, root, state, try_root};
use crate::internet::{INTRANET, Internet, RESOLVED};
use crate::login::{CREATE, Login};

/// What `dns status` says where the resolver was told.
const ROUTED: &str = "systemd-resolved asks the instance's server";
/// banger of root, with root's own folders and the programs that are installed.
const ROOT: &str = "env -u BANGER_LIBEXEC HOME=/root /usr/local/bin/banger";

#[test]
#[ignore = "runs inside the test host"]
fn host_and_guests_know_each_other_by_name_in_helper_and_in_root_mode_also_after_a_restart_of_the_resolver()
 {
    install();
    let _internet = Internet::new();
    let mut otter = Login::new();
    let calm = otter.create("calm", "--nat");
    let calm = calm["address"].as_str().unwrap().to_owned();
    assert_eq!(otter.json("banger daemon status")["mode"], "helper");
    eventually("the helper has told the resolver", || finds("calm", &calm));
    let dns = otter.json("banger dns status");
    assert_eq!(dns["host_names"], ROUTED);
    let doctor = otter.run("banger doctor").stdout;
    assert!(doctor.contains(&format!("names: {ROUTED}")), "{doctor}");
    let objects = otter.json("banger host ls");
    let mut objects = objects.as_array().unwrap().iter();
    assert!(objects.any(|object| object["kind"] == "resolver" && object["owner"] == "(instance)"));

    // The guest knows itself, and with NAT the internet by way of the host's resolver.
    let said = otter.ssh(
        "calm",
        &format!("nslookup calm.vm; nslookup {calm}; nslookup -type=a there.example; true"),
    );
    assert!(said.contains(&format!("Address: {calm}")), "{said}");
    assert!(said.contains("name = calm.vm"), "{said}");
    assert!(said.contains(&RESOLVED.to_string()), "{said}");

    // Names of private networks are for guests that reach these.
    let intranet = |otter: &mut Login| {
        let said = otter.ssh("calm", "nslookup -type=a intranet.corp; true");
        said.contains(&INTRANET.to_string())
    };
    assert!(!intranet(&mut otter));
    otter.ok("banger nat up calm --private");
    assert!(intranet(&mut otter));

    // Root has guests as well. Both answer for names below `.vm`, each for its own.
    root("mkdir -p ~/.local/share && cp -r /mnt/fixtures/banger ~/.local/share/");
    root(&format!("{ROOT} daemon start"));
    let said = root(&format!("{ROOT} daemon status --json"));
    assert!(
        said.contains("\"mode\":\"root\"") || said.contains("\"mode\": \"root\""),
        "{said}"
    );
    root(&format!(
        "{ROOT} {} --name heron",
        &CREATE["banger ".len()..]
    ));
    let heron = root(&format!("{ROOT} vm show heron --json"));
    let heron: serde_json::Value = serde_json::from_str(&heron).unwrap();
    let vmm = &heron["attempt"]["vmm_pid"];
    let group = std::fs::read_to_string(format!("/proc/{vmm}/cgroup")).unwrap();
    assert!(group.starts_with("0::/banger.slice/banger-"), "{group}");
    let heron = heron["address"].as_str().unwrap().to_owned();
    eventually("root's guest has a name", || finds("heron", &heron));
    finds("calm", &calm).expect("both have their names");

    root("systemctl restart systemd-resolved");
    eventually("the names are back", || {
        finds("calm", &calm).and_then(|()| finds("heron", &heron))
    });
    // Who stops it wants it stopped; and one that has forgotten all that it was told is told again.
    root("systemctl stop systemd-resolved");
    otter.ok("banger daemon restart");
    let dns = otter.json("banger dns status");
    assert!(
        dns["host_names"].as_str().unwrap().contains("does not run"),
        "{dns:#}"
    );
    assert_eq!(state("systemd-resolved"), "inactive");
    root("rm -rf /run/systemd/resolve/* && systemctl start systemd-resolved");
    eventually("the names are back", || {
        finds("calm", &calm).and_then(|()| finds("heron", &heron))
    });
    let dns = otter.json("banger dns status");
    assert_eq!(dns["host_names"], ROUTED);

    root(&format!("{ROOT} vm delete heron --force --purge"));
    is_gone("heron", &heron);
    finds("calm", &calm).expect("the other one has its name");
    root(&format!(
        "{ROOT} daemon stop && rm -r ~/.local/share/banger ~/.local/state/banger"
    ));
    otter.ok("banger vm delete calm --force --purge");
    is_gone("calm", &calm);
    otter.ok("banger daemon stop");
    eventually("the resolver knows nothing of all this any more", || {
        let status = root("resolvectl status");
        (!status.contains("~vm") && !status.contains("(bv")).then_some(())
    });
}

/// Whether the host finds the guest by its name, and the name by the guest's address, as any of its programs would.
fn finds(name: &str, address: &str) -> Option<()> {
    let forward = try_root(&format!("getent ahostsv4 {name}.vm")).ok()?;
    let reverse = try_root(&format!("getent hosts {address}")).ok()?;
    let asked = try_root(&format!(
        "resolvectl query {name}.vm && resolvectl query {address}"
    ))
    .ok()?;
    let finds = forward.contains(address)
        && reverse.contains(&format!("{name}.vm"))
        && asked.contains(&format!("{name}.vm: {address}"))
        && asked.contains(&format!("{address}: {name}.vm"));
    finds.then_some(())
}

#[track_caller]
fn is_gone(name: &str, address: &str) {
    for what in [format!("{name}.vm"), address.to_owned()] {
        let said = try_root(&format!("getent hosts {what}"));
        assert!(said.is_err(), "{said:?}");
        let said = try_root(&format!("resolvectl query {what}"));
        assert!(said.is_err(), "{said:?}");
    }
}
