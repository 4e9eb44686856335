//! One event as listed.

use std::fmt;

use crate::{
    Malformed,
    digest::{HashAlg, MAX_DIGEST},
    pcr::PCR_COUNT,
    reader::Reader,
};

use super::MAX_LOG;

const SHA1_SIZE: usize = 20;

/// One event, borrowed from the log. Of it only register and digests are extended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event<'a> {
    /// Its number in the log, from 0.
    pub number: u32,
    /// Where it begins in the log, in bytes.
    pub offset: usize,
    /// The register; below 24 unless the event is not extended.
    pub pcr: u32,
    /// Its type, by the log's word.
    pub kind: EventType,
    /// Its data, by the log's word.
    pub data: &'a [u8],
    /// In the order of [`HashAlg::ALL`].
    digests: [Option<&'a [u8]>; HashAlg::ALL.len()],
}

impl<'a> Event<'a> {
    pub(super) fn parse_sha1(r: &mut Reader<'a>, number: u32) -> Result<Self, Malformed> {
        let offset = r.at();
        let (pcr, kind) = head(r)?;
        let digests = [Some(r.take(SHA1_SIZE)?), None, None, None];
        let data = r.block_le(MAX_LOG)?;
        Ok(Self { number, offset, pcr, kind, data, digests })
    }

    /// `algorithms` are those that the log's header names, with sizes.
    pub(super) fn parse_agile(r: &mut Reader<'a>, number: u32, algorithms: &[(u16, usize)]) -> Result<Self, Malformed> {
        let offset = r.at();
        let (pcr, kind) = head(r)?;
        let count = r.u32_le()?;
        if count == 0 || count as usize > algorithms.len() {
            return Err(r.invalid("number of digests"));
        }
        let mut digests = [None; HashAlg::ALL.len()];
        for _ in 0..count {
            let id = r.u16_le()?;
            let Some((_, size)) = algorithms.iter().find(|(known, _)| *known == id) else {
                return Err(r.invalid("a digest of an algorithm that the header does not name"));
            };
            let digest = r.take(*size)?;
            let Some(alg) = HashAlg::from_tpm(id) else { continue };
            if digests[place(alg)].replace(digest).is_some() {
                return Err(r.invalid("an algorithm's digest stands twice"));
            }
        }
        let data = r.block_le(MAX_LOG)?;
        Ok(Self { number, offset, pcr, kind, data, digests })
    }

    /// Whether it went into a register: everything but `EV_NO_ACTION`.
    #[must_use]
    pub fn is_extended(&self) -> bool {
        self.kind != EventType::NO_ACTION
    }

    /// Its digest in a bank.
    #[must_use]
    pub fn digest(&self, bank: HashAlg) -> Option<&'a [u8]> {
        self.digests[place(bank)]
    }

    /// Whether its digest in `bank` is that of the parts, one after the other.
    #[must_use]
    pub fn is_digest_of(&self, bank: HashAlg, parts: &[&[u8]]) -> bool {
        let mut out = [0; MAX_DIGEST];
        self.is_extended() && self.digest(bank) == Some(bank.hash_into(parts, &mut out))
    }

    /// Whether its digest in `bank` is that of its data.
    #[must_use]
    pub fn proves_data(&self, bank: HashAlg) -> bool {
        self.is_digest_of(bank, &[self.data])
    }
}

fn head(r: &mut Reader<'_>) -> Result<(u32, EventType), Malformed> {
    let pcr = r.u32_le()?;
    let kind = EventType(r.u32_le()?);
    // Informative events may name registers that do not exist.
    if pcr >= u32::from(PCR_COUNT) && kind != EventType::NO_ACTION {
        return Err(r.invalid("register out of range"));
    }
    Ok((pcr, kind))
}

/// The place of an algorithm in [`HashAlg::ALL`].
fn place(alg: HashAlg) -> usize {
    match alg {
        HashAlg::Sha1 => 0,
        HashAlg::Sha256 => 1,
        HashAlg::Sha384 => 2,
        HashAlg::Sha512 => 3,
    }
}

/// An event's type (PFP section 10.4.1): what the log says that the event is. Nothing proves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EventType(pub u32);

impl EventType {
    /// `EV_NO_ACTION`: informative, not extended.
    pub const NO_ACTION: Self = Self(3);
    /// `EV_SEPARATOR`.
    pub const SEPARATOR: Self = Self(4);
    /// `EV_EVENT_TAG`.
    pub const EVENT_TAG: Self = Self(6);
    /// `EV_IPL`: boot loaders.
    pub const IPL: Self = Self(0xd);
    /// `EV_EFI_VARIABLE_DRIVER_CONFIG`.
    pub const VARIABLE_DRIVER_CONFIG: Self = Self(0x8000_0001);
    /// `EV_EFI_VARIABLE_BOOT`.
    pub const VARIABLE_BOOT: Self = Self(0x8000_0002);
    /// `EV_EFI_BOOT_SERVICES_APPLICATION`.
    pub const BOOT_SERVICES_APPLICATION: Self = Self(0x8000_0003);
    /// `EV_EFI_BOOT_SERVICES_DRIVER`.
    pub const BOOT_SERVICES_DRIVER: Self = Self(0x8000_0004);
    /// `EV_EFI_RUNTIME_SERVICES_DRIVER`.
    pub const RUNTIME_SERVICES_DRIVER: Self = Self(0x8000_0005);
    /// `EV_EFI_ACTION`.
    pub const EFI_ACTION: Self = Self(0x8000_0007);
    /// `EV_EFI_VARIABLE_AUTHORITY`.
    pub const VARIABLE_AUTHORITY: Self = Self(0x8000_00e0);

    /// The name in the specification, if it has one.
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        Some(match self.0 {
            0x0 => "EV_PREBOOT_CERT",
            0x1 => "EV_POST_CODE",
            0x2 => "EV_UNUSED",
            0x3 => "EV_NO_ACTION",
            0x4 => "EV_SEPARATOR",
            0x5 => "EV_ACTION",
            0x6 => "EV_EVENT_TAG",
            0x7 => "EV_S_CRTM_CONTENTS",
            0x8 => "EV_S_CRTM_VERSION",
            0x9 => "EV_CPU_MICROCODE",
            0xa => "EV_PLATFORM_CONFIG_FLAGS",
            0xb => "EV_TABLE_OF_DEVICES",
            0xc => "EV_COMPACT_HASH",
            0xd => "EV_IPL",
            0xe => "EV_IPL_PARTITION_DATA",
            0xf => "EV_NONHOST_CODE",
            0x10 => "EV_NONHOST_CONFIG",
            0x11 => "EV_NONHOST_INFO",
            0x12 => "EV_OMIT_BOOT_DEVICE_EVENTS",
            0x13 => "EV_POST_CODE2",
            0x8000_0001 => "EV_EFI_VARIABLE_DRIVER_CONFIG",
            0x8000_0002 => "EV_EFI_VARIABLE_BOOT",
            0x8000_0003 => "EV_EFI_BOOT_SERVICES_APPLICATION",
            0x8000_0004 => "EV_EFI_BOOT_SERVICES_DRIVER",
            0x8000_0005 => "EV_EFI_RUNTIME_SERVICES_DRIVER",
            0x8000_0006 => "EV_EFI_GPT_EVENT",
            0x8000_0007 => "EV_EFI_ACTION",
            0x8000_0008 => "EV_EFI_PLATFORM_FIRMWARE_BLOB",
            0x8000_0009 => "EV_EFI_HANDOFF_TABLES",
            0x8000_000a => "EV_EFI_PLATFORM_FIRMWARE_BLOB2",
            0x8000_000b => "EV_EFI_HANDOFF_TABLES2",
            0x8000_000c => "EV_EFI_VARIABLE_BOOT2",
            0x8000_000d => "EV_EFI_GPT_EVENT2",
            0x8000_0010 => "EV_EFI_HCRTM_EVENT",
            0x8000_00e0 => "EV_EFI_VARIABLE_AUTHORITY",
            0x8000_00e1 => "EV_EFI_SPDM_FIRMWARE_BLOB",
            0x8000_00e2 => "EV_EFI_SPDM_FIRMWARE_CONFIG",
            0x8000_00e3 => "EV_EFI_SPDM_DEVICE_POLICY",
            0x8000_00e4 => "EV_EFI_SPDM_DEVICE_AUTHORITY",
            _ => return None,
        })
    }
}

impl fmt::Display for EventType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "type {:#x}", self.0),
        }
    }
}
