//! Step 8: that the measurement log is the one whose records went into the TPM.
//!
//! The records are replayed from the history in the first one. What comes out must be what the TPM quoted and what
//! the host states. The part that was accepted before must still be there, and be the same: registers are chains, so
//! that equal values after the same number of records mean equal records.

use onequote_evidence::{
    digest::HashAlg,
    event::{Event, EventBody, ProxyStart},
    id::Sha256,
    log::{LogError, LogErrorKind, LogReader, Replay},
    pcr::{self, Register, RegisterValue},
    statement::Statement,
    tpm::ClockInfo,
};

use super::{
    firmware::{self, Boot},
    registers::QuotedRegisters,
    state::Accepted,
};
use crate::{
    finding::{Code, Finding},
    policy::{HostRule, Pcr},
};

/// Events that went into the quoted registers, in order. Can be had only through [`check`].
#[derive(Debug, Clone)]
pub struct VerifiedLog {
    events: Vec<(u64, Event)>,
    start: ProxyStart,
    registers: Vec<RegisterValue>,
}

impl VerifiedLog {
    /// The events, each with the number of its record.
    #[must_use]
    pub fn events(&self) -> &[(u64, Event)] {
        &self.events
    }

    /// The event that the log begins with.
    #[must_use]
    pub fn start(&self) -> &ProxyStart {
        &self.start
    }

    /// Both registers in every bank, after the last record.
    #[must_use]
    pub fn registers(&self) -> &[RegisterValue] {
        &self.registers
    }
}

/// Replays `records`. The caller must trust `quoted` and `clock`, `statement` to be what the quote covers, and
/// `accepted` to be what it stored itself.
///
/// # Errors
/// The finding.
pub fn check(
    records: &[u8],
    quoted: &QuotedRegisters,
    statement: &Statement,
    clock: &ClockInfo,
    accepted: Option<&Accepted>,
    rule: &HostRule,
) -> Result<VerifiedLog, Finding> {
    let accepted = accepted.filter(|a| a.epoch == statement.epoch);
    let mut replay: Option<Replay> = None;
    let mut events = Vec::new();
    for record in LogReader::new(records, 0) {
        let record = record.map_err(|e| broken(&e))?;
        match &mut replay {
            Some(replay) => replay.apply(&record).map_err(|e| broken(&e))?,
            None => {
                let begun = Replay::begin(&record).map_err(|e| broken(&e))?;
                check_start(begun.start(), statement, clock, rule)?;
                replay = Some(begun);
            }
        }
        let content = record
            .events()
            .map_err(|e| Finding::new(Code::LogMalformed, format!("record {}", record.recnum)).actual(e))?;
        events.extend(content.into_iter().map(|event| (record.recnum, event)));
        if let (Some(replay), Some(accepted)) = (&replay, accepted)
            && replay.len() == accepted.records
            && pcr::to_list(replay.registers()) != accepted.registers
        {
            return Err(rolled_back(format!("records 0 to {}", accepted.records - 1), "other than before"));
        }
    }
    let Some(replay) = replay else {
        return Err(Finding::new(Code::LogLength, "record 0").expected(statement.log_len).actual("no record"));
    };
    if let Some(accepted) = accepted
        && replay.len() < accepted.records
    {
        return Err(rolled_back(format!("record {}", replay.len()), "missing"));
    }
    if replay.len() != statement.log_len {
        let first = replay.len().min(statement.log_len);
        let finding = Finding::new(Code::LogLength, format!("record {first}"));
        return Err(finding.expected(format!("{} records", statement.log_len)).actual(replay.len()));
    }
    compare(&replay, quoted, statement, accepted)?;
    for (recnum, event) in &events {
        if let EventBody::ProxyStart(start) = &event.body {
            check_start(start, statement, clock, rule).map_err(|mut finding| {
                finding.item = format!("record {recnum}");
                finding
            })?;
        }
    }
    let registers = pcr::to_list(replay.registers());
    Ok(VerifiedLog { events, start: replay.start().clone(), registers })
}

/// Holds the replayed registers against the quote and the statement.
fn compare(
    replay: &Replay,
    quoted: &QuotedRegisters,
    statement: &Statement,
    accepted: Option<&Accepted>,
) -> Result<(), Finding> {
    let as_stated = pcr::to_list(replay.registers()) == statement.registers;
    let from = accepted.map_or(0, |a| a.records);
    for (register, value) in replay.registers().iter().filter(|(r, _)| r.bank == HashAlg::Sha256) {
        let expected = quoted.sha256(register.pcr);
        if expected.is_some_and(|e| e.as_bytes() == value.as_slice()) {
            continue;
        }
        let code = if as_stated { Code::ForeignExtend } else { Code::LogReplay };
        let item = format!("PCR {}, records {from} to {}", register.pcr, replay.len() - 1);
        let finding = Finding::new(code, item).actual(hex::encode(value));
        return Err(expected.map_or(finding.clone(), |e| finding.expected(e)));
    }
    if !replay.registers().keys().any(|r| r.bank == HashAlg::Sha256) {
        return Err(Finding::new(Code::LogRegister, "record 0").expected("a sha256 bank").actual("none"));
    }
    if !as_stated {
        return Err(Finding::new(Code::LogReplay, "registers in the statement"));
    }
    Ok(())
}

fn check_start(start: &ProxyStart, statement: &Statement, clock: &ClockInfo, rule: &HostRule) -> Result<(), Finding> {
    let host = &statement.host;
    let finding = Finding::new(Code::LogStart, "record 0");
    if start.host != *host {
        return Err(finding.expected(host).actual(&start.host));
    }
    if start.epoch != statement.epoch {
        let show = |e: &onequote_evidence::id::Epoch| format!("epoch {} {}", e.number, e.id);
        return Err(finding.expected(show(&statement.epoch)).actual(show(&start.epoch)));
    }
    if start.reset_count != clock.reset_count {
        let finding = Finding::new(Code::EpochReused, "record 0").expected(clock.reset_count);
        return Err(finding.actual(start.reset_count));
    }
    if (start.pcr_vm, start.pcr_guest) != (rule.pcr_vm, rule.pcr_guest) {
        let show = |vm: u8, guest: u8| format!("PCR {vm} and {guest}");
        let finding = Finding::new(Code::LogRegister, "record 0").expected(show(rule.pcr_vm, rule.pcr_guest));
        return Err(finding.actual(show(start.pcr_vm, start.pcr_guest)));
    }
    Ok(())
}

/// Whether the epoch can follow the one last accepted.
///
/// # Errors
/// The finding.
pub fn check_epoch(statement: &Statement, clock: &ClockInfo, accepted: Option<&Accepted>) -> Result<(), Finding> {
    let Some(accepted) = accepted else { return Ok(()) };
    let (now, before) = (statement.epoch, accepted.epoch);
    if now == before {
        if clock.reset_count != accepted.clock.reset_count {
            return Err(Finding::new(Code::EpochReused, format!("epoch {}", now.number)));
        }
        return Ok(());
    }
    if now.number <= before.number {
        let finding = Finding::new(Code::EpochRollback, format!("epoch {}", now.number));
        return Err(finding.expected(format!("after {}", before.number)).actual(now.id));
    }
    Ok(())
}

/// What the log's registers held before it: zeros, or what the policy knows, or, without a TPM reset in between,
/// what was accepted last.
///
/// That the firmware's event log explains it is not enough. Whoever can write that log can list there whatever an
/// earlier log of ours extended and hide that log. The policy must know each of these events.
#[must_use]
pub fn check_history(
    start: &ProxyStart,
    clock: &ClockInfo,
    accepted: Option<&Accepted>,
    rule: &HostRule,
    boot: Option<&Boot<'_>>,
) -> Vec<Finding> {
    let same_log = accepted.filter(|a| a.epoch == start.epoch);
    let same_run = accepted.filter(|a| a.clock.reset_count == clock.reset_count);
    let mut findings = Vec::new();
    for item in start.history.iter().filter(|item| item.bank == HashAlg::Sha256) {
        let zeros = item.value.0.iter().all(|&byte| byte == 0);
        let by_policy = rule.history.get(&Pcr(item.pcr)).is_some_and(|known| {
            known.as_slice().iter().any(|value: &Sha256| value.as_bytes() == item.value.0.as_slice())
        });
        let before = same_run.and_then(|a| a.registers.iter().find(|r| r.bank == item.bank && r.pcr == item.pcr));
        let goes_on = before.is_some_and(|before| before.value == item.value);
        let register = Register { bank: item.bank, pcr: item.pcr };
        let events = boot.and_then(|boot| Some((boot, boot.history(item.pcr, &item.value.0)?)));
        let by_stub = events.as_ref().is_some_and(|(_, events)| firmware::stub_allows(rule.firmware.as_ref(), events));
        if zeros && boot.is_some_and(|boot| boot.log().is_extended(item.pcr)) {
            let finding = Finding::new(Code::FirmwareLogReplay, format!("{register} when the measurement log began"));
            findings.push(finding.expected(&item.value).actual("extended, by the firmware's event log"));
        } else if !(zeros || by_policy || goes_on || by_stub || same_log.is_some_and(|a| a.history_accepted)) {
            let finding = Finding::new(Code::LogHistory, register.to_string()).expected("zeros");
            findings.push(match events {
                Some((boot, events)) => {
                    let words = firmware::in_words(boot, &events);
                    finding.actual(format!("{}, which the firmware's event log explains by {words}", item.value))
                }
                None => finding.actual(&item.value),
            });
        }
    }
    findings
}

fn rolled_back(item: String, actual: &str) -> Finding {
    Finding::new(Code::LogRollback, item).expected("as accepted before").actual(actual)
}

fn broken(e: &LogError) -> Finding {
    let code = match &e.kind {
        LogErrorKind::Malformed(_) if e.is_truncated() => Code::LogTruncated,
        LogErrorKind::Malformed(_) => Code::LogMalformed,
        LogErrorKind::OutOfOrder { .. } => Code::LogOrder,
        LogErrorKind::DigestMismatch => Code::LogDigest,
        LogErrorKind::ForeignRegister(_) | LogErrorKind::Banks => Code::LogRegister,
        LogErrorKind::NoStart(_) => Code::LogStart,
    };
    Finding::new(code, format!("record {}", e.recnum)).actual(&e.kind)
}
