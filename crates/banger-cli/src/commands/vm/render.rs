//! VMs as people read them.

use crate::escape;
use crate::output::{fields, table};
use crate::value;
use banger_api::network::VmNetwork;
use banger_api::vm::Vm;
use banger_core::phase::{PausedBy, Phase, StopReason};
use banger_core::publish::PublishedPort;

/// The phase in a few words.
pub(in crate::commands) fn phase(phase: &Phase) -> String {
    match phase {
        Phase::Stopped { why } => format!("stopped ({})", reason(why)),
        Phase::Starting { step } => format!("starting ({})", step.name()),
        Phase::Running {
            reachable: false, ..
        } => "running (unreachable)".to_owned(),
        Phase::Running { ready: false, .. } => "running (not ready)".to_owned(),
        Phase::Running { .. } => "running".to_owned(),
        Phase::Paused {
            by: PausedBy::Person,
        } => "paused".to_owned(),
        Phase::Paused {
            by: PausedBy::FullDisk,
        } => "paused (host's disk is full)".to_owned(),
        Phase::Stopping { .. } => "stopping".to_owned(),
    }
}

/// A stop's reason without its details.
fn reason(why: &StopReason) -> String {
    match why {
        StopReason::Asked => "on request".to_owned(),
        StopReason::AskedThenForced => "forced".to_owned(),
        StopReason::Killed => "killed".to_owned(),
        StopReason::StartFailed { step, .. } => format!("start failed at {}", step.name()),
        StopReason::VmmDied { .. } => "the VMM died".to_owned(),
        StopReason::Unknown => "reason unknown".to_owned(),
        StopReason::NeverStarted
        | StopReason::GuestPoweroff
        | StopReason::GuestReboot
        | StopReason::GuestPanic
        | StopReason::StartCancelled
        | StopReason::HostRebooted
        | StopReason::UserLoggedOut
        | StopReason::HostShutDown => why.to_string(),
    }
}

/// What became of a VM, on one line. A reason that needs telling is told in full.
pub(super) fn line(vm: &Vm) -> String {
    let phase = match &vm.phase {
        Phase::Stopped {
            why:
                why @ (StopReason::AskedThenForced
                | StopReason::StartFailed { .. }
                | StopReason::VmmDied { .. }),
        } => {
            format!("stopped ({why})")
        }
        other => phase(other),
    };
    let phase = if vm.trashed_at.is_some() {
        "in the trash".to_owned()
    } else {
        phase
    };
    format!("{}: {}\n", vm.name, escape::line(&phase))
}

/// What is left to say of a VM that is gone for ever.
pub(super) fn purged(vm: &Vm) -> String {
    format!("{}: purged\n", vm.name)
}

/// A list of VMs as a table.
pub(in crate::commands) fn list(vms: &[Vm], trash: bool) -> String {
    let mut header = vec![
        "NAME", "PHASE", "ADDRESS", "IMAGE", "DRIVER", "CPU", "MEMORY",
    ];
    if trash {
        header.push("DELETED");
    }
    let rows = vms.iter().map(|vm| {
        let mut row = vec![
            vm.name.to_string(),
            phase(&vm.phase),
            vm.address.to_string(),
            vm.image_name
                .clone()
                .unwrap_or_else(|| vm.spec.image.to_string()),
            driver(vm),
            vm.spec.vcpus.get().to_string(),
            memory(vm),
        ];
        if trash {
            row.push(vm.trashed_at.map_or_else(String::new, value::date));
        }
        row
    });
    table(&header, rows)
}

/// The driver that runs the VM, else the one asked for.
fn driver(vm: &Vm) -> String {
    match &vm.attempt {
        Some(attempt) => attempt.driver.to_string(),
        None => word(&vm.spec.driver),
    }
}

fn memory(vm: &Vm) -> String {
    value::bytes(u64::from(vm.spec.memory_mib.get()) << 20)
}

/// The word by which the API names a choice.
fn word(value: &impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        _ => "-".to_owned(),
    }
}

fn switch(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

/// Whether the guest may reach the internet, and whether the kernel sees it the same way.
fn nat(vm: &Vm, now: Option<&VmNetwork>) -> String {
    let word = |on, private| match (on, private) {
        (true, true) => "on, private networks too",
        _ => switch(on),
    };
    let wanted = word(vm.spec.nat, vm.spec.nat_private);
    match now {
        Some(now) if now.live => match word(now.nat_now, now.nat_private_now) {
            is if is == wanted => wanted.to_owned(),
            is => format!("{wanted} ({is} now)"),
        },
        _ => wanted.to_owned(),
    }
}

/// The published ports, each with why it is not open if it should be.
fn ports(vm: &Vm, now: Option<&VmNetwork>) -> String {
    let problem = |port: &PublishedPort| {
        let known = now?.ports.iter().find(|known| known.port == *port)?;
        known.problem.as_ref()
    };
    let ports = vm.spec.ports.iter().map(|port| match problem(port) {
        Some(why) => format!("{port} (closed: {why})"),
        None => port.to_string(),
    });
    or_none(ports.collect())
}

/// The VMs that it reaches, by name where that is known.
fn joins(vm: &Vm, now: Option<&VmNetwork>) -> String {
    or_none(match now {
        Some(now) => now.joins.iter().map(ToString::to_string).collect(),
        None => vm.spec.joins.iter().map(ToString::to_string).collect(),
    })
}

fn or_none(words: Vec<String>) -> String {
    if words.is_empty() {
        "none".to_owned()
    } else {
        words.join(", ")
    }
}

/// All of a VM; `now` is its network as it is now, if that is known.
pub(super) fn details(vm: &Vm, now: Option<&VmNetwork>) -> String {
    let named = |name: &Option<String>, id: String| match name {
        Some(name) => format!("{name} ({id})"),
        None => id,
    };
    let phase = match &vm.phase {
        Phase::Stopped { why } => format!("stopped ({why})"),
        Phase::Stopping { deadline } => format!(
            "stopping (ended at {} if it has not shut down)",
            value::time(*deadline)
        ),
        other => phase(other),
    };
    let mut lines = vec![
        ("name", vm.name.to_string()),
        ("id", vm.id.to_string()),
        ("phase", phase),
        ("desired", word(&vm.desired)),
        ("address", vm.address.to_string()),
        ("mac", vm.mac.to_string()),
        ("image", named(&vm.image_name, vm.spec.image.to_string())),
        ("kernel", named(&vm.kernel_name, vm.spec.kernel.to_string())),
        ("vcpus", vm.spec.vcpus.get().to_string()),
        ("memory", memory(vm)),
        (
            "cpu limit",
            vm.spec
                .cpu_limit
                .map_or_else(|| "none".to_owned(), |limit| limit.to_string()),
        ),
        ("overlay", value::bytes(vm.spec.overlay_bytes.get())),
        (
            "disk",
            vm.spec
                .disk_bytes
                .map_or_else(|| "none".to_owned(), |bytes| value::bytes(bytes.get())),
        ),
        (
            "storage",
            format!("{} ({})", vm.spec.storage.name(), vm.storage_reason),
        ),
        ("driver", word(&vm.spec.driver)),
        ("nat", nat(vm, now)),
        ("ports", ports(vm, now)),
        ("joins", joins(vm, now)),
        ("autostart", switch(vm.spec.autostart).to_owned()),
        ("generation", vm.generation.to_string()),
        ("created", value::date(vm.created_at)),
    ];
    if let Some(at) = vm.trashed_at {
        lines.push(("deleted", value::date(at)));
    }
    if let Some(attempt) = &vm.attempt {
        let pid =
            |pid: Option<i32>| pid.map_or_else(|| "unknown".to_owned(), |pid| pid.to_string());
        lines.push((
            "runs on",
            format!(
                "{}, {} ({})",
                attempt.driver, attempt.accelerator, attempt.reason
            ),
        ));
        lines.push((
            "processes",
            format!(
                "VMM {}, shim {}",
                pid(attempt.vmm_pid),
                pid(attempt.shim_pid)
            ),
        ));
        lines.push((
            "sandbox",
            match attempt.sandbox.as_slice() {
                [] => "none".to_owned(),
                layers => layers.join(", "),
            },
        ));
        if !attempt.sandbox_missing.is_empty() {
            lines.push(("sandbox missing", attempt.sandbox_missing.join("; ")));
        }
        if attempt.generation != vm.generation {
            lines.push(("booted with", format!("generation {}", attempt.generation)));
        }
    }
    if let Some(boot) = &vm.boot {
        let stages: Vec<String> = super::boot::stages(boot)
            .filter_map(|(stage, ms)| Some(format!("{stage} {}", value::seconds(ms?))))
            .collect();
        lines.push(("boot", stages.join(", ")));
    }
    lines.push(("host key", vm.host_key.clone()));
    lines.push(("directory", vm.directory.clone()));
    fields(lines)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use banger_api::network::VmPort;
    use banger_core::phase::StartStep;

    pub(crate) fn vm(name: &str, phase: serde_json::Value) -> Vm {
        serde_json::from_value(serde_json::json!({
            "id": "0198c2a4-7d1e-7b3a-9c4d-1f2e3d4c5b6a",
            "name": name,
            "phase": phase,
            "address": "172.16.0.2",
            "mac": "06:2e:3d:4c:5b:6a",
            "spec": {
                "image": "0198c2a4-0000-7b3a-9c4d-1f2e3d4c5b6a",
                "kernel": "0198c2a4-1111-7b3a-9c4d-1f2e3d4c5b6a",
                "vcpus": 2, "memory_mib": 1024, "overlay_bytes": 8589934592u64, "disk_bytes": null,
                "driver": "auto", "storage": "overlay",
            },
            "generation": 1, "desired": "off", "revision": 7,
            "image_name": "default", "kernel_name": null, "storage_reason": "asked for",
            "attempt": null, "boot": {"vmm_up": 120, "ready": 9870},
            "host_key": "ssh-ed25519 AAAA calm-otter",
            "created_at": "2026-11-24T09:00:00Z", "trashed_at": null,
            "directory": "/s/vms/0198c2a4",
        }))
        .unwrap()
    }

    #[test]
    fn a_list_tells_phase_and_reason() {
        let vms = [
            vm(
                "calm-otter",
                serde_json::json!({"state": "running", "ready": true, "reachable": true}),
            ),
            vm(
                "fox",
                serde_json::json!({"state": "running", "ready": false, "reachable": true}),
            ),
            vm(
                "owl",
                serde_json::json!({"state": "running", "ready": true, "reachable": false}),
            ),
            vm(
                "yak",
                serde_json::json!({"state": "stopped", "why": {"reason": "guest-poweroff"}}),
            ),
        ];
        insta::assert_snapshot!(list(&vms, false), @r"
        NAME        PHASE                        ADDRESS     IMAGE    DRIVER  CPU  MEMORY
        calm-otter  running                      172.16.0.2  default  auto    2    1 GiB
        fox         running (not ready)          172.16.0.2  default  auto    2    1 GiB
        owl         running (unreachable)        172.16.0.2  default  auto    2    1 GiB
        yak         stopped (guest powered off)  172.16.0.2  default  auto    2    1 GiB
        ");
    }

    #[test]
    fn a_failed_start_is_short_in_lists_and_full_on_its_own() {
        let failed = serde_json::json!({"state": "stopped", "why": {"reason": "start-failed", "step": "launch-shim", "error": "QEMU said \u{1b}[31mno"}});
        let vm = vm("fox", failed);
        assert_eq!(phase(&vm.phase), "stopped (start failed at launch-shim)");
        assert_eq!(
            line(&vm),
            "fox: stopped (start failed at launch-shim: QEMU said \\x1b[31mno)\n"
        );
        assert_eq!(
            phase(&Phase::Starting {
                step: StartStep::LeasePort
            }),
            "starting (lease-port)"
        );
    }

    #[test]
    fn details_tell_everything() {
        let vm = vm(
            "calm-otter",
            serde_json::json!({"state": "stopped", "why": {"reason": "asked"}}),
        );
        insta::assert_snapshot!(details(&vm, None), @r"
        name        calm-otter
        id          0198c2a4-7d1e-7b3a-9c4d-1f2e3d4c5b6a
        phase       stopped (on request)
        desired     off
        address     172.16.0.2
        mac         06:2e:3d:4c:5b:6a
        image       default (0198c2a4-0000-7b3a-9c4d-1f2e3d4c5b6a)
        kernel      0198c2a4-1111-7b3a-9c4d-1f2e3d4c5b6a
        vcpus       2
        memory      1 GiB
        cpu limit   none
        overlay     8 GiB
        disk        none
        storage     overlay (asked for)
        driver      auto
        nat         off
        ports       none
        joins       none
        autostart   off
        generation  1
        created     2026-11-24T09:00:00Z
        boot        VMM up 0.12 s, ready 9.87 s
        host key    ssh-ed25519 AAAA calm-otter
        directory   /s/vms/0198c2a4
        ");
    }

    #[test]
    fn details_tell_what_of_the_network_is_not_as_it_should_be() {
        let mut vm = vm(
            "otter",
            serde_json::json!({"state": "running", "ready": true, "reachable": true}),
        );
        let port: PublishedPort = "8080:80".parse().unwrap();
        vm.spec.nat = true;
        vm.spec.ports = [port.clone(), "53:53/udp".parse().unwrap()].into();
        let now = VmNetwork {
            id: vm.id,
            name: vm.name.clone(),
            address: vm.address,
            live: true,
            nat: true,
            nat_now: false,
            nat_private: false,
            nat_private_now: false,
            ports: vec![VmPort {
                port,
                open: false,
                connections: 0,
                problem: Some("address already in use".to_owned()),
            }],
            joins: vec!["fox".parse().unwrap()],
        };
        let text = details(&vm, Some(&now));
        for line in [
            "nat         on (off now)\n",
            "ports       127.0.0.1:8080:80/tcp (closed: address already in use), 127.0.0.1:53:53/udp\n",
            "joins       fox\n",
        ] {
            assert!(text.contains(line), "{text}");
        }
    }
}
