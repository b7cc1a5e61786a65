//! The words that every object of ours on the host carries.

use super::Caller;
use banger_core::id::InstanceId;
use std::fmt;

/// Whose an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tag {
    pub(super) uid: u32,
    pub(super) instance: InstanceId,
}

impl Tag {
    pub(super) fn new(caller: Caller, instance: InstanceId) -> Self {
        Self {
            uid: caller.uid,
            instance,
        }
    }

    /// The tag that `text` is, to the last byte.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let rest = text.strip_prefix("banger uid=")?;
        let (uid, instance) = rest.split_once(" instance=")?;
        let tag = Self {
            uid: uid.parse().ok()?,
            instance: instance.parse().ok()?,
        };
        (tag.to_string() == text).then_some(tag)
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "banger uid={} instance={}", self.uid, self.instance)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0198c2a4-7d1e-7b3a-9c4d-1f2e3d4c5b6a";

    #[test]
    fn only_the_very_words_are_a_tag() {
        let tag = Tag {
            uid: 1000,
            instance: ID.parse().unwrap(),
        };
        assert_eq!(tag.to_string(), format!("banger uid=1000 instance={ID}"));
        assert_eq!(Tag::parse(&tag.to_string()), Some(tag));
        for wrong in [
            String::new(),
            format!("banger uid=1000 instance={ID} "),
            format!("banger uid=+1000 instance={ID}"),
            format!("banger uid=01000 instance={ID}"),
            format!("banger uid=1000 instance={}", ID.to_uppercase()),
            format!("Banger uid=1000 instance={ID}"),
            "banger uid=1000 instance=".to_owned(),
        ] {
            assert_eq!(Tag::parse(&wrong), None, "{wrong}");
        }
    }
}
