//! `TPMS_ATTEST` of a quote (TPM 2.0 Part 2, section 10.12.12).

use std::collections::BTreeSet;

use crate::{
    Malformed,
    digest::{HashAlg, sha256},
    pcr::Register,
    reader::Reader,
};

const WHAT: &str = "TPMS_ATTEST";

/// `TPM_GENERATED_VALUE`: what a TPM signs begins with it, and nothing else that a restricted key signs does.
const TPM_GENERATED: u32 = 0xff54_4347;

/// `TPM_ST_ATTEST_QUOTE`.
const ST_ATTEST_QUOTE: u16 = 0x8018;

/// The most banks in a selection (`HASH_COUNT` of real TPMs is at most 5).
const MAX_BANKS: u32 = 16;

/// A quote: what a TPM says about its registers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attest {
    /// Qualified name of the key that signed.
    pub qualified_signer: Vec<u8>,
    /// The qualifying data that the caller of `TPM2_Quote` gave; 0 to 64 bytes.
    pub extra_data: Vec<u8>,
    /// The TPM's clock and counters.
    pub clock: ClockInfo,
    /// Vendor's firmware version.
    pub firmware_version: u64,
    /// The registers that were quoted. This is what to trust, not what came beside the quote.
    pub selection: PcrSelection,
    /// Digest over the quoted registers' values, with the hash algorithm of the signing scheme.
    pub pcr_digest: Vec<u8>,
}

/// `TPMS_CLOCK_INFO`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
#[cfg_attr(feature = "json", derive(serde::Serialize, serde::Deserialize))]
pub struct ClockInfo {
    /// Milliseconds that the TPM was powered since it was last cleared.
    #[n(0)]
    pub clock: u64,
    /// Number of TPM Resets since it was last cleared.
    #[n(1)]
    pub reset_count: u32,
    /// Number of TPM Restarts and Resumes since the last Reset or clear.
    #[n(2)]
    pub restart_count: u32,
    /// Whether no greater clock was ever reported than `clock`.
    #[n(3)]
    pub safe: bool,
}

/// `TPML_PCR_SELECTION`: banks in the order in which they were quoted, each with its registers ascending.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PcrSelection {
    /// Bank by `TPM_ALG_ID` (a bank of an unknown algorithm is kept by its number) and its registers.
    pub banks: Vec<(u16, BTreeSet<u8>)>,
}

impl Attest {
    /// Reads a `TPMS_ATTEST` that is a quote and fills `bytes`.
    ///
    /// # Errors
    /// [`Malformed`], also when it is signed data of another type.
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(WHAT, bytes);
        if r.u32_be()? != TPM_GENERATED {
            return Err(Malformed::invalid(WHAT, 0, "magic is not TPM_GENERATED_VALUE"));
        }
        if r.u16_be()? != ST_ATTEST_QUOTE {
            return Err(Malformed::invalid(WHAT, 4, "type is not TPM_ST_ATTEST_QUOTE"));
        }
        let qualified_signer = r.tpm2b(2 + 64)?.to_vec();
        let extra_data = r.tpm2b(64)?.to_vec();
        let clock = ClockInfo {
            clock: r.u64_be()?,
            reset_count: r.u32_be()?,
            restart_count: r.u32_be()?,
            safe: yes_no(&mut r)?,
        };
        let firmware_version = r.u64_be()?;
        let selection = PcrSelection::read(&mut r)?;
        let pcr_digest = r.tpm2b(64)?.to_vec();
        r.end()?;
        Ok(Self { qualified_signer, extra_data, clock, firmware_version, selection, pcr_digest })
    }
}

impl PcrSelection {
    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        let count = r.u32_be()?;
        if count > MAX_BANKS {
            return Err(r.invalid("more banks than a TPM can have"));
        }
        let mut banks: Vec<(u16, BTreeSet<u8>)> = Vec::new();
        for _ in 0..count {
            let alg = r.u16_be()?;
            if banks.iter().any(|(other, _)| *other == alg) {
                return Err(r.invalid("a bank is selected twice"));
            }
            let size = usize::from(r.u8()?);
            if size > 4 {
                return Err(r.invalid("selection of more than 32 registers"));
            }
            let bits = r.take(size)?;
            let pcrs = (0..8 * size).filter(|i| bits[i / 8] >> (i % 8) & 1 == 1).map(|i| i as u8).collect();
            banks.push((alg, pcrs));
        }
        Ok(Self { banks })
    }

    /// Whether exactly these registers are selected, in these banks and no other. A bank that is listed with no
    /// register does not count as selected.
    #[must_use]
    pub fn is_exactly(&self, expected: &BTreeSet<Register>) -> bool {
        let total: usize = self.banks.iter().map(|(_, pcrs)| pcrs.len()).sum();
        total == expected.len()
            && expected
                .iter()
                .all(|r| self.banks.iter().any(|(alg, pcrs)| *alg == r.bank.tpm_id() && pcrs.contains(&r.pcr)))
    }

    /// The digest that a quote over this selection has for these values, with SHA-256 as the scheme's hash: over the
    /// values in the order of the banks and, in each, of the registers (TPM 2.0 Part 1, section 17.5).
    /// `None` when a value is missing.
    #[must_use]
    pub fn digest_sha256(&self, values: &crate::pcr::Registers) -> Option<crate::id::Sha256> {
        let mut parts: Vec<&[u8]> = Vec::new();
        for (alg, pcrs) in &self.banks {
            if pcrs.is_empty() {
                continue;
            }
            let bank = HashAlg::from_tpm(*alg)?;
            for &pcr in pcrs {
                parts.push(values.get(&Register { bank, pcr })?);
            }
        }
        Some(sha256(&parts))
    }

    #[cfg(test)]
    pub(super) fn of(bank: HashAlg, pcrs: &[u8]) -> Self {
        Self { banks: vec![(bank.tpm_id(), pcrs.iter().copied().collect())] }
    }
}

fn yes_no(r: &mut Reader<'_>) -> Result<bool, Malformed> {
    match r.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(r.invalid("TPMI_YES_NO is neither 0 nor 1")),
    }
}
