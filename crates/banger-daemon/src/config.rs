//! `config.toml`: the person's settings. A missing file means the defaults; an unknown key is an error.

use banger_api::daemon::Mode;
use banger_core::addr::{Ipv4Net, Pool};
use banger_core::spec::{DriverChoice, StorageChoice};
use serde::Deserialize;
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
        let config: Self = toml::from_str(&text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        match config.network.pool {
            Some(pool) if pool.prefix() != Pool::PREFIX => Err(ConfigError::Pool {
                path: path.to_owned(),
                pool,
            }),
            _ => Ok(config),
        }
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
