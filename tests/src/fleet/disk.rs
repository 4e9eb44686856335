//! A host's log in memory. It outlives the proxy as a disk does, and can be put back or edited as a disk can.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use onequote_proxy::log::{LogRead, LogStore, StoreError};

/// The disk. Clones are the same one.
#[derive(Clone, Default)]
pub struct Disk(Arc<Mutex<BTreeMap<u64, Vec<u8>>>>);

/// What was on a disk at some time.
#[derive(Clone)]
pub struct SavedDisk(BTreeMap<u64, Vec<u8>>);

impl Disk {
    /// For the proxy.
    #[must_use]
    pub fn store(&self) -> Box<dyn LogStore> {
        Box::new(self.clone())
    }

    /// What is on it now.
    #[must_use]
    pub fn save(&self) -> SavedDisk {
        SavedDisk(self.lock().clone())
    }

    /// Puts back what was on it.
    pub fn put_back(&self, saved: &SavedDisk) {
        self.lock().clone_from(&saved.0);
    }

    /// Another disk with the same content.
    #[must_use]
    pub fn copy(&self) -> Self {
        Self(Arc::new(Mutex::new(self.lock().clone())))
    }

    /// Edits the newest log.
    pub fn edit(&self, edit: impl FnOnce(&mut Vec<u8>)) {
        if let Some(mut log) = self.lock().last_entry() {
            edit(log.get_mut());
        }
    }

    /// Bytes of the newest log.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().last_key_value().map_or(0, |(_, log)| log.len())
    }

    /// Whether there is nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, epoch: u64, doing: &'static str, change: impl FnOnce(&mut Vec<u8>)) -> Result<(), StoreError> {
        match self.lock().get_mut(&epoch) {
            Some(log) => change(log),
            None => return Err(StoreError::new("memory", doing, io::ErrorKind::NotFound.into())),
        }
        Ok(())
    }
}

impl LogStore for Disk {
    fn reader(&self) -> Arc<dyn LogRead> {
        Arc::new(self.clone())
    }

    fn create(&mut self, epoch: u64) -> Result<(), StoreError> {
        // Simulated hosts keep the log of this epoch only: nobody asks for another.
        let mut logs = self.lock();
        logs.retain(|number, _| *number == epoch);
        logs.entry(epoch).or_default();
        Ok(())
    }

    fn append(&mut self, epoch: u64, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        self.change(epoch, "append", |log| {
            log.truncate(usize::try_from(offset).unwrap_or(usize::MAX));
            log.extend_from_slice(bytes);
        })
    }

    fn sync(&mut self, _epoch: u64) -> Result<(), StoreError> {
        Ok(())
    }

    fn cut(&mut self, epoch: u64, len: u64, _keep: bool) -> Result<(), StoreError> {
        self.change(epoch, "cut", |log| log.truncate(usize::try_from(len).unwrap_or(usize::MAX)))
    }

    fn set_aside(&mut self, epoch: u64) -> Result<(), StoreError> {
        self.lock().remove(&epoch);
        Ok(())
    }
}

impl LogRead for Disk {
    fn epochs(&self) -> Result<Vec<u64>, StoreError> {
        Ok(self.lock().keys().copied().collect())
    }

    fn read_at(&self, epoch: u64, offset: u64, buffer: &mut [u8]) -> Result<usize, StoreError> {
        let logs = self.lock();
        let log = logs.get(&epoch).ok_or_else(|| StoreError::new("memory", "read", io::ErrorKind::NotFound.into()))?;
        let rest = usize::try_from(offset).ok().and_then(|offset| log.get(offset..)).unwrap_or_default();
        let len = rest.len().min(buffer.len());
        buffer[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }
}
