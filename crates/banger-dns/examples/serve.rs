//! Serves many made-up VMs on one address of loopback, without a limit to the rate: for measuring and for trying by
//! hand with `dig`. It says `ready` once it serves, and ends when its standard input does.
//!
//! `serve 127.0.0.1:5353 1000` serves `vm-0.vm` to `vm-999.vm` to clients of 127.0.0.0/21, which have NAT.

use banger_core::addr::Pool;
use banger_core::name::VmName;
use banger_dns::{Audience, Config, Listener, Rate, Server, Zone};
use std::error::Error;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr};
use tokio::net::{TcpListener, UdpSocket};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(address), Some(count), None) = (arguments.next(), arguments.next(), arguments.next())
    else {
        return Err("usage: serve ADDRESS:PORT COUNT".into());
    };
    let (address, count) = (address.parse()?, count.parse()?);
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?
        .block_on(serve(address, count))
}

async fn serve(address: SocketAddr, count: u32) -> Result<(), Box<dyn Error>> {
    let pool = Pool::at(Ipv4Addr::new(127, 0, 0, 0));
    let zone = Zone::new(pool);
    let mut last = None;
    for number in 0..count {
        last = pool.next_address(last, |_| false);
        let vm = last.ok_or("the pool has no address")?;
        zone.set(&VmName::new(format!("vm-{number}"))?, vm)?;
    }
    for entry in zone.list() {
        zone.set_nat(entry.address, true)?;
    }
    zone.set_nat(Ipv4Addr::LOCALHOST, true)?;
    let listener = Listener {
        udp: UdpSocket::bind(address).await?,
        tcp: TcpListener::bind(address).await?,
        audience: Audience::Guests,
    };
    let config = Config {
        rate: Rate {
            per_second: u32::MAX,
            burst: u32::MAX,
        },
        ..Config::default()
    };
    let server = Server::start(vec![listener], zone, config)?;
    println!("ready");
    tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new())).await??;
    eprintln!("{:?}", server.stats());
    server.stop().await;
    Ok(())
}
