//! `banger dns`.

use crate::context::with_daemon;
use crate::output::{OutputArgs, fields, json, print, table};
use crate::report::{Outcome, note};
use banger_api::endpoint::{GetDns, Nothing};
use banger_api::network::DnsStatus;

/// Look at the names of VMs
///
/// Every VM that is not in the trash is `NAME.vm`, for guests and, where that can be, for this host's own programs. It
/// has an IPv4 address (A) and no IPv6 one (AAAA), since guests have IPv4 alone.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum DnsCommand {
    Status(StatusArgs),
    #[command(visible_alias = "ls")]
    List(ListArgs),
}

/// Show the name server, who can ask it, and what was asked
#[derive(Debug, clap::Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    output: OutputArgs,
}

/// List all names with their addresses
///
/// `--json` prints an array of names.
#[derive(Debug, clap::Args)]
pub(crate) struct ListArgs {
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn run(command: DnsCommand) -> Outcome {
    with_daemon(async |_, daemon| {
        let status = daemon.client.call::<GetDns>(&[], &Nothing {}).await?;
        match command {
            DnsCommand::Status(args) if args.output.json => json(&status)?,
            DnsCommand::Status(_) => print(&render(&status))?,
            DnsCommand::List(args) if args.output.json => json(&status.records)?,
            DnsCommand::List(_) if status.records.is_empty() => note("no names: there are no VMs"),
            DnsCommand::List(_) => print(&names(&status))?,
        }
        Ok(0)
    })
}

fn names(status: &DnsStatus) -> String {
    let records = status.records.iter();
    table(
        &["NAME", "ADDRESS"],
        records.map(|record| vec![record.name.clone(), record.address.to_string()]),
    )
}

fn render(status: &DnsStatus) -> String {
    let place = |place: Option<std::net::SocketAddr>| {
        place.map_or_else(|| "not listening".to_owned(), |place| place.to_string())
    };
    let mut text = fields([
        ("guests ask", place(status.guests)),
        ("the host asks", place(status.host)),
        ("host's programs", status.host_names.clone()),
        ("names", status.records.len().to_string()),
        ("names' file", status.records_file.clone()),
    ]);
    let counted = status.counters.iter().filter(|(_, count)| **count > 0);
    let rows: Vec<_> = counted
        .map(|(outcome, count)| vec![outcome.clone(), count.to_string()])
        .collect();
    if !rows.is_empty() {
        text.push('\n');
        text.push_str(&table(&["ASKED", "TIMES"], rows));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_tells_who_can_ask_and_what_was_asked() {
        let status: DnsStatus = serde_json::from_value(serde_json::json!({
            "guests": "172.16.0.1:53", "host": null, "host_names": "not configured: systemd-resolved does not run",
            "records_file": "/s/records.json", "records": [{"name": "calm-otter.vm", "address": "172.16.0.2"}],
            "counters": {"answered": 7, "refused": 0},
        }))
        .unwrap();
        insta::assert_snapshot!(render(&status), @r"
        guests ask       172.16.0.1:53
        the host asks    not listening
        host's programs  not configured: systemd-resolved does not run
        names            1
        names' file      /s/records.json

        ASKED     TIMES
        answered  7
        ");
        assert_eq!(
            names(&status),
            "NAME           ADDRESS\ncalm-otter.vm  172.16.0.2\n"
        );
    }
}
