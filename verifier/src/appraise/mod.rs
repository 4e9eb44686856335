//! Appraisal: evidence, the host's accepted state, policy and time in; findings, verdict and new state out.
//!
//! Pure: no clock, no storage, no network. The steps come in the order of what may be believed. Each takes types that
//! only the step before can give, so that nothing is judged that was not shown to be the host's word:
//!
//! ```text
//! stream ─ parse ─► Received ─ signature ─► Quoted ─ nonce, binding ─► Stated      (1–3)
//!                                  ├─ counters against the accepted state          (4)
//!                                  └─ selection, digest ─► QuotedRegisters         (5)
//! firmware log ─ replay ─► Boot; host IMA list ─ replay ─► HostList                 (6, 7)
//! records ─ replay ─► VerifiedLog ─ fold ─► Sessions, expectation tree             (8)
//! programs of proxy and QEMU ↔ HostList                                            (7, 8)
//! guests' lists ─ replay ─► VerifiedList                                           (9)
//! statement ↔ sessions: inventory                                                  (10)
//! policy: host, then each VM                                                       (11)
//! ```
//!
//! The first failed step up to 5, and a log that is not the quoted one, end the appraisal: there is nothing left to
//! look at. Later steps collect everything that they find. State is renewed only when the evidence itself is whole.

mod changes;
pub mod counters;
pub mod epoch;
pub mod firmware;
pub mod freshness;
pub mod guests;
pub mod host_ima;
pub mod ima;
mod images;
pub mod inventory;
pub mod judge;
pub mod log;
pub mod programs;
pub mod registers;
pub mod sessions;
pub mod signature;
pub mod state;
mod verdict;

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
pub(crate) mod testing;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use onequote_evidence::{
    Malformed,
    id::{HostId, SessionId, TimeMs},
    statement::Statement,
    stream::{Evidence, ReadError, Reader},
    tpm::Public,
};

use crate::{
    finding::{Class, Code, Finding},
    policy::{HostRule, Policy},
    result::{Skipped, Verdict},
};
use firmware::Boot;
use freshness::{Freshness, Stated};
use guests::Dictionary;
use log::VerifiedLog;
use registers::QuotedRegisters;
use sessions::Sessions;
use signature::Quoted;
use state::{Accepted, AcceptedGuest, HostState};

/// A stream that has the right form. Nothing in it is believed yet.
#[derive(Debug, Clone)]
pub struct Received {
    evidence: Evidence,
}

/// What evidence is held against.
pub struct Context<'a> {
    /// The host that was asked; none takes the host that the evidence names.
    pub host: Option<&'a HostId>,
    /// The host's attestation key, known by enrolment.
    pub ak: &'a Public,
    /// Whether the operator enrolled the host with a software TPM.
    pub software_tpm: bool,
    /// What the evidence must answer.
    pub freshness: &'a Freshness,
    /// What was accepted of the host before.
    pub state: &'a HostState,
    /// The policy in force, with its version.
    pub policy: Option<(&'a Policy, u64)>,
    /// The time.
    pub now: TimeMs,
    /// How long a verdict holds, in milliseconds.
    pub lifetime: u64,
    /// Whether the facts are wanted too: they take as much memory as the evidence.
    pub facts: bool,
}

/// What comes out.
#[derive(Debug, Clone)]
pub struct Appraisal {
    /// The verdict.
    pub verdict: Verdict,
    /// The state to keep; none when the evidence was not whole, and the state before stays.
    pub state: Option<HostState>,
    /// What was shown to be measured, when that was wanted and the evidence was whole.
    pub facts: Option<Facts>,
}

/// What evidence shows, before any policy.
#[derive(Debug, Clone)]
pub struct Facts {
    /// The host's statement.
    pub statement: Statement,
    /// Registers of the SHA-256 bank.
    pub registers: QuotedRegisters,
    /// The log.
    pub log: VerifiedLog,
    /// What it says of VMs.
    pub sessions: Sessions,
    /// For each QEMU process the distinct entries of its guest's lists, as listed, with the size of the template
    /// hash.
    pub entries: BTreeMap<SessionId, Vec<(usize, Vec<u8>)>>,
    /// The host's own list, as listed, without a boot aggregate that was checked.
    pub host_entries: Vec<Vec<u8>>,
    /// The firmware's event log, and the registers that it explains; none when there is no log.
    pub firmware: Option<(Vec<u8>, BTreeSet<u8>)>,
}

impl Facts {
    /// The firmware's event log, as far as the quote proves it.
    #[must_use]
    pub fn boot(&self) -> Option<Boot<'_>> {
        let (bytes, explained) = self.firmware.as_ref()?;
        Boot::again(bytes, explained)
    }
}

impl Received {
    /// Reads a stream as it was sent or saved.
    ///
    /// # Errors
    /// The finding.
    pub fn read(compressed: &[u8]) -> Result<Self, Finding> {
        Self::read_from(compressed, None)
    }

    /// As [`Self::read`], of a stream whose logs may go on where those of `before` end.
    ///
    /// # Errors
    /// The finding.
    pub fn read_onto(compressed: &[u8], before: &Evidence) -> Result<Self, Finding> {
        Self::read_from(compressed, Some(before))
    }

    fn read_from(compressed: &[u8], before: Option<&Evidence>) -> Result<Self, Finding> {
        let evidence = Reader::open(compressed).and_then(|reader| Evidence::read(reader, before));
        let finding = |e: ReadError| Finding::new(Code::EvidenceMalformed, "evidence").actual(e);
        evidence.map(|evidence| Self { evidence }).map_err(finding)
    }

    /// Reads an expanded stream.
    ///
    /// # Errors
    /// The finding.
    pub fn parse(expanded: &[u8]) -> Result<Self, Finding> {
        Evidence::parse(expanded).map(|evidence| Self { evidence }).map_err(|e| malformed(&e))
    }

    /// What the stream holds, to be kept.
    #[must_use]
    pub fn into_evidence(self) -> Evidence {
        self.evidence
    }

    /// What the stream holds.
    #[must_use]
    pub fn evidence(&self) -> &Evidence {
        &self.evidence
    }
}

fn malformed(e: &Malformed) -> Finding {
    Finding::new(Code::EvidenceMalformed, "evidence").actual(e)
}

/// What steps 1 to 5 and 8 show; whatever comes after stands on it.
struct Proven {
    quoted: Quoted,
    stated: Stated,
    registers: QuotedRegisters,
    log: VerifiedLog,
    counters: Vec<Finding>,
}

/// Where that ended, with what was shown before.
struct Unproven {
    finding: Finding,
    quoted: Option<Quoted>,
    stated: Option<Stated>,
}

fn prove(
    evidence: &Evidence,
    context: &Context<'_>,
    rule: &HostRule,
    skipped: &mut Vec<Skipped>,
) -> Result<Proven, Box<Unproven>> {
    let fail = |finding, quoted: Option<&Quoted>, stated: Option<&Stated>| {
        Box::new(Unproven { finding, quoted: quoted.cloned(), stated: stated.cloned() })
    };
    signature::check_key(context.ak).map_err(|f| fail(f, None, None))?;
    let head = &evidence.head;
    let quoted = signature::check(context.ak, &head.attest.0, &head.signature.0).map_err(|f| fail(f, None, None))?;
    let stated = freshness::check(&quoted, head, context.freshness, context.now, skipped)
        .map_err(|f| fail(f, Some(&quoted), None))?;
    let with = |f| fail(f, Some(&quoted), Some(&stated));
    freshness::check_host(&stated, context.host).map_err(with)?;
    let accepted = context.state.accepted.as_ref();
    let clock = &quoted.attest().clock;
    let counters = accepted.map(|a| counters::check(clock, &a.clock)).unwrap_or_default();
    let expected = registers::expected(rule.pcr_vm, rule.pcr_guest);
    let registers = registers::check(&quoted, &head.registers, &expected).map_err(with)?;
    let statement = stated.statement();
    log::check_epoch(statement, clock, accepted).map_err(with)?;
    let log = log::check(&evidence.records, &registers, statement, clock, accepted, rule).map_err(with)?;
    Ok(Proven { quoted, stated, registers, log, counters })
}

/// Appraises evidence. The caller must trust everything in `context`, and nothing in `received`.
#[must_use]
pub fn appraise(received: &Received, context: &Context<'_>) -> Appraisal {
    let none = Policy::default();
    let policy = context.policy.map_or(&none, |(policy, _)| policy);
    let mut skipped = Vec::new();
    let evidence = &received.evidence;
    let proven = match prove(evidence, context, &policy.host, &mut skipped) {
        Ok(proven) => proven,
        Err(failed) => return verdict::failed(context, *failed, skipped),
    };
    let Proven { quoted, stated, registers, log, counters } = proven;
    let statement = stated.statement();
    let clock = quoted.attest().clock;
    let accepted = context.state.accepted.as_ref();
    let mut host = counters;
    let past = epoch::check(&log, statement.epoch, accepted);

    let (boot, found) = firmware::check(&evidence.firmware, &registers, log.start(), &policy.host, &mut skipped);
    host.extend(found);
    let host_rule = &policy.host.ima;
    let demanded = host_rule.judges_files() || host_rule.judges_buffers();
    let host_list = match host_ima::check(&evidence.host_ima, &registers, demanded, &mut skipped) {
        Ok(list) => list,
        Err(finding) => {
            host.push(finding);
            host_ima::HostList::default()
        }
    };
    let history = log::check_history(log.start(), &clock, accepted, &policy.host, boot.as_ref());
    let history_accepted = history.is_empty();
    host.extend(history);

    let names = statement.vms.iter().map(|vm| (vm.session, vm.name.clone())).collect();
    let mut sessions = sessions::fold(&log, context.state.base_for(statement.epoch), &names, policy);
    host.append(&mut sessions.findings);
    host.extend(programs::check(&host_list, &log, &mut sessions, &policy.host, &mut skipped));
    let mut notes = std::mem::take(&mut sessions.notes);
    host.extend(past.iter().filter_map(|gap| sessions::past_gap_finding(gap, policy, &mut notes)));
    let mut dictionary = Dictionary::new(&evidence.dictionary);
    let mut guests = guests::check(statement, &sessions, &evidence.guests, &mut dictionary, &context.state.guests);
    host.append(&mut guests.host_findings);
    let (present, inventory) = inventory::check(statement, &sessions, &policy.host, &mut notes);
    host.extend(inventory);

    let authentic = host.iter().all(|finding| finding.code.class() != Class::Evidence);
    if context.policy.is_none() {
        let id = &statement.host;
        host.push(Finding::new(Code::HostWithoutPolicy, id.as_str()));
    }
    match &policy.host.firmware {
        Some(rule) => host.extend(firmware::judge(rule, boot.as_ref(), &mut notes)),
        None if boot.is_some() => {
            skipped.push(Skipped::new("firmware-rules", "the policy has no rules about the boot ([host.firmware])"));
        }
        None => {}
    }
    host.extend(judge::host(&policy.host, &registers, context.software_tpm, &mut skipped));
    if demanded {
        let mut judge = ima::Judge::new(host_rule);
        host.extend(judge.list(host_list.to_judge()));
        skipped.extend(judge.unchecked().map(|what| Skipped::new("host-ima", what)));
    }
    if !host_rule.judges_files() && !host_list.entries.is_empty() {
        skipped.push(Skipped::new("host-ima", "the policy has no allow list for the host"));
    }
    let vms = verdict::vms(&present, &sessions.tree, policy, &mut dictionary, &guests, &mut skipped);

    let state = authentic.then(|| HostState {
        accepted: Some(Accepted {
            epoch: statement.epoch,
            records: statement.log_len,
            registers: log.registers().to_vec(),
            history_accepted,
            clock,
            boot_id: Some(epoch::last_boot(&log)),
            gaps: epoch::told(&log),
            past_gaps: past,
        }),
        base: context.state.base_for(statement.epoch),
        tree: sessions.tree.clone(),
        guests: accepted_guests(&guests, &context.state.guests, statement),
    });
    let verdict = verdict::whole(context, &quoted, statement, host, vms, skipped, notes);
    let facts = (authentic && context.facts).then(|| Facts {
        statement: statement.clone(),
        registers,
        entries: verdict::entries(&guests, &mut dictionary),
        firmware: boot.as_ref().map(|boot| (evidence.firmware.clone(), boot.explained().clone())),
        host_entries: host_list.to_judge().iter().map(|entry| entry.raw.to_vec()).collect(),
        log,
        sessions,
    });
    Appraisal { verdict, state, facts }
}

/// Lists that were true this time, and what was accepted of those that were not.
fn accepted_guests(guests: &guests::Guests<'_>, before: &[AcceptedGuest], statement: &Statement) -> Vec<AcceptedGuest> {
    let mut accepted: Vec<AcceptedGuest> = (guests.lists.iter())
        .map(|list| AcceptedGuest {
            session: list.session,
            boot: list.boot,
            count: list.entries.len() as u64,
            aggregate: list.aggregate,
        })
        .collect();
    for old in before.iter().filter(|old| statement.vms.iter().any(|vm| vm.session == old.session)) {
        if !accepted.iter().any(|new| new.session == old.session && new.boot == old.boot) {
            accepted.push(old.clone());
        }
    }
    accepted
}
