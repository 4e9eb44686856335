//! One attestation of one host: challenge, ask, appraise, keep.
//!
//! The challenge is written down before it is sent and marked as answered before it is appraised. The verdict is
//! written together with the state that it was made against; when another round of the same host was faster, this one
//! begins again with a new challenge, since its evidence may be older than the state.

use std::{sync::Arc, time::Duration};

use onequote_evidence::{
    id::HostId,
    stream::{Evidence, Have},
    tpm::Public,
};

use crate::{
    appraise::{Appraisal, Context, Facts, Received, appraise, freshness::Freshness},
    challenge,
    client::{self, Target},
    enrol::{EnrolError, Identity, authority::Authority, serial},
    finding::{Code, Finding},
    policy::{Policy, PolicyError},
    result::Verdict,
    source::Source,
    store::{
        Host, NonceUse, Part, StoreError, Take, Taken,
        enrol::{EnrolStore, Standing},
    },
};

/// How often a round begins again.
const ATTEMPTS: usize = 4;

/// Times of a round.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// How long a challenge may be answered.
    pub challenge: Duration,
    /// How long a verdict holds.
    pub verdict: Duration,
}

impl Default for Times {
    fn default() -> Self {
        Self { challenge: Duration::from_secs(60), verdict: Duration::from_secs(300) }
    }
}

/// The verifier at work.
pub struct Verifier<S> {
    /// Where everything is kept.
    pub store: S,
    /// Its own certificate, which proxies of hosts that were enrolled by hand know.
    pub identity: Identity,
    /// What vouches for it and for hosts that have joined; none where no host can join.
    pub authority: Option<Arc<Authority>>,
    /// Time and randomness.
    pub source: Arc<dyn Source>,
    /// How long things hold.
    pub times: Times,
}

/// What a round gave.
#[derive(Debug, Clone)]
pub struct Round {
    /// The verdict.
    pub verdict: Verdict,
    /// The whole evidence as a stream, if any came; as it came, if it cannot be read.
    pub evidence: Option<Vec<u8>>,
    /// Bytes that came over the network.
    pub received: usize,
    /// What was shown to be measured, if that was wanted and the evidence was whole.
    pub facts: Option<Facts>,
}

/// The verifier's own fault: it says nothing about the host.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The policy in force cannot be read (any more).
    #[error("the policy in force for host {host} cannot be used: put it right with policy set")]
    Policy {
        /// Of which host.
        host: HostId,
        /// Why.
        source: PolicyError,
    },
    /// The enrolled key cannot be read.
    #[error("the attestation key enrolled for host {host} cannot be read: enrol it again")]
    Key {
        /// Of which host.
        host: HostId,
        /// Why.
        source: onequote_evidence::Malformed,
    },
    /// The authority that vouches for us is gone or unusable.
    #[error("the verifier's own authority cannot be used, which host {host} joined under")]
    Authority {
        /// The host.
        host: HostId,
        /// Why.
        source: Option<EnrolError>,
    },
    /// What was received cannot be kept.
    #[error("evidence cannot be compressed")]
    Compress(#[source] std::io::Error),
    /// Others were always faster.
    #[error("host {0} is attested by too many at once; try again")]
    Busy(HostId),
}

impl<S: EnrolStore> Verifier<S> {
    /// Attests a host.
    ///
    /// # Errors
    /// [`Fault`]. That the host is unreachable or untrusted is no error: the verdict says so.
    pub async fn attest(&self, id: &HostId) -> Result<Round, Fault> {
        self.run(id, false).await
    }

    /// Attests a host and keeps what was shown to be measured in the result: for proposing a policy.
    ///
    /// # Errors
    /// [`Fault`].
    pub async fn attest_for_facts(&self, id: &HostId) -> Result<Round, Fault> {
        self.run(id, true).await
    }

    async fn run(&self, id: &HostId, facts: bool) -> Result<Round, Fault> {
        for _ in 0..ATTEMPTS {
            let host = self.store.host(id).await?;
            let Some(round) = self.try_attest(&host, facts).await? else { continue };
            return Ok(round);
        }
        Err(Fault::Busy(id.clone()))
    }

    /// One attempt; none when the host's state was renewed meanwhile.
    async fn try_attest(&self, host: &Host, facts: bool) -> Result<Option<Round>, Fault> {
        let enrolled = &host.enrolment;
        let id = &enrolled.id;
        if host.standing != Standing::Enrolled {
            let finding = Finding::new(Code::HostWithdrawn, id.as_str()).actual(host.standing);
            let round = self.without_evidence(host, finding, None);
            return Ok(self.keep(host, round, None).await?);
        }
        let ak = Public::parse(&enrolled.ak).map_err(|source| Fault::Key { host: id.clone(), source })?;
        let policy = self.policy(host).await?;
        let issued = self.issued_identity(host)?;
        let lifetime = millis(self.times.challenge);
        let challenge = challenge::issue(&self.store, &*self.source, id, lifetime).await?;
        let target = Target { host: id, url: &enrolled.url, certificate: &enrolled.certificate };
        let identity = issued.as_deref().unwrap_or(&self.identity);
        let before = self.before(id).await?;
        let have = before.as_ref().map(Have::of).unwrap_or_default();
        let answer = client::ask(target, identity, &challenge.nonce, &have, self.times.challenge).await;
        let answer = match answer {
            Ok(answer) => answer,
            Err(e) => {
                let round = self.without_evidence(host, e.finding(&enrolled.url), None);
                return Ok(self.keep(host, round, None).await?);
            }
        };
        if issued.is_some()
            && let Some(finding) = self.certificate_defect(id, &ak, &answer.certificate).await?
        {
            let round = self.without_evidence(host, finding, Some(answer.evidence));
            return Ok(self.keep(host, round, None).await?);
        }
        let size = answer.evidence.len();
        let received = match &before {
            Some(before) => Received::read_onto(&answer.evidence, before),
            None => Received::read(&answer.evidence),
        };
        let received = match received {
            Ok(received) => received,
            Err(finding) => {
                let round = self.without_evidence(host, finding, Some(answer.evidence));
                return Ok(self.keep(host, round, None).await?);
            }
        };
        let now = self.source.now();
        let claimed = &received.evidence().head.nonce.0;
        let claimed_was_answered = self.store.was_answered(id, claimed).await?;
        let unused = self.store.answer(&challenge.nonce, id, now).await? == NonceUse::Fresh;
        let freshness = Freshness::Asked {
            nonce: challenge.nonce,
            binding: answer.binding,
            expires: challenge.expires,
            unused,
            claimed_was_answered,
        };
        let context = Context {
            host: Some(id),
            ak: &ak,
            software_tpm: enrolled.software_tpm,
            freshness: &freshness,
            state: &host.state,
            policy: policy.as_ref().map(|(policy, version)| (policy, *version)),
            now,
            lifetime: millis(self.times.verdict),
            facts,
        };
        let Appraisal { verdict, state, facts } = appraise(&received, &context);
        let evidence = match before {
            // As it came it is of use only to who has what came before.
            Some(_) => received.evidence().to_bytes().map_err(Fault::Compress)?,
            None => answer.evidence,
        };
        let round = Round { verdict, evidence: Some(evidence), received: size, facts };
        Ok(self.keep(host, round, state).await?)
    }

    /// The last evidence that was accepted of a host. What cannot be read is asked for again.
    async fn before(&self, id: &HostId) -> Result<Option<Evidence>, StoreError> {
        let parts = self.store.parts(id).await?;
        let [kept] = parts.as_slice() else { return Ok(None) };
        match Received::read(kept) {
            Ok(received) => Ok(Some(received.into_evidence())),
            Err(finding) => {
                tracing::warn!(host = %id, "kept evidence cannot be read, so all of it is asked for: {:?}", finding.actual);
                Ok(None)
            }
        }
    }

    /// The certificate by which a host that has joined knows us.
    fn issued_identity(&self, host: &Host) -> Result<Option<Arc<Identity>>, Fault> {
        if !host.joined.issued {
            return Ok(None);
        }
        let fault = |source| Fault::Authority { host: host.enrolment.id.clone(), source };
        let authority = self.authority.as_ref().ok_or_else(|| fault(None))?;
        authority.identity().map(Some).map_err(|e| fault(Some(e)))
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

    async fn policy(&self, host: &Host) -> Result<Option<(Policy, u64)>, Fault> {
        let Some((version, text)) = self.store.policy(host).await? else { return Ok(None) };
        let id = &host.enrolment.id;
        let policy = Policy::parse(&text, &format!("policy of {id}, version {version}"));
        let policy = policy.map_err(|source| Fault::Policy { host: id.clone(), source })?;
        Ok(Some((policy, version)))
    }

    fn without_evidence(&self, host: &Host, finding: Finding, evidence: Option<Vec<u8>>) -> Round {
        let last = host.verdict.as_ref();
        let mut verdict = Verdict::without_evidence(host.enrolment.id.clone(), finding, last, self.source.now());
        verdict.host.software_tpm = host.enrolment.software_tpm;
        Round { verdict, received: evidence.as_ref().map_or(0, Vec::len), evidence, facts: None }
    }

    async fn keep(
        &self,
        host: &Host,
        round: Round,
        state: Option<crate::appraise::state::HostState>,
    ) -> Result<Option<Round>, StoreError> {
        let taken = Taken {
            host: &host.enrolment.id,
            version: host.version,
            nonce: None,
            now: self.source.now(),
            verdict: &round.verdict,
            state: state.as_ref(),
            trees: state.as_ref().is_some_and(|state| !state.same_trees(&host.state)),
            part: round.evidence.as_deref().filter(|_| state.is_some()).map(Part::Whole),
            next: None,
        };
        Ok(matches!(self.store.take(taken).await?, Take::Kept(_)).then_some(round))
    }
}

/// The verdict that shows a fault of the verifier itself.
#[must_use]
pub fn faulty(id: &HostId, fault: &Fault, last: Option<&Verdict>, source: &dyn Source) -> Verdict {
    let mut text = fault.to_string();
    let mut cause = std::error::Error::source(fault);
    while let Some(e) = cause {
        text = format!("{text}: {e}");
        cause = e.source();
    }
    Verdict::without_evidence(
        id.clone(),
        Finding::new(Code::VerifierFault, "verifier").actual(text),
        last,
        source.now(),
    )
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
