//! Step 5: that the TPM quoted the registers that were asked for, and that the values are those it signed.
//!
//! The selection is read from the signed structure. The values come beside it and are believed because their digest
//! is in it.

use std::collections::BTreeSet;

use onequote_evidence::{
    digest::HashAlg,
    id::Sha256,
    pcr::{self, QUOTED_PCRS, Register, RegisterValue, Registers},
};

use super::signature::Quoted;
use crate::finding::{Code, Finding};

/// Values that the TPM signed. Can be had only through [`check`].
#[derive(Debug, Clone)]
pub struct QuotedRegisters {
    values: Registers,
}

impl QuotedRegisters {
    /// The values.
    #[must_use]
    pub fn values(&self) -> &Registers {
        &self.values
    }

    /// The banks that were quoted, ascending.
    #[must_use]
    pub fn banks(&self) -> BTreeSet<HashAlg> {
        self.values.keys().map(|register| register.bank).collect()
    }

    /// The value of a register in the SHA-256 bank; none when it was not quoted.
    #[must_use]
    pub fn sha256(&self, pcr: u8) -> Option<Sha256> {
        let value = self.values.get(&Register { bank: HashAlg::Sha256, pcr })?;
        value.as_slice().try_into().ok().map(Sha256)
    }
}

/// The registers that a quote must cover: those of every quote and the log's two, in the SHA-256 bank.
#[must_use]
pub fn expected(pcr_vm: u8, pcr_guest: u8) -> BTreeSet<Register> {
    let ours = QUOTED_PCRS.into_iter().chain([pcr_vm, pcr_guest]);
    ours.map(|pcr| Register { bank: HashAlg::Sha256, pcr }).collect()
}

/// Checks selection and values.
///
/// # Errors
/// The finding.
pub fn check(
    quoted: &Quoted,
    values: &[RegisterValue],
    expected: &BTreeSet<Register>,
) -> Result<QuotedRegisters, Finding> {
    let attest = quoted.attest();
    if !attest.selection.is_exactly(expected) {
        let actual: Vec<String> = (attest.selection.banks.iter())
            .map(|(bank, pcrs)| {
                let bank = HashAlg::from_tpm(*bank).map_or_else(|| format!("{bank:#06x}"), |bank| bank.to_string());
                format!("{bank}:{}", list(pcrs.iter().copied()))
            })
            .collect();
        let finding = Finding::new(Code::PcrSelection, "PCR selection");
        let wanted = list(expected.iter().map(|r| r.pcr));
        return Err(finding.expected(format!("sha256:{wanted}")).actual(actual.join(" + ")));
    }
    let fail = |why: &str| Err(Finding::new(Code::PcrValues, "PCR values").actual(why));
    let Some(values) = pcr::from_list(values) else {
        return fail("a register stands twice, or has no value of its bank");
    };
    if !values.keys().eq(expected) {
        return fail("not exactly the quoted registers");
    }
    match attest.selection.digest_sha256(&values) {
        Some(digest) if digest.as_bytes() == attest.pcr_digest.as_slice() => Ok(QuotedRegisters { values }),
        digest => {
            let finding = Finding::new(Code::PcrValues, "PCR digest").expected(hex::encode(&attest.pcr_digest));
            Err(digest.map_or(finding.clone(), |digest| finding.actual(digest)))
        }
    }
}

fn list(pcrs: impl Iterator<Item = u8>) -> String {
    pcrs.map(|pcr| pcr.to_string()).collect::<Vec<_>>().join(",")
}
