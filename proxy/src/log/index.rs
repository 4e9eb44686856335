//! Where records begin, so that a range of them can be read without reading all before it.

use onequote_evidence::id::Epoch;

/// One mark for so many records: 8 bytes each, 1 MiB for 8 million records.
const STRIDE: u64 = 64;

/// Offsets of the records of the current epoch that are recorded: on disk and in the registers.
#[derive(Debug, Clone)]
pub(super) struct Index {
    pub(super) epoch: Epoch,
    len: u64,
    end: u64,
    marks: Vec<u64>,
}

impl Index {
    pub(super) fn new(epoch: Epoch) -> Self {
        Self { epoch, len: 0, end: 0, marks: Vec::new() }
    }

    /// Takes in the next record, of `bytes` bytes.
    pub(super) fn push(&mut self, bytes: u64) {
        if self.len.is_multiple_of(STRIDE) {
            self.marks.push(self.end);
        }
        self.len += 1;
        self.end += bytes;
    }

    /// Number of records.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// The file's length that belongs to them.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// The last marked record that is not after `recnum`, and where it begins.
    pub(super) fn mark(&self, recnum: u64) -> (u64, u64) {
        let at = usize::try_from(recnum / STRIDE).unwrap_or(usize::MAX).min(self.marks.len().saturating_sub(1));
        self.marks.get(at).map_or((0, 0), |&offset| (at as u64 * STRIDE, offset))
    }
}
