//! Measuring one file so that the digest belongs to one state of it.

use std::{
    fs::{File, Metadata, OpenOptions},
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::Path,
    sync::Arc,
};

use onequote_evidence::digest::FileDigest;

use super::{Digester, MeasureErrorKind, Progress};

/// What tells one state of a file from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Device and inode.
    pub file: (u64, u64),
    /// Size in bytes, as the file system says; 0 for block devices.
    pub size: u64,
    /// Last change of the data: seconds and nanoseconds.
    pub mtime: (i64, i64),
    /// Last change of data or attributes: seconds and nanoseconds.
    pub ctime: (i64, i64),
}

impl From<&Metadata> for Stamp {
    fn from(m: &Metadata) -> Self {
        Self {
            file: (m.dev(), m.ino()),
            size: m.size(),
            mtime: (m.mtime(), m.mtime_nsec()),
            ctime: (m.ctime(), m.ctime_nsec()),
        }
    }
}

/// A measured file, still open.
#[derive(Debug, Clone)]
pub struct MeasuredFile {
    /// Open for reading.
    pub file: Arc<File>,
    /// Device and inode.
    pub id: (u64, u64),
    /// Bytes read.
    pub size: u64,
    /// Their digest.
    pub digest: FileDigest,
}

/// Opens for reading without waiting for whoever is at the other end of a FIFO, which is then refused.
pub(super) fn open(path: &Path) -> Result<File, MeasureErrorKind> {
    let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::CLOEXEC | rustix::fs::OFlags::NOCTTY;
    let flags = i32::try_from(flags.bits()).unwrap_or_default();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_file() || kind.is_block_device() { Ok(file) } else { Err(MeasureErrorKind::NotAFile) }
}

/// Measures what `path` names. The file, and what the path names, must be the same before and after.
pub(crate) async fn measure_path(
    digester: &Digester,
    path: &Path,
    progress: Option<Progress>,
) -> Result<MeasuredFile, MeasureErrorKind> {
    let file = open(path)?;
    let id = Stamp::from(&file.metadata()?).file;
    let measured = measure_open(digester, file, false, progress).await?;
    if Stamp::from(&std::fs::metadata(path)?).file != id {
        return Err(MeasureErrorKind::Changed);
    }
    Ok(measured)
}

/// Measures an open file. Unless it is `hot` (a guest may write it meanwhile), it must not change.
pub(super) async fn measure_open(
    digester: &Digester,
    file: File,
    hot: bool,
    progress: Option<Progress>,
) -> Result<MeasuredFile, MeasureErrorKind> {
    let before = Stamp::from(&file.metadata()?);
    let file = Arc::new(file);
    let (size, digest) = digester.digest(Arc::clone(&file), progress).await?;
    if !hot && Stamp::from(&file.metadata()?) != before {
        return Err(MeasureErrorKind::Changed);
    }
    Ok(MeasuredFile { file, id: before.file, size, digest })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use std::{os::unix::fs::FileExt, process::Command};

    use super::*;

    #[tokio::test]
    async fn the_digest_is_that_of_sha256sum() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        for size in [0, 1, 1 << 20, (3 << 20) + 5] {
            std::fs::write(&path, vec![7; size]).unwrap();
            let sum = Command::new("sha256sum").arg(&path).output().unwrap().stdout;
            let measured = measure_path(&Digester::default(), &path, None).await.unwrap();
            assert_eq!(measured.digest.value.to_string().as_bytes(), &sum[..64]);
            assert_eq!(measured.size, size as u64);
        }
    }

    #[tokio::test]
    async fn a_file_that_changes_meanwhile_is_not_measured() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        type Change = fn(&Path);
        let changes: [Change; 3] = [
            |p| File::options().write(true).open(p).unwrap().write_all_at(b"x", 0).unwrap(),
            |p| File::options().append(true).open(p).unwrap().set_len(5 << 20).unwrap(),
            |p| std::fs::rename(p.with_extension("other"), p).unwrap(),
        ];
        for change in changes {
            std::fs::write(&path, vec![7; 3 << 20]).unwrap();
            std::fs::write(path.with_extension("other"), vec![7; 3 << 20]).unwrap();
            let once = std::sync::Once::new();
            let at = path.clone();
            let progress: Progress = Arc::new(move |_| once.call_once(|| change(&at)));
            let e = measure_path(&Digester::default(), &path, Some(progress)).await.unwrap_err();
            assert!(matches!(e, MeasureErrorKind::Changed), "{e}");
        }
    }

    #[tokio::test]
    async fn only_files_are_measured() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        for path in [&fifo, dir.path(), Path::new("/dev/zero")] {
            let e = measure_path(&Digester::default(), path, None).await.unwrap_err();
            assert!(matches!(e, MeasureErrorKind::NotAFile), "{}: {e}", path.display());
        }
    }

    #[tokio::test]
    async fn reading_ends_when_nobody_waits() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("endless");
        File::create(&path).unwrap().set_len(1 << 40).unwrap();
        let (reading, read) = std::sync::mpsc::channel();
        let progress: Progress = Arc::new(move |_| {
            // Nobody listens any more once the test has seen enough.
            let _ = reading.send(());
        });
        let task = tokio::spawn(async move { measure_path(&Digester::default(), &path, Some(progress)).await.is_ok() });
        let read = tokio::task::spawn_blocking(move || {
            read.recv().unwrap();
            read
        });
        let read = read.await.unwrap();
        task.abort();
        // The reader lets go of its callback: the channel ends.
        tokio::task::spawn_blocking(move || while read.recv().is_ok() {}).await.unwrap();
    }
}
