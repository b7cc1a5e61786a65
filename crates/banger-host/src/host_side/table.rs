//! An instance's table in the host's packet filter.

use super::tag::Tag;
use crate::crash::step;
use crate::exec::Run;
use crate::net::links::NetlinkError;
use crate::net::nft::NftError;
use banger_core::addr::{Ipv4Net, Pool};
use banger_core::id::InstanceId;
use linux_raw_sys::net::NFPROTO_INET;
use netlink_bindings::nftables::{self, Nfgenmsg};
use netlink_socket2::{NetlinkSocket, ReplyError};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fmt::Write as _;
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

const RULES: &str = include_str!("host.nft");
const LOAD_TIMEOUT: Duration = Duration::from_secs(30);
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const PREFIX: &str = "banger_";
const SETS: [&str; 2] = ["uplinks", "lent"];
/// The kind of a table's user data that is its comment.
const COMMENT: u8 = 0;

/// The table's name: `banger_` and twelve hexadecimal digits.
pub(super) fn name(instance: InstanceId) -> String {
    format!("{PREFIX}{}", instance.tail(12))
}

/// What tells the rules of this version from another's.
pub(super) fn made_from() -> u32 {
    crc32c::crc32c(RULES.as_bytes())
}

/// What a table is made for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Contents<'a> {
    pub(super) tag: Tag,
    pub(super) pool: Pool,
    /// The devices of the default routes; none while NAT is down.
    pub(super) uplinks: &'a [String],
    /// Those that forward for our sake alone.
    pub(super) lent: &'a [String],
}

/// The tables of the host, in the network namespace that the calling thread is in.
pub(super) struct Tables {
    socket: NetlinkSocket,
}

impl Tables {
    pub(super) fn new() -> Self {
        Self {
            socket: NetlinkSocket::new(),
        }
    }

    /// Every table with a name like ours, and the comment it carries.
    pub(super) fn list(&mut self) -> Result<BTreeMap<String, Option<String>>, NetlinkError> {
        self.list_raw()
            .map_err(NetlinkError::new("list the packet filter's tables"))
    }

    fn list_raw(&mut self) -> Result<BTreeMap<String, Option<String>>, ReplyError> {
        let request = nftables::Request::new().op_gettable_dump(&header());
        let mut reply = self.socket.request(&request)?;
        let mut tables = BTreeMap::new();
        while let Some((_, table)) = reply.recv().transpose()? {
            let name = table.get_name()?.to_string_lossy().into_owned();
            if name.starts_with(PREFIX) {
                tables.insert(name, comment(table.get_userdata().unwrap_or_default()));
            }
        }
        Ok(tables)
    }

    /// Loads the table in one transaction, in place of what was there. `lock` is held for as long as that takes, also
    /// if this process is killed meanwhile: nobody who takes it then is overtaken.
    pub(super) fn load(
        &mut self,
        contents: Contents<'_>,
        lock: &Arc<File>,
    ) -> Result<(), NftError> {
        let load = Run::new("nft")
            .args(["-f", "-"])
            .stdin(script(contents))
            .stdout_to(Arc::clone(lock))
            .timeout(LOAD_TIMEOUT);
        step("load-table", || load.run()).map_err(NftError::Load)?;
        Ok(())
    }

    /// A checksum of all that is in the table, or nothing if there is none. Handles make no difference.
    pub(super) fn checksum(&mut self, table: &str) -> Result<Option<u32>, NetlinkError> {
        match self
            .checksum_raw(table)
            .map_err(NetlinkError::new(format!("read table `{table}`")))
        {
            Err(error) if error.errno() == Some(Errno::NOENT) => Ok(None),
            checksum => checksum,
        }
    }

    fn checksum_raw(&mut self, table: &str) -> Result<Option<u32>, ReplyError> {
        let is_ours =
            |name: Result<&CStr, _>| name.is_ok_and(|name| name.to_bytes() == table.as_bytes());
        let mut checksum = 0;
        let mut add = |bytes: &[u8]| checksum = crc32c::crc32c_append(checksum, bytes);
        let mut found = false;
        let request = nftables::Request::new().op_getchain_dump(&header());
        let mut reply = self.socket.request(&request)?;
        while let Some((_, chain)) = reply.recv().transpose()? {
            if !is_ours(chain.get_table().map_err(drop)) {
                continue;
            }
            found = true;
            add(chain.get_name()?.to_bytes_with_nul());
            if let Ok(hook) = chain.get_hook() {
                add(hook.get_buf());
            }
            if let Ok(policy) = chain.get_policy() {
                add(&policy.to_ne_bytes());
            }
        }
        if !found {
            return Ok(None);
        }
        let mut request = nftables::Request::new().op_getrule_dump(&header());
        request.encode().push_table_bytes(table.as_bytes());
        let mut reply = self.socket.request(&request)?;
        while let Some((_, rule)) = reply.recv().transpose()? {
            if is_ours(rule.get_table().map_err(drop)) {
                add(rule.get_chain()?.to_bytes_with_nul());
                add(rule.get_expressions()?.get_buf());
            }
        }
        for set in SETS {
            let mut request = nftables::Request::new().op_getsetelem_dump(&header());
            request
                .encode()
                .push_table_bytes(table.as_bytes())
                .push_set_bytes(set.as_bytes());
            let mut reply = self.socket.request(&request)?;
            // In an order of the kernel's own.
            let mut keys = Vec::new();
            while let Some((_, list)) = reply.recv().transpose()? {
                let Ok(elements) = list.get_elements() else {
                    continue;
                };
                for element in elements.get_elem() {
                    keys.push(element.get_key()?.get_value()?.to_vec());
                }
            }
            keys.sort_unstable();
            add(set.as_bytes());
            keys.iter().for_each(|key| add(key));
        }
        Ok(Some(checksum))
    }

    /// Removes the table; no error if it is gone.
    pub(super) fn delete(&mut self, table: &str) -> Result<(), NetlinkError> {
        let what = format!("remove table `{table}`");
        let deleted = step("remove-table", || self.delete_raw(table));
        match deleted.map_err(NetlinkError::new(what)) {
            Err(error) if error.errno() == Some(Errno::NOENT) => Ok(()),
            deleted => deleted,
        }
    }

    fn delete_raw(&mut self, table: &str) -> Result<(), ReplyError> {
        let mut chain = nftables::Chained::new(self.socket.reserve_seq(3));
        let mut batch = Nfgenmsg::new();
        batch.set_res_id(NFNL_SUBSYS_NFTABLES);
        chain.request().op_batch_begin_do(&batch);
        chain
            .request()
            .op_deltable_do(&header())
            .encode()
            .push_name_bytes(table.as_bytes());
        chain.request().op_batch_end_do(&batch);
        let chain = chain.finalize();
        self.socket.request_chained(&chain)?.recv_all()
    }
}

/// Whether a device's name can be put into a script: what the kernel allows beyond it, nobody uses.
pub(super) fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_-.@+".contains(&byte))
}

fn header() -> Nfgenmsg {
    let mut header = Nfgenmsg::new();
    header.nfgen_family = NFPROTO_INET as u8;
    header
}

/// The comment in a table's user data: records of a kind, a length and so many bytes.
fn comment(mut userdata: &[u8]) -> Option<String> {
    while let [kind, length, rest @ ..] = userdata {
        let value = rest.get(..usize::from(*length))?;
        if *kind == COMMENT {
            let text = value.strip_suffix(b"\0").unwrap_or(value);
            return String::from_utf8(text.to_vec()).ok();
        }
        userdata = &rest[value.len()..];
    }
    None
}

fn script(contents: Contents<'_>) -> String {
    let Contents { tag, pool, .. } = contents;
    let table = name(tag.instance);
    let guests: Ipv4Net = pool.guests();
    let mut script = RULES
        .replace("TABLE", &table)
        .replace("TAG", &tag.to_string())
        .replace("VETH", &tag.instance.veth_name())
        .replace("POOL", &pool.network().to_string())
        .replace("GUESTS", &guests.to_string());
    for (set, devices) in SETS.into_iter().zip([contents.uplinks, contents.lent]) {
        for device in devices.iter().filter(|device| is_plain_name(device)) {
            let _ = writeln!(script, "add element inet {table} {set} {{ \"{device}\" }}");
        }
    }
    script
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn text(uplinks: &[String]) -> String {
        script(Contents {
            tag: Tag {
                uid: 1000,
                instance: "0198c2a4-7d1e-7b3a-9c4d-1f2e3d4c5b6a".parse().unwrap(),
            },
            pool: Pool::at(Ipv4Addr::new(172, 16, 16, 0)),
            uplinks,
            lent: &[],
        })
    }

    #[test]
    fn the_script_names_our_own_table_and_nothing_is_left_to_fill_in() {
        let text = text(&["eth0".to_owned(), "bad\"; flush ruleset".to_owned()]);
        for line in text.lines().filter(|line| line.contains("table ")) {
            let line = line.trim_start_matches("delete ").trim_end_matches(" {");
            assert!(
                line.starts_with('#') || line == "table inet banger_1f2e3d4c5b6a",
                "{line}"
            );
        }
        let rules = text
            .lines()
            .filter(|line| !line.trim_start().starts_with('#'));
        let rules = rules.collect::<Vec<_>>().join("\n");
        for word in ["TABLE", "TAG", "VETH", "POOL", "GUESTS"] {
            assert!(!rules.contains(word), "{word}");
        }
        assert!(!text.contains("flush"));
        assert!(text.ends_with("add element inet banger_1f2e3d4c5b6a uplinks { \"eth0\" }\n"));
    }

    #[test]
    fn every_way_from_and_to_a_guest_ends_with_a_drop() {
        let text = text(&[]);
        for chain in ["to_host", "from_guests", "to_guests"] {
            let (_, rest) = text.split_once(&format!("chain {chain} {{")).unwrap();
            let (rules, _) = rest.split_once("\n\t}").unwrap();
            assert!(rules.ends_with("\n\t\tdrop"), "{chain}: {rules}");
            // Nothing is let through that does not say which addresses it may have.
            let accepting = rules.lines().filter(|rule| rule.ends_with("accept"));
            for rule in accepting {
                let words = rule.trim_start();
                assert!(
                    words.starts_with("ip saddr 172.16.") || words.starts_with("ip daddr 172.16."),
                    "{rule}"
                );
            }
        }
    }

    #[test]
    fn a_comment_is_found_among_other_user_data_and_a_broken_one_is_none() {
        assert_eq!(comment(b"\x07\x02ab\x00\x04tag\0"), Some("tag".to_owned()));
        for broken in [&b""[..], b"\0", b"\0\x09tag", b"\x01\x01a", b"\0\x01\xff"] {
            assert_eq!(comment(broken), None);
        }
    }
}
