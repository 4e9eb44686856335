//! Putting a verdict together from what the steps found.

use std::collections::{BTreeMap, HashSet};

use onequote_evidence::{
    event::VmRef,
    id::{HostId, SessionId, TimeMs, VmId},
    statement::Statement,
};

use super::{
    Appraisal, Context, Unproven,
    guests::{Dictionary, Guests},
    ima::Judge,
    inventory::Present,
    judge,
    signature::Quoted,
    state::{ImageExpectation, Tree},
};
use crate::{
    finding::{Code, Finding},
    policy::Policy,
    result::{HostVerdict, ImageLine, LIMITS, MAX_FINDINGS, MAX_NOTES, QuoteInfo, Skipped, State, Verdict, VmVerdict},
};

/// The verdict on evidence of which nothing can be believed. VMs that were known stay named, and untrusted.
pub(super) fn failed(
    context: &Context<'_>,
    Unproven { finding, quoted, stated }: Unproven,
    skipped: Vec<Skipped>,
) -> Appraisal {
    let fallback = || "unknown".parse::<HostId>().ok();
    let id = context.host.cloned().or_else(|| stated.as_ref().map(|s| s.statement().host.clone())).or_else(fallback);
    let mut vms = Vec::new();
    for (id, vm) in &context.state.tree.vms {
        if let Some(session) = &vm.session {
            vms.push(row(&vm.name, VmRef { vm: *id, session: session.session }, State::Untrusted));
        }
    }
    let quote = quoted.zip(stated).map(|(quoted, stated)| quote_info(&quoted, stated.statement()));
    let state = State::of(std::slice::from_ref(&finding));
    let host = HostVerdict {
        // "unknown" is a host id.
        #[allow(clippy::expect_used)]
        id: id.expect("the fallback is a host id"),
        state,
        software_tpm: context.software_tpm,
        policy: context.policy.map(|(_, version)| version),
        findings: vec![finding],
        findings_omitted: 0,
    };
    let verdict = Verdict {
        host,
        vms,
        quote,
        skipped,
        notes: Vec::new(),
        time: context.now,
        expires: expiry(context),
        limits: LIMITS.to_owned(),
    };
    Appraisal { verdict, state: None, facts: None }
}

/// The verdict on evidence that could be appraised to the end.
pub(super) fn whole(
    context: &Context<'_>,
    quoted: &Quoted,
    statement: &Statement,
    findings: Vec<Finding>,
    mut vms: Vec<VmVerdict>,
    skipped: Vec<Skipped>,
    mut notes: Vec<String>,
) -> Verdict {
    let state = State::of(&findings);
    for vm in &mut vms {
        vm.state = vm.state.max(state);
    }
    if !quoted.attest().clock.safe {
        notes.push("the TPM's clock may have been set back at its last reset".to_owned());
    }
    let surplus = notes.len().saturating_sub(MAX_NOTES);
    if surplus > 0 {
        notes.drain(..=surplus);
        notes.insert(0, format!("{} older notes were left out", surplus + 1));
    }
    let (findings, findings_omitted) = cut(findings);
    Verdict {
        host: HostVerdict {
            id: statement.host.clone(),
            state,
            software_tpm: context.software_tpm,
            policy: context.policy.map(|(_, version)| version),
            findings,
            findings_omitted,
        },
        vms,
        quote: Some(quote_info(quoted, statement)),
        skipped,
        notes,
        time: context.now,
        expires: expiry(context),
        limits: LIMITS.to_owned(),
    }
}

/// Judges every VM that is there.
pub(super) fn vms(
    present: &[Present<'_>],
    tree: &Tree,
    policy: &Policy,
    dictionary: &mut Dictionary<'_>,
    guests: &Guests<'_>,
    skipped: &mut Vec<Skipped>,
) -> Vec<VmVerdict> {
    let mut judges: BTreeMap<usize, Judge<'_>> = BTreeMap::new();
    let mut out = Vec::with_capacity(present.len());
    for one in present {
        let rule = policy.rule(&one.name, one.vm.vm);
        let mut findings = one.session.map(|s| s.findings.clone()).unwrap_or_default();
        findings.extend(guests.findings.get(&one.vm.session).cloned().unwrap_or_default());
        findings.extend(boots_without_reset(one));
        findings.extend(judge::vm(one, rule.map(|(_, rule)| rule)));
        if let Some((index, rule)) = rule {
            let judge = judges.entry(index).or_insert_with(|| Judge::new(&rule.ima));
            let mut seen = HashSet::new();
            for list in guests.lists.iter().filter(|list| list.session == one.vm.session) {
                let entries = dictionary.entries(list.hash_size);
                for &index in list.entries {
                    let entry = entries.get(index as usize).and_then(Option::as_ref);
                    if let Some(entry) = entry.filter(|_| seen.insert((list.hash_size, index))) {
                        findings.extend(judge.shared(list.hash_size, index, &entry.entry).cloned());
                    }
                }
            }
            if !rule.ima.judges_files() {
                let reason = format!("{}: its rule has no allow list", one.name);
                skipped.push(Skipped::new("guest-ima", reason));
            }
        }
        let mut vm = row(&one.name, one.vm, State::of(&findings));
        if let Some(stated) = one.stated {
            vm.run_state.clone_from(&stated.run_state);
            vm.boots = stated.boots.len() as u64;
            vm.entries = stated.boots.iter().map(|boot| boot.count).sum();
            vm.last_contact = stated.last_contact;
        }
        if vm.state == State::Trusted && one.stated.is_none() {
            vm.state = State::Untrusted;
        }
        (vm.findings, vm.findings_omitted) = cut(findings);
        vm.images = images(tree, one.vm);
        out.push(vm);
    }
    for (index, judge) in judges {
        skipped.extend(judge.unchecked().map(|what| Skipped::new("guest-ima", format!("rule {}: {what}", index + 1))));
    }
    out
}

/// The images of a QEMU process' start.
fn images(tree: &Tree, vm: VmRef) -> Vec<ImageLine> {
    let known = tree.vms.get(&vm.vm).into_iter().flat_map(|vm| &vm.images);
    let line = |(slot, image): (&String, &ImageExpectation)| {
        let started = image.started.clone().filter(|started| started.session == vm.session)?;
        Some(ImageLine { slot: slot.clone(), started })
    };
    known.filter_map(line).collect()
}

/// A guest begins a new list only after its VM was reset. Only sessions that are whole in this log can be counted.
fn boots_without_reset(one: &Present<'_>) -> Option<Finding> {
    let session = one.session.filter(|s| !s.older && s.before)?;
    let boots = one.stated?.boots.len() as u64;
    (boots > session.reboots + 1).then(|| {
        let finding = Finding::new(Code::GuestRewind, format!("{boots} lists"));
        finding.expected(format!("at most {}: the VM was reset {} times", session.reboots + 1, session.reboots))
    })
}

/// For each QEMU process the distinct entries of its guest's lists.
pub(super) fn entries(
    guests: &Guests<'_>,
    dictionary: &mut Dictionary<'_>,
) -> BTreeMap<SessionId, Vec<(usize, Vec<u8>)>> {
    let mut out: BTreeMap<SessionId, Vec<(usize, Vec<u8>)>> = BTreeMap::new();
    for list in &guests.lists {
        let read = dictionary.entries(list.hash_size);
        let mut seen = HashSet::new();
        let new = list.entries.iter().filter(|index| seen.insert(**index));
        let raw = new.filter_map(|&index| read.get(index as usize)?.as_ref());
        let raw = raw.map(|entry| (list.hash_size, entry.entry.raw.to_vec()));
        out.entry(list.session).or_default().extend(raw);
    }
    out
}

fn row(name: &str, vm: VmRef, state: State) -> VmVerdict {
    VmVerdict {
        name: if name.is_empty() { short(vm.vm) } else { name.to_owned() },
        uuid: vm.vm,
        session: vm.session,
        state,
        run_state: String::new(),
        boots: 0,
        entries: 0,
        last_contact: None,
        images: Vec::new(),
        findings: Vec::new(),
        findings_omitted: 0,
    }
}

fn short(vm: VmId) -> String {
    vm.to_string().chars().take(8).collect()
}

/// Keeps at most [`MAX_FINDINGS`], the worst kinds first.
fn cut(mut findings: Vec<Finding>) -> (Vec<Finding>, u64) {
    findings.sort_by_key(|finding| finding.code);
    let omitted = findings.len().saturating_sub(MAX_FINDINGS);
    findings.truncate(MAX_FINDINGS);
    (findings, omitted as u64)
}

fn quote_info(quoted: &Quoted, statement: &Statement) -> QuoteInfo {
    let attest = quoted.attest();
    QuoteInfo {
        clock: attest.clock,
        firmware_version: attest.firmware_version,
        epoch: statement.epoch,
        records: statement.log_len,
        collected: statement.time,
    }
}

fn expiry(context: &Context<'_>) -> TimeMs {
    TimeMs(context.now.0.saturating_add(context.lifetime))
}
