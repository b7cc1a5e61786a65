//! QEMU's command line. QEMU 7.2 and later take it.

use crate::driver::{
    Accelerator, Capabilities, MachineConfig, Plan, PlanError, Vmm, absolute, command_line,
};
use crate::protocol::Control;
use crate::sandbox::Sandbox;
use banger_core::spec::Driver;
use std::path::{Path, PathBuf};

/// The name of the QMP socket in the run folder.
pub const QMP_SOCKET: &str = "qmp.sock";
/// The name of the agent's socket in the run folder.
pub const AGENT_SOCKET: &str = "agent.sock";
/// The kernel's command line: nothing waits, nothing chatters, a panic resets at once. The kernel's check of its timer
/// panics where a busy host does not let an emulated one tick in time.
pub const KERNEL_COMMAND_LINE: &str =
    "console=ttyS0 reboot=t panic=-1 quiet loglevel=3 cryptomgr.notests no_timer_check";

/// What an emulated guest's kernel is told besides. It would take the TSCs of two AMD CPUs without an invariant TSC,
/// which TCG does not offer, for unsynchronised, and read its clock from the ACPI timer instead: an emulated device,
/// each time. Yet TCG has one TSC for all of a machine's vCPUs (`cpu_get_ticks`: the host's, under one lock, never
/// going back).
const EMULATED_KERNEL_COMMAND_LINE: &str = "tsc=reliable";

/// An emulated CPU with what Debian's userland wants and little more: each feature costs boot time. Without RDRAND
/// a guest waits a second for its random pool.
const EMULATED_CPU: &str = "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+rdrand,+rdseed,+aes,+pclmulqdq";
/// The lean `q35`: without these devices its firmware and the guest's kernel have less to look for.
const MACHINE: &str = "q35,sata=off,smbus=off,hpet=off,vmport=off,smm=off";
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
/// PCI slot of the first drive; the slots before it are the machine's own. Explicit slots fix the guest's order.
const FIRST_DRIVE_SLOT: usize = 2;
const MAX_DRIVES: usize = 16;
const MAX_VCPUS: u32 = 255;

/// Where distributions keep qboot, the firmware that boots in a tenth of SeaBIOS' time.
const FIRMWARE: [&str; 4] = [
    "/usr/share/qemu/qboot.rom",
    "/usr/share/qboot/bios.bin",
    "/usr/lib/qemu/qboot.rom",
    "/usr/local/share/qemu/qboot.rom",
];

/// Finds `qboot.rom`, if QEMU brought one. Reads the file system; to be called once.
pub fn find_firmware() -> Option<PathBuf> {
    FIRMWARE
        .iter()
        .map(PathBuf::from)
        .find(|path| path.is_file())
}

/// What it can do.
pub(crate) const CAPABILITIES: Capabilities = Capabilities {
    pause: true,
    graceful_stop: true,
    snapshot: false,
    emulation: true,
    pause_on_full_disk: true,
    ends_on_poweroff: true,
    vsock: false,
};

/// The QEMU driver.
#[derive(Debug, Clone)]
pub struct Qemu {
    program: PathBuf,
}

impl Qemu {
    /// A driver that runs `program`, a `qemu-system-x86_64`.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
        }
    }
}

/// A value of a comma-separated option: QEMU reads a doubled comma as one.
fn escaped(path: &Path) -> Result<String, PlanError> {
    Ok(absolute(path)?.replace(',', ",,"))
}

impl Vmm for Qemu {
    fn driver(&self) -> Driver {
        Driver::Qemu
    }

    fn capabilities(&self) -> Capabilities {
        CAPABILITIES
    }

    fn plan(&self, machine: &MachineConfig) -> Result<Plan, PlanError> {
        machine.check()?;
        absolute(&machine.run_dir)?;
        let too_many = |what, max: u32, asked: u32| PlanError::TooMany {
            driver: Driver::Qemu,
            what,
            max,
            asked,
        };
        if machine.vcpus > MAX_VCPUS {
            return Err(too_many("vCPUs", MAX_VCPUS, machine.vcpus));
        }
        let drives = machine.drives.len();
        if drives > MAX_DRIVES {
            return Err(too_many("drives", MAX_DRIVES as u32, drives as u32));
        }
        let mut args = Arguments::default();
        for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
            args.flag(flag);
        }
        args.option("-display", "none");
        args.option("-name", format!("guest={}", machine.name));
        args.option("-machine", MACHINE);
        let mut kernel_command_line = KERNEL_COMMAND_LINE.to_owned();
        match machine.accelerator {
            Accelerator::Kvm => {
                args.option("-accel", "kvm");
                args.option("-cpu", "host");
            }
            // Several emulating threads crash now and then: the guest's kernel patches code that another runs.
            Accelerator::Tcg => {
                args.option("-accel", "tcg,thread=single");
                args.option("-cpu", EMULATED_CPU);
                kernel_command_line.push(' ');
                kernel_command_line.push_str(EMULATED_KERNEL_COMMAND_LINE);
            }
        }
        args.option("-smp", machine.vcpus.to_string());
        args.option("-m", format!("{}M", machine.memory_mib));
        if let Some(firmware) = &machine.firmware {
            args.option("-bios", absolute(firmware)?);
        }
        args.option("-kernel", absolute(&machine.kernel)?);
        args.option("-initrd", absolute(&machine.initrd)?);
        args.option("-append", command_line(&kernel_command_line, machine)?);
        args.option("-sandbox", SANDBOX);
        args.option("-chardev", "stdio,id=console,signal=off");
        args.option("-serial", "chardev:console");
        args.option("-monitor", "none");
        args.option("-qmp", format!("unix:{QMP_SOCKET},server=on,wait=off"));
        for (index, drive) in machine.drives.iter().enumerate() {
            let path = escaped(&drive.path)?;
            let read_only = if drive.read_only {
                "readonly=on"
            } else {
                "discard=unmap"
            };
            args.option(
                "-drive",
                format!(
                    "if=none,id=drive{index},format=raw,cache=writeback,{read_only},file={path}"
                ),
            );
            // A full host pauses the guest and loses no write; any other error is the guest's to see.
            let on_error = if drive.read_only {
                ""
            } else {
                ",werror=enospc"
            };
            let slot = FIRST_DRIVE_SLOT + index;
            args.option(
                "-device",
                format!("virtio-blk-pci,drive=drive{index},addr={slot:#x}{on_error}"),
            );
        }
        args.option("-device", "virtio-serial-pci,max_ports=2");
        args.option(
            "-chardev",
            format!("socket,id=agent,path={AGENT_SOCKET},server=on,wait=off"),
        );
        args.option(
            "-device",
            format!(
                "virtserialport,chardev=agent,id=agent,name={}",
                banger_guest::agent_protocol::PORT_NAME
            ),
        );
        if let Some(nic) = &machine.nic {
            args.option(
                "-netdev",
                format!("tap,id=nic,ifname={},script=no,downscript=no", nic.tap),
            );
            args.option(
                "-device",
                format!("virtio-net-pci,netdev=nic,romfile=,mac={}", nic.mac),
            );
        }
        args.option("-device", "virtio-rng-pci");
        Ok(Plan {
            program: self.program.clone(),
            args: args.0,
            control: Control::Qemu {
                qmp_socket: machine.run_dir.join(QMP_SOCKET),
                agent_socket: machine.run_dir.join(AGENT_SOCKET),
            },
            sandbox: Sandbox::of(machine),
            files: Vec::new(),
        })
    }
}

#[derive(Default)]
struct Arguments(Vec<String>);

impl Arguments {
    fn flag(&mut self, name: &str) {
        self.0.push(name.to_owned());
    }

    fn option(&mut self, name: &str, value: impl Into<String>) {
        self.flag(name);
        self.0.push(value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::tests::machine;

    fn line(machine: &MachineConfig) -> String {
        let plan = Qemu::new("/usr/bin/qemu-system-x86_64").plan(machine);
        plan.unwrap().args.join(" ")
    }

    #[test]
    fn the_emulated_command_line_is_the_measured_one() {
        let mut machine = machine();
        machine.firmware = Some("/usr/share/qemu/qboot.rom".into());
        let expected = "-nodefaults -no-user-config -no-reboot -display none -name guest=calm-otter \
            -machine q35,sata=off,smbus=off,hpet=off,vmport=off,smm=off \
            -accel tcg,thread=single \
            -cpu qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+rdrand,+rdseed,+aes,+pclmulqdq \
            -smp 2 -m 512M -bios /usr/share/qemu/qboot.rom -kernel /k/vmlinux -initrd /k/initrd \
            -append console=ttyS0 reboot=t panic=-1 quiet loglevel=3 cryptomgr.notests no_timer_check tsc=reliable audit=0 \
            -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny \
            -chardev stdio,id=console,signal=off -serial chardev:console -monitor none \
            -qmp unix:qmp.sock,server=on,wait=off \
            -drive if=none,id=drive0,format=raw,cache=writeback,readonly=on,file=/i/root,, old.img \
            -device virtio-blk-pci,drive=drive0,addr=0x2 \
            -drive if=none,id=drive1,format=raw,cache=writeback,discard=unmap,file=/v/disk.img \
            -device virtio-blk-pci,drive=drive1,addr=0x3,werror=enospc \
            -device virtio-serial-pci,max_ports=2 \
            -chardev socket,id=agent,path=agent.sock,server=on,wait=off \
            -device virtserialport,chardev=agent,id=agent,name=banger.agent \
            -netdev tap,id=nic,ifname=tap7,script=no,downscript=no \
            -device virtio-net-pci,netdev=nic,romfile=,mac=02:00:5e:00:00:07 \
            -device virtio-rng-pci";
        assert_eq!(line(&machine), expected);
    }

    #[test]
    fn kvm_gives_the_hosts_cpu_and_no_firmware_means_qemus_own() {
        let mut machine = machine();
        machine.accelerator = Accelerator::Kvm;
        machine.nic = None;
        let line = line(&machine);
        assert!(line.contains("-accel kvm -cpu host"), "{line}");
        // Its own CPU knows best whether its TSC is to be trusted.
        assert!(!line.contains("tsc="), "{line}");
        assert!(
            !line.contains("-bios") && !line.contains("netdev"),
            "{line}"
        );
    }
}
