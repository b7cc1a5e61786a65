//! The top level of the command line.

use crate::commands::{Command, exit_codes};
use clap::Parser;
use clap::builder::styling::{AnsiColor, Styles};

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Green.on_default().bold())
    .usage(AnsiColor::Green.on_default().bold())
    .literal(AnsiColor::Cyan.on_default().bold())
    .placeholder(AnsiColor::Cyan.on_default());

const EXAMPLES: &str = "\
Examples:
  banger image build                     Build the default image (once)
  banger vm create --name otter --wait   Create a VM, boot it, wait until it is ready
  banger vm ssh otter                    Log in to it
  banger vm list                         Show all VMs
  banger nat up otter                    Let it reach the internet
  banger port add otter 8080:80          Lead port 8080 of this machine into it
  banger vm stop otter                   Ask it to shut down; its disks stay
  banger doctor                          See what this machine can do

A VM, image or kernel is named by its name, its id, or an unambiguous prefix of either.
Data goes to stdout, everything else to stderr. `--json` prints the API's own objects.

Environment:
  BANGER_NO_AUTOSTART=1  Never start or replace the daemon
  BANGER_LIBEXEC=FOLDER  Where `bangerd` and the other programs are
  NO_COLOR=1             No colours
";

/// Keep microVMs as persistent machines
///
/// A VM made with `banger vm create` is there until it is deleted: it survives its own shutdown, the daemon's and the
/// host's. A daemon of your own, which this program starts when it is needed, keeps them.
#[derive(Debug, Parser)]
#[command(name = "banger", version, styles = STYLES, max_term_width = 100)]
#[command(after_help = format!("{EXAMPLES}\nSee `banger --help` for the exit codes."))]
#[command(after_long_help = format!("{EXAMPLES}\nExit codes:\n{}", exit_codes()))]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn write_help(command: &mut clap::Command, path: &str, out: &mut String) {
        let help =
            anstream::adapter::strip_str(&command.render_long_help().to_string()).to_string();
        out.push_str(&format!("===== {path}\n{help}\n"));
        for verb in command.get_subcommands_mut() {
            if verb.get_name() != "help" {
                let path = format!("{path} {}", verb.get_name());
                write_help(verb, &path, out);
            }
        }
    }

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_help_of_every_verb_is_as_recorded() {
        let mut command = Cli::command().term_width(100);
        command.build();
        let mut out = String::new();
        write_help(&mut command, "banger", &mut out);
        insta::assert_snapshot!("help", out);
    }
}
