//! Records from a store, one after the other, without holding the log in memory.

use onequote_evidence::{
    Malformed, MalformedKind,
    log::{LogError, LogErrorKind},
    record::{MAX_RECORD, Record},
};

use super::{LogRead, RecorderError};

/// Bytes that are read at once.
const STEP: usize = 64 * 1024;

const WHAT: &str = "log record";

/// The records of one epoch's log. Holds one record and one read-ahead in memory.
///
/// After an error it ends. What follows the last record is told by [`RecordStream::offset`].
pub struct RecordStream<'a> {
    reader: &'a dyn LogRead,
    epoch: u64,
    buffer: Vec<u8>,
    /// Where the next record begins in `buffer`, and in the file.
    start: usize,
    offset: u64,
    next: u64,
    /// Whether the next record may have any number.
    anywhere: bool,
    at_end: bool,
    failed: bool,
}

impl<'a> RecordStream<'a> {
    /// Records of `epoch`, beginning with number `first` at `offset`.
    #[must_use]
    pub fn new(reader: &'a dyn LogRead, epoch: u64, first: u64, offset: u64) -> Self {
        let (buffer, anywhere, at_end, failed) = (Vec::new(), false, false, false);
        Self { reader, epoch, buffer, start: 0, offset, next: first, anywhere, at_end, failed }
    }

    /// All records of `epoch` that are there, from its oldest segment on.
    ///
    /// # Errors
    /// When the store cannot say where that begins.
    pub fn oldest(reader: &'a dyn LogRead, epoch: u64) -> Result<Self, RecorderError> {
        let offset = reader.segments(epoch)?.first().copied().unwrap_or_default();
        Ok(Self { anywhere: offset > 0, ..Self::new(reader, epoch, 0, offset) })
    }

    /// Where the next record begins in the file: the end of the last one that was read.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The bytes of the next record, not looked at beyond finding their end.
    pub(super) fn next_bytes(&mut self) -> Option<Result<&[u8], RecorderError>> {
        let outcome = self.advance(|bytes| {
            let mut decoder = minicbor::Decoder::new(bytes);
            let malformed = |kind| Malformed { what: WHAT, offset: 0, kind };
            match decoder.skip() {
                Ok(()) => Ok(((), decoder.position())),
                Err(error) if error.is_end_of_input() => Err(malformed(match bytes.len() > MAX_RECORD {
                    true => MalformedKind::TooLarge { limit: MAX_RECORD },
                    false => MalformedKind::Truncated,
                })),
                Err(error) => Err(malformed(MalformedKind::Cbor(error.to_string()))),
            }
        })?;
        Some(outcome.map(|((), len)| &self.buffer[self.start - len..self.start]))
    }

    /// Finds the next item and its length, reading on while `parse` says that it is truncated.
    fn advance<T>(
        &mut self,
        parse: impl Fn(&[u8]) -> Result<(T, usize), Malformed>,
    ) -> Option<Result<(T, usize), RecorderError>> {
        while !self.failed {
            let rest = &self.buffer[self.start..];
            if rest.is_empty() && self.at_end {
                return None;
            }
            match parse(rest) {
                Ok((item, len)) => {
                    self.start += len;
                    self.offset += len as u64;
                    self.next += 1;
                    return Some(Ok((item, len)));
                }
                Err(error) if error.is_truncated() && !self.at_end => {
                    if let Err(error) = self.fill() {
                        self.failed = true;
                        return Some(Err(error));
                    }
                }
                Err(error) => return Some(Err(self.fail(LogErrorKind::Malformed(error)))),
            }
        }
        None
    }

    fn fill(&mut self) -> Result<(), RecorderError> {
        self.buffer.drain(..self.start);
        self.start = 0;
        let had = self.buffer.len();
        self.buffer.resize(had + STEP, 0);
        let read = self.reader.read_at(self.epoch, self.offset + had as u64, &mut self.buffer[had..])?;
        self.buffer.truncate(had + read);
        self.at_end = read == 0;
        Ok(())
    }

    fn fail(&mut self, kind: LogErrorKind) -> RecorderError {
        self.failed = true;
        RecorderError::Damaged(LogError { recnum: self.next, offset: self.offset, kind })
    }
}

impl Iterator for RecordStream<'_> {
    type Item = Result<Record, RecorderError>;

    fn next(&mut self) -> Option<Self::Item> {
        let expected = self.next;
        match self.advance(Record::parse_first)? {
            Ok((record, _)) if record.recnum == expected || std::mem::take(&mut self.anywhere) => {
                self.next = record.recnum.saturating_add(1);
                Some(Ok(record))
            }
            Ok((record, len)) => {
                self.next = expected;
                self.offset -= len as u64;
                Some(Err(self.fail(LogErrorKind::OutOfOrder { found: record.recnum })))
            }
            Err(error) => Some(Err(error)),
        }
    }
}
