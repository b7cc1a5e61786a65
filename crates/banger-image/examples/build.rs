//! Builds a kernel bundle or an image by hand: `build kernel SOURCE INIT OUT CACHE [APT-OPTION…]`,
//! `build image default|tiny OUT CACHE`. SOURCE is `distribution`, a package's name, a `.deb`, or a kernel.

use banger_image::image::{Recipe, RecipeKind, build_image};
use banger_image::kernel::{KernelRequest, KernelSource, build_kernel};
use banger_image::{BuildError, Context};
use std::path::Path;
use uuid::Uuid;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let started = std::time::Instant::now();
    let context = |cache: &str, options: &[String]| Context {
        progress: Box::new(|progress| eprintln!("{progress:?}")),
        apt_options: options.to_vec(),
        ..Context::quiet(cache)
    };
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["kernel", source, init, out, cache, ..] => {
            let source = match *source {
                "distribution" => KernelSource::Distribution,
                path if path.ends_with(".deb") => KernelSource::PackageFile(path.into()),
                path if path.contains('/') => KernelSource::Files {
                    kernel: path.into(),
                    modules: None,
                },
                name => KernelSource::AptPackage(name.to_owned()),
            };
            let request = KernelRequest {
                id: banger_core::id::KernelId::from_uuid(Uuid::now_v7()),
                name: None,
                source,
            };
            let context = context(cache, &arguments[5..]);
            build_kernel(&request, Path::new(init), Path::new(out), &context)
                .map(|manifest| format!("{manifest:#?}"))
        }
        ["image", kind, out, cache] => {
            let recipe = Recipe {
                id: banger_core::id::ImageId::from_uuid(Uuid::now_v7()),
                name: None,
                kind: match *kind {
                    "tiny" => RecipeKind::Tiny,
                    _ => RecipeKind::Default { packages: None },
                },
            };
            build_image(&recipe, Path::new(out), &context(cache, &[]))
                .map(|manifest| format!("{manifest:#?}"))
        }
        _ => {
            eprintln!(
                "usage: build kernel SOURCE INIT OUT CACHE | build image default|tiny OUT CACHE"
            );
            std::process::exit(2);
        }
    };
    match result {
        Ok(text) => println!("{text}"),
        Err(error) => {
            complain(&error);
            std::process::exit(1);
        }
    }
    println!("{:.2?}", started.elapsed());
}

fn complain(error: &BuildError) {
    eprintln!("error: {error}");
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        eprintln!("caused by: {cause}");
        source = cause.source();
    }
    if let Some(hint) = error.hint() {
        eprintln!("hint: {hint}");
    }
}
