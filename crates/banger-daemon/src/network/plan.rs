//! What the network shall be, computed from the VMs that live. Nothing here touches anything.

use banger_core::id::{MacAddress, VmId};
use banger_core::publish::{Protocol, PublishedPort};
use banger_core::spec::LivePatch;
use banger_host::op::{Port, Publication};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

/// What one live VM has of the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PortPlan {
    pub(crate) vm: VmId,
    pub(crate) address: Ipv4Addr,
    pub(crate) nat: bool,
    pub(crate) nat_private: bool,
    pub(crate) ports: BTreeSet<PublishedPort>,
    pub(crate) joins: BTreeSet<VmId>,
}

impl PortPlan {
    pub(super) fn tap(&self) -> String {
        self.vm.tap_name()
    }

    fn mac(&self) -> MacAddress {
        self.vm.mac()
    }

    pub(super) fn port(&self) -> Port {
        Port {
            tap: self.tap(),
            mac: self.mac(),
            address: self.address,
        }
    }

    pub(super) fn publications(&self) -> Vec<Publication> {
        let publication = |port: &PublishedPort| Publication {
            protocol: port.protocol,
            listen: port.listen,
            tap: self.tap(),
            guest: SocketAddrV4::new(self.address, port.guest_port.get()),
        };
        self.ports.iter().map(publication).collect()
    }
}

/// What names a publication: protocol and place on the host.
pub(super) type Place = (Protocol, SocketAddr);

pub(super) fn place(publication: &Publication) -> Place {
    (publication.protocol, publication.listen)
}

/// A part of a plan that may fail alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    /// Whether its guest is let out.
    Nat,
    /// A published port.
    Port(Place),
    /// Whom its guest reaches.
    Joins,
}

impl Part {
    /// The parts that a change is about.
    pub(crate) fn named(patch: &LivePatch) -> BTreeSet<Self> {
        let published = patch.publish.as_ref();
        let published = published.map(|port| (port.protocol, port.listen));
        let places = published.into_iter().chain(patch.unpublish);
        let nat = patch.nat.or(patch.nat_private).map(|_| Self::Nat);
        let joins = patch.join.or(patch.leave).map(|_| Self::Joins);
        places.map(Self::Port).chain(nat).chain(joins).collect()
    }
}

/// The places that the plan before had and this one has not.
pub(super) fn surplus_places(before: Option<&PortPlan>, plan: &PortPlan) -> BTreeSet<Place> {
    let places = |plan: &PortPlan| -> BTreeSet<Place> {
        let ports = plan.ports.iter();
        ports.map(|port| (port.protocol, port.listen)).collect()
    };
    let before = before.map(places).unwrap_or_default();
    &before - &places(plan)
}

/// All live VMs' plans, by TAP.
pub(super) type Plans = BTreeMap<String, PortPlan>;

/// Whether `found` leads to another live VM than that of `tap`.
pub(super) fn holds(plans: &Plans, found: &Publication, tap: &str) -> bool {
    found.tap != tap && plans.contains_key(&found.tap)
}

/// The pairs that may reach each other, the lower address first: both live, and one of the two says so.
pub(super) fn joins(plans: &Plans) -> BTreeSet<(Ipv4Addr, Ipv4Addr)> {
    let addresses: BTreeMap<VmId, Ipv4Addr> =
        plans.values().map(|plan| (plan.vm, plan.address)).collect();
    plans
        .values()
        .flat_map(|plan| plan.joins.iter().map(move |other| (plan.address, other)))
        .filter_map(|(one, other)| addresses.get(other).map(|other| (one, *other)))
        .filter(|(one, other)| one != other)
        .map(|(one, other)| (one.min(other), one.max(other)))
        .collect()
}

/// Those of the pairs `found` of which one is no VM of the plans: it may live and not have been asked yet.
pub(super) fn unknown_joins(
    plans: &Plans,
    found: &BTreeSet<(Ipv4Addr, Ipv4Addr)>,
) -> BTreeSet<(Ipv4Addr, Ipv4Addr)> {
    let known: BTreeSet<Ipv4Addr> = plans.values().map(|plan| plan.address).collect();
    let both = |(one, other): &(Ipv4Addr, Ipv4Addr)| known.contains(one) && known.contains(other);
    found.iter().filter(|pair| !both(pair)).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn plan(number: u8, joins: &[u8]) -> PortPlan {
        let id = |number: u8| VmId::from_uuid(Uuid::from_u128(u128::from(number)));
        PortPlan {
            vm: id(number),
            address: Ipv4Addr::new(172, 16, 0, number),
            nat: false,
            nat_private: false,
            ports: BTreeSet::new(),
            joins: joins.iter().map(|other| id(*other)).collect(),
        }
    }

    fn plans(all: &[PortPlan]) -> Plans {
        all.iter().map(|plan| (plan.tap(), plan.clone())).collect()
    }

    #[test]
    fn a_join_holds_once_whoever_says_it() {
        let pair = (Ipv4Addr::new(172, 16, 0, 2), Ipv4Addr::new(172, 16, 0, 3));
        let once = BTreeSet::from([pair]);
        assert_eq!(joins(&plans(&[plan(2, &[3]), plan(3, &[])])), once);
        assert_eq!(joins(&plans(&[plan(2, &[]), plan(3, &[2])])), once);
        assert_eq!(joins(&plans(&[plan(2, &[3]), plan(3, &[2])])), once);
    }

    #[test]
    fn nobody_is_joined_with_itself_or_with_one_that_does_not_live() {
        assert_eq!(joins(&plans(&[plan(2, &[2, 9])])), BTreeSet::new());
    }

    #[test]
    fn a_join_that_is_found_stays_until_both_of_its_vms_are_known() {
        let pair = (Ipv4Addr::new(172, 16, 0, 2), Ipv4Addr::new(172, 16, 0, 3));
        let found = BTreeSet::from([pair]);
        for known in [plans(&[]), plans(&[plan(2, &[3])]), plans(&[plan(3, &[])])] {
            assert_eq!(unknown_joins(&known, &found), found);
        }
        let both = plans(&[plan(2, &[]), plan(3, &[])]);
        assert_eq!(unknown_joins(&both, &found), BTreeSet::new());
    }

    #[test]
    fn a_place_is_taken_by_another_vm_that_lives_and_by_no_other() {
        let mut owner = plan(2, &[]);
        owner.ports.insert("8080:80".parse().unwrap());
        let found = &owner.publications()[0];
        let live = plans(&[owner.clone(), plan(3, &[])]);
        assert!(holds(&live, found, &plan(3, &[]).tap()));
        assert!(!holds(&live, found, &owner.tap()));
        assert!(!holds(&plans(&[plan(3, &[])]), found, &plan(3, &[]).tap()));
    }

    #[test]
    fn a_change_names_the_parts_that_it_is_about_and_no_other() {
        let port: PublishedPort = "8080:80".parse().unwrap();
        let place = (port.protocol, port.listen);
        let named = |patch| Part::named(&patch).into_iter().collect::<Vec<_>>();
        let nothing = LivePatch::default;
        assert_eq!(named(nothing()), []);
        let autostart = Some(true);
        assert_eq!(
            named(LivePatch {
                autostart,
                ..nothing()
            }),
            []
        );
        let nat = Some(false);
        assert_eq!(named(LivePatch { nat, ..nothing() }), [Part::Nat]);
        let publish = Some(port);
        let all = [Part::Port(place)];
        assert_eq!(
            named(LivePatch {
                publish,
                ..nothing()
            }),
            all
        );
        let unpublish = Some(place);
        assert_eq!(
            named(LivePatch {
                unpublish,
                ..nothing()
            }),
            all
        );
        let leave = Some(plan(2, &[]).vm);
        assert_eq!(named(LivePatch { leave, ..nothing() }), [Part::Joins]);
    }

    #[test]
    fn a_place_that_leads_elsewhere_now_is_not_surplus() {
        let with = |port: &str| {
            let mut plan = plan(2, &[]);
            plan.ports.insert(port.parse().unwrap());
            plan
        };
        let (before, elsewhere, other) = (with("8080:80"), with("8080:81"), with("8081:80"));
        assert_eq!(surplus_places(None, &before), BTreeSet::new());
        assert_eq!(surplus_places(Some(&before), &elsewhere), BTreeSet::new());
        let places = surplus_places(Some(&before), &other);
        let listens: Vec<String> = places.iter().map(|(_, at)| at.to_string()).collect();
        assert_eq!(listens, ["127.0.0.1:8080"]);
    }

    #[test]
    fn a_published_port_leads_to_the_guest_of_its_own_tap() {
        let mut plan = plan(2, &[]);
        plan.ports.insert("8080:80".parse().unwrap());
        let publications = plan.publications();
        assert_eq!(publications[0].guest.to_string(), "172.16.0.2:80");
        assert_eq!(publications[0].tap, plan.tap());
        assert_eq!(publications[0].listen.to_string(), "127.0.0.1:8080");
    }
}
