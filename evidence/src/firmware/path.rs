//! Device paths in words, as far as people need them (UEFI 2.10, section 10.3).

use std::fmt;

use crate::{Malformed, reader::Reader};

use super::{Guid, wide_text};

/// A device path: nodes, each u8 type, u8 subtype, u16 length of the whole node, data. What cannot be read is shown as
/// bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DevicePath<'a>(pub &'a [u8]);

const WHAT: &str = "device path";

/// ACPI's `PNP0A03` and `PNP0A08` as EISA ids: roots of PCI.
const PCI_ROOTS: [u32; 2] = [0x0a03_41d0, 0x0a08_41d0];

impl fmt::Display for DevicePath<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut r = Reader::new(WHAT, self.0);
        let mut first = true;
        while r.remaining() > 0 {
            let rest = &self.0[r.at()..];
            let Ok((kind, subtype, data)) = node(&mut r) else {
                return write!(f, "{}?{}", if first { "" } else { "/" }, hex::encode(rest));
            };
            match (kind, subtype) {
                (0x7f, 0xff) => break,
                // The end of one of several paths.
                (0x7f, _) => f.write_str(";")?,
                _ => {
                    f.write_str(if first { "" } else { "/" })?;
                    show(f, kind, subtype, data)?;
                }
            }
            first = kind == 0x7f;
        }
        Ok(())
    }
}

fn node<'a>(r: &mut Reader<'a>) -> Result<(u8, u8, &'a [u8]), Malformed> {
    let (kind, subtype, len) = (r.u8()?, r.u8()?, usize::from(r.u16_le()?));
    let Some(len) = len.checked_sub(4) else { return Err(r.invalid("node shorter than its head")) };
    Ok((kind, subtype, r.take(len)?))
}

fn show(f: &mut fmt::Formatter<'_>, kind: u8, subtype: u8, data: &[u8]) -> fmt::Result {
    match known(kind, subtype, data) {
        Ok(Some(text)) => f.write_str(&text),
        _ => write!(f, "Path({kind},{subtype},{})", hex::encode(data)),
    }
}

/// The node in words; none for a kind that we do not read.
fn known(kind: u8, subtype: u8, data: &[u8]) -> Result<Option<String>, Malformed> {
    let mut r = Reader::new(WHAT, data);
    let text = match (kind, subtype) {
        (1, 1) => {
            let (function, device) = (r.u8()?, r.u8()?);
            format!("Pci({device:#x},{function:#x})")
        }
        (1, 3) => {
            let (kind, from, to) = (r.u32_le()?, r.u64_le()?, r.u64_le()?);
            format!("MemoryMapped({kind:#x},{from:#x},{to:#x})")
        }
        (1, 4) => format!("VenHw({})", Guid(r.array()?)),
        (2, 1) => {
            let (hid, uid) = (r.u32_le()?, r.u32_le()?);
            if PCI_ROOTS.contains(&hid) { format!("PciRoot({uid:#x})") } else { format!("Acpi({hid:#x},{uid:#x})") }
        }
        (3, 2) => format!("Scsi({:#x},{:#x})", r.u16_le()?, r.u16_le()?),
        (3, 5) => format!("USB({:#x},{:#x})", r.u8()?, r.u8()?),
        (3, 11) => format!("MAC({})", hex::encode(&r.take(32)?[..6])),
        (3, 12) => "IPv4".to_owned(),
        (3, 13) => "IPv6".to_owned(),
        (3, 18) => format!("Sata({:#x},{:#x},{:#x})", r.u16_le()?, r.u16_le()?, r.u16_le()?),
        (3, 23) => format!("NVMe({:#x},{})", r.u32_le()?, hex::encode(r.take(8)?)),
        (3, 24) => format!("Uri({})", String::from_utf8_lossy(data).escape_debug()),
        (4, 1) => {
            let (number, start, size) = (r.u32_le()?, r.u64_le()?, r.u64_le()?);
            let signature: [u8; 16] = r.array()?;
            let (_format, kind) = (r.u8()?, r.u8()?);
            let id = match kind {
                2 => format!("GPT,{}", Guid(signature)),
                1 => format!("MBR,0x{}", hex::encode(signature[..4].iter().rev().copied().collect::<Vec<_>>())),
                _ => "none".to_owned(),
            };
            format!("HD({number},{id},{start:#x},{size:#x})")
        }
        (4, 2) => format!("CDROM({:#x})", r.u32_le()?),
        (4, 3) => format!("VenMedia({})", Guid(r.array()?)),
        (4, 4) => wide_text(data.strip_suffix(&[0, 0]).unwrap_or(data)),
        (4, 6) => format!("FvFile({})", Guid(r.array()?)),
        (4, 7) => format!("Fv({})", Guid(r.array()?)),
        (4, 8) => {
            let (_reserved, from, to) = (r.u32_le()?, r.u64_le()?, r.u64_le()?);
            format!("Offset({from:#x},{to:#x})")
        }
        _ => return Ok(None),
    };
    Ok(Some(text))
}
