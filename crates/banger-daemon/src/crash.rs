//! Crash points: before and after every step of a verb, a debug build ends itself there if it is told to.
//!
//! `BANGER_CRASH_AT=start/lease-port:before` names the point; when it is reached, its name is appended to the file
//! that `BANGER_CRASH_LOG` names, and the process aborts. Release builds have none of this.

/// Ends the process here if it was told to.
#[cfg(debug_assertions)]
pub(crate) fn point(verb: &str, step: &str, side: Side) {
    use std::io::Write;
    static WANTED: std::sync::LazyLock<Option<String>> =
        std::sync::LazyLock::new(|| std::env::var("BANGER_CRASH_AT").ok());
    let Some(wanted) = WANTED.as_deref() else {
        return;
    };
    let side = match side {
        Side::Before => "before",
        Side::After => "after",
    };
    if wanted != format!("{verb}/{step}:{side}") {
        return;
    }
    if let Some(path) = std::env::var_os("BANGER_CRASH_LOG")
        && let Ok(mut file) = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
    {
        // The process ends next: there is nobody to tell.
        let _ = writeln!(file, "{wanted}");
    }
    std::process::abort();
}

#[cfg(not(debug_assertions))]
pub(crate) const fn point(_verb: &str, _step: &str, _side: Side) {}

/// Which side of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Before,
    After,
}
