//! The instance's address pool and who has which address of it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;

/// An IPv4 network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Ipv4Net {
    base: Ipv4Addr,
    prefix: u8,
}

/// The text is not a network such as `172.16.0.0/20`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is not an IPv4 network such as 172.16.0.0/20", .0.escape_debug())]
pub struct Ipv4NetError(String);

impl Ipv4Net {
    /// The network of `address` with `prefix` (at most 32) bits; host bits are cleared.
    pub const fn new(address: Ipv4Addr, prefix: u8) -> Self {
        let prefix = if prefix > 32 { 32 } else { prefix };
        Self {
            base: Ipv4Addr::from_bits(address.to_bits() & Self::mask(prefix)),
            prefix,
        }
    }

    const fn mask(prefix: u8) -> u32 {
        if prefix == 0 {
            0
        } else {
            u32::MAX << (32 - prefix)
        }
    }

    /// The first address of the network.
    pub const fn base(&self) -> Ipv4Addr {
        self.base
    }

    /// The number of network bits.
    pub const fn prefix(&self) -> u8 {
        self.prefix
    }

    /// Whether `address` lies in the network.
    pub const fn contains(&self, address: Ipv4Addr) -> bool {
        address.to_bits() & Self::mask(self.prefix) == self.base.to_bits()
    }

    /// Whether the two networks share an address.
    pub const fn overlaps(&self, other: &Self) -> bool {
        self.contains(other.base) || other.contains(self.base)
    }
}

impl std::fmt::Display for Ipv4Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

impl From<Ipv4Net> for String {
    fn from(net: Ipv4Net) -> String {
        net.to_string()
    }
}

impl TryFrom<String> for Ipv4Net {
    type Error = Ipv4NetError;
    fn try_from(text: String) -> Result<Self, Ipv4NetError> {
        let parsed = text.split_once('/').and_then(|(address, prefix)| {
            let prefix: u8 = prefix.parse().ok().filter(|&bits| bits <= 32)?;
            Some(Self::new(address.parse().ok()?, prefix))
        });
        parsed.ok_or(Ipv4NetError(text))
    }
}

/// The pool of an instance: a /20. Its lower half is the guests' network on the bridge, with the bridge at the
/// first address; the last two addresses of its upper half are the two ends of the veth to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Pool(Ipv4Net);

impl Pool {
    /// The number of network bits of a pool.
    pub const PREFIX: u8 = 20;

    /// The pool at `base`; host bits are cleared.
    pub const fn at(base: Ipv4Addr) -> Self {
        Self(Ipv4Net::new(base, Self::PREFIX))
    }

    /// The whole pool.
    pub const fn network(&self) -> Ipv4Net {
        self.0
    }

    /// The guests' network: a /21, on link for every guest.
    pub const fn guests(&self) -> Ipv4Net {
        Ipv4Net::new(self.0.base, Self::PREFIX + 1)
    }

    const fn at_offset(&self, offset: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.0.base.to_bits() + offset)
    }

    /// The bridge's address: every guest's gateway.
    pub const fn gateway(&self) -> Ipv4Addr {
        self.at_offset(1)
    }

    /// The veth's address inside the namespace.
    pub const fn uplink(&self) -> Ipv4Addr {
        self.at_offset(4093)
    }

    /// The veth's address on the host.
    pub const fn host(&self) -> Ipv4Addr {
        self.at_offset(4094)
    }

    /// The free pool of 172.16.0.0/12 that overlaps none of `routes` (a default route does not count).
    /// `start` (any number) says where to begin to look, so that two users rarely meet. First come those that Docker
    /// never takes for a network of its own, and those that it takes last: it begins with 172.17.0.0/16, and its routes
    /// come and go.
    pub fn find_free(routes: &[Ipv4Net], start: u32) -> Option<Self> {
        const POOLS: u32 = 1 << (Pool::PREFIX - 12);
        /// 172.17.0.0/16 to 172.23.0.0/16.
        const DOCKERS_FIRST: std::ops::Range<u32> = 16..128;
        const DOCKERS: u32 = DOCKERS_FIRST.end - DOCKERS_FIRST.start;
        const OTHERS: u32 = POOLS - DOCKERS;
        let first = Ipv4Addr::new(172, 16, 0, 0).to_bits();
        let others = (0..OTHERS)
            .map(|step| (start % OTHERS + step) % OTHERS)
            .map(|number| match number < DOCKERS_FIRST.start {
                true => number,
                false => number + DOCKERS,
            });
        let dockers =
            (0..DOCKERS).map(|step| DOCKERS_FIRST.start + (start % DOCKERS + step) % DOCKERS);
        others
            .chain(dockers)
            .map(|number| Self::at(Ipv4Addr::from_bits(first + number * 4096)))
            .find(|pool| {
                routes
                    .iter()
                    .all(|route| route.prefix == 0 || !route.overlaps(&pool.0))
            })
    }

    /// The lowest guest address that `taken` does not know, starting after `last` so that the address of a
    /// deleted VM is not used again at once.
    pub fn next_address(
        &self,
        last: Option<Ipv4Addr>,
        taken: impl Fn(Ipv4Addr) -> bool,
    ) -> Option<Ipv4Addr> {
        const FIRST: u32 = 2;
        const LAST: u32 = 2046;
        const COUNT: u32 = LAST - FIRST + 1;
        let after = last.map_or(0, |address| {
            (address
                .to_bits()
                .wrapping_sub(self.0.base.to_bits())
                .wrapping_sub(FIRST)
                .wrapping_add(1))
                % COUNT
        });
        (0..COUNT)
            .map(|step| self.at_offset(FIRST + (after + step) % COUNT))
            .find(|&address| !taken(address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> Ipv4Net {
        Ipv4Net::try_from(text.to_owned()).unwrap()
    }

    #[test]
    fn a_pool_shadows_no_route_of_the_host() {
        let pool = Pool::find_free(
            &[
                net("0.0.0.0/0"),
                net("172.16.0.0/19"),
                net("172.16.40.7/32"),
            ],
            0,
        )
        .unwrap();
        assert_eq!(pool.network().to_string(), "172.16.48.0/20");
        assert_eq!(Pool::find_free(&[net("172.0.0.0/8")], 3), None);
    }

    #[test]
    fn a_pool_is_one_that_docker_takes_only_when_nothing_else_is_left() {
        let early = |pool: Pool| (17..24).contains(&pool.network().base().octets()[1]);
        let free: std::collections::BTreeSet<_> = (0..1000)
            .map(|start| Pool::find_free(&[], start).unwrap())
            .inspect(|pool| assert!(!early(*pool), "{pool:?}"))
            .map(|pool| pool.network().base())
            .collect();
        assert_eq!(free.len(), 144);
        let rest = [net("172.16.0.0/16"), net("172.24.0.0/13")];
        for start in [0, 5, 300, u32::MAX] {
            assert!(early(Pool::find_free(&rest, start).unwrap()));
        }
    }

    #[test]
    fn guests_never_get_the_addresses_of_bridge_and_veth() {
        let pool = Pool::at(Ipv4Addr::new(172, 16, 16, 0));
        let mut taken = std::collections::HashSet::new();
        let mut last = None;
        while let Some(address) = pool.next_address(last, |a| taken.contains(&a)) {
            assert!(pool.guests().contains(address));
            assert_ne!(address, pool.gateway());
            assert!(taken.insert(address));
            last = Some(address);
        }
        assert_eq!(taken.len(), 2045);
        assert!(!pool.guests().contains(pool.host()) && pool.network().contains(pool.host()));
    }

    #[test]
    fn the_address_of_a_deleted_vm_is_not_the_next_one_given() {
        let pool = Pool::at(Ipv4Addr::new(172, 16, 16, 0));
        let first = pool.next_address(None, |_| false).unwrap();
        assert_ne!(pool.next_address(Some(first), |_| false), Some(first));
    }

    #[test]
    fn what_is_no_network_is_refused() {
        for bad in ["", "1.2.3.4", "1.2.3.4/33", "1.2.3/8", "a/8"] {
            assert!(Ipv4Net::try_from(bad.to_owned()).is_err(), "{bad}");
        }
    }
}
