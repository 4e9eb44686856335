//! One guest's list in one boot: references into the dictionary.
//!
//! At start the references that are on disk are read up to the logged count; entries behind it were never logged and come again
//! from the guest. References that do not give the logged aggregate are *damaged*: they are kept and shown as they are, and
//! the guest can add nothing to them.

use onequote_evidence::{id::BootId, ima::Aggregate};

use super::{
    dictionary::Dictionary,
    files::{Chunk, Key},
};
use crate::inventory::LoggedBoot;

/// A list.
pub(super) struct GuestList {
    /// Which boot of the session.
    pub(super) boot: u32,
    /// The boot id that the guest claimed.
    pub(super) boot_id: BootId,
    /// Size of the template hash, in bytes.
    pub(super) hash_size: u32,
    /// References into the dictionary.
    pub(super) refs: Vec<u32>,
    /// Count and aggregate of `refs`.
    pub(super) received: Aggregate,
    /// Whether and why nothing more is taken.
    pub(super) closed: Option<Closed>,
    /// References that are on disk.
    saved: usize,
}

/// Why a list takes nothing more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Closed {
    /// The guest claimed another past, or went over a limit: it is in the log.
    ByGuest,
    /// What is on disk does not give what was logged.
    Damaged,
}

impl GuestList {
    /// Begins a list.
    pub(super) fn create(boot: u32, boot_id: BootId, hash_size: u32) -> Self {
        let (refs, received) = (Vec::new(), Aggregate::EMPTY);
        Self { boot, boot_id, hash_size, refs, received, closed: None, saved: 0 }
    }

    /// A list that the log speaks of, with the references that are on disk.
    pub(super) fn restore(mut refs: Vec<u32>, logged: &LoggedBoot, dictionary: &Dictionary) -> Self {
        refs.truncate(usize::try_from(logged.count).unwrap_or(usize::MAX));
        refs.shrink_to_fit();
        let received = dictionary.aggregate(&refs);
        let damaged = received != Aggregate { count: logged.count, value: logged.aggregate };
        Self {
            boot: logged.boot,
            boot_id: logged.boot_id,
            hash_size: logged.hash_size,
            saved: refs.len(),
            refs,
            received,
            closed: if damaged { Some(Closed::Damaged) } else { logged.closed.then_some(Closed::ByGuest) },
        }
    }

    /// Adds references, after which the list stands at `after`.
    pub(super) fn extend(&mut self, new: &[u32], after: Aggregate) {
        // By a quarter and not to the double: there are many lists, and most have stopped growing.
        if self.refs.capacity() - self.refs.len() < new.len() {
            self.refs.reserve_exact(new.len().max(self.refs.len() / 4));
        }
        self.refs.extend_from_slice(new);
        self.received = after;
    }

    /// What is not on disk.
    pub(super) fn unsaved(&self, key: Key) -> Option<Chunk> {
        let refs = self.refs.get(self.saved..).filter(|refs| !refs.is_empty())?;
        Some(Chunk { key, first: self.saved, refs: refs.to_vec() })
    }

    /// All of it.
    pub(super) fn whole(&self, key: Key) -> Chunk {
        Chunk { key, first: 0, refs: self.refs.clone() }
    }

    /// So many references are on disk.
    pub(super) fn saved(&mut self, len: usize) {
        self.saved = len.min(self.refs.len());
    }
}
