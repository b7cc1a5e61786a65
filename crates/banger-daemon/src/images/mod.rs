//! Images and kernels: the catalog, who pins what, builds and removals.
//!
//! An image or kernel is staged in a folder whose name starts with `.new-`, synced, renamed, and then gets its row.
//! Ids never change; a name is a pointer that moves. What a VM pins is not removed.

mod build;

pub(crate) use build::{start_build, start_import};

use crate::store::Store;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_api::image::Image;
use banger_api::kernel::Kernel;
use banger_api::paths::Paths;
use banger_core::id::{ImageId, KernelId, VmId};
use banger_core::name::{ImageName, KernelName};
use banger_core::spec::{Resolution, resolve};
use banger_image::error::BuildError;
use banger_image::image::ImageManifest;
use banger_image::kernel::KernelManifest;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use uuid::Uuid;

/// The start of a staging folder's name.
pub(crate) const STAGING: &str = ".new-";
/// The name of the image and of the kernel that are used when none is named.
pub(crate) const DEFAULT_NAME: &str = "default";

/// An image's row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageRecord {
    pub(crate) name: Option<ImageName>,
    pub(crate) manifest: ImageManifest,
}

/// A kernel's row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KernelRecord {
    pub(crate) name: Option<KernelName>,
    pub(crate) manifest: KernelManifest,
}

#[derive(Debug, Default)]
struct Catalog {
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

    /// Finds an image by name, id or prefix.
    pub(crate) fn find_image(&self, query: &str) -> Result<ImageRecord, ErrorBody> {
        self.catalog().image(query).cloned()
    }

    /// Finds an image by name, id or prefix, and pins it for `vm`.
    pub(crate) fn pin_image(&self, query: &str, vm: VmId) -> Result<ImageRecord, ErrorBody> {
        let mut catalog = self.catalog();
        let found = catalog.image(query)?.clone();
        catalog
            .pins
            .entry(found.manifest.id.as_uuid())
            .or_default()
            .insert(vm);
        Ok(found)
    }

    /// Finds a kernel by name, id or prefix, and pins it for `vm`.
    pub(crate) fn pin_kernel(&self, query: &str, vm: VmId) -> Result<KernelRecord, ErrorBody> {
        let mut catalog = self.catalog();
        let found = catalog.kernel(query)?.clone();
        catalog
            .pins
            .entry(found.manifest.id.as_uuid())
            .or_default()
            .insert(vm);
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

    /// The image with this id.
    pub(crate) fn image_by_id(&self, id: ImageId) -> Option<ImageRecord> {
        self.catalog()
            .images
            .iter()
            .find(|image| image.manifest.id == id)
            .cloned()
    }

    /// The kernel with this id.
    pub(crate) fn kernel_by_id(&self, id: KernelId) -> Option<KernelRecord> {
        self.catalog()
            .kernels
            .iter()
            .find(|kernel| kernel.manifest.id == id)
            .cloned()
    }

    /// The `vmlinux` of the default kernel, if there is one.
    pub(crate) fn default_vmlinux(&self) -> Option<PathBuf> {
        let catalog = self.catalog();
        let kernel = catalog
            .kernel(DEFAULT_NAME)
            .ok()
            .or_else(|| catalog.kernels.first())?;
        Some(
            self.kernel_folder(kernel.manifest.id)
                .join(banger_image::kernel::VMLINUX),
        )
    }

    pub(crate) fn image_folder(&self, id: ImageId) -> PathBuf {
        self.paths.images().join(id.to_string())
    }

    pub(crate) fn kernel_folder(&self, id: KernelId) -> PathBuf {
        self.paths.kernels().join(id.to_string())
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
        let record = self.catalog().image(query)?.clone();
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
                directory: self.kernel_folder(manifest.id).display().to_string(),
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
        let kernel = catalog.kernel(&self.default_kernel).ok();
        Image {
            kernel: kernel.map(|kernel| kernel.manifest.id),
            id: manifest.id,
            name,
            directory: self.image_folder(manifest.id).display().to_string(),
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

    /// Removes an image that no VM pins; `describe` names one that does.
    pub(crate) async fn delete_image(
        &self,
        query: &str,
        describe: impl Fn(VmId) -> String,
    ) -> Result<(), ErrorBody> {
        let record = {
            let mut catalog = self.catalog();
            let found = catalog.image(query)?.clone();
            catalog.check_unpinned("image", query, found.manifest.id.as_uuid(), describe)?;
            // Out of the catalog first, so that nobody pins it meanwhile.
            catalog
                .images
                .retain(|image| image.manifest.id != found.manifest.id);
            found
        };
        let id = record.manifest.id;
        if let Err(error) = self.store.delete_image(id).await {
            self.catalog().images.push(record);
            return Err(store_error(&error));
        }
        remove_folder(self.image_folder(id)).await
    }

    /// Removes a kernel that no VM pins; `describe` names one that does.
    pub(crate) async fn delete_kernel(
        &self,
        query: &str,
        describe: impl Fn(VmId) -> String,
    ) -> Result<(), ErrorBody> {
        let record = {
            let mut catalog = self.catalog();
            let found = catalog.kernel(query)?.clone();
            catalog.check_unpinned("kernel", query, found.manifest.id.as_uuid(), describe)?;
            // Out of the catalog first, so that nobody pins it meanwhile.
            catalog
                .kernels
                .retain(|kernel| kernel.manifest.id != found.manifest.id);
            found
        };
        let id = record.manifest.id;
        if let Err(error) = self.store.delete_kernel(id).await {
            self.catalog().kernels.push(record);
            return Err(store_error(&error));
        }
        remove_folder(self.kernel_folder(id)).await
    }

    async fn add_image(&self, record: ImageRecord) -> Result<(), ErrorBody> {
        self.store
            .put_image(record.clone())
            .await
            .map_err(|error| store_error(&error))?;
        let mut catalog = self.catalog();
        for other in &mut catalog.images {
            if other.name == record.name {
                other.name = None;
            }
        }
        catalog.images.push(record);
        Ok(())
    }

    async fn add_kernel(&self, record: KernelRecord) -> Result<(), ErrorBody> {
        self.store
            .put_kernel(record.clone())
            .await
            .map_err(|error| store_error(&error))?;
        let mut catalog = self.catalog();
        for other in &mut catalog.kernels {
            if other.name == record.name {
                other.name = None;
            }
        }
        catalog.kernels.push(record);
        Ok(())
    }
}

impl Catalog {
    fn image(&self, query: &str) -> Result<&ImageRecord, ErrorBody> {
        let name = |image: &ImageRecord| image.name.as_ref().map(|name| name.as_str().to_owned());
        find("image", query, &self.images, name, |image| {
            image.manifest.id.to_string()
        })
    }

    fn kernel(&self, query: &str) -> Result<&KernelRecord, ErrorBody> {
        let name =
            |kernel: &KernelRecord| kernel.name.as_ref().map(|name| name.as_str().to_owned());
        find("kernel", query, &self.kernels, name, |kernel| {
            kernel.manifest.id.to_string()
        })
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

/// Finds what `query` means among `all` things of a `kind`, or says what comes close.
pub(crate) fn find<'a, T>(
    kind: &str,
    query: &str,
    all: &'a [T],
    name: impl Fn(&T) -> Option<String>,
    id: impl Fn(&T) -> String,
) -> Result<&'a T, ErrorBody> {
    let named: Vec<(Option<String>, &T)> = all.iter().map(|thing| (name(thing), thing)).collect();
    let describe = |name: &Option<String>, thing: &T| match name {
        Some(name) => format!("{name} ({})", id(thing)),
        None => id(thing),
    };
    match resolve(
        query,
        &named,
        |(name, _)| name.as_deref(),
        |(_, thing)| id(thing),
    ) {
        Resolution::One((_, found)) => Ok(found),
        Resolution::Many(candidates) => {
            let list: Vec<String> = candidates
                .iter()
                .map(|(name, thing)| describe(name, thing))
                .collect();
            let message = format!(
                "`{}` fits {} {kind}s: {}",
                query.escape_debug(),
                list.len(),
                list.join(", ")
            );
            Err(ErrorBody::new(ErrorCode::Ambiguous, message)
                .hint("type more of the one that is meant"))
        }
        Resolution::None => {
            let error = ErrorBody::new(
                ErrorCode::NotFound,
                format!("there is no {kind} `{}`", query.escape_debug()),
            );
            let close = named
                .iter()
                .filter_map(|(name, _)| name.as_deref())
                .min_by_key(|name| distance(name, query));
            Err(match close.filter(|name| distance(name, query) <= 2.max(query.len() / 3)) {
                Some(name) => error.hint(format!("did you mean `{name}`?")),
                None => error.hint(match kind {
                    "image" => "`banger image list` shows all; `banger image build` makes the default one".to_owned(),
                    "kernel" => "`banger kernel list` shows all; `banger kernel import` makes the default one".to_owned(),
                    _ => format!("`banger {} list` shows all", kind.to_ascii_lowercase()),
                }),
            })
        }
    }
}

/// The edit distance between two texts.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(128).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().take(128).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

async fn remove_folder(folder: PathBuf) -> Result<(), ErrorBody> {
    let removed = tokio::task::spawn_blocking(move || banger_image::store::remove(&folder)).await;
    match removed {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(build_error(&error)),
        Err(error) => Err(ErrorBody::from_error(ErrorCode::Internal, &error)),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn look(query: &str) -> Result<String, ErrorBody> {
        let all = [
            ("calm-otter", "0198aa"),
            ("calm-fox", "0198ab"),
            ("default", "0299cc"),
        ];
        find(
            "image",
            query,
            &all,
            |c| Some(c.0.to_owned()),
            |c| c.1.to_owned(),
        )
        .map(|c| c.0.to_owned())
    }

    #[test]
    fn a_misspelt_name_gets_a_suggestion() {
        let error = look("defualt").unwrap_err();
        assert_eq!(error.code, ErrorCode::NotFound);
        assert_eq!(error.hints, ["did you mean `default`?"]);
        assert!(look("zzzzzzzz").unwrap_err().hints[0].contains("banger image list"));
    }

    #[test]
    fn an_ambiguous_prefix_lists_its_candidates() {
        let error = look("calm").unwrap_err();
        assert_eq!(error.code, ErrorCode::Ambiguous);
        assert!(
            error.message.contains("calm-otter (0198aa)") && error.message.contains("calm-fox")
        );
    }
}
