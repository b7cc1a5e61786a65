//! `banger image`.

mod build;
mod delete;
mod list;
mod show;

use crate::output::fields;
use crate::report::Outcome;
use crate::value;
use banger_api::image::Image;

/// Build, list and delete images, the read-only root filesystems of VMs
#[derive(Debug, clap::Subcommand)]
pub(crate) enum ImageCommand {
    List(list::ListArgs),
    Show(show::ShowArgs),
    Build(build::BuildArgs),
    Delete(delete::DeleteArgs),
}

pub(crate) fn run(command: ImageCommand) -> Outcome {
    match command {
        ImageCommand::List(args) => list::run(args),
        ImageCommand::Show(args) => show::run(args),
        ImageCommand::Build(args) => build::run(args),
        ImageCommand::Delete(args) => delete::run(args),
    }
}

fn name_or_dash(name: Option<&impl ToString>) -> String {
    name.map_or_else(|| "-".to_owned(), ToString::to_string)
}

fn render(image: &Image) -> String {
    fields([
        ("name", name_or_dash(image.name.as_ref())),
        ("id", image.id.to_string()),
        ("source", image.source.clone()),
        ("size", value::bytes(image.bytes)),
        ("kernel", name_or_dash(image.kernel.as_ref())),
        ("init", image.init.clone()),
        ("packages", image.packages.len().to_string()),
        (
            "packages digest",
            name_or_dash(image.packages_digest.as_ref()),
        ),
        ("digest", image.digest.clone()),
        ("created", value::date(image.created_at)),
        ("directory", image.directory.clone()),
    ])
}
