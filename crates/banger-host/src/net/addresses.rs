//! The host's own addresses, and word of their changes. Needs no privilege.

use super::links::Links;
use super::watch;
use rustix::event::{PollFd, PollFlags, poll};
use std::collections::BTreeSet;
use std::io;
use std::net::Ipv4Addr;
use std::ops::ControlFlow;

/// The group of changes of IPv4 addresses, as a bit.
const ADDRESSES: u32 = 1 << 4;

/// All IPv4 addresses of the network namespace that the calling thread is in, the loopback's aside.
///
/// # Errors
/// The kernel refuses.
pub fn own_addresses() -> Result<BTreeSet<Ipv4Addr>, super::links::NetlinkError> {
    let addresses = Links::new().addresses()?.into_iter();
    Ok(addresses
        .map(|address| address.address)
        .filter(|address| !address.is_loopback())
        .collect())
}

/// Tells `report` all addresses now, and again whenever they have changed, until it breaks off.
///
/// # Errors
/// Changes cannot be heard of.
pub fn follow(mut report: impl FnMut(BTreeSet<Ipv4Addr>) -> ControlFlow<()>) -> io::Result<()> {
    let socket = watch::listen(None, ADDRESSES)?;
    let mut told = None;
    loop {
        // Once more than nothing: what changed before the socket listened is in the first list.
        if let Ok(now) = own_addresses()
            && told.as_ref() != Some(&now)
        {
            told = Some(now.clone());
            if report(now).is_break() {
                return Ok(());
            }
        }
        match poll(&mut [PollFd::new(&socket, PollFlags::IN)], None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        watch::drain(&socket)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_word_is_all_addresses_and_the_loopback_is_not_among_them() {
        let mut heard = None;
        let followed = follow(|addresses| {
            heard = Some(addresses);
            ControlFlow::Break(())
        });
        followed.unwrap();
        let heard = heard.unwrap();
        assert!(!heard.contains(&Ipv4Addr::LOCALHOST), "{heard:?}");
    }
}
