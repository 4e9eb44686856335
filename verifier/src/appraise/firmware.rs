//! Step 6: the firmware's event log, which explains the registers of the boot, and the rules about it.
//!
//! The log is replayed in every quoted bank that it has. A register whose replay is the quoted value is *explained*:
//! its events are what was extended, in this order, and nothing is missing. Only explained registers are judged by
//! rules. IMA's register and the log's own two go on after the boot, so that they are not compared here: the log's must
//! begin with what the boot left in them, which [`super::log::check_history`] looks at [`History`] for.
//!
//! All of it hangs on log, registers of the boot, the start of the measurement log, and rules: [`Outcome`] holds for as long
//! as none of these is another, and is small, so that the log itself need not be kept at hand.

use std::collections::{BTreeMap, BTreeSet};

use sha2::Digest as _;

use onequote_evidence::{
    digest::HashAlg,
    event::ProxyStart,
    firmware::{Event, FirmwareLog, Meaning},
    id::Sha256,
    pcr::{QUOTED_PCRS, Register},
};

use super::{found::Notes, registers::QuotedRegisters};
use crate::{
    finding::{Code, Finding},
    policy::{FirmwareRule, HostRule, Runtime},
    result::Skipped,
};

mod rules;

pub use rules::judge;

/// The bank by which everything is judged: the one that every quote has.
pub const BANK: HashAlg = HashAlg::Sha256;

/// The check that is skipped where there are no rules about the boot.
pub(super) const RULES: &str = "firmware-rules";

const IMA_PCR: u8 = 10;

/// Registers that only others extend: events of them cannot be the firmware's. PCR 16 and 23 can be reset by anybody.
const FOREIGN: [u8; 3] = [IMA_PCR, 16, 23];

/// A log as far as the quote proves it.
#[derive(Debug, Clone)]
pub struct Boot<'a> {
    log: FirmwareLog<'a>,
    /// Registers whose replay in [`BANK`] is the quoted value.
    explained: BTreeSet<u8>,
}

impl<'a> Boot<'a> {
    /// A log that [`check`] has seen, with the registers that it explained.
    pub(super) fn again(bytes: &'a [u8], explained: &BTreeSet<u8>) -> Option<Self> {
        Some(Self { log: FirmwareLog::parse(bytes).ok()?, explained: explained.clone() })
    }

    /// The log. Its events are proven for [`Boot::explained`] only.
    #[must_use]
    pub fn log(&self) -> &FirmwareLog<'a> {
        &self.log
    }

    /// Registers whose every extend is in the log.
    #[must_use]
    pub fn explained(&self) -> &BTreeSet<u8> {
        &self.explained
    }

    /// The events that extended an explained register; none for another.
    #[must_use]
    pub fn extends(&self, pcr: u8) -> Option<Vec<&Event<'a>>> {
        self.explained.contains(&pcr).then(|| self.log.extends(pcr).collect())
    }

    /// The events that lead to `value`, which a register of the measurement log held when that log began.
    #[must_use]
    pub fn history(&self, pcr: u8, value: &[u8]) -> Option<Vec<&Event<'a>>> {
        let replayed = self.log.value(Register { bank: BANK, pcr })?;
        (replayed == value).then(|| self.log.extends(pcr).collect())
    }
}

/// What the firmware's event log, or that there is none, comes to.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Bytes of the log.
    pub len: u64,
    /// Whether there is a log that can be read.
    pub readable: bool,
    /// What is wrong with the log.
    pub findings: Vec<Finding>,
    /// What of it was not checked.
    pub skipped: Vec<Skipped>,
    /// What the rules about the boot find.
    pub judged: Vec<Finding>,
    /// What rules that are kept rely on.
    pub notes: Vec<String>,
    /// What it says of the measurement log's registers.
    pub history: BTreeMap<u8, History>,
    /// Registers that it explains.
    pub explained: BTreeSet<u8>,
    /// Over the registers that it was held against.
    registers: Sha256,
}

/// What the firmware's event log says of a register of the measurement log, before that began.
#[derive(Debug, Clone)]
pub struct History {
    /// Whether it has events that extended it.
    pub extended: bool,
    /// The events that lead to what the register held, if they do.
    pub explained: Option<Explained>,
}

/// Events of a boot stub that explain a register.
#[derive(Debug, Clone)]
pub struct Explained {
    /// Whether the policy knows every one.
    pub allowed: bool,
    /// The events for people.
    pub words: String,
}

impl Outcome {
    /// Replays and judges the log. The caller must trust `quoted`, and `start` to be replayed to them.
    #[must_use]
    pub fn of(bytes: &[u8], quoted: &QuotedRegisters, start: &ProxyStart, rule: &HostRule) -> Self {
        let (mut skipped, mut notes) = (Vec::new(), Notes::default());
        let (boot, findings) = check(bytes, quoted, start, rule, &mut skipped);
        let mut judged = Vec::new();
        match &rule.firmware {
            Some(rule) => judged = judge(rule, boot.as_ref(), &mut notes),
            None if boot.is_some() => {
                let why = "the policy has no rules about the boot ([host.firmware])";
                skipped.push(Skipped::new(RULES, why));
            }
            None => {}
        }
        let mut history = BTreeMap::new();
        for item in start.history.iter().filter(|item| item.bank == BANK) {
            let Some(boot) = &boot else { break };
            let explained = boot.history(item.pcr, &item.value.0).map(|events| Explained {
                allowed: stub_allows(rule.firmware.as_ref(), &events),
                words: in_words(boot, &events),
            });
            history.insert(item.pcr, History { extended: boot.log.is_extended(item.pcr), explained });
        }
        Self {
            len: bytes.len() as u64,
            readable: boot.is_some(),
            findings,
            skipped,
            judged,
            notes: notes.finish(),
            history,
            explained: boot.map(|boot| boot.explained).unwrap_or_default(),
            registers: digest(quoted, start),
        }
    }

    /// Whether it holds for these registers too. Log, rule and `start` must be those that it was made for.
    #[must_use]
    pub fn holds_for(&self, quoted: &QuotedRegisters, start: &ProxyStart) -> bool {
        self.registers == digest(quoted, start)
    }
}

/// Over the registers that [`check`] looks at.
fn digest(quoted: &QuotedRegisters, start: &ProxyStart) -> Sha256 {
    let others = [IMA_PCR, start.pcr_vm, start.pcr_guest];
    let mut hasher = sha2::Sha256::new();
    for (register, value) in quoted.values().iter().filter(|(register, _)| !others.contains(&register.pcr)) {
        hasher.update(register.bank.tpm_id().to_be_bytes());
        hasher.update([register.pcr]);
        // The bank says how long it is.
        hasher.update(value);
    }
    Sha256(hasher.finalize().into())
}

/// Replays the log. The caller must trust `quoted`, and `start` to be replayed to them.
#[must_use]
pub fn check<'a>(
    bytes: &'a [u8],
    quoted: &QuotedRegisters,
    start: &ProxyStart,
    rule: &HostRule,
    skipped: &mut Vec<Skipped>,
) -> (Option<Boot<'a>>, Vec<Finding>) {
    let boot = rule.firmware.as_ref();
    let (parsed, mut findings) = read(bytes, quoted, start, boot, skipped);
    let Some(log) = parsed else { return (None, consented(findings, boot, skipped)) };
    for bank in quoted.banks() {
        if !log.banks().contains(&bank) {
            let has: Vec<&str> = log.banks().iter().map(|bank| bank.name()).collect();
            let has = if has.is_empty() { "no whole bank".to_owned() } else { has.join(", ") };
            findings.push(Finding::new(Code::FirmwareLogBank, bank.name()).actual(has));
        }
    }
    let ours = [start.pcr_vm, start.pcr_guest];
    let mut explained = BTreeSet::new();
    for (register, value) in quoted.values() {
        if register.pcr == IMA_PCR || ours.contains(&register.pcr) {
            continue;
        }
        let Some(replayed) = log.value(*register) else { continue };
        if replayed == value {
            if register.bank == BANK {
                explained.insert(register.pcr);
            }
        } else if boot.is_some_and(|boot| boot.unexplained.iter().any(|pcr| pcr.0 == register.pcr)) {
            skipped.push(Skipped::new(
                "firmware-log",
                format!("{register} is not what the log gives, as the policy expects"),
            ));
        } else {
            let finding = Finding::new(Code::FirmwareLogReplay, register.to_string());
            findings.push(finding.expected(hex::encode(value)).actual(hex::encode(replayed)));
        }
    }
    let (foreign, unquoted): (Vec<u8>, Vec<u8>) = log
        .extended()
        .into_iter()
        .filter(|pcr| !ours.contains(pcr))
        .filter(|pcr| *pcr == IMA_PCR || !quoted.values().contains_key(&Register { bank: BANK, pcr: *pcr }))
        .partition(|pcr| FOREIGN.contains(pcr));
    for pcr in foreign {
        let number = log.extends(pcr).next().map_or(0, |event| event.number);
        findings.push(Finding::new(Code::FirmwareLogRegister, format!("PCR {pcr}")).actual(format!("event {number}")));
    }
    if !unquoted.is_empty() {
        let list = unquoted.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        skipped.push(Skipped::new(
            "firmware-log",
            format!("PCR {list} is not quoted: what the log says of it is not proven"),
        ));
    }
    (Some(Boot { log, explained }), consented(findings, boot, skipped))
}

/// Reads the log; without one there is a finding where there should be one.
fn read<'a>(
    bytes: &'a [u8],
    quoted: &QuotedRegisters,
    start: &ProxyStart,
    boot: Option<&FirmwareRule>,
    skipped: &mut Vec<Skipped>,
) -> (Option<FirmwareLog<'a>>, Vec<Finding>) {
    if !bytes.is_empty() {
        return match FirmwareLog::parse(bytes) {
            Ok(log) => (Some(log), Vec::new()),
            Err(e) => (None, vec![Finding::new(Code::FirmwareLogMalformed, "firmware log").actual(e)]),
        };
    }
    let ours = [start.pcr_vm, start.pcr_guest, IMA_PCR];
    let used: Vec<String> = (QUOTED_PCRS.iter().filter(|pcr| !ours.contains(pcr)))
        .filter(|&&pcr| quoted.sha256(pcr).is_some_and(|value| value != Sha256::ZERO))
        .map(ToString::to_string)
        .collect();
    let finding = Finding::new(Code::FirmwareLogMissing, "firmware log");
    if !used.is_empty() {
        return (None, vec![finding.actual(format!("PCR {} were extended", used.join(", ")))]);
    }
    if boot.is_some_and(|boot| boot.log != Some(Runtime::Optional)) {
        return (None, vec![finding]);
    }
    skipped.push(Skipped::new("firmware-log", "the host sent none, and no firmware has extended its TPM"));
    (None, Vec::new())
}

/// Where the policy does not demand a log, what is wrong with it is noted only. A foreign register stays a finding.
fn consented(findings: Vec<Finding>, boot: Option<&FirmwareRule>, skipped: &mut Vec<Skipped>) -> Vec<Finding> {
    if boot.is_none_or(|boot| boot.log != Some(Runtime::Optional)) {
        return findings;
    }
    let (kept, noted) = findings.into_iter().partition(|finding| finding.code == Code::FirmwareLogRegister);
    for Finding { code, item, .. } in noted {
        skipped.push(Skipped::new("firmware-log", format!("{code}: {item}; the policy demands no log")));
    }
    kept
}

/// An event for people: its number, and what it is.
fn shown(log: &FirmwareLog<'_>, event: &Event<'_>) -> String {
    format!("event {}, {}", event.number, log.describe(event, BANK))
}

/// What a boot stub measured before the proxy: the events, when the policy knows every one of them.
#[must_use]
pub fn stub_allows(rule: Option<&FirmwareRule>, events: &[&Event<'_>]) -> bool {
    let Some(known) = rule.and_then(|rule| rule.stub.as_ref()) else { return false };
    events.iter().all(|event| {
        let digest = event.digest(BANK);
        known.iter().any(|one| digest == Some(one.digest.as_bytes()))
    })
}

/// The events in words, for a finding about what they left in a register.
#[must_use]
pub fn in_words(boot: &Boot<'_>, events: &[&Event<'_>]) -> String {
    events.iter().map(|event| shown(&boot.log, event)).collect::<Vec<_>>().join("; ")
}

/// Whether an event is nothing but the text that its digest proves.
fn is_text(event: &Event<'_>) -> bool {
    matches!(event.meaning(BANK), Meaning::Text(_))
}
