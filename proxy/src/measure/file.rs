//! Measuring one file so that the digest belongs to one state of it.

use std::{
    fs::{File, Metadata, OpenOptions},
    io,
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use onequote_evidence::digest::{FileDigest, FileDigestAlg};

use super::{Digester, MeasureErrorKind, Progress, digest::Wanted};

/// The most symbolic links that are followed on one path, as many as the kernel follows.
const MAX_LINKS: u32 = 40;

/// What tells one state of a file from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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
    /// What is kept to measure it again with less reading, where it was to be and could be.
    pub saved: Option<Saved>,
}

/// The tree of a digest, and the file's stamp then.
#[derive(Debug, Clone)]
pub struct Saved {
    /// As `onequote_verity` keeps it.
    pub tree: Arc<File>,
    /// Before and after the file was read.
    pub stamp: Stamp,
}

/// Opens for reading without waiting for whoever is at the other end of a FIFO, which is then refused.
pub(super) fn open(path: &Path) -> Result<File, MeasureErrorKind> {
    let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::CLOEXEC | rustix::fs::OFlags::NOCTTY;
    let flags = i32::try_from(flags.bits()).unwrap_or_default();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_file() || kind.is_block_device() { Ok(file) } else { Err(MeasureErrorKind::NotAFile) }
}

/// When a symbolic link on the way to `path` was last made, if there is one: a link that was turned to another file and
/// back leaves both files as they were.
///
/// # Errors
/// When a part of the path is not there, or links lead in circles.
pub(super) fn newest_link(path: &Path) -> io::Result<Option<SystemTime>> {
    let mut rest: Vec<PathBuf> = path.components().rev().map(|c| PathBuf::from(c.as_os_str())).collect();
    let (mut at, mut newest, mut links) = (PathBuf::from("/"), None, 0);
    while let Some(part) = rest.pop() {
        if part == Path::new("..") {
            at.pop();
            continue;
        }
        let next = at.join(part);
        let m = std::fs::symlink_metadata(&next)?;
        if !m.file_type().is_symlink() {
            at = next;
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            return Err(io::Error::other("too many symbolic links"));
        }
        let seconds = Duration::from_secs(u64::try_from(m.ctime()).unwrap_or(0));
        let nanos = Duration::from_nanos(u64::try_from(m.ctime_nsec()).unwrap_or(0));
        newest = newest.max(Some(SystemTime::UNIX_EPOCH + seconds + nanos));
        let target = std::fs::read_link(&next)?;
        rest.extend(target.components().rev().map(|c| PathBuf::from(c.as_os_str())));
    }
    Ok(newest)
}

/// Measures what `path` names. The file, and what the path names, must be the same before and after.
pub(crate) async fn measure_path(
    digester: &Digester,
    path: &Path,
    alg: FileDigestAlg,
    progress: Option<Progress>,
) -> Result<MeasuredFile, MeasureErrorKind> {
    measure_named(digester, path, alg, false, progress).await
}

/// The same of a file that may be `hot`: a guest may write it meanwhile.
pub(crate) async fn measure_named(
    digester: &Digester,
    path: &Path,
    alg: FileDigestAlg,
    hot: bool,
    progress: Option<Progress>,
) -> Result<MeasuredFile, MeasureErrorKind> {
    let file = open(path)?;
    let id = Stamp::from(&file.metadata()?).file;
    let measured = measure_open(digester, file, alg, hot, progress).await?;
    if Stamp::from(&std::fs::metadata(path)?).file != id {
        return Err(MeasureErrorKind::Changed);
    }
    Ok(measured)
}

/// Measures an open file. Unless it is `hot` (a guest may write it meanwhile), it must not change.
pub(super) async fn measure_open(
    digester: &Digester,
    file: File,
    alg: FileDigestAlg,
    hot: bool,
    progress: Option<Progress>,
) -> Result<MeasuredFile, MeasureErrorKind> {
    let before = Stamp::from(&file.metadata()?);
    let file = Arc::new(file);
    let wanted = Wanted { alg, stamp: (!hot).then_some(before), progress };
    let (size, digest) = digester.digest(Arc::clone(&file), wanted).await?;
    if !hot && Stamp::from(&file.metadata()?) != before {
        return Err(MeasureErrorKind::Changed);
    }
    Ok(MeasuredFile { file, id: before.file, size, digest, saved: None })
}

/// Measures an open image, which must not change, and keeps the tree of its digest in `tree`, an empty file.
pub(super) async fn measure_and_save(
    digester: &Digester,
    file: File,
    tree: File,
) -> Result<MeasuredFile, MeasureErrorKind> {
    let before = Stamp::from(&file.metadata()?);
    let (file, tree) = (Arc::new(file), Arc::new(tree));
    let ((size, digest), saved) = digester.digest_and_save(Arc::clone(&file), Arc::clone(&tree)).await?;
    if Stamp::from(&file.metadata()?) != before {
        return Err(MeasureErrorKind::Changed);
    }
    let saved = saved.then_some(Saved { tree, stamp: before });
    Ok(MeasuredFile { file, id: before.file, size, digest, saved })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use std::{os::unix::fs::FileExt, process::Command};

    use super::*;

    /// Measures a file by its path, as images are and as everything else is.
    async fn both(path: &Path, progress: Option<Progress>) -> [Result<MeasuredFile, MeasureErrorKind>; 2] {
        let digester = Digester::default();
        [
            measure_path(&digester, path, FileDigestAlg::Sha256, progress.clone()).await,
            measure_path(&digester, path, FileDigestAlg::FsVerity, progress).await,
        ]
    }

    #[tokio::test]
    async fn the_digest_is_that_of_sha256sum() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        for size in [0, 1, 1 << 20, (3 << 20) + 5] {
            std::fs::write(&path, vec![7; size]).unwrap();
            let sum = Command::new("sha256sum").arg(&path).output().unwrap().stdout;
            let measured = measure_path(&Digester::default(), &path, FileDigestAlg::Sha256, None).await.unwrap();
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
        let algs = [FileDigestAlg::Sha256, FileDigestAlg::FsVerity];
        for (change, alg) in changes.into_iter().flat_map(|change| algs.map(|alg| (change, alg))) {
            std::fs::write(&path, vec![7; 3 << 20]).unwrap();
            std::fs::write(path.with_extension("other"), vec![7; 3 << 20]).unwrap();
            let once = std::sync::Once::new();
            let at = path.clone();
            let progress: Progress = Arc::new(move |_| once.call_once(|| change(&at)));
            let e = measure_path(&Digester::default(), &path, alg, Some(progress)).await.unwrap_err();
            assert!(matches!(e, MeasureErrorKind::Changed), "{e}");
        }
    }

    #[test]
    fn a_link_that_was_turned_is_seen() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path().canonicalize().unwrap();
        std::fs::create_dir(dir.join("d")).unwrap();
        std::fs::write(dir.join("d/good"), "good").unwrap();
        assert_eq!(newest_link(&dir.join("d/good")).unwrap(), None);
        let (link, way) = (dir.join("d/kernel"), dir.join("way"));
        std::os::unix::fs::symlink("../d/good", &link).unwrap();
        std::os::unix::fs::symlink(dir.join("d"), &way).unwrap();
        let before = newest_link(&way.join("kernel")).unwrap().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        std::fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink("good", &link).unwrap();
        assert!(newest_link(&way.join("kernel")).unwrap().unwrap() > before);
        std::os::unix::fs::symlink("loop", dir.join("loop")).unwrap();
        assert!(newest_link(&dir.join("loop")).is_err());
    }

    #[tokio::test]
    async fn only_files_are_measured() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        for path in [&fifo, dir.path(), Path::new("/dev/zero")] {
            for measured in both(path, None).await {
                let e = measured.unwrap_err();
                assert!(matches!(e, MeasureErrorKind::NotAFile), "{}: {e}", path.display());
            }
        }
    }

    #[tokio::test]
    async fn a_file_that_shrinks_is_not_measured() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, vec![7; 30 << 20]).unwrap();
        let shrink = path.clone();
        let progress: Progress =
            Arc::new(move |_| File::options().write(true).open(&shrink).unwrap().set_len(1 << 20).unwrap());
        for measured in both(&path, Some(progress)).await {
            std::fs::write(&path, vec![7; 30 << 20]).unwrap();
            let e = measured.unwrap_err();
            assert!(matches!(e, MeasureErrorKind::Changed), "{e}");
        }
    }

    #[tokio::test]
    async fn a_file_too_large_to_be_read_is_an_error_unless_holes_are_left_out() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("f");
        let file = File::create(&path).unwrap();
        file.set_len(i64::MAX.unsigned_abs()).unwrap();
        let measured = measure_path(&Digester::default(), &path, FileDigestAlg::FsVerity, None).await.unwrap();
        assert_eq!(measured.size, i64::MAX.unsigned_abs());
        let begun = std::time::Instant::now();
        let e = measure_path(&Digester::default(), &path, FileDigestAlg::Sha256, None).await.unwrap_err();
        assert!(matches!(e, MeasureErrorKind::Unsupported(_)) && e.to_string().contains("64 GiB"), "{e}");
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn reading_ends_when_nobody_waits() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("endless");
        // Each piece takes some time, so that there is something to be given up.
        File::create(&path).unwrap().set_len(60 << 30).unwrap();
        let (reading, read) = std::sync::mpsc::channel();
        let progress: Progress = Arc::new(move |_| {
            // Nobody listens any more once the test has seen enough.
            let _ = reading.send(());
        });
        let task = tokio::spawn(async move {
            measure_path(&Digester::default(), &path, FileDigestAlg::Sha256, Some(progress)).await.is_ok()
        });
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
