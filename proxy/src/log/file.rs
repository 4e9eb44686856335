//! Logs in a folder: `epoch-00000001.cel` and so on, for root's eyes only.
//!
//! Beside them: `….cel.torn-OFFSET`, what was cut off a log after a crash; `….cel.aside`, logs that the registers
//! contradict; `lock`, held by the one writer.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
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

    /// The file of an epoch's log.
    #[must_use]
    pub fn path(&self, epoch: u64) -> PathBuf {
        self.dir.join(format!("epoch-{epoch:08}.cel"))
    }
}

impl LogRead for LogFolder {
    fn epochs(&self) -> Result<Vec<u64>, StoreError> {
        let fail = |error| StoreError::new(&self.dir, "list the logs", error);
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(fail(error)),
        };
        let mut epochs = Vec::new();
        for entry in entries {
            let name = entry.map_err(fail)?.file_name();
            let number = name.to_str().and_then(|name| name.strip_prefix("epoch-")?.strip_suffix(".cel")?.parse().ok());
            if let Some(number) = number
                && self.path(number).file_name() == Some(&name)
            {
                epochs.push(number);
            }
        }
        epochs.sort_unstable();
        Ok(epochs)
    }

    fn read_at(&self, epoch: u64, offset: u64, buffer: &mut [u8]) -> Result<usize, StoreError> {
        let path = self.path(epoch);
        let mut read = 0;
        File::open(&path)
            .and_then(|file| {
                while read < buffer.len() {
                    match file.read_at(&mut buffer[read..], offset + read as u64) {
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
    /// The log that is being written.
    current: Option<(u64, File)>,
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

    /// Runs `action` on the open file of an epoch's log.
    fn with<T>(
        &mut self,
        epoch: u64,
        doing: &'static str,
        action: impl FnOnce(&mut File) -> io::Result<T>,
    ) -> Result<T, StoreError> {
        let path = self.folder.path(epoch);
        let open = match self.current.take() {
            Some((number, file)) if number == epoch => Ok(file),
            _ => private().open(&path),
        };
        open.and_then(|file| {
            let (_, file) = self.current.insert((epoch, file));
            action(file)
        })
        .map_err(|error| StoreError::new(path, doing, error))
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
        let path = self.folder.path(epoch);
        let file = private().create(true).truncate(false).open(&path);
        let file = file.map_err(|error| StoreError::new(path, "create", error))?;
        self.current = Some((epoch, file));
        self.sync_folder()
    }

    fn append(&mut self, epoch: u64, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        self.with(epoch, "write", |file| file.write_all_at(bytes, offset))
    }

    fn sync(&mut self, epoch: u64) -> Result<(), StoreError> {
        self.with(epoch, "sync", |file| file.sync_data())
    }

    fn cut(&mut self, epoch: u64, len: u64, keep: bool) -> Result<(), StoreError> {
        if keep {
            let from = self.folder.path(epoch);
            let to = with_suffix(&from, &format!(".torn-{len}"));
            keep_tail(&from, len, &to).map_err(|error| StoreError::new(to, "keep a torn record's bytes", error))?;
            self.sync_folder()?;
        }
        self.with(epoch, "cut", |file| {
            file.set_len(len)?;
            file.sync_all()
        })
    }

    fn set_aside(&mut self, epoch: u64) -> Result<(), StoreError> {
        let path = self.folder.path(epoch);
        self.current = self.current.take().filter(|(number, _)| *number != epoch);
        match fs::rename(&path, with_suffix(&path, ".aside")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StoreError::new(path, "set aside", error)),
            _ => self.sync_folder(),
        }
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
        assert_eq!((mode(&dir), mode(&folder.path(2))), (0o700, 0o600));
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
