//! The room's door: what connections, the quote and the evidence ask of it.
//!
//! Everything that changes a list goes as a [`Job`] to the one writer ([`super::writer`]), in the order of arrival.
//! Only the time of a guest's last frame, and who has answered a collection, are kept here.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use onequote_evidence::{
    event::VmRef,
    id::{BootId, Sha256},
    ima::Aggregate,
};
use tokio::sync::{Notify, OwnedSemaphorePermit, mpsc, oneshot};

use super::dictionary::{Cut, Dictionary};

/// What guests may bring, so that evidence of all of them together stays far below
/// [`onequote_evidence::stream::MAX_EXPANDED`] whatever they do.
///
/// The limits of a session are its own. Those of the host are shared: once they are reached, a session that has less
/// than its even share goes on up to that share, and the others take nothing more. So nobody is cut off by what
/// another guest does, and together they never bring more than twice the host's limits.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Boots of one session.
    pub boots: u32,
    /// Records with entries that one session may cause as fast as it can; every entry could be one. Then its entries
    /// are held back for two seconds, or until the next quote, so that no guest makes the log, which every evidence
    /// carries, too large to be sent.
    pub records: u32,
    /// Entries of all boots of one session.
    pub entries: u64,
    /// Bytes of entries that no guest had before, of all boots of one session.
    pub bytes: u64,
    /// Entries of all sessions.
    pub host_entries: u64,
    /// Bytes of entries of all sessions.
    pub host_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            boots: 256,
            records: 1024,
            entries: 1_000_000,
            bytes: 48 * 1024 * 1024,
            host_entries: 10_000_000,
            host_bytes: 64 * 1024 * 1024,
        }
    }
}

/// What was brought.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Brought {
    pub(super) entries: u64,
    /// Of entries that were new to the dictionary.
    pub(super) bytes: u64,
}

impl Limits {
    /// Which limit `session` has gone over, when `host` is what all of `sessions` sessions have brought.
    pub(super) fn exceeded(&self, session: Brought, host: Brought, sessions: u64) -> Option<String> {
        let share = |limit: u64| limit / sessions.max(1);
        if session.entries > self.entries {
            Some(format!("{} entries in a session", self.entries))
        } else if session.bytes > self.bytes {
            Some(format!("{} bytes of new entries in a session", self.bytes))
        } else if host.entries > self.host_entries && session.entries > share(self.host_entries) {
            Some(format!("its share of {} entries on this host", self.host_entries))
        } else if host.bytes > self.host_bytes && session.bytes > share(self.host_bytes) {
            Some(format!("its share of {} bytes of entries on this host", self.host_bytes))
        } else {
            None
        }
    }
}

/// The room refused.
#[derive(Debug, thiserror::Error)]
pub enum RoomError {
    /// The proxy is ending.
    #[error("the proxy is ending")]
    Closed,
    /// The log does not know the VM (yet), or it is measured no more.
    #[error("the VM is not in the log")]
    UnknownVm,
    /// Nothing more is taken in this boot.
    #[error("nothing more is taken from this guest in this boot: {0}")]
    ListClosed(&'static str),
    /// The guest sent entries that do not follow those it sent before.
    #[error("entries begin at {found}, expected {expected}")]
    OutOfOrder {
        /// Where they should begin.
        expected: u64,
        /// Where they begin.
        found: u64,
    },
    /// Another connection of the same VM took over.
    #[error("replaced by a newer connection")]
    Replaced,
    /// The list could not be kept.
    #[error("cannot keep the guest's list: {0}")]
    Io(#[from] std::io::Error),
}

/// A connection's right to add to a list, until a newer connection of the same VM takes it over.
#[derive(Debug, Clone)]
pub struct Token {
    /// The VM.
    pub vm: VmRef,
    /// The boot that the connection speaks of.
    pub boot: u32,
    /// Size of the template hash in its list.
    pub hash_size: u32,
    /// Which connection of the session this is.
    pub generation: u64,
}

/// Work for the writer.
pub(super) enum Job {
    Hello {
        vm: VmRef,
        boot_id: BootId,
        hash_size: u32,
        collect: mpsc::Sender<u64>,
        reply: oneshot::Sender<Result<(Token, Aggregate), RoomError>>,
    },
    Rewound {
        token: Token,
        claimed: (u64, Sha256),
        boot_id: BootId,
    },
    Entries {
        token: Token,
        /// Where the list stood when the connection cut the entries.
        before: Aggregate,
        cut: Cut,
        permit: OwnedSemaphorePermit,
        reply: oneshot::Sender<Result<(), RoomError>>,
    },
    Lost {
        token: Token,
        reason: String,
    },
    /// The VM's process ended.
    Ended(VmRef),
    /// Answered when everything before it is in the log.
    Flush(oneshot::Sender<()>),
    /// Give these lists up to these counts.
    Lists(Vec<(VmRef, u32, u64)>, oneshot::Sender<Lists>),
    /// Everybody who is connected; from now on what they send is held back for so long, or until a flush.
    Connected(Duration, oneshot::Sender<Vec<(VmRef, mpsc::Sender<u64>)>>),
}

/// Guests' lists for evidence.
#[derive(Debug, Default)]
pub struct Lists {
    /// The entries that the lists refer to, each once.
    pub dictionary: Vec<Arc<[u8]>>,
    /// For each list asked for, references into `dictionary`.
    pub lists: Vec<(VmRef, u32, Vec<u32>)>,
}

/// Connections that one VM may have at a time: the one that counts, and some that are beginning or ending.
const CONNECTIONS: usize = 8;

/// How much longer than for the guests themselves a collection waits until what came is in the log.
const LOGGING: Duration = Duration::from_secs(10);

/// A connection's place among those of its VM.
pub(super) struct Place {
    room: Arc<Room>,
    vm: VmRef,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut connections = lock(&self.room.connections);
        if let Some(count) = connections.get_mut(&self.vm) {
            *count -= 1;
            if *count == 0 {
                connections.remove(&self.vm);
            }
        }
    }
}

/// The room.
pub struct Room {
    jobs: mpsc::Sender<Job>,
    dictionary: Arc<Dictionary>,
    connections: Mutex<HashMap<VmRef, usize>>,
    contacts: Mutex<HashMap<VmRef, Instant>>,
    collecting: Mutex<Option<Collecting>>,
    next_collect: AtomicU64,
}

struct Collecting {
    id: u64,
    waiting: HashSet<VmRef>,
    done: Arc<Notify>,
}

impl Room {
    pub(super) fn new(jobs: mpsc::Sender<Job>, dictionary: Arc<Dictionary>) -> Self {
        let (connections, contacts, collecting) = (Mutex::default(), Mutex::default(), Mutex::default());
        Self { jobs, dictionary, connections, contacts, collecting, next_collect: AtomicU64::new(1) }
    }

    /// Where connections look entries up.
    pub(super) fn dictionary(&self) -> &Dictionary {
        &self.dictionary
    }

    /// A place for one more connection of a VM; none when it has too many already, so that a guest cannot use up
    /// descriptors that others need.
    pub(super) fn admit(self: &Arc<Self>, vm: VmRef) -> Option<Place> {
        let mut connections = lock(&self.connections);
        let count = connections.entry(vm).or_default();
        if *count >= CONNECTIONS {
            return None;
        }
        *count += 1;
        Some(Place { room: Arc::clone(self), vm })
    }

    /// A shim connected. Gives what the host holds of this boot's list, and where requests to collect come from.
    pub(super) async fn hello(
        &self,
        vm: VmRef,
        boot_id: BootId,
        hash_size: u32,
    ) -> Result<(Token, Aggregate, mpsc::Receiver<u64>), RoomError> {
        let (collect, requests) = mpsc::channel(4);
        let (token, have) = self.ask(|reply| Job::Hello { vm, boot_id, hash_size, collect, reply }).await??;
        self.touch(vm);
        Ok((token, have, requests))
    }

    pub(super) async fn rewound(
        &self,
        token: &Token,
        claimed: (u64, Sha256),
        boot_id: BootId,
    ) -> Result<(), RoomError> {
        let job = Job::Rewound { token: token.clone(), claimed, boot_id };
        self.jobs.send(job).await.map_err(|_| RoomError::Closed)
    }

    /// Hands over entries; resolves when they are in the list. `permit` is given back when they are in the log.
    pub(super) async fn entries(
        &self,
        token: &Token,
        before: Aggregate,
        cut: Cut,
        permit: OwnedSemaphorePermit,
    ) -> Result<(), RoomError> {
        self.touch(token.vm);
        let token = token.clone();
        self.ask(|reply| Job::Entries { token, before, cut, permit, reply }).await?
    }

    /// The guest answered, with nothing new. `count` is what it says it has sent.
    pub(super) fn alive(&self, token: &Token, _count: u64, collected: Option<u64>) -> Result<(), RoomError> {
        self.touch(token.vm);
        if let Some(id) = collected {
            self.answered(token.vm, Some(id));
        }
        Ok(())
    }

    pub(super) async fn disconnected(&self, token: &Token, reason: &str) {
        self.answered(token.vm, None);
        let _ = self.jobs.send(Job::Lost { token: token.clone(), reason: reason.to_owned() }).await;
    }

    /// The VM's process ended.
    pub async fn ended(&self, vm: VmRef) {
        lock(&self.contacts).remove(&vm);
        let _ = self.jobs.send(Job::Ended(vm)).await;
    }

    /// Time since a guest's last frame.
    #[must_use]
    pub fn last_contact(&self, vm: &VmRef) -> Option<Duration> {
        lock(&self.contacts).get(vm).map(Instant::elapsed)
    }

    /// Asks all connected guests for what is new, waits at most `wait` for them, then until all that came is in the
    /// log. Gives those that did not answer in time. Only one collection runs at a time (the caller is one task).
    pub async fn collect(&self, wait: Duration) -> HashSet<VmRef> {
        let Ok(connected) = self.ask(|reply| Job::Connected(wait, reply)).await else { return HashSet::new() };
        let id = self.next_collect.fetch_add(1, Ordering::Relaxed);
        let done = Arc::new(Notify::new());
        let mut waiting = HashSet::new();
        // Whoever does not even take the request is late; nobody waits for a full channel.
        let mut late = HashSet::new();
        *lock(&self.collecting) =
            Some(Collecting { id, waiting: connected.iter().map(|(vm, _)| *vm).collect(), done: Arc::clone(&done) });
        for (vm, requests) in connected {
            match requests.try_send(id) {
                Ok(()) => waiting.insert(vm),
                Err(_) => {
                    self.answered(vm, Some(id));
                    late.insert(vm)
                }
            };
        }
        if !waiting.is_empty() {
            let _ = tokio::time::timeout(wait, done.notified()).await;
        }
        if let Some(collecting) = lock(&self.collecting).take() {
            late.extend(collecting.waiting);
        }
        // Where log or TPM do not work, the quote fails by itself and says why.
        let _ = tokio::time::timeout(wait + LOGGING, self.ask(Job::Flush)).await;
        late
    }

    /// The lists' entries, up to the counts given, for evidence.
    pub async fn lists(&self, wanted: Vec<(VmRef, u32, u64)>) -> Lists {
        self.ask(|reply| Job::Lists(wanted, reply)).await.unwrap_or_default()
    }

    async fn ask<T>(&self, job: impl FnOnce(oneshot::Sender<T>) -> Job) -> Result<T, RoomError> {
        let (reply, answer) = oneshot::channel();
        self.jobs.send(job(reply)).await.map_err(|_| RoomError::Closed)?;
        answer.await.map_err(|_| RoomError::Closed)
    }

    fn touch(&self, vm: VmRef) {
        lock(&self.contacts).insert(vm, Instant::now());
    }

    /// A guest answered a collection, or cannot any more (`None`).
    fn answered(&self, vm: VmRef, id: Option<u64>) {
        let mut guard = lock(&self.collecting);
        let Some(collecting) = guard.as_mut().filter(|c| id.is_none_or(|id| id == c.id)) else { return };
        collecting.waiting.remove(&vm);
        if collecting.waiting.is_empty() {
            collecting.done.notify_one();
        }
    }
}

/// A panic while holding one of these locks leaves maps that are still whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
