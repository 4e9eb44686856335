//! Shows a firmware event log in words.

use std::path::Path;

use onequote_evidence::{
    digest::HashAlg,
    firmware::{FirmwareLog, Format},
    pcr::Register,
};

use super::{
    commands::{CliError, read_evidence, say},
    table,
};
use crate::appraise::Received;

/// A zstd frame's first bytes: saved evidence, which a firmware log cannot begin with (its register would be none).
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Prints events and register values of a log, or of the log in saved evidence. Nothing is appraised.
pub(super) fn show(path: &Path, bank: Option<HashAlg>) -> Result<(), CliError> {
    let mut bytes = read_evidence(path)?;
    if bytes.starts_with(&ZSTD) {
        let received = Received::read(&bytes).map_err(|finding| CliError::NotWhole(table::finding(&finding)))?;
        bytes = received.logs.firmware.items;
    }
    if bytes.is_empty() {
        return Err(CliError::Usage(format!("{} holds no firmware log", path.display())));
    }
    let log = FirmwareLog::parse(&bytes).map_err(|e| CliError::Usage(format!("{}: {e}", path.display())))?;
    let bank = match bank {
        Some(bank) if log.banks().contains(&bank) => bank,
        Some(bank) => return Err(CliError::Usage(format!("the log has no {bank} digest of each event"))),
        None => log.banks().iter().copied().find(|bank| *bank == HashAlg::Sha256).unwrap_or_else(|| first(&log)),
    };
    say(&text(&log, bank))
}

fn first(log: &FirmwareLog<'_>) -> HashAlg {
    log.banks().first().copied().unwrap_or(HashAlg::Sha256)
}

fn text(log: &FirmwareLog<'_>, bank: HashAlg) -> String {
    let form = match log.format() {
        Format::Sha1 => "SHA-1",
        Format::CryptoAgile => "crypto-agile",
    };
    let banks: Vec<&str> = log.banks().iter().map(|bank| bank.name()).collect();
    let mut out = format!(
        "{form} log of {} bytes; banks: {}; started at locality {}\n",
        log.content_len(),
        banks.join(", "),
        log.startup_locality()
    );
    out += &table::firmware(log, bank);
    out += "\nregisters after it:\n";
    for pcr in log.extended() {
        if let Some(value) = log.value(Register { bank, pcr }) {
            out += &format!("  {bank}:{pcr:<2} {}\n", hex::encode(value));
        }
    }
    out
}
