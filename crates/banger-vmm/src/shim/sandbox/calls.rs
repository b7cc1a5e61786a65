//! The system calls of a sandbox that no library wraps.

use linux_raw_sys::general::{
    __NR_landlock_add_rule, __NR_landlock_create_ruleset, __NR_landlock_restrict_self,
    __NR_mount_setattr, AT_EMPTY_PATH, AT_RECURSIVE, mount_attr,
};
use rustix::thread::UnshareFlags;
use std::ffi::{c_long, c_uint};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

#[expect(
    unsafe_code,
    reason = "declares the C library's way to any system call"
)]
unsafe extern "C" {
    fn syscall(number: c_long, ...) -> c_long;
}

fn outcome(result: c_long) -> io::Result<c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Leaves namespaces for new ones.
#[expect(unsafe_code, reason = "rustix knows no safe call, since a flag is not")]
pub(super) fn unshare(flags: UnshareFlags) -> io::Result<()> {
    let flags = flags.difference(UnshareFlags::FILES);
    // SAFETY: without `FILES`, the one flag that matters to memory safety, this only changes what the process sees.
    Ok(unsafe { rustix::thread::unshare_unsafe(flags) }?)
}

/// Adds `MOUNT_ATTR_*` to a mount, and to all below it if `recursive`.
#[expect(unsafe_code, reason = "no library wraps mount_setattr")]
pub(super) fn mount_setattr(
    mount: BorrowedFd<'_>,
    recursive: bool,
    attributes: u32,
) -> io::Result<()> {
    let change = mount_attr {
        attr_set: attributes.into(),
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    let flags: c_uint = AT_EMPTY_PATH | if recursive { AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a C string and `change` has the size that is told; the kernel reads both and keeps neither.
    let result = unsafe {
        syscall(
            c_long::from(__NR_mount_setattr),
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const change,
            size_of::<mount_attr>(),
        )
    };
    outcome(result).map(drop)
}

/// `struct landlock_ruleset_attr`. A kernel that knows a shorter one takes it, if the rest is zero.
#[repr(C)]
pub(super) struct Ruleset {
    pub(super) handled_files: u64,
    pub(super) handled_network: u64,
    pub(super) scoped: u64,
}

/// `struct landlock_path_beneath_attr`.
#[repr(C, packed)]
struct PathBeneath {
    allowed: u64,
    parent: i32,
}

/// The version of Landlock in this kernel.
#[expect(unsafe_code, reason = "no library in use wraps Landlock")]
pub(super) fn landlock_version() -> io::Result<u32> {
    const VERSION: c_uint = 1;
    // SAFETY: with this flag the kernel takes no structure.
    let result = unsafe {
        syscall(
            c_long::from(__NR_landlock_create_ruleset),
            std::ptr::null::<Ruleset>(),
            0_usize,
            VERSION,
        )
    };
    Ok(outcome(result)? as u32)
}

/// A new set of rules.
#[expect(unsafe_code, reason = "no library in use wraps Landlock")]
pub(super) fn landlock_ruleset(ruleset: &Ruleset) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads as many bytes as are told, which is the structure's size.
    let result = unsafe {
        syscall(
            c_long::from(__NR_landlock_create_ruleset),
            std::ptr::from_ref(ruleset),
            size_of::<Ruleset>(),
            0 as c_uint,
        )
    };
    let descriptor = outcome(result)? as i32;
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Allows `allowed` on `path` and what is beneath it.
#[expect(unsafe_code, reason = "no library in use wraps Landlock")]
pub(super) fn landlock_allow(
    ruleset: BorrowedFd<'_>,
    path: BorrowedFd<'_>,
    allowed: u64,
) -> io::Result<()> {
    const PATH_BENEATH: c_uint = 1;
    let rule = PathBeneath {
        allowed,
        parent: path.as_raw_fd(),
    };
    // SAFETY: the kernel reads a rule of this kind, which lives until the call ends.
    let result = unsafe {
        syscall(
            c_long::from(__NR_landlock_add_rule),
            ruleset.as_raw_fd(),
            PATH_BENEATH,
            &raw const rule,
            0 as c_uint,
        )
    };
    outcome(result).map(drop)
}

/// Holds this process, and all that come of it, to the rules.
#[expect(unsafe_code, reason = "no library in use wraps Landlock")]
pub(super) fn landlock_restrict(ruleset: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: takes a descriptor alone.
    let result = unsafe {
        syscall(
            c_long::from(__NR_landlock_restrict_self),
            ruleset.as_raw_fd(),
            0 as c_uint,
        )
    };
    outcome(result).map(drop)
}
