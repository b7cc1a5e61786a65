//! What a descriptor that came with a request is.

use crate::net::host::HostOpError;
use linux_raw_sys::general::{CLONE_NEWNET, NSFS_MAGIC};
use linux_raw_sys::ioctl::{NS_GET_NSTYPE, NS_GET_OWNER_UID, NS_GET_USERNS};
use rustix::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use rustix::io::Errno;
use rustix::ioctl::{Getter, Ioctl, IoctlOutput, Opcode, ioctl};
use std::ffi::c_void;

/// Checks that `descriptor` is a network namespace whose owner is `uid`, and not our own.
///
/// # Errors
/// It is something else, or somebody else's.
pub(super) fn own_network_namespace(
    descriptor: BorrowedFd<'_>,
    uid: u32,
) -> Result<(), HostOpError> {
    // By the kernel's own word for it: to ask a file system could mean to wait for the user that serves it.
    let link = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
    let word = std::fs::read_link(link)
        .map(|word| word.to_string_lossy().into_owned())
        .unwrap_or_default();
    if !word.starts_with("net:[") {
        return Err(HostOpError::NotANamespace(word));
    }
    let is_namespace = rustix::fs::fstatfs(descriptor)
        .is_ok_and(|facts| facts.f_type.cast_unsigned() == u64::from(NSFS_MAGIC));
    if !is_namespace || kind(descriptor) != Ok(CLONE_NEWNET.cast_signed()) {
        return Err(HostOpError::NotANamespace(word));
    }
    let owner = user_namespace(descriptor)
        .and_then(|user| owner(&user))
        .map_err(|errno| HostOpError::Enter(errno.into()))?;
    let ours = std::fs::read_link("/proc/thread-self/ns/net").map_err(HostOpError::Enter)?;
    if owner != uid || ours.as_os_str() == word.as_str() {
        return Err(HostOpError::ForeignNamespace { word, owner, uid });
    }
    Ok(())
}

/// A request that answers with its own return value and takes nothing.
struct Asking<const CODE: u32>;

#[expect(unsafe_code, reason = "the shape of an ioctl")]
// SAFETY: the requests it is used with have no argument, and what they return is a number.
unsafe impl<const CODE: u32> Ioctl for Asking<CODE> {
    type Output = i32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        Opcode::from(CODE)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> Result<i32, Errno> {
        Ok(out)
    }
}

#[expect(unsafe_code, reason = "asks a namespace what kind it is")]
fn kind(namespace: BorrowedFd<'_>) -> Result<i32, Errno> {
    // SAFETY: `NS_GET_NSTYPE` takes nothing and answers with a number.
    unsafe { ioctl(namespace, Asking::<NS_GET_NSTYPE>) }
}

#[expect(unsafe_code, reason = "asks a namespace for its user namespace")]
fn user_namespace(namespace: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    // SAFETY: `NS_GET_USERNS` takes nothing and answers with a new descriptor, which is nobody else's.
    unsafe {
        let descriptor = ioctl(namespace, Asking::<NS_GET_USERNS>)?;
        Ok(OwnedFd::from_raw_fd(descriptor))
    }
}

#[expect(unsafe_code, reason = "asks a user namespace for its owner")]
fn owner(user_namespace: &OwnedFd) -> Result<u32, Errno> {
    // SAFETY: `NS_GET_OWNER_UID` writes one `uid_t`.
    unsafe { ioctl(user_namespace, Getter::<NS_GET_OWNER_UID, u32>::new()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn what_is_no_network_namespace_is_refused_whatever_it_is() {
        let directory = tempfile::tempdir().unwrap();
        // A file with the very name that a namespace has.
        let named = directory.path().join("net:[4026531840]");
        let (pipe, _writer) = std::io::pipe().unwrap();
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let descriptors: Vec<OwnedFd> = vec![
            std::fs::File::open("/etc/hostname").unwrap().into(),
            std::fs::File::open("/").unwrap().into(),
            std::fs::File::create(named).unwrap().into(),
            std::fs::File::open("/proc/self/ns/user").unwrap().into(),
            std::fs::File::open("/dev/null").unwrap().into(),
            pipe.into(),
            socket.into(),
        ];
        let uid = rustix::process::geteuid().as_raw();
        for descriptor in descriptors {
            assert!(matches!(
                own_network_namespace(descriptor.as_fd(), uid),
                Err(HostOpError::NotANamespace(_))
            ));
        }
    }

    #[test]
    fn our_own_network_is_no_namespace_to_attach_to() {
        let namespace = std::fs::File::open("/proc/self/ns/net").unwrap();
        for uid in [0, 1, 12345] {
            assert!(matches!(
                own_network_namespace(namespace.as_fd(), uid),
                Err(HostOpError::ForeignNamespace { .. })
            ));
        }
    }
}
