//! Between the wire and the domain, in one place.

use crate::images::ImageRecord;
use crate::vm::files::VmFiles;
use crate::vm::{Change, View};
use crate::world::World;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_api::vm::{SetVm, Vm};
use banger_core::decide::{Deny, Request};
use banger_core::id::KernelId;
use banger_core::name::VmName;
use banger_core::publish::PublishedPort;
use banger_core::size::{CpuLimit, DiskBytes, MemoryMib, SizeError, VcpuCount};
use banger_core::spec::{BootPatch, LivePatch, VmSpecPatch};
use banger_image::image::ImageManifest;
use banger_image::kernel::KernelManifest;

/// A VM on the wire.
pub(crate) fn vm(world: &World, view: &View) -> Vm {
    let record = &view.record;
    Vm {
        id: record.id,
        name: record.name.clone(),
        phase: view.phase.clone(),
        address: record.address,
        mac: record.id.mac(),
        spec: record.spec.clone(),
        generation: record.generation,
        desired: record.desired,
        revision: view.revision,
        image_name: world
            .images
            .by_id::<ImageManifest>(record.spec.image)
            .and_then(|image| image.name)
            .map(Into::into),
        kernel_name: world
            .images
            .by_id::<KernelManifest>(record.spec.kernel)
            .and_then(|kernel| kernel.name)
            .map(Into::into),
        storage_reason: record.storage_reason.clone(),
        attempt: view.attempt.clone(),
        boot: view.boot.clone().or_else(|| record.boot.clone()),
        host_key: record.host_key_public.clone(),
        created_at: record.created_at,
        trashed_at: record.trashed_at,
        directory: VmFiles::of(&world.paths, record.id)
            .folder
            .display()
            .to_string(),
    }
}

/// An invalid value's error on the wire.
pub(crate) fn invalid(error: &(dyn std::error::Error + 'static)) -> ErrorBody {
    ErrorBody::from_error(ErrorCode::InvalidRequest, error)
}

pub(crate) fn vcpus(value: u64) -> Result<VcpuCount, ErrorBody> {
    VcpuCount::new(value).map_err(|error: SizeError| invalid(&error))
}

pub(crate) fn memory(value: u64) -> Result<MemoryMib, ErrorBody> {
    MemoryMib::new(value).map_err(|error| invalid(&error))
}

pub(crate) fn disk(value: u64) -> Result<DiskBytes, ErrorBody> {
    DiskBytes::new(value).map_err(|error| invalid(&error))
}

/// What may be asked for of a VM that is there: 0 takes its limit away.
fn cpu_limit(value: u64) -> Result<Option<CpuLimit>, ErrorBody> {
    match value {
        0 => Ok(None),
        value => cpu_limit_of_new(value).map(Some),
    }
}

pub(crate) fn cpu_limit_of_new(value: u64) -> Result<CpuLimit, ErrorBody> {
    CpuLimit::new(value).map_err(|error| invalid(&error))
}

/// A published port has a place on the host.
pub(crate) fn published(port: &PublishedPort) -> Result<(), ErrorBody> {
    if port.listen.port() != 0 {
        return Ok(());
    }
    let message = format!("the published port {port} names no port of the host");
    Err(ErrorBody::new(ErrorCode::InvalidRequest, message).hint("choose one from 1 to 65535"))
}

/// A change of a VM; `image` and `kernel` are those that the request names.
pub(crate) fn change(
    request: &SetVm,
    image: Option<ImageRecord>,
    kernel: Option<KernelId>,
) -> Result<Change, ErrorBody> {
    let name = request.name.as_deref().map(VmName::new).transpose();
    Ok(Change {
        patch: patch(request)?,
        name: name.map_err(|error| invalid(&error))?,
        image: image.map(Box::new),
        kernel,
        overlay_bytes: request.overlay_bytes.map(disk).transpose()?,
        disk_bytes: request.disk_bytes.map(disk).transpose()?,
        generation: request.generation,
    })
}

fn patch(request: &SetVm) -> Result<VmSpecPatch, ErrorBody> {
    Ok(VmSpecPatch {
        boot: BootPatch {
            vcpus: request.vcpus.map(vcpus).transpose()?,
            memory_mib: request.memory_mib.map(memory).transpose()?,
            driver: request.driver,
        },
        live: LivePatch {
            nat: request.nat,
            nat_private: request.nat_private,
            autostart: request.autostart,
            cpu_limit: request.cpu_limit.map(cpu_limit).transpose()?,
            ..LivePatch::default()
        },
    })
}

/// Nothing is begun any more.
pub(crate) fn going_down() -> ErrorBody {
    ErrorBody::new(ErrorCode::ShuttingDown, "the daemon is going down").hint("repeat the command")
}

/// A refusal on the wire: what stands in the way, and the verb that helps.
pub(crate) fn denied(name: &VmName, deny: Deny, request: Request) -> ErrorBody {
    let verb = request.verb();
    let (code, why, hint) = match deny {
        Deny::Paused => (
            ErrorCode::WrongPhase,
            "it is paused",
            format!("`banger vm resume {name}` lets it run on"),
        ),
        Deny::PausedByFullDisk => (
            ErrorCode::WrongPhase,
            "it is paused because the host's disk is full",
            format!("free some space and `banger vm resume {name}`, or `banger vm kill {name}`"),
        ),
        Deny::Starting => (
            ErrorCode::WrongPhase,
            "it is starting",
            format!(
                "`banger vm wait {name}` waits for it, `banger vm stop {name}` cancels the start"
            ),
        ),
        Deny::Stopping => (
            ErrorCode::WrongPhase,
            "it is stopping",
            format!(
                "`banger vm wait {name} --for stopped` waits for it; `banger vm restart {name}` starts it again then"
            ),
        ),
        Deny::Running => (
            ErrorCode::WrongPhase,
            "it is running",
            format!("`banger vm stop {name}` first"),
        ),
        Deny::Stopped => (
            ErrorCode::WrongPhase,
            "it is stopped",
            format!("`banger vm start {name}` first"),
        ),
        Deny::Unreachable => (
            ErrorCode::Unreachable,
            "a process of it is alive but does not answer",
            format!("`banger vm kill {name}` ends it"),
        ),
        Deny::NeedsForce => (
            ErrorCode::WrongPhase,
            "it is not stopped",
            format!("`banger vm stop {name}` first, or `banger vm delete --force {name}`"),
        ),
        Deny::Trashed => (
            ErrorCode::WrongPhase,
            "it is in the trash",
            format!("`banger vm undelete {name}` brings it back"),
        ),
    };
    ErrorBody::new(code, format!("cannot {verb} VM `{name}`: {why}")).hint(hint)
}
