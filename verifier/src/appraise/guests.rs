//! Step 9: that each guest's list is the one whose aggregates went into the log, and into the statement.
//!
//! Lists come as references into one dictionary. Replaying a list gives its aggregate after every entry; each record
//! of entries must have the one at its place, records must follow each other, and the last must be what the host
//! states now. A list that was accepted before must still begin as it did.

use std::collections::{BTreeMap, HashMap};

use onequote_evidence::{
    id::{Blob, SessionId, Sha256},
    ima::{Aggregate, Entry, SHA1_HASH_SIZE},
    statement::{GuestBoot, Statement, VmState},
    stream::Guest,
};

use super::{
    sessions::{Boot, Sessions},
    state::AcceptedGuest,
};
use crate::finding::{Code, Finding};

/// Distinct entries, read once for each size of template hash that a guest's list has.
pub struct Dictionary<'a> {
    raw: &'a [Blob],
    read: HashMap<usize, Vec<Option<DictionaryEntry<'a>>>>,
}

/// One distinct entry.
#[derive(Debug, Clone, Copy)]
pub struct DictionaryEntry<'a> {
    /// As listed.
    pub entry: Entry<'a>,
    /// What it extends an aggregate with.
    pub digest: Sha256,
}

/// A guest's list that is the recorded one.
#[derive(Debug, Clone)]
pub struct VerifiedList<'a> {
    /// The VM's QEMU process.
    pub session: SessionId,
    /// Which boot of it.
    pub boot: u32,
    /// Size of the template hash, in bytes: with it the dictionary is read.
    pub hash_size: usize,
    /// Indexes into the dictionary, all of them there and readable.
    pub entries: &'a [u32],
    /// Aggregate over them.
    pub aggregate: Sha256,
}

/// Lists and what is wrong with others.
#[derive(Debug, Default)]
pub struct Guests<'a> {
    /// The lists that are true.
    pub lists: Vec<VerifiedList<'a>>,
    /// Findings by QEMU process.
    pub findings: BTreeMap<SessionId, Vec<Finding>>,
    /// Findings about the host.
    pub host_findings: Vec<Finding>,
}

impl<'a> Dictionary<'a> {
    /// Over the entries as sent.
    #[must_use]
    pub fn new(raw: &'a [Blob]) -> Self {
        Self { raw, read: HashMap::new() }
    }

    /// The entries, read with this size of template hash; none where an entry cannot be read so.
    pub fn entries(&mut self, hash_size: usize) -> &[Option<DictionaryEntry<'a>>] {
        let raw = self.raw;
        self.read.entry(hash_size).or_insert_with(|| {
            let read = |blob: &'a Blob| {
                let entry = Entry::parse(&blob.0, hash_size).ok()?;
                Some(DictionaryEntry { entry, digest: Aggregate::digest(&entry) })
            };
            raw.iter().map(read).collect()
        })
    }
}

/// Checks all lists. The caller must trust `statement` and `sessions`, and must have kept `accepted` itself.
#[must_use]
pub fn check<'a>(
    statement: &Statement,
    sessions: &Sessions,
    sent: &'a [Guest],
    dictionary: &mut Dictionary<'_>,
    accepted: &[AcceptedGuest],
) -> Guests<'a> {
    let mut out = Guests::default();
    for list in sent {
        let stated = (statement.vms.iter())
            .any(|vm| vm.session == list.session && vm.vm == list.vm && vm.boots.iter().any(|b| b.boot == list.boot));
        if !stated {
            let item = format!("VM {}, session {}, boot {}", list.vm, list.session, list.boot);
            out.host_findings.push(Finding::new(Code::GuestListUnexpected, item));
        }
    }
    for vm in &statement.vms {
        let none = BTreeMap::new();
        let boots = sessions.by_id.get(&vm.session).map_or(&none, |s| &s.boots);
        let older = sessions.by_id.get(&vm.session).is_some_and(|s| s.older);
        let mut findings = missing_boots(vm, boots, accepted);
        for stated in &vm.boots {
            let list = sent.iter().find(|l| l.session == vm.session && l.vm == vm.vm && l.boot == stated.boot);
            let recorded = boots.get(&stated.boot).cloned().unwrap_or_default();
            let before = accepted.iter().find(|a| a.session == vm.session && a.boot == stated.boot);
            let entries = list.map_or(&[][..], |list| &list.entries);
            let one = One { stated, recorded: &recorded, entries, sent: list.is_some(), before, older };
            match one.check(dictionary) {
                Ok((hash_size, aggregate)) => out.lists.push(VerifiedList {
                    session: vm.session,
                    boot: stated.boot,
                    hash_size,
                    entries,
                    aggregate,
                }),
                Err(finding) => findings.push(finding),
            }
        }
        if !findings.is_empty() {
            out.findings.insert(vm.session, findings);
        }
    }
    out
}

/// Boots that the log or an accepted statement speaks of, and that are not stated now.
fn missing_boots(vm: &VmState, recorded: &BTreeMap<u32, Boot>, accepted: &[AcceptedGuest]) -> Vec<Finding> {
    let stated = |boot: u32| vm.boots.iter().any(|b| b.boot == boot);
    let in_log = recorded.iter().filter(|(boot, _)| !stated(**boot)).filter_map(|(boot, facts)| {
        let (recnum, last) = facts.recorded.last()?;
        let finding = Finding::new(Code::GuestListCount, format!("boot {boot}, record {recnum}"));
        Some(finding.expected(format!("{} entries", last.first + last.count)).actual("not in the statement"))
    });
    let before = accepted.iter().filter(|a| a.session == vm.session && a.count > 0 && !stated(a.boot)).map(|a| {
        let finding = Finding::new(Code::GuestListRollback, format!("boot {}", a.boot));
        finding.expected(format!("at least {} entries", a.count)).actual("not in the statement")
    });
    in_log.chain(before).collect()
}

/// One list with everything that it is held against.
struct One<'a> {
    stated: &'a GuestBoot,
    recorded: &'a Boot,
    entries: &'a [u32],
    sent: bool,
    before: Option<&'a AcceptedGuest>,
    older: bool,
}

impl One<'_> {
    fn check(&self, dictionary: &mut Dictionary<'_>) -> Result<(usize, Sha256), Finding> {
        let boot = self.stated.boot;
        if !self.sent && self.stated.count > 0 {
            let finding = Finding::new(Code::GuestListMissing, format!("boot {boot}"));
            return Err(finding.expected(format!("{} entries", self.stated.count)));
        }
        let hash_size = self.recorded.hash_size.unwrap_or(SHA1_HASH_SIZE);
        let read = dictionary.entries(hash_size);
        let mut aggregates = Vec::with_capacity(self.entries.len() + 1);
        let mut running = Aggregate::EMPTY;
        aggregates.push(running.value);
        for (i, &reference) in self.entries.iter().enumerate() {
            let finding = || Finding::new(Code::GuestListReference, format!("boot {boot}, entry {i}"));
            match read.get(reference as usize) {
                None => return Err(finding().expected(format!("below {}", read.len())).actual(reference)),
                Some(None) => return Err(finding().actual(format!("dictionary entry {reference} cannot be read"))),
                Some(Some(entry)) => running.push_digest(&entry.digest),
            }
            aggregates.push(running.value);
        }
        let at = |count: u64| usize::try_from(count).ok().and_then(|i| aggregates.get(i)).copied();
        let end = self.check_records(&at)?;
        let count = |item: String, expected: u64, actual: u64| {
            Finding::new(Code::GuestListCount, item).expected(format!("{expected} entries")).actual(actual)
        };
        if self.stated.count != running.count {
            return Err(count(format!("boot {boot}"), self.stated.count, running.count));
        }
        if self.stated.count != end && self.stated.count > 0 {
            return Err(count(format!("boot {boot}, in the log"), self.stated.count, end));
        }
        if self.stated.aggregate != running.value {
            let finding = Finding::new(Code::GuestListAggregate, format!("boot {boot}, statement"));
            return Err(finding.expected(self.stated.aggregate).actual(running.value));
        }
        if let Some(before) = self.before.filter(|before| at(before.count) != Some(before.aggregate)) {
            let finding = Finding::new(Code::GuestListRollback, format!("boot {boot}"));
            return Err(finding.expected(format!("{} entries, {}", before.count, before.aggregate)));
        }
        Ok((hash_size, running.value))
    }

    /// Holds the list against each record of it; gives the number of entries after the last.
    fn check_records(&self, at: &dyn Fn(u64) -> Option<Sha256>) -> Result<u64, Finding> {
        let boot = self.stated.boot;
        let mut end: Option<u64> = if self.older { None } else { Some(0) };
        for (recnum, entries) in &self.recorded.recorded {
            let item = || format!("boot {boot}, record {recnum}");
            let after = entries.first.saturating_add(entries.count);
            if end.is_some_and(|end| end != entries.first) {
                let finding = Finding::new(Code::GuestListCount, item());
                return Err(finding.expected(format!("entries from {}", end.unwrap_or(0))).actual(entries.first));
            }
            match at(after) {
                None => {
                    let finding = Finding::new(Code::GuestListCount, item());
                    return Err(finding.expected(format!("{after} entries")).actual(self.entries.len()));
                }
                Some(value) if value != entries.aggregate => {
                    let finding = Finding::new(Code::GuestListAggregate, item());
                    return Err(finding.expected(entries.aggregate).actual(value));
                }
                Some(_) => end = Some(after),
            }
        }
        Ok(end.unwrap_or(0))
    }
}
