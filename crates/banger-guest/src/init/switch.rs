//! Handing over to the image's init.

use super::{Fatal, NEW_ROOT, Reporter, note};
use crate::sys;
use rustix::fs::{Mode, OFlags, open};
use rustix::mount::mount_move;
use rustix::process::{chdir, chroot};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// What is tried after the init that the image's metadata names.
const FALLBACKS: [&str; 4] = ["/sbin/init", "/etc/init", "/bin/init", "/bin/sh"];

/// The inits to try, each once.
fn candidates(init: &str) -> Vec<&str> {
    let mut candidates = Vec::with_capacity(FALLBACKS.len() + 1);
    for path in std::iter::once(init).chain(FALLBACKS) {
        if path.starts_with('/') && !candidates.contains(&path) {
            candidates.push(path);
        }
    }
    candidates
}

/// Makes the new root the root and becomes the image's init. Returns only if that fails.
#[expect(
    clippy::disallowed_methods,
    reason = "this process becomes the image's init; nothing is spawned"
)]
pub(crate) fn hand_over(
    init: &str,
    report: &mut Reporter,
) -> Result<std::convert::Infallible, Fatal> {
    forget_initrd();
    let switched = chdir(NEW_ROOT)
        .and_then(|()| mount_move(NEW_ROOT, "/"))
        .and_then(|()| chroot("."))
        .and_then(|()| chdir("/"));
    switched.map_err(|error| Fatal(format!("cannot make the image's root the root: {error}")))?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    match open("/dev/console", flags, Mode::empty()) {
        Ok(console) => {
            let stdio = dup2_stdin(&console)
                .and_then(|()| dup2_stdout(&console))
                .and_then(|()| dup2_stderr(&console));
            report.check("cannot use the console", stdio);
        }
        Err(error) => report.warn(format_args!("cannot open the console: {error}")),
    }
    report.note(note::IMAGE_INIT, sys::uptime_ms());
    let mut tried = Vec::new();
    for path in candidates(init) {
        let mut command = Command::new(path);
        // What the kernel gives its first program.
        command.env_clear().env("HOME", "/").env("TERM", "linux");
        command.env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        );
        tried.push(format!("{path} ({})", command.exec()));
    }
    Err(Fatal(format!(
        "the image has no init that can be run: tried {}",
        tried.join(", ")
    )))
}

/// Frees the memory of what the initrd brought. This program stays in memory for as long as the agent runs it.
fn forget_initrd() {
    // Whatever stays costs memory and nothing else.
    let _ = std::fs::remove_dir_all("/modules");
    let _ = std::fs::remove_file("/init");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_images_init_is_tried_first_and_nothing_twice() {
        assert_eq!(
            candidates("/etc/init"),
            ["/etc/init", "/sbin/init", "/bin/init", "/bin/sh"]
        );
        assert_eq!(candidates("evil")[0], "/sbin/init");
    }
}
