//! TAP devices of the network namespace that the calling thread is in.

use linux_raw_sys::if_tun::{IFF_NO_PI, IFF_TAP, IFF_VNET_HDR};
use linux_raw_sys::ioctl::{TUNSETIFF, TUNSETOWNER, TUNSETPERSIST};
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{IntegerSetter, Setter, ioctl};

const TUN_DEVICE: &str = "/dev/net/tun";
/// The longest name of a link, with its NUL.
const NAME_BYTES: usize = 16;

/// A TAP could not be made or opened.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The device node is missing.
    #[error(
        "`/dev/net/tun` does not exist: as root run `modprobe tun` (or build the kernel with CONFIG_TUN), and \
         `mkdir -p /dev/net && mknod -m 0666 /dev/net/tun c 10 200` if no node appears"
    )]
    NoDevice,
    /// The device node may not be opened.
    #[error("no permission to open `/dev/net/tun`: as root run `chmod 0666 /dev/net/tun`")]
    NoPermission,
    /// The device node could not be opened.
    #[error("cannot open `/dev/net/tun`")]
    Open(#[source] Errno),
    /// The name is too long or empty.
    #[error("`{}` cannot be the name of a TAP", .0.escape_debug())]
    BadName(String),
    /// The kernel refuses.
    #[error("cannot make TAP `{name}`")]
    Make {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: Errno,
    },
}

/// `struct ifreq` as `TUNSETIFF` reads it: a name, flags, and room.
#[repr(C)]
struct TunRequest {
    name: [u8; NAME_BYTES],
    flags: u16,
    room: [u8; 22],
}

/// Makes a TAP called `name` that stays, and that the user `owner` may attach to; one that exists is opened and left
/// as it is otherwise. It has a virtio header, as both drivers expect.
///
/// # Errors
/// `/dev/net/tun` cannot be opened, a link of another kind has the name, or the TAP has a user already.
pub fn create(name: &str, owner: u32) -> Result<(), TapError> {
    let tap = open(name)?;
    let make = |source| TapError::Make {
        name: name.to_owned(),
        source,
    };
    // The owner first: from the moment that the TAP persists it is complete.
    set_integer::<{ TUNSETOWNER }>(&tap, owner as usize).map_err(make)?;
    set_integer::<{ TUNSETPERSIST }>(&tap, 1).map_err(make)
}

/// Opens the TAP called `name`, making it if it is not there; it goes with the descriptor unless it persists. Reads
/// and writes carry a virtio header of ten bytes before each frame.
///
/// # Errors
/// As [`create`].
pub fn open(name: &str) -> Result<OwnedFd, TapError> {
    if name.is_empty() || name.len() >= NAME_BYTES || name.contains(['\0', '/', '%']) {
        return Err(TapError::BadName(name.to_owned()));
    }
    let tap = rustix::fs::open(TUN_DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(
        |errno| match errno {
            Errno::NOENT | Errno::NODEV | Errno::NXIO => TapError::NoDevice,
            Errno::ACCESS | Errno::PERM => TapError::NoPermission,
            errno => TapError::Open(errno),
        },
    )?;
    let mut request = TunRequest {
        name: [0; NAME_BYTES],
        flags: TAP_FLAGS,
        room: [0; 22],
    };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    attach(&tap, request).map_err(|source| TapError::Make {
        name: name.to_owned(),
        source,
    })?;
    Ok(tap)
}

const TAP_FLAGS: u16 = (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR) as u16;

#[expect(unsafe_code, reason = "the one ioctl that joins a descriptor to a TAP")]
fn attach(tap: &OwnedFd, request: TunRequest) -> Result<(), Errno> {
    // SAFETY: `TUNSETIFF` reads (and may write) a `struct ifreq`, whose size and leading fields `TunRequest` has.
    unsafe { ioctl(tap, Setter::<{ TUNSETIFF }, TunRequest>::new(request)) }
}

#[expect(unsafe_code, reason = "ioctls of a TAP that take a plain number")]
fn set_integer<const CODE: u32>(tap: &OwnedFd, value: usize) -> Result<(), Errno> {
    // SAFETY: only used with `TUNSETOWNER` and `TUNSETPERSIST`, which take their argument by value and touch no
    // memory of ours.
    unsafe { ioctl(tap, IntegerSetter::<CODE>::new_usize(value)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_has_the_kernels_size() {
        // A name of 16 bytes and a union of 24.
        assert_eq!(size_of::<TunRequest>(), 40);
    }

    #[test]
    fn a_name_that_no_link_can_have_is_refused() {
        for name in ["", "sixteen-bytes-xx", "bt%d", "a/b"] {
            assert!(matches!(open(name), Err(TapError::BadName(_))), "{name}");
        }
    }

    #[test]
    fn what_can_be_done_about_a_missing_right_is_said() {
        let text = TapError::NoPermission.to_string();
        assert!(text.contains("chmod 0666 /dev/net/tun"), "{text}");
        assert!(TapError::NoDevice.to_string().contains("modprobe tun"));
    }
}
