//! Getting a kernel's files together, wherever they come from.

use super::vmlinux::is_release;
use super::{KernelSource, PackageVersion};
use crate::apt;
use crate::context::Context;
use crate::error::BuildError;
use crate::tree::{Content, Entry, Kind, Tree};
use crate::unpack::{Package, read_package};
use std::fs::File;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The largest file that a kernel is looked for in.
const MAX_KERNEL_FILE: u64 = 512 << 20;
/// How many packages are followed from one that only depends on the kernel.
const MAX_HOPS: usize = 4;

/// What a bundle is made from.
pub(crate) struct Material {
    /// The bytes of a `vmlinux` or `bzImage`.
    pub(crate) kernel: Vec<u8>,
    /// Where they came from, for errors.
    pub(crate) origin: PathBuf,
    /// The content of `/lib/modules/<release>`; may be empty.
    pub(crate) modules: Tree,
    /// The release, where a modules folder names it.
    pub(crate) release: Option<String>,
    /// The source in words.
    pub(crate) source: String,
    /// The package, where it is one.
    pub(crate) package: Option<PackageVersion>,
}

pub(crate) fn gather(source: &KernelSource, context: &Context) -> Result<Material, BuildError> {
    match source {
        KernelSource::Distribution => {
            let host = apt::host()?;
            let package = match host.distribution.as_str() {
                "ubuntu" => "linux-image-virtual",
                _ => "linux-image-cloud-amd64",
            };
            from_apt(package, context)
        }
        KernelSource::AptPackage(package) => from_apt(package, context),
        KernelSource::PackageFile(path) => {
            from_package(read_package(path, context)?, path, context, false)
        }
        KernelSource::Files { kernel, modules } => from_files(kernel, modules.as_deref(), context),
    }
}

/// Follows `name` to the package that holds the kernel.
fn from_apt(name: &str, context: &Context) -> Result<Material, BuildError> {
    let mut name = name.to_owned();
    for _ in 0..MAX_HOPS {
        context.tell("download", &name);
        let path = apt::download(&name, context)?;
        let package = read_package(&path, context)?;
        if kernel_path(&package.tree).is_some() {
            return from_package(package, &path, context, true);
        }
        let next = package
            .depends
            .iter()
            .find(|d| d.starts_with("linux-image-") && **d != name);
        name = match next {
            Some(next) => next.clone(),
            None => {
                let reason = "it holds no kernel and depends on none";
                return Err(BuildError::archive(name, reason));
            }
        };
    }
    Err(BuildError::archive(
        name,
        "it depends on too many other packages",
    ))
}

/// The path of the kernel in a package's tree.
fn kernel_path(tree: &Tree) -> Option<&str> {
    tree.entries()
        .map(|(path, _)| path)
        .find(|path| path.starts_with("boot/vmlinuz-"))
}

/// The modules' folder in a package's tree.
fn modules_path(tree: &Tree) -> Option<String> {
    let prefixes = ["lib/modules/", "usr/lib/modules/"];
    tree.entries().find_map(|(path, entry)| {
        let release = prefixes
            .iter()
            .find_map(|prefix| path.strip_prefix(prefix))?;
        let is_folder = matches!(entry.kind, Kind::Directory) && is_release(release);
        is_folder.then(|| path.to_owned())
    })
}

fn from_package(
    package: Package,
    path: &Path,
    context: &Context,
    may_download: bool,
) -> Result<Material, BuildError> {
    let subject = path.display().to_string();
    let inner = kernel_path(&package.tree)
        .ok_or_else(|| BuildError::archive(&*subject, "it holds no boot/vmlinuz-*"))?;
    let kernel = package
        .tree
        .file(inner)
        .ok_or_else(|| BuildError::archive(&*subject, format!("`{inner}` is no file")))?
        .read(&subject, MAX_KERNEL_FILE)?;
    let origin = path.join(inner);
    let mut modules = package.tree.clone();
    // Ubuntu ships a kernel's modules apart.
    let apart = package
        .depends
        .iter()
        .find(|d| d.starts_with("linux-modules-"));
    if modules_path(&modules).is_none()
        && may_download
        && let Some(apart) = apart
    {
        modules = read_package(&apt::download(apart, context)?, context)?.tree;
    }
    let folder = modules_path(&modules);
    let release = folder
        .as_deref()
        .and_then(|folder| folder.rsplit('/').next())
        .map(str::to_owned);
    Ok(Material {
        kernel,
        origin,
        modules: folder
            .map(|folder| modules.subtree(&folder))
            .unwrap_or_default(),
        release,
        source: format!(
            "package {} {}",
            package.version.name, package.version.version
        ),
        package: Some(package.version),
    })
}

fn from_files(
    kernel: &Path,
    modules: Option<&Path>,
    context: &Context,
) -> Result<Material, BuildError> {
    let metadata = std::fs::metadata(kernel).map_err(BuildError::io("read", kernel))?;
    let not_kernel = |found: &str| BuildError::NotKernel {
        path: kernel.to_owned(),
        found: found.to_owned(),
    };
    if metadata.is_dir() {
        return Err(not_kernel("a folder"));
    }
    if metadata.len() > MAX_KERNEL_FILE {
        return Err(not_kernel("a file larger than any kernel"));
    }
    let bytes = std::fs::read(kernel).map_err(BuildError::io("read", kernel))?;
    let mut tree = Tree::default();
    let mut release = None;
    if let Some(folder) = modules {
        let real = folder
            .canonicalize()
            .map_err(BuildError::io("find", folder))?;
        let name = real
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        if !is_release(name) {
            let reason = format!(
                "the modules folder `{}` is not named after one",
                folder.display()
            );
            return Err(BuildError::NoRelease { reason });
        }
        release = Some(name.to_owned());
        add_folder(&mut tree, &real, "", context)?;
    }
    Ok(Material {
        kernel: bytes,
        origin: kernel.to_owned(),
        modules: tree,
        release,
        source: format!("file {}", kernel.display()),
        package: None,
    })
}

/// Adds the files and folders in `folder` to the tree; links and other things are left out.
fn add_folder(
    tree: &mut Tree,
    folder: &Path,
    inner: &str,
    context: &Context,
) -> Result<(), BuildError> {
    context.check()?;
    let entries = std::fs::read_dir(folder).map_err(BuildError::io("list", folder))?;
    for entry in entries {
        let path = entry.map_err(BuildError::io("list", folder))?.path();
        let metadata = std::fs::symlink_metadata(&path).map_err(BuildError::io("read", &path))?;
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
            continue;
        };
        let inner = if inner.is_empty() {
            name.to_owned()
        } else {
            format!("{inner}/{name}")
        };
        let mode = (metadata.permissions().mode() & 0o755) as u16;
        if metadata.is_dir() {
            tree.insert(&inner, Entry::new(Kind::Directory, mode, metadata.mtime()));
            add_folder(tree, &path, &inner, context)?;
        } else if metadata.is_file() {
            // Read now: there may be more files than descriptors.
            let file = if metadata.len() > 1 << 20 {
                let file = File::open(&path).map_err(BuildError::io("read", &path))?;
                Content::Spooled {
                    file: Arc::new(file),
                    offset: 0,
                    length: metadata.len(),
                }
            } else {
                let bytes = std::fs::read(&path).map_err(BuildError::io("read", &path))?;
                Content::Bytes(bytes.into())
            };
            tree.insert(&inner, Entry::new(Kind::File(file), mode, metadata.mtime()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_and_modules_are_found_in_a_package() {
        let mut tree = Tree::default();
        tree.write("boot/vmlinuz-6.1", 0o644, 1, "");
        tree.directory("usr/lib/modules/6.1.0-9", 0o755, 1);
        assert_eq!(kernel_path(&tree), Some("boot/vmlinuz-6.1"));
        assert_eq!(
            modules_path(&tree).as_deref(),
            Some("usr/lib/modules/6.1.0-9")
        );
        assert_eq!(kernel_path(&Tree::default()), None);
        assert_eq!(modules_path(&Tree::default()), None);
    }

    #[test]
    fn a_folder_given_as_kernel_is_called_so() {
        let dir = tempfile::tempdir().unwrap();
        let source = KernelSource::Files {
            kernel: dir.path().to_owned(),
            modules: None,
        };
        let error = gather(&source, &Context::quiet(dir.path())).err().unwrap();
        assert!(error.to_string().contains("a folder"), "{error}");
    }

    #[test]
    fn a_modules_folder_must_be_named_after_a_release() {
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("vmlinux");
        std::fs::write(&kernel, "").unwrap();
        let modules = dir.path().join("modules");
        std::fs::create_dir(&modules).unwrap();
        let source = KernelSource::Files {
            kernel,
            modules: Some(modules),
        };
        let error = gather(&source, &Context::quiet(dir.path())).err().unwrap();
        assert!(matches!(error, BuildError::NoRelease { .. }), "{error}");
    }
}
