//! Where files live: one function of the environment.
//!
//! | what | where |
//! | --- | --- |
//! | settings | `$XDG_CONFIG_HOME/banger/config.toml` |
//! | state | `$XDG_STATE_HOME/banger/` |
//! | images, kernels, keys | `$XDG_DATA_HOME/banger/` |
//! | what can be made again | `$XDG_CACHE_HOME/banger/` |
//! | the daemon's socket | `$XDG_RUNTIME_DIR/banger/`, else `/run/user/<uid>/banger/`, else `run/` in the state folder |

use banger_core::id::VmId;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What [`Paths::from_env`] needs to know of the outside.
pub trait Env {
    /// An environment variable.
    fn var(&self, name: &str) -> Option<String>;
    /// The effective user id.
    fn uid(&self) -> u32;
    /// Whether `path` is a folder that belongs to `uid`.
    fn is_own_dir(&self, path: &Path, uid: u32) -> bool;
}

/// The environment of this process.
#[derive(Debug, Clone, Copy)]
pub struct ProcessEnv;

impl Env for ProcessEnv {
    fn var(&self, name: &str) -> Option<String> {
        std::env::var(name).ok()
    }

    fn uid(&self) -> u32 {
        rustix::process::geteuid().as_raw()
    }

    fn is_own_dir(&self, path: &Path, uid: u32) -> bool {
        std::fs::metadata(path).is_ok_and(|metadata| metadata.is_dir() && metadata.uid() == uid)
    }
}

/// No folder to keep anything in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("HOME is not set to an absolute path, and {variable} is not set either")]
pub struct PathsError {
    /// The XDG variable that would have helped.
    pub variable: &'static str,
}

/// Where files live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    /// Settings.
    pub config: PathBuf,
    /// Database, VMs, the daemon's log.
    pub state: PathBuf,
    /// Images, kernels, keys.
    pub data: PathBuf,
    /// What can be made again.
    pub cache: PathBuf,
    /// The daemon's socket.
    pub runtime: PathBuf,
}

impl Paths {
    /// Computes all folders. Relative XDG values are ignored, as the XDG specification says.
    ///
    /// # Errors
    /// Neither `HOME` nor the XDG variable that would replace it is an absolute path.
    pub fn from_env(env: &impl Env) -> Result<Self, PathsError> {
        let absolute = |name: &str| {
            env.var(name)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        let home = absolute("HOME");
        let folder = |variable: &'static str, below_home: &str| {
            absolute(variable)
                .or_else(|| home.as_ref().map(|home| home.join(below_home)))
                .map(|path| path.join("banger"))
                .ok_or(PathsError { variable })
        };
        let state = folder("XDG_STATE_HOME", ".local/state")?;
        let uid = env.uid();
        let run_user = PathBuf::from(format!("/run/user/{uid}"));
        let runtime = absolute("XDG_RUNTIME_DIR")
            .or_else(|| Some(run_user).filter(|path| env.is_own_dir(path, uid)))
            .map_or_else(|| state.join("run"), |path| path.join("banger"));
        Ok(Self {
            config: folder("XDG_CONFIG_HOME", ".config")?,
            data: folder("XDG_DATA_HOME", ".local/share")?,
            cache: folder("XDG_CACHE_HOME", ".cache")?,
            state,
            runtime,
        })
    }

    /// Settings.
    pub fn config_file(&self) -> PathBuf {
        self.config.join("config.toml")
    }

    /// The daemon's socket.
    pub fn socket(&self) -> PathBuf {
        self.runtime.join("bangerd.sock")
    }

    /// Is locked by whoever starts a daemon.
    pub fn start_lock(&self) -> PathBuf {
        self.runtime.join("start.lock")
    }

    /// Is locked by the daemon for as long as it lives.
    pub fn daemon_lock(&self) -> PathBuf {
        self.state.join("bangerd.lock")
    }

    /// The daemon's log.
    pub fn daemon_log(&self) -> PathBuf {
        self.state.join("bangerd.log")
    }

    /// The database.
    pub fn database(&self) -> PathBuf {
        self.state.join("banger.db")
    }

    /// Binds the instance to this machine and folder.
    pub fn instance_file(&self) -> PathBuf {
        self.state.join("instance.json")
    }

    /// The namespace keeper's socket.
    pub fn keeper_socket(&self) -> PathBuf {
        self.state.join("netns.sock")
    }

    /// All VMs.
    pub fn vms(&self) -> PathBuf {
        self.state.join("vms")
    }

    /// One VM.
    pub fn vm(&self, id: VmId) -> PathBuf {
        self.vms().join(id.to_string())
    }

    /// All images.
    pub fn images(&self) -> PathBuf {
        self.data.join("images")
    }

    /// All kernels.
    pub fn kernels(&self) -> PathBuf {
        self.data.join("kernels")
    }

    /// The key made at first start: `id_ed25519` and `id_ed25519.pub`.
    pub fn ssh(&self) -> PathBuf {
        self.data.join("ssh")
    }

    /// VMMs that banger installed.
    pub fn drivers(&self) -> PathBuf {
        self.data.join("drivers")
    }
}

/// Finds a program that belongs to banger (`bangerd`, `banger-shim`, `banger-netns`, `banger-init`): in the folder
/// that `BANGER_LIBEXEC` names, beside `current_exe`, or in `../libexec/banger` or `../lib/banger` of it.
pub fn find_program(env: &impl Env, current_exe: &Path, name: &str) -> Option<PathBuf> {
    let beside = current_exe.parent();
    let candidates = [
        env.var("BANGER_LIBEXEC").map(PathBuf::from),
        beside.map(Path::to_owned),
        beside.map(|folder| folder.join("../libexec/banger")),
        beside.map(|folder| folder.join("../lib/banger")),
    ];
    candidates
        .into_iter()
        .flatten()
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    struct Fixed(HashMap<&'static str, &'static str>, bool);

    impl Env for Fixed {
        fn var(&self, name: &str) -> Option<String> {
            self.0.get(name).map(|value| (*value).to_owned())
        }
        fn uid(&self) -> u32 {
            1000
        }
        fn is_own_dir(&self, _: &Path, _: u32) -> bool {
            self.1
        }
    }

    fn paths(
        variables: &[(&'static str, &'static str)],
        run_user: bool,
    ) -> Result<Paths, PathsError> {
        Paths::from_env(&Fixed(variables.iter().copied().collect(), run_user))
    }

    #[test]
    fn without_xdg_variables_everything_is_below_home() {
        let paths = paths(&[("HOME", "/home/o")], false).unwrap();
        assert_eq!(
            paths.database(),
            Path::new("/home/o/.local/state/banger/banger.db")
        );
        assert_eq!(
            paths.socket(),
            Path::new("/home/o/.local/state/banger/run/bangerd.sock")
        );
        assert_eq!(
            paths.images(),
            Path::new("/home/o/.local/share/banger/images")
        );
    }

    #[test]
    fn the_runtime_folder_is_the_users_own_or_none() {
        let home = ("HOME", "/home/o");
        assert_eq!(
            paths(&[home], true).unwrap().runtime,
            Path::new("/run/user/1000/banger")
        );
        let given = paths(&[home, ("XDG_RUNTIME_DIR", "/r")], false).unwrap();
        assert_eq!(given.runtime, Path::new("/r/banger"));
    }

    #[test]
    fn relative_values_are_ignored_and_no_home_is_an_error() {
        let relative = paths(&[("HOME", "/h"), ("XDG_STATE_HOME", "state")], false).unwrap();
        assert_eq!(relative.state, Path::new("/h/.local/state/banger"));
        assert_eq!(
            paths(&[("HOME", "h")], false),
            Err(PathsError {
                variable: "XDG_STATE_HOME"
            })
        );
    }
}
