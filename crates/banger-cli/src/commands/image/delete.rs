//! `banger image delete`.

use crate::commands::worst;
use crate::complete;
use crate::context::with_daemon;
use crate::report::{Failure, Outcome};
use banger_api::endpoint::{DeleteImage, Nothing};

/// Delete images that no VM uses
///
/// An image is in use as long as a VM was made from it, also one in the trash.
#[derive(Debug, clap::Args)]
#[command(visible_alias = "rm")]
pub(crate) struct DeleteArgs {
    /// The images, by name, id or unambiguous prefix
    #[arg(value_name = "IMAGE", required = true, add = complete::images())]
    images: Vec<String>,
}

pub(crate) fn run(args: DeleteArgs) -> Outcome {
    with_daemon(async |_, daemon| {
        let mut failures: Vec<Failure> = Vec::new();
        for image in &args.images {
            let deleted = daemon
                .client
                .call::<DeleteImage>(&[("image", image)], &Nothing {})
                .await;
            failures.extend(deleted.err().map(Failure::from));
        }
        Ok(worst(&failures))
    })
}
