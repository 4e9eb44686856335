//! A session's events on their way to the log: in order, none lost, none twice.
//!
//! The session and the clients of its intercepted monitor put their events in here; whoever flushes takes along what
//! the others have put in, so that events that come while the TPM is busy share the next record.
//!
//! An append that failed may yet turn up in the log. Its events are kept as *doubtful* until the log takes events
//! again; then the inventory tells how many events of this session the log has, and so how many of the doubtful ones.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError, RwLock,
    atomic::{AtomicUsize, Ordering},
};

use onequote_evidence::event::{Event, EventBody, VmRef};

use crate::{
    inventory::Inventory,
    sink::{EventSink, SinkError},
};

/// Events of one session that are not in the log yet, or not known to be. Clones share them.
#[derive(Clone)]
pub(crate) struct Outbox {
    shared: Arc<Shared>,
}

/// An event that was put in, to take it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ticket(u64);

struct Shared {
    vm: VmRef,
    sink: Arc<dyn EventSink>,
    inventory: Arc<RwLock<Inventory>>,
    /// Held for as long as an append lasts.
    sent: tokio::sync::Mutex<Sent>,
    waiting: Mutex<Waiting>,
    /// How many of `sent` are doubtful.
    doubtful: AtomicUsize,
}

struct Sent {
    /// How many of the session's events the log has for certain.
    logged: u64,
    /// Those of an append that did not succeed.
    doubtful: Vec<Item>,
}

#[derive(Default)]
struct Waiting {
    next: u64,
    items: Vec<Item>,
    /// Taken back when they were on their way already.
    withdrawn: Vec<Ticket>,
    /// Whether the session's stop was put in: it is its last event.
    stopped: bool,
}

struct Item {
    ticket: Ticket,
    event: Event,
}

impl Outbox {
    pub(crate) fn new(vm: VmRef, sink: Arc<dyn EventSink>, inventory: Arc<RwLock<Inventory>>) -> Self {
        let logged = in_inventory(&inventory, &vm).unwrap_or(0);
        let shared = Shared {
            vm,
            sink,
            inventory,
            sent: tokio::sync::Mutex::new(Sent { logged, doubtful: Vec::new() }),
            waiting: Mutex::default(),
            doubtful: AtomicUsize::new(0),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Adds an event behind the others.
    pub(crate) fn push(&self, event: Event) -> Ticket {
        let mut waiting = self.shared.waiting();
        waiting.stopped |= matches!(event.body, EventBody::VmStop(_));
        waiting.push(event)
    }

    /// The same for those who do not know whether the session has ended: then nothing is added.
    pub(crate) fn offer(&self, event: Event) -> Option<Ticket> {
        let mut waiting = self.shared.waiting();
        (!waiting.stopped).then(|| waiting.push(event))
    }

    /// How many events are not known to be in the log.
    pub(super) fn len(&self) -> usize {
        self.shared.doubtful.load(Ordering::SeqCst) + self.shared.waiting().items.len()
    }

    /// Takes back an event that could not be logged: what it speaks of has not happened, and must not be logged later.
    /// If it turns out that the log has it, it says more than happened.
    pub(crate) fn withdraw(&self, ticket: Ticket) {
        let mut waiting = self.shared.waiting();
        let before = waiting.items.len();
        waiting.items.retain(|item| item.ticket != ticket);
        if waiting.items.len() == before && self.shared.doubtful.load(Ordering::SeqCst) > 0 {
            waiting.withdrawn.push(ticket);
        }
    }

    /// Logs all, in one record. When that went well, whatever was put in before is in the log or was taken back.
    pub(crate) async fn flush(&self) -> Result<(), SinkError> {
        let mut sent = self.shared.sent.lock().await;
        if !sent.doubtful.is_empty() {
            self.shared.sink.ready().await?;
            self.shared.settle(&mut sent);
        }
        let events: Vec<Event> = {
            let mut waiting = self.shared.waiting();
            if waiting.items.is_empty() {
                return Ok(());
            }
            // Doubtful before the attempt: whoever drops this future cannot know how it ended.
            sent.doubtful = std::mem::take(&mut waiting.items);
            self.shared.doubtful.store(sent.doubtful.len(), Ordering::SeqCst);
            sent.doubtful.iter().map(|item| item.event.clone()).collect()
        };
        let count = events.len() as u64;
        self.shared.sink.append(events).await?;
        sent.logged += count;
        self.shared.clear_doubtful(&mut sent);
        Ok(())
    }
}

impl Waiting {
    fn push(&mut self, event: Event) -> Ticket {
        let ticket = Ticket(self.next);
        self.next += 1;
        self.items.push(Item { ticket, event });
        ticket
    }
}

impl Shared {
    /// Sorts the doubtful events out.
    fn settle(&self, sent: &mut Sent) {
        let stops = sent.doubtful.iter().any(|item| matches!(item.event.body, EventBody::VmStop(_)));
        let all = sent.logged + sent.doubtful.len() as u64;
        let now = match in_inventory(&self.inventory, &self.vm) {
            Some(events) => events,
            // A session that the log knew is gone from the inventory when its stop is in the log.
            None if stops && sent.logged > 0 => all,
            None => sent.logged,
        };
        let arrived = usize::try_from(now.saturating_sub(sent.logged)).unwrap_or(usize::MAX);
        let mut rest = sent.doubtful.split_off(arrived.min(sent.doubtful.len()));
        sent.logged = now;
        {
            let mut waiting = self.waiting();
            rest.retain(|item| !waiting.withdrawn.contains(&item.ticket));
            rest.append(&mut waiting.items);
            waiting.items = rest;
        }
        self.clear_doubtful(sent);
    }

    fn clear_doubtful(&self, sent: &mut Sent) {
        sent.doubtful.clear();
        let mut waiting = self.waiting();
        waiting.withdrawn.clear();
        self.doubtful.store(0, Ordering::SeqCst);
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // Nothing in here can panic between two changes that belong together.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn in_inventory(inventory: &RwLock<Inventory>, vm: &VmRef) -> Option<u64> {
    inventory.read().unwrap_or_else(PoisonError::into_inner).vm(vm).map(|vm| vm.events)
}
