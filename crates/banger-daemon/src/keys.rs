//! ssh keys: banger's own, made at first start, and a host key for each VM.

use ssh_key::private::{Ed25519Keypair, Ed25519PrivateKey, KeypairData};
use ssh_key::{LineEnding, PrivateKey};
use std::path::{Path, PathBuf};

/// A key pair as text.
#[derive(Debug, Clone)]
pub(crate) struct KeyPair {
    /// OpenSSH's private format.
    pub(crate) private: String,
    /// One line.
    pub(crate) public: String,
}

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeyError {
    #[error("the system gave no random bytes")]
    Random(#[source] getrandom::Error),
    #[error("the key cannot be written down")]
    Encode(#[source] ssh_key::Error),
    #[error("cannot {action} `{}`", path.display())]
    File {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

/// Random bytes from the system.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], KeyError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(KeyError::Random)?;
    Ok(bytes)
}

/// A new ed25519 key.
pub(crate) fn generate(comment: &str) -> Result<KeyPair, KeyError> {
    let pair = Ed25519Keypair::from(Ed25519PrivateKey::from_bytes(&random()?));
    let key = PrivateKey::new(KeypairData::Ed25519(pair), comment).map_err(KeyError::Encode)?;
    let private = key.to_openssh(LineEnding::LF).map_err(KeyError::Encode)?;
    let public = key.public_key().to_openssh().map_err(KeyError::Encode)?;
    Ok(KeyPair {
        private: private.to_string(),
        public,
    })
}

/// The public half of banger's own key, which is made if it is not there.
pub(crate) fn ensure_own(folder: &Path) -> Result<String, KeyError> {
    use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
    let private = folder.join("id_ed25519");
    let public = folder.join("id_ed25519.pub");
    let failed = |action, path: &Path| {
        let path = path.to_owned();
        move |source| KeyError::File {
            action,
            path,
            source,
        }
    };
    if private.exists()
        && let Ok(line) = std::fs::read_to_string(&public)
    {
        return Ok(line.trim().to_owned());
    }
    let mut builder = std::fs::DirBuilder::new();
    builder
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(failed("make", folder))?;
    let pair = generate("banger")?;
    let staged = folder.join("id_ed25519.new");
    let mut options = std::fs::OpenOptions::new();
    let file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&staged);
    file.and_then(|mut file| {
        std::io::Write::write_all(&mut file, pair.private.as_bytes())?;
        file.sync_all()
    })
    .map_err(failed("write", &staged))?;
    std::fs::write(&public, format!("{}\n", pair.public)).map_err(failed("write", &public))?;
    std::fs::rename(&staged, &private).map_err(failed("write", &private))?;
    Ok(pair.public)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn banger_s_own_key_is_made_once_and_is_private() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let first = ensure_own(folder.path()).unwrap();
        assert!(first.starts_with("ssh-ed25519 "));
        assert_eq!(ensure_own(folder.path()).unwrap(), first);
        let mode = std::fs::metadata(folder.path().join("id_ed25519"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
