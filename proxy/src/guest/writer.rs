//! The one owner of the guests' lists.
//!
//! ```text
//! jobs ──► lists in memory ──► batch: files written, synced ──► guest-entries in the log ──► permits given back
//!   ▲                            │
//!   └── goes on meanwhile ◄──────┘
//! ```
//!
//! One batch is on its way at a time. What comes meanwhile changes the lists in memory, and the next batch carries all of it, so
//! that one sync and one extend serve many guests. While guests are asked for what is new before a quote, it holds
//! back what comes until all have answered or the time is over, so that the quote costs one extend and not one a guest;
//! only a guest that has much to send, and would wait for its own entries, makes it log before. What is still to be logged
//! is always computed from what the log has (the inventory) and what the lists hold, so that a batch that failed is neither
//! lost nor logged twice.

use std::{
    collections::{HashMap, HashSet},
    io,
    path::Path,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, Instant},
};

use onequote_evidence::{
    event::{Event, EventBody, GuestEntries, GuestHello, GuestLost, GuestOverflow, GuestRewind, VmRef},
    id::{BootId, Sha256, TimeMs},
    ima::Aggregate,
};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tracing::warn;

use super::{
    dictionary::{Cut, Dictionary},
    files::{Chunk, Files, Key},
    list::{Closed, GuestList},
    protocol::WINDOW,
    room::{Brought, Job, Limits, Lists, RoomError, Token},
};
use crate::{
    inventory::Inventory,
    rate::{Bucket, Kind, limited},
    sink::{BoxFuture, EventSink},
};

/// Jobs taken into one batch.
const BATCH: usize = 1024;

/// How often a batch that failed is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Connections of one session that are logged; later ones are only counted, so that a guest that connects over and
/// over cannot fill the log. Every new boot is logged.
const LOGGED_CONNECTIONS: u32 = 64;

/// How long it takes until a session that has used up [`Limits::records`] may cause one more.
const RECORDS_REFILL: Duration = Duration::from_secs(2);

pub(super) struct Writer {
    limits: Limits,
    clock: fn() -> TimeMs,
    inventory: Arc<RwLock<Inventory>>,
    sink: Arc<dyn EventSink>,
    dictionary: Arc<Dictionary>,
    /// Locked by the batch that is on its way.
    files: Arc<Mutex<Files>>,
    sessions: HashMap<VmRef, Session>,
    /// By all sessions.
    brought: Brought,
    /// Whether something came that a batch may have to carry.
    changed: bool,
    /// Whether the last batch failed.
    failed: bool,
    /// What waits for the next batch.
    waiting: Waiting,
    /// Sessions whose entries are held back a little: they have made too many records.
    held_back: HashSet<VmRef>,
    /// Until when what comes is held back, unless a flush comes before.
    hold: Option<Instant>,
}

/// What is done with when a batch is in the log.
#[derive(Default)]
struct Waiting {
    /// Events that are not in the log yet and cannot be computed from the lists.
    events: Vec<Event>,
    permits: Vec<(VmRef, OwnedSemaphorePermit)>,
    flushes: Vec<oneshot::Sender<()>>,
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// A batch on its way: what waits for it, and which references are on disk with it.
struct Batch {
    waiting: Waiting,
    saved: Vec<(Key, usize)>,
}

/// A step of a batch that has ended.
enum Step {
    /// After a failure: log and TPM agree again.
    Ready(Result<(), Failure>),
    Written(Batch, Result<(), Failure>),
}

struct Session {
    /// One token for each record with entries of this session, those for a quote apart.
    records: Bucket,
    lists: Vec<GuestList>,
    brought: Brought,
    generation: u64,
    connections: u32,
    collect: Option<mpsc::Sender<u64>>,
}

impl Session {
    fn new(records: u32) -> Self {
        Self {
            records: Bucket::new(records, RECORDS_REFILL, Instant::now()),
            lists: Vec::new(),
            brought: Brought::default(),
            generation: 0,
            connections: 0,
            collect: None,
        }
    }
}

impl Writer {
    /// Opens the folder and loads the lists of all VMs of the inventory.
    pub(super) fn open(
        folder: &Path,
        limits: Limits,
        clock: fn() -> TimeMs,
        inventory: Arc<RwLock<Inventory>>,
        sink: Arc<dyn EventSink>,
    ) -> io::Result<Self> {
        let (files, dictionary, mut kept) = {
            let inventory = read(&inventory);
            let logged = |(vm, boot): &Key| {
                inventory.vm(vm).is_some_and(|logged| logged.boots.iter().any(|one| one.boot == *boot))
            };
            Files::open(folder, logged)?
        };
        let mut sessions = HashMap::new();
        let mut brought = Brought::default();
        let mut seen = HashSet::new();
        for (vm, logged) in read(&inventory).vms() {
            let mut session = Session::new(limits.records);
            for boot in &logged.boots {
                let list = GuestList::restore(kept.remove(&(*vm, boot.boot)).unwrap_or_default(), boot, &dictionary);
                if list.closed == Some(Closed::Damaged) {
                    warn!(vm = %logged.name, boot = boot.boot, "the guest's list on disk does not give what was logged; it is kept as it is");
                }
                session.brought.entries += list.refs.len() as u64;
                for id in list.refs.iter().filter(|id| seen.insert(**id)) {
                    session.brought.bytes += dictionary.entry(*id).map_or(0, |entry| entry.len() as u64);
                }
                session.lists.push(list);
            }
            brought.entries += session.brought.entries;
            brought.bytes += session.brought.bytes;
            sessions.insert(*vm, session);
        }
        Ok(Self {
            limits,
            clock,
            inventory,
            sink,
            dictionary,
            files: Arc::new(Mutex::new(files)),
            sessions,
            brought,
            changed: true,
            failed: false,
            waiting: Waiting::default(),
            held_back: HashSet::new(),
            hold: None,
        })
    }

    /// The entries, for those who look them up.
    pub(super) fn dictionary(&self) -> Arc<Dictionary> {
        Arc::clone(&self.dictionary)
    }

    pub(super) async fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        let mut batch: Option<BoxFuture<'static, Step>> = None;
        // When a failed batch is tried again, and sessions that are held back may cause a record.
        let mut retry: Option<Instant> = None;
        loop {
            let may = !self.failed || retry.is_none() || !self.waiting.flushes.is_empty();
            if batch.is_none() && self.changed && may && !self.holds() {
                batch = self.begin();
            }
            if retry.is_none() && (self.failed || !self.held_back.is_empty()) {
                retry = Some(Instant::now() + RETRY);
            }
            let until = self.hold.into_iter().chain(retry).min().filter(|_| batch.is_none());
            tokio::select! {
                step = next_step(&mut batch) => batch = self.end(step),
                job = jobs.recv() => {
                    let Some(job) = job else { return };
                    self.take(job);
                    for _ in 1..BATCH {
                        let Ok(job) = jobs.try_recv() else { break };
                        self.take(job);
                    }
                }
                () = tokio::time::sleep_until(until.unwrap_or_else(Instant::now).into()), if until.is_some() => {
                    self.changed |= retry.take_if(|at| *at <= Instant::now()).is_some();
                }
            }
        }
    }

    /// Whether to wait for more before anything is logged.
    fn holds(&mut self) -> bool {
        if self.hold.is_some_and(|until| Instant::now() >= until) {
            self.hold = None;
        }
        let mut frames: HashMap<&VmRef, usize> = HashMap::new();
        self.hold.is_some()
            && self.waiting.permits.iter().filter(|(vm, _)| !self.held_back.contains(vm)).all(|(vm, _)| {
                let frames = frames.entry(vm).or_default();
                *frames += 1;
                *frames < WINDOW / 2
            })
    }

    fn take(&mut self, job: Job) {
        self.changed |= !matches!(job, Job::Lists(..) | Job::Connected(..));
        match job {
            Job::Hello { vm, boot_id, hash_size, collect, reply } => {
                let _ = reply.send(self.hello(vm, boot_id, hash_size, collect));
            }
            Job::Rewound { token, claimed, boot_id } => self.rewound(&token, claimed, boot_id),
            Job::Entries { token, before, cut, permit, reply } => {
                let taken = self.entries(&token, before, cut);
                self.waiting.permits.push((token.vm, permit));
                let _ = reply.send(taken);
            }
            Job::Lost { token, reason } => self.lost(&token, reason),
            Job::Ended(vm) => {
                if let Some(ended) = self.sessions.remove(&vm) {
                    self.brought.entries -= ended.brought.entries;
                    self.brought.bytes -= ended.brought.bytes;
                }
            }
            Job::Flush(done) => {
                self.hold = None;
                self.waiting.flushes.push(done);
            }
            Job::Lists(wanted, reply) => {
                let _ = reply.send(self.lists(&wanted));
            }
            Job::Connected(hold, reply) => {
                self.hold = Some(Instant::now() + hold);
                let connected = self.sessions.iter().filter_map(|(vm, s)| Some((*vm, s.collect.clone()?))).collect();
                let _ = reply.send(connected);
            }
        }
    }

    fn hello(
        &mut self,
        vm: VmRef,
        boot_id: BootId,
        hash_size: u32,
        collect: mpsc::Sender<u64>,
    ) -> Result<(Token, Aggregate), RoomError> {
        let (may_reboot, name) = match read(&self.inventory).vm(&vm) {
            Some(logged) if logged.measured => (logged.may_reboot, logged.name.clone()),
            _ => return Err(RoomError::UnknownVm),
        };
        let records = self.limits.records;
        let session = self.sessions.entry(vm).or_insert_with(|| Session::new(records));
        let (new, boot) = match session.lists.last() {
            None => (true, 0),
            Some(last) if last.boot_id == boot_id => (false, last.boot),
            Some(last) if may_reboot && last.boot + 1 < self.limits.boots => (true, last.boot + 1),
            Some(last) if may_reboot => {
                let (boot, count) = (last.boot, last.received.count);
                if last.closed.is_none() {
                    session.lists.iter_mut().for_each(|list| list.closed = Some(Closed::ByGuest));
                    let limit = format!("{} boots in a session", self.limits.boots);
                    self.event(vm, GuestOverflow { boot, count, limit }.into());
                }
                return Err(RoomError::ListClosed("too many boots in this session"));
            }
            Some(last) => {
                let token = Token { vm, boot: last.boot, hash_size, generation: session.generation };
                self.rewound(&token, (0, Sha256::ZERO), boot_id);
                return Err(RoomError::ListClosed("it claims another boot, and the VM was not reset"));
            }
        };
        if new {
            session.lists.push(GuestList::create(boot, boot_id, hash_size));
        }
        let Some(list) = session.lists.last() else { return Err(RoomError::UnknownVm) };
        match list.closed {
            Some(Closed::ByGuest) => return Err(RoomError::ListClosed("rewound or over a limit")),
            Some(Closed::Damaged) => return Err(RoomError::ListClosed("its list on the host is damaged")),
            None if list.hash_size != hash_size => {
                return Err(RoomError::ListClosed("the size of its template hashes changed"));
            }
            None => {}
        }
        let have = list.received;
        session.generation += 1;
        session.connections += 1;
        session.collect = Some(collect);
        let token = Token { vm, boot, hash_size, generation: session.generation };
        if new || session.connections <= LOGGED_CONNECTIONS {
            let body = GuestHello { boot, boot_id, hash_size, count: have.count };
            self.event(vm, body.into());
        }
        limited!(Kind::GuestConnection, info, vm = %name, boot, have = have.count, "guest connected");
        Ok((token, have))
    }

    fn entries(&mut self, token: &Token, before: Aggregate, cut: Cut) -> Result<(), RoomError> {
        let list = current(&mut self.sessions, token)?;
        if let Some(why) = list.closed {
            return Err(RoomError::ListClosed(match why {
                Closed::ByGuest => "rewound or over a limit",
                Closed::Damaged => "its list on the host is damaged",
            }));
        }
        if before != list.received {
            return Err(RoomError::OutOfOrder { expected: list.received.count, found: before.count });
        }
        let hash_size = token.hash_size as u8;
        let new = Brought { entries: cut.len() as u64, bytes: self.dictionary.new_bytes(&cut, hash_size) };
        let add = |to: Brought| Brought { entries: to.entries + new.entries, bytes: to.bytes + new.bytes };
        let (session, host) = (add(self.sessions[&token.vm].brought), add(self.brought));
        let exceeded = self.limits.exceeded(session, host, self.sessions.len() as u64);
        let list = current(&mut self.sessions, token)?;
        if let Some(limit) = exceeded {
            list.closed = Some(Closed::ByGuest);
            let body = GuestOverflow { boot: token.boot, count: list.received.count, limit };
            self.event(token.vm, body.into());
            return Err(RoomError::ListClosed("over a limit"));
        }
        let after = cut.after;
        list.extend(&self.dictionary.take(cut, hash_size)?, after);
        if let Some(known) = self.sessions.get_mut(&token.vm) {
            known.brought = session;
            self.brought = host;
        }
        Ok(())
    }

    fn rewound(&mut self, token: &Token, claimed: (u64, Sha256), boot_id: BootId) {
        let Some(session) = self.sessions.get_mut(&token.vm) else { return };
        let Some(list) = session.lists.iter_mut().find(|list| list.boot == token.boot) else { return };
        if list.closed.is_some() {
            return;
        }
        list.closed = Some(Closed::ByGuest);
        let body = GuestRewind {
            boot: token.boot,
            count: list.received.count,
            aggregate: list.received.value,
            claimed_count: claimed.0,
            claimed: claimed.1,
            boot_id,
        };
        limited!(Kind::GuestMisbehaves, warn, vm = %token.vm.vm, boot = token.boot, "a guest claims another past than it told before");
        self.event(token.vm, body.into());
    }

    fn lost(&mut self, token: &Token, reason: String) {
        let Ok(list) = current(&mut self.sessions, token) else { return };
        let body = GuestLost { boot: token.boot, count: list.received.count, reason };
        let Some(session) = self.sessions.get_mut(&token.vm) else { return };
        session.collect = None;
        limited!(Kind::GuestConnection, info, vm = %token.vm.vm, boot = token.boot, reason = body.reason, "guest connection lost");
        if session.connections <= LOGGED_CONNECTIONS {
            self.event(token.vm, body.into());
        }
    }

    fn event(&mut self, vm: VmRef, body: EventBody) {
        self.waiting.events.push(Event { time: (self.clock)(), vm: Some(vm), body });
    }

    fn lists(&self, wanted: &[(VmRef, u32, u64)]) -> Lists {
        let entries = self.dictionary.range(0, self.dictionary.len());
        let known = entries.len();
        let refs = |(vm, boot, count): &(VmRef, u32, u64)| {
            let list = self.sessions.get(vm).and_then(|s| s.lists.iter().find(|list| list.boot == *boot));
            let refs = list.map_or(&[][..], |list| &list.refs[..list.refs.len().min(*count as usize)]);
            &refs[..refs.iter().position(|id| *id as usize >= known).unwrap_or(refs.len())]
        };
        // In the order in which the host saw them first: what came later stands behind what was sent before.
        let mut used = vec![false; entries.len()];
        wanted.iter().flat_map(refs).for_each(|id| used[*id as usize] = true);
        let mut next = 0;
        let place = |used: &bool| {
            next += u32::from(*used);
            next - u32::from(*used)
        };
        let places: Vec<u32> = used.iter().map(place).collect();
        let dictionary = entries.into_iter().zip(&used).filter(|(_, used)| **used).map(|((_, raw), _)| raw).collect();
        let mapped = |one| refs(one).iter().map(|id| places[*id as usize]).collect();
        Lists { dictionary, lists: wanted.iter().map(|one| (one.0, one.1, mapped(one))).collect() }
    }

    /// Begins a batch with all that is not logged yet. Where nothing is, whoever waits is told at once.
    fn begin(&mut self) -> Option<BoxFuture<'static, Step>> {
        self.changed = false;
        let sink = Arc::clone(&self.sink);
        if self.failed {
            // What the failed batch has left in the log is in the inventory after this.
            return Some(Box::pin(async move { Step::Ready(sink.ready().await.map_err(Into::into)) }));
        }
        self.write()
    }

    fn write(&mut self) -> Option<BoxFuture<'static, Step>> {
        let events = self.due();
        let lists = || self.sessions.iter().flat_map(|(vm, s)| s.lists.iter().map(|list| ((*vm, list.boot), list)));
        let mut chunks: Vec<Chunk> = lists().filter_map(|(key, list)| list.unsaved(key)).collect();
        let mut waiting = std::mem::take(&mut self.waiting);
        let (kept, carried) =
            std::mem::take(&mut waiting.permits).into_iter().partition(|(vm, _)| self.held_back.contains(vm));
        (self.waiting.permits, waiting.permits) = (kept, carried);
        if events.is_empty() && chunks.is_empty() {
            waiting.done();
            return None;
        }
        let live = lists().map(|(_, list)| list.refs.len()).sum();
        let saved = chunks.iter().map(|chunk| (chunk.key, chunk.first + chunk.refs.len())).collect();
        // The files are locked only while a batch is on its way, and none is.
        let anew = lock(&self.files).is_wasteful(live);
        if anew {
            chunks = lists().map(|(key, list)| list.whole(key)).collect();
        }
        let batch = Batch { waiting, saved };
        let (files, dictionary, sink) = (Arc::clone(&self.files), Arc::clone(&self.dictionary), Arc::clone(&self.sink));
        let entries = dictionary.len();
        Some(Box::pin(async move {
            let write = move || lock(&files).write(&dictionary, entries, &chunks, anew);
            let written = match tokio::task::spawn_blocking(write).await {
                Ok(Ok(())) if events.is_empty() => Ok(()),
                Ok(Ok(())) => sink.append(events).await.map_err(Into::into),
                Ok(Err(error)) => Err(error.into()),
                Err(error) => Err(error.into()),
            };
            Step::Written(batch, written)
        }))
    }

    /// Takes in the end of a batch's step; gives the next.
    fn end(&mut self, step: Step) -> Option<BoxFuture<'static, Step>> {
        let failure = match step {
            Step::Ready(Ok(())) => {
                self.failed = false;
                return self.write();
            }
            Step::Ready(Err(failure)) => failure,
            Step::Written(batch, Ok(())) => {
                for ((vm, boot), len) in batch.saved {
                    let session = self.sessions.get_mut(&vm);
                    if let Some(list) = session.and_then(|s| s.lists.iter_mut().find(|list| list.boot == boot)) {
                        list.saved(len);
                    }
                }
                batch.waiting.done();
                return None;
            }
            Step::Written(batch, Err(failure)) => {
                let since = std::mem::replace(&mut self.waiting, batch.waiting);
                self.waiting.events.extend(since.events);
                self.waiting.permits.extend(since.permits);
                self.waiting.flushes.extend(since.flushes);
                failure
            }
        };
        limited!(Kind::GuestsWait, warn, "guests' entries wait: {failure}");
        self.failed = true;
        self.changed = false;
        None
    }

    /// What the log does not have yet: kept events, each list's new entries after its hello and before its end.
    fn due(&mut self) -> Vec<Event> {
        let inventory = read(&self.inventory);
        let (now, wanted) = (Instant::now(), !self.waiting.flushes.is_empty());
        self.held_back.clear();
        let closed = |event: &&Event| {
            matches!(event.body, EventBody::GuestRewind(_) | EventBody::GuestOverflow(_) | EventBody::GuestLost(_))
        };
        let logged_already = |event: &Event| {
            let boots = event.vm.and_then(|vm| inventory.vm(&vm)).map(|vm| vm.boots.as_slice()).unwrap_or_default();
            let of = |boot: u32| boots.iter().find(|b| b.boot == boot);
            match &event.body {
                EventBody::GuestHello(hello) => hello.count == 0 && of(hello.boot).is_some(),
                EventBody::GuestRewind(body) => of(body.boot).is_some_and(|b| b.closed),
                EventBody::GuestOverflow(body) => of(body.boot).is_some_and(|b| b.closed),
                _ => false,
            }
        };
        self.waiting.events.retain(|event| !logged_already(event));
        let mut events: Vec<Event> = self.waiting.events.iter().filter(|e| !closed(e)).cloned().collect();
        for (vm, session) in &mut self.sessions {
            let boots = inventory.vm(vm).map(|vm| vm.boots.as_slice()).unwrap_or_default();
            let new = session.lists.iter().filter(|list| list.closed != Some(Closed::Damaged)).any(|list| {
                let logged = boots.iter().find(|b| b.boot == list.boot).map_or(0, |b| b.count);
                list.received.count > logged
            });
            let ends = self.waiting.events.iter().any(|event| event.vm == Some(*vm) && closed(&event));
            if new && !session.records.take(now) && !wanted && !ends && inventory.vm(vm).is_some() {
                self.held_back.insert(*vm);
                continue;
            }
            for list in session.lists.iter().filter(|list| list.closed != Some(Closed::Damaged)) {
                let logged = boots.iter().find(|b| b.boot == list.boot).map_or(0, |b| b.count);
                if list.received.count > logged {
                    let body = GuestEntries {
                        boot: list.boot,
                        first: logged,
                        count: list.received.count - logged,
                        aggregate: list.received.value,
                    };
                    events.push(Event { time: (self.clock)(), vm: Some(*vm), body: body.into() });
                }
            }
        }
        events.extend(self.waiting.events.iter().filter(closed).cloned());
        // A VM whose end is logged already takes no more events.
        let live: HashSet<VmRef> = inventory.vms().map(|(vm, _)| *vm).collect();
        events.retain(|event| event.vm.is_some_and(|vm| live.contains(&vm)));
        events
    }
}

/// The end of the step that is on its way; never, when none is.
async fn next_step(batch: &mut Option<BoxFuture<'static, Step>>) -> Step {
    match batch {
        Some(step) => step.await,
        None => std::future::pending().await,
    }
}

impl Waiting {
    /// All of it is in the log: permits are given back, and who waits is told.
    fn done(self) {
        for flush in self.flushes {
            let _ = flush.send(());
        }
    }
}

/// A panic while writing leaves a file whose end is known.
fn lock(files: &Mutex<Files>) -> std::sync::MutexGuard<'_, Files> {
    files.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The list that a connection may add to.
fn current<'a>(sessions: &'a mut HashMap<VmRef, Session>, token: &Token) -> Result<&'a mut GuestList, RoomError> {
    let session = sessions.get_mut(&token.vm).ok_or(RoomError::UnknownVm)?;
    if session.generation != token.generation {
        return Err(RoomError::Replaced);
    }
    session.lists.iter_mut().find(|list| list.boot == token.boot).ok_or(RoomError::UnknownVm)
}

fn read(inventory: &RwLock<Inventory>) -> std::sync::RwLockReadGuard<'_, Inventory> {
    inventory.read().unwrap_or_else(PoisonError::into_inner)
}
