use super::*;
use crate::testing::query;

fn zone() -> Zone {
    let zone = Zone::new(Pool::at(Ipv4Addr::new(172, 16, 32, 0)));
    zone.set(&vm("calm-otter"), guest(9)).unwrap();
    zone
}

fn vm(name: &str) -> VmName {
    VmName::new(name).unwrap()
}

fn guest(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(172, 16, 32, last)
}

fn find(zone: &Zone, name: &str, kind: u16) -> Option<Found> {
    let message = query(name, kind).bytes();
    zone.find(&Question::read(&message).unwrap())
}

#[track_caller]
fn assert_record(zone: &Zone, name: &str, kind: u16, expected: Record) {
    let found = find(zone, name, kind).unwrap();
    assert_eq!(found.record, Some(expected), "{name}");
    assert!(found.is_there);
}

#[track_caller]
fn assert_no_data(zone: &Zone, name: &str, kind: u16) {
    let found = find(zone, name, kind).unwrap();
    assert_eq!((found.is_there, found.record), (true, None), "{name}");
}

#[track_caller]
fn assert_no_name(zone: &Zone, name: &str, kind: u16) {
    let found = find(zone, name, kind).unwrap();
    assert_eq!((found.is_there, found.record), (false, None), "{name}");
}

#[test]
fn a_vm_has_its_address_in_any_case_and_no_other_record() {
    let zone = zone();
    for name in ["calm-otter.vm", "CALM-Otter.Vm."] {
        assert_record(&zone, name, kind::A, Record::Address(guest(9)));
        for kind in [kind::AAAA, kind::NS, kind::SOA, kind::CNAME, 16, 257] {
            assert_no_data(&zone, name, kind);
        }
    }
}

#[test]
fn what_is_no_vm_is_not_there() {
    let zone = zone();
    for name in [
        "calm-otte.vm",
        "calm-otter2.vm",
        "a.calm-otter.vm",
        "a.b.c.vm",
    ] {
        assert_no_name(&zone, name, kind::A);
        assert_no_name(&zone, name, kind::AAAA);
    }
    let found = find(&zone, "x.y.vm", kind::A).unwrap();
    assert_eq!(found.apex.labels, 1);
}

#[test]
fn the_apex_is_a_zone_and_no_vm() {
    let zone = zone();
    for apex in ["vm", "32.16.172.in-addr.arpa", "47.16.172.in-addr.arpa"] {
        assert_record(&zone, apex, kind::SOA, Record::Authority);
        assert_record(&zone, apex, kind::NS, Record::NameServer);
        assert_no_data(&zone, apex, kind::A);
        assert_no_data(&zone, apex, kind::PTR);
    }
}

#[test]
fn an_address_leads_back_to_its_vm() {
    let zone = zone();
    let name = "9.32.16.172.in-addr.arpa";
    assert_record(&zone, name, kind::PTR, Record::Pointer("calm-otter".into()));
    assert_no_data(&zone, name, kind::A);
    for unknown in [
        "10.32.16.172.in-addr.arpa",
        "9.39.16.172.IN-ADDR.arpa",
        // The half of the pool that guests have no address of.
        "253.47.16.172.in-addr.arpa",
        "b._dns-sd._udp.9.32.16.172.in-addr.arpa",
        "b._dns-sd._udp.32.16.172.in-addr.arpa",
        "x.32.16.172.in-addr.arpa",
        "256.32.16.172.in-addr.arpa",
        "09.32.16.172.in-addr.arpa",
    ] {
        assert_no_name(&zone, unknown, kind::PTR);
    }
}

#[test]
fn what_is_not_of_the_pool_is_not_of_the_zone() {
    let zone = zone();
    for name in [
        ".",
        "com",
        "vm.com",
        "xvm",
        "1.48.16.172.in-addr.arpa",
        "31.16.172.in-addr.arpa",
        "16.172.in-addr.arpa",
        "in-addr.arpa",
        "8.8.8.8.in-addr.arpa",
        "9.32.16.172.ip6.arpa",
    ] {
        assert_eq!(find(&zone, name, kind::PTR), None, "{name}");
    }
}

#[test]
fn labels_that_are_no_text_are_not_there() {
    let zone = zone();
    let mut message = query("calm-otter.vm", kind::A).bytes();
    message[13] = 0xff;
    let found = zone.find(&Question::read(&message).unwrap()).unwrap();
    assert!(!found.is_there);
}

#[test]
fn a_removed_vm_leaves_nothing() {
    let zone = zone();
    zone.set_nat(guest(9), true).unwrap();
    zone.set_private(guest(9), true).unwrap();
    assert!(zone.reaches_private(guest(9).into()));
    assert!(zone.remove(&vm("calm-otter")));
    assert!(!zone.remove(&vm("calm-otter")));
    assert_no_name(&zone, "calm-otter.vm", kind::A);
    assert_no_name(&zone, "9.32.16.172.in-addr.arpa", kind::PTR);
    assert!(!zone.has_nat(guest(9).into()));
    // Whoever comes next at that address has no NAT either.
    zone.set(&vm("brave-fox"), guest(9)).unwrap();
    assert!(!zone.list()[0].nat);
    zone.set_nat(guest(9), true).unwrap();
    assert!(!zone.reaches_private(guest(9).into()));
}

#[test]
fn a_new_address_takes_the_place_of_the_old_one() {
    let zone = zone();
    zone.set_nat(guest(9), true).unwrap();
    zone.set(&vm("calm-otter"), guest(10)).unwrap();
    assert_record(&zone, "calm-otter.vm", kind::A, Record::Address(guest(10)));
    assert_no_name(&zone, "9.32.16.172.in-addr.arpa", kind::PTR);
    assert!(!zone.has_nat(guest(9).into()) && !zone.has_nat(guest(10).into()));
}

#[test]
fn setting_the_same_again_changes_nothing() {
    let zone = zone();
    zone.set_nat(guest(9), true).unwrap();
    let changes = zone.changes();
    zone.set(&vm("calm-otter"), guest(9)).unwrap();
    assert!(zone.has_nat(guest(9).into()));
    assert_eq!(zone.changes(), changes);
}

#[test]
fn a_renamed_vm_keeps_its_address_and_its_nat() {
    let zone = zone();
    zone.set_nat(guest(9), true).unwrap();
    zone.rename(&vm("calm-otter"), &vm("brave-fox")).unwrap();
    assert_no_name(&zone, "calm-otter.vm", kind::A);
    assert_record(&zone, "brave-fox.vm", kind::A, Record::Address(guest(9)));
    let name = "9.32.16.172.in-addr.arpa";
    assert_record(&zone, name, kind::PTR, Record::Pointer("brave-fox".into()));
    let entry = ZoneEntry {
        name: vm("brave-fox"),
        address: guest(9),
        nat: true,
        private: false,
    };
    assert_eq!(zone.list(), [entry]);
}

#[test]
fn a_refused_change_says_why_and_changes_nothing() {
    let zone = zone();
    zone.set(&vm("brave-fox"), guest(10)).unwrap();
    let before = (zone.list(), zone.changes());
    let refused = [
        zone.set(&vm("brave-fox"), guest(9)),
        zone.set(&vm("new"), Ipv4Addr::new(172, 16, 40, 1)),
        zone.rename(&vm("brave-fox"), &vm("calm-otter")),
        zone.rename(&vm("nobody"), &vm("somebody")),
        zone.set_nat(Ipv4Addr::new(10, 0, 0, 1), true),
    ];
    let said: Vec<String> = refused
        .into_iter()
        .map(|result| result.unwrap_err().to_string())
        .collect();
    assert_eq!(
        said,
        [
            "172.16.32.9 is the address of VM `calm-otter` already",
            "172.16.40.1 is not in the guests' network 172.16.32.0/21",
            "VM `calm-otter` is in the zone already",
            "VM `nobody` is not in the zone",
            "10.0.0.1 is not in the guests' network 172.16.32.0/21",
        ]
    );
    assert_eq!((zone.list(), zone.changes()), before);
}

#[test]
fn every_change_of_names_makes_another_serial() {
    let zone = zone();
    let serial = || find(&zone, "vm", kind::SOA).unwrap().apex.serial;
    let first = serial();
    zone.rename(&vm("calm-otter"), &vm("brave-fox")).unwrap();
    let second = serial();
    zone.remove(&vm("brave-fox"));
    assert!(first < second && second < serial());
    assert_eq!(serial(), zone.changes());
}

#[test]
fn clones_are_the_same_zone() {
    let zone = zone();
    let clone = zone.clone();
    clone.remove(&vm("calm-otter"));
    assert!(zone.list().is_empty());
}
