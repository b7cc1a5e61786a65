//! The user unit that starts the daemon with the host, as far as its files tell.

use crate::paths::{Env, Paths, PathsError};
use std::path::{Path, PathBuf};

/// The unit of the daemon.
pub const DAEMON_UNIT: &str = "bangerd.service";

/// What wants the daemon once it is enabled.
const WANTS: &str = "default.target.wants";
/// There while systemd is the first process.
const BOOTED: &str = "/run/systemd/system";
/// Where a user's systemd looks, after what is in the home folder.
const SYSTEM_FOLDERS: [&str; 6] = [
    "/etc/systemd/user",
    "/run/systemd/user",
    "/usr/local/share/systemd/user",
    "/usr/share/systemd/user",
    "/usr/local/lib/systemd/user",
    "/usr/lib/systemd/user",
];

/// Whether this machine is run by systemd.
pub fn is_booted() -> bool {
    Path::new(BOOTED).is_dir()
}

/// The unit of the daemon, as its user's systemd finds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DaemonUnit {
    /// Its file.
    pub path: PathBuf,
    /// The daemon that it starts.
    pub program: PathBuf,
    /// It is started with its user's systemd.
    pub enabled: bool,
}

impl DaemonUnit {
    /// Looks for it; `None` if it is not installed, or is masked.
    pub fn find(env: &impl Env) -> Option<Self> {
        Self::find_in(&folders(env))
    }

    fn find_in(folders: &[PathBuf]) -> Option<Self> {
        let path = folders
            .iter()
            .map(|folder| folder.join(DAEMON_UNIT))
            .find(|path| path.exists())?;
        let program = program(&std::fs::read_to_string(&path).ok()?)?;
        let enabled = folders
            .iter()
            .any(|folder| folder.join(WANTS).join(DAEMON_UNIT).is_symlink());
        Some(Self {
            path,
            program,
            enabled,
        })
    }

    /// Whether it starts the same program as `bangerd`.
    pub fn starts(&self, bangerd: &Path) -> bool {
        match (self.program.canonicalize(), bangerd.canonicalize()) {
            (Ok(one), Ok(other)) => one == other,
            (Err(_), _) | (_, Err(_)) => self.program == bangerd,
        }
    }
}

/// Where files live for a daemon that this user's systemd starts: it knows none of a shell's variables.
///
/// # Errors
/// `HOME` is not an absolute path.
pub fn paths(env: &impl Env) -> Result<Paths, PathsError> {
    struct Managed<'a, E>(&'a E);
    impl<E: Env> Env for Managed<'_, E> {
        fn var(&self, name: &str) -> Option<String> {
            (name == "HOME").then(|| self.0.var(name)).flatten()
        }
        fn uid(&self) -> u32 {
            self.0.uid()
        }
        fn is_own_dir(&self, path: &Path, uid: u32) -> bool {
            self.0.is_own_dir(path, uid)
        }
    }
    Paths::from_env(&Managed(env))
}

fn folders(env: &impl Env) -> Vec<PathBuf> {
    let home = env.var("HOME").map(PathBuf::from);
    let own = |below: &str| home.as_ref().map(|home| home.join(below));
    [
        own(".config/systemd/user"),
        own(".local/share/systemd/user"),
    ]
    .into_iter()
    .flatten()
    .chain(SYSTEM_FOLDERS.map(PathBuf::from))
    .collect()
}

/// The program of the unit `text`.
fn program(text: &str) -> Option<PathBuf> {
    let line = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("ExecStart="))?;
    let program = PathBuf::from(line.split_whitespace().next()?);
    program.is_absolute().then_some(program)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    struct Fixed(HashMap<&'static str, &'static str>);

    impl Env for Fixed {
        fn var(&self, name: &str) -> Option<String> {
            self.0.get(name).map(|value| (*value).to_owned())
        }
        fn uid(&self) -> u32 {
            1000
        }
        fn is_own_dir(&self, _: &Path, _: u32) -> bool {
            true
        }
    }

    #[test]
    fn a_unit_is_enabled_by_a_link_in_any_folder_and_masked_by_an_empty_file() {
        let folder = tempfile::tempdir().unwrap();
        let [own, system] = ["own", "system"].map(|name| folder.path().join(name));
        let folders = [own.clone(), system.clone()];
        std::fs::create_dir_all(own.join(WANTS)).unwrap();
        std::fs::create_dir_all(&system).unwrap();
        assert_eq!(DaemonUnit::find_in(&folders), None);

        let path = system.join(DAEMON_UNIT);
        std::fs::write(&path, "[Service]\nExecStart=/opt/libexec/bangerd\n").unwrap();
        let unit = DaemonUnit::find_in(&folders).unwrap();
        assert_eq!((&unit.path, unit.enabled), (&path, false));
        assert!(unit.starts(Path::new("/opt/libexec/bangerd")));
        assert!(!unit.starts(Path::new("/usr/libexec/bangerd")));

        std::os::unix::fs::symlink(&path, own.join(WANTS).join(DAEMON_UNIT)).unwrap();
        assert!(DaemonUnit::find_in(&folders).unwrap().enabled);

        std::os::unix::fs::symlink("/dev/null", own.join(DAEMON_UNIT)).unwrap();
        assert_eq!(DaemonUnit::find_in(&folders), None);
    }

    #[test]
    fn the_units_daemon_knows_nothing_of_a_shells_variables() {
        let env = Fixed(HashMap::from([
            ("HOME", "/home/o"),
            ("XDG_STATE_HOME", "/elsewhere"),
            ("XDG_RUNTIME_DIR", "/tmp/run"),
        ]));
        let paths = paths(&env).unwrap();
        assert_eq!(paths.state, Path::new("/home/o/.local/state/banger"));
        assert_eq!(paths.runtime, Path::new("/run/user/1000/banger"));
    }
}
