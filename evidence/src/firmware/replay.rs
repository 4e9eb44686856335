//! From events to register values.

use std::collections::BTreeMap;

use crate::{
    digest::{HashAlg, MAX_DIGEST},
    pcr::{PCR_COUNT, Register, Registers},
};

use super::Event;

/// Extends all events into registers as a TPM reset leaves them: zeros, PCR 17 to 22 ones (PC Client Platform TPM
/// Profile, table 6), and the startup locality in the last byte of PCR 0.
pub(super) fn replay(events: &[Event<'_>], banks: &[HashAlg], locality: u8) -> Registers {
    let mut registers = BTreeMap::new();
    for &bank in banks {
        let size = bank.size();
        let mut values = [[0_u8; MAX_DIGEST]; PCR_COUNT as usize];
        values[17..=22].fill([0xff; MAX_DIGEST]);
        values[0][size - 1] = locality;
        for event in events.iter().filter(|event| event.is_extended()) {
            let value = usize::try_from(event.pcr).ok().and_then(|pcr| values.get_mut(pcr));
            let (Some(value), Some(digest)) = (value, event.digest(bank)) else { continue };
            let before = *value;
            bank.hash_into(&[&before[..size], digest], value);
        }
        for (pcr, value) in (0..PCR_COUNT).zip(&values) {
            registers.insert(Register { bank, pcr }, value[..size].to_vec());
        }
    }
    registers
}
