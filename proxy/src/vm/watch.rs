//! Which monitor sockets there are.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use inotify::{Inotify, WatchMask};
use tokio::io::{Interest, unix::AsyncFd};

/// The extension of monitor sockets.
const EXTENSION: &str = "qmp";

/// A monitor socket in the file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Socket {
    /// The VM's name.
    pub(super) name: String,
    pub(super) path: PathBuf,
    /// Device, inode and time of making: another one when QEMU made the socket anew.
    pub(super) id: SocketId,
}

pub(super) type SocketId = (u64, u64, i64, i64);

/// Watches the folder and the sockets named one by one.
pub(super) struct Watch {
    inotify: AsyncFd<Inotify>,
    dir: PathBuf,
    extra: Vec<(String, PathBuf)>,
}

impl Watch {
    /// Begins to watch. Makes the folder, for its owner only, if it is not there.
    pub(super) fn new(dir: &Path, extra: &[(String, PathBuf)]) -> io::Result<Self> {
        if !dir.is_dir() {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        }
        let inotify = Inotify::init()?;
        let parents = extra.iter().filter_map(|(_, path)| path.parent());
        for folder in std::iter::once(dir).chain(parents) {
            let mask = WatchMask::CREATE | WatchMask::MOVED_TO | WatchMask::DELETE | WatchMask::MOVED_FROM;
            let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", folder.display()));
            inotify.watches().add(folder, mask).map_err(named)?;
        }
        #[expect(unsafe_code, reason = "tokio asks for a promise about the descriptor")]
        // SAFETY: `Inotify` owns one descriptor, which it neither closes nor exchanges before it is dropped.
        let inotify = unsafe { AsyncFd::register_with_interest(inotify, Interest::READABLE) }?;
        Ok(Self { inotify, dir: dir.to_owned(), extra: extra.to_vec() })
    }

    /// Waits until something came or went. Safe to cancel.
    pub(super) async fn changed(&mut self) -> io::Result<()> {
        loop {
            let mut ready = self.inotify.readable_mut().await?;
            let mut buffer = [0; 4096];
            let read = ready.try_io(|inotify| inotify.get_mut().read_events(&mut buffer).map(Iterator::count));
            match read {
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(e)) => return Err(e),
                // It only seemed to be ready.
                Err(_) => {}
            }
        }
    }

    /// The sockets that are there now, in ascending order of their paths.
    pub(super) fn sockets(&self) -> io::Result<Vec<Socket>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == EXTENSION)
                && let Some(name) = path.file_stem().and_then(|n| n.to_str())
            {
                found.extend(socket(name, &path));
            }
        }
        found.extend(self.extra.iter().filter_map(|(name, path)| socket(name, path)));
        found.sort_by(|a, b| a.path.cmp(&b.path));
        found.dedup_by(|a, b| a.path == b.path);
        Ok(found)
    }
}

fn socket(name: &str, path: &Path) -> Option<Socket> {
    Some(Socket { name: name.to_owned(), path: path.to_owned(), id: socket_id(path)? })
}

/// Which socket a path names.
pub(super) fn socket_id(path: &Path) -> Option<SocketId> {
    let m = fs::metadata(path).ok()?;
    m.file_type().is_socket().then(|| (m.dev(), m.ino(), m.mtime(), m.mtime_nsec()))
}
