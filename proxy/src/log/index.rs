//! Where records begin, so that a range of them can be read without reading all before it.

use onequote_evidence::id::Epoch;

use super::LogPlace;

/// One mark for so many records: 8 bytes each, 1 MiB for 8 million records.
const STRIDE: u64 = 64;

/// Offsets of the records of the current epoch that are recorded: on disk and in the registers.
#[derive(Debug, Clone)]
pub(super) struct Index {
    pub(super) epoch: Epoch,
    /// Where the marks begin.
    origin: LogPlace,
    /// The end.
    end: LogPlace,
    marks: Vec<u64>,
    /// Where the segments that are there begin; never none.
    segments: Vec<LogPlace>,
}

impl Index {
    /// Of a log whose oldest segment begins at `origin`.
    pub(super) fn new(epoch: Epoch, origin: LogPlace) -> Self {
        Self { epoch, origin, end: origin, marks: Vec::new(), segments: vec![origin] }
    }

    /// Takes in the next record, of `bytes` bytes.
    pub(super) fn push(&mut self, bytes: u64) {
        if (self.end.records - self.origin.records).is_multiple_of(STRIDE) {
            self.marks.push(self.end.bytes);
        }
        self.end.records += 1;
        self.end.bytes += bytes;
    }

    /// A segment begins with the last record that was taken in, at `place`.
    pub(super) fn begin_segment(&mut self, place: LogPlace) {
        if self.segments.last().is_none_or(|last| *last < place) {
            self.segments.push(place);
        }
    }

    /// What is before the segment that begins at `place` is there no more.
    pub(super) fn drop_before(&mut self, place: LogPlace) {
        if self.segments.contains(&place) {
            self.segments.retain(|start| *start >= place);
        }
    }

    /// Where the segments that are there begin.
    pub(super) fn segments(&self) -> &[LogPlace] {
        &self.segments
    }

    /// Where the oldest record that is there begins.
    pub(super) fn first(&self) -> LogPlace {
        self.segments.first().copied().unwrap_or(self.origin)
    }

    /// Where the newest segment begins.
    pub(super) fn newest(&self) -> LogPlace {
        self.segments.last().copied().unwrap_or(self.origin)
    }

    /// Number of records, those that were dropped included.
    pub(super) fn len(&self) -> u64 {
        self.end.records
    }

    /// The log's length that belongs to them.
    pub(super) fn end(&self) -> u64 {
        self.end.bytes
    }

    /// The last marked record that is not after `recnum`, and where it begins.
    pub(super) fn mark(&self, recnum: u64) -> (u64, u64) {
        let first = self.first();
        let at = recnum.saturating_sub(self.origin.records) / STRIDE;
        let at = usize::try_from(at).unwrap_or(usize::MAX).min(self.marks.len().saturating_sub(1));
        let marked = self.marks.get(at).map(|&bytes| (self.origin.records + at as u64 * STRIDE, bytes));
        // A mark may be in a segment that was dropped.
        marked.filter(|(_, bytes)| *bytes >= first.bytes).unwrap_or((first.records, first.bytes))
    }
}
