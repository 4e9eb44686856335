//! Step 7: the host's own measurement list, which proves the proxy's binary among others.
//!
//! The list may run ahead of the quote; what is believed of it is the longest beginning whose replay is the quoted
//! PCR 10. Kernels before 5.8 extended the SHA-256 bank with the SHA-1 digest padded with zeros; a list is replayed
//! both ways at once.

use onequote_evidence::{
    digest::{HashAlg, sha256},
    id::Sha256,
    ima::{Aggregate, Entry, ListReader, SHA1_HASH_SIZE},
    pcr::extend_sha256,
};

use super::registers::QuotedRegisters;
use crate::{
    finding::{Code, Finding},
    result::Skipped,
};

const IMA_PCR: u8 = 10;

/// The entries that went into the quoted PCR 10.
#[derive(Debug, Clone, Default)]
pub struct HostList<'a> {
    /// In order.
    pub entries: Vec<Entry<'a>>,
    /// Whether the first is the boot aggregate and was found to be that of the quoted registers.
    pub boot_aggregate: bool,
}

impl<'a> HostList<'a> {
    /// The entries that a policy must know: a boot aggregate that was checked says no more than the registers do.
    #[must_use]
    pub fn to_judge(&self) -> &[Entry<'a>] {
        if self.boot_aggregate { self.entries.get(1..).unwrap_or_default() } else { &self.entries }
    }
}

/// Replays the host's list. `demanded` says whether the policy wants one.
///
/// # Errors
/// The finding.
pub fn check<'a>(
    list: &'a [u8],
    quoted: &QuotedRegisters,
    demanded: bool,
    skipped: &mut Vec<Skipped>,
) -> Result<HostList<'a>, Finding> {
    let target = quoted.sha256(IMA_PCR).unwrap_or(Sha256::ZERO);
    if list.is_empty() {
        if demanded || target != Sha256::ZERO {
            return Err(Finding::new(Code::HostImaMissing, "PCR 10").actual(target));
        }
        let why = "the host measures no files (PCR 10 is empty): the proxy's own binary is not proven";
        skipped.push(Skipped::new("host-ima", why));
        return Ok(HostList::default());
    }
    let mut entries = Vec::new();
    let (mut modern, mut padded) = (Sha256::ZERO, Sha256::ZERO);
    let mut believed = (target == Sha256::ZERO).then_some(0);
    for entry in ListReader::new(list, SHA1_HASH_SIZE) {
        let entry =
            entry.map_err(|e| Finding::new(Code::HostImaMalformed, format!("entry {}", entries.len())).actual(e))?;
        if entry.pcr != u32::from(IMA_PCR) {
            // A policy can send entries to other registers, where this replay proves nothing of them.
            continue;
        }
        modern = extend_sha256(&modern, &Aggregate::digest(&entry));
        let mut digest = Sha256::ZERO;
        digest.0.copy_from_slice(&entry.padded_sha1(HashAlg::Sha256));
        padded = extend_sha256(&padded, &digest);
        entries.push(entry);
        if modern == target || padded == target {
            believed = Some(entries.len());
        }
    }
    let Some(believed) = believed else {
        let finding = Finding::new(Code::HostImaReplay, format!("{} entries", entries.len()));
        return Err(finding.expected(target).actual(modern));
    };
    entries.truncate(believed);
    let boot_aggregate = check_boot_aggregate(entries.first(), quoted, skipped)?;
    Ok(HostList { entries, boot_aggregate })
}

/// The first entry is the kernel's digest over the registers that firmware and boot loader had extended. False when it
/// could not be checked.
fn check_boot_aggregate(
    first: Option<&Entry<'_>>,
    quoted: &QuotedRegisters,
    skipped: &mut Vec<Skipped>,
) -> Result<bool, Finding> {
    let Some(fields) = first.and_then(|entry| entry.fields().ok()).filter(|f| f.path == b"boot_aggregate") else {
        return Err(Finding::new(Code::HostImaBootAggregate, "entry 0").actual("another entry, or none"));
    };
    if fields.digest_alg != HashAlg::Sha256.name() {
        let why = format!("it is in {}, the quote in sha256", fields.digest_alg);
        skipped.push(Skipped::new("host-boot-aggregate", why));
        return Ok(false);
    }
    let values: Vec<Sha256> = (0..10).filter_map(|pcr| quoted.sha256(pcr)).collect();
    let parts: Vec<&[u8]> = values.iter().map(Sha256::as_bytes).collect();
    let expected = sha256(&parts);
    if fields.digest != expected.as_bytes() {
        let finding = Finding::new(Code::HostImaBootAggregate, "entry 0").expected(expected);
        return Err(finding.actual(hex::encode(fields.digest)));
    }
    Ok(true)
}
