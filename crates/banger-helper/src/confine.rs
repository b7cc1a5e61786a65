//! What `banger-helper`, and the programs that it runs, may still do: it gives up the rest before it hears anybody.

use linux_raw_sys::general as nr;
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::collections::BTreeMap;
use std::io;

/// Where programs are found.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
/// Links, rules and settings; entering a namespace, loop devices and device-mapper; their nodes, given to their user;
/// asking the older iptables.
const KEPT: CapabilitySet = CapabilitySet::NET_ADMIN
    .union(CapabilitySet::SYS_ADMIN)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::CHOWN)
    .union(CapabilitySet::NET_RAW);
const HIGHEST_CAPABILITY: u32 = 63;
/// The families of sockets: `AF_UNIX`, `AF_INET`, `AF_NETLINK`.
const FAMILIES: [u64; 3] = [1, 2, 16];
/// All flags of `clone` that make a namespace.
const NEW_NAMESPACES: u64 = 0x7e02_0080;

/// Rights could not be given up.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// The kernel refuses.
    #[error("cannot give up {what}")]
    Refused {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The filter of system calls could not be made or set.
    #[error("cannot filter system calls")]
    Filter(#[source] seccompiler::Error),
}

/// Forgets the environment, but for a fixed PATH. Only while there is one thread.
#[expect(
    unsafe_code,
    reason = "the environment is changed while there is one thread"
)]
pub fn clear_environment() {
    let names: Vec<_> = std::env::vars_os().map(|(name, _)| name).collect();
    for name in names {
        // SAFETY: called at the very start, before any thread is made.
        unsafe { std::env::remove_var(name) };
    }
    // SAFETY: as above.
    unsafe { std::env::set_var("PATH", PATH) };
}

/// Gives up, for this thread and all that come from it: every capability but a few, gaining any by a program, and all
/// system calls that the work does not take (they fail with `EPERM`). Only while there is one thread.
///
/// # Errors
/// The kernel refuses.
pub fn confine() -> Result<(), ConfineError> {
    let refused = |what| {
        move |errno: Errno| ConfineError::Refused {
            what,
            source: errno.into(),
        }
    };
    rustix::thread::clear_ambient_capability_set().map_err(refused("ambient capabilities"))?;
    for number in 0..=HIGHEST_CAPABILITY {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if KEPT.contains(capability) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // The kernel knows no more.
            Err(Errno::INVAL) => break,
            removed => removed.map_err(refused("capabilities of programs"))?,
        }
    }
    let now = rustix::thread::capabilities(None).map_err(refused("capabilities"))?;
    let kept = now.permitted.intersection(KEPT);
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, sets).map_err(refused("capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(refused("new privileges"))?;
    for program in programs().map_err(ConfineError::Filter)? {
        seccompiler::apply_filter(&program).map_err(ConfineError::Filter)?;
    }
    Ok(())
}

/// The filters, in the order to set them. The last one says that there is no `clone3`, whose flags cannot be judged,
/// so that everybody falls back to `clone`; were it refused instead, nobody would.
fn programs() -> Result<[BpfProgram; 2], seccompiler::Error> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALLOWED
        .iter()
        .map(|number| (i64::from(*number), Vec::new()))
        .collect();
    let families = FAMILIES
        .iter()
        .map(|family| only(0, SeccompCmpOp::Eq, *family))
        .collect::<Result<_, _>>()?;
    rules.insert(nr::__NR_socket.into(), families);
    let network = only(1, SeccompCmpOp::Eq, nr::CLONE_NEWNET.into())?;
    rules.insert(nr::__NR_setns.into(), vec![network]);
    let no_namespace = only(0, SeccompCmpOp::MaskedEq(NEW_NAMESPACES), 0)?;
    rules.insert(nr::__NR_clone.into(), vec![no_namespace]);
    let filter = |rules, mismatch, matched| {
        SeccompFilter::new(rules, mismatch, matched, TargetArch::x86_64)
            .and_then(BpfProgram::try_from)
            .map_err(seccompiler::Error::from)
    };
    let errno = |errno: Errno| SeccompAction::Errno(errno.raw_os_error().unsigned_abs());
    let clone3 = BTreeMap::from([(i64::from(nr::__NR_clone3), Vec::new())]);
    Ok([
        filter(rules, errno(Errno::PERM), SeccompAction::Allow)?,
        filter(clone3, SeccompAction::Allow, errno(Errno::NOSYS))?,
    ])
}

fn only(
    argument: u8,
    compared: SeccompCmpOp,
    value: u64,
) -> Result<SeccompRule, seccompiler::Error> {
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, compared, value)?;
    Ok(SeccompRule::new(vec![condition])?)
}

/// What the helper, `nft` and `busctl` use, beside those that are judged by their arguments.
const ALLOWED: &[u32] = &[
    // Files.
    nr::__NR_read,
    nr::__NR_write,
    nr::__NR_readv,
    nr::__NR_writev,
    nr::__NR_pread64,
    nr::__NR_pwrite64,
    nr::__NR_open,
    nr::__NR_openat,
    nr::__NR_openat2,
    nr::__NR_close,
    nr::__NR_close_range,
    nr::__NR_stat,
    nr::__NR_fstat,
    nr::__NR_lstat,
    nr::__NR_newfstatat,
    nr::__NR_statx,
    nr::__NR_statfs,
    nr::__NR_fstatfs,
    nr::__NR_lseek,
    nr::__NR_access,
    nr::__NR_faccessat,
    nr::__NR_faccessat2,
    nr::__NR_readlink,
    nr::__NR_readlinkat,
    nr::__NR_getdents64,
    nr::__NR_mkdir,
    nr::__NR_mkdirat,
    nr::__NR_rmdir,
    nr::__NR_unlink,
    nr::__NR_unlinkat,
    nr::__NR_rename,
    nr::__NR_renameat,
    nr::__NR_renameat2,
    nr::__NR_ftruncate,
    nr::__NR_fallocate,
    nr::__NR_fsync,
    nr::__NR_fdatasync,
    nr::__NR_flock,
    nr::__NR_fcntl,
    nr::__NR_fadvise64,
    nr::__NR_ioctl,
    nr::__NR_mknod,
    nr::__NR_mknodat,
    nr::__NR_fchmod,
    nr::__NR_chown,
    nr::__NR_fchownat,
    nr::__NR_umask,
    nr::__NR_getcwd,
    nr::__NR_chdir,
    nr::__NR_dup,
    nr::__NR_dup2,
    nr::__NR_dup3,
    nr::__NR_pipe,
    nr::__NR_pipe2,
    // Waiting.
    nr::__NR_poll,
    nr::__NR_ppoll,
    nr::__NR_select,
    nr::__NR_pselect6,
    nr::__NR_epoll_create1,
    nr::__NR_epoll_ctl,
    nr::__NR_epoll_wait,
    nr::__NR_epoll_pwait,
    nr::__NR_eventfd2,
    nr::__NR_timerfd_create,
    nr::__NR_timerfd_settime,
    nr::__NR_signalfd4,
    nr::__NR_inotify_init1,
    nr::__NR_inotify_add_watch,
    nr::__NR_nanosleep,
    nr::__NR_clock_nanosleep,
    nr::__NR_futex,
    nr::__NR_sched_yield,
    // Sockets, of the families that `socket` allows.
    nr::__NR_socketpair,
    nr::__NR_bind,
    nr::__NR_listen,
    nr::__NR_accept4,
    nr::__NR_connect,
    nr::__NR_shutdown,
    nr::__NR_sendto,
    nr::__NR_sendmsg,
    nr::__NR_sendmmsg,
    nr::__NR_recvfrom,
    nr::__NR_recvmsg,
    nr::__NR_recvmmsg,
    nr::__NR_getsockname,
    nr::__NR_getpeername,
    nr::__NR_getsockopt,
    nr::__NR_setsockopt,
    // Memory.
    nr::__NR_brk,
    nr::__NR_mmap,
    nr::__NR_munmap,
    nr::__NR_mremap,
    nr::__NR_mprotect,
    nr::__NR_madvise,
    nr::__NR_mlock,
    // Threads and programs.
    nr::__NR_vfork,
    nr::__NR_fork,
    nr::__NR_execve,
    nr::__NR_exit,
    nr::__NR_exit_group,
    nr::__NR_wait4,
    nr::__NR_waitid,
    nr::__NR_kill,
    nr::__NR_tgkill,
    nr::__NR_pidfd_open,
    nr::__NR_pidfd_send_signal,
    nr::__NR_setpgid,
    nr::__NR_getpgrp,
    nr::__NR_setsid,
    nr::__NR_set_tid_address,
    nr::__NR_set_robust_list,
    nr::__NR_rseq,
    nr::__NR_membarrier,
    nr::__NR_arch_prctl,
    nr::__NR_prctl,
    nr::__NR_seccomp,
    nr::__NR_restart_syscall,
    nr::__NR_rt_sigaction,
    nr::__NR_rt_sigprocmask,
    nr::__NR_rt_sigpending,
    nr::__NR_rt_sigreturn,
    nr::__NR_rt_sigsuspend,
    nr::__NR_rt_sigtimedwait,
    nr::__NR_sigaltstack,
    // Who and where am I.
    nr::__NR_getpid,
    nr::__NR_getppid,
    nr::__NR_gettid,
    nr::__NR_getuid,
    nr::__NR_geteuid,
    nr::__NR_getgid,
    nr::__NR_getegid,
    nr::__NR_getgroups,
    nr::__NR_getresuid,
    nr::__NR_getresgid,
    nr::__NR_getrandom,
    nr::__NR_getrlimit,
    nr::__NR_prlimit64,
    nr::__NR_getrusage,
    nr::__NR_capget,
    nr::__NR_uname,
    nr::__NR_sysinfo,
    nr::__NR_sched_getaffinity,
    nr::__NR_getcpu,
    nr::__NR_gettimeofday,
    nr::__NR_time,
    nr::__NR_clock_gettime,
    nr::__NR_clock_getres,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_break_out_is_on_no_list() {
        for number in [
            nr::__NR_mount,
            nr::__NR_umount2,
            nr::__NR_move_mount,
            nr::__NR_open_tree,
            nr::__NR_fsopen,
            nr::__NR_pivot_root,
            nr::__NR_chroot,
            nr::__NR_unshare,
            nr::__NR_setns,
            nr::__NR_clone3,
            nr::__NR_ptrace,
            nr::__NR_process_vm_readv,
            nr::__NR_process_vm_writev,
            nr::__NR_pidfd_getfd,
            nr::__NR_open_by_handle_at,
            nr::__NR_bpf,
            nr::__NR_perf_event_open,
            nr::__NR_userfaultfd,
            nr::__NR_io_uring_setup,
            nr::__NR_init_module,
            nr::__NR_finit_module,
            nr::__NR_delete_module,
            nr::__NR_kexec_load,
            nr::__NR_kexec_file_load,
            nr::__NR_reboot,
            nr::__NR_swapon,
            nr::__NR_quotactl,
            nr::__NR_add_key,
            nr::__NR_request_key,
            nr::__NR_keyctl,
            nr::__NR_setuid,
            nr::__NR_setgid,
            nr::__NR_setresuid,
            nr::__NR_capset,
            nr::__NR_sethostname,
            nr::__NR_settimeofday,
            nr::__NR_clock_settime,
            nr::__NR_acct,
            nr::__NR_iopl,
            nr::__NR_ioperm,
            nr::__NR_memfd_create,
        ] {
            assert!(!ALLOWED.contains(&number), "{number}");
        }
    }

    #[test]
    fn the_filters_compile() {
        let [allowed, clone3] = programs().unwrap();
        assert!(allowed.len() > ALLOWED.len() && clone3.len() > 2);
    }
}
