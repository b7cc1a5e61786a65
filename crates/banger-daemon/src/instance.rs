//! `instance.json`: binds the instance to this machine and this folder.

use banger_core::addr::{Ipv4Net, Pool};
use banger_core::id::InstanceId;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// The instance's own facts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Instance {
    pub(crate) id: InstanceId,
    pub(crate) machine: Option<String>,
    pub(crate) folder: PathBuf,
    pub(crate) pool: Pool,
}

/// How the instance came to be.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// It was there.
    Known,
    /// It is new.
    New,
    /// The folder was copied from another machine or place: it is an instance of its own now.
    Copied,
}

/// Why there is no instance.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InstanceError {
    #[error("`{}` cannot be read", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("`{}` cannot be written", path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: banger_host::storage::StorageError,
    },
    #[error("no /20 of 172.16.0.0/12 is free: every one overlaps a route of this host")]
    NoPool,
}

/// Reads the instance of `folder`, or makes one. `configured` is the pool that the settings ask for.
pub(crate) fn load(
    path: &Path,
    folder: &Path,
    machine: Option<String>,
    configured: Option<Pool>,
    routes: impl FnOnce() -> Vec<Ipv4Net>,
) -> Result<(Instance, Origin), InstanceError> {
    let stored: Option<Instance> = match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).ok(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(source) => {
            return Err(InstanceError::Read {
                path: path.to_owned(),
                source,
            });
        }
    };
    let origin = match &stored {
        Some(instance) if instance.machine == machine && instance.folder == folder => {
            return Ok((instance.clone(), Origin::Known));
        }
        Some(_) => Origin::Copied,
        None => Origin::New,
    };
    let id = Uuid::now_v7();
    let start = u32::from_be_bytes(id.as_bytes()[12..].try_into().unwrap_or_default());
    let pool = configured
        .or_else(|| Pool::find_free(&routes(), start))
        .ok_or(InstanceError::NoPool)?;
    let instance = Instance {
        id: InstanceId::from_uuid(id),
        machine,
        folder: folder.to_owned(),
        pool,
    };
    let bytes = serde_json::to_vec_pretty(&instance).expect("an instance is plain data");
    banger_host::storage::replace_file(path, &bytes, 0o600).map_err(|source| {
        InstanceError::Write {
            path: path.to_owned(),
            source,
        }
    })?;
    Ok((instance, origin))
}

/// Whether no daemon of this state folder has come up since the host was booted. Asked once, it is so no longer.
pub(crate) fn first_start_of_boot(state: &Path, boot_id: &str) -> bool {
    let path = state.join("boot");
    if std::fs::read_to_string(&path).is_ok_and(|last| last == boot_id) {
        return false;
    }
    let noted = banger_host::storage::replace_file(&path, boot_id.as_bytes(), 0o600);
    if let Err(error) = &noted {
        // Else they would be started again and again.
        tracing::warn!(path = %path.display(), %error, "VMs with autostart are not started");
    }
    noted.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_start_of_a_boot_is_the_first() {
        let folder = tempfile::tempdir().unwrap();
        assert!(first_start_of_boot(folder.path(), "one"));
        assert!(!first_start_of_boot(folder.path(), "one"));
        assert!(first_start_of_boot(folder.path(), "two"));
        assert!(!first_start_of_boot(Path::new("/nonexistent"), "two"));
    }

    #[test]
    fn a_copied_state_folder_becomes_an_instance_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("instance.json");
        let load = |machine: &str, place: &str| {
            load(
                &path,
                Path::new(place),
                Some(machine.into()),
                None,
                Vec::new,
            )
        };
        let (first, origin) = load("m1", "/a").unwrap();
        assert_eq!(origin, Origin::New);
        assert_eq!(load("m1", "/a").unwrap(), (first.clone(), Origin::Known));
        for (machine, place) in [("m2", "/a"), ("m2", "/b")] {
            let (copy, origin) = load(machine, place).unwrap();
            assert_eq!(origin, Origin::Copied);
            assert_ne!(copy.id, first.id);
        }
    }
}
