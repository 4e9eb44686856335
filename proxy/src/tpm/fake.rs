//! A TPM in memory: true registers, quotes without a signature, faults on request.

use std::sync::{Arc, Mutex, MutexGuard};

use onequote_evidence::{
    digest::{BankDigest, HashAlg, sha256},
    pcr::{self, PCR_COUNT, Register, Registers},
};

use super::{Clock, Quote, Tpm, TpmError, TpmErrorKind};

/// The chip: survives the connections to it. Clones share it.
#[derive(Clone)]
pub(crate) struct FakeChip(Arc<Mutex<Chip>>);

struct Chip {
    banks: Vec<HashAlg>,
    registers: Registers,
    reset_count: u32,
    restart_count: u32,
    extends: u64,
    quotes: u64,
    /// Asked before each command with its name; what it answers happens.
    fault: Option<Box<dyn FnMut(&'static str) -> Fault + Send>>,
}

/// What happens to a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It works.
    None,
    /// It fails and was not carried out.
    Before,
    /// It fails but was carried out.
    After,
}

impl FakeChip {
    pub(crate) fn new(banks: &[HashAlg]) -> Self {
        let chip = Chip {
            banks: banks.to_vec(),
            registers: Registers::new(),
            reset_count: 1,
            restart_count: 0,
            extends: 0,
            quotes: 0,
            fault: None,
        };
        let this = Self(Arc::new(Mutex::new(chip)));
        this.clear();
        this
    }

    /// A connection, as a factory of TPMs makes it.
    pub(crate) fn connect(&self) -> Result<Box<dyn Tpm>, TpmError> {
        self.lock().command("connect", |_| ())?;
        Ok(Box::new(FakeTpm(self.clone())))
    }

    /// Loss of power.
    pub(crate) fn reset(&self) {
        self.clear();
        let mut chip = self.lock();
        chip.reset_count += 1;
        chip.restart_count = 0;
    }

    /// `TPM2_Shutdown(STATE)`, then `TPM2_Startup(STATE)`: registers stay.
    pub(crate) fn resume(&self) {
        self.lock().restart_count += 1;
    }

    /// `TPM2_Shutdown(STATE)`, then `TPM2_Startup(CLEAR)`: registers begin anew, the count of resets stays.
    pub(crate) fn restart(&self) {
        self.clear();
        self.lock().restart_count += 1;
    }

    /// An extend by somebody else.
    pub(crate) fn foreign_extend(&self, pcr: u8) {
        let mut chip = self.lock();
        for bank in chip.banks.clone() {
            let value = chip.registers.get_mut(&Register { bank, pcr }).unwrap();
            pcr::extend(bank, value, &bank.hash(b"somebody else"));
        }
    }

    pub(crate) fn set_fault(&self, fault: impl FnMut(&'static str) -> Fault + Send + 'static) {
        self.lock().fault = Some(Box::new(fault));
    }

    pub(crate) fn clear_fault(&self) {
        self.lock().fault = None;
    }

    pub(crate) fn registers(&self, pcrs: &[u8]) -> Registers {
        self.lock().registers.iter().filter(|(r, _)| pcrs.contains(&r.pcr)).map(|(r, v)| (*r, v.clone())).collect()
    }

    /// Extends and quotes carried out so far.
    pub(crate) fn counts(&self) -> (u64, u64) {
        let chip = self.lock();
        (chip.extends, chip.quotes)
    }

    fn clear(&self) {
        let mut chip = self.lock();
        chip.registers = chip
            .banks
            .iter()
            .flat_map(|&bank| (0..PCR_COUNT).map(move |pcr| (Register { bank, pcr }, pcr::zeros(bank))))
            .collect();
    }

    fn lock(&self) -> MutexGuard<'_, Chip> {
        self.0.lock().unwrap()
    }
}

impl Chip {
    fn command<T>(&mut self, name: &'static str, run: impl FnOnce(&mut Self) -> T) -> Result<T, TpmError> {
        let fault = self.fault.as_mut().map_or(Fault::None, |fault| fault(name));
        let kind = TpmErrorKind::Gone { code: 0x000A_000A, hint: String::new() };
        let error = TpmError { tcti: "fake:".to_owned(), command: name, kind };
        match fault {
            Fault::None => Ok(run(self)),
            Fault::Before => Err(error),
            Fault::After => {
                run(self);
                Err(error)
            }
        }
    }
}

struct FakeTpm(FakeChip);

impl Tpm for FakeTpm {
    fn active_banks(&mut self) -> Result<Vec<HashAlg>, TpmError> {
        self.0.lock().command("active_banks", |chip| chip.banks.clone())
    }

    fn pcr_read(&mut self, registers: &[Register]) -> Result<Registers, TpmError> {
        self.0.lock().command("pcr_read", |chip| registers.iter().map(|r| (*r, chip.registers[r].clone())).collect())
    }

    fn extend(&mut self, pcr: u8, digests: &[BankDigest]) -> Result<(), TpmError> {
        self.0.lock().command("extend", |chip| {
            assert_eq!(digests.iter().map(|d| d.alg).collect::<Vec<_>>(), chip.banks, "every bank is extended");
            for digest in digests {
                let value = chip.registers.get_mut(&Register { bank: digest.alg, pcr }).unwrap();
                pcr::extend(digest.alg, value, &digest.value.0);
            }
            chip.extends += 1;
        })
    }

    fn quote(&mut self, qualifying_data: &[u8], registers: &[Register]) -> Result<Quote, TpmError> {
        self.0.lock().command("quote", |chip| {
            chip.quotes += 1;
            Quote { attest: attest(chip, qualifying_data, registers), signature: b"none".to_vec() }
        })
    }

    fn clock(&mut self) -> Result<Clock, TpmError> {
        self.0.lock().command("clock", |chip| Clock {
            clock: 1000,
            reset_count: chip.reset_count,
            restart_count: chip.restart_count,
            safe: true,
        })
    }

    fn ak_public(&self) -> &[u8] {
        b"no key"
    }

    fn is_software(&self) -> bool {
        true
    }

    fn model(&self) -> &str {
        "fake"
    }
}

/// `TPMS_ATTEST` of a quote (TPM 2.0 Part 2, section 10.12.12).
fn attest(chip: &Chip, qualifying_data: &[u8], registers: &[Register]) -> Vec<u8> {
    let mut out = Vec::new();
    let sized = |out: &mut Vec<u8>, bytes: &[u8]| {
        out.extend(u16::try_from(bytes.len()).unwrap().to_be_bytes());
        out.extend(bytes);
    };
    out.extend(0xFF54_4347_u32.to_be_bytes());
    out.extend(0x8018_u16.to_be_bytes());
    sized(&mut out, &[&[0, 0x0B], [0; 32].as_slice()].concat());
    sized(&mut out, qualifying_data);
    out.extend(1000_u64.to_be_bytes());
    out.extend(chip.reset_count.to_be_bytes());
    out.extend(chip.restart_count.to_be_bytes());
    out.push(1);
    out.extend(0_u64.to_be_bytes());
    let mut registers = registers.to_vec();
    registers.sort_unstable();
    let banks: Vec<HashAlg> = chip.banks.iter().copied().filter(|b| registers.iter().any(|r| r.bank == *b)).collect();
    out.extend(u32::try_from(banks.len()).unwrap().to_be_bytes());
    for bank in banks {
        let mut bits = [0_u8; 3];
        for register in registers.iter().filter(|r| r.bank == bank) {
            bits[usize::from(register.pcr / 8)] |= 1 << (register.pcr % 8);
        }
        out.extend(bank.tpm_id().to_be_bytes());
        out.push(3);
        out.extend(bits);
    }
    let values: Vec<&[u8]> = registers.iter().map(|r| chip.registers[r].as_slice()).collect();
    sized(&mut out, &sha256(&values).0);
    out
}
