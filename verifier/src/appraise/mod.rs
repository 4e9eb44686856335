//! Appraisal: evidence, the host's accepted state, policy and time in; findings, verdict and new state out.
//!
//! Pure: no clock, no storage, no network. The steps come in the order of what may be believed. Each takes types that
//! only the step before can give, so that nothing is judged that was not shown to be the host's word:
//!
//! ```text
//! stream: head ─ signature ─► Quoted ─ nonce, binding ─► Stated = Begun            (1–3)
//!                                  ├─ counters against the accepted state          (4)
//!                                  └─ selection, digest ─► QuotedRegisters         (5)
//! stream: pieces ─► Logs
//! firmware log ─ replay ─► Outcome; host IMA list ─ replay ─► HostList              (6, 7)
//! records ─ replay ─► VerifiedLog ─ fold ─► Sessions, expectation tree             (8)
//! programs of proxy and QEMU ↔ HostList                                            (7, 8)
//! guests' lists ─ replay ─► VerifiedList                                           (9)
//! statement ↔ sessions: inventory                                                  (10)
//! policy: host, then each VM                                                       (11)
//! ```
//!
//! The first failed step up to 5, and a log that is not the quoted one, end the appraisal: there is nothing left to
//! look at. Later steps collect everything that they find. State is renewed only when the evidence itself is whole.
//!
//! **Each step is a fold.** A replay goes on from a value; sessions and findings are added to. So there is one way for logs
//! that come whole and for what they go on with: the same code from another start, the empty one or that of [`Kept`].
//! Whatever cannot be decided from there, since it hangs on what was not kept or was taken in under another assumption, ends
//! with [`WholeNeeded`] and no verdict: then the caller folds the whole from the empty start.

mod changes;
pub mod counters;
pub mod dictionary;
pub mod epoch;
pub mod firmware;
pub mod found;
pub mod freshness;
pub mod guests;
pub mod host_ima;
pub mod ima;
mod images;
pub mod inventory;
pub mod judge;
pub mod kept;
pub mod log;
pub mod logs;
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

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Read,
    sync::Arc,
};

use onequote_evidence::{
    digest::sha256,
    event::VmRef,
    id::{HostId, SessionId, TimeMs},
    statement::Statement,
    stream::{self, Evidence, Head, Reader},
    tpm::Public,
};

use crate::{
    finding::{Code, Finding},
    policy::{HostRule, Policy},
    result::{Skipped, Verdict},
};
use dictionary::Pool;
use firmware::{Boot, Outcome};
use found::Findings;
use freshness::{Freshness, Stated};
use host_ima::{HostList, HostProgress};
use ima::{Judge, Judgements, RuleId};
use kept::Kept;
use log::VerifiedLog;
use logs::Logs;
use registers::QuotedRegisters;
use sessions::Sessions;
use signature::Quoted;
use state::{Accepted, AcceptedGuest, HostState};

/// A stream that has the right form. Nothing in it is believed yet.
#[derive(Debug, Clone)]
pub struct Received {
    /// The quote and what it is about.
    pub head: Head,
    /// The logs.
    pub logs: Logs,
}

/// What appraisals of many hosts share: it makes them cheaper, and no verdict another.
#[derive(Debug, Default)]
pub struct Shared {
    /// Distinct entries of guests' lists.
    pub pool: Pool,
    /// What was judged of entries.
    pub judgements: Judgements,
}

/// What was kept does not suffice to go on: the logs are needed from their start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WholeNeeded;

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
    /// Whether the facts are wanted too: they take as much memory as the evidence, and need it whole.
    pub facts: bool,
    /// What is shared with other appraisals.
    pub shared: &'a Shared,
}

/// What comes out.
#[derive(Debug, Clone)]
pub struct Appraisal {
    /// The verdict.
    pub verdict: Verdict,
    /// The state to keep; none when the evidence was not whole, and the state before stays.
    pub state: Option<HostState>,
    /// Where every fold stands, for the next evidence to go on from, if there is a new state. None too where the next must
    /// come whole, since a guest's list was not as recorded.
    pub kept: Option<Kept>,
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
        Self::read_from(compressed)
    }

    /// The same, from whatever gives its bytes.
    ///
    /// # Errors
    /// The finding.
    pub fn read_from(source: impl Read) -> Result<Self, Finding> {
        let reader = Reader::open(source).map_err(|e| malformed(&e))?;
        let head = reader.head().clone();
        Ok(Self { head, logs: Logs::collect(reader).map_err(|e| malformed(&e))? })
    }

    /// Reads an expanded stream.
    ///
    /// # Errors
    /// The finding.
    pub fn parse(expanded: &[u8]) -> Result<Self, Finding> {
        Evidence::parse(expanded).map(Self::from).map_err(|e| malformed(&e))
    }

    /// What it holds, to be kept in memory. Its logs must be whole.
    #[must_use]
    pub fn into_evidence(self) -> Evidence {
        let Self { head, logs: Logs { firmware, host_ima, records, dictionary, guests } } = self;
        let (firmware, host_ima, records) = (firmware.items, host_ima.items, records.items);
        Evidence { head, firmware, host_ima, records, dictionary: dictionary.items, guests }
    }

    /// The stream of it, compressed.
    ///
    /// # Errors
    /// When zstd fails, which it does only for want of memory.
    pub fn to_stream(&self) -> std::io::Result<Vec<u8>> {
        let mut pieces = stream::Pieces::default();
        self.logs.push_all(&mut pieces);
        stream::compress(&pieces.stream(self.head.clone()))
    }
}

impl From<Evidence> for Received {
    fn from(evidence: Evidence) -> Self {
        Self { head: evidence.head.clone(), logs: evidence.into() }
    }
}

/// The finding that a stream has not the form of one.
pub fn malformed(e: &impl std::fmt::Display) -> Finding {
    Finding::new(Code::EvidenceMalformed, "evidence").actual(e)
}

/// What steps 1 to 3 show. Can be had only through [`begin`].
#[derive(Debug, Clone)]
pub struct Begun {
    quoted: Quoted,
    stated: Stated,
    head: Head,
    skipped: Vec<Skipped>,
}

/// Where appraisal ended, with what was shown before.
struct Unproven {
    finding: Finding,
    quoted: Option<Quoted>,
    stated: Option<Stated>,
}

/// Steps 1 to 3: whose word the quote is, and that it answers the challenge. The caller must trust everything in `context`,
/// and nothing in `head`.
///
/// # Errors
/// The appraisal, if it ends here.
pub fn begin(head: Head, context: &Context<'_>) -> Result<Begun, Box<Appraisal>> {
    let mut skipped = Vec::new();
    let fail = |finding, quoted: Option<&Quoted>, stated: Option<&Stated>, skipped: &mut Vec<Skipped>| {
        let unproven = Unproven { finding, quoted: quoted.cloned(), stated: stated.cloned() };
        Box::new(verdict::failed(context, unproven, std::mem::take(skipped)))
    };
    signature::check_key(context.ak).map_err(|f| fail(f, None, None, &mut skipped))?;
    let quoted = signature::check(context.ak, &head.attest.0, &head.signature.0);
    let quoted = quoted.map_err(|f| fail(f, None, None, &mut skipped))?;
    let stated = freshness::check(&quoted, &head, context.freshness, context.now, &mut skipped);
    let stated = stated.map_err(|f| fail(f, Some(&quoted), None, &mut skipped))?;
    freshness::check_host(&stated, context.host).map_err(|f| fail(f, Some(&quoted), Some(&stated), &mut skipped))?;
    Ok(Begun { quoted, stated, head, skipped })
}

/// What steps 4, 5 and the first half of 8 show; whatever comes after stands on it.
struct Proven {
    registers: QuotedRegisters,
    log: VerifiedLog,
    counters: Vec<Finding>,
}

fn prove(
    begun: &Begun,
    kept: Option<&Kept>,
    logs: &Logs,
    context: &Context<'_>,
    rule: &HostRule,
) -> Result<Proven, Finding> {
    let accepted = context.state.accepted.as_ref();
    let clock = &begun.quoted.attest().clock;
    let counters = accepted.map(|a| counters::check(clock, &a.clock)).unwrap_or_default();
    let expected = registers::expected(rule.pcr_vm, rule.pcr_guest);
    let registers = registers::check(&begun.quoted, &begun.head.registers, &expected)?;
    let statement = begun.stated.statement();
    log::check_epoch(statement, clock, accepted)?;
    let from = kept.map(|kept| &kept.log);
    let log = log::check(from, &logs.records, &registers, statement, clock, accepted, rule)?;
    Ok(Proven { registers, log, counters })
}

/// Appraises evidence whose logs are whole, but for a beginning of the measurement log that the host has dropped. The caller must trust everything in `context`, and nothing in `received`.
#[must_use]
pub fn appraise(received: &Received, context: &Context<'_>) -> Appraisal {
    match begin(received.head.clone(), context) {
        Ok(begun) => finish(begun, &received.logs, context),
        Err(failed) => *failed,
    }
}

/// The steps behind [`begin`], on logs that are whole. The caller must trust everything in `context`, and nothing in `logs`.
#[must_use]
pub fn finish(begun: Begun, logs: &Logs, context: &Context<'_>) -> Appraisal {
    let whole = if logs.begin() { run(&begun, None, logs, context) } else { Err(WholeNeeded) };
    whole.unwrap_or_else(|WholeNeeded| {
        let finding = malformed(&"a log does not begin at its start");
        let Begun { quoted, stated, skipped, .. } = begun;
        let unproven = Unproven { finding, quoted: Some(quoted), stated: Some(stated) };
        verdict::failed(context, unproven, skipped)
    })
}

/// The steps behind [`begin`], on what the logs go on with. The caller must trust everything in `context`, and nothing in
/// `logs`; it must have kept `kept` itself, together with the state in `context`.
///
/// # Errors
/// [`WholeNeeded`]: nothing is said of the evidence.
pub fn go_on(begun: &Begun, kept: &Kept, logs: &Logs, context: &Context<'_>) -> Result<Appraisal, WholeNeeded> {
    let accepted = context.state.accepted.as_ref().filter(|accepted| kept.log.is_of(accepted));
    let same_epoch = accepted.is_some_and(|accepted| accepted.epoch == begun.stated.statement().epoch);
    let same_policy = kept.policy == context.policy.map_or_else(|| Policy::default().id, |(policy, _)| policy.id);
    if context.facts || !same_epoch || !same_policy || !kept.is_followed_by(logs) {
        return Err(WholeNeeded);
    }
    run(begun, Some(kept), logs, context)
}

fn run(begun: &Begun, kept: Option<&Kept>, logs: &Logs, context: &Context<'_>) -> Result<Appraisal, WholeNeeded> {
    let none = Policy::default();
    let policy = context.policy.map_or(&none, |(policy, _)| policy);
    let mut skipped = begun.skipped.clone();
    let Proven { registers, log, counters } = match prove(begun, kept, logs, context, &policy.host) {
        Ok(proven) => proven,
        Err(finding) => {
            let (quoted, stated) = (Some(begun.quoted.clone()), Some(begun.stated.clone()));
            return Ok(verdict::failed(context, Unproven { finding, quoted, stated }, skipped));
        }
    };
    let statement = begun.stated.statement();
    let clock = begun.quoted.attest().clock;
    let accepted = context.state.accepted.as_ref();
    let mut host = Findings::from(counters);
    let past = epoch::check(&log, statement.epoch, accepted);
    let sessions = take_records(kept, &log, statement, context, policy)?;

    let outcome = boot(kept, logs, &registers, &log, &policy.host)?;
    skipped.extend(outcome.skipped.iter().filter(|skipped| skipped.check != firmware::RULES).cloned());
    host.extend(outcome.findings.iter().cloned());
    let host_rule = &policy.host.ima;
    let demanded = host_rule.judges_files() || host_rule.judges_buffers();
    let id = RuleId { policy: policy.id, rule: 0 };
    let judge = Judge::remembering(host_rule, id, &context.shared.judgements);
    let from = match kept {
        Some(kept) if !programs::known(&kept.host.programs, &log, &sessions) => return Err(WholeNeeded),
        Some(kept) => kept.host.clone(),
        None => HostProgress::begin(programs::wanted(&log, &sessions)),
    };
    let judging = demanded.then_some(&judge);
    let host_list = match host_ima::check(&from, &logs.host_ima, &registers, demanded, judging, &mut skipped) {
        Ok(list) => list,
        Err(finding) => {
            host.push(finding);
            HostList::nothing(&from)
        }
    };
    let history = log::check_history(log.start(), &clock, accepted, &policy.host, &outcome.history);
    let history_accepted = history.is_empty();
    host.extend(history);
    host.append(&sessions.findings);
    let unlisted = programs::check(&host_list, &log, &sessions, &policy.host, &judge, &mut skipped);
    host.extend(unlisted.host);
    let mut notes = sessions.notes.clone();
    host.extend(log::check_beginning(&log, &policy.host, &mut notes));
    host.extend(past.iter().filter_map(|gap| sessions::past_gap_finding(gap, policy, &mut notes)));
    let mut dictionary = kept.map(|kept| kept.dictionary.clone()).unwrap_or_default();
    dictionary.extend(&context.shared.pool, &logs.dictionary.items);
    let no_lists = BTreeMap::new();
    let lists = kept.map_or(&no_lists, |kept| &kept.lists);
    let mut guests = guests::check(statement, &sessions, lists, &logs.guests, &dictionary, &context.state.guests)?;
    host.extend(std::mem::take(&mut guests.host_findings));
    let (present, inventory) = inventory::check(statement, &sessions, &policy.host, &mut notes);
    host.extend(inventory);

    let authentic = host.is_authentic();
    if context.policy.is_none() {
        let id = &statement.host;
        host.push(Finding::new(Code::HostWithoutPolicy, id.as_str()));
    }
    host.extend(outcome.judged.iter().cloned());
    notes.extend(outcome.notes.iter().cloned());
    skipped.extend(outcome.skipped.iter().filter(|skipped| skipped.check == firmware::RULES).cloned());
    host.extend(judge::host(&policy.host, &registers, context.software_tpm, &mut skipped));
    if demanded {
        host.extend(host_list.findings());
        skipped.extend(host_list.unchecked().words().map(|what| Skipped::new("host-ima", what)));
    }
    if !host_rule.judges_files() && !host_list.is_empty() {
        skipped.push(Skipped::new("host-ima", "the policy has no allow list for the host"));
    }
    let shown = verdict::Shown {
        present: &present,
        tree: &sessions.tree,
        unlisted: &unlisted.sessions,
        guests: &guests,
        dictionary: &dictionary,
    };
    let (vms, lists) = shown.judge(context, policy, &mut skipped)?;

    let state = authentic.then(|| HostState {
        accepted: Some(Accepted {
            epoch: statement.epoch,
            records: statement.log_len,
            registers: log.registers(),
            statement: Some(sha256(&[&begun.head.statement.0])),
            history_accepted,
            clock,
            boot_id: Some(epoch::last_boot(&log)),
            gaps: log.gaps().to_vec(),
            past_gaps: past,
        }),
        base: context.state.base_for(statement.epoch),
        tree: sessions.tree.clone(),
        guests: accepted_guests(&guests, &context.state.guests, statement),
    });
    let verdict = verdict::whole(context, begun.quoted.attest(), statement, host, vms, skipped, notes);
    let facts = (authentic && context.facts).then(|| Facts {
        statement: statement.clone(),
        registers,
        entries: verdict::entries(&guests, &dictionary),
        firmware: outcome.readable.then(|| (logs.firmware.items.clone(), outcome.explained.clone())),
        host_entries: host_list.entries(&logs.host_ima.items),
        log: log.clone(),
        sessions: Sessions::clone(&sessions),
    });
    let kept = (authentic && guests.findings.is_empty()).then(|| Kept {
        statement: sha256(&[&begun.head.statement.0]),
        policy: policy.id,
        log: log.progress().clone(),
        firmware: outcome,
        host: host_list.progress().clone(),
        sessions: hold(&guests, sessions.clone()),
        dictionary: dictionary.clone(),
        lists,
    });
    Ok(Appraisal { verdict, state, kept, facts })
}

/// Second half of step 8: what the log says of VMs.
fn take_records(
    kept: Option<&Kept>,
    log: &VerifiedLog,
    statement: &Statement,
    context: &Context<'_>,
    policy: &Policy,
) -> Result<Arc<Sessions>, WholeNeeded> {
    let names = statement.vms.iter().map(|vm| (vm.session, vm.name.as_str())).collect();
    let mut sessions = match kept {
        Some(kept) if !kept.sessions.fit(&names) => return Err(WholeNeeded),
        Some(kept) => kept.sessions.clone(),
        None => Arc::new(Sessions::begin(context.state.base_for(statement.epoch))),
    };
    if kept.is_none() && log.first() > 0 {
        // What they began with may be in what was dropped.
        Arc::make_mut(&mut sessions)
            .cut(statement.vms.iter().map(|vm| VmRef { vm: vm.vm, session: vm.session }), &names);
    }
    if !log.events().is_empty() {
        Arc::make_mut(&mut sessions).take(log, &names, policy);
    }
    Ok(sessions)
}

/// Step 6, and the rules about it: as it was, if nothing that it hangs on is another.
fn boot(
    kept: Option<&Kept>,
    logs: &Logs,
    registers: &QuotedRegisters,
    log: &VerifiedLog,
    rule: &HostRule,
) -> Result<Arc<Outcome>, WholeNeeded> {
    match kept {
        None => Ok(Arc::new(Outcome::of(&logs.firmware.items, registers, log.start(), rule))),
        Some(kept) if logs.firmware.items.is_empty() && kept.firmware.holds_for(registers, log.start()) => {
            Ok(kept.firmware.clone())
        }
        Some(_) => Err(WholeNeeded),
    }
}

/// Notes that every list was held against its records.
fn hold(guests: &guests::Guests<'_>, mut sessions: Arc<Sessions>) -> Arc<Sessions> {
    for list in &guests.lists {
        if sessions.is_held(list.session, list.boot) {
            continue;
        }
        Arc::make_mut(&mut sessions).hold(list.session, list.boot);
    }
    sessions
}

/// Lists that were true this time, and what was accepted of those that were not.
fn accepted_guests(guests: &guests::Guests<'_>, before: &[AcceptedGuest], statement: &Statement) -> Vec<AcceptedGuest> {
    let mut accepted: Vec<AcceptedGuest> = (guests.lists.iter())
        .map(|list| AcceptedGuest {
            session: list.session,
            boot: list.boot,
            count: list.aggregate.count,
            aggregate: list.aggregate.value,
        })
        .collect();
    let now: BTreeSet<(SessionId, u32)> = accepted.iter().map(|new| (new.session, new.boot)).collect();
    let there: BTreeSet<SessionId> = statement.vms.iter().map(|vm| vm.session).collect();
    let still = |old: &&AcceptedGuest| there.contains(&old.session) && !now.contains(&(old.session, old.boot));
    accepted.extend(before.iter().filter(still).cloned());
    accepted
}
