//! `banger kernel import`.

use super::list::render;
use crate::context::with_daemon;
use crate::output::{OutputArgs, json, print};
use crate::progress::follow;
use crate::report::{Outcome, note};
use crate::value::readable_path;
use banger_api::endpoint::{GetKernels, Nothing, PostKernels};
use banger_api::kernel::ImportKernel;
use banger_core::name::KernelName;
use std::path::PathBuf;

/// Import a kernel with its modules
///
/// From a package (`linux-image-….deb`), a `bzImage` or a `vmlinux`; without a path from the distribution's cloud
/// kernel, which is downloaded. Ctrl-C cancels the import and leaves nothing half made.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  banger kernel import                                            The distribution's cloud kernel
  banger kernel import ./linux-image-6.12.0.deb --name new        A package
  banger kernel import ./bzImage --modules ./lib/modules/6.12.0   A kernel of your own")]
pub(crate) struct ImportArgs {
    /// A package, a `bzImage` or a `vmlinux`
    #[arg(value_hint = clap::ValueHint::FilePath)]
    path: Option<PathBuf>,
    /// The folder of its modules, for a bare kernel
    #[arg(long, value_name = "DIR", requires = "path", value_hint = clap::ValueHint::DirPath)]
    modules: Option<PathBuf>,
    /// The name that shall point to it (default: `default`); a kernel that had it keeps its id
    #[arg(long)]
    name: Option<KernelName>,
    /// Import it even if the same source was imported under that name
    #[arg(long)]
    reimport: bool,
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn run(args: ImportArgs) -> Outcome {
    let request = ImportKernel {
        name: args.name.map(String::from),
        path: args.path.as_deref().map(readable_path).transpose()?,
        modules: args.modules.as_deref().map(readable_path).transpose()?,
        reimport: args.reimport,
    };
    with_daemon(async |_, daemon| {
        let operation = daemon.client.call::<PostKernels>(&[], &request).await?;
        let made = follow(&daemon.client, operation).await?;
        let kernels = daemon.client.call::<GetKernels>(&[], &Nothing {}).await?;
        let kernel: Vec<_> = kernels
            .into_iter()
            .filter(|kernel| kernel.id.to_string() == made.subject)
            .collect();
        if made.unchanged {
            note("already imported from the same source; `--reimport` imports it again");
        }
        match (args.output.json, kernel.first()) {
            (true, Some(kernel)) => json(kernel)?,
            (true, None) => json(&serde_json::json!({"id": made.subject}))?,
            (false, _) => print(&render(&kernel))?,
        }
        Ok(0)
    })
}
