//! What can go wrong in measuring.

use std::{
    io,
    path::{Path, PathBuf},
};

use onequote_evidence::event::RefuseCause;

use crate::qmp::QmpError;

/// An item that could not be measured.
#[derive(Debug, thiserror::Error)]
#[error("{item}{}: {kind}", show(path))]
pub struct MeasureError {
    /// The item: a role's word (`kernel`) or an image's slot (`disk0/1`).
    pub item: String,
    /// The file, if it is about one.
    pub path: PathBuf,
    /// What went wrong.
    pub kind: MeasureErrorKind,
}

/// What went wrong with an item.
#[derive(Debug, thiserror::Error)]
pub enum MeasureErrorKind {
    /// The file could not be opened or read.
    #[error("cannot be read: {0}{advice}", advice = advice(.0))]
    Io(#[from] io::Error),
    /// The file is not where QEMU looks for it.
    #[error("not found where QEMU looks for it")]
    NotFound,
    /// Neither a regular file nor a block device.
    #[error("is neither a regular file nor a block device")]
    NotAFile,
    /// It changed while it was read.
    #[error("changed while it was measured")]
    Changed,
    /// It changed after QEMU, which may have read it before that, was started.
    #[error("changed after QEMU was started, which may have read what it held before; start QEMU again")]
    ChangedSinceStart,
    /// The path names another file than the one that QEMU opened.
    #[error("the path no longer names a file that QEMU holds open: it was replaced or removed")]
    NotHeld,
    /// The guest's memory does not hold at this address what the file holds.
    #[error("is not what QEMU loaded: guest memory holds something else at {0:#x}; start QEMU again")]
    LoadedDiffers(u64),
    /// QEMU has another file mapped.
    #[error("is not the file that QEMU has mapped: the path was exchanged; start QEMU again")]
    NotMapped,
    /// It cannot be told that the file is the one that QEMU has in this slot.
    #[error("may not be the file that QEMU has there: {0}; start QEMU again")]
    Exchanged(String),
    /// Who answers at the monitor is not, or does not speak for, the process that is measured.
    #[error("is answered by somebody else than the QEMU process: {0}")]
    Impostor(String),
    /// There is no way to measure it.
    #[error("cannot be measured: {0}")]
    Unsupported(String),
    /// QEMU did not tell what is needed.
    #[error(transparent)]
    Qmp(#[from] QmpError),
}

impl MeasureError {
    /// Whether QEMU's monitor is at fault, not the item.
    pub(crate) fn is_monitor(&self) -> bool {
        matches!(self.kind, MeasureErrorKind::Qmp(_))
    }

    /// What a VM is refused for.
    pub(crate) fn cause(&self) -> RefuseCause {
        match self.kind {
            MeasureErrorKind::LoadedDiffers(_) | MeasureErrorKind::NotMapped => RefuseCause::LoadedDiffers,
            MeasureErrorKind::Impostor(_) => RefuseCause::Impostor,
            MeasureErrorKind::Exchanged(_)
            | MeasureErrorKind::Changed
            | MeasureErrorKind::ChangedSinceStart
            | MeasureErrorKind::NotHeld => RefuseCause::Changed,
            _ => RefuseCause::Unmeasurable,
        }
    }

    /// An error about an item and a file.
    pub(crate) fn new(item: &str, path: &Path, kind: impl Into<MeasureErrorKind>) -> Self {
        Self { item: item.to_owned(), path: path.to_owned(), kind: kind.into() }
    }

    /// An error about an item that is no file.
    pub(crate) fn of(item: &str, kind: impl Into<MeasureErrorKind>) -> Self {
        Self::new(item, Path::new(""), kind)
    }
}

/// What to do, where the system's words leave that open.
fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "; run the proxy as root, or as the user whose QEMU and images these are",
        _ => "",
    }
}

fn show(path: &Path) -> String {
    if path.as_os_str().is_empty() { String::new() } else { format!(" ({})", path.display()) }
}
