//! The few system calls that neither std nor rustix wraps safely, and `/proc/uptime`.

use rustix::fd::{AsFd, FromRawFd, OwnedFd};
use rustix::io::Errno;
use rustix::process::Signal;
use std::io;

/// Milliseconds since the kernel's start.
pub(crate) fn uptime_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec.unsigned_abs() * 1000 + now.tv_nsec.unsigned_abs() / 1_000_000
}

/// `RNDADDENTROPY`'s argument for 32 bytes.
#[repr(C)]
struct RandPoolInfo {
    entropy_bits: i32,
    bytes: i32,
    data: [u8; 32],
}

/// Mixes a seed into the kernel's random pool and credits all its bits.
pub(crate) fn credit_entropy(random: impl AsFd, seed: [u8; 32]) -> io::Result<()> {
    const RNDADDENTROPY: rustix::ioctl::Opcode = linux_raw_sys::ioctl::RNDADDENTROPY as _;
    let info = RandPoolInfo {
        entropy_bits: 256,
        bytes: 32,
        data: seed,
    };
    #[expect(unsafe_code, reason = "rustix has no call for this request")]
    // SAFETY: the request reads one `rand_pool_info`, whose buffer is the 32 bytes that `bytes` announces.
    let done = unsafe {
        let request = rustix::ioctl::Setter::<RNDADDENTROPY, RandPoolInfo>::new(info);
        rustix::ioctl::ioctl(random, request)
    };
    Ok(done?)
}

/// A vsock address as `connect` takes it: the kernel's `sockaddr_vm`.
#[repr(C)]
pub(crate) struct VsockAddr {
    family: u16,
    reserved: u16,
    port: u32,
    context: u32,
    flags: u8,
    zero: [u8; 3],
}

impl VsockAddr {
    /// Port `port` of the host.
    pub(crate) fn host(port: u32) -> Self {
        const AF_VSOCK: u16 = 40;
        const VMADDR_CID_HOST: u32 = 2;
        Self {
            family: AF_VSOCK,
            reserved: 0,
            port,
            context: VMADDR_CID_HOST,
            flags: 0,
            zero: [0; 3],
        }
    }
}

#[expect(unsafe_code, reason = "rustix has no vsock address of its own")]
// SAFETY: the closure gets a pointer to a whole `sockaddr_vm` that lives as long as the call, and its size.
unsafe impl rustix::net::addr::SocketAddrArg for VsockAddr {
    unsafe fn with_sockaddr<R>(
        &self,
        call: impl FnOnce(
            *const rustix::net::addr::SocketAddrOpaque,
            rustix::net::addr::SocketAddrLen,
        ) -> R,
    ) -> R {
        let length = size_of_val(self) as rustix::net::addr::SocketAddrLen;
        call((&raw const *self).cast(), length)
    }
}

/// The signal with this number, which may be a real-time one of the C library's.
pub(crate) fn signal(number: std::num::NonZeroI32) -> Signal {
    #[expect(unsafe_code, reason = "rustix names no real-time signals")]
    // SAFETY: the value is only passed to `kill`, never to a function that installs a handler.
    unsafe {
        Signal::from_raw_nonzero_unchecked(number)
    }
}

/// The C library's signal set.
#[repr(C)]
struct SignalSet([u64; 16]);

#[expect(unsafe_code, reason = "rustix has neither call")]
// SAFETY: both are declared as in the C library that std links anyway.
unsafe extern "C" {
    fn sigprocmask(how: i32, set: *const SignalSet, old: *mut SignalSet) -> i32;
    fn signalfd(fd: i32, set: *const SignalSet, flags: i32) -> i32;
}

/// Blocks SIGTERM and returns a non-blocking descriptor that reads when it came.
pub(crate) fn sigterm_fd() -> io::Result<OwnedFd> {
    const SIG_BLOCK: i32 = 0;
    const FLAGS: i32 = 0o2_000_000 | 0o4_000; // SFD_CLOEXEC | SFD_NONBLOCK
    let mut set = SignalSet([0; 16]);
    set.0[0] = 1 << (Signal::TERM.as_raw() - 1);
    #[expect(unsafe_code, reason = "see the declarations")]
    // SAFETY: the set is valid for both calls, `old` may be null, and the new descriptor is owned by nobody else.
    unsafe {
        if sigprocmask(SIG_BLOCK, &raw const set, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = signalfd(-1, &raw const set, FLAGS);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// What a non-blocking read gave.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ReadSome {
    /// So many bytes.
    Bytes(usize),
    /// Nothing at present.
    Nothing,
    /// The other end is gone.
    End,
}

/// Reads from a non-blocking descriptor.
pub(crate) fn read_some(fd: impl AsFd, buffer: &mut [u8]) -> io::Result<ReadSome> {
    match rustix::io::retry_on_intr(|| rustix::io::read(&fd, &mut *buffer)) {
        Ok(0) => Ok(ReadSome::End),
        Ok(count) => Ok(ReadSome::Bytes(count)),
        Err(Errno::AGAIN) => Ok(ReadSome::Nothing),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vsock_address_is_as_long_as_the_kernels() {
        assert_eq!(size_of::<VsockAddr>(), 16);
    }

    #[test]
    fn a_signal_descriptor_reads_nothing_before_the_signal() {
        let fd = sigterm_fd().unwrap();
        let mut buffer = [0; 128];
        assert_eq!(read_some(&fd, &mut buffer).unwrap(), ReadSome::Nothing);
    }
}
