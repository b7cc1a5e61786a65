//! `records.json`: the zone as a file, for tools that look names up without asking a server.
//!
//! One JSON object, a member per VM: its whole name, with `.vm` and without a last dot, and its IPv4 address as text.
//! Members are in the order of their names, so that the same zone is the same bytes.
//!
//! ```json
//! {
//!   "brave-fox.vm": "172.16.32.9",
//!   "calm-otter.vm": "172.16.32.2"
//! }
//! ```

use crate::zone::Zone;
use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The file cannot be replaced; the old one is as it was.
#[derive(Debug, thiserror::Error)]
#[error("cannot write `{}`", .path.display())]
pub struct RecordsError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// The zone as the text of a `records.json`.
pub fn records_json(zone: &Zone) -> String {
    let records: BTreeMap<String, String> = zone
        .list()
        .into_iter()
        .map(|entry| (format!("{}.vm", entry.name), entry.address.to_string()))
        .collect();
    let mut text = serde_json::to_string_pretty(&records).expect("texts are JSON");
    text.push('\n');
    text
}

/// Puts `text` in the place of the file at `path`, readable for everyone. A reader sees the old file or the new one,
/// whole. It is not synced to disk: it can be written again at any time.
///
/// # Errors
///
/// The folder is missing, full or not writable.
pub fn replace_records(path: &Path, text: &str) -> Result<(), RecordsError> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    std::fs::write(&partial, text)
        .and_then(|()| {
            std::fs::set_permissions(&partial, std::fs::Permissions::from_mode(0o644))?;
            std::fs::rename(&partial, path)
        })
        .map_err(|source| RecordsError {
            path: path.to_owned(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use banger_core::addr::Pool;
    use banger_core::name::VmName;
    use std::net::Ipv4Addr;

    fn zone() -> Zone {
        let zone = Zone::new(Pool::at(Ipv4Addr::new(172, 16, 32, 0)));
        for (name, last) in [("calm-otter", 2), ("brave-fox", 9)] {
            let name = VmName::new(name).unwrap();
            zone.set(&name, Ipv4Addr::new(172, 16, 32, last)).unwrap();
        }
        zone
    }

    #[test]
    fn the_zone_is_a_flat_map_in_the_order_of_its_names() {
        let expected =
            "{\n  \"brave-fox.vm\": \"172.16.32.9\",\n  \"calm-otter.vm\": \"172.16.32.2\"\n}\n";
        assert_eq!(records_json(&zone()), expected);
        let empty = Zone::new(zone().pool());
        assert_eq!(records_json(&empty), "{}\n");
    }

    #[test]
    fn a_file_is_replaced_and_nothing_is_left_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("records.json");
        replace_records(&path, "old").unwrap();
        replace_records(&path, &records_json(&zone())).unwrap();
        let read = std::fs::read_to_string(&path).unwrap();
        assert!(read.contains("calm-otter.vm"));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_cannot_be_written_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("missing/records.json");
        let error = replace_records(&path, "{}").unwrap_err().to_string();
        assert!(error.contains("missing/records.json"));
    }
}
