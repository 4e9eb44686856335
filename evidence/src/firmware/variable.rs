//! UEFI variables as they are measured, and boot entries.

use std::fmt;

use crate::{Malformed, reader::Reader};

use super::{DevicePath, MAX_LOG};

const WHAT: &str = "UEFI variable";

/// A GUID in the byte order of UEFI: the first three fields little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Guid(pub [u8; 16]);

impl Guid {
    /// `EFI_GLOBAL_VARIABLE`: SecureBoot, PK, KEK, BootOrder.
    pub const GLOBAL: Self = Self::from_fields(0x8be4_df61, 0x93ca, 0x11d2, 0xaa0d_00e0_9803_2b8c);
    /// `EFI_IMAGE_SECURITY_DATABASE_GUID`: db, dbx.
    pub const IMAGE_SECURITY: Self = Self::from_fields(0xd719_b2cb, 0x3d3a, 0x4596, 0xa3bc_dad0_0e67_656f);
    /// Variables of shim.
    pub const SHIM: Self = Self::from_fields(0x605d_ab50, 0xe046, 0x4300, 0xabb6_3dd8_10dd_8b23);

    /// From the four numbers of the usual notation, the last two groups as one.
    #[must_use]
    pub const fn from_fields(a: u32, b: u16, c: u16, d: u64) -> Self {
        let (a, b, c, d) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes(), d.to_be_bytes());
        Self([a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]])
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        uuid::Uuid::from_bytes_le(self.0).fmt(f)
    }
}

/// `UEFI_VARIABLE_DATA` (PFP section 10.2.6): GUID, u64 length of the name in characters, u64 length of the content,
/// name in UTF-16 without NUL, content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Variable<'a> {
    /// The vendor's GUID.
    pub guid: Guid,
    /// The name in UTF-16, little-endian.
    pub name: &'a [u8],
    /// The content.
    pub data: &'a [u8],
}

impl<'a> Variable<'a> {
    /// Reads a variable that fills `bytes`.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(WHAT, bytes);
        let guid = Guid(r.array()?);
        let length = |value: u64| usize::try_from(value).ok().filter(|&value| value <= MAX_LOG);
        let (name, data) = (length(r.u64_le()?), length(r.u64_le()?));
        let (Some(name), Some(data)) = (name, data) else { return Err(r.invalid("length")) };
        let (name, data) = (r.take(2 * name)?, r.take(data)?);
        r.end()?;
        Ok(Self { guid, name, data })
    }

    /// The bytes that are measured.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let (name, data) = (self.name.len() as u64 / 2, self.data.len() as u64);
        [&self.guid.0[..], &name.to_le_bytes(), &data.to_le_bytes(), self.name, self.data].concat()
    }

    /// Whether it is the variable of this vendor and name.
    #[must_use]
    pub fn is(&self, guid: Guid, name: &str) -> bool {
        let units = self.name.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
        self.guid == guid && units.eq(name.encode_utf16())
    }

    /// The name for people.
    #[must_use]
    pub fn name(&self) -> String {
        wide_text(self.name)
    }
}

/// Whether it is UTF-16 text of printable characters with or without its NUL; without it.
pub(super) fn wide(data: &[u8]) -> Option<&[u8]> {
    let text = data.strip_suffix(&[0, 0]).filter(|_| data.len().is_multiple_of(2)).unwrap_or(data);
    let units = text.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
    let printable = |c: Result<char, _>| c.is_ok_and(|c: char| !c.is_control());
    let is_text = !text.is_empty() && text.len().is_multiple_of(2) && char::decode_utf16(units).all(printable);
    is_text.then_some(text)
}

/// UTF-16 for people: what is no character is replaced, control characters are escaped.
#[must_use]
pub fn wide_text(bytes: &[u8]) -> String {
    let units = bytes.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
    let chars = char::decode_utf16(units).map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER));
    let mut out = String::new();
    for c in chars {
        if c.is_control() { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

/// `EFI_LOAD_OPTION`, the content of `Boot####` (UEFI 2.10, section 3.1.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadOption<'a> {
    /// Attributes; bit 0: active.
    pub attributes: u32,
    /// What boot menus show, UTF-16 without NUL.
    pub description: &'a [u8],
    /// What is started.
    pub path: DevicePath<'a>,
    /// What it is given.
    pub options: &'a [u8],
}

impl<'a> LoadOption<'a> {
    /// Reads a boot entry's content.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new("boot entry", bytes);
        let (attributes, path_len) = (r.u32_le()?, usize::from(r.u16_le()?));
        let start = r.at();
        while r.u16_le()? != 0 {}
        let description = &bytes[start..r.at() - 2];
        let path = DevicePath(r.take(path_len)?);
        let options = r.take(r.remaining())?;
        Ok(Self { attributes, description, path, options })
    }
}
