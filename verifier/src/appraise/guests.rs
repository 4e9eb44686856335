//! Step 9: that each guest's list is the one whose aggregates went into the log, and into the statement.
//!
//! Lists come as references into one dictionary. Replaying a list, from its start or from where its replay stood, gives its
//! aggregate after every entry; each record of entries must have the one at its place, records must follow each
//! other, and the last must be what the host states now. A list that was accepted before must still begin as it did; one
//! that goes on does by its making.

use std::collections::{BTreeMap, HashMap};

use onequote_evidence::{
    id::{SessionId, Sha256},
    ima::{Aggregate, SHA1_HASH_SIZE},
    statement::{GuestBoot, Statement, VmState},
    stream::Guest,
};

use super::{
    WholeNeeded,
    dictionary::Dictionary,
    sessions::{Boot, Boots, Sessions},
    state::AcceptedGuest,
};
use crate::finding::{Code, Finding};

/// A boot of a QEMU process' guest.
pub type ListId = (SessionId, u32);

/// How far a list was taken in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListProgress {
    /// Size of the template hash that it was read with, in bytes.
    pub hash_size: usize,
    /// Count of entries, and aggregate over them.
    pub aggregate: Aggregate,
    /// By which rule its entries were judged.
    pub rule: Option<u32>,
    /// Those that are not as they should be, each once, as indexes into the dictionary.
    pub bad: Vec<u32>,
    /// What of the others could not be checked.
    pub unchecked: super::ima::Unchecked,
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
    /// How far it was taken in before.
    pub before: Option<&'a ListProgress>,
    /// What came since: indexes into the dictionary, all of them there and readable.
    pub new: &'a [u32],
    /// Count of entries, and aggregate over all of them.
    pub aggregate: Aggregate,
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

/// Checks all lists. The caller must trust `statement`, `sessions` and `dictionary`, and must have kept `before` and
/// `accepted` itself.
///
/// # Errors
/// When what was kept does not suffice.
pub fn check<'a>(
    statement: &Statement,
    sessions: &Sessions,
    before: &'a BTreeMap<ListId, ListProgress>,
    sent: &'a [Guest],
    dictionary: &Dictionary,
    accepted: &[AcceptedGuest],
) -> Result<Guests<'a>, WholeNeeded> {
    let mut out = Guests::default();
    let stated: HashMap<SessionId, &VmState> = statement.vms.iter().map(|vm| (vm.session, vm)).collect();
    for list in sent {
        let vm = stated.get(&list.session).filter(|vm| vm.vm == list.vm);
        if vm.is_none_or(|vm| vm.boots.iter().all(|boot| boot.boot != list.boot)) {
            let item = format!("VM {}, session {}, boot {}", list.vm, list.session, list.boot);
            out.host_findings.push(Finding::new(Code::GuestListUnexpected, item));
        }
    }
    let sent: HashMap<_, &Guest> = sent.iter().map(|list| ((list.vm, list.session, list.boot), list)).collect();
    let accepted: HashMap<ListId, &AcceptedGuest> = accepted.iter().map(|a| ((a.session, a.boot), a)).collect();
    let mut digests = Digests { dictionary, read: HashMap::new() };
    let none = Boots::default();
    for vm in &statement.vms {
        let session = sessions.by_id.get(&vm.session);
        let boots = session.map_or(&none, |s| &s.boots);
        let (older, cut) = session.map_or((false, false), |s| (s.older, s.cut));
        let mut findings = missing_boots(vm, boots, &accepted);
        for stated in &vm.boots {
            let id = (vm.session, stated.boot);
            let list = sent.get(&(vm.vm, vm.session, stated.boot));
            let recorded = boots.get(stated.boot).cloned().unwrap_or_default();
            let hash_size = recorded.hash_size.map_or(SHA1_HASH_SIZE, |size| size as usize);
            let from = before.get(&id);
            if from.is_some_and(|from| from.hash_size != hash_size) {
                return Err(WholeNeeded);
            }
            let new = list.map_or(&[][..], |list| &list.entries);
            let accepted = accepted.get(&id).copied();
            let one =
                One { stated, recorded: &recorded, from, new, sent: list.is_some(), accepted, older, cut, hash_size };
            match one.check(&mut digests) {
                Ok(aggregate) => out.lists.push(VerifiedList {
                    session: vm.session,
                    boot: stated.boot,
                    hash_size,
                    before: from,
                    new,
                    aggregate,
                }),
                Err(finding) => findings.push(finding),
            }
        }
        if !findings.is_empty() {
            out.findings.insert(vm.session, findings);
        }
    }
    Ok(out)
}

/// Boots that the log or an accepted statement speaks of, and that are not stated now.
fn missing_boots(vm: &VmState, recorded: &Boots, accepted: &HashMap<ListId, &AcceptedGuest>) -> Vec<Finding> {
    let stated = |boot: u32| vm.boots.iter().any(|b| b.boot == boot);
    let in_log = recorded.iter().filter(|(boot, _)| !stated(*boot)).filter_map(|(boot, facts)| {
        let last = facts.recorded.last().map(|(recnum, last)| (*recnum, last.first.saturating_add(last.count)));
        let (recnum, after) = last.or(facts.held)?;
        let finding = Finding::new(Code::GuestListCount, format!("boot {boot}, record {recnum}"));
        Some(finding.expected(format!("{after} entries")).actual("not in the statement"))
    });
    let mut findings: Vec<Finding> = in_log.collect();
    let mut gone: Vec<&&AcceptedGuest> =
        accepted.values().filter(|a| a.session == vm.session && a.count > 0 && !stated(a.boot)).collect();
    gone.sort_by_key(|a| a.boot);
    findings.extend(gone.into_iter().map(|a| {
        let finding = Finding::new(Code::GuestListRollback, format!("boot {}", a.boot));
        finding.expected(format!("at least {} entries", a.count)).actual("not in the statement")
    }));
    findings
}

/// What the entries of a dictionary extend an aggregate with, at hand where many are asked for.
struct Digests<'a> {
    dictionary: &'a Dictionary,
    read: HashMap<usize, Vec<Option<Sha256>>>,
}

impl Digests<'_> {
    /// For a list that goes on with so many references.
    fn of(&mut self, hash_size: usize, references: usize) -> Option<&[Option<Sha256>]> {
        if !self.read.contains_key(&hash_size) && references < self.dictionary.len() / 8 {
            return None;
        }
        let dictionary = self.dictionary;
        Some(self.read.entry(hash_size).or_insert_with(|| dictionary.iter().map(|one| one.digest(hash_size)).collect()))
    }
}

/// One list with everything that it is held against.
struct One<'a> {
    stated: &'a GuestBoot,
    recorded: &'a Boot,
    from: Option<&'a ListProgress>,
    new: &'a [u32],
    sent: bool,
    accepted: Option<&'a AcceptedGuest>,
    older: bool,
    /// Its records may be in a part of the log that was dropped.
    cut: bool,
    hash_size: usize,
}

impl One<'_> {
    fn check(&self, digests: &mut Digests<'_>) -> Result<Aggregate, Finding> {
        let boot = self.stated.boot;
        if !self.sent && self.stated.count > 0 {
            let finding = Finding::new(Code::GuestListMissing, format!("boot {boot}"));
            return Err(finding.expected(format!("{} entries", self.stated.count)));
        }
        let (running, aggregates) = self.replay(digests)?;
        let at = |count: u64| {
            let known = aggregates.binary_search_by_key(&count, |known| known.count).ok()?;
            Some(aggregates[known].value)
        };
        let end = self.check_records(&at, running.count)?;
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
        if let Some(before) = self.accepted.filter(|before| at(before.count) != Some(before.aggregate)) {
            let finding = Finding::new(Code::GuestListRollback, format!("boot {boot}"));
            return Err(finding.expected(format!("{} entries, {}", before.count, before.aggregate)));
        }
        Ok(running)
    }

    /// The aggregate at the list's end, and after each count of entries that something is said of.
    fn replay(&self, digests: &mut Digests<'_>) -> Result<(Aggregate, Vec<Aggregate>), Finding> {
        let boot = self.stated.boot;
        let mut wanted: Vec<u64> =
            self.recorded.recorded.iter().map(|(_, e)| e.first.saturating_add(e.count)).collect();
        wanted.extend(self.accepted.map(|accepted| accepted.count));
        wanted.sort_unstable();
        wanted.dedup();
        let mut running = self.from.map_or(Aggregate::EMPTY, |from| from.aggregate);
        let begin = running.count;
        let mut wanted = wanted.into_iter().skip_while(|&count| count < begin).peekable();
        let mut found = Vec::new();
        let mut note = |running: &Aggregate| {
            if wanted.next_if_eq(&running.count).is_some() {
                found.push(*running);
            }
        };
        note(&running);
        let (dictionary, hash_size) = (digests.dictionary, self.hash_size);
        let at_hand = digests.of(hash_size, self.new.len());
        for &reference in self.new {
            let digest = match at_hand {
                Some(read) => read.get(reference as usize).copied(),
                None => dictionary.get(reference).map(|entry| entry.digest(hash_size)),
            };
            let finding = || Finding::new(Code::GuestListReference, format!("boot {boot}, entry {}", running.count));
            match digest {
                None => return Err(finding().expected(format!("below {}", dictionary.len())).actual(reference)),
                Some(None) => return Err(finding().actual(format!("dictionary entry {reference} cannot be read"))),
                Some(Some(digest)) => running.push_digest(&digest),
            }
            note(&running);
        }
        Ok((running, found))
    }

    /// Holds the list against each record of it; gives the number of entries after the last.
    fn check_records(&self, at: &dyn Fn(u64) -> Option<Sha256>, len: u64) -> Result<u64, Finding> {
        let boot = self.stated.boot;
        let begin = if self.older || self.cut { None } else { Some(0) };
        let mut end: Option<u64> = self.recorded.held.map(|(_, after)| after).or(begin);
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
                    return Err(finding.expected(format!("{after} entries")).actual(len));
                }
                Some(value) if value != entries.aggregate => {
                    let finding = Finding::new(Code::GuestListAggregate, item());
                    return Err(finding.expected(entries.aggregate).actual(value));
                }
                Some(_) => end = Some(after),
            }
        }
        // Of a list whose records were all dropped only the statement tells.
        Ok(end.unwrap_or(if self.cut { self.stated.count } else { 0 }))
    }
}
