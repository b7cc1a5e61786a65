//! Whose rules drop what the guests forward. A packet goes through every table, and one that drops is enough; so what
//! others close stays closed, and all that can be done is to say so, with what opens it for good where its owner
//! keeps such things.

use crate::net::links::NetlinkError;
use crate::op::ClosedForward;
use linux_raw_sys::net::{NFPROTO_INET, NFPROTO_IPV4};
use netlink_bindings::nftables::{self, Nfgenmsg};
use netlink_socket2::{NetlinkSocket, ReplyError};
use std::collections::{BTreeMap, BTreeSet};

const NF_INET_FORWARD: u32 = 2;
const NF_DROP: u32 = 0;
const FAMILIES: [(u8, &str); 2] = [(NFPROTO_IPV4 as u8, "ip"), (NFPROTO_INET as u8, "inet")];
/// Expressions that neither choose packets nor let them pass.
const INDIFFERENT: [&[u8]; 3] = [b"counter", b"log", b"limit"];
/// Expressions that end a packet's way, where nothing before them chose.
const ENDING: [&[u8]; 3] = [b"reject", b"immediate", TARGET];
/// A module of iptables: what it does, it says by its name.
const TARGET: &[u8] = b"target";
const OURS: &str = "banger_";

/// What is known of somebody's table.
#[derive(Debug, Default)]
struct Table {
    /// Base chains of the forward hook that end with a drop.
    closed: Vec<String>,
    chains: BTreeSet<String>,
    /// A rule names our link: its owner knows of us.
    names_us: bool,
}

/// The chains that drop what comes from `veth` on its way out.
///
/// # Errors
/// The kernel refuses.
pub(super) fn forward_closed_by(veth: &str) -> Result<Vec<ClosedForward>, NetlinkError> {
    let mut socket = NetlinkSocket::new();
    let mut found = Vec::new();
    for (family, word) in FAMILIES {
        let tables = tables(&mut socket, family, veth)
            .map_err(NetlinkError::new("list the packet filter's chains"))?;
        for (name, table) in &tables {
            if !table.names_us {
                let of_table = table
                    .closed
                    .iter()
                    .map(|chain| explain(word, name, chain, &table.chains, veth));
                found.extend(of_table);
            }
        }
    }
    if found.is_empty() && legacy_is_in_use() {
        found.extend(legacy(veth));
    }
    Ok(found)
}

fn tables(
    socket: &mut NetlinkSocket,
    family: u8,
    veth: &str,
) -> Result<BTreeMap<String, Table>, ReplyError> {
    let mut header = Nfgenmsg::new();
    header.nfgen_family = family;
    let mut tables: BTreeMap<String, Table> = BTreeMap::new();
    let mut of_forward = BTreeSet::new();
    let request = nftables::Request::new().op_getchain_dump(&header);
    let mut reply = socket.request(&request)?;
    while let Some((_, chain)) = reply.recv().transpose()? {
        let table = chain.get_table()?.to_string_lossy().into_owned();
        let name = chain.get_name()?.to_string_lossy().into_owned();
        if table.starts_with(OURS) {
            continue;
        }
        let entry = tables.entry(table.clone()).or_default();
        entry.chains.insert(name.clone());
        if chain.get_hook().and_then(|hook| hook.get_num()) == Ok(NF_INET_FORWARD) {
            if chain.get_policy() == Ok(NF_DROP) {
                entry.closed.push(name.clone());
            }
            of_forward.insert((table, name));
        }
    }
    // A chain may also end with a rule that ends all that came so far.
    let mut last_ends: BTreeMap<(String, String), bool> = BTreeMap::new();
    let request = nftables::Request::new().op_getrule_dump(&header);
    let mut reply = socket.request(&request)?;
    while let Some((_, rule)) = reply.recv().transpose()? {
        let table = rule.get_table()?.to_string_lossy().into_owned();
        let chain = rule.get_chain()?.to_string_lossy().into_owned();
        let Some(entry) = tables.get_mut(&table) else {
            continue;
        };
        let expressions = rule.get_expressions()?;
        if contains(expressions.get_buf(), veth.as_bytes()) {
            entry.names_us = true;
        }
        let key = (table, chain);
        if of_forward.contains(&key) {
            last_ends.insert(key, ends_all(&expressions));
        }
    }
    for ((table, chain), ends) in last_ends {
        if let Some(entry) = tables.get_mut(&table)
            && ends
            && !entry.closed.contains(&chain)
        {
            entry.closed.push(chain);
        }
    }
    Ok(tables)
}

/// Whether a rule drops or rejects every packet that comes to it.
fn ends_all(expressions: &nftables::IterableExprListAttrs<'_>) -> bool {
    let mut ends = false;
    for expression in expressions.get_elem() {
        let Ok(name) = expression.get_name() else {
            return false;
        };
        if INDIFFERENT.contains(&name.to_bytes()) {
            continue;
        }
        if !ENDING.contains(&name.to_bytes()) {
            return false;
        }
        ends = match expression.get_data() {
            Ok(nftables::ExprOps::Immediate(immediate)) => immediate
                .get_data()
                .and_then(|data| data.get_verdict())
                .and_then(|verdict| verdict.get_code())
                .is_ok_and(|code| code == NF_DROP),
            Ok(nftables::ExprOps::Target(target)) => target
                .get_name()
                .is_ok_and(|name| name.to_bytes() == b"REJECT"),
            _ => true,
        };
    }
    ends
}

fn contains(bytes: &[u8], word: &[u8]) -> bool {
    bytes.windows(word.len()).any(|window| window == word)
}

fn explain(
    family: &str,
    table: &str,
    chain: &str,
    chains: &BTreeSet<String>,
    veth: &str,
) -> ClosedForward {
    let has = |name: &str| chains.contains(name);
    let by_iptables = |chain: &str| {
        format!(
            "iptables -I {chain} -i {veth} -j ACCEPT && iptables -I {chain} -o {veth} -m conntrack --ctstate \
             ESTABLISHED,RELATED -j ACCEPT"
        )
    };
    let (owner, remedy) = if family == "ip" && chain == "FORWARD" && has("DOCKER-USER") {
        ("Docker", by_iptables("DOCKER-USER"))
    } else if family == "ip" && chain == "FORWARD" && has("ufw-before-forward") {
        // Whichever way out the host has: our own table knows them.
        ("ufw", format!("ufw route allow in on {veth}"))
    } else if table == "firewalld" {
        // What is permanent holds from the next reload on, and what is not until then.
        let zone = format!("--zone=trusted --change-interface={veth}");
        (
            "firewalld",
            format!("firewall-cmd --permanent {zone} && firewall-cmd {zone}"),
        )
    } else if table == "firewalld_policy_drop" {
        // There while it loads its rules, and after a reload that broke off.
        ("firewalld", "firewall-cmd --reload".to_owned())
    } else if family == "ip" && table == "filter" && chain == "FORWARD" {
        ("iptables", by_iptables("FORWARD"))
    } else {
        (
            "nftables",
            format!(
                "nft insert rule {family} {table} {chain} iifname {veth} accept && nft insert rule {family} {table} \
                 {chain} oifname {veth} ct state established,related accept"
            ),
        )
    };
    ClosedForward {
        chain: format!("chain {chain} of table {family} {table} ({owner})"),
        remedy,
    }
}

/// Whether rules of the older iptables, which nftables does not show, are there.
fn legacy_is_in_use() -> bool {
    std::fs::read_to_string("/proc/thread-self/net/ip_tables_names")
        .is_ok_and(|names| names.lines().any(|name| name == "filter"))
}

/// What the older iptables says of its chain of forwarded packets.
fn legacy(veth: &str) -> Option<ClosedForward> {
    let output = crate::exec::Run::new("iptables-legacy")
        .args(["-w", "1", "-S"])
        .timeout(std::time::Duration::from_secs(5))
        .run()
        .ok()?;
    let rules = String::from_utf8_lossy(&output.stdout);
    legacy_closes(&rules, veth).then(|| {
        let chain = if rules.lines().any(|rule| rule == "-N DOCKER-USER") {
            "DOCKER-USER"
        } else {
            "FORWARD"
        };
        ClosedForward {
            chain: "chain FORWARD of iptables-legacy".to_owned(),
            remedy: format!(
                "iptables-legacy -I {chain} -i {veth} -j ACCEPT && iptables-legacy -I {chain} -o {veth} -m conntrack \
                 --ctstate ESTABLISHED,RELATED -j ACCEPT"
            ),
        }
    })
}

fn legacy_closes(rules: &str, veth: &str) -> bool {
    let names_us = rules.split_whitespace().any(|word| word == veth);
    rules.lines().any(|rule| rule == "-P FORWARD DROP") && !names_us
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remedy(family: &str, table: &str, chain: &str, chains: &[&str]) -> String {
        let chains = chains.iter().map(|name| (*name).to_owned()).collect();
        let closed = explain(family, table, chain, &chains, "bv0123456789ab");
        format!("{}: {}", closed.chain, closed.remedy)
    }

    #[test]
    fn the_remedy_is_the_one_of_whoever_made_the_chain() {
        for (found, said) in [
            (
                remedy("ip", "filter", "FORWARD", &["FORWARD", "DOCKER-USER"]),
                "(Docker): iptables -I DOCKER-USER -i bv0123456789ab -j ACCEPT",
            ),
            (
                remedy("ip", "filter", "FORWARD", &["ufw-before-forward"]),
                "(ufw): ufw route allow in on bv0123456789ab",
            ),
            (
                remedy("inet", "firewalld", "filter_FORWARD", &[]),
                "(firewalld): firewall-cmd --permanent --zone=trusted --change-interface=bv0123456789ab && firewall-cmd \
                 --zone=trusted --change-interface=bv0123456789ab",
            ),
            (
                remedy("inet", "firewalld_policy_drop", "filter_forward", &[]),
                "(firewalld): firewall-cmd --reload",
            ),
            (
                remedy("ip", "filter", "FORWARD", &[]),
                "(iptables): iptables -I FORWARD -i bv0123456789ab -j ACCEPT",
            ),
            (
                remedy("inet", "mine", "fwd", &[]),
                "chain fwd of table inet mine (nftables): nft insert rule inet mine fwd iifname bv0123456789ab accept",
            ),
        ] {
            assert!(found.contains(said), "{found}");
        }
    }

    #[test]
    fn the_older_iptables_closes_by_its_policy_until_a_rule_names_us() {
        let closed = "-P INPUT ACCEPT\n-P FORWARD DROP\n-A FORWARD -i docker0 -j ACCEPT\n";
        assert!(legacy_closes(closed, "bv0123456789ab"));
        let told = format!("{closed}-A FORWARD -i bv0123456789ab -j ACCEPT\n");
        assert!(!legacy_closes(&told, "bv0123456789ab"));
        assert!(!legacy_closes("-P FORWARD ACCEPT\n", "bv0123456789ab"));
    }
}
