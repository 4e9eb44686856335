//! Step 8: that the measurement log is the one whose records went into the TPM.
//!
//! The records are replayed from the history in the first one, or from where the replay stood when the last evidence
//! was accepted. What comes out must be what the TPM quoted and what the host states. The part that was accepted before
//! must still be there, and be the same: registers are chains, so that equal values after the same number of records
//! mean equal records. A replay that goes on where it stood has that part by its making.

use std::{collections::BTreeMap, sync::Arc};

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
    epoch::{MAX_PAST, PastGap},
    firmware::History,
    found::Notes,
    logs::Part,
    registers::QuotedRegisters,
    state::Accepted,
};
use crate::{
    finding::{Code, Finding},
    policy::{Consent, HostRule, Pcr},
};

/// How far a log was taken in, and what later steps need of that part.
#[derive(Debug, Clone)]
pub struct LogProgress {
    replay: Replay,
    /// Bytes of the records.
    len: u64,
    /// Every start of a proxy, with its record.
    starts: Arc<Vec<(u64, ProxyStart)>>,
    /// Gaps of the host, VMs apart.
    gaps: Arc<Vec<PastGap>>,
}

/// Events that went into the quoted registers, in order. Can be had only through [`check`].
#[derive(Debug, Clone)]
pub struct VerifiedLog {
    events: Vec<(u64, Event)>,
    progress: LogProgress,
}

impl LogProgress {
    /// Bytes of the log that were taken in, with those that were dropped before.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is none: there always is a first record.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether it is that of a log that was accepted so.
    #[must_use]
    pub fn is_of(&self, accepted: &Accepted) -> bool {
        self.replay.start().epoch == accepted.epoch
            && self.replay.len() == accepted.records
            && pcr::to_list(self.replay.registers()) == accepted.registers
    }

    fn take(&mut self, recnum: u64, event: &Event) {
        match &event.body {
            EventBody::ProxyStart(start) => Arc::make_mut(&mut self.starts).push((recnum, start.clone())),
            EventBody::LogGap(gap) if event.vm.is_none() && self.gaps.len() < MAX_PAST => {
                let epoch = self.replay.start().epoch.number;
                let gap = PastGap { epoch, record: recnum, reason: gap.reason, detail: gap.detail.clone() };
                Arc::make_mut(&mut self.gaps).push(gap);
            }
            _ => {}
        }
    }
}

impl VerifiedLog {
    /// The events that were not taken in before, each with the number of its record.
    #[must_use]
    pub fn events(&self) -> &[(u64, Event)] {
        &self.events
    }

    /// The event that the log begins with.
    #[must_use]
    pub fn start(&self) -> &ProxyStart {
        self.progress.replay.start()
    }

    /// The first record that is there: 0, unless the log's beginning was dropped.
    #[must_use]
    pub fn first(&self) -> u64 {
        self.progress.replay.first()
    }

    /// Every start of a proxy in the whole log, with its record.
    #[must_use]
    pub fn starts(&self) -> &[(u64, ProxyStart)] {
        &self.progress.starts
    }

    /// The first gaps that the whole log tells of its host, VMs apart.
    #[must_use]
    pub fn gaps(&self) -> &[PastGap] {
        &self.progress.gaps
    }

    /// Both registers in every bank, after the last record.
    #[must_use]
    pub fn registers(&self) -> Vec<RegisterValue> {
        pcr::to_list(self.progress.replay.registers())
    }

    /// How far the log was taken in.
    #[must_use]
    pub fn progress(&self) -> &LogProgress {
        &self.progress
    }
}

/// Replays `records`, which go on where `from` stands, or begin with a log or with a segment of one. The caller must trust `quoted` and `clock`, `statement` to be what
/// the quote covers, and `accepted` and `from` to be what it kept itself; `from` must be [`LogProgress::is_of`] `accepted`.
///
/// # Errors
/// The finding.
pub fn check(
    from: Option<&LogProgress>,
    records: &Part<u8>,
    quoted: &QuotedRegisters,
    statement: &Statement,
    clock: &ClockInfo,
    accepted: Option<&Accepted>,
    rule: &HostRule,
) -> Result<VerifiedLog, Finding> {
    let accepted = accepted.filter(|a| a.epoch == statement.epoch);
    let mut progress = from.cloned();
    if let Some(from) = &progress {
        check_start(from.replay.start(), statement, clock, rule)?;
    }
    let mut events = Vec::new();
    let reader = match &progress {
        Some(from) => LogReader::new(&records.items, from.replay.len()),
        None => LogReader::anywhere(&records.items),
    };
    for record in reader {
        let record = record.map_err(|e| broken(&e))?;
        let progress = match &mut progress {
            Some(progress) => {
                progress.replay.apply(&record).map_err(|e| broken(&e))?;
                progress
            }
            None => {
                let replay = Replay::begin(&record).map_err(|e| broken(&e))?;
                check_start(replay.start(), statement, clock, rule)?;
                if let Some(accepted) = accepted
                    && replay.first() > accepted.records
                {
                    let missing = format!("records {} to {}", accepted.records, replay.first() - 1);
                    return Err(Finding::new(Code::LogDropped, missing).actual("dropped"));
                }
                // Where its own record is not there, the segment says what the first start was.
                let starts = (replay.first() > 0).then(|| (replay.first(), replay.start().clone()));
                let (starts, len) = (Arc::new(starts.into_iter().collect()), records.first);
                progress.insert(LogProgress { replay, len, starts, gaps: Arc::default() })
            }
        };
        let content = record
            .events()
            .map_err(|e| Finding::new(Code::LogMalformed, format!("record {}", record.recnum)).actual(e))?;
        events.extend(content.into_iter().map(|event| (record.recnum, event)));
        if let Some(accepted) = accepted
            && progress.replay.len() == accepted.records
            && pcr::to_list(progress.replay.registers()) != accepted.registers
        {
            return Err(rolled_back(format!("records 0 to {}", accepted.records - 1), "other than before"));
        }
    }
    let Some(mut progress) = progress else {
        return Err(Finding::new(Code::LogLength, "record 0").expected(statement.log_len).actual("no record"));
    };
    let replay = &progress.replay;
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
    compare(replay, quoted, statement, accepted)?;
    for (recnum, event) in &events {
        if let EventBody::ProxyStart(start) = &event.body {
            check_start(start, statement, clock, rule).map_err(|mut finding| {
                finding.item = format!("record {recnum}");
                finding
            })?;
        }
        progress.take(*recnum, event);
    }
    progress.len += records.items.len() as u64;
    Ok(VerifiedLog { events, progress })
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
    by_firmware: &BTreeMap<u8, History>,
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
        let firmware = by_firmware.get(&item.pcr);
        let explained = firmware.and_then(|firmware| firmware.explained.as_ref());
        let by_stub = explained.is_some_and(|explained| explained.allowed);
        if zeros && firmware.is_some_and(|firmware| firmware.extended) {
            let finding = Finding::new(Code::FirmwareLogReplay, format!("{register} when the measurement log began"));
            findings.push(finding.expected(&item.value).actual("extended, by the firmware's event log"));
        } else if !(zeros || by_policy || goes_on || by_stub || same_log.is_some_and(|a| a.history_accepted)) {
            let finding = Finding::new(Code::LogHistory, register.to_string()).expected("zeros");
            findings.push(match explained {
                Some(explained) => finding
                    .actual(format!("{}, which the firmware's event log explains by {}", item.value, explained.words)),
                None => finding.actual(&item.value),
            });
        }
    }
    findings
}

/// That the log's beginning was dropped before this verifier had it, unless the policy allows that.
pub fn check_beginning(log: &VerifiedLog, rule: &HostRule, notes: &mut Notes) -> Option<Finding> {
    let first = log.first();
    match rule.dropped_records {
        _ if first == 0 => None,
        Consent::Allowed => {
            notes.push(format!("the log begins with record {first}, as allowed: what was before was dropped"));
            None
        }
        Consent::Refused => {
            let dropped = format!("records 0 to {}", first - 1);
            Some(Finding::new(Code::LogSegmentStart, dropped).actual("dropped before this verifier had them"))
        }
    }
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
        LogErrorKind::NoStart(_) | LogErrorKind::Segment => Code::LogStart,
    };
    Finding::new(code, format!("record {}", e.recnum)).actual(&e.kind)
}
