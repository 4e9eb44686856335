//! What is kept of a host's evidence at hand, so that the next can go on where this ended.
//!
//! It is where every fold stands: replay of the measurement log and of the lists, sessions, findings. Nothing in it is
//! believed that was not shown by evidence that was accepted, and all of it can be made again from the parts of evidence
//! that the store has. It holds for one policy, one epoch and the state that was made with it. A round makes a new one and
//! leaves the old as it is; what did not change is shared between both.

use std::{collections::BTreeMap, sync::Arc};

use onequote_evidence::{id::Sha256, stream::Guest};

use super::{
    dictionary::Dictionary,
    firmware::Outcome,
    guests::{ListId, ListProgress},
    host_ima::HostProgress,
    log::LogProgress,
    logs::Logs,
    sessions::Sessions,
};

/// Where every fold stands. Can be had only from an appraisal that accepted the evidence.
#[derive(Debug, Clone)]
pub struct Kept {
    /// SHA-256 of the statement of the evidence that was accepted last.
    pub(super) statement: Sha256,
    /// The policy that everything was judged by.
    pub(super) policy: Sha256,
    /// The measurement log.
    pub(super) log: LogProgress,
    /// The firmware's event log.
    pub(super) firmware: Arc<Outcome>,
    /// The host's IMA list.
    pub(super) host: HostProgress,
    /// What the measurement log says of VMs.
    pub(super) sessions: Arc<Sessions>,
    /// Distinct entries of guests' lists.
    pub(super) dictionary: Dictionary,
    /// Guests' lists.
    pub(super) lists: BTreeMap<ListId, ListProgress>,
}

impl Kept {
    /// SHA-256 of the statement of the evidence that was accepted last.
    #[must_use]
    pub fn statement(&self) -> &Sha256 {
        &self.statement
    }

    /// Whether every log goes on where it ended, and lists that were not there before begin.
    #[must_use]
    pub fn is_followed_by(&self, logs: &Logs) -> bool {
        let list = |list: &Guest| {
            let known = self.lists.get(&(list.session, list.boot));
            list.first == known.map_or(0, |known| known.aggregate.count)
        };
        logs.firmware.first == self.firmware.len
            && logs.host_ima.first == self.host.len()
            && logs.records.first == self.log.len()
            && logs.dictionary.first == self.dictionary.len() as u64
            && logs.guests.iter().all(list)
    }

    /// About how much memory it takes, in bytes, entries that other hosts may have too apart.
    #[must_use]
    pub fn size(&self) -> usize {
        let lists: usize =
            self.lists.values().map(|list| size_of::<(ListId, ListProgress)>() + 4 * list.bad.len()).sum();
        size_of::<Self>() + lists + self.dictionary.len() * size_of::<usize>() + self.sessions.size()
    }
}
