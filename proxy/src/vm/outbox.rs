//! A session's events on their way to the log: in order, none lost, none twice.
//!
//! An append that failed may yet turn up in the log. Its events are kept as *doubtful* until the log takes events
//! again; then the inventory tells how many events of this session the log has, and so how many of the doubtful ones.

use std::sync::{Arc, PoisonError, RwLock};

use onequote_evidence::event::{Event, EventBody, VmRef};

use crate::{
    inventory::Inventory,
    sink::{EventSink, SinkError},
};

/// Events of one session that are not in the log yet, or not known to be.
pub(super) struct Outbox {
    vm: VmRef,
    sink: Arc<dyn EventSink>,
    inventory: Arc<RwLock<Inventory>>,
    /// How many of the session's events the log has for certain.
    logged: u64,
    /// Those of an append that did not succeed.
    doubtful: Vec<Event>,
    waiting: Vec<Event>,
    no_start: bool,
}

impl Outbox {
    pub(super) fn new(vm: VmRef, sink: Arc<dyn EventSink>, inventory: Arc<RwLock<Inventory>>) -> Self {
        let mut outbox =
            Self { vm, sink, inventory, logged: 0, doubtful: Vec::new(), waiting: Vec::new(), no_start: false };
        outbox.logged = outbox.in_inventory().unwrap_or(0);
        outbox
    }

    /// Adds an event behind the others.
    pub(super) fn push(&mut self, event: Event) {
        if matches!(event.body, EventBody::VmStart(_)) {
            self.no_start = false;
        }
        self.waiting.push(event);
    }

    /// How many events are not known to be in the log.
    pub(super) fn len(&self) -> usize {
        self.doubtful.len() + self.waiting.len()
    }

    /// Takes back a start that could not be logged: it has not happened, and must not be logged later. If it turns
    /// out that the log has it, what comes behind it in the log tells that the VM was not let run.
    pub(super) fn withdraw_start(&mut self) {
        self.no_start = true;
    }

    /// Logs all, in one record.
    pub(super) async fn flush(&mut self) -> Result<(), SinkError> {
        if !self.doubtful.is_empty() {
            self.sink.ready().await?;
            self.settle();
        }
        if self.waiting.is_empty() {
            return Ok(());
        }
        // Doubtful before the attempt: whoever drops this future cannot know how it ended.
        self.doubtful = std::mem::take(&mut self.waiting);
        self.sink.append(self.doubtful.clone()).await?;
        self.logged += self.doubtful.len() as u64;
        self.doubtful.clear();
        Ok(())
    }

    /// Sorts the doubtful events out.
    fn settle(&mut self) {
        let stops = self.doubtful.iter().any(|e| matches!(e.body, EventBody::VmStop(_)));
        let all = self.logged + self.doubtful.len() as u64;
        let now = match self.in_inventory() {
            Some(events) => events,
            // A session that the log knew is gone from the inventory when its stop is in the log.
            None if stops && self.logged > 0 => all,
            None => self.logged,
        };
        let arrived = usize::try_from(now.saturating_sub(self.logged)).unwrap_or(usize::MAX);
        let mut rest = self.doubtful.split_off(arrived.min(self.doubtful.len()));
        self.doubtful.clear();
        self.logged = now;
        rest.append(&mut self.waiting);
        if self.no_start {
            rest.retain(|e| !matches!(e.body, EventBody::VmStart(_)));
        }
        self.waiting = rest;
    }

    fn in_inventory(&self) -> Option<u64> {
        let inventory = self.inventory.read().unwrap_or_else(PoisonError::into_inner);
        inventory.vm(&self.vm).map(|vm| vm.events)
    }
}
