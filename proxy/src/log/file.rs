//! Logs in a folder: `epoch-00000001.cel` and so on, for root's eyes only. A segment that begins at byte N of its epoch's log is
//! in `epoch-00000001.from-N.cel`, its snapshot in `….from-N.snapshot`. `epoch-00000001.dropped` says up to which
//! byte the proxy itself has dropped segments.
//!
//! Beside them: `….cel.torn-OFFSET`, what was cut off a log after a crash; `….cel.aside`, logs that the registers
//! contradict; `lock`, held by the one writer.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{LogRead, LogStore, StoreError};

/// A folder of logs for reading, also while another process writes it.
#[derive(Debug, Clone)]
pub struct LogFolder {
    dir: PathBuf,
}

impl LogFolder {
    /// The logs in `dir`, which need not exist.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// The file of the segment of an epoch's log that begins at `offset`.
    #[must_use]
    pub fn path(&self, epoch: u64, offset: u64) -> PathBuf {
        self.name(epoch, offset, "cel")
    }

    fn name(&self, epoch: u64, offset: u64, kind: &str) -> PathBuf {
        self.dir.join(match offset {
            0 => format!("epoch-{epoch:08}.{kind}"),
            _ => format!("epoch-{epoch:08}.from-{offset}.{kind}"),
        })
    }

    /// Epoch and offset of every file of that kind, ascending.
    fn list(&self, kind: &str) -> Result<Vec<(u64, u64)>, StoreError> {
        let fail = |error| StoreError::new(&self.dir, "list the logs", error);
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(fail(error)),
        };
        let mut found = Vec::new();
        for entry in entries {
            let name = entry.map_err(fail)?.file_name();
            let parts =
                name.to_str().and_then(|name| name.strip_prefix("epoch-")?.strip_suffix(kind)?.strip_suffix('.'));
            let (epoch, offset) = parts.map_or(("", "0"), |name| name.split_once(".from-").unwrap_or((name, "0")));
            if let (Ok(epoch), Ok(offset)) = (epoch.parse(), offset.parse())
                && self.name(epoch, offset, kind).file_name() == Some(&name)
            {
                found.push((epoch, offset));
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    /// Where the segment that holds `offset` begins, and where the next does.
    fn holding(&self, epoch: u64, offset: u64) -> Result<(u64, Option<u64>), StoreError> {
        let segments = self.segments(epoch)?;
        let after = segments.iter().copied().find(|start| *start > offset);
        let start = segments.into_iter().rev().find(|start| *start <= offset);
        Ok((start.unwrap_or_default(), after))
    }
}

impl LogRead for LogFolder {
    fn epochs(&self) -> Result<Vec<u64>, StoreError> {
        let mut epochs: Vec<u64> = self.list("cel")?.into_iter().map(|(epoch, _)| epoch).collect();
        epochs.dedup();
        Ok(epochs)
    }

    fn segments(&self, epoch: u64) -> Result<Vec<u64>, StoreError> {
        let all = self.list("cel")?.into_iter();
        Ok(all.filter(|(number, _)| *number == epoch).map(|(_, offset)| offset).collect())
    }

    fn dropped(&self, epoch: u64) -> Result<u64, StoreError> {
        let path = self.name(epoch, 0, "dropped");
        match fs::read_to_string(&path) {
            Ok(text) => {
                text.trim().parse().map_err(|_| StoreError::new(path, "read", io::ErrorKind::InvalidData.into()))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(StoreError::new(path, "read", error)),
        }
    }

    fn snapshot(&self, epoch: u64, offset: u64, limit: usize) -> Result<Option<Vec<u8>>, StoreError> {
        let path = self.name(epoch, offset, "snapshot");
        let mut bytes = Vec::new();
        match File::open(&path).and_then(|file| file.take(limit as u64 + 1).read_to_end(&mut bytes)) {
            Ok(_) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(StoreError::new(path, "read", error)),
        }
    }

    fn read_at(&self, epoch: u64, offset: u64, buffer: &mut [u8]) -> Result<usize, StoreError> {
        let (start, next) = self.holding(epoch, offset)?;
        let path = self.path(epoch, start);
        // Not beyond the segment, whatever its file holds.
        let room = next.map_or(u64::MAX, |next| next - offset);
        let len = usize::try_from(room).unwrap_or(usize::MAX).min(buffer.len());
        let mut read = 0;
        File::open(&path)
            .and_then(|file| {
                while read < len {
                    match file.read_at(&mut buffer[read..len], offset - start + read as u64) {
                        Ok(0) => break,
                        Ok(n) => read += n,
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        Err(error) => return Err(error),
                    }
                }
                Ok(read)
            })
            .map_err(|error| StoreError::new(path, "read", error))
    }
}

/// A folder of logs for writing.
pub struct FileStore {
    folder: LogFolder,
    /// The segment that is being written: its epoch, where it begins, its file.
    current: Option<(u64, u64, File)>,
    /// Its lock is held as long as the file is open.
    _lock: File,
}

impl FileStore {
    /// Opens the folder, and makes it if it is not there.
    ///
    /// # Errors
    /// [`StoreError`]; also when another process has it open.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let dir = dir.into();
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(|error| StoreError::new(&dir, "make the folder", error))?;
        let path = dir.join("lock");
        let lock = private().create(true).truncate(false).open(&path);
        let lock = lock.map_err(|error| StoreError::new(&path, "open", error))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(|error| {
            let error = match error {
                rustix::io::Errno::WOULDBLOCK => io::Error::other("another onequote-proxy writes this log"),
                error => error.into(),
            };
            StoreError::new(&path, "lock", error)
        })?;
        Ok(Self { folder: LogFolder::new(dir), current: None, _lock: lock })
    }

    /// Runs `action` on the open file of the last segment of an epoch's log, and on where that begins.
    fn with<T>(
        &mut self,
        epoch: u64,
        doing: &'static str,
        action: impl FnOnce(&mut File, u64) -> io::Result<T>,
    ) -> Result<T, StoreError> {
        let (start, open) = match self.current.take() {
            Some((number, start, file)) if number == epoch => (start, Ok(file)),
            _ => {
                let start = self.folder.segments(epoch)?.last().copied().unwrap_or_default();
                (start, private().open(self.folder.path(epoch, start)))
            }
        };
        open.and_then(|file| {
            let (_, _, file) = self.current.insert((epoch, start, file));
            action(file, start)
        })
        .map_err(|error| StoreError::new(self.folder.path(epoch, start), doing, error))
    }

    /// Removes files that may be gone already.
    fn remove(&self, paths: &[PathBuf]) -> Result<(), StoreError> {
        for path in paths {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(StoreError::new(path, "remove", error));
                }
                _ => {}
            }
        }
        self.sync_folder()
    }

    /// Puts a whole file in its place, durably.
    fn put(&self, path: PathBuf, bytes: &[u8]) -> Result<(), StoreError> {
        let beside = with_suffix(&path, ".new");
        private()
            .create(true)
            .truncate(true)
            .open(&beside)
            .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
            .and_then(|()| fs::rename(&beside, &path))
            .map_err(|error| StoreError::new(path, "write", error))?;
        self.sync_folder()
    }

    fn sync_folder(&self) -> Result<(), StoreError> {
        File::open(&self.folder.dir)
            .and_then(|dir| dir.sync_all())
            .map_err(|error| StoreError::new(&self.folder.dir, "sync the folder", error))
    }
}

impl LogStore for FileStore {
    fn reader(&self) -> Arc<dyn LogRead> {
        Arc::new(self.folder.clone())
    }

    fn create(&mut self, epoch: u64) -> Result<(), StoreError> {
        self.begin_segment(epoch, 0)
    }

    fn keep_snapshot(&mut self, epoch: u64, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        self.put(self.folder.name(epoch, offset, "snapshot"), bytes)
    }

    fn begin_segment(&mut self, epoch: u64, offset: u64) -> Result<(), StoreError> {
        let path = self.folder.path(epoch, offset);
        let file = private().create(true).truncate(false).open(&path);
        let file = file.map_err(|error| StoreError::new(path, "create", error))?;
        self.current = Some((epoch, offset, file));
        self.sync_folder()
    }

    fn drop_before(&mut self, epoch: u64, offset: u64) -> Result<(), StoreError> {
        if self.folder.segments(epoch)?.first().is_none_or(|oldest| *oldest >= offset) {
            return Ok(());
        }
        self.put(self.folder.name(epoch, 0, "dropped"), format!("{offset}\n").as_bytes())?;
        // A snapshot goes before its segment, so that none is left alone.
        for kind in ["snapshot", "cel"] {
            let old = self.folder.list(kind)?.into_iter().filter(|(number, start)| *number == epoch && *start < offset);
            let paths: Vec<PathBuf> = old.map(|(_, start)| self.folder.name(epoch, start, kind)).collect();
            self.remove(&paths)?;
        }
        Ok(())
    }

    fn append(&mut self, epoch: u64, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        self.with(epoch, "write", |file, start| file.write_all_at(bytes, offset.saturating_sub(start)))
    }

    fn sync(&mut self, epoch: u64) -> Result<(), StoreError> {
        self.with(epoch, "sync", |file, _| file.sync_data())
    }

    fn cut(&mut self, epoch: u64, len: u64, keep: bool) -> Result<(), StoreError> {
        let segments = self.folder.segments(epoch)?;
        let (mut left, gone): (Vec<u64>, Vec<u64>) =
            segments.into_iter().partition(|start| *start == 0 || *start < len);
        if keep {
            let torn = |start: u64| with_suffix(&self.folder.path(epoch, start), &format!(".torn-{len}"));
            for start in left.last().into_iter().chain(&gone) {
                let (from, to) = (self.folder.path(epoch, *start), torn(*start));
                keep_tail(&from, len.saturating_sub(*start), &to)
                    .map_err(|error| StoreError::new(to, "keep a torn record's bytes", error))?;
            }
            self.sync_folder()?;
        }
        for start in gone.iter().rev() {
            self.current = None;
            self.remove(&[self.folder.path(epoch, *start), self.folder.name(epoch, *start, "snapshot")])?;
        }
        if left.pop().is_none() {
            return Ok(());
        }
        self.with(epoch, "cut", |file, start| {
            file.set_len(len.saturating_sub(start))?;
            file.sync_all()
        })
    }

    fn set_aside(&mut self, epoch: u64) -> Result<(), StoreError> {
        self.current = self.current.take().filter(|(number, ..)| *number != epoch);
        for kind in ["dropped", "snapshot", "cel"] {
            for (_, start) in self.folder.list(kind)?.into_iter().filter(|(number, _)| *number == epoch) {
                let path = self.folder.name(epoch, start, kind);
                match fs::rename(&path, with_suffix(&path, ".aside")) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(StoreError::new(path, "set aside", error));
                    }
                    _ => {}
                }
            }
        }
        self.sync_folder()
    }
}

/// Copies what follows the first `len` bytes into a file of its own.
fn keep_tail(from: &Path, len: u64, to: &Path) -> io::Result<()> {
    let mut source = File::open(from)?;
    io::Seek::seek(&mut source, io::SeekFrom::Start(len))?;
    let mut kept = private().create(true).truncate(true).open(to)?;
    io::copy(&mut source, &mut kept)?;
    kept.flush()?;
    kept.sync_all()
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    options
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn content(folder: &LogFolder, epoch: u64) -> Vec<u8> {
        let mut buffer = vec![0; 100];
        let len = folder.read_at(epoch, 0, &mut buffer).unwrap();
        buffer.truncate(len);
        buffer
    }

    #[test]
    fn writes_cuts_and_sets_aside() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("deep/log");
        let folder = LogFolder::new(&dir);
        assert!(folder.epochs().unwrap().is_empty());
        let mut store = FileStore::open(&dir).unwrap();
        store.create(1).unwrap();
        store.append(1, 0, b"first").unwrap();
        store.append(1, 5, b"second").unwrap();
        store.sync(1).unwrap();
        store.create(1).unwrap();
        assert_eq!(content(&folder, 1), b"firstsecond");
        store.cut(1, 5, true).unwrap();
        assert_eq!(content(&folder, 1), b"first");
        assert_eq!(fs::read(dir.join("epoch-00000001.cel.torn-5")).unwrap(), b"second");
        store.create(2).unwrap();
        store.create(12_345_678_901).unwrap();
        fs::write(dir.join("epoch-3.cel"), b"not one of ours").unwrap();
        assert_eq!(folder.epochs().unwrap(), [1, 2, 12_345_678_901]);
        store.set_aside(1).unwrap();
        store.set_aside(1).unwrap();
        assert_eq!(folder.epochs().unwrap(), [2, 12_345_678_901]);
        assert_eq!(fs::read(dir.join("epoch-00000001.cel.aside")).unwrap(), b"first");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&dir), mode(&folder.path(2, 0))), (0o700, 0o600));
    }

    #[test]
    fn segments_are_one_log() {
        let dir = tempfile::tempdir().unwrap();
        let folder = LogFolder::new(dir.path());
        let mut store = FileStore::open(dir.path()).unwrap();
        store.create(1).unwrap();
        store.append(1, 0, b"first").unwrap();
        store.keep_snapshot(1, 5, b"one").unwrap();
        store.begin_segment(1, 5).unwrap();
        store.append(1, 5, b"second").unwrap();
        store.keep_snapshot(1, 11, b"two").unwrap();
        store.begin_segment(1, 11).unwrap();
        store.append(1, 11, b"third").unwrap();
        assert_eq!((folder.epochs().unwrap(), folder.segments(1).unwrap()), (vec![1], vec![0, 5, 11]));
        let mut buffer = [0; 20];
        assert_eq!(folder.read_at(1, 2, &mut buffer).unwrap(), 3, "up to the segment's end");
        assert_eq!(folder.read_at(1, 5, &mut buffer).unwrap(), 6);
        assert_eq!((folder.read_at(1, 13, &mut buffer).unwrap(), &buffer[..3]), (3, &b"ird"[..]));
        assert_eq!(folder.snapshot(1, 11, 10).unwrap().unwrap(), b"two");
        assert_eq!(folder.snapshot(1, 11, 1).unwrap().unwrap(), b"tw", "one more than the limit tells");

        // Cut at a segment's beginning, it is gone; its bytes and those of the next are kept.
        store.cut(1, 11, true).unwrap();
        assert_eq!((folder.segments(1).unwrap(), folder.snapshot(1, 11, 10).unwrap()), (vec![0, 5], None));
        assert_eq!(fs::read(dir.path().join("epoch-00000001.from-11.cel.torn-11")).unwrap(), b"third");
        store.cut(1, 7, false).unwrap();
        assert_eq!((folder.read_at(1, 5, &mut buffer).unwrap(), &buffer[..2]), (2, &b"se"[..]));

        store.drop_before(1, 5).unwrap();
        assert_eq!((folder.epochs().unwrap(), folder.segments(1).unwrap()), (vec![1], vec![5]));
        assert_eq!(folder.dropped(1).unwrap(), 5);
        drop(store);
        let mut store = FileStore::open(dir.path()).unwrap();
        store.append(1, 7, b"!").unwrap();
        assert_eq!((folder.read_at(1, 5, &mut buffer).unwrap(), &buffer[..3]), (3, &b"se!"[..]));
        store.set_aside(1).unwrap();
        assert!(folder.epochs().unwrap().is_empty());
        assert!(dir.path().join("epoch-00000001.from-5.cel.aside").exists());
        assert!(dir.path().join("epoch-00000001.from-5.snapshot.aside").exists());
    }

    #[test]
    fn one_writer_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let first = FileStore::open(dir.path()).unwrap();
        let error = FileStore::open(dir.path()).map(drop).unwrap_err();
        assert!(error.to_string().contains("another onequote-proxy"), "{error}");
        drop(first);
        FileStore::open(dir.path()).unwrap();
    }

    #[test]
    fn errors_name_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = FileStore::open(dir.path()).unwrap();
        let error = store.append(7, 0, b"x").unwrap_err();
        assert!(error.to_string().contains("epoch-00000007.cel: cannot write"), "{error}");
        assert!(store.reader().read_at(7, 0, &mut [0; 4]).is_err());
    }
}
