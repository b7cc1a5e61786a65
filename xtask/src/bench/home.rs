//! A world of banger's own for a bench: folders, a daemon, and neither afterwards.

use super::machine::Machine;
use crate::command::{Captured, capture, cargo, command, run};
use crate::failure::{Failure, Result};
use crate::layout::{root, target};
use serde_json::Value;
use std::io::{Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long the daemon may take to answer a request.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// An ordinary user's number, whoever has it.
const USER: u32 = 65_534;
/// Files up to this size belong to the home; larger ones, which nobody writes to, are linked.
const OWN_UP_TO: &str = "-4M";

/// A home whose daemon serves the programs in `dist`.
#[derive(Debug)]
pub(super) struct Home {
    dist: PathBuf,
    /// Where programs see it.
    folder: PathBuf,
    /// Where it is on the disk, if that is elsewhere.
    shown_from: Option<PathBuf>,
    kept: bool,
    user: Option<u32>,
}

/// Who does for a home what only root may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    Root,
    Helper,
    Rootless,
}

/// The images that a bench wants beside the default kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Images {
    Tiny,
    TinyAndDefault,
}

impl Home {
    /// A new home with a running daemon, and with the kernel and the images in it.
    pub(super) fn new(dist: &Path, images: Images) -> Result<Self> {
        end_left_over(dist);
        fill_store(dist, images)?;
        let (_, name) = next_name();
        // Not in the folder for temporary files, which is often in memory, where no bench waits for a disk.
        let home = Self::at(dist, target().join(name), false)?;
        home.take_images()?;
        home.succeed(&["daemon", "start"])?;
        Ok(home)
    }

    /// As [`Home::new`], on a machine of the bench's own, in this mode; its VMs are `vmm`, or QEMU. The store must have
    /// been filled: nothing is fetched from there.
    pub(super) fn on(machine: &Machine, mode: Mode, vmm: Option<&Path>) -> Result<Self> {
        let (number, name) = next_name();
        let folder = target().join(&name);
        let mut home = Self::at(&machine.dist, folder.clone(), false)?;
        home.user = (mode != Mode::Root).then_some(USER);
        home.take_images()?;
        let shown = machine.show(&folder, &name)?;
        home.shown_from = Some(std::mem::replace(&mut home.folder, shown));
        let word = match mode {
            Mode::Root => "root",
            Mode::Helper => "helper",
            Mode::Rootless => "rootless",
        };
        // One for each home, since all are there at once.
        let pool = format!("100.126.{}.0/20", number % 16 * 16);
        let mut settings = format!(
            "[network]\npool = \"{pool}\"\nmode = \"{word}\"\n[driver]\nchoice = \"qemu\"\n"
        );
        if let Some(vmm) = vmm {
            let program = home.scratch("vmm")?.join("fake-vmm");
            // What QEMU has beside it.
            home.scratch("share/qemu")?;
            std::fs::copy(vmm, &program)
                .map_err(Failure::io(format!("cannot copy `{}`", vmm.display())))?;
            settings.push_str(&format!("qemu = \"{}\"\n", program.display()));
        }
        let config = home.scratch("config/banger")?.join("config.toml");
        std::fs::write(&config, settings)
            .map_err(Failure::io(format!("cannot write `{}`", config.display())))?;
        home.give()?;
        home.succeed(&["daemon", "start"])?;
        Ok(home)
    }

    /// Nobody writes into an image, so a hard link is as good as a copy.
    fn take_images(&self) -> Result<()> {
        let store = store().join("data/banger");
        for part in ["images", "kernels"] {
            let mut copy = command("cp");
            copy.arg("-al").arg(store.join(part)).arg(self.data());
            succeed(&mut copy)?;
        }
        Ok(())
    }

    /// Makes everything in it the user's own, but for large images, which the store shares.
    fn give(&self) -> Result<()> {
        let Some(user) = self.user else {
            return Ok(());
        };
        let find = || {
            let mut find = command("find");
            find.arg(&self.folder);
            find
        };
        let copy = "for file; do cp -p \"$file\" \"$file.own\" && mv \"$file.own\" \"$file\"; done";
        let mut own = find();
        own.args(["-type", "f", "-links", "+1", "-size", OWN_UP_TO])
            .args(["-exec", "sh", "-c", copy, "sh", "{}", "+"]);
        succeed(&mut own)?;
        let mut give = find();
        give.args(["(", "-not", "-type", "f", "-o", "-links", "1", ")"])
            .args(["-exec", "chown", "-h", &format!("{user}:{user}"), "{}", "+"]);
        succeed(&mut give)?;
        Ok(())
    }

    fn at(dist: &Path, folder: PathBuf, kept: bool) -> Result<Self> {
        let home = Self {
            dist: dist.to_owned(),
            folder,
            shown_from: None,
            kept,
            user: None,
        };
        for below in ["config", "state", "cache", "run", "data/banger"] {
            let below = home.folder.join(below);
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&below)
                .map_err(Failure::io(format!("cannot make `{}`", below.display())))?;
        }
        Ok(home)
    }

    fn data(&self) -> PathBuf {
        self.folder.join("data/banger")
    }

    /// The folder of the one image that the home has.
    pub(super) fn only_image(&self) -> Result<PathBuf> {
        let images = self.data().join("images");
        let mut folders = std::fs::read_dir(&images)
            .map_err(Failure::io(format!("cannot list `{}`", images.display())))?
            .flatten()
            .map(|entry| entry.path());
        folders
            .next()
            .ok_or_else(|| Failure::new(format!("`{}` holds no image", images.display())))
    }

    /// A folder for what the bench itself needs.
    pub(super) fn scratch(&self, name: &str) -> Result<PathBuf> {
        let folder = self.folder.join(name);
        std::fs::create_dir_all(&folder)
            .map_err(Failure::io(format!("cannot make `{}`", folder.display())))?;
        Ok(folder)
    }

    /// `banger` with this home as its world.
    pub(super) fn banger(&self, args: &[&str]) -> Command {
        let mut banger = self.program("banger");
        banger.args(args);
        banger
    }

    /// A program of ours with this home as its world.
    pub(super) fn program(&self, name: &str) -> Command {
        let mut program = command(self.dist.join(name));
        if let Some(user) = self.user {
            program.uid(user).gid(user).current_dir(&self.folder);
        }
        program
            .env("HOME", &self.folder)
            .env("XDG_CONFIG_HOME", self.folder.join("config"))
            .env("XDG_STATE_HOME", self.folder.join("state"))
            .env("XDG_DATA_HOME", self.folder.join("data"))
            .env("XDG_CACHE_HOME", self.folder.join("cache"))
            .env("XDG_RUNTIME_DIR", self.folder.join("run"))
            .env_remove("BANGER_LIBEXEC");
        program
    }

    /// Runs `banger`, which must succeed.
    pub(super) fn succeed(&self, args: &[&str]) -> Result<Captured> {
        succeed(&mut self.banger(args))
    }

    /// What `banger` printed as JSON.
    pub(super) fn json(&self, args: &[&str]) -> Result<Value> {
        let said = self.succeed(&[args, &["--json"]].concat())?.stdout;
        serde_json::from_str(&said).map_err(|error| {
            Failure::new(format!(
                "`banger {} --json` printed no JSON: {error}",
                args.join(" ")
            ))
        })
    }

    /// The daemon's process.
    pub(super) fn daemon_pid(&self) -> Result<i64> {
        self.json(&["daemon", "status"])?["pid"]
            .as_i64()
            .ok_or_else(|| Failure::new("`banger daemon status` names no process"))
    }

    /// The folder itself, which is in the command lines of what runs for it.
    pub(super) fn folder(&self) -> String {
        self.folder.display().to_string()
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.folder.join("run/banger/bangerd.sock")
    }

    /// Posts `body` to the daemon; its answer must say success. Returns when the last byte of it came.
    pub(super) fn post(&self, path: &str, body: &str) -> Result<()> {
        self.request("POST", path, body)
    }

    /// As [`Home::post`], with another method.
    pub(super) fn request(&self, method: &str, path: &str, body: &str) -> Result<()> {
        let socket = self.socket();
        let failed = || Failure::io(format!("cannot ask {path} of `{}`", socket.display()));
        let mut stream = UnixStream::connect(&socket).map_err(failed())?;
        stream
            .set_read_timeout(Some(ANSWER_LIMIT))
            .map_err(failed())?;
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: banger\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).map_err(failed())?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).map_err(failed())?;
        let answer = String::from_utf8_lossy(&answer);
        if answer.starts_with("HTTP/1.1 2") {
            Ok(())
        } else {
            Err(Failure::new(format!("the daemon refused {path}: {answer}")))
        }
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        // What cannot be ended is told, so that a person can; there is nobody to return it to.
        if let Err(failure) = self.succeed(&["daemon", "stop", "--vms"]) {
            eprintln!("{failure}");
        }
        if self.kept {
            return;
        }
        let mut folder = &self.folder;
        if let Some(shown_from) = &self.shown_from {
            let mut hide = command("umount");
            if let Err(failure) = succeed(hide.arg("--lazy").arg(&self.folder)) {
                eprintln!("{failure}");
            }
            folder = shown_from;
        }
        if let Err(error) = std::fs::remove_dir_all(folder) {
            eprintln!("error: cannot remove `{}`: {error}", folder.display());
        }
    }
}

/// A number that no other home of this bench has, and the name that goes with it.
fn next_name() -> (usize, String) {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    (number, format!("bench-{}-{number}", std::process::id()))
}

/// What stands for a VMM where its guest does not matter: it answers as QEMU does, at once.
pub(super) fn scripted_vmm() -> Result<PathBuf> {
    run(cargo()
        .current_dir(root())
        .args(["build", "--release", "--locked", "--workspace"])
        .args(["--bin", "fake-vmm"]))?;
    Ok(target().join("release/fake-vmm"))
}

/// Ends the worlds of benches that were broken off.
fn end_left_over(dist: &Path) {
    for entry in std::fs::read_dir(target()).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(process_of) else {
            continue;
        };
        if Path::new("/proc").join(pid.to_string()).exists() {
            continue;
        }
        eprintln!(
            "ending what an earlier bench left: {}",
            entry.path().display()
        );
        drop(Home::at(dist, entry.path(), false));
    }
}

/// The process whose bench has a home of this name.
fn process_of(name: &str) -> Option<u32> {
    let (pid, number) = name.strip_prefix("bench-")?.split_once('-')?;
    number.parse::<usize>().ok()?;
    pid.parse().ok()
}

/// What benches make once and keep.
pub(super) fn store() -> PathBuf {
    target().join("bench-store")
}

/// Makes what is missing in the store.
pub(super) fn fill_store(dist: &Path, images: Images) -> Result<()> {
    let store = Home::at(dist, store(), true)?;
    run(&mut store.banger(&["kernel", "import"]))?;
    let built: &[&[&str]] = match images {
        Images::Tiny => &[&["--tiny"]],
        Images::TinyAndDefault => &[&["--tiny"], &[]],
    };
    for options in built {
        run(&mut store.banger(&[&["image", "build"], *options].concat()))?;
    }
    Ok(())
}

/// Runs a command that must succeed, and gives what it said.
pub(super) fn succeed(command: &mut Command) -> Result<Captured> {
    let captured = capture(command)?;
    if captured.success {
        Ok(captured)
    } else {
        Err(Failure::new(format!(
            "`{}` failed: {}",
            crate::command::line(command),
            captured.stderr.trim()
        )))
    }
}

/// How long the command takes, in seconds, from before it is started until its end was seen. It must succeed.
pub(super) fn seconds_of(command: &mut Command) -> Result<f64> {
    let start = Instant::now();
    succeed(command)?;
    Ok(start.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_home_is_taken_for_one() {
        assert_eq!(process_of("bench-12-0"), Some(12));
        for other in ["bench-store", "bench-12", "bench-12-x", "debug"] {
            assert_eq!(process_of(other), None, "{other}");
        }
    }
}
