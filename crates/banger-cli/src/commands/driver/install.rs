//! `banger driver install`.

use super::render;
use crate::context::with_daemon;
use crate::output::{OutputArgs, json, print};
use crate::progress::follow;
use crate::report::{Outcome, note};
use crate::value::readable_path;
use banger_api::daemon::InstallDriver;
use banger_api::endpoint::{GetDrivers, Nothing, PostDriverInstall};
use banger_core::spec::Driver;
use std::path::PathBuf;

/// Install Firecracker
///
/// From its release archive, whose SHA-256 is compared with `--sha256`, or else with the release's own checksum file;
/// or from a file. QEMU comes from the distribution: package `qemu-system-x86`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  banger driver install
  banger driver install --from ./firecracker-v1.13.1-x86_64.tgz --sha256 4b0c…")]
pub(crate) struct InstallArgs {
    /// The driver to install
    #[arg(default_value = "firecracker", value_parser = ["firecracker"])]
    driver: String,
    /// The version (default: the newest that this banger knows)
    #[arg(long, conflicts_with = "from")]
    version: Option<String>,
    /// The URL of a release archive instead of the known one
    #[arg(long, conflicts_with = "from")]
    url: Option<String>,
    /// The SHA-256 that the archive must have
    #[arg(long, value_parser = sha256)]
    sha256: Option<String>,
    /// An archive, or a `firecracker` program, instead of a download
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    from: Option<PathBuf>,
    #[command(flatten)]
    output: OutputArgs,
}

/// Not a SHA-256.
#[derive(Debug, thiserror::Error)]
#[error("a SHA-256 is 64 hexadecimal digits")]
struct Sha256Error;

fn sha256(text: &str) -> Result<String, Sha256Error> {
    if text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        Ok(text.to_ascii_lowercase())
    } else {
        Err(Sha256Error)
    }
}

pub(crate) fn run(args: InstallArgs) -> Outcome {
    let request = InstallDriver {
        version: args.version,
        url: args.url,
        sha256: args.sha256,
        from: args.from.as_deref().map(readable_path).transpose()?,
    };
    with_daemon(async |_, daemon| {
        let operation = daemon
            .client
            .call::<PostDriverInstall>(&[], &request)
            .await?;
        let made = follow(&daemon.client, operation).await?;
        if made.unchanged {
            note("already installed");
        }
        let mut drivers = daemon.client.call::<GetDrivers>(&[], &Nothing {}).await?;
        drivers.retain(|driver| driver.driver == Driver::Firecracker);
        match (args.output.json, drivers.first()) {
            (true, Some(driver)) => json(driver)?,
            (true, None) => json(&serde_json::json!({"id": made.subject}))?,
            (false, _) => print(&render(&drivers))?,
        }
        Ok(0)
    })
}
