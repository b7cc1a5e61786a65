//! A way out that leads nowhere, with the name server of whoever provides it: what the host's resolver asks.

use super::host::root;
use std::net::{Ipv4Addr, UdpSocket};

/// What every name leads to, but `intranet.corp`.
pub(crate) const RESOLVED: Ipv4Addr = Ipv4Addr::new(45, 67, 89, 10);
/// What `intranet.corp` leads to.
pub(crate) const INTRANET: Ipv4Addr = Ipv4Addr::new(10, 20, 30, 40);
const SERVER: Ipv4Addr = Ipv4Addr::new(9, 9, 9, 9);
const LINK: &str = "provider0";

/// Goes with the test.
pub(crate) struct Internet;

impl Internet {
    pub(crate) fn new() -> Self {
        root(&format!(
            "ip link add {LINK} type dummy && ip address add {SERVER}/24 dev {LINK} && ip link set {LINK} up && \
             ip route add default dev {LINK} && resolvectl dns {LINK} {SERVER} && resolvectl domain {LINK} '~.'"
        ));
        let socket = UdpSocket::bind((SERVER, 53)).unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 1500];
            while let Ok((length, client)) = socket.recv_from(&mut buffer) {
                if let Some(answer) = answer(&buffer[..length]) {
                    let _ = socket.send_to(&answer, client);
                }
            }
        });
        Self
    }
}

impl Drop for Internet {
    fn drop(&mut self) {
        root(&format!("ip link delete {LINK}"));
    }
}

/// An answer to the one question of `query`.
fn answer(query: &[u8]) -> Option<Vec<u8>> {
    let labels = query.get(12..)?.iter().position(|byte| *byte == 0)?;
    let question = query.get(12..12 + labels + 5)?;
    let is_address = question[labels + 1..labels + 3] == 1_u16.to_be_bytes();
    let mut answer = query[..2].to_vec();
    // Recursion was desired and is there; one question, so many answers.
    answer.extend([0x81, 0x80, 0, 1, 0, u8::from(is_address), 0, 0, 0, 0]);
    answer.extend(question);
    if is_address {
        // The question's name, an address, for a minute.
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        let is_private = question.starts_with(b"\x08intranet\x04corp\0");
        let address = if is_private { INTRANET } else { RESOLVED };
        answer.extend(address.octets());
    }
    Some(answer)
}
