//! The binary indices that `modprobe` reads: tries of keys, as kmod's `depmod` writes them.

use std::collections::BTreeMap;

const MAGIC: u32 = 0xb007_f457;
const VERSION: u32 = 0x0002_0001;
const HAS_PREFIX: u32 = 0x8000_0000;
const HAS_VALUES: u32 = 0x4000_0000;
const HAS_CHILDREN: u32 = 0x2000_0000;

/// Keys, each with its values and their order.
pub(crate) type Keys = BTreeMap<Vec<u8>, Vec<(u32, String)>>;

/// A key with its values.
type Key<'a> = (&'a [u8], &'a [(u32, String)]);

/// The bytes of an index.
pub(crate) fn write(keys: &Keys) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(MAGIC.to_be_bytes());
    out.extend(VERSION.to_be_bytes());
    out.extend([0; 4]);
    let entries: Vec<_> = keys
        .iter()
        .map(|(key, values)| (&key[..], &values[..]))
        .collect();
    let root = node(&entries, 0, &mut out);
    out[8..12].copy_from_slice(&root.to_be_bytes());
    out
}

/// Writes the node of all `entries`, which agree in their first `depth` bytes and are sorted; returns where it is.
fn node(entries: &[Key<'_>], depth: usize, out: &mut Vec<u8>) -> u32 {
    let (first, last) = match (entries.first(), entries.last()) {
        (Some(first), Some(last)) => (first.0, last.0),
        _ => (&[][..], &[][..]),
    };
    // Sorted: what the first and the last have in common, all have.
    let common = first[depth..]
        .iter()
        .zip(&last[depth..])
        .take_while(|(a, b)| a == b)
        .count();
    let end = depth + common;
    let (values, rest) = match entries.first() {
        Some((key, values)) if key.len() == end => (*values, &entries[1..]),
        _ => (&[][..], entries),
    };
    let mut children = Vec::new();
    for group in rest.chunk_by(|a, b| a.0[end] == b.0[end]) {
        children.push((group[0].0[end], node(group, end + 1, out)));
    }

    // An offset has 28 bits; even the index of all aliases is far below.
    let mut at = (out.len() as u32) & 0x0fff_ffff;
    if common > 0 {
        at |= HAS_PREFIX;
        out.extend(&first[depth..end]);
        out.push(0);
    }
    if let (Some(&(low, _)), Some(&(high, _))) = (children.first(), children.last()) {
        at |= HAS_CHILDREN;
        out.extend([low, high]);
        let mut offsets = vec![0u32; usize::from(high - low) + 1];
        for (byte, offset) in children {
            offsets[usize::from(byte - low)] = offset;
        }
        out.extend(offsets.into_iter().flat_map(u32::to_be_bytes));
    }
    if !values.is_empty() {
        at |= HAS_VALUES;
        out.extend((values.len() as u32).to_be_bytes());
        let mut values: Vec<_> = values.iter().collect();
        values.sort();
        for (priority, value) in values {
            out.extend(priority.to_be_bytes());
            out.extend(value.bytes());
            out.push(0);
        }
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(bytes: &[u8], at: usize) -> u32 {
        u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    /// Looks a key up as kmod does.
    fn find(bytes: &[u8], key: &[u8]) -> Option<Vec<String>> {
        let (mut node, mut key) = (word(bytes, 8), key);
        loop {
            let mut at = (node & 0x0fff_ffff) as usize;
            if node & HAS_PREFIX != 0 {
                let length = bytes[at..].iter().position(|&b| b == 0).unwrap();
                key = key.strip_prefix(&bytes[at..at + length])?;
                at += length + 1;
            }
            let children = at;
            let mut span = (1, 0);
            if node & HAS_CHILDREN != 0 {
                span = (bytes[at], bytes[at + 1]);
                at += 2 + 4 * (usize::from(span.1 - span.0) + 1);
            }
            let Some((&next, rest)) = key.split_first() else {
                if node & HAS_VALUES == 0 {
                    return None;
                }
                let count = word(bytes, at);
                at += 4;
                let mut values = Vec::new();
                for _ in 0..count {
                    let text = &bytes[at + 4..];
                    let length = text.iter().position(|&b| b == 0).unwrap();
                    values.push(String::from_utf8(text[..length].to_vec()).unwrap());
                    at += 4 + length + 1;
                }
                return Some(values);
            };
            if next < span.0 || next > span.1 {
                return None;
            }
            node = word(bytes, children + 2 + 4 * usize::from(next - span.0));
            if node == 0 {
                return None;
            }
            key = rest;
        }
    }

    #[test]
    fn every_key_is_found_with_its_values_in_order() {
        let mut keys = Keys::new();
        for key in [
            "ext4",
            "ext2",
            "e",
            "overlay",
            "virtio_net",
            "virtio_blk",
            "virtio",
        ] {
            keys.insert(
                key.into(),
                vec![(2, format!("{key}-b")), (1, format!("{key}-a"))],
            );
        }
        let bytes = write(&keys);
        assert_eq!(word(&bytes, 0), MAGIC);
        for key in keys.keys() {
            let name = String::from_utf8(key.clone()).unwrap();
            assert_eq!(
                find(&bytes, key),
                Some(vec![format!("{name}-a"), format!("{name}-b")])
            );
        }
        for absent in ["", "ext", "ext3", "ext44", "virtio_", "z"] {
            assert_eq!(find(&bytes, absent.as_bytes()), None, "{absent}");
        }
    }

    #[test]
    fn an_empty_index_finds_nothing() {
        assert_eq!(find(&write(&Keys::new()), b"ext4"), None);
    }
}
