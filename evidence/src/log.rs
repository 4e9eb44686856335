//! The measurement log and its replay to the registers.
//!
//! A log is a sequence of records in one file per epoch, nothing before, between or after them. Its first record
//! begins with a `proxy-start` event whose history holds the registers' values before it: the replay starts there.
//!
//! ```text
//! history of record 0 ──► record 0 ──► record 1 ──► …      each extends one register in every bank
//! ```
//!
//! The host may have dropped the beginning of a long log. What is left begins with a record whose one event, `log-segment`,
//! holds the registers' values before it: a replay can start there, too.
//!
//! A log proves nothing by itself. It is believed only up to the record after which its [`Replay`] has the register
//! values of a quote; and its history only if the caller knows the start otherwise (zeros after a TPM reset, or the
//! value that the firmware's event log gives).

use crate::{
    Malformed,
    digest::HashAlg,
    event::{Event, EventBody, LogSegment, ProxyStart},
    pcr::{self, Register, Registers},
    record::Record,
};

/// A log that is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("record {recnum} at byte {offset}: {kind}")]
pub struct LogError {
    /// The number that the record has or should have.
    pub recnum: u64,
    /// Offset of the record in the input, in bytes.
    pub offset: u64,
    /// What is wrong with it.
    pub kind: LogErrorKind,
}

/// What is wrong with a record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LogErrorKind {
    /// Not a record.
    #[error("not a record: {0}")]
    Malformed(Malformed),
    /// Records are missing, doubled or out of order.
    #[error("it says it is record {found}")]
    OutOfOrder {
        /// The number found.
        found: u64,
    },
    /// The content is not what was hashed.
    #[error("a digest is not that of its content")]
    DigestMismatch,
    /// It extends a register that is not one of the log's two.
    #[error("it extends PCR {0}, which is not one of this log's")]
    ForeignRegister(u8),
    /// It does not have one digest for each bank of the log.
    #[error("its banks are not those of the log's start")]
    Banks,
    /// Record 0 does not begin with a usable `proxy-start`, or the first record that is there with a usable `log-segment`.
    #[error("the log does not begin with a proxy-start or log-segment that fits: {0}")]
    NoStart(&'static str),
    /// A `log-segment` does not say what the records before it gave.
    #[error("its log-segment does not follow from the records before it")]
    Segment,
}

impl LogError {
    /// Whether the input ended inside the record.
    #[must_use]
    pub fn is_truncated(&self) -> bool {
        matches!(&self.kind, LogErrorKind::Malformed(e) if e.is_truncated())
    }
}

/// Cuts a log into records. After an error the iterator ends.
pub struct LogReader<'a> {
    bytes: &'a [u8],
    offset: usize,
    next: u64,
    failed: bool,
}

impl<'a> LogReader<'a> {
    /// Reads records from `bytes`, whose first one must have the number `first`.
    #[must_use]
    pub fn new(bytes: &'a [u8], first: u64) -> Self {
        Self { bytes, offset: 0, next: first, failed: false }
    }

    /// Reads records from `bytes`, whose first one may have any number: a log without its beginning.
    #[must_use]
    pub fn anywhere(bytes: &'a [u8]) -> Self {
        let first = Record::parse_first(bytes).map_or(0, |(record, _)| record.recnum);
        Self::new(bytes, first)
    }

    /// Bytes read so far as whole records.
    #[must_use]
    pub fn offset(&self) -> usize {
        self.offset
    }
}

impl Iterator for LogReader<'_> {
    type Item = Result<Record, LogError>;

    fn next(&mut self) -> Option<Self::Item> {
        let rest = &self.bytes[self.offset..];
        if self.failed || rest.is_empty() {
            return None;
        }
        let error = match Record::parse_first(rest) {
            Ok((record, len)) if record.recnum == self.next => {
                self.offset += len;
                self.next = self.next.saturating_add(1);
                return Some(Ok(record));
            }
            Ok((record, _)) => LogErrorKind::OutOfOrder { found: record.recnum },
            Err(e) => LogErrorKind::Malformed(e),
        };
        self.failed = true;
        Some(Err(LogError { recnum: self.next, offset: self.offset as u64, kind: error }))
    }
}

const SEGMENT: &[u8] = b"log-segment";

/// The registers' values after a log's first records. The caller must trust the history that it started from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replay {
    start: ProxyStart,
    banks: Vec<HashAlg>,
    registers: Registers,
    first: u64,
    /// Number of the segment that the last record is in.
    segment: u64,
    len: u64,
}

impl Replay {
    /// Starts with record 0 of an epoch, or with the first record of a later segment, and takes it in.
    ///
    /// # Errors
    /// [`LogError`] when it is not a record that begins a log or a segment.
    pub fn begin(record: &Record) -> Result<Self, LogError> {
        let fail = |kind| LogError { recnum: record.recnum, offset: 0, kind };
        let no_start = |why| fail(LogErrorKind::NoStart(why));
        let mut events = record.events().map_err(|e| fail(LogErrorKind::Malformed(e)))?.into_iter();
        let (start, registers, segment) = match (record.recnum, events.next(), events.next()) {
            (0, Some(Event { body: EventBody::ProxyStart(start), .. }), _) => {
                let registers = pcr::from_list(&start.history).ok_or_else(|| no_start("its history is not one"))?;
                (start, registers, 0)
            }
            (0, ..) => return Err(no_start("its first event is another")),
            (_, Some(Event { body: EventBody::LogSegment(body), .. }), None) if body.number > 0 => {
                let registers = pcr::from_list(&body.registers).ok_or_else(|| no_start("its registers are none"))?;
                (body.start, registers, body.number)
            }
            (found, ..) => return Err(fail(LogErrorKind::OutOfOrder { found })),
        };
        let banks: Vec<HashAlg> = record.digests.keys().copied().collect();
        let expected: Vec<Register> = banks
            .iter()
            .flat_map(|&bank| {
                let (low, high) = (start.pcr_vm.min(start.pcr_guest), start.pcr_vm.max(start.pcr_guest));
                [Register { bank, pcr: low }, Register { bank, pcr: high }]
            })
            .collect();
        if start.pcr_vm == start.pcr_guest || !registers.keys().eq(&expected) {
            return Err(no_start("it does not have both registers in each bank"));
        }
        let first = record.recnum;
        // The segment's own record is taken in as one that follows.
        let before = segment.saturating_sub(1);
        let mut replay = Self { start, banks, registers, first, segment: before, len: first };
        replay.apply(record)?;
        Ok(replay)
    }

    /// Takes in the next record.
    ///
    /// # Errors
    /// [`LogError`]; the replay is then unchanged. The offset in the error is 0.
    pub fn apply(&mut self, record: &Record) -> Result<(), LogError> {
        let fail = |kind| Err(LogError { recnum: self.len, offset: 0, kind });
        if record.recnum != self.len {
            return fail(LogErrorKind::OutOfOrder { found: record.recnum });
        }
        if record.pcr != self.start.pcr_vm && record.pcr != self.start.pcr_guest {
            return fail(LogErrorKind::ForeignRegister(record.pcr));
        }
        if !record.digests.keys().eq(&self.banks) {
            return fail(LogErrorKind::Banks);
        }
        if !record.digests_match() {
            return fail(LogErrorKind::DigestMismatch);
        }
        let Some(segment) = self.segment_of(record) else { return fail(LogErrorKind::Segment) };
        for (&bank, digest) in &record.digests {
            if let Some(value) = self.registers.get_mut(&Register { bank, pcr: record.pcr }) {
                pcr::extend(bank, value, &digest.0);
            }
        }
        self.len += 1;
        self.segment = segment;
        Ok(())
    }

    /// The segment that a next record is in; none when it has a `log-segment` that does not follow.
    fn segment_of(&self, record: &Record) -> Option<u64> {
        // Spares reading most records: one with this event holds its name.
        if !record.content.0.windows(SEGMENT.len()).any(|part| part == SEGMENT) {
            return Some(self.segment);
        }
        // Content that is no list of events is for others to report.
        let events = record.events().unwrap_or_default();
        let mut segments = events.iter().filter_map(|event| match &event.body {
            EventBody::LogSegment(body) => Some(body),
            _ => None,
        });
        match segments.next() {
            None => Some(self.segment),
            Some(body) => (events.len() == 1 && self.is_next(body)).then_some(body.number),
        }
    }

    fn is_next(&self, body: &LogSegment) -> bool {
        body.number == self.segment + 1
            && body.start == self.start
            && pcr::from_list(&body.registers).as_ref() == Some(&self.registers)
    }

    /// The event that the log began with; as the segment's first record says, where the beginning is not there.
    #[must_use]
    pub fn start(&self) -> &ProxyStart {
        &self.start
    }

    /// The banks that the log extends.
    #[must_use]
    pub fn banks(&self) -> &[HashAlg] {
        &self.banks
    }

    /// Both registers in every bank, after [`Replay::len`] records.
    #[must_use]
    pub fn registers(&self) -> &Registers {
        &self.registers
    }

    /// Number of the record that the replay started with: 0, unless the log's beginning is not there.
    #[must_use]
    pub fn first(&self) -> u64 {
        self.first
    }

    /// Number of the segment that the last record is in.
    #[must_use]
    pub fn segment(&self) -> u64 {
        self.segment
    }

    /// Number of records of the epoch up to the last one taken in, those before [`Replay::first`] included.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "a replay is never empty: it begins with a record")]
    pub fn len(&self) -> u64 {
        self.len
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
pub(crate) mod tests;
