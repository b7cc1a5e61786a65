use super::*;

/// A registry of VMs with these names, in the trash or not, numbered from one.
fn registry(vms: &[(&str, bool)]) -> Registry {
    let registry = Registry::default();
    for (number, &(name, trashed)) in (1..).zip(vms) {
        let id = VmId::from_uuid(Uuid::from_u128(number));
        let record: VmRecord = serde_json::from_value(serde_json::json!({
            "id": id, "name": name, "generation": 1, "desired": "off", "record_version": 1,
            "spec": {
                "image": Uuid::nil(), "kernel": Uuid::nil(), "vcpus": 1, "memory_mib": 128,
                "overlay_bytes": 1u64 << 30, "disk_bytes": null, "driver": "auto", "storage": "overlay",
            },
            "address": "172.16.0.2", "host_key": "", "host_key_public": "", "overlay_uuid": Uuid::nil(),
            "disk_uuid": null, "image_digest": "", "storage_reason": "", "started_once": false,
            "last_stop": {"reason": "never-started"}, "boot": null, "created_at": Timestamp::UNIX_EPOCH,
            "trashed_at": trashed.then_some(Timestamp::UNIX_EPOCH), "purging": false,
            "idempotency_key": null,
        }))
        .unwrap();
        let phase = Phase::Stopped {
            why: record.last_stop.clone(),
        };
        let view = View {
            record: Arc::new(record),
            phase,
            revision: 1,
            attempt: None,
            boot: None,
            purged: false,
        };
        add(&registry, view);
    }
    registry
}

fn add(registry: &Registry, view: View) {
    let id = view.record.id;
    let (_, view) = tokio::sync::watch::channel(view);
    registry.add(Handle::deaf(id, view));
}

#[test]
fn a_purged_vm_is_forgotten_also_when_its_actor_ended_before_it_was_added() {
    let registry = registry(&[("fox", false), ("owl", true)]);
    let owl = registry.find_trashed("owl").unwrap();
    registry.state().created.insert("key".to_owned(), owl.id);
    registry.forget(owl.id);
    let purged = View {
        purged: true,
        ..owl.latest()
    };
    add(&registry, purged);
    let state = registry.state();
    assert_eq!(state.handles.len(), 1);
    assert!(state.created.is_empty());
}

#[test]
fn a_whole_name_finds_its_vm_as_prefixes_and_ids_do() {
    let id = |number| VmId::from_uuid(Uuid::from_u128(number));
    let third = id(3).to_string();
    let registry = registry(&[
        ("fox", false),
        ("fox-two", false),
        ("owl", false),
        ("owl", true),
        ("elk", true),
        ("elk", true),
        (&third, false),
    ]);
    let find = |query: &str| registry.find(query).map(|handle| handle.id);
    assert_eq!(find("fox").unwrap(), id(1));
    assert_eq!(find("fox-").unwrap(), id(2));
    assert_eq!(find("owl").unwrap(), id(3));
    assert_eq!(registry.find_trashed("owl").unwrap().id, id(4));
    assert_eq!(registry.find_trashed("fox").unwrap().id, id(1));
    let several = registry.find_trashed("elk").unwrap_err();
    assert_eq!(several.code, ErrorCode::Ambiguous);
    assert_eq!(find("gnu").unwrap_err().code, ErrorCode::NotFound);
    assert_eq!(find(&third).unwrap(), id(3), "an id comes before a name");
}

#[test]
fn a_port_that_one_vm_is_being_given_is_not_given_to_another() {
    let registry = Arc::new(Registry::default());
    let id = |number| VmId::from_uuid(Uuid::from_u128(number));
    let ports = |port: &str| BTreeSet::from([port.parse::<PublishedPort>().unwrap()]);
    let hold = |number, port| registry.hold_ports(id(number), &ports(port), choose_another);
    let held = hold(1, "8080:80").unwrap();
    for colliding in ["8080:81", "0.0.0.0:8080:80"] {
        let refused = hold(2, colliding).err().unwrap();
        assert_eq!(refused.code, ErrorCode::Conflict);
    }
    let again = hold(1, "8080:80").unwrap();
    let other = hold(2, "8081:80").unwrap();
    drop((held, other));
    assert!(hold(2, "8080:80").is_err());
    drop(again);
    assert!(hold(2, "8080:80").is_ok());
}
