//! Servers of the internet, in threads that end with the test.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub(crate) const RESOLVED_PORT: u16 = 53;
/// Whatever is asked for is there.
pub(crate) const RESOLVED: Ipv4Addr = Ipv4Addr::new(45, 67, 89, 10);
const LIMIT: Duration = Duration::from_secs(5);
const ADDRESS: u16 = 1;
const INTERNET: u16 = 1;

/// How many bytes came to which address.
#[derive(Clone, Default)]
pub(crate) struct Heard(Arc<Mutex<BTreeMap<IpAddr, usize>>>);

impl Heard {
    pub(crate) fn at(&self, address: Ipv4Addr) -> usize {
        let heard = self.0.lock().unwrap();
        heard.get(&IpAddr::V4(address)).copied().unwrap_or_default()
    }

    /// Answers each connection with what it says.
    pub(crate) fn echo(&self, listener: TcpListener) {
        let heard = self.clone();
        std::thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let heard = heard.clone();
                std::thread::spawn(move || heard.answer(connection));
            }
        });
    }

    fn answer(&self, mut connection: TcpStream) {
        let Ok(here) = connection.local_addr() else {
            return;
        };
        let mut buffer = [0; 512];
        while let Ok(length) = connection.read(&mut buffer) {
            if length == 0 || connection.write_all(&buffer[..length]).is_err() {
                return;
            }
            *self.0.lock().unwrap().entry(here.ip()).or_default() += length;
        }
    }
}

/// Answers each question for an address.
pub(crate) fn resolve(socket: UdpSocket) {
    std::thread::spawn(move || {
        let mut buffer = [0; 1500];
        while let Ok((length, client)) = socket.recv_from(&mut buffer) {
            // A client that went away wants no answer.
            let _ = socket.send_to(&answer(&buffer[..length]), client);
        }
    });
}

/// An answer to the one question of `query`.
fn answer(query: &[u8]) -> Vec<u8> {
    let labels = query[12..].iter().position(|byte| *byte == 0).unwrap();
    let question = &query[12..12 + labels + 5];
    let is_address = question[labels + 1..labels + 3] == ADDRESS.to_be_bytes();
    let mut answer = query[..2].to_vec();
    // Recursion was desired and is there; one question, so many answers.
    answer.extend([0x81, 0x80, 0, 1, 0, u8::from(is_address), 0, 0, 0, 0]);
    answer.extend(question);
    if is_address {
        // The question's name, an address, for a minute.
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend(RESOLVED.octets());
    }
    answer
}

/// Asks `server` from here, and answers with what it said.
pub(crate) fn ask(server: SocketAddr, name: &str, kind: u16) -> Vec<u8> {
    let mut query = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        query.push(u8::try_from(label.len()).unwrap());
        query.extend(label.bytes());
    }
    query.push(0);
    query.extend(kind.to_be_bytes());
    query.extend(INTERNET.to_be_bytes());
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    socket.connect(server).unwrap();
    socket.send(&query).unwrap();
    let mut buffer = [0; 1500];
    let length = socket.recv(&mut buffer).unwrap();
    buffer[..length].to_vec()
}
