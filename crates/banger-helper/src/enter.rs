//! Into new namespaces; and where the machine forbids it, why and what to do.

use rustix::fd::AsFd;
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, UnshareFlags, unshare_unsafe};
use std::io;
use std::path::Path;

/// The namespaces could not be made.
#[derive(Debug, thiserror::Error)]
pub enum EnterError {
    /// User namespaces are restricted on this machine.
    #[error("user namespaces are not allowed for this user: {cause}")]
    Restricted {
        /// What forbids them, and what to do.
        cause: String,
    },
    /// The kernel refused.
    #[error("cannot {what}")]
    Refused {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Moves this process, which must have one thread, into a new network namespace, and into a new user namespace before
/// if `user_namespace`: there it is root, and nobody else is anybody.
///
/// # Errors
/// The kernel refuses.
pub fn enter(user_namespace: bool) -> Result<(), EnterError> {
    if user_namespace {
        let uid = rustix::process::geteuid().as_raw();
        let gid = rustix::process::getegid().as_raw();
        unshare(UnshareFlags::NEWUSER).map_err(|errno| explain(errno, "make a user namespace"))?;
        // Groups may only be mapped by one who has given up changing them.
        write("/proc/self/setgroups", "deny", "give up setgroups")?;
        write("/proc/self/uid_map", &format!("0 {uid} 1"), "map the user")?;
        write("/proc/self/gid_map", &format!("0 {gid} 1"), "map the group")?;
    }
    unshare(UnshareFlags::NEWNET).map_err(|errno| {
        if user_namespace {
            // Some machines allow the user namespace, but no rights in it.
            explain(errno, "make a network namespace")
        } else {
            EnterError::Refused {
                what: "make a network namespace (without a user namespace this needs root)",
                source: errno.into(),
            }
        }
    })
}

/// Moves this process, which must have one thread, into namespaces that are there already: `user` first, since the
/// right to enter the other comes from it.
///
/// # Errors
/// A file names no namespace, or the kernel refuses.
pub fn join(network: &Path, user: Option<&Path>) -> Result<(), EnterError> {
    let refused = |source| EnterError::Refused {
        what: "enter the namespace of a network that lost its keeper",
        source,
    };
    let open = |path: &Path| std::fs::File::open(path).map_err(refused);
    // Both at first: from inside of the user namespace the files of processes outside are out of reach.
    let network = open(network)?;
    let user = user.map(open).transpose()?;
    let enter = |file: &std::fs::File, kind| {
        rustix::thread::move_into_link_name_space(file.as_fd(), Some(kind))
            .map_err(|errno| refused(errno.into()))
    };
    if let Some(user) = &user {
        enter(user, LinkNameSpaceType::User)?;
    }
    enter(&network, LinkNameSpaceType::Network)
}

#[expect(
    unsafe_code,
    reason = "unshare may break what threads share; there is one"
)]
fn unshare(flags: UnshareFlags) -> Result<(), Errno> {
    // SAFETY: only user and network namespaces are unshared, never the table of descriptors.
    unsafe { unshare_unsafe(flags) }
}

fn write(path: &str, text: &str, what: &'static str) -> Result<(), EnterError> {
    match std::fs::write(path, text) {
        Ok(()) => Ok(()),
        Err(source) if source.kind() == io::ErrorKind::PermissionDenied => {
            Err(explain(Errno::PERM, what))
        }
        Err(source) => Err(EnterError::Refused { what, source }),
    }
}

fn explain(errno: Errno, what: &'static str) -> EnterError {
    let setting = |name: &str| {
        std::fs::read_to_string(Path::new("/proc/sys").join(name))
            .ok()
            .map(|value| value.trim().to_owned())
    };
    match cause(errno, setting) {
        Some(cause) => EnterError::Restricted { cause },
        None => EnterError::Refused {
            what,
            source: errno.into(),
        },
    }
}

/// What in the kernel's settings explains `errno`.
fn cause(errno: Errno, setting: impl Fn(&str) -> Option<String>) -> Option<String> {
    if errno == Errno::INVAL || errno == Errno::NOSYS {
        return Some("this kernel is built without them (CONFIG_USER_NS)".to_owned());
    }
    for name in ["user/max_user_namespaces", "user/max_net_namespaces"] {
        if errno == Errno::NOSPC && setting(name).as_deref() == Some("0") {
            let name = name.replace('/', ".");
            return Some(format!("{name} is 0; as root run `sysctl -w {name}=15000`"));
        }
    }
    if errno == Errno::NOSPC {
        return Some(
            "too many are in use; raise user.max_user_namespaces and user.max_net_namespaces"
                .to_owned(),
        );
    }
    if errno != Errno::PERM && errno != Errno::ACCESS {
        return None;
    }
    if setting("kernel/unprivileged_userns_clone").as_deref() == Some("0") {
        return Some(
            "kernel.unprivileged_userns_clone is 0; as root run `sysctl -w kernel.unprivileged_userns_clone=1`"
                .to_owned(),
        );
    }
    let apparmor = setting("kernel/apparmor_restrict_unprivileged_userns");
    if apparmor.is_some_and(|value| value != "0") {
        return Some(
            "AppArmor restricts them (kernel.apparmor_restrict_unprivileged_userns); `make install` as root brings the \
             profile that gives them to banger-netns, `/etc/apparmor.d/banger-netns`; or as root run \
             `sysctl -w kernel.apparmor_restrict_unprivileged_userns=0`"
                .to_owned(),
        );
    }
    Some(
        "the kernel denies them, perhaps a container's seccomp profile or another security module; run the daemon \
         outside of it, or as root"
            .to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(errno: Errno, name: &'static str, value: &'static str) -> String {
        cause(errno, |asked| (asked == name).then(|| value.to_owned())).unwrap()
    }

    #[test]
    fn every_known_restriction_is_named_with_its_remedy() {
        for (errno, name, value, said) in [
            (
                Errno::PERM,
                "kernel/unprivileged_userns_clone",
                "0",
                "sysctl -w kernel.unprivileged_userns_clone=1",
            ),
            (
                Errno::PERM,
                "kernel/apparmor_restrict_unprivileged_userns",
                "1",
                "kernel.apparmor_restrict_unprivileged_userns=0",
            ),
            (
                Errno::ACCESS,
                "kernel/apparmor_restrict_unprivileged_userns",
                "1",
                "profile",
            ),
            (
                Errno::NOSPC,
                "user/max_user_namespaces",
                "0",
                "sysctl -w user.max_user_namespaces=15000",
            ),
            (
                Errno::NOSPC,
                "user/max_net_namespaces",
                "0",
                "user.max_net_namespaces=15000",
            ),
            (Errno::PERM, "no/setting", "0", "seccomp"),
            (Errno::INVAL, "no/setting", "0", "CONFIG_USER_NS"),
        ] {
            let text = with(errno, name, value);
            assert!(text.contains(said), "{name}: {text}");
        }
    }

    #[test]
    fn what_no_setting_explains_is_left_to_the_kernels_word() {
        assert_eq!(cause(Errno::NOMEM, |_| None), None);
    }
}
