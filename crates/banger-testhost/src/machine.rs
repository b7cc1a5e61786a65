//! Boots the test host for one command.

use crate::Result;
use crate::base::Base;
use crate::error::Error;
use crate::init::Init;
use crate::run::{cannot_start, command};
use rustix::io::{FdFlags, fcntl_setfd};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::process::Command;
use std::thread::JoinHandle;

const MEMORY_MIB: u32 = 4096;
const KEPT_CONSOLE_BYTES: usize = 4096;
const KERNEL_ARGUMENTS: &str = "console=ttyS0 reboot=t panic=-1 quiet loglevel=4 cryptomgr.notests no_timer_check mitigations=off";
/// A descriptor that the machine's process gets, as QEMU names it.
const DRIVE: u32 = 1;
const FIRST_PIPE: u32 = 2;

/// How the test host is run.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Show what its kernel prints, on stderr.
    pub show_console: bool,
    /// The first process. Under systemd the machine may be rebooted, which keeps what was written.
    pub init: Init,
}

/// Boots the test host with `drive`, shows what its command writes, and gives the command's exit code.
///
/// The machine dies with the thread that called this. It writes to no file, and makes nothing on this host.
///
/// # Errors
/// There is no QEMU, or the machine ended before the command did.
pub fn run(base: &Base, drive: &File, options: Options) -> Result<u8> {
    let mut wiring = Wiring::default();
    wiring.hand_over(drive)?;
    let console = wiring.pipe()?;
    let stdout = wiring.pipe()?;
    let stderr = wiring.pipe()?;
    let status = wiring.pipe()?;

    // The parent's death signal is the only one that a SIGKILL of this process cannot keep from the machine.
    let program = "setpriv";
    let mut qemu = command(program);
    qemu.args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64"]);
    machine(&mut qemu, base);
    if options.init == Init::Shell {
        qemu.arg("-no-reboot");
    }
    wiring.arguments(&mut qemu);
    let mut child = qemu.spawn().map_err(cannot_start(program))?;
    // The ends of the pipes are seen only when no write end is left here.
    drop(wiring);

    let console = std::thread::spawn(move || keep_end(console, options.show_console));
    let copies = [
        copy(stdout, Box::new(std::io::stdout())),
        copy(stderr, Box::new(std::io::stderr())),
    ];
    let mut said = String::new();
    let mut status = status;
    // Comes to its end with the machine; what is not text is no exit code.
    let _ = status.read_to_string(&mut said);
    child.wait().map_err(cannot_start(program))?;
    for copy in copies {
        let _ = copy.join();
    }
    let console = console.join().unwrap_or_default();
    said.trim().parse().map_err(|_| Error::NoStatus {
        console: console.escape_debug().to_string().replace("\\n", "\n"),
    })
}

fn machine(qemu: &mut Command, base: &Base) {
    qemu.args([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-machine",
        "q35,sata=off,smbus=off,hpet=off,vmport=off,smm=off",
        "-bios",
        "qboot.rom",
        // `max` has SVM, which KVM inside stands on. One processor: with several, kernels fail under emulation.
        "-cpu",
        "max",
        "-smp",
        "1",
        "-accel",
        "tcg,thread=single,tb-size=512",
        "-append",
        KERNEL_ARGUMENTS,
        "-device",
        "virtio-rng-pci",
    ]);
    qemu.arg("-m").arg(MEMORY_MIB.to_string());
    qemu.arg("-kernel").arg(&base.kernel);
    qemu.arg("-initrd").arg(&base.initrd);
    qemu.arg("-drive").arg(drive_argument(
        "root",
        &base.root,
        // What is written goes to a file without a name.
        "snapshot=on,cache=unsafe",
    ));
    qemu.args(["-device", "virtio-blk-pci,drive=root"]);
    qemu.arg("-drive").arg(drive_argument(
        "banger",
        Path::new(&format!("/dev/fdset/{DRIVE}")),
        "readonly=on",
    ));
    qemu.args(["-device", "virtio-blk-pci,drive=banger"]);
    qemu.args(["-device", "virtio-serial-pci"]);
    for (number, name) in ["console", "stdout", "stderr", "status"].iter().enumerate() {
        let set = FIRST_PIPE + u32::try_from(number).unwrap_or(0);
        qemu.arg("-chardev")
            // Appending, because QEMU would truncate it otherwise, which a pipe refuses.
            .arg(format!("file,id={name},path=/dev/fdset/{set},append=on"));
        match *name {
            "console" => qemu.args(["-serial", "chardev:console"]),
            name => qemu
                .arg("-device")
                .arg(format!("virtserialport,chardev={name},name={name}")),
        };
    }
}

fn drive_argument(id: &str, file: &Path, more: &str) -> String {
    // QEMU splits at commas; a doubled one is a comma.
    let file = file.to_string_lossy().replace(',', ",,");
    format!("if=none,id={id},format=raw,file={file},{more}")
}

/// The descriptors that the machine's process is born with.
#[derive(Default)]
struct Wiring {
    inherited: Vec<std::os::fd::OwnedFd>,
}

impl Wiring {
    fn hand_over(&mut self, descriptor: impl AsFd) -> Result<()> {
        let pass = || -> std::io::Result<std::os::fd::OwnedFd> {
            let copy = descriptor.as_fd().try_clone_to_owned()?;
            fcntl_setfd(&copy, FdFlags::empty())?;
            Ok(copy)
        };
        let copy = pass().map_err(cannot_start("qemu-system-x86_64"))?;
        self.inherited.push(copy);
        Ok(())
    }

    fn pipe(&mut self) -> Result<PipeReader> {
        let (reader, writer): (PipeReader, PipeWriter) =
            std::io::pipe().map_err(cannot_start("qemu-system-x86_64"))?;
        self.hand_over(&writer)?;
        Ok(reader)
    }

    /// Sets 1, 2, … in the order in which the descriptors were given.
    fn arguments(&self, qemu: &mut Command) {
        for (number, descriptor) in self.inherited.iter().enumerate() {
            qemu.arg("-add-fd")
                .arg(format!("fd={},set={}", descriptor.as_raw_fd(), number + 1));
        }
    }
}

fn copy(mut from: PipeReader, mut to: Box<dyn Write + Send>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut buffer = [0; 8192];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            // Goes on after a failure: a reader that went away must not stop the machine.
            let _ = to.write_all(&buffer[..count]).and_then(|()| to.flush());
        }
    })
}

fn keep_end(mut console: PipeReader, show: bool) -> String {
    let mut kept = VecDeque::new();
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = console.read(&mut buffer) {
        if show {
            let _ = std::io::stderr().write_all(&buffer[..count]);
        }
        kept.extend(&buffer[..count]);
        kept.drain(..kept.len().saturating_sub(KEPT_CONSOLE_BYTES));
    }
    String::from_utf8_lossy(kept.make_contiguous()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comma_in_a_path_does_not_end_it() {
        assert_eq!(
            drive_argument("r", Path::new("/a,b/root"), "readonly=on"),
            "if=none,id=r,format=raw,file=/a,,b/root,readonly=on"
        );
    }

    #[test]
    fn only_the_end_of_the_console_is_kept() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let kept = std::thread::spawn(move || keep_end(reader, false));
        writer.write_all(&[b'a'; KEPT_CONSOLE_BYTES]).unwrap();
        writer.write_all(b"the end").unwrap();
        drop(writer);
        let kept = kept.join().unwrap();
        assert_eq!(kept.len(), KEPT_CONSOLE_BYTES);
        assert!(kept.ends_with("the end"));
    }
}
