//! The ruleset of the instance's namespace: loaded as a whole from one file, its sets changed by netlink.
//!
//! Needs nothing but nf_tables with the inet and bridge families and connection tracking of IPv4: no connection
//! tracking of bridged frames, as the bridge's rules look at each frame alone.

pub mod elements;

use crate::exec::{ExecError, Run};
use crate::op::Dropped;
use banger_core::addr::Pool;
use elements::{Change, Element, Elements, Set};
use linux_raw_sys::net::{NFPROTO_BRIDGE, NFPROTO_INET};
use netlink_bindings::nftables::{self, Nfgenmsg};
use netlink_bindings::traits::Pusher;
use netlink_socket2::{NetlinkSocket, ReplyError};
use rustix::io::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::links::NetlinkError;

const RULES: &str = include_str!("base.nft");
const MASQUERADE: &str = include_str!("masquerade.nft");
const TABLE: &[u8] = b"banger";
const LOAD_TIMEOUT: Duration = Duration::from_secs(30);
const NFNL_SUBSYS_NFTABLES: u16 = 10;
/// What does not change: which networks are what.
const NETWORKS: [&[u8]; 2] = [b"closed", b"private_networks"];

/// The ruleset could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// `nft` failed or is missing.
    #[error("cannot load the packet filter's rules (is `nftables` installed?)")]
    Load(#[source] ExecError),
    /// The kernel refused a request.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
}

/// What decides about the text of the ruleset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// The addresses.
    pub pool: Pool,
    /// Masquerade what leaves: the way out is `pasta`.
    pub masquerade: bool,
}

/// What all rules and chains of our tables look like, without handles and counters, and which networks are closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint {
    rules: usize,
    checksum: u32,
}

/// The two tables, in the network namespace that the calling thread is in.
pub struct Rules {
    socket: NetlinkSocket,
}

impl Default for Rules {
    fn default() -> Self {
        Self::new()
    }
}

impl Rules {
    /// A socket that is opened at the first request.
    pub fn new() -> Self {
        Self {
            socket: NetlinkSocket::new(),
        }
    }

    /// Loads the whole ruleset with these elements in one transaction.
    ///
    /// # Errors
    /// `nft` is missing or refuses.
    pub fn load(&mut self, shape: Shape, elements: &Elements) -> Result<(), NftError> {
        Run::new("nft")
            .args(["-f", "-"])
            .stdin(script(shape, elements))
            .timeout(LOAD_TIMEOUT)
            .run()
            .map_err(NftError::Load)?;
        Ok(())
    }

    /// The number of the namespace's ruleset: every transaction, of whoever, makes it greater by one.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn generation(&mut self) -> Result<u32, NetlinkError> {
        self.generation_raw().map_err(NetlinkError::new(
            "read the generation of the packet filter's rules",
        ))
    }

    fn generation_raw(&mut self) -> Result<u32, ReplyError> {
        let request = nftables::Request::new().op_getgen_do(&header(0));
        let mut reply = self.socket.request(&request)?;
        let mut generation = 0;
        while let Some((_, attributes)) = reply.recv().transpose()? {
            generation = attributes.get_id()?;
        }
        Ok(generation)
    }

    /// What is there now. Rules that somebody flushed, changed or added make a difference; elements do not.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn fingerprint(&mut self) -> Result<Fingerprint, NetlinkError> {
        self.fingerprint_raw()
            .map_err(NetlinkError::new("read the packet filter's rules"))
    }

    fn fingerprint_raw(&mut self) -> Result<Fingerprint, ReplyError> {
        let mut fingerprint = Fingerprint {
            rules: 0,
            checksum: 0,
        };
        for family in [INET, BRIDGE] {
            let mut add = |bytes: &[u8]| {
                fingerprint.checksum = crc32c::crc32c_append(fingerprint.checksum, bytes);
            };
            let request = nftables::Request::new().op_getchain_dump(&header(family));
            let mut reply = self.socket.request(&request)?;
            while let Some((_, chain)) = reply.recv().transpose()? {
                if chain.get_table().map(std::ffi::CStr::to_bytes) != Ok(TABLE) {
                    continue;
                }
                add(chain.get_name()?.to_bytes_with_nul());
                if let Ok(hook) = chain.get_hook() {
                    add(hook.get_buf());
                }
                if let Ok(policy) = chain.get_policy() {
                    add(&policy.to_ne_bytes());
                }
            }
            let request = nftables::Request::new().op_getrule_dump(&header(family));
            let mut reply = self.socket.request(&request)?;
            while let Some((_, rule)) = reply.recv().transpose()? {
                if rule.get_table().map(std::ffi::CStr::to_bytes) != Ok(TABLE) {
                    continue;
                }
                add(rule.get_chain()?.to_bytes_with_nul());
                add(rule.get_expressions()?.get_buf());
                fingerprint.rules += 1;
            }
        }
        for set in NETWORKS {
            for key in self.elements(INET, set)? {
                fingerprint.checksum = crc32c::crc32c_append(fingerprint.checksum, &key);
            }
        }
        Ok(fingerprint)
    }

    /// The keys of `set`. Nothing if the table is not there.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn keys(&mut self, set: Set) -> Result<BTreeSet<Vec<u8>>, NetlinkError> {
        let (bridge, name) = set.place();
        let family = if bridge { BRIDGE } else { INET };
        let keys = self
            .elements(family, name.as_bytes())
            .map_err(NetlinkError::new(format!("list the elements of `{name}`")))?;
        Ok(keys.into_iter().collect())
    }

    /// Whether every set holds `elements` and nothing else.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn hold(&mut self, elements: &Elements) -> Result<bool, NetlinkError> {
        for set in Set::ALL {
            let wanted = elements.of(set).into_iter().map(|element| element.key);
            if !self.keys(set)?.into_iter().eq(wanted) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn elements(&mut self, family: u8, set: &[u8]) -> Result<Vec<Vec<u8>>, ReplyError> {
        let mut request = nftables::Request::new().op_getsetelem_dump(&header(family));
        request.encode().push_table_bytes(TABLE).push_set_bytes(set);
        let mut reply = self.socket.request(&request)?;
        let mut keys = Vec::new();
        loop {
            match reply.recv() {
                None => return Ok(keys),
                Some(Ok((_, list))) => {
                    let Ok(elements) = list.get_elements() else {
                        continue;
                    };
                    for element in elements.get_elem() {
                        keys.push(element.get_key()?.get_value()?.to_vec());
                    }
                }
                Some(Err(error))
                    if error.as_io_error().raw_os_error() == Some(Errno::NOENT.raw_os_error()) =>
                {
                    return Ok(Vec::new());
                }
                Some(Err(error)) => return Err(error),
            }
        }
    }

    /// Changes the sets, all or nothing. What is removed must be there.
    ///
    /// # Errors
    /// The ruleset is not loaded, or the kernel refuses.
    pub fn change(&mut self, change: &Change) -> Result<(), NetlinkError> {
        if change.is_empty() {
            return Ok(());
        }
        let failed = || {
            NetlinkError::new(format!(
                "change the elements of {}",
                names(change).join(", ")
            ))
        };
        let messages = u32::try_from(2 + 2 * Set::ALL.len()).unwrap_or(u32::MAX);
        let mut chain = nftables::Chained::new(self.socket.reserve_seq(messages));
        let mut batch = Nfgenmsg::new();
        batch.set_res_id(NFNL_SUBSYS_NFTABLES);
        chain.request().op_batch_begin_do(&batch);
        for set in Set::ALL {
            let (bridge, name) = set.place();
            let header = header(if bridge { BRIDGE } else { INET });
            if change.remove.iter().any(|element| element.set == set) {
                let mut request = chain.request().op_delsetelem_do(&header);
                push_keys(request.encode(), name, &change.remove, set);
            }
            if change.add.iter().any(|element| element.set == set) {
                let mut request = chain.request().set_create().op_newsetelem_do(&header);
                push_keys(request.encode(), name, &change.add, set);
            }
        }
        chain.request().op_batch_end_do(&batch);
        let chain = chain.finalize();
        self.socket
            .request_chained(&chain)
            .map_err(|error| failed()(ReplyError::from(error)))?
            .recv_all()
            .map_err(failed())
    }

    /// What each counter has seen, by its name. Nothing if the tables are not there.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn counters(&mut self) -> Result<BTreeMap<String, Dropped>, NetlinkError> {
        self.counters_raw()
            .map_err(NetlinkError::new("read the packet filter's counters"))
    }

    fn counters_raw(&mut self) -> Result<BTreeMap<String, Dropped>, ReplyError> {
        let mut counters = BTreeMap::new();
        for family in [INET, BRIDGE] {
            let request = nftables::Request::new().op_getobj_dump(&header(family));
            let mut reply = self.socket.request(&request)?;
            while let Some((_, object)) = reply.recv().transpose()? {
                if object.get_table().map(std::ffi::CStr::to_bytes) != Ok(TABLE) {
                    continue;
                }
                if let Ok(nftables::ObjData::Counter(counter)) = object.get_data() {
                    let name = object.get_name()?.to_string_lossy().into_owned();
                    let seen = Dropped {
                        packets: counter.get_packets()?,
                        bytes: counter.get_bytes()?,
                    };
                    counters.insert(name, seen);
                }
            }
        }
        Ok(counters)
    }
}

fn names(change: &Change) -> Vec<&'static str> {
    let elements = change.remove.iter().chain(&change.add);
    let names: BTreeSet<&str> = elements.map(|element| element.set.place().1).collect();
    names.into_iter().collect()
}

fn push_keys<P: Pusher>(
    attributes: nftables::PushSetelemListAttrs<P>,
    name: &str,
    elements: &[Element],
    set: Set,
) {
    let mut list = attributes
        .push_table_bytes(TABLE)
        .push_set_bytes(name.as_bytes())
        .nested_elements();
    for element in elements.iter().filter(|element| element.set == set) {
        list = list
            .nested_elem()
            .nested_key()
            .push_value(&element.key)
            .end_nested()
            .end_nested();
    }
}

const INET: u8 = NFPROTO_INET as u8;
const BRIDGE: u8 = NFPROTO_BRIDGE as u8;

fn header(family: u8) -> Nfgenmsg {
    let mut header = Nfgenmsg::new();
    header.nfgen_family = family;
    header
}

/// Everything in it is a number of ours or the name of a TAP that was checked: nothing of a guest's choice.
fn script(shape: Shape, elements: &Elements) -> String {
    let Shape { pool, masquerade } = shape;
    let masquerade = if masquerade { MASQUERADE } else { "" };
    format!(
        "define host_address = {}\ndefine gateway = {}\ndefine guests = {}\ndefine pool = {}\n\
         {RULES}{masquerade}{}",
        pool.host(),
        pool.gateway(),
        pool.guests(),
        pool.network(),
        elements.script()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_hook_drops_what_no_rule_accepts() {
        let chains = RULES.matches("type filter hook").count();
        let dropping = RULES.matches("policy drop;").count();
        // Of the two that accept, one sends everything from a guest to a chain that ends with a drop, and the other
        // only marks what may be routed.
        assert_eq!((chains, dropping), (5, 3));
        assert!(RULES.contains("iifname \"bt*\" jump from_guest"));
        assert!(RULES.contains("counter name \"sender_dropped\" drop\n\t}"));
        assert!(
            RULES.contains("ip saddr @nat_vms accept\n\t\tcounter name \"nat_dropped\" drop\n\t}")
        );
    }

    #[test]
    fn only_our_own_tables_are_touched() {
        for line in RULES
            .lines()
            .chain(MASQUERADE.lines())
            .filter(|line| line.contains("table ") && !line.starts_with('#'))
        {
            let line = line.trim_start_matches("delete ").trim_end_matches(" {");
            assert!(
                matches!(line, "table inet banger" | "table bridge banger"),
                "{line}"
            );
        }
        assert!(!RULES.contains("flush"));
    }

    #[test]
    fn only_behind_pasta_something_is_masqueraded() {
        let shape = |masquerade| Shape {
            pool: Pool::at(std::net::Ipv4Addr::new(172, 16, 0, 0)),
            masquerade,
        };
        let veth = script(shape(false), &Elements::default());
        let pasta = script(shape(true), &Elements::default());
        assert!(veth.starts_with("define host_address = 172.16.15.254\n"));
        assert!(!veth.contains("hook postrouting"));
        assert!(pasta.contains("ip saddr $guests oifname \"up0\" masquerade"));
    }
}
