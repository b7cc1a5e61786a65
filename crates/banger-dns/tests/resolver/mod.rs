//! A resolver on loopback that does what the first label of the question says.

use simple_dns::Packet;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, UdpSocket};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

/// It ends when this value goes.
pub(crate) struct Resolver {
    address: SocketAddr,
    heard: watch::Receiver<Vec<Heard>>,
    release: Arc<Notify>,
    _tasks: JoinSet<()>,
    /// Bound, and never read.
    _deaf: Option<(UdpSocket, TcpListener)>,
    _closed: Option<(UdpSocket, TcpSocket)>,
}

#[derive(Debug, Clone)]
struct Heard {
    name: String,
    id: u16,
    port: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    Normal,
    Failing,
}

async fn pair() -> (UdpSocket, TcpListener) {
    loop {
        let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        // Another program may have the same port for TCP.
        if let Ok(tcp) = TcpListener::bind(udp.local_addr().unwrap()).await {
            return (udp, tcp);
        }
    }
}

impl Resolver {
    /// One that answers.
    pub(crate) async fn start() -> Self {
        Self::new(Manner::Normal).await
    }

    /// One that always says that it failed.
    pub(crate) async fn failing() -> Self {
        Self::new(Manner::Failing).await
    }

    /// One that never answers.
    pub(crate) async fn deaf() -> Self {
        let pair = pair().await;
        Self {
            address: pair.0.local_addr().unwrap(),
            heard: watch::channel(Vec::new()).1,
            release: Arc::default(),
            _tasks: JoinSet::new(),
            _deaf: Some(pair),
            _closed: None,
        }
    }

    /// One whose port is closed. Nobody else can have that port meanwhile: its sockets are bound to it, but one hears
    /// another address alone, and the other does not listen.
    pub(crate) async fn gone() -> Self {
        let mut gone = Self::deaf().await;
        let (udp, _) = gone._deaf.take().unwrap();
        udp.connect((Ipv4Addr::LOCALHOST, 9)).await.unwrap();
        let tcp = TcpSocket::new_v4().unwrap();
        tcp.set_reuseaddr(true).unwrap();
        tcp.bind(gone.address).unwrap();
        gone._closed = Some((udp, tcp));
        gone
    }

    async fn new(manner: Manner) -> Self {
        let (udp, tcp) = pair().await;
        let address = udp.local_addr().unwrap();
        let (sender, heard) = watch::channel(Vec::new());
        let sender = Arc::new(sender);
        let release = Arc::new(Notify::new());
        let mut tasks = JoinSet::new();
        tasks.spawn(serve_udp(udp, manner, sender.clone(), release.clone()));
        tasks.spawn(serve_tcp(tcp, manner, sender));
        Self {
            address,
            heard,
            release,
            _tasks: tasks,
            _deaf: None,
            _closed: None,
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The names it was asked for.
    pub(crate) fn asked(&self) -> Vec<String> {
        let heard = self.heard.borrow();
        heard.iter().map(|heard| heard.name.clone()).collect()
    }

    pub(crate) fn ids_and_ports(&self) -> (Vec<u16>, Vec<u16>) {
        let heard = self.heard.borrow();
        heard.iter().map(|heard| (heard.id, heard.port)).unzip()
    }

    pub(crate) async fn wait_until_asked(&self, name: &str) {
        let mut heard = self.heard.clone();
        let seen = heard.wait_for(|heard| heard.iter().any(|one| one.name == name));
        seen.await.unwrap();
    }

    /// Lets go of what waits.
    pub(crate) fn release(&self) {
        self.release.notify_one();
    }
}

type Sender = Arc<watch::Sender<Vec<Heard>>>;

fn hear(query: &[u8], port: u16, sender: &Sender) -> String {
    let packet = Packet::parse(query).unwrap();
    let name = packet.questions[0].qname.to_string();
    sender.send_modify(|heard| {
        heard.push(Heard {
            name: name.clone(),
            id: packet.id(),
            port,
        });
    });
    name.split('.').next().unwrap().to_owned()
}

/// The query as an answer with these addresses.
fn answer(query: &[u8], addresses: &[Ipv4Addr]) -> Vec<u8> {
    let name_end = 12 + query[12..].iter().position(|byte| *byte == 0).unwrap() + 1;
    let mut bytes = query[..name_end + 4].to_vec();
    bytes[2] |= 0x80;
    bytes[3] |= 0x80;
    let count = u16::try_from(addresses.len()).unwrap();
    bytes[6..8].copy_from_slice(&count.to_be_bytes());
    bytes[8..12].fill(0);
    for address in addresses {
        push_address(*address, &mut bytes);
    }
    bytes
}

fn push_address(address: Ipv4Addr, bytes: &mut Vec<u8>) {
    bytes.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
    bytes.extend(address.octets());
}

const GOOD: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const SPOOFED: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 66);

/// What is answered over TCP, and over UDP where nothing is amiss.
fn right_answer(word: &str, query: &[u8], manner: Manner) -> Vec<u8> {
    if manner == Manner::Failing {
        let mut failed = answer(query, &[]);
        failed[3] |= 2;
        return failed;
    }
    match word {
        "private" => answer(query, &[Ipv4Addr::new(10, 0, 0, 1)]),
        "mixed" => answer(query, &[GOOD, Ipv4Addr::new(192, 168, 1, 1)]),
        "guest" => answer(query, &[Ipv4Addr::new(127, 0, 0, 3)]),
        "alias" => {
            let mut alias = answer(query, &[]);
            alias[7] = 1;
            let target = b"\x09brave-fox\x02vm\0";
            alias.extend([0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 60, 0, target.len() as u8]);
            alias.extend(target);
            alias
        }
        "glue" => {
            let mut glue = answer(query, &[GOOD]);
            push_address(Ipv4Addr::new(10, 0, 0, 1), &mut glue);
            glue[11] = 1;
            glue
        }
        "truncated" | "big" => answer(query, &[GOOD; 100]),
        _ => answer(query, &[GOOD]),
    }
}

async fn serve_udp(socket: UdpSocket, manner: Manner, sender: Sender, release: Arc<Notify>) {
    let socket = Arc::new(socket);
    let stranger = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let mut waiting = JoinSet::new();
    let mut buffer = [0; 4096];
    loop {
        let (length, peer) = socket.recv_from(&mut buffer).await.unwrap();
        let query = &buffer[..length];
        let word = hear(query, peer.port(), &sender);
        let right = right_answer(&word, query, manner);
        let wrong = answer(query, &[SPOOFED]);
        let before = match word.as_str() {
            "wrong-id" => changed(&wrong, 1),
            "wrong-question" => changed(&wrong, 14),
            "garbage" => vec![0xff; 700],
            _ => Vec::new(),
        };
        if !before.is_empty() {
            socket.send_to(&before, peer).await.unwrap();
        }
        match word.as_str() {
            "spoofed" => {
                stranger.send_to(&wrong, peer).await.unwrap();
                socket.send_to(&right, peer).await.unwrap();
            }
            "truncated" => {
                let mut truncated = answer(query, &[]);
                truncated[2] |= 2;
                socket.send_to(&truncated, peer).await.unwrap();
            }
            "slow" => {
                let (socket, release) = (socket.clone(), release.clone());
                waiting.spawn(async move {
                    release.notified().await;
                    socket.send_to(&right, peer).await.unwrap();
                });
            }
            _ => {
                socket.send_to(&right, peer).await.unwrap();
            }
        }
    }
}

fn changed(message: &[u8], at: usize) -> Vec<u8> {
    let mut changed = message.to_vec();
    changed[at] ^= 1;
    changed
}

async fn serve_tcp(listener: TcpListener, manner: Manner, sender: Sender) {
    loop {
        let (mut stream, peer) = listener.accept().await.unwrap();
        let length = stream.read_u16().await.unwrap();
        let mut query = vec![0; usize::from(length)];
        stream.read_exact(&mut query).await.unwrap();
        let word = hear(&query, peer.port(), &sender);
        let answer = right_answer(&word, &query, manner);
        let length = u16::try_from(answer.len()).unwrap();
        stream.write_all(&length.to_be_bytes()).await.unwrap();
        stream.write_all(&answer).await.unwrap();
    }
}
