//! Where logs are kept.

use std::sync::Arc;

use super::StoreError;

/// Logs for reading: one for each epoch, a plain sequence of records.
///
/// Readers run beside the writer. They must look only at the part of the current epoch that is known to be recorded.
pub trait LogRead: Send + Sync {
    /// Numbers of the epochs that are there and not set aside, ascending.
    ///
    /// # Errors
    /// [`StoreError`].
    fn epochs(&self) -> Result<Vec<u64>, StoreError>;

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

    /// Cuts the log to `len` bytes, durably. With `keep`, what is cut off is first put where a person can find it.
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
