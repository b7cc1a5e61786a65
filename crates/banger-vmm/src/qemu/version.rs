//! Which QEMU versions are used.

use crate::version::{Verdict, Version};

/// The oldest QEMU whose command line is known to take ours (Debian 12's).
pub const OLDEST: Version = Version::new(7, 2, 0);
/// The newest QEMU that was tried.
pub const NEWEST_TRIED: Version = Version::new(10, 0, 2);

/// Reads the output of `qemu-system-x86_64 --version`.
pub fn parse(output: &str) -> Option<Version> {
    Version::after("QEMU emulator version ", output)
}

/// Judges a QEMU version.
pub fn judge(version: Version) -> Verdict {
    if version < OLDEST {
        Verdict::Refused(format!(
            "QEMU {version} is too old: {OLDEST} or later is needed"
        ))
    } else if version.major > NEWEST_TRIED.major {
        Verdict::Noted(format!(
            "QEMU {version} is newer than the newest that was tried ({NEWEST_TRIED})"
        ))
    } else {
        Verdict::Known
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_versions_that_distributions_print_are_read() {
        for (output, version) in [
            (
                "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2~bpo12+1)\nCopyright (c)",
                Version::new(10, 0, 2),
            ),
            (
                "QEMU emulator version 7.2.17 (Debian 1:7.2+dfsg-7)",
                Version::new(7, 2, 17),
            ),
            ("QEMU emulator version 9.1.50", Version::new(9, 1, 50)),
        ] {
            assert_eq!(parse(output), Some(version), "{output}");
        }
        assert_eq!(parse("QEMU emulator version ten"), None);
        assert_eq!(parse(""), None);
    }

    #[test]
    fn too_old_is_refused_and_too_new_is_noted() {
        assert!(matches!(judge(Version::new(6, 2, 0)), Verdict::Refused(_)));
        assert_eq!(judge(Version::new(7, 2, 0)), Verdict::Known);
        assert_eq!(judge(Version::new(10, 0, 13)), Verdict::Known);
        assert!(matches!(judge(Version::new(11, 0, 0)), Verdict::Noted(_)));
    }
}
