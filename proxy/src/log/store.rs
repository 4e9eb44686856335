//! Where logs are kept.

use std::sync::Arc;

use super::StoreError;

/// Logs for reading: one for each epoch, a plain sequence of records. It is in one piece or several, its *segments*, of which
/// the oldest may have been dropped. Offsets count from the epoch's beginning, with what was dropped.
///
/// A store that keeps each log in one piece need say nothing of segments, and is asked for none.
///
/// Readers run beside the writer. They must look only at the part of the current epoch that is known to be recorded.
pub trait LogRead: Send + Sync {
    /// Numbers of the epochs that are there and not set aside, ascending.
    ///
    /// # Errors
    /// [`StoreError`].
    fn epochs(&self) -> Result<Vec<u64>, StoreError>;

    /// Where the segments of an epoch's log begin, ascending; never none for an epoch that is there.
    ///
    /// # Errors
    /// [`StoreError`].
    fn segments(&self, _epoch: u64) -> Result<Vec<u64>, StoreError> {
        Ok(vec![0])
    }

    /// Up to which offset segments of an epoch's log were dropped on purpose; 0 when none were.
    ///
    /// # Errors
    /// [`StoreError`].
    fn dropped(&self, _epoch: u64) -> Result<u64, StoreError> {
        Ok(0)
    }

    /// The snapshot beside the segment that begins at `offset`, at most `limit` bytes and one more of it; none if there is none.
    ///
    /// # Errors
    /// [`StoreError`].
    fn snapshot(&self, _epoch: u64, _offset: u64, _limit: usize) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(None)
    }

    /// Reads bytes from `offset` on into `buffer` and tells how many; 0 only at the end.
    ///
    /// # Errors
    /// [`StoreError`].
    fn read_at(&self, epoch: u64, offset: u64, buffer: &mut [u8]) -> Result<usize, StoreError>;
}

/// Logs for writing. One writer at a time.
pub trait LogStore: Send {
    /// The same logs for reading.
    fn reader(&self) -> Arc<dyn LogRead>;

    /// Makes the empty log of an epoch, durably. One that is there stays as it is.
    ///
    /// # Errors
    /// [`StoreError`].
    fn create(&mut self, epoch: u64) -> Result<(), StoreError>;

    /// Keeps a snapshot for the segment that is to begin at `offset`, durably, in the place of one that is there.
    ///
    /// # Errors
    /// [`StoreError`].
    fn keep_snapshot(&mut self, _epoch: u64, _offset: u64, _bytes: &[u8]) -> Result<(), StoreError> {
        Err(one_piece("keep a snapshot"))
    }

    /// Begins a segment at `offset`, which is the log's end, durably.
    ///
    /// # Errors
    /// [`StoreError`].
    fn begin_segment(&mut self, _epoch: u64, _offset: u64) -> Result<(), StoreError> {
        Err(one_piece("begin a segment"))
    }

    /// Removes the segments before the one that begins at `offset`, oldest first, and their snapshots. That they were is written
    /// down before, durably ([`LogRead::dropped`]).
    ///
    /// # Errors
    /// [`StoreError`]; some may be gone then.
    fn drop_before(&mut self, _epoch: u64, _offset: u64) -> Result<(), StoreError> {
        Err(one_piece("drop segments"))
    }

    /// Writes `bytes` at `offset`, which is the log's end. After an error any part of them may be there.
    ///
    /// # Errors
    /// [`StoreError`].
    fn append(&mut self, epoch: u64, offset: u64, bytes: &[u8]) -> Result<(), StoreError>;

    /// Returns when everything appended so far is durable.
    ///
    /// # Errors
    /// [`StoreError`].
    fn sync(&mut self, epoch: u64) -> Result<(), StoreError>;

    /// Cuts the log to `len` bytes, durably: a segment that begins there or behind goes, too. With `keep`, what is cut off is
    /// first put where a person can find it.
    ///
    /// # Errors
    /// [`StoreError`].
    fn cut(&mut self, epoch: u64, len: u64, keep: bool) -> Result<(), StoreError>;

    /// Takes an epoch's log out of [`LogRead::epochs`] and keeps it where a person can find it. One that is not there
    /// is no error.
    ///
    /// # Errors
    /// [`StoreError`].
    fn set_aside(&mut self, epoch: u64) -> Result<(), StoreError>;
}

/// What a store says that keeps each log in one piece.
fn one_piece(doing: &'static str) -> StoreError {
    StoreError::new("log", doing, std::io::ErrorKind::Unsupported.into())
}
