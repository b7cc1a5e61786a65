//! Domain names.

use super::Malformed;
use std::fmt::Write as _;

/// The longest name, in bytes with its lengths and the root's zero.
const MOST_BYTES: usize = 255;
/// The most labels that fit into that.
const MOST_LABELS: usize = 127;
/// The longest label.
const MOST_LABEL: usize = 63;

/// A domain name in lower case, as its bytes on the wire. It lives on the stack.
#[derive(Clone, Copy)]
pub(crate) struct Name {
    bytes: [u8; MOST_BYTES],
    length: u8,
    /// Where each label begins, from the left.
    starts: [u8; MOST_LABELS],
    labels: u8,
}

/// Whether a name may point back to bytes that came before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pointers {
    Allowed,
    Forbidden,
}

impl Name {
    const EMPTY: Self = Self {
        bytes: [0; MOST_BYTES],
        length: 0,
        starts: [0; MOST_LABELS],
        labels: 0,
    };

    /// Reads the name at `at`, and gives where it ends.
    pub(crate) fn read(
        message: &[u8],
        at: usize,
        pointers: Pointers,
    ) -> Result<(Self, usize), Malformed> {
        let mut name = Self::EMPTY;
        let mut at = at;
        let mut end = None;
        // Each pointer must lead to before the one that was followed last, so this comes to an end.
        let mut before = at;
        loop {
            let length = usize::from(*message.get(at).ok_or(Malformed)?);
            match length {
                0 => {
                    name.length += 1;
                    return Ok((name, end.unwrap_or(at + 1)));
                }
                1..=MOST_LABEL => {
                    let label = message.get(at + 1..at + 1 + length).ok_or(Malformed)?;
                    name.push(label)?;
                    at += 1 + length;
                }
                0xc0.. if pointers == Pointers::Allowed => {
                    let target = usize::from(super::word(message, at)? & 0x3fff);
                    if target >= before {
                        return Err(Malformed);
                    }
                    end.get_or_insert(at + 2);
                    at = target;
                    before = target;
                }
                _ => return Err(Malformed),
            }
        }
    }

    /// Reads a name as people write it, with or without the last dot. `None` if it is none.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut name = Self::EMPTY;
        for label in text.strip_suffix('.').unwrap_or(text).split('.') {
            if label.is_empty() || label.len() > MOST_LABEL {
                return None;
            }
            name.push(label.as_bytes()).ok()?;
        }
        name.length += 1;
        Some(name)
    }

    fn push(&mut self, label: &[u8]) -> Result<(), Malformed> {
        let start = usize::from(self.length);
        let end = start + 1 + label.len();
        // One byte is left for the root.
        if end >= MOST_BYTES {
            return Err(Malformed);
        }
        self.starts[usize::from(self.labels)] = self.length;
        self.labels += 1;
        #[expect(clippy::cast_possible_truncation, reason = "less than 255")]
        {
            self.bytes[start] = label.len() as u8;
            self.length = end as u8;
        }
        let copy = &mut self.bytes[start + 1..end];
        copy.copy_from_slice(label);
        copy.make_ascii_lowercase();
        Ok(())
    }

    /// How many labels it has; the root has none.
    pub(crate) fn labels(&self) -> usize {
        usize::from(self.labels)
    }

    /// The label that is `index` labels away from the right end: that of the top level is 0.
    pub(crate) fn label(&self, index: usize) -> Option<&[u8]> {
        let from_left = self.labels().checked_sub(index + 1)?;
        let start = usize::from(self.starts[from_left]);
        let length = usize::from(self.bytes[start]);
        self.bytes.get(start + 1..start + 1 + length)
    }

    /// Where its last `labels` labels begin, counted from its first byte.
    pub(crate) fn suffix_offset(&self, labels: usize) -> usize {
        match self.labels().checked_sub(labels) {
            Some(0) | None => 0,
            Some(left) if left == self.labels() => usize::from(self.length) - 1,
            Some(left) => usize::from(self.starts[left]),
        }
    }

    /// Whether it is `zone` or below it.
    pub(crate) fn is_within(&self, zone: &Self) -> bool {
        self.labels >= zone.labels
            && self.wire()[self.suffix_offset(zone.labels())..] == *zone.wire()
    }

    fn wire(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}

impl PartialEq for Name {
    fn eq(&self, other: &Self) -> bool {
        self.wire() == other.wire()
    }
}

impl Eq for Name {}

/// As in zone files: what is no letter, digit, hyphen or underscore is written as its number, so that a guest's name
/// never brings a control character into a log.
impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.labels == 0 {
            return f.write_char('.');
        }
        for index in (0..self.labels()).rev() {
            for &byte in self.label(index).unwrap_or_default() {
                if byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_' {
                    f.write_char(char::from(byte))?;
                } else {
                    write!(f, "\\{byte:03}")?;
                }
            }
            f.write_char('.')?;
        }
        Ok(())
    }
}

impl std::fmt::Debug for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    #[test]
    fn case_and_the_last_dot_make_no_difference() {
        assert_eq!(name("Calm-OTTER.vm."), name("calm-otter.vm"));
        assert_eq!(name("calm-otter.vm").to_string(), "calm-otter.vm.");
    }

    #[test]
    fn labels_are_counted_from_the_right() {
        let name = name("a.bc.vm");
        assert_eq!(name.labels(), 3);
        assert_eq!(name.label(0), Some(&b"vm"[..]));
        assert_eq!(name.label(2), Some(&b"a"[..]));
        assert_eq!(name.label(3), None);
        assert_eq!(name.suffix_offset(1), 5);
        assert_eq!(name.suffix_offset(3), 0);
        assert_eq!(name.suffix_offset(0), 8);
    }

    #[test]
    fn a_name_is_within_a_zone_by_whole_labels() {
        assert!(name("a.corp.example").is_within(&name("corp.example")));
        assert!(name("corp.example").is_within(&name("corp.example")));
        assert!(!name("xcorp.example").is_within(&name("corp.example")));
        assert!(!name("example").is_within(&name("corp.example")));
        // A label whose bytes look like the zone's.
        let (tricky, _) = Name::read(b"\x03\x02vm\0", 0, Pointers::Forbidden).unwrap();
        assert!(!tricky.is_within(&name("vm")));
    }

    #[test]
    fn bytes_of_guests_are_escaped() {
        let (hostile, end) = Name::read(b"\x05a\x1b[2.\x02vm\0", 0, Pointers::Forbidden).unwrap();
        assert_eq!(end, 10);
        assert_eq!(hostile.to_string(), "a\\027\\0912\\046.vm.");
    }

    #[test]
    fn pointers_lead_backwards_only() {
        let message = b"\x02vm\0\x01a\xc0\x00\xff";
        let (found, end) = Name::read(message, 4, Pointers::Allowed).unwrap();
        assert_eq!((found, end), (name("a.vm"), 8));
        assert!(Name::read(message, 4, Pointers::Forbidden).is_err());
        for hostile in [
            &b"\xc0\x00"[..],
            b"\xc0\x02\xc0\x00",
            b"\x01a\xc0\x00",
            b"\xc0",
            b"\x80\x00",
            b"\x40\x00",
        ] {
            assert!(Name::read(hostile, 0, Pointers::Allowed).is_err());
        }
    }

    #[test]
    fn too_long_names_are_refused() {
        let label = "x".repeat(63);
        let fits = [label.as_str(), &label, &label, &label[..61]].join(".");
        assert!(Name::parse(&fits).is_some());
        assert!(Name::parse(&format!("{fits}x")).is_none());
        assert!(Name::parse(&"x".repeat(64)).is_none());
        assert!(Name::parse("a..b").is_none() && Name::parse("").is_none());
        let deep = "a.".repeat(127);
        assert_eq!(Name::parse(&deep).map(|name| name.labels()), Some(127));
        assert!(Name::parse(&format!("{deep}a")).is_none());
    }
}
