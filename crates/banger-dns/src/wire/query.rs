//! What clients ask.

use super::name::{Name, Pointers};
use super::{CLASS_IN, Code, HEADER, Malformed, UDP_MOST, UDP_WITHOUT_EDNS, flag, kind, word};

/// The most records after the question that are looked at.
const MOST_ADDITIONAL: u16 = 4;

/// One question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Question {
    pub(crate) name: Name,
    pub(crate) kind: u16,
    pub(crate) class: u16,
    /// Where its bytes end in the message; they begin after the header.
    pub(crate) end: usize,
}

impl Question {
    /// Reads the question of `message`.
    pub(crate) fn read(message: &[u8]) -> Result<Self, Malformed> {
        // Nothing but the header is before it, so a pointer could lead nowhere.
        let (name, at) = Name::read(message, HEADER, Pointers::Forbidden)?;
        Ok(Self {
            name,
            kind: word(message, at)?,
            class: word(message, at + 2)?,
            end: at + 4,
        })
    }

    /// Whether it asks for one kind of record of the internet: not for all, not for a transfer, and not for what
    /// exists only within messages.
    pub(crate) fn is_plain(&self) -> bool {
        self.class == CLASS_IN && !matches!(self.kind, 0 | kind::OPT | 128..=255)
    }

    /// Whether both ask the same.
    pub(crate) fn asks_the_same(&self, other: &Self) -> bool {
        self.name == other.name && self.kind == other.kind && self.class == other.class
    }
}

/// What a client said about EDNS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Edns {
    /// The largest UDP message it takes, in bytes.
    pub(crate) size: u16,
    /// It wants signatures.
    pub(crate) dnssec_ok: bool,
    version: u8,
}

/// A query with one question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Query {
    pub(crate) id: u16,
    pub(crate) flags: u16,
    pub(crate) question: Question,
    pub(crate) edns: Option<Edns>,
}

/// Why a message is no query that could be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rejection {
    /// It gets no reply at all: too short to have an id, or a reply itself.
    Drop,
    /// A reply without a question.
    Bare { id: u16, flags: u16, code: Code },
}

impl Query {
    /// Reads a message of a client.
    pub(crate) fn read(message: &[u8]) -> Result<Self, Rejection> {
        let drop = |Malformed| Rejection::Drop;
        let id = word(message, 0).map_err(drop)?;
        let flags = word(message, 2).map_err(drop)?;
        // A reply to a reply could go on for ever.
        if message.len() < HEADER || flags & flag::RESPONSE != 0 {
            return Err(Rejection::Drop);
        }
        let bare = |code| Rejection::Bare { id, flags, code };
        if flags & flag::OPCODE != 0 {
            return Err(bare(Code::Refused));
        }
        let malformed = |Malformed| bare(Code::Malformed);
        let counts: [u16; 3] = [4, 6, 8].map(|at| word(message, at).unwrap_or(u16::MAX));
        let additional = word(message, 10).map_err(malformed)?;
        if flags & flag::TRUNCATED != 0 || counts != [1, 0, 0] || additional > MOST_ADDITIONAL {
            return Err(bare(Code::Malformed));
        }
        let question = Question::read(message).map_err(malformed)?;
        let edns = read_additional(message, question.end, additional).map_err(malformed)?;
        Ok(Self {
            id,
            flags,
            question,
            edns,
        })
    }

    /// Whether the client speaks a version of EDNS that is not known here.
    pub(crate) fn has_unknown_edns(&self) -> bool {
        self.edns.is_some_and(|edns| edns.version > 0)
    }

    /// The largest UDP message that the client takes, in bytes, within what is ever sent.
    pub(crate) fn udp_limit(&self) -> usize {
        self.edns.map_or(UDP_WITHOUT_EDNS, |edns| {
            usize::from(edns.size).clamp(UDP_WITHOUT_EDNS, UDP_MOST)
        })
    }
}

/// Reads the records after the question, of which only OPT says anything here.
fn read_additional(message: &[u8], at: usize, count: u16) -> Result<Option<Edns>, Malformed> {
    let mut at = at;
    let mut edns = None;
    for _ in 0..count {
        let (owner, after) = Name::read(message, at, Pointers::Allowed)?;
        if word(message, after)? == kind::OPT {
            if owner.labels() != 0 || edns.is_some() {
                return Err(Malformed);
            }
            edns = Some(Edns {
                size: word(message, after + 2)?,
                version: word(message, after + 4)?.to_be_bytes()[1],
                dnssec_ok: word(message, after + 6)? & 0x8000 != 0,
            });
        }
        at = after + 10 + usize::from(word(message, after + 8)?);
    }
    if at == message.len() {
        Ok(edns)
    } else {
        Err(Malformed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Asked, query};

    #[test]
    fn a_question_is_read() {
        let read = Query::read(&query("Calm-Otter.VM", kind::A).edns(4096).bytes()).unwrap();
        assert_eq!(read.question.name.to_string(), "calm-otter.vm.");
        assert_eq!(read.question.kind, kind::A);
        assert_eq!(read.udp_limit(), UDP_MOST);
        assert!(read.question.is_plain());
    }

    #[test]
    fn the_size_asked_for_stays_within_reason() {
        let limit = |asked: Asked| Query::read(&asked.bytes()).unwrap().udp_limit();
        assert_eq!(limit(query("a.vm", kind::A)), 512);
        assert_eq!(limit(query("a.vm", kind::A).edns(0)), 512);
        assert_eq!(limit(query("a.vm", kind::A).edns(700)), 700);
        assert_eq!(limit(query("a.vm", kind::A).edns(65535)), 1232);
    }

    #[test]
    fn replies_and_stumps_get_no_answer() {
        let mut reply = query("a.vm", kind::A).bytes();
        reply[2] |= 0x80;
        for message in [&reply[..], b"", b"\0", &[0; 11]] {
            assert_eq!(Query::read(message), Err(Rejection::Drop));
        }
    }

    #[track_caller]
    fn assert_code(message: &[u8], expected: Code) {
        match Query::read(message) {
            Err(Rejection::Bare { code, .. }) => assert_eq!(code, expected),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn updates_and_notifies_are_refused() {
        for opcode in 1..16 {
            let mut message = query("a.vm", kind::A).bytes();
            message[2] |= opcode << 3;
            assert_code(&message, Code::Refused);
        }
    }

    #[test]
    fn anything_but_one_whole_question_is_malformed() {
        let good = query("a.vm", kind::A).bytes();
        for (at, value) in [(5, 0), (5, 2), (7, 1), (9, 1), (11, 1), (11, 5), (2, 2)] {
            let mut message = good.clone();
            message[at] = value;
            assert_code(&message, Code::Malformed);
        }
        for end in HEADER..good.len() {
            assert_code(&good[..end], Code::Malformed);
        }
        let mut longer = good;
        longer.push(0);
        assert_code(&longer, Code::Malformed);
    }

    #[test]
    fn a_question_whose_name_is_a_pointer_is_malformed() {
        let mut message = query("a.vm", kind::A).bytes();
        message.truncate(HEADER);
        message.extend(*b"\xc0\x0c\0\x01\0\x01");
        assert_code(&message, Code::Malformed);
    }

    #[test]
    fn a_newer_edns_is_told_so() {
        let mut message = query("a.vm", kind::A).edns(1232).bytes();
        let at = message.len() - 5;
        message[at] = 1;
        assert!(Query::read(&message).unwrap().has_unknown_edns());
    }

    #[test]
    fn transfers_and_everything_at_once_are_not_plain() {
        for kind in [0, 41, 249, 250, 251, 252, 253, 254, 255] {
            let read = Query::read(&query("a.vm", kind).bytes()).unwrap();
            assert!(!read.question.is_plain(), "{kind}");
        }
        let mut chaos = query("version.bind", 16).bytes();
        let at = chaos.len() - 1;
        chaos[at] = 3;
        assert!(!Query::read(&chaos).unwrap().question.is_plain());
    }
}
