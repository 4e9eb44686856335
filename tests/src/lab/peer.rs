//! A guest that does not exist, and the shim's part played for it: as many entries as a test wants, as fast as it wants.
//!
//! The part is played true to the protocol ([`onequote_evidence::guest_frame`]): hello, resume, entries without gap,
//! an answer to each request to collect, a new connection whenever the old one ends.

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use onequote_evidence::digest::HashAlg;
use onequote_evidence::guest_frame::{ENTRIES_TARGET, GuestFrame, HostFrame, VERSION, body_len, to_wire};
use onequote_evidence::id::{Blob, BootId, Sha256};
use onequote_evidence::ima::{Aggregate, Entry, SHA1_HASH_SIZE};

/// How long the host may take to answer a hello.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// How long a peer listens before it grows its list again.
const PACE: Duration = Duration::from_millis(2);

/// A guest's list, made up: entry n is that of a program `/opt/program-n`.
#[derive(Debug, Clone)]
pub struct Guest {
    /// What it says its kernel's boot id is.
    pub boot_id: BootId,
    seed: u64,
    entries: Vec<Vec<u8>>,
    aggregates: Vec<Sha256>,
}

impl Guest {
    /// A guest with an empty list. Guests of the same `seed` have the same entries.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&seed.to_le_bytes());
        Self { boot_id: BootId(id), seed, entries: Vec::new(), aggregates: vec![Sha256::ZERO] }
    }

    /// Adds entries.
    ///
    /// # Errors
    /// Never, as long as the entries made here are entries.
    pub fn grow(&mut self, count: u64) -> Result<()> {
        for _ in 0..count {
            let raw = entry(self.seed, self.count());
            let mut aggregate = self.aggregate(self.count())?;
            aggregate.push(&Entry::parse(&raw, SHA1_HASH_SIZE)?);
            self.aggregates.push(aggregate.value);
            self.entries.push(raw);
        }
        Ok(())
    }

    /// Number of entries.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.entries.len() as u64
    }

    /// The aggregate of the first `count` entries.
    ///
    /// # Errors
    /// There are fewer.
    pub fn aggregate(&self, count: u64) -> Result<Aggregate> {
        let value = usize::try_from(count).ok().and_then(|count| self.aggregates.get(count));
        let value = value.with_context(|| format!("the guest has {} entries, not {count}", self.count()))?;
        Ok(Aggregate { count, value: *value })
    }

    /// The whole list in the kernel's binary format.
    #[must_use]
    pub fn list(&self) -> Vec<u8> {
        self.entries.concat()
    }

    /// Entries from `first` on, as many as one frame takes, and how many these are.
    #[must_use]
    pub fn frame(&self, first: u64) -> (Vec<u8>, u64) {
        let mut bytes = Vec::new();
        let mut count = 0;
        for raw in self.entries.iter().skip(first as usize) {
            if count > 0 && bytes.len() + raw.len() > ENTRIES_TARGET {
                break;
            }
            bytes.extend_from_slice(raw);
            count += 1;
        }
        (bytes, count)
    }
}

/// An `ima-ng` entry.
fn entry(seed: u64, number: u64) -> Vec<u8> {
    let digest = HashAlg::Sha256.hash_parts(&[&seed.to_le_bytes(), &number.to_le_bytes()]);
    let field = |bytes: &[u8]| [&(bytes.len() as u32).to_le_bytes(), bytes].concat();
    let data =
        [field(&[b"sha256:\0", digest.as_slice()].concat()), field(format!("/opt/program-{number}\0").as_bytes())]
            .concat();
    [&10_u32.to_le_bytes(), HashAlg::Sha1.hash(&data).as_slice(), &field(b"ima-ng"), &field(&data)].concat()
}

/// One connection of a shim.
#[derive(Debug)]
pub struct ShimConnection {
    stream: UnixStream,
    /// Bytes of a frame that is not whole yet.
    buffer: Vec<u8>,
    sent: u64,
}

impl ShimConnection {
    /// Connects to a VM's socket at the proxy.
    ///
    /// # Errors
    /// Nobody listens.
    pub fn open(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).with_context(|| format!("nobody listens at {}", socket.display()))?;
        Ok(Self { stream, buffer: Vec::new(), sent: 0 })
    }

    /// Sends a frame.
    ///
    /// # Errors
    /// The host has closed the connection.
    pub fn say(&mut self, frame: &GuestFrame) -> Result<()> {
        self.stream.write_all(&to_wire(frame)).context("the host closed the connection")
    }

    /// The next frame of the host; none when no whole one comes within `limit`.
    ///
    /// # Errors
    /// The host has closed the connection, or sends what is no frame.
    pub fn hear(&mut self, limit: Duration) -> Result<Option<HostFrame>> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(prefix) = self.buffer.first_chunk::<4>() {
                let end = 4 + body_len(*prefix)?;
                if self.buffer.len() >= end {
                    let frame = HostFrame::parse(&self.buffer[4..end])?;
                    self.buffer.drain(..end);
                    return Ok(Some(frame));
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut piece = [0; 4096];
            match self.stream.read(&mut piece) {
                Ok(0) => bail!("the host closed the connection"),
                Ok(count) => self.buffer.extend_from_slice(&piece[..count]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Says hello. Returns what the host has.
    ///
    /// # Errors
    /// The host closes the connection or answers something else.
    pub fn hello(&mut self, boot_id: BootId, count: u64) -> Result<Aggregate> {
        self.say(&GuestFrame::Hello { version: VERSION, boot_id, hash_size: SHA1_HASH_SIZE as u32, count })?;
        match self.hear(ANSWER_LIMIT)?.context("the host does not answer")? {
            HostFrame::Have { count, aggregate } => Ok(Aggregate { count, value: aggregate }),
            HostFrame::Collect { .. } => bail!("the host's first frame is not have"),
        }
    }

    /// Says hello and resumes as an honest guest does. Returns what the host has.
    ///
    /// # Errors
    /// As [`Self::hello`]; [`Contradiction`] when the host has what this guest never said.
    pub fn begin(&mut self, guest: &Guest) -> Result<Aggregate> {
        let have = self.hello(guest.boot_id, guest.count())?;
        if !guest.aggregate(have.count).is_ok_and(|own| own == have) {
            return Err(anyhow!(Contradiction(have)));
        }
        self.say(&GuestFrame::Resume { count: have.count, aggregate: have.value })?;
        self.sent = have.count;
        Ok(have)
    }

    /// Sends all that was not sent yet. Whether there was any.
    ///
    /// # Errors
    /// The host has closed the connection.
    pub fn send_new(&mut self, guest: &Guest) -> Result<bool> {
        let before = self.sent;
        while self.sent < guest.count() {
            let (bytes, count) = guest.frame(self.sent);
            self.say(&GuestFrame::Entries { first: self.sent, entries: Blob(bytes) })?;
            self.sent += count;
        }
        Ok(self.sent > before)
    }
}

/// The host claims that a guest said what it never did.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the host has {} entries with aggregate {}, which the guest never sent", .0.count, .0.value)]
pub struct Contradiction(pub Aggregate);

/// A guest and its shim, on a thread of their own until the value goes.
#[derive(Debug)]
pub struct Peer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    guest: Mutex<Guest>,
    /// Entries added after each pause of [`PACE`].
    steadily: AtomicU64,
    /// Entries added when the host collects.
    at_collect: AtomicU64,
    stop: AtomicBool,
    connections: AtomicU64,
    /// What the host had at the last hello.
    have: AtomicU64,
    trouble: Mutex<Option<String>>,
}

impl Peer {
    /// Plays the part of `guest`'s shim at the proxy's socket for its VM, which need not be there yet.
    #[must_use]
    pub fn start(socket: PathBuf, guest: Guest) -> Self {
        let shared = Arc::new(Shared {
            guest: Mutex::new(guest),
            steadily: AtomicU64::new(0),
            at_collect: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            connections: AtomicU64::new(0),
            have: AtomicU64::new(0),
            trouble: Mutex::new(None),
        });
        let own = Arc::clone(&shared);
        Self { shared, thread: Some(std::thread::spawn(move || own.play(&socket))) }
    }

    /// The guest. The peer waits while this is held.
    pub fn guest(&self) -> MutexGuard<'_, Guest> {
        lock(&self.shared.guest)
    }

    /// From now on the list grows by so many entries each few milliseconds; 0 ends that.
    pub fn grow_steadily(&self, entries: u64) {
        self.shared.steadily.store(entries, Ordering::SeqCst);
    }

    /// From now on the list grows by so many entries whenever the host collects.
    pub fn grow_at_collect(&self, entries: u64) {
        self.shared.at_collect.store(entries, Ordering::SeqCst);
    }

    /// How often a connection was made and the host's hello answered.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// How many entries the host had at the last connection.
    #[must_use]
    pub fn last_have(&self) -> u64 {
        self.shared.have.load(Ordering::SeqCst)
    }

    /// Whether all was well so far.
    ///
    /// # Errors
    /// The host claimed what the guest never said.
    pub fn check(&self) -> Result<()> {
        match &*lock(&self.shared.trouble) {
            Some(trouble) => bail!("{trouble}"),
            None => Ok(()),
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            // Its panic was printed by itself.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn play(&self, socket: &Path) {
        while !self.stop.load(Ordering::SeqCst) {
            let Err(error) = self.connect(socket) else { return };
            if error.is::<Contradiction>() {
                lock(&self.trouble).get_or_insert(error.to_string());
            }
            // The host is not there, or gone: as long as the real shim, but much more eager.
            std::thread::sleep(PACE);
        }
    }

    /// One connection; ends well only when told to stop.
    fn connect(&self, socket: &Path) -> Result<()> {
        let mut connection = ShimConnection::open(socket)?;
        let have = connection.begin(&lock(&self.guest))?;
        self.have.store(have.count, Ordering::SeqCst);
        self.connections.fetch_add(1, Ordering::SeqCst);
        let mut last = Instant::now();
        while !self.stop.load(Ordering::SeqCst) {
            match connection.hear(PACE)? {
                Some(HostFrame::Collect { id }) => {
                    let mut guest = lock(&self.guest);
                    guest.grow(self.at_collect.load(Ordering::SeqCst))?;
                    connection.send_new(&guest)?;
                    connection.say(&GuestFrame::Collected { id, count: guest.count() })?;
                    last = Instant::now();
                }
                Some(HostFrame::Have { .. }) => bail!("have in the middle"),
                None => {
                    let mut guest = lock(&self.guest);
                    guest.grow(self.steadily.load(Ordering::SeqCst))?;
                    if connection.send_new(&guest)? {
                        last = Instant::now();
                    } else if last.elapsed() > Duration::from_secs(5) {
                        connection.say(&GuestFrame::Heartbeat { count: guest.count() })?;
                        last = Instant::now();
                    }
                }
            }
        }
        ensure!(self.stop.load(Ordering::SeqCst));
        Ok(())
    }
}

/// A panic while holding one of these locks leaves a list that is still whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use onequote_evidence::ima::ListReader;

    use super::*;

    #[test]
    fn the_list_is_one_and_its_aggregates_are_its_own() {
        let mut guest = Guest::new(7);
        guest.grow(3).unwrap();
        let list = guest.list();
        let mut aggregate = Aggregate::EMPTY;
        for entry in ListReader::new(&list, SHA1_HASH_SIZE) {
            let entry = entry.unwrap();
            assert!(entry.hash_matches() && entry.fields().is_ok());
            aggregate.push(&entry);
        }
        assert_eq!(guest.aggregate(3).unwrap(), aggregate);
        assert!(guest.aggregate(4).is_err());
        assert_eq!(guest.frame(1).1, 2);
    }
}
