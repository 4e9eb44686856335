//! The one owner of the guests' lists.
//!
//! ```text
//! jobs ──► lists in memory ──► dictionary and list files, synced ──► guest-entries in the log ──► permits given back
//! ```
//!
//! The writer takes all jobs that wait, changes the lists, saves them, and logs one batch of events. While the TPM is
//! busy jobs queue, and the next batch carries them all. While guests are asked for what is new before a quote, it holds
//! back what comes until all have answered or the time is over, so that the quote costs one extend and not one a guest;
//! only a guest that has much to send, and would wait for its own entries, makes it log before. What is still to be logged is always computed from what the
//! log has (the inventory) and what the lists hold, so that a batch that failed is neither lost nor logged twice.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    io,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, Instant},
};

use onequote_evidence::{
    event::{Event, EventBody, GuestEntries, GuestHello, GuestLost, GuestOverflow, GuestRewind, VmRef},
    id::{BootId, Sha256, TimeMs},
    ima::{Aggregate, ListReader},
};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tracing::warn;

use super::{
    dictionary::Dictionary,
    list::{Closed, GuestList},
    protocol::WINDOW,
    room::{Brought, Job, Limits, Lists, RoomError, Token},
};
use crate::{
    inventory::Inventory,
    rate::{Bucket, Kind, limited},
    sink::EventSink,
};

/// Jobs taken into one batch.
const BATCH: usize = 1024;

/// Lists that are written at a time.
const SYNCS: usize = 16;

/// How often a batch that failed is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Connections of one session that are logged; later ones are only counted, so that a guest that connects over and
/// over cannot fill the log. Every new boot is logged.
const LOGGED_CONNECTIONS: u32 = 64;

/// How long it takes until a session that has used up [`Limits::records`] may cause one more.
const RECORDS_REFILL: Duration = Duration::from_secs(2);

pub(super) struct Writer {
    folder: PathBuf,
    limits: Limits,
    clock: fn() -> TimeMs,
    inventory: Arc<RwLock<Inventory>>,
    sink: Arc<dyn EventSink>,
    dictionary: Dictionary,
    sessions: HashMap<VmRef, Session>,
    /// By all sessions.
    brought: Brought,
    /// Events that are not in the log yet and cannot be computed from the lists.
    events: Vec<Event>,
    permits: Vec<(VmRef, OwnedSemaphorePermit)>,
    /// Sessions whose entries are held back a little: they have made too many records.
    held_back: HashSet<VmRef>,
    flushes: Vec<oneshot::Sender<()>>,
    /// Until when what comes is held back, unless a flush comes before.
    hold: Option<Instant>,
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
        folder: PathBuf,
        limits: Limits,
        clock: fn() -> TimeMs,
        inventory: Arc<RwLock<Inventory>>,
        sink: Arc<dyn EventSink>,
    ) -> io::Result<Self> {
        std::fs::create_dir_all(&folder)?;
        let dictionary = Dictionary::open(&folder.join("dictionary"))?;
        let mut sessions = HashMap::new();
        let mut brought = Brought::default();
        let mut seen = HashSet::new();
        for (vm, logged) in read(&inventory).vms() {
            let mut session = Session::new(limits.records);
            for boot in &logged.boots {
                let list = GuestList::load(&folder, vm, boot, &dictionary)?;
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
            folder,
            limits,
            clock,
            inventory,
            sink,
            dictionary,
            sessions,
            brought,
            events: Vec::new(),
            permits: Vec::new(),
            held_back: HashSet::new(),
            flushes: Vec::new(),
            hold: None,
        })
    }

    pub(super) async fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        let mut failed = false;
        loop {
            let held = self.hold.map(|until| until.saturating_duration_since(Instant::now()));
            let retry = (failed || !self.held_back.is_empty()).then_some(RETRY);
            let job = if let Some(limit) = held.into_iter().chain(retry).min() {
                match tokio::time::timeout(limit, jobs.recv()).await {
                    Ok(Some(job)) => Some(job),
                    Ok(None) => return,
                    Err(_) => None,
                }
            } else {
                let Some(job) = jobs.recv().await else { return };
                Some(job)
            };
            if let Some(job) = job {
                self.take(job);
                for _ in 1..BATCH {
                    let Ok(job) = jobs.try_recv() else { break };
                    self.take(job);
                }
            }
            if self.holds() {
                continue;
            }
            match self.log().await {
                Ok(()) => failed = false,
                Err(e) => {
                    if !failed {
                        warn!("guests' entries wait: {e}");
                    }
                    failed = true;
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
            && self.permits.iter().filter(|(vm, _)| !self.held_back.contains(vm)).all(|(vm, _)| {
                let frames = frames.entry(vm).or_default();
                *frames += 1;
                *frames < WINDOW / 2
            })
    }

    fn take(&mut self, job: Job) {
        match job {
            Job::Hello { vm, boot_id, hash_size, collect, reply } => {
                let _ = reply.send(self.hello(vm, boot_id, hash_size, collect));
            }
            Job::Rewound { token, claimed, boot_id } => self.rewound(&token, claimed, boot_id),
            Job::Entries { token, first, count, bytes, permit, reply } => {
                let taken = self.entries(&token, first, count, &bytes.0);
                self.permits.push((token.vm, permit));
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
                self.flushes.push(done);
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
            session.lists.push(GuestList::create(&self.folder, &vm, boot, boot_id, hash_size)?);
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

    fn entries(&mut self, token: &Token, first: u64, count: u64, bytes: &[u8]) -> Result<(), RoomError> {
        let list = current(&mut self.sessions, token)?;
        if let Some(why) = list.closed {
            return Err(RoomError::ListClosed(match why {
                Closed::ByGuest => "rewound or over a limit",
                Closed::Damaged => "its list on the host is damaged",
            }));
        }
        if first != list.received.count {
            return Err(RoomError::OutOfOrder { expected: list.received.count, found: first });
        }
        let read = || ListReader::new(bytes, token.hash_size as usize).flatten();
        let unknown = read().filter(|entry| !self.dictionary.contains(entry));
        let new = Brought { entries: count, bytes: unknown.map(|entry| entry.raw.len() as u64).sum() };
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
        // The connection has checked that all of the bytes are entries.
        for entry in read() {
            let (id, digest) = self.dictionary.intern(&entry)?;
            list.refs.push(id);
            list.received.push_digest(&digest);
        }
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
        self.events.push(Event { time: (self.clock)(), vm: Some(vm), body });
    }

    fn lists(&self, wanted: &[(VmRef, u32, u64)]) -> Lists {
        let refs = |(vm, boot, count): &(VmRef, u32, u64)| {
            let list = self.sessions.get(vm).and_then(|s| s.lists.iter().find(|list| list.boot == *boot));
            let refs = list.map_or(&[][..], |list| &list.refs[..list.refs.len().min(*count as usize)]);
            let known = refs.iter().position(|id| self.dictionary.entry(*id).is_none());
            &refs[..known.unwrap_or(refs.len())]
        };
        // In the order in which the host saw them first: what came later stands behind what was sent before.
        let ids: BTreeSet<u32> = wanted.iter().flat_map(|one| refs(one).iter().copied()).collect();
        let places: HashMap<u32, u32> = ids.iter().zip(0..).map(|(id, place)| (*id, place)).collect();
        let dictionary = ids.iter().filter_map(|id| self.dictionary.entry(*id).map(Arc::clone)).collect();
        let mapped = |one| refs(one).iter().filter_map(|id| places.get(id).copied()).collect();
        Lists { dictionary, lists: wanted.iter().map(|one| (one.0, one.1, mapped(one))).collect() }
    }

    /// Saves and logs all that is not logged yet.
    async fn log(&mut self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.sink.ready().await?;
        tokio::task::block_in_place(|| self.save())?;
        let events = self.due();
        if !events.is_empty() {
            self.sink.append(events).await?;
        }
        self.events.clear();
        self.permits.retain(|(vm, _)| self.held_back.contains(vm));
        for flush in self.flushes.drain(..) {
            let _ = flush.send(());
        }
        Ok(())
    }

    /// Writes what is new to the dictionary and the lists, and syncs them, a few at a time: file systems sync many files
    /// together for little more than one.
    fn save(&mut self) -> io::Result<()> {
        let Self { dictionary, sessions, folder, .. } = self;
        let mut lists: Vec<&mut GuestList> =
            sessions.values_mut().flat_map(|s| &mut s.lists).filter(|list| list.is_unsaved()).collect();
        let share = lists.len().div_ceil(SYNCS).max(1);
        std::thread::scope(|scope| {
            let save = |lists: &mut [&mut GuestList]| lists.iter_mut().try_for_each(|list| list.save());
            let threads: Vec<_> = lists.chunks_mut(share).map(|part| scope.spawn(move || save(part))).collect();
            let dictionary = dictionary.save().map_err(|e| named(&folder.join("dictionary"), &e));
            let fault = || Err(io::Error::other("the thread that writes failed"));
            let saved = threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| fault()));
            let lists = saved.collect::<io::Result<()>>().map_err(|e| named(folder, &e));
            dictionary.and(lists)
        })
    }

    /// What the log does not have yet: kept events, each list's new entries after its hello and before its end.
    fn due(&mut self) -> Vec<Event> {
        let inventory = read(&self.inventory);
        let (now, wanted) = (Instant::now(), !self.flushes.is_empty());
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
        self.events.retain(|event| !logged_already(event));
        let mut events: Vec<Event> = self.events.iter().filter(|e| !closed(e)).cloned().collect();
        for (vm, session) in &mut self.sessions {
            let boots = inventory.vm(vm).map(|vm| vm.boots.as_slice()).unwrap_or_default();
            let new = session.lists.iter().filter(|list| list.closed != Some(Closed::Damaged)).any(|list| {
                let logged = boots.iter().find(|b| b.boot == list.boot).map_or(0, |b| b.count);
                list.received.count > logged
            });
            let ends = self.events.iter().any(|event| event.vm == Some(*vm) && closed(&event));
            if new && !session.records.take(now) && !wanted && !ends && inventory.vm(vm).is_some() {
                self.held_back.insert(*vm);
                continue;
            }
            for list in session.lists.iter_mut().filter(|list| list.closed != Some(Closed::Damaged)) {
                let logged = boots.iter().find(|b| b.boot == list.boot);
                list.logged = logged
                    .map_or(Aggregate::EMPTY, |logged| Aggregate { count: logged.count, value: logged.aggregate });
                if list.received.count > list.logged.count {
                    let body = GuestEntries {
                        boot: list.boot,
                        first: list.logged.count,
                        count: list.received.count - list.logged.count,
                        aggregate: list.received.value,
                    };
                    events.push(Event { time: (self.clock)(), vm: Some(*vm), body: body.into() });
                }
            }
        }
        events.extend(self.events.iter().filter(closed).cloned());
        // A VM whose end is logged already takes no more events.
        let live: HashSet<VmRef> = inventory.vms().map(|(vm, _)| *vm).collect();
        events.retain(|event| event.vm.is_some_and(|vm| live.contains(&vm)));
        events
    }
}

/// An error of the file system that says where it happened.
fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot write {}: {error}", path.display()))
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
