//! What `nat up` and `nat down` cost in the namespace, by how many guests have it already: CPU time of the process and
//! of the kernel's work for it. Needs root; the network namespace ends with the process.

use banger_core::addr::Pool;
use banger_core::id::MacAddress;
use banger_host::net::namespace::Namespace;
use banger_host::op::{NamespaceOp, Port};
use rustix::thread::UnshareFlags;
use std::net::Ipv4Addr;
use std::time::Duration;

const GUESTS: u16 = 500;
const MEASURED: [u16; 4] = [1, 10, 100, GUESTS];
/// Each figure is the least of so many.
const TIMES: usize = 20;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    own_network()?;
    let pool = Pool::at(Ipv4Addr::new(172, 31, 240, 0));
    let namespace = Namespace::new();
    let ask = |op: NamespaceOp| namespace.perform(&op, Vec::new());
    ask(NamespaceOp::EnsureBase { pool })?;
    println!("guests with NAT   up (µs)   down (µs)");
    for number in 1..=GUESTS {
        let port = guest(pool, number);
        let address = port.address;
        ask(NamespaceOp::EnsurePort(port))?;
        if !MEASURED.contains(&number) {
            ask(NamespaceOp::SetNat { address, on: true })?;
            continue;
        }
        let (mut up, mut down) = (Duration::MAX, Duration::MAX);
        for _ in 0..TIMES {
            let start = cpu_time();
            ask(NamespaceOp::SetNat { address, on: true })?;
            up = up.min(cpu_time().saturating_sub(start));
            let start = cpu_time();
            ask(NamespaceOp::SetNat { address, on: false })?;
            down = down.min(cpu_time().saturating_sub(start));
        }
        ask(NamespaceOp::SetNat { address, on: true })?;
        println!("{number:15} {:9} {:11}", up.as_micros(), down.as_micros());
    }
    Ok(())
}

fn guest(pool: Pool, number: u16) -> Port {
    let [high, low] = number.to_be_bytes();
    let first = pool.gateway().to_bits();
    Port {
        tap: format!("bt{number:012x}"),
        mac: MacAddress([6, 0, 0, 0, high, low]),
        address: Ipv4Addr::from_bits(first + u32::from(number)),
    }
}

fn cpu_time() -> Duration {
    let spent = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::try_from(spent).unwrap_or_default()
}

#[expect(unsafe_code, reason = "the process has one thread")]
fn own_network() -> rustix::io::Result<()> {
    // SAFETY: only the network namespace changes, and no other thread is there to share anything.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
}
