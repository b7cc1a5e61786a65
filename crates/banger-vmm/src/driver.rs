//! What every VMM driver does: turn a [`MachineConfig`] into a [`Plan`], the recipe for one exec.
//!
//! Pure: nothing here touches the host. What a driver can do is declared in [`Capabilities`], and callers branch on
//! that, never on a driver's name.

use crate::protocol::Control;
use crate::sandbox::Sandbox;
use banger_core::spec::Driver;
use std::path::{Path, PathBuf};

/// How the guest's instructions are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Accelerator {
    /// By the CPU, through `/dev/kvm`.
    Kvm,
    /// By QEMU's software emulation.
    Tcg,
}

/// One drive. The order of drives is the guest's order of disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriveConfig {
    /// The raw file; absolute.
    pub path: PathBuf,
    /// Attach it read-only.
    pub read_only: bool,
}

/// The machine's NIC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NicConfig {
    /// The name of an existing TAP in the network namespace of the VMM.
    pub tap: String,
    /// The guest's MAC, such as `02:00:5e:00:00:01`.
    pub mac: String,
}

/// A machine, the same for every driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineConfig {
    /// The VM's id: letters, digits and hyphens.
    pub id: String,
    /// The VM's name, for people who look at processes.
    pub name: String,
    /// The number of vCPUs.
    pub vcpus: u32,
    /// The memory in MiB.
    pub memory_mib: u64,
    /// The kernel, an ELF `vmlinux`; absolute.
    pub kernel: PathBuf,
    /// The initial RAM disk; absolute.
    pub initrd: PathBuf,
    /// Words to add to the kernel's command line.
    pub kernel_args: Vec<String>,
    /// All drives, in the fixed order.
    pub drives: Vec<DriveConfig>,
    /// The NIC, if there is to be one.
    pub nic: Option<NicConfig>,
    /// The folder of the VMM's sockets and configuration, which is its working folder; absolute. The VMM may make and
    /// change things there, so nothing that others write should lie in it.
    pub run_dir: PathBuf,
    /// How instructions are run.
    pub accelerator: Accelerator,
    /// The guest's vsock address (at least 3), used by drivers with [`Capabilities::vsock`].
    pub cid: u32,
    /// A firmware image to use instead of the VMM's own ([`crate::qemu::args::find_firmware`]).
    pub firmware: Option<PathBuf>,
}

/// What a driver can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// Pause and resume the vCPUs.
    pub pause: bool,
    /// Press a button that asks a guest without an agent to shut down.
    pub graceful_stop: bool,
    /// Save and load a machine's memory and state.
    pub snapshot: bool,
    /// Run without KVM.
    pub emulation: bool,
    /// The VMM stops the guest by itself when the host's disk is full, before a write is lost.
    pub pause_on_full_disk: bool,
    /// The VMM ends when the guest powers off.
    pub ends_on_poweroff: bool,
    /// The agent's channel is vsock, so the guest needs a `cid`.
    pub vsock: bool,
}

/// What a driver can do, which needs none of its programs.
pub const fn capabilities(driver: Driver) -> Capabilities {
    match driver {
        Driver::Firecracker => crate::firecracker::config::CAPABILITIES,
        Driver::Qemu => crate::qemu::args::CAPABILITIES,
    }
}

/// The recipe for one exec of a VMM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The VMM.
    pub program: PathBuf,
    /// Its arguments, without the program itself.
    pub args: Vec<String>,
    /// How the shim reaches it.
    pub control: Control,
    /// What it may reach.
    pub sandbox: Sandbox,
    /// Configuration files to write (mode 0600) before the exec.
    pub files: Vec<(PathBuf, Vec<u8>)>,
}

/// Why a machine cannot be planned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A path is not UTF-8, which a VMM's arguments must be.
    #[error("the path `{}` is not UTF-8", .0.display())]
    NotUtf8(PathBuf),
    /// A path is relative, but the VMM runs in another folder.
    #[error("the path `{}` is not absolute", .0.display())]
    NotAbsolute(PathBuf),
    /// A word would be taken apart, or hide an argument of its own.
    #[error("{what} `{}` has a character that cannot be passed to a VMM", .text.escape_debug())]
    Character {
        /// What the text is.
        what: &'static str,
        /// The text.
        text: String,
    },
    /// The driver cannot run without KVM.
    #[error("{0} needs KVM and cannot emulate")]
    NeedsKvm(Driver),
    /// More than the driver supports.
    #[error("{driver} supports at most {max} {what}, not {asked}")]
    TooMany {
        /// The driver.
        driver: Driver,
        /// Of what.
        what: &'static str,
        /// The limit.
        max: u32,
        /// What was asked for.
        asked: u32,
    },
}

/// A VMM driver.
pub trait Vmm: std::fmt::Debug + Send + Sync {
    /// Which driver this is.
    fn driver(&self) -> Driver;

    /// What it can do.
    fn capabilities(&self) -> Capabilities;

    /// The recipe that starts `machine`.
    fn plan(&self, machine: &MachineConfig) -> Result<Plan, PlanError>;
}

/// The text of an absolute path.
pub(crate) fn absolute(path: &Path) -> Result<&str, PlanError> {
    if !path.is_absolute() {
        return Err(PlanError::NotAbsolute(path.to_owned()));
    }
    let text = path
        .to_str()
        .ok_or_else(|| PlanError::NotUtf8(path.to_owned()))?;
    word("the path", text, |c| !c.is_control())?;
    Ok(text)
}

/// `text`, if all its characters are `allowed` and it is not empty.
pub(crate) fn word<'a>(
    what: &'static str,
    text: &'a str,
    allowed: impl Fn(char) -> bool,
) -> Result<&'a str, PlanError> {
    if text.is_empty() || !text.chars().all(allowed) {
        return Err(PlanError::Character {
            what,
            text: text.to_owned(),
        });
    }
    Ok(text)
}

/// The kernel's command line: `base`, then the machine's own words.
pub(crate) fn command_line(base: &str, machine: &MachineConfig) -> Result<String, PlanError> {
    let mut line = base.to_owned();
    for arg in &machine.kernel_args {
        line.push(' ');
        line.push_str(word("the kernel argument", arg, |c| c.is_ascii_graphic())?);
    }
    Ok(line)
}

impl MachineConfig {
    /// Checks what every driver passes on as it is.
    pub(crate) fn check(&self) -> Result<(), PlanError> {
        word("the VM's id", &self.id, |c| {
            c.is_ascii_alphanumeric() || c == '-'
        })?;
        word("the VM's name", &self.name, |c| {
            c.is_ascii_alphanumeric() || c == '-'
        })?;
        if let Some(nic) = &self.nic {
            word("the TAP", &nic.tap, |c| {
                c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')
            })?;
            word("the MAC", &nic.mac, |c| c.is_ascii_hexdigit() || c == ':')?;
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::firecracker::Firecracker;
    use crate::qemu::Qemu;

    pub(crate) fn machine() -> MachineConfig {
        MachineConfig {
            id: "0198aa".to_owned(),
            name: "calm-otter".to_owned(),
            vcpus: 2,
            memory_mib: 512,
            kernel: "/k/vmlinux".into(),
            initrd: "/k/initrd".into(),
            kernel_args: vec!["audit=0".to_owned()],
            drives: vec![
                DriveConfig {
                    path: "/i/root, old.img".into(),
                    read_only: true,
                },
                DriveConfig {
                    path: "/v/disk.img".into(),
                    read_only: false,
                },
            ],
            nic: Some(NicConfig {
                tap: "tap7".to_owned(),
                mac: "02:00:5e:00:00:07".to_owned(),
            }),
            run_dir: "/run/vm".into(),
            accelerator: Accelerator::Tcg,
            cid: 42,
            firmware: None,
        }
    }

    #[test]
    fn no_driver_takes_a_word_that_could_become_another_argument() {
        let drivers: [&dyn Vmm; 2] = [&Qemu::new("/q"), &Firecracker::new("/f")];
        let spoil: [fn(&mut MachineConfig); 8] = [
            |machine| machine.id = "a b".to_owned(),
            |machine| machine.name = "a,debug-threads=on".to_owned(),
            |machine| machine.kernel_args = vec!["a init=/bin/sh".to_owned()],
            |machine| machine.kernel = "vmlinux".into(),
            |machine| machine.initrd = "/k/init\nrd".into(),
            |machine| machine.drives[0].path = "disk.img".into(),
            |machine| machine.nic.as_mut().unwrap().tap = "t,script=/x".to_owned(),
            |machine| machine.nic.as_mut().unwrap().mac = "02:00,x".to_owned(),
        ];
        for driver in drivers {
            for (number, spoil) in spoil.iter().enumerate() {
                let mut machine = machine();
                machine.accelerator = Accelerator::Kvm;
                assert!(driver.plan(&machine).is_ok());
                spoil(&mut machine);
                assert!(driver.plan(&machine).is_err(), "{number} {driver:?}");
            }
        }
    }

    #[test]
    fn every_plan_is_controlled_by_its_own_driver_within_the_run_folder() {
        let drivers: [&dyn Vmm; 2] = [&Qemu::new("/q"), &Firecracker::new("/f")];
        for driver in drivers {
            let mut machine = machine();
            machine.accelerator = Accelerator::Kvm;
            let plan = driver.plan(&machine).unwrap();
            assert_eq!(plan.control.driver(), driver.driver());
            assert!(
                plan.files
                    .iter()
                    .all(|(path, _)| path.starts_with("/run/vm"))
            );
        }
    }
}
