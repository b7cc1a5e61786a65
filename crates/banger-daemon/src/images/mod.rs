//! Images and kernels: the catalog, who pins what, builds and removals.
//!
//! An image or kernel is staged in a folder whose name starts with `.new-`, synced, renamed, and then gets its row.
//! Ids never change; a name is a pointer that moves. What a VM pins is not removed.

mod build;
mod bundle;
mod find;

pub(crate) use build::{start_build, start_import};
pub(crate) use bundle::{Bundle, ImageRecord, KernelRecord, Manifest};
pub(crate) use find::find;

use crate::blocking::blocking;
use crate::store::Store;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_api::image::Image;
use banger_api::kernel::Kernel;
use banger_api::paths::Paths;
use banger_core::id::{ImageId, KernelId, VmId};
use banger_image::error::BuildError;
use banger_image::image::ImageManifest;
use banger_image::kernel::KernelManifest;
use jiff::Timestamp;
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use uuid::Uuid;

/// The start of a staging folder's name.
pub(crate) const STAGING: &str = ".new-";
/// The name of the image and of the kernel that are used when none is named.
pub(crate) const DEFAULT_NAME: &str = "default";

#[derive(Debug, Default)]
pub(crate) struct Catalog {
    images: Vec<ImageRecord>,
    kernels: Vec<KernelRecord>,
    /// Which VMs use an image or kernel, by its id.
    pins: HashMap<Uuid, HashSet<VmId>>,
}

/// The catalog of images and kernels.
#[derive(Debug)]
pub(crate) struct Images {
    paths: Paths,
    store: Store,
    /// What VMs boot that name no kernel: no image has one of its own.
    default_kernel: String,
    catalog: Mutex<Catalog>,
}

impl Images {
    pub(crate) fn new(
        paths: Paths,
        store: Store,
        default_kernel: Option<String>,
        images: Vec<ImageRecord>,
        kernels: Vec<KernelRecord>,
    ) -> Self {
        Self {
            paths,
            store,
            default_kernel: default_kernel.unwrap_or_else(|| DEFAULT_NAME.to_owned()),
            catalog: Mutex::new(Catalog {
                images,
                kernels,
                pins: HashMap::new(),
            }),
        }
    }

    fn catalog(&self) -> MutexGuard<'_, Catalog> {
        self.catalog.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds an image or a kernel by name, id or prefix.
    pub(crate) fn find<M: Manifest>(&self, query: &str) -> Result<Bundle<M>, ErrorBody> {
        self.catalog().find(query).cloned()
    }

    /// The same, and pins it for `vm`.
    pub(crate) fn pin<M: Manifest>(&self, query: &str, vm: VmId) -> Result<Bundle<M>, ErrorBody> {
        let mut catalog = self.catalog();
        let found = catalog.find::<M>(query)?.clone();
        let pins = catalog.pins.entry(found.manifest.uuid()).or_default();
        pins.insert(vm);
        Ok(found)
    }

    /// Pins what a VM that is there already uses.
    pub(crate) fn pin_known(&self, image: ImageId, kernel: KernelId, vm: VmId) {
        let mut catalog = self.catalog();
        catalog.pins.entry(image.as_uuid()).or_default().insert(vm);
        catalog.pins.entry(kernel.as_uuid()).or_default().insert(vm);
    }

    /// Makes these all that `vm` pins.
    pub(crate) fn repin(&self, image: ImageId, kernel: KernelId, vm: VmId) {
        let mut catalog = self.catalog();
        for pins in catalog.pins.values_mut() {
            pins.remove(&vm);
        }
        for used in [image.as_uuid(), kernel.as_uuid()] {
            catalog.pins.entry(used).or_default().insert(vm);
        }
    }

    /// Forgets all pins of `vm`.
    pub(crate) fn unpin(&self, vm: VmId) {
        for pins in self.catalog().pins.values_mut() {
            pins.remove(&vm);
        }
    }

    /// The image or kernel with this id.
    pub(crate) fn by_id<M: Manifest>(&self, id: M::Id) -> Option<Bundle<M>> {
        let catalog = self.catalog();
        let mut all = M::all(&catalog).iter();
        all.find(|bundle| bundle.manifest.id() == id).cloned()
    }

    /// The `vmlinux` of the default kernel, if there is one.
    pub(crate) fn default_vmlinux(&self) -> Option<PathBuf> {
        let catalog = self.catalog();
        let default = catalog.find::<KernelManifest>(DEFAULT_NAME).ok();
        let kernel = default.or_else(|| catalog.kernels.first())?;
        let folder = self.folder::<KernelManifest>(kernel.manifest.id);
        Some(folder.join(banger_image::kernel::VMLINUX))
    }

    /// Where the files of the image or kernel with this id are.
    pub(crate) fn folder<M: Manifest>(&self, id: M::Id) -> PathBuf {
        M::shelf(&self.paths).join(id.to_string())
    }

    /// All images.
    pub(crate) fn images(&self) -> Vec<Image> {
        let records = self.catalog().images.clone();
        records
            .into_iter()
            .map(|record| self.show_image(record))
            .collect()
    }

    /// One image.
    pub(crate) fn image(&self, query: &str) -> Result<Image, ErrorBody> {
        let record = self.find(query)?;
        Ok(self.show_image(record))
    }

    /// All kernels.
    pub(crate) fn kernels(&self) -> Vec<Kernel> {
        let records = self.catalog().kernels.clone();
        records
            .into_iter()
            .map(|KernelRecord { name, manifest }| Kernel {
                id: manifest.id,
                name,
                directory: self
                    .folder::<KernelManifest>(manifest.id)
                    .display()
                    .to_string(),
                release: manifest.release,
                source: manifest.source,
                digest: manifest.vmlinux_sha256,
                bytes: manifest.bytes,
                created_at: Timestamp::from_second(manifest.created).unwrap_or_default(),
            })
            .collect()
    }

    fn show_image(&self, ImageRecord { name, manifest }: ImageRecord) -> Image {
        let catalog = self.catalog();
        let kernel = catalog.find::<KernelManifest>(&self.default_kernel).ok();
        Image {
            kernel: kernel.map(|kernel| kernel.manifest.id),
            id: manifest.id,
            name,
            directory: self
                .folder::<ImageManifest>(manifest.id)
                .display()
                .to_string(),
            source: manifest.source,
            digest: manifest.sha256,
            bytes: manifest.bytes,
            packages_digest: Some(manifest.packages_sha256),
            packages: manifest
                .packages
                .into_iter()
                .map(|p| format!("{} {}", p.name, p.version))
                .collect(),
            init: manifest.init,
            created_at: Timestamp::from_second(manifest.created).unwrap_or_default(),
        }
    }

    /// Removes an image or kernel that no VM pins; `describe` names one that does.
    pub(crate) async fn delete<M: Manifest>(
        &self,
        query: &str,
        describe: impl Fn(VmId) -> String,
    ) -> Result<(), ErrorBody> {
        let bundle = {
            let mut catalog = self.catalog();
            let found = catalog.find::<M>(query)?.clone();
            catalog.check_unpinned(M::KIND, query, found.manifest.uuid(), describe)?;
            // Out of the catalog first, so that nobody pins it meanwhile.
            M::all_mut(&mut catalog).retain(|other| other.manifest.id() != found.manifest.id());
            found
        };
        let id = bundle.manifest.id();
        if let Err(error) = self.store.delete_bundle::<M>(id).await {
            M::all_mut(&mut self.catalog()).push(bundle);
            return Err(store_error(&error));
        }
        remove_folder(self.folder::<M>(id)).await
    }

    async fn add<M: Manifest>(&self, bundle: Bundle<M>) -> Result<(), ErrorBody> {
        let row = bundle.clone();
        let put = self.store.put_bundle(row).await;
        put.map_err(|error| store_error(&error))?;
        let mut catalog = self.catalog();
        let all = M::all_mut(&mut catalog);
        for other in all.iter_mut() {
            if other.name == bundle.name {
                other.name = None;
            }
        }
        all.push(bundle);
        Ok(())
    }
}

impl Catalog {
    fn find<M: Manifest>(&self, query: &str) -> Result<&Bundle<M>, ErrorBody> {
        let name = |bundle: &Bundle<M>| bundle.name.as_ref().map(ToString::to_string);
        let id = |bundle: &Bundle<M>| bundle.manifest.id().to_string();
        find(M::KIND, query, M::all(self), name, id)
    }

    /// What has this very name.
    fn named<M: Manifest>(&self, name: &M::Name) -> Option<&Bundle<M>> {
        let mut all = M::all(self).iter();
        all.find(|bundle| bundle.name.as_ref() == Some(name))
    }

    fn check_unpinned(
        &self,
        kind: &str,
        query: &str,
        id: Uuid,
        describe: impl Fn(VmId) -> String,
    ) -> Result<(), ErrorBody> {
        let pins = self.pins.get(&id).into_iter().flatten();
        let mut pins: Vec<String> = pins.copied().map(describe).collect();
        pins.sort();
        if pins.is_empty() {
            return Ok(());
        }
        let message = format!(
            "{kind} `{query}` is used by {} VM(s): {}",
            pins.len(),
            pins.join(", ")
        );
        Err(ErrorBody::new(ErrorCode::InUse, message)
            .hint("`banger vm delete --purge VM` frees it, also for a VM in the trash (`banger vm list --trash`)"))
    }
}

async fn remove_folder(folder: PathBuf) -> Result<(), ErrorBody> {
    let removed = blocking(move || banger_image::store::remove(&folder)).await?;
    removed.map_err(|error| build_error(&error))
}

/// A store's error on the wire.
pub(crate) fn store_error(error: &crate::store::StoreError) -> ErrorBody {
    use crate::store::StoreError;
    match error {
        StoreError::NameTaken(_) => ErrorBody::from_error(ErrorCode::NameTaken, error)
            .hint("choose another name; `banger vm list` shows those that are taken"),
        StoreError::Newer { .. } => ErrorBody::from_error(ErrorCode::NewerSchema, error)
            .hint("install that version of banger or a newer one; nothing was changed"),
        _ if error.is_no_space() => ErrorBody::from_error(ErrorCode::NoSpace, error)
            .hint("free some space and repeat the command"),
        _ => ErrorBody::from_error(ErrorCode::Internal, error)
            .hint("`banger daemon logs` tells more"),
    }
}

/// A build's error on the wire.
pub(crate) fn build_error(error: &BuildError) -> ErrorBody {
    let code = match error {
        BuildError::Cancelled => ErrorCode::Cancelled,
        _ if error.is_disk_full() => ErrorCode::NoSpace,
        BuildError::NotKernel { .. }
        | BuildError::BadArchive { .. }
        | BuildError::PackageList { .. } => ErrorCode::BadFile,
        BuildError::ProgramMissing { .. }
        | BuildError::NoSubordinateIds { .. }
        | BuildError::NoAptLists => ErrorCode::HostUnfit,
        _ => ErrorCode::Internal,
    };
    let body = ErrorBody::from_error(code, error);
    match error.hint() {
        Some(hint) => body.hint(hint),
        None => body,
    }
}
