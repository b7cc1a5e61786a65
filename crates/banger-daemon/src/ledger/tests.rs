use super::removal::{Refused, gone, left_as_it_is};
use super::*;
use banger_core::id::InstanceId;
use uuid::Uuid;

fn instance(number: u128) -> InstanceId {
    InstanceId::from_uuid(Uuid::from_u128(number))
}

fn vm(number: u128) -> VmId {
    VmId::from_uuid(Uuid::from_u128(number))
}

fn snapshots(of: InstanceId, vm: VmId) -> [String; 2] {
    let name = format!("BANGER-0-{of}-{vm}");
    [format!("{name}-origin"), name]
}

fn below(of: InstanceId, vm: VmId, name: &str, file: &str) -> ops::LoopBelow {
    ops::LoopBelow {
        name: name.to_owned(),
        file: file.to_owned(),
        is_written_to: file.contains("overlay"),
        instance: of,
        vm,
    }
}

/// Kind, name, owner, and whether it is explained.
fn told(found: &[Found]) -> Vec<(HostKind, String, String, bool)> {
    found
        .iter()
        .map(|found| {
            let object = &found.object;
            (
                object.kind,
                object.name.clone(),
                object.owner.clone(),
                object.expected,
            )
        })
        .collect()
}

#[test]
fn a_snapshot_is_explained_by_the_vm_that_lives_on_it_and_by_nothing_else() {
    let own = instance(7);
    let known = |name: &str, live| Known {
        name: name.to_owned(),
        live,
    };
    let vms = HashMap::from([(vm(1), known("otter", true)), (vm(2), known("fox", false))]);
    let names: Vec<String> = [vm(1), vm(2), vm(3)]
        .into_iter()
        .flat_map(|vm| snapshots(own, vm))
        .collect();
    let loops = [
        below(own, vm(1), "loop0", "/images/root.img"),
        below(own, vm(2), "loop0", "/images/root.img"),
        below(own, vm(1), "loop1", "/vms/1/overlay.img"),
        below(own, vm(2), "loop2", "/vms/2/overlay.img"),
    ];
    let lock = |vm: VmId| PathBuf::from(format!("/vms/{vm}/vm.lock"));
    let found = of_storage(own, &names, &loops, &vms, lock);
    let owners: Vec<(String, bool)> = told(&found)
        .into_iter()
        .map(|(_, _, owner, expected)| (owner, expected))
        .collect();
    let pair = |owner: &str, expected| (owner.to_owned(), expected);
    assert_eq!(
        owners,
        [
            pair("otter", true),
            pair("otter", true),
            pair("fox", false),
            pair("fox", false),
            pair(INSTANCE, false),
            pair(INSTANCE, false),
            // Shared, and one of the two lives.
            pair("fox, otter", true),
            pair("otter", true),
            pair("fox", false),
        ]
    );
    assert_eq!(found[6].object.name, "loop0 (/images/root.img)");
    // Also of a VM that was made since: nobody starts it meanwhile.
    let locks: Vec<bool> = found
        .iter()
        .filter_map(|found| match &found.remedy {
            Remedy::Snapshot(_, lock) => Some(lock.is_some()),
            _ => None,
        })
        .collect();
    assert_eq!(locks, [true; 6]);
}

#[test]
fn another_instances_snapshot_is_left_over_only_when_its_file_was_removed() {
    let (own, other, gone) = (instance(7), instance(8), instance(9));
    let names: Vec<String> = [other, gone]
        .into_iter()
        .flat_map(|of| snapshots(of, vm(1)))
        .collect();
    let loops = [
        below(other, vm(1), "loop1", "/elsewhere/overlay.img"),
        // Its image is gone, and it lives.
        below(other, vm(1), "loop3", "/images/root.img (deleted)"),
        below(gone, vm(1), "loop2", "/removed/overlay.img (deleted)"),
    ];
    let found = of_storage(own, &names, &loops, &HashMap::new(), |_| PathBuf::new());
    let expected: Vec<bool> = found.iter().map(|found| found.object.expected).collect();
    assert_eq!(expected, [true, true, false, false, true, false, true]);
    let owner = format!("{OTHER_INSTANCE}{gone}");
    assert_eq!(found[2].object.owner, owner);
    let Remedy::Snapshot(found, None) = &found[2].remedy else {
        panic!("{found:?}");
    };
    assert_eq!(found.instance, gone);
}

#[test]
fn whatever_is_left_says_why_and_what_helps() {
    let object = |kind, name: &str| HostObject {
        kind,
        name: name.to_owned(),
        owner: "otter".to_owned(),
        expected: false,
    };
    let found = |kind, name: &str, remedy| Found {
        object: object(kind, name),
        remedy,
    };
    let owner = Owner {
        instance: instance(7),
        vm: vm(1),
    };
    let mut busy = ErrorBody::new(ErrorCode::Internal, "device-mapper cannot remove it");
    busy.causes.push("Device or resource busy".to_owned());
    let refused = Refused::from([((HostKind::Snapshot, "BANGER".to_owned()), busy)]);
    let snapshot = found(HostKind::Snapshot, "BANGER", Remedy::Snapshot(owner, None));
    let left = left_as_it_is(&snapshot, &refused);
    assert_eq!(left.message, "snapshot BANGER of otter");
    assert_eq!(
        left.causes,
        ["device-mapper cannot remove it", "Device or resource busy"]
    );
    assert!(left.hints[0].contains("fuser"), "{left:?}");
    for remedy in [
        Remedy::Stranger(12),
        Remedy::Process(12, PathBuf::new()),
        Remedy::Waiting(12),
    ] {
        let left = left_as_it_is(&found(HostKind::Process, "12 (cat)", remedy), &refused);
        assert!(left.hints[0].contains("kill "), "{left:?}");
    }
    for (kind, remedy) in [
        (HostKind::Tap, Remedy::Port("bt1".to_owned(), None)),
        (HostKind::Veth, Remedy::HostSide),
        (HostKind::Loop, Remedy::Nothing),
    ] {
        assert!(
            !left_as_it_is(&found(kind, "x", remedy), &refused)
                .hints
                .is_empty()
        );
    }
}

#[test]
fn what_still_stands_is_not_told_as_removed_whoever_it_belongs_to() {
    let tap = |owner: &str, expected| {
        let name = "bt1".to_owned();
        new(HostKind::Tap, name, owner, expected, Remedy::Nothing)
    };
    let veth = new(
        HostKind::Veth,
        "bt1".to_owned(),
        INSTANCE,
        true,
        Remedy::HostSide,
    );
    let before = [tap("otter", true), veth];
    let after = [tap(INSTANCE, false)];
    let told: Vec<String> = gone(&before, &after).collect();
    assert_eq!(told, ["removed veth bt1"]);
}
