//! Builds of images and imports of kernels, as operations.

use super::{Bundle, DEFAULT_NAME, Manifest, STAGING, build_error};
use crate::operations::{Made, Operations, Reporter};
use crate::world::World;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_api::event::EventKind;
use banger_api::image::{BuildImage, ImageRecipe};
use banger_api::kernel::ImportKernel;
use banger_api::operation::{Operation, Progress};
use banger_core::id::{ImageId, KernelId};
use banger_core::name::{ImageName, KernelName};
use banger_image::context::Context;
use banger_image::error::BuildError;
use banger_image::image::{ImageManifest, Recipe, RecipeKind, build_image, packages_sha256};
use banger_image::kernel::{KernelManifest, KernelRequest, KernelSource, build_kernel};
use banger_image::store::publish;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use uuid::Uuid;

fn check_name<T>(name: Result<T, banger_core::name::NameError>) -> Result<T, ErrorBody> {
    name.map_err(|error| ErrorBody::from_error(ErrorCode::InvalidRequest, &error))
}

/// Starts the build of an image.
pub(crate) fn start_build(world: &Arc<World>, request: BuildImage) -> Result<Operation, ErrorBody> {
    let default_name = match request.recipe {
        ImageRecipe::Default => DEFAULT_NAME,
        ImageRecipe::Tiny => "tiny",
    };
    let name = check_name(ImageName::new(
        request
            .name
            .clone()
            .unwrap_or_else(|| default_name.to_owned()),
    ))?;
    let world = Arc::clone(world);
    let operations: Arc<Operations> = Arc::clone(&world.operations);
    Ok(operations.start("image.build", |reporter| {
        build(world, request, name, reporter)
    }))
}

async fn build(
    world: Arc<World>,
    request: BuildImage,
    name: ImageName,
    reporter: Reporter,
) -> Result<Made, ErrorBody> {
    let images = Arc::clone(&world.images);
    let current = images.catalog().named::<ImageManifest>(&name).cloned();
    let current_id = current.as_ref().map(|image| image.manifest.id.to_string());
    let cache = world.paths.cache.clone();
    let parent = world.paths.images();
    let built =
        tokio::task::spawn_blocking(move || -> Result<Option<ImageManifest>, BuildError> {
            let id = ImageId::from_uuid(Uuid::now_v7());
            let staging = Staging::make(&parent, &id.to_string())?;
            let packages = request
                .packages
                .map(|text| (staging.path.with_extension("packages"), text));
            if let Some((path, text)) = &packages {
                std::fs::write(path, text).map_err(|source| BuildError::Io {
                    action: "write",
                    path: path.clone(),
                    source,
                })?;
            }
            let kind = match request.recipe {
                ImageRecipe::Default => RecipeKind::Default {
                    packages: packages.as_ref().map(|(path, _)| path.clone()),
                },
                ImageRecipe::Tiny => RecipeKind::Tiny,
            };
            let wanted = packages_sha256(&kind)?;
            let unchanged = current
                .as_ref()
                .is_some_and(|image| image.manifest.packages_sha256 == wanted);
            let outcome = if unchanged && !request.rebuild {
                Ok(None)
            } else {
                let recipe = Recipe {
                    id,
                    name: Some(name),
                    kind,
                };
                build_image(&recipe, &staging.path, &context(cache, &reporter)).and_then(
                    |manifest| {
                        publish(&staging.path, &parent.join(id.to_string()))
                            .map(|()| Some(manifest))
                    },
                )
            };
            if let Some((path, _)) = &packages {
                // The list was copied for the build alone.
                let _ = std::fs::remove_file(path);
            }
            outcome
        });
    match built.await {
        Ok(Ok(Some(manifest))) => take_in(&world, manifest).await,
        Ok(Ok(None)) => Ok(Made {
            subject: current_id.unwrap_or_default(),
            unchanged: true,
        }),
        Ok(Err(error)) => Err(build_error(&error)),
        Err(error) => Err(ErrorBody::from_error(ErrorCode::Internal, &error)),
    }
}

/// Starts the import of a kernel.
pub(crate) fn start_import(
    world: &Arc<World>,
    request: ImportKernel,
) -> Result<Operation, ErrorBody> {
    let name = check_name(KernelName::new(
        request
            .name
            .clone()
            .unwrap_or_else(|| DEFAULT_NAME.to_owned()),
    ))?;
    let source = kernel_source(&request)?;
    let world = Arc::clone(world);
    let operations: Arc<Operations> = Arc::clone(&world.operations);
    Ok(operations.start("kernel.import", |reporter| {
        import(world, request.reimport, source, name, reporter)
    }))
}

fn kernel_source(request: &ImportKernel) -> Result<KernelSource, ErrorBody> {
    let Some(path) = request.path.as_ref().map(PathBuf::from) else {
        return Ok(KernelSource::Distribution);
    };
    let bad = |message: String| ErrorBody::new(ErrorCode::BadFile, message);
    if !path.is_absolute() {
        return Err(ErrorBody::new(
            ErrorCode::InvalidRequest,
            format!("the path `{}` is not absolute", path.display()),
        ));
    }
    if let Err(error) = std::fs::File::open(&path) {
        return Err(bad(format!("cannot read the kernel `{}`", path.display()))
            .caused_by(&error)
            .hint(
                "give the path of a vmlinux, a bzImage or a linux-image package that you may read",
            ));
    }
    if path.extension().is_some_and(|extension| extension == "deb") {
        return Ok(KernelSource::PackageFile(path));
    }
    Ok(KernelSource::Files {
        kernel: path,
        modules: request.modules.as_ref().map(PathBuf::from),
    })
}

async fn import(
    world: Arc<World>,
    reimport: bool,
    source: KernelSource,
    name: KernelName,
    reporter: Reporter,
) -> Result<Made, ErrorBody> {
    let images = Arc::clone(&world.images);
    let current = images.catalog().named::<KernelManifest>(&name).cloned();
    if let Some(current) = &current
        && !reimport
        && source == KernelSource::Distribution
    {
        return Ok(Made {
            subject: current.manifest.id.to_string(),
            unchanged: true,
        });
    }
    let cache = world.paths.cache.clone();
    let parent = world.paths.kernels();
    let init = world.programs.init.clone();
    let built = tokio::task::spawn_blocking(move || -> Result<KernelManifest, BuildError> {
        let id = KernelId::from_uuid(Uuid::now_v7());
        let staging = Staging::make(&parent, &id.to_string())?;
        let request = KernelRequest {
            id,
            name: Some(name),
            source,
        };
        let manifest = build_kernel(&request, &init, &staging.path, &context(cache, &reporter))?;
        publish(&staging.path, &parent.join(id.to_string()))?;
        Ok(manifest)
    });
    match built.await {
        Ok(Ok(manifest)) => take_in(&world, manifest).await,
        Ok(Err(error)) => Err(build_error(&error)),
        Err(error) => Err(ErrorBody::from_error(ErrorCode::Internal, &error)),
    }
}

/// What was built is in its place: it gets its row and its name.
async fn take_in<M: Manifest>(world: &World, manifest: M) -> Result<Made, ErrorBody> {
    let subject = manifest.id().to_string();
    world.images.add(Bundle::of(manifest)).await?;
    world.hub.publish(EventKind::ImagesChanged);
    Ok(Made {
        subject,
        unchanged: false,
    })
}

fn context(cache_dir: PathBuf, reporter: &Reporter) -> Context {
    let told = reporter.clone();
    Context {
        cache_dir,
        cancel: Arc::clone(&reporter.cancel),
        progress: Box::new(move |step| {
            told.progress(Progress {
                stage: step.stage.to_owned(),
                message: step.message,
                done: step.done,
                total: step.total,
            });
        }),
        apt_options: Vec::new(),
    }
}

/// A folder that is removed again unless it was published.
struct Staging {
    path: PathBuf,
}

impl Staging {
    fn make(parent: &Path, id: &str) -> Result<Self, BuildError> {
        let path = parent.join(format!("{STAGING}{id}"));
        std::fs::create_dir_all(&path).map_err(|source| BuildError::Io {
            action: "make",
            path: path.clone(),
            source,
        })?;
        Ok(Self { path })
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Err(error) = banger_image::store::remove(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a staging folder is left behind");
        }
    }
}
