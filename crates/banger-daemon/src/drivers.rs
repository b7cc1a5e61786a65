//! Which VMMs there are, what KVM is good for, and which driver a VM gets.

use crate::config::DriverConfig;
use banger_api::daemon::DriverInfo;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_core::spec::{Driver, DriverChoice};
use banger_host::exec::Run;
use banger_host::probe;
use banger_vmm::driver::{Accelerator, Vmm};
use banger_vmm::firecracker::{self, Firecracker};
use banger_vmm::qemu::{self, Qemu};
use banger_vmm::version::{Verdict, Version};
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const VERSION_TIMEOUT: Duration = Duration::from_secs(10);

/// Finds VMMs and judges KVM. Its calls block.
#[derive(Debug)]
pub(crate) struct Drivers {
    config: DriverConfig,
    installed: PathBuf,
    keeper_program: PathBuf,
    probe_cache: PathBuf,
    boot_id: String,
    /// Versions of programs by what identifies a file.
    versions: Mutex<HashMap<(PathBuf, u64, i64), Option<Version>>>,
}

/// A VMM and how it is to run a VM.
#[derive(Debug)]
pub(crate) struct Chosen {
    pub(crate) vmm: Box<dyn Vmm>,
    pub(crate) accelerator: Accelerator,
    pub(crate) reason: String,
}

type Parse = fn(&str) -> Option<Version>;
type Judge = fn(Version) -> Verdict;

/// A program that was looked for.
#[derive(Debug, Clone)]
struct Found {
    path: PathBuf,
    version: Option<Version>,
    verdict: Verdict,
}

impl Drivers {
    pub(crate) fn new(
        config: DriverConfig,
        installed: PathBuf,
        keeper_program: PathBuf,
        probe_cache: PathBuf,
        boot_id: String,
    ) -> Self {
        Self {
            config,
            installed,
            keeper_program,
            probe_cache,
            boot_id,
            versions: Mutex::default(),
        }
    }

    fn version(&self, program: &Path, parse: Parse) -> Option<Version> {
        let metadata = std::fs::metadata(program).ok()?;
        let key = (program.to_owned(), metadata.ino(), metadata.mtime());
        let known = self
            .versions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&key)
            .copied();
        if let Some(version) = known {
            return version;
        }
        let output = Run::new(program)
            .args(["--version"])
            .timeout(VERSION_TIMEOUT)
            .run();
        let version = output
            .ok()
            .and_then(|output| parse(&String::from_utf8_lossy(&output.stdout)));
        self.versions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(key, version);
        version
    }

    fn find(&self, driver: Driver) -> Option<Found> {
        let (configured, name) = match driver {
            Driver::Qemu => (&self.config.qemu, "qemu-system-x86_64"),
            Driver::Firecracker => (&self.config.firecracker, "firecracker"),
        };
        let path = match configured {
            Some(path) => Some(path.clone()).filter(|path| path.is_file()),
            None => Some(self.installed.join(name))
                .filter(|path| path.is_file())
                .or_else(|| banger_host::exec::find(name)),
        }?;
        let (parse, judge): (Parse, Judge) = match driver {
            Driver::Qemu => (qemu::version::parse, qemu::version::judge),
            Driver::Firecracker => (firecracker::version::parse, firecracker::version::judge),
        };
        let version = self.version(&path, parse);
        let verdict = match version {
            Some(version) => judge(version),
            None => Verdict::Refused(format!(
                "`{} --version` does not name a version",
                path.display()
            )),
        };
        Some(Found {
            path,
            version,
            verdict,
        })
    }

    /// What `/dev/kvm` is good for; found out once for each boot of the host. `vmlinux` is booted where the probe's
    /// own instructions cannot tell.
    pub(crate) fn kvm(&self, vmlinux: Option<&Path>) -> probe::Verdict {
        probe::cached(
            &self.probe_cache,
            &self.boot_id,
            &self.keeper_program,
            || {
                let second = (
                    self.find(Driver::Qemu),
                    vmlinux,
                    qemu::args::find_firmware(),
                );
                let begun = Instant::now();
                let first = probe::run(&self.keeper_program);
                let timeout = probe::kernel_timeout(begun.elapsed());
                match (first, second) {
                    (probe::Verdict::Works, (Some(qemu), Some(vmlinux), Some(firmware))) => {
                        probe::kernel_boots(&qemu.path, &firmware, vmlinux, timeout)
                    }
                    (verdict, _) => verdict,
                }
            },
        )
    }

    /// Picks what runs a VM. `auto` is what the settings say, and without them the best that there is.
    pub(crate) fn choose(
        &self,
        choice: DriverChoice,
        vmlinux: Option<&Path>,
    ) -> Result<Chosen, ErrorBody> {
        let (by_settings, choice, why) = match choice {
            DriverChoice::Auto => (true, self.config.choice, "auto by config.toml"),
            asked => (false, asked, "asked for"),
        };
        let usable = |driver| {
            self.usable(driver).map_err(|error| match by_settings {
                true => error.hint("`[driver] choice` in config.toml asks for it"),
                false => error,
            })
        };
        match choice {
            DriverChoice::Firecracker => {
                let found = usable(Driver::Firecracker)?;
                Ok(Chosen {
                    vmm: Box::new(Firecracker::new(found.path)),
                    accelerator: Accelerator::Kvm,
                    reason: why.to_owned(),
                })
            }
            DriverChoice::Qemu => {
                let found = usable(Driver::Qemu)?;
                Ok(self.with_qemu(found, why, &self.kvm(vmlinux)))
            }
            DriverChoice::Auto => self.auto(vmlinux),
        }
    }

    fn auto(&self, vmlinux: Option<&Path>) -> Result<Chosen, ErrorBody> {
        let kvm = self.kvm(vmlinux);
        if kvm == probe::Verdict::Works
            && let Ok(found) = self.usable(Driver::Firecracker)
        {
            return Ok(Chosen {
                vmm: Box::new(Firecracker::new(found.path)),
                accelerator: Accelerator::Kvm,
                reason: "auto: KVM runs guests and Firecracker was found".to_owned(),
            });
        }
        let found = self.usable(Driver::Qemu)?;
        Ok(self.with_qemu(found, "auto", &kvm))
    }

    fn with_qemu(&self, found: Found, why: &str, kvm: &probe::Verdict) -> Chosen {
        let (accelerator, reason) = match kvm {
            probe::Verdict::Works => (Accelerator::Kvm, format!("{why}: KVM runs guests")),
            other => (
                Accelerator::Tcg,
                format!("{why}: software emulation, since {}", describe_kvm(other)),
            ),
        };
        Chosen {
            vmm: Box::new(Qemu::new(found.path)),
            accelerator,
            reason,
        }
    }

    fn usable(&self, driver: Driver) -> Result<Found, ErrorBody> {
        let Some(found) = self.find(driver) else {
            let (program, hint) = match driver {
                Driver::Qemu => (
                    "qemu-system-x86_64",
                    "install QEMU: `sudo apt-get install qemu-system-x86`",
                ),
                Driver::Firecracker => (
                    "firecracker",
                    "install Firecracker: `banger driver install firecracker`",
                ),
            };
            let message = match (driver, &self.config.qemu, &self.config.firecracker) {
                (Driver::Qemu, Some(path), _) | (Driver::Firecracker, _, Some(path)) => {
                    format!(
                        "the VMM `{}` named in config.toml is not there",
                        path.display()
                    )
                }
                _ => format!("the VMM `{program}` is not installed"),
            };
            return Err(ErrorBody::new(ErrorCode::NoDriver, message).hint(hint));
        };
        match &found.verdict {
            Verdict::Known | Verdict::Noted(_) => Ok(found),
            Verdict::Refused(why) => Err(ErrorBody::new(
                ErrorCode::NoDriver,
                format!("`{}` is not used: {why}", found.path.display()),
            )
            .hint("`banger driver list` shows all VMMs that were found")),
        }
    }

    /// All VMMs that were looked for.
    pub(crate) fn list(&self, vmlinux: Option<&Path>) -> Vec<DriverInfo> {
        let kvm = self.kvm(vmlinux);
        let default = self.choose(DriverChoice::Auto, vmlinux);
        let default = default.ok().map(|chosen| chosen.vmm.driver());
        [Driver::Firecracker, Driver::Qemu]
            .into_iter()
            .map(|driver| {
                let found = self.find(driver);
                let (usable, reason) = match (&found, driver) {
                    (None, _) => (false, "not installed".to_owned()),
                    (
                        Some(Found {
                            verdict: Verdict::Refused(why),
                            ..
                        }),
                        _,
                    ) => (false, why.clone()),
                    (Some(_), Driver::Firecracker) if kvm != probe::Verdict::Works => {
                        (false, format!("needs KVM, but {}", describe_kvm(&kvm)))
                    }
                    (Some(_), Driver::Qemu) if kvm != probe::Verdict::Works => (
                        true,
                        format!("by software emulation, since {}", describe_kvm(&kvm)),
                    ),
                    (
                        Some(Found {
                            verdict: Verdict::Noted(note),
                            ..
                        }),
                        _,
                    ) => (true, format!("with KVM; {note}")),
                    (Some(_), _) => (true, "with KVM".to_owned()),
                };
                DriverInfo {
                    driver,
                    path: found.as_ref().map(|found| found.path.display().to_string()),
                    version: found
                        .and_then(|found| found.version)
                        .map(|version| version.to_string()),
                    usable,
                    default: default == Some(driver),
                    reason,
                }
            })
            .collect()
    }
}

/// What is to be said of a verdict, to follow "since" or "but".
pub(crate) fn describe_kvm(verdict: &probe::Verdict) -> String {
    match verdict {
        probe::Verdict::Works => "KVM runs guests".to_owned(),
        probe::Verdict::NoDevice => "there is no /dev/kvm".to_owned(),
        probe::Verdict::NoPermission { group, mode } => {
            format!(
                "this user may not open /dev/kvm (group {group}, mode {:o})",
                mode & 0o777
            )
        }
        probe::Verdict::CannotRunGuests { why } => {
            format!("/dev/kvm cannot run ordinary guests: {why}")
        }
    }
}

/// How instructions are run, for display.
pub(crate) const fn accelerator_name(accelerator: Accelerator) -> &'static str {
    match accelerator {
        Accelerator::Kvm => "kvm",
        Accelerator::Tcg => "tcg",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_is_what_the_settings_say_and_a_vm_that_names_a_driver_gets_that() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let config = DriverConfig {
            choice: DriverChoice::Firecracker,
            qemu: Some(path("qemu")),
            firecracker: Some(path("firecracker")),
        };
        let drivers = Drivers::new(
            config,
            path("installed"),
            path("keeper"),
            path("kvm.json"),
            "boot".to_owned(),
        );
        let wants = |choice| drivers.choose(choice, None).unwrap_err().message;
        assert!(wants(DriverChoice::Auto).contains("/firecracker`"));
        assert!(wants(DriverChoice::Firecracker).contains("/firecracker`"));
        assert!(wants(DriverChoice::Qemu).contains("/qemu`"));
    }
}
