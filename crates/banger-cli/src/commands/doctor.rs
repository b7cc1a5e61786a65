//! `banger doctor`.

use super::mended;
use crate::context::with_daemon;
use crate::escape;
use crate::output::{OutputArgs, json, print};
use crate::patience::{Wait, cancelled};
use crate::report::Outcome;
use anstyle::{AnsiColor, Style};
use banger_api::daemon::{Check, Verdict};
use banger_api::endpoint::{GetDoctor, Nothing, PostDoctorRepair};
use banger_api::error::ErrorCode;

/// Check what this machine can do, and say what helps
///
/// Ends with exit code 7 if something does not work, or is not repaired.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  banger doctor\n  banger doctor --repair   Put right rules, links and ports that differ from the records"
)]
pub(crate) struct DoctorArgs {
    /// Put right what differs from the records, remove what is left over, and print what was; VMs run on
    #[arg(long)]
    repair: bool,
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn run(args: DoctorArgs) -> Outcome {
    with_daemon(async |_, daemon| {
        if args.repair {
            let wait = Wait {
                what: "what differs from the records to be put right",
                goes_on: "all of it is put right all the same: `banger host ls` shows what is left",
            };
            let repair = daemon.client.call::<PostDoctorRepair>(&[], &Nothing {});
            let Some(done) = wait.of(repair).await else {
                return cancelled();
            };
            return mended(&done?, args.output, "nothing differs from the records");
        }
        let checks = daemon.client.call::<GetDoctor>(&[], &Nothing {}).await?;
        if args.output.json {
            json(&checks)?;
        } else {
            print(&checks.iter().map(render).collect::<String>())?;
        }
        let bad = checks.iter().any(|check| check.verdict == Verdict::Bad);
        Ok(if bad {
            ErrorCode::HostUnfit.exit_code()
        } else {
            0
        })
    })
}

fn render(check: &Check) -> String {
    let (word, color) = match check.verdict {
        Verdict::Good => ("good", AnsiColor::Green),
        Verdict::Note => ("note", AnsiColor::Yellow),
        Verdict::Bad => ("bad", AnsiColor::Red),
    };
    let style = Style::new().bold().fg_color(Some(color.into()));
    let (subject, message) = (escape::line(&check.subject), escape::line(&check.message));
    let hint = check
        .hint
        .as_ref()
        .map(|hint| format!("      hint: {}\n", escape::line(hint)));
    format!(
        "{style}{word:<4}{style:#}  {subject}: {message}\n{}",
        hint.unwrap_or_default()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_check_says_what_helps() {
        let check = Check {
            subject: "/dev/net/tun".to_owned(),
            verdict: Verdict::Bad,
            message: "not there".to_owned(),
            hint: Some("modprobe tun".to_owned()),
        };
        let text = anstream::adapter::strip_str(&render(&check)).to_string();
        assert_eq!(
            text,
            "bad   /dev/net/tun: not there\n      hint: modprobe tun\n"
        );
    }
}
