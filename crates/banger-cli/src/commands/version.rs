//! `banger version`.

use crate::context::{Context, block_on};
use crate::ensure_daemon::status;
use crate::output::{OutputArgs, fields, json, print};
use crate::report::Outcome;
use banger_api::version::{API_VERSION, VERSION};

/// Print the versions of this program and of the running daemon
///
/// Does not start the daemon.
#[derive(Debug, clap::Args)]
pub(crate) struct VersionArgs {
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn run(args: VersionArgs) -> Outcome {
    block_on(async {
        let daemon = match Context::from_env() {
            Ok(context) => status(&context.paths).await.ok().flatten(),
            Err(_) => None,
        };
        if args.output.json {
            json(&serde_json::json!({
                "version": VERSION,
                "api": API_VERSION,
                "daemon": daemon.map(|status| serde_json::json!({"version": status.version, "build": status.build})),
            }))?;
        } else {
            let daemon = daemon.map_or_else(
                || "not running".to_owned(),
                |status| format!("{} (build {})", status.version, status.build),
            );
            print(&fields([
                ("banger", VERSION.to_owned()),
                ("api", format!("v{API_VERSION}")),
                ("daemon", daemon),
            ]))?;
        }
        Ok(0)
    })
}
