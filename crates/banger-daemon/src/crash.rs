//! Crash points: before and after every step of a verb, a debug build ends itself there if it is told to.
//!
//! `BANGER_CRASH_AT=start/lease-port:before` names the point; when it is reached, its name is appended to the file
//! that `BANGER_CRASH_LOG` names, and the process aborts. With `BANGER_CRASH_TRACE` every point that is passed is
//! appended to the file that it names, so that nobody has to keep a list of them. Release builds have none of this.

/// Ends the process here if it was told to.
#[cfg(debug_assertions)]
pub(crate) fn point(verb: &str, step: &str, side: Side) {
    use std::ffi::OsString;
    use std::sync::LazyLock;
    static WANTED: LazyLock<Option<String>> =
        LazyLock::new(|| std::env::var("BANGER_CRASH_AT").ok());
    static TRACE: LazyLock<Option<OsString>> =
        LazyLock::new(|| std::env::var_os("BANGER_CRASH_TRACE"));
    if WANTED.is_none() && TRACE.is_none() {
        return;
    }
    let side = match side {
        Side::Before => "before",
        Side::After => "after",
    };
    let name = format!("{verb}/{step}:{side}");
    if let Some(path) = TRACE.as_deref() {
        append(path, &name);
    }
    if WANTED.as_deref() == Some(name.as_str()) {
        if let Some(path) = std::env::var_os("BANGER_CRASH_LOG") {
            append(&path, &name);
        }
        std::process::abort();
    }
}

#[cfg(debug_assertions)]
fn append(path: &std::ffi::OsStr, name: &str) {
    use std::io::Write;
    let file = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(path);
    if let Ok(mut file) = file {
        // One write of one line; a test that misses it fails.
        let _ = file.write_all(format!("{name}\n").as_bytes());
    }
}

#[cfg(not(debug_assertions))]
pub(crate) const fn point(_verb: &str, _step: &str, _side: Side) {}

/// Which side of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Before,
    After,
}
