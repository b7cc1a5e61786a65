//! Firecracker's configuration file: the machine as `firecracker --config-file` reads it.

use crate::driver::{
    Accelerator, Capabilities, MachineConfig, Plan, PlanError, Vmm, absolute, command_line,
};
use crate::protocol::Control;
use crate::sandbox::Sandbox;
use banger_core::spec::Driver;
use serde::Serialize;
use std::path::PathBuf;

/// The name of the API's socket in the run folder.
pub const API_SOCKET: &str = "api.sock";
/// The name of the vsock device's socket in the run folder.
pub const VSOCK_SOCKET: &str = "vsock.sock";
/// The name of the log's FIFO in the run folder. A path such as `/dev/stderr` would need a `/proc`.
pub const LOG_PIPE: &str = "log.pipe";
/// The name of the metrics' FIFO in the run folder. Firecracker opens both for reading and writing without blocking,
/// so a full one costs it a line and never its time.
pub const METRICS_PIPE: &str = "metrics.pipe";
/// The name of the configuration file in the run folder.
pub const CONFIG_FILE: &str = "firecracker.json";
/// The kernel's command line. `i8042.nomux` and `i8042.nopnp`, which examples often carry, would make
/// `SendCtrlAltDel` do nothing.
pub const KERNEL_COMMAND_LINE: &str =
    "console=ttyS0 reboot=k panic=-1 quiet loglevel=3 cryptomgr.notests";
const MAX_VCPUS: u32 = 32;

/// What it can do.
pub(crate) const CAPABILITIES: Capabilities = Capabilities {
    pause: true,
    graceful_stop: true,
    snapshot: false,
    emulation: false,
    pause_on_full_disk: false,
    ends_on_poweroff: false,
    vsock: true,
};

/// The Firecracker driver.
#[derive(Debug, Clone)]
pub struct Firecracker {
    program: PathBuf,
}

impl Firecracker {
    /// A driver that runs `program`, a `firecracker`.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
        }
    }
}

#[derive(Serialize)]
struct Config<'a> {
    #[serde(rename = "boot-source")]
    boot_source: BootSource<'a>,
    drives: Vec<Drive<'a>>,
    #[serde(rename = "machine-config")]
    machine_config: MachineConfiguration,
    #[serde(rename = "network-interfaces")]
    network_interfaces: Vec<NetworkInterface<'a>>,
    vsock: Vsock,
    entropy: EntropyDevice,
    metrics: Metrics,
}

#[derive(Serialize)]
struct BootSource<'a> {
    kernel_image_path: &'a str,
    initrd_path: &'a str,
    boot_args: String,
}

#[derive(Serialize)]
struct Drive<'a> {
    drive_id: String,
    path_on_host: &'a str,
    /// The root is the initrd's to mount; a true here would also put `root=` on the command line.
    is_root_device: bool,
    is_read_only: bool,
    /// The default, `Unsafe`, ignores the guest's fsync.
    cache_type: &'static str,
}

#[derive(Serialize)]
struct MachineConfiguration {
    vcpu_count: u32,
    mem_size_mib: u64,
}

#[derive(Serialize)]
struct NetworkInterface<'a> {
    iface_id: &'static str,
    host_dev_name: &'a str,
    guest_mac: &'a str,
}

#[derive(Serialize)]
struct Vsock {
    guest_cid: u32,
    uds_path: &'static str,
}

#[derive(Serialize)]
struct EntropyDevice {}

#[derive(Serialize)]
struct Metrics {
    metrics_path: &'static str,
}

impl Vmm for Firecracker {
    fn driver(&self) -> Driver {
        Driver::Firecracker
    }

    fn capabilities(&self) -> Capabilities {
        CAPABILITIES
    }

    fn plan(&self, machine: &MachineConfig) -> Result<Plan, PlanError> {
        machine.check()?;
        absolute(&machine.run_dir)?;
        if machine.accelerator == Accelerator::Tcg {
            return Err(PlanError::NeedsKvm(Driver::Firecracker));
        }
        if machine.vcpus > MAX_VCPUS {
            return Err(PlanError::TooMany {
                driver: Driver::Firecracker,
                what: "vCPUs",
                max: MAX_VCPUS,
                asked: machine.vcpus,
            });
        }
        let config = Config {
            boot_source: BootSource {
                kernel_image_path: absolute(&machine.kernel)?,
                initrd_path: absolute(&machine.initrd)?,
                boot_args: command_line(KERNEL_COMMAND_LINE, machine)?,
            },
            drives: machine
                .drives
                .iter()
                .enumerate()
                .map(|(index, drive)| {
                    Ok(Drive {
                        drive_id: format!("drive{index}"),
                        path_on_host: absolute(&drive.path)?,
                        is_root_device: false,
                        is_read_only: drive.read_only,
                        cache_type: "Writeback",
                    })
                })
                .collect::<Result<_, PlanError>>()?,
            machine_config: MachineConfiguration {
                vcpu_count: machine.vcpus,
                mem_size_mib: machine.memory_mib,
            },
            network_interfaces: machine
                .nic
                .iter()
                .map(|nic| NetworkInterface {
                    iface_id: "eth0",
                    host_dev_name: &nic.tap,
                    guest_mac: &nic.mac,
                })
                .collect(),
            vsock: Vsock {
                guest_cid: machine.cid,
                uds_path: VSOCK_SOCKET,
            },
            entropy: EntropyDevice {},
            metrics: Metrics {
                metrics_path: METRICS_PIPE,
            },
        };
        let json = serde_json::to_vec_pretty(&config)
            .expect("the configuration has no map with keys other than text");
        let words = [
            "--id",
            &machine.id,
            "--api-sock",
            API_SOCKET,
            "--config-file",
            CONFIG_FILE,
            // Standard output is the guest's console alone.
            "--log-path",
            LOG_PIPE,
            "--level",
            "Warning",
        ];
        Ok(Plan {
            program: self.program.clone(),
            args: words.map(str::to_owned).to_vec(),
            control: Control::Firecracker {
                api_socket: machine.run_dir.join(API_SOCKET),
                vsock_socket: machine.run_dir.join(VSOCK_SOCKET),
                log_pipe: machine.run_dir.join(LOG_PIPE),
                metrics_pipe: machine.run_dir.join(METRICS_PIPE),
            },
            sandbox: Sandbox::of(machine),
            files: vec![(machine.run_dir.join(CONFIG_FILE), json)],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::tests::machine;
    use serde_json::{Value, json};

    fn config(machine: &MachineConfig) -> Value {
        let plan = Firecracker::new("/usr/bin/firecracker")
            .plan(machine)
            .unwrap();
        assert_eq!(plan.files[0].0, machine.run_dir.join(CONFIG_FILE));
        serde_json::from_slice(&plan.files[0].1).unwrap()
    }

    #[test]
    fn the_configuration_has_the_fields_of_firecrackers_own_description() {
        let mut machine = machine();
        machine.accelerator = Accelerator::Kvm;
        assert_eq!(
            config(&machine),
            json!({
                "boot-source": {
                    "kernel_image_path": "/k/vmlinux",
                    "initrd_path": "/k/initrd",
                    "boot_args": "console=ttyS0 reboot=k panic=-1 quiet loglevel=3 cryptomgr.notests audit=0",
                },
                "drives": [
                    {
                        "drive_id": "drive0",
                        "path_on_host": "/i/root, old.img",
                        "is_root_device": false,
                        "is_read_only": true,
                        "cache_type": "Writeback",
                    },
                    {
                        "drive_id": "drive1",
                        "path_on_host": "/v/disk.img",
                        "is_root_device": false,
                        "is_read_only": false,
                        "cache_type": "Writeback",
                    },
                ],
                "machine-config": { "vcpu_count": 2, "mem_size_mib": 512 },
                "network-interfaces": [{
                    "iface_id": "eth0",
                    "host_dev_name": "tap7",
                    "guest_mac": "02:00:5e:00:00:07",
                }],
                "vsock": { "guest_cid": 42, "uds_path": "vsock.sock" },
                "entropy": {},
                "metrics": { "metrics_path": "metrics.pipe" },
            })
        );
    }

    #[test]
    fn firecracker_is_never_asked_to_emulate() {
        let plan = Firecracker::new("/usr/bin/firecracker").plan(&machine());
        assert_eq!(plan, Err(PlanError::NeedsKvm(Driver::Firecracker)));
    }

    #[test]
    fn the_command_line_names_sockets_relative_to_the_run_folder() {
        let mut machine = machine();
        machine.accelerator = Accelerator::Kvm;
        machine.nic = None;
        let plan = Firecracker::new("/usr/bin/firecracker")
            .plan(&machine)
            .unwrap();
        assert_eq!(
            plan.args.join(" "),
            "--id 0198aa --api-sock api.sock --config-file firecracker.json \
             --log-path log.pipe --level Warning"
        );
        assert_eq!(config(&machine)["network-interfaces"], json!([]));
    }
}
