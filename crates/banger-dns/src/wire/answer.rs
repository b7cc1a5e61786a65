//! What other servers answer: walked through record by record, judged, and never rewritten.

use super::name::{Name, Pointers};
use super::query::Question;
use super::{Code, Malformed, flag, kind, word};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// What must not be in an answer.
pub(crate) trait Forbidden {
    /// Whether a public name may not have this address.
    fn address(&self, address: IpAddr) -> bool;
    /// Whether a public name may not be an alias of this name.
    fn alias(&self, target: &Name) -> bool;
}

/// What is to become of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It may be passed on as it is.
    Good,
    /// It did not fit; it says so, and nothing else in it counts.
    Truncated,
    /// It may be passed on up to this byte, where its answers end: what follows must not be passed on.
    GoodUpTo(usize),
    /// Its answers hold what is forbidden.
    Forbidden,
    /// The server will not or cannot help; another one may.
    Unhelpful,
}

/// Judges `message` as the answer to `question`, which was asked with `id`. An error if it is not that answer, or no
/// message at all: then the right one may still come.
pub(crate) fn judge(
    message: &[u8],
    id: u16,
    question: &Question,
    forbidden: &impl Forbidden,
) -> Result<Verdict, Malformed> {
    let flags = word(message, 2)?;
    let is_reply = flags & (flag::RESPONSE | flag::OPCODE) == flag::RESPONSE;
    if word(message, 0)? != id || !is_reply || word(message, 4)? != 1 {
        return Err(Malformed);
    }
    let asked = Question::read(message)?;
    if !asked.asks_the_same(question) {
        return Err(Malformed);
    }
    let code = flags & flag::CODE;
    if code == Code::ServerFailure.number() || code == Code::Refused.number() {
        return Ok(Verdict::Unhelpful);
    }
    if flags & flag::TRUNCATED != 0 {
        return Ok(Verdict::Truncated);
    }
    let answers = walk(message, asked.end, word(message, 6)?, forbidden)?;
    let authority = walk(message, answers.end, word(message, 8)?, forbidden)?;
    let additional = walk(message, authority.end, word(message, 10)?, forbidden)?;
    if additional.end != message.len() {
        return Err(Malformed);
    }
    Ok(if answers.forbidden {
        Verdict::Forbidden
    } else if authority.forbidden || additional.forbidden {
        Verdict::GoodUpTo(answers.end)
    } else {
        Verdict::Good
    })
}

/// A section that was walked through.
struct Walked {
    end: usize,
    forbidden: bool,
}

fn walk(
    message: &[u8],
    at: usize,
    count: u16,
    forbidden: &impl Forbidden,
) -> Result<Walked, Malformed> {
    let mut walked = Walked {
        end: at,
        forbidden: false,
    };
    for _ in 0..count {
        let (_, after) = Name::read(message, walked.end, Pointers::Allowed)?;
        let start = after + 10;
        let end = start + usize::from(word(message, after + 8)?);
        let data = message.get(start..end).ok_or(Malformed)?;
        walked.forbidden |= match word(message, after)? {
            kind::A => forbidden.address(v4(data)?),
            kind::AAAA => forbidden.address(v6(data)?),
            kind::CNAME | kind::DNAME => {
                let (target, at) = Name::read(message, start, Pointers::Allowed)?;
                if at != end {
                    return Err(Malformed);
                }
                forbidden.alias(&target)
            }
            kind::SVCB | kind::HTTPS => service(data, forbidden)?,
            _ => false,
        };
        walked.end = end;
    }
    Ok(walked)
}

fn v4(data: &[u8]) -> Result<IpAddr, Malformed> {
    let octets: [u8; 4] = data.try_into().map_err(|_| Malformed)?;
    Ok(Ipv4Addr::from(octets).into())
}

fn v6(data: &[u8]) -> Result<IpAddr, Malformed> {
    let octets: [u8; 16] = data.try_into().map_err(|_| Malformed)?;
    Ok(Ipv6Addr::from(octets).into())
}

/// Whether a service record (RFC 9460) leads to what is forbidden: it may carry addresses, too.
fn service(data: &[u8], forbidden: &impl Forbidden) -> Result<bool, Malformed> {
    const ADDRESSES_V4: u16 = 4;
    const ADDRESSES_V6: u16 = 6;
    let (target, mut at) = Name::read(data, 2, Pointers::Forbidden)?;
    let mut found = forbidden.alias(&target);
    while at < data.len() {
        let end = at + 4 + usize::from(word(data, at + 2)?);
        let value = data.get(at + 4..end).ok_or(Malformed)?;
        let addresses = match word(data, at)? {
            ADDRESSES_V4 => value.chunks(4).map(v4).collect::<Result<Vec<_>, _>>()?,
            ADDRESSES_V6 => value.chunks(16).map(v6).collect::<Result<Vec<_>, _>>()?,
            _ => Vec::new(),
        };
        found |= addresses
            .into_iter()
            .any(|address| forbidden.address(address));
        at = end;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Answering, query};
    use crate::wire::HEADER;
    use proptest::prelude::*;

    /// Forbids 10.0.0.0/8, everything of IPv6 but its documentation prefix, and aliases into `.vm`.
    struct Rules;

    impl Forbidden for Rules {
        fn address(&self, address: IpAddr) -> bool {
            match address {
                IpAddr::V4(address) => address.octets()[0] == 10,
                IpAddr::V6(address) => address.segments()[0] != 0x2001,
            }
        }
        fn alias(&self, target: &Name) -> bool {
            target.label(0) == Some(b"vm")
        }
    }

    fn asked() -> (Vec<u8>, Question) {
        let message = query("Example.com", kind::A).bytes();
        let question = Question::read(&message).unwrap();
        (message, question)
    }

    fn judged(answer: &[u8]) -> Result<Verdict, Malformed> {
        judge(answer, crate::testing::ID, &asked().1, &Rules)
    }

    fn answering() -> Answering {
        Answering::to(&asked().0)
    }

    #[test]
    fn public_addresses_are_good() {
        let answer = answering()
            .address("192.0.2.1")
            .address("2001:db8::1")
            .alias("www.example.net");
        assert_eq!(judged(&answer.bytes()), Ok(Verdict::Good));
    }

    #[test]
    fn one_forbidden_record_among_the_answers_is_enough() {
        for bad in [
            answering().address("192.0.2.1").address("10.0.0.1"),
            answering().address("fd00::1"),
            answering().alias("calm-otter.vm"),
            answering().service(&["10.1.2.3"]),
            answering().service(&["192.0.2.1", "10.1.2.3"]),
            answering().service(&["fe80::1"]),
        ] {
            assert_eq!(judged(&bad.bytes()), Ok(Verdict::Forbidden));
        }
    }

    #[test]
    fn forbidden_glue_is_cut_off() {
        let answer = answering().address("192.0.2.1");
        let end = answer.bytes().len();
        let answer = answer.additional("10.0.0.1");
        assert_eq!(judged(&answer.bytes()), Ok(Verdict::GoodUpTo(end)));
    }

    #[test]
    fn another_id_question_or_direction_is_not_the_answer() {
        let good = answering().address("192.0.2.1").bytes();
        assert_eq!(judged(&good), Ok(Verdict::Good));
        for (at, bits) in [(0, 1), (1, 1), (2, 0x80), (2, 8), (5, 1), (15, 1)] {
            let mut other = good.clone();
            other[at] ^= bits;
            assert_eq!(judged(&other), Err(Malformed), "byte {at}");
        }
        assert_eq!(judged(&[]), Err(Malformed));
    }

    #[test]
    fn the_case_of_the_question_does_not_matter() {
        let mut answer = answering().address("192.0.2.1").bytes();
        answer[HEADER + 1] ^= 0x20;
        assert_eq!(judged(&answer), Ok(Verdict::Good));
    }

    #[test]
    fn servers_that_cannot_help_are_told_apart_from_names_that_are_not_there() {
        assert_eq!(judged(&answering().code(2).bytes()), Ok(Verdict::Unhelpful));
        assert_eq!(judged(&answering().code(5).bytes()), Ok(Verdict::Unhelpful));
        assert_eq!(judged(&answering().code(3).bytes()), Ok(Verdict::Good));
        let truncated = answering().truncated().bytes();
        assert_eq!(judged(&truncated), Ok(Verdict::Truncated));
    }

    #[test]
    fn what_ends_too_early_or_too_late_is_no_answer() {
        let good = answering().address("192.0.2.1").service(&["192.0.2.7"]);
        let good = good.bytes();
        for end in 0..good.len() {
            assert_eq!(judged(&good[..end]), Err(Malformed), "{end}");
        }
        let mut longer = good;
        longer.push(0);
        assert_eq!(judged(&longer), Err(Malformed));
    }

    #[test]
    fn addresses_of_strange_lengths_are_no_answer() {
        let mut answer = answering().record(kind::A, &[10, 0, 0]).bytes();
        assert_eq!(judged(&answer), Err(Malformed));
        answer = answering().record(kind::AAAA, &[0; 15]).bytes();
        assert_eq!(judged(&answer), Err(Malformed));
        answer = answering()
            .record(kind::HTTPS, b"\0\x01\0\0\x04\0\x03\x0a\0\0")
            .bytes();
        assert_eq!(judged(&answer), Err(Malformed));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(noise in prop::collection::vec(any::<u8>(), 0..300)) {
            // With the right head, since nothing else is walked through.
            let mut answer = answering().bytes();
            answer.extend(&noise);
            for (at, byte) in (6..HEADER).zip(&noise) {
                answer[at] = byte & 3;
            }
            let _ = judged(&answer);
            let _ = judged(&noise);
        }

        #[test]
        fn no_nearly_right_answer_hides_what_is_forbidden(
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        ) {
            let mut answer = answering()
                .alias("www.example.net")
                .service(&["192.0.2.1"])
                .address("192.0.2.1")
                .address("10.0.0.1")
                .bytes();
            for (at, value) in edits {
                let at = at.index(answer.len());
                answer[at] = value;
            }
            // What another reader finds, this one must have found, too.
            let judged = judged(&answer);
            if let (Ok(Verdict::Good), Ok(packet)) = (judged, simple_dns::Packet::parse(&answer)) {
                let forbidden = packet.answers.iter().any(|record| {
                    matches!(&record.rdata, simple_dns::rdata::RData::A(a) if a.address >> 24 == 10)
                });
                prop_assert!(!forbidden, "{packet:?}");
            }
        }
    }
}
