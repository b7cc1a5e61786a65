//! Addresses that the host needs, and that no route of their own shows: who is reached by the default route alone. A
//! pool with one of them in it would lead what the host sends there to guests.

use super::links::{Links, NetlinkError};
use banger_core::addr::Pool;
use std::net::Ipv4Addr;
use std::path::Path;

/// The resolver's own file, and that of the resolvers which systemd-resolved asks.
const RESOLVERS: [&str; 2] = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];
/// What systemd-resolved writes names our own servers as well.
const OF_RESOLVED: &str = "/run/systemd/resolve/";

/// An address, and what it is to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Needed {
    /// A word for it.
    pub(crate) what: &'static str,
    /// The address.
    pub(crate) address: Ipv4Addr,
    /// The link that it is on, if that is known.
    pub(crate) link: Option<u32>,
    /// The host was told of it by us, if it is a gateway of ours.
    pub(crate) perhaps_ours: bool,
}

impl Needed {
    /// Whether it is a reason not to give guests `pool`. The link `own` is the pool's.
    pub(crate) fn is_in(&self, pool: Pool, own: Option<u32>) -> bool {
        let by_us = own.is_some() && self.link == own;
        // Of an instance that has just lost its veth systemd-resolved may not have heard yet.
        let told = self.perhaps_ours && self.address == pool.gateway();
        pool.network().contains(self.address) && !by_us && !told
    }
}

/// All of them.
///
/// # Errors
/// The kernel's tables cannot be read.
pub(crate) fn needed(links: &mut Links) -> Result<Vec<Needed>, NetlinkError> {
    let on_link = |what, address, link| Needed {
        what,
        address,
        link,
        perhaps_ours: false,
    };
    let mut needed: Vec<Needed> = links
        .routes()?
        .into_iter()
        .filter_map(|route| Some(on_link("gateway", route.gateway?, route.link)))
        .collect();
    let neighbours = links.neighbours()?.into_iter();
    needed.extend(neighbours.map(|(link, address)| on_link("neighbour", address, Some(link))));
    let addresses = links.addresses()?.into_iter();
    needed.extend(addresses.map(|found| on_link("address", found.address, Some(found.link))));
    for path in RESOLVERS.map(Path::new) {
        let real = std::fs::canonicalize(path).unwrap_or_default();
        // One that cannot be read names nobody.
        let text = std::fs::read_to_string(&real).unwrap_or_default();
        needed.extend(name_servers(&text).map(|address| Needed {
            what: "name server",
            address,
            link: None,
            perhaps_ours: real.starts_with(OF_RESOLVED),
        }));
    }
    Ok(needed)
}

fn name_servers(text: &str) -> impl Iterator<Item = Ipv4Addr> {
    text.lines()
        .filter_map(|line| line.strip_prefix("nameserver"))
        .filter(|rest| rest.starts_with([' ', '\t']))
        .filter_map(|rest| rest.split_ascii_whitespace().next()?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_that_holds_a_name_server_of_the_host_is_refused_unless_it_is_its_own() {
        let text = "# nameserver 10.0.0.1\nnameserver 10.10.0.1\nnameserver\t10.10.0.53\nnameserver ::1\noptions x\n";
        let found: Vec<_> = name_servers(text).collect();
        assert_eq!(found, [[10, 10, 0, 1], [10, 10, 0, 53]].map(Ipv4Addr::from));
        let pool = Pool::at(Ipv4Addr::new(10, 10, 0, 0));
        let is_in = |address, perhaps_ours| {
            let (what, link) = ("name server", None);
            let needed = Needed {
                what,
                address,
                link,
                perhaps_ours,
            };
            needed.is_in(pool, Some(7))
        };
        assert_eq!(found[0], pool.gateway());
        assert!(is_in(found[0], false) && is_in(found[1], false));
        assert!(!is_in(found[0], true) && is_in(found[1], true));
        assert!(!is_in(Ipv4Addr::new(10, 10, 16, 1), false));
    }
}
