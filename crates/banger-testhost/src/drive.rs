//! The drive that a command and all it needs come on.

use crate::Result;
use crate::error::Error;
use crate::init::Init;
use crate::run::{command, output_of};
use crate::tree::{Tree, bytes_in, image_bytes};
use std::fs::File;
use std::path::{Path, PathBuf};

const SHELL_INIT: &str = include_str!("inside/shell.sh");
const SYSTEMD_INIT: &str = include_str!("inside/systemd.sh");
const RUNNER: &str = include_str!("inside/runner.sh");
/// Inode tables and journal of a small filesystem.
const ROOM_BYTES: u64 = 64 << 20;
/// Libraries that belong to the C library: the test host has its own, and they fit only their own loader.
const C_LIBRARY: [&str; 8] = [
    "ld-linux-x86-64.so.2",
    "libc.so.6",
    "libdl.so.2",
    "libm.so.6",
    "libpthread.so.0",
    "libresolv.so.2",
    "librt.so.1",
    "libutil.so.1",
];

/// What is on the drive.
#[derive(Debug, Clone, Default)]
pub struct Contents {
    /// The folder of banger's programs, which becomes `/mnt/bin`.
    pub programs: Option<PathBuf>,
    /// An `XDG_DATA_HOME` with images and kernels, which becomes `/mnt/fixtures`.
    pub fixtures: Option<PathBuf>,
    /// A program of tests, which becomes `/mnt/suite`.
    pub suite: Option<PathBuf>,
    /// A `firecracker`, which becomes `/mnt/bin/firecracker`, its libraries in `/mnt/lib`.
    pub firecracker: Option<PathBuf>,
    /// What else is to be there: a file or folder, and its path below `/mnt`.
    pub more: Vec<(PathBuf, PathBuf)>,
    /// The first process.
    pub init: Init,
    /// What to run.
    pub command: Vec<String>,
}

/// Writes the drive into the folder `cache` and opens it. The file has no name any more, so it goes with its last
/// user.
///
/// # Errors
/// Something of it cannot be read, or the drive cannot be written.
pub fn make(contents: &Contents, cache: &Path) -> Result<File> {
    let image = cache.join(format!("drive-{}.ext4", std::process::id()));
    let made = write(contents, &image)
        .and_then(|()| File::open(&image).map_err(Error::io("open", &image)));
    match std::fs::remove_file(&image) {
        Err(error) if made.is_ok() => Err(Error::io("remove", &image)(error)),
        _ => made,
    }
}

fn write(contents: &Contents, image: &Path) -> Result<()> {
    let libraries = match &contents.firecracker {
        Some(program) => libraries(program)?,
        None => Vec::new(),
    };
    let placed: Vec<(PathBuf, PathBuf)> = [
        (contents.programs.clone(), "bin"),
        // Not what they were made from, which is beside it.
        (
            contents.fixtures.as_ref().map(|data| data.join("banger")),
            "fixtures/banger",
        ),
        (contents.suite.clone(), "suite"),
        (contents.firecracker.clone(), "bin/firecracker"),
    ]
    .into_iter()
    .filter_map(|(from, to)| Some((from?, PathBuf::from(to))))
    .chain(contents.more.iter().cloned())
    .filter(|(from, _)| from.exists())
    .chain(libraries.into_iter().map(|library| {
        let name = library.file_name().unwrap_or_default().to_owned();
        (library, Path::new("lib").join(name))
    }))
    .collect();
    let mut bytes = 0;
    for (from, _) in &placed {
        bytes += bytes_in(from)?;
    }
    let mut tree = Tree::new(image, image_bytes(bytes, ROOM_BYTES))?;
    let init = match contents.init {
        Init::Shell => SHELL_INIT,
        Init::Systemd => SYSTEMD_INIT,
    };
    tree.add_bytes(Path::new("init"), init.into())?;
    tree.add_bytes(Path::new("runner"), RUNNER.into())?;
    tree.add_bytes(Path::new("command"), script(&contents.command).into())?;
    for (from, to) in &placed {
        tree.add_path(from, to)?;
    }
    tree.write()
}

/// A shell script that becomes the command.
fn script(command: &[String]) -> String {
    let words: Vec<String> = command.iter().map(|word| quoted(word)).collect();
    format!("exec {}\n", words.join(" "))
}

fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The shared libraries that `program` needs, without those of the C library.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    match output_of(command("ldd").arg(program)) {
        Ok(listed) => Ok(read_ldd(&listed)),
        // It has none.
        Err(Error::Program { reason, .. }) if reason.contains("not a dynamic executable") => {
            Ok(Vec::new())
        }
        Err(error) => Err(error),
    }
}

fn read_ldd(listed: &str) -> Vec<PathBuf> {
    listed
        .lines()
        .filter_map(|line| line.split_once(" => "))
        .filter(|(name, _)| !C_LIBRARY.contains(&name.trim()))
        .filter_map(|(_, rest)| rest.split(" (").next())
        .filter(|path| path.starts_with('/'))
        .map(PathBuf::from)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_arrives_word_for_word() {
        let command = ["sh", "-c", "echo \"it's $HOME\"; ls *"].map(str::to_owned);
        assert_eq!(
            script(&command),
            "exec 'sh' '-c' 'echo \"it'\\''s $HOME\"; ls *'\n"
        );
    }

    #[test]
    fn libraries_come_along_but_not_those_of_the_c_library() {
        let listed = "\tlinux-vdso.so.1 (0x00007ffd)\n\
                      \tlibseccomp.so.2 => /lib/x86_64-linux-gnu/libseccomp.so.2 (0x00007f)\n\
                      \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                      \tlibgone.so.1 => not found\n\
                      \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(
            read_ldd(listed),
            [PathBuf::from("/lib/x86_64-linux-gnu/libseccomp.so.2")]
        );
    }
}
