//! Digests of open files: a few at a time over all VMs, off the async threads, given up when nobody waits any more, and
//! read once for all who want the same file at the same time.
//!
//! # Why one reading serves many
//! Each who waits has the file open himself and compares its [`Stamp`] before he asks with the one after he has the
//! answer. A reading is shared among those whose stamps before are equal: the stamp that its first asker saw before the
//! first byte was read. So for each of them the file is unchanged from before the reading to after it, or he sees
//! another stamp and measures nothing. A change leaves no trace in a stamp only within the clock tick of the change
//! before; a file that changed less than [`SETTLED`] before a reading began is therefore read by each for himself.
//! Nothing is kept when the last one has his answer: what a file was a moment ago proves nothing. Files on which
//! fs-verity is enabled need no cache: the kernel tells their digest in no time, and vouches for it.

use std::{
    collections::HashMap,
    fs::File,
    io,
    num::NonZeroUsize,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use onequote_evidence::{
    digest::{FileDigest, FileDigestAlg},
    id::Sha256,
};
use onequote_verity::{Changed, Measured, Options, SavedTree, TreeError, VerityError};
use serde::Serialize;
use sha2::Digest as _;
use tokio::sync::{Semaphore, oneshot, watch};

use super::{MeasureErrorKind, Stamp};

/// Bytes that plain SHA-256 reads at a time.
const BUFFER: usize = 256 * 1024;

/// The most that is read for a plain SHA-256, which cannot leave out holes. A kernel, initrd, firmware or argument's
/// file is loaded into memory and far smaller.
const MAX_PLAIN: u64 = 64 << 30;

/// A file that changed less than this before a reading begins is not shared; far longer than a clock tick.
const SETTLED: Duration = Duration::from_secs(1);

/// Told after each piece how many bytes have been read so far.
pub type Progress = Arc<dyn Fn(u64) + Send + Sync>;

/// How much of the host measuring may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MeasureLimits {
    /// Files that are read at a time, for all VMs together.
    pub parallel: NonZeroUsize,
    /// Whether reads wait for everybody else's.
    pub idle_io: bool,
}

impl Default for MeasureLimits {
    /// As many files as there are cores, and at least four, so that one large file does not keep all others waiting.
    fn default() -> Self {
        Self { parallel: cores().max(NonZeroUsize::new(4).unwrap_or(NonZeroUsize::MIN)), idle_io: false }
    }
}

/// What is wanted of a file.
#[derive(Clone)]
pub struct Wanted {
    /// Which digest.
    pub alg: FileDigestAlg,
    /// The file's stamp, if whoever asks compares it with the one after: then a reading may be shared.
    pub stamp: Option<Stamp>,
    /// Told how far it is.
    pub progress: Option<Progress>,
}

/// Size in bytes and digest of what was read.
pub type Digested = (u64, FileDigest);

/// A digest that was to be made from what changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Updated {
    /// Size and digest.
    pub digested: Digested,
    /// Bytes that were read of the file; or why all of it was.
    pub read: Result<u64, String>,
}

/// A file that is being read, for people.
#[derive(Debug, Clone, Serialize)]
pub struct Reading {
    /// Its path as the kernel shows it.
    pub path: PathBuf,
    /// Bytes done.
    pub done: u64,
    /// Its size in bytes.
    pub size: u64,
    /// How many wait for it.
    pub waiting: usize,
}

/// Computes digests. Clones share limits and readings.
#[derive(Debug, Clone)]
pub struct Digester {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    limits: MeasureLimits,
    slots: Semaphore,
    /// Files that are being read now.
    busy: AtomicUsize,
    flights: Mutex<HashMap<(Stamp, FileDigestAlg), Weak<Flight>>>,
    readings: Mutex<Vec<Weak<Active>>>,
    /// Files read so far, counted when reading begins.
    read: AtomicU64,
}

/// A reading that others can join; it ends when the last one of them is gone.
struct Flight {
    outcome: watch::Receiver<Option<Result<Digested, ()>>>,
    task: tokio::task::AbortHandle,
    active: Arc<Active>,
}

impl std::fmt::Debug for Flight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Flight").finish_non_exhaustive()
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Active {
    file: Arc<File>,
    size: u64,
    done: AtomicU64,
    waiting: AtomicUsize,
    listeners: Mutex<Vec<Progress>>,
}

impl std::fmt::Debug for Active {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Active").field("done", &self.done).finish_non_exhaustive()
    }
}

impl Active {
    fn tell(&self, done: u64) {
        self.done.store(done, Ordering::Relaxed);
        // Not under the lock: a listener may take its time, and others may want to join.
        let listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner).clone();
        listeners.iter().for_each(|progress| progress(done));
    }
}

/// One who waits.
struct Waiting(Arc<Active>);

impl Waiting {
    fn new(active: &Arc<Active>, progress: Option<Progress>) -> Self {
        active.waiting.fetch_add(1, Ordering::Relaxed);
        active.listeners.lock().unwrap_or_else(PoisonError::into_inner).extend(progress);
        Self(Arc::clone(active))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Default for Digester {
    fn default() -> Self {
        Self::new(MeasureLimits::default())
    }
}

impl Digester {
    /// With these limits.
    #[must_use]
    pub fn new(limits: MeasureLimits) -> Self {
        let shared = Shared {
            limits,
            slots: Semaphore::new(limits.parallel.get().min(Semaphore::MAX_PERMITS)),
            busy: AtomicUsize::new(0),
            flights: Mutex::default(),
            readings: Mutex::default(),
            read: AtomicU64::new(0),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Reads the whole file from its start, whatever its position. When the future is dropped and nobody else waits for
    /// the same, reading ends within one piece. Needs a tokio runtime.
    ///
    /// # Errors
    /// What keeps the file from being measured.
    pub async fn digest(&self, file: Arc<File>, wanted: Wanted) -> Result<Digested, MeasureErrorKind> {
        if let Some(stamp) = wanted.stamp.filter(|stamp| settled(stamp, SystemTime::now())) {
            let (flight, _waiting) = self.join(stamp, &file, &wanted)?;
            let mut outcome = flight.outcome.clone();
            // Without an outcome the reading was given up, which it is not while somebody waits: the runtime ends.
            if let Ok(outcome) = outcome.wait_for(Option::is_some).await
                && let Some(Ok(digested)) = *outcome
            {
                return Ok(digested);
            }
            // What failed for another's descriptor need not fail for ours, and the error should be our own.
        }
        let active = self.activity(&file)?;
        let _waiting = Waiting::new(&active, wanted.progress);
        read(&self.shared, active, move |file, options| digest_now(file, wanted.alg, options)).await
    }

    /// The fs-verity digest of an image whose tree is kept in `tree`, an empty file, for [`Self::digest_changed`]. Tells
    /// whether it was.
    ///
    /// # Errors
    /// As for [`Self::digest`].
    pub async fn digest_and_save(
        &self,
        file: Arc<File>,
        tree: Arc<File>,
    ) -> Result<(Digested, bool), MeasureErrorKind> {
        let work = move |file: &File, options: Options<'_>| {
            let measured = onequote_verity::measure(file, Options { save: Some(&tree), ..options })?;
            Ok((digested(&measured), measured.saved))
        };
        read(&self.shared, self.activity(&file)?, work).await
    }

    /// The fs-verity digest of an image of which only `changed` differs from when it was `known` and `tree` was saved: no
    /// more is read than that, unless the tree does not give `known`, or anything else is not certain: then the whole
    /// image is read.
    ///
    /// What is trusted is the caller's word about `known` and `changed`, and nothing about the tree.
    ///
    /// # Errors
    /// As for [`Self::digest`].
    pub async fn digest_changed(
        &self,
        file: Arc<File>,
        tree: Arc<File>,
        known: FileDigest,
        changed: Changed,
    ) -> Result<Updated, MeasureErrorKind> {
        let work = move |file: &File, options: Options<'_>| {
            let update = || SavedTree::open(tree.try_clone()?)?.update(file, &changed, &known.value.0, options);
            let why = match update() {
                Ok(measured) if known.alg == FileDigestAlg::FsVerity => {
                    return Ok(Updated { digested: digested(&measured), read: Ok(measured.read) });
                }
                Ok(_) => "the digest before is no fs-verity digest".to_owned(),
                Err(TreeError::Verity(e @ VerityError::Stopped)) => return Err(e.into()),
                Err(e) => format!("the saved tree {e}"),
            };
            Ok(Updated { digested: digested(&onequote_verity::measure(file, options)?), read: Err(why) })
        };
        read(&self.shared, self.activity(&file)?, work).await
    }

    /// Files that are being read or wait to be.
    #[must_use]
    pub fn readings(&self) -> Vec<Reading> {
        let mut readings = self.shared.readings.lock().unwrap_or_else(PoisonError::into_inner);
        readings.retain(|reading| reading.strong_count() > 0);
        let show = |active: Arc<Active>| Reading {
            path: std::fs::read_link(format!("/proc/self/fd/{}", active.file.as_raw_fd())).unwrap_or_default(),
            done: active.done.load(Ordering::Relaxed),
            size: active.size,
            waiting: active.waiting.load(Ordering::Relaxed),
        };
        readings.iter().filter_map(Weak::upgrade).map(show).collect()
    }

    /// How many files it has begun to read.
    #[must_use]
    pub fn files_read(&self) -> u64 {
        self.shared.read.load(Ordering::Relaxed)
    }

    /// The reading of a file with this stamp: one that goes on, or a new one.
    fn join(
        &self,
        stamp: Stamp,
        file: &Arc<File>,
        wanted: &Wanted,
    ) -> Result<(Arc<Flight>, Waiting), MeasureErrorKind> {
        let mut flights = self.shared.flights.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (stamp, wanted.alg);
        let going = flights.get(&key).and_then(Weak::upgrade).filter(|f| f.outcome.borrow().is_none());
        let flight = match going {
            Some(flight) => flight,
            None => {
                flights.retain(|_, flight| flight.strong_count() > 0);
                let active = self.activity(file)?;
                let (tell, outcome) = watch::channel(None);
                let (shared, alg, reading) = (Arc::clone(&self.shared), wanted.alg, Arc::clone(&active));
                let task = tokio::spawn(async move {
                    let read = read(&shared, reading, move |file, options| digest_now(file, alg, options)).await;
                    tell.send_replace(Some(read.map_err(|_| ())));
                });
                let flight = Arc::new(Flight { outcome, task: task.abort_handle(), active });
                flights.insert(key, Arc::downgrade(&flight));
                flight
            }
        };
        let waiting = Waiting::new(&flight.active, wanted.progress.clone());
        Ok((flight, waiting))
    }

    fn activity(&self, file: &Arc<File>) -> Result<Arc<Active>, MeasureErrorKind> {
        let active = Arc::new(Active {
            file: Arc::clone(file),
            size: onequote_verity::size_of(file)?,
            done: AtomicU64::new(0),
            waiting: AtomicUsize::new(0),
            listeners: Mutex::default(),
        });
        let mut readings = self.shared.readings.lock().unwrap_or_else(PoisonError::into_inner);
        readings.retain(|reading| reading.strong_count() > 0);
        readings.push(Arc::downgrade(&active));
        Ok(active)
    }
}

/// Whether a file's last change is so long ago that another one would show.
fn settled(stamp: &Stamp, now: SystemTime) -> bool {
    let (seconds, nanos) = stamp.ctime;
    let since_epoch = Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
        + Duration::from_nanos(u64::try_from(nanos).unwrap_or(0));
    // A change in the future, or before 1970: a clock that is not to be relied on.
    seconds > 0 && now.duration_since(SystemTime::UNIX_EPOCH + since_epoch).is_ok_and(|age| age > SETTLED)
}

/// Waits for its turn, then reads on threads of its own: one that hangs on a dead disk keeps none of the runtime's.
async fn read<T: Send + 'static>(
    shared: &Arc<Shared>,
    active: Arc<Active>,
    work: impl FnOnce(&File, Options<'_>) -> Result<T, MeasureErrorKind> + Send + 'static,
) -> Result<T, MeasureErrorKind> {
    let _slot = shared.slots.acquire().await.map_err(io::Error::other)?;
    shared.read.fetch_add(1, Ordering::Relaxed);
    let busy = Busy::new(shared);
    let stop = Arc::new(AtomicBool::new(false));
    let _guard = StopOnDrop(Arc::clone(&stop));
    let (threads, idle_io) = (busy.threads(), shared.limits.idle_io);
    let (tell, told) = oneshot::channel();
    let thread = move || {
        let progress = |done| {
            active.tell(done);
            !stop.load(Ordering::Relaxed)
        };
        let digested = work(&active.file, Options { threads, idle_io, progress: &progress, save: None });
        // Whoever has the answer finds the reading ended.
        drop(active);
        // Nobody listens when the future was dropped.
        let _ = tell.send(digested);
    };
    std::thread::Builder::new().name("measure".to_owned()).spawn(thread)?;
    told.await.map_err(|_| MeasureErrorKind::from(io::Error::other("the thread that measured it failed")))?
}

/// One file that is being read.
struct Busy<'a> {
    shared: &'a Shared,
    now: usize,
}

impl<'a> Busy<'a> {
    fn new(shared: &'a Shared) -> Self {
        Self { shared, now: shared.busy.fetch_add(1, Ordering::Relaxed) + 1 }
    }

    /// All cores for one file alone, and for each that comes later its part of twice as many: with many files there are
    /// somewhat more threads than cores, never cores times files.
    fn threads(&self) -> NonZeroUsize {
        NonZeroUsize::new((2 * cores().get() / self.now).min(cores().get())).unwrap_or(NonZeroUsize::MIN)
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.shared.busy.fetch_sub(1, Ordering::Relaxed);
    }
}

pub(super) fn cores() -> NonZeroUsize {
    std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

/// The digest, on this thread and, with fs-verity, others.
pub(super) fn digest_now(file: &File, alg: FileDigestAlg, options: Options<'_>) -> Result<Digested, MeasureErrorKind> {
    match alg {
        FileDigestAlg::FsVerity => Ok(digested(&onequote_verity::measure(file, options)?)),
        FileDigestAlg::Sha256 => {
            if options.idle_io {
                // Courtesy to others: measuring goes on without it.
                let _ = onequote_verity::idle_io();
            }
            plain(file, options.progress)
        }
    }
}

fn digested(measured: &Measured) -> Digested {
    (measured.size, FileDigest { alg: FileDigestAlg::FsVerity, value: Sha256(measured.digest) })
}

/// Plain SHA-256.
fn plain(file: &File, go_on: &dyn Fn(u64) -> bool) -> Result<Digested, MeasureErrorKind> {
    let too_large = || {
        let what = format!("it has more than {} GiB, and is no disk image", MAX_PLAIN >> 30);
        MeasureErrorKind::Unsupported(what)
    };
    if onequote_verity::size_of(file)? > MAX_PLAIN {
        return Err(too_large());
    }
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
            Err(e) => return Err(e.into()),
        }
        if at > MAX_PLAIN {
            return Err(too_large());
        }
        if !go_on(at) {
            return Err(VerityError::Stopped.into());
        }
    }
    Ok((at, FileDigest::sha256(Sha256(hasher.finalize().into()))))
}

impl From<VerityError> for MeasureErrorKind {
    fn from(e: VerityError) -> Self {
        match e {
            VerityError::Io(e) => Self::Io(e),
            VerityError::NotAFile => Self::NotAFile,
            VerityError::Shrunk => Self::Changed,
            VerityError::Unsized => Self::Unsupported(e.to_string()),
            VerityError::Stopped => io::Error::new(io::ErrorKind::Interrupted, e).into(),
        }
    }
}

struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;
