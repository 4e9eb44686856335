//! Logs in memory that survive the process in tests, with faults on request.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{Arc, Mutex, MutexGuard},
};

use super::{LogRead, LogStore, StoreError};

/// A disk. Clones share it.
#[derive(Clone, Default)]
pub(crate) struct MemoryDisk(Arc<Mutex<Disk>>);

#[derive(Default)]
struct Disk {
    logs: BTreeMap<u64, Log>,
    kept: Vec<Vec<u8>>,
    aside: BTreeMap<u64, Vec<u8>>,
    /// Asked before each change with its name and the number of bytes it writes.
    fault: Option<FaultFn>,
}

#[derive(Default)]
struct Log {
    /// From `base` on.
    bytes: Vec<u8>,
    base: u64,
    synced: usize,
    /// Where segments begin, but for the one at 0.
    segments: BTreeSet<u64>,
    snapshots: BTreeMap<u64, Vec<u8>>,
    dropped: u64,
}

impl Log {
    fn at(&self, offset: u64) -> usize {
        usize::try_from(offset.saturating_sub(self.base)).unwrap()
    }

    fn starts(&self) -> Vec<u64> {
        (self.base == 0).then_some(0).into_iter().chain(self.segments.iter().copied()).collect()
    }
}

type FaultFn = Box<dyn FnMut(&'static str, usize) -> DiskFault + Send>;

/// What happens to a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DiskFault {
    /// It works.
    None,
    /// It fails and nothing was changed.
    Before,
    /// It fails after all of it was done.
    After,
    /// An append fails after so many bytes.
    Torn(usize),
}

impl MemoryDisk {
    pub(crate) fn store(&self) -> Box<dyn LogStore> {
        Box::new(self.clone())
    }

    pub(crate) fn set_fault(&self, fault: impl FnMut(&'static str, usize) -> DiskFault + Send + 'static) {
        self.lock().fault = Some(Box::new(fault));
    }

    pub(crate) fn clear_fault(&self) {
        self.lock().fault = None;
    }

    /// Bytes of each log in force.
    pub(crate) fn logs(&self) -> BTreeMap<u64, Vec<u8>> {
        self.lock().logs.iter().map(|(&number, log)| (number, log.bytes.clone())).collect()
    }

    pub(crate) fn edit(&self, epoch: u64, edit: impl FnOnce(&mut Vec<u8>)) {
        let mut disk = self.lock();
        let log = disk.logs.get_mut(&epoch).unwrap();
        edit(&mut log.bytes);
        log.synced = log.bytes.len();
    }

    /// Where the segments of a log begin.
    pub(crate) fn starts(&self, epoch: u64) -> Vec<u64> {
        self.lock().logs[&epoch].starts()
    }

    /// Changes a snapshot, or takes it away.
    pub(crate) fn edit_snapshot(&self, epoch: u64, offset: u64, edit: impl FnOnce(Vec<u8>) -> Option<Vec<u8>>) {
        let mut disk = self.lock();
        let snapshots = &mut disk.logs.get_mut(&epoch).unwrap().snapshots;
        let old = snapshots.remove(&offset).unwrap();
        snapshots.extend(edit(old).map(|new| (offset, new)));
    }

    /// Takes the segments before `offset` away, without a word.
    pub(crate) fn lose_before(&self, epoch: u64, offset: u64) {
        lose_before(self.lock().logs.get_mut(&epoch).unwrap(), offset);
    }

    /// Logs set aside.
    pub(crate) fn aside(&self) -> BTreeMap<u64, Vec<u8>> {
        self.lock().aside.clone()
    }

    /// Bytes cut off and kept.
    pub(crate) fn kept(&self) -> Vec<Vec<u8>> {
        self.lock().kept.clone()
    }

    /// Whether everything appended to the newest log is durable.
    pub(crate) fn is_synced(&self) -> bool {
        self.lock().logs.values().next_back().is_none_or(|log| log.synced == log.bytes.len())
    }

    fn lock(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().unwrap()
    }

    fn change(
        &self,
        name: &'static str,
        bytes: usize,
        change: impl FnOnce(&mut Disk, usize) -> io::Result<()>,
    ) -> Result<(), StoreError> {
        let mut disk = self.lock();
        let fault = disk.fault.as_mut().map_or(DiskFault::None, |fault| fault(name, bytes));
        let full = || StoreError::new("memory", name, io::ErrorKind::StorageFull.into());
        let real = |error| StoreError::new("memory", name, error);
        match fault {
            DiskFault::None => change(&mut disk, bytes).map_err(real),
            DiskFault::Before => Err(full()),
            DiskFault::After => change(&mut disk, bytes).map_err(real).and(Err(full())),
            DiskFault::Torn(part) => change(&mut disk, part.min(bytes)).map_err(real).and(Err(full())),
        }
    }
}

fn lose_before(log: &mut Log, offset: u64) {
    let gone = log.at(offset);
    log.bytes.drain(..gone);
    log.synced -= gone.min(log.synced);
    log.base = log.base.max(offset);
    log.segments.retain(|start| *start >= offset);
    log.snapshots.retain(|start, _| *start >= offset);
}

impl LogStore for MemoryDisk {
    fn reader(&self) -> Arc<dyn LogRead> {
        Arc::new(self.clone())
    }

    fn create(&mut self, epoch: u64) -> Result<(), StoreError> {
        self.change("create", 0, |disk, _| {
            disk.logs.entry(epoch).or_default();
            Ok(())
        })
    }

    fn keep_snapshot(&mut self, epoch: u64, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        // A snapshot is renamed to where it belongs: it is there whole or not at all.
        let bytes = bytes.to_vec();
        self.change("keep snapshot", 0, |disk, _| {
            disk.logs.get_mut(&epoch).ok_or(io::ErrorKind::NotFound)?.snapshots.insert(offset, bytes);
            Ok(())
        })
    }

    fn begin_segment(&mut self, epoch: u64, offset: u64) -> Result<(), StoreError> {
        self.change("begin segment", 0, |disk, _| {
            disk.logs.get_mut(&epoch).ok_or(io::ErrorKind::NotFound)?.segments.insert(offset);
            Ok(())
        })
    }

    fn drop_before(&mut self, epoch: u64, offset: u64) -> Result<(), StoreError> {
        self.change("note what is dropped", 0, |disk, _| {
            disk.logs.get_mut(&epoch).ok_or(io::ErrorKind::NotFound)?.dropped = offset;
            Ok(())
        })?;
        // One segment a step.
        for next in self.segments(epoch)?.into_iter().skip(1).filter(|start| *start <= offset) {
            self.change("drop", 0, |disk, _| {
                lose_before(disk.logs.get_mut(&epoch).ok_or(io::ErrorKind::NotFound)?, next);
                Ok(())
            })?;
        }
        Ok(())
    }

    fn append(&mut self, epoch: u64, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        self.change("append", bytes.len(), |disk, part| {
            let log = disk.logs.get_mut(&epoch).ok_or(io::ErrorKind::NotFound)?;
            assert_eq!(log.base + log.bytes.len() as u64, offset, "appends go to the end");
            log.bytes.extend_from_slice(&bytes[..part]);
            Ok(())
        })
    }

    fn sync(&mut self, epoch: u64) -> Result<(), StoreError> {
        self.change("sync", 0, |disk, _| {
            let log = disk.logs.get_mut(&epoch).ok_or(io::ErrorKind::NotFound)?;
            log.synced = log.bytes.len();
            Ok(())
        })
    }

    fn cut(&mut self, epoch: u64, len: u64, keep: bool) -> Result<(), StoreError> {
        self.change("cut", 0, |disk, _| {
            let log = disk.logs.get_mut(&epoch).ok_or(io::ErrorKind::NotFound)?;
            let at = log.at(len);
            let tail = log.bytes.split_off(at);
            log.segments.retain(|start| *start < len);
            log.snapshots.retain(|start, _| *start < len);
            log.synced = log.bytes.len();
            if keep {
                disk.kept.push(tail);
            }
            Ok(())
        })
    }

    fn set_aside(&mut self, epoch: u64) -> Result<(), StoreError> {
        self.change("set aside", 0, |disk, _| {
            if let Some(log) = disk.logs.remove(&epoch) {
                disk.aside.insert(epoch, log.bytes);
            }
            Ok(())
        })
    }
}

impl LogRead for MemoryDisk {
    fn epochs(&self) -> Result<Vec<u64>, StoreError> {
        Ok(self.lock().logs.keys().copied().collect())
    }

    fn segments(&self, epoch: u64) -> Result<Vec<u64>, StoreError> {
        Ok(self.lock().logs.get(&epoch).map(Log::starts).unwrap_or_default())
    }

    fn dropped(&self, epoch: u64) -> Result<u64, StoreError> {
        Ok(self.lock().logs.get(&epoch).map_or(0, |log| log.dropped))
    }

    fn snapshot(&self, epoch: u64, offset: u64, _limit: usize) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.lock().logs.get(&epoch).and_then(|log| log.snapshots.get(&offset).cloned()))
    }

    fn read_at(&self, epoch: u64, offset: u64, buffer: &mut [u8]) -> Result<usize, StoreError> {
        let disk = self.lock();
        let Some(log) = disk.logs.get(&epoch) else {
            return Err(StoreError::new("memory", "read", io::ErrorKind::NotFound.into()));
        };
        let rest = log.bytes.get(log.at(offset)..).unwrap_or_default();
        // As from files: not beyond a segment.
        let room = log.segments.iter().find(|start| **start > offset).map_or(u64::MAX, |next| next - offset);
        let len = rest.len().min(buffer.len()).min(usize::try_from(room).unwrap_or(usize::MAX));
        buffer[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }
}
