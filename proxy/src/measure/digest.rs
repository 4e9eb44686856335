//! Digests of open files: streamed, a few at a time, off the async threads, and given up when nobody waits any more.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use onequote_evidence::{digest::FileDigest, id::Sha256};
use sha2::Digest as _;
use tokio::sync::Semaphore;

/// Bytes read at a time.
const BUFFER: usize = 1024 * 1024;

/// Told after each piece how many bytes have been read so far.
pub type Progress = Arc<dyn Fn(u64) + Send + Sync>;

/// Computes digests. Clones share the bound on how many are computed at a time.
#[derive(Debug, Clone)]
pub struct Digester {
    slots: Arc<Semaphore>,
}

impl Default for Digester {
    fn default() -> Self {
        Self::new(std::thread::available_parallelism().map_or(1, usize::from))
    }
}

impl Digester {
    /// Computes at most `parallel` digests at a time.
    #[must_use]
    pub fn new(parallel: usize) -> Self {
        Self { slots: Arc::new(Semaphore::new(parallel.max(1))) }
    }

    /// Reads the whole file from its start, whatever its position, and tells bytes read and digest. When the future is
    /// dropped, reading ends within one piece.
    ///
    /// # Errors
    /// What reading gives.
    pub async fn digest(&self, file: Arc<File>, progress: Option<Progress>) -> io::Result<(u64, FileDigest)> {
        let _slot = self.slots.acquire().await.map_err(io::Error::other)?;
        let stop = Arc::new(AtomicBool::new(false));
        let _guard = StopOnDrop(Arc::clone(&stop));
        let work = move || {
            digest_now(&file, &mut |done| {
                if let Some(progress) = &progress {
                    progress(done);
                }
                !stop.load(Ordering::Relaxed)
            })
        };
        tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
    }
}

/// The same on this thread. `go_on` is told the bytes read so far and ends the reading by saying no.
pub(super) fn digest_now(file: &File, go_on: &mut dyn FnMut(u64) -> bool) -> io::Result<(u64, FileDigest)> {
    let mut hasher = sha2::Sha256::new();
    let mut buffer = vec![0; BUFFER];
    let mut at = 0;
    loop {
        match file.read_at(&mut buffer, at) {
            Ok(0) => break,
            Ok(n) => {
                hasher.update(&buffer[..n]);
                at += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
        if !go_on(at) {
            return Err(io::Error::new(io::ErrorKind::Interrupted, "nobody waits for the digest any more"));
        }
    }
    Ok((at, FileDigest::sha256(Sha256(hasher.finalize().into()))))
}

struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
