//! Versions as VMMs print them.

/// `major.minor.patch`; what follows (`-dev`, a distribution's suffix) is not part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// Changes of the whole.
    pub major: u32,
    /// Releases.
    pub minor: u32,
    /// Fixes.
    pub patch: u32,
}

impl Version {
    /// The version `major.minor.patch`.
    pub const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self {
            major,
            minor,
            patch,
        }
    }

    /// Reads the version that follows `prefix` on a line of `output`.
    pub(crate) fn after(prefix: &str, output: &str) -> Option<Self> {
        let rest = output
            .lines()
            .find_map(|line| line.trim_start().strip_prefix(prefix))?;
        let end = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(rest.len());
        let mut numbers = rest[..end].split('.').map(str::parse::<u32>);
        let (major, minor) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
        let patch = numbers.next().and_then(Result::ok).unwrap_or(0);
        Some(Self::new(major, minor, patch))
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// What is thought of a VMM's version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Known, and fine.
    Known,
    /// Used, but a person should know this.
    Noted(String),
    /// Not used, for this reason.
    Refused(String),
}
