//! A folder: walked without following links, hashed on all processors.

use std::{
    fs::{self, File},
    io,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

use onequote_evidence::digest::HashAlg;

use super::{FileHash, Files, MOUNT_POINTS, TreeError, digests};

/// Digests of the regular files beneath `root`.
pub(super) fn files(root: &Path, algorithms: &[HashAlg]) -> Result<Files, TreeError> {
    let paths = walk(root)?;
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let hashed = Mutex::new(Files::new());
    let workers = thread::available_parallelism().map_or(1, Into::into);
    let work = || {
        let mut mine: Vec<(Vec<u8>, Vec<FileHash>)> = Vec::new();
        while let Some(path) = paths.get(next.fetch_add(1, Ordering::Relaxed)) {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            match hash(path, algorithms) {
                Ok(hashes) => {
                    let relative = path.strip_prefix(root).unwrap_or(path);
                    mine.push((relative.as_os_str().as_bytes().to_vec(), hashes));
                }
                Err(source) => {
                    stop.store(true, Ordering::Relaxed);
                    return Err(TreeError::Read { path: path.clone(), source });
                }
            }
        }
        hashed.lock().unwrap_or_else(PoisonError::into_inner).extend(mine);
        Ok(())
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        let died = |_| TreeError::Read { path: root.to_owned(), source: io::Error::other("a thread died") };
        threads.into_iter().try_for_each(|thread| thread.join().map_err(died)?)
    })?;
    Ok(hashed.into_inner().unwrap_or_else(PoisonError::into_inner))
}

fn walk(root: &Path) -> Result<Vec<PathBuf>, TreeError> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        let fail = |source| TreeError::Read { path: folder.clone(), source };
        for item in fs::read_dir(&folder).map_err(fail)? {
            let item = item.map_err(fail)?;
            let kind = item.file_type().map_err(fail)?;
            if kind.is_file() {
                found.push(item.path());
            } else if kind.is_dir() && !(folder == root && MOUNT_POINTS.iter().any(|point| item.file_name() == *point))
            {
                folders.push(item.path());
            }
        }
    }
    Ok(found)
}

fn hash(path: &Path, algorithms: &[HashAlg]) -> io::Result<Vec<FileHash>> {
    let mut file = File::open(path)?;
    let expected = file.metadata()?;
    let (hashes, size) = digests(&mut file, algorithms)?;
    let after = file.metadata()?;
    if size != expected.len() || after.modified().ok() != expected.modified().ok() {
        return Err(io::Error::other("it changed while it was read"));
    }
    Ok(hashes)
}
