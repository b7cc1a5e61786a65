//! What keeps the namespace closed while it has no packet filter: a packet is routed only with a mark, and only the
//! ruleset gives marks.
//!
//! `nft flush ruleset` takes filter and marks away together, so from then on nothing that a guest sends finds a route,
//! nor is its ARP answered, and nothing from outside finds one to a guest. (Between the ports of the bridge nothing
//! passes anyway: they are isolated.)

use super::links::{NetlinkError, TABLE_LOCAL, TABLE_MAIN};
use crate::op::{BRIDGE, UPLINK};
use linux_raw_sys::net::AF_INET;
use netlink_bindings::rt_rule::{self, FibRuleHdr, FrAct};
use netlink_bindings::traits::NetlinkRequest;
use netlink_socket2::{NetlinkSocket, ReplyError};

/// As `base.nft` defines them.
const MARK_ASKS_FOR_GATEWAY: u32 = 2;
const MARK_JUDGED: u32 = 3;
const WHOLE_MARK: u32 = u32::MAX;
/// Where the kernel has the rule for its own addresses at first: before all others.
const FIRST: u32 = 0;

/// A rule of the routing policy: which table is asked, or that there is no route.
#[derive(Debug, Clone, PartialEq, Eq)]
struct RoutingRule {
    priority: u32,
    from_link: Option<&'static str>,
    mark: Option<u32>,
    table: Option<u32>,
}

const fn rule(
    priority: u32,
    from_link: &'static str,
    mark: Option<u32>,
    table: Option<u32>,
) -> RoutingRule {
    RoutingRule {
        priority,
        from_link: Some(from_link),
        mark,
        table,
    }
}

const RULES: [RoutingRule; 8] = [
    // The namespace's own packets; before the first rule is removed.
    RoutingRule {
        priority: 100,
        from_link: None,
        mark: None,
        table: Some(TABLE_LOCAL),
    },
    rule(10, BRIDGE, Some(MARK_JUDGED), Some(TABLE_LOCAL)),
    rule(11, BRIDGE, Some(MARK_JUDGED), Some(TABLE_MAIN)),
    rule(12, BRIDGE, Some(MARK_ASKS_FOR_GATEWAY), Some(TABLE_LOCAL)),
    rule(19, BRIDGE, None, None),
    // The other end's ARP carries no mark.
    rule(20, UPLINK, None, Some(TABLE_LOCAL)),
    rule(21, UPLINK, Some(MARK_JUDGED), Some(TABLE_MAIN)),
    rule(29, UPLINK, None, None),
];

/// Makes the rules that are missing, and takes away the one that would be asked before them.
///
/// # Errors
/// The kernel refuses, or is built without policy routing.
pub fn ensure_closed() -> Result<(), NetlinkError> {
    let mut socket = NetlinkSocket::new();
    ensure(&mut socket).map_err(NetlinkError::new(
        "close the namespace's routing (needs CONFIG_IP_MULTIPLE_TABLES)",
    ))
}

fn ensure(socket: &mut NetlinkSocket) -> Result<(), ReplyError> {
    let there = rules(socket)?;
    for wanted in RULES {
        if !there.iter().any(|rule| rule.is(&wanted)) {
            let mut request = rt_rule::Request::new()
                .set_create()
                .set_excl()
                .op_newrule_do(&wanted.header());
            wanted.push(request.encode());
            act(socket, &request)?;
        }
    }
    if there
        .iter()
        .any(|rule| rule.priority == FIRST && rule.table == Some(TABLE_LOCAL))
    {
        let first = RoutingRule {
            priority: FIRST,
            from_link: None,
            mark: None,
            table: Some(TABLE_LOCAL),
        };
        let mut request = rt_rule::Request::new().op_delrule_do(&first.header());
        first.push(request.encode());
        act(socket, &request)?;
    }
    Ok(())
}

fn act<R: NetlinkRequest>(socket: &mut NetlinkSocket, request: &R) -> Result<(), ReplyError> {
    socket.request(request)?.recv_ack()
}

impl RoutingRule {
    fn header(&self) -> FibRuleHdr {
        FibRuleHdr {
            family: AF_INET as u8,
            action: match self.table {
                Some(_) => FrAct::ToTbl as u8,
                None => FrAct::Blackhole as u8,
            },
            ..FibRuleHdr::new()
        }
    }

    fn push<P: netlink_bindings::traits::Pusher>(&self, attributes: rt_rule::PushFibRuleAttrs<P>) {
        let mut attributes = attributes.push_priority(self.priority);
        if let Some(link) = self.from_link {
            attributes = attributes.push_iifname_bytes(link.as_bytes());
        }
        if let Some(mark) = self.mark {
            attributes = attributes.push_fwmark(mark).push_fwmask(WHOLE_MARK);
        }
        if let Some(table) = self.table {
            attributes.push_table(table);
        }
    }
}

/// A rule that is there, as far as it concerns us.
struct Found {
    priority: u32,
    from_link: Option<String>,
    mark: Option<u32>,
    table: Option<u32>,
    action: u8,
}

impl Found {
    fn is(&self, wanted: &RoutingRule) -> bool {
        self.priority == wanted.priority
            && self.from_link.as_deref() == wanted.from_link
            && self.mark == wanted.mark
            && self.action == wanted.header().action
            && self.table == wanted.table
    }
}

fn rules(socket: &mut NetlinkSocket) -> Result<Vec<Found>, ReplyError> {
    let request = rt_rule::Request::new().op_getrule_dump(&FibRuleHdr {
        family: AF_INET as u8,
        ..FibRuleHdr::new()
    });
    let mut reply = socket.request(&request)?;
    let mut rules = Vec::new();
    while let Some((header, attributes)) = reply.recv().transpose()? {
        if u32::from(header.family) != AF_INET {
            continue;
        }
        let table = attributes.get_table().unwrap_or(header.table.into());
        rules.push(Found {
            // The kernel's first rule says no priority.
            priority: attributes.get_priority().unwrap_or(FIRST),
            from_link: attributes
                .get_iifname()
                .ok()
                .map(|name| name.to_string_lossy().into_owned()),
            mark: attributes.get_fwmark().ok(),
            table: (table != 0).then_some(table),
            action: header.action,
        });
    }
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_link_ends_without_a_route_and_before_the_rules_of_the_namespace_itself() {
        for link in [BRIDGE, UPLINK] {
            let last = RULES
                .iter()
                .filter(|rule| rule.from_link == Some(link))
                .max_by_key(|rule| rule.priority)
                .unwrap();
            assert_eq!((last.mark, last.table), (None, None), "{link}");
            assert!(last.priority < RULES[0].priority);
        }
    }

    #[test]
    fn the_marks_are_those_of_the_ruleset() {
        let rules = include_str!("base.nft");
        assert!(rules.contains(&format!(
            "define asks_for_gateway = {MARK_ASKS_FOR_GATEWAY}\n"
        )));
        assert!(rules.contains(&format!("define judged = {MARK_JUDGED}\n")));
    }
}
