//! What a log on disk and the registers together mean. Looks only; acting on it is the journal's part.

use onequote_evidence::{
    digest::BankDigest,
    event::{Event, EventBody, GapReason, ProxyStart},
    id::{BootId, Epoch},
    log::Replay,
    pcr::{self, Register, Registers},
    record::Record,
};

use super::{LogRead, RecordStream, RecorderError, index::Index};
use crate::tpm::Clock;

/// What the TPM says at the start.
pub(super) struct TpmState {
    pub(super) clock: Clock,
    /// Both registers in every active bank.
    pub(super) registers: Registers,
    pub(super) pcr_vm: u8,
    pub(super) pcr_guest: u8,
    /// The kernel that runs now.
    pub(super) boot_id: BootId,
}

/// What has to be done.
pub(super) enum Plan {
    /// Go on with the log that is there.
    Continue(Box<Continue>),
    /// Begin the log of epoch `number`.
    Begin {
        number: u64,
        /// Why the log does not cover everything, if it doesn't.
        gap: Option<Gap>,
        /// Whether a file of that number is there already, from a beginning that did not get far.
        remains: bool,
    },
}

/// Why a new log does not cover everything.
pub(super) struct Gap {
    pub(super) reason: GapReason,
    pub(super) detail: String,
    /// The epoch whose log is set aside for it. One that ended with its registers stays: it is whole.
    pub(super) set_aside: Option<u64>,
}

/// The log to go on with.
pub(super) struct Continue {
    pub(super) epoch: Epoch,
    /// Replay and index of the whole records, a missing extend included.
    pub(super) replay: Replay,
    pub(super) index: Index,
    /// The record whose extend is missing.
    pub(super) missing: Option<Extend>,
    /// Whether bytes of a torn record follow.
    pub(super) torn: bool,
    /// An older epoch whose log this one has replaced with a `log-gap`.
    pub(super) set_aside: Option<u64>,
    /// The kernel that wrote the last `proxy-start`, if it was another: the registers outlived it.
    pub(super) kexec_from: Option<BootId>,
}

/// An extend: register and digests.
pub(super) struct Extend {
    pub(super) pcr: u8,
    pub(super) digests: Vec<BankDigest>,
}

impl From<&Record> for Extend {
    fn from(record: &Record) -> Self {
        let digest = |(&alg, value): (&_, &onequote_evidence::id::Blob)| BankDigest { alg, value: value.clone() };
        Self { pcr: record.pcr, digests: record.digests.iter().map(digest).collect() }
    }
}

/// Compares the newest log with the TPM.
///
/// # Errors
/// When the store can't be read, or the configuration contradicts the log of this boot.
pub(super) fn plan(reader: &dyn LogRead, tpm: &TpmState) -> Result<Plan, RecorderError> {
    let epochs = reader.epochs()?;
    let Some(&newest) = epochs.last() else {
        return Ok(Plan::Begin { number: 1, gap: None, remains: false });
    };
    // A file without a whole record is of an epoch that never began: whoever was told of a record, could count on the
    // file holding it. The epoch before decides, as it did then.
    for (&number, remains) in epochs.iter().rev().zip([false, true]) {
        let survey = survey(reader, number, &tpm.registers)?;
        if survey.never_began() {
            if remains {
                break;
            }
            continue;
        }
        let before = epochs.iter().rev().find(|&&other| other < number).copied();
        return survey.decide(tpm, number, before, if remains { newest } else { newest + 1 }, remains);
    }
    Ok(Plan::Begin { number: newest, gap: None, remains: true })
}

/// What is in one log, and which part of it the registers know.
struct Survey {
    begin: Option<Begin>,
    /// Number of whole records, and the last number of records after which the replay has the registers' values.
    whole: u64,
    matched: Option<u64>,
    last: Option<Record>,
    tail: Tail,
}

struct Begin {
    start: ProxyStart,
    /// The last `proxy-start`: boot id and restart count may be others than those of the first.
    last: ProxyStart,
    /// Whether it says `log-gap` for a reason that sets the log before it aside.
    gap: bool,
    replay: Replay,
    index: Index,
}

enum Tail {
    /// Nothing follows the last whole record.
    Clean,
    /// A record that ends too early.
    Torn,
    /// Something else.
    Damaged(String),
}

fn survey(reader: &dyn LogRead, number: u64, registers: &Registers) -> Result<Survey, RecorderError> {
    let mut survey = Survey { begin: None, whole: 0, matched: None, last: None, tail: Tail::Clean };
    let mut stream = RecordStream::new(reader, number, 0, 0);
    loop {
        let offset = stream.offset();
        let record = match stream.next() {
            None => break,
            Some(Ok(record)) => record,
            Some(Err(RecorderError::Damaged(error))) => {
                survey.tail = if error.is_truncated() { Tail::Torn } else { Tail::Damaged(error.to_string()) };
                break;
            }
            Some(Err(error)) => return Err(error),
        };
        if let Err(error) = survey.take(record, stream.offset() - offset, number, registers) {
            survey.tail = Tail::Damaged(format!("at byte {offset}: {error}"));
            break;
        }
    }
    Ok(survey)
}

impl Survey {
    fn take(&mut self, record: Record, size: u64, number: u64, registers: &Registers) -> Result<(), String> {
        match &mut self.begin {
            Some(begin) => {
                begin.replay.apply(&record).map_err(|error| error.to_string())?;
                begin.index.push(size);
                if let Some(start) = proxy_start(&record) {
                    begin.last = start;
                }
            }
            None => {
                let replay = Replay::begin(&record).map_err(|error| error.to_string())?;
                let start = replay.start().clone();
                if start.epoch.number != number {
                    return Err(format!("it is the log of epoch {}", start.epoch.number));
                }
                if pcr::from_list(&start.history).as_ref() == Some(registers) {
                    self.matched = Some(0);
                }
                let mut index = Index::new(start.epoch);
                index.push(size);
                let gap = set_others_aside(&record);
                self.begin = Some(Begin { gap, last: start.clone(), start, replay, index });
            }
        }
        self.whole += 1;
        if self.begin.as_ref().is_some_and(|begin| begin.replay.registers() == registers) {
            self.matched = Some(self.whole);
        }
        self.last = Some(record);
        Ok(())
    }

    fn never_began(&self) -> bool {
        self.begin.is_none() && !matches!(self.tail, Tail::Damaged(_))
    }

    /// `number` is this log's epoch, `before` the one before it, `next` the one to begin if this can't go on.
    fn decide(
        self,
        tpm: &TpmState,
        number: u64,
        before: Option<u64>,
        next: u64,
        remains: bool,
    ) -> Result<Plan, RecorderError> {
        let begin_new = |gap: Option<Gap>| Plan::Begin { number: next, gap, remains };
        let aside = |(reason, detail)| Some(Gap { reason, detail, set_aside: Some(number) });
        let damaged = |detail: String| Ok(begin_new(aside((GapReason::LogDamaged, detail))));
        let Some(begin) = self.begin else {
            let Tail::Damaged(detail) = self.tail else { return Ok(begin_new(None)) };
            return damaged(detail);
        };
        let same_kernel = begin.last.boot_id == tpm.boot_id;
        let (resets, restarts) = (begin.last.reset_count, begin.last.restart_count);
        let restarted = restarts != tpm.clock.restart_count;
        let began_anew = || {
            let now = tpm.clock;
            let detail = format!(
                "resets {resets} to {}, restarts {restarts} to {}, in boot {}: the log of epoch {number} ended without its host",
                now.reset_count, now.restart_count, tpm.boot_id
            );
            same_kernel.then_some(Gap { reason: GapReason::TpmReset, detail, set_aside: None })
        };
        if resets != tpm.clock.reset_count {
            return Ok(begin_new(began_anew()));
        }
        let (log, configured) = ((begin.start.pcr_vm, begin.start.pcr_guest), (tpm.pcr_vm, tpm.pcr_guest));
        if log != configured {
            return Err(RecorderError::RegistersChanged { log, configured });
        }
        if let Tail::Damaged(detail) = self.tail {
            return damaged(detail);
        }
        let explained = self.matched.is_some_and(|matched| matched + 1 >= self.whole);
        // A TPM restart: registers begin anew, and the count of resets stays. In another boot its stub may have extended
        // them already: a verifier sees what they hold in the new log's history.
        if !explained && restarted && (!same_kernel || all_zero(&tpm.registers)) {
            return Ok(begin_new(began_anew()));
        }
        if !explained {
            return Ok(begin_new(aside(mismatch(self.matched, self.whole, &begin.replay, tpm))));
        }
        let missing = if self.matched == Some(self.whole) { None } else { self.last.as_ref().map(Extend::from) };
        Ok(Plan::Continue(Box::new(Continue {
            epoch: begin.start.epoch,
            replay: begin.replay,
            index: begin.index,
            missing,
            torn: matches!(self.tail, Tail::Torn),
            set_aside: before.filter(|_| begin.gap),
            kexec_from: (!same_kernel).then_some(begin.last.boot_id),
        })))
    }
}

/// Why no part of the log that we could have left gives the registers' values.
fn mismatch(matched: Option<u64>, whole: u64, replay: &Replay, tpm: &TpmState) -> (GapReason, String) {
    if !replay.registers().keys().eq(tpm.registers.keys()) {
        return (GapReason::LogDamaged, "the log's banks are not the TPM's active ones".to_owned());
    }
    match matched {
        Some(matched) => (GapReason::LogDamaged, format!("the registers know {matched} of {whole} records")),
        None => {
            let differ = |register: &&Register| replay.registers().get(register) != tpm.registers.get(register);
            let names: Vec<String> = tpm.registers.keys().filter(differ).map(ToString::to_string).collect();
            let detail = format!("{} not explained by any part of the log ({whole} records)", names.join(", "));
            (GapReason::ForeignExtend, detail)
        }
    }
}

/// The `proxy-start` of a record, which is its first event.
fn proxy_start(record: &Record) -> Option<ProxyStart> {
    record.events().ok()?.into_iter().find_map(|event| match event.body {
        EventBody::ProxyStart(start) => Some(start),
        _ => None,
    })
}

/// Whether a log begins because the one before it could not go on.
fn set_others_aside(record: &Record) -> bool {
    let replaces = |event: &Event| matches!(&event.body, EventBody::LogGap(gap) if gap.reason != GapReason::TpmReset);
    record.events().is_ok_and(|events| events.iter().any(replaces))
}

fn all_zero(registers: &Registers) -> bool {
    registers.values().flatten().all(|&byte| byte == 0)
}
