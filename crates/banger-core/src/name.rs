//! Names of VMs, images and kernels. A VM's name becomes a DNS label, so all names follow the rules of one.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The longest name allowed: the limit of a DNS label.
pub const MAX_NAME_LENGTH: usize = 63;

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The text is empty.
    #[error("a name cannot be empty")]
    Empty,
    /// The text is longer than [`MAX_NAME_LENGTH`].
    #[error("name `{}…` has {length} characters; at most {MAX_NAME_LENGTH} are allowed", .name.chars().take(20).collect::<String>().escape_debug())]
    TooLong {
        /// The text that was given.
        name: String,
        /// Its length in characters.
        length: usize,
    },
    /// The text holds a character outside `[a-z0-9-]`.
    #[error("name `{}` contains {character:?}; only a-z, 0-9 and hyphens are allowed", .name.escape_debug())]
    BadCharacter {
        /// The text that was given.
        name: String,
        /// The first character that is not allowed.
        character: char,
    },
    /// The text starts or ends with a hyphen.
    #[error("name `{name}` starts or ends with a hyphen")]
    Hyphen {
        /// The text that was given.
        name: String,
    },
}

fn check(name: &str) -> Result<(), NameError> {
    if name.is_empty() {
        return Err(NameError::Empty);
    }
    let length = name.chars().count();
    if length > MAX_NAME_LENGTH {
        return Err(NameError::TooLong {
            name: name.to_owned(),
            length,
        });
    }
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if let Some(character) = name.chars().find(|&c| !allowed(c)) {
        return Err(NameError::BadCharacter {
            name: name.to_owned(),
            character,
        });
    }
    if name.starts_with('-') || name.ends_with('-') {
        return Err(NameError::Hyphen {
            name: name.to_owned(),
        });
    }
    Ok(())
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
        #[serde(try_from = "String", into = "String")]
        #[schemars(with = "String")]
        pub struct $name(String);

        impl $name {
            /// Checks `name` and wraps it.
            pub fn new(name: impl Into<String>) -> Result<Self, NameError> {
                let name = name.into();
                check(&name)?;
                Ok(Self(name))
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(name: String) -> Result<Self, NameError> {
                Self::new(name)
            }
        }

        impl std::str::FromStr for $name {
            type Err = NameError;
            fn from_str(name: &str) -> Result<Self, NameError> {
                Self::new(name)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type!(
    /// A VM's name: unique among VMs that are not in the trash, and its host name.
    VmName
);
name_type!(
    /// An image's name: a movable pointer to an image id.
    ImageName
);
name_type!(
    /// A kernel bundle's name: a movable pointer to a kernel id.
    KernelName
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dns_labels_are_names() {
        for name in ["a", "0", "calm-otter", "a--b", &"x".repeat(63)] {
            assert!(VmName::new(name).is_ok(), "{name}");
        }
    }

    #[test]
    fn what_is_no_dns_label_is_refused_with_its_reason() {
        assert_eq!(VmName::new(""), Err(NameError::Empty));
        assert!(matches!(
            VmName::new("x".repeat(64)),
            Err(NameError::TooLong { length: 64, .. })
        ));
        for name in ["-a", "a-", "-"] {
            assert!(
                matches!(VmName::new(name), Err(NameError::Hyphen { .. })),
                "{name}"
            );
        }
        for (name, bad) in [
            ("Otter", 'O'),
            ("a.b", '.'),
            ("a/b", '/'),
            ("é", 'é'),
            ("a\u{1b}[0m", '\u{1b}'),
        ] {
            match VmName::new(name) {
                Err(NameError::BadCharacter { character, .. }) => assert_eq!(character, bad),
                other => panic!("{name:?}: {other:?}"),
            }
        }
    }

    #[test]
    fn an_error_never_prints_control_characters() {
        let error = VmName::new("a\u{1b}[2J").unwrap_err().to_string();
        assert!(!error.contains('\u{1b}'), "{error:?}");
    }
}
