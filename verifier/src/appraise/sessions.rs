//! What the log says of each VM: its QEMU processes, what they started from, how they ended.
//!
//! Events are taken in order, onto the expectation tree as it was when the epoch began, or onto what the events before
//! them gave. What comes out are the sessions with everything that judging them needs, the tree as it is now, and
//! findings about history: those need no policy except for images, whose rule says whether digests or continuity count.

use std::{collections::BTreeMap, sync::Arc};

use onequote_evidence::{
    event::{
        Component, Event, EventBody, GapReason, GuestEntries, GuestHello, GuestOverflow, GuestRewind, HowRead, Image,
        LogGap, RefuseCause, VmCreate, VmDelete, VmRef, VmRefuse, VmStart,
    },
    id::{SessionId, VmId},
};

use super::{
    changes,
    epoch::PastGap,
    found::{Findings, Notes},
    images,
    log::VerifiedLog,
    state::{ImageStatus, KnownSession, Place, Tree, VmExpectation},
};
use crate::{
    finding::{Code, Finding},
    policy::{Policy, VmRule},
    result::MAX_FINDINGS,
};

/// One QEMU process that has not ended, as far as the log tells.
#[derive(Debug, Clone)]
pub struct Session {
    /// The VM.
    pub vm: VmId,
    /// Its name, as far as it is known.
    pub name: String,
    /// What it started from, measured before it ran or else when it was first seen.
    pub start: Option<Arc<VmStart>>,
    /// Whether that was measured before it ran.
    pub before: bool,
    /// Other ways to command its QEMU than the proxy's monitor, when it was first seen.
    pub monitors: Vec<String>,
    /// Why it was not let run.
    pub refused: Option<Box<VmRefuse>>,
    /// Whether it was there before this epoch's log.
    pub older: bool,
    /// Whether it may have begun in a part of the log that was dropped.
    pub cut: bool,
    /// How often in this epoch its guest can have begun a new boot: resets, and gaps that may hide one.
    pub reboots: u64,
    /// The record of the proxy's last start since which this VM was neither measured again nor ended.
    pub unseen_since: Option<u64>,
    /// Its guest's boots.
    pub boots: Boots,
    /// What the log itself shows to be wrong with it.
    pub findings: Findings,
}

/// Boots of a guest, in ascending order.
#[derive(Debug, Clone, Default)]
pub struct Boots(Vec<(u32, Boot)>);

/// One boot of a guest, as the log tells it.
#[derive(Debug, Clone, Default)]
pub struct Boot {
    /// Size of the template hash in its list, in bytes; none when no shim said hello in this epoch.
    pub hash_size: Option<u32>,
    /// The records of its entries that its list was not held against yet: number of the record, and the event.
    pub recorded: Vec<(u64, GuestEntries)>,
    /// The last record that its list was held against, and the number of entries after it.
    pub held: Option<(u64, u64)>,
}

impl Boots {
    /// One of them.
    #[must_use]
    pub fn get(&self, boot: u32) -> Option<&Boot> {
        self.0.binary_search_by_key(&boot, |(number, _)| *number).ok().map(|at| &self.0[at].1)
    }

    /// All, each with its number.
    pub fn iter(&self) -> impl Iterator<Item = &(u32, Boot)> {
        self.0.iter()
    }

    /// One of them, begun if it is not there.
    pub fn entry(&mut self, boot: u32) -> &mut Boot {
        let at = self.0.binary_search_by_key(&boot, |(number, _)| *number).unwrap_or_else(|at| {
            self.0.insert(at, (boot, Boot::default()));
            at
        });
        &mut self.0[at].1
    }
}

/// All that the log says, as far as it was taken in.
#[derive(Debug, Clone, Default)]
pub struct Sessions {
    /// QEMU processes that have not ended.
    pub by_id: BTreeMap<SessionId, Arc<Session>>,
    /// Those that have, with their VMs.
    pub ended: Arc<BTreeMap<SessionId, VmId>>,
    /// The expectations after the log.
    pub tree: Tree,
    /// Findings about the host.
    pub findings: Findings,
    /// For the operator.
    pub notes: Notes,
    /// Processes whose names the log did not tell: the name that the tree had, which counts unless a statement says
    /// another, and the name that was taken. Another statement may say otherwise.
    assumed: BTreeMap<SessionId, (String, String)>,
}

impl Sessions {
    /// Before the first record of an epoch's log. The caller must have kept `base` itself.
    #[must_use]
    pub fn begin(base: Tree) -> Self {
        Self { tree: base, ..Self::default() }
    }

    /// Whether what was taken in so far would be the same with these names of VMs.
    #[must_use]
    pub fn fit(&self, names: &BTreeMap<SessionId, &str>) -> bool {
        self.assumed.iter().all(|(session, (known, taken))| names.get(session).copied().unwrap_or(known) == taken)
    }

    /// The log's beginning was dropped: these VMs, which the host states, may have begun there. Before the first event is taken.
    pub fn cut(&mut self, vms: impl Iterator<Item = VmRef>, names: &BTreeMap<SessionId, &str>) {
        let policy = Policy::default();
        let mut fold = Fold { out: self, names, policy: &policy, epoch: 0 };
        for vm in vms {
            fold.open(vm);
            if let Some(session) = fold.out.by_id.get_mut(&vm.session) {
                Arc::make_mut(session).cut = true;
            }
        }
    }

    /// Takes in what the log goes on with. The caller must trust it. `names` are the VMs' names as the host states them
    /// now, and must [`Self::fit`].
    pub fn take(&mut self, log: &VerifiedLog, names: &BTreeMap<SessionId, &str>, policy: &Policy) {
        let mut fold = Fold { out: self, names, policy, epoch: log.start().epoch.number };
        for (recnum, event) in log.events() {
            fold.take(*recnum, event);
        }
        fold.keep_findings();
    }

    /// Whether a list was held against every record of a boot.
    #[must_use]
    pub fn is_held(&self, session: SessionId, boot: u32) -> bool {
        self.by_id.get(&session).and_then(|s| s.boots.get(boot)).is_none_or(|boot| boot.recorded.is_empty())
    }

    /// Notes that it was.
    pub fn hold(&mut self, session: SessionId, boot: u32) {
        let Some(session) = self.by_id.get_mut(&session) else { return };
        let boot = Arc::make_mut(session).boots.entry(boot);
        if let Some((recnum, last)) = boot.recorded.last() {
            boot.held = Some((*recnum, last.first.saturating_add(last.count)));
        }
        boot.recorded = Vec::new();
    }

    /// About how much memory it takes, in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        // A session's own, and what is usual for its start and images, in it and in the tree.
        self.by_id.len() * (size_of::<Session>() + 4096) + self.ended.len() * 48 + self.tree.vms.len() * 1024
    }
}

struct Fold<'a> {
    out: &'a mut Sessions,
    names: &'a BTreeMap<SessionId, &'a str>,
    policy: &'a Policy,
    /// The number of the log's epoch.
    epoch: u64,
}

impl Fold<'_> {
    fn take(&mut self, recnum: u64, event: &Event) {
        let Some(vm) = event.vm else { return self.take_host(recnum, event) };
        let by = Place { event: event.body.kind().to_owned(), time: event.time, epoch: self.epoch, record: recnum };
        if let EventBody::VmDelete(delete) = &event.body {
            return self.delete(vm, delete, &by);
        }
        let ended = self.open(vm);
        self.take_vm(recnum, vm, &event.body, &by);
        if ended {
            // What comes after the end changes what is expected of images, and nothing else.
            self.out.by_id.remove(&vm.session);
        }
    }

    fn take_vm(&mut self, recnum: u64, vm: VmRef, body: &EventBody, by: &Place) {
        if let EventBody::VmCreate(create) = body {
            return self.create(vm, create, by);
        }
        let policy = self.policy;
        let Some(session) = self.out.by_id.get_mut(&vm.session) else { return };
        if body.is_guest() {
            return guest_event(session, recnum, body);
        }
        let name = session.name.clone();
        let rule = policy.rule(&name, vm.vm).map(|(_, rule)| rule);
        match body {
            EventBody::VmStart(start) => self.start(vm, start, rule, by),
            EventBody::VmAttach(attach) => {
                let start = VmStart { components: attach.components.clone(), images: attach.images.clone() };
                self.attach(vm, start, attach.again, rule, by);
            }
            EventBody::VmStop(stop) => {
                let tree = self.out.tree.vm_mut(vm.vm);
                tree.session = None;
                images::stop(tree, vm.session, stop, by);
                let partly = stop.read.iter().filter(|read| read.how == HowRead::Changed);
                self.out.notes.extend(partly.map(|read| {
                    format!(
                        "record {recnum}: {name} left {} with a digest made by reading {} bytes that its QEMU said had \
                         changed; the next start reads all",
                        read.slot, read.bytes
                    )
                }));
                self.out.by_id.remove(&vm.session);
                Arc::make_mut(&mut self.out.ended).insert(vm.session, vm.vm);
            }
            EventBody::VmPause(_) | EventBody::VmResume(_) => {}
            body => {
                let session = Arc::make_mut(session);
                match body {
                    EventBody::VmRefuse(refuse) => session.refused = Some(Box::new(refuse.clone())),
                    EventBody::VmReset(_) => session.reboots += 1,
                    EventBody::LogGap(gap) => {
                        session.reboots += 1;
                        session.findings.extend(gap_finding(recnum, gap, policy, &mut self.out.notes));
                    }
                    EventBody::Unknown { kind, .. } => session.findings.push(unknown(recnum, kind)),
                    other => {
                        let tree = self.out.tree.vm_mut(vm.vm);
                        if !changes::take(session, tree, other, rule, by, &mut self.out.notes) {
                            // An event of the host cannot be about a VM.
                            session.findings.push(unknown(recnum, &format!("{} with a VM", other.kind())));
                        }
                    }
                }
            }
        }
    }

    fn create(&mut self, vm: VmRef, create: &VmCreate, by: &Place) {
        self.vm(vm.vm).name.clone_from(&create.name);
        let rule = self.policy.rule(&create.name, vm.vm).map(|(_, rule)| rule);
        self.out.assumed.remove(&vm.session);
        let Some(session) = self.out.by_id.get_mut(&vm.session) else { return };
        let session = Arc::make_mut(session);
        session.name.clone_from(&create.name);
        session.monitors.clone_from(&create.monitors);
        for monitor in &create.monitors {
            changes::monitor(session, monitor, rule, by, &mut self.out.notes);
        }
    }

    /// A deletion speaks of a VM that has stopped, maybe in an epoch before this one.
    fn delete(&mut self, vm: VmRef, delete: &VmDelete, by: &Place) {
        let runs = self.out.by_id.values().any(|session| session.vm == vm.vm);
        if runs {
            let finding = Finding::new(Code::VmNotInLog, format!("{} (record {})", delete.name, by.record));
            return self.out.findings.push(finding.expected("a VM that has stopped").actual("deleted while it ran"));
        }
        images::deleted(self.vm(vm.vm), &delete.images, by);
        self.out.notes.push(format!("record {}: {} was deleted", by.record, delete.name));
    }

    fn take_host(&mut self, recnum: u64, event: &Event) {
        match &event.body {
            EventBody::LogGap(gap) => {
                self.out.findings.extend(gap_finding(recnum, gap, self.policy, &mut self.out.notes));
            }
            EventBody::UnmanagedVm(other) => {
                let note = format!("record {recnum}: {} (pid {}) ran unmanaged", other.program, other.pid);
                self.out.notes.push(note);
            }
            EventBody::ProxyStart(start) if recnum > 0 => {
                for session in self.out.by_id.values_mut() {
                    Arc::make_mut(session).unseen_since = Some(recnum);
                }
                let note = format!("record {recnum}: the proxy (version {}) was started again", start.version);
                self.out.notes.push(note);
            }
            // The replay has held a segment against what was before it.
            EventBody::ProxyStart(_) | EventBody::LogSegment(_) => {}
            EventBody::Unknown { kind, .. } => self.out.findings.push(unknown(recnum, kind)),
            // An event of a VM without a VM cannot be judged.
            body => self.out.findings.push(unknown(recnum, &format!("{} without a VM", body.kind()))),
        }
    }

    /// Makes sure that the session is there, also one that has ended: tells whether it had.
    fn open(&mut self, vm: VmRef) -> bool {
        let tree = self.out.tree.vms.entry(vm.vm).or_default();
        let ended = self.out.ended.get(&vm.session).copied();
        if !self.out.by_id.contains_key(&vm.session) {
            let known = tree.session.as_ref().filter(|known| known.session == vm.session && ended.is_none());
            let stated = self.names.get(&vm.session).copied().filter(|_| ended.is_none());
            let name = stated.unwrap_or(&tree.name).to_owned();
            if ended.is_none() {
                self.out.assumed.insert(vm.session, (tree.name.clone(), name.clone()));
            }
            let session = Session {
                vm: ended.unwrap_or(vm.vm),
                name,
                before: known.is_some(),
                older: known.is_some(),
                cut: false,
                // Until this log says that it was looked at again.
                unseen_since: known.is_some().then_some(0),
                start: known.map(|known| known.start.clone()),
                monitors: Vec::new(),
                refused: None,
                reboots: 0,
                boots: Boots::default(),
                findings: known.map(|known| known.findings.clone()).unwrap_or_default().into(),
            };
            self.out.by_id.insert(vm.session, Arc::new(session));
        }
        if let Some(session) = self.out.by_id.get(&vm.session).filter(|session| session.vm != vm.vm) {
            let item = format!("session {}", vm.session);
            self.out.findings.push(Finding::new(Code::VmNotInLog, item).expected(session.vm).actual(vm.vm));
        }
        ended.is_some()
    }

    fn vm(&mut self, vm: VmId) -> &mut VmExpectation {
        self.out.tree.vm_mut(vm)
    }

    /// What was found of a process that lives on is found in the next epoch too, whose log begins without it.
    fn keep_findings(&mut self) {
        for (id, session) in &self.out.by_id {
            let found = session.findings.list();
            let found = &found[..found.len().min(MAX_FINDINGS)];
            let known = self.out.tree.vms.get(&session.vm).and_then(|vm| vm.session.as_ref());
            if known.is_some_and(|known| known.session == *id && known.findings != found)
                && let Some(known) = &mut self.out.tree.vm_mut(session.vm).session
            {
                known.findings = found.to_vec();
            }
        }
    }

    /// Images that nothing but continuity speaks for, and that this VM has for the first time: they are taken as they
    /// are, which the operator is told. If another VM had this name before, a changed image may have been given a new
    /// UUID to look like a first start: that is for the operator to decide.
    fn first_seen(&mut self, recnum: u64, vm: VmRef, images: &[Image], rule: Option<&VmRule>) -> Vec<Finding> {
        let tree = &self.out.tree;
        let known = tree.vms.get(&vm.vm);
        let name = known.map(|vm| vm.name.as_str()).unwrap_or_default();
        let namesake = (tree.vms.iter())
            .find(|(id, other)| **id != vm.vm && !name.is_empty() && other.name == name && !other.images.is_empty());
        let mut findings = Vec::new();
        for image in images {
            let listed = rule.and_then(|rule| rule.images.get(&image.slot));
            let alone = listed.is_some_and(|listed| listed.continuity && listed.digests.is_empty());
            let expectation = known.and_then(|vm| vm.images.get(&image.slot));
            let new = expectation.is_none_or(|e| e.now == ImageStatus::New && !e.accepted.contains(&image.digest));
            if !alone || !new {
                continue;
            }
            let item = format!("{} {}", image.slot, image.path);
            match namesake {
                Some((id, _)) => {
                    let finding = Finding::new(Code::ImageUnwatched, item).actual(image.digest);
                    findings.push(finding.expected(format!("unknown: VM {id} had the name {name} before")));
                }
                None => self.out.notes.push(format!(
                    "{name}: {item} was seen for the first time in record {recnum} and taken as it was: {}",
                    image.digest
                )),
            }
        }
        findings
    }

    /// Judges the images of a start and notes that they are in use.
    fn take_over(
        &mut self,
        vm: VmRef,
        images: &[Image],
        rule: Option<&VmRule>,
        by: &Place,
        seen: images::Seen,
    ) -> Vec<Finding> {
        let first = self.first_seen(by.record, vm, images, rule);
        let unknown: Vec<String> = first.iter().map(|finding| finding.item.clone()).collect();
        let tree = self.vm(vm.vm);
        let mut findings = images::start(tree, vm.session, images, rule, by, seen);
        images::still_new(tree, images, &unknown);
        findings.extend(first);
        findings
    }

    fn start(&mut self, vm: VmRef, start: &VmStart, rule: Option<&VmRule>, by: &Place) {
        let findings = self.take_over(vm, &start.images, rule, by, images::Seen::BeforeItRan);
        let start = Arc::new(start.clone());
        self.vm(vm.vm).session =
            Some(KnownSession { session: vm.session, start: start.clone(), record: by.record, findings: Vec::new() });
        if let Some(session) = self.out.by_id.get_mut(&vm.session) {
            let session = Arc::make_mut(session);
            session.unseen_since = None;
            session.findings.extend(findings);
            session.start = Some(start);
            session.before = true;
            session.refused = None;
        }
    }

    fn attach(&mut self, vm: VmRef, start: VmStart, again: bool, rule: Option<&VmRule>, by: &Place) {
        let Some(session) = self.out.by_id.get_mut(&vm.session) else { return };
        let session = Arc::make_mut(session);
        session.unseen_since = None;
        // What kept it from being measured is over. What the measurement showed is not.
        let passing = [RefuseCause::Unmeasurable, RefuseCause::Log, RefuseCause::Duplicate];
        session.refused.take_if(|refused| passing.contains(&refused.cause));
        if let Some(first) = session.start.clone().filter(|_| again || session.before) {
            let same = |a: &Image, b: &Image| (&a.slot, &a.path, a.read_only) == (&b.slot, &b.path, b.read_only);
            let exchanged = |image: &&Image| !first.images.iter().any(|before| same(before, image));
            let exchanged: Vec<Image> = start.images.iter().filter(exchanged).cloned().collect();
            session.findings.extend(changed(by.record, &first, &start));
            // It ran on while its log ended and another began: nobody watched it in between, whatever came before.
            session.before &= again || !session.older;
            images::forget(self.vm(vm.vm), &exchanged, "it was exchanged while nobody watched", by);
            return;
        }
        let findings = self.take_over(vm, &start.images, rule, by, images::Seen::WhileItRan);
        if let Some(session) = self.out.by_id.get_mut(&vm.session) {
            let session = Arc::make_mut(session);
            session.findings.extend(findings);
            session.start = Some(Arc::new(start));
        }
    }
}

fn guest_event(session: &mut Arc<Session>, recnum: u64, body: &EventBody) {
    match body {
        EventBody::GuestHello(GuestHello { boot, hash_size, .. }) => {
            Arc::make_mut(session).boots.entry(*boot).hash_size = Some(*hash_size);
        }
        EventBody::GuestEntries(entries) => {
            let boot = Arc::make_mut(session).boots.entry(entries.boot);
            boot.recorded.push((recnum, entries.clone()));
        }
        EventBody::GuestRewind(GuestRewind { boot, count, aggregate, claimed_count, claimed, .. }) => {
            let item = format!("boot {boot}, record {recnum}");
            let finding = Finding::new(Code::GuestRewind, item).expected(format!("{count} entries, {aggregate}"));
            Arc::make_mut(session).findings.push(finding.actual(format!("{claimed_count} entries, {claimed}")));
        }
        EventBody::GuestOverflow(GuestOverflow { boot, count, limit }) => {
            let item = format!("boot {boot}, record {recnum}");
            let finding = Finding::new(Code::GuestOverflow, item).expected(limit);
            Arc::make_mut(session).findings.push(finding.actual(format!("{count} entries taken")));
        }
        // It is stated how long it is silent.
        EventBody::GuestLost(_) => {}
        EventBody::Unknown { kind, .. } => Arc::make_mut(session).findings.push(unknown(recnum, kind)),
        other => {
            let finding = unknown(recnum, &format!("{} with a VM", other.kind()));
            Arc::make_mut(session).findings.push(finding);
        }
    }
}

fn gap_finding(recnum: u64, gap: &LogGap, policy: &Policy, notes: &mut Notes) -> Option<Finding> {
    judge_gap(gap.reason, format!("{} (record {recnum})", gap.reason), &gap.detail, policy, notes)
}

/// The same for a gap of this boot that this log does not tell.
pub fn past_gap_finding(gap: &PastGap, policy: &Policy, notes: &mut Notes) -> Option<Finding> {
    let item = format!("{} (epoch {}, record {})", gap.reason, gap.epoch, gap.record);
    judge_gap(gap.reason, item, &gap.detail, policy, notes)
}

fn judge_gap(reason: GapReason, item: String, detail: &str, policy: &Policy, notes: &mut Notes) -> Option<Finding> {
    if policy.host.accept_gaps.contains(&reason) {
        notes.push(format!("accepted gap: {item}: {detail}"));
        return None;
    }
    let code = match reason {
        GapReason::ForeignExtend => Code::ForeignExtend,
        GapReason::TpmReset => Code::TpmReset,
        GapReason::Kexec => Code::HostKexec,
        _ => Code::LogGap,
    };
    Some(Finding::new(code, item).actual(detail))
}

fn unknown(recnum: u64, kind: &str) -> Finding {
    Finding::new(Code::UnknownEvent, format!("{kind} (record {recnum})"))
}

/// What is other than it was when the same QEMU process was measured first. What is in an image that the VM writes may
/// be; that it is the same image, and that there is no other, not.
fn changed(recnum: u64, first: &VmStart, now: &VmStart) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut differ = |item: String, before: Option<String>, after: Option<String>| {
        if before != after {
            let show = |value: Option<String>| value.unwrap_or_else(|| "nothing".to_owned());
            let finding = Finding::new(Code::ComponentChanged, format!("{item} (record {recnum})"));
            findings.push(finding.expected(show(before)).actual(show(after)));
        }
    };
    let part = |c: &Component| (format!("{} {}", c.role, c.path), c.digest.to_string());
    let image = |i: &Image| {
        let as_it_must_stay = if i.read_only { i.digest.to_string() } else { format!("writable, {}", i.path) };
        (i.slot.clone(), as_it_must_stay)
    };
    let table = |start: &VmStart| -> BTreeMap<String, String> {
        start.components.iter().map(part).chain(start.images.iter().map(image)).collect()
    };
    let (before, after) = (table(first), table(now));
    for key in before.keys().chain(after.keys().filter(|key| !before.contains_key(*key))) {
        differ(key.trim_end().to_owned(), before.get(key).cloned(), after.get(key).cloned());
    }
    findings
}
