//! `banger config`.

use crate::context::{Context, with_daemon};
use crate::output::{OutputArgs, json, print};
use crate::report::Outcome;
use banger_api::daemon::{Setting, SettingSource, Settings};
use banger_api::endpoint::{GetSettings, Nothing};

/// See the settings
///
/// They are in a file that you alone write; without one, or for what it does not name, defaults hold. The daemon reads
/// it when it starts: `banger daemon restart` has it read again, and VMs run on.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum ConfigCommand {
    Show(ShowArgs),
    Path(PathArgs),
}

/// Print all settings as the daemon has them, each with where it comes from
///
/// What is printed can be the file: all in it is TOML.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  banger config show\n  banger config show --json")]
pub(crate) struct ShowArgs {
    #[command(flatten)]
    output: OutputArgs,
}

/// Print where the file is, whether it is there or not
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  $EDITOR \"$(banger config path)\" && banger daemon restart")]
pub(crate) struct PathArgs {}

pub(crate) fn run(command: ConfigCommand) -> Outcome {
    match command {
        ConfigCommand::Show(args) => show(args),
        ConfigCommand::Path(PathArgs {}) => {
            let path = Context::from_env()?.paths.config_file();
            print(&format!("{}\n", path.display()))?;
            Ok(0)
        }
    }
}

fn show(args: ShowArgs) -> Outcome {
    with_daemon(async |_, daemon| {
        let settings = daemon.client.call::<GetSettings>(&[], &Nothing {}).await?;
        if args.output.json {
            json(&settings)?;
        } else {
            print(&render(&settings))?;
        }
        Ok(0)
    })
}

fn render(settings: &Settings) -> String {
    let mut text = format!("# {}\n", settings.file);
    let mut section = "";
    for setting in &settings.settings {
        let (of, key) = setting.key.split_once('.').unwrap_or(("", &setting.key));
        if of != section {
            text.push_str(&format!("\n[{of}]\n"));
            section = of;
        }
        text.push_str(&line(setting, key));
    }
    text
}

fn line(setting: &Setting, key: &str) -> String {
    // JSON's strings and numbers are TOML's, too.
    let value = setting.value.as_ref().map(ToString::to_string);
    let about = &setting.about;
    match (value, setting.source) {
        (None, _) => format!("# {about} (not set)\n# {key} =\n"),
        (Some(value), SettingSource::Default) => format!("# {about} (default)\n{key} = {value}\n"),
        (Some(value), SettingSource::File) => {
            format!("# {about} (from the file)\n{key} = {value}\n")
        }
        (Some(value), SettingSource::Daemon) => {
            format!("# {about} (chosen by the daemon)\n# {key} = {value}\n")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_toml_and_says_where_it_comes_from() {
        let setting = |key: &str, value: serde_json::Value, source, about: &str| Setting {
            key: key.to_owned(),
            value: Some(value).filter(|value| !value.is_null()),
            source,
            about: about.to_owned(),
        };
        let settings = Settings {
            file: "/home/o/.config/banger/config.toml".to_owned(),
            settings: vec![
                setting(
                    "network.mode",
                    "root".into(),
                    SettingSource::Daemon,
                    "the way",
                ),
                setting(
                    "driver.choice",
                    "qemu".into(),
                    SettingSource::File,
                    "the VMM",
                ),
                setting(
                    "driver.qemu",
                    serde_json::Value::Null,
                    SettingSource::Default,
                    "its program",
                ),
                setting("defaults.vcpus", 2.into(), SettingSource::Default, "vCPUs"),
            ],
        };
        insta::assert_snapshot!(render(&settings), @r#"
        # /home/o/.config/banger/config.toml

        [network]
        # the way (chosen by the daemon)
        # mode = "root"

        [driver]
        # the VMM (from the file)
        choice = "qemu"
        # its program (not set)
        # qemu =

        [defaults]
        # vCPUs (default)
        vcpus = 2
        "#);
    }
}
