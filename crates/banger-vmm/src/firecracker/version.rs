//! Which Firecracker versions are used, and which are known to be broken.

use crate::version::{Verdict, Version};

/// The oldest Firecracker that is used: the first with an entropy device.
pub const OLDEST: Version = Version::new(1, 4, 0);
/// The newest Firecracker that was tried.
pub const NEWEST_TRIED: Version = Version::new(1, 17, 0);

/// A hole and the versions that have it.
struct Hole {
    name: &'static str,
    what: &'static str,
    /// First and last version with the hole, per release line.
    versions: &'static [(Version, Version)],
    /// Whether a machine as banger configures it can be attacked through it.
    reaches_us: bool,
}

/// Holes published by the vendor (Firecracker's CHANGELOG, AWS' security bulletins, the CVE records).
const HOLES: [Hole; 5] = [
    Hole {
        name: "CVE-2019-18960",
        what: "the vsock device writes outside the guest's memory",
        versions: &[
            (Version::new(0, 18, 0), Version::new(0, 18, 0)),
            (Version::new(0, 19, 0), Version::new(0, 19, 0)),
        ],
        reaches_us: true,
    },
    Hole {
        name: "CVE-2020-16843",
        what: "heavy incoming traffic freezes the network device",
        versions: &[
            (Version::new(0, 20, 0), Version::new(0, 20, 0)),
            (Version::new(0, 21, 0), Version::new(0, 21, 1)),
        ],
        reaches_us: true,
    },
    Hole {
        name: "CVE-2020-27174",
        what: "a guest fills the host's memory through the serial console",
        versions: &[
            (Version::new(0, 0, 0), Version::new(0, 21, 2)),
            (Version::new(0, 22, 0), Version::new(0, 22, 0)),
        ],
        reaches_us: true,
    },
    Hole {
        name: "CVE-2026-1386",
        what: "the jailer follows symbolic links as root",
        versions: &[
            (Version::new(0, 0, 0), Version::new(1, 13, 1)),
            (Version::new(1, 14, 0), Version::new(1, 14, 0)),
        ],
        reaches_us: false,
    },
    Hole {
        name: "CVE-2026-5747",
        what: "the virtio PCI transport (`--enable-pci`) writes out of bounds",
        versions: &[
            (Version::new(1, 13, 0), Version::new(1, 14, 3)),
            (Version::new(1, 15, 0), Version::new(1, 15, 0)),
        ],
        reaches_us: false,
    },
];

/// Reads the output of `firecracker --version`.
pub fn parse(output: &str) -> Option<Version> {
    Version::after("Firecracker v", output)
}

/// Judges a Firecracker version.
pub fn judge(version: Version) -> Verdict {
    let holes = || {
        HOLES.iter().filter(|hole| {
            hole.versions
                .iter()
                .any(|&(first, last)| (first..=last).contains(&version))
        })
    };
    if let Some(hole) = holes().find(|hole| hole.reaches_us) {
        return Verdict::Refused(format!(
            "Firecracker {version} has a known hole, {}: {}",
            hole.name, hole.what
        ));
    }
    if version < OLDEST {
        return Verdict::Refused(format!(
            "Firecracker {version} is too old: {OLDEST} or later is needed"
        ));
    }
    let mut notes: Vec<String> = holes()
        .map(|hole| {
            format!(
                "it has {} ({}), which banger does not use",
                hole.name, hole.what
            )
        })
        .collect();
    if version > NEWEST_TRIED {
        notes.push(format!(
            "it is newer than the newest that was tried ({NEWEST_TRIED})"
        ));
    }
    if notes.is_empty() {
        Verdict::Known
    } else {
        Verdict::Noted(format!("Firecracker {version}: {}", notes.join("; ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(major: u32, minor: u32, patch: u32) -> Verdict {
        judge(Version::new(major, minor, patch))
    }

    #[test]
    fn the_version_is_read_whatever_else_is_printed() {
        for (output, version) in [
            (
                "Firecracker v1.17.0-dev\n\n2026-11-24T08:55:50.69 [anonymous-instance:main] exiting",
                Version::new(1, 17, 0),
            ),
            ("Firecracker v1.16.1\n", Version::new(1, 16, 1)),
            (
                "noise\nFirecracker v0.25.0\nSupported",
                Version::new(0, 25, 0),
            ),
        ] {
            assert_eq!(parse(output), Some(version), "{output}");
        }
        assert_eq!(parse("Firecracker"), None);
        assert_eq!(parse("Firecracker v1"), None);
    }

    #[test]
    fn versions_with_a_hole_that_reaches_us_are_refused_by_its_name() {
        for (version, hole) in [
            (Version::new(0, 18, 0), "CVE-2019-18960"),
            (Version::new(0, 21, 1), "CVE-2020-16843"),
            (Version::new(0, 21, 2), "CVE-2020-27174"),
            (Version::new(0, 22, 0), "CVE-2020-27174"),
        ] {
            match judge(version) {
                Verdict::Refused(why) => assert!(why.contains(hole), "{why}"),
                other => panic!("{version}: {other:?}"),
            }
        }
        assert!(matches!(judged(0, 25, 0), Verdict::Refused(why) if why.contains("too old")));
    }

    #[test]
    fn holes_in_what_is_not_used_and_unknown_newer_versions_are_noted() {
        assert!(matches!(judged(1, 14, 3), Verdict::Noted(why) if why.contains("CVE-2026-5747")));
        assert!(matches!(judged(1, 12, 0), Verdict::Noted(why) if why.contains("CVE-2026-1386")));
        assert_eq!(judged(1, 14, 4), Verdict::Known);
        assert_eq!(judged(1, 15, 1), Verdict::Known);
        assert_eq!(judged(1, 16, 1), Verdict::Known);
        assert!(matches!(judged(2, 0, 0), Verdict::Noted(why) if why.contains("newer")));
    }
}
