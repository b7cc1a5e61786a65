//! `config.toml`: the person's settings. A missing file means the defaults; an unknown key is an error. README.md has
//! all of them in a table.

use crate::images::DEFAULT_NAME;
use banger_api::daemon::{Mode, Setting, SettingSource};
use banger_core::addr::{Ipv4Net, Pool};
use banger_core::spec::{
    DEFAULT_MEMORY_MIB, DEFAULT_OVERLAY_BYTES, DEFAULT_VCPUS, DriverChoice, StorageChoice,
};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// All settings.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(crate) struct Config {
    pub(crate) network: NetworkConfig,
    pub(crate) driver: DriverConfig,
    pub(crate) storage: StorageConfig,
    pub(crate) trash: TrashConfig,
    pub(crate) defaults: Defaults,
    /// The settings that the file names, as `network.pool`.
    #[serde(skip)]
    named: BTreeSet<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(crate) struct TrashConfig {
    /// How long a deleted VM can be brought back, as `7d`.
    #[serde(deserialize_with = "duration")]
    pub(crate) keep: Duration,
}

impl Default for TrashConfig {
    fn default() -> Self {
        Self {
            keep: Duration::from_secs(7 * 24 * 3600),
        }
    }
}

/// A duration as people write it, `7d` or `12h 30m`; a day has 24 hours.
fn duration<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    use serde::de::Error;
    let span = jiff::Span::deserialize(deserializer)?;
    let signed = span
        .to_duration(jiff::SpanRelativeTo::days_are_24_hours())
        .map_err(D::Error::custom)?;
    Duration::try_from(signed).map_err(D::Error::custom)
}

/// A duration as the file has it.
fn written(duration: Duration) -> String {
    const DAY: u64 = 24 * 3600;
    match duration.as_secs() {
        whole if duration.subsec_nanos() == 0 && whole > 0 && whole % DAY == 0 => {
            format!("{}d", whole / DAY)
        }
        _ => match jiff::SignedDuration::try_from(duration) {
            Ok(signed) => format!("{signed:#}"),
            Err(_) => format!("{}s", duration.as_secs()),
        },
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(crate) struct NetworkConfig {
    /// The instance's /20; chosen once if it is not set.
    pub(crate) pool: Option<Ipv4Net>,
    /// How the daemon gets what only root may do; the best that there is if it is not set.
    pub(crate) mode: Option<Mode>,
    /// `pasta`'s program instead of the one on `PATH`.
    pub(crate) pasta: Option<PathBuf>,
}

impl NetworkConfig {
    pub(crate) fn pasta(&self) -> PathBuf {
        self.pasta.clone().unwrap_or_else(|| "pasta".into())
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(crate) struct DriverConfig {
    /// What `auto` means, at each start.
    pub(crate) choice: DriverChoice,
    /// QEMU's program instead of the one on `PATH`.
    pub(crate) qemu: Option<PathBuf>,
    /// Firecracker's program instead of the installed one or the one on `PATH`.
    pub(crate) firecracker: Option<PathBuf>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(crate) struct StorageConfig {
    /// What `auto` means for VMs that are created without `--storage`.
    pub(crate) choice: StorageChoice,
}

/// What a VM gets that was asked for nothing else.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(crate) struct Defaults {
    pub(crate) image: Option<String>,
    pub(crate) kernel: Option<String>,
    pub(crate) vcpus: Option<u64>,
    pub(crate) memory_mib: Option<u64>,
    pub(crate) overlay_bytes: Option<u64>,
}

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("cannot read the settings `{}`", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the settings `{}` are not valid", path.display())]
    Parse {
        path: PathBuf,
        #[source]
        source: Box<toml::de::Error>,
    },
    #[error("the settings `{}` ask for the pool {pool}, which is no /20", path.display())]
    Pool { path: PathBuf, pool: Ipv4Net },
}

impl Config {
    /// Reads the settings at `path`.
    pub(crate) fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            Err(source) => {
                return Err(ConfigError::Read {
                    path: path.to_owned(),
                    source,
                });
            }
        };
        let parse_error = |source| ConfigError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        };
        let mut config: Self = toml::from_str(&text).map_err(parse_error)?;
        let sections: BTreeMap<String, toml::Table> = toml::from_str(&text).map_err(parse_error)?;
        config.named = sections
            .iter()
            .flat_map(|(section, table)| table.keys().map(move |key| format!("{section}.{key}")))
            .collect();
        match config.network.pool {
            Some(pool) if pool.prefix() != Pool::PREFIX => Err(ConfigError::Pool {
                path: path.to_owned(),
                pool,
            }),
            _ => Ok(config),
        }
    }

    /// All settings as they are in effect; `pool` and `mode` are what the instance and the daemon have.
    pub(crate) fn settings(&self, pool: Ipv4Net, mode: Mode) -> Vec<Setting> {
        let Self {
            network,
            driver,
            storage,
            trash,
            defaults,
            named: _,
        } = self;
        let is_wanted = network.pool.is_none_or(|wanted| wanted == pool);
        let image = defaults.image.as_deref().unwrap_or(DEFAULT_NAME);
        let kernel = defaults.kernel.as_deref().unwrap_or(DEFAULT_NAME);
        let overlay = defaults.overlay_bytes.unwrap_or(DEFAULT_OVERLAY_BYTES);
        vec![
            self.found(
                "network.pool",
                json!(pool.to_string()),
                is_wanted,
                "guests' addresses, a /20: those that the instance was made with",
            ),
            self.found(
                "network.mode",
                json!(mode),
                true,
                "how the daemon gets root's part: root, helper or rootless",
            ),
            self.setting(
                "network.pasta",
                json!(network.pasta()),
                "the program for an ordinary user's way to the internet",
            ),
            self.setting(
                "driver.choice",
                json!(driver.choice),
                "what the driver auto means: auto, firecracker or qemu",
            ),
            self.setting(
                "driver.qemu",
                json!(driver.qemu),
                "QEMU's program, instead of the one on PATH",
            ),
            self.setting(
                "driver.firecracker",
                json!(driver.firecracker),
                "Firecracker's program, instead of one installed or on PATH",
            ),
            self.setting(
                "storage.choice",
                json!(storage.choice),
                "how new VMs get their /: auto, reflink, overlay, copy, snapshot",
            ),
            self.setting(
                "trash.keep",
                json!(written(trash.keep)),
                "how long a deleted VM can be brought back",
            ),
            self.setting(
                "defaults.image",
                json!(image),
                "the image of new VMs that name none",
            ),
            self.setting("defaults.kernel", json!(kernel), "their kernel"),
            self.setting(
                "defaults.vcpus",
                json!(defaults.vcpus.unwrap_or(DEFAULT_VCPUS)),
                "their vCPUs, 1 to 16",
            ),
            self.setting(
                "defaults.memory-mib",
                json!(defaults.memory_mib.unwrap_or(DEFAULT_MEMORY_MIB)),
                "their memory in MiB, 128 to 32768",
            ),
            self.setting(
                "defaults.overlay-bytes",
                json!(overlay),
                "the new data that they may write to /, in bytes",
            ),
        ]
    }

    fn setting(&self, key: &str, value: Value, about: &str) -> Setting {
        Setting {
            key: key.to_owned(),
            value: Some(value).filter(|value| !value.is_null()),
            source: match self.named.contains(key) {
                true => SettingSource::File,
                false => SettingSource::Default,
            },
            about: about.to_owned(),
        }
    }

    /// A setting that the daemon found out unless the file, which `is_wanted`, says it.
    fn found(&self, key: &str, value: Value, is_wanted: bool, about: &str) -> Setting {
        let setting = self.setting(key, value, about);
        let source = match setting.source {
            SettingSource::File if is_wanted => SettingSource::File,
            _ => SettingSource::Daemon,
        };
        Setting { source, ..setting }
    }

    /// The pool that the settings ask for.
    pub(crate) fn pool(&self) -> Option<Pool> {
        self.network.pool.map(|network| Pool::at(network.base()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Config, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Config::load(file.path())
    }

    #[test]
    fn no_file_means_the_defaults() {
        assert_eq!(
            Config::load(Path::new("/nonexistent/config.toml")).unwrap(),
            Config::default()
        );
    }

    fn settings(config: &Config) -> Vec<Setting> {
        let pool = Pool::at(std::net::Ipv4Addr::new(172, 20, 0, 0));
        config.settings(pool.network(), Mode::Root)
    }

    /// What the parser knows, as its own errors tell it.
    fn known(text: &str) -> BTreeSet<String> {
        let error = toml::from_str::<Config>(text).unwrap_err().to_string();
        let (_, names) = error.split_once("expected ").unwrap();
        let names = names.split('`').skip(1).step_by(2);
        names.map(str::to_owned).collect()
    }

    #[test]
    fn every_setting_is_shown_and_in_the_readme_and_no_other() {
        let sections = known("[nonsense]").into_iter();
        let parsed: BTreeSet<String> = sections
            .flat_map(|section| {
                let keys = known(&format!("[{section}]\nnonsense = 1"));
                keys.into_iter().map(move |key| format!("{section}.{key}"))
            })
            .collect();
        let shown: BTreeSet<String> = settings(&Config::default())
            .into_iter()
            .map(|setting| setting.key)
            .collect();
        assert_eq!(shown, parsed);
        let readme = concat!(env!("CARGO_MANIFEST_DIR"), "/../../README.md");
        let readme = std::fs::read_to_string(readme).unwrap();
        let listed: BTreeSet<String> = readme
            .lines()
            .filter_map(|line| line.strip_prefix("| `[")?.split_once('`'))
            .map(|(key, _)| key.replacen("] ", ".", 1))
            .collect();
        assert_eq!(listed, parsed);
    }

    #[test]
    fn what_is_shown_can_be_the_file_and_says_what_came_from_it() {
        let source = |config: &Config, key: &str| {
            let all = settings(config);
            all.into_iter().find(|s| s.key == key).unwrap().source
        };
        let config = load("[network]\npool = \"172.20.0.0/20\"\n[trash]\nkeep = \"36h\"").unwrap();
        assert_eq!(source(&config, "network.pool"), SettingSource::File);
        assert_eq!(source(&config, "network.mode"), SettingSource::Daemon);
        assert_eq!(source(&config, "trash.keep"), SettingSource::File);
        assert_eq!(source(&config, "defaults.vcpus"), SettingSource::Default);
        // The instance was made with another one.
        let config = load("[network]\npool = \"172.24.0.0/20\"").unwrap();
        assert_eq!(source(&config, "network.pool"), SettingSource::Daemon);

        let config = load("[trash]\nkeep = \"36h\"\n[driver]\nqemu = \"/q\"").unwrap();
        let values = settings(&config).into_iter().filter_map(|setting| {
            let (section, key) = setting.key.split_once('.')?;
            Some(format!("[{section}]\n{key} = {}\n", setting.value?))
        });
        for text in values {
            load(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
        }
        let kept = settings(&config)
            .into_iter()
            .find(|s| s.key == "trash.keep");
        assert_eq!(kept.unwrap().value, Some("36h".into()));
    }

    #[test]
    fn a_misspelt_key_and_a_bad_pool_are_errors_and_not_ignored() {
        assert!(matches!(
            load("[network]\npol = \"172.20.0.0/20\""),
            Err(ConfigError::Parse { .. })
        ));
        assert!(matches!(
            load("[network]\npool = \"172.20.0.0/24\""),
            Err(ConfigError::Pool { .. })
        ));
        assert!(load("[trash]\nkeep = \"soon\"").is_err());
        assert_eq!(
            load("[trash]\nkeep = \"2d 12h\"").unwrap().trash.keep,
            Duration::from_secs(60 * 3600)
        );
        let config =
            load("[network]\npool = \"172.20.0.0/20\"\n[driver]\nchoice = \"qemu\"").unwrap();
        assert_eq!(
            config.pool().unwrap().network().to_string(),
            "172.20.0.0/20"
        );
    }
}
