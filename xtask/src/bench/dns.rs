//! How fast names of VMs are answered, against dnsmasq with the same names: both serve on loopback, and are asked in
//! turn by one client that keeps so many queries in flight.

use super::pairs;
use super::stats::Target;
use super::table::Row;
use crate::command::{cargo, command, find, run};
use crate::failure::{Failure, Result};
use crate::layout::{root, target};
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, ErrorKind};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// VMs in the zone.
const NAMES: u32 = 1000;
/// Queries of one measurement.
const QUERIES: u32 = 20_000;
/// Of them, so many wait for their answer at once.
const IN_FLIGHT: usize = 32;
/// How long a server may take to serve, and for one answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
const PAIRS: usize = 20;

/// At least as many answers in the same time, and none much later.
const TARGET: Target = Target {
    at_most: 1.0,
    margin: 0.25,
    at_most_more: None,
};

pub(super) fn run_bench(_dist: &Path) -> Result<Vec<Row>> {
    let ours = Server::ours()?;
    let Some(theirs) = Server::dnsmasq()? else {
        let run = load(ours.address)?;
        return Ok(vec![
            Row::without_other("dns: answers / dnsmasq", run.seconds, "no dnsmasq"),
            Row::without_other("dns: p99 / dnsmasq", run.p99, "no dnsmasq"),
        ]);
    };
    let mut runs = (Vec::new(), Vec::new());
    let mut cpu = (Vec::new(), Vec::new());
    let rates = pairs(
        PAIRS,
        || measure(&ours, &mut runs.0, &mut cpu.0),
        || measure(&theirs, &mut runs.1, &mut cpu.1),
    )?;
    // The first pair does not count here either.
    let p99 = super::stats::summarise(&zip(&runs.0, &runs.1));
    let cpu = super::stats::summarise(&zip(&cpu.0, &cpu.1));
    let (Some(p99), Some(cpu)) = (p99, cpu) else {
        return Err(Failure::new("dnsmasq took no time at all"));
    };
    let rate = |seconds: f64| f64::from(QUERIES) / seconds;
    eprintln!(
        "answers per second: ours {:.0}, dnsmasq {:.0}; p99: {:.0} µs, {:.0} µs; CPU time per answer: {:.1} µs, {:.1} µs",
        rate(rates.ours.median),
        rate(rates.theirs.median),
        p99.ours.median * 1e6,
        p99.theirs.median * 1e6,
        cpu.ours.median * 1e6 / f64::from(QUERIES),
        cpu.theirs.median * 1e6 / f64::from(QUERIES),
    );
    let name = format!("dns: {QUERIES} answers / dnsmasq");
    Ok(vec![
        Row::pairs(&name, &rates, TARGET, PAIRS),
        Row::pairs("dns: p99 / dnsmasq", &p99, TARGET, PAIRS),
        Row::pairs_without_target("dns: CPU time / dnsmasq", &cpu),
    ])
}

fn zip(ours: &[f64], theirs: &[f64]) -> Vec<(f64, f64)> {
    let pairs = ours.iter().copied().zip(theirs.iter().copied());
    pairs.skip(1).collect()
}

fn measure(server: &Server, p99s: &mut Vec<f64>, cpu: &mut Vec<f64>) -> Result<f64> {
    let before = server.cpu_seconds()?;
    let run = load(server.address)?;
    cpu.push(server.cpu_seconds()? - before);
    p99s.push(run.p99);
    Ok(run.seconds)
}

/// A server that runs; it ends when this value goes.
struct Server {
    child: Child,
    address: SocketAddr,
    /// Its settings, if it reads any.
    _folder: Option<Folder>,
}

/// A folder that is removed when this value goes.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Server {
    fn ours() -> Result<Self> {
        run(cargo()
            .current_dir(root())
            .args(["build", "--release", "--locked", "--workspace"])
            .args(["--example", "serve"]))?;
        let address = free_address()?;
        let mut server = command(target().join("release/examples/serve"));
        server.arg(address.to_string()).arg(NAMES.to_string());
        Self::start(server, address, None)
    }

    /// `None` where it is not installed.
    fn dnsmasq() -> Result<Option<Self>> {
        let Some(program) = find("dnsmasq") else {
            return Ok(None);
        };
        let folder =
            Folder(std::env::temp_dir().join(format!("banger-bench-dns-{}", std::process::id())));
        let hosts = folder.0.join("hosts");
        let failed = || Failure::io(format!("cannot write `{}`", hosts.display()));
        let mut text = String::new();
        for number in 0..NAMES {
            let address = Ipv4Addr::from_bits(Ipv4Addr::new(127, 0, 0, 2).to_bits() + number);
            let _ = writeln!(text, "{address} vm-{number}.vm");
        }
        std::fs::create_dir_all(&folder.0).map_err(failed())?;
        std::fs::write(&hosts, text).map_err(failed())?;
        let address = free_address()?;
        let mut server = command(program);
        server
            .args([
                "--keep-in-foreground",
                "--conf-file=/dev/null",
                "--no-resolv",
            ])
            .args([
                "--no-hosts",
                "--local=/vm/",
                "--local-ttl=5",
                "--user=",
                "--pid-file=",
            ])
            .args(["--listen-address=127.0.0.1", "--bind-interfaces"])
            .arg(format!("--addn-hosts={}", hosts.display()))
            .arg(format!("--port={}", address.port()))
            .arg("--log-facility=/dev/null");
        Self::start(server, address, Some(folder)).map(Some)
    }

    fn start(mut server: Command, address: SocketAddr, folder: Option<Folder>) -> Result<Self> {
        let failed = Failure::io(format!("cannot start `{}`", crate::command::line(&server)));
        let child = server
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(failed)?;
        let mut server = Self {
            child,
            address,
            _folder: folder,
        };
        server.wait_until_it_serves()?;
        Ok(server)
    }

    /// Ours says so; of the other one nothing is heard until it answers.
    fn wait_until_it_serves(&mut self) -> Result<()> {
        if self._folder.is_none() {
            let mut said = String::new();
            if let Some(pipe) = self.child.stdout.take() {
                let _ = BufReader::new(pipe).read_line(&mut said);
            }
            if said.trim() != "ready" {
                return Err(Failure::new("the server of ours did not start"));
            }
        }
        let socket = client(self.address)?;
        let end = Instant::now() + ANSWER_LIMIT;
        // A closed port refuses at once, so this asks again until it is open.
        while Instant::now() < end {
            let asked = socket.send(&query(0, 0));
            if asked.is_ok() && socket.recv(&mut [0; 512]).is_ok() {
                return Ok(());
            }
            std::thread::yield_now();
        }
        Err(Failure::new(format!(
            "no server answers at {}",
            self.address
        )))
    }

    /// The CPU time that it took so far.
    fn cpu_seconds(&self) -> Result<f64> {
        super::cpu::seconds_of_process(self.child.id().into())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An address that nobody has right now, for UDP.
fn free_address() -> Result<SocketAddr> {
    let failed = || Failure::io("cannot bind a socket on loopback");
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).map_err(failed())?;
    socket.local_addr().map_err(failed())
}

fn client(server: SocketAddr) -> Result<UdpSocket> {
    let failed = || Failure::io("cannot make a socket on loopback");
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).map_err(failed())?;
    socket.connect(server).map_err(failed())?;
    socket
        .set_read_timeout(Some(ANSWER_LIMIT))
        .map_err(failed())?;
    Ok(socket)
}

/// A query for the address of a VM.
fn query(id: u16, vm: u32) -> Vec<u8> {
    let mut bytes = id.to_be_bytes().to_vec();
    bytes.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    let label = format!("vm-{vm}");
    bytes.push(u8::try_from(label.len()).unwrap_or(u8::MAX));
    bytes.extend(label.as_bytes());
    bytes.extend(b"\x02vm\0\0\x01\0\x01");
    bytes
}

/// What a measurement showed, in seconds.
struct Load {
    /// Of all queries together.
    seconds: f64,
    /// From the query to its answer, of all but one in a hundred.
    p99: f64,
}

/// Asks for one VM after the other, the next one whenever an answer came.
fn load(server: SocketAddr) -> Result<Load> {
    let failed = |what: &'static str| Failure::io(what);
    let socket = client(server)?;
    let mut asked_at = vec![Instant::now(); IN_FLIGHT];
    let mut latencies = Vec::new();
    let mut sent = 0;
    let mut ask = |slot: usize, asked_at: &mut [Instant]| -> Result<()> {
        // The slot is the id, so that the answer says which query it is to.
        let id = u16::try_from(slot).unwrap_or(u16::MAX);
        asked_at[slot] = Instant::now();
        sent += 1;
        let message = query(id, sent % NAMES);
        socket
            .send(&message)
            .map(drop)
            .map_err(failed("cannot ask"))
    };
    let start = Instant::now();
    for slot in 0..IN_FLIGHT {
        ask(slot, &mut asked_at)?;
    }
    let mut buffer = [0; 512];
    for answered in 1..=QUERIES {
        let length = match socket.recv(&mut buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                return Err(Failure::new(format!(
                    "{server} left a query without an answer"
                )));
            }
            Err(error) => return Err(failed("cannot receive")(error)),
        };
        let slot = usize::from(u16::from_be_bytes([buffer[0], buffer[1]]));
        // One answer, no error.
        if length < 12 || slot >= IN_FLIGHT || buffer[3] & 15 != 0 || buffer[7] != 1 {
            return Err(Failure::new(format!("{server} gave a wrong answer")));
        }
        latencies.push(asked_at[slot].elapsed().as_secs_f64());
        if answered as usize + IN_FLIGHT <= QUERIES as usize {
            ask(slot, &mut asked_at)?;
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    latencies.sort_by(f64::total_cmp);
    let p99 = latencies[latencies.len() * 99 / 100];
    Ok(Load { seconds, p99 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_what_servers_read() {
        assert_eq!(
            query(0x0102, 7),
            *b"\x01\x02\x01\0\0\x01\0\0\0\0\0\0\x04vm-7\x02vm\0\0\x01\0\x01"
        );
    }

    #[test]
    fn every_query_is_answered_once() {
        let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = server.local_addr().unwrap();
        let echo = std::thread::spawn(move || {
            let mut buffer = [0; 512];
            for _ in 0..QUERIES {
                let (length, peer) = server.recv_from(&mut buffer).unwrap();
                buffer[7] = 1;
                server.send_to(&buffer[..length], peer).unwrap();
            }
        });
        let load = load(address).unwrap();
        echo.join().unwrap();
        assert!(load.p99 > 0.0 && load.p99 < load.seconds);
    }
}
