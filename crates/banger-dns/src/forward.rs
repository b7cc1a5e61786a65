//! Asking one of the host's resolvers, and passing on what may be passed on. Each attempt has an id and a socket of its
//! own, both random, so that whoever wants to answer in a resolver's place must guess both.

use crate::route::NoRebinding;
use crate::service::{Pending, Service, Transport};
use crate::stats::count;
use crate::wire::answer::{Verdict, judge};
use crate::wire::reply::{Reply, Why, begin, write_opt, write_opt_head};
use crate::wire::{Code, HEADER, UDP_MOST, flag};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

/// Room for what a resolver sends over UDP, in bytes: more than it was asked for.
const ROOM: usize = 4096;

/// Has the question answered, within the time of all attempts together, and gives the message for the client.
pub(crate) async fn forward(service: &Service, pending: &Pending) -> Vec<u8> {
    count(&service.counters.forwarded);
    match ask_all(service, pending).await {
        Ok(message) if message.len() <= pending.limit() => {
            count(&service.counters.answered);
            message
        }
        Ok(_) => write(service, pending, &Reply::truncated()),
        Err(reply) => write(service, pending, &reply),
    }
}

fn write(service: &Service, pending: &Pending, reply: &Reply) -> Vec<u8> {
    let mut out = Vec::new();
    reply.write(&pending.asked, &pending.query, pending.limit(), &mut out);
    service.counters.replied(reply.code);
    out
}

/// Asks one resolver after the other until one of them helps. What is not an answer to pass on is the reply to give.
async fn ask_all(service: &Service, pending: &Pending) -> Result<Vec<u8>, Reply> {
    for resolver in service.resolvers.at(service.now()) {
        let attempt = timeout(
            service.config.attempt_limit,
            ask(service, pending, resolver),
        );
        match attempt.await {
            Ok(Ok((message, verdict))) => {
                if verdict != Verdict::Unhelpful {
                    service.resolvers.answered(resolver);
                    return pass_on(service, pending, message, verdict);
                }
                tracing::debug!(%resolver, name = %pending.query.question.name, "resolver cannot help");
            }
            Ok(Err(error)) => tracing::debug!(%resolver, %error, "resolver cannot be asked"),
            Err(_) => tracing::debug!(%resolver, "resolver does not answer"),
        }
    }
    Err(Reply::recursive(Code::ServerFailure, Why::NoResolver))
}

fn pass_on(
    service: &Service,
    pending: &Pending,
    mut message: Vec<u8>,
    verdict: Verdict,
) -> Result<Vec<u8>, Reply> {
    match verdict {
        Verdict::Good => {}
        Verdict::GoodUpTo(end) => {
            message.truncate(end);
            message[8..HEADER].fill(0);
            if let Some(edns) = &pending.query.edns {
                write_opt(edns, Code::NoError, None, &mut message);
                message[HEADER - 1] = 1;
            }
        }
        Verdict::Forbidden => {
            count(&service.counters.rebinding);
            let name = &pending.query.question.name;
            tracing::debug!(client = %pending.client, %name, "a public name that points into a private network");
            return Err(Reply::recursive(Code::Refused, Why::Private));
        }
        Verdict::Truncated => return Err(Reply::truncated()),
        Verdict::Unhelpful => return Err(Reply::recursive(Code::ServerFailure, Why::NoResolver)),
    }
    message[..2].copy_from_slice(&pending.query.id.to_be_bytes());
    Ok(message)
}

async fn ask(
    service: &Service,
    pending: &Pending,
    resolver: SocketAddr,
) -> io::Result<(Vec<u8>, Verdict)> {
    let id = random_id()?;
    let message = message_for_resolver(pending, id);
    let question = &pending.query.question;
    let rules = NoRebinding::new(
        &service.zone,
        &service.config.private_domains,
        pending.client,
        question,
    );
    match pending.transport {
        Transport::Udp => {
            let socket = UdpSocket::bind(any_port(resolver)).await?;
            // From here on the kernel takes datagrams from nobody else.
            socket.connect(resolver).await?;
            socket.send(&message).await?;
            let mut answer = vec![0; ROOM];
            loop {
                let length = socket.recv(&mut answer).await?;
                if let Ok(verdict) = judge(&answer[..length], id, question, &rules) {
                    answer.truncate(length);
                    return Ok((answer, verdict));
                }
            }
        }
        Transport::Tcp => {
            let mut stream = TcpStream::connect(resolver).await?;
            stream.write_all(&framed(&message)).await?;
            let length = stream.read_u16().await?;
            let mut answer = vec![0; usize::from(length)];
            stream.read_exact(&mut answer).await?;
            match judge(&answer, id, question, &rules) {
                // There is nothing longer to ask over.
                Ok(Verdict::Truncated) => Ok((answer, Verdict::Unhelpful)),
                Ok(verdict) => Ok((answer, verdict)),
                Err(_) => Err(io::Error::other("the answer is to something else")),
            }
        }
    }
}

/// The client's question in a message of our own: nothing else that the client wrote goes to a resolver.
fn message_for_resolver(pending: &Pending, id: u16) -> Vec<u8> {
    const KEPT: u16 = flag::RECURSION_DESIRED | flag::AUTHENTIC_DATA | flag::CHECKING_DISABLED;
    let query = &pending.query;
    let mut message = Vec::with_capacity(pending.asked.len() + 16);
    let counts = [1, 0, 0, u16::from(query.edns.is_some())];
    begin(id, query.flags & KEPT, counts, &mut message);
    message.extend(&pending.asked[HEADER..]);
    if let Some(edns) = &query.edns {
        let size = pending.limit().min(UDP_MOST);
        write_opt_head(size as u16, edns.dnssec_ok, 0, &mut message);
        message.extend([0, 0]);
    }
    message
}

/// A message as it goes over TCP. It is at most 65535 bytes long.
pub(crate) fn framed(message: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).unwrap_or(u16::MAX);
    let mut frame = Vec::with_capacity(2 + message.len());
    frame.extend(length.to_be_bytes());
    frame.extend(&message[..usize::from(length)]);
    frame
}

fn random_id() -> io::Result<u16> {
    let mut bytes = [0; 2];
    getrandom::fill(&mut bytes).map_err(io::Error::from)?;
    Ok(u16::from_be_bytes(bytes))
}

/// A port that the kernel chooses at random.
fn any_port(to: SocketAddr) -> SocketAddr {
    match to {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}
