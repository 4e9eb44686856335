//! One attestation of one host that is asked: challenge, ask, take.
//!
//! The challenge is written down before it is sent. What comes back goes the way of all evidence ([`crate::intake`]); when
//! that says that it says nothing, since another round of the same host was faster, this one begins again with a new
//! challenge.

use std::{io::Cursor, sync::Arc, time::Duration};

use onequote_evidence::{id::HostId, stream::Have};

use crate::{
    appraise::Facts,
    client::{self, Target},
    enrol::{EnrolError, Identity, authority::Authority},
    finding::{Code, Finding},
    intake::{Answer, Expected, Intake, Known, Outcome, Taken, Wanted},
    policy::PolicyError,
    result::Verdict,
    source::Source,
    store::{
        StoreError,
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
    /// What is at hand of hosts.
    pub intake: Intake,
}

/// What a round gave.
#[derive(Debug, Clone)]
pub struct Round {
    /// The verdict.
    pub verdict: Verdict,
    /// The whole evidence as a stream, if that was wanted and any came; as it came, if it cannot be read.
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
    /// The appraisal ended by itself.
    #[error("the appraisal of host {host} was not finished")]
    Appraisal {
        /// Of which host.
        host: HostId,
        /// Why.
        source: tokio::task::JoinError,
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
        self.run(id, Wanted::default()).await
    }

    /// Attests a host and gives its whole evidence too: for saving it.
    ///
    /// # Errors
    /// [`Fault`].
    pub async fn attest_for_evidence(&self, id: &HostId) -> Result<Round, Fault> {
        self.run(id, Wanted { evidence: true, ..Wanted::default() }).await
    }

    /// Attests a host and keeps what was shown to be measured in the result: for proposing a policy.
    ///
    /// # Errors
    /// [`Fault`].
    pub async fn attest_for_facts(&self, id: &HostId) -> Result<Round, Fault> {
        self.run(id, Wanted { facts: true, ..Wanted::default() }).await
    }

    async fn run(&self, id: &HostId, wanted: Wanted) -> Result<Round, Fault> {
        let mut all = false;
        for _ in 0..ATTEMPTS {
            match self.try_attest(id, wanted, all).await? {
                Ok(round) => return Ok(round),
                // Nothing, or what cannot be gone on from.
                Err(Again { had_nothing }) => all |= had_nothing,
            }
        }
        Err(Fault::Busy(id.clone()))
    }

    /// One attempt.
    async fn try_attest(&self, id: &HostId, wanted: Wanted, all: bool) -> Result<Result<Round, Again>, Fault> {
        let known = self.known(id).await?;
        let enrolled = &known.enrolment;
        if known.standing != Standing::Enrolled {
            let finding = Finding::new(Code::HostWithdrawn, id.as_str()).actual(known.standing);
            return self.unanswered(&known, finding).await;
        }
        let issued = self.issued_identity(&known)?;
        let expected = self.expect_now(id, all, self.times.challenge).await?;
        let target = Target { host: id, url: &enrolled.url, certificate: &enrolled.certificate };
        let identity = issued.as_deref().unwrap_or(&self.identity);
        let Expected { challenge, mut have } = expected;
        if have.statement.is_some() {
            // A proxy that does not remember the statement cannot ask back here: the details go along.
            have = Have { statement: have.statement, ..self.have_in_detail(id).await? };
        }
        let answer = client::ask(target, identity, &challenge.nonce, &have, self.times.challenge).await;
        let answer = match answer {
            Ok(answer) => answer,
            Err(e) => return self.unanswered(&known, e.finding(&enrolled.url)).await,
        };
        let received = answer.evidence.len();
        let raw = wanted.evidence.then(|| answer.evidence.clone());
        let answer = Answer {
            challenge,
            binding: answer.binding,
            certificate: issued.is_some().then_some(answer.certificate),
            evidence: Cursor::new(answer.evidence),
        };
        Ok(match self.take(id, answer, wanted).await? {
            Outcome::Again(next) => Err(Again { had_nothing: next.have == Have::default() }),
            Outcome::Taken(taken) => {
                let Taken { verdict, facts, whole, .. } = *taken;
                let whole = whole.map(|whole| whole.to_stream()).transpose().map_err(Fault::Compress)?;
                Ok(Round { verdict, evidence: whole.or(raw), received, facts })
            }
        })
    }

    /// A round without an answer.
    async fn unanswered(&self, known: &Known, finding: Finding) -> Result<Result<Round, Again>, Fault> {
        let verdict = self.without_evidence(known, finding).await?;
        let kept = self.keep_verdict(known, &verdict).await?;
        let round = Round { verdict, evidence: None, received: 0, facts: None };
        Ok(kept.then_some(round).ok_or(Again { had_nothing: false }))
    }

    /// The certificate by which a host that has joined knows us.
    fn issued_identity(&self, host: &Known) -> Result<Option<Arc<Identity>>, Fault> {
        if !host.joined.issued {
            return Ok(None);
        }
        let fault = |source| Fault::Authority { host: host.enrolment.id.clone(), source };
        let authority = self.authority.as_ref().ok_or_else(|| fault(None))?;
        authority.identity().map(Some).map_err(|e| fault(Some(e)))
    }
}

/// A round that has to begin again.
struct Again {
    /// Whether nothing that was kept is of use.
    had_nothing: bool,
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

pub(crate) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
