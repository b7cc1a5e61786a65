//! `banger image show`.

use super::render;
use crate::complete;
use crate::context::with_daemon;
use crate::output::{OutputArgs, json, print};
use crate::report::Outcome;
use banger_api::endpoint::{GetImage, Nothing};

/// Show an image
///
/// `--json` also lists its packages.
#[derive(Debug, clap::Args)]
pub(crate) struct ShowArgs {
    /// The image, by name, id or unambiguous prefix
    #[arg(value_name = "IMAGE", add = complete::images())]
    image: String,
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn run(args: ShowArgs) -> Outcome {
    with_daemon(async |_, daemon| {
        let image = daemon
            .client
            .call::<GetImage>(&[("image", &args.image)], &Nothing {})
            .await?;
        if args.output.json {
            json(&image)?;
        } else {
            print(&render(&image))?;
        }
        Ok(0)
    })
}
