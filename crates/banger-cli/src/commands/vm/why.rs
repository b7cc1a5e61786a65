//! `banger vm why`.

use crate::complete;
use crate::context::with_daemon;
use crate::output::{OutputArgs, json, print, table};
use crate::report::{Outcome, note};
use crate::value;
use banger_api::endpoint::{GetVmWhy, Nothing};
use banger_api::vm::JournalEntry;

/// Tell what happened to a VM, step by step
///
/// Times are in UTC.
#[derive(Debug, clap::Args)]
pub(crate) struct WhyArgs {
    /// The VM, by name, id or unambiguous prefix
    #[arg(value_name = "NAME", add = complete::vms())]
    vm: String,
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn run(args: WhyArgs) -> Outcome {
    with_daemon(async |_, daemon| {
        let entries = daemon
            .client
            .call::<GetVmWhy>(&[("vm", &args.vm)], &Nothing {})
            .await?;
        if args.output.json {
            json(&entries)?;
        } else if entries.is_empty() {
            note("nothing is known of what happened to it");
        } else {
            print(&render(&entries))?;
        }
        Ok(0)
    })
}

fn render(entries: &[JournalEntry]) -> String {
    let rows = entries.iter().map(|entry| {
        vec![
            value::time(entry.at),
            entry.subject.clone(),
            entry.took_us.map_or_else(String::new, value::microseconds),
            entry.message.clone(),
        ]
    });
    table(&["TIME", "SUBJECT", "TOOK", "MESSAGE"], rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_story_is_told_in_order_and_cannot_reach_the_terminal() {
        let entries = [
            JournalEntry {
                at: "2026-11-24T09:00:00.5Z".parse().unwrap(),
                subject: "start".to_owned(),
                message: "lease-port".to_owned(),
                took_us: Some(1_250),
            },
            JournalEntry {
                at: "2026-11-24T09:00:01Z".parse().unwrap(),
                subject: "guest".to_owned(),
                message: "said \u{1b}[5m\nhello".to_owned(),
                took_us: None,
            },
        ];
        insta::assert_snapshot!(render(&entries), @r"
        TIME                      SUBJECT  TOOK    MESSAGE
        2026-11-24T09:00:00.500Z  start    1.2 ms  lease-port
        2026-11-24T09:00:01.000Z  guest            said \x1b[5m\nhello
        ");
    }
}
