//! The measurement log and the TPM's registers as somebody else than the proxy sees them: the file read with the
//! `evidence` crate, the registers with tpm2-tools.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail, ensure};
use onequote_evidence::digest::HashAlg;
use onequote_evidence::event::Event;
use onequote_evidence::log::{LogReader, Replay};
use onequote_evidence::pcr::{Register, Registers};
use onequote_evidence::record::Record;

use super::command;
use super::world::World;

/// One epoch's log, read and replayed as far as its records are whole.
#[derive(Debug, Default)]
pub struct LogView {
    /// The file's bytes.
    pub bytes: Vec<u8>,
    /// How many of them are whole records; behind them is at most one torn one.
    pub whole: usize,
    /// The records.
    pub records: Vec<Record>,
    replay: Option<Replay>,
    before_last: Registers,
}

impl LogView {
    /// Takes in the file as it is now. What was whole before must be there still.
    ///
    /// # Errors
    /// It isn't, or what is new are no records. A torn record at the end is no error.
    pub fn grow(&mut self, bytes: Vec<u8>) -> Result<()> {
        ensure!(
            bytes.starts_with(&self.bytes[..self.whole]),
            "records that were written before are not there any more"
        );
        let mut reader = LogReader::new(&bytes[self.whole..], self.records.len() as u64);
        for record in reader.by_ref() {
            let record = match record {
                Ok(record) => record,
                Err(torn) if torn.is_truncated() => break,
                Err(error) => return Err(error.into()),
            };
            match &mut self.replay {
                None => self.replay = Some(Replay::begin(&record)?),
                Some(replay) => {
                    self.before_last = replay.registers().clone();
                    replay.apply(&record)?;
                }
            }
            self.records.push(record);
        }
        self.whole += reader.offset();
        self.bytes = bytes;
        Ok(())
    }

    /// All events in order.
    ///
    /// # Errors
    /// A record's content is not a list of events.
    pub fn events(&self) -> Result<Vec<Event>> {
        self.events_from(0)
    }

    /// The events of the records from number `first` on.
    ///
    /// # Errors
    /// As [`Self::events`].
    pub fn events_from(&self, first: usize) -> Result<Vec<Event>> {
        let mut events = Vec::new();
        for record in self.records.iter().skip(first) {
            events.extend(record.events().with_context(|| format!("record {}", record.recnum))?);
        }
        Ok(events)
    }

    /// How many events of this kind there are.
    ///
    /// # Errors
    /// As [`Self::events`].
    pub fn count(&self, kind: &str) -> Result<usize> {
        Ok(self.events()?.iter().filter(|event| event.body.kind() == kind).count())
    }

    /// How many of the last whole records the TPM has not seen: 0, or 1 after a crash between append and extend.
    ///
    /// # Errors
    /// Neither explains the TPM's registers.
    pub fn behind(&self, registers: &Registers) -> Result<usize> {
        let explains = |after: &Registers| {
            !after.is_empty()
                && registers.len() == after.len()
                && after.iter().all(|(r, v)| registers.get(r) == Some(v))
        };
        let replay = self.replay.as_ref().context("the log has no record")?;
        if explains(replay.registers()) {
            return Ok(0);
        }
        if explains(&self.before_last) {
            return Ok(1);
        }
        bail!("neither all {} records nor all but one explain the TPM's registers {registers:?}", self.records.len())
    }
}

impl World {
    /// The numbers of the proxy's logs.
    ///
    /// # Errors
    /// There is no folder of logs.
    pub fn epochs(&self) -> Result<Vec<u64>> {
        let mut epochs = Vec::new();
        for item in fs::read_dir(self.proxy_state().join("log"))? {
            let name = item?.file_name().to_string_lossy().into_owned();
            // `epoch-N.cel`, or `epoch-N.from-BYTE.cel` where an earlier file was dropped.
            let number = name.strip_prefix("epoch-").and_then(|n| n.strip_suffix(".cel")?.split('.').next());
            epochs.extend(number.and_then(|number| number.parse::<u64>().ok()));
        }
        epochs.sort_unstable();
        epochs.dedup();
        Ok(epochs)
    }

    /// The file of the newest log.
    ///
    /// # Errors
    /// There is none.
    pub fn log_file(&self) -> Result<PathBuf> {
        let newest = self.epochs()?.last().copied().context("there is no log yet")?;
        Ok(self.proxy_state().join(format!("log/epoch-{newest:08}.cel")))
    }

    /// The newest log. A torn record at its end is left out, anything else that is wrong is an error.
    ///
    /// # Errors
    /// The log is none.
    pub fn read_log(&self) -> Result<LogView> {
        let mut log = LogView::default();
        log.grow(fs::read(self.log_file()?)?)?;
        Ok(log)
    }

    /// PCR 12 and 13 in all banks that the TPM has, as `tpm2_pcrread` prints them. Not while the proxy is in the middle
    /// of something: a TPM without resource manager is everybody's.
    ///
    /// # Errors
    /// tpm2-tools are missing, or the TPM does not answer.
    pub fn tpm_registers(&self) -> Result<Registers> {
        let selection = HashAlg::ALL.map(|bank| format!("{}:12,13", bank.name())).join("+");
        let text = command::text(command::program("tpm2_pcrread").args(["-T", &self.tcti()]).arg(&selection))?;
        parse_pcrread(&text)
    }

    /// The newest log, when it is whole and its replay has exactly the TPM's values.
    ///
    /// # Errors
    /// It isn't.
    pub fn bound_log(&self) -> Result<LogView> {
        let log = self.read_log()?;
        ensure!(log.whole == log.bytes.len(), "the log ends with a torn record");
        ensure!(log.behind(&self.tpm_registers()?)? == 0, "the TPM has not seen the log's last record");
        Ok(log)
    }
}

/// Lines `sha256:` and below each `12: 0x…`.
fn parse_pcrread(text: &str) -> Result<Registers> {
    let mut registers = Registers::new();
    let mut bank = None;
    for line in text.lines() {
        let (key, value) = line.trim().split_once(':').context("tpm2_pcrread prints something else")?;
        match value.trim().strip_prefix("0x") {
            None => bank = HashAlg::ALL.into_iter().find(|bank| bank.name() == key),
            Some(value) => {
                let bank = bank.context("tpm2_pcrread prints a value without its bank")?;
                registers.insert(Register { bank, pcr: key.trim().parse()? }, hex::decode(value)?);
            }
        }
    }
    ensure!(!registers.is_empty(), "tpm2_pcrread printed no register");
    Ok(registers)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_read_as_printed() {
        let text = "  sha1:\n    12: 0x00\n  sha256:\n    12: 0xAB\n    13: 0x0102\n";
        let registers = parse_pcrread(text).unwrap();
        assert_eq!(registers.len(), 3);
        assert_eq!(registers[&Register { bank: HashAlg::Sha256, pcr: 13 }], [1, 2]);
        assert!(parse_pcrread("").is_err());
    }
}
