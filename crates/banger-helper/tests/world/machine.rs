//! A guest with a network stack of its own: a namespace whose device is joined to the guest's end of a TAP.

use super::{POOL, World, as_root, guest, run};
use banger_host::net::tap;
use banger_host::op::Port;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::OwnedFd;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::thread::JoinHandle;
use std::time::Duration;

/// How long a guest tries what must succeed.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long it tries what must not.
const SHORT: Duration = Duration::from_millis(300);

pub(crate) struct Machine {
    pub(crate) port: Port,
    namespace: OwnedFd,
    stop: Option<io::PipeWriter>,
    cable: Option<JoinHandle<()>>,
}

impl Machine {
    /// Guest `number` with its address, and the bridge as its gateway.
    pub(crate) fn new(world: &World, number: u8) -> Self {
        let port = guest(number);
        let here = world.attach(&port);
        let (namespace, there) = as_root(|| device(&port));
        let (stopped, stop) = io::pipe().unwrap();
        let cable = std::thread::spawn(move || carry(&here, &there, &stopped));
        Self {
            port,
            namespace,
            stop: Some(stop),
            cable: Some(cable),
        }
    }

    pub(crate) fn address(&self) -> Ipv4Addr {
        self.port.address
    }

    /// Runs `work` in the guest.
    pub(crate) fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        as_root(|| {
            let network = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(self.namespace.as_fd(), network).unwrap();
            work()
        })
    }

    pub(crate) fn run(&self, program: &str, args: &[&str]) -> String {
        self.inside(|| run(program, args))
    }

    /// A connection that must come about.
    pub(crate) fn connect(&self, to: (Ipv4Addr, u16)) -> TcpStream {
        self.inside(|| connect(to, PATIENCE)).unwrap()
    }

    /// Whether a connection comes about in a short time.
    pub(crate) fn reaches(&self, to: (Ipv4Addr, u16)) -> bool {
        self.inside(|| connect(to, SHORT)).is_ok()
    }

    /// A server in the guest that answers what it hears, until the other side ends.
    pub(crate) fn serve(&self, port: u16) {
        let listener = self.inside(|| TcpListener::bind((self.address(), port)).unwrap());
        echo(listener);
    }

    pub(crate) fn udp(&self, port: u16) -> UdpSocket {
        self.inside(|| UdpSocket::bind((self.address(), port)).unwrap())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(cable) = self.cable.take() {
            let _ = cable.join();
        }
    }
}

pub(crate) fn connect(to: (Ipv4Addr, u16), limit: Duration) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&SocketAddr::new(IpAddr::V4(to.0), to.1), limit)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Answers each connection with what it says, in threads that end with the test.
pub(crate) fn echo(listener: TcpListener) {
    std::thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            std::thread::spawn(move || io::copy(&mut &connection, &mut &connection));
        }
    });
}

/// Whether the other side answers what it is told.
pub(crate) fn answers(mut stream: &TcpStream, limit: Duration) -> bool {
    stream.set_read_timeout(Some(limit)).unwrap();
    let mut answer = [0; 5];
    stream.write_all(b"hello").is_ok() && stream.read_exact(&mut answer).is_ok()
}

/// As [`answers`], of one that must, or must not.
#[track_caller]
pub(crate) fn assert_alive(stream: &TcpStream, alive: bool) {
    let limit = if alive { PATIENCE } else { SHORT };
    assert_eq!(answers(stream, limit), alive);
}

/// A namespace and its device.
fn device(port: &Port) -> (OwnedFd, OwnedFd) {
    super::enter_new_host();
    let device = tap::open("eth0").unwrap();
    let address = format!("{}/21", port.address);
    run(
        "ip",
        &["link", "set", "eth0", "address", &port.mac.to_string()],
    );
    run("ip", &["address", "add", &address, "dev", "eth0"]);
    run("ip", &["link", "set", "lo", "up"]);
    run("ip", &["link", "set", "eth0", "up"]);
    let gateway = POOL.gateway().to_string();
    run("ip", &["route", "add", "default", "via", &gateway]);
    let namespace = std::fs::File::open("/proc/thread-self/ns/net").unwrap();
    (namespace.into(), device)
}

/// Carries frames both ways until `stopped` ends.
fn carry(here: &OwnedFd, there: &OwnedFd, stopped: &io::PipeReader) {
    let mut frame = vec![0; 65536];
    loop {
        let mut fds = [
            PollFd::new(here, PollFlags::IN),
            PollFd::new(there, PollFlags::IN),
            PollFd::new(stopped, PollFlags::IN),
        ];
        poll(&mut fds, None).unwrap();
        let [from_here, from_there, stop] = fds.map(|fd| !fd.revents().is_empty());
        if stop {
            return;
        }
        for (ready, from, to) in [(from_here, here, there), (from_there, there, here)] {
            if ready {
                // A device that is down, or gone, carries nothing.
                let Ok(length) = rustix::io::read(from, &mut frame) else {
                    return;
                };
                let _ = rustix::io::write(to, &frame[..length]);
            }
        }
    }
}
