//! What a log on disk and the registers together mean. Looks only; acting on it is the journal's part.

use onequote_evidence::{
    digest::BankDigest,
    event::{Event, EventBody, GapReason, LogSegment, ProxyStart},
    id::{BootId, Epoch, Sha256},
    log::Replay,
    pcr::{self, Register, Registers},
    record::Record,
};

use super::{
    LogPlace, LogRead, RecordStream, RecorderError,
    index::Index,
    snapshot::{self, MAX_SNAPSHOT, Snapshot},
};
use crate::{inventory::Inventory, tpm::Clock};

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
    /// The last `proxy-start`.
    pub(super) last: ProxyStart,
    /// Whether the epoch began with a `log-gap` for a reason that sets the log before it aside.
    pub(super) gap: bool,
    /// What the records say that are there no more.
    pub(super) before: Inventory,
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
    before: Inventory,
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
    let (mut stream, snapshot) = match oldest(reader, number)? {
        Ok(None) => (RecordStream::new(reader, number, 0, 0), None),
        Ok(Some((place, digest, snapshot))) => {
            (RecordStream::new(reader, number, place.records, place.bytes), Some((digest, snapshot)))
        }
        Err(damage) => {
            survey.tail = Tail::Damaged(damage);
            return Ok(survey);
        }
    };
    let mut snapshot = snapshot;
    let whole_before = snapshot.is_some();
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
        let taken = match &mut survey.begin {
            Some(begin) => begin.take(&record, offset, stream.offset() - offset),
            None => {
                Begin::new(&record, number, offset, stream.offset() - offset, snapshot.take()).map(|(begin, before)| {
                    if before == *registers {
                        survey.matched = Some(record.recnum);
                    }
                    survey.begin = Some(begin);
                })
            }
        };
        if let Err(error) = taken {
            survey.tail = Tail::Damaged(format!("at byte {offset}: {error}"));
            break;
        }
        survey.whole = record.recnum + 1;
        if survey.begin.as_ref().is_some_and(|begin| begin.replay.registers() == registers) {
            survey.matched = Some(survey.whole);
        }
        survey.last = Some(record);
    }
    if survey.begin.is_none() && whole_before && !matches!(survey.tail, Tail::Damaged(_)) {
        // Records before it were dropped, so it once was whole.
        survey.tail = Tail::Damaged("the oldest segment has no whole record".to_owned());
    }
    Ok(survey)
}

type Oldest = (LogPlace, Sha256, Snapshot);

/// Where a log without its beginning begins, with its snapshot and that one's digest; none for a log that is whole. The inner
/// error says why it cannot be gone on with.
fn oldest(reader: &dyn LogRead, number: u64) -> Result<Result<Option<Oldest>, String>, RecorderError> {
    let Some(bytes) = reader.segments(number)?.first().copied().filter(|oldest| *oldest > 0) else {
        return Ok(Ok(None));
    };
    let dropped = reader.dropped(number)?;
    if bytes > dropped {
        return Ok(Err(format!(
            "segments before byte {bytes} are missing, and only those before {dropped} were dropped"
        )));
    }
    let Some(snapshot) = reader.snapshot(number, bytes, MAX_SNAPSHOT)? else {
        return Ok(Err(format!("the snapshot for byte {bytes} is missing")));
    };
    let digest = snapshot::digest(&snapshot);
    Ok(match Snapshot::parse(&snapshot) {
        Ok(snapshot) => Ok(Some((LogPlace { records: snapshot.records, bytes }, digest, snapshot))),
        Err(error) => Err(format!("the snapshot for byte {bytes}: {error}")),
    })
}

impl Begin {
    /// Begins with the oldest record that is there; gives the registers' values before it, too.
    fn new(
        record: &Record,
        number: u64,
        offset: u64,
        size: u64,
        snapshot: Option<(Sha256, Snapshot)>,
    ) -> Result<(Self, Registers), String> {
        let replay = Replay::begin(record).map_err(|error| error.to_string())?;
        let start = replay.start().clone();
        if start.epoch.number != number {
            return Err(format!("it is the log of epoch {}", start.epoch.number));
        }
        let mut index = Index::new(start.epoch, LogPlace { records: record.recnum, bytes: offset });
        index.push(size);
        let (before, last, gap, inventory) = match (segment(record), snapshot) {
            (Some(body), Some((digest, snapshot))) => {
                let fits = digest == body.snapshot
                    && (snapshot.epoch, snapshot.number) == (start.epoch, body.number)
                    && snapshot.records == record.recnum;
                if !fits {
                    return Err("its snapshot is another than the one that it names".to_owned());
                }
                (body.registers, snapshot.last, snapshot.gap, snapshot.inventory)
            }
            (None, None) => (start.history.clone(), start.clone(), set_others_aside(record), Inventory::default()),
            _ => return Err("it is not where a segment begins".to_owned()),
        };
        let before = pcr::from_list(&before).unwrap_or_default();
        Ok((Self { start, last, gap, before: inventory, replay, index }, before))
    }

    fn take(&mut self, record: &Record, offset: u64, size: u64) -> Result<(), String> {
        let segment = self.replay.segment();
        self.replay.apply(record).map_err(|error| error.to_string())?;
        self.index.push(size);
        if self.replay.segment() != segment {
            self.index.begin_segment(LogPlace { records: record.recnum, bytes: offset });
        }
        if let Some(start) = proxy_start(record) {
            self.last = start;
        }
        Ok(())
    }
}

impl Survey {
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
        let kexec_from = (!same_kernel).then_some(begin.last.boot_id);
        Ok(Plan::Continue(Box::new(Continue {
            epoch: begin.start.epoch,
            replay: begin.replay,
            index: begin.index,
            last: begin.last,
            gap: begin.gap,
            before: begin.before,
            missing,
            torn: matches!(self.tail, Tail::Torn),
            set_aside: before.filter(|_| begin.gap),
            kexec_from,
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

/// The `log-segment` of a record, which is its only event.
fn segment(record: &Record) -> Option<LogSegment> {
    match record.events().ok()?.into_iter().next()?.body {
        EventBody::LogSegment(body) => Some(body),
        _ => None,
    }
}

/// Whether a log begins because the one before it could not go on.
fn set_others_aside(record: &Record) -> bool {
    let replaces = |event: &Event| matches!(&event.body, EventBody::LogGap(gap) if gap.reason != GapReason::TpmReset);
    record.events().is_ok_and(|events| events.iter().any(replaces))
}

fn all_zero(registers: &Registers) -> bool {
    registers.values().flatten().all(|&byte| byte == 0)
}
