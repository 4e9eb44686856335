//! Hosts at hand, those that were used last, up to a bound.
//!
//! What is let go costs reading the host's evidence again from the store, and nothing else.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use onequote_evidence::id::HostId;

use super::Known;

/// Bytes that are kept at hand unless told otherwise.
pub(super) const DEFAULT_MEMORY: usize = 4 << 30;

/// The hosts.
#[derive(Debug)]
pub struct Cache {
    most: usize,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    hosts: HashMap<HostId, Entry>,
    /// When each was used: the first was not for the longest time.
    used: BTreeMap<u64, HostId>,
    clock: u64,
    bytes: usize,
}

#[derive(Debug)]
struct Entry {
    known: Arc<Known>,
    bytes: usize,
    used: u64,
}

impl Cache {
    pub(super) fn new(most: usize) -> Self {
        Self { most, inner: Mutex::default() }
    }

    pub(super) fn get(&self, id: &HostId) -> Option<Arc<Known>> {
        let mut inner = self.lock();
        let now = inner.tick();
        let Inner { hosts, used, .. } = &mut *inner;
        let entry = hosts.get_mut(id)?;
        used.remove(&entry.used);
        used.insert(now, id.clone());
        entry.used = now;
        Some(entry.known.clone())
    }

    pub(super) fn put(&self, id: HostId, known: Arc<Known>) {
        let bytes = known.size();
        let mut inner = self.lock();
        inner.remove(&id);
        let used = inner.tick();
        inner.bytes += bytes;
        inner.used.insert(used, id.clone());
        inner.hosts.insert(id, Entry { known, bytes, used });
        while inner.bytes > self.most {
            let Some((_, oldest)) = inner.used.pop_first() else { break };
            inner.remove(&oldest);
        }
    }

    pub(super) fn remove(&self, id: &HostId) {
        self.lock().remove(id);
    }

    /// How many there are, and about how many bytes they take.
    #[must_use]
    pub fn usage(&self) -> (usize, usize) {
        let inner = self.lock();
        (inner.hosts.len(), inner.bytes)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing in here panics halfway.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn remove(&mut self, id: &HostId) {
        if let Some(entry) = self.hosts.remove(id) {
            self.used.remove(&entry.used);
            self.bytes -= entry.bytes;
        }
    }
}
