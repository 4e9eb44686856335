//! Platform configuration registers: names, values, extend.

use std::{collections::BTreeMap, fmt};

use minicbor::{Decode, Encode};

use crate::{
    digest::HashAlg,
    id::{Blob, Sha256},
};

/// Number of PCRs of a PC-client TPM (TCG PC Client Platform TPM Profile, section 4.6).
pub const PCR_COUNT: u8 = 24;

/// Host and VM life cycle, unless configured otherwise.
pub const DEFAULT_PCR_VM: u8 = 12;

/// Guest run time, unless configured otherwise.
pub const DEFAULT_PCR_GUEST: u8 = 13;

/// The registers that a quote covers: firmware and boot loader, IMA, ours, and shim's.
pub const QUOTED_PCRS: [u8; 14] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14];

/// The most registers that there are: all of every bank.
pub const MAX_REGISTERS: usize = PCR_COUNT as usize * HashAlg::ALL.len();

/// One register of one bank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Register {
    /// The bank.
    pub bank: HashAlg,
    /// The PCR's index, below [`PCR_COUNT`].
    pub pcr: u8,
}

impl fmt::Display for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:PCR{}", self.bank, self.pcr)
    }
}

/// A register with its value: CBOR array `[bank, pcr, value]`.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cfg_attr(feature = "json", derive(serde::Serialize, serde::Deserialize))]
pub struct RegisterValue {
    /// The bank.
    #[n(0)]
    pub bank: HashAlg,
    /// The PCR's index.
    #[n(1)]
    pub pcr: u8,
    /// The value, of the bank's digest size.
    #[n(2)]
    pub value: Blob,
}

/// Values of registers, of any banks, as computed or as read.
pub type Registers = BTreeMap<Register, Vec<u8>>;

/// What `TPM2_PCR_Extend` does to one register: `value ← H(value ‖ digest)` (TPM 2.0 Part 1, section 17.3).
pub fn extend(bank: HashAlg, value: &mut Vec<u8>, digest: &[u8]) {
    *value = bank.hash_parts(&[value, digest]);
}

/// The same for a SHA-256 value, without allocation.
#[must_use]
pub fn extend_sha256(value: &Sha256, digest: &Sha256) -> Sha256 {
    crate::digest::sha256(&[&value.0, &digest.0])
}

/// All bits zero: the value of PCR 0–15 after a TPM reset.
#[must_use]
pub fn zeros(bank: HashAlg) -> Vec<u8> {
    vec![0; bank.size()]
}

/// Register values as a list, in ascending order of bank and index.
#[must_use]
pub fn to_list(registers: &Registers) -> Vec<RegisterValue> {
    registers.iter().map(|(r, value)| RegisterValue { bank: r.bank, pcr: r.pcr, value: Blob(value.clone()) }).collect()
}

/// A list of register values as a map; `None` when a register stands twice, an index is too high or a value has not
/// its bank's size.
#[must_use]
pub fn from_list(list: &[RegisterValue]) -> Option<Registers> {
    let mut registers = Registers::new();
    for item in list {
        let fits = item.pcr < PCR_COUNT && item.value.0.len() == item.bank.size();
        let register = Register { bank: item.bank, pcr: item.pcr };
        if !fits || registers.insert(register, item.value.0.clone()).is_some() {
            return None;
        }
    }
    Some(registers)
}
