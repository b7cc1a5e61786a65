//! Loading the kernel modules that the initrd brings.

use rustix::io::Errno;
use std::fs::File;
use std::path::Path;

/// The file names of a load list, in order: one a line, blank lines and `#` comments aside.
pub(crate) fn parse_load_list(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// Loads the modules of `directory`/load in order and returns what went wrong. One that is there already is fine.
pub(crate) fn load_all(directory: &Path) -> Vec<String> {
    let list = match std::fs::read_to_string(directory.join("load")) {
        Ok(list) => list,
        // A kernel that has everything built in brings no list.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => return vec![format!("cannot read the module list: {error}")],
    };
    parse_load_list(&list)
        .filter_map(|name| {
            let error = match File::open(directory.join(name)) {
                Ok(file) => match rustix::system::finit_module(&file, c"", 0) {
                    Ok(()) | Err(Errno::EXIST) => return None,
                    Err(error) => std::io::Error::from(error),
                },
                Err(error) => error,
            };
            Some(format!("cannot load module `{name}`: {error}"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_list_keeps_its_order_and_skips_blanks_and_comments() {
        let names: Vec<_> = parse_load_list("# made\nvirtio.ko\n\n virtio_blk.ko \n").collect();
        assert_eq!(names, ["virtio.ko", "virtio_blk.ko"]);
    }

    #[test]
    fn a_missing_load_list_means_that_everything_is_built_in() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(load_all(dir.path()), Vec::<String>::new());
    }

    #[test]
    fn a_listed_module_that_is_missing_is_named() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("load"), "nix.ko\n").unwrap();
        let warnings = load_all(dir.path());
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].contains("`nix.ko`"), "{warnings:?}");
    }
}
