//! How a VM is made: what a request asks for is checked, its folder is put together beside the others, its row is
//! committed, and the folder gets its name. Who has which name and address is the registry's.

use crate::blocking::blocking;
use crate::crash::{Side, point};
use crate::images::{DEFAULT_NAME, store_error};
use crate::record::VmRecord;
use crate::storage::{self, Layer};
use crate::vm::files::{self, VmFiles, io_error};
use crate::world::World;
use crate::{convert, keys};
use banger_api::error::{ErrorBody, ErrorCode};
use banger_api::vm::CreateVm;
use banger_core::id::VmId;
use banger_core::name::VmName;
use banger_core::phase::{Desired, StopReason};
use banger_core::publish::PublishedPort;
use banger_core::size::DiskBytes;
use banger_core::spec::{
    DEFAULT_MEMORY_MIB, DEFAULT_OVERLAY_BYTES, DEFAULT_VCPUS, StorageChoice, VmSpec,
};
use banger_image::image::ImageManifest;
use banger_image::kernel::KernelManifest;
use jiff::Timestamp;
use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;
use uuid::Uuid;

/// The ports of a request, none of which may stand in another's way.
fn published(ports: &[PublishedPort]) -> Result<BTreeSet<PublishedPort>, ErrorBody> {
    let mut published = BTreeSet::<PublishedPort>::new();
    for port in ports {
        convert::published(port)?;
        if let Some(other) = published.iter().find(|other| other.collides(port)) {
            let message = format!("the ports {other} and {port} want the same place on the host");
            return Err(ErrorBody::new(ErrorCode::InvalidRequest, message)
                .hint("give one of them another port of the host"));
        }
        published.insert(port.clone());
    }
    Ok(published)
}

/// Checks the request and everything it names.
pub(crate) fn draft(
    world: &World,
    request: &CreateVm,
    id: VmId,
    idempotency_key: Option<String>,
) -> Result<Draft, ErrorBody> {
    let defaults = &world.config.defaults;
    let choose = |asked: Option<u64>, configured: Option<u64>, fallback| {
        asked.or(configured).unwrap_or(fallback)
    };
    let vcpus = convert::vcpus(choose(request.vcpus, defaults.vcpus, DEFAULT_VCPUS))?;
    let memory_mib = convert::memory(choose(
        request.memory_mib,
        defaults.memory_mib,
        DEFAULT_MEMORY_MIB,
    ))?;
    let overlay_bytes = convert::disk(choose(
        request.overlay_bytes,
        defaults.overlay_bytes,
        DEFAULT_OVERLAY_BYTES,
    ))?;
    let disk_bytes: Option<DiskBytes> = request.disk_bytes.map(convert::disk).transpose()?;
    let image_query = request
        .image
        .as_deref()
        .or(defaults.image.as_deref())
        .unwrap_or(DEFAULT_NAME);
    let kernel_query = request
        .kernel
        .as_deref()
        .or(defaults.kernel.as_deref())
        .unwrap_or(DEFAULT_NAME);
    let image = world.images.pin::<ImageManifest>(image_query, id)?;
    let kernel = world.images.pin::<KernelManifest>(kernel_query, id)?;
    let ports = published(&request.ports)?;
    let storage = match request.storage {
        StorageChoice::Auto => world.config.storage.choice,
        asked => asked,
    };
    let (storage, storage_reason) =
        storage::choose(world, storage).map_err(|error| storage::impossible(&error))?;
    let cpu_limit = request
        .cpu_limit
        .map(convert::cpu_limit_of_new)
        .transpose()?;
    if request.start {
        // What cannot run is not created.
        let vmlinux = world
            .images
            .folder::<KernelManifest>(kernel.manifest.id)
            .join(banger_image::kernel::VMLINUX);
        world.drivers.choose(request.driver, Some(&vmlinux))?;
    }
    let keys = keys::generate("banger")
        .map_err(|error| ErrorBody::from_error(ErrorCode::Internal, &error))?;
    let spec = VmSpec {
        image: image.manifest.id,
        kernel: kernel.manifest.id,
        vcpus,
        memory_mib,
        overlay_bytes,
        disk_bytes,
        driver: request.driver,
        storage,
        nat: request.nat,
        nat_private: request.nat_private,
        ports,
        joins: BTreeSet::new(),
        autostart: request.autostart,
        cpu_limit,
    };
    Ok(Draft {
        id,
        spec,
        keys,
        image_digest: image.manifest.sha256,
        storage_reason,
        idempotency_key,
    })
}

/// A VM that lacks only its name and address.
pub(crate) struct Draft {
    id: VmId,
    pub(crate) spec: VmSpec,
    keys: keys::KeyPair,
    image_digest: String,
    storage_reason: String,
    idempotency_key: Option<String>,
}

impl Draft {
    /// The record of the new VM.
    pub(crate) fn complete(self, name: VmName, address: Ipv4Addr) -> VmRecord {
        VmRecord {
            id: self.id,
            name,
            disk_uuid: self.spec.disk_bytes.map(|_| Uuid::now_v7()),
            spec: self.spec,
            generation: 1,
            desired: Desired::Off,
            record_version: 1,
            address,
            host_key: self.keys.private,
            host_key_public: self.keys.public,
            overlay_uuid: Uuid::now_v7(),
            image_digest: self.image_digest,
            storage_reason: self.storage_reason,
            last_stop: StopReason::NeverStarted,
            last_attempt: None,
            started_once: false,
            reset_pending: false,
            boot: None,
            created_at: Timestamp::now(),
            trashed_at: None,
            purging: false,
            idempotency_key: self.idempotency_key,
        }
    }
}

/// Stages the VM's folder, commits its row, and gives the folder its name. After an error nothing is left.
pub(crate) async fn make(world: &Arc<World>, record: &VmRecord) -> Result<(), ErrorBody> {
    let staging = VmFiles::staging(&world.paths, record.id);
    let staged = {
        let (world, record, staging) = (Arc::clone(world), record.clone(), staging.clone());
        blocking(move || stage(&world, &record, &staging)).await
    };
    let committed = match staged.flatten() {
        Ok(()) => {
            point("create", "row", Side::Before);
            let stored = world
                .store
                .insert_vm(record.clone())
                .await
                .map_err(|error| store_error(&error));
            point("create", "row", Side::After);
            stored
        }
        Err(error) => Err(error),
    };
    let folder = VmFiles::of(&world.paths, record.id).folder;
    let published = committed.and_then(|()| {
        point("create", "publish", Side::Before);
        let renamed = std::fs::rename(&staging.folder, &folder);
        point("create", "publish", Side::After);
        renamed.map_err(|error| io_error("make", &folder, &error))
    });
    if published.is_err() {
        // The row may be there; without a folder it must not be.
        if let Err(error) = world.store.delete_vm(record.id).await {
            tracing::error!(vm = %record.id, %error, "the row of a VM that was not made is left");
        }
        if let Err(error) = tokio::fs::remove_dir_all(&staging.folder).await
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::error!(folder = %staging.folder.display(), %error, "a staging folder is left");
        }
    }
    published
}

fn stage(world: &World, record: &VmRecord, staging: &VmFiles) -> Result<(), ErrorBody> {
    point("create", "stage", Side::Before);
    files::make_folder(&staging.folder)
        .map_err(|error| io_error("make", &staging.folder, &error))?;
    let layer = Layer::of(world, record, staging)?;
    world.storage.driver(record.spec.storage).create(&layer)?;
    if let (Some(uuid), Some(bytes)) = (record.disk_uuid, record.spec.disk_bytes) {
        storage::make_empty(&world.paths.cache, bytes.get(), &staging.disk(), uuid)?;
    }
    record
        .mirror(&staging.folder, None)
        .map_err(|error| io_error("write", &staging.folder, &error))?;
    point("create", "stage", Side::After);
    Ok(())
}
