//! Getting a kernel's ELF out of whatever file holds it.

use crate::error::BuildError;
use crate::unpack::{Compression, decompress};
use object::elf::{EM_X86_64, ET_EXEC, FileHeader64};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endianness, elf};
use std::path::Path;

/// The largest kernel, unpacked.
const MAX_KERNEL: u64 = 512 << 20;
/// The type of the note that holds the entry for a start in 32-bit mode by a VMM.
const XEN_ELFNOTE_PHYS32_ENTRY: elf::NoteType = elf::NoteType(18);

/// A kernel as an ELF file.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// The ELF.
    pub(crate) elf: Vec<u8>,
    /// Whether it has a PVH entry.
    pub(crate) pvh: bool,
    /// Its release, where it says so.
    pub(crate) release: Option<String>,
}

/// The kernel in `bytes`, a `vmlinux` or `bzImage`; `path` is for errors.
pub(crate) fn extract(bytes: Vec<u8>, path: &Path) -> Result<Kernel, BuildError> {
    let not_kernel = |found: String| BuildError::NotKernel {
        path: path.to_owned(),
        found,
    };
    let elf = match payload(&bytes) {
        None => bytes,
        Some(Err(found)) => return Err(not_kernel(found)),
        Some(Ok(payload)) => {
            // All but gzip are followed by the unpacked length.
            let stream = match Compression::detect(payload) {
                Compression::None => {
                    return Err(not_kernel(
                        "a bzImage with an unknown compression".to_owned(),
                    ));
                }
                Compression::Gzip => payload,
                _ => payload
                    .get(..payload.len().saturating_sub(4))
                    .unwrap_or_default(),
            };
            decompress(stream, "its payload", MAX_KERNEL)
                .map_err(|error| not_kernel(format!("a bzImage, but {error}")))?
        }
    };
    let pvh = check(&elf).map_err(not_kernel)?;
    let release = banner(&elf);
    Ok(Kernel { elf, pvh, release })
}

/// The compressed kernel inside a bzImage; `None` if the bytes are no bzImage.
fn payload(bytes: &[u8]) -> Option<Result<&[u8], String>> {
    const SETUP_SECTORS: usize = 0x1f1;
    const MAGIC: usize = 0x202;
    const VERSION: usize = 0x206;
    const PAYLOAD_OFFSET: usize = 0x248;
    const PAYLOAD_LENGTH: usize = 0x24c;
    if bytes.get(MAGIC..MAGIC + 4)? != b"HdrS" {
        return None;
    }
    let word = |at: usize| -> Option<usize> {
        let word = bytes.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(word)).ok()
    };
    let found = || -> Option<Result<&[u8], String>> {
        let version = u16::from_le_bytes(bytes.get(VERSION..VERSION + 2)?.try_into().ok()?);
        if version < 0x208 {
            return Some(Err(format!(
                "a bzImage of the old boot protocol {version:#x}"
            )));
        }
        let sectors = match bytes.get(SETUP_SECTORS)? {
            0 => 4,
            &sectors => usize::from(sectors),
        };
        let start = ((sectors + 1) * 512).checked_add(word(PAYLOAD_OFFSET)?)?;
        let end = start.checked_add(word(PAYLOAD_LENGTH)?)?;
        Some(Ok(bytes.get(start..end)?))
    };
    Some(found().unwrap_or_else(|| Err("a bzImage that is cut off".to_owned())))
}

/// Checks that the bytes are a kernel for x86-64; says whether it has a PVH entry.
fn check(bytes: &[u8]) -> Result<bool, String> {
    let header = FileHeader64::<Endianness>::parse(bytes).map_err(|_| describe(bytes))?;
    let endian = header.endian().map_err(|_| describe(bytes))?;
    if header.e_machine(endian) != EM_X86_64 {
        return Err(format!(
            "an ELF file for machine {:?}",
            header.e_machine(endian)
        ));
    }
    if header.e_type(endian) != ET_EXEC {
        return Err("an ELF file, but a program or library".to_owned());
    }
    let segments = header
        .program_headers(endian, bytes)
        .map_err(|_| "an ELF file that is cut off".to_owned())?;
    let load = segments.iter().filter(|s| s.p_type(endian) == elf::PT_LOAD);
    let mut loaded = 0;
    for segment in load {
        segment
            .data(endian, bytes)
            .map_err(|()| "an ELF file that is cut off".to_owned())?;
        // A kernel is linked to run in the upper half.
        if segment.p_vaddr(endian) >> 63 == 1 {
            loaded += 1;
        }
    }
    if loaded == 0 {
        return Err("an ELF file, but a program or library".to_owned());
    }
    let pvh = segments.iter().any(|segment| {
        let Ok(Some(mut notes)) = segment.notes(endian, bytes) else {
            return false;
        };
        while let Ok(Some(note)) = notes.next() {
            if note.name() == b"Xen" && note.n_type(endian) == XEN_ELFNOTE_PHYS32_ENTRY {
                return true;
            }
        }
        false
    });
    Ok(pvh)
}

/// What a file that is no kernel looks like.
fn describe(bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return "an empty file".to_owned();
    }
    match Compression::detect(bytes) {
        Compression::None => {}
        _ => return "a compressed file without a bzImage's header".to_owned(),
    }
    match bytes {
        [0x7f, b'E', b'L', b'F', 1, ..] => "a 32-bit ELF file".to_owned(),
        [0x7f, b'E', b'L', b'F', ..] => "an ELF file that is cut off".to_owned(),
        [b'0', b'7', b'0', b'7', b'0', ..] => "a cpio archive, such as an initrd".to_owned(),
        [b'Q', b'F', b'I', 0xfb, ..] => "a qcow2 disk image".to_owned(),
        [b'!', b'<', b'a', b'r', b'c', b'h', b'>', ..] => {
            "an ar archive, such as a Debian package".to_owned()
        }
        [b'M', b'Z', ..] => "a Windows or EFI program without a bzImage's header".to_owned(),
        _ if bytes
            .iter()
            .take(512)
            .all(|b| b.is_ascii_graphic() || b.is_ascii_whitespace()) =>
        {
            "text".to_owned()
        }
        _ => "unknown data".to_owned(),
    }
}

/// The release in the kernel's banner.
fn banner(elf: &[u8]) -> Option<String> {
    const START: &[u8] = b"Linux version ";
    let mut rest = elf;
    while let Some(at) = rest.windows(START.len()).position(|window| window == START) {
        let after = &rest[at + START.len()..];
        let end = after.iter().take(65).position(|&byte| byte == b' ');
        if let Some(release) = end.and_then(|end| std::str::from_utf8(&after[..end]).ok())
            && is_release(release)
        {
            return Some(release.to_owned());
        }
        rest = after;
    }
    None
}

/// Whether the text may be a kernel's release, and so the name of a folder.
pub(crate) fn is_release(text: &str) -> bool {
    text.len() <= 64
        && text.starts_with(|c: char| c.is_ascii_digit())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "._+-~".contains(c))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// An ELF with one segment in the upper half and, if asked for, a PVH note.
    pub(crate) fn elf(pvh: bool) -> Vec<u8> {
        let text = b"Linux version %s\0Linux version 6.1.0-9-cloud-amd64 (someone) #1\0";
        let mut note = Vec::new();
        for word in [4u32, 4, if pvh { XEN_ELFNOTE_PHYS32_ENTRY.0 } else { 5 }] {
            note.extend(word.to_le_bytes());
        }
        note.extend(b"Xen\0");
        note.extend(0x0100_0000u32.to_le_bytes());
        let (text_at, note_at) = (64 + 2 * 56, 64 + 2 * 56 + text.len().next_multiple_of(4));
        let mut bytes = vec![0; note_at];
        bytes[..16].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        bytes[16..18].copy_from_slice(&2u16.to_le_bytes());
        bytes[18..20].copy_from_slice(&62u16.to_le_bytes());
        bytes[20..24].copy_from_slice(&1u32.to_le_bytes());
        bytes[32..40].copy_from_slice(&64u64.to_le_bytes());
        bytes[52..54].copy_from_slice(&64u16.to_le_bytes());
        bytes[54..56].copy_from_slice(&56u16.to_le_bytes());
        bytes[56..58].copy_from_slice(&2u16.to_le_bytes());
        bytes[58..60].copy_from_slice(&64u16.to_le_bytes());
        for (index, kind, at, length) in
            [(0, 1u32, text_at, text.len()), (1, 4, note_at, note.len())]
        {
            let header = &mut bytes[64 + index * 56..64 + (index + 1) * 56];
            header[..4].copy_from_slice(&kind.to_le_bytes());
            header[8..16].copy_from_slice(&(at as u64).to_le_bytes());
            header[16..24].copy_from_slice(&0xffff_ffff_8100_0000u64.to_le_bytes());
            header[32..40].copy_from_slice(&(length as u64).to_le_bytes());
            header[40..48].copy_from_slice(&(length as u64).to_le_bytes());
            header[48..56].copy_from_slice(&4u64.to_le_bytes());
        }
        bytes[text_at..text_at + text.len()].copy_from_slice(text);
        bytes.extend(note);
        bytes
    }

    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 1024];
        bytes[0x1f1] = 1;
        bytes[0x202..0x206].copy_from_slice(b"HdrS");
        bytes[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        bytes[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        bytes[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        bytes.extend([0; 16]);
        bytes.extend(payload);
        bytes.extend([0; 100]);
        bytes
    }

    fn lz4(elf: &[u8]) -> Vec<u8> {
        let packed = lz4_flex::block::compress(elf);
        let mut bytes = 0x184c_2102u32.to_le_bytes().to_vec();
        bytes.extend((packed.len() as u32).to_le_bytes());
        bytes.extend(packed);
        bytes.extend((elf.len() as u32).to_le_bytes());
        bytes
    }

    fn read(bytes: Vec<u8>) -> Result<Kernel, BuildError> {
        extract(bytes, Path::new("/boot/some"))
    }

    #[test]
    fn a_vmlinux_is_taken_as_it_is() {
        let kernel = read(elf(true)).unwrap();
        assert!(kernel.pvh);
        assert_eq!(kernel.release.as_deref(), Some("6.1.0-9-cloud-amd64"));
        assert!(!read(elf(false)).unwrap().pvh);
    }

    #[test]
    fn a_bzimage_is_unpacked_whatever_its_compression() {
        let plain = elf(true);
        let mut zstd = zstd::encode_all(&plain[..], 1).unwrap();
        zstd.extend((plain.len() as u32).to_le_bytes());
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut gzip, &plain).unwrap();
        let mut xz =
            lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(0)).unwrap();
        std::io::Write::write_all(&mut xz, &plain).unwrap();
        let mut xz = xz.finish().unwrap();
        xz.extend((plain.len() as u32).to_le_bytes());
        for payload in [zstd, gzip.finish().unwrap(), xz, lz4(&plain)] {
            let kernel = read(bzimage(&payload)).unwrap();
            assert_eq!(kernel.elf, plain);
        }
    }

    #[test]
    fn what_is_no_kernel_is_named_with_what_it_is() {
        let mut program = elf(false);
        program[64 + 23] = 0;
        let cases: [(Vec<u8>, &str); 8] = [
            (Vec::new(), "an empty file"),
            (b"#!/bin/sh\necho hello\n".to_vec(), "text"),
            (vec![0x80; 5000], "unknown data"),
            (b"070701000".to_vec(), "cpio archive"),
            (b"\x7fELF\x01\x01".to_vec(), "32-bit"),
            (
                bzimage(b"no compression that is known"),
                "unknown compression",
            ),
            (bzimage(&lz4(&elf(true))[..40]), "a bzImage, but"),
            (program, "program or library"),
        ];
        for (bytes, found) in cases {
            let error = read(bytes).unwrap_err();
            let text = error.to_string();
            assert!(
                text.contains("/boot/some") && text.contains(found),
                "{text}"
            );
            assert!(error.hint().is_some());
        }
    }

    #[test]
    fn a_kernel_cut_off_anywhere_is_an_error_and_never_a_panic() {
        let whole = bzimage(&lz4(&elf(true)));
        for length in 0..whole.len() - 104 {
            assert!(read(whole[..length].to_vec()).is_err(), "{length}");
        }
        let whole = elf(true);
        for length in 0..64 + 2 * 56 {
            assert!(read(whole[..length].to_vec()).is_err(), "{length}");
        }
    }

    #[test]
    fn a_release_never_is_a_path() {
        assert!(is_release("6.12.95+deb12-cloud-amd64"));
        for bad in [
            "",
            "..",
            "../6.1",
            "6.1/../..",
            "6.1 ",
            "%s",
            &"6".repeat(65),
        ] {
            assert!(!is_release(bad), "{bad}");
        }
    }
}
