//! The ssh host key: read from OpenSSH's private format, written in dropbear's.

use std::fmt;

/// Why a key cannot be turned into dropbear's format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HostKeyError {
    /// The armour is missing or holds no base64.
    Armour,
    /// It is encrypted.
    Encrypted,
    /// It is not one ed25519 key.
    Kind,
    /// It ends too early or contradicts itself.
    Malformed,
}

impl fmt::Display for HostKeyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Armour => "the host key is not in OpenSSH's private format",
            Self::Encrypted => "the host key is encrypted",
            Self::Kind => "the host key is not one ed25519 key",
            Self::Malformed => "the host key is damaged",
        })
    }
}

/// dropbear's file of an ed25519 key: the name, then the private and public halves as one string of 64 bytes.
pub(crate) fn to_dropbear(openssh: &str) -> Result<Vec<u8>, HostKeyError> {
    let pair = ed25519_pair(openssh)?;
    let mut file = Vec::with_capacity(83);
    for string in [&b"ssh-ed25519"[..], &pair] {
        file.extend_from_slice(&(string.len() as u32).to_be_bytes());
        file.extend_from_slice(string);
    }
    Ok(file)
}

/// The 64 bytes of private half and public half.
fn ed25519_pair(openssh: &str) -> Result<[u8; 64], HostKeyError> {
    use HostKeyError::{Armour, Encrypted, Kind, Malformed};
    let body = openssh
        .split_once("-----BEGIN OPENSSH PRIVATE KEY-----")
        .and_then(|(_, rest)| rest.split_once("-----END OPENSSH PRIVATE KEY-----"))
        .ok_or(Armour)?
        .0;
    let bytes = base64(body).ok_or(Armour)?;
    let mut outer = Reader(bytes.strip_prefix(b"openssh-key-v1\0").ok_or(Armour)?);
    if outer.string()? != b"none" {
        return Err(Encrypted);
    }
    outer.string()?; // key derivation
    outer.string()?; // its options
    if outer.word()? != 1 {
        return Err(Kind);
    }
    outer.string()?; // the public key
    let mut inner = Reader(outer.string()?);
    if inner.word()? != inner.word()? {
        return Err(Malformed);
    }
    if inner.string()? != b"ssh-ed25519" {
        return Err(Kind);
    }
    let public = inner.string()?;
    let pair: [u8; 64] = inner.string()?.try_into().map_err(|_| Malformed)?;
    if pair[32..] != *public {
        return Err(Malformed);
    }
    Ok(pair)
}

/// ssh's wire format.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn word(&mut self) -> Result<u32, HostKeyError> {
        let (word, rest) = self.0.split_first_chunk().ok_or(HostKeyError::Malformed)?;
        self.0 = rest;
        Ok(u32::from_be_bytes(*word))
    }

    fn string(&mut self) -> Result<&'a [u8], HostKeyError> {
        let length = self.word()? as usize;
        let (string, rest) = self
            .0
            .split_at_checked(length)
            .ok_or(HostKeyError::Malformed)?;
        self.0 = rest;
        Ok(string)
    }
}

/// Decodes base64, white space ignored; `None` at any other foreign character.
fn base64(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() * 3 / 4);
    let (mut bits, mut count) = (0_u32, 0);
    let digits = text.bytes().filter(|byte| !byte.is_ascii_whitespace());
    for digit in digits.take_while(|byte| *byte != b'=') {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = (bits << 6 | u32::from(value)) & 0x00ff_ffff;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = include_str!("../../tests/data/ssh_host_ed25519_key");
    const DROPBEAR: &[u8] = include_bytes!("../../tests/data/dropbear_ed25519_host_key");

    #[test]
    fn a_key_becomes_the_file_that_dropbears_own_converter_writes() {
        assert_eq!(to_dropbear(KEY).unwrap(), DROPBEAR);
    }

    #[test]
    fn an_encrypted_key_is_refused_as_such() {
        let encrypted = include_str!("../../tests/data/encrypted_key");
        assert_eq!(to_dropbear(encrypted), Err(HostKeyError::Encrypted));
    }

    #[test]
    fn another_kind_of_key_is_refused_as_such() {
        let ecdsa = include_str!("../../tests/data/ecdsa_key");
        assert_eq!(to_dropbear(ecdsa), Err(HostKeyError::Kind));
    }

    #[test]
    fn garbage_and_cut_off_keys_are_refused() {
        assert_eq!(to_dropbear("hello"), Err(HostKeyError::Armour));
        let body: String = KEY.lines().filter(|line| !line.starts_with('-')).collect();
        for length in (0..body.len()).step_by(4) {
            let cut = format!(
                "-----BEGIN OPENSSH PRIVATE KEY-----\n{}\n-----END OPENSSH PRIVATE KEY-----\n",
                &body[..length]
            );
            if length < body.len() - 24 {
                to_dropbear(&cut).unwrap_err();
            } else {
                // Only the comment and the padding are missing.
                let _ = to_dropbear(&cut);
            }
        }
    }

    #[test]
    fn base64_takes_all_its_digits_and_no_others() {
        assert_eq!(base64("AAEC\n+/8="), Some(vec![0, 1, 2, 0xfb, 0xff]));
        assert_eq!(base64("AA-C"), None);
    }
}
