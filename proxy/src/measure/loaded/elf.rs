//! As much of ELF as QEMU's loader looks at (System V ABI, chapter 4 and 5; QEMU `include/hw/elf_ops.h`): which bytes of
//! a file go to which physical addresses.
//!
//! The parser is total: every read is bounds-checked, the number of program headers is bounded, and a segment that does
//! not lie within the file is an error.

/// The most program headers that are looked at. Kernels have fewer than ten.
const MAX_HEADERS: u16 = 256;

const LOAD: u32 = 1;

/// Bytes of a file that are loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::measure) struct Segment {
    /// Where they are in the file.
    pub offset: u64,
    /// How many.
    pub size: u64,
    /// The guest's physical address at which they are loaded.
    pub address: u64,
}

/// Why a file's segments are not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum ElfError {
    /// It ends inside its headers.
    #[error("the ELF headers are cut off")]
    Short,
    /// Another kind of ELF file than a little-endian one of 32 or 64 bits.
    #[error("not a little-endian ELF file of 32 or 64 bits")]
    Kind,
    /// Headers of another size, or more of them than are looked at.
    #[error("the ELF program headers are of a strange size or number")]
    Headers,
    /// A segment lies outside of the file, or of the address space.
    #[error("an ELF segment lies outside of the file")]
    Outside,
}

/// Whether a file begins as ELF files do.
pub(super) fn is_elf(head: &[u8]) -> bool {
    head.starts_with(b"\x7fELF")
}

/// The loaded segments. `read` gives the bytes of the file from an offset on, as many as asked for or fewer at its end;
/// it is asked for at most 64 bytes and for 256 program headers.
pub(super) fn segments<E: From<ElfError>>(
    file_size: u64,
    mut read: impl FnMut(u64, usize) -> Result<Vec<u8>, E>,
) -> Result<Vec<Segment>, E> {
    let head = read(0, 64)?;
    if !is_elf(&head) {
        return Err(ElfError::Kind.into());
    }
    let wide = match head.get(4..6) {
        Some([1, 1]) => false,
        Some([2, 1]) => true,
        _ => return Err(ElfError::Kind.into()),
    };
    let head = Fields(&head);
    let (table, entry, count) = if wide {
        (head.u64(32)?, head.u16(54)?, head.u16(56)?)
    } else {
        (u64::from(head.u32(28)?), head.u16(42)?, head.u16(44)?)
    };
    let size: u16 = if wide { 56 } else { 32 };
    if entry != size || count > MAX_HEADERS {
        return Err(ElfError::Headers.into());
    }
    let bytes = read(table, usize::from(size) * usize::from(count))?;
    let mut found = Vec::new();
    for n in 0..usize::from(count) {
        let at = n * usize::from(size);
        let header = Fields(bytes.get(at..at + usize::from(size)).ok_or(ElfError::Short)?);
        if header.u32(0)? != LOAD {
            continue;
        }
        let (offset, address, in_file, in_memory) = if wide {
            (header.u64(8)?, header.u64(24)?, header.u64(32)?, header.u64(40)?)
        } else {
            let field = |at| header.u32(at).map(u64::from);
            (field(4)?, field(12)?, field(16)?, field(20)?)
        };
        // QEMU loads no more than has room in memory.
        let size = in_file.min(in_memory);
        let inside = offset.checked_add(in_file).is_some_and(|end| end <= file_size);
        if !inside || address.checked_add(size).is_none() {
            return Err(ElfError::Outside.into());
        }
        if size > 0 {
            found.push(Segment { offset, size, address });
        }
    }
    Ok(found)
}

/// Little-endian fields at offsets.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u16(&self, at: usize) -> Result<u16, ElfError> {
        self.array(at).map(u16::from_le_bytes)
    }

    fn u32(&self, at: usize) -> Result<u32, ElfError> {
        self.array(at).map(u32::from_le_bytes)
    }

    fn u64(&self, at: usize) -> Result<u64, ElfError> {
        self.array(at).map(u64::from_le_bytes)
    }

    fn array<const N: usize>(&self, at: usize) -> Result<[u8; N], ElfError> {
        self.0.get(at..).and_then(|rest| rest.first_chunk()).copied().ok_or(ElfError::Short)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(file: &[u8]) -> Result<Vec<Segment>, ElfError> {
        segments(file.len() as u64, |at, size| {
            assert!(size <= 56 * usize::from(MAX_HEADERS));
            let rest = usize::try_from(at).ok().and_then(|at| file.get(at..)).unwrap_or_default();
            Ok(rest[..size.min(rest.len())].to_vec())
        })
    }

    /// A file with one segment for each of these: offset, bytes in the file, bytes in memory, address.
    pub(in crate::measure::loaded) fn elf(wide: bool, segments: &[[u64; 4]]) -> Vec<u8> {
        let mut file = vec![0; if wide { 64 } else { 52 }];
        file[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 1 + u8::from(wide), 1]);
        let count = (segments.len() as u16).to_le_bytes();
        if wide {
            file[32..40].copy_from_slice(&64_u64.to_le_bytes());
            file[54..56].copy_from_slice(&56_u16.to_le_bytes());
            file[56..58].copy_from_slice(&count);
        } else {
            file[28..32].copy_from_slice(&52_u32.to_le_bytes());
            file[42..44].copy_from_slice(&32_u16.to_le_bytes());
            file[44..46].copy_from_slice(&count);
        }
        for &[offset, in_file, in_memory, address] in segments {
            file.extend(LOAD.to_le_bytes());
            if wide {
                file.extend(0_u32.to_le_bytes());
                [offset, 0, address, in_file, in_memory, 0].iter().for_each(|n| file.extend(n.to_le_bytes()));
            } else {
                let words = [offset, 0, address, in_file, in_memory, 0, 0];
                words.iter().for_each(|&n| file.extend((n as u32).to_le_bytes()));
            }
        }
        file
    }

    #[test]
    fn segments_of_both_widths() {
        for wide in [false, true] {
            let mut file = elf(wide, &[[0x100, 0x20, 0x40, 0x10_0000], [0x120, 0, 0x10, 0x20_0000], [0, 0x40, 8, 64]]);
            file.resize(0x200, 0);
            let expected = [
                Segment { offset: 0x100, size: 0x20, address: 0x10_0000 },
                Segment { offset: 0, size: 8, address: 64 },
            ];
            assert_eq!(parse(&file).unwrap(), expected, "wide: {wide}");
        }
    }

    #[test]
    fn what_is_none_is_named() {
        let good = elf(true, &[[0, 64, 64, 0]]);
        assert_eq!(parse(b"MZ"), Err(ElfError::Kind));
        assert_eq!(parse(&good[..40]), Err(ElfError::Short));
        assert_eq!(parse(&good[..100]), Err(ElfError::Short));
        let with = |at: usize, bytes: &[u8]| {
            let mut file = good.clone();
            file[at..at + bytes.len()].copy_from_slice(bytes);
            parse(&file)
        };
        assert_eq!(with(5, &[2]), Err(ElfError::Kind));
        assert_eq!(with(54, &[55]), Err(ElfError::Headers));
        assert_eq!(with(56, &[0xff, 0xff]), Err(ElfError::Headers));
        assert_eq!(with(32, &[0xff; 8]), Err(ElfError::Short));
        // The offset, then the address of the only segment.
        assert_eq!(with(64 + 8, &[0xff; 8]), Err(ElfError::Outside));
        assert_eq!(with(64 + 24, &[0xff; 8]), Err(ElfError::Outside));
        assert_eq!(with(64 + 32, &[0xff]), Err(ElfError::Outside));
    }

    proptest! {
        #[test]
        fn no_file_panics(wide: bool, mut bytes in prop::collection::vec(any::<u8>(), 0..512), headers in 0..20_u16) {
            // Past the checks of kind and size, where the rest is looked at.
            for (at, value) in (0..).zip([0x7f, b'E', b'L', b'F', 1 + u8::from(wide), 1]).take(bytes.len()) {
                bytes[at] = value;
            }
            let (size, count) = if wide { (54, 56) } else { (42, 44) };
            if bytes.len() > 64 {
                bytes[size..size + 2].copy_from_slice(&if wide { 56_u16 } else { 32 }.to_le_bytes());
                bytes[count..count + 2].copy_from_slice(&headers.to_le_bytes());
                bytes[if wide { 33..40 } else { 29..32 }].fill(0);
            }
            if let Ok(found) = parse(&bytes) {
                for segment in found {
                    prop_assert!(segment.offset + segment.size <= bytes.len() as u64);
                    prop_assert!(segment.size > 0 && segment.address.checked_add(segment.size).is_some());
                }
            }
        }
    }
}
