//! What is answered here: at most one record, or the SOA that says for how long there is none.

use super::query::{Edns, Query};
use super::{CLASS_IN, Code, HEADER, UDP_MOST, flag, kind};
use std::net::Ipv4Addr;
use std::sync::Arc;

/// For how many seconds an answer may be remembered: a VM's name goes with the VM, and may be another's at once.
pub(crate) const POSITIVE_TTL: u32 = 0;
/// For how many seconds it may be remembered that a name is not there: it may come with the next command.
pub(crate) const NEGATIVE_TTL: u32 = 0;

/// A pointer to the question's name.
const QUESTION_NAME: u16 = 0xc00c;

/// The record that answers a question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Record {
    Address(Ipv4Addr),
    /// The VM's name, without `.vm`.
    Pointer(Arc<str>),
    Authority,
    NameServer,
}

/// The zone that speaks: its apex is the last `labels` labels of the question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Apex {
    pub(crate) labels: usize,
    pub(crate) serial: u32,
}

/// Why a question is not answered, for people: an extended error (RFC 8914).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Why {
    /// The guest may not ask for names of the internet.
    NoNat,
    /// This listener answers for the instance's names alone.
    OnlyOwnNames,
    /// What was asked for is never answered.
    Kind,
    /// The answer leads to where no public name may lead.
    Private,
    /// None of the host's resolvers answered.
    NoResolver,
    /// Too many questions wait for the host's resolvers.
    Busy,
}

impl Why {
    const fn number(self) -> u16 {
        match self {
            Self::NoNat | Self::OnlyOwnNames => 18,
            Self::Kind => 21,
            Self::Private => 17,
            Self::NoResolver => 23,
            Self::Busy => 0,
        }
    }

    const fn text(self) -> &'static str {
        match self {
            Self::NoNat => "banger: NAT is off for this VM, so only names below .vm are answered",
            Self::OnlyOwnNames => "banger: only names below .vm are answered here",
            Self::Kind => "banger: this kind of query is not answered",
            Self::Private => "banger: a public name that points into a private network",
            Self::NoResolver => "banger: none of the host's resolvers could answer",
            Self::Busy => "banger: too many queries wait for the host's resolvers",
        }
    }
}

/// All of a reply but what it repeats of the query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) code: Code,
    pub(crate) authoritative: bool,
    /// The client could ask for names of the internet, too.
    pub(crate) recursion: bool,
    pub(crate) truncated: bool,
    pub(crate) record: Option<Record>,
    pub(crate) apex: Option<Apex>,
    pub(crate) why: Option<Why>,
}

impl Reply {
    /// Nothing but a code.
    pub(crate) fn code(code: Code) -> Self {
        Self {
            code,
            authoritative: false,
            recursion: false,
            truncated: false,
            record: None,
            apex: None,
            why: None,
        }
    }

    /// A code with a reason.
    pub(crate) fn because(code: Code, why: Why) -> Self {
        Self {
            why: Some(why),
            ..Self::code(code)
        }
    }

    /// A code with a reason, to a client that may ask for names of the internet.
    pub(crate) fn recursive(code: Code, why: Why) -> Self {
        Self {
            recursion: true,
            ..Self::because(code, why)
        }
    }

    /// Nothing but the news that the answer is too long, to such a client.
    pub(crate) fn truncated() -> Self {
        Self {
            truncated: true,
            recursion: true,
            ..Self::code(Code::NoError)
        }
    }

    /// Writes the reply to `query`, whose bytes are `message`, over `out`.
    pub(crate) fn write(&self, message: &[u8], query: &Query, limit: usize, out: &mut Vec<u8>) {
        self.write_all(message, query, out);
        if out.len() > limit {
            let short = Self {
                truncated: true,
                record: None,
                apex: None,
                why: None,
                ..*self
            };
            short.write_all(message, query, out);
        }
    }

    fn write_all(&self, message: &[u8], query: &Query, out: &mut Vec<u8>) {
        let set = |condition: bool, flag: u16| if condition { flag } else { 0 };
        let flags = flag::RESPONSE
            | query.flags & (flag::RECURSION_DESIRED | flag::CHECKING_DISABLED)
            | set(self.authoritative, flag::AUTHORITATIVE)
            | set(self.truncated, flag::TRUNCATED)
            | set(self.recursion, flag::RECURSION_AVAILABLE)
            | self.code.number() & flag::CODE;
        // Whoever asked for the SOA gets it as the answer.
        let authority = self.apex.filter(|_| self.record.is_none());
        let counts = [
            1,
            u16::from(self.record.is_some()),
            u16::from(authority.is_some()),
            u16::from(query.edns.is_some()),
        ];
        begin(query.id, flags, counts, out);
        out.extend(&message[HEADER..query.question.end]);
        if let Some(record) = &self.record {
            self.write_record(record, query, out);
        }
        if let Some(apex) = authority {
            write_soa(pointer_to(query, apex), apex, NEGATIVE_TTL, out);
        }
        if let Some(edns) = &query.edns {
            write_opt(edns, self.code, self.why, out);
        }
    }

    fn write_record(&self, record: &Record, query: &Query, out: &mut Vec<u8>) {
        let apex = self.apex.unwrap_or(Apex {
            labels: query.question.name.labels(),
            serial: 0,
        });
        match record {
            Record::Address(address) => {
                write_head(QUESTION_NAME, kind::A, POSITIVE_TTL, 4, out);
                out.extend(address.octets());
            }
            Record::Pointer(name) => {
                let name = name.as_bytes();
                #[expect(
                    clippy::cast_possible_truncation,
                    reason = "a VM's name has at most 63 bytes"
                )]
                let length = name.len() as u8;
                write_head(
                    QUESTION_NAME,
                    kind::PTR,
                    POSITIVE_TTL,
                    u16::from(length) + 5,
                    out,
                );
                out.push(length);
                out.extend(name);
                out.extend(b"\x02vm\0");
            }
            Record::Authority => write_soa(QUESTION_NAME, apex, POSITIVE_TTL, out),
            Record::NameServer => {
                write_head(QUESTION_NAME, kind::NS, POSITIVE_TTL, 2, out);
                out.extend(pointer_to(query, apex).to_be_bytes());
            }
        }
    }
}

/// Writes a reply without a question over `out`.
pub(crate) fn write_bare(id: u16, flags: u16, code: Code, out: &mut Vec<u8>) {
    let flags = flag::RESPONSE
        | flags & (flag::OPCODE | flag::RECURSION_DESIRED)
        | code.number() & flag::CODE;
    begin(id, flags, [0; 4], out);
}

/// Begins a message with its header.
pub(crate) fn begin(id: u16, flags: u16, counts: [u16; 4], out: &mut Vec<u8>) {
    out.clear();
    out.extend(id.to_be_bytes());
    out.extend(flags.to_be_bytes());
    for count in counts {
        out.extend(count.to_be_bytes());
    }
}

/// Where the apex stands in the question.
fn pointer_to(query: &Query, apex: Apex) -> u16 {
    let offset = HEADER + query.question.name.suffix_offset(apex.labels);
    #[expect(clippy::cast_possible_truncation, reason = "at most 12 + 254")]
    let offset = offset as u16;
    0xc000 | offset
}

fn write_head(owner: u16, kind: u16, ttl: u32, length: u16, out: &mut Vec<u8>) {
    out.extend(owner.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(CLASS_IN.to_be_bytes());
    out.extend(ttl.to_be_bytes());
    out.extend(length.to_be_bytes());
}

/// The zone is its own name server, which has no address and takes no mail, like the empty zones of RFC 6303.
fn write_soa(owner: u16, apex: Apex, ttl: u32, out: &mut Vec<u8>) {
    const MAILBOX: &[u8] = b"\x06nobody\x07invalid\0";
    let length = 2 + MAILBOX.len() + 5 * 4;
    #[expect(clippy::cast_possible_truncation, reason = "38")]
    write_head(owner, kind::SOA, ttl, length as u16, out);
    out.extend(owner.to_be_bytes());
    out.extend(MAILBOX);
    for number in [apex.serial, 3600, 1200, 604_800, NEGATIVE_TTL] {
        out.extend(number.to_be_bytes());
    }
}

/// Writes what this side has to say about EDNS to one who knows it.
pub(crate) fn write_opt(edns: &Edns, code: Code, why: Option<Why>, out: &mut Vec<u8>) {
    write_opt_head(UDP_MOST as u16, edns.dnssec_ok, code.number() >> 4, out);
    let Some(why) = why else {
        out.extend([0, 0]);
        return;
    };
    const EXTENDED_ERROR: u16 = 15;
    #[expect(clippy::cast_possible_truncation, reason = "a short text of ours")]
    let length = why.text().len() as u16;
    for number in [length + 6, EXTENDED_ERROR, length + 2, why.number()] {
        out.extend(number.to_be_bytes());
    }
    out.extend(why.text().as_bytes());
}

/// An OPT record up to the length of its options.
pub(crate) fn write_opt_head(size: u16, dnssec_ok: bool, upper_code: u16, out: &mut Vec<u8>) {
    out.push(0);
    for number in [
        kind::OPT,
        size,
        upper_code << 8,
        if dnssec_ok { 0x8000 } else { 0 },
    ] {
        out.extend(number.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::query;
    use simple_dns::{Packet, RCODE, rdata::RData};

    fn written(asked: &crate::testing::Asked, reply: &Reply, limit: usize) -> Vec<u8> {
        let message = asked.bytes();
        let mut out = vec![1, 2, 3];
        let query = Query::read(&message).unwrap();
        reply.write(&message, &query, limit, &mut out);
        out
    }

    #[test]
    fn an_address_reads_as_it_was_written() {
        let reply = Reply {
            authoritative: true,
            record: Some(Record::Address(Ipv4Addr::new(172, 16, 0, 9))),
            ..Reply::code(Code::NoError)
        };
        let bytes = written(&query("A.vm", kind::A).edns(1232), &reply, 512);
        let packet = Packet::parse(&bytes).unwrap();
        assert_eq!(packet.id(), crate::testing::ID);
        assert_eq!(packet.questions[0].qname.to_string(), "A.vm");
        assert_eq!(packet.answers[0].ttl, POSITIVE_TTL);
        assert_eq!(packet.answers[0].name.to_string(), "A.vm");
        assert!(matches!(&packet.answers[0].rdata, RData::A(a) if a.address == 0xac10_0009));
        assert_eq!(packet.opt().unwrap().udp_packet_size, 1232);
    }

    #[test]
    fn what_is_not_there_comes_with_the_zone_that_says_so() {
        let reply = Reply {
            apex: Some(Apex {
                labels: 1,
                serial: 7,
            }),
            ..Reply::code(Code::NoName)
        };
        let bytes = written(&query("a.b.vm", kind::A), &reply, 512);
        let packet = Packet::parse(&bytes).unwrap();
        assert_eq!(packet.rcode(), RCODE::NameError);
        assert!(packet.opt().is_none());
        let soa = &packet.name_servers[0];
        assert_eq!(
            (soa.name.to_string().as_str(), soa.ttl),
            ("vm", NEGATIVE_TTL)
        );
        match &soa.rdata {
            RData::SOA(soa) => {
                assert_eq!(soa.mname.to_string(), "vm");
                assert_eq!(soa.rname.to_string(), "nobody.invalid");
                assert_eq!((soa.serial, soa.minimum), (7, NEGATIVE_TTL));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_refusal_says_why_to_who_can_read_it() {
        let reply = Reply::because(Code::Refused, Why::NoNat);
        let bytes = written(&query("example.com", kind::A).edns(512), &reply, 512);
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.contains("NAT is off for this VM"), "{text:?}");
        let packet = Packet::parse(&bytes).unwrap();
        assert_eq!(packet.opt().unwrap().opt_codes[0].code, 15);
        let plain = written(&query("example.com", kind::A), &reply, 512);
        assert_eq!(plain.len(), query("example.com", kind::A).bytes().len());
    }

    #[test]
    fn the_longest_replies_fit_into_the_smallest_message() {
        let label = "x".repeat(63);
        let long = [label.as_str(), &label, &label, &label[..61]].join(".");
        let apex = Some(Apex {
            labels: 1,
            serial: 0,
        });
        for reply in [
            Reply {
                apex,
                ..Reply::because(Code::NoName, Why::Private)
            },
            Reply {
                apex,
                record: Some(Record::Pointer(label.as_str().into())),
                ..Reply::because(Code::NoError, Why::NoNat)
            },
        ] {
            let bytes = written(&query(&long, kind::A).edns(512), &reply, 9999);
            assert!(bytes.len() <= 512, "{}", bytes.len());
            assert!(Packet::parse(&bytes).is_ok());
        }
    }

    #[test]
    fn what_does_not_fit_is_marked() {
        let reply = Reply {
            record: Some(Record::Address(Ipv4Addr::LOCALHOST)),
            ..Reply::code(Code::NoError)
        };
        let bytes = written(&query("a.vm", kind::A).edns(512), &reply, 36);
        let packet = Packet::parse(&bytes).unwrap();
        assert!(packet.has_flags(simple_dns::PacketFlag::TRUNCATION));
        assert!(packet.answers.is_empty() && packet.questions.len() == 1);
    }
}
