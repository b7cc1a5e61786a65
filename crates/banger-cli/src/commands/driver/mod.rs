//! `banger driver`.

mod install;
mod list;

use crate::output::table;
use crate::report::Outcome;
use banger_api::daemon::DriverInfo;

/// List and install VMMs, the programs that run VMs
#[derive(Debug, clap::Subcommand)]
pub(crate) enum DriverCommand {
    List(list::ListArgs),
    Install(install::InstallArgs),
}

pub(crate) fn run(command: DriverCommand) -> Outcome {
    match command {
        DriverCommand::List(args) => list::run(args),
        DriverCommand::Install(args) => install::run(args),
    }
}

fn render(drivers: &[DriverInfo]) -> String {
    let rows = drivers.iter().map(|driver| {
        let usable = match (driver.usable, driver.default) {
            (true, true) => "yes, by default",
            (true, false) => "yes",
            (false, _) => "no",
        };
        vec![
            driver.driver.to_string(),
            driver.version.clone().unwrap_or_else(|| "-".to_owned()),
            usable.to_owned(),
            driver.path.clone().unwrap_or_else(|| "-".to_owned()),
            driver.reason.clone(),
        ]
    });
    table(&["DRIVER", "VERSION", "USABLE", "PATH", "WHY"], rows)
}
