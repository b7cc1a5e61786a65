//! A VM's scope: the cgroup in which its shim and VMM live, made by the systemd that is nearest, with the limits that
//! were asked for. It ends by itself with the last process in it.

use super::actor::{Actor, Run};
use crate::blocking::blocking;
use crate::record::VmRecord;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_core::id::InstanceId;
use banger_core::name::VmName;
use banger_core::size::CpuLimit;
use banger_host::error_chain;
use banger_host::systemd::{Scope, Systemd, cgroup_of, cpu_limit_of, scope_in};
use banger_vmm::sandbox::{Applied, Layer};

/// What the name of every scope of ours begins with.
const PREFIX: &str = "banger-";
/// What is said where there is nobody to ask.
const NO_SYSTEMD: &str = "no systemd does what this user asks";

/// Puts a shim that starts nothing yet into a scope of its own, so that the VMM is born in it. `None` where nobody can
/// make one; without a limit that was asked for, a missing scope is no error.
///
/// # Errors
/// The limit would not hold.
pub(super) fn make(
    systemd: Option<&Systemd>,
    instance: InstanceId,
    record: &VmRecord,
    shim: u32,
) -> Result<Option<Applied>, ErrorBody> {
    let limit = record.spec.cpu_limit;
    let made = match systemd {
        Some(systemd) => place(systemd, instance, record, shim),
        None if limit.is_none() => return Ok(None),
        None => Err(NO_SYSTEMD.to_owned()),
    };
    match (made, limit) {
        (Err(why), Some(limit)) => {
            let name = &record.name;
            Err(unenforceable(name, limit, why).hint(format!(
                "`banger vm set {name} --cpu-limit none` lets it run without"
            )))
        }
        (made, _) => Ok(Some(Applied {
            layer: Layer::Cgroup,
            missing: made.err(),
        })),
    }
}

fn place(
    systemd: &Systemd,
    instance: InstanceId,
    record: &VmRecord,
    shim: u32,
) -> Result<(), String> {
    // The shim's number makes a name of this attempt alone: what is left of an earlier one stands in nobody's way.
    let unit = format!(
        "{PREFIX}{}-{}-{shim}.scope",
        instance.as_uuid().simple(),
        record.id.as_uuid().simple()
    );
    let description = format!("microVM {} (banger)", record.name);
    let limit = record.spec.cpu_limit.map(CpuLimit::get);
    systemd
        .start_scope(&Scope {
            unit: &unit,
            description: &description,
            process: shim,
            cpu_percent: limit,
        })
        .map_err(|error| error_chain(&error))?;
    match limit {
        // That its job is done says enough.
        None => Ok(()),
        Some(_) => {
            let cgroup = cgroup_of(shim).map_err(|error| error.to_string())?;
            holds(&cgroup, limit)
        }
    }
}

/// Whether the kernel limits `cgroup` like this. systemd itself takes every limit, and leaves out what it cannot do.
fn holds(cgroup: &str, percent: Option<u32>) -> Result<(), String> {
    match cpu_limit_of(cgroup) {
        Ok(now) if now == percent => Ok(()),
        Ok(Some(now)) => Err(format!("the kernel's limit of `{cgroup}` is {now} %")),
        Ok(None) => Err(format!("the kernel knows of no limit of `{cgroup}`")),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(format!(
            "the cgroup controller `cpu` is not delegated to `{cgroup}`"
        )),
        Err(error) => Err(error.to_string()),
    }
}

/// The cgroup of a process, if it is in one of our scopes.
pub(crate) fn of(process: i32) -> Option<String> {
    let cgroup = cgroup_of(u32::try_from(process).ok()?).ok()?;
    scope_in(&cgroup)
        .is_some_and(|unit| unit.starts_with(PREFIX))
        .then_some(cgroup)
}

/// As [`make`], of a shim that has its VMM already.
fn change(shim: u32, limit: Option<CpuLimit>) -> Result<(), String> {
    let percent = limit.map(CpuLimit::get);
    let unlimited = |why: String| percent.map_or(Ok(()), |_| Err(why));
    let cgroup = match cgroup_of(shim) {
        Ok(cgroup) => cgroup,
        Err(error) => return unlimited(error.to_string()),
    };
    let Some(unit) = scope_in(&cgroup).filter(|unit| unit.starts_with(PREFIX)) else {
        return unlimited("it runs in no scope of its own, and gets one when it starts".to_owned());
    };
    match cpu_limit_of(&cgroup) {
        Ok(now) if now == percent => return Ok(()),
        Err(_) if percent.is_none() => return Ok(()),
        Ok(_) | Err(_) => {}
    }
    let systemd = Systemd::nearest().ok_or(NO_SYSTEMD)?;
    systemd
        .limit_cpu(unit, percent)
        .map_err(|error| error_chain(&error))?;
    holds(&cgroup, percent)
}

fn unenforceable(name: &VmName, limit: CpuLimit, why: String) -> ErrorBody {
    let message = format!("the CPU limit of VM `{name}`, {limit}, would not hold");
    let mut error = ErrorBody::new(ErrorCode::HostUnfit, message);
    error.causes.push(why);
    error.hint(
        "limits need systemd and, for an ordinary user, `Delegate=cpu memory pids` in the unit user@.service",
    )
}

impl Actor {
    /// Brings a VM that lives to its limit of CPU time. One that does not live gets it when it starts.
    ///
    /// # Errors
    /// It would not hold.
    pub(super) async fn limit_cpu(&mut self, limit: Option<CpuLimit>) -> Result<(), ErrorBody> {
        let Run::Live(live) = &self.run else {
            return Ok(());
        };
        let shim = live.status.as_ref().map(|status| status.shim_pid);
        let changed = match (shim.and_then(|shim| u32::try_from(shim).ok()), limit) {
            (Some(shim), _) => blocking(move || change(shim, limit)).await?,
            (None, None) => Ok(()),
            (None, Some(_)) => Err("its shim does not answer".to_owned()),
        };
        match (changed, limit) {
            (Ok(()), _) => Ok(()),
            (Err(why), Some(limit)) => Err(unenforceable(&self.record.name, limit, why)),
            (Err(why), None) => {
                let name = &self.record.name;
                let message = format!("the CPU limit of VM `{name}` cannot be taken away");
                let mut error = ErrorBody::new(ErrorCode::Internal, message);
                error.causes.push(why);
                Err(error.hint("nothing was changed; it has none from its next start on if it is taken away while the VM is stopped"))
            }
        }
    }

    /// The same for what another daemon began to change, or what somebody changed by hand.
    pub(super) async fn settle_cpu_limit(&mut self) {
        if let Err(error) = self.limit_cpu(self.record.spec.cpu_limit).await {
            let causes = error.causes.join(": ");
            self.note("recover", format!("{}: {causes}", error.message), None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_nobody_can_hold_is_refused_with_the_way_out_of_it() {
        let name = VmName::new("otter").unwrap();
        let limit = CpuLimit::new(150).unwrap();
        let error = unenforceable(&name, limit, NO_SYSTEMD.to_owned());
        assert_eq!(error.code, ErrorCode::HostUnfit);
        assert_eq!(
            error.message,
            "the CPU limit of VM `otter`, 150%, would not hold"
        );
        assert_eq!(error.causes, [NO_SYSTEMD]);
        assert!(error.hints[0].contains("Delegate=cpu"));
        let missing = holds("/no-such-cgroup", Some(150)).unwrap_err();
        assert!(missing.contains("`cpu` is not delegated"), "{missing}");
    }

    #[test]
    fn a_process_of_nobodys_scope_cannot_be_limited_and_need_not_be_freed() {
        let own = std::process::id();
        assert_eq!(change(own, None), Ok(()));
        assert!(change(own, CpuLimit::new(50).ok()).is_err());
    }
}
