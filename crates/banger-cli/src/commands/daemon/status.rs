//! `banger daemon status`.

use super::render;
use crate::context::{Context, block_on};
use crate::ensure_daemon::status;
use crate::output::{OutputArgs, json, print};
use crate::report::Outcome;
use banger_api::error::ErrorCode;

/// Show whether the daemon runs, without starting it
///
/// Ends with exit code 3 if it does not; `--json` then prints `null`.
#[derive(Debug, clap::Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn run(args: StatusArgs) -> Outcome {
    let context = Context::from_env()?;
    block_on(async {
        let status = status(&context.paths).await?;
        if args.output.json {
            json(&status)?;
        } else {
            print(
                &status
                    .as_ref()
                    .map_or_else(|| "daemon  not running\n".to_owned(), render),
            )?;
        }
        Ok(if status.is_some() {
            0
        } else {
            ErrorCode::DaemonUnreachable.exit_code()
        })
    })
}
