//! The ruleset of the instance's namespace: loaded as a whole from one file, its sets changed by netlink.
//!
//! Needs nothing but nf_tables with the inet and bridge families and connection tracking of IPv4: no connection
//! tracking of bridged frames, as the bridge's rules look at each frame alone.

use crate::exec::{ExecError, Run};
use crate::op::Port;
use banger_core::id::MacAddress;
use linux_raw_sys::net::{NFPROTO_BRIDGE, NFPROTO_INET};
use netlink_bindings::nftables::{self, Nfgenmsg};
use netlink_socket2::{NetlinkSocket, ReplyError};
use rustix::io::Errno;
use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::time::Duration;

use super::links::NetlinkError;

const RULES: &str = include_str!("base.nft");
const TABLE: &[u8] = b"banger";
const PORTS: &[u8] = b"ports";
const NAT_VMS: &[u8] = b"nat_vms";
const LOAD_TIMEOUT: Duration = Duration::from_secs(10);
const NFNL_SUBSYS_NFTABLES: u16 = 10;
/// `ifname` (16 bytes), `ether_addr` (6, filled up to 8), `ipv4_addr` (4).
const KEY_BYTES: usize = 28;
const NAME_BYTES: usize = 16;

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

/// What all rules and chains of our tables look like, without handles and counters.
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

    /// Loads the whole ruleset in one transaction. Elements that the sets had are kept.
    ///
    /// # Errors
    /// `nft` is missing or refuses.
    pub fn load(&mut self, host_address: Ipv4Addr) -> Result<(), NftError> {
        let script = script(host_address, &self.ports()?, &self.nat_vms()?);
        Run::new("nft")
            .args(["-f", "-"])
            .stdin(script)
            .timeout(LOAD_TIMEOUT)
            .run()
            .map_err(NftError::Load)?;
        Ok(())
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
        Ok(fingerprint)
    }

    /// What every port may send as. Nothing if the table is not there.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn ports(&mut self) -> Result<Vec<Port>, NetlinkError> {
        let keys = self
            .elements(BRIDGE, PORTS)
            .map_err(NetlinkError::new("list the allowed senders"))?;
        Ok(keys.iter().filter_map(|key| decode_port(key)).collect())
    }

    /// Whose guests may reach the internet. Nothing if the table is not there.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn nat_vms(&mut self) -> Result<Vec<Ipv4Addr>, NetlinkError> {
        let keys = self
            .elements(INET, NAT_VMS)
            .map_err(NetlinkError::new("list who reaches the internet"))?;
        Ok(keys
            .iter()
            .filter_map(|key| <[u8; 4]>::try_from(key.as_slice()).ok())
            .map(Ipv4Addr::from)
            .collect())
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

    /// Takes `remove` out of the allowed senders and puts `add` in, all or nothing. What is removed must be there.
    ///
    /// # Errors
    /// The ruleset is not loaded, or the kernel refuses.
    pub fn change_ports(&mut self, remove: &[Port], add: &[Port]) -> Result<(), NetlinkError> {
        let failed = |error: std::io::Error| {
            NetlinkError::new("change the allowed senders")(ReplyError::from(error))
        };
        if remove.is_empty() && add.is_empty() {
            return Ok(());
        }
        let mut chain = nftables::Chained::new(self.socket.reserve_seq(4));
        let mut batch = Nfgenmsg::new();
        batch.set_res_id(NFNL_SUBSYS_NFTABLES);
        chain.request().op_batch_begin_do(&batch);
        if !remove.is_empty() {
            let mut request = chain.request().op_delsetelem_do(&header(BRIDGE));
            let mut list = request
                .encode()
                .push_table_bytes(TABLE)
                .push_set_bytes(PORTS)
                .nested_elements();
            for port in remove {
                list = list
                    .nested_elem()
                    .nested_key()
                    .push_value(&encode_port(port))
                    .end_nested()
                    .end_nested();
            }
        }
        if !add.is_empty() {
            let mut request = chain
                .request()
                .set_create()
                .op_newsetelem_do(&header(BRIDGE));
            let mut list = request
                .encode()
                .push_table_bytes(TABLE)
                .push_set_bytes(PORTS)
                .nested_elements();
            for port in add {
                list = list
                    .nested_elem()
                    .nested_key()
                    .push_value(&encode_port(port))
                    .end_nested()
                    .end_nested();
            }
        }
        chain.request().op_batch_end_do(&batch);
        let chain = chain.finalize();
        self.socket
            .request_chained(&chain)
            .map_err(failed)?
            .recv_all()
            .map_err(NetlinkError::new("change the allowed senders"))
    }
}

const INET: u8 = NFPROTO_INET as u8;
const BRIDGE: u8 = NFPROTO_BRIDGE as u8;

fn header(family: u8) -> Nfgenmsg {
    let mut header = Nfgenmsg::new();
    header.nfgen_family = family;
    header
}

fn encode_port(port: &Port) -> [u8; KEY_BYTES] {
    let mut key = [0; KEY_BYTES];
    let name = port.tap.as_bytes();
    let length = name.len().min(NAME_BYTES - 1);
    key[..length].copy_from_slice(&name[..length]);
    key[16..22].copy_from_slice(&port.mac.0);
    key[24..].copy_from_slice(&port.address.octets());
    key
}

fn decode_port(key: &[u8]) -> Option<Port> {
    let key: &[u8; KEY_BYTES] = key.try_into().ok()?;
    let end = key[..NAME_BYTES].iter().position(|&byte| byte == 0)?;
    let tap = std::str::from_utf8(&key[..end]).ok()?.to_owned();
    let mac = MacAddress(key[16..22].try_into().ok()?);
    let address = Ipv4Addr::from(<[u8; 4]>::try_from(&key[24..]).ok()?);
    Some(Port { tap, mac, address })
}

fn script(host_address: Ipv4Addr, ports: &[Port], nat_vms: &[Ipv4Addr]) -> String {
    let mut script = format!("define host_address = {host_address}\n{RULES}");
    for port in ports {
        // Only a name of our own making goes into the script; another's element is not kept.
        if super::namespace::is_tap_name(&port.tap) {
            let _ = writeln!(
                script,
                "add element bridge banger ports {{ \"{}\" . {} . {} }}",
                port.tap, port.mac, port.address
            );
        }
    }
    for address in nat_vms {
        let _ = writeln!(script, "add element inet banger nat_vms {{ {address} }}");
    }
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port() -> Port {
        Port {
            tap: "bt0123456789ab".to_owned(),
            mac: MacAddress([6, 1, 2, 3, 4, 5]),
            address: Ipv4Addr::new(172, 16, 0, 2),
        }
    }

    #[test]
    fn an_element_is_name_mac_and_address_each_at_its_place() {
        let key = encode_port(&port());
        assert_eq!(&key[..16], b"bt0123456789ab\0\0");
        assert_eq!(&key[16..24], [6, 1, 2, 3, 4, 5, 0, 0]);
        assert_eq!(&key[24..], [172, 16, 0, 2]);
        assert_eq!(decode_port(&key), Some(port()));
        assert_eq!(decode_port(&key[..27]), None);
        assert_eq!(decode_port(&[b'x'; KEY_BYTES]), None);
    }

    #[test]
    fn every_hook_drops_what_no_rule_accepts() {
        let chains = RULES.matches("type filter hook").count();
        let dropping = RULES.matches("policy drop;").count();
        // The one that accepts sends everything from a guest to a chain that ends with a drop.
        assert_eq!((chains, dropping), (4, 3));
        assert!(RULES.contains("iifname \"bt*\" jump from_guest"));
        assert!(RULES.contains("counter name \"sender_dropped\" drop\n\t}"));
    }

    #[test]
    fn only_our_own_tables_are_touched() {
        for line in RULES
            .lines()
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
    fn a_foreign_name_never_gets_into_the_script() {
        let mut foreign = port();
        foreign.tap = "bt\" } ; flush".to_owned();
        let script = script(
            Ipv4Addr::new(172, 16, 15, 254),
            &[port(), foreign],
            &[Ipv4Addr::new(172, 16, 0, 2)],
        );
        assert!(script.starts_with("define host_address = 172.16.15.254\n"));
        assert!(script.ends_with(
            "add element bridge banger ports { \"bt0123456789ab\" . 06:01:02:03:04:05 . 172.16.0.2 }\n\
             add element inet banger nat_vms { 172.16.0.2 }\n"
        ));
    }
}
