//! Names below `.vm` on the host, by systemd-resolved's routing per link.

use crate::exec::{ExecError, Run};
use crate::op::ResolvedReport;
use banger_core::addr::Ipv4Net;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

/// There while systemd-resolved serves.
const SERVING: &str = "/run/systemd/resolve/io.systemd.Resolve";
const PROGRAM: &str = "resolvectl";
const LIMIT: Duration = Duration::from_secs(10);

/// Sends the questions for names below `.vm`, and for the addresses of `guests`, to `dns` by way of `link`; and no
/// others.
///
/// # Errors
/// `resolvectl` fails.
pub(super) fn route(
    link: &str,
    guests: Ipv4Net,
    dns: Ipv4Addr,
) -> Result<ResolvedReport, ExecError> {
    if !Path::new(SERVING).exists() {
        return Ok(ResolvedReport::NotRunning);
    }
    for command in commands(link, guests, dns) {
        match run(&command) {
            Err(ExecError::Missing { .. }) => return Ok(ResolvedReport::NoResolvectl),
            ran => ran?,
        }
    }
    Ok(ResolvedReport::Routed)
}

fn commands(link: &str, guests: Ipv4Net, dns: Ipv4Addr) -> [Vec<String>; 3] {
    let words = |words: [&str; 3]| words.map(str::to_owned).to_vec();
    let mut domains = words(["domain", link, "~vm"]);
    domains.extend(reverse_zones(guests));
    [
        // Never the server for the rest of the world, not even for a moment.
        words(["default-route", link, "no"]),
        domains,
        words(["dns", link, &dns.to_string()]),
    ]
}

/// Takes it back from a link that is there. Nothing is left to do where systemd-resolved does not run.
///
/// # Errors
/// `resolvectl` fails.
pub(super) fn revert(link: &str) -> Result<(), ExecError> {
    if !Path::new(SERVING).exists() {
        return Ok(());
    }
    match run(&["revert".to_owned(), link.to_owned()]) {
        Err(ExecError::Missing { .. }) => Ok(()),
        ran => ran,
    }
}

fn run(arguments: &[String]) -> Result<(), ExecError> {
    Run::new(PROGRAM).args(arguments).timeout(LIMIT).run()?;
    Ok(())
}

/// The routing domains of all addresses of a network of 16 to 24 bits.
fn reverse_zones(network: Ipv4Net) -> Vec<String> {
    let [a, b, c, _] = network.base().octets();
    let count = 1_u16 << (24 - network.prefix().clamp(16, 24));
    (0..count)
        .map(|step| format!("~{}.{b}.{a}.in-addr.arpa", u16::from(c) + step))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_server_is_named_last_when_it_is_settled_what_it_is_asked() {
        let guests = Ipv4Net::new(Ipv4Addr::new(172, 16, 16, 0), 21);
        let commands = commands("bv0", guests, Ipv4Addr::new(172, 16, 16, 1));
        let lines = commands.map(|words| words.join(" "));
        assert_eq!(lines[0], "default-route bv0 no");
        assert!(lines[1].starts_with("domain bv0 ~vm ~16.16.172.in-addr.arpa ~17."));
        assert_eq!(lines[2], "dns bv0 172.16.16.1");
    }

    #[test]
    fn every_address_of_the_guests_has_its_zone_and_no_other() {
        let zones = reverse_zones(Ipv4Net::new(Ipv4Addr::new(172, 16, 248, 0), 21));
        assert_eq!(zones.len(), 8);
        assert_eq!(zones[0], "~248.16.172.in-addr.arpa");
        assert_eq!(zones[7], "~255.16.172.in-addr.arpa");
        let one = reverse_zones(Ipv4Net::new(Ipv4Addr::new(10, 1, 2, 0), 24));
        assert_eq!(one, ["~2.1.10.in-addr.arpa"]);
    }
}
