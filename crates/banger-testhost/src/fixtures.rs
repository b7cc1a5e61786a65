//! The image and the kernel that guests in tests boot: an `XDG_DATA_HOME` in the build folder, made once.

use crate::Result;
use crate::error::Error;
use banger_core::id::{ImageId, KernelId};
use banger_image::image::{self, Recipe, RecipeKind};
use banger_image::kernel::{self, KernelRequest, KernelSource};
use banger_image::{BuildError, Context, publish};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Sees to it that below `data_home` there are the tiny image and the default kernel, with `init` in its initrd.
/// Returns the folders of both.
///
/// # Errors
/// They cannot be made.
pub fn ensure(data_home: &Path, init: &Path) -> Result<(PathBuf, PathBuf)> {
    let banger = data_home.join("banger");
    let mut context = Context::quiet(data_home.join("cache"));
    context.progress = Box::new(|progress| eprintln!("{}: {}", progress.stage, progress.message));
    let kernel = ensure_one(
        "kernel",
        &banger.join("kernels"),
        usable_kernel(init),
        |id, to| {
            let request = KernelRequest {
                id: KernelId::from_uuid(id),
                name: "default".parse().ok(),
                source: KernelSource::Distribution,
            };
            kernel::build_kernel(&request, init, to, &context).map(|_| ())
        },
    )?;
    let image = ensure_one("image", &banger.join("images"), usable_image, |id, to| {
        let recipe = Recipe {
            id: ImageId::from_uuid(id),
            name: "tiny".parse().ok(),
            kind: RecipeKind::Tiny,
        };
        image::build_image(&recipe, to, &context).map(|_| ())
    })?;
    Ok((image, kernel))
}

fn usable_kernel(init: &Path) -> impl Fn(&Path) -> bool {
    move |folder| {
        kernel::read_manifest(folder).is_ok() && kernel::refresh_initrd(folder, init).is_ok()
    }
}

fn usable_image(folder: &Path) -> bool {
    let current = image::packages_sha256(&RecipeKind::Tiny);
    match (image::read_manifest(folder), current) {
        (Ok(manifest), Ok(current)) => manifest.packages_sha256 == current,
        _ => false,
    }
}

/// The one in `store` that is usable, or a new one in place of all others.
fn ensure_one(
    what: &'static str,
    store: &Path,
    usable: impl Fn(&Path) -> bool,
    build: impl FnOnce(Uuid, &Path) -> std::result::Result<(), BuildError>,
) -> Result<PathBuf> {
    std::fs::create_dir_all(store).map_err(Error::io("make", store))?;
    for entry in std::fs::read_dir(store).map_err(Error::io("list", store))? {
        let folder = entry.map_err(Error::io("list", store))?.path();
        if usable(&folder) {
            return Ok(folder);
        }
        std::fs::remove_dir_all(&folder).map_err(Error::io("remove", &folder))?;
    }
    let id = Uuid::now_v7();
    let staging = store.join(format!(".{id}"));
    std::fs::create_dir(&staging).map_err(Error::io("make", &staging))?;
    let folder = store.join(id.to_string());
    build(id, &staging)
        .and_then(|()| publish(&staging, &folder))
        .map_err(|source| Error::Fixture { what, source })?;
    Ok(folder)
}
