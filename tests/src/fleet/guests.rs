//! The guests of one host: what their kernels have listed, as the proxy has taken it.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use onequote_evidence::{
    event::{GuestEntries, VmRef},
    ima::Aggregate,
};
use onequote_proxy::{attest::Guests, guest::Lists, sink::BoxFuture};

use super::catalogue::Catalogue;

/// All guests of a host. Every one of them is heard of all the time, and has sent all that it has.
pub struct GuestLists {
    catalogue: Arc<Catalogue>,
    state: Mutex<State>,
}

#[derive(Clone, Default)]
struct State {
    /// The host's dictionary: the catalogue's numbers in the order in which this host saw them first.
    dictionary: Vec<u32>,
    places: HashMap<u32, u32>,
    lists: HashMap<VmRef, Vec<List>>,
    /// An attacker's: the entry that is sent in place of the n-th of a list.
    exchanged: Option<(VmRef, usize, u32)>,
}

#[derive(Clone)]
struct List {
    boot: u32,
    references: Vec<u32>,
    aggregate: Aggregate,
}

impl GuestLists {
    /// No guest yet.
    #[must_use]
    pub fn new(catalogue: Arc<Catalogue>) -> Self {
        Self { catalogue, state: Mutex::default() }
    }

    /// A guest's kernel lists more, by the catalogue's numbers. Gives the event for the log.
    pub fn add(&self, vm: VmRef, boot: u32, entries: impl IntoIterator<Item = usize>) -> GuestEntries {
        let mut state = self.lock();
        let State { dictionary, places, lists, .. } = &mut *state;
        let lists = lists.entry(vm).or_default();
        let at = lists.iter().position(|list| list.boot == boot).unwrap_or_else(|| {
            lists.push(List { boot, references: Vec::new(), aggregate: Aggregate::EMPTY });
            lists.len() - 1
        });
        let list = &mut lists[at];
        let first = list.aggregate.count;
        for number in entries {
            let place = *places.entry(number as u32).or_insert_with(|| {
                dictionary.push(number as u32);
                dictionary.len() as u32 - 1
            });
            list.references.push(place);
            list.aggregate.push_digest(&self.catalogue.entries[number].digest);
        }
        GuestEntries { boot, first, count: list.aggregate.count - first, aggregate: list.aggregate.value }
    }

    /// Whether a guest's list has this entry already: a kernel lists each file once.
    #[must_use]
    pub fn has(&self, vm: VmRef, boot: u32, number: usize) -> bool {
        let state = self.lock();
        let list = state.lists.get(&vm).and_then(|lists| lists.iter().find(|list| list.boot == boot));
        let place = state.places.get(&(number as u32));
        list.zip(place).is_some_and(|(list, place)| list.references.contains(place))
    }

    /// The same again, for another machine.
    #[must_use]
    pub fn copy(&self) -> Self {
        Self { catalogue: Arc::clone(&self.catalogue), state: Mutex::new(self.lock().clone()) }
    }

    /// Bytes of all lists as the guests' kernels have them, each with all its entries.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let state = self.lock();
        let entry = |place: &u32| self.catalogue.entries[state.dictionary[*place as usize] as usize].raw.len() as u64;
        state.lists.values().flatten().flat_map(|list| &list.references).map(entry).sum()
    }

    /// A VM's process is gone.
    pub fn end(&self, vm: VmRef) {
        self.lock().lists.remove(&vm);
    }

    /// The host was booted.
    pub fn clear(&self) {
        *self.lock() = State::default();
    }

    /// An attacker's: from now on another entry is sent in place of a guest's last one.
    pub fn exchange_last(&self, vm: VmRef, number: usize) {
        let mut state = self.lock();
        let last = state.lists.get(&vm).and_then(|lists| lists.last()).map_or(0, |list| list.references.len());
        let State { dictionary, places, exchanged, .. } = &mut *state;
        let place = *places.entry(number as u32).or_insert_with(|| {
            dictionary.push(number as u32);
            dictionary.len() as u32 - 1
        });
        *exchanged = Some((vm, last.saturating_sub(1), place));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Guests for GuestLists {
    fn collect(&self, _wait: Duration) -> BoxFuture<'_, HashSet<VmRef>> {
        Box::pin(std::future::ready(HashSet::new()))
    }

    fn last_contact(&self, vm: &VmRef) -> Option<Duration> {
        self.lock().lists.contains_key(vm).then_some(Duration::from_millis(500))
    }

    fn lists(&self, wanted: Vec<(VmRef, u32, u64)>) -> BoxFuture<'_, Lists> {
        let state = self.lock();
        let dictionary =
            state.dictionary.iter().map(|&n| Arc::clone(&self.catalogue.entries[n as usize].raw)).collect();
        let list = |(vm, boot, count): (VmRef, u32, u64)| {
            let list = state.lists.get(&vm).and_then(|lists| lists.iter().find(|list| list.boot == boot));
            let all = list.map_or(&[][..], |list| &list.references);
            let mut references = all[..all.len().min(count as usize)].to_vec();
            if let Some((_, at, place)) = state.exchanged.filter(|(of, _, _)| *of == vm)
                && let Some(reference) = references.get_mut(at)
            {
                *reference = place;
            }
            (vm, boot, references)
        };
        let lists = Lists { dictionary, lists: wanted.into_iter().map(list).collect() };
        drop(state);
        Box::pin(std::future::ready(lists))
    }
}
