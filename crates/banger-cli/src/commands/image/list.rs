//! `banger image list`.

use super::name_or_dash;
use crate::context::with_daemon;
use crate::output::{OutputArgs, json, print, table};
use crate::report::{Outcome, note};
use crate::value;
use banger_api::endpoint::{GetImages, Nothing};

/// List images
#[derive(Debug, clap::Args)]
#[command(visible_alias = "ls")]
pub(crate) struct ListArgs {
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn run(args: ListArgs) -> Outcome {
    with_daemon(async |_, daemon| {
        let images = daemon.client.call::<GetImages>(&[], &Nothing {}).await?;
        if args.output.json {
            json(&images)?;
        } else if images.is_empty() {
            note("no images; `banger image build` builds the default one");
        } else {
            let rows = images.iter().map(|image| {
                vec![
                    name_or_dash(image.name.as_ref()),
                    image.id.to_string(),
                    image.source.clone(),
                    value::bytes(image.bytes),
                    value::date(image.created_at),
                ]
            });
            print(&table(&["NAME", "ID", "SOURCE", "SIZE", "CREATED"], rows))?;
        }
        Ok(0)
    })
}
