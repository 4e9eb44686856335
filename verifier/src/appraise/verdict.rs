//! Putting a verdict together from what the steps found.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use onequote_evidence::{
    event::VmRef,
    id::{HostId, SessionId, TimeMs, VmId},
    statement::Statement,
    tpm::Attest,
};

use super::{
    Appraisal, Context, Unproven, WholeNeeded,
    dictionary::Dictionary,
    found::{Findings, Notes},
    guests::{Guests, ListId, ListProgress, VerifiedList},
    ima::{Judge, Opinion, RuleId, Unchecked},
    inventory::Present,
    judge,
    state::Tree,
};
use crate::{
    finding::{Code, Finding},
    policy::Policy,
    result::{HostVerdict, ImageLine, LIMITS, QuoteInfo, Skipped, State, Verdict, VmVerdict, Way},
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
    let quote = quoted.zip(stated).map(|(quoted, stated)| quote_info(quoted.attest(), stated.statement()));
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
        way: Way::Asked,
        time: context.now,
        expires: expiry(context),
        limits: LIMITS.to_owned(),
    };
    Appraisal { verdict, state: None, kept: None, facts: None }
}

/// The verdict on evidence that could be appraised to the end.
pub(super) fn whole(
    context: &Context<'_>,
    attest: &Attest,
    statement: &Statement,
    findings: Findings,
    mut vms: Vec<VmVerdict>,
    skipped: Vec<Skipped>,
    mut notes: Notes,
) -> Verdict {
    let state = findings.state();
    for vm in &mut vms {
        vm.state = vm.state.max(state);
    }
    if !attest.clock.safe {
        notes.push("the TPM's clock may have been set back at its last reset".to_owned());
    }
    let (now, before) = (&attest.clock, context.state.accepted.as_ref());
    if let Some(before) = before.filter(|before| before.epoch == statement.epoch).map(|before| &before.clock)
        && before.reset_count == now.reset_count
        && before.restart_count != now.restart_count
    {
        let (before, now) = (before.restart_count, now.restart_count);
        notes.push(format!(
            "the host was suspended and woke up: TPM restarts {before} to {now}, and its registers went on"
        ));
    }
    let (findings, findings_omitted) = findings.finish();
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
        quote: Some(quote_info(attest, statement)),
        skipped,
        notes: notes.finish(),
        way: Way::Asked,
        time: context.now,
        expires: expiry(context),
        limits: LIMITS.to_owned(),
    }
}

/// What VMs are judged by: everything that was shown of them.
pub(super) struct Shown<'a> {
    pub(super) present: &'a [Present<'a>],
    pub(super) tree: &'a Tree,
    /// Programs that the host's list does not have.
    pub(super) unlisted: &'a BTreeMap<SessionId, Vec<Finding>>,
    pub(super) guests: &'a Guests<'a>,
    pub(super) dictionary: &'a Dictionary,
}

impl Shown<'_> {
    /// Judges every VM that is there, and says how far their lists were taken in.
    pub(super) fn judge(
        &self,
        context: &Context<'_>,
        policy: &Policy,
        skipped: &mut Vec<Skipped>,
    ) -> Result<(Vec<VmVerdict>, BTreeMap<ListId, ListProgress>), WholeNeeded> {
        let mut lists: HashMap<SessionId, Vec<&VerifiedList<'_>>> = HashMap::new();
        for list in &self.guests.lists {
            lists.entry(list.session).or_default().push(list);
        }
        let mut unchecked: BTreeMap<usize, Unchecked> = BTreeMap::new();
        let mut seen = Seen::default();
        let mut progress = BTreeMap::new();
        let mut out = Vec::with_capacity(self.present.len());
        for one in self.present {
            let rule = policy.rule(&one.name, one.vm.vm);
            let mut findings = one.session.map(|s| s.findings.clone()).unwrap_or_default();
            findings.extend(self.unlisted.get(&one.vm.session).into_iter().flatten().cloned());
            findings.extend(self.guests.findings.get(&one.vm.session).into_iter().flatten().cloned());
            findings.extend(boots_without_reset(one));
            findings.extend(judge::vm(one, rule.map(|(_, rule)| rule)));
            let judge = rule.map(|(index, rule)| {
                let id = RuleId { policy: policy.id, rule: index as u32 + 1 };
                (index, Judge::remembering(&rule.ima, id, &context.shared.judgements))
            });
            let mut told = HashSet::new();
            for list in lists.get(&one.vm.session).map(Vec::as_slice).unwrap_or_default() {
                let judged = self.judge_list(list, judge.as_ref(), &mut seen)?;
                if let Some((index, judge)) = &judge {
                    unchecked.entry(*index).or_default().add(judged.unchecked);
                    let new = judged.bad.iter().filter(|reference| told.insert((list.hash_size, **reference)));
                    findings.extend(new.filter_map(|&reference| {
                        opinion(judge, self.dictionary, list.hash_size, reference)?.finding.clone()
                    }));
                }
                progress.insert((list.session, list.boot), judged);
            }
            if let Some((_, rule)) = rule
                && !rule.ima.judges_files()
            {
                let reason = format!("{}: its rule has no allow list", one.name);
                skipped.push(Skipped::new("guest-ima", reason));
            }
            let mut vm = row(&one.name, one.vm, findings.state());
            if let Some(stated) = one.stated {
                vm.run_state.clone_from(&stated.run_state);
                vm.boots = stated.boots.len() as u64;
                vm.entries = stated.boots.iter().map(|boot| boot.count).sum();
                vm.last_contact = stated.last_contact;
            }
            if vm.state == State::Trusted && one.stated.is_none() {
                vm.state = State::Untrusted;
            }
            (vm.findings, vm.findings_omitted) = findings.finish();
            vm.images = images(self.tree, one.vm);
            out.push(vm);
        }
        for (index, unchecked) in unchecked {
            let words = unchecked.words();
            skipped.extend(words.map(|what| Skipped::new("guest-ima", format!("rule {}: {what}", index + 1))));
        }
        Ok((out, progress))
    }

    /// Judges what is new of a list.
    fn judge_list(
        &self,
        list: &VerifiedList<'_>,
        judge: Option<&(usize, Judge<'_>)>,
        seen: &mut Seen,
    ) -> Result<ListProgress, WholeNeeded> {
        let rule = judge.map(|(index, _)| *index as u32);
        let before = list.before;
        if before.is_some_and(|before| before.rule != rule) {
            return Err(WholeNeeded);
        }
        let (mut bad, mut unchecked) = before.map(|before| (before.bad.clone(), before.unchecked)).unwrap_or_default();
        if let Some((index, judge)) = judge.filter(|_| !list.new.is_empty()) {
            let mut known: Option<BTreeSet<u32>> = None;
            let seen = seen.of(*index, list.hash_size, self.dictionary.len());
            for &reference in list.new {
                let Some(one) = seen.get_mut(reference as usize) else { continue };
                if *one == Look::Fine {
                    continue;
                }
                let Some(opinion) = opinion(judge, self.dictionary, list.hash_size, reference) else {
                    *one = Look::Fine;
                    continue;
                };
                unchecked.add(opinion.unchecked);
                let known = known.get_or_insert_with(|| bad.iter().copied().collect());
                if opinion.finding.is_some() && known.insert(reference) {
                    bad.push(reference);
                }
            }
        }
        Ok(ListProgress { hash_size: list.hash_size, aggregate: list.aggregate, rule, bad, unchecked })
    }
}

/// What a rule says of an entry of the dictionary; none where it is as it should be.
fn opinion(
    judge: &Judge<'_>,
    dictionary: &Dictionary,
    hash_size: usize,
    reference: u32,
) -> Option<std::sync::Arc<Opinion>> {
    let distinct = dictionary.get(reference)?;
    judge.judge(&distinct.entry(hash_size)?, || *distinct.id())
}

/// Entries of the dictionary that were looked at in this round, by rule and size of the template hash.
#[derive(Default)]
struct Seen(HashMap<(usize, usize), Vec<Look>>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    /// Not yet, or it is not as it should be.
    Needed,
    Fine,
}

impl Seen {
    fn of(&mut self, rule: usize, hash_size: usize, len: usize) -> &mut Vec<Look> {
        self.0.entry((rule, hash_size)).or_insert_with(|| vec![Look::Needed; len])
    }
}

/// The images of a QEMU process' start.
fn images(tree: &Tree, vm: VmRef) -> Vec<ImageLine> {
    let known = tree.vms.get(&vm.vm).into_iter().flat_map(|vm| &vm.images);
    let mine = known.filter_map(|(slot, image)| {
        let started = image.started.clone().filter(|started| started.session == vm.session)?;
        Some(ImageLine { slot: slot.clone(), started })
    });
    mine.collect()
}

/// A guest begins a new list only after its VM was reset. Only sessions that are whole in this log can be counted.
fn boots_without_reset(one: &Present<'_>) -> Option<Finding> {
    let session = one.session.filter(|s| !s.older && !s.cut && s.before)?;
    let boots = one.stated?.boots.len() as u64;
    (boots > session.reboots + 1).then(|| {
        let finding = Finding::new(Code::GuestRewind, format!("{boots} lists"));
        finding.expected(format!("at most {}: the VM was reset {} times", session.reboots + 1, session.reboots))
    })
}

/// For each QEMU process the distinct entries of its guest's lists, which were given whole.
pub(super) fn entries(guests: &Guests<'_>, dictionary: &Dictionary) -> BTreeMap<SessionId, Vec<(usize, Vec<u8>)>> {
    let mut out: BTreeMap<SessionId, Vec<(usize, Vec<u8>)>> = BTreeMap::new();
    for list in &guests.lists {
        let mut seen = HashSet::new();
        let new = list.new.iter().filter(|index| seen.insert(**index));
        let raw = new.filter_map(|&index| Some(dictionary.get(index)?.entry(list.hash_size)?.raw.to_vec()));
        out.entry(list.session).or_default().extend(raw.map(|raw| (list.hash_size, raw)));
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

fn quote_info(attest: &Attest, statement: &Statement) -> QuoteInfo {
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
