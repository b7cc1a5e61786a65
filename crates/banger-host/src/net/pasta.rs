//! The way out of an ordinary user's namespace: `pasta` of the passt project.

use super::keeper::{self, Keeper, KeeperError};
use crate::crash::{Side, point};
use crate::exec::{ExecError, Run};
use crate::op::{NamespaceAnswer, NamespaceOp};
use std::ffi::OsStr;
use std::fmt;
use std::path::Path;
use std::time::Duration;

const VERSION_TIMEOUT: Duration = Duration::from_secs(5);
/// The first year whose releases pass on the end of a connection that is half closed already.
const PASSES_ENDS: u16 = 2024;

/// The namespace could not be given a way out.
#[derive(Debug, thiserror::Error)]
pub enum PastaError {
    /// The keeper is gone, or refused.
    #[error(transparent)]
    Keeper(#[from] KeeperError),
    /// `pasta` gave up.
    #[error("cannot give the guests a way to the internet: {why}")]
    Failed {
        /// What it said.
        why: String,
    },
    /// With root the way out is the veth.
    #[error("the namespace has no user namespace: its way out is the host's veth, not `pasta`")]
    NotRootless,
    /// It says that it is ready, and the namespace has nothing.
    #[error("`pasta` is ready, but the namespace has no default route through it")]
    NoRoute,
}

/// Gives the namespace of `keeper`, which is in a user namespace, a way to the internet if it has none: starts `helper`
/// (a `banger-netns`), which starts `pasta` outside of the namespace, then has what leaves masqueraded. Both end with
/// the keeper and outlive this process. Starting `pasta` takes a while the first time; afterwards it is one request.
///
/// # Errors
/// `pasta` is not installed or gives up, or the keeper refuses.
pub fn ensure(keeper: &Keeper, helper: &Path, pasta: &Path) -> Result<(), PastaError> {
    if is_ready(keeper)? {
        return Ok(());
    }
    let pid = match keeper.request(NamespaceOp::Hello)?.0 {
        NamespaceAnswer::Hello {
            pid,
            user_namespace: true,
            ..
        } => pid.to_string(),
        _ => return Err(PastaError::NotRootless),
    };
    let args = [
        OsStr::new("--way-out-of"),
        OsStr::new(&pid),
        OsStr::new("--pasta"),
        pasta.as_os_str(),
    ];
    point("way-out", "pasta", Side::Before);
    keeper::start(helper, &args).map_err(|error| match error {
        KeeperError::NotReady { why } => PastaError::Failed { why },
        error => PastaError::Keeper(error),
    })?;
    point("way-out", "pasta", Side::After);
    if is_ready(keeper)? {
        Ok(())
    } else {
        Err(PastaError::NoRoute)
    }
}

fn is_ready(keeper: &Keeper) -> Result<bool, KeeperError> {
    let (answer, _) = keeper.request(NamespaceOp::EnsureWayOut)?;
    Ok(answer == NamespaceAnswer::WayOut { ready: true })
}

/// The processes that are the way out of the namespace of `keeper`: `pasta`, and the one that holds it.
pub fn processes(keeper: i32) -> Vec<i32> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let mut found: Vec<i32> = entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid| {
            // One that ends just now has no words.
            std::fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|words| is_way_out(&words, keeper))
        })
        .collect();
    found.sort_unstable();
    found
}

/// Whether a process with these words, each with a NUL after it, is of the way out of `keeper`'s namespace.
fn is_way_out(words: &[u8], keeper: i32) -> bool {
    let words: Vec<&[u8]> = words.split(|byte| *byte == 0).collect();
    let says = |option: &str, value: &str| {
        let pair = [option.as_bytes(), value.as_bytes()];
        words.windows(2).any(|two| two == pair)
    };
    says("--way-out-of", &keeper.to_string()) || says("--netns", &format!("/proc/{keeper}/ns/net"))
}

/// What `pasta` says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// Its releases are named after their day; unknown where the packager left it out, as Debian did in 2023.
    year: Option<u16>,
    said: String,
}

impl Version {
    fn read(said: &str) -> Self {
        let line = said.lines().next().unwrap_or_default();
        let line = line.strip_prefix("pasta ").unwrap_or(line).trim();
        // `2024_02_20.1e6f92b`, or `0.0~git20230309.7c7625d-1` of a package.
        let years = line
            .split(|c: char| !c.is_ascii_digit())
            .filter(|digits| digits.len() == 4 || digits.len() == 8)
            .filter_map(|digits| digits[..4].parse().ok());
        Self {
            year: years.into_iter().find(|year| (2020..2100).contains(year)),
            said: line.chars().take(80).collect(),
        }
    }

    /// Whether it is one that often keeps the end of a connection from a guest that has ended its own side.
    pub fn loses_ends(&self) -> bool {
        self.year.is_none_or(|year| year < PASSES_ENDS)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.said.escape_debug())
    }
}

/// Asks `pasta` for its version.
///
/// # Errors
/// It is not installed, or does not say.
pub fn version(pasta: &Path) -> Result<Version, ExecError> {
    let output = Run::new(pasta)
        .arg("--version")
        .timeout(VERSION_TIMEOUT)
        .run()?;
    Ok(Version::read(&String::from_utf8_lossy(&output.stdout)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_way_out_is_known_by_the_keeper_that_it_is_for() {
        let holder = b"/usr/libexec/banger/banger-netns\0--way-out-of\x00123\0--pasta\0pasta\0";
        let pasta =
            b"pasta\0--config-net\0--netns\0/proc/123/ns/net\0--userns\0/proc/123/ns/user\0";
        for words in [&holder[..], &pasta[..]] {
            assert!(is_way_out(words, 123));
            assert!(!is_way_out(words, 12));
        }
        assert!(!is_way_out(b"less\0--way-out-of 123\0", 123));
        assert!(!is_way_out(b"", 123));
    }

    #[test]
    fn a_version_of_2023_or_of_no_known_day_loses_ends() {
        for (said, loses) in [
            ("pasta unknown version\nCopyright Red Hat\n", true),
            ("pasta 2023_03_09.7c7625d", true),
            ("pasta 0.0~git20230309.7c7625d-1", true),
            ("pasta 2024_02_20.1e6f92b", false),
            ("pasta 0.0~git20250503.587980c-2", false),
            ("", true),
        ] {
            assert_eq!(Version::read(said).loses_ends(), loses, "{said}");
        }
        let said = Version::read("pasta 2024_02_20.1e6f92b\nCopyright Red Hat");
        assert_eq!(said.to_string(), "2024_02_20.1e6f92b");
    }
}
