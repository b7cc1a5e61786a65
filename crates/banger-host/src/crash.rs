//! Crash points: before and after every step of a verb, and every change of the host, a debug build ends itself there
//! if it is told to.
//!
//! `BANGER_CRASH_AT=start/lease-port:before` names the point; when it is reached, its name is appended to the file
//! that `BANGER_CRASH_LOG` names, and the process aborts. With `BANGER_CRASH_TRACE` every point that is passed is
//! appended to the file that it names, so that nobody has to keep a list of them. Release builds have none of this.

/// Which side of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Nothing is done yet.
    Before,
    /// All is done.
    After,
}

#[cfg(debug_assertions)]
pub use armed::{operation, point, remember, step};

#[cfg(debug_assertions)]
mod armed {
    use super::Side;
    use std::cell::Cell;
    use std::ffi::{OsStr, OsString};
    use std::io::Write;
    use std::sync::LazyLock;

    /// What the process was told when it started.
    struct Told {
        at: Option<String>,
        log: Option<OsString>,
        trace: Option<OsString>,
    }

    static TOLD: LazyLock<Told> = LazyLock::new(|| Told {
        at: std::env::var("BANGER_CRASH_AT").ok(),
        log: std::env::var_os("BANGER_CRASH_LOG"),
        trace: std::env::var_os("BANGER_CRASH_TRACE"),
    });

    thread_local! {
        /// What this thread does; what nobody asked for is settling.
        static OPERATION: Cell<&'static str> = const { Cell::new("settle") };
    }

    /// For a process that is about to forget its environment.
    pub fn remember() {
        LazyLock::force(&TOLD);
    }

    /// Ends the process here if it was told to.
    pub fn point(verb: &str, step: &str, side: Side) {
        if TOLD.at.is_none() && TOLD.trace.is_none() {
            return;
        }
        let side = match side {
            Side::Before => "before",
            Side::After => "after",
        };
        let name = format!("{verb}/{step}:{side}");
        if let Some(path) = &TOLD.trace {
            append(path, &name);
        }
        if TOLD.at.as_deref() == Some(name.as_str()) {
            if let Some(path) = &TOLD.log {
                append(path, &name);
            }
            std::process::abort();
        }
    }

    /// From now on, the steps of this thread belong to an operation of this name.
    pub fn operation(name: &'static str) {
        OPERATION.set(name);
    }

    /// Does a step of the thread's operation between its two points.
    pub fn step<T>(name: &str, work: impl FnOnce() -> T) -> T {
        point(OPERATION.get(), name, Side::Before);
        let done = work();
        point(OPERATION.get(), name, Side::After);
        done
    }

    fn append(path: &OsStr, name: &str) {
        let file = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(path);
        if let Ok(mut file) = file {
            // One write of one line; a test that misses it fails.
            let _ = file.write_all(format!("{name}\n").as_bytes());
        }
    }
}

/// Nothing, in a release build.
#[cfg(not(debug_assertions))]
pub const fn remember() {}

/// Nothing, in a release build.
#[cfg(not(debug_assertions))]
pub const fn point(_verb: &str, _step: &str, _side: Side) {}

/// Nothing, in a release build.
#[cfg(not(debug_assertions))]
pub const fn operation(_name: &'static str) {}

/// Does a step, and nothing else in a release build.
#[cfg(not(debug_assertions))]
pub fn step<T>(_name: &str, work: impl FnOnce() -> T) -> T {
    work()
}
