//! Which devices of the host pass packets on. Those of the default routes do while an instance needs them, and what
//! they were before is remembered and put back.

use super::ledger::{Ledger, Lent};
use crate::crash::step;
use crate::net::host::HostOpError;
use crate::net::links::Link;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

/// The setting that switches all devices at once.
const EVERYWHERE: &str = "all";

fn path(device: &str) -> PathBuf {
    Path::new("/proc/sys/net/ipv4/conf")
        .join(device)
        .join("forwarding")
}

/// Whether a device passes packets on; nothing if there is no such device.
pub(super) fn read(device: &str) -> Result<Option<bool>, HostOpError> {
    match std::fs::read_to_string(path(device)) {
        Ok(text) => Ok(Some(text.trim() != "0")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(HostOpError::Setting {
            path: path(device),
            source,
        }),
    }
}

/// Makes a device pass packets on, or not, if it does not so already.
pub(super) fn set(device: &str, on: bool) -> Result<(), HostOpError> {
    if read(device)?.is_none_or(|is| is == on) {
        return Ok(());
    }
    let text = if on { "1" } else { "0" };
    let written = step("forward", || std::fs::write(path(device), text));
    written.map_err(|source| HostOpError::Setting {
        path: path(device),
        source,
    })
}

/// Makes the devices in `needed` forward, gives those back that are needed no more, and answers with those that
/// forward for our sake alone.
pub(super) fn settle(
    ledger: &Ledger,
    links: &[Link],
    needed: &BTreeSet<String>,
) -> Result<Vec<String>, HostOpError> {
    let everywhere = read(EVERYWHERE)?.unwrap_or(false);
    let before = ledger.lent()?;
    let is_there = |name: &str, lent: Lent| {
        links
            .iter()
            .any(|link| link.name == name && link.index == lent.index)
    };
    let mut lent = BTreeMap::new();
    let mut given_back = Vec::new();
    for (name, entry) in &before {
        if !is_there(name, *entry) {
            // The device, and what it was, is gone.
        } else if needed.contains(name) {
            lent.insert(name.clone(), *entry);
        } else {
            given_back.push(name);
        }
    }
    for name in needed {
        let link = links.iter().find(|link| &link.name == name);
        if let Some(link) = link
            && !lent.contains_key(name)
            && read(name)? == Some(false)
        {
            lent.insert(
                name.clone(),
                Lent {
                    index: link.index,
                    everywhere,
                },
            );
        }
    }
    // Remembered before it is done, and forgotten after it is undone.
    let mut both = lent.clone();
    both.extend(
        given_back
            .iter()
            .map(|name| ((*name).clone(), before[*name])),
    );
    if both != before {
        ledger.save_lent(&both)?;
    }
    for name in lent.keys() {
        set(name, true)?;
    }
    // Whoever made the whole host a router meanwhile needs it to stay one.
    let for_us_alone = |entry: Lent| entry.everywhere == everywhere;
    for name in given_back {
        if for_us_alone(before[name]) {
            set(name, false)?;
        }
    }
    if both != lent {
        ledger.save_lent(&lent)?;
    }
    lent.retain(|_, entry| for_us_alone(*entry));
    Ok(lent.into_keys().collect())
}
