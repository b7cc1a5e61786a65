//! What a repair did, and what it could not do: told by measuring before and after, so that nothing is said that is
//! not so.

use super::plan::{self, Plans};
use super::{NetworkError, network_error};
use banger_api::daemon::Mode;
use banger_api::error::ErrorBody;
use banger_api::network::ClosedForward;
use banger_core::id::VmId;
use banger_host::op::{BRIDGE, OwnedKind, OwnedObject, Publication, UPLINK};
use std::collections::BTreeSet;
use std::net::Ipv4Addr;

/// What was put right, and what was not.
#[derive(Debug, Default)]
pub(crate) struct Repaired {
    pub(crate) done: Vec<Mend>,
    /// Of which VM it is, if it is of one alone.
    pub(crate) left: Vec<(Option<VmId>, ErrorBody)>,
}

/// Something that was put right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mend {
    /// Whose it is, if it is of one alone.
    pub(crate) vm: Option<VmId>,
    pub(crate) what: String,
}

impl Mend {
    pub(super) fn shared(what: impl Into<String>) -> Self {
        let what = what.into();
        Self { vm: None, what }
    }
}

impl Repaired {
    /// The same of the same VM, or of all, is told once.
    pub(super) fn leave(&mut self, vm: Option<VmId>, error: &NetworkError) {
        let left = (vm, network_error(error));
        if !self.left.contains(&left) {
            self.left.push(left);
        }
    }

    /// A chain of somebody else's that no rule of ours can overrule.
    pub(super) fn leave_closed(&mut self, closed: &ClosedForward) {
        let message = format!(
            "guests do not reach the internet: {} drops what they send",
            closed.chain
        );
        let error = ErrorBody::new(banger_api::error::ErrorCode::HostUnfit, message)
            .hint(format!("as root: {}", closed.remedy));
        self.left.push((None, error));
    }
}

/// What is there of the network, as far as a repair may change it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Measured {
    /// In the namespace: the bridge and the way out, where they are enabled.
    pub(super) links: BTreeSet<String>,
    /// TAPs that are there and may send.
    pub(super) ports: BTreeSet<String>,
    pub(super) nat: BTreeSet<Ipv4Addr>,
    pub(super) private: BTreeSet<Ipv4Addr>,
    pub(super) joins: BTreeSet<(Ipv4Addr, Ipv4Addr)>,
    pub(super) published: BTreeSet<Publication>,
    /// What the instance has on the host's side.
    pub(super) owned: BTreeSet<OwnedObject>,
}

impl Measured {
    /// What a repair made of this, by what is there now.
    pub(super) fn changes(&self, now: &Self, plans: &Plans, mode: Mode) -> Vec<Mend> {
        let mut changes = Changes::default();
        let link = |name: &String| match (name.as_str(), mode) {
            (BRIDGE, _) => Mend::shared(format!("the bridge `{BRIDGE}`")),
            (UPLINK, Mode::Rootless) => Mend::shared(format!("the way out `{UPLINK}`, by `pasta`")),
            _ => Mend::shared(format!("the link `{name}`")),
        };
        changes.of(&self.links, &now.links, link);
        changes.of(&self.owned, &now.owned, |object| {
            let name = &object.name;
            Mend::shared(match object.kind {
                OwnedKind::Veth => format!("the veth `{name}`"),
                OwnedKind::NftTable => format!("the host's rules, table `{name}`"),
                OwnedKind::Forwarding => format!("forwarding by `{name}`"),
                OwnedKind::Snapshot => format!("the snapshot `{name}`"),
            })
        });
        let by_tap = |tap: &String| plans.get(tap).map(|plan| plan.vm);
        changes.of(&self.ports, &now.ports, |tap| Mend {
            vm: by_tap(tap),
            what: format!("the port `{tap}`"),
        });
        changes.of(&self.nat, &now.nat, |address| {
            of_guest(plans, *address, "the way to the internet".to_owned())
        });
        changes.of(&self.private, &now.private, |address| {
            of_guest(plans, *address, "the way to private networks".to_owned())
        });
        changes.of(&self.joins, &now.joins, |(one, other)| {
            of_guest(plans, *one, format!("the way to and from {other}"))
        });
        changes.of(&self.published, &now.published, |published| {
            let (protocol, listen) = plan::place(published);
            Mend {
                vm: by_tap(&published.tap),
                what: format!("the published port {listen} ({protocol})"),
            }
        });
        changes.found
    }
}

fn of_guest(plans: &Plans, address: Ipv4Addr, what: String) -> Mend {
    let mut plans = plans.values();
    let vm = plans
        .find(|plan| plan.address == address)
        .map(|plan| plan.vm);
    // Nobody of the plans: then the address is all that is known of it.
    let what = match vm {
        Some(_) => what,
        None => format!("{what} of {address}"),
    };
    Mend { vm, what }
}

#[derive(Default)]
struct Changes {
    found: Vec<Mend>,
}

impl Changes {
    fn of<T: Ord>(&mut self, before: &BTreeSet<T>, now: &BTreeSet<T>, told: impl Fn(&T) -> Mend) {
        let made = now.difference(before).map(|item| ("made", told(item)));
        let gone = before.difference(now).map(|item| ("removed", told(item)));
        self.found.extend(made.chain(gone).map(|(verb, mend)| Mend {
            what: format!("{verb} {}", mend.what),
            ..mend
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::super::PortPlan;
    use super::*;
    use banger_core::id::InstanceId;
    use uuid::Uuid;

    const ADDRESS: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 2);

    fn plans() -> (VmId, Plans) {
        let vm = VmId::from_uuid(Uuid::from_u128(2));
        let plan = PortPlan {
            vm,
            address: ADDRESS,
            nat: true,
            nat_private: true,
            ports: BTreeSet::from(["8080:80".parse().unwrap()]),
            joins: BTreeSet::new(),
        };
        (vm, Plans::from([(plan.tap(), plan)]))
    }

    fn whole(plans: &Plans) -> Measured {
        let plan = plans.values().next().unwrap();
        let instance = InstanceId::from_uuid(Uuid::from_u128(7));
        let object = |kind, name: &str| OwnedObject {
            kind,
            name: name.to_owned(),
            instance,
        };
        Measured {
            links: BTreeSet::from([BRIDGE.to_owned(), UPLINK.to_owned()]),
            ports: BTreeSet::from([plan.tap()]),
            nat: BTreeSet::from([ADDRESS]),
            private: BTreeSet::from([ADDRESS]),
            joins: BTreeSet::from([(ADDRESS, Ipv4Addr::new(172, 16, 0, 3))]),
            published: plan.publications().into_iter().collect(),
            owned: BTreeSet::from([
                object(OwnedKind::Veth, "bv1"),
                object(OwnedKind::NftTable, "banger_1"),
                object(OwnedKind::Forwarding, "eth0"),
            ]),
        }
    }

    #[test]
    fn whatever_was_made_again_is_named_and_nothing_else() {
        let (vm, plans) = plans();
        let whole = whole(&plans);
        let tap = whole.ports.first().unwrap();
        let told = whole.changes(&whole, &plans, Mode::Root);
        assert_eq!(told, []);
        let told = Measured::default().changes(&whole, &plans, Mode::Root);
        let lines: Vec<(bool, String)> = told
            .into_iter()
            .map(|mend| (mend.vm == Some(vm), mend.what))
            .collect();
        let wanted = [
            (false, "made the bridge `br0`".to_owned()),
            (false, "made the link `up0`".to_owned()),
            (false, "made the veth `bv1`".to_owned()),
            (false, "made the host's rules, table `banger_1`".to_owned()),
            (false, "made forwarding by `eth0`".to_owned()),
            (true, format!("made the port `{tap}`")),
            (true, "made the way to the internet".to_owned()),
            (true, "made the way to private networks".to_owned()),
            (true, "made the way to and from 172.16.0.3".to_owned()),
            (
                true,
                "made the published port 127.0.0.1:8080 (tcp)".to_owned(),
            ),
        ];
        assert_eq!(lines, wanted);
        let rootless = Measured::default().changes(&whole, &plans, Mode::Rootless);
        assert_eq!(rootless[1].what, "made the way out `up0`, by `pasta`");
    }

    #[test]
    fn what_nobody_had_asked_for_is_told_when_it_is_gone() {
        let (_, plans) = plans();
        let stranger = Ipv4Addr::new(172, 16, 0, 9);
        let before = Measured {
            nat: BTreeSet::from([stranger]),
            ..Measured::default()
        };
        let told = before.changes(&Measured::default(), &plans, Mode::Root);
        assert_eq!(
            told,
            [Mend::shared(
                "removed the way to the internet of 172.16.0.9"
            )]
        );
    }

    #[test]
    fn what_is_left_says_why_and_what_helps_and_is_told_once() {
        let pasta = banger_host::net::pasta::PastaError::Failed {
            why: "no route".to_owned(),
        };
        let error = NetworkError::Pasta(pasta);
        let mut repaired = Repaired::default();
        let (vm, _) = plans();
        repaired.leave(None, &error);
        repaired.leave(None, &error);
        assert_eq!(repaired.left.len(), 1);
        // Another VM that it meets is told as well.
        repaired.leave(Some(vm), &error);
        assert_eq!(repaired.left.len(), 2);
        let left = &repaired.left[0].1;
        assert!(left.causes[0].contains("no route"), "{left:?}");
        assert!(left.hints[0].contains("passt"), "{left:?}");
    }
}
