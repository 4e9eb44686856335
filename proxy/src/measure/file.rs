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
