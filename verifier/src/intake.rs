//! The one way in for evidence, whether the host was asked or reports by itself.
//!
//! [`Verifier::expect`] says what a host has to answer and what need not be sent again; [`Verifier::take`] takes the answer:
//! signature, nonce and binding are checked behind the first two items of the stream, before more is read. What the logs go
//! on with is folded onto what is kept at hand of the host ([`Kept`]); where that is not there, or does not suffice, the
//! parts that the store has are put before it, and all of it is folded from the start. Verdict, state, the evidence and the
//! next challenge are written in one transaction that also marks the challenge as answered. Only what was written is kept at
//! hand: a round that fails leaves everything as it was.
//!
//! Whoever was appraised against a state that another verifier has renewed meanwhile has to answer a new challenge: its
//! evidence may be older than that state.

use std::{
    collections::HashMap,
    io::{Cursor, Read},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use onequote_evidence::{
    id::{HostId, Sha256, TimeMs},
    stream::{Have, Head, Reader},
    tpm::Public,
};
use tokio::sync::Semaphore;

use crate::{
    appraise::{
        self, Appraisal, Begun, Context, Facts, Received, Shared, WholeNeeded, freshness::Freshness, kept::Kept,
        logs::Logs, state::HostState,
    },
    challenge::{self, Challenge},
    enrol::serial,
    finding::{Code, Finding},
    policy::Policy,
    report::Appraiser,
    result::{Verdict, Way},
    round::{Fault, Verifier, millis},
    store::{
        Enrolment, NonceUse, Part, PolicyInForce, StoreError, Take,
        enrol::{EnrolStore, Joined, Standing},
    },
};

mod cache;

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;

pub use cache::Cache;

/// Parts of evidence that are kept before they are put together.
const MAX_PARTS: usize = 256;

/// What a host has to answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// The challenge.
    pub challenge: Challenge,
    /// What need not be sent again.
    pub have: Have,
}

/// What a host answers.
pub struct Answer<R> {
    /// What it was asked.
    pub challenge: Challenge,
    /// The exporter value of the connection that it answers over.
    pub binding: Vec<u8>,
    /// The certificate that it showed there, DER, if it is one that our authority must have issued.
    pub certificate: Option<Vec<u8>>,
    /// The stream.
    pub evidence: R,
}

/// What else is wanted of an answer.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wanted {
    /// The next challenge, which the host is to answer by itself, and for how long it may.
    pub next: Option<Duration>,
    /// What was shown to be measured. The answer must be whole.
    pub facts: bool,
    /// The whole evidence.
    pub evidence: bool,
    /// How the answer came.
    pub way: Way,
}

/// What came of an answer.
#[derive(Debug)]
pub enum Outcome {
    /// It was taken, for good or bad.
    Taken(Box<Taken>),
    /// It says nothing: something was changed meanwhile, or what it goes on from is not there any more. The host has to
    /// answer this.
    Again(Box<Expected>),
}

/// An answer that was taken.
#[derive(Debug)]
pub struct Taken {
    /// The verdict, as it was written down.
    pub verdict: Verdict,
    /// Whether the evidence was accepted: it is the host's, fresh and whole, whatever it shows.
    pub accepted: bool,
    /// What the host has to answer next, if that was wanted.
    pub next: Option<Expected>,
    /// What was shown to be measured, if that was wanted and the evidence was accepted.
    pub facts: Option<Facts>,
    /// The evidence with every log from its start, if that was wanted and it could be read.
    pub whole: Option<Received>,
}

/// A host at hand: what the store has of it, and where the folds over its evidence stand.
#[derive(Debug, Clone)]
pub(crate) struct Known {
    pub(crate) enrolment: Enrolment,
    pub(crate) policy: Option<PolicyInForce>,
    pub(crate) state: HostState,
    pub(crate) version: u64,
    pub(crate) challenge: Option<Challenge>,
    pub(crate) standing: Standing,
    pub(crate) joined: Joined,
    /// None where the next evidence has to be folded from the start.
    kept: Option<Kept>,
    /// Parts of evidence in the store; none if they were not counted.
    parts: Option<usize>,
    /// Whether the next evidence had better come whole: what is kept of the last did not hold.
    ask_all: bool,
}

impl Known {
    fn size(&self) -> usize {
        let kept = self.kept.as_ref().map_or(0, Kept::size);
        size_of::<Self>() + self.enrolment.certificate.len() + self.state.guests.len() * 64 + kept
    }
}

/// What verifiers share over all hosts.
#[derive(Debug)]
pub struct Intake {
    hosts: Cache,
    policies: Mutex<HashMap<Sha256, Arc<Policy>>>,
    shared: Arc<Shared>,
    /// Appraisals at the same time: as many as there are processors.
    processors: Arc<Semaphore>,
}

impl Default for Intake {
    fn default() -> Self {
        Self::with_memory(cache::DEFAULT_MEMORY)
    }
}

impl Intake {
    /// Keeps at hand of hosts about so many bytes.
    #[must_use]
    pub fn with_memory(bytes: usize) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            hosts: Cache::new(bytes),
            policies: Mutex::default(),
            shared: Arc::default(),
            processors: Arc::new(Semaphore::new(processors)),
        }
    }

    /// The hosts at hand.
    #[must_use]
    pub fn hosts(&self) -> &Cache {
        &self.hosts
    }

    /// What appraisals share.
    #[must_use]
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    fn policies(&self) -> MutexGuard<'_, HashMap<Sha256, Arc<Policy>>> {
        // Every change is one insertion, or one removal.
        self.policies.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An appraisal with all that it is made against.
struct Job {
    known: Arc<Known>,
    ak: Public,
    policy: Option<(Arc<Policy>, u64)>,
    freshness: Freshness,
    now: TimeMs,
    lifetime: u64,
    facts: bool,
    shared: Arc<Shared>,
}

impl Job {
    fn context(&self) -> Context<'_> {
        Context {
            host: Some(&self.known.enrolment.id),
            ak: &self.ak,
            software_tpm: self.known.enrolment.software_tpm,
            freshness: &self.freshness,
            state: &self.known.state,
            policy: self.policy.as_ref().map(|(policy, version)| (&**policy, *version)),
            now: self.now,
            lifetime: self.lifetime,
            facts: self.facts,
            shared: &self.shared,
        }
    }
}

/// How far reading came.
enum ReadSoFar {
    /// Everything, and the head holds.
    All(Box<(Begun, Logs, Head)>),
    /// The head does not hold.
    Refused(Box<Appraisal>),
    /// It is no stream.
    Malformed(Finding),
}

/// What is to be written.
struct Written {
    verdict: Verdict,
    state: Option<HostState>,
    kept: Option<Kept>,
    facts: Option<Facts>,
    whole: Option<Received>,
    part: Option<(bool, Vec<u8>)>,
    parts: Option<usize>,
}

impl<S: EnrolStore> Verifier<S> {
    /// What a host that reports has to answer next, for so long. A challenge that is open for long enough stays so.
    ///
    /// # Errors
    /// [`Fault`].
    pub async fn expect(&self, id: &HostId, lifetime: Duration) -> Result<Expected, Fault> {
        let known = self.known(id).await?;
        let half = TimeMs(self.source.now().0.saturating_add(millis(lifetime) / 2));
        let challenge = match &known.challenge {
            Some(open) if open.expires > half => open.clone(),
            _ => self.issue(id, lifetime).await?,
        };
        Ok(Expected { challenge, have: self.have(&known).await? })
    }

    /// What a host that is asked now has to answer; `all` if nothing of it is to be left out.
    ///
    /// # Errors
    /// [`Fault`].
    pub async fn expect_now(&self, id: &HostId, all: bool, lifetime: Duration) -> Result<Expected, Fault> {
        let known = self.known(id).await?;
        let have = if all { Have::default() } else { self.have(&known).await? };
        Ok(Expected { challenge: self.issue(id, lifetime).await?, have })
    }

    /// What is there of a host's evidence in detail, for a proxy that does not know the statement.
    ///
    /// # Errors
    /// [`Fault`].
    pub async fn have_in_detail(&self, id: &HostId) -> Result<Have, Fault> {
        let known = self.known(id).await?;
        if known.ask_all {
            return Ok(Have::default());
        }
        Ok(self.kept_logs(id).await?.map(|logs| logs.have()).unwrap_or_default())
    }

    async fn issue(&self, id: &HostId, lifetime: Duration) -> Result<Challenge, StoreError> {
        challenge::issue(&self.store, &*self.source, id, millis(lifetime)).await
    }

    async fn have(&self, known: &Known) -> Result<Have, StoreError> {
        match &known.kept {
            _ if known.ask_all => Ok(Have::default()),
            Some(kept) => Ok(Have { statement: Some(*kept.statement()), ..Have::default() }),
            None => {
                let logs = self.kept_logs(&known.enrolment.id).await?;
                // What was accepted is all there, so its statement names it as well.
                let statement = known.state.accepted.as_ref().and_then(|accepted| accepted.statement);
                Ok(logs.map(|logs| Have { statement, ..logs.have() }).unwrap_or_default())
            }
        }
    }

    /// The logs that the store has of a host. What cannot be read is asked for again.
    async fn kept_logs(&self, id: &HostId) -> Result<Option<Logs>, StoreError> {
        let parts = self.store.parts(id).await?;
        if parts.is_empty() {
            return Ok(None);
        }
        let read = tokio::task::spawn_blocking(move || {
            let mut whole = Logs::default();
            for part in parts {
                let part = Received::read(&part).map_err(|finding| finding.actual.unwrap_or_default())?;
                whole.append_part(part.logs).map_err(|e| e.to_string())?;
            }
            Ok::<_, String>(whole)
        });
        match read.await {
            Ok(Ok(logs)) => Ok(Some(logs)),
            Ok(Err(why)) => {
                tracing::warn!(host = %id, "kept evidence cannot be read, so all of it is asked for: {why}");
                Ok(None)
            }
            Err(e) => Err(StoreError::Database { doing: "reading evidence", source: Box::new(e) }),
        }
    }

    /// The host as the store has it now, from what is at hand if that is as new.
    pub(crate) async fn known(&self, id: &HostId) -> Result<Arc<Known>, StoreError> {
        if let Some(known) = self.intake.hosts.get(id) {
            if self.store.version(id).await? == known.version {
                return Ok(known);
            }
            self.intake.hosts.remove(id);
        }
        let host = self.store.host(id).await?;
        let known = Arc::new(Known {
            enrolment: host.enrolment,
            policy: host.policy,
            state: host.state,
            version: host.version,
            challenge: host.challenge,
            standing: host.standing,
            joined: host.joined,
            kept: None,
            parts: None,
            ask_all: false,
        });
        Ok(known)
    }

    async fn policy_of(&self, known: &Known) -> Result<Option<(Arc<Policy>, u64)>, Fault> {
        let Some(PolicyInForce { version, digest }) = known.policy else { return Ok(None) };
        if let Some(policy) = self.intake.policies().get(&digest) {
            return Ok(Some((policy.clone(), version)));
        }
        let id = &known.enrolment.id;
        let text = self.store.policy_text(&digest).await?.ok_or_else(|| StoreError::Content {
            what: "policy",
            host: id.to_string(),
            source: format!("there is no text with the hash {digest}").into(),
        })?;
        let policy = Policy::parse(&text, &format!("policy of {id}, version {version}"));
        let policy = Arc::new(policy.map_err(|source| Fault::Policy { host: id.clone(), source })?);
        let mut policies = self.intake.policies();
        // Those that no host has any more are let go when another comes.
        policies.retain(|_, policy| Arc::strong_count(policy) > 1);
        policies.insert(digest, policy.clone());
        Ok(Some((policy, version)))
    }

    /// Takes what a host answers. `evidence` is read to its end unless its head is refused.
    ///
    /// # Errors
    /// [`Fault`]: the verifier's own; it says nothing about the host, and nothing was written.
    pub async fn take<R>(&self, id: &HostId, answer: Answer<R>, wanted: Wanted) -> Result<Outcome, Fault>
    where
        R: Read + Send + 'static,
    {
        let known = self.known(id).await?;
        let Answer { challenge, binding, certificate, evidence } = answer;
        if known.standing != Standing::Enrolled {
            let finding = Finding::new(Code::HostWithdrawn, id.as_str()).actual(known.standing);
            return self.refuse(&known, finding, &challenge, wanted).await;
        }
        let ak = Public::parse(&known.enrolment.ak).map_err(|source| Fault::Key { host: id.clone(), source })?;
        if let Some(shown) = &certificate
            && let Some(finding) = self.certificate_defect(id, &ak, shown).await?
        {
            return self.refuse(&known, finding, &challenge, wanted).await;
        }
        let job = Arc::new(Job {
            policy: self.policy_of(&known).await?,
            ak,
            freshness: Freshness::Asked {
                nonce: challenge.nonce.clone(),
                binding,
                expires: challenge.expires,
                unused: true,
                claimed_was_answered: false,
            },
            now: self.source.now(),
            lifetime: millis(self.times.verdict),
            facts: wanted.facts,
            shared: self.intake.shared.clone(),
            known: known.clone(),
        });
        let (begun, logs, head) = match blocking(id, {
            let job = job.clone();
            move || read(evidence, &job)
        })
        .await?
        {
            ReadSoFar::All(all) => *all,
            ReadSoFar::Malformed(finding) => return self.refuse(&known, finding, &challenge, wanted).await,
            ReadSoFar::Refused(appraisal) => {
                let mut verdict = appraisal.verdict;
                self.name_reuse(id, &mut verdict).await?;
                let written = Written::failed(verdict);
                return self.write(&known, written, &challenge, wanted).await;
            }
        };
        let Some(written) = self.appraise(&known, &job, begun, logs, head, wanted).await? else {
            // What it goes on from is not there any more.
            let nothing = Known { kept: None, ask_all: true, ..Known::clone(&known) };
            self.intake.hosts.put(id.clone(), Arc::new(nothing));
            let lifetime = wanted.next.unwrap_or(self.times.challenge);
            return Ok(Outcome::Again(Box::new(self.expect_now(id, false, lifetime).await?)));
        };
        self.write(&known, written, &challenge, wanted).await
    }

    /// The appraisal, from what is kept or from the start; none if the logs go on from what is not there.
    #[allow(clippy::too_many_arguments, reason = "one call, of one function that was cut in two")]
    async fn appraise(
        &self,
        known: &Arc<Known>,
        job: &Arc<Job>,
        begun: Begun,
        logs: Logs,
        head: Head,
        wanted: Wanted,
    ) -> Result<Option<Written>, Fault> {
        let id = &known.enrolment.id;
        let permit = self.intake.processors.clone().acquire_owned().await;
        let full = known.parts.is_none_or(|parts| parts >= MAX_PARTS);
        let mut logs = Arc::new(logs);
        let begun = Arc::new(begun);
        if known.kept.is_some() && !full && !wanted.evidence {
            let (job, begun, logs) = (job.clone(), begun.clone(), logs.clone());
            let went_on = blocking(id, move || {
                let Some(kept) = &job.known.kept else { return Err(WholeNeeded) };
                let appraisal = appraise::go_on(&begun, kept, &logs, &job.context())?;
                let part =
                    (appraisal.state.is_some()).then(|| logs.news().map(|news| news.to_part())).flatten().transpose();
                Ok((appraisal, part))
            });
            match went_on.await? {
                // What a list is that was not as recorded has to be looked at from its start.
                Ok((appraisal, part)) if appraisal.state.is_none() || appraisal.kept.is_some() => {
                    let part = part.map_err(Fault::Compress)?.map(|bytes| (false, bytes));
                    let parts = known.parts.map(|parts| parts + usize::from(part.is_some()));
                    return Ok(Some(Written::new(appraisal, part, parts)));
                }
                _ => {}
            }
        }
        let mut with_parts = false;
        if !logs.are_whole() {
            let before = if known.ask_all { None } else { self.kept_logs(id).await? };
            let joined = before.and_then(|mut before| {
                let logs = Arc::unwrap_or_clone(std::mem::take(&mut logs));
                before.append(logs).ok().map(|()| before)
            });
            match joined {
                Some(joined) => {
                    with_parts = true;
                    logs = Arc::new(joined);
                }
                // The host has dropped the beginning of its log, and it is not here either.
                None if logs.records.first > 0 && logs.begin() => {}
                None if known.ask_all => {
                    let finding = appraise::malformed(&"a log does not begin at its start");
                    return Ok(Some(Written::failed(self.without_evidence(known, finding).await?)));
                }
                None => return Ok(None),
            }
        }
        let job = job.clone();
        let written = blocking(id, move || {
            let appraisal = appraise::finish(Begun::clone(&begun), &logs, &job.context());
            let part = appraisal.state.is_some().then(|| logs.to_part()).transpose()?;
            let mut written = Written::new(appraisal, part.map(|bytes| (true, bytes)), Some(1));
            written.whole = wanted.evidence.then(|| Received { head, logs: Arc::unwrap_or_clone(logs) });
            Ok(written)
        });
        let written = written.await?.map_err(Fault::Compress)?;
        drop(permit);
        // Whether it is the host or our copy that is wrong is seen when all of it comes from the host.
        Ok(Some(written).filter(|written| written.state.is_some() || !with_parts || known.ask_all))
    }

    /// A verdict without evidence that could be looked at.
    async fn refuse(
        &self,
        known: &Arc<Known>,
        finding: Finding,
        challenge: &Challenge,
        wanted: Wanted,
    ) -> Result<Outcome, Fault> {
        let verdict = self.without_evidence(known, finding).await?;
        self.write(known, Written::failed(verdict), challenge, wanted).await
    }

    pub(crate) async fn without_evidence(&self, known: &Known, finding: Finding) -> Result<Verdict, StoreError> {
        let id = &known.enrolment.id;
        let last = self.store.host(id).await?.verdict;
        let mut verdict = Verdict::without_evidence(id.clone(), finding, last.as_ref(), self.source.now());
        verdict.host.software_tpm = known.enrolment.software_tpm;
        Ok(verdict)
    }

    /// Writes a verdict that no evidence led to. Tells whether the host was still as it was known.
    pub(crate) async fn keep_verdict(&self, known: &Known, verdict: &Verdict) -> Result<bool, StoreError> {
        let id = &known.enrolment.id;
        let taken = crate::store::Taken {
            host: id,
            version: known.version,
            nonce: None,
            now: self.source.now(),
            verdict,
            state: None,
            trees: false,
            part: None,
            next: None,
        };
        let Take::Kept(version) = self.store.take(taken).await? else {
            self.intake.hosts.remove(id);
            return Ok(false);
        };
        if known.kept.is_some() {
            self.intake.hosts.put(id.clone(), Arc::new(Known { version, ..known.clone() }));
        }
        Ok(true)
    }

    /// Evidence for another nonce may be old evidence.
    async fn name_reuse(&self, id: &HostId, verdict: &mut Verdict) -> Result<(), StoreError> {
        for finding in verdict.host.findings.iter_mut().filter(|finding| finding.code == Code::NonceOther) {
            let claimed = finding.actual.as_deref().and_then(|claimed| hex::decode(claimed).ok());
            if let Some(claimed) = claimed
                && self.store.was_answered(id, &claimed).await?
            {
                finding.code = Code::NonceReused;
            }
        }
        Ok(())
    }

    /// Writes what came of an answer, and only then keeps it at hand.
    async fn write(
        &self,
        known: &Arc<Known>,
        written: Written,
        challenge: &Challenge,
        wanted: Wanted,
    ) -> Result<Outcome, Fault> {
        let id = &known.enrolment.id;
        let Written { mut verdict, mut state, mut kept, mut facts, whole, mut part, parts } = written;
        verdict.way = wanted.way;
        let next = wanted.next.map(|lifetime| challenge::make(&*self.source, millis(lifetime)));
        let mut nonce = Some(&challenge.nonce);
        let version = loop {
            let taken = crate::store::Taken {
                host: id,
                version: known.version,
                nonce,
                now: self.source.now(),
                verdict: &verdict,
                state: state.as_ref(),
                trees: state.as_ref().is_some_and(|state| !state.same_trees(&known.state)),
                part: part.as_ref().map(|(whole, bytes)| if *whole { Part::Whole(bytes) } else { Part::More(bytes) }),
                next: next.as_ref(),
            };
            match self.store.take(taken).await? {
                Take::Kept(version) => break version,
                Take::Moved => {
                    self.intake.hosts.remove(id);
                    let lifetime = wanted.next.unwrap_or(self.times.challenge);
                    return Ok(Outcome::Again(Box::new(self.expect_now(id, false, lifetime).await?)));
                }
                // The challenge is not open any more: whatever the evidence shows, it may be a copy.
                Take::Nonce(used) => {
                    let code = if used == NonceUse::Answered { Code::NonceReused } else { Code::NonceOther };
                    let finding = Finding::new(code, "nonce").actual(&challenge.nonce);
                    verdict = self.without_evidence(known, finding).await?;
                    verdict.way = wanted.way;
                    (state, kept, facts, part, nonce) = (None, None, None, None, None);
                }
            }
        };
        let accepted = state.is_some();
        let mut renewed = Known::clone(known);
        renewed.version = version;
        if next.is_some() || known.challenge.as_ref().is_some_and(|open| open.nonce == challenge.nonce) {
            renewed.challenge = next.clone();
        }
        if let Some(state) = state {
            renewed.ask_all = kept.is_none();
            (renewed.state, renewed.kept, renewed.parts) = (state, kept, parts);
        }
        let have = match next {
            Some(_) => self.have(&renewed).await?,
            None => Have::default(),
        };
        self.intake.hosts.put(id.clone(), Arc::new(renewed));
        let next = next.map(|challenge| Expected { challenge, have });
        Ok(Outcome::Taken(Box::new(Taken { verdict, accepted, next, facts, whole })))
    }

    /// Why the certificate that a proxy showed does not count, although our authority issued it to this name.
    async fn certificate_defect(&self, id: &HostId, ak: &Public, shown: &[u8]) -> Result<Option<Finding>, StoreError> {
        let known = match serial(shown) {
            Some(serial) => self.store.certificate(&serial).await?,
            None => None,
        };
        let why = match known {
            None => "it is not known here",
            Some(known) if known.revoked => "it was taken back",
            Some(known) if known.host != *id => "it is another host's",
            Some(known) if known.ak != ak.name() => "it belongs to another attestation key",
            Some(_) => return Ok(None),
        };
        Ok(Some(Finding::new(Code::CertificateRevoked, "certificate").actual(why)))
    }
}

impl<S: EnrolStore> Appraiser for Verifier<S> {
    async fn expect(&self, id: &HostId, now: bool, lifetime: Duration) -> Result<Expected, Fault> {
        match now {
            // Evidence that was made before somebody asked is none for them.
            true => self.expect_now(id, false, lifetime).await,
            false => Self::expect(self, id, lifetime).await,
        }
    }

    async fn details(&self, id: &HostId) -> Result<Have, Fault> {
        self.have_in_detail(id).await
    }

    async fn take(&self, id: &HostId, answer: Answer<Cursor<Vec<u8>>>, lifetime: Duration) -> Result<Outcome, Fault> {
        let wanted = Wanted { next: Some(lifetime), way: Way::Reported, ..Wanted::default() };
        Self::take(self, id, answer, wanted).await
    }
}

impl Written {
    fn new(appraisal: Appraisal, part: Option<(bool, Vec<u8>)>, parts: Option<usize>) -> Self {
        let Appraisal { verdict, state, kept, facts } = appraisal;
        Self { verdict, state, kept, facts, whole: None, part, parts }
    }

    fn failed(verdict: Verdict) -> Self {
        Self { verdict, state: None, kept: None, facts: None, whole: None, part: None, parts: None }
    }
}

/// Reads a stream; what is behind its head only if that holds.
fn read(evidence: impl Read, job: &Job) -> ReadSoFar {
    let reader = match Reader::open(evidence) {
        Ok(reader) => reader,
        Err(e) => return ReadSoFar::Malformed(appraise::malformed(&e)),
    };
    let head = reader.head().clone();
    let begun = match appraise::begin(head.clone(), &job.context()) {
        Ok(begun) => begun,
        Err(refused) => return ReadSoFar::Refused(refused),
    };
    match Logs::collect(reader) {
        Ok(logs) => ReadSoFar::All(Box::new((begun, logs, head))),
        Err(e) => ReadSoFar::Malformed(appraise::malformed(&e)),
    }
}

/// Runs what takes a processor, or waits for a peer, where nobody else waits for it.
async fn blocking<T: Send + 'static>(id: &HostId, run: impl FnOnce() -> T + Send + 'static) -> Result<T, Fault> {
    tokio::task::spawn_blocking(run).await.map_err(|source| Fault::Appraisal { host: id.clone(), source })
}
