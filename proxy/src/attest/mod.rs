//! From challenges to evidence: one quote for all that wait.
//!
//! ```text
//! challenges ──► queue ─┐
//!                       ├─► collect from guests ─► one extend ─► one quote ─► host logs ─► a stream for each
//! more that wait ───────┘                     (statement of the log as it then is)
//! ```
//!
//! One task makes all quotes. Whatever waits when it begins a round is answered by that round's quote: the leaves of
//! the nonce tree are the challenges, each gets its own path and the same pieces. What comes during a round waits for
//! the next, so that nobody waits for more than two quotes.
//!
//! The statement is made in the moment of the quote, from the inventory of exactly the records that the registers
//! then hold.

mod pieces;
mod stream;

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use hyper::body::Bytes;
use onequote_evidence::{
    digest::sha256,
    event::VmRef,
    id::{Blob, HostId, Nonce, TimeMs},
    nonce_tree, pcr,
    statement::{self, GuestBoot, Statement, Unmanaged, VmState},
    stream::{Answer, Have, Quote, VERSION},
};
use tokio::sync::{mpsc, oneshot};
use tracing::debug;

pub use stream::Stream;

use pieces::Logs;

use crate::{
    guest::{Lists, Room},
    inventory::Inventory,
    log::{Acknowledged, LogHandle, LogHead, RecorderError},
    sink::BoxFuture,
};

/// Challenges that may wait. More are refused, to come again.
const QUEUE: usize = 8192;

/// Challenges that one quote answers at most.
const BATCH: usize = 1 << 16;

/// No evidence could be made.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AttestError {
    /// Too many wait.
    #[error("too many challenges wait; try again in a second")]
    Busy,
    /// The proxy is ending.
    #[error("the proxy is ending")]
    Closed,
    /// Log or TPM failed.
    #[error("no quote: {0}")]
    Recorder(Arc<RecorderError>),
    /// The host's logs or the measurement log could not be read.
    #[error("cannot read {what}: {error}")]
    Read {
        /// What.
        what: String,
        /// Why.
        error: Arc<dyn std::error::Error + Send + Sync>,
    },
}

/// What a round asks of the guests.
pub trait Guests: Send + Sync + 'static {
    /// Asks all connected guests for what is new, waits at most `wait` for them, then until all that came is in the log.
    /// Gives those that did not answer in time.
    fn collect(&self, wait: Duration) -> BoxFuture<'_, HashSet<VmRef>>;

    /// Time since a guest's last frame.
    fn last_contact(&self, vm: &VmRef) -> Option<Duration>;

    /// The lists of these VMs' boots, up to these counts.
    fn lists(&self, wanted: Vec<(VmRef, u32, u64)>) -> BoxFuture<'_, Lists>;
}

impl Guests for Room {
    fn collect(&self, wait: Duration) -> BoxFuture<'_, HashSet<VmRef>> {
        Box::pin(self.collect(wait))
    }

    fn last_contact(&self, vm: &VmRef) -> Option<Duration> {
        self.last_contact(vm)
    }

    fn lists(&self, wanted: Vec<(VmRef, u32, u64)>) -> BoxFuture<'_, Lists> {
        Box::pin(self.lists(wanted))
    }
}

/// What a round needs.
pub struct Attester {
    /// The host.
    pub host: HostId,
    /// The log and the TPM.
    pub log: LogHandle,
    /// What the log says is there.
    pub inventory: Arc<RwLock<Inventory>>,
    /// The guests.
    pub room: Arc<dyn Guests>,
    /// What runs on the host beside what the log says.
    pub processes: Arc<dyn Fn() -> Processes + Send + Sync>,
    /// How long to wait for guests.
    pub wait: Duration,
    /// The host's clock.
    pub clock: fn() -> TimeMs,
    /// The firmware's event log, if the host has one.
    pub firmware_log: Option<PathBuf>,
    /// The host's IMA list, if it has one.
    pub ima_list: Option<PathBuf>,
    /// Told of each statement, so that a verifier that accepts it has acknowledged its log; none where nothing is dropped.
    pub acknowledged: Option<Arc<Acknowledged>>,
}

/// QEMU processes as they are now, whatever the log says.
#[derive(Debug, Default)]
pub struct Processes {
    /// Those that are not managed.
    pub unmanaged: Vec<Unmanaged>,
    /// Those that are, and run. One that the log does not have is stated as unmanaged: a host must not look complete
    /// because its log began anew.
    pub running: Vec<(VmRef, Unmanaged)>,
}

struct Challenge {
    nonce: Nonce,
    binding: Vec<u8>,
    /// What the verifier has and need not be sent.
    have: Have,
    reply: oneshot::Sender<Result<Stream, AttestError>>,
}

/// Where challenges go.
#[derive(Clone)]
pub struct AttestHandle {
    queue: mpsc::Sender<Challenge>,
    inventory: Arc<RwLock<Inventory>>,
    room: Arc<dyn Guests>,
}

impl AttestHandle {
    /// Answers a challenge with an evidence stream, without what the verifier has.
    ///
    /// # Errors
    /// [`AttestError`].
    pub async fn challenge(&self, nonce: Nonce, binding: Vec<u8>, have: Have) -> Result<Stream, AttestError> {
        let (reply, answer) = oneshot::channel();
        self.queue.try_send(Challenge { nonce, binding, have, reply }).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => AttestError::Busy,
            mpsc::error::TrySendError::Closed(_) => AttestError::Closed,
        })?;
        answer.await.map_err(|_| AttestError::Closed)?
    }

    /// A guest's logged list in the kernel's binary format; the VM by name or UUID, the last boot unless told.
    pub async fn guest_list(&self, vm: &str, boot: Option<u32>) -> Option<Vec<u8>> {
        let (key, boot, count) = {
            let inventory = self.inventory.read().unwrap_or_else(PoisonError::into_inner);
            let (key, logged) = inventory.vms().find(|(key, v)| v.name == vm || key.vm.to_string() == vm)?;
            let boot = logged.boots.iter().rev().find(|b| boot.is_none_or(|boot| b.boot == boot))?;
            (*key, boot.boot, boot.count)
        };
        let lists = self.room.lists(vec![(key, boot, count)]).await;
        let (_, _, refs) = lists.lists.first()?;
        let entries = refs.iter().filter_map(|&id| lists.dictionary.get(id as usize));
        Some(entries.flat_map(|entry| entry.iter().copied()).collect())
    }
}

impl Attester {
    /// Starts the task that makes all quotes. It ends when the last handle is gone.
    #[must_use]
    pub fn start(self) -> AttestHandle {
        let (queue, challenges) = mpsc::channel(QUEUE);
        let handle = AttestHandle { queue, inventory: Arc::clone(&self.inventory), room: Arc::clone(&self.room) };
        tokio::spawn(self.run(challenges));
        handle
    }

    async fn run(self, mut challenges: mpsc::Receiver<Challenge>) {
        let mut batch = Vec::new();
        loop {
            if challenges.recv_many(&mut batch, 1).await == 0 {
                return;
            }
            let late = self.room.collect(self.wait).await;
            // Who came while guests were asked shares this quote too.
            while batch.len() < BATCH {
                let Ok(challenge) = challenges.try_recv() else { break };
                batch.push(challenge);
            }
            self.round(std::mem::take(&mut batch), late).await;
        }
    }

    async fn round(&self, batch: Vec<Challenge>, late: HashSet<VmRef>) {
        let leaves: Vec<_> = batch.iter().map(|c| nonce_tree::leaf(&c.nonce, &c.binding)).collect();
        let Some((root, paths)) = nonce_tree::build(&leaves) else { return };
        debug!(challenges = batch.len(), "one quote");
        match self.quote(root, late).await {
            Ok((quote, logs)) => {
                // Encoded and compressed once for all who have the same.
                let mut made: HashMap<Have, Result<Bytes, AttestError>> = HashMap::new();
                for (challenge, path) in batch.into_iter().zip(paths) {
                    let Challenge { nonce, binding, have, reply } = challenge;
                    let shared = match made.entry(have) {
                        Entry::Occupied(made) => made.into_mut(),
                        Entry::Vacant(place) => {
                            let frame = logs.frame(&quote, place.key());
                            place.insert(frame)
                        }
                    };
                    let answer = Answer {
                        version: VERSION,
                        path,
                        nonce: Blob(nonce.as_bytes().to_vec()),
                        binding: Blob(binding),
                    };
                    let shared = shared.clone();
                    let _ = reply.send(shared.map(|second| Stream::new(answer.to_frame(), &[second])));
                }
            }
            Err(e) => {
                for challenge in batch {
                    let _ = challenge.reply.send(Err(e.clone()));
                }
            }
        }
    }

    async fn quote(
        &self,
        root: onequote_evidence::id::Sha256,
        late: HashSet<VmRef>,
    ) -> Result<(Quote, Logs), AttestError> {
        let inventory = Arc::clone(&self.inventory);
        let (host, room, clock) = (self.host.clone(), Arc::clone(&self.room), self.clock);
        let processes = (self.processes)();
        let (made, statement) = oneshot::channel();
        let quoted = self
            .log
            .quote(move |log: &LogHead| {
                let inventory = inventory.read().unwrap_or_else(PoisonError::into_inner);
                let statement = state(host, log, &inventory, &*room, &late, processes, clock());
                let bytes = statement.to_bytes();
                let qualifying = nonce_tree::qualifying_data(&root, &bytes);
                let _ = made.send((statement, bytes));
                qualifying
            })
            .await
            .map_err(|e| AttestError::Recorder(Arc::new(e)))?;
        let (statement, bytes) = statement.await.map_err(|_| AttestError::Closed)?;
        if let Some(acknowledged) = &self.acknowledged {
            acknowledged.quoted(sha256(&[&bytes]), quoted.head.place());
        }
        let quote = Quote {
            statement: Blob(bytes),
            attest: Blob(quoted.quote.attest),
            signature: Blob(quoted.quote.signature),
            registers: pcr::to_list(&quoted.pcr_values),
        };
        Ok((quote, self.logs(&statement, &quoted.head).await?))
    }
}

fn state(
    host: HostId,
    log: &LogHead,
    inventory: &Inventory,
    room: &dyn Guests,
    late: &HashSet<VmRef>,
    processes: Processes,
    time: TimeMs,
) -> Statement {
    let mut unmanaged = processes.unmanaged;
    let unlogged = processes.running.into_iter().filter(|(vm, _)| inventory.vm(vm).is_none());
    unmanaged.extend(unlogged.map(|(_, process)| process));
    unmanaged.sort_by_key(|process| process.pid);
    unmanaged.dedup_by_key(|process| process.pid);
    let vms = inventory.vms().map(|(key, vm)| VmState {
        vm: key.vm,
        session: key.session,
        name: vm.name.clone(),
        run_state: vm.run_state.clone(),
        depth: vm.depth,
        boots: vm.boots.iter().map(|b| GuestBoot { boot: b.boot, count: b.count, aggregate: b.aggregate }).collect(),
        last_contact: room.last_contact(key).and_then(|age| u64::try_from(age.as_millis()).ok()),
        late: late.contains(key),
    });
    Statement {
        version: statement::VERSION,
        host,
        epoch: log.epoch,
        log_len: log.log_len,
        registers: pcr::to_list(&log.registers),
        vms: vms.collect(),
        unmanaged,
        time,
    }
}
