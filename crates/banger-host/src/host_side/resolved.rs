//! Names below `.vm` on the host, by systemd-resolved's routing per link.
//!
//! It is asked by `busctl` and not by `resolvectl`, which would have it started where somebody stopped it.

use crate::exec::{ExecError, Run};
use crate::op::ResolvedReport;
use banger_core::addr::Ipv4Net;
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Its socket, which may outlive it.
const SERVING: &str = "/run/systemd/resolve/io.systemd.Resolve";
const PROGRAM: &str = "busctl";
const MANAGER: [&str; 5] = [
    "--auto-start=no",
    "call",
    "org.freedesktop.resolve1",
    "/org/freedesktop/resolve1",
    "org.freedesktop.resolve1.Manager",
];
const LIMIT: Duration = Duration::from_secs(10);

/// Sends the questions for names below `.vm`, and for the addresses of `guests`, to `dns` by way of the link with the
/// number `link`; and no others.
///
/// # Errors
/// It cannot be told, as in the moment of its start.
pub(super) fn route(
    link: u32,
    guests: Ipv4Net,
    dns: Ipv4Addr,
) -> Result<ResolvedReport, ExecError> {
    if !serves() {
        return Ok(ResolvedReport::NotRunning);
    }
    for call in calls(link, guests, dns) {
        match run(&call) {
            Err(ExecError::Missing { .. }) => return Ok(ResolvedReport::NoBusctl),
            ran => ran?,
        }
    }
    Ok(ResolvedReport::Routed)
}

/// Methods with the types of their arguments, and the arguments.
fn calls(link: u32, guests: Ipv4Net, dns: Ipv4Addr) -> [Vec<String>; 3] {
    let call = |method: &str, types: &str, more: Vec<String>| {
        [method.to_owned(), types.to_owned(), link.to_string()]
            .into_iter()
            .chain(more)
            .collect::<Vec<_>>()
    };
    let zones: Vec<String> = std::iter::once("vm".to_owned())
        .chain(reverse_zones(guests))
        .collect();
    // Each is for routing alone: no name is completed with it.
    let mut domains = vec![zones.len().to_string()];
    domains.extend(zones.into_iter().flat_map(|zone| [zone, "true".to_owned()]));
    // One address, of the family AF_INET, of four bytes.
    let mut server = ["1", "2", "4"].map(str::to_owned).to_vec();
    server.extend(dns.octets().map(|octet| octet.to_string()));
    [
        // Never the server for the rest of the world, not even for a moment.
        call("SetLinkDefaultRoute", "ib", vec!["false".to_owned()]),
        call("SetLinkDomains", "ia(sb)", domains),
        call("SetLinkDNS", "ia(iay)", server),
    ]
}

fn serves() -> bool {
    UnixStream::connect(SERVING).is_ok()
}

fn run(call: &[impl AsRef<std::ffi::OsStr>]) -> Result<(), ExecError> {
    Run::new(PROGRAM)
        .args(MANAGER)
        .args(call)
        .timeout(LIMIT)
        .run()?;
    Ok(())
}

/// The reverse zones of all addresses of a network of 16 to 24 bits.
fn reverse_zones(network: Ipv4Net) -> Vec<String> {
    let [a, b, c, _] = network.base().octets();
    let count = 1_u16 << (24 - network.prefix().clamp(16, 24));
    (0..count)
        .map(|step| format!("{}.{b}.{a}.in-addr.arpa", u16::from(c) + step))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_server_is_named_last_when_it_is_settled_what_it_is_asked() {
        let guests = Ipv4Net::new(Ipv4Addr::new(172, 16, 16, 0), 21);
        let calls = calls(7, guests, Ipv4Addr::new(172, 16, 16, 1));
        let lines = calls.map(|words| words.join(" "));
        assert_eq!(lines[0], "SetLinkDefaultRoute ib 7 false");
        assert!(
            lines[1]
                .starts_with("SetLinkDomains ia(sb) 7 9 vm true 16.16.172.in-addr.arpa true 17.")
        );
        assert_eq!(lines[2], "SetLinkDNS ia(iay) 7 1 2 4 172 16 16 1");
    }

    #[test]
    fn every_address_of_the_guests_has_its_zone_and_no_other() {
        let zones = reverse_zones(Ipv4Net::new(Ipv4Addr::new(172, 16, 248, 0), 21));
        assert_eq!(zones.len(), 8);
        assert_eq!(zones[0], "248.16.172.in-addr.arpa");
        assert_eq!(zones[7], "255.16.172.in-addr.arpa");
        let one = reverse_zones(Ipv4Net::new(Ipv4Addr::new(10, 1, 2, 0), 24));
        assert_eq!(one, ["2.1.10.in-addr.arpa"]);
    }
}
