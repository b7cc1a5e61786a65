//! `banger image build`.

use super::render;
use crate::context::with_daemon;
use crate::output::{OutputArgs, json, print};
use crate::progress::follow;
use crate::report::{Failure, Outcome, note};
use banger_api::endpoint::{GetImage, Nothing, PostImages};
use banger_api::error::ErrorCode;
use banger_api::image::{BuildImage, ImageRecipe};
use banger_core::name::ImageName;
use std::path::{Path, PathBuf};

/// Build an image from distribution packages
///
/// Nothing is built if an image of that name was made from the same recipe and packages. Ctrl-C cancels the build and
/// leaves nothing half built.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  banger image build                                         The default image: systemd, sshd, tools
  banger image build --tiny                                  A tiny one: busybox and dropbear
  banger image build --name web --packages packages.apt      Your own choice of packages")]
pub(crate) struct BuildArgs {
    /// The name that shall point to it (default: `default`, or `tiny`); an image that had it keeps its id
    #[arg(long)]
    name: Option<ImageName>,
    /// Build the tiny image of busybox and dropbear, which boots in seconds
    #[arg(long)]
    tiny: bool,
    /// A list of packages instead of the recipe's own: one a line, `#` begins a comment
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    packages: Option<PathBuf>,
    /// Build it even if nothing changed
    #[arg(long)]
    rebuild: bool,
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn run(args: BuildArgs) -> Outcome {
    let request = BuildImage {
        name: args.name.map(String::from),
        recipe: if args.tiny {
            ImageRecipe::Tiny
        } else {
            ImageRecipe::Default
        },
        packages: args.packages.as_deref().map(read_packages).transpose()?,
        rebuild: args.rebuild,
    };
    with_daemon(async |_, daemon| {
        let operation = daemon.client.call::<PostImages>(&[], &request).await?;
        let made = follow(&daemon.client, operation).await?;
        let image = daemon
            .client
            .call::<GetImage>(&[("image", &made.subject)], &Nothing {})
            .await?;
        if made.unchanged {
            note("already built from the same packages; `--rebuild` builds it again");
        }
        if args.output.json {
            json(&image)?;
        } else {
            print(&render(&image))?;
        }
        Ok(0)
    })
}

fn read_packages(path: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(path).map_err(|error| {
        let message = format!("cannot read the list of packages `{}`", path.display());
        Failure::new(ErrorCode::BadFile, message).caused_by(&error)
    })
}
