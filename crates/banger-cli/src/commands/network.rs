//! What the verbs about the network share: asking for it, choosing VMs of it, telling what is not as it should be.

use crate::output::table;
use crate::report::{Failure, warn};
use banger_api::client::Client;
use banger_api::endpoint::{GetNetwork, Nothing};
use banger_api::error::ErrorCode;
use banger_api::network::{NetworkStatus, VmNetwork, WayOut};
use banger_api::vm::Vm;
use banger_core::spec::{Resolution, resolve};

/// The network as it is now.
pub(super) async fn status(client: &Client) -> Result<NetworkStatus, Failure> {
    Ok(client.call::<GetNetwork>(&[], &Nothing {}).await?)
}

/// One VM's network as it is now; `None` if the VM is in the trash or the network cannot be asked.
pub(super) async fn of(client: &Client, vm: &Vm) -> Option<VmNetwork> {
    let status = status(client).await.ok()?;
    status.vms.into_iter().find(|found| found.id == vm.id)
}

/// The VMs that `names` mean, in that order; all without names.
///
/// # Errors
/// A name means no VM, or several.
pub(super) fn choose(vms: Vec<VmNetwork>, names: &[String]) -> Result<Vec<VmNetwork>, Failure> {
    if names.is_empty() {
        return Ok(vms);
    }
    let one = |name: &String| {
        let found = resolve(
            name,
            &vms,
            |vm| Some(vm.name.as_str()),
            |vm| vm.id.to_string(),
        );
        match found {
            Resolution::One(vm) => Ok(vm.clone()),
            Resolution::None => Err(Failure::new(
                ErrorCode::NotFound,
                format!("there is no VM `{name}` that is not in the trash"),
            )
            .hint("`banger vm list` shows all")),
            Resolution::Many(several) => {
                let several: Vec<&str> = several.iter().map(|vm| vm.name.as_str()).collect();
                let message = format!("`{name}` fits several VMs: {}", several.join(", "));
                Err(Failure::new(ErrorCode::Ambiguous, message)
                    .hint("type more of the one that is meant"))
            }
        }
    };
    names.iter().map(one).collect()
}

/// Tells, on stderr, what keeps guests with NAT from the internet.
pub(super) fn warn_of_way_out(way_out: &WayOut) {
    for (message, hints) in closed(way_out) {
        warn(&message, &hints);
    }
}

fn closed(way_out: &WayOut) -> Vec<(String, Vec<String>)> {
    match way_out {
        WayOut::Closed => Vec::new(),
        WayOut::Failed { why, hints } => {
            let again = "`banger doctor --repair` tries again then".to_owned();
            let hints = hints.iter().cloned().chain([again]).collect();
            vec![(format!("guests do not reach the internet: {why}"), hints)]
        }
        WayOut::Open { closed_by, .. } => closed_by
            .iter()
            .map(|closed| {
                let message = format!(
                    "guests do not reach the internet: {} drops what they send, and no rule of banger's can overrule it",
                    closed.chain
                );
                (message, vec![format!("as root: {}", closed.remedy)])
            })
            .collect(),
    }
}

/// Tells, on stderr, what of a live VM's NAT and ports is not as it was asked for. Asks only if there can be such.
pub(super) async fn warn_about(client: &Client, vm: &Vm) {
    let can_differ = vm.spec.nat || !vm.spec.ports.is_empty();
    if !vm.phase.is_live() || !can_differ {
        return;
    }
    // The verb itself is done: that the network cannot be asked does not undo it.
    let Ok(status) = status(client).await else {
        return;
    };
    if vm.spec.nat {
        warn_of_way_out(&status.way_out);
    }
    let now = status.vms.iter().find(|found| found.id == vm.id);
    for port in now.into_iter().flat_map(|now| &now.ports) {
        if let Some(why) = &port.problem {
            let hint = format!(
                "`banger port rm {} {}/{}` and `banger port add` another",
                vm.name, port.port.listen, port.port.protocol
            );
            warn(&format!("the port {} is closed: {why}", port.port), &[hint]);
        }
    }
}

/// The counters of dropped packets as a table, without those at zero.
pub(super) fn dropped(status: &NetworkStatus) -> String {
    let counted = status.dropped.iter().filter(|(_, packets)| **packets > 0);
    let rows: Vec<_> = counted
        .map(|(reason, packets)| vec![reason.clone(), packets.to_string()])
        .collect();
    if rows.is_empty() {
        return String::new();
    }
    format!("\n{}", table(&["DROPPED", "PACKETS"], rows))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn example() -> NetworkStatus {
        serde_json::from_value(serde_json::json!({
            "mode": "root",
            "way_out": {"state": "open", "by": ["eth0"], "closed_by": [
                {"chain": "chain FORWARD of table ip filter (Docker)", "remedy": "iptables -I DOCKER-USER -i bv+ -j ACCEPT"},
            ]},
            "vms": [
                {"id": "0198c2a4-7d1e-7b3a-9c4d-1f2e3d4c5b6a", "name": "calm-otter", "address": "172.16.0.2",
                 "live": true, "nat": true, "nat_now": true, "joins": ["fox"], "ports": [
                    {"protocol": "tcp", "listen": "127.0.0.1:8080", "guest_port": 80, "open": true, "connections": 2, "problem": null},
                    {"protocol": "udp", "listen": "0.0.0.0:53", "guest_port": 53, "open": false, "connections": 0, "problem": "address already in use"},
                 ]},
                {"id": "0198c2a4-7d1e-7b3a-9c4d-1f2e3d4c5b6b", "name": "fox", "address": "172.16.0.3",
                 "live": false, "nat": true, "nat_now": false, "joins": ["calm-otter"], "ports": [
                    {"protocol": "tcp", "listen": "127.0.0.1:9090", "guest_port": 90, "open": false, "connections": 0, "problem": null},
                 ]},
            ],
            "dropped": {"not_joined": 3, "private": 12, "foreign": 0}, "repairs": 1,
        }))
        .unwrap()
    }

    #[test]
    fn a_chain_that_closes_the_way_out_is_named_with_its_remedy() {
        let told = closed(&example().way_out);
        assert_eq!(told.len(), 1);
        let (message, hints) = &told[0];
        assert!(
            message.contains("chain FORWARD of table ip filter (Docker)"),
            "{message}"
        );
        assert_eq!(
            hints,
            &["as root: iptables -I DOCKER-USER -i bv+ -j ACCEPT"]
        );
        assert!(closed(&WayOut::Closed).is_empty());
        let failed = WayOut::Failed {
            why: "no `pasta`".to_owned(),
            hints: vec!["install passt".to_owned()],
        };
        // The remedy first: to try again without it would fail again.
        assert_eq!(closed(&failed)[0].1[0], "install passt");
    }

    #[test]
    fn vms_are_chosen_by_name_or_prefix_in_the_order_they_were_named() {
        let names = |words: &[&str]| -> Result<Vec<String>, Failure> {
            let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
            let chosen = choose(example().vms, &words)?;
            Ok(chosen.iter().map(|vm| vm.name.to_string()).collect())
        };
        assert_eq!(names(&[]).unwrap(), ["calm-otter", "fox"]);
        assert_eq!(names(&["fox", "calm"]).unwrap(), ["fox", "calm-otter"]);
        assert_eq!(names(&["owl"]).unwrap_err().exit_code(), 4);
        assert_eq!(
            names(&["0198c2a4"]).unwrap_err().0.code,
            ErrorCode::Ambiguous
        );
    }
}
